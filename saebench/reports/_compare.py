"""Two SAEs, metric by metric: paired by unit, with verdicts in words.

Both were asked the same: the same model, site and text, the same version and parameters of each eval. What was asked
otherwise is refused, for a difference of such numbers says nothing of the SAEs. Latents of two SAEs are not the same
things; there the difference is one of independent samples. p-values are Holm-adjusted over the metrics that are shown.
"""

import csv
import difflib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd

from saebench import results as files
from saebench import stats
from saebench.errors import UserError
from saebench.reports._table import (
    MISSED,
    OWN_UNITS,
    Best,
    Key,
    keys,
    newest,
    number,
    of_key,
    shown,
    spelled,
    words,
)
from saebench.reports._terminal import Line, Screen
from saebench.results import Results, Units
from saebench.stats import Column, Counts, Difference

_FEW_FLIPS = 5
"""Up to so many pairs even the sign-flip test of pairs that all say the same gives p > 5 %."""


class Side(NamedTuple):
    name: str
    results: Results
    scores: pd.DataFrame
    """Of this SAE alone, in the newest version that it has."""


class Row(NamedTuple):
    """One metric of both."""

    key: Key
    label: str
    best: Best
    unit: str
    n_units: int
    n_sources: int
    """What the tests resample: units, or what they are from where several are from one source."""
    a: float
    b: float
    difference: Difference | None
    """a - b; None where there are too few units to tell."""
    p: float
    """Holm-adjusted; 1 where there is no difference to test."""
    counts: Counts | None
    """Of units on which a is better; None where units are not pairs, or nothing is better."""
    verdict: str


class Compared(NamedTuple):
    a: str
    b: str
    summary: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


def compare(a: str, b: str, folders: Sequence[Path], metrics: Sequence[str]) -> Compared:
    """`folders` is one with both, or that of a and that of b; without `metrics` it is all that both have."""
    if len(folders) not in (1, 2):
        raise UserError(f"two SAEs are from one or two --results folders, got {len(folders)}.")
    read = [files.read(folder) for folder in folders]
    sides = _side(a, read[0]), _side(b, read[-1])
    if a == b and len({folder.resolve() for folder in folders}) == 1:
        raise UserError(f"{a!r} is compared with itself. Give two SAEs, or two --results folders.")
    found = _common(*sides, metrics)
    tested = [_tested(*sides, key) for key in found]
    same = [row for row in tested if row.best is None and _is_same(row)]
    kept = [row for row in tested if row not in same]
    adjusted = stats.holm([row.p for row in kept])
    rows = [row._replace(p=float(p)) for row, p in zip(kept, adjusted, strict=True)]
    rows = [row._replace(verdict=_verdict(row, a, b)) for row in rows]
    return Compared(a, b, _summary(a, b, rows), tuple(rows), tuple(_notes(*sides, rows, same)))


def text(compared: Compared) -> str:
    a, b, summary, rows, notes = compared
    screen = Screen()
    screen.line(f"A: {a}\nB: {b}\n\n{summary}")
    head = ["metric", "A", "B", "A - B", "p", "detectable", "win/tie/loss"]
    screen.grid(head, [Line(_cells(row), dim=False) for row in rows], left=1)
    screen.line("\n".join(f"{row.label}: {row.verdict}." for row in rows))
    reading = [
        "A - B: with its 95 % interval, which is not adjusted. p: Holm-adjusted over these metrics. detectable: a true "
        "difference of that size is found 80 % of the time. win/tie/loss: on how many units A is better, as good, "
        "worse. Units: " + _about_units(rows) + "."
    ]
    screen.line("\n" + "\n".join([*reading, *notes]))
    return screen.text()


def as_csv(compared: Compared) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        (
            "metric",
            "eval",
            "params",
            "best",
            "unit",
            "n_units",
            "n_sources",
            "a",
            "b",
            "value_a",
            "value_b",
        )
        + ("difference", "ci_low", "ci_high", "p", "p_holm", "detectable")
        + ("wins", "ties", "losses", "verdict")
    )
    for row in compared.rows:
        difference = row.difference or (None,) * len(Difference._fields)
        value, low, high, p, detectable = difference
        about = (
            *row.key,
            row.best,
            row.unit,
            row.n_units,
            row.n_sources,
            compared.a,
            compared.b,
            row.a,
            row.b,
        )
        counts = row.counts or (None,) * len(Counts._fields)
        writer.writerow((*about, value, low, high, p, row.p, detectable, *counts, row.verdict))
    return file.getvalue()


# What may be compared


def _side(name: str, results: Results) -> Side:
    known = sorted(set(map(str, results.scores["sae"])))
    if name not in known:
        raise UserError(f"{results.folder} has no scores of {name!r}; {nearest(name, known)}")
    scores = newest(results.scores[results.scores["sae"] == name])
    if (scores["kind"] == "imported").any():
        raise UserError(
            f"{name} is imported: a number without units has no interval and cannot be compared. Score its checkpoint "
            "on a suite of yours, and compare that."
        )
    return Side(name, results, scores)


def nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(known)}."


def _common(a: Side, b: Side, metrics: Sequence[str]) -> list[Key]:
    """Metrics that both have, in the order of a; everything that was asked otherwise is refused."""
    mine, theirs = _keys(a), _keys(b)
    wanted = list(mine)
    if metrics:
        wanted = [key for name in metrics for key in _named(a, b, name)]
    refusals = {key: _refusal(a, b, key) for key in wanted if _has(theirs, key)}
    refused: dict[str, dict[str, None]] = {}
    for key, reason in refusals.items():
        if reason:
            refused.setdefault(reason, {})[key.eval_name] = None
    if refused:
        reasons = [f"{', '.join(evals)}: {reason}." for reason, evals in refused.items()]
        good = [key.metric for key, reason in refusals.items() if not reason]
        rest = f" What can be compared: --metric {' --metric '.join(good)}" if good else ""
        raise UserError(
            f"{a.name} and {b.name} were not asked the same, so that their difference would say nothing of "
            f"them. {' '.join(reasons)}{rest}"
        )
    if not refusals:
        raise UserError(f"{a.name} and {b.name} have no metric in common.")
    return list(refusals)


def _keys(side: Side) -> dict[Key, str]:
    """The run file of each metric of an SAE."""
    rows = side.scores
    named = zip(rows["metric"], rows["eval"], rows["params"], rows["file"], strict=True)
    return {Key(metric, eval_name, params): file for metric, eval_name, params, file in named}


def _has(theirs: Mapping[Key, str], key: Key) -> bool:
    return any((other.metric, other.eval_name) == (key.metric, key.eval_name) for other in theirs)


def _named(a: Side, b: Side, name: str) -> list[Key]:
    for side in (a, b):
        if not keys(side.scores, name):
            known = sorted({key.metric for key in _keys(side)})
            raise UserError(f"{side.name} has no metric {name!r}; {nearest(name, known)}")
    return keys(a.scores, name)


def _refusal(a: Side, b: Side, key: Key) -> str:
    """Why a metric cannot be compared; empty where it can."""
    mine, theirs = _keys(a), _keys(b)
    if key not in theirs:
        others = [k for k in theirs if (k.metric, k.eval_name) == (key.metric, key.eval_name)]
        params = " and ".join(k.params or "none" for k in others)
        return f"other parameters, {key.params or 'none'} against {params}"
    # One folder has one model, but for the control that is of the model before its training.
    aside = {"sae", "model"} if a.results is b.results else {"sae"}
    return ", ".join(_differing(_spec(a, mine[key]), _spec(b, theirs[key]), aside))


def _spec(side: Side, file: str) -> dict[str, Any]:
    path = side.results.folder / file
    spec: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["spec"]
    return spec


