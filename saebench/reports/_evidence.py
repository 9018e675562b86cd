"""The kept units behind the scores of one folder, and the tests on them.

Units are read, draws made and tests done once each, however many tables show what comes of it.

Trained against control C, on one metric: of the trained SAEs and checkpoints of a block in which C stands, those are
better than C whose difference from it has the better sign and p < 5 %, Holm-adjusted over the block. In a block where
at most half of them are, the metric fails to separate; it does not separate trained SAEs from C where it fails in more
than half of the blocks that have C. A difference is measured in standard errors too, z = difference / SE, with the SE
from the length of its 95 % interval, (high - low) / (2 * 1.96).
"""

import math
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple, final

import numpy as np

from saebench import results as files
from saebench import stats
from saebench.reports import _seeds
from saebench.reports._blocks import Contender, Group, grouped
from saebench.reports._table import (
    OWN_UNITS,
    Against,
    Best,
    Key,
    Standing,
    newest,
    of_key,
)
from saebench.results import Results, Units
from saebench.stats import Bootstrap, Column, Difference, Statistic

_Z = 1.959964  # the 97.5 % point of the normal distribution
_LETTER = re.compile(r"\.*[a-zA-Z]")


class Measured(NamedTuple):
    """A score of one SAE."""

    value: float
    low: float
    """NaN, as `high`, where there is no interval."""
    high: float
    best: Best
    unit: str
    statistic: Statistic
    file: str

    @property
    def paired(self) -> bool:
        """Units of two SAEs can be paired."""
        return self.unit not in OWN_UNITS


