"""Noise: how far a metric moves when the evaluation is drawn anew, and which difference one run can show."""

import math
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from saebench.reliability.missing import Missing, split
from saebench.reliability.rows import NOTHING, Row
from saebench.stats import Floats

ENOUGH_SAES = 3
"""For a median coefficient of variation."""

_Z = 1.96


class Noise(NamedTuple):
    """How far trained SAEs move when their evaluation is drawn anew: y_ir of SAE i in draw r.

    sd                          s = sqrt(sum_ir (y_ir - y_i.)^2 / sum_i (R_i - 1))
    cv                          median over SAEs of s_i / |y_i.|
    smallest_difference         1.96 sqrt(2) s: two SAEs, each on a draw of its own
    smallest_paired_difference  1.96 s_d, two SAEs on the same draw, with
                                s_d^2 = mean over pairs of SAEs of a site of var_r(y_ir - y_jr)
    signal_to_noise             variance of base values between all trained SAEs of a site / s^2
    interval_ratio              s / sqrt(mean_ir ((high_ir - low_ir) / 3.92)^2): near 1 the reported 95 % intervals
                                cover what they claim, above 1 they are too narrow

    Draws that have fewer tokens than the suite's evaluation (`share` of them) are noisier than it is: their deviations
    from y_i. are taken times sqrt(share), as those of means over independent documents are.
    """

    n_saes: int
    n_draws: int
    """Of the SAE that has most."""
    share: float | None
    """Evaluation tokens of a draw over those of the suite."""
    sd: float | None
    cv: float | None
    smallest_difference: float | None
    smallest_paired_difference: float | None
    signal_to_noise: float | None
    interval_ratio: float | None
    missing: dict[str, str]


class Draws(NamedTuple):
    """Trained SAEs that were drawn anew."""

    sites: list[str]
    y: Floats
    """[n_saes n_draws], NaN where an SAE was not in a draw."""
    implied: list[float]
    """Standard deviations that the intervals of these values imply."""
    share: float | Missing


def draws_of(rows: Sequence[Row]) -> Draws:
    drawn = [row for row in rows if row.what == "redraw" and row.kind == "trained"]
    saes = list(dict.fromkeys(row.sae for row in drawn))
    draws = list(dict.fromkeys(row.setting for row in drawn))
    y = np.full((len(saes), len(draws)), np.nan)
    for row in drawn:
        y[saes.index(row.sae), draws.index(row.setting)] = row.value
    sites = {row.sae: row.site for row in drawn}
    shares = [row.share for row in drawn if row.share is not None]
    if not shares:
        nothing = Missing("no evaluation of a trained SAE was drawn anew")
        return Draws([sites[sae] for sae in saes], y, _implied(drawn), nothing)
    share = min(shares)
    mean = np.array([[float(_finite(x).mean())] for x in y])
    smaller = math.sqrt(share)
    implied = [smaller * sd for sd in _implied(drawn)]
    return Draws([sites[sae] for sae in saes], mean + smaller * (y - mean), implied, share)


def noise_of(rows: Sequence[Row], draws: Draws) -> Noise:
    counts = np.isfinite(draws.y).sum(axis=1)
    s = _pooled_sd(draws.y)
    d = s if isinstance(s, Missing) else paired_sd(draws)
    parts = {
        "share": draws.share,
        "sd": s,
        "cv": s if isinstance(s, Missing) else _cv(draws.y),
        "smallest_difference": s if isinstance(s, Missing) else _Z * math.sqrt(2) * s,
        "smallest_paired_difference": d if isinstance(d, Missing) else _Z * d,
        "signal_to_noise": _signal_to_noise(rows, s),
        "interval_ratio": _interval_ratio(s, draws.implied),
    }
    return Noise(n_saes=len(draws.y), n_draws=int(counts.max(initial=0)), **split(parts))


def yardstick(rows: Sequence[Row], noise: Noise) -> float | Missing:
    """The sd in which changes are measured."""
    if noise.sd:
        return noise.sd
    claimed = _claimed(_implied(row for row in rows if row.is_panel))
    return claimed or Missing("neither new draws nor intervals say how large noise is")


def paired_sd(draws: Draws) -> float | Missing:
    """s_d of `Noise`."""
    pairs = [
        draws.y[i] - draws.y[j]
        for i, j in combinations(range(len(draws.y)), 2)
        if draws.sites[i] == draws.sites[j]
    ]
    found = _pooled_sd(np.array(pairs)) if pairs else None
    if found is None or isinstance(found, Missing):
        return Missing("no two trained SAEs of one site were in the same new draws")
    return found


def within_groups(labelled: Iterable[tuple[Any, float]]) -> tuple[float, int]:
    """Sum of squares about the means of groups, and its degrees of freedom."""
    groups: dict[Any, list[float]] = {}
    for label, value in labelled:
        groups.setdefault(label, []).append(value)
    squares = sum(float(np.square(np.array(g) - np.mean(g)).sum()) for g in groups.values())
    return squares, sum(len(g) - 1 for g in groups.values())


def _pooled_sd(y: Floats) -> float | Missing:
    """sqrt of the mean variance within rows, by degrees of freedom."""
    freedom = int((np.isfinite(y).sum(axis=1) - 1).clip(0).sum())
    if freedom == 0:
        return Missing("no evaluation of a trained SAE was drawn anew")
    squares = sum(float(np.square(x - x.mean()).sum()) for x in map(_finite, y) if len(x))
    sd = math.sqrt(squares / freedom)
    # What only rounding moves does not move.
    return sd if sd > NOTHING * float(np.nanmax(np.abs(y))) else 0.0


def _finite(x: Floats) -> Floats:
    return x[np.isfinite(x)]


def _cv(y: Floats) -> float | Missing:
    found = []
    for x in map(_finite, y):
        if len(x) > 1 and abs(float(x.mean())) > NOTHING:
            found.append(float(x.std(ddof=1)) / abs(float(x.mean())))
    if len(found) < ENOUGH_SAES:
        return Missing(
            f"{len(found)} SAEs were drawn anew and have a mean that is not 0; {ENOUGH_SAES} are needed"
        )
    return float(np.median(found))


def _signal_to_noise(rows: Sequence[Row], s: float | Missing) -> float | Missing:
    if isinstance(s, Missing):
        return s
    if s == 0:
        return Missing("the draws do not differ")
    panel = [row for row in rows if row.is_panel]
    squares, freedom = within_groups([(row.site, row.value) for row in panel])
    if freedom == 0:
        return Missing("no two trained SAEs are at one site")
    between = math.sqrt(squares / freedom)
    largest = max(abs(row.value) for row in panel)
    return (between / s) ** 2 if between > NOTHING * largest else 0.0


def _interval_ratio(s: float | Missing, implied: Sequence[float]) -> float | Missing:
    if isinstance(s, Missing):
        return s
    claimed = _claimed(implied)
    if claimed == 0:
        return Missing("no interval is reported that has a length")
    return s / claimed


def _implied(rows: Iterable[Row]) -> list[float]:
    return [
        (row.high - row.low) / (2 * _Z)
        for row in rows
        if row.low is not None and row.high is not None
    ]


def _claimed(implied: Sequence[float]) -> float:
    """Their root mean square."""
    return math.sqrt(float(np.mean(np.square(implied)))) if implied else 0.0
