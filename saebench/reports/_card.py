"""The reliability card of a suite's metrics in Markdown: one table of all of them, what is behind it, and in words how
each number is defined.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from saebench.reliability.cards import PASSED, WARNING, Card, Reliability
from saebench.reliability.invariance import WHATS, Change
from saebench.reliability.order import Pairs
from saebench.reliability.truth import Correlation
from saebench.reports._markdown import escaped, pipes
from saebench.reports._table import words
from saebench.reports._terminal import Line, Screen

_NONE = "–"
_LENSES = ("noise", "training_noise", "order", "progress", "truth", "invariance", "cost")
_MOST_NAMES = 8
_DEFINITIONS = (
    f"badge: {PASSED} where order and truth both pass and nothing fails; {WARNING} where order, truth or the unit "
    "fails; empty where nothing failed and not all was tested.",
    "CV: standard deviation over evaluations drawn anew (other texts, other splits) over the mean; the median over the "
    "SAEs that were drawn anew. Sd is the same without the division, pooled over SAEs.",
    "smallest difference: what one run must show between two SAEs, scored on the same draw, to lie outside 95 % of "
    "what draws alone do: 1.96 standard deviations of such a difference. On draws of their own it is 1.96 · √2 · sd.",
    "signal/noise: variance between the trained SAEs of a site over the variance between draws. Below 1, draws differ "
    "more than SAEs.",
    "interval/noise: sd over draws by the sd that the reported 95 % intervals claim. Near 1 they cover what they "
    "claim; above 1 they are too narrow.",
    "seed: share of the variance between trained SAEs that is their training seed, after that of the evaluation is "
    "taken off; from recipes trained with two seeds or more. Training sd and recipe sd are the roots of its parts.",
    "order: pairs at the same site, width and asked-for L0 in which the metric ranks as it must; equal is wrong. Each "
    "kind of pair must be right in 90 % or more. Oracles are compared with SAEs of about their L0 or less.",
    "progress: rank correlation of the metric with training tokens over the snapshots of an SAE; the median, and how "
    "many are above 0.8.",
    "F1, MCC: rank correlation of the metric with the agreement of latents and known features, over the trained SAEs "
    "of a synthetic suite, with its 95 % interval over recipes. It passes where one of the two is above 0 and none "
    "below. Within L0: the mean over asked-for L0 of the correlation among SAEs of the same one.",
    "moves: how far values move at the most when something else changes (batch size, number format of the language "
    "model, context length, evaluation tokens, unit of activations), and in brackets that over the sd of noise.",
    "unit: activations and SAE both in another unit. A metric that has a worst and a best value must not move, by more "
    "than a thousandth of the range of its values here.",
    "cost: seconds and memory of the metric's whole eval alone, on one SAE; metrics of one eval share it.",
)


def markdown(card: Card) -> str:
    labels = _labels(card.metrics)
    parts = [f"# Reliability of the metrics of {escaped(card.suite)}"]
    parts.append(f"{len(card.metrics)} metrics, measured on {card.n_saes} SAEs and controls.")
    parts.append(_overview(card, labels))
    warnings = _bullets(_warnings(card, labels))
    parts += [f"## Warnings\n\n{warnings}"] if warnings else []
    parts += _section("Noise", "", card, labels, _NOISE)
    parts += _order(card, labels)
    parts += _truth(card, labels)
    parts += _moves(card, labels)
    parts.append(f"## How the numbers are defined\n\n{_bullets(_DEFINITIONS)}")
    missing = _bullets(_missing(card, labels))
    parts += [f"## Not measured\n\n{missing}"] if missing else []
    return "\n\n".join(parts) + "\n"


def _labels(metrics: Sequence[Reliability]) -> list[str]:
    """A metric that is there in several ways is named with its eval, version and parameters."""
    often = Counter(one.metric for one in metrics)
    return [
        words(one.metric)
        + ("" if often[one.metric] == 1 else f" ({one.eval} v{one.version} {one.params})")
        for one in metrics
    ]


# Cells

_Column = Callable[[Reliability], str]


def _short(value: float | None) -> str:
    return _NONE if value is None else f"{value:.2g}" if abs(value) < 100 else f"{value:,.0f}"


def _percent(share: float | None) -> str:
    if share is None:
        return _NONE
    digits = 1 if 0 < share < 0.0995 else 0
    return f"{100 * share:.{digits}f} %"


def _badge(one: Reliability) -> str:
    return one.badge


def _order_cell(one: Reliability) -> str:
    tested = [kind for kind in one.order.kinds if kind.verdict != "not tested"]
    if not tested:
        return _NONE
    right, pairs = sum(kind.right for kind in tested), sum(kind.pairs for kind in tested)
    return f"{right}/{pairs}{WARNING if one.order.passes is False else ''}"


def _progress_cell(one: Reliability) -> str:
    median, rising, n_curves = one.progress.median, one.progress.rising, one.progress.n_curves
    return _NONE if median is None else f"{median:.2f} ({rising}/{n_curves})"


def _correlation(found: Correlation | None) -> str:
    return _NONE if found is None else f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _drawn(one: Reliability) -> str:
    """3, 5 at 25 % of the tokens."""
    share = one.noise.share
    if one.noise.n_saes == 0:
        return _NONE
    of = "" if share is None or share >= 1 else f" at {_percent(share)} of the tokens"
    return f"{one.noise.n_saes}, {one.noise.n_draws}{of}"


def _reseeded(one: Reliability) -> str:
    n_recipes, n_saes = one.training_noise.n_recipes, one.training_noise.n_saes
    return f"{n_recipes}, {n_saes}" if n_recipes else _NONE


def _changes(one: Reliability) -> dict[str, Change]:
    found = {what: getattr(one.invariance, what) for what in WHATS}
    return {what: change for what, change in found.items() if change is not None}


def _most_moved(one: Reliability) -> str:
    """By what does not change what is measured."""
    moved = [
        (change.in_noise, what)
        for what, change in _changes(one).items()
        if what != "unit" and change.in_noise is not None
    ]
    if not moved:
        return _NONE
    most, what = max(moved)
    return f"{what} {_short(most)}" if most > 0 else "0"


def _unit_cell(one: Reliability) -> str:
    unit = one.invariance.unit
    if unit is None:
        return _NONE
    if one.invariance.passes is False:
        return f"fails{WARNING}"
    return "depends" if unit.mark else "same"


def _move(what: str) -> _Column:
    def cell(one: Reliability) -> str:
        change = _changes(one).get(what)
        if change is None:
            return _NONE
        times = "" if change.in_noise is None else f" ({_short(change.in_noise)})"
        return f"{_short(change.largest)}{times}"

    return cell


def _cost_cell(one: Reliability) -> str:
    seconds, size = one.cost.seconds, one.cost.bytes
    told = [] if seconds is None else [f"{_short(seconds)} s"]
    told += [] if size is None else [f"{size / 2**20:,.0f} MiB"]
    return ", ".join(told) or _NONE


_OVERVIEW: dict[str, _Column] = {
    "badge": _badge,
    "CV": lambda one: _percent(one.noise.cv),
    "smallest difference": lambda one: _short(one.noise.smallest_paired_difference),
    "signal/noise": lambda one: _short(one.noise.signal_to_noise),
    "seed": lambda one: _percent(one.training_noise.seed_share),
    "order": _order_cell,
    "progress": _progress_cell,
    "F1": lambda one: _correlation(one.truth.f1),
    "MCC": lambda one: _correlation(one.truth.mcc),
    "moves most": _most_moved,
    "unit": _unit_cell,
    "cost": _cost_cell,
}
_NOISE: dict[str, _Column] = {
    "SAEs, draws": _drawn,
    "sd": lambda one: _short(one.noise.sd),
    "smallest difference, same draw": lambda one: _short(one.noise.smallest_paired_difference),
    "own draws": lambda one: _short(one.noise.smallest_difference),
    "interval/noise": lambda one: _short(one.noise.interval_ratio),
    "recipes, SAEs": _reseeded,
    "training sd": lambda one: _short(one.training_noise.training_sd),
    "recipe sd": lambda one: _short(one.training_noise.recipe_sd),
}
_TRUTH: dict[str, _Column] = {
    "SAEs": lambda one: str(one.truth.n_saes or _NONE),
    "F1": lambda one: _correlation(one.truth.f1),
    "F1 within L0": lambda one: _correlation(one.truth.f1_within_l0),
    "MCC": lambda one: _correlation(one.truth.mcc),
    "MCC within L0": lambda one: _correlation(one.truth.mcc_within_l0),
}


def text(card: Card) -> str:
    """For a terminal: the one table of all metrics, and the warnings."""
    labels = _labels(card.metrics)
    screen = Screen()
    screen.line(f"Reliability of the metrics of {card.suite}", "bold")
    lines = [
        Line([label, *(cell(one) for cell in _OVERVIEW.values())], dim=False)
        for label, one in zip(labels, card.metrics, strict=True)
    ]
    screen.grid(["metric", *_OVERVIEW], lines, left=2)
    for warning in _warnings(card, labels):
        screen.line(warning)
    return screen.text()


# Sections


def _overview(card: Card, labels: Sequence[str]) -> str:
    return pipes(["metric", *_OVERVIEW], _lines(card, labels, _OVERVIEW), left=2)


def _section(
    title: str, told: str, card: Card, labels: Sequence[str], columns: dict[str, _Column]
) -> list[str]:
    """With the metrics that have anything to show there; none where none has."""
    lines = [
        line for line in _lines(card, labels, columns) if any(cell != _NONE for cell in line[1:])
    ]
    if not lines:
        return []
    grid = pipes(["metric", *map(escaped, columns)], lines, left=1)
    return ["\n\n".join(part for part in (f"## {title}", told, grid) if part)]


def _lines(card: Card, labels: Sequence[str], columns: dict[str, _Column]) -> list[list[str]]:
    return [
        [escaped(text) for text in (label, *(cell(one) for cell in columns.values()))]
        for label, one in zip(labels, card.metrics, strict=True)
    ]


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {escaped(line)}" for line in lines)


def _warnings(card: Card, labels: Sequence[str]) -> list[str]:
    lines = []
    for label, one in zip(labels, card.metrics, strict=True):
        lines += [f"{WARNING} {label}: {warning}." for warning in one.warnings]
        lines += [f"{label}: {c.mark}." for c in _changes(one).values() if c.mark]
    return lines


def _order(card: Card, labels: Sequence[str]) -> list[str]:
    kinds = [
        (kind.better, kind.worse)
        for one in card.metrics
        for kind in one.order.kinds
        if kind.verdict != "not tested"
    ]
    columns = {f"{a} > {b}": _kind_cell(a, b) for a, b in dict.fromkeys(kinds)}
    return _section("Order", "Pairs that are right, of all.", card, labels, columns)


def _kind_cell(better: str, worse: str) -> _Column:
    def cell(one: Reliability) -> str:
        found = (k for k in one.order.kinds if (k.better, k.worse) == (better, worse))
        kind = next(found, None)
        return _NONE if kind is None or kind.verdict == "not tested" else _right(kind)

    return cell


def _right(kind: Pairs) -> str:
    return f"{kind.right}/{kind.pairs}{WARNING if kind.verdict == 'fails' else ''}"


def _truth(card: Card, labels: Sequence[str]) -> list[str]:
    panels = dict.fromkeys(one.truth.panel for one in card.metrics if one.truth.f1 is not None)
    named = ", ".join(escaped(panel) for panel in panels if panel is not None)
    told = f"Rank correlation with known features, over the trained SAEs of {named}."
    return _section("Truth", told, card, labels, _TRUTH) if named else []


def _moves(card: Card, labels: Sequence[str]) -> list[str]:
    there = [what for what in WHATS if any(what in _changes(one) for one in card.metrics)]
    columns = {_told(card, what): _move(what) for what in there}
    told = "The largest move of a value, and in brackets how many sd of noise that is."
    return _section("What moves them", told, card, labels, columns)


def _told(card: Card, what: str) -> str:
    """With its settings."""
    found = [_changes(one)[what].setting for one in card.metrics if what in _changes(one)]
    settings = ", ".join(setting for setting in dict.fromkeys(found) if setting)
    return f"{what} {settings}".strip()


def _missing(card: Card, labels: Sequence[str]) -> list[str]:
    """What is not there, for which metrics, and why: one line for all that have the same reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for label, one in zip(labels, card.metrics, strict=True):
        for what, reason in _reasons(one):
            found.setdefault((what, reason), []).append(label)
    return [
        f"{what} of {_names(of, len(labels))}: {reason}." for (what, reason), of in found.items()
    ]


def _reasons(one: Reliability) -> Iterator[tuple[str, str]]:
    for lens in _LENSES:
        missing: dict[str, str] = getattr(one, lens).missing
        for reason in dict.fromkeys(missing.values()):
            fields = [words(name) for name, given in missing.items() if given == reason]
            whole = len(set(missing.values())) == 1 and lens != "invariance"
            yield words(lens) + ("" if whole else f" ({', '.join(fields)})"), reason
    for what, change in _changes(one).items():
        for reason in change.missing.values():
            yield f"{what} in noise", reason


def _names(of: Sequence[str], everything: int) -> str:
    if len(of) == everything > 1:
        return "all metrics"
    more = len(of) - _MOST_NAMES
    return ", ".join(of[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
