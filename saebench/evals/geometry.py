"""How the dictionary lies in space.

encoder_decoder_cosine          = median over live latents of cos(W_enc[:, i], W_dec[i]); dead ones sit at their initial
                                  value and are left out; a transcoder has none, because its two sites share no
                                  directions; beside it the 5 % and 95 % quantiles, and
encoder_decoder_cosine_weighted = its mean weighted by firing rate
max_decoder_cosine              = mean over latents of max_{j != i} cos(d_i, d_j); its reference is that of random
                                  directions of the same shape
"""

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saebench.types import SAE, Facts, Metric, Score, Seen, Skip, StreamEval, Tally

_ALIGNMENT = "cosine of encoder and decoder direction over live latents"
_ROWS_FOR_REFERENCE = 2048
_CHUNK = 2**25


@final
@dataclass(frozen=True)
class Geometry(StreamEval):
    sample: int = 16_384
    """Latents whose nearest neighbour among all others is looked for; all of them in SAEs up to this width."""

    version: ClassVar = 1
    metrics: ClassVar = (
        Metric("encoder_decoder_cosine", None, "latent", f"{_ALIGNMENT}, median", "median"),
        Metric("encoder_decoder_cosine_q05", None, "latent", f"{_ALIGNMENT}, 5 % quantile", "q05"),
        Metric("encoder_decoder_cosine_q95", None, "latent", f"{_ALIGNMENT}, 95 % quantile", "q95"),
        Metric("encoder_decoder_cosine_weighted", None, "latent", f"{_ALIGNMENT}, by firing rate"),
        Metric(
            "max_decoder_cosine",
            "min",
            "latent",
            "cosine to the nearest other decoder direction, mean; reference: random directions",
        ),
    )

    def start(self, sae: SAE, facts: Facts) -> Tally:
        if getattr(sae, "W_dec", None) is None:
            raise Skip("it has no decoder directions")
        return _Tally(self, sae, facts)


@final
class _Tally:
    def __init__(self, geometry: Geometry, sae: SAE, facts: Facts) -> None:
        self.geometry, self.sae, self.n = geometry, sae, 0
        self.one_space = facts.site == facts.target
        self.fires: Tensor | None = None

    def update(self, seen: Seen) -> None:
        fires = torch.bincount(seen.code.indices, minlength=self.sae.d_sae)
        self.fires = fires if self.fires is None else self.fires + fires
        self.n += len(seen.batch.x)

    @torch.no_grad()
    def scores(self) -> list[Score]:
        assert self.fires is not None, "no batch was seen"
        W_enc, W_dec = getattr(self.sae, "W_enc", None), self.sae.W_dec  # type: ignore[attr-defined]
        fires = self.fires.cpu().numpy().astype(np.float64)
        scores = []
        if W_enc is not None and self.one_space:
            scores = self._alignment(W_enc, W_dec, fires)
        nearest = _nearest_cosine(W_dec, self.geometry.sample)
        reference = float(np.mean(_nearest_cosine(_random_like(W_dec), _ROWS_FOR_REFERENCE)))
        one = np.ones(len(nearest))
        return [*scores, Score("max_decoder_cosine", nearest, one, len(nearest), reference)]

    def _alignment(self, W_enc: Tensor, W_dec: Tensor, fires: np.ndarray) -> list[Score]:
        cosine = _cosine_of_pairs(W_enc, W_dec)
        live = (fires > 0).astype(np.float64)
        if not live.any():
            return []
        n = int(live.sum())
        name = "encoder_decoder_cosine"
        quantiles = [Score(name + end, cosine, live, n) for end in ("", "_q05", "_q95")]
        weighted = Score(name + "_weighted", cosine * fires / self.n, fires / self.n, n)
        return [*quantiles, weighted]


def _cosine_of_pairs(
    W_enc: Float[Tensor, "d d_sae"], W_dec: Float[Tensor, "d_sae d"]
) -> np.ndarray:
    """In float64, some latents at a time: whole matrices of doubles would be most of the memory of a wide SAE."""
    size = max(1, _CHUNK // (8 * W_dec.shape[1]))
    pairs = zip(W_enc.T.split(size), W_dec.split(size), strict=True)
    cosines = [torch.cosine_similarity(a.double(), b.double(), dim=-1) for a, b in pairs]
    return torch.cat(cosines).cpu().numpy()


def _nearest_cosine(W_dec: Float[Tensor, "d_sae d"], sample: int) -> np.ndarray:
    """Of a seeded sample of rows (all, if there are no more), the largest cosine to another row."""
    d_sae = len(W_dec)
    directions = torch.nn.functional.normalize(W_dec.float(), dim=-1)
    rows = torch.arange(d_sae)
    if d_sae > sample:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randperm(d_sae, generator=generator)[:sample].sort().values
    rows = rows.to(W_dec.device)
    best = []
    for chunk in rows.split(max(1, _CHUNK // d_sae)):
        cosines = directions[chunk] @ directions.T
        cosines[torch.arange(len(chunk), device=W_dec.device), chunk] = -1.0
        best.append(cosines.amax(-1))
    return torch.cat(best).double().cpu().numpy()


def _random_like(W_dec: Float[Tensor, "d_sae d"]) -> Float[Tensor, "d_sae d"]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(W_dec.shape, generator=generator).to(W_dec.device)
