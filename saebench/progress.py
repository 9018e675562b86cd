"""Progress of long work, on the error stream: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
import unicodedata
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


def several(n: int, what: str) -> str:
    """1 SAE, 2 SAEs."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


class Meter:
    """Counts `total` pieces of work, with rate and time left. A context manager."""

    def __init__(self, what: str, total: int, unit: str, done: int = 0) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = self.first = done
        self._began = self._shown = time.monotonic()
        self._printed: int | None = None
        self._bar = _bar() if sys.stderr.isatty() else None

    def __enter__(self) -> "Meter":
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(
                printable(self.what), total=self.total, completed=self.done, rate=""
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and self._printed != self.done:
            self._print_line()

    def advance(self, amount: int) -> None:
        self.done += amount
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, rate=self._rate())
        elif now - self._shown > SECONDS_BETWEEN_LINES:
            self._shown = now
            self._print_line()

    def _rate(self) -> str:
        seconds = max(time.monotonic() - self._began, 1e-9)
        return f"{(self.done - self.first) / seconds:,.0f} {self.unit}/s"

    def _print_line(self) -> None:
        self._printed = self.done
        seconds = time.monotonic() - self._began
        pace = seconds / max(self.done - self.first, 1)
        left = pace * (self.total - self.done)
        say(
            f"{self.what}: {self.done:,} of {self.total:,} {self.unit}, {self._rate()}, {left:.0f} s left"
        )


def say(line: str) -> None:
    """One plain line on the error stream, never folded or coloured."""
    sys.stderr.write(printable(line) + "\n")
    sys.stderr.flush()


def printable(text: str) -> str:
    """What a terminal shows as it is: names that strangers chose may hold codes that move its cursor or rewrite it.

    Line breaks and tabs stay.
    """
    if text.isprintable():
        return text
    return "".join(c if _is_shown(c) else ascii(c)[1:-1] for c in text)


def _is_shown(character: str) -> bool:
    if character in "\n\t":
        return True
    # Cc, Cf, Cs, Co, Cn: controls, formats such as right-to-left, half characters; Zl, Zp: other line breaks.
    category = unicodedata.category(character)
    return not category.startswith("C") and category not in ("Zl", "Zp")


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}% {task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