def _differing(a: Any, b: Any, aside: set[str], where: str = "") -> Iterator[str]:
    """Paths into two specs where these differ, with both values."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in dict.fromkeys([*a, *b]):
            if where or name not in aside:
                deeper = f"{where} {name}".strip()
                yield from _differing(a.get(name), b.get(name), aside, deeper)
    elif a != b:
        yield f"another {where}, {_brief(a)} against {_brief(b)}"


def _brief(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 24 else text[:12] + "..."


# One metric


def _tested(a: Side, b: Side, key: Key) -> Row:
    found = {"a": _units(a, key), "b": _units(b, key)}
    about = of_key(a.scores, key).iloc[0]
    best: Best = about["best"] if about["best"] in ("min", "max") else None
    paired = about["unit"] not in OWN_UNITS
    if paired:
        found = files.on_common_units(found)
        if len(found["a"].num) == 0:
            raise UserError(
                f"{a.name} and {b.name} have no {about['unit']} of {key.metric} in common."
            )
    one, other = (files.column(units, about["statistic"]) for units in found.values())
    if paired:
        difference = stats.paired_difference(*one[:2], *other[:2], one.statistic)
    else:
        difference = stats.independent_difference(one, other)
    return Row(
        key=key,
        label=_label(a, b, key),
        best=best,
        unit=about["unit"],
        n_units=min(len(units.num) for units in found.values()),
        n_sources=min(len(one.num), len(other.num)),
        a=stats.value(*one),
        b=stats.value(*other),
        difference=difference,
        p=1.0 if difference is None else difference.p,
        counts=_counts(found["a"], found["b"], best) if paired and best else None,
        verdict="",
    )


def _counts(a: Units, b: Units, best: Literal["min", "max"]) -> Counts:
    return stats.win_tie_loss(Column(a.num, a.den), Column(b.num, b.den), best)


def _units(side: Side, key: Key) -> Units:
    file = str(of_key(side.scores, key)["file"].iloc[0])
    return files.units_in(side.results.folder / file, key.metric)


def _label(a: Side, b: Side, key: Key) -> str:
    ways = {k for side in (a, b) for k in _keys(side) if k.metric == key.metric}
    label = words(key.metric)
    return label if len(ways) == 1 else f"{label} ({key.params or key.eval_name})"


def _is_same(row: Row) -> bool:
    """In every unit, as the loss of the model without an SAE is."""
    difference = row.difference
    return difference is not None and difference[:3] == (0.0, 0.0, 0.0)


# Words


def _verdict(row: Row, a: str, b: str) -> str:
    difference = row.difference
    if difference is None:
        return f"too few {_resampled(row)} to compare ({row.n_sources})"
    if _is_same(row):
        return f"the same in every {row.unit}"
    if not _apart(row):
        few = ""
        if row.counts is not None and row.n_sources <= _FEW_FLIPS:
            few = f"; {row.n_sources} {_resampled(row)} are too few to tell any difference"
        return untold(difference, row.p) + few
    if row.best is None:
        return f"higher for {a if difference.value > 0 else b} {by(difference)}"
    return f"{a if _a_is_better(row) else b} is better {by(difference)}"


def _resampled(row: Row) -> str:
    return f"{row.unit}s" if row.n_sources == row.n_units else f"sources of {row.unit}s"


def _apart(row: Row) -> bool:
    return row.difference is not None and row.p < 1 - stats.LEVEL


def _a_is_better(row: Row) -> bool:
    assert row.difference is not None
    return (row.difference.value > 0) == (row.best == "max")


def by(difference: Difference) -> str:
    """by 0.012 (95 % interval 0.010 to 0.014), whichever of the two is ahead."""
    value, low, high = difference[:3]
    if value < 0:
        value, low, high = -value, -high, -low
    shown_value, first, last = spelled(value, low, high)
    return f"by {shown_value} (95 % interval {first} to {last})"


def untold(difference: Difference, p: float) -> str:
    """`p`: adjusted, which the interval is not: it may leave out 0 all the same, and then p says why."""
    value, low, high = spelled(*difference[:3])
    why = f", but p is {p:.3g} when adjusted" if difference.low > 0 or difference.high < 0 else ""
    return (
        f"cannot be told apart (A - B is {value}, 95 % interval {low} to {high}{why}); differences below "
        f"{difference.detectable:.2g} could not have been seen"
    )


def _summary(a: str, b: str, rows: Sequence[Row]) -> str:
    directed = [row for row in rows if row.best is not None]
    if not directed:
        return f"None of these metrics says which of {a} and {b} is better."
    apart = [_a_is_better(row) for row in directed if _apart(row)]
    wins, losses, open_ = sum(apart), len(apart) - sum(apart), len(directed) - len(apart)
    return (
        f"{a} is better than {b} on {wins} of {_metrics(len(directed))} with a better direction and worse on "
        f"{losses}; on {open_} they cannot be told apart."
    )


def _metrics(count: int) -> str:
    return "1 metric" if count == 1 else f"{count} metrics"


def _cells(row: Row) -> list[str]:
    difference = row.difference
    values = [f"{value:.4g}" for value in (row.a, row.b)]
    if difference is None:
        return [row.label, *values, "–", "–", "–", "–"]
    p = "<0.0001" if row.p < 1e-4 else f"{row.p:.2g}"
    counts = "–" if row.counts is None else "/".join(map(str, row.counts))
    gap = shown(number(*difference[:3]))
    return [row.label, *values, gap, p, f"{difference.detectable:.2g}", counts]


def _about_units(rows: Sequence[Row]) -> str:
    counted = []
    for row in rows:
        several = row.n_sources != row.n_units
        sources = f" from {row.n_sources:,} sources, which are resampled" if several else ""
        counted.append(f"{row.n_units:,} {row.unit}s{sources}")
    return ", ".join(dict.fromkeys(counted))


def _notes(a: Side, b: Side, rows: Sequence[Row], same: Sequence[Row]) -> Iterator[str]:
    l0 = next((row for row in rows if row.key.metric == "l0"), None)
    if l0 is not None and abs(l0.a - l0.b) > MISSED * min(abs(l0.a), abs(l0.b)):
        yield (
            f"They are not equally sparse (L0 {l0.a:.3g} and {l0.b:.3g}), and active latents buy fidelity: compare "
            "SAEs of one L0, or families with --families."
        )
    mine, theirs = (_spec(side, next(iter(_keys(side).values()))) for side in (a, b))
    models = list(_differing(mine.get("model"), theirs.get("model"), set(), "model"))
    if models:
        yield f"They are SAEs of two models, on the same text: {', '.join(models)}."
    if same:
        labels = ", ".join(row.label for row in same)
        yield f"The same for both, and not about them: {labels}."
    alone = [key.metric for key in _keys(a) if not _has(_keys(b), key)]
    alone += [key.metric for key in _keys(b) if not _has(_keys(a), key)]
    if alone:
        yield f"Only one of them has: {', '.join(dict.fromkeys(alone))}."
