"""The weights, the affine decoder and the sparse code that every architecture here shares."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saebench import sparse
from saebench.types import SparseCode


class Dictionary(nn.Module, ABC):
    """Subclasses are final and say one thing: how to encode. They take raw activations.

    `W_enc [d_in d_sae]`, `W_dec [d_sae d_out]`, `b_dec [d_out]`.
    """

    def __init__(self, d_in: int, d_sae: int) -> None:
        super().__init__()
        self.d_in, self.d_sae = d_in, d_sae
        self.W_enc = weight(d_in, d_sae)
        self.W_dec = weight(d_sae, d_in)
        self.b_dec = weight(d_in)

    @abstractmethod
    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]: ...

    @abstractmethod
    def fold(self, mean: Float[Tensor, " d_in"], scale: float) -> None:
        """Turns an SAE of (x - mean) / scale into the same SAE of x, in place; latents come in units of x."""

    def arguments(self) -> dict[str, int]:
        """What builds an SAE of the same shape."""
        return {"d_in": self.d_in, "d_sae": self.d_sae}

    def decode(self, z: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_out"]:
        return z @ self.W_dec + self.b_dec

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> SparseCode:
        chunks = sparse.token_chunks(x, self.d_sae)
        return sparse.concatenate([sparse.from_dense(self.encode(chunk)) for chunk in chunks])

    def decode_sparse(self, code: SparseCode) -> Float[Tensor, "n d_out"]:
        return sparse.decode(code, self.W_dec) + self.b_dec

    def _fold_decoder(self, mean: Tensor, scale: float) -> None:
        self.b_dec.mul_(scale).add_(mean)

    def _fold_bias(self, bias: Tensor, mean: Tensor, scale: float) -> None:
        bias.mul_(scale).sub_(mean @ self.W_enc)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape), requires_grad=False)
