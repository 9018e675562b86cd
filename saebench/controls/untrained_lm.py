"""The same recipe on the same architecture with random weights: there is nothing learned that could be found.

Both the SAE and its scores belong to the language model as it was before training, on the same text. Heap et al. 2025
(https://arxiv.org/abs/2501.17727) found that automated interpretability hardly tells such SAEs from others: what they
reach, a metric gives for the statistics of the text and the architecture alone.

One for each width and L0, with the recipe of the suite's first SAE of that shape (or the first of the variant `of`)
that needs no trained model and no other SAE.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from saebench.controls._control import Asked, Planned, TrainedControl, beside_parents


@final
@dataclass(frozen=True)
class UntrainedLM(TrainedControl):
    of: str | None = None
    """Variant of the parents; None takes the first in the suite."""

    untrained_lm: ClassVar = True

    def plan(self, asked: Sequence[Asked]) -> list[Planned]:
        alone = [sae for sae in asked if not (sae.recipe.from_parent or sae.recipe.end_to_end)]
        return beside_parents(
            "untrained_lm", alone, self.of, needs=" that learns from activations alone"
        )
