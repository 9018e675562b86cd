"""Truth: whether a metric ranks SAEs as agreement with known features does (arXiv 2602.14687)."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from saebench import stats
from saebench.errors import UserError
from saebench.reliability.missing import Missing, split
from saebench.reliability.rows import Best, Row, Version
from saebench.reliability.spearman import ENOUGH_POINTS, spearman
from saebench.stats import Floats

ENOUGH_FOR_TRUTH = 30
"""SAEs."""
GROUND_TRUTH = "ground_truth"
"""The eval."""

Integers = NDArray[np.int64]


class Correlation(NamedTuple):
    """Spearman's, with a 95 % interval."""

    value: float
    low: float
    high: float


class Truth(NamedTuple):
    """Spearman's correlation of the metric with `f1` and `mcc` of ground_truth, over trained SAEs of a synthetic panel.

    The 95 % intervals come from 2,000 draws of recipes (family, width, asked-for L0), because seeds of a recipe are
    alike, widened as in `stats`. Within L0 it is the mean over asked-for L0 of the correlation among the SAEs of one.
    `passes`: one of the two overall intervals lies above 0, and none below.
    """

    panel: str | None
    """The suite whose features are known."""
    n_saes: int
    f1: Correlation | None
    mcc: Correlation | None
    f1_within_l0: Correlation | None
    mcc_within_l0: Correlation | None
    passes: bool | None
    missing: dict[str, str]


class Known(NamedTuple):
    """A panel of trained SAEs on activations whose features are known."""

    suite: str
    rows: dict[Version, list[Row]]
    truth: dict[str, dict[str, float]]
    """`f1` and `mcc`, by SAE."""


class _Beside(NamedTuple):
    """SAEs that have the metric and the truth."""

    metric: Floats
    truth: Floats
    recipes: Integers
    l0: Floats


def known_from(suite: str, rows: Mapping[Version, Sequence[Row]]) -> Known:
    panel = {version: [row for row in of if row.is_panel] for version, of in rows.items()}
    truth = {name: _of_truth(suite, name, panel) for name in ("f1", "mcc")}
    return Known(suite, panel, truth)


def _of_truth(suite: str, name: str, panel: Mapping[Version, Sequence[Row]]) -> dict[str, float]:
    ways = [version for version in panel if version[:2] == (name, GROUND_TRUTH)]
    if len(ways) != 1:
        raise UserError(
            f"the audit of {suite} has {name} of {GROUND_TRUTH} in {len(ways)} ways; expected one. Audit a suite that "
            f"has {GROUND_TRUTH} once"
        )
    return {row.sae: row.better for row in panel[ways[0]]}


def truth_of(version: Version, best: Best, known: Known | None) -> Truth:
    if best is None:
        return _no_truth(known, 0, "the metric has no better direction")
    if version.eval == GROUND_TRUTH:
        return _no_truth(known, 0, "it is truth itself")
    if known is None:
        return _no_truth(None, 0, "no panel with known features was audited")
    rows = _same_metric(version, known)
    found = {name: _beside(rows, truth) for name, truth in known.truth.items()}
    n_saes = min(len(beside.metric) for beside in found.values())
    if n_saes < ENOUGH_FOR_TRUTH:
        reason = f"{n_saes} trained SAEs of {known.suite} have it; {ENOUGH_FOR_TRUTH} are needed"
        return _no_truth(known, n_saes, reason)
    overall = {name: _correlation(beside) for name, beside in found.items()}
    within = {f"{name}_within_l0": _correlation_in_l0(beside) for name, beside in found.items()}
    passes = _is_true([c for c in overall.values() if isinstance(c, Correlation)])
    parts = {**overall, **within, "passes": passes}
    return Truth(panel=known.suite, n_saes=n_saes, **split(parts))


def truth_fails(truth: Truth) -> list[str]:
    if truth.passes is not False:
        return []
    found = (("F1", truth.f1), ("MCC", truth.mcc))
    told = " and ".join(
        f"{c.value:.2f} [{c.low:.2f}, {c.high:.2f}] with {name}" for name, c in found if c
    )
    return [f"fails the truth test (rank correlation {told} on {truth.panel})"]


def _no_truth(known: Known | None, n_saes: int, reason: str) -> Truth:
    names = ("f1", "mcc", "f1_within_l0", "mcc_within_l0", "passes")
    parts = dict.fromkeys(names, Missing(reason))
    return Truth(panel=None if known is None else known.suite, n_saes=n_saes, **split(parts))


def _same_metric(version: Version, known: Known) -> Sequence[Row]:
    """The same parameters if there are such, or the only ones: probes have other datasets on every subject."""
    if version in known.rows:
        return known.rows[version]
    others = [of for other, of in known.rows.items() if other[:3] == version[:3]]
    return others[0] if len(others) == 1 else []


def _beside(rows: Sequence[Row], truth: Mapping[str, float]) -> _Beside:
    here = [row for row in rows if row.sae in truth]
    names = list(dict.fromkeys(row.recipe for row in here))
    return _Beside(
        np.array([row.better for row in here], dtype=np.float64),
        np.array([truth[row.sae] for row in here], dtype=np.float64),
        np.array([names.index(row.recipe) for row in here], dtype=np.int64),
        np.array([math.nan if row.l0 is None else row.l0 for row in here], dtype=np.float64),
    )


def _is_true(found: Sequence[Correlation]) -> bool | Missing:
    if not found:
        return Missing("it has no rank correlation with the truth")
    above, below = any(c.low > 0 for c in found), any(c.high < 0 for c in found)
    return above and not below


def _correlation(beside: _Beside) -> Correlation | Missing:
    return _with_interval(beside, lambda c: spearman(beside.metric, beside.truth, c))


def _correlation_in_l0(beside: _Beside) -> Correlation | Missing:
    levels = [level for level in np.unique(beside.l0).tolist() if not math.isnan(level)]
    groups = [beside.l0 == level for level in levels]
    groups = [here for here in groups if int(here.sum()) >= ENOUGH_POINTS]
    if not groups:
        return Missing(f"no asked-for L0 has {ENOUGH_POINTS} SAEs")

    def mean(counts: Floats) -> Floats:
        each = [spearman(beside.metric[h], beside.truth[h], counts[:, h]) for h in groups]
        return _mean_of_finite(np.stack(each))

    return _with_interval(beside, mean)


def _with_interval(beside: _Beside, value: Callable[[Floats], Floats]) -> Correlation | Missing:
    """`value` maps how often each SAE counts, [draws n_saes], to a correlation in each draw."""
    observed = float(value(np.ones((1, len(beside.metric))))[0])
    if math.isnan(observed):
        return Missing("all SAEs have the same value")
    n_recipes = int(beside.recipes.max()) + 1
    if n_recipes < 2:
        return Missing("all SAEs are of one recipe")
    drawn = stats.Bootstrap(n_recipes).sums(np.eye(n_recipes))
    draws = value(drawn[:, beside.recipes])
    if np.isfinite(draws).mean() < stats.LEVEL:
        return Missing("most recipes have the same value")
    found = stats.from_draws(observed, draws, n_recipes)
    return Correlation(observed, found.low, found.high)


def _mean_of_finite(x: Floats) -> Floats:
    """Over rows; NaN where none is finite."""
    return np.asarray(np.ma.masked_invalid(x).mean(axis=0).filled(np.nan))
