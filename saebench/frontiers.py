"""Families of SAEs compared along the sparsity axis, at equal L0.

A family is a curve m(L0) through its SAEs: monotone cubic interpolation (PCHIP, Fritsch and Butland 1984,
https://doi.org/10.1137/0905021) in ln L0, which never overshoots the points, and no extrapolation.

area            1 / (ln b - ln a) * integral from a to b of m d ln L0, over the range [a, b] of L0 that both families
                have: the mean of the metric at equal sparsity, in the metric's own unit
distance        of one SAE from a family: its m less that of the curve at its own measured L0
dominance       a simultaneous 95 % band of the difference of the two curves leaves out zero everywhere
hypervolume     share of a fixed box, log10 L0 from 1 to 1,000 by |ideal - m| from 0 to |ideal - worst|, that is no
                better in either than some SAE (Zitzler and Thiele 1999, https://doi.org/10.1109/4235.797969)

The uncertainty of area and band is that of the evaluation: units are resampled, and each draw has its own curves.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from saebench import stats
from saebench.stats import FEW_UNITS, LEVEL, Bootstrap, Column, Difference, Floats

Best = Literal["min", "max"]

L0_BEST = 1.0
L0_WORST = 1_000.0
"""The box of the hypervolume. Fixed, so that adding an SAE moves no other's number."""

_BAND_POINTS = 50  # and the L0s of the SAEs
_SEARCH_POINTS = 1_000
_SEPARATE = 1e-9  # in ln L0: how far two SAEs are kept apart where they coincide in a draw


class Point(NamedTuple):
    """One SAE of a family."""

    l0: Column
    metric: Column


Family = Sequence[Point]


class Comparison(NamedTuple):
    """Two families, a - b, over the range of L0 that both have."""

    low_l0: float
    high_l0: float
    a: float
    """Area of a: the mean of the metric over ln L0."""
    b: float
    difference: Difference
    """Of the areas."""
    crossings: tuple[float, ...]
    """L0s where the curves through the measured values cross; two that lie within 1/1000 of the range are not seen."""
    dominates: Literal["a", "b"] | None
    """The family that is better everywhere in the range, with 95 % confidence in all of it at once."""


class Distance(NamedTuple):
    """One SAE, and a family at its L0."""

    l0: float
    sae: float
    frontier: float
    """The metric of the family there."""
    difference: Difference
    """sae - frontier."""


class _Curves(NamedTuple):
    """As many curves as there are draws, through k points each: [draws k] ln L0 (ascending), metric, slope."""

    x: Floats
    y: Floats
    slope: Floats


class _Pair(NamedTuple):
    """The curves of two families."""

    a: _Curves
    b: _Curves


class _Draws(NamedTuple):
    """[draws k] values of the SAEs of a family."""

    l0: Floats
    metric: Floats


def area(l0: Floats, metric: Floats, low: float, high: float) -> float:
    """The mean over ln L0 from `low` to `high` of the curve; SAEs of equal L0 are one point, their mean."""
    points = _Draws(
        np.asarray(l0, dtype=np.float64)[None], np.asarray(metric, dtype=np.float64)[None]
    )
    first, last = _range(points)
    if not first <= low < high <= last:
        raise ValueError(
            f"an area from L0 {low:g} to {high:g} needs a curve that reaches as far, and this one goes from "
            f"{first:g} to {last:g}; nothing is extrapolated"
        )
    return float(_areas(_curves(points, points.l0[0]), low, high)[0])


