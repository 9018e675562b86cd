"""Random directions of the same width and L0 as the trained SAEs.

pre   = (x - mean) . d_i,  z = pre where pre > threshold,  x_hat = mean + g sum_i z_i d_i

One threshold for all latents is set to the wanted L0 on the training stream, and one gain g to the least squared
error there, so that the control is as good as random directions can be made without learning any.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from saebench.controls._control import Asked, BuiltControl, Material, Planned, shapes
from saebench.saes._dictionary import Dictionary
from saebench.saes.jumprelu import JumpReLU

_TOKENS = 16_384
_PRE_ACTIVATIONS = 2**26
"""The most that are looked at together to find the threshold; wide controls look at fewer tokens."""


@final
@dataclass(frozen=True)
class Random(BuiltControl):
    seed: int = 0

    def plan(self, asked: Sequence[Asked]) -> list[Planned]:
        return [Planned(f"-w{width}-l{l0:g}", width, l0) for width, l0 in shapes(asked)]

    def build(self, planned: Planned, material: Material) -> Dictionary:
        assert planned.width is not None and planned.l0 is not None, "planned from a trained SAE"
        x = material.x[:_TOKENS]
        generator = torch.Generator().manual_seed(self.seed)
        rows = torch.randn(planned.width, x.shape[1], generator=generator).to(x.device)
        rows = torch.nn.functional.normalize(rows, dim=-1)
        mean = x.mean(0)
        sae = JumpReLU(x.shape[1], planned.width).to(x.device)
        sae.W_enc.copy_(rows.T)
        sae.W_dec.copy_(rows)
        sae.b_enc.copy_(-(rows @ mean))
        sae.b_dec.copy_(mean)
        few = x[: max(256, _PRE_ACTIVATIONS // planned.width)]
        sae.threshold.fill_(_threshold_for(sae, few, planned.l0))
        centred_hat, centred = sae.decode_sparse(sae.encode_sparse(x)) - mean, x - mean
        sae.W_dec.mul_((centred_hat * centred).sum() / centred_hat.square().sum())
        return sae.cpu()


def _threshold_for(sae: JumpReLU, x: Float[Tensor, "n d_in"], l0: float) -> float:
    """The threshold for all latents above which l0 of them are, per token of x."""
    pre = torch.addmm(sae.b_enc, x, sae.W_enc).flatten()
    active = round(l0 * len(x))
    return float(pre.kthvalue(max(1, len(pre) - active)).values)
