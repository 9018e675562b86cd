"""Sums over the tokens of each sequence, in float64."""

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from saebench.types import Score


class SequenceSums:
    """Named totals per sequence; every metric here is a ratio of two of them."""

    def __init__(self, n_sequences: int) -> None:
        self.n_sequences = n_sequences
        self._totals: dict[str, Tensor] = {}

    def add(self, name: str, sequence: Int[Tensor, " n"], values: Shaped[Tensor, " n"]) -> None:
        if name not in self._totals:
            self._totals[name] = values.new_zeros(self.n_sequences, dtype=torch.float64)
        self._totals[name].index_add_(0, sequence, values.double())

    def __getitem__(self, name: str) -> np.ndarray:
        return self._totals[name].cpu().numpy()

    def ratio(self, metric: str, num: np.ndarray, den: np.ndarray, n: int) -> Score:
        """A score over the sequences that have any tokens, named by their numbers where some have none."""
        used = self["tokens"] > 0
        ids = None if used.all() else [str(number) for number in np.flatnonzero(used)]
        return Score(metric, num[used], den[used], n, ids=ids)
