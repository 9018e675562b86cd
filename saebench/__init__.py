"""Benchmark and evaluation harness for sparse autoencoders.

`saebench.load` reads a checkpoint in any format, `saebench.score` scores an SAE on a suite; both are imported when
they are asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saebench.api import load as load
    from saebench.api import score as score

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in ("load", "score"):
        raise AttributeError(f"module 'saebench' has no attribute {name!r}")
    from saebench import api

    return getattr(api, name)
