"""GroupMax SAE, of EleutherAI's sparsify (https://github.com/EleutherAI/sparsify): one latent of each group is active.

pre   = x W_enc + b_enc
z_i   = relu(pre_i) where i is the largest of its group, else 0       groups: k runs of d_sae / k consecutive latents
x_hat = z W_dec + b_dec
"""

from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saebench import sparse
from saebench.errors import UserError
from saebench.saes._dictionary import Dictionary, Scaling, weight
from saebench.types import SparseCode


@final
class GroupMax(Dictionary):
    def __init__(
        self, d_in: int, d_sae: int, d_out: int | None = None, skip: bool = False, *, k: int
    ) -> None:
        super().__init__(d_in, d_sae, d_out, skip)
        if not 0 < k <= d_sae or d_sae % k:
            raise UserError(f"k is {k}; it must divide the width, {d_sae}, into groups of one size")
        self.k = k
        self.b_enc = weight(d_sae)

    def arguments(self) -> dict[str, Any]:
        return super().arguments() | {"k": self.k}

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        columns, values = self._largest(x)
        return values.new_zeros(len(x), self.d_sae).scatter_(-1, columns, values)

    def _encode_chunk(self, x: Float[Tensor, "n d_in"]) -> SparseCode:
        """Groups are in ascending order, and so are the largest of each."""
        return sparse.from_columns(*self._largest(x))

    def _largest(
        self, x: Float[Tensor, "n d_in"]
    ) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
        """Which latent of each group it is, and its value."""
        pre = torch.addmm(self.b_enc, x, self.W_enc)
        top = pre.unflatten(-1, (self.k, self.d_sae // self.k)).max(-1)
        first = torch.arange(0, self.d_sae, self.d_sae // self.k, device=pre.device)
        return first + top.indices, top.values.relu()

    def fold(self, read: Scaling, predicted: Scaling) -> None:
        self._fold_encoder(read, predicted)
        self._fold_bias(self.b_enc, read, predicted)
        self._fold_decoder(read, predicted)
