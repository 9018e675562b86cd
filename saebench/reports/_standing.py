"""Where one SAE stands: against every family of baselines at its own L0, and in its block.

A family is the trained SAEs of one variant at the same site; those of the SAE's own width where there are such, or
else of all widths. Its frontier, m(L0) through its SAEs, is read at the measured L0 of the SAE (`frontiers.at_point`).
Nothing is extrapolated: beyond the frontier's ends the SAE is compared with the one of the family whose L0 is nearest,
if that is within 10 %. Differences come with 95 % intervals from the same drawn units, and p-values are Holm-adjusted
over the families of a metric. Controls are treated as families are; those that are not beaten come first.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from saebench import frontiers, stats
from saebench import results as files
from saebench.errors import UserError
from saebench.frontiers import Point
from saebench.reports import _seeds
from saebench.reports._blocks import Contender
from saebench.reports._compare import nearest
from saebench.reports._evidence import Evidence
from saebench.reports._table import MISSED, Key, keys, number, shown, spelled, words
from saebench.reports._terminal import Screen
from saebench.stats import Column, Difference

_HEADLINES = ("explained_variance", "loss_recovered")
_PROBES = tuple(f"probe_auc_{name}" for name in ("k5", "k1", "k2", "k10", "k20", "k50", "all"))
"""Of these the first that an SAE has."""


class _Said(NamedTuple):
    """How a difference is put into words: `explains 0.01 more variance than ...`."""

    verb: str
    more: str
    less: str


_SAYS = {
    "explained_variance": _Said("explains", "more variance than", "less variance than"),
    "loss_recovered": _Said("recovers", "more of the loss than", "less of the loss than"),
}
_PROBES_SAY = _Said("probes", "better (AUC) than", "worse (AUC) than")


class _Against(NamedTuple):
    """The SAE less a family, on one metric."""

    family: str
    difference: Difference
    p: float
    at: str
    """The frontier at its L0, or the one SAE of the family that it was compared with."""
    short: str


class _Apart(NamedTuple):
    """A family that the SAE cannot be compared with."""

    family: str
    reason: str


class _Family(NamedTuple):
    name: str
    members: tuple[Contender, ...]
    own_width: bool


def standing(folder: Path, name: str) -> str:
    """Some lines for a terminal. Raises `UserError` where the SAE has no scores here."""
    evidence = Evidence(files.read(folder))
    me = _contender(evidence, name)
    metrics = _metrics(evidence, me)
    if not metrics:
        raise UserError(f"{name} has none of the metrics {', '.join(_HEADLINES)} in {folder}.")
    screen = Screen()
    screen.line(_printable(_head(evidence, me, name)), "bold")
    for warning in _unbeaten(evidence, me, metrics):
        screen.line(_printable(warning))
    for key in metrics:
        for line in _about(evidence, me, key):
            screen.line(_printable(line))
    for note in _notes(evidence, me):
        screen.line(_printable(note))
    return screen.text()


def _contender(evidence: Evidence, name: str) -> Contender:
    """Alone, where it is one of several seeds."""
    for group in evidence.groups:
        for one in group.contenders:
            if name in one.saes:
                return one._replace(name=name, saes=(name,))
    known = sorted(set(map(str, evidence.scores["sae"])))
    raise UserError(f"{evidence.results.folder} has no scores of {name!r}; {nearest(name, known)}")


def _metrics(evidence: Evidence, me: Contender) -> list[Key]:
    (name,) = me.saes

    def has(metric: str) -> list[Key]:
        return [key for key in keys(evidence.scores, metric) if name in evidence.measured(key)]

    probes = next((found for metric in _PROBES if (found := has(metric))), [])
    return [key for metric in _HEADLINES for key in has(metric)] + probes


# What it is compared with


def _families(
    evidence: Evidence, me: Contender, kind: Literal["trained", "control"]
) -> list[_Family]:
    """Without the SAE's own, in the order of the suite."""
    here = [
        one
        for group in evidence.groups
        for one in group.contenders
        if one.kind == kind and one.site == me.site and not set(me.saes) & set(one.saes)
    ]
    if me.kind == kind:
        here = [one for one in here if one.variant != me.variant]
    order = {str(sae): place for place, sae in enumerate(evidence.scores["sae"].unique())}
    here.sort(key=lambda one: order[one.saes[0]])
    found = []
    for variant in dict.fromkeys(one.variant for one in here):
        members = tuple(one for one in dict.fromkeys(here) if one.variant == variant)
        same = tuple(one for one in members if one.width == me.width)
        found.append(_Family(variant, same or members, bool(same)))
    return found


