"""Intervals, paired differences, training seeds and Pareto points. Pure NumPy and SciPy.

A metric is kept unit by unit (a unit is a sequence, a latent, a dataset ...) as `num` and `den`.

ratio       value = sum(num) / sum(den), in float64
median ...  value = quantile of num over the units with den > 0

Only units are resampled, never tokens: tokens of one sequence resemble each other, and an interval
from resampled tokens is far too narrow. Two SAEs are compared on the same units in the same draws.

Percentile intervals and p-values of few units are too bold, because a bootstrap draw varies by a
factor (n - 1) / n less than the data and knows nothing of the t distribution. Their tails are
therefore widened as in Hesterberg (2015, https://arxiv.org/abs/1411.5279, "expanded percentile
interval"): alpha' / 2 = Phi(-sqrt(n / (n - 1)) t_{n-1}). With many units nothing changes.

To first order a ratio R is the mean over units of R + z_i, with the influence z_i = (num_i - R den_i) / mean(den).
Student's t, sign flips and the noise of training seeds all work on these.
"""

from collections.abc import Iterator, Sequence
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
FLIPPED_UNITS = 50
"""Below this the p-value of a paired difference is that of sign flips."""
POWER = 0.8
"""How often a comparison finds a difference as large as the minimum detectable one."""

_QUANTILES = {"median": 0.5, "q05": 0.05, "q95": 0.95}
_TAIL = (1 - LEVEL) / 2
_CHUNK_BYTES = 64 * 2**20
_EXACT_UNITS = 12  # up to here all 2^n patterns of signs are gone through
_FLIPS = 10_000
_RARE = 10  # fewer draws than this say little about how rare what they show is


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
    detectable: float
    """Minimum detectable difference: how large it must truly be to be found (p < 5 %) 80 % of the time,
    (t_{.975, n-1} + t_{.8, n-1}) s / sqrt(n)."""


class Counts(NamedTuple):
    """On how many units a is better than b, equal to it, worse."""

    wins: int
    ties: int
    losses: int


class Seeds(NamedTuple):
    """Several training seeds of one recipe: mean of their values, its 95 % interval, and two kinds of noise."""

    mean: float
    low: float | None
    """None, as `high`, where there is nothing to say it from: too few units, too few seeds."""
    high: float | None
    training_sd: float | None
    """Standard deviation over seeds of the values that they would have on endlessly many units.
    None where one seed is all there is, or too few units to know what is evaluation noise."""
    evaluation_sd: float | None
    """Standard error of one seed's value over its units; None where these are too few."""
    n_seeds: int


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
        drawn = drawn_ratios(bootstrap, [checked[i] for i in members])
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
    pairs = [(0, j) for j in range(1, len(others) + 1)]
    return differences_in_pairs([a, *others], pairs, bootstrap)


def differences_in_pairs(
    columns: Sequence[Column], pairs: Sequence[tuple[int, int]], bootstrap: Bootstrap
) -> list[Difference | None]:
    """columns[i] - columns[j] for every pair (i, j): all columns are over the same units, in the same order.

    Of a ratio with fewer than 50 units the interval and the p-value come from two methods: the interval from Student's
    t (below 10 units) or the widened bootstrap, the p-value from sign flips (`sign_flip`). They may disagree where p is
    close to 5 %. With 5 units or fewer an interval may leave out zero, but no p-value is below 2 / 2^5 = 0.0625.
    """
    n_units = bootstrap.n_units
    if any(len(column.num) != n_units for column in columns):
        raise ValueError("paired columns and their bootstrap must have the same number of units")
    if n_units < 2:
        return [None for _ in pairs]
    checked = [Column(*_checked(c.num, c.den), c.statistic) for c in columns]
    if checked[0].statistic != "ratio":
        return [_paired_quantiles(checked[i], checked[j], bootstrap) for i, j in pairs]
    return list(_paired_ratios(checked, pairs, bootstrap))


