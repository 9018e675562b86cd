"""Autoencoder of units that saturate, with the threshold that says which of them are active.

a     = x W_enc + b_enc
z_i   = size_i act(a_i / size_i) where that is above threshold_i, else 0        act: sigmoid or tanh
x_hat = z W_dec + b_dec

Classic hidden units (Ng 2011, CS294A lecture notes) are never exactly zero; here only what is active is decoded. `size`
is the value at which a unit saturates: it gives latents the unit of x, as those of other architectures have.
"""

from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from saebench.errors import UserError
from saebench.saes._dictionary import Dictionary, Scaling, weight

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


@final
class Saturating(Dictionary):
    def __init__(
        self,
        d_in: int,
        d_sae: int,
        d_out: int | None = None,
        skip: bool = False,
        *,
        activation: str,
    ) -> None:
        super().__init__(d_in, d_sae, d_out, skip)
        if activation not in _ACTIVATIONS:
            raise UserError(
                f"activation is {activation!r}; expected one of {', '.join(_ACTIVATIONS)}"
            )
        self.activation = activation
        self.b_enc, self.size, self.threshold = (weight(d_sae) for _ in range(3))

    def arguments(self) -> dict[str, Any]:
        return super().arguments() | {"activation": self.activation}

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        a = torch.addmm(self.b_enc, x, self.W_enc)
        z = self.size * _ACTIVATIONS[self.activation](a / self.size)
        return torch.where(z > self.threshold, z, 0.0)

    def fold(self, read: Scaling, predicted: Scaling) -> None:
        self._fold_encoder(read, predicted)
        self._fold_bias(self.b_enc, read, predicted)
        self._fold_decoder(read, predicted)
        self.size.mul_(predicted.scale)
        self.threshold.mul_(predicted.scale)