def _compared(
    evidence: Evidence, me: Contender, key: Key, families: Sequence[_Family]
) -> tuple[list[_Against], list[_Apart]]:
    found: list[_Against] = []
    apart: list[_Apart] = []
    for family in families:
        outcome = _against(evidence, me, key, family)
        if isinstance(outcome, _Against):
            found.append(outcome)
        else:
            apart.append(outcome)
    adjusted = stats.holm([one.difference.p for one in found])
    return [one._replace(p=float(p)) for one, p in zip(found, adjusted, strict=True)], apart


def _against(evidence: Evidence, me: Contender, key: Key, family: _Family) -> _Against | _Apart:
    (name,) = me.saes
    l0s = _l0_columns(evidence, [name, *(sae for one in family.members for sae in one.saes)])
    measured = evidence.measured(key)
    members = {
        one.name: saes
        for one in family.members
        if (saes := [sae for sae in one.saes if sae in measured])
    }
    if not members:
        return _Apart(family.name, f"has no {words(key.metric)}")
    values = evidence.columns(key, [name, *(sae for saes in members.values() for sae in saes)])
    if name not in values or name not in l0s:
        return _Apart(family.name, "has no units to compare")
    points = {
        label: Point(
            _seeds.recipe_column([l0s[sae] for sae in saes]),
            _seeds.recipe_column([values[sae] for sae in saes]),
        )
        for label, saes in members.items()
        if all(sae in l0s for sae in saes)
    }
    if not points:
        return _beside(evidence, me, family, members, values)
    return _at_l0(family.name, Point(l0s[name], values[name]), points)


def _beside(
    evidence: Evidence,
    me: Contender,
    family: _Family,
    members: Mapping[str, Sequence[str]],
    values: Mapping[str, Column],
) -> _Against | _Apart:
    """What has no L0 of its own, as shuffled labels have not, is that of the L0 that was asked for."""
    own = evidence.measured(keys(evidence.scores, "l0")[0])[me.name].value
    asked = {one.name: one.l0 for one in family.members if one.name in members and one.l0}
    label = min(asked, key=lambda one: abs(asked[one] - own), default=None)
    if label is None or abs(asked[label] - own) > MISSED * asked[label]:
        return _Apart(family.name, "has no L0 near")
    other = _seeds.recipe_column([values[sae] for sae in members[label]])
    return _pair(family.name, values[me.name], other, label)


def _l0_columns(evidence: Evidence, saes: Sequence[str]) -> dict[str, Column]:
    found = keys(evidence.scores, "l0")
    return evidence.columns(found[0], saes) if found else {}


def _at_l0(family: str, sae: Point, points: dict[str, Point]) -> _Against | _Apart:
    """On the frontier, or beside the nearest SAE where the frontier does not reach."""
    if len(sae.metric.num) < 2:
        return _Apart(family, "has too few units")
    l0s = {label: stats.value(*point.l0) for label, point in points.items()}
    own = stats.value(*sae.l0)
    low, high = min(l0s.values()), max(l0s.values())
    if 0 < low < high and low <= own <= high:
        found = frontiers.at_point(sae, list(points.values()))
        at = f"the {family} frontier at L0 = {own:.3g}"
        return _Against(family, found.difference, 1.0, at, f"{family}'s")
    label = min(l0s, key=lambda one: abs(l0s[one] - own))
    if own <= 0 or abs(l0s[label] - own) > MISSED * own:
        reach = f"L0 {low:.3g}" if low == high else f"L0 {low:.3g} to {high:.3g}"
        return _Apart(family, f"has {reach}")
    return _pair(family, sae.metric, points[label].metric, f"{label} (L0 {l0s[label]:.3g})")


def _pair(family: str, a: Column, b: Column, label: str) -> _Against | _Apart:
    difference = stats.paired_difference(a.num, a.den, b.num, b.den, a.statistic)
    if difference is None:
        return _Apart(family, "has too few units")
    return _Against(family, difference, 1.0, label, label)


# Words


def _head(evidence: Evidence, me: Contender, name: str) -> str:
    width = "no width" if me.width is None else f"{me.width:,} latents"
    found = keys(evidence.scores, "l0")
    measured = evidence.measured(found[0]).get(name) if found else None
    l0 = "L0 not measured" if measured is None else f"L0 {measured.value:.3g}"
    return f"{name} at {me.site}: {width}, {l0}."


