"""TopK SAE (Gao et al. 2024, https://arxiv.org/abs/2406.04093).

z     = relu(topk(x W_enc + b_enc))
x_hat = z W_dec + b_dec
"""

from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from saebench import sparse
from saebench.errors import UserError
from saebench.saes._dictionary import Dictionary, Scaling, weight
from saebench.types import SparseCode


@final
class TopK(Dictionary):
    def __init__(
        self, d_in: int, d_sae: int, d_out: int | None = None, skip: bool = False, *, k: int
    ) -> None:
        super().__init__(d_in, d_sae, d_out, skip)
        if not 0 < k <= d_sae:
            raise UserError(f"k is {k}; it must be from 1 to the width, {d_sae}")
        self.k = k
        self.b_enc = weight(d_sae)

    def arguments(self) -> dict[str, Any]:
        return super().arguments() | {"k": self.k}

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        pre = torch.addmm(self.b_enc, x, self.W_enc)
        top = pre.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter_(-1, top.indices, top.values.relu())

    def _encode_chunk(self, x: Float[Tensor, "n d_in"]) -> SparseCode:
        """Straight from the top k, without looking for them in dense codes."""
        pre = torch.addmm(self.b_enc, x, self.W_enc)
        columns = pre.topk(self.k, dim=-1, sorted=False).indices.sort(-1).values
        return sparse.from_columns(columns, pre.gather(-1, columns).relu())

    def fold(self, read: Scaling, predicted: Scaling) -> None:
        self._fold_encoder(read, predicted)
        self._fold_bias(self.b_enc, read, predicted)
        self._fold_decoder(read, predicted)
