"""Intervals, paired differences, tie groups and frontiers. Pure NumPy and SciPy.

A metric is kept unit by unit (a unit is a sequence, a latent, a dataset ...) as `num` and `den`.

ratio       value = sum(num) / sum(den), in float64
median ...  value = quantile of num over the units with den > 0

Only units are resampled, never tokens: tokens of one sequence resemble each other, and an interval
from resampled tokens is far too narrow. Two SAEs are compared on the same units in the same draws.

Percentile intervals and p-values of few units are too bold, because a bootstrap draw varies by a
factor (n - 1) / n less than the data and knows nothing of the t distribution. Their tails are
therefore widened as in Hesterberg (2015, https://arxiv.org/abs/1411.5279, "expanded percentile
interval"): alpha' / 2 = Phi(-sqrt(n / (n - 1)) t_{n-1}). With many units nothing changes.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Statistic = Literal["ratio", "median", "q05", "q95"]
Floats = NDArray[np.float64]
Numbers = NDArray[Any]
"""Counts and flags too; all sums are in float64."""

DRAWS = 2_000
LEVEL = 0.95
FEW_UNITS = 10
"""Below this resampling cannot reach beyond the data, and Student's t on the delta method is used."""
MANY_UNITS = 20_000
"""Above this a ratio of sums is as good as normal, and the delta method replaces resampling."""

_QUANTILES = {"median": 0.5, "q05": 0.05, "q95": 0.95}
_TAIL = (1 - LEVEL) / 2
_CHUNK_BYTES = 64 * 2**20


class Interval(NamedTuple):
    low: float
    high: float


class Column(NamedTuple):
    """One metric, unit by unit."""

    num: Numbers
    den: Numbers
    statistic: Statistic = "ratio"


class Difference(NamedTuple):
    """a - b, with its 95 % interval and the two-sided p-value of "there is none"."""

    value: float
    low: float
    high: float
    p: float


