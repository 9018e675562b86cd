"""What Markdown needs: text that stays text, and tables that are legible as they are."""

import re
from collections.abc import Sequence

from saebench.progress import printable


def escaped(text: str) -> str:
    """Shown as it is: nothing in a name becomes markup, HTML or another cell."""
    text = re.sub(r"([\\`*\[\]|~$])", r"\\\1", " ".join(printable(text).split()))
    # Inside a word an underscore means nothing.
    text = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def pipes(head: list[str], lines: Sequence[list[str]], left: int) -> str:
    """A table whose first columns are flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    rule = [("-" * (w - 1) + ":") if i >= left else "-" * w for i, w in enumerate(widths)]
    padded = [
        [
            text.rjust(w) if i >= left else text.ljust(w)
            for i, (text, w) in enumerate(zip(line, widths, strict=True))
        ]
        for line in (head, *lines)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [padded[0], rule, *padded[1:]])
