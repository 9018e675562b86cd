"""The leaderboard: every SAE on the core metrics, beside the controls, with intervals, ranks and ties.

leaderboard.md and leaderboard.tex show the chosen metrics. leaderboard.csv holds every score in full
precision, one row each, with the ranks of those that have a better direction and the badge that audits give them;
separation.csv says of every such metric how far trained SAEs are from each control.
"""

import csv
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, final

import pandas as pd

from saebench.errors import UserError
from saebench.progress import printable
from saebench.reliability.verdicts import remarks
from saebench.reports import _build
from saebench.reports._build import AFTER_THE_LETTERS
from saebench.reports._evidence import Evidence
from saebench.reports._markdown import escaped, pipes
from saebench.reports._table import (
    Against,
    Arm,
    Block,
    Cell,
    Ends,
    Heading,
    Row,
    SeedBlock,
    SeparationRow,
    Standing,
    Table,
    newest,
    one_key,
    shown,
)
from saebench.reports._terminal import Line, Screen, Written
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
    "‡": r"$^\ddagger$",
    "✓": r"$^\surd$",
    "⚠": r"$^\triangle$",
    "ᶜ": r"$^\mathrm{c}$",
    "ʳ": r"$^\mathrm{r}$",
    "ⁱ": r"$^\mathrm{i}$",
    "–": "--",
}


_ABOUT_RANKS = (
    "The places that an SAE may have at the 5 % level, and letters that it shares with all that it cannot be told "
    "apart from (all pairs of a block and metric are tested, Holm-adjusted)."
)
_ABOUT_SEPARATION = (
    "How many standard errors the trained SAEs are better than the control beside them (same width and asked-for L0; "
    "the median over SAEs), and how many of them are significantly better (Holm-adjusted over a block). ‡: in more "
    "than half of the blocks at most half of them are, and the metric does not separate trained SAEs from the control."
)
_ABOUT_SEEDS = (
    "Training sd: how far apart seeds of a recipe lie beyond what their evaluation explains. Evaluation sd: the "
    "standard error of one seed's value over the units of the evaluation."
)


_TEX_MARKS = {"control": "ᶜ", "reference": "ʳ", "imported": "ⁱ"}


@final
@dataclass(frozen=True)
class Leaderboard:
    metrics: tuple[str, ...] = _CORE
    sort: str = "explained_variance"
    """Metric that rows are sorted by, best first, and that the column of ranks is about."""
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
        evidence = Evidence(results)
        table = _build.build(evidence, self.metrics, self.sort)
        separation = _build.separation(evidence)
        renderers: dict[str, Callable[[], str]] = {
            "leaderboard.md": lambda: _markdown(results.suite, table, separation),
            "leaderboard.csv": lambda: _csv(evidence),
            "leaderboard.tex": lambda: _latex(results.suite, table),
            "separation.csv": lambda: _separation_csv(separation),
        }
        paths = self.files(folder)
        for path in paths:
            write_text_whole(path, renderers[path.name]())
        return paths

    def files(self, folder: Path) -> list[Path]:
        """What a call writes."""
        boards = [folder / f"leaderboard.{name}" for name in self.formats]
        return [*boards, folder / "separation.csv"] if "csv" in self.formats else boards

    def check_sort(self, results: Results) -> None:
        """Refuses a metric that no SAE has, where somebody asked for it by hand; a report falls back to another."""
        one_key(newest(results.scores), self.sort)

    def text(self, results: Results) -> str:
        """For a terminal; what is bold in the files carries a star here."""
        return _terminal(results.suite, _build.build(Evidence(results), self.metrics, self.sort))


def _label(heading: Heading) -> str:
    """With its marks and the better direction."""
    arrow = {"max": " ↑", "min": " ↓", None: ""}[heading.best]
    return heading.label + _marks(heading) + arrow


def _marks(heading: Heading) -> str:
    """The badge of audits, and the mark of what does not separate trained SAEs from controls here."""
    return heading.badge + ("‡" if heading.unseparated else "")


