"""Sparse coding without an encoder: the lasso over the decoder, by FISTA (Beck and Teboulle 2009,
https://doi.org/10.1137/080716542).

z = argmin 1/2 |x - b_dec - z W_dec|^2 + penalty sum_i z_i |d_i|   over z >= 0

Latents are weighted by the norm of their decoder row, so that it does not matter how a dictionary shares length between
latents and rows. With unit rows D, r = x - b_dec, L the largest eigenvalue of D^T D, z^0 = y^1 = 0 and t_1 = 1:

z^j     = relu(y^j - ((y^j D - r) D^T + penalty) / L)
t_{j+1} = (1 + sqrt(1 + 4 t_j^2)) / 2
y^{j+1} = z^j + (t_j - 1) / t_{j+1} (z^j - z^{j-1})
"""

import math
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from saebench.errors import UserError
from saebench.saes._dictionary import Scaling, weight
from saebench.saes._encoderless import Encoderless


@final
class FISTA(Encoderless):
    def __init__(self, d_in: int, d_sae: int, *, iterations: int) -> None:
        super().__init__(d_in, d_sae)
        if iterations < 1:
            raise UserError(f"iterations is {iterations}; it must be 1 or more")
        self.iterations = iterations
        self.penalty = weight(1)

    def arguments(self) -> dict[str, Any]:
        return super().arguments() | {"iterations": self.iterations}

    def fold(self, read: Scaling, predicted: Scaling) -> None:
        super().fold(read, predicted)
        self.penalty.mul_(predicted.scale)

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        rows, norms = self.directions()
        curvature = _largest_eigenvalue(rows)
        x = x - self.b_dec
        z = ahead = x.new_zeros(len(x), self.d_sae)
        t = 1.0
        for _ in range(self.iterations):
            gradient = torch.addmm(self.penalty, ahead @ rows - x, rows.T)
            after = torch.sub(ahead, gradient.div_(curvature)).relu_()
            t, before = (1 + math.sqrt(1 + 4 * t**2)) / 2, t
            ahead = torch.lerp(z, after, 1 + (before - 1) / t)
            z = after
        return z / norms


def _largest_eigenvalue(rows: Float[Tensor, "d_sae d"]) -> Float[Tensor, ""]:
    """Of D^T D, or of D D^T where that is smaller: they have the same."""
    d_sae, d = rows.shape
    gram = rows.T @ rows if d <= d_sae else rows @ rows.T
    largest: Tensor = torch.linalg.eigvalsh(gram)[-1]
    return largest.clamp_min(torch.finfo(rows.dtype).tiny)