def compare(a: Family, b: Family, best: Best, paired: bool) -> Comparison:
    """`paired` says that the metric of every SAE of both families is over the same units, in the same order.

    Paired, all curves of one draw come from the same drawn units. L0 is drawn with them where it has as many units, and
    held at its value where not (a metric over datasets). Below 10 units the jackknife over units stands in for the
    bootstrap, with Student's t; above, interval and p-value are both from the widened bootstrap, without sign flips.
    Unpaired (latents), and for quantiles, every column has draws of its own.

    The range of L0 is that of the measured values, in every draw; where the curve of a draw falls short of it, it goes
    on at the value of its end.
    """
    measured = [_measured(family) for family in (a, b)]
    low, high = _common_range(*measured)
    n_units = _n_units(a, b, paired)
    places = _band_places(measured, low, high)
    curves = _Pair(*(_curves(points, points.l0[0]) for points in measured))
    area_a, area_b = (float(_areas(curve, low, high)[0]) for curve in curves)
    gap = _gaps(curves, places)[0]

    together = paired and a[0].metric.statistic == "ratio"
    drawn = _drawn_pair(a, b, together)
    drawn_areas = _areas(drawn.a, low, high) - _areas(drawn.b, low, high)
    drawn_gaps = _gaps(drawn, places)
    if together and n_units < FEW_UNITS:
        error = float(_jackknife_error(drawn_areas[:, None])[0])
        difference = stats.student(area_a - area_b, error, n_units - 1)
        margin = _jackknife_margin(drawn_gaps)
    else:
        difference = stats.from_draws(area_a - area_b, drawn_areas, n_units)
        margin = _band_margin(drawn_gaps - gap, n_units)
    return Comparison(
        low_l0=low,
        high_l0=high,
        a=area_a,
        b=area_b,
        difference=difference,
        crossings=_crossings(curves, low, high),
        dominates=_dominant(gap if best == "max" else -gap, margin),
    )


def at_point(sae: Point, family: Family) -> Distance:
    """How far an SAE is from a family at its own measured L0, which must lie in the family's range.

    Metrics are ratios over the same units, in the same order. All is drawn together, as in `compare` of pairs: in each
    draw the SAE has an L0 of its own, and the curve of that draw is read there.
    """
    measured, own = _measured(family), _measured([sae])
    l0, value = float(own.l0[0, 0]), float(own.metric[0, 0])
    low, high = _range(measured)
    if not low <= l0 <= high:
        raise ValueError(
            f"the family goes from L0 {low:g} to {high:g}, and the SAE has {l0:g}; nothing is extrapolated"
        )
    n_units = _n_units([sae], family, paired=True)
    if sae.metric.statistic != "ratio":
        raise ValueError(f"expected a ratio of sums over units, got a {sae.metric.statistic}")
    frontier = float(_at(_curves(measured, measured.l0[0]), np.log([l0]))[0, 0])

    drawn = _drawn_together([sae, *family])
    curves = _curves(_Draws(drawn.l0[:, 1:], drawn.metric[:, 1:]), measured.l0[0])
    drawn_gaps = drawn.metric[:, 0] - _at(curves, np.log(drawn.l0[:, :1]))[:, 0]
    if n_units < FEW_UNITS:
        error = float(_jackknife_error(drawn_gaps[:, None])[0])
        difference = stats.student(value - frontier, error, n_units - 1)
    else:
        difference = stats.from_draws(value - frontier, drawn_gaps, n_units)
    return Distance(l0, value, frontier, difference)


def hypervolume(l0: Floats, metric: Floats, worst: float, ideal: float) -> float:
    """The share of the box that some SAE dominates: 1 is a perfect SAE at L0 1, 0 one that is worth nothing.

    `worst` is the metric of an SAE that is worth nothing and `ideal` that of a perfect one. What is worse than the box
    adds nothing, what is better counts as on its edge. It grows with the number of SAEs: compare equally many.
    """
    l0, metric = np.asarray(l0, dtype=np.float64), np.asarray(metric, dtype=np.float64)
    if worst == ideal:
        raise ValueError(f"worst and ideal must differ, got {worst:g} for both")
    if (l0 < 0).any():
        raise ValueError(f"an L0 is never negative, got {l0.min():g}")
    width = np.log10(L0_WORST / L0_BEST)
    x = np.log10(np.clip(l0, L0_BEST, L0_WORST) / L0_BEST) / width
    y = np.minimum(np.abs(ideal - metric) / abs(ideal - worst), 1)
    order = np.lexsort((y, x))
    reach = np.minimum.accumulate(y[order])
    return float(np.sum(np.diff(x[order], append=1) * (1 - reach)))