def independent_difference(a: Column, b: Column) -> Difference | None:
    """a - b where the units are not the same things, such as the latents of two SAEs."""
    return independent_differences([a, b], [(0, 1)])[0]


def independent_differences(
    columns: Sequence[Column], pairs: Sequence[tuple[int, int]]
) -> list[Difference | None]:
    """columns[i] - columns[j] for every pair (i, j) of columns whose units are not the same things."""
    values = [value(*column) for column in columns]
    errors = [_standard_error(column) for column in columns]
    found: list[Difference | None] = []
    for i, j in pairs:
        error_i, error_j = errors[i], errors[j]
        if error_i is None or error_j is None:
            found.append(None)
            continue
        # As many degrees of freedom as the smaller of the two: on the safe side of Welch's.
        freedom = min(len(columns[i].num), len(columns[j].num)) - 1
        error = float(np.hypot(error_i, error_j))
        found.append(student(values[i] - values[j], error, freedom))
    return found


def sign_flip(differences: Floats) -> float:
    """Two-sided p-value of "the mean is zero": how many patterns of signs give a mean at least as far from it.

    Exact up to 12 units, where all 2^n patterns are gone through, so that no p-value is below 2 / 2^n: with 5 units or
    fewer none reaches 5 %. Above, (beyond + 1) / (flips + 1) of 10,000 random patterns, always the same ones.
    """
    return float(_sign_flips(np.asarray(differences, dtype=np.float64)[:, None], _FLIPS)[0])


def win_tie_loss(a: Column, b: Column, best: Literal["min", "max"]) -> Counts:
    """In how many units a's own value num / den is better than b's, among those where both have one (den != 0)."""
    if len(a.num) != len(b.num):
        raise ValueError(f"paired columns need the same units, got {len(a.num)} and {len(b.num)}")
    (num_a, den_a), (num_b, den_b) = _checked(a.num, a.den), _checked(b.num, b.den)
    both = (den_a != 0) & (den_b != 0)
    gain = num_a[both] / den_a[both] - num_b[both] / den_b[both]
    wins, losses = int((gain > 0).sum()), int((gain < 0).sum())
    ties = len(gain) - wins - losses
    return Counts(wins, ties, losses) if best == "max" else Counts(losses, ties, wins)


def seeds(columns: Sequence[Column], paired: bool) -> Seeds:
    """Training seeds of one recipe, a column each. `paired` says that all columns are over the same units.

    Seed s has the value y_s = mu + u_s + mean_i(g_i + h_si): training noise u, and evaluation noise from which units
    i there happen to be. What these do to every seed alike (g) is no difference between seeds, and does not average
    out over them; what they do to one seed alone (h) does. With influences z_si, S seeds and n units

    own           V = sum_si (z_si - z_.i)^2 / ((S - 1)(n - 1) n), the noise of one y_s from h
    training_sd   sqrt(max(0, var_s(y) - V))
    shared        W = max(0, var_i(z_.i) / n - V / S), the noise of every y_s from g
    interval      mean(y) +- t sqrt(var_s(y) / S + W), where t is the average of t_{S-1} and t_{n-1} with the two parts
                  of the variance as weights (Cochran and Cox 1957): Satterthwaite's degrees of freedom cover only
                  92 % with 3 seeds

    Without pairs (latents) nothing is shared: V is the mean squared standard error of a seed, and W is 0.
    """
    if not columns:
        raise ValueError("there must be at least one seed, got no column")
    checked = [Column(*_checked(c.num, c.den), c.statistic) for c in columns]
    values = np.array([value(*column) for column in checked])
    mean, n_seeds = float(values.mean()), len(values)
    errors = [_standard_error(column) for column in checked]
    known = [error for error in errors if error is not None]
    evaluation = float(np.sqrt(np.mean(np.square(known)))) if len(known) == n_seeds else None
    if n_seeds == 1:
        ends = intervals(checked)[0]
        low, high = (None, None) if ends is None else ends
        return Seeds(mean, low, high, None, evaluation, 1)
    spread = float(values.var(ddof=1))
    noise = _crossed_noise(checked) if paired else _SeedNoise(evaluation, 0.0)
    excess = None if noise.own is None else max(0.0, spread - noise.own**2)
    training = None if excess is None else float(np.sqrt(excess))
    if noise.shared is None:
        return Seeds(mean, None, None, training, evaluation, n_seeds)
    parts = [(spread / n_seeds, n_seeds - 1), (noise.shared**2, len(checked[0].num) - 1)]
    half = _half_width([part for part in parts if part[0] > 0])
    return Seeds(mean, mean - half, mean + half, training, evaluation, n_seeds)


