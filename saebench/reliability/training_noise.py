"""Training noise: how much of a metric's variance between SAEs is their training seed."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from saebench.reliability.missing import Missing, split
from saebench.reliability.noise import Draws, paired_sd, within_groups
from saebench.reliability.rows import Row


class TrainingNoise(NamedTuple):
    """One-way random effects of recipe and seed: y = site + recipe b + seed u + evaluation e, on the same draw for all.

    With mean squares MS_between recipes of a site and MS_within a recipe over base values,

    evaluation_sd  sigma_e = s_d / sqrt(2), of the paired differences of `Noise`: what a draw does to every SAE alike
                   is no difference between seeds
    training_sd    sigma_u = sqrt(max(0, MS_within - sigma_e^2)); sigma_e is left in where it was not measured
    recipe_sd      sigma_b = sqrt(max(0, (MS_between - MS_within) / n_0)), n_0 the seeds of a recipe: their mean n, less
                   what unequal numbers take from it, (N - sum n^2 / N) / (recipes - 1)
    seed_share     sigma_u^2 / (sigma_b^2 + sigma_u^2 + sigma_e^2)
    """

    n_recipes: int
    """With two seeds or more: family, width, asked-for L0 and site are the same."""
    n_saes: int
    evaluation_sd: float | None
    training_sd: float | None
    recipe_sd: float | None
    seed_share: float | None
    missing: dict[str, str]


def training_noise_of(rows: Sequence[Row], draws: Draws) -> TrainingNoise:
    recipes: dict[Any, list[Row]] = {}
    for row in rows:
        if row.is_panel and row.seed is not None:
            recipes.setdefault(row.recipe, []).append(row)
    several = {recipe: of for recipe, of in recipes.items() if len({row.seed for row in of}) > 1}
    panel = [row for of in several.values() for row in of]
    paired = paired_sd(draws)
    e = paired if isinstance(paired, Missing) else paired / math.sqrt(2)
    parts: dict[str, float | Missing] = {"evaluation_sd": e} | _effects(panel, e)
    return TrainingNoise(n_recipes=len(several), n_saes=len(panel), **split(parts))


def _effects(panel: Sequence[Row], e: float | Missing) -> dict[str, float | Missing]:
    if not panel:
        one = Missing("no recipe was trained with two seeds")
        return {"training_sd": one, "recipe_sd": one, "seed_share": one}
    squares, freedom = within_groups([(row.recipe, row.value) for row in panel])
    within = squares / freedom
    evaluation = 0.0 if isinstance(e, Missing) else e**2
    training = max(0.0, within - evaluation)
    between = _between_recipes(panel, squares, within)
    share: float | Missing
    if isinstance(between, Missing):
        share = between
    else:
        whole = between + training + evaluation
        share = training / whole if whole > 0 else Missing("all SAEs have the same value")
    recipe = between if isinstance(between, Missing) else math.sqrt(between)
    return {"training_sd": math.sqrt(training), "recipe_sd": recipe, "seed_share": share}


def _between_recipes(panel: Sequence[Row], squares: float, within: float) -> float | Missing:
    """The variance between recipes of a site; `squares` is the sum about the means of recipes."""
    squares_site, _ = within_groups([(row.site, row.value) for row in panel])
    sizes: dict[str, list[int]] = {}
    for recipe in dict.fromkeys(row.recipe for row in panel):
        n = sum(row.recipe == recipe for row in panel)
        sizes.setdefault(recipe[-1], []).append(n)
    freedom = sum(len(n) - 1 for n in sizes.values())
    if freedom == 0:
        return Missing("one recipe alone was trained with two seeds")
    n0 = sum(sum(n) - sum(i * i for i in n) / sum(n) for n in sizes.values()) / freedom
    return max(0.0, ((squares_site - squares) / freedom - within) / n0)
