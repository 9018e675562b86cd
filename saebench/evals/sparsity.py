"""How many latents are active, and which never are.

l0             = active latents per token (z != 0)
density_i      = share of tokens on which latent i is active
dead_fraction  = share of latents that are active on none of the n tokens; beside it the bound 3/n on the firing rate
                 of a latent that never fired (rule of three, 95 %)
dense_fraction = share of latents with a density above 0.1
"""

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from saebench.evals._sums import SequenceSums
from saebench.types import SAE, Facts, Metric, Score, Seen, StreamEval, Tally

_DENSE = 0.1


@final
@dataclass(frozen=True)
class Sparsity(StreamEval):
    version: ClassVar = 2
    metrics: ClassVar = (
        Metric("l0", None, "sequence", "active latents per token"),
        Metric(
            "dead_fraction",
            "min",
            "latent",
            "share of latents never active on the n tokens; reference: 3/n, the 95 % bound on the "
            "firing rate of such a latent",
        ),
        Metric(
            "density",
            None,
            "latent",
            "share of tokens on which a latent is active, mean over latents",
        ),
        Metric(
            "dense_fraction",
            "min",
            "latent",
            "share of latents active on more than a tenth of the tokens",
        ),
    )

    def start(self, sae: SAE, facts: Facts) -> Tally:
        return _Tally(sae.d_sae, facts)


@final
class _Tally:
    def __init__(self, d_sae: int, facts: Facts) -> None:
        self.sums = SequenceSums(facts.n_sequences)
        self.n = 0
        self.fires: Tensor | None = None
        self.d_sae = d_sae

    def update(self, seen: Seen) -> None:
        x, sequence = seen.batch.x, seen.batch.sequence
        counts = seen.code.offsets.diff()
        self.sums.add("tokens", sequence, torch.ones_like(counts))
        self.sums.add("active", sequence, counts)
        fires = torch.bincount(seen.code.indices, minlength=self.d_sae)
        self.fires = fires if self.fires is None else self.fires + fires
        self.n += len(x)

    def scores(self) -> list[Score]:
        assert self.fires is not None, "no batch was seen"
        fires = self.fires.cpu().numpy().astype(np.float64)
        one = np.ones(self.d_sae)
        return [
            self.sums.ratio("l0", self.sums["active"], self.sums["tokens"], self.n),
            Score("dead_fraction", (fires == 0).astype(np.float64), one, self.n, 3 / self.n),
            Score("density", fires / self.n, one, self.n),
            Score("dense_fraction", (fires > _DENSE * self.n).astype(np.float64), one, self.n),
        ]