def holm(p_values: Sequence[float]) -> Floats:
    """p-values adjusted for how many there are (Holm 1979): below 0.05 still means 5 % for all."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    steps = (len(p) - np.arange(len(p))) * p[order]
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


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
    found = student(value(*column), _delta_error(column), len(column.num) - 1)
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


def _influence(column: Column) -> Floats:
    """What each unit adds to the value, to first order; the mean of squares over n is the squared standard error."""
    if column.statistic == "ratio":
        return np.asarray((column.num - value(*column) * column.den) / column.den.mean())
    error, n = _standard_error(column), len(column.num)
    # A quantile moves with how many units lie above it, at a rate that its interval tells.
    above = np.where(column.den > 0, column.num > value(*column), np.nan)
    sides = np.nan_to_num(above - np.nanmean(above))
    spread = sides.std(ddof=1)
    if error is None or spread == 0:
        return np.zeros(n)
    return np.asarray(sides / spread * error * np.sqrt(n))


def _delta_error(column: Column) -> float:
    """Standard error of a ratio of sums, to first order."""
    return float(np.std(_influence(column), ddof=1) / np.sqrt(len(column.num)))


def _standard_error(column: Column) -> float | None:
    if len(column.num) < 2:
        return None
    if column.statistic == "ratio":
        return _delta_error(column)
    found = _order_statistics(column.num[column.den > 0], _QUANTILES[column.statistic])
    return None if found is None else (found.high - found.low) / (2 * _z())


class _SeedNoise(NamedTuple):
    """Standard errors by evaluation: of one seed alone, and of all seeds alike; None where not known."""

    own: float | None
    shared: float | None


def _half_width(parts: Sequence[tuple[float, int]]) -> float:
    """Of an interval whose variance has several parts, each with its degrees of freedom."""
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return 0.0
    return sum(part * _t(freedom, 1 - _TAIL) for part, freedom in parts) / float(np.sqrt(variance))


def _crossed_noise(columns: Sequence[Column]) -> _SeedNoise:
    n_seeds, n_units = len(columns), len(columns[0].num)
    if any(len(column.num) != n_units for column in columns):
        raise ValueError("paired columns must have the same number of units")
    if n_units < 2:
        return _SeedNoise(None, None)
    z = np.stack([_influence(column) for column in columns], axis=1)  # [n s]
    common = z.mean(axis=1)
    residual = np.square(z - common[:, None]).sum() / ((n_seeds - 1) * (n_units - 1))
    own = residual / n_units
    shared = max(0.0, common.var(ddof=1) / n_units - own / n_seeds)
    return _SeedNoise(float(np.sqrt(own)), float(np.sqrt(shared)))


def drawn_ratios(bootstrap: Bootstrap, columns: Sequence[Column]) -> Floats:
    """[draws c]; NaN in a draw whose denominators sum to zero, which says nothing."""
    stacked = np.stack([part for column in columns for part in column[:2]], axis=1)
    sums = bootstrap.sums(stacked.astype(np.float64))
    num, den = sums[:, 0::2], sums[:, 1::2]
    return np.divide(num, den, out=np.full_like(num, np.nan), where=den != 0)


def paired_draws(columns: Sequence[Column], bootstrap: Bootstrap) -> Floats:
    """[draws c] ratios in the same draws of units; where units are too many to resample, from the normal distribution
    that has the covariance of their influences."""
    n_units = bootstrap.n_units
    if n_units <= MANY_UNITS:
        return drawn_ratios(bootstrap, columns)
    checked = [Column(*_checked(c.num, c.den), c.statistic) for c in columns]
    z = np.stack([_influence(column) for column in checked], axis=1)
    values = [value(*column) for column in checked]
    covariance = z.T @ z / (n_units * (n_units - 1))
    rng = np.random.default_rng(bootstrap.seed)
    return rng.multivariate_normal(values, covariance, bootstrap.draws, method="eigh")


def independent_draws(column: Column, draws: int, seed: int) -> Floats:
    """[draws] values of one column whose units no other column has; another seed gives independent ones.

    Quantiles need no resampling: the r-th smallest of n drawn units is the unit that the r-th smallest of n uniform
    numbers points at, and that one follows a Beta distribution. A ratio of very few or very many units is drawn from
    Student's t about its value.
    """
    rng = np.random.default_rng(seed)
    column = Column(*_checked(column.num, column.den), column.statistic)
    if column.statistic != "ratio":
        return _drawn_quantiles(np.sort(column.num[column.den > 0]), column.statistic, draws, rng)
    n_units = len(column.num)
    if _is_resampled(column):
        # One resampling serves all: draw s of one column and draw s + 1 of another share nothing.
        return np.roll(drawn_ratios(_bootstrap(n_units, draws, 0), [column])[:, 0], seed)
    if n_units < 2:
        return np.full(draws, value(*column))
    return value(*column) + _delta_error(column) * rng.standard_t(n_units - 1, draws)


def _drawn_quantiles(
    ordered: Floats, statistic: Statistic, draws: int, rng: np.random.Generator
) -> Floats:
    n = len(ordered)
    place = _QUANTILES[statistic] * (n - 1)  # as numpy.quantile: between two order statistics
    r = int(place) + 1
    below = rng.beta(r, n - r + 1, draws)
    x = ordered[(n * below).astype(np.int64)]
    if r == n:
        return x
    # The next of n uniform numbers is the smallest of the n - r that lie above.
    above = 1 - (1 - below) * rng.random(draws) ** (1 / (n - r))
    return np.asarray(x + (place - (r - 1)) * (ordered[(n * above).astype(np.int64)] - x))


def widening(n_units: int) -> float:
    """How much further from the value the end of a 95 % interval lies than that of the percentile interval."""
    return float(np.sqrt(n_units / (n_units - 1)) * _t(n_units - 1, 1 - _TAIL) / _z())


def _percentiles(draws: Floats, n_units: int) -> Interval:
    from scipy.special import ndtr

    tail = ndtr(-widening(n_units) * _z())
    # Weibull's positions: of B draws, a share k / (B + 1) lies below the k-th, as the p-value counts them.
    low, high = np.nanquantile(draws, [tail, 1 - tail], method="weibull")
    return Interval(float(low), float(high))


def from_draws(observed: float, draws: Floats, n_units: int) -> Difference:
    """A difference of which there are bootstrap draws [draws]: the widened percentiles, and the p-value that is below
    5 % exactly where these leave out zero.

    Where fewer than 10 draws lie beyond zero, their number says little (of 2,000 draws none can say p < 0.001, and
    Holm needs less), and the p-value is Student's with the standard deviation of the draws.
    """
    from scipy.special import ndtri

    draws = draws[np.isfinite(draws)]
    narrow = np.sqrt((n_units - 1) / n_units)
    beyond = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    # The widening of the interval, backwards.
    tail = min((max(beyond, _RARE) + 1) / (len(draws) + 1), 0.5)
    p = _two_sided(ndtri(tail) * narrow, n_units - 1)
    spread = float(draws.std())
    if beyond < _RARE and spread > 0:
        p = min(p, _two_sided(-abs(observed) / spread * narrow, n_units - 1))
    elif beyond < _RARE:
        p = 0.0
    low, high = _percentiles(draws, n_units)
    error = (high - low) / 2 / _t(n_units - 1, 1 - _TAIL)
    return Difference(observed, low, high, p, _detectable(error, n_units - 1))


def student(observed: float, error: float, freedom: int | float) -> Difference:
    """A difference with its standard error."""
    if error == 0:
        return Difference(observed, observed, observed, 1.0 if observed == 0 else 0.0, 0.0)
    half = _t(freedom, 1 - _TAIL) * error
    p = _two_sided(-abs(observed) / error, freedom)
    return Difference(observed, observed - half, observed + half, p, _detectable(error, freedom))


def _two_sided(t: float, freedom: int | float) -> float:
    from scipy.special import stdtr

    return 2 * float(stdtr(freedom, t))


def _t(freedom: int | float, probability: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, probability))


def _detectable(error: float, freedom: int | float) -> float:
    return (_t(freedom, 1 - _TAIL) + _t(freedom, POWER)) * error


def _paired_ratios(
    columns: Sequence[Column], pairs: Sequence[tuple[int, int]], bootstrap: Bootstrap
) -> Iterator[Difference]:
    n_units = bootstrap.n_units
    values = [value(*column) for column in columns]
    parts = [_influence(c) + v for c, v in zip(columns, values, strict=True)]
    flipped: Sequence[float] = ()
    if n_units < FLIPPED_UNITS and pairs:
        differences = np.stack([parts[i] - parts[j] for i, j in pairs], axis=1)
        flipped = _sign_flips(differences, max(_FLIPS, 40 * len(pairs))).tolist()
    drawn = None
    if FEW_UNITS <= n_units <= MANY_UNITS:
        drawn = drawn_ratios(bootstrap, columns)
    for at, (i, j) in enumerate(pairs):
        error = float(np.std(parts[i] - parts[j], ddof=1) / np.sqrt(n_units))
        found = student(values[i] - values[j], error, n_units - 1)
        if drawn is not None:
            resampled = from_draws(found.value, drawn[:, i] - drawn[:, j], n_units)
            found = resampled._replace(detectable=found.detectable)
        yield found._replace(p=flipped[at]) if flipped else found


def _sign_flips(differences: Floats, flips: int) -> Floats:
    """differences [n c] -> the p-value of each column."""
    n_units, n_columns = differences.shape
    if n_units == 0:
        raise ValueError("a sign-flip test needs at least one unit, got none")
    exact = n_units <= _EXACT_UNITS
    signs = _all_signs(n_units) if exact else _random_signs(n_units, flips)
    # Patterns that give the same sum must count as such, whatever the rounding.
    reach = np.abs(differences.sum(axis=0)) - 1e-12 * np.abs(differences).sum(axis=0)
    chunk = max(1, _CHUNK_BYTES // (8 * len(signs)))
    beyond = np.zeros(n_columns)
    for start in range(0, n_columns, chunk):
        here = slice(start, start + chunk)
        beyond[here] = (np.abs(signs @ differences[:, here]) >= reach[here]).sum(axis=0)
    return np.asarray(beyond / len(signs) if exact else (beyond + 1) / (flips + 1))


@lru_cache(maxsize=2)
def _all_signs(n_units: int) -> Floats:
    patterns = np.arange(2**n_units)[:, None] >> np.arange(n_units)
    return np.where(patterns & 1, 1.0, -1.0)


@lru_cache(maxsize=2)
def _random_signs(n_units: int, flips: int) -> Floats:
    heads = np.random.default_rng(0).integers(2, size=(flips, n_units))
    return np.where(heads == 1, 1.0, -1.0)


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
    return from_draws(observed, np.concatenate(draws), n_units)