def _unbeaten(evidence: Evidence, me: Contender, metrics: Sequence[Key]) -> Iterator[str]:
    """One line a metric: controls at its L0 that it is not clearly better than."""
    controls = _families(evidence, me, "control")
    for key in metrics:
        found, _ = _compared(evidence, me, key, controls)
        best = next(iter(evidence.measured(key).values())).best
        lost = [one.family for one in found if _direction(one, best) <= 0]
        if lost:
            beaten = f"the control{'s' if len(lost) > 1 else ''} {_listed(lost)}"
            yield (
                f"Warning: {words(key.metric)} is not clearly better than that of {beaten}, which "
                f"know{'' if len(lost) > 1 else 's'} nothing of what the model learned."
            )


def _about(evidence: Evidence, me: Contender, key: Key) -> Iterator[str]:
    measured = evidence.measured(key)[me.saes[0]]
    yield (
        f"{_label(evidence, key)} {shown(number(measured.value, measured.low, measured.high))}, "
        f"{_rank(evidence, me, key)}"
    )
    found, apart = _compared(evidence, me, key, _families(evidence, me, "trained"))
    says = _SAYS.get(key.metric, _PROBES_SAY)
    found.sort(key=lambda one: abs(one.difference.value))
    for side, comparative in ((1, says.more), (-1, says.less)):
        apart_by = [one for one in found if _direction(one, measured.best) == side]
        if apart_by:
            yield f"  {says.verb} {_than(apart_by, comparative)}"
    tied = [one for one in found if _direction(one, measured.best) == 0]
    if tied:
        first, *others = tied
        listed = [f"{first.at} ({_signed(first.difference)})"]
        listed += [f"{one.short} ({_signed(one.difference)})" for one in others]
        yield f"  cannot be told from {_listed(listed, 'or')}"
    if apart:
        listed = [f"{one.family}, which {one.reason}" for one in apart]
        yield f"  not compared with {'; '.join(listed)}"


def _than(found: Sequence[_Against], comparative: str) -> str:
    """0.012 [0.009, 0.015] more variance than the topk frontier at L0 = 31, 0.02 [0.01, 0.03] more than relu's."""
    first, *others = found
    brief = f"{comparative.split()[0]} than"
    parts = [f"{_by(first.difference)} {comparative} {first.at}"]
    return ", ".join(parts + [f"{_by(one.difference)} {brief} {one.short}" for one in others])


def _label(evidence: Evidence, key: Key) -> str:
    label = words(key.metric)
    label = label[0].upper() + label[1:]
    several = len(keys(evidence.scores, key.metric)) > 1
    return f"{label} ({key.params or key.eval_name})" if several else label


def _rank(evidence: Evidence, me: Contender, key: Key) -> str:
    """In its block, where recipes with several seeds are one row."""
    for group in evidence.groups:
        row = next((one for one in group.contenders if set(me.saes) <= set(one.saes)), None)
        if row is None:
            continue
        standings = evidence.standings(key, group)
        found = standings.get(row.name)
        if found is None:
            return f"with nothing to rank it against ({group.title})"
        places = f"{found.low}" if found.low == found.high else f"{found.low} to {found.high}"
        return f"rank {places} of {len(standings)} ({group.title})"
    return "with no rank"


def _direction(one: _Against, best: str | None) -> int:
    """1 where the SAE is better than the family, -1 where it is worse, 0 where they cannot be told apart."""
    if one.p >= 1 - stats.LEVEL or one.difference.value == 0:
        return 0
    return 1 if (one.difference.value > 0) == (best != "min") else -1


def _by(difference: Difference) -> str:
    """0.012 [0.009, 0.015], whichever of the two is ahead."""
    value, low, high = difference[:3]
    return _interval(value, low, high) if value >= 0 else _interval(-value, -high, -low)


def _signed(difference: Difference) -> str:
    return _interval(*difference[:3])


def _interval(value: float, low: float, high: float) -> str:
    """In as few digits as leave no end at zero."""
    digits = spelled(value, low, high)
    if all("." in part and "e" not in part for part in digits):
        brief = [f"{part:.{len(digits[0].partition('.')[2]) - 1}f}" for part in (value, low, high)]
        if all(float(part) for part in brief[1:]):
            digits = (brief[0], brief[1], brief[2])
    return f"{digits[0]} [{digits[1]}, {digits[2]}]"


def _listed(names: Sequence[str], last: str = "and") -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}"


def _notes(evidence: Evidence, me: Contender) -> Iterator[str]:
    families = _families(evidence, me, "trained")
    if not families:
        yield "There are no trained SAEs at this site to compare it with; run the suite for these."
        return
    other = [family.name for family in families if not family.own_width]
    if other:
        yield f"Of {_listed(other)} there are other widths alone; their frontiers go through all of them."
    yield "In brackets: 95 % intervals; families are told apart at the 5 % level, Holm-adjusted over those of a metric."


def _printable(text: str) -> str:
    """Nothing in a name moves the cursor, colours or reverses what is written."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
