"""A trained SAE whose probes learn from labels that were dealt out anew: what probing finds where there is nothing.

Selecting latents and regularisation among many can find something in noise; on test labels, which stay as they are, it
must be worth nothing, so that its AUC is 0.5 to within its interval. Evals without labels do not apply.

One for each width and L0: the suite's first SAE of that shape (or the first of the variant `of`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from saebench.controls._control import Asked, BuiltControl, Material, Planned, beside_parents
from saebench.saes._dictionary import Dictionary


@final
@dataclass(frozen=True)
class ShuffledLabels(BuiltControl):
    of: str | None = None
    """Variant of the parents; None takes the first in the suite."""

    shuffled: ClassVar = True

    def plan(self, asked: Sequence[Asked]) -> list[Planned]:
        return beside_parents("shuffled_labels", asked, self.of)

    def build(self, planned: Planned, material: Material) -> Dictionary:
        assert planned.parent is not None, "planned from a trained SAE"
        return material.trained(planned.parent.name)
