"""How much of the activations the SAE gives back.

explained_variance = 1 - sum |x - x_hat|^2 / sum |x - mean(x)|^2     1 is perfect, 0 is predicting the mean
mse                = mean over tokens of |x - x_hat|^2, summed over dimensions
cosine             = mean over tokens of cos(x, x_hat), 0 where x_hat is 0

Sums run over the whole stream and are divided once; mean(x) is the mean over the evaluated tokens.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch

from saebench.evals._sums import SequenceSums
from saebench.types import SAE, Facts, Metric, Score, Seen, StreamEval, Tally


@final
@dataclass(frozen=True)
class Reconstruction(StreamEval):
    version: ClassVar = 2
    metrics: ClassVar = (
        Metric(
            "explained_variance",
            "max",
            "sequence",
            "1 - squared error / variance of the stream",
            ends=(0.0, 1.0),
        ),
        Metric("mse", "min", "sequence", "squared error per token, summed over dimensions"),
        Metric(
            "cosine",
            "max",
            "sequence",
            "mean cosine of activation and reconstruction",
            ends=(0.0, 1.0),
        ),
    )

    def start(self, sae: SAE, facts: Facts) -> Tally:
        return _Tally(facts)


@final
class _Tally:
    def __init__(self, facts: Facts) -> None:
        self.sums, self.mean, self.n = SequenceSums(facts.n_sequences), facts.mean.double(), 0

    def update(self, seen: Seen) -> None:
        x, x_hat = seen.batch.target.double(), seen.x_hat.double()
        sequence = seen.batch.sequence
        cosine = torch.cosine_similarity(x, x_hat, dim=-1, eps=1e-30)
        self.sums.add("tokens", sequence, torch.ones_like(cosine))
        self.sums.add("error", sequence, (x - x_hat).square().sum(-1))
        self.sums.add("variance", sequence, (x - self.mean.to(x.device)).square().sum(-1))
        self.sums.add("cosine", sequence, cosine)
        self.n += len(x)

    def scores(self) -> list[Score]:
        s = self.sums
        return [
            s.ratio("explained_variance", s["variance"] - s["error"], s["variance"], self.n),
            s.ratio("mse", s["error"], s["tokens"], self.n),
            s.ratio("cosine", s["cosine"], s["tokens"], self.n),
        ]
