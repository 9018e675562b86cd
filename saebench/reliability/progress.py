"""Progress: whether a metric rises with the tokens that an SAE was trained on."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from saebench.reliability.rows import Row
from saebench.reliability.spearman import ENOUGH_POINTS, rank_correlation

RISES = 0.8
"""Rank correlation with training tokens above which a metric is said to rise."""


class Progress(NamedTuple):
    """Spearman's correlation of the metric with training tokens, over the snapshots of one SAE and the whole of it.

    A metric that is the same at all snapshots does not rise: 0.
    """

    n_curves: int
    median: float | None
    rising: int | None
    """How many correlations are above 0.8."""
    missing: dict[str, str]


def progress_of(rows: Sequence[Row]) -> Progress:
    if rows[0].best is None:
        return _no_progress("the metric has no better direction")
    curves: dict[Any, dict[float, float]] = {}
    for row in rows:
        if row.kind == "trained" and row.what == "snapshot" and row.tokens is not None:
            curves.setdefault((*row.recipe, row.seed), {})[row.tokens] = row.better
    for row in rows:
        curve = curves.get((*row.recipe, row.seed))
        if row.is_panel and row.tokens is not None and curve is not None:
            curve.setdefault(row.tokens, row.better)
    long = [curve for curve in curves.values() if len(curve) >= ENOUGH_POINTS]
    if not long:
        return _no_progress(f"no trained SAE was scored at {ENOUGH_POINTS} points of its training")
    found = [rank_correlation(np.array([*c]), np.array([*c.values()])) for c in long]
    rho = [0.0 if math.isnan(r) else r for r in found]
    return Progress(len(rho), float(np.median(rho)), sum(r > RISES for r in rho), {})


def _no_progress(reason: str) -> Progress:
    return Progress(0, None, None, {"median": reason, "rising": reason})
