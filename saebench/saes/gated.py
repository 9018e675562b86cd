"""Gated SAE (Rajamanoharan et al. 2024, https://arxiv.org/abs/2404.16014).

pi    = x W_enc
z     = [pi + b_gate > 0] * relu(exp(r_mag) * pi + b_mag)
x_hat = z W_dec + b_dec
"""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from saebench import sparse
from saebench.saes._dictionary import Dictionary, Scaling, weight
from saebench.types import SparseCode


@final
class Gated(Dictionary):
    def __init__(self, d_in: int, d_sae: int, d_out: int | None = None, skip: bool = False) -> None:
        super().__init__(d_in, d_sae, d_out, skip)
        self.b_gate, self.b_mag, self.r_mag = (weight(d_sae) for _ in range(3))

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        pi = x @ self.W_enc
        magnitude = (self.r_mag.exp() * pi + self.b_mag).relu()
        return torch.where(pi + self.b_gate > 0, magnitude, 0.0)

    def _encode_chunk(self, x: Float[Tensor, "n d_in"]) -> SparseCode:
        """Magnitudes are computed where the gate is open."""
        pi = x @ self.W_enc
        rows, columns = sparse.nonzero(pi + self.b_gate > 0)
        magnitude = self.r_mag.exp()[columns] * pi[rows, columns] + self.b_mag[columns]
        return sparse.from_pairs(rows, columns, magnitude.relu(), len(x))

    def fold(self, read: Scaling, predicted: Scaling) -> None:
        self._fold_encoder(read, predicted)
        self._fold_bias(self.b_gate, read, predicted)
        self.b_mag.mul_(predicted.scale).sub_(self.r_mag.exp() * (read.mean @ self.W_enc))
        self._fold_decoder(read, predicted)
