"""Vector quantisation: one latent is active, that of the nearest of d_sae points.

z     = size at argmin_i |x - b_dec - size d_i|, else 0
x_hat = z W_dec + b_dec

There is no encoder: the point of latent i is b_dec + size d_i, and `size` is 1 but for scaled activations.
"""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from saebench.saes._dictionary import Scaling, weight
from saebench.saes._encoderless import Encoderless


@final
class Codebook(Encoderless):
    def __init__(self, d_in: int, d_sae: int) -> None:
        super().__init__(d_in, d_sae)
        self.size = weight(1)

    def fold(self, read: Scaling, predicted: Scaling) -> None:
        super().fold(read, predicted)
        self.size.mul_(predicted.scale)

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        points = self.size * self.W_dec
        # Half the squared distance, less what is the same for all points.
        nearness = torch.addmm(-points.square().sum(-1) / 2, x - self.b_dec, points.T)
        nearest = nearness.argmax(-1, keepdim=True)
        return torch.zeros_like(nearness).scatter_(-1, nearest, self.size.expand_as(nearest))
