"""A linear autoencoder, for controls: z = x W_enc + b_enc, x_hat = z W_dec + b_dec. Every latent is active."""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from saebench.saes._dictionary import Dictionary, Scaling, weight


@final
class Linear(Dictionary):
    def __init__(self, d_in: int, d_sae: int, d_out: int | None = None, skip: bool = False) -> None:
        super().__init__(d_in, d_sae, d_out, skip)
        self.b_enc = weight(d_sae)

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        return torch.addmm(self.b_enc, x, self.W_enc)

    def fold(self, read: Scaling, predicted: Scaling) -> None:
        self._fold_encoder(read, predicted)
        self._fold_bias(self.b_enc, read, predicted)
        self._fold_decoder(read, predicted)
