"""Results folders made by hand, for reports and comparisons."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from saebench import results
from saebench.results import Entry, Omission, Results, ScoreRow

SITE = "2.resid_post"
DEFINITION = {"model": {"id": "m"}, "text": {"source": "t", "context": 8}}


def trained(variant: str, l0: float = 8.0, seed: int = 0, width: int = 64) -> Entry:
    return Entry("trained", variant, width, l0, seed, SITE)


def control(
    variant: str, l0: float = 8.0, kind: Literal["control", "reference"] = "control"
) -> Entry:
    return Entry(kind, variant, 64, l0, None, SITE)


def row(metric: str, num: Any, **fields: Any) -> ScoreRow:
    """Each unit's own value is its `num`, unless there is a `den` too."""
    num = np.asarray(num, dtype=np.float64)
    plain: dict[str, Any] = {
        "best": "max",
        "unit": "sequence",
        "statistic": "ratio",
        "doc": "a metric",
        "den": np.ones(len(num)),
        "n": len(num),
        "reference": None,
        "ids": None,
        "clusters": None,
        "ends": None,
    }
    return ScoreRow(metric=metric, num=num, **(plain | fields))


def write(
    folder: Path,
    saes: Mapping[str, tuple[Entry, Sequence[ScoreRow]]],
    omitted: Mapping[str, Sequence[Omission]] | None = None,
    **spec: Any,
) -> Results:
    """All metrics are of one eval, named core; `spec` changes what the runs say of themselves."""
    runs = []
    for name, (entry, rows) in saes.items():
        whole = {
            "sae": {"name": name},
            "site": entry.site,
            "model": {"id": "m"},
            "text": {"fingerprint": "f"},
            "eval": {"name": "core", "version": 1, "params": {}},
        }
        left_out = [] if omitted is None else omitted.get(name, [])
        runs.append(f"runs/{results.write(folder, whole | spec, rows, left_out, {}).name}")
    entries = {name: entry for name, (entry, _) in saes.items()}
    results.write_manifest(folder, "toy", DEFINITION, entries, runs)
    return results.read(folder)


def noisy(mean: float, sd: float, seed: int, n: int = 100) -> np.ndarray:
    """Units with exactly this mean and standard deviation."""
    x = np.random.default_rng(seed).standard_normal(n)
    return mean + sd * (x - x.mean()) / x.std(ddof=1)
