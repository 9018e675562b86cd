"""The leaderboard: every SAE on the core metrics, beside the controls, with intervals and ties.

leaderboard.md and leaderboard.tex show the chosen metrics; leaderboard.csv holds every score in
full precision, one row each.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, final

from saebench.errors import UserError
from saebench.reports import _table
from saebench.reports._table import Arm, Block, Cell, Ends, Heading, Row, Table
from saebench.results import Results, write_text_whole

_CORE = (
    "l0",
    "explained_variance",
    "loss_recovered",
    "ce_loss_increase",
    "kl_divergence",
    "shrinkage",
    "encoder_decoder_cosine",
    "dead_fraction",
)
_TEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "†": r"$^\dagger$",
    "–": "--",
}


@final
@dataclass(frozen=True)
class Leaderboard:
    metrics: tuple[str, ...] = _CORE
    formats: tuple[str, ...] = ("md", "csv", "tex")

    makes: ClassVar[tuple[str, ...]] = ("md", "csv", "tex")
    needs: ClassVar[tuple[str, ...]] = ()
    """Metrics without which it cannot be made: it shows those that there are."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.formats if name not in self.makes]
        if unknown:
            raise UserError(
                f"leaderboard: no format {unknown[0]!r}; expected some of {', '.join(self.makes)}."
            )

    def __call__(self, results: Results, folder: Path) -> list[Path]:
        renderers: dict[str, Callable[[], str]] = {
            "md": lambda: _markdown(results.suite, table),
            "csv": lambda: _csv(results),
            "tex": lambda: _latex(results.suite, table),
        }
        table = _table.build(results, self.metrics)
        paths = self.files(folder)
        for path in paths:
            write_text_whole(path, renderers[path.suffix[1:]]())
        return paths

    def files(self, folder: Path) -> list[Path]:
        """What a call writes."""
        return [folder / f"leaderboard.{name}" for name in self.formats]

    def text(self, results: Results) -> str:
        """For a terminal; what is bold in the files carries a star here."""
        return _terminal(results.suite, _table.build(results, self.metrics))


def _arrow(heading: Heading) -> str:
    return {"max": " ↑", "min": " ↓", None: ""}[heading.best]


def _plain(cell: Cell) -> str:
    if cell.number is None:
        return "–"
    value, interval, exponent = cell.number
    text = value
    if isinstance(interval, Arm):
        text = f"{value} ± {interval.length}"
    elif isinstance(interval, Ends):
        text = f"{value} [{interval.low}, {interval.high}]"
    if exponent:
        text = f"({text})e{exponent}" if interval else f"{text}e{exponent}"
    return text + ("†" if cell.missed else "")


# Markdown


def _markdown(suite: str, table: Table) -> str:
    parts = [f"# Leaderboard: {_escaped(suite)}", _escaped(table.facts)]
    parts += [f"## {_escaped(block.title)}\n\n{_pipes(table, block)}" for block in table.blocks]
    parts.append("\n".join(f"- {_escaped(sentence)}" for sentence in table.reading))
    docs = [f"- **{_escaped(h.label)}**: {_definition(h)}" for h in table.headings]
    parts.append("## Metrics\n\n" + "\n".join(docs))
    if table.notes:
        notes = [f"- {_escaped(note)}" for note in table.notes]
        parts.append("## Not shown\n\n" + "\n".join(notes))
    return "\n\n".join(parts) + "\n"


def _escaped(text: str) -> str:
    """Shown as it is: nothing in a name becomes markup, HTML or another cell."""
    text = re.sub(r"([\\`*\[\]|])", r"\\\1", " ".join(text.split()))
    # Inside a word an underscore means nothing.
    text = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _definition(heading: Heading) -> str:
    given = "" if heading.reference is None else f" Reference: {heading.reference}."
    return _escaped(heading.doc.rstrip(".") + "." + given)