@final
class Evidence:
    def __init__(self, results: Results) -> None:
        self.results = results
        self.scores = newest(results.scores)
        self.groups = grouped(self.scores)
        self._measured: dict[Key, dict[str, Measured]] = {}
        self._units: dict[tuple[str, str], Units | None] = {}
        self._bootstraps: dict[int, Bootstrap] = {}
        self._separations: dict[Key, dict[str, Against]] = {}
        self._standings: dict[tuple[Key, Group], dict[str, Standing]] = {}

    def measured(self, key: Key) -> dict[str, Measured]:
        """By SAE."""
        if key not in self._measured:
            rows = of_key(self.scores, key).reset_index().to_dict("records")
            self._measured[key] = {
                row["sae"]: Measured(
                    row["value"],
                    row["ci_low"],
                    row["ci_high"],
                    row["best"] if row["best"] in ("min", "max") else None,
                    row["unit"],
                    row["statistic"],
                    row["file"],
                )
                for row in rows
            }
        return self._measured[key]

    def columns(self, key: Key, saes: Sequence[str]) -> dict[str, Column]:
        """Of those that have the metric, over the same units where these can be paired.

        Empty where there are none, or the units of some were not kept.
        """
        rows = {sae: row for sae, row in self.measured(key).items() if sae in saes}
        kept = {sae: self._kept(row.file, key.metric) for sae, row in rows.items()}
        found = {sae: units for sae, units in kept.items() if units is not None}
        if not found or len(found) < len(rows):
            return {}
        if next(iter(rows.values())).paired:
            found = files.on_common_units(found)
        if any(len(units.num) == 0 for units in found.values()):
            return {}
        return {sae: files.column(units, rows[sae].statistic) for sae, units in found.items()}

    def standings(self, key: Key, group: Group) -> dict[str, Standing]:
        """By row; empty where there is nothing to compare, or nothing to compare with."""
        known = self._standings.get((key, group))
        if known is None:
            known = self._standings[key, group] = self._compared(key, group)
        return known

    def seeds(self, key: Key, contender: Contender) -> stats.Seeds | None:
        """None where no seed has the metric, or units were not kept."""
        columns = self.columns(key, contender.saes)
        if not columns:
            return None
        paired = self.measured(key)[next(iter(columns))].paired
        return stats.seeds(list(columns.values()), paired)

    def separation(self, key: Key) -> dict[str, Against]:
        """By control, the trained SAEs and checkpoints that stand beside it."""
        if key not in self._separations:
            self._separations[key] = self._separated(key)
        return self._separations[key]

    def bootstrap(self, n_units: int) -> Bootstrap:
        return self._bootstraps.setdefault(n_units, Bootstrap(n_units))

    def _separated(self, key: Key) -> dict[str, Against]:
        found: dict[str, list[_Block]] = {}
        for group in self.groups:
            ours = [sae for one in group.ranked for sae in one.saes]
            for control in group.contenders:
                against = self._against(key, control, ours)
                if against is not None:
                    found.setdefault(control.variant, []).append(against)
        return {control: _over_blocks(blocks) for control, blocks in found.items()}

    def _kept(self, file: str, metric: str) -> Units | None:
        if (file, metric) not in self._units:
            there = files.has_units(self.results, file)
            path = self.results.folder / file
            self._units[file, metric] = files.units_in(path, metric) if there else None
        return self._units[file, metric]

    def _compared(self, key: Key, group: Group) -> dict[str, Standing]:
        measured = self.measured(key)
        best = next(iter(measured.values())).best
        if best is None:
            return {}
        columns = self.columns(key, [sae for one in group.ranked for sae in one.saes])
        recipes = {
            one.name: [columns[sae] for sae in one.saes if sae in columns] for one in group.ranked
        }
        recipes = {name: seeds for name, seeds in recipes.items() if seeds}
        if len(recipes) < 2:
            return {}
        paired = next(iter(measured.values())).paired
        bootstrap = self.bootstrap(len(next(iter(columns.values())).num))
        found = _seeds.rank(recipes, best, paired, bootstrap)
        letters = {name: set(_LETTER.findall(group)) for name, group in found.groups.items()}
        leaders = next(iter(letters.values()))  # from the best value down
        return {
            name: Standing(
                *found.ranks[name], group, found.p_best[name], not leaders.isdisjoint(letters[name])
            )
            for name, group in found.groups.items()
        }

    def _against(self, key: Key, control: Contender, ours: Sequence[str]) -> "_Block | None":
        if control.kind != "control":
            return None
        (name,) = control.saes
        measured = self.measured(key)
        trained = [sae for sae in ours if sae in measured]
        if name not in measured or not trained:
            return None
        columns = self.columns(key, [name, *trained])
        best = measured[name].best
        if not columns or best is None:
            return None
        others = [columns[sae] for sae in trained]
        if measured[name].paired:
            draws = self.bootstrap(len(columns[name].num))
            found = stats.paired_differences(columns[name], others, draws)
        else:
            found = [stats.independent_difference(columns[name], other) for other in others]
        return _block(found, best)


class _Block(NamedTuple):
    """Trained SAEs of one block against one control."""

    z: list[float]
    better: int
    pairs: int

    @property
    def fails(self) -> bool:
        return 2 * self.better <= self.pairs


def _block(
    control_less_trained: Sequence[Difference | None], best: Literal["min", "max"]
) -> _Block:
    sign = -1 if best == "max" else 1
    # What cannot be tested cannot be told apart.
    adjusted = stats.holm([1.0 if d is None else d.p for d in control_less_trained])
    better = [
        d is not None and sign * d.value > 0 and p < 1 - stats.LEVEL
        for d, p in zip(control_less_trained, adjusted.tolist(), strict=True)
    ]
    z = [sign * _standard_errors(d) for d in control_less_trained if d is not None]
    return _Block(z, sum(better), len(better))


def _standard_errors(difference: Difference) -> float:
    error = (difference.high - difference.low) / (2 * _Z)
    if error == 0:
        return math.copysign(math.inf, difference.value) if difference.value else 0.0
    return difference.value / error


def _over_blocks(blocks: Sequence[_Block]) -> Against:
    z = [value for block in blocks for value in block.z]
    return Against(
        float(np.median(z)) if z else None,
        sum(block.better for block in blocks),
        sum(block.pairs for block in blocks),
        len(blocks),
        sum(block.fails for block in blocks),
    )
