"""What every control fills in."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor

from saebench.errors import UserError
from saebench.saes._dictionary import Dictionary
from saebench.types import SAE, Site, SparseCode, Truth


class Asked(NamedTuple):
    """A trained SAE of the suite, as controls see it."""

    name: str
    variant: str
    width: int
    l0: float
    identity: str
    """Hash of all that determined its weights."""
    site: Site
    """What it reads."""
    recipe: Any
    """Of its variant."""


class Planned(NamedTuple):
    """One control SAE that a suite gets, before it is built."""

    suffix: str
    """Added to the control's name; empty where there is just one."""
    width: int | None
    l0: float | None
    """The wanted L0 of the trained SAEs that it stands beside, where there is one."""
    parent: Asked | None = None


class Known(NamedTuple):
    """What a synthetic world lets its controls know."""

    truth: Truth
    features_of: Callable[[Float[Tensor, "n d"]], SparseCode]
    """The true features of tokens that the world has sampled, by their activations."""


class Material(NamedTuple):
    """What controls are made of."""

    x: Float[Tensor, "n d_in"]
    """Activations of the training stream."""
    trained: Callable[[str], Dictionary]
    """A trained SAE by its name."""
    known: Known | None = None
    """None where nobody knows the true features."""


@dataclass(frozen=True)
class Control(ABC):
    """A frozen dataclass whose fields are its parameters: either a `BuiltControl` or a `TrainedControl`."""

    kind: ClassVar[Literal["control", "reference"]] = "control"
    """A control knows nothing of what the model learned; a reference is there to read the others against."""
    shuffled: ClassVar[bool] = False
    """Whether evals that learn from labels get these dealt out anew; other evals have nothing to say of it."""
    untrained_lm: ClassVar[bool] = False
    """Whether the language model has its random initial weights."""
    needs_truth: ClassVar[bool] = False
    """Whether it is made of the true features, and so is possible on a synthetic world alone."""

    @abstractmethod
    def plan(self, asked: Sequence[Asked]) -> list[Planned]:
        """Which control SAEs stand beside the trained ones of a site."""


@dataclass(frozen=True)
class BuiltControl(Control):
    """Made from activations, or from a trained SAE, without training."""

    parents_codes: ClassVar[bool] = False
    """Whether its codes are those of its parent, so that evals of codes alone can say nothing of it."""

    def has_parents_codes(self, planned: Planned) -> bool:  # noqa: ARG002  (some have where others have not)
        return self.parents_codes

    @abstractmethod
    def build(self, planned: Planned, material: Material) -> SAE: ...


@dataclass(frozen=True)
class TrainedControl(Control):
    """Trained like its parent, with something taken away."""

    frozen: ClassVar[bool] = False
    """The decoder stays at its random start."""


def shapes(asked: Sequence[Asked]) -> list[tuple[int, float]]:
    """The different (width, l0) of the trained SAEs, in their order."""
    return list(dict.fromkeys((sae.width, sae.l0) for sae in asked))


def beside_parents(
    control: str, asked: Sequence[Asked], of: str | None, prefix: str = "", needs: str = ""
) -> list[Planned]:
    """One control for each (width, l0): made of the first SAE of that shape, or the first of the variant `of`.

    Raises `UserError` where there is none; `needs` tells what `asked` was chosen by.
    """
    parents = [sae for sae in asked if of in (None, sae.variant)]
    if not parents:
        raise UserError(
            f"the control {control} has no parent: it is made of a trained SAE of one site (no transcoder)"
            f"{needs}, and the suite trains none{'' if of is None else f' of the variant {of!r}'}; train one, "
            "name another variant with `of`, or drop the control"
        )
    first = {
        shape: next(p for p in parents if (p.width, p.l0) == shape) for shape in shapes(parents)
    }
    return [
        Planned(f"{prefix}-w{width}-l{l0:g}", width, l0, parent)
        for (width, l0), parent in first.items()
    ]
