"""Tables for a terminal: as wide as it is, and plain text without limits where there is none."""

import io
import shutil
import sys
from collections.abc import Sequence
from typing import NamedTuple, final

from saebench.progress import printable


class Written(NamedTuple):
    """The text of a cell."""

    text: str
    bold: bool


class Line(NamedTuple):
    cells: Sequence[str | Written]
    dim: bool


@final
class Screen:
    def __init__(self) -> None:
        from rich.console import Console

        there = sys.stdout.isatty()
        width = shutil.get_terminal_size().columns if there else 10_000
        self._file = io.StringIO()
        # Names such as `huge:A:` stay what they are.
        self._console = Console(
            file=self._file, width=width, force_terminal=there, highlight=False, emoji=False
        )

    def line(self, text: str, style: str = "") -> None:
        self._console.print(printable(text), markup=False, style=style)

    def grid(self, head: Sequence[str], lines: Sequence[Line], left: int) -> None:
        """A table whose first columns are flush left, the others flush right; the first is never broken."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        longest = max((len(_written(line.cells[0]).text) for line in lines), default=0)
        table.add_column(head[0], no_wrap=True, min_width=longest)
        for place, label in enumerate(head[1:], start=1):
            if place < left:
                table.add_column(Text(label), overflow="fold")
            else:
                table.add_column(Text(label), justify="right")
        for line in lines:
            cells = map(_written, line.cells)
            shown = [
                Text(_unbroken(printable(c.text)), style="bold" if c.bold else "") for c in cells
            ]
            table.add_row(*shown, style="dim" if line.dim else "")
        self._console.print(table)

    def text(self) -> str:
        written = self._file.getvalue().splitlines()
        return "\n".join(line.rstrip() for line in written) + "\n"


def _unbroken(text: str) -> str:
    """A narrow terminal breaks lines at spaces: before ±, not after it, and not before %."""
    return text.replace("± ", "±").replace(" %", "\N{NO-BREAK SPACE}%")


def _written(cell: str | Written) -> Written:
    return Written(cell, bold=False) if isinstance(cell, str) else cell
