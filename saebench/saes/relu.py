"""ReLU SAE (Bricken et al. 2023, https://transformer-circuits.pub/2023/monosemantic-features).

z     = relu(x W_enc + b_enc)
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
class ReLU(Dictionary):
    def __init__(self, d_in: int, d_sae: int, d_out: int | None = None, skip: bool = False) -> None:
        super().__init__(d_in, d_sae, d_out, skip)
        self.b_enc = weight(d_sae)

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        return torch.addmm(self.b_enc, x, self.W_enc).relu()

    def _encode_chunk(self, x: Float[Tensor, "n d_in"]) -> SparseCode:
        pre = torch.addmm(self.b_enc, x, self.W_enc)
        rows, columns = sparse.nonzero(pre > 0)
        return sparse.from_pairs(rows, columns, pre[rows, columns], len(x))

    def fold(self, read: Scaling, predicted: Scaling) -> None:
        self._fold_encoder(read, predicted)
        self._fold_bias(self.b_enc, read, predicted)
        self._fold_decoder(read, predicted)
