import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from saebench import registry, results
from saebench.errors import UserError
from saebench.reports import _table
from saebench.reports._table import number
from saebench.reports.leaderboard import Leaderboard
from saebench.reports.pareto import Pareto
from saebench.results import Entry, ScoreRow

SITE = "2.resid_post"
N_SEQUENCES = 300
TOKENS = 128
VARIANTS = {"relu": 0.0, "topk": 0.045, "batch_topk": 0.055, "jumprelu": 0.05, "gated": 0.03}
DEFINITION = {
    "name": "toy",
    "model": {"id": "builtin:pylm", "dtype": "float32"},
    "text": {"source": "builtin:python-stdlib", "context": TOKENS},
}


def fidelity(variant: str, l0: float, kind: str) -> float:
    """A made-up share of variance left over, better with more active latents."""
    if variant == "identity":
        return 0.0
    if variant == "permuted_decoder":
        return 1.4 + 0.05 * l0
    if variant in ("random", "untrained_lm"):
        return 0.93 - 0.004 * l0
    return (0.42 - VARIANTS[variant]) * (8 / l0) ** 0.45 + (0.01 if kind == "checkpoint" else 0)


def score_rows(name: str, entry: Entry, measured: float) -> list[ScoreRow]:
    """Units as an eval would keep them; the text is as hard for every SAE."""
    text = np.random.default_rng(7)
    own = np.random.default_rng(sum(map(ord, name)))
    energy = text.gamma(20, 1 / 20, N_SEQUENCES) * TOKENS
    hard = text.lognormal(0, 0.15, N_SEQUENCES)
    left = fidelity(entry.variant, measured, entry.kind) * hard
    left = left * own.lognormal(0, 0.01, N_SEQUENCES)
    tokens = np.full(N_SEQUENCES, float(TOKENS))
    active = tokens * measured
    if entry.variant not in ("topk", "identity"):
        active = np.round(active * own.lognormal(0, 0.1, N_SEQUENCES))
    gap = 8.0 * energy
    rise = gap * 0.08 * left**1.5
    dead = (own.random(1024) < 0.03).astype(float)
    cosine = own.beta(8, 2, 1024)
    n = N_SEQUENCES * TOKENS

    def row(metric, best, unit, num, den, doc, statistic="ratio", reference=None):
        count = n if unit == "sequence" else len(num)
        return ScoreRow(
            metric, best, unit, statistic, doc, num, den, count, reference, None, None, None
        )

    rows = [
        row("l0", None, "sequence", active, tokens, "active latents per token"),
        row("explained_variance", "max", "sequence", energy - left * energy, energy, "1 - |e|^2"),
        row("loss_recovered", "max", "sequence", gap - rise, gap, "share of the loss | recovered"),
        row("ce_loss_increase", "min", "sequence", rise, tokens, "rise of the loss, nats"),
        row("shrinkage", None, "sequence", energy * (1 - 0.1 * left), energy, "1 is unbiased"),
    ]
    if entry.variant != "identity":
        live = 1 - dead
        rows += [
            row("encoder_decoder_cosine", "max", "latent", cosine, live, "median", "median"),
            row(
                "dead_fraction", "min", "latent", dead, np.ones(1024), "never fire", "ratio", 3 / n
            ),
        ]
    return rows


def add(folder: Path, name: str, entry: Entry, measured: float) -> list[str]:
    spec = {
        "sae": {"name": name, "checksum": name},
        "site": entry.site,
        "model": DEFINITION["model"],
        "text": DEFINITION["text"],
        "eval": {"name": "core", "version": 1, "params": {}},
    }
    path = results.write(folder, spec, score_rows(name, entry, measured), [], {"seconds": 1.0})
    geometry = spec | {"eval": {"name": "geometry", "version": 1, "params": {"k": 2}}}
    files = [path]
    if entry.variant == "identity":
        files.append(results.write_skip(folder, geometry, "it has no decoder", {}))
    return [f"runs/{path.name}" for path in files]


