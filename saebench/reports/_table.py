"""The leaderboard as data: blocks of rows of cells, before any of it is Markdown or LaTeX.

A block holds what may be compared: one site, one width, one asked-for L0 (`_blocks`). A cell says its
value in as many digits as its interval warrants. Whether two SAEs differ is decided by a test on their
kept units (`_evidence`), not by whether their intervals overlap. `_build` puts it together.
"""

import math
import re
from typing import Literal, NamedTuple

import pandas as pd

from saebench.errors import NothingToShow, UserError
from saebench.reliability.cards import Badge
from saebench.results import Results

OWN_UNITS = ("latent", "feature")
"""One SAE's latents are not another's, nor are the features that it has found."""
MISSED = 0.1
"""An asked-for L0 is missed when the measured one is off by more than this share of it."""

_MOST_DECIMALS = 6
_SYMMETRIC = 1.25  # the longer arm of an interval over the shorter, up to which it is shown as ±
_NAMED = re.compile(r"(?P<metric>[^\[\]]+)(\[(?P<params>[^\]]*)\])?")
_SHORT = {
    name.lower(): name
    for name in ("AUC", "CE", "F1", "KL", "L0", "L2", "MCC", "MMCS", "MSE", "SAE")
}


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
    unseparated: tuple[str, ...]
    """Controls that it does not separate from trained SAEs."""
    badge: Badge
    """What audits say of it."""
    warnings: tuple[str, ...]
    """Which audits it failed, as parts of a sentence."""


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


class Standing(NamedTuple):
    """Where a row stands in its block on one metric."""

    low: int
    """1 + how many are significantly better."""
    high: int
    """How many there are, less those that are significantly worse."""
    letters: str
    """Two rows share a letter exactly where they cannot be told apart."""
    p_best: float
    """Share of resampled draws in which it is the best."""
    tied: bool
    """Cannot be told apart from the best of the block."""


class Cell(NamedTuple):
    number: Number | None
    standing: Standing | None
    """None where there is nothing to compare, or the units to compare with were not kept."""
    missed: bool
    """The asked-for L0 was missed."""

    @property
    def tied(self) -> bool:
        return self.standing is not None and self.standing.tied


class Row(NamedTuple):
    name: str
    mark: Literal["control", "reference", "imported"] | None
    """Of what is never ranked."""
    variant: str
    n_seeds: int
    cells: tuple[Cell, ...]


class Block(NamedTuple):
    title: str
    rows: tuple[Row, ...]


class SeedRow(NamedTuple):
    """One metric of one recipe that was trained with several seeds."""

    name: str
    metric: str
    mean: str
    training_sd: str
    evaluation_sd: str
    values: tuple[str, ...]


class SeedBlock(NamedTuple):
    title: str
    rows: tuple[SeedRow, ...]


class Against(NamedTuple):
    """All trained SAEs beside a control, on one metric."""

    z: float | None
    """Median difference in standard errors, positive where trained SAEs are better."""
    better: int
    """How many are significantly better than the control."""
    pairs: int
    blocks: int
    """How many blocks have the control."""
    failed: int
    """In how many of these at most half of the SAEs are significantly better."""

    @property
    def separates(self) -> bool:
        return 2 * self.failed <= self.blocks


class SeparationRow(NamedTuple):
    heading: Heading
    against: dict[str, Against]
    """By control."""


class Table(NamedTuple):
    headings: tuple[Heading, ...]
    sorted_by: int
    """Which of the headings."""
    blocks: tuple[Block, ...]
    seeds: tuple[SeedBlock, ...]
    facts: str
    """Model, sites, text and tokens, in a sentence."""
    reading: tuple[str, ...]
    """How to read it: a sentence each."""
    notes: tuple[str, ...]
    """What is not shown, and why."""


def newest(scores: pd.DataFrame) -> pd.DataFrame:
    """The newest version of each eval: versions of a metric are never mixed."""
    return scores[scores["version"] == scores.groupby("eval")["version"].transform("max")]


def only(results: Results, site: str | None, width: int | None) -> Results:
    """The SAEs of one site, of one width; None is all. Raises `UserError` where there are none."""
    scores = results.scores
    here = pd.Series(True, index=scores.index)
    if site is not None:
        here &= scores["site"] == site
    if width is not None:
        here &= (scores["width"] == width).fillna(False).astype(bool)
    if not here.any():
        places = scores[["site", "width"]].drop_duplicates().itertuples(index=False)
        there = sorted((f"{p.site} with width {p.width}" for p in places), key=natural)
        raise UserError(
            f"{results.folder} has no SAE at {site or 'any site'} with width {width or 'of any size'}; there are: "
            + "; ".join(there)
        )
    return results._replace(scores=scores[here])


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
    raise NothingToShow(f"No SAE has a metric {name!r}. Metrics of these results: {known}")


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
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]


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


def shown(given: Number) -> str:
    """0.913 ± 0.002, 0.03 [0.02, 0.05] or (1.2 ± 0.1)e-6."""
    value, interval, exponent = given
    text = value
    if isinstance(interval, Arm):
        text = f"{value} ± {interval.length}"
    elif isinstance(interval, Ends):
        text = f"{value} [{interval.low}, {interval.high}]"
    if exponent:
        text = f"({text})e{exponent}" if interval else f"{text}e{exponent}"
    return text


def spelled(value: float, low: float, high: float) -> tuple[str, str, str]:
    """A value and the ends of its interval, with a digit more than `number`, so that no end is rounded to zero."""
    digits = number(value, low, high)
    if digits.interval is None:
        return f"{value:.4g}", f"{low:.4g}", f"{high:.4g}"
    decimals = len(digits.value.partition(".")[2]) + 1
    power = f"e{digits.exponent}" if digits.exponent else ""
    scale = 10.0**digits.exponent
    first, second, third = (f"{part / scale:.{decimals}f}{power}" for part in (value, low, high))
    return first, second, third


def _decimals(half: float) -> int | None:
    """One digit of the interval, two where it starts with 1; None where nothing would be seen."""
    if math.isnan(half) or half <= 0:
        return None
    places = -math.floor(math.log10(half))
    if half * 10.0**places < 1.95:
        places += 1
    return None if places > _MOST_DECIMALS else max(0, places)