def _pipes(table: Table, block: Block) -> str:
    head = ["SAE", "variant", *(_escaped(h.label) + _arrow(h) for h in table.headings)]
    lines = [head, *(_pipe_cells(row) for row in block.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = [("-" * (w - 1) + ":") if i > 1 else "-" * w for i, w in enumerate(widths)]
    padded = [
        [
            text.rjust(w) if i > 1 else text.ljust(w)
            for i, (text, w) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [padded[0], rule, *padded[1:]])


def _pipe_cells(row: Row) -> list[str]:
    name = _escaped(row.name) + (" *(control)*" if row.control else "")
    cells = [_escaped(_plain(cell)) for cell in row.cells]
    bold = [f"**{t}**" if c.tied else t for t, c in zip(cells, row.cells, strict=True)]
    return [name, _escaped(row.variant), *bold]


# CSV


def _csv(results: Results) -> str:
    order = ["sae", "eval", "version", "params", "metric"]
    text: str = results.scores.sort_values(order, kind="stable").to_csv(
        index=False, lineterminator="\n"
    )
    return text


# LaTeX


def _latex(suite: str, table: Table) -> str:
    n_columns = 1 + len(table.headings)
    head = ["SAE", *map(_tex_heading, table.headings)]
    body: list[str] = []
    for block in table.blocks:
        title = rf"\multicolumn{{{n_columns}}}{{@{{}}l}}{{\textit{{{_tex(block.title)}}}}} \\"
        body += [r"\midrule", title, *(_tex_row(row) for row in block.rows)]
    # Intervals with unequal arms are narrower as super- and subscripts.
    reading = [
        line.replace("[low, high]", "sub- and superscripts").replace("(control)", "In italics")
        for line in table.reading
    ]
    caption = [f"SAEs of the suite {suite}: {table.facts}", *reading]
    lines = [
        r"% Needs \usepackage{booktabs}.",
        r"\begin{table*}[t]",
        r"\centering",
        rf"\caption{{{' '.join(_tex(sentence) for sentence in caption)}}}",
        r"\smallskip",
        rf"\label{{tab:{re.sub('[^A-Za-z0-9-]', '-', suite)}}}",
        r"\scriptsize",
        r"\setlength{\tabcolsep}{2.5pt}",
        r"\renewcommand{\arraystretch}{1.15}",
        rf"\begin{{tabular}}{{@{{}}l{'r' * len(table.headings)}@{{}}}}",
        r"\toprule",
        " & ".join(head) + r" \\",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table*}",
    ]
    return "\n".join(lines) + "\n"


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in " ".join(text.split()))


def _tex_heading(heading: Heading) -> str:
    """One word a line, which keeps columns as narrow as their numbers."""
    arrow = {"max": r" $\uparrow$", "min": r" $\downarrow$", None: ""}[heading.best]
    lines = r"\\".join(_tex(word) for word in heading.label.split())
    return rf"\begin{{tabular}}[b]{{@{{}}r@{{}}}}{lines}{arrow}\end{{tabular}}"


def _tex_row(row: Row) -> str:
    name = rf"\textit{{{_tex(row.name)}}}" if row.control else _tex(row.name)
    return " & ".join([name, *map(_tex_cell, row.cells)]) + r" \\"


def _tex_cell(cell: Cell) -> str:
    if cell.number is None:
        return "--"
    value, interval, exponent = cell.number
    value = rf"\mathbf{{{value}}}" if cell.tied else value
    text = f"${value}$"
    if isinstance(interval, Arm):
        text += rf"{{\tiny$\pm{interval.length}$}}"
    elif isinstance(interval, Ends):
        text = rf"${value}^{{+{interval.up}}}_{{-{interval.down}}}$"
    if exponent:
        text += rf"$\,\times 10^{{{exponent}}}$"
    return text + (r"$^\dagger$" if cell.missed else "")


# Terminal


def _terminal(suite: str, table: Table) -> str:
    import io
    import shutil
    import sys

    from rich.console import Console

    on_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if on_terminal else 10_000
    console = Console(file=io.StringIO(), width=width, force_terminal=on_terminal, highlight=False)
    console.print(f"Leaderboard: {suite}\n{table.facts}", markup=False)
    for block in table.blocks:
        console.print(f"\n{block.title}", markup=False, style="bold")
        console.print(_rich_block(table, block))
    reading = [sentence.replace("Bold:", "*:") for sentence in table.reading]
    console.print("\n" + "\n".join([*reading, *table.notes]), markup=False)
    file = console.file
    assert isinstance(file, io.StringIO)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def _rich_block(table: Table, block: Block) -> object:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as Grid
    from rich.text import Text

    grid = Grid(box=SIMPLE_HEAD, pad_edge=False)
    grid.add_column("SAE", no_wrap=True, min_width=max(len(row.name) for row in block.rows))
    grid.add_column("variant", overflow="fold")
    for heading in table.headings:
        grid.add_column(Text(heading.label + _arrow(heading)), justify="right")
    for row in block.rows:
        style = "dim" if row.control else ""
        cells = [
            # A narrow terminal breaks lines at spaces: before the sign, not after it.
            Text(
                _plain(cell).replace("± ", "±") + ("*" if cell.tied else ""),
                style="bold" if cell.tied else "",
            )
            for cell in row.cells
        ]
        variant = "(control)" if row.control else row.variant
        grid.add_row(Text(row.name), Text(variant), *cells, style=style)
    return grid
