"""The reliability card of a suite: what its audit says of each metric version, and the badge that follows."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import pandas as pd

from saebench.reliability.cost import Cost, cost_of
from saebench.reliability.invariance import Invariance, invariance_of, unit_fails
from saebench.reliability.noise import Noise, draws_of, noise_of, yardstick
from saebench.reliability.order import Order, order_fails, order_of
from saebench.reliability.progress import Progress, progress_of
from saebench.reliability.rows import Best, Price, Row, Version, by_version, prices_of, tidy
from saebench.reliability.training_noise import TrainingNoise, training_noise_of
from saebench.reliability.truth import GROUND_TRUTH, Known, Truth, known_from, truth_fails, truth_of

SCHEMA = 1
PASSED: Literal["✓"] = "✓"
WARNING: Literal["⚠"] = "⚠"

Badge = Literal["✓", "⚠", ""]


class Reliability(NamedTuple):
    """All that is known of one metric version."""

    metric: str
    eval: str
    version: int
    params: str
    """Canonical JSON."""
    best: Best
    ends: bool
    badge: Badge
    """✓: order and truth pass, and the unit does where it was tested. ⚠: one of the three fails."""
    warnings: tuple[str, ...]
    noise: Noise
    training_noise: TrainingNoise
    order: Order
    progress: Progress
    truth: Truth
    invariance: Invariance
    cost: Cost


class Card(NamedTuple):
    """All that is known of the metrics of a suite."""

    schema: int
    suite: str
    n_saes: int
    metrics: tuple[Reliability, ...]


class Panel(NamedTuple):
    """What was measured of a suite whose evals include ground_truth."""

    suite: str
    measured: pd.DataFrame


def card_of(suite: str, measured: pd.DataFrame, panel: Panel | None) -> Card:
    """`panel` is where truth comes from if this suite's own evals do not include ground_truth."""
    frame = tidy(measured)
    rows = by_version(frame)
    own = any(version.eval == GROUND_TRUTH for version in rows)
    known: Known | None = None
    if own:
        known = known_from(suite, rows)
    elif panel is not None:
        known = known_from(panel.suite, by_version(tidy(panel.measured)))
    costs = prices_of(frame)
    found = [
        _reliability(version, of, known, costs.get(version[1:], [])) for version, of in rows.items()
    ]
    saes = {row.sae for of in rows.values() for row in of}
    return Card(SCHEMA, suite, len(saes), tuple(found))


def _reliability(
    version: Version,
    rows: Sequence[Row],
    known: Known | None,
    costs: Sequence[Price],
) -> Reliability:
    best, ends = rows[0].best, rows[0].ends
    draws = draws_of(rows)
    noise = noise_of(rows, draws)
    order = order_of(rows)
    truth = truth_of(version, best, known)
    invariance = invariance_of(rows, yardstick(rows, noise))
    warnings = (*order_fails(order), *truth_fails(truth), *unit_fails(invariance))
    passed = order.passes is True and truth.passes is True
    badge: Badge = WARNING if warnings else PASSED if passed else ""
    return Reliability(
        *version,
        best=best,
        ends=ends,
        badge=badge,
        warnings=warnings,
        noise=noise,
        training_noise=training_noise_of(rows, draws),
        order=order,
        progress=progress_of(rows),
        truth=truth,
        invariance=invariance,
        cost=cost_of(costs),
    )
