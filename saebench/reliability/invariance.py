"""Invariance: what moves a metric that should not."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from saebench.reliability.missing import Missing, split
from saebench.reliability.rows import NOTHING, Row

WHATS = ("batch", "dtype", "context", "tokens", "unit")
"""What is changed to see what a metric depends on."""
BATCH_SHARE = 1e-6
"""Of the larger of two values: how far another batch size may move them."""
UNIT_SHARE = 1e-3
"""Of the range of values: how far another unit may move them."""

_AS_GOOD = 1e-6  # of a value: rounding in float32


class Change(NamedTuple):
    """The largest |value - base| over SAEs and settings."""

    setting: str
    """Where it is largest."""
    n_saes: int
    largest: float
    in_noise: float | None
    """Over the sd of `Noise`, or over that which the reported intervals imply where nothing was drawn anew."""
    mark: str
    """What is to be said of it in words, empty where nothing is."""
    missing: dict[str, str]


class Invariance(NamedTuple):
    """What happens to values when something else is changed.

    batch    marked beyond 1e-6 of the larger of the two values
    unit     activations x and the SAE both at a x + b: a metric with ends must not move by more than 1e-3 of its range
             (largest less smallest base value of the audit, controls and references too) or by 1e-6 of its
             largest value, whichever is more; one without ends that does is marked
    """

    batch: Change | None
    dtype: Change | None
    context: Change | None
    tokens: Change | None
    unit: Change | None
    passes: bool | None
    """The unit, of a metric with ends."""
    missing: dict[str, str]


class _Moved(NamedTuple):
    row: Row
    base: float

    @property
    def by(self) -> float:
        return abs(self.row.value - self.base)

    @property
    def relative(self) -> float:
        return self.by / max(abs(self.row.value), abs(self.base), NOTHING)


def invariance_of(rows: Sequence[Row], noise: float | Missing) -> Invariance:
    base = {row.sae: row for row in rows if row.what == "base"}
    changed = {what: _changes(rows, base, what) for what in WHATS}
    parts: dict[str, Any] = {
        what: _change(what, pairs, base, noise) if pairs else Missing("not measured")
        for what, pairs in changed.items()
    }
    if not rows[0].ends:
        parts["passes"] = Missing("the metric has no ends, so it may be in the unit of activations")
    elif not changed["unit"]:
        parts["passes"] = Missing("not measured")
    else:
        parts["passes"] = not _moves_with_unit(changed["unit"], base)
    return Invariance(**split(parts))


def unit_fails(invariance: Invariance) -> list[str]:
    if invariance.passes is not False or invariance.unit is None:
        return []
    unit = invariance.unit
    return [f"fails the unit test (moves by {unit.largest:.2g} at {unit.setting})"]


def _changes(rows: Sequence[Row], base: Mapping[str, Row], what: str) -> list[_Moved]:
    return [
        _Moved(row, base[row.sae].value) for row in rows if row.what == what and row.sae in base
    ]


def _change(
    what: str, moved: Sequence[_Moved], base: Mapping[str, Row], noise: float | Missing
) -> Change:
    most = max(moved, key=lambda one: one.by)
    mark = ""
    if what == "batch" and max(one.relative for one in moved) > BATCH_SHARE:
        mark = "depends on the batch size"
    if what == "unit" and not most.row.ends and _moves_with_unit(moved, base):
        mark = "depends on the unit of activations"
    part = noise if isinstance(noise, Missing) else most.by / noise
    n_saes = len({one.row.sae for one in moved})
    return Change(most.row.setting, n_saes, most.by, mark=mark, **split({"in_noise": part}))


def _moves_with_unit(moved: Sequence[_Moved], base: Mapping[str, Row]) -> bool:
    values = np.array([row.value for row in base.values()])
    allowed = max(UNIT_SHARE * float(np.ptp(values)), _AS_GOOD * float(np.abs(values).max()))
    return max(one.by for one in moved) > allowed
