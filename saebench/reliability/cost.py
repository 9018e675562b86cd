"""Cost: seconds and bytes of a metric's eval."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from saebench.reliability.missing import Missing, split
from saebench.reliability.rows import Price


class Cost(NamedTuple):
    """Of the metric's whole eval alone, on one SAE: the median time and the largest memory over those measured."""

    n_saes: int
    seconds: float | None
    bytes: float | None
    missing: dict[str, str]


def cost_of(found: Sequence[Price]) -> Cost:
    seconds = [price.seconds for price in found if math.isfinite(price.seconds)]
    memory = [price.bytes for price in found if math.isfinite(price.bytes)]
    parts = {
        "seconds": float(np.median(seconds)) if seconds else Missing("not measured"),
        "bytes": max(memory) if memory else Missing("not measured"),
    }
    return Cost(n_saes=len(found), **split(parts))
