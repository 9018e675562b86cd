"""Puts the leaderboard together: which rows and columns, in which order, and how to read them."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from saebench import results as files
from saebench.errors import NothingToShow
from saebench.reliability.cards import PASSED, WARNING
from saebench.reliability.verdicts import remarks
from saebench.reports._blocks import Contender, Group
from saebench.reports._evidence import Evidence
from saebench.reports._table import (
    MISSED,
    OWN_UNITS,
    Block,
    Cell,
    Heading,
    Key,
    Row,
    SeedBlock,
    SeedRow,
    SeparationRow,
    Standing,
    Table,
    keys,
    natural,
    newest,
    number,
    of_key,
    one_key,
    words,
)
from saebench.results import Results

AFTER_THE_LETTERS = "% after the letters"
"""How the sentence begins that is about what narrow tables leave out."""
_RESAMPLED = {
    "sequence": "documents",  # with all sequences that were cut from them
    "dataset": "datasets",  # with those that share their texts
    "latent": "latents",
    "feature": "features",
}
_MOST_OMITTED = 12
"""Names in one line."""
_MOST_NAMES = 6


def build(evidence: Evidence, metrics: Sequence[str], sort: str) -> Table:
    results, scores = evidence.results, evidence.scores
    # L0 is the axis along which SAEs are matched: no table goes without it.
    headings = _headings(evidence, ["l0", *metrics])
    if not headings:
        known = ", ".join(sorted(set(scores["metric"]))) or "none yet"
        raise NothingToShow(
            f"{results.folder}: no SAE has any of {', '.join(metrics)}. Metrics of these results: "
            f"{known}. Name some of these in the leaderboard's `metrics`, or finish the run."
        )
    notes = _notes(results)
    if not keys(scores, sort):
        first = _first_directed(headings)
        notes.insert(0, f"No SAE has {sort}, to sort by; sorted by {headings[first].label}.")
    else:
        wanted = one_key(scores, sort)
        # What a table is sorted by is seen in it.
        if wanted not in [heading.key for heading in headings]:
            headings += [h for h in _headings(evidence, [sort]) if h.key == wanted]
        first = [heading.key for heading in headings].index(wanted)
    blocks = [
        Block(group.title, _rows(evidence, headings, headings[first], group))
        for group in evidence.groups
    ]
    return Table(
        headings=tuple(headings),
        sorted_by=first,
        blocks=tuple(blocks),
        seeds=tuple(_seed_blocks(evidence, headings)),
        facts=_facts(results, scores),
        reading=tuple(_reading(evidence, headings, first, blocks)),
        notes=tuple(notes),
    )


def separation(evidence: Evidence) -> list[SeparationRow]:
    """Of every metric with a direction, shown or not, that some control has."""
    names = list(dict.fromkeys(map(str, evidence.scores["metric"])))
    rows = [
        SeparationRow(heading, evidence.separation(heading.key))
        for heading in _headings(evidence, names)
        if heading.best is not None
    ]
    return [row for row in rows if row.against]


def directed(evidence: Evidence) -> list[Key]:
    return [
        Key(*found)
        for found in evidence.scores[["metric", "eval", "params", "best"]]
        .query("best in ('min', 'max')")
        .drop_duplicates()[["metric", "eval", "params"]]
        .itertuples(index=False, name=None)
    ]


def _headings(evidence: Evidence, names: Sequence[str]) -> list[Heading]:
    ways: dict[Key, int] = {}
    for name in names:
        found = keys(evidence.scores, name)
        for key in found:
            ways.setdefault(key, len(found))
    return [_heading(evidence, key, n_ways) for key, n_ways in ways.items()]


def _heading(evidence: Evidence, key: Key, n_ways: int) -> Heading:
    rows = of_key(evidence.scores, key)
    row = rows.iloc[0]
    best = next(iter(evidence.measured(key).values())).best
    label = words(key.metric)
    if n_ways > 1:
        label += f" ({key.params or key.eval_name})"
    found = {} if best is None else evidence.separation(key)
    unseparated = tuple(control for control, against in found.items() if not against.separates)
    reference = _reference(rows["reference"].dropna())
    audited = remarks(
        evidence.results.audits, key.metric, key.eval_name, int(row["version"]), key.params
    )
    return Heading(key, label, best, row["unit"], row["doc"], reference, unseparated, *audited)


def _reference(given: "pd.Series[float]") -> str | None:
    if given.empty:
        return None
    least, most = f"{given.min():.3g}", f"{given.max():.3g}"
    return least if least == most else f"{least} to {most}"


def _first_directed(headings: Sequence[Heading]) -> int:
    return next((i for i, heading in enumerate(headings) if heading.best is not None), 0)


# Rows


def _rows(
    evidence: Evidence, headings: Sequence[Heading], by: Heading, group: Group
) -> tuple[Row, ...]:
    standings = [evidence.standings(heading.key, group) for heading in headings]
    rows = []
    for one in _sorted(evidence, by, group):
        cells = tuple(
            _cell(evidence, heading, one, found.get(one.name))
            for heading, found in zip(headings, standings, strict=True)
        )
        rows.append(Row(one.name, _mark(one), one.variant, len(one.saes), cells))
    return tuple(rows)


def _mark(one: Contender) -> Literal["control", "reference", "imported"] | None:
    kinds: tuple[Literal["control", "reference", "imported"], ...]
    kinds = ("control", "reference", "imported")
    return next((kind for kind in kinds if kind == one.kind), None)


def _sorted(evidence: Evidence, by: Heading, group: Group) -> list[Contender]:
    """Best first, controls and references last; upwards where nothing is the better direction."""

    def order(one: Contender) -> tuple[int, bool, float, list[tuple[int, int, str]]]:
        place = 1 + (one.kind == "reference") if one.standard else 0
        value = _value(evidence, by.key, one)
        if value is None:
            return place, True, 0.0, natural(one.name)
        return place, False, -value if by.best == "max" else value, natural(one.name)

    return sorted(group.contenders, key=order)


def _value(evidence: Evidence, key: Key, one: Contender) -> float | None:
    """The mean over seeds."""
    measured = evidence.measured(key)
    found = [measured[sae].value for sae in one.saes if sae in measured]
    return float(np.mean(found)) if found else None


def _cell(evidence: Evidence, heading: Heading, one: Contender, standing: Standing | None) -> Cell:
    value = _value(evidence, heading.key, one)
    if value is None:
        return Cell(None, None, missed=False)
    low, high = _interval(evidence, heading.key, one)
    missed = False
    if heading.key.metric == "l0" and one.l0 is not None:
        missed = abs(value - one.l0) > MISSED * one.l0
    return Cell(number(value, low, high), standing, missed)


def _interval(evidence: Evidence, key: Key, one: Contender) -> tuple[float, float]:
    """NaN where there is none."""
    measured = evidence.measured(key)
    if len(one.saes) == 1:
        return measured[one.saes[0]].low, measured[one.saes[0]].high
    seeds = evidence.seeds(key, one)
    if seeds is None or seeds.low is None or seeds.high is None:
        return math.nan, math.nan
    return seeds.low, seeds.high


def _seed_blocks(evidence: Evidence, headings: Sequence[Heading]) -> Iterator[SeedBlock]:
    for group in evidence.groups:
        recipes = [one for one in group.contenders if len(one.saes) > 1]
        rows = [
            row
            for one in recipes
            for heading in headings
            for row in _seed_rows(evidence, heading, one)
        ]
        if rows:
            yield SeedBlock(group.title, tuple(rows))


def _seed_rows(evidence: Evidence, heading: Heading, one: Contender) -> Iterator[SeedRow]:
    measured = evidence.measured(heading.key)
    values = [measured[sae].value for sae in one.saes if sae in measured]
    seeds = evidence.seeds(heading.key, one)
    if values:
        noise = (None, None) if seeds is None else (seeds.training_sd, seeds.evaluation_sd)
        training, evaluation = ("–" if sd is None else f"{sd:.2g}" for sd in noise)
        shown = tuple(f"{value:.4g}" for value in values)
        mean = f"{np.mean(values):.4g}"
        yield SeedRow(one.name, heading.label, mean, training, evaluation, shown)


# Sentences


def _facts(results: Results, scores: pd.DataFrame) -> str:
    sites = ", ".join(sorted(set(scores["site"]), key=natural))
    tokens = scores.loc[scores["unit"] == "sequence", "n"]
    amount = ""
    if len(tokens):
        least, most = int(tokens.min()), int(tokens.max())
        amount = f"{most:,} tokens of " if least == most else f"{least:,} to {most:,} tokens of "
    return f"{results.model}, at {sites}, on {amount}{results.text}."


def _reading(
    evidence: Evidence, headings: Sequence[Heading], first: int, blocks: Sequence[Block]
) -> list[str]:
    results = evidence.results
    rows = [row for block in blocks for row in block.rows]
    cells = [cell for row in rows for cell in row.cells]
    # What is imported has no intervals.
    own = any(row.mark != "imported" for row in rows)
    sentences = [_about_intervals(headings)] if own else []
    if any(row.cells[first].standing for row in rows):
        sentences += _about_ranks(headings[first])
    if any(cell.tied for cell in cells):
        sentences.append(
            "Bold: cannot be told apart from the best of its block at the 5 % level "
            f"({_about_test(headings)}, Holm-adjusted over all pairs of a block)."
        )
    sentences += _about_seeds(evidence)
    if any(row.mark == "control" for row in rows):
        sentences.append("(control): knows nothing of what the model learned; never ranked.")
    if any(row.mark == "reference" for row in rows):
        sentences.append("(reference): there to read the others against; never ranked.")
    if any(row.mark == "imported" for row in rows):
        sentences.append(
            "(imported): from result files of another tool, by its definitions and without units; no interval, "
            "never ranked."
        )
    if any(heading.unseparated for heading in headings):
        sentences.append(_about_separation(headings))
    sentences += about_badges(headings)
    if any(cell.missed for cell in cells):
        sentences.append(
            f"†: misses the asked-for L0 by more than {MISSED:.0%}, so it is compared at another "
            "sparsity than the rest of its block.".replace("%", " %")
        )
    sentences += _about_dead(results, headings)
    if not _all_units_kept(results):
        sentences.append("Units of some runs were not kept: these columns have no ranks.")
    return sentences


def _about_ranks(by: Heading) -> list[str]:
    return [
        f"rank: by {by.label}; the places that it may have at the 5 % level, and letters that it shares with all "
        "that it cannot be told apart from.",
        f"{AFTER_THE_LETTERS}: how often it is the best when the {_RESAMPLED[by.unit]} are drawn anew, where "
        "that is at least 1 %.",
    ]


def _about_seeds(evidence: Evidence) -> list[str]:
    everyone = [one for group in evidence.groups for one in group.ranked]
    if any(len(one.saes) > 1 for one in everyone):
        return [
            "(n seeds): SAEs that differ in their training seed alone, with the mean over seeds and an "
            "interval of training and evaluation noise. Two recipes are told apart only where the test over "
            "units says so and Student's t with the noise of training seeds does too; how often a recipe is the best "
            "has that noise in it."
        ]
    if any(one.kind == "trained" for one in everyone):
        return [
            "Trained with one seed each: what is told apart are these SAEs, not their variants."
        ]
    return []


def _about_separation(headings: Sequence[Heading]) -> str:
    marked = [f"{h.label} ({', '.join(h.unseparated)})" for h in headings if h.unseparated]
    return (
        f"‡: does not separate trained SAEs from controls here: {'; '.join(marked)}. In more than half of the "
        "blocks with that control, at most half of the trained SAEs beside it are significantly better."
    )


def about_badges(headings: Sequence[Heading]) -> list[str]:
    """What audits say of these metrics."""
    sentences = [f"{WARNING} {h.label}: {'; '.join(h.warnings)}." for h in headings if h.warnings]
    passed = [heading.label for heading in headings if heading.badge == PASSED]
    if passed:
        sentences.append(
            f"{PASSED}: ranks SAEs, controls and known features in order in an audit, as far as they were there: "
            f"{', '.join(passed)}."
        )
    return sentences


def _about_dead(results: Results, headings: Sequence[Heading]) -> list[str]:
    """How little a latent may fire that was never seen to: the count of tokens is part of the metric."""
    rows = results.scores[results.scores["metric"] == "dead_fraction"].dropna(subset=["reference"])
    if rows.empty or not any(heading.key.metric == "dead_fraction" for heading in headings):
        return []
    bound = 100 * rows["reference"].max()
    return [
        f"dead fraction: of latents silent on {int(rows['n'].min()):,} tokens; with 95 % confidence such a "
        f"latent fires on fewer than {bound:.2g} % of tokens."
    ]


def _about_intervals(headings: Sequence[Heading]) -> str:
    units: dict[str, list[str]] = {}
    for heading in headings:
        units.setdefault(heading.unit, []).append(heading.label)
    commonest = max(units, key=lambda unit: len(units[unit]))
    others = [
        f"{_RESAMPLED[unit]} for {', '.join(n)}" for unit, n in units.items() if unit != commonest
    ]
    rest = f" ({'; '.join(others)})" if others else ""
    return (
        f"± and [low, high]: 95 % interval over {_RESAMPLED[commonest]}{rest}; left out where it is narrower "
        "than the digits shown or where there are too few units."
    )


def _about_test(headings: Sequence[Heading]) -> str:
    units = {heading.unit for heading in headings if heading.best is not None}
    paired = sorted(_RESAMPLED[unit] for unit in units - {*OWN_UNITS})
    tests = [f"paired test on the same {' or '.join(paired)}"] if paired else []
    if own := sorted(_RESAMPLED[unit] for unit in units & {*OWN_UNITS}):
        tests.append(f"unpaired over {' and '.join(own)}")
    return "; ".join(tests)


def _all_units_kept(results: Results) -> bool:
    own = results.scores[results.scores["kind"] != "imported"]
    return all(files.has_units(results, file) for file in set(own["file"]))


# What is not shown


def _notes(results: Results) -> list[str]:
    notes = []
    for (eval_name, reason), rows in results.skips.groupby(["eval", "reason"], sort=True):
        names = ", ".join(sorted(set(rows["sae"]), key=natural))
        notes.append(f"{eval_name} does not apply to {names}: {reason}")
    notes += _omissions(results)
    if results.missing:
        runs = "1 run is" if len(results.missing) == 1 else f"{len(results.missing)} runs are"
        notes.append(f"{runs} not done yet: `saebench run` continues them.")
    if results.stale:
        some = "1 result file" if len(results.stale) == 1 else f"{len(results.stale)} result files"
        verb = "is" if len(results.stale) == 1 else "are"
        state = "of an earlier state of this suite"
        notes.append(f"{some} {state} {verb} kept in runs/ and not shown.")
    outdated = results.scores.drop(newest(results.scores).index)
    if len(outdated):
        evals = ", ".join(sorted(set(outdated["eval"])))
        notes.append(f"Scores of older versions of {evals} are not shown.")
    return notes


class _Omission(NamedTuple):
    """Something that is left out of the runs of these SAEs."""

    what: str
    reason: str
    saes: frozenset[str]


def _omissions(results: Results) -> list[str]:
    """What runs leave out: for each eval how much, then each thing with its reason.

    Many things left out for one reason, but for the numbers in it, are one line.
    """
    shown = results.omitted[results.omitted["file"].isin(set(newest(results.scores)["file"]))]
    lines = []
    for eval_name, of_eval in shown.groupby("eval", sort=True):
        scored = results.scores[results.scores["eval"] == eval_name]
        everyone = set(scored["sae"])
        found = [
            _Omission(_one_line(what), _one_line(reason).rstrip("."), frozenset(rows["sae"]))
            for (what, reason), rows in of_eval.groupby(["what", "reason"], sort=False)
        ]
        found.sort(key=lambda omission: (natural(omission.what), omission.reason))
        alike: dict[tuple[str, frozenset[str]], list[_Omission]] = {}
        for omission in found:
            kind = (re.sub(r"\d[\d,.]*", "", omission.reason), omission.saes)
            alike.setdefault(kind, []).append(omission)
        n_things = of_eval["what"].nunique()
        some = "1 dataset or metric" if n_things == 1 else f"{n_things} datasets or metrics"
        lines.append(f"{eval_name} leaves out {some}, wholly or in part:")
        for (_, saes), group in alike.items():
            lines.append(f"{eval_name}: {_together(group)} ({_for_whom(set(saes), everyone)}).")
    return lines


def _one_line(told: object) -> str:
    """Classes of a dataset can be any text."""
    return " ".join(str(told).split())


def _together(group: Sequence[_Omission]) -> str:
    first = group[0]
    if len(group) == 1:
        return f"{first.what}: {first.reason}"
    names = [omission.what for omission in group]
    more = len(names) - _MOST_OMITTED
    listed = ", ".join(names[:_MOST_OMITTED]) + (f" and {more} more" if more > 0 else "")
    return f"{len(group)} alike, such as {first.what}: {first.reason}; they are {listed}"


def _for_whom(saes: set[str], everyone: set[str]) -> str:
    if saes == everyone and len(everyone) > 1:
        return f"all {len(everyone)} SAEs"
    names = sorted(saes, key=natural)
    if len(names) > _MOST_NAMES:
        return f"{', '.join(names[:_MOST_NAMES])} and {len(names) - _MOST_NAMES} more"
    return ", ".join(names)
