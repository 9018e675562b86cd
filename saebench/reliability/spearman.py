"""Spearman's rank correlation of rows that count more than once, as those of bootstrap draws do."""

import numpy as np

from saebench.reliability.rows import NOTHING
from saebench.stats import Floats

ENOUGH_POINTS = 3
"""For a rank correlation over snapshots, or within one L0."""


def rank_correlation(x: Floats, y: Floats) -> float:
    """Spearman's; NaN where one of them is constant."""
    return float(spearman(x, y, np.ones((1, len(x))))[0])


def spearman(x: Floats, y: Floats, counts: Floats) -> Floats:
    """Spearman's correlation of x and y [n] in which each pair stands as often as counts [draws n] says; ties have
    their mean rank."""
    middle = (counts.sum(axis=1, keepdims=True) + 1) / 2  # the mean of all ranks
    a, b = _ranks(x, counts) - middle, _ranks(y, counts) - middle
    both, aa, bb = (np.einsum("dn,dn,dn->d", counts, *two) for two in ((a, b), (a, a), (b, b)))
    scale = np.sqrt(aa * bb)
    found = np.divide(both, scale, out=np.full(len(counts), np.nan), where=scale > NOTHING)
    return np.asarray(found)


def _ranks(x: Floats, counts: Floats) -> Floats:
    """[draws n]: mean rank of each value among all copies, from 1."""
    order = np.argsort(x, kind="stable")
    ordered = x[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    copies = np.add.reduceat(counts[:, order], starts, axis=1)
    ranks = np.cumsum(copies, axis=1) - (copies - 1) / 2
    return ranks[:, np.unique(x, return_inverse=True)[1]]
