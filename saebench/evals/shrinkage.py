"""Whether reconstructions are systematically too small.

shrinkage         = gamma = sum |x_hat|^2 / sum x_hat . x, the g that minimises sum |x_hat / g - x|^2, "relative
                    reconstruction bias" (Rajamanoharan et al. 2024, arXiv 2404.16014, eq. 10); below 1 the SAE shrinks
shrinkage_centred = the same of x - b_dec and x_hat - b_dec, which a large bias does not pull to 1
l2_ratio          = mean over tokens of |x_hat| / |x|; a projection has a ratio below 1 without any shrinkage
rescale_gain      = explained variance that dividing every reconstruction by gamma would add
"""

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from saebench.evals._sums import SequenceSums
from saebench.types import SAE, Facts, Metric, Score, Seen, Skip, StreamEval, Tally


@final
@dataclass(frozen=True)
class Shrinkage(StreamEval):
    version: ClassVar = 2
    metrics: ClassVar = (
        Metric(
            "shrinkage",
            None,
            "sequence",
            "relative reconstruction bias; 1 is unbiased, below 1 shrinks",
        ),
        Metric("shrinkage_centred", None, "sequence", "the same about the decoder bias"),
        Metric("l2_ratio", None, "sequence", "mean of |x_hat| / |x|"),
        Metric(
            "rescale_gain",
            "min",
            "sequence",
            "explained variance that one global rescale would add",
        ),
    )

    def start(self, sae: SAE, facts: Facts) -> Tally:
        return _Tally(sae, facts)


@final
class _Tally:
    def __init__(self, sae: SAE, facts: Facts) -> None:
        self.sums, self.n = SequenceSums(facts.n_sequences), 0
        self.mean = facts.mean.double()
        self.b_dec: Tensor | None = getattr(sae, "b_dec", None)

    def update(self, seen: Seen) -> None:
        x, x_hat = seen.batch.target.double(), seen.x_hat.double()
        add, sequence = self.sums.add, seen.batch.sequence
        lengths = torch.linalg.vector_norm(x, dim=-1)
        add("tokens", sequence, torch.ones_like(lengths))
        self._add_products("", seen, x, x_hat)
        if self.b_dec is not None:
            self._add_products("centred_", seen, x - self.b_dec, x_hat - self.b_dec)
        ratio = torch.linalg.vector_norm(x_hat, dim=-1) / lengths
        add("ratio", sequence, torch.where(lengths > 0, ratio, 0.0))
        add("not_zero", sequence, lengths > 0)
        add("variance", sequence, (x - self.mean.to(x.device)).square().sum(-1))
        self.n += len(x)

    def _add_products(self, prefix: str, seen: Seen, x: Tensor, x_hat: Tensor) -> None:
        self.sums.add(prefix + "hat_hat", seen.batch.sequence, torch.linalg.vecdot(x_hat, x_hat))
        self.sums.add(prefix + "hat_x", seen.batch.sequence, torch.linalg.vecdot(x_hat, x))

    def scores(self) -> list[Score]:
        s, n = self.sums, self.n
        hat_hat, hat_x = s["hat_hat"], s["hat_x"]
        if hat_x.sum() <= 0:
            raise Skip(
                "reconstructions do not point along the activations, so no rescale could mend them"
            )
        gamma = hat_hat.sum() / hat_x.sum()
        gain = _error_saved(hat_hat, hat_x, gamma)
        scores = [
            s.ratio("shrinkage", hat_hat, hat_x, n),
            s.ratio("l2_ratio", s["ratio"], s["not_zero"], n),
            s.ratio("rescale_gain", gain, s["variance"], n),
        ]
        if self.b_dec is not None and s["centred_hat_x"].sum() > 0:
            scores.append(s.ratio("shrinkage_centred", s["centred_hat_hat"], s["centred_hat_x"], n))
        return scores


def _error_saved(hat_hat: np.ndarray, hat_x: np.ndarray, gamma: float) -> np.ndarray:
    """|x - x_hat|^2 - |x - x_hat / gamma|^2, in which |x|^2 cancels."""
    return np.asarray(hat_hat * (1 - 1 / gamma**2) - 2 * hat_x * (1 - 1 / gamma))