def _measured(family: Family) -> _Draws:
    return _Draws(
        *(np.array([[stats.value(*column) for column in part]]) for part in _columns(family))
    )


def _columns(points: Family) -> tuple[list[Column], list[Column]]:
    return [point.l0 for point in points], [point.metric for point in points]


def _range(points: _Draws) -> tuple[float, float]:
    l0 = points.l0[0]
    if (l0 <= 0).any():
        raise ValueError(f"a curve over ln L0 needs L0s above zero, got {l0.min():g}")
    if len(np.unique(l0)) < 2:
        listed = ", ".join(f"{value:g}" for value in l0)
        raise ValueError(
            f"a curve needs SAEs of at least two different L0s, got {listed or 'none'}"
        )
    return float(l0.min()), float(l0.max())


def _common_range(a: _Draws, b: _Draws) -> tuple[float, float]:
    ranges = [_range(a), _range(b)]
    low, high = max(first for first, _ in ranges), min(last for _, last in ranges)
    if low >= high:
        (first_a, last_a), (first_b, last_b) = ranges
        raise ValueError(
            f"the families have no range of L0 in common: one goes from {first_a:g} to {last_a:g}, the other from "
            f"{first_b:g} to {last_b:g}. Compare families trained to overlapping L0s."
        )
    return low, high


def _n_units(a: Family, b: Family, paired: bool) -> int:
    """Of the metric; the smallest number where these differ."""
    found = {len(point.metric.num) for point in (*a, *b)}
    if paired and len(found) > 1:
        raise ValueError(f"paired columns must have the same number of units, got {sorted(found)}")
    if min(found) < 2:
        raise ValueError("families are compared over at least two units, got one")
    return min(found)


def _band_places(measured: Sequence[_Draws], low: float, high: float) -> Floats:
    """In ln L0: a grid over the common range, and the SAEs in it."""
    grid = np.linspace(np.log(low), np.log(high), _BAND_POINTS)
    points = np.log(np.concatenate([points.l0[0] for points in measured]))
    return np.union1d(grid, points[(points > grid[0]) & (points < grid[-1])])


def _drawn_pair(a: Family, b: Family, together: bool) -> _Pair:
    drawn = _drawn_together([*a, *b]) if together else _drawn_apart([*a, *b])
    families = zip((a, b), (slice(len(a)), slice(len(a), None)), strict=True)
    return _Pair(
        *(
            _curves(_Draws(drawn.l0[:, of], drawn.metric[:, of]), _measured(family).l0[0])
            for family, of in families
        )
    )


def _drawn_together(points: Family) -> _Draws:
    """From the same draws of units; below 10 units those that leave out one unit each."""
    l0, metric = _columns(points)
    n_units = len(metric[0].num)
    shared = [column for column in l0 if len(column.num) == n_units]
    if n_units < FEW_UNITS:
        drawn = _without_each([*metric, *shared])
    else:
        drawn = stats.paired_draws([*metric, *shared], Bootstrap(n_units))
    l0_draws = np.tile([stats.value(*column) for column in l0], (len(drawn), 1))
    l0_draws[:, [len(column.num) == n_units for column in l0]] = drawn[:, len(metric) :]
    return _usable(_Draws(l0_draws, drawn[:, : len(metric)]))


def _drawn_apart(points: Family) -> _Draws:
    l0, metric = _columns(points)
    drawn = [
        stats.independent_draws(column, stats.DRAWS, seed)
        for seed, column in enumerate([*l0, *metric])
    ]
    return _usable(_Draws(np.stack(drawn[: len(l0)], axis=1), np.stack(drawn[len(l0) :], axis=1)))


def _usable(drawn: _Draws) -> _Draws:
    """Without draws that leave an SAE no value, or no active latent."""
    kept = np.isfinite(drawn.metric).all(axis=1) & (drawn.l0 > 0).all(axis=1)
    return _Draws(drawn.l0[kept], drawn.metric[kept])


