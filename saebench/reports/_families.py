"""Two families of SAEs, a variant each, compared over the L0 that both have.

Only SAEs of one site and one width are compared, each site and width in a section of its own. The seeds of one
asked-for L0 count as one SAE, with the mean of their values. What area, dominance and hypervolume are: `frontiers`.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from saebench import frontiers, stats
from saebench import results as files
from saebench.errors import UserError
from saebench.frontiers import Comparison, Point
from saebench.reports import _seeds
from saebench.reports._blocks import Contender, contenders
from saebench.reports._compare import by, nearest, untold
from saebench.reports._evidence import Evidence
from saebench.reports._table import Key, natural, number, of_key, one_key, shown, words
from saebench.reports._terminal import Line, Screen
from saebench.stats import Column


class Place(NamedTuple):
    """Where two families are compared; None stands for everywhere, or for no width."""

    site: str | None
    width: int | None


class Row(NamedTuple):
    """One metric of both families at one site and width."""

    place: Place
    key: Key
    label: str
    best: Literal["min", "max"]
    n_saes: tuple[int, int]
    comparison: Comparison
    p: float
    """Holm-adjusted over all rows."""
    volumes: tuple[float, float] | None
    """Hypervolumes; None where the metric has no worst and ideal value."""
    verdict: str


class Families(NamedTuple):
    a: str
    b: str
    rows: tuple[Row, ...]


def compare(families: tuple[str, str], folder: Path, metrics: Sequence[str], at: Place) -> Families:
    evidence = Evidence(files.read(folder))
    if (evidence.scores["kind"] == "imported").any():
        raise UserError(
            f"{folder} is imported: numbers without units have no intervals and cannot be compared."
        )
    everyone = [one for one in contenders(evidence.scores) if one.ranked]
    a, b = families
    for name in families:
        _check_name(name, everyone, folder)
    if a == b:
        raise UserError(f"{a!r} is compared with itself. Give two variants.")
    named = [one_key(evidence.scores, name) for name in metrics]
    rows = []
    for place in _places(families, everyone, at):
        here = [one for one in everyone if (one.site, one.width) == place]
        sides = {name: [one for one in here if one.variant == name] for name in families}
        rows += [_row(evidence, place, key, sides) for key in named]
    adjusted = stats.holm([row.comparison.difference.p for row in rows])
    rows = [row._replace(p=float(p)) for row, p in zip(rows, adjusted, strict=True)]
    return Families(a, b, tuple(row._replace(verdict=_verdict(row, a, b)) for row in rows))


def text(families: Families) -> str:
    a, b, rows = families
    screen = Screen()
    screen.line(f"A: {a}\nB: {b}")
    for place in dict.fromkeys(row.place for row in rows):
        here = [row for row in rows if row.place == place]
        screen.line(f"\n{_title(place)}", "bold")
        head = ["metric", "L0", "SAEs", "A", "B", "A - B", "p", "hypervolume A", "B"]
        screen.grid(head, [Line(_cells(row), dim=False) for row in here], left=1)
        screen.line("\n".join(f"{row.label} {row.verdict}." for row in here))
    screen.line(
        "\nA and B: the mean of the metric over ln L0, over the range of L0 that both have. A - B: with its 95 % "
        "interval, from resampled units and not adjusted. p: Holm-adjusted over these rows. Hypervolume: the share of "
        "the box from L0 1 to 1,000 and from worst to ideal that a family is at least as good as; it grows with the "
        "number of SAEs. Seeds of one asked-for L0 count as one SAE."
    )
    return screen.text()


def as_csv(families: Families) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        ("site", "width", "metric", "eval", "params", "a", "b", "n_a", "n_b", "low_l0", "high_l0")
        + ("area_a", "area_b", "difference", "ci_low", "ci_high", "p", "p_holm", "detectable")
        + ("hypervolume_a", "hypervolume_b", "crossings", "dominates", "verdict")
    )
    for row in families.rows:
        low_l0, high_l0, area_a, area_b, difference, crossings, dominates = row.comparison
        value, low, high, p, detectable = difference
        about = (*row.place, *row.key, families.a, families.b, *row.n_saes)
        areas = (low_l0, high_l0, area_a, area_b, value, low, high, p, row.p, detectable)
        volumes = row.volumes or (None, None)
        crossed = " ".join(f"{l0:.6g}" for l0 in crossings)
        writer.writerow((*about, *areas, *volumes, crossed, dominates, row.verdict))
    return file.getvalue()


# What may be compared


def _check_name(name: str, everyone: Sequence[Contender], folder: Path) -> None:
    known = sorted({one.variant for one in everyone})
    if name not in known:
        raise UserError(f"{folder} has no SAEs of a variant {name!r}; {nearest(name, known)}")


def _places(
    families: tuple[str, str], everyone: Sequence[Contender], at: Place
) -> list[tuple[str, int | None]]:
    """Sites and widths at which both families have SAEs."""
    places = [
        {(one.site, one.width) for one in everyone if one.variant == name} for name in families
    ]
    both = sorted(places[0] & places[1], key=lambda place: (natural(place[0]), place[1] or 0))
    found = [
        (site, width)
        for site, width in both
        if at.site in (None, site) and at.width in (None, width)
    ]
    if not found:
        listed = "; ".join(_title(Place(*place)) for place in both) or "none"
        raise UserError(
            f"{families[0]} and {families[1]} have no SAEs of {_title(at)} to compare. Both have some of: {listed}."
        )
    return found


def _title(place: Place | tuple[str, int | None]) -> str:
    site, width = place
    parts = [site or "any site", "any width" if width is None else f"width {width:,}"]
    return ", ".join(parts)


# One metric


def _row(
    evidence: Evidence,
    place: tuple[str, int | None],
    key: Key,
    sides: Mapping[str, Sequence[Contender]],
) -> Row:
    best = next(iter(evidence.measured(key).values())).best
    if best is None:
        raise UserError(f"{key.metric} has no better direction: neither family can be ahead on it.")
    everyone = [sae for side in sides.values() for one in side for sae in one.saes]
    l0s = _columns(evidence, one_key(evidence.scores, "l0"), everyone)
    values = _columns(evidence, key, everyone)
    families = []
    for name, side in sides.items():
        seeds = [[sae for sae in one.saes if sae in l0s and sae in values] for one in side]
        points = [
            Point(
                _seeds.recipe_column([l0s[sae] for sae in saes]),
                _seeds.recipe_column([values[sae] for sae in saes]),
            )
            for saes in seeds
            if saes
        ]
        if len({stats.value(*point.l0) for point in points}) < 2:
            raise UserError(
                f"{name} has {key.metric} at fewer than two sparsities at {_title(place)}; a family is compared "
                "over a range of L0. Train it to more of them, or choose others with --site and --width."
            )
        families.append(points)
    a, b = families
    paired = evidence.measured(key)[next(iter(values))].paired
    try:
        comparison = frontiers.compare(a, b, best, paired)
    except ValueError as error:
        raise UserError(f"{key.metric} at {_title(place)}: {error}") from error
    return Row(
        place=Place(*place),
        key=key,
        label=_label(evidence, key),
        best=best,
        n_saes=(len(a), len(b)),
        comparison=comparison,
        p=comparison.difference.p,
        volumes=_volumes(evidence, key, a, b),
        verdict="",
    )


def _columns(evidence: Evidence, key: Key, saes: Sequence[str]) -> dict[str, Column]:
    found = evidence.columns(key, saes)
    if not found:
        raise UserError(
            f"{evidence.results.folder}: kept units of {key.metric} are gone, and comparisons need them. Delete "
            "the run files that lack theirs (.units.parquet) and run the suite again."
        )
    return found


def _label(evidence: Evidence, key: Key) -> str:
    ways = evidence.scores[evidence.scores["metric"] == key.metric][["eval", "params"]]
    several = len(ways.drop_duplicates()) > 1
    return words(key.metric) + (f" ({key.params or key.eval_name})" if several else "")


def _volumes(
    evidence: Evidence, key: Key, a: Sequence[Point], b: Sequence[Point]
) -> tuple[float, float] | None:
    ends = of_key(evidence.scores, key)[["worst", "ideal"]].dropna()
    if ends.empty:
        return None
    worst, ideal = map(float, ends.iloc[0])
    found = []
    for family in (a, b):
        l0 = np.array([stats.value(*point.l0) for point in family])
        values = np.array([stats.value(*point.metric) for point in family])
        found.append(frontiers.hypervolume(l0, values, worst, ideal))
    return found[0], found[1]


# Words


def _verdict(row: Row, a: str, b: str) -> str:
    found = row.comparison
    if row.p >= 1 - stats.LEVEL:
        verdict = untold(found.difference, row.p)
    else:
        a_is_better = (found.difference.value > 0) == (row.best == "max")
        verdict = f"{a if a_is_better else b} is better {by(found.difference)}"
    over = f"at equal L0 from {found.low_l0:.3g} to {found.high_l0:.3g}, on average"
    verdict = f"{over}: {verdict}"
    if found.dominates is not None:
        verdict += f"; {a if found.dominates == 'a' else b} is better everywhere in that range"
    if found.crossings:
        crossed = ", ".join(f"{l0:.3g}" for l0 in found.crossings)
        verdict += f"; the curves cross at L0 {crossed}"
    return verdict


def _cells(row: Row) -> list[str]:
    found = row.comparison
    p = "<0.0001" if row.p < 1e-4 else f"{row.p:.2g}"
    volumes = ["–", "–"] if row.volumes is None else [f"{volume:.3f}" for volume in row.volumes]
    gap = shown(number(*found.difference[:3]))
    saes = f"{row.n_saes[0]} and {row.n_saes[1]}"
    l0 = f"{found.low_l0:.3g} to {found.high_l0:.3g}"
    return [row.label, l0, saes, f"{found.a:.4g}", f"{found.b:.4g}", gap, p, *volumes]
