"""Recipes that were trained with several seeds: one column of each, and what may be told apart.

A recipe's value is the mean R over its S seeds. Its column is, unit by unit, the mean over seeds of what the unit
says of their values: R_s + z_si with the influence z_si = (num_i - R_s den_i) / mean(den). Its mean is R, and its
spread over units is what the evaluation does to R: what it does to all seeds alike stays, the rest averages out.
Seeds that have found different numbers of features have their units one after the other.

Two recipes are told apart only where two tests say so: that over units, which takes the trained SAEs as they are, and
Student's t on

    (R_a - R_b) / sqrt(T_a / S_a + T_b / S_b + E)

with the variance T between training seeds (`stats.seeds`), the variance E of the difference by evaluation, and
Satterthwaite's degrees of freedom, S - 1 for each T. Where a recipe has a single seed, its T is taken to be the
other's; where both have, there is the first test alone, and it speaks of these SAEs. How often a recipe is the best is
counted in draws of both noises: resampled units, and sqrt(T / S) times a draw of Student's t.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from saebench import ranks, stats
from saebench.ranks import Best, Ranking
from saebench.stats import Bootstrap, Column, Difference, Floats

_Z = 1.959964  # the 97.5 % point of the normal distribution

_Side = tuple[float | None, int]
"""The spread between training seeds of a recipe, None where it is not known, and how many seeds it has."""


def rank(
    recipes: Mapping[str, Sequence[Column]], best: Best, paired: bool, bootstrap: Bootstrap
) -> Ranking:
    """`recipes` has a column for each seed; `paired` says that all are over the same units."""
    columns = {name: recipe_column(seeds) for name, seeds in recipes.items()}
    draws = bootstrap if paired else None
    ranking = ranks.rank(columns, best, paired, draws)
    if all(len(seeds) == 1 for seeds in recipes.values()):
        return ranking
    names = list(ranking.groups)  # best first
    ordered = [columns[name] for name in names]
    spreads = [stats.seeds(recipes[name], paired).training_sd for name in names]
    sides = [(sd, len(recipes[name])) for sd, name in zip(spreads, names, strict=True)]
    differ = _differ(ordered, sides, draws)
    better, worse = np.triu(differ).sum(axis=0), np.triu(differ).sum(axis=1)
    return Ranking(
        {name: (1 + int(better[i]), len(names) - int(worse[i])) for i, name in enumerate(names)},
        dict(zip(names, ranks.letters(differ), strict=True)),
        dict(zip(names, _shares_of_best(ordered, sides, best, draws), strict=True)),
    )


def recipe_column(seeds: Sequence[Column]) -> Column:
    """Of one seed it is that seed's own; a quantile is that over the units of all seeds."""
    if len(seeds) == 1:
        return seeds[0]
    if seeds[0].statistic != "ratio":
        num, den = (np.concatenate([column[part] for column in seeds]) for part in (0, 1))
        return Column(num, den, seeds[0].statistic)
    values = np.array([stats.value(*column) for column in seeds])
    influences = []
    for value, column in zip(values, seeds, strict=True):
        num, den = (np.asarray(part, dtype=np.float64) for part in column[:2])
        influences.append((num - value * den) / den.mean())
    told = values.mean() + _together(influences)
    return Column(told, np.ones(len(told)), "ratio")


def _together(influences: Sequence[Floats]) -> Floats:
    """Unit by unit where seeds have as many; else one after the other, of the same mean and variance of the mean.

    With n_s units of each of S seeds and N of all, these are z_si N / (S n_s).
    """
    counts = np.array([len(z) for z in influences])
    if len(set(counts.tolist())) == 1:
        return np.asarray(np.mean(influences, axis=0))
    weights = counts.sum() / (len(counts) * counts)
    return np.concatenate([z * w for z, w in zip(influences, weights, strict=True)])


def _differ(
    columns: Sequence[Column], sides: Sequence[_Side], bootstrap: Bootstrap | None
) -> NDArray[np.bool_]:
    """[c c], symmetric: whether two recipes can be told apart; without a bootstrap, unpaired."""
    pairs = list(combinations(range(len(columns)), 2))
    if bootstrap is None:
        found = stats.independent_differences(columns, pairs)
    else:
        found = stats.differences_in_pairs(columns, pairs, bootstrap)
    p = []
    for (i, j), difference in zip(pairs, found, strict=True):
        freedom = min(len(columns[i].num), len(columns[j].num)) - 1
        # What cannot be tested cannot be told apart.
        p.append(1.0 if difference is None else p_value(difference, (sides[i], sides[j]), freedom))
    differ = np.zeros((len(columns), len(columns)), dtype=bool)
    for (i, j), adjusted in zip(pairs, stats.holm(p), strict=True):
        differ[i, j] = differ[j, i] = adjusted < 1 - stats.LEVEL
    return differ


def p_value(difference: Difference, sides: tuple[_Side, _Side], freedom: int) -> float:
    """The larger one of the two tests of a pair; `freedom` is that of the evaluation."""
    known = [(sd, n) for sd, n in sides if sd is not None]
    if not known:
        return difference.p
    terms = [(sd**2 / n, n - 1) for sd, n in known]
    if len(known) < len(sides):
        # A single seed says nothing of its recipe's spread.
        ((sd, counted),) = known
        terms = [(sd**2 * sum(1 / n for _, n in sides), counted - 1)]
    terms.append((((difference.high - difference.low) / (2 * _Z)) ** 2, freedom))
    variance = sum(term for term, _ in terms)
    if variance == 0:
        return difference.p
    satterthwaite = variance**2 / sum(term**2 / degrees for term, degrees in terms)
    return max(difference.p, stats.student(difference.value, variance**0.5, satterthwaite).p)


def _shares_of_best(
    columns: Sequence[Column], sides: Sequence[_Side], best: Best, bootstrap: Bootstrap | None
) -> list[float]:
    if bootstrap is not None and columns[0].statistic == "ratio":
        drawn = stats.drawn_ratios(bootstrap, columns)
    else:
        each = [stats.independent_draws(c, stats.DRAWS, seed) for seed, c in enumerate(columns)]
        drawn = np.stack(each, axis=1)
    known = [(sd, n) for sd, n in sides if sd is not None]
    rng = np.random.default_rng(0)
    for i, (sd, n) in enumerate(sides):
        if known:
            # A recipe with a single seed is taken to scatter as the one that scatters the most.
            spread, counted = max(known) if sd is None else (sd, n)
            drawn[:, i] += spread / np.sqrt(n) * rng.standard_t(counted - 1, len(drawn))
    drawn = drawn if best == "max" else -drawn
    drawn = drawn[np.isfinite(drawn).all(axis=1)]
    winners = drawn == drawn.max(axis=1, keepdims=True)
    return [float(share) for share in (winners / winners.sum(axis=1, keepdims=True)).mean(axis=0)]