class Bootstrap:
    """The same draws of units for every column that has them, so that comparisons are paired."""

    def __init__(self, n_units: int, draws: int = DRAWS, seed: int = 0) -> None:
        self.n_units = n_units
        self.draws = draws
        self.seed = seed

    def sums(self, columns: Floats) -> Floats:
        """columns [n_units c] -> the sum of each column in each draw [draws c]."""
        return np.concatenate([counts @ columns for counts in self._counts()])

    def picks(self) -> Iterator[NDArray[np.int64]]:
        """The drawn units themselves, [chunk n_units] at a time."""
        rng = np.random.default_rng(self.seed)
        chunk = max(1, _CHUNK_BYTES // (8 * self.n_units))
        for start in range(0, self.draws, chunk):
            yield rng.integers(self.n_units, size=(min(chunk, self.draws - start), self.n_units))

    def _counts(self) -> Iterator[Floats]:
        """How often each unit was drawn: [chunk n_units], kept when all of it is small."""
        if self.draws * self.n_units * 8 <= _CHUNK_BYTES:
            yield self._kept
        else:
            yield from map(_count, self.picks())

    @cached_property
    def _kept(self) -> Floats:
        return np.concatenate([_count(picks) for picks in self.picks()])


def value(num: Numbers, den: Numbers, statistic: Statistic) -> float:
    num, den = _checked(num, den)
    if statistic == "ratio":
        if den.sum() == 0:
            raise ValueError("the denominators sum to zero, so the ratio has no value")
        return float(num.sum() / den.sum())
    live = num[den > 0]
    if len(live) == 0:
        raise ValueError(f"no unit has a denominator above zero, so the {statistic} has no value")
    return float(np.quantile(live, _QUANTILES[statistic]))


def interval(
    num: Numbers, den: Numbers, statistic: Statistic, draws: int = DRAWS, seed: int = 0
) -> Interval | None:
    """The 95 % interval over units; None where there are too few units to have one."""
    return intervals([Column(num, den, statistic)], draws, seed)[0]


def intervals(
    columns: Sequence[Column], draws: int = DRAWS, seed: int = 0
) -> list[Interval | None]:
    """As `interval`, with one resampling for all columns that have the same number of units."""
    checked = [Column(*_checked(num, den), statistic) for num, den, statistic in columns]
    found: list[Interval | None] = [_without_draws(column) for column in checked]
    resampled: dict[int, list[int]] = {}
    for i, column in enumerate(checked):
        if _is_resampled(column):
            resampled.setdefault(len(column.num), []).append(i)
    for n_units, members in resampled.items():
        bootstrap = _bootstrap(n_units, draws, seed)
        drawn = _drawn_ratios(bootstrap, [checked[i] for i in members])
        for i, ratios in zip(members, drawn.T, strict=True):
            found[i] = _percentiles(ratios, n_units)
    return found


@lru_cache(maxsize=2)
def _bootstrap(n_units: int, draws: int, seed: int) -> Bootstrap:
    """Kept, because the SAEs of a suite have the same number of units, and drawing takes longer than all the rest."""
    return Bootstrap(n_units, draws, seed)


def clustered(column: Column, clusters: Sequence[str]) -> Column:
    """The sums over the units of each cluster, in the order in which clusters first come: what is resampled then.

    Units of one cluster (datasets from one source) are alike, so that each says less than one from another source.
    """
    if column.statistic != "ratio":
        raise ValueError(f"units with a {column.statistic} cannot be summed by cluster")
    names = list(dict.fromkeys(clusters))
    if len(names) == len(clusters):
        return column
    places = {name: i for i, name in enumerate(names)}
    codes = np.array([places[name] for name in clusters])
    num, den = _checked(column.num, column.den)
    return Column(np.bincount(codes, num), np.bincount(codes, den), "ratio")


def paired_difference(
    num_a: Numbers,
    den_a: Numbers,
    num_b: Numbers,
    den_b: Numbers,
    statistic: Statistic,
) -> Difference | None:
    """a - b on the same units, in the same order; None where there are fewer than two units."""
    a, b = Column(num_a, den_a, statistic), Column(num_b, den_b, statistic)
    return paired_differences(a, [b], Bootstrap(len(num_a)))[0]


def paired_differences(
    a: Column, others: Sequence[Column], bootstrap: Bootstrap
) -> list[Difference | None]:
    """a - b for every b of `others`: all are columns over the same units as `a`."""
    if any(len(column.num) != bootstrap.n_units for column in (a, *others)):
        raise ValueError("paired columns and their bootstrap must have the same number of units")
    if bootstrap.n_units < 2:
        return [None for _ in others]
    if a.statistic != "ratio":
        return [_paired_quantiles(a, b, bootstrap) for b in others]
    if not FEW_UNITS <= bootstrap.n_units <= MANY_UNITS:
        return [_paired_delta(a, b) for b in others]
    drawn = _drawn_ratios(bootstrap, [a, *others])
    return [
        _from_draws(value(*a) - value(*b), drawn[:, 0] - drawn[:, j], bootstrap.n_units)
        for j, b in enumerate(others, start=1)
    ]


def independent_difference(a: Column, b: Column) -> Difference | None:
    """a - b where the units are not the same things, such as the latents of two SAEs."""
    errors = [_standard_error(column) for column in (a, b)]
    if errors[0] is None or errors[1] is None:
        return None
    # As many degrees of freedom as the smaller of the two: on the safe side of Welch's.
    freedom = min(len(a.num), len(b.num)) - 1
    return _student(value(*a) - value(*b), float(np.hypot(errors[0], errors[1])), freedom)


def holm(p_values: Sequence[float]) -> Floats:
    """p-values adjusted for how many there are (Holm 1979): below 0.05 still means 5 % for all."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    steps = (len(p) - np.arange(len(p))) * p[order]
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def tie_group(
    columns: Mapping[str, Column],
    best: Literal["min", "max"],
    paired: bool,
    bootstrap: Bootstrap | None = None,
) -> frozenset[str]:
    """The best of one metric, and all that cannot be told apart from it at 5 % (Holm).

    Membership is relative to the best: two members may well differ from each other. `paired` says
    that all columns are over the same units; `bootstrap` spares drawing these again.
    """
    names = list(columns)
    sign = 1 if best == "max" else -1
    leader = max(names, key=lambda name: sign * value(*columns[name]))
    others = [name for name in names if name != leader]
    if paired:
        units = bootstrap or Bootstrap(len(columns[leader].num), draws_for(len(others)))
        found = paired_differences(columns[leader], [columns[name] for name in others], units)
    else:
        found = [independent_difference(columns[leader], columns[name]) for name in others]
    # What cannot be tested cannot be told apart.
    adjusted = holm([1.0 if difference is None else difference.p for difference in found])
    ties = [name for name, p in zip(others, adjusted, strict=True) if p >= 1 - LEVEL]
    return frozenset([leader, *ties])


def draws_for(comparisons: int) -> int:
    """Enough draws that the smallest possible p-value survives Holm over so many comparisons."""
    return max(DRAWS, 400 * comparisons)


def frontier(x: Numbers, y: Numbers, best: Literal["min", "max"]) -> NDArray[np.int64]:
    """Points that no other beats, by ascending x: smaller x is better, and y as `best` says."""
    x = np.asarray(x, dtype=np.float64)
    cost = np.asarray(y, dtype=np.float64) * (-1 if best == "max" else 1)
    kept: list[int] = []
    for i in np.lexsort((cost, x)):
        last = kept[-1] if kept else None
        twin = last is not None and x[i] == x[last] and cost[i] == cost[last]
        if last is None or twin or cost[i] < cost[last]:
            kept.append(int(i))
    return np.array(kept, dtype=np.int64)


def rule_of_three(n: int) -> float:
    """The 95 % upper bound on the rate of what never happened in n trials."""
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return 3 / n


def _checked(num: Numbers, den: Numbers) -> tuple[Floats, Floats]:
    num, den = np.asarray(num, dtype=np.float64), np.asarray(den, dtype=np.float64)
    if num.ndim != 1 or num.shape != den.shape:
        raise ValueError(f"num and den must be one column each, got {num.shape} and {den.shape}")
    return num, den


def _count(picks: NDArray[np.int64]) -> Floats:
    draws, n_units = picks.shape
    flat = (picks + n_units * np.arange(draws)[:, None]).ravel()
    return np.bincount(flat, minlength=picks.size).reshape(picks.shape).astype(np.float64)


def _is_proportion(column: Column) -> bool:
    return bool(np.all(column.den == 1) and np.all((column.num == 0) | (column.num == 1)))


def _is_resampled(column: Column) -> bool:
    drawn = FEW_UNITS <= len(column.num) <= MANY_UNITS
    return column.statistic == "ratio" and drawn and not _is_proportion(column)


def _without_draws(column: Column) -> Interval | None:
    """Every interval that has a closed form."""
    if len(column.num) < 2:
        return None
    if column.statistic != "ratio":
        return _order_statistics(column.num[column.den > 0], _QUANTILES[column.statistic])
    if _is_proportion(column):
        return _wilson(column.num.mean(), len(column.num))
    if _is_resampled(column):
        return None
    found = _student(value(*column), _delta_error(column), len(column.num) - 1)
    return Interval(found.low, found.high)


def _z() -> float:
    from scipy.special import ndtri

    return float(ndtri(1 - _TAIL))


def _wilson(share: float, n: int) -> Interval:
    z = _z()
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    # At 0 and 1 an end is exact; rounding would put the value itself outside by 1e-17.
    low = 0.0 if share == 0 else float(centre - half)
    high = 1.0 if share == 1 else float(centre + half)
    return Interval(low, high)


def _order_statistics(x: Numbers, q: float) -> Interval | None:
    """Exact at any n: the number of units below the true quantile is binomial.

    None where even the extremes of so few units do not reach 95 %.
    """
    from scipy.special import bdtr

    n = len(x)
    if n < 2:
        return None
    # Ten standard deviations about the quantile: all of it would be slow for a million units.
    reach = 10 * (np.sqrt(n * q * (1 - q)) + 1)
    ranks = np.arange(max(0, int(n * q - reach)), min(n, int(n * q + reach)))
    below = bdtr(ranks, n, q)  # P(at most k of the n units lie below the quantile)
    # The r-th smallest lies above the quantile with P(B < r), the s-th below it with P(B >= s).
    r = int(ranks[0] + np.searchsorted(below, _TAIL, side="right"))
    s = int(ranks[0] + np.searchsorted(below, 1 - _TAIL, side="left")) + 1
    if r < 1 or s > n:
        return None
    ordered = np.sort(x)
    return Interval(float(ordered[r - 1]), float(ordered[s - 1]))


def _delta_error(column: Column) -> float:
    """Standard error of a ratio of sums, to first order."""
    n = len(column.num)
    influence = column.num - value(*column) * column.den
    return float(np.sqrt(n * np.var(influence, ddof=1)) / abs(column.den.sum()))


def _standard_error(column: Column) -> float | None:
    if len(column.num) < 2:
        return None
    if column.statistic == "ratio":
        return _delta_error(column)
    found = _order_statistics(column.num[column.den > 0], _QUANTILES[column.statistic])
    return None if found is None else (found.high - found.low) / (2 * _z())


def _drawn_ratios(bootstrap: Bootstrap, columns: Sequence[Column]) -> Floats:
    """[draws c]; NaN in a draw whose denominators sum to zero, which says nothing."""
    stacked = np.stack([part for column in columns for part in column[:2]], axis=1)
    sums = bootstrap.sums(stacked.astype(np.float64))
    num, den = sums[:, 0::2], sums[:, 1::2]
    return np.divide(num, den, out=np.full_like(num, np.nan), where=den != 0)


def _percentiles(draws: Floats, n_units: int) -> Interval:
    from scipy.special import ndtr, stdtrit

    tail = ndtr(np.sqrt(n_units / (n_units - 1)) * stdtrit(n_units - 1, _TAIL))
    low, high = np.nanquantile(draws, [tail, 1 - tail])
    return Interval(float(low), float(high))


def _from_draws(observed: float, draws: Floats, n_units: int) -> Difference:
    from scipy.special import ndtri, stdtr

    draws = draws[np.isfinite(draws)]
    beyond = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    tail = min((beyond + 1) / (len(draws) + 1), 0.5)
    # The widening of the interval, backwards: p < 5 % exactly where the interval leaves out zero.
    p = 2 * stdtr(n_units - 1, ndtri(tail) * np.sqrt((n_units - 1) / n_units))
    return Difference(observed, *_percentiles(draws, n_units), float(p))


def _paired_quantiles(a: Column, b: Column, bootstrap: Bootstrap) -> Difference | None:
    both = (a.den > 0) & (b.den > 0)
    n_units = int(both.sum())
    if n_units < 2:
        return None
    q, num_a, num_b = _QUANTILES[a.statistic], a.num[both], b.num[both]
    draws = [
        np.quantile(num_a[picks], q, axis=1) - np.quantile(num_b[picks], q, axis=1)
        for picks in Bootstrap(n_units, bootstrap.draws, bootstrap.seed).picks()
    ]
    observed = float(np.quantile(num_a, q) - np.quantile(num_b, q))
    return _from_draws(observed, np.concatenate(draws), n_units)


def _paired_delta(a: Column, b: Column) -> Difference:
    influence = [(c.num - value(*c) * c.den) / c.den.mean() for c in (a, b)]
    error = np.std(influence[0] - influence[1], ddof=1) / np.sqrt(len(a.num))
    return _student(value(*a) - value(*b), float(error), len(a.num) - 1)


def _student(observed: float, error: float, freedom: int) -> Difference:
    from scipy.special import stdtr, stdtrit

    if error == 0:
        return Difference(observed, observed, observed, 1.0 if observed == 0 else 0.0)
    half = float(stdtrit(freedom, 1 - _TAIL)) * error
    p = 2 * float(stdtr(freedom, -abs(observed) / error))
    return Difference(observed, observed - half, observed + half, p)
