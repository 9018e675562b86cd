"""What every control fills in."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from saebench.saes._dictionary import Dictionary


class Asked(NamedTuple):
    """A trained SAE of the suite, as controls see it."""

    name: str
    variant: str
    width: int
    l0: float
    identity: str
    """Hash of all that determined its weights."""


class Planned(NamedTuple):
    """One control SAE that a suite gets, before it is built."""

    suffix: str
    """Added to the control's name; empty where there is just one."""
    width: int | None
    l0: float | None
    """The wanted L0 of the trained SAEs that it stands beside, where there is one."""
    parent: Asked | None = None


class Material(NamedTuple):
    """What controls are made of."""

    x: Float[Tensor, "n d_in"]
    """Activations of the training stream."""
    trained: Callable[[str], Dictionary]
    """A trained SAE by its name."""


@dataclass(frozen=True)
class Control(ABC):
    """A frozen dataclass whose fields are its parameters."""

    @abstractmethod
    def plan(self, asked: Sequence[Asked]) -> list[Planned]:
        """Which control SAEs stand beside the trained ones of a site."""

    @abstractmethod
    def build(self, planned: Planned, material: Material) -> Dictionary: ...


def shapes(asked: Sequence[Asked]) -> list[tuple[int, float]]:
    """The different (width, l0) of the trained SAEs, in their order."""
    return list(dict.fromkeys((sae.width, sae.l0) for sae in asked))
