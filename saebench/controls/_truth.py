"""An SAE that is told the true features of what it encodes, and so needs no encoder."""

from collections.abc import Callable
from typing import NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saebench import sparse
from saebench.types import SparseCode


class Wires(NamedTuple):
    """Which latents hear which features: a wire for each such pair."""

    features: Int[Tensor, " wires"]
    latents: Int[Tensor, " wires"]
    weights: Float[Tensor, " wires"]


@final
class TrueFeatures:
    """z_j = sum_i weight_ij a_i over its wires, with a_i the true magnitude of feature i; x_hat = z W_dec + b_dec."""

    def __init__(
        self,
        W_dec: Float[Tensor, "d_sae d_in"],
        b_dec: Float[Tensor, " d_in"],
        wires: Wires,
        n_features: int,
        features_of: Callable[[Float[Tensor, "n d_in"]], SparseCode],
    ) -> None:
        """`features_of`: the features of tokens that are known; it raises `ValueError` of others."""
        self.d_sae, self.d_in = W_dec.shape
        self.W_dec, self.b_dec = W_dec, b_dec
        order = torch.argsort(wires.features, stable=True)
        features, latents, weights = (part[order] for part in wires)
        self._of_feature = sparse.from_pairs(features, latents, weights, n_features)
        self._features_of = features_of

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        return sparse.to_dense(self.encode_sparse(x), self.d_sae)

    def decode(self, z: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_in"]:
        return z @ self.W_dec + self.b_dec

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> SparseCode:
        true = self._features_of(x)
        heard = sparse.take(self._of_feature, true.indices)
        times = heard.offsets.diff()
        values = heard.values * true.values.repeat_interleave(times)
        token = sparse.rows_of(true).repeat_interleave(times)
        pairs, place = (token * self.d_sae + heard.indices).unique(return_inverse=True)
        z = values.new_zeros(len(pairs)).index_add_(0, place, values)
        return sparse.from_pairs(pairs // self.d_sae, pairs % self.d_sae, z, len(x))

    def decode_sparse(self, code: SparseCode) -> Float[Tensor, "n d_in"]:
        return sparse.decode(code, self.W_dec) + self.b_dec
