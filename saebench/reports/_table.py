"""The leaderboard as data: blocks of rows of cells, before any of it is Markdown or LaTeX.

A block holds what may be compared: one site, one width, one asked-for L0. A cell says its value in
as many digits as its interval warrants. Whether two SAEs differ is decided by a test on their kept
units, not by whether their intervals overlap.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, cast

import pandas as pd

from saebench import results as files
from saebench import stats
from saebench.errors import UserError
from saebench.results import Results

MISSED = 0.1
"""An asked-for L0 is missed when the measured one is off by more than this share of it."""

_RANKED_BY = "explained_variance"
_MOST_DECIMALS = 6
_SYMMETRIC = 1.25  # the longer arm of an interval over the shorter, up to which it is shown as ±
_NAMED = re.compile(r"(?P<metric>[^\[\]]+)(\[(?P<params>[^\]]*)\])?")
_SHORT = {"l0": "L0", "ce": "CE", "kl": "KL", "mse": "MSE", "auc": "AUC"}


Best = Literal["min", "max"] | None


class Key(NamedTuple):
    """One metric as measured in one way."""

    metric: str
    eval_name: str
    params: str


class Heading(NamedTuple):
    key: Key
    label: str
    best: Best
    unit: str
    doc: str
    reference: str | None
    """What evals give to be read beside it: a bound, or a chance level."""


class Number(NamedTuple):
    """A value and its interval, times 10^exponent, as digits."""

    value: str
    interval: "Arm | Ends | None"
    exponent: int


class Arm(NamedTuple):
    """An interval that is symmetric enough to be one number."""

    length: str


class Ends(NamedTuple):
    low: str
    high: str
    down: str
    """How far below the value the interval reaches."""
    up: str


class Cell(NamedTuple):
    number: Number | None
    tied: bool
    """Cannot be told apart from the best of the block."""
    missed: bool
    """The asked-for L0 was missed."""


class Row(NamedTuple):
    name: str
    variant: str
    control: bool
    cells: tuple[Cell, ...]


class Block(NamedTuple):
    title: str
    rows: tuple[Row, ...]


class Table(NamedTuple):
    headings: tuple[Heading, ...]
    blocks: tuple[Block, ...]
    facts: str
    """Model, sites, text and tokens, in a sentence."""
    reading: tuple[str, ...]
    """How to read it: a sentence each."""
    notes: tuple[str, ...]
    """What is not shown, and why."""


def newest(scores: pd.DataFrame) -> pd.DataFrame:
    """The newest version of each eval: versions of a metric are never mixed."""
    return scores[scores["version"] == scores.groupby("eval")["version"].transform("max")]


def keys(scores: pd.DataFrame, name: str) -> list[Key]:
    """What a name such as `l0` or `sparse_probing_auc[k=5]` stands for; empty if nobody has it."""
    named = _NAMED.fullmatch(name)
    if named is None:
        raise UserError(f"{name!r} is no metric. Expected a name such as 'l0' or 'auc[k=5]'.")
    rows = scores[scores["metric"] == named["metric"]]
    if named["params"] is not None:
        rows = rows[rows["params"] == named["params"]]
    ways = set(zip(rows["eval"], rows["params"], strict=True))
    found = [Key(named["metric"], eval_name, params) for eval_name, params in ways]
    return sorted(found, key=lambda key: (key.eval_name, natural(key.params)))


def one_key(scores: pd.DataFrame, name: str) -> Key:
    found = keys(scores, name)
    if len(found) == 1:
        return found[0]
    if found:
        choices = ", ".join(f"{key.metric}[{key.params}]" for key in found)
        raise UserError(f"{name!r} is measured in several ways. Name one of them: {choices}")
    known = ", ".join(sorted(set(scores["metric"]))) or "none"
    raise UserError(f"No SAE has a metric {name!r}. Metrics of these results: {known}")


def of_key(scores: pd.DataFrame, key: Key) -> pd.DataFrame:
    """The rows of one metric measured in one way, by SAE, of which each has one."""
    same = (
        (scores["metric"] == key.metric)
        & (scores["eval"] == key.eval_name)
        & (scores["params"] == key.params)
    )
    return scores[same].set_index("sae")


def words(name: str) -> str:
    """explained_variance -> explained variance, l0 -> L0."""
    return " ".join(_SHORT.get(word, word) for word in name.split("_"))


def natural(text: str) -> list[tuple[int, int, str]]:
    """Sorts k=2 before k=10."""
    parts = re.split(r"(\d+)", text)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts if part]


def number(value: float, low: float, high: float) -> Number:
    """`low` and `high` are NaN where there is no interval."""
    half = (high - low) / 2
    size = max(abs(value), 0.0 if math.isnan(half) else half)
    magnitude = math.floor(math.log10(size)) if size > 0 else 0
    exponent = magnitude if magnitude < -4 or magnitude >= 6 else 0
    value, low, high, half = (part / 10.0**exponent for part in (value, low, high, half))
    decimals = _decimals(half)
    if decimals is None:
        return Number(f"{value:.4g}", None, exponent)
    up, down = high - value, value - low
    shown, *parts = (f"{part:.{decimals}f}" for part in (value, low, high, down, up))
    if min(up, down) > 0 and max(up, down) <= _SYMMETRIC * min(up, down):
        return Number(shown, Arm(f"{max(up, down):.{decimals}f}"), exponent)
    return Number(shown, Ends(*parts), exponent)


def build(results: Results, metrics: Sequence[str]) -> Table:
    scores = newest(results.scores)
    headings = _headings(scores, metrics)
    if not headings:
        known = ", ".join(sorted(set(scores["metric"]))) or "none yet"
        raise UserError(
            f"{results.folder}: no SAE has any of {', '.join(metrics)}. Metrics of these results: "
            f"{known}. Name some of these in the leaderboard's `metrics`, or finish the run."
        )
    columns = {heading.key: of_key(scores, heading.key) for heading in headings}
    saes = _matched(scores.drop_duplicates("sae").set_index("sae"), scores)
    bootstraps: dict[tuple[int, int], stats.Bootstrap] = {}
    blocks = []
    for title, members in _grouped(saes):
        tied = {
            heading.key: _tied(results, heading, columns[heading.key], members, bootstraps)
            for heading in headings
        }
        blocks.append(Block(title, _rows(headings, columns, saes, members, tied)))
    return Table(
        headings=tuple(headings),
        blocks=tuple(blocks),
        facts=_facts(results, scores),
        reading=tuple(_reading(results, headings, blocks)),
        notes=tuple(_notes(results)),
    )


def _matched(saes: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """Puts each checkpoint beside the SAEs of its width whose asked-for L0 it has, where there are such."""
    measured = scores[scores["metric"] == "l0"]
    l0 = dict(zip(map(str, measured["sae"]), map(float, measured["value"]), strict=True))
    trained = saes[saes["kind"] == "trained"]
    asked_for = []
    for name, row in saes.iterrows():
        asked = float(row["target_l0"])
        if row["kind"] == "checkpoint" and math.isnan(asked) and str(name) in l0:
            here = trained[(trained["site"] == row["site"]) & (trained["width"] == row["width"])]
            asked = _hit(l0[str(name)], [float(a) for a in here["target_l0"].dropna()])
        asked_for.append(asked)
    return saes.assign(target_l0=asked_for)


def _hit(l0: float, asked: Sequence[float]) -> float:
    """The nearest of the asked-for values, NaN where none is within what counts as hit."""
    distance, nearest = min(((abs(l0 / a - 1), a) for a in asked), default=(math.inf, math.nan))
    return nearest if distance <= MISSED else math.nan


def _decimals(half: float) -> int | None:
    """One digit of the interval, two where it starts with 1; None where nothing would be seen."""
    if math.isnan(half) or half <= 0:
        return None
    places = -math.floor(math.log10(half))
    if half * 10.0**places < 1.95:
        places += 1
    return None if places > _MOST_DECIMALS else max(0, places)


def _headings(scores: pd.DataFrame, metrics: Sequence[str]) -> list[Heading]:
    # L0 is the axis along which SAEs are matched: no table goes without it.
    wanted = list(dict.fromkeys(["l0", *metrics]))
    return [
        _heading(scores, key, len(found))
        for name in wanted
        for found in [keys(scores, name)]
        for key in found
    ]


def _heading(scores: pd.DataFrame, key: Key, n_ways: int) -> Heading:
    rows = of_key(scores, key)
    row = rows.iloc[0]
    best: Best = row["best"] if row["best"] in ("min", "max") else None
    label = words(key.metric)
    if n_ways > 1:
        label += f" ({key.params or key.eval_name})"
    reference = _reference(rows["reference"].dropna())
    return Heading(key, label, best, row["unit"], row["doc"], reference)


def _reference(given: "pd.Series[float]") -> str | None:
    if given.empty:
        return None
    least, most = f"{given.min():.3g}", f"{given.max():.3g}"
    return least if least == most else f"{least} to {most}"


def _none_last(value: Any) -> tuple[bool, float]:
    return (True, 0.0) if pd.isna(value) else (False, float(value))


def _grouped(saes: pd.DataFrame) -> Iterable[tuple[str, list[str]]]:
    """Blocks in order: title and the SAEs in it."""
    for site in sorted(set(saes["site"]), key=natural):
        here = saes[saes["site"] == site]
        contenders = here[here["kind"] != "control"]
        controls = here[here["kind"] == "control"]
        # Width and asked-for L0, None where nobody asked, as for a foreign checkpoint.
        places = {_place(row) for _, row in contenders.iterrows()}
        placed: set[str] = set()
        for place in sorted(places, key=lambda p: (_none_last(p[0]), _none_last(p[1]))):
            members = [str(name) for name, row in contenders.iterrows() if _place(row) == place]
            beside = [str(n) for n, row in controls.iterrows() if _belongs(row, place, places)]
            placed.update(beside)
            yield _title(site, place), members + beside
        left = [str(name) for name in controls.index if name not in placed]
        if left:
            yield f"{site}, controls", left


_Place = tuple[int | None, float | None]


def _place(row: "pd.Series[Any]") -> _Place:
    width = None if pd.isna(row["width"]) else int(row["width"])
    return width, None if pd.isna(row["target_l0"]) else float(row["target_l0"])


def _belongs(control: "pd.Series[Any]", place: _Place, places: set[_Place]) -> bool:
    """A control stands beside the SAEs of its asked-for L0: of its own width, if there are such."""
    own = _place(control)
    return own[1] is not None and (own == place or (own not in places and own[1] == place[1]))


def _title(site: str, place: _Place) -> str:
    width, l0 = place
    parts = [site]
    parts.append("no width asked for" if width is None else f"width {width:,}")
    parts.append("no L0 asked for" if l0 is None else f"asked-for L0 {l0:g}")
    if width is None and l0 is None:
        return f"{site}, checkpoints"
    return ", ".join(parts)


def _tied(
    results: Results,
    heading: Heading,
    column: pd.DataFrame,
    members: Sequence[str],
    bootstraps: dict[tuple[int, int], stats.Bootstrap],
) -> frozenset[str]:
    """Empty where there is nothing to compare, or the units to compare with were not kept."""
    rows = column[column.index.isin(list(members)) & (column["kind"] != "control")]
    kept = all(files.has_units(results, file) for file in rows["file"])
    if heading.best is None or len(rows) < 2 or not kept:
        return frozenset()
    found = {
        str(sae): files.units_in(results.folder / str(file), heading.key.metric)
        for sae, file in rows["file"].items()
    }
    # One SAE's latents are not another's.
    paired = heading.unit != "latent"
    if paired:
        found = files.on_common_units(found)
    shape = (len(next(iter(found.values())).num), stats.draws_for(len(found) - 1))
    bootstrap = bootstraps.setdefault(shape, stats.Bootstrap(*shape))
    statistic = rows["statistic"].iloc[0]
    columns = {sae: stats.Column(u.num, u.den, statistic) for sae, u in found.items()}
    return stats.tie_group(columns, heading.best, paired, bootstrap)


def _rows(
    headings: Sequence[Heading],
    columns: dict[Key, pd.DataFrame],
    saes: pd.DataFrame,
    members: Sequence[str],
    tied: dict[Key, frozenset[str]],
) -> tuple[Row, ...]:
    rows = []
    for name in _ranked(headings, columns, saes, members):
        cells = (_cell(columns[h.key], name, name in tied[h.key]) for h in headings)
        about = saes.loc[name]
        control = str(about["kind"]) == "control"
        rows.append(Row(name, str(about["variant"]), control, tuple(cells)))
    return tuple(rows)


def _ranked(
    headings: Sequence[Heading],
    columns: dict[Key, pd.DataFrame],
    saes: pd.DataFrame,
    members: Sequence[str],
) -> list[str]:
    """Best first, controls last."""
    directed = [h for h in headings if h.best is not None]
    first = directed[0] if directed else None
    by = next((h for h in directed if h.key.metric == _RANKED_BY), first)

    def order(name: str) -> tuple[bool, tuple[bool, float], list[tuple[int, int, str]]]:
        is_control = str(saes.loc[name, "kind"]) == "control"
        if by is None or name not in columns[by.key].index:
            return is_control, (True, 0.0), natural(name)
        value = float(cast(float, columns[by.key].loc[name, "value"]))
        return is_control, (False, -value if by.best == "max" else value), natural(name)

    return sorted(members, key=order)


def _cell(column: pd.DataFrame, name: str, tied: bool) -> Cell:
    if name not in column.index:
        return Cell(None, tied=False, missed=False)
    found = [cast(float, column.loc[name, part]) for part in ("value", "ci_low", "ci_high")]
    asked = cast(float, column.loc[name, "target_l0"])
    # NaN, where no L0 was asked for, is not missed by anything.
    missed = column.loc[name, "metric"] == "l0" and abs(found[0] - asked) > MISSED * asked
    return Cell(number(*found), tied, bool(missed))


def _facts(results: Results, scores: pd.DataFrame) -> str:
    sites = ", ".join(sorted(set(scores["site"]), key=natural))
    tokens = scores.loc[scores["unit"] == "sequence", "n"]
    amount = ""
    if len(tokens):
        least, most = int(tokens.min()), int(tokens.max())
        amount = f"{most:,} tokens of " if least == most else f"{least:,} to {most:,} tokens of "
    return f"{results.model}, at {sites}, on {amount}{results.text}."


def _reading(results: Results, headings: Sequence[Heading], blocks: Sequence[Block]) -> list[str]:
    cells = [cell for block in blocks for row in block.rows for cell in row.cells]
    sentences = [_about_intervals(headings)]
    if any(cell.tied for cell in cells):
        sentences.append(
            "Bold: cannot be told apart from the best of its block at the 5 % level "
            f"({_about_test(headings)}, Holm-adjusted)."
        )
    if any(row.control for block in blocks for row in block.rows):
        sentences.append("(control): a reference to read the others against; never ranked.")
    if any(cell.missed for cell in cells):
        sentences.append(
            f"†: misses the asked-for L0 by more than {MISSED:.0%}, so it is compared at another "
            "sparsity than the rest of its block.".replace("%", " %")
        )
    sentences += _about_dead(results, headings)
    if not _all_units_kept(results):
        sentences.append("Units of some runs were not kept: these columns have no bold.")
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
    others = [f"{unit}s for {', '.join(n)}" for unit, n in units.items() if unit != commonest]
    rest = f" ({'; '.join(others)})" if others else ""
    return (
        f"± and [low, high]: 95 % interval over {commonest}s{rest}; left out where it is narrower "
        "than the digits shown or where there are too few units."
    )


def _about_test(headings: Sequence[Heading]) -> str:
    directed = {heading.unit for heading in headings if heading.best is not None}
    paired = sorted(f"{unit}s" for unit in directed - {"latent"})
    tests = [f"paired test on the same {' or '.join(paired)}"] if paired else []
    if "latent" in directed:
        tests.append("unpaired over latents")
    return "; ".join(tests)


def _all_units_kept(results: Results) -> bool:
    return all(files.has_units(results, file) for file in set(results.scores["file"]))


def _notes(results: Results) -> list[str]:
    notes = []
    for (eval_name, reason), rows in results.skips.groupby(["eval", "reason"], sort=True):
        names = ", ".join(sorted(set(rows["sae"]), key=natural))
        notes.append(f"{eval_name} does not apply to {names}: {reason}")
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