def _name(row: Row) -> str:
    return f"{row.name} ({row.n_seeds} seeds)" if row.n_seeds > 1 else row.name


def _plain(cell: Cell) -> str:
    if cell.number is None:
        return "–"
    return shown(cell.number) + ("†" if cell.missed else "")


def _places(standing: Standing | None) -> str:
    """1–3 ab."""
    if standing is None:
        return "–"
    low, high, letters = standing[:3]
    return f"{low} {letters}" if low == high else f"{low}–{high} {letters}"


def _rank(row: Row, table: Table) -> str:
    """1–3 ab, 62 %."""
    standing = row.cells[table.sorted_by].standing
    if standing is None:
        return "" if row.mark else "–"
    percent = round(100 * standing.p_best)
    # So many draws cannot say that nothing else is ever the best.
    shown = ">99" if percent == 100 else f"{percent}"
    return _places(standing) + (f", {shown} %" if percent else "")


def _has_ranks(table: Table) -> bool:
    rows = [row for block in table.blocks for row in block.rows]
    return any(row.cells[table.sorted_by].standing is not None for row in rows)


def _against(against: Against | None) -> str:
    """+41 (24/24): standard errors, and how many of the trained SAEs are significantly better."""
    if against is None:
        return "–"
    z = "–" if against.z is None else _sign(against.z)
    return f"{z} ({against.better}/{against.pairs})" + ("" if against.separates else "‡")


def _sign(z: float) -> str:
    if z == 0:
        return "0"
    if math.isinf(z):
        return "+∞" if z > 0 else "-∞"
    return f"{z:+.1f}" if abs(z) < 10 else f"{z:+,.0f}"


def _controls(separation: Sequence[SeparationRow]) -> list[str]:
    return list(dict.fromkeys(control for row in separation for control in row.against))


# Markdown


def _markdown(suite: str, table: Table, separation: Sequence[SeparationRow]) -> str:
    parts = [f"# Leaderboard: {escaped(suite)}", escaped(table.facts)]
    parts += [f"## {escaped(block.title)}\n\n{_board(table, block)}" for block in table.blocks]
    parts.append("\n".join(f"- {escaped(sentence)}" for sentence in table.reading))
    ranks = [(block, _ranks(table, block)) for block in table.blocks]
    if any(grid for _, grid in ranks):
        parts.append(f"## Ranks\n\n{_ABOUT_RANKS}")
        parts += [f"### {escaped(block.title)}\n\n{grid}" for block, grid in ranks if grid]
    if separation:
        parts.append(
            f"## Trained against controls\n\n{_ABOUT_SEPARATION}\n\n{_separation(separation)}"
        )
        above = [heading.key for heading in table.headings]
        badges = _build.about_badges([r.heading for r in separation if r.heading.key not in above])
        parts += ["\n".join(f"- {escaped(sentence)}" for sentence in badges)] if badges else []
    if table.seeds:
        parts.append(f"## Seeds\n\n{_ABOUT_SEEDS}")
        parts += [f"### {escaped(block.title)}\n\n{_seeds(block)}" for block in table.seeds]
    docs = [f"- **{escaped(h.label)}**: {_definition(h)}" for h in table.headings]
    parts.append("## Metrics\n\n" + "\n".join(docs))
    if table.notes:
        notes = [f"- {escaped(note)}" for note in table.notes]
        parts.append("## Not shown\n\n" + "\n".join(notes))
    return "\n\n".join(parts) + "\n"


def _definition(heading: Heading) -> str:
    given = "" if heading.reference is None else f" Reference: {heading.reference}."
    return escaped(heading.doc.rstrip(".") + "." + given)


def _board(table: Table, block: Block) -> str:
    ranked = ["rank"] if _has_ranks(table) else []
    head = ["SAE", *ranked, "variant", *(escaped(_label(h)) for h in table.headings)]
    lines = [_board_line(table, row, bool(ranked)) for row in block.rows]
    return pipes(head, lines, left=len(ranked) + 2)


