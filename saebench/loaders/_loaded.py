"""What every loader gives."""

from typing import NamedTuple

from saebench.saes._dictionary import Dictionary
from saebench.types import Site


class Loaded(NamedTuple):
    """A checkpoint of somebody's, on raw activations."""

    sae: Dictionary
    site: Site
    """What it reads."""
    target: Site
    """What it predicts: the same site, but for transcoders."""
