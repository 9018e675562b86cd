"""What every export is: it writes an SAE so that another tool loads the same function."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import NamedTuple

from saebench.saes._dictionary import Dictionary
from saebench.types import Site


class Origin(NamedTuple):
    """What a checkpoint says of itself beside its weights."""

    site: Site
    """What it reads."""
    target: Site
    """What it predicts: the same site, but for transcoders."""
    model: str | None
    """The language model; None where nobody said."""


class Export(ABC):
    """One format. Subclasses are final."""

    @abstractmethod
    def write(self, sae: Dictionary, origin: Origin, folder: Path) -> None:
        """Into an empty folder. What the format cannot say is a `UserError` before anything is written.

        Weights are written in float32, as they are but for the folding that the module's docstring names.
        """
