"""An SAE of activations that are normalised token by token, with the normalisation undone.

s, m  = scale and shift of a token:   layer norm   m = mean of its d entries, s = their standard deviation + eps
                                      length       m = 0, s = |x| / sqrt(d)
                                      rms          m = 0, s = sqrt(mean of x^2 + eps)
f     = inner.encode((x - m) / s)
z     = s f, x_hat = z W_dec + beside(x),  beside(x) = s (b_dec + (x - m)/s W_skip) + m        where it is undone
z     = f, x_hat = z W_dec + beside(x),    beside(x) = b_dec + (x - m)/s W_skip                where it is not

So latents come in the unit of what is predicted, and which of them are active is as the inner SAE says. What follows
from x alone, beside the latents, is `beside`.
"""

from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saebench import sparse
from saebench.saes._dictionary import Dictionary
from saebench.types import SparseCode

Norm = Literal["layer", "length", "rms"]


@final
class Normalized(nn.Module):
    """Not trained here, and found in others' checkpoints alone.

    `undone` says whether the output is taken back to the unit of the input, as it is for all but transcoders that
    predict raw activations.
    """

    def __init__(self, inner: Dictionary, norm: Norm, eps: float, undone: bool) -> None:
        super().__init__()
        self.inner, self.norm, self.eps, self.undone = inner, norm, eps, undone
        self.d_in, self.d_sae, self.d_out = inner.d_in, inner.d_sae, inner.d_out

    def arguments(self) -> dict[str, Any]:
        """What tells it from another of the same weights."""
        mine = {"norm": self.norm, "eps": self.eps, "undone": self.undone}
        return mine | {"inner": self.inner.arguments(), "architecture": type(self.inner).__name__}

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        return self.inner.W_enc

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_out"]:
        return self.inner.W_dec

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        mean, scale = self._moments(x)
        return self.inner.encode((x - mean) / scale) * self._unit(scale)

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> SparseCode:
        mean, scale = self._moments(x)
        code = self.inner.encode_sparse((x - mean) / scale)
        unit = self._unit(scale).squeeze(-1).repeat_interleave(code.offsets.diff())
        return code._replace(values=code.values * unit)

    def decode(self, z: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_out"]:
        return z @ self.inner.W_dec

    def decode_sparse(self, code: SparseCode) -> Float[Tensor, "n d_out"]:
        return sparse.decode(code, self.inner.W_dec)

    def beside(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_out"]:
        mean, scale = self._moments(x)
        constant = self.inner.b_dec.expand(len(x), -1)
        skip = self.inner.W_skip
        if skip is not None:
            constant = torch.addmm(constant, (x - mean) / scale, skip)
        return constant * scale + mean if self.undone else constant

    def _unit(self, scale: Float[Tensor, "n 1"]) -> Float[Tensor, "n 1"]:
        return scale if self.undone else torch.ones_like(scale)

    def _moments(
        self, x: Float[Tensor, "n d_in"]
    ) -> tuple[Float[Tensor, "n 1"], Float[Tensor, "n 1"]]:
        """Shift and scale."""
        nothing = x.new_zeros(len(x), 1)
        if self.norm == "layer":
            mean = x.mean(-1, keepdim=True)
            variance = (x - mean).square().sum(-1, keepdim=True) / max(1, self.d_in - 1)
            return mean, variance.sqrt() + self.eps
        square = x.square().mean(-1, keepdim=True)
        if self.norm == "rms":
            return nothing, (square + self.eps).sqrt()
        return nothing, square.sqrt().clamp_min(
            torch.finfo(x.dtype).tiny
        )  # a token of zeros stays one
