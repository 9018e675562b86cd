"""A trained SAE whose decoder rows are dealt out to other latents: the same L0, densities and norms, no meaning.

One for each width and L0, made of the suite's first SAE of that shape (or the first of the variant `of`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch

from saebench.controls._control import Asked, BuiltControl, Material, Planned, beside_parents
from saebench.saes._dictionary import Dictionary


@final
@dataclass(frozen=True)
class PermutedDecoder(BuiltControl):
    of: str | None = None
    """Variant of the parents; None takes the first in the suite."""
    seed: int = 0

    parents_codes: ClassVar = True

    def plan(self, asked: Sequence[Asked]) -> list[Planned]:
        # A single row has no other latent to go to.
        several = [sae for sae in asked if sae.width > 1]
        return beside_parents(
            "permuted_decoder", several, self.of, needs=" with more than one latent"
        )

    def build(self, planned: Planned, material: Material) -> Dictionary:
        assert planned.parent is not None, "planned from a trained SAE"
        sae = material.trained(planned.parent.name)
        generator = torch.Generator().manual_seed(self.seed)
        # Each row goes to the next latent of a random round, so that none keeps its own.
        latents = torch.randperm(sae.d_sae, generator=generator)
        rows = sae.W_dec.clone()
        sae.W_dec[latents] = rows[latents.roll(1)]
        return sae
