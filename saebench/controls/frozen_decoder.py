"""A trained SAE whose decoder never left its random start: encoder, biases and thresholds are learned around it.

Korznikov et al. 2026 (https://arxiv.org/abs/2602.14111) found that such SAEs come close to fully trained ones on
several standard metrics: what they reach, a metric gives for learning to read random directions.

One for each width and L0, with the recipe of the suite's first SAE of that shape (or the first of the variant `of`)
that has a decoder of its own. Recipes that keep the largest latents make it harder to beat than L1 penalties do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from saebench.controls._control import Asked, Planned, TrainedControl, beside_parents


@final
@dataclass(frozen=True)
class FrozenDecoder(TrainedControl):
    of: str | None = None
    """Variant of the parents; None takes the first in the suite."""

    frozen: ClassVar = True

    def plan(self, asked: Sequence[Asked]) -> list[Planned]:
        separate = [sae for sae in asked if sae.recipe.own_decoder]
        return beside_parents(
            "frozen_decoder", separate, self.of, needs=" with a decoder of its own"
        )
