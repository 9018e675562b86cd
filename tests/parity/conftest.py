"""How agreement with another package is measured, and the table of it that stands at the end of a run.

A test module names its package by `pytest.importorskip(name, exc_type=ImportError)`, which also keeps what that warns
of while it is imported from being an error here.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

TOLERANCE = 1e-5
"""Of the largest value, or of 1 where all are smaller."""


class Agreement(NamedTuple):
    format: str
    architecture: str
    dtype: str
    difference: float
    """The largest, as a share of the largest value."""


Agree = Callable[[str, str, str | torch.dtype, Tensor, Tensor], None]
_MEASURED = pytest.StashKey[list[Agreement]]()


@pytest.fixture
def agree(request: pytest.FixtureRequest) -> Agree:
    """`agree(format, architecture, dtype, ours, theirs)`: the same numbers, up to float32 rounding."""
    measured = request.config.stash.setdefault(_MEASURED, [])

    def check(
        format: str, architecture: str, dtype: str | torch.dtype, ours: Tensor, theirs: Tensor
    ) -> None:
        assert ours.shape == theirs.shape
        assert theirs.isfinite().all(), "nothing can agree with what is not finite"
        largest = max(1.0, theirs.abs().max().item())
        difference = (ours.double() - theirs.double()).abs().max().item() / largest
        name = str(dtype).removeprefix("torch.")
        measured.append(Agreement(format, architecture, name, difference))
        assert difference <= TOLERANCE

    return check


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    largest: dict[tuple[str, str, str], float] = {}
    for *key, difference in config.stash.get(_MEASURED, []):
        row = (key[0], key[1], key[2])
        largest[row] = max(difference, largest.get(row, 0.0))
    if not largest:
        return
    terminalreporter.section("parity")
    width = max(len(architecture) for _, architecture, _ in largest)
    heading = f"{'format':20} {'architecture':{width}} {'dtype':10} largest difference"
    terminalreporter.write_line(heading)
    for (format, architecture, dtype), difference in sorted(largest.items()):
        verdict = "" if difference <= TOLERANCE else "  above 1e-5"
        terminalreporter.write_line(
            f"{format:20} {architecture:{width}} {dtype:10} {difference:.1e}{verdict}"
        )
