"""What transcoders share: they read one site and predict another, with the loss of any other variant."""

from dataclasses import dataclass
from typing import ClassVar

from saebench.variants._training import Variant


@dataclass(frozen=True, kw_only=True)
class Transcoding(Variant):
    """A recipe with another one inside; the fields that both have agree."""

    target: ClassVar = "other"

    activation: str
    """The variant whose encoder, sparsity and loss it has."""
    inner: Variant
    """That variant's recipe, filled in by the suite."""

    def __post_init__(self) -> None:
        if self.inner.target != "any":
            raise ValueError(f"activation is {self.activation}, which cannot predict another site")

    @property
    def float32(self) -> bool:
        return self.inner.float32

    def check(self, width: int, l0: float) -> None:
        self.inner.check(width, l0)