def _board_line(table: Table, row: Row, ranked: bool) -> list[str]:
    name = escaped(_name(row)) + (f" *({row.mark})*" if row.mark else "")
    cells = [escaped(_plain(cell)) for cell in row.cells]
    bold = [f"**{t}**" if c.tied else t for t, c in zip(cells, row.cells, strict=True)]
    return [name, *([escaped(_rank(row, table))] if ranked else []), escaped(row.variant), *bold]


def _ranks(table: Table, block: Block) -> str:
    """Empty where a block has nothing to rank."""
    rows = [row for row in block.rows if any(cell.standing for cell in row.cells)]
    if not rows:
        return ""
    shown = [i for i, heading in enumerate(table.headings) if heading.best is not None]
    head = ["SAE", *(escaped(_label(table.headings[i])) for i in shown)]
    lines = [
        [escaped(_name(row)), *(_places(row.cells[i].standing) for i in shown)] for row in rows
    ]
    return pipes(head, lines, left=len(head))


def _separation(separation: Sequence[SeparationRow]) -> str:
    controls = _controls(separation)
    lines = [
        [escaped(_label(row.heading)), *(_against(row.against.get(c)) for c in controls)]
        for row in separation
    ]
    return pipes(["metric", *map(escaped, controls)], lines, left=1)


def _seeds(block: SeedBlock) -> str:
    head = ["SAE", "metric", "mean", "training sd", "evaluation sd", "seeds"]
    lines = [
        [escaped(row.name), escaped(row.metric), *row[2:5], ", ".join(row.values)]
        for row in block.rows
    ]
    return pipes(head, lines, left=2)


# CSV


def _csv(evidence: Evidence) -> str:
    ranked = {
        (sae, *key): standing
        for key in _build.directed(evidence)
        for group in evidence.groups
        for one in group.ranked
        for standing in [evidence.standings(key, group).get(one.name)]
        for sae in one.saes
        if standing is not None
    }
    order = ["sae", "eval", "version", "params", "metric"]
    # Every score, those of older versions too, which have no ranks.
    scores = evidence.results.scores.sort_values(order, kind="stable")
    newest = set(evidence.scores.index)
    names = scores[["sae", "metric", "eval", "params"]].itertuples(index=True, name=None)
    found = [ranked.get(tuple(name)) if index in newest else None for index, *name in names]
    for column, part in (
        ("rank_low", "low"),
        ("rank_high", "high"),
        ("group", "letters"),
        ("p_best", "p_best"),
    ):
        scores[column] = [None if s is None else getattr(s, part) for s in found]
    scores = scores.astype({"rank_low": "Int64", "rank_high": "Int64"})
    scores["badge"] = _badges(evidence.results, scores)
    text: str = scores.to_csv(index=False, lineterminator="\n")
    return text


def _badges(results: Results, scores: pd.DataFrame) -> list[str]:
    """Of each score, by its own version."""
    ways = list(scores[["metric", "eval", "version", "params"]].itertuples(index=False, name=None))
    found = {way: remarks(results.audits, *way).badge for way in dict.fromkeys(ways)}
    return [found[way] for way in ways]


def _separation_csv(separation: Sequence[SeparationRow]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        ("metric", "eval", "params", "control", "z", "better", "pairs")
        + ("blocks", "blocks_failed", "separates")
    )
    for row in separation:
        for control, against in row.against.items():
            z = "" if against.z is None else against.z
            counts = against[1:]
            writer.writerow((*row.heading.key, control, z, *counts, against.separates))
    return file.getvalue()


# LaTeX


