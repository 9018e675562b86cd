"""The best linear reconstruction from L0 fixed directions: principal components of the training stream.

One control keeps as many leading components as the trained SAEs have active latents, for each L0 of the suite; one
keeps all of them. A dictionary that explains less than `pca` at its L0 has gained nothing from being sparse.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch

from saebench.controls._control import Asked, BuiltControl, Material, Planned
from saebench.saes._dictionary import Dictionary
from saebench.saes.linear import Linear


@final
@dataclass(frozen=True)
class PCA(BuiltControl):
    kind: ClassVar = "reference"

    def plan(self, asked: Sequence[Asked]) -> list[Planned]:
        values = sorted({round(sae.l0) for sae in asked})
        return [*(Planned(f"-{k}", None, k) for k in values), Planned("-full", None, None)]

    def build(self, planned: Planned, material: Material) -> Dictionary:
        d = material.x.shape[1]
        k = d if planned.l0 is None else min(d, round(planned.l0))
        x = material.x.double()
        mean = x.mean(0)
        _, vectors = torch.linalg.eigh((x - mean).T @ (x - mean))
        leading = vectors[:, -k:].flip(1)
        sae = Linear(d, k)
        sae.W_enc.copy_(leading)
        sae.W_dec.copy_(leading.T)
        sae.b_enc.copy_(-mean @ leading)
        sae.b_dec.copy_(mean)
        return sae