def _without_each(columns: Sequence[Column]) -> Floats:
    """[n c] ratios, each over all units but one."""
    num, den = (np.stack([column[part] for column in columns], axis=1) for part in (0, 1))
    rest = den.sum(axis=0) - den
    out = np.full(rest.shape, np.nan)
    np.divide(num.sum(axis=0) - num, rest, out=out, where=rest != 0)
    return out


def _curves(points: _Draws, l0: Floats) -> _Curves:
    """Curves through the points of each draw. SAEs of the same measured L0 are one point, their mean."""
    _, group = np.unique(l0, return_inverse=True)
    members = group[:, None] == np.arange(group.max() + 1)
    mean = members / members.sum(axis=0)
    x, y = np.log(points.l0 @ mean), points.metric @ mean
    order = np.argsort(x, axis=1, kind="stable")
    x, y = np.take_along_axis(x, order, 1), np.take_along_axis(y, order, 1)
    gaps = np.maximum(np.diff(x, axis=1), _SEPARATE)
    x = np.concatenate([x[:, :1], x[:, :1] + np.cumsum(gaps, axis=1)], axis=1)
    return _Curves(x, y, _slopes(gaps, np.diff(y, axis=1) / gaps))


def _slopes(h: Floats, delta: Floats) -> Floats:
    """Slopes at the points [draws k] from the widths of the intervals and the secants over them [draws k-1]."""
    if h.shape[1] == 1:
        return np.repeat(delta, 2, axis=1)
    h0, h1, d0, d1 = h[:, :-1], h[:, 1:], delta[:, :-1], delta[:, 1:]
    same = d0 * d1 > 0
    # A weighted harmonic mean inside, zero at a turning point.
    inverse = np.divide(2 * h1 + h0, d0, out=np.ones_like(d0), where=same)
    inverse += np.divide(h1 + 2 * h0, d1, out=np.zeros_like(d1), where=same)
    inner = np.where(same, 3 * (h0 + h1) / inverse, 0.0)
    first = _end_slope(h[:, 0], h[:, 1], delta[:, 0], delta[:, 1])
    last = _end_slope(h[:, -1], h[:, -2], delta[:, -1], delta[:, -2])
    return np.concatenate([first[:, None], inner, last[:, None]], axis=1)


def _end_slope(h0: Floats, h1: Floats, d0: Floats, d1: Floats) -> Floats:
    """Of the parabola through the three points at an end, limited so that the curve stays monotone there."""
    slope = ((2 * h0 + h1) * d0 - h0 * d1) / (h0 + h1)
    slope = np.where(np.sign(slope) != np.sign(d0), 0.0, slope)
    too_steep = (np.sign(d0) != np.sign(d1)) & (np.abs(slope) > 3 * np.abs(d0))
    return np.where(too_steep, 3 * d0, slope)


class _Pieces(NamedTuple):
    """The piece of each curve [draws g] that each of g places lies in, and where in it: t from 0 to 1."""

    place: NDArray[np.intp]
    t: Floats
    width: Floats


def _pieces(curves: _Curves, places: Floats) -> _Pieces:
    """`places` [g], or [draws g] where every curve has its own. Before the first point and after the last, t is 0 or 1:
    there the curve is constant."""
    index = (curves.x[:, None, 1:-1] <= places[..., None]).sum(axis=2)
    left = np.take_along_axis(curves.x, index, 1)
    width = np.take_along_axis(curves.x, index + 1, 1) - left
    return _Pieces(index, np.clip((places - left) / width, 0, 1), width)


def _at(curves: _Curves, places: Floats) -> Floats:
    """[draws g] the curves at g places, in ln L0, or each at g of its own."""
    index, t, width = _pieces(curves, places)
    y0, y1 = (np.take_along_axis(curves.y, index + end, 1) for end in (0, 1))
    s0, s1 = (np.take_along_axis(curves.slope, index + end, 1) * width for end in (0, 1))
    rise = t**2 * (3 - 2 * t)
    return np.asarray(y0 + (y1 - y0) * rise + s0 * t * (1 - t) ** 2 - s1 * t**2 * (1 - t))


