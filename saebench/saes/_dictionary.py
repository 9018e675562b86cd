"""The weights, the affine decoder and the sparse code that every architecture here shares."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saebench import sparse
from saebench.types import SparseCode


class Scaling(NamedTuple):
    """Activations are trained on as (x - mean) / scale."""

    mean: Float[Tensor, " d"]
    scale: float

    def apply(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """In float32."""
        return (x.float() - self.mean) / self.scale

    def cpu(self) -> "Scaling":
        return Scaling(self.mean.cpu(), self.scale)


class Dictionary(nn.Module, ABC):
    """Subclasses are final and say one thing: how to encode. They take raw activations.

    `W_enc [d_in d_sae]`, `W_dec [d_sae d_out]`, `b_dec [d_out]`; where a transcoder has an affine path beside its
    latents, `W_skip [d_in d_out]`: whoever decodes adds `beside`, x W_skip. Those that find their codes without an
    encoder have no `W_enc`.
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        d_out: int | None = None,
        skip: bool = False,
        encoder: bool = True,
    ) -> None:
        super().__init__()
        self.d_in, self.d_sae, self.d_out = d_in, d_sae, d_in if d_out is None else d_out
        if encoder:
            self.W_enc = weight(d_in, d_sae)
        self.W_dec = weight(d_sae, self.d_out)
        self.b_dec = weight(self.d_out)
        self.W_skip = weight(d_in, self.d_out) if skip else None

    @abstractmethod
    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]: ...

    @abstractmethod
    def fold(self, read: Scaling, predicted: Scaling) -> None:
        """Turns an SAE of scaled activations into the same SAE of raw ones, in place.

        `read` is how its input was scaled, `predicted` how its target was: the same, but for transcoders. Decoder
        directions keep their length where latents have a unit, which is then that of the target.
        """

    def arguments(self) -> dict[str, Any]:
        """What builds an SAE of the same shape."""
        return {
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "d_out": self.d_out,
            "skip": self.W_skip is not None,
        }

    def decode(self, z: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_out"]:
        return z @ self.W_dec + self.b_dec

    def beside(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_out"] | None:
        """What is predicted beside the latents, where there is such."""
        return None if self.W_skip is None else x @ self.W_skip

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> SparseCode:
        chunks = sparse.token_chunks(x, self.d_sae)
        return sparse.concatenate([self._encode_chunk(chunk) for chunk in chunks])

    def _encode_chunk(self, x: Float[Tensor, "n d_in"]) -> SparseCode:
        """Of few enough tokens that their dense pre-activations may be held."""
        return sparse.from_dense(self.encode(x))

    def decode_sparse(self, code: SparseCode) -> Float[Tensor, "n d_out"]:
        return sparse.decode(code, self.W_dec) + self.b_dec

    def _fold_encoder(self, read: Scaling, predicted: Scaling) -> None:
        """Pre-activations come in units of the target."""
        self.W_enc.mul_(predicted.scale / read.scale)

    def _fold_bias(self, bias: Tensor, read: Scaling, predicted: Scaling) -> None:
        """After the encoder."""
        bias.mul_(predicted.scale).sub_(read.mean @ self.W_enc)

    def _fold_decoder(self, read: Scaling, predicted: Scaling) -> None:
        self.b_dec.mul_(predicted.scale).add_(predicted.mean)
        if self.W_skip is not None:
            self.W_skip.mul_(predicted.scale / read.scale)
            self.b_dec.sub_(read.mean @ self.W_skip)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape), requires_grad=False)