def roster(
    sites: tuple[str, ...], widths: tuple[int, ...], l0s: tuple[int, ...]
) -> dict[str, tuple[Entry, float]]:
    """Every SAE of the toy suite: what was asked of it and the L0 it has."""
    saes: dict[str, tuple[Entry, float]] = {}
    for site in sites:
        for width in widths:
            mark = ("" if len(sites) == 1 else f"-{site[0]}") + (
                "" if len(widths) == 1 else f"-w{width}"
            )
            for variant in VARIANTS:
                for l0 in l0s:
                    off = 1.2 if (variant, l0) == ("relu", 8) else 1.02
                    measured = float(l0) if variant == "topk" else l0 * off
                    entry = Entry("trained", variant, width, l0, 0, site)
                    saes[f"{variant}-{l0}{mark}"] = (entry, measured * (width / 1024) ** 0.1)
        end = "" if len(sites) == 1 else f"-{site[0]}"
        saes[f"my_sae{end}"] = (Entry("checkpoint", "jumprelu", None, None, None, site), 20.0)
        saes[f"identity{end}"] = (Entry("control", "identity", None, None, None, site), 64.0)
        for variant in ("random", "permuted_decoder", "untrained_lm"):
            for l0 in l0s:
                entry = Entry("control", variant, widths[0], l0, 0, site)
                saes[f"{variant}-{l0}{end}"] = (entry, float(l0))
    return saes


def make(
    folder: Path,
    sites: tuple[str, ...] = (SITE,),
    widths: tuple[int, ...] = (1024,),
    l0s: tuple[int, ...] = (8, 16, 32),
) -> results.Results:
    saes = roster(sites, widths, l0s)
    runs = [run for name, (entry, l0) in saes.items() for run in add(folder, name, entry, l0)]
    entries = {name: entry for name, (entry, _) in saes.items()}
    results.write_manifest(folder, "toy", DEFINITION, entries, runs)
    return results.read(folder)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make(tmp_path_factory.mktemp("results") / "toy")


def seen(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def rows_of(markdown: str) -> dict[str, list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0].strip(): row for row in table}


