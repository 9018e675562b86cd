"""The MLP's own basis: the neurons of its hidden layer, without any dictionary.

At `mlp_hidden` each sign of each neuron h_i is a latent, relu(h_i) and relu(-h_i), that writes along +-e_i; for each
L0 of the suite, the neurons with the largest |h_i| are kept and the others are zero. An SAE of that stream that
explains no more has found nothing that the model does not already show.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch

from saebench.controls._control import Asked, BuiltControl, Material, Planned
from saebench.saes._dictionary import Dictionary
from saebench.saes.topk import TopK


@final
@dataclass(frozen=True)
class Neurons(BuiltControl):
    kind: ClassVar = "reference"

    def plan(self, asked: Sequence[Asked]) -> list[Planned]:
        here = [sae for sae in asked if sae.site.stream == "mlp_hidden"]
        values = sorted({max(1, round(sae.l0)) for sae in here})
        return [Planned(f"-{k}", None, k) for k in values]

    def build(self, planned: Planned, material: Material) -> Dictionary:
        assert planned.l0 is not None, "planned from a trained SAE"
        return _largest(material.x.shape[1], round(planned.l0))


def _largest(d: int, k: int) -> TopK:
    """The k neurons of the largest magnitude, as they are."""
    both = torch.cat([torch.eye(d), -torch.eye(d)])
    sae = TopK(d, 2 * d, k=min(k, d))
    sae.W_enc.copy_(both.T)
    sae.W_dec.copy_(both)
    return sae
