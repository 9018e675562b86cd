"""Every activation dimension is a latent and comes back unchanged: the perfect score of every fidelity metric."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch

from saebench.controls._control import Asked, BuiltControl, Material, Planned
from saebench.saes._dictionary import Dictionary
from saebench.saes.linear import Linear


@final
@dataclass(frozen=True)
class Identity(BuiltControl):
    kind: ClassVar = "reference"

    def plan(self, asked: Sequence[Asked]) -> list[Planned]:
        return [Planned("", None, None)]

    def build(self, planned: Planned, material: Material) -> Dictionary:
        d = material.x.shape[1]
        sae = Linear(d, d)
        sae.W_enc.copy_(torch.eye(d))
        sae.W_dec.copy_(torch.eye(d))
        return sae
