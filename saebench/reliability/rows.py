"""The table of an audit, audit.csv, and its rows by metric version: one row for each value, and for each price."""

import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from saebench.errors import UserError

COLUMNS = {  # of the table of what was measured
    "sae": str,
    "kind": str,
    "family": str,
    "width": float,
    "l0": float,
    "seed": float,
    "site": str,
    "tokens": float,
    "what": str,
    "setting": str,
    "share": float,
    "eval": str,
    "version": int,
    "params": str,
    "metric": str,
    "best": str,
    "ends": bool,
    "value": float,
    "low": float,
    "high": float,
    "seconds": float,
    "bytes": float,
    "degraded": str,
    "amount": float,
}

NOTHING = 1e-12
"""What is smaller is rounding."""

Best = Literal["min", "max"] | None
Run = tuple[str, int, str]
"""Eval, version and parameters."""


class Version(NamedTuple):
    """A metric as defined and measured in one way."""

    metric: str
    eval: str
    version: int
    params: str
    """Canonical JSON."""


class Row(NamedTuple):
    """One value of a metric, of one SAE. The fields are those of `COLUMNS`."""

    sae: str
    kind: str
    family: str
    width: float | None
    l0: float | None
    seed: float | None
    site: str
    tokens: float | None
    what: str
    setting: str
    share: float | None
    best: Best
    ends: bool
    value: float
    low: float | None
    high: float | None
    degraded: str
    amount: float | None
    active: float | None
    """L0 as the suite itself measured it; None where it does not."""

    @property
    def recipe(self) -> tuple[str, float | None, float | None, str]:
        return self.family, self.width, self.l0, self.site

    @property
    def better(self) -> float:
        """Larger is better."""
        return -self.value if self.best == "min" else self.value

    @property
    def is_panel(self) -> bool:
        """Of a trained SAE, as the suite itself scores it."""
        return self.kind == "trained" and self.what == "base"


class Price(NamedTuple):
    """Of one eval alone, on one SAE; NaN where it was not measured."""

    seconds: float
    bytes: float


def read_measured(path: Path) -> pd.DataFrame:
    """The table of an audit, as its audit.csv has it."""
    try:
        frame = pd.read_csv(path, dtype={"params": str, "setting": str})
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read: {error}; expected the audit.csv of a suite's results"
        ) from None
    return tidy(frame)


def tidy(measured: pd.DataFrame) -> pd.DataFrame:
    """The columns in their types; text that is None becomes empty. Raises `UserError` where it is no such table."""
    lacking = [name for name in COLUMNS if name not in measured.columns]
    if lacking:
        raise UserError(
            f"this is no table of an audit: it lacks {', '.join(lacking)}. Run `saebench audit` again"
        )
    frame = measured[list(COLUMNS)].copy()
    for name, kind in COLUMNS.items():
        if kind is str:
            frame[name] = frame[name].astype(object).where(frame[name].notna(), "").astype(str)
        elif kind is bool:
            frame[name] = frame[name].astype(str).str.lower() == "true"
        else:
            frame[name] = frame[name].astype(kind)
    _check(frame[frame["what"] != "cost"])
    return frame


def _check(scored: pd.DataFrame) -> None:
    """That every value is there, and once."""
    if not np.isfinite(scored["value"].to_numpy()).all():
        row = scored[~np.isfinite(scored["value"].to_numpy())].iloc[0]
        raise UserError(
            f"the audit has no finite value of {row['metric']} of {row['sae']} ({row['what']}). Where a metric does "
            "not apply, its row is left out"
        )
    one = ["what", "setting", "sae", "tokens", "metric", "eval", "version", "params"]
    twice = scored[scored.duplicated(one)]
    if len(twice):
        row = twice.iloc[0]
        raise UserError(
            f"the audit has {row['metric']} of {row['sae']} twice for {row['what']} {row['setting']}. "
            "Run `saebench audit` again"
        )


def by_version(frame: pd.DataFrame) -> dict[Version, list[Row]]:
    found: dict[Version, list[Row]] = {}
    of_base = frame[(frame["what"] == "base") & (frame["metric"] == "l0")]
    active = dict(zip(of_base["sae"], of_base["value"], strict=True))
    for record in frame[frame["what"] != "cost"].to_dict("records"):
        plain = {str(k): _none_for_nan(v) for k, v in record.items()}
        best = plain["best"] if plain["best"] in ("min", "max") else None
        own = {name: plain[name] for name in Row._fields if name not in ("best", "active")}
        row = Row(**own, best=best, active=active.get(plain["sae"]))
        version = Version(plain["metric"], plain["eval"], int(plain["version"]), plain["params"])
        found.setdefault(version, []).append(row)
    return found


def _none_for_nan(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def prices_of(frame: pd.DataFrame) -> dict[Run, list[Price]]:
    found: dict[Run, dict[str, Price]] = {}
    for row in frame[frame["what"] == "cost"].to_dict("records"):
        run = str(row["eval"]), int(row["version"]), str(row["params"])
        price = Price(float(row["seconds"]), float(row["bytes"]))
        # All metrics of an eval have its price.
        found.setdefault(run, {})[str(row["sae"])] = price
    return {run: list(prices.values()) for run, prices in found.items()}
