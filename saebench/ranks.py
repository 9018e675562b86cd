"""Ranks as far as the data can tell them: intervals, letters, and how often each SAE would be the best.

All pairs of one metric are tested, and their p-values adjusted together (Holm 1979), so that with 95 % confidence not
one of the statements "a is better than b" is false.

rank interval   of a: [1 + how many are significantly better, N - how many are significantly worse]
letters         two SAEs share a letter exactly where they cannot be told apart (compact letter display, insert and
                absorb: Piepho 2004, https://doi.org/10.1198/1061860043515)
P(best)         the share of bootstrap draws in which the SAE has the best value; ties split it
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from string import ascii_letters
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from saebench import stats
from saebench.stats import Bootstrap, Column, Floats

Best = Literal["min", "max"]


class Ranking(NamedTuple):
    """One metric of several SAEs, by name."""

    ranks: dict[str, tuple[int, int]]
    """The lowest and the highest rank that an SAE may have; 1 is the best."""
    groups: dict[str, str]
    """Letters, from the best value down; a letter beyond z and Z has a dot before it."""
    p_best: dict[str, float]


def rank(
    columns: Mapping[str, Column],
    best: Best,
    paired: bool,
    bootstrap: Bootstrap | None = None,
) -> Ranking:
    """`paired` says that all columns are over the same units, in the same order; `bootstrap` spares drawing these
    again. SAEs with too few units to be tested cannot be told apart from any other."""
    sign = 1 if best == "max" else -1
    # Best first, so that whoever comes before another is the better one where the two differ.
    names = sorted(columns, key=lambda name: -sign * stats.value(*columns[name]))
    ordered = [columns[name] for name in names]
    if paired and ordered and bootstrap is None:
        bootstrap = Bootstrap(len(ordered[0].num))
    differ = _significant(ordered, bootstrap if paired else None)
    better, worse = np.triu(differ).sum(axis=0), np.triu(differ).sum(axis=1)
    drawn = _draws(ordered, bootstrap if paired else None)
    shares = _shares_of_best(sign * drawn) if ordered else []
    return Ranking(
        ranks={
            name: (1 + int(better[i]), len(names) - int(worse[i])) for i, name in enumerate(names)
        },
        groups=dict(zip(names, letters(differ), strict=True)),
        p_best=dict(zip(names, shares, strict=True)),
    )


def _significant(columns: Sequence[Column], bootstrap: Bootstrap | None) -> NDArray[np.bool_]:
    """[c c], symmetric: whether two SAEs can be told apart; without a bootstrap, unpaired."""
    pairs = list(combinations(range(len(columns)), 2))
    if bootstrap is None:
        found = stats.independent_differences(columns, pairs)
    else:
        found = stats.differences_in_pairs(columns, pairs, bootstrap)
    # What cannot be tested cannot be told apart.
    adjusted = stats.holm([1.0 if difference is None else difference.p for difference in found])
    differ = np.zeros((len(columns), len(columns)), dtype=bool)
    for (i, j), p in zip(pairs, adjusted, strict=True):
        differ[i, j] = differ[j, i] = p < 1 - stats.LEVEL
    return differ


def letters(differ: NDArray[np.bool_]) -> list[str]:
    n = len(differ)
    groups = [frozenset(range(n))] if n else []
    for i, j in zip(*np.nonzero(np.triu(differ)), strict=True):
        split = [group - {gone} for group in groups if {i, j} <= group for gone in (i, j)]
        whole = [group for group in groups if not {i, j} <= group]
        groups = whole + _absorbed(split, whole)
    groups.sort(key=sorted)
    return ["".join(_letter(at) for at, group in enumerate(groups) if i in group) for i in range(n)]


def _absorbed(new: Iterable[frozenset[int]], old: Sequence[frozenset[int]]) -> list[frozenset[int]]:
    """The new groups that no other group holds already."""
    kept: list[frozenset[int]] = []
    for group in sorted(set(new), key=len, reverse=True):
        if not any(group <= other for other in (*old, *kept)):
            kept.append(group)
    return kept


def _letter(at: int) -> str:
    dots, place = divmod(at, len(ascii_letters))
    return "." * dots + ascii_letters[place]


def _draws(columns: Sequence[Column], bootstrap: Bootstrap | None) -> Floats:
    """[draws c] values, in the same draws of units where these are shared."""
    if bootstrap is None or columns[0].statistic != "ratio":
        drawn = [
            stats.independent_draws(column, stats.DRAWS, seed)
            for seed, column in enumerate(columns)
        ]
        return np.stack(drawn, axis=1) if drawn else np.zeros((stats.DRAWS, 0))
    return stats.paired_draws(columns, bootstrap)


def _shares_of_best(drawn: Floats) -> list[float]:
    """drawn [draws c], where larger is better -> the share of each column, [c]."""
    drawn = drawn[np.isfinite(drawn).all(axis=1)]
    winners = drawn == drawn.max(axis=1, keepdims=True)
    shares = winners / winners.sum(axis=1, keepdims=True)
    return [float(share) for share in shares.mean(axis=0)]
