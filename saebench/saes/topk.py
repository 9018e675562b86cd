"""TopK SAE (Gao et al. 2024, https://arxiv.org/abs/2406.04093).

z     = relu(topk(x W_enc + b_enc))
x_hat = z W_dec + b_dec
"""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from saebench.errors import UserError
from saebench.saes._dictionary import Dictionary, weight


@final
class TopK(Dictionary):
    def __init__(self, d_in: int, d_sae: int, *, k: int) -> None:
        super().__init__(d_in, d_sae)
        if not 0 < k <= d_sae:
            raise UserError(f"k is {k}; it must be from 1 to the width, {d_sae}")
        self.k = k
        self.b_enc = weight(d_sae)

    def arguments(self) -> dict[str, int]:
        return {"d_in": self.d_in, "d_sae": self.d_sae, "k": self.k}

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        pre = torch.addmm(self.b_enc, x, self.W_enc)
        top = pre.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter_(-1, top.indices, top.values.relu())

    def fold(self, mean: Float[Tensor, " d_in"], scale: float) -> None:
        self._fold_bias(self.b_enc, mean, scale)
        self._fold_decoder(mean, scale)