def _gaps(curves: _Pair, places: Floats) -> Floats:
    return np.asarray(_at(curves.a, places) - _at(curves.b, places))


def _areas(curves: _Curves, low: float, high: float) -> Floats:
    """[draws] means over ln L0 from low to high."""
    ends = np.log([low, high])
    upto = _integral(curves, ends)
    return np.asarray((upto[:, 1] - upto[:, 0]) / (ends[1] - ends[0]))


def _integral(curves: _Curves, places: Floats) -> Floats:
    """[draws g] integrals from the first point of each curve to g places, exact for cubic pieces."""
    x, y, slope = curves
    h = np.diff(x, axis=1)
    pieces = h * (y[:, :-1] + y[:, 1:]) / 2 + h**2 * (slope[:, :-1] - slope[:, 1:]) / 12
    before = np.concatenate([np.zeros_like(x[:, :1]), np.cumsum(pieces, axis=1)], axis=1)
    index, t, width = _pieces(curves, places)
    y0, y1 = (np.take_along_axis(y, index + end, 1) for end in (0, 1))
    s0, s1 = (np.take_along_axis(slope, index + end, 1) * width for end in (0, 1))
    inside = y0 * t + (y1 - y0) * (t**3 - t**4 / 2)
    inside += s0 * (t**2 / 2 - 2 * t**3 / 3 + t**4 / 4) - s1 * (t**3 / 3 - t**4 / 4)
    beyond = places - np.clip(places, x[:, :1], x[:, -1:])
    flat = beyond * np.where(beyond < 0, y[:, :1], y[:, -1:])
    return np.asarray(np.take_along_axis(before, index, 1) + inside * width + flat)


def _jackknife_error(left_out: Floats) -> Floats:
    """Standard errors [c] from values without each unit [n c]."""
    return np.asarray(np.sqrt(np.square(_jackknife_parts(left_out)).sum(axis=0)))


def _jackknife_parts(left_out: Floats) -> Floats:
    n_units = len(left_out)
    return np.asarray((left_out - left_out.mean(axis=0)) * np.sqrt((n_units - 1) / n_units))


def _jackknife_margin(left_out: Floats) -> Floats:
    """[g] half-width of the simultaneous band: the largest of g multivariate t variables, simulated."""
    parts, freedom = _jackknife_parts(left_out), len(left_out) - 1
    error = _jackknife_error(left_out)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((stats.DRAWS, len(parts))) @ parts
    scale = np.sqrt(rng.chisquare(freedom, (stats.DRAWS, 1)) / freedom)
    return _sup_t(noise / scale, error)


def _band_margin(deviations: Floats, n_units: int) -> Floats:
    """[g] half-width of the simultaneous band from bootstrap deviations [draws g], widened as a single interval is."""
    widened = deviations * stats.widening(n_units)
    return _sup_t(widened, deviations.std(axis=0))


def _sup_t(deviations: Floats, error: Floats) -> Floats:
    share = np.divide(np.abs(deviations), error, out=np.zeros_like(deviations), where=error > 0)
    return np.asarray(np.quantile(share.max(axis=1), LEVEL) * error)


def _dominant(gain: Floats, margin: Floats) -> Literal["a", "b"] | None:
    if (gain - margin > 0).all():
        return "a"
    return "b" if (gain + margin < 0).all() else None


def _crossings(curves: _Pair, low: float, high: float) -> tuple[float, ...]:
    from scipy.optimize import brentq

    def gap(place: float) -> float:
        return float(_gaps(curves, np.array([place]))[0, 0])

    places = np.linspace(np.log(low), np.log(high), _SEARCH_POINTS + 1)
    signs = np.sign(_gaps(curves, places)[0])
    apart = np.nonzero(signs)[0]  # where the curves touch, they have not crossed yet
    turns = [(i, j) for i, j in zip(apart, apart[1:], strict=False) if signs[i] != signs[j]]
    return tuple(float(np.exp(brentq(gap, places[i], places[j]))) for i, j in turns)
