"""Order: whether a metric ranks oracle > trained > frozen decoder, random and permuted decoder."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from saebench.reliability.rows import Row

MATCHED = 1.05
"""Up to so many times the L0 of the oracle, a trained SAE is compared with it."""
HOLDS = 0.9
"""Share of pairs that must be in order."""


class Pairs(NamedTuple):
    """Of all pairs at one site, width and asked-for L0 (where both have one), those in which `better` is better.

    A tie is none. `holds` is at least 90 % of them. Beside an oracle stand SAEs of at most 1.05 times its measured L0.
    """

    better: str
    worse: str
    right: int
    pairs: int
    verdict: Literal["holds", "fails", "not tested"]


class Order(NamedTuple):
    """`passes`: every kind of pair that is there holds."""

    kinds: tuple[Pairs, ...]
    passes: bool | None
    missing: dict[str, str]


def _is(family: str) -> Callable[[Row], bool]:
    return lambda row: row.family == family and row.kind != "trained" and not row.degraded


def _is_trained(row: Row) -> bool:
    return row.kind == "trained"


def _is_degraded(row: Row) -> bool:
    return row.family == "oracle" and bool(row.degraded)


def _always(_: Row, __: Row) -> bool:
    return True


def _as_sparse(oracle: Row, trained: Row) -> bool:
    """An oracle has the L0 that it has; what has more active latents can explain more without knowing more."""
    if oracle.active is None or trained.active is None:
        return True
    return trained.active <= MATCHED * oracle.active


def _less_degraded(a: Row, b: Row) -> bool:
    return a.degraded == b.degraded and (a.amount or 0.0) < (b.amount or 0.0)


class _Rule(NamedTuple):
    better: str
    worse: str
    is_better: Callable[[Row], bool]
    is_worse: Callable[[Row], bool]
    compares: Callable[[Row, Row], bool]


_RULES = (
    _Rule("oracle", "trained", _is("oracle"), _is_trained, _as_sparse),
    _Rule("oracle", "degraded oracle", _is("oracle"), _is_degraded, _always),
    _Rule("degraded oracle", "more degraded", _is_degraded, _is_degraded, _less_degraded),
    _Rule("trained", "frozen_decoder", _is_trained, _is("frozen_decoder"), _always),
    _Rule("trained", "random", _is_trained, _is("random"), _always),
    _Rule("trained", "permuted_decoder", _is_trained, _is("permuted_decoder"), _always),
)


def order_of(rows: Sequence[Row]) -> Order:
    if rows[0].best is None:
        return Order((), None, {"passes": "the metric has no better direction"})
    base = [row for row in rows if row.what == "base"]
    kinds = tuple(_ordered(rule, base) for rule in _RULES)
    tested = [kind for kind in kinds if kind.verdict != "not tested"]
    if not tested:
        return Order(kinds, None, {"passes": "no oracle or control stands beside a trained SAE"})
    return Order(kinds, all(kind.verdict == "holds" for kind in tested), {})


def order_fails(order: Order) -> list[str]:
    failed = [
        f"{kind.worse} no worse than {kind.better} in {kind.pairs - kind.right} of {kind.pairs} pairs"
        for kind in order.kinds
        if kind.verdict == "fails"
    ]
    return [f"fails the order test ({'; '.join(failed)})"] if failed else []


def _ordered(rule: _Rule, base: Sequence[Row]) -> Pairs:
    worse = [row for row in base if rule.is_worse(row)]
    found = [
        a.better > b.better
        for a in filter(rule.is_better, base)
        for b in worse
        if _same_place(a, b) and rule.compares(a, b)
    ]
    right, n = sum(found), len(found)
    verdict: Literal["holds", "fails", "not tested"]
    verdict = "not tested" if n == 0 else "holds" if right >= HOLDS * n else "fails"
    return Pairs(rule.better, rule.worse, right, n, verdict)


def _same_place(a: Row, b: Row) -> bool:
    same_l0 = a.l0 is None or b.l0 is None or a.l0 == b.l0
    return (a.site, a.width) == (b.site, b.width) and same_l0