def _latex(suite: str, table: Table) -> str:
    ranked = _has_ranks(table)
    n_columns = 1 + ranked + len(table.headings)
    head = ["SAE", *(["rank"] if ranked else []), *map(_tex_heading, table.headings)]
    body: list[str] = []
    for block in table.blocks:
        title = rf"\multicolumn{{{n_columns}}}{{@{{}}l}}{{\textit{{{_tex(block.title)}}}}} \\"
        body += [r"\midrule", title, *(_tex_row(row, table) for row in block.rows)]
    # Intervals with unequal arms are narrower as super- and subscripts, and so are marks as letters.
    reading = [
        line.replace("[low, high]", "sub- and superscripts")
        for line in table.reading
        if not line.startswith(AFTER_THE_LETTERS)
    ]
    for mark, letter in _TEX_MARKS.items():
        reading = [line.replace(f"({mark})", letter) for line in reading]
    caption = [f"SAEs of the suite {suite}: {table.facts}", *reading]
    lines = [
        r"% Needs \usepackage{booktabs}.",
        r"\begin{table*}[t]",
        r"\centering",
        rf"\caption{{{' '.join(_tex(sentence) for sentence in caption)}}}",
        r"\smallskip",
        rf"\label{{tab:{re.sub('[^A-Za-z0-9-]', '-', suite)}}}",
        r"\scriptsize",
        r"\setlength{\tabcolsep}{1.5pt}",
        r"\renewcommand{\arraystretch}{1.15}",
        rf"\begin{{tabular}}{{@{{}}l{'l' * ranked}{'r' * len(table.headings)}@{{}}}}",
        r"\toprule",
        " & ".join(head) + r" \\",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table*}",
    ]
    return "\n".join(lines) + "\n"


def _tex(text: str) -> str:
    words = " ".join(printable(text).split())
    # At the start of a row these would be options of the end of the row before.
    start = "{}" if words.startswith(("[", "*")) else ""
    return start + "".join(_TEX.get(character, character) for character in words)


def _tex_heading(heading: Heading) -> str:
    """One word a line, which keeps columns as narrow as their numbers."""
    arrow = {"max": r" $\uparrow$", "min": r" $\downarrow$", None: ""}[heading.best]
    mark = _tex(_marks(heading))
    lines = r"\\".join(_tex(word) for word in heading.label.split())
    return rf"\begin{{tabular}}[b]{{@{{}}r@{{}}}}{lines}{mark}{arrow}\end{{tabular}}"


def _tex_row(row: Row, table: Table) -> str:
    name = _tex(_name(row))
    name = rf"\textit{{{name}}}{_tex(_TEX_MARKS[row.mark])}" if row.mark else name
    standing = row.cells[table.sorted_by].standing
    rank = [_tex(_places(standing) if standing else "")] if _has_ranks(table) else []
    return " & ".join([name, *rank, *map(_tex_cell, row.cells)]) + r" \\"


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
    screen = Screen()
    screen.line(f"Leaderboard: {suite}\n{table.facts}")
    for block in table.blocks:
        screen.line(f"\n{block.title}", "bold")
        _show_block(screen, table, block)
    reading = [sentence.replace("Bold:", "*:") for sentence in table.reading]
    screen.line("\n" + "\n".join([*reading, *table.notes]))
    return screen.text()


def _show_block(screen: Screen, table: Table, block: Block) -> None:
    ranked = ["rank"] if _has_ranks(table) else []
    head = ["SAE", *ranked, "variant", *map(_label, table.headings)]
    lines = []
    for row in block.rows:
        variant = _shown_variant(row)
        rank = [_rank(row, table)] if ranked else []
        cells = [
            Written(_plain(cell) + ("*" if cell.tied else ""), cell.tied) for cell in row.cells
        ]
        lines.append(Line([_name(row), *rank, variant, *cells], dim=_is_standard(row)))
    screen.grid(head, lines, left=len(ranked) + 2)


def _is_standard(row: Row) -> bool:
    """There to read the others against."""
    return row.mark in ("control", "reference")


def _shown_variant(row: Row) -> str:
    if _is_standard(row):
        return f"({row.mark})"
    return f"{row.variant} ({row.mark})" if row.mark else row.variant
