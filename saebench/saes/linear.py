"""A linear autoencoder, for controls: z = x W_enc + b_enc, x_hat = z W_dec + b_dec. Every latent is active."""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from saebench.saes._dictionary import Dictionary, weight


@final
class Linear(Dictionary):
    def __init__(self, d_in: int, d_sae: int) -> None:
        super().__init__(d_in, d_sae)
        self.b_enc = weight(d_sae)

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        return torch.addmm(self.b_enc, x, self.W_enc)

    def fold(self, mean: Float[Tensor, " d_in"], scale: float) -> None:
        self._fold_bias(self.b_enc, mean, scale)
        self._fold_decoder(mean, scale)