@pytest.fixture(scope="module")
def board(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("board")
    Leaderboard()(toy, folder)
    return folder


# Numbers


@pytest.mark.parametrize(
    ("value", "low", "high", "shown"),
    [
        (0.91312, 0.91101, 0.91522, ("0.913", "0.002")),
        (0.91312, 0.9117, 0.9145, ("0.9131", "0.0014")),
        (12345.6, 12000.0, 12700.0, ("12346", "354")),
        (-2.02, -2.07, -1.97, ("-2.02", "0.05")),
        (32.0, 32.0, 32.0, ("32", None)),
        (0.12345678, float("nan"), float("nan"), ("0.1235", None)),
        (0.5, 0.5 - 1e-9, 0.5 + 1e-9, ("0.5", None)),
    ],
)
def test_a_number_has_as_many_digits_as_its_interval_warrants(value, low, high, shown):
    found = number(value, low, high)
    assert (found.value, getattr(found.interval, "length", None), found.exponent) == (*shown, 0)


def test_a_lopsided_interval_shows_both_ends():
    found = number(0.030, 0.021, 0.043)
    assert found.value == "0.030"
    assert found.interval == ("0.021", "0.043", "0.009", "0.013")


def test_a_tiny_number_has_an_exponent():
    found = number(1.234e-7, 1.2e-7, 1.27e-7)
    assert (found.value, found.interval, found.exponent) == ("1.23", ("0.04",), -7)


# Leaderboard


def test_a_block_is_ranked_with_the_controls_last(board):
    text = (board / "leaderboard.md").read_text()
    block = text.split("## ")[1]
    names = list(rows_of(block))[2:]
    assert block.startswith("2.resid_post, width 1,024, asked-for L0 8")
    assert [name.split("-")[0] for name in names[:5]] == [
        "batch_topk",
        "jumprelu",
        "topk",
        "relu",
        "gated",
    ]
    assert all(name.endswith("*(control)*") for name in names[5:])
    assert len(names) == 8


def test_blocks_ascend_and_sparsity_without_a_choice_comes_last(board):
    text = (board / "leaderboard.md").read_text()
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert titles == [
        "2.resid_post, width 1,024, asked-for L0 8",
        "2.resid_post, width 1,024, asked-for L0 16",
        "2.resid_post, width 1,024, asked-for L0 32",
        "2.resid_post, checkpoints",
        "2.resid_post, controls",
        "Metrics",
        "Not shown",
    ]


def test_bold_is_what_cannot_be_told_apart_from_the_best_and_never_a_control(board):
    rows = rows_of((board / "leaderboard.md").read_text())
    variance = {name: row[3] for name, row in rows.items()}
    assert variance["batch_topk-8"].startswith("**")
    assert not variance["jumprelu-8"].startswith("**")  # its interval overlaps, its pairs differ
    assert not any("**" in cell for n, row in rows.items() if "control" in n for cell in row)
    assert "**" not in " ".join(rows["my_sae"])  # alone in its block


def test_a_missed_l0_has_a_footnote(board):
    text = (board / "leaderboard.md").read_text()
    rows = rows_of(text)
    assert rows["relu-8"][2].endswith("†")
    assert "†" not in rows["relu-16"][2]
    assert "† : misses" in text or "†: misses the asked-for L0 by more than 10 %" in text


def test_what_is_not_shown_is_said(tmp_path):
    made = make(tmp_path / "toy", l0s=(8,))
    extra = made._replace(stale=["runs/a.json", "runs/b.json"], missing=["runs/c.json"])
    Leaderboard()(extra, tmp_path)
    text = (tmp_path / "leaderboard.md").read_text()
    assert "geometry does not apply to identity: it has no decoder" in text
    assert "2 result files of an earlier state of this suite are kept in runs/" in text
    assert "1 run is not done yet" in text


def test_the_table_says_model_site_tokens_and_unit(board):
    for name in ("leaderboard.md", "leaderboard.tex"):
        text = (board / name).read_text().replace("\\_", "_").replace("\n", " ")
        assert "builtin:pylm, float32, at 2.resid_post, on 38,400 tokens" in text
        assert "interval over sequences (latents for encoder decoder cosine, dead fraction)" in text


def test_the_csv_has_every_score_in_full(toy, board):
    with (board / "leaderboard.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(toy.scores)
    wanted = toy.scores.set_index(["sae", "metric"])["value"]
    assert all(float(row["value"]) == wanted[row["sae"], row["metric"]] for row in rows)
    assert rows == sorted(rows, key=lambda row: (row["sae"], row["eval"]))


def test_a_second_report_changes_nothing(toy, board):
    before = seen(board)
    Leaderboard()(toy, board)
    assert seen(board) == before


def test_the_terminal_shows_the_same_numbers_with_stars(toy):
    text = Leaderboard().text(toy)
    line = next(line for line in text.splitlines() if line.startswith(" batch_topk-8 "))
    assert "0.635 ±0.007*" in line
    assert "\x1b" not in text


def test_a_metric_that_nobody_has_is_left_out_and_no_metric_at_all_is_an_error(toy, tmp_path):
    Leaderboard(metrics=("nothing", "shrinkage"), formats=("md",))(toy, tmp_path)
    header = list(rows_of((tmp_path / "leaderboard.md").read_text()).values())[0]
    assert header == ["SAE", "variant", "L0", "shrinkage"]
    without = toy._replace(scores=toy.scores[toy.scores["metric"] != "l0"])
    with pytest.raises(UserError, match="Metrics of these results: .*shrinkage"):
        Leaderboard(metrics=("nothing",))(without, tmp_path)


def test_hostile_text_stays_text(toy, tmp_path):
    scores = toy.scores.copy()
    hostile = r"a|b*_<i>\&%$#{}~^"
    scores["variant"] = hostile
    Leaderboard()(toy._replace(scores=scores, model=hostile), tmp_path)
    markdown = (tmp_path / "leaderboard.md").read_text()
    assert r"a\|b\*\_&lt;i&gt;\\&amp;%$#{}~^" in markdown
    latex = (tmp_path / "leaderboard.tex").read_text()
    assert (
        r"a|b*\_\textless{}i\textgreater{}\textbackslash{}\&\%\$\#\{\}"
        r"\textasciitilde{}\textasciicircum{}" in latex
    )


def test_the_latex_table_has_as_many_cells_in_each_row_as_columns(board):
    text = (board / "leaderboard.tex").read_text()
    columns = re.search(r"\\begin\{tabular\}\{@\{\}(l+r+)@\{\}\}", text)
    assert columns is not None
    body = text.split("\\toprule\n")[1].split("\\bottomrule")[0]
    rows = [line for line in body.splitlines() if " & " in line]
    assert {len(row.split(" & ")) for row in rows} == {len(columns[1])}
    assert text.count("{") == text.count("}")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX here")
def test_the_latex_table_compiles_with_booktabs_alone_and_fits_a_page(board, tmp_path):
    (tmp_path / "paper.tex").write_text(
        "\\documentclass[twocolumn]{article}\\usepackage[margin=0.75in]{geometry}"
        "\\usepackage{booktabs}\\begin{document}\n"
        f"\\input{{{board / 'leaderboard.tex'}}}\n\\end{{document}}\n"
    )
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "Overfull" not in done.stdout


def test_versions_are_never_mixed(tmp_path):
    made = make(tmp_path / "toy", l0s=(8,))
    scores = made.scores.copy()
    scores.loc[scores["sae"] == "topk-8", "version"] = 0
    text = Leaderboard().text(made._replace(scores=scores))
    assert "topk-8 " not in text.replace("batch_topk-8", "")
    assert "Scores of older versions of core are not shown." in text


def test_results_without_their_units_are_shown_without_ties(tmp_path):
    made = make(tmp_path / "toy", l0s=(8,))
    for path in (tmp_path / "toy" / "runs").glob("*.units.parquet"):
        path.unlink()
    text = Leaderboard().text(made)
    assert "0.635 ±0.007 " in text and "0.007*" not in text
    assert "Units of some runs were not kept" in text


def test_parameters_make_columns_of_their_own(tmp_path):
    folder = tmp_path / "toy"
    entry = Entry("trained", "topk", 1024, 8, 0, SITE)
    paths = []
    for k in (1, 2, 10):
        ones = np.ones(12)
        row = ScoreRow(
            "auc", "max", "dataset", "ratio", "d", ones * k / 20, ones, 12, None, None, None, None
        )
        spec = {"sae": {"name": "s"}, "eval": {"name": "probing", "version": 1, "params": {"k": k}}}
        paths.append(results.write(folder, spec, [row], [], {}))
    runs = [f"runs/{path.name}" for path in paths]
    results.write_manifest(folder, "toy", DEFINITION, {"s": entry}, runs)
    read = results.read(folder)
    Leaderboard(metrics=("auc",), formats=("md",))(read, tmp_path)
    header, _, row = rows_of((tmp_path / "leaderboard.md").read_text()).values()
    assert header[2:] == ["AUC (k=1) ↑", "AUC (k=2) ↑", "AUC (k=10) ↑"]
    assert row[2:] == ["0.05", "0.1", "0.5"]
    with pytest.raises(UserError, match=r"auc\[k=1\], auc\[k=2\], auc\[k=10\]"):
        Pareto(x="auc", y="auc").draw(read)


@pytest.mark.parametrize("report", [Leaderboard, Pareto])
def test_an_unknown_format_names_the_known_ones(report):
    with pytest.raises(UserError, match=", ".join(report.makes)):
        report(formats=("docx",))


@pytest.mark.parametrize(("name", "report"), [("leaderboard", Leaderboard), ("pareto", Pareto)])
def test_a_report_is_the_one_public_object_of_its_file(name, report):
    assert registry.get("reports", name) is report


def test_the_leaderboard_does_not_import_matplotlib():
    code = "import sys, saebench.reports.leaderboard; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# Pareto


def test_the_same_results_give_the_same_bytes_and_a_second_plot_changes_nothing(toy, tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    paths = Pareto()(toy, first)
    Pareto()(toy, second)
    assert [path.name for path in paths] == [
        f"pareto_l0_explained_variance.{ending}" for ending in ("pdf", "svg", "png")
    ]
    before = seen(first)
    assert {n: data for n, (_, data) in before.items()} == {
        n: data for n, (_, data) in seen(second).items()
    }
    Pareto()(toy, first)
    assert seen(first) == before
    assert b"/CreationDate" not in (first / paths[0].name).read_bytes()


def test_a_users_own_matplotlib_style_changes_nothing(toy):
    import matplotlib as mpl

    plain = Pareto().draw(toy)
    with mpl.rc_context({"font.size": 30, "lines.linewidth": 9, "axes.grid": True}):
        styled = Pareto().draw(toy)
    sizes = [figure.axes[0].yaxis.label.get_fontsize() for figure in (plain, styled)]
    assert sizes == [7.5, 7.5]
    assert mpl.rcParams["font.size"] == mpl.rcParamsDefault["font.size"]


def test_the_figure_is_one_column_wide_with_plain_ticks(toy):
    figure = Pareto().draw(toy)
    panel = figure.axes[0]
    assert figure.get_figwidth() == 3.4
    assert panel.get_xscale() == "log"
    assert [label.get_text() for label in panel.get_xticklabels()] == ["8", "16", "32"]
    assert panel.get_xlabel().startswith("L0")


def test_tick_labels_are_the_numbers_at_the_ticks(toy):
    for y in ("explained_variance", "loss_recovered", "ce_loss_increase", "dead_fraction"):
        axis = Pareto(y=y).draw(toy).axes[0].yaxis
        texts = [label.get_text().replace("\N{MINUS SIGN}", "-") for label in axis.get_ticklabels()]
        np.testing.assert_allclose([float(t) for t in texts], axis.get_ticklocs(), rtol=1e-9)
        assert len(texts) >= 3


def test_every_variant_has_its_own_colour_marker_and_dashes(toy):
    figure = Pareto().draw(toy)
    handles = figure.legends[0].legend_handles
    lines = [h for h in handles if "(control)" not in h.get_label()][:5]
    assert [line.get_label() for line in lines] == list(VARIANTS)
    for look in ("get_color", "get_marker"):
        assert len({getattr(line, look)() for line in lines}) == 5


def test_far_controls_stand_in_a_strip_with_their_values(toy):
    panel = Pareto().draw(toy).axes[0]
    low, high = panel.get_ylim()
    texts = [text.get_text() for text in panel.texts]
    # identity 1.00 lies above, random 0.10 and permuted_decoder -0.81 below what SAEs reach.
    assert low > 0.4 and high < 0.95
    assert "identity 1.00↑" in texts
    assert "\N{MINUS SIGN}0.81↓" in texts and "0.10↓" in texts


def test_a_near_control_without_an_l0_is_a_dotted_line(toy):
    panel = Pareto(y="loss_recovered").draw(toy).axes[0]
    assert panel.get_ylim()[0] > 0.95
    assert "identity" in [text.get_text() for text in panel.texts]
    assert any(list(line.get_ydata()) == [1, 1] for line in panel.lines)


def test_lines_go_through_frontiers_only(tmp_path):
    folder = tmp_path / "toy"
    values = {"a": (8.0, 0.6), "b": (16.0, 0.5), "c": (32.0, 0.8)}  # b is beaten by a
    entries, runs = {}, []
    for name, (l0, variance) in values.items():
        one = np.ones(20)
        rows = [
            ScoreRow(
                "l0", None, "sequence", "ratio", "d", one * l0, one, 20, None, None, None, None
            ),
            ScoreRow(
                "ev",
                "max",
                "sequence",
                "ratio",
                "d",
                one * variance,
                one,
                20,
                None,
                None,
                None,
                None,
            ),
        ]
        spec = {"sae": {"name": name}, "eval": {"name": "core", "version": 1, "params": {}}}
        runs.append(f"runs/{results.write(folder, spec, rows, [], {}).name}")
        entries[name] = Entry("trained", "topk", 64, l0, 0, SITE)
    results.write_manifest(folder, "toy", DEFINITION, entries, runs)
    panel = Pareto(y="ev").draw(results.read(folder)).axes[0]
    lines = [line for line in panel.lines if len(line.get_xdata()) > 1]
    assert [list(line.get_xdata()) for line in lines] == [[8.0, 32.0]]
    drawn = sorted(
        (float(line.get_xdata()[0]), line.get_alpha())
        for line in panel.lines
        if len(line.get_xdata()) == 1 and line.get_marker() == "o"
    )
    assert drawn == [(8.0, 1.0), (16.0, 0.3), (32.0, 1.0)]


def test_every_site_has_a_panel_and_every_width_a_line(tmp_path):
    read = make(tmp_path / "toy", ("2.resid_post", "10.resid_post"), (512, 1024), (8,))
    figure = Pareto().draw(read)
    assert [panel.get_title() for panel in figure.axes] == ["2.resid_post", "10.resid_post"]
    labels = [h.get_label() for h in figure.legends[0].legend_handles]
    assert "topk, width 512" in labels and "topk, width 1,024" in labels
    titles = [line for line in Leaderboard().text(read).splitlines() if "asked-for L0 8" in line]
    assert titles == [
        "2.resid_post, width 512, asked-for L0 8",
        "2.resid_post, width 1,024, asked-for L0 8",
        "10.resid_post, width 512, asked-for L0 8",
        "10.resid_post, width 1,024, asked-for L0 8",
    ]


def test_a_figure_is_saved_in_the_format_of_its_name(toy, tmp_path):
    pareto = Pareto(y="loss_recovered")
    figure = pareto.draw(toy)
    assert pareto.save(figure, tmp_path / "fig.pdf")
    assert (tmp_path / "fig.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(UserError, match=r"\.pdf, \.svg, \.png"):
        pareto.save(figure, tmp_path / "fig.docx")


def test_an_unknown_metric_names_the_known_ones(toy):
    with pytest.raises(UserError, match="explained_variance"):
        Pareto(y="fidelity").draw(toy)


def test_an_sae_without_active_latents_is_named_beside_the_plot(toy):
    scores = toy.scores.copy()
    dead = (scores["sae"] == "gated-8") & (scores["metric"] == "l0")
    scores.loc[dead, ["value", "ci_low", "ci_high"]] = 0.0
    panel = Pareto().draw(toy._replace(scores=scores)).axes[0]
    assert "not shown (no active latents): gated-8" in [text.get_text() for text in panel.texts]


def test_a_checkpoint_stands_beside_the_saes_whose_sparsity_it_has(toy):
    scores = toy.scores.copy()
    given = scores["sae"].iloc[0]
    asked = scores.loc[scores["sae"] == given, "target_l0"].iloc[0]
    mine = scores["sae"] == given
    scores.loc[mine, "kind"], scores.loc[mine, "target_l0"] = "checkpoint", np.nan
    scores.loc[mine & (scores["metric"] == "l0"), "value"] = 1.09 * asked
    near = _table.build(toy._replace(scores=scores), ("explained_variance",))
    scores.loc[mine & (scores["metric"] == "l0"), "value"] = 1.11 * asked
    far = _table.build(toy._replace(scores=scores), ("explained_variance",))
    block = {
        title: next(b.title for b in table.blocks if given in [row.name for row in b.rows])
        for title, table in (("near", near), ("far", far))
    }
    assert f"asked-for L0 {asked:g}" in block["near"]
    assert "no L0 asked for" in block["far"]
