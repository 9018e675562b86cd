"""Independent components of the training stream (Hyvarinen and Oja 2000, https://doi.org/10.1016/S0893-6080(00)00026-5).

s = (x - mean) W^T has independent entries as nearly as FastICA can make them; x = mean + s A^T. Each sign of each is a
latent, relu(s_i |a_i|) and relu(-s_i |a_i|), that writes along the unit vector +-a_i / |a_i|. For each L0 of the
suite, the latents with the largest values are kept: `pca` chooses its directions once, `ica` for every token.
"""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float
from sklearn.decomposition import FastICA
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from saebench.controls._control import Asked, BuiltControl, Material, Planned
from saebench.progress import say
from saebench.saes._dictionary import Dictionary
from saebench.saes.topk import TopK

_TOKENS = 16_384
_RANK = 1e-10
"""Share of the largest variance below which a direction is none: nothing can be whitened there."""


class _Sources(NamedTuple):
    """x = mean + s mixing, s = (x - mean) unmixing, for `r` sources."""

    mean: Float[np.ndarray, " d"]
    unmixing: Float[np.ndarray, "d r"]
    mixing: Float[np.ndarray, "r d"]


@final
@dataclass(frozen=True)
class ICA(BuiltControl):
    seed: int = 0
    max_iterations: int = 200

    kind: ClassVar = "reference"

    def plan(self, asked: Sequence[Asked]) -> list[Planned]:
        values = sorted({max(1, round(sae.l0)) for sae in asked})
        return [Planned(f"-{k}", None, k) for k in values]

    def build(self, planned: Planned, material: Material) -> Dictionary:
        assert planned.l0 is not None, "planned from a trained SAE"
        found = _sources(material.x[:_TOKENS], self.seed, self.max_iterations)
        lengths = np.linalg.norm(found.mixing, axis=1)
        encoder = torch.from_numpy(found.unmixing * lengths)
        rows = torch.from_numpy(found.mixing / lengths[:, None])
        r, d = rows.shape
        sae = TopK(d, 2 * r, k=min(round(planned.l0), 2 * r))
        sae.W_enc.copy_(torch.cat([encoder, -encoder], dim=1))
        sae.W_dec.copy_(torch.cat([rows, -rows]))
        mean = torch.from_numpy(found.mean)
        shift = mean @ encoder
        sae.b_enc.copy_(torch.cat([-shift, shift]))
        sae.b_dec.copy_(mean)
        return sae


_last: dict[str, _Sources] = {}
"""The sources found last: they are the same for every L0, and take long to find."""


def _sources(x: Float[Tensor, "n d"], seed: int, max_iterations: int) -> _Sources:
    tokens = x.double().cpu().numpy()
    key = f"{hashlib.sha256(tokens.tobytes()).hexdigest()} {seed} {max_iterations}"
    if key not in _last:
        found = _fit(tokens, seed, max_iterations)
        _last.clear()
        _last[key] = found
    return _last[key]


def _fit(x: Float[np.ndarray, "n d"], seed: int, max_iterations: int) -> _Sources:
    mean = x.mean(0)
    basis = _varying(x, seed)
    ica = FastICA(
        whiten="unit-variance",
        whiten_solver="eigh",
        max_iter=max_iterations,
        random_state=seed,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        ica.fit((x - mean) @ basis)
    if any(issubclass(warning.category, ConvergenceWarning) for warning in caught):
        say(
            f"the control ica has not converged after {max_iterations} iterations over {len(x):,} tokens "
            f"of {x.shape[1]} dimensions; its directions are those of the last one"
        )
    return _Sources(mean, basis @ ica.components_.T, ica.mixing_.T @ basis.T)


def _varying(x: Float[np.ndarray, "n d"], seed: int) -> Float[np.ndarray, "d r"]:
    """An orthonormal basis of the directions in which activations differ."""
    d = x.shape[1]
    variances, vectors = np.linalg.eigh(np.cov(x.T))
    vectors = vectors[:, variances > _RANK * variances[-1]]
    r = vectors.shape[1]
    if r == d:
        return np.eye(d)
    # Turned, because scikit-learn takes signs from the first dimension, which must have a share in all directions.
    turn, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(r, r)))
    turned: np.ndarray = vectors @ turn
    return turned
