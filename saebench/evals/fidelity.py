"""What the language model loses when it goes on from the reconstruction.

ce_loss_*            = mean next-token cross-entropy in nats: clean, with the stream replaced by x_hat (sae), by 0
                       (zero) or by its mean (mean); the same positions are replaced and scored in all of them
ce_loss_increase     = ce_loss_sae - ce_loss_clean
loss_recovered       = (ce_loss_zero - ce_loss_sae) / (ce_loss_zero - ce_loss_clean)
loss_recovered_mean  = the same against mean ablation
kl_divergence        = mean of KL(p_clean || p_sae) in nats
top1_agreement       = share of positions whose likeliest next token stays the same
"""

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
import torch

from saebench.evals._sums import SequenceSums
from saebench.types import SAE, Facts, Metric, Omitted, Score, Seen, Skip, StreamEval, Tally

_LEAST_RISE = 0.01
"""Nats per position that ablating the stream must cost, where anything can be recovered of it."""


@final
@dataclass(frozen=True)
class Fidelity(StreamEval):
    version: ClassVar = 2
    needs_outcome: ClassVar = True
    metrics: ClassVar = (
        Metric(
            "loss_recovered",
            "max",
            "sequence",
            "share of the loss of zero ablation that is recovered",
            ends=(0.0, 1.0),
        ),
        Metric(
            "loss_recovered_mean",
            "max",
            "sequence",
            "share of the loss of mean ablation that is recovered",
            ends=(0.0, 1.0),
        ),
        Metric("ce_loss_increase", "min", "sequence", "rise of the cross-entropy, nats"),
        Metric("kl_divergence", "min", "sequence", "KL(clean || with the SAE), nats"),
        Metric(
            "top1_agreement",
            "max",
            "sequence",
            "share of positions with the same likeliest token",
            ends=(0.0, 1.0),
        ),
        Metric("ce_loss_clean", None, "sequence", "cross-entropy of the untouched model, nats"),
        Metric("ce_loss_sae", "min", "sequence", "cross-entropy with the reconstruction, nats"),
        Metric("ce_loss_zero", None, "sequence", "cross-entropy with the stream at zero, nats"),
        Metric("ce_loss_mean", None, "sequence", "cross-entropy with the stream at its mean, nats"),
    )

    def start(self, sae: SAE, facts: Facts) -> Tally:
        return _Tally(facts)


@final
class _Tally:
    def __init__(self, facts: Facts) -> None:
        self.sums, self.n = SequenceSums(facts.n_sequences), 0

    def update(self, seen: Seen) -> None:
        assert seen.outcome is not None, (
            "the runner leaves the outcome out only where none is asked for"
        )
        sequence, references = seen.batch.scored_sequence, seen.batch.references()
        self.sums.add("tokens", sequence, torch.ones_like(sequence))
        self.sums.add("sae", sequence, seen.outcome.loss)
        self.sums.add("clean", sequence, references.clean)
        self.sums.add("zero", sequence, references.zero)
        self.sums.add("mean", sequence, references.mean)
        self.sums.add("kl", sequence, seen.outcome.kl)
        self.sums.add("same", sequence, seen.outcome.same_top1)
        self.n += len(sequence)

    def scores(self) -> list[Score | Omitted]:
        s, n = self.sums, self.n
        if n == 0:
            raise Skip("no position has both a token to replace and a next token to predict")
        tokens, sae, clean = s["tokens"], s["sae"], s["clean"]

        def mean(metric: str, total: np.ndarray) -> Score:
            return s.ratio(metric, total, tokens, n)

        def recovered(metric: str, ablation: str) -> Score | Omitted:
            if (s[ablation] - clean).sum() < _LEAST_RISE * n:
                return Omitted(
                    metric,
                    f"{ablation} ablation raises the loss by less than {_LEAST_RISE} nats, so that "
                    "shares of it say nothing",
                )
            return s.ratio(metric, s[ablation] - sae, s[ablation] - clean, n)

        return [
            recovered("loss_recovered", "zero"),
            recovered("loss_recovered_mean", "mean"),
            mean("ce_loss_increase", sae - clean),
            mean("kl_divergence", s["kl"]),
            mean("top1_agreement", s["same"]),
            mean("ce_loss_clean", clean),
            mean("ce_loss_sae", sae),
            mean("ce_loss_zero", s["zero"]),
            mean("ce_loss_mean", s["mean"]),
        ]
