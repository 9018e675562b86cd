import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from saebench import registry, results
from saebench.errors import UserError
from saebench.reports import _seeds, pareto
from saebench.reports._blocks import grouped
from saebench.reports._evidence import Evidence
from saebench.reports._table import Key, natural, number
from saebench.reports._terminal import Screen
from saebench.reports.leaderboard import Leaderboard
from saebench.reports.pareto import Pareto
from saebench.results import Entry, Omission, ScoreRow
from saebench.stats import Column, Difference
from tests.boards import SITE, control, noisy, row, trained, write

VARIANCE = Key("explained_variance", "core", "")
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
    found: dict[str, list[str]] = {}
    for cells in table:
        found.setdefault(cells[0], cells)  # the leaderboard comes before the tables of ranks
    return found


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
        "Ranks",
        "Trained against controls",
        "Metrics",
        "Not shown",
    ]


def test_bold_is_what_cannot_be_told_apart_from_the_best_and_never_a_control(board):
    rows = rows_of((board / "leaderboard.md").read_text().split("## Ranks")[0])
    variance = {name: row[4] for name, row in rows.items()}
    assert variance["batch_topk-8"].startswith("**")
    assert not variance["jumprelu-8"].startswith("**")  # its interval overlaps, its pairs differ
    assert not any("**" in cell for n, row in rows.items() if "control" in n for cell in row)
    assert "**" not in " ".join(rows["my_sae"])  # alone in its block


def test_a_missed_l0_has_a_footnote(board):
    text = (board / "leaderboard.md").read_text()
    rows = rows_of(text)
    assert rows["relu-8"][3].endswith("†")
    assert "†" not in rows["relu-16"][3]
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
        assert "interval over documents (latents for encoder decoder cosine, dead fraction)" in text


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
    assert header == ["SAE", "rank", "variant", "L0", "shrinkage", "explained variance ↑"]
    without = toy._replace(scores=toy.scores[toy.scores["metric"] != "l0"])
    with pytest.raises(UserError, match="Metrics of these results: .*shrinkage"):
        Leaderboard(metrics=("nothing",))(without, tmp_path)


def test_hostile_text_stays_text(toy, tmp_path):
    scores = toy.scores.copy()
    hostile = r"a|b*_<i>\&%$#{}~^"
    scores["variant"] = hostile
    Leaderboard()(toy._replace(scores=scores, model=hostile), tmp_path)
    markdown = (tmp_path / "leaderboard.md").read_text()
    assert r"a\|b\*\_&lt;i&gt;\\&amp;%\$#{}\~^" in markdown
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
    text = (tmp_path / "leaderboard.md").read_text()
    (header, row) = (rows_of(text)[name] for name in ("SAE", "s"))
    assert header[2:] == ["AUC (k=1) ↑", "AUC (k=2) ↑", "AUC (k=10) ↑"]
    assert row[2:] == ["0.05", "0.1", "0.5"]
    assert "No SAE has explained_variance, to sort by; sorted by AUC (k=1)." in text
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


# Ranks


def two_and_a_worse(folder: Path) -> results.Results:
    """a and b are the same to the last unit; c is far below."""
    high, low = noisy(0.9, 0.01, 0), noisy(0.5, 0.01, 1)
    values = {"a": high, "b": high, "c": low}
    saes = {
        name: (trained(name), [row("explained_variance", v), row("l0", v, best=None)])
        for name, v in values.items()
    }
    return write(folder, saes)


def test_what_cannot_be_told_apart_shares_a_letter_and_its_ranks(tmp_path):
    made = two_and_a_worse(tmp_path / "toy")
    Leaderboard()(made, tmp_path)
    text = (tmp_path / "leaderboard.md").read_text()
    rows = rows_of(text)
    assert [rows[name][1] for name in "abc"] == ["1–2 a, 50 %", "1–2 a, 50 %", "3 b"]
    assert [rows[name][4].startswith("**") for name in "abc"] == [True, True, False]
    assert "### 2.resid\\_post, width 64, asked-for L0 8" in text or "### 2.resid_post" in text
    assert rows_of(text.split("## Ranks")[1])["a"] == ["a", "1–2 a"]


def test_the_csv_has_the_ranks_of_what_is_ranked(tmp_path):
    made = two_and_a_worse(tmp_path / "toy")
    Leaderboard(formats=("csv",))(made, tmp_path)
    with (tmp_path / "leaderboard.csv").open() as file:
        rows = {(row["sae"], row["metric"]): row for row in csv.DictReader(file)}
    names = ("rank_low", "rank_high", "group", "p_best")
    assert [rows["b", "explained_variance"][n] for n in names] == ["1", "2", "a", "0.5"]
    assert [rows["c", "explained_variance"][n] for n in names] == ["3", "3", "b", "0.0"]
    assert [rows["c", "l0"][n] for n in names] == ["", "", "", ""]


def test_controls_and_references_are_marked_and_never_ranked(tmp_path):
    perfect, good = noisy(1.0, 0.001, 0), noisy(0.9, 0.01, 1)
    saes = {
        "identity": (control("identity", kind="reference"), [row("explained_variance", perfect)]),
        "random": (control("random"), [row("explained_variance", perfect)]),
        "a": (trained("a"), [row("explained_variance", good)]),
        "b": (trained("b"), [row("explained_variance", good - 0.1)]),
    }
    made = write(tmp_path / "toy", saes)
    Leaderboard()(made, tmp_path)
    text = (tmp_path / "leaderboard.md").read_text()
    rows = rows_of(text)
    assert list(rows)[2:6] == ["a", "b", "random *(control)*", "identity *(reference)*"]
    assert [rows[name][1] for name in list(rows)[2:6]] == ["1 a, &gt;99 %", "2 b", "", ""]
    assert "identity" not in text.split("## Ranks")[1].split("## Metrics")[0]
    terminal = Leaderboard().text(made)
    assert "(reference)" in terminal and "(control)" in terminal


def test_rows_are_sorted_by_the_metric_asked_for(tmp_path):
    saes = {
        name: (trained(name), [row("explained_variance", ev), row("mse", error, best="min")])
        for name, ev, error in (
            ("a", noisy(0.9, 0.01, 0), noisy(3.0, 0.01, 2)),
            ("b", noisy(0.5, 0.01, 1), noisy(1.0, 0.01, 3)),
        )
    }
    made = write(tmp_path / "toy", saes)
    for sort, order in (("explained_variance", ["a", "b"]), ("mse", ["b", "a"])):
        Leaderboard(metrics=("explained_variance",), sort=sort)(made, tmp_path)
        text = (tmp_path / "leaderboard.md").read_text()
        assert [name for name in rows_of(text) if name in ("a", "b")] == order
        assert [rows_of(text)[name][1] for name in order] == ["1 a, &gt;99 %", "2 b"]
        assert ("MSE ↓" in rows_of(text)["SAE"]) == (
            sort == "mse"
        )  # it is shown what it is sorted by
    Leaderboard(sort="auc")(made, tmp_path)
    text = (tmp_path / "leaderboard.md").read_text()
    assert "No SAE has auc, to sort by; sorted by explained variance." in text


# Seeds


def seeded(folder: Path, values: dict[str, list[float]], sd: float = 0.01) -> results.Results:
    """Recipes whose seeds have these values, on the same hard and easy sequences."""
    saes = {}
    text = noisy(0.0, 10 * sd, 99)
    for variant, of_seeds in values.items():
        for seed, mean in enumerate(of_seeds):
            own = noisy(mean, sd, sum(map(ord, variant)) + seed) + text
            rows = [row("explained_variance", own), row("l0", 8 + noisy(0, 1, seed), best=None)]
            saes[f"{variant}-s{seed}"] = (trained(variant, seed=seed), rows)
    return write(folder, saes)


def test_of_oracles_the_whole_one_is_drawn(tmp_path):
    def one(entry, value):
        rows = [row("l0", [8.0] * 5), row("explained_variance", [value] * 5)]
        return entry, rows

    whole = Entry("reference", "oracle", 64, None, None, SITE)
    made = write(
        tmp_path,
        {
            "topk": one(trained("topk"), 0.8),
            "oracle-w64": one(whole, 0.9),
            "oracle-w64-mixed25": one(whole, 0.7),
        },
    )
    points = pareto._plot(made, "l0", "explained_variance").points
    assert sorted(points.index) == ["oracle-w64", "topk"]


def test_seeds_of_different_numbers_of_units_are_one_column_of_the_same_mean_and_noise():
    """By hand: the mean of seeds, and sqrt(sum of their variances of the mean) over their number."""
    seeds = [
        Column(noisy(mean, sd, seed, n), np.ones(n), "ratio")
        for seed, (mean, sd, n) in enumerate([(0.2, 0.3, 400), (0.5, 0.1, 100), (0.8, 0.2, 900)])
    ]
    made = _seeds.recipe_column(seeds)
    assert made.num.mean() == pytest.approx(0.5)
    squares = [0.3**2 / 400, 0.1**2 / 100, 0.2**2 / 900]
    error = np.sqrt(np.square(made.num - 0.5).sum()) / len(made.num)
    assert error == pytest.approx(np.sqrt(sum(squares)) / 3, rel=0.01)


def test_seeds_that_have_found_other_features_have_an_interval_about_their_mean(tmp_path):
    """Two features are common to all seeds, and these are unlike the others."""
    found = {
        f"topk-s{seed}": (
            trained("topk", seed=seed),
            [
                row(
                    "explained_variance",
                    [0.0, 0.0, *noisy(0.88 + 0.02 * seed, 0.05, seed, 30)],
                    unit="feature",
                    ids=["1", "2", *(str(100 * seed + i) for i in range(3, 33))],
                )
            ],
        )
        for seed in range(3)
    }
    evidence = Evidence(write(tmp_path, found))
    seeds = evidence.seeds(VARIANCE, evidence.groups[0].ranked[0])
    assert seeds.mean == pytest.approx(0.9 * 30 / 32)
    assert seeds.low < seeds.mean < seeds.high and seeds.high - seeds.low < 0.3


def test_seeds_of_a_recipe_are_one_row_with_their_mean(tmp_path):
    made = seeded(tmp_path / "toy", {"topk": [0.80, 0.82, 0.84], "relu": [0.6]})
    Leaderboard()(made, tmp_path)
    text = (tmp_path / "leaderboard.md").read_text()
    rows = rows_of(text)
    assert {"topk-w64-l8 (3 seeds)", "relu-s0"} < set(rows)
    assert "topk-s0" not in rows
    assert rows["topk-w64-l8 (3 seeds)"][4].startswith("**0.82 ")
    assert "topk-w64-l8 (3 seeds)" in Leaderboard().text(made)
    seeds = rows_of(text.split("## Seeds")[1])["topk-w64-l8"]
    assert seeds[:2] == ["topk-w64-l8", "L0"]
    lines = text.split("## Seeds")[1].splitlines()
    shown = next(line for line in lines if "| explained variance" in line)
    cells = [cell.strip() for cell in shown.strip("|").split("|")]
    # var(y) = 0.02^2; own noise 0.01^2 / 100; sqrt(0.0004 - 0.000001) = 0.01997
    assert cells[2:] == ["0.82", "0.02", cells[4], "0.8, 0.82, 0.84"]
    assert float(cells[4]) == pytest.approx(
        0.1005 / 10, rel=0.2
    )  # sqrt(0.1^2 + 0.01^2) / sqrt(100)


def test_one_seed_each_has_no_section_of_seeds(toy, board):
    text = (board / "leaderboard.md").read_text()
    assert "## Seeds" not in text and "seeds)" not in text
    assert "Trained with one seed each" in text


def test_recipes_are_not_told_apart_by_what_training_seeds_do(tmp_path):
    scattered = seeded(tmp_path / "a", {"topk": [0.7, 0.8, 0.9], "relu": [0.65, 0.75, 0.85]})
    steady = seeded(tmp_path / "b", {"topk": [0.80, 0.801, 0.799], "relu": [0.75, 0.751, 0.749]})
    alone = seeded(tmp_path / "c", {"topk": [0.8], "relu": [0.75]})
    found = [
        [Evidence(read).standings(VARIANCE, grouped(read.scores)[0])[name][:3] for name in names]
        for read, names in (
            (scattered, ("topk-w64-l8", "relu-w64-l8")),
            (steady, ("topk-w64-l8", "relu-w64-l8")),
            (alone, ("topk-s0", "relu-s0")),
        )
    ]
    assert found == [
        [(1, 2, "a"), (1, 2, "a")],
        [(1, 1, "a"), (2, 2, "b")],
        [(1, 1, "a"), (2, 2, "b")],
    ]


def test_the_test_between_recipes_is_welchs_where_evaluation_is_exact():
    a, b = [0.81, 0.84, 0.80, 0.83], [0.78, 0.80, 0.70]
    gap = np.mean(a) - np.mean(b)
    exact = Difference(float(gap), float(gap), float(gap), 0.0, 0.0)
    sides = ((float(np.std(a, ddof=1)), 4), (float(np.std(b, ddof=1)), 3))
    expected = scipy.stats.ttest_ind(a, b, equal_var=False).pvalue
    assert _seeds.p_value(exact, sides, 99) == pytest.approx(expected, rel=1e-9)
    # A recipe with one seed is taken to scatter as the other does.
    alone = ((float(np.std(a, ddof=1)), 4), (None, 1))
    t = gap / (np.std(a, ddof=1) * np.sqrt(1 / 4 + 1))
    assert _seeds.p_value(exact, alone, 99) == pytest.approx(2 * scipy.stats.t.sf(t, 3), rel=1e-9)


def test_the_column_of_a_recipe_has_the_mean_of_its_seeds_values():
    one = Column(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 1.0]))  # 6 / 4 = 1.5
    two = Column(np.array([2.0, 2.0, 2.0]), np.array([4.0, 1.0, 1.0]))  # 6 / 6 = 1
    told = _seeds.recipe_column([one, two])
    # R + (num - R den) / mean(den)
    first = 1.5 + (np.array([1, 2, 3]) - 1.5 * np.array([1, 2, 1])) / (4 / 3)
    second = 1.0 + (np.array([2, 2, 2]) - 1.0 * np.array([4, 1, 1])) / 2
    np.testing.assert_allclose(first, [1.125, 0.75, 2.625])
    np.testing.assert_allclose(second, [0.0, 1.5, 1.5])
    np.testing.assert_allclose(told.num, [0.5625, 1.125, 2.0625])
    assert told.num.mean() / told.den.mean() == pytest.approx(1.25)
    assert _seeds.recipe_column([one]) is one


def test_how_often_a_recipe_is_the_best_counts_what_training_seeds_do(tmp_path):
    """Without evaluation noise it is P(t > -gap) of two draws of Student's t."""
    made = seeded(tmp_path / "toy", {"topk": [0.78, 0.80, 0.82], "relu": [0.76, 0.78, 0.80]}, 1e-6)
    (group,) = grouped(made.scores)
    found = Evidence(made).standings(VARIANCE, group)
    rng = np.random.default_rng(5)
    a, b = (mean + 0.02 / np.sqrt(3) * rng.standard_t(2, 100_000) for mean in (0.80, 0.78))
    assert found["topk-w64-l8"].p_best == pytest.approx((a > b).mean(), abs=0.03)
    assert found["topk-w64-l8"].p_best + found["relu-w64-l8"].p_best == pytest.approx(1)


def test_the_same_seed_twice_is_two_recipes(tmp_path):
    rows = [row("explained_variance", noisy(0.8, 0.1, 0))]
    saes = {name: (trained("topk", seed=0), rows) for name in ("mine", "other")}
    made = write(tmp_path / "toy", saes)
    assert {"mine", "other"} == blocks(made).keys()


# Trained against controls


def against(folder: Path, of_control: list[float], sparsities: tuple[float, ...] = (8.0,)):
    """Two trained SAEs at 0.8 and 0.7 beside a control, in a block for each sparsity."""
    saes = {}
    for l0, value in zip(sparsities, of_control, strict=True):
        for name, mean in (("topk", 0.8), ("relu", 0.7)):
            rows = [row("explained_variance", noisy(mean, 0.02, len(name)))]
            saes[f"{name}-{l0:g}"] = (trained(name, l0), rows)
        rows = [row("explained_variance", noisy(value, 0.02, 7)), row("dead", [1.0], best="min")]
        saes[f"random-{l0:g}"] = (control("random", l0), rows)
    return write(folder, saes)


@pytest.mark.parametrize(
    ("value", "better", "marked"),
    [(0.1, 2, False), (0.75, 1, True), (0.7, 1, True), (0.9, 0, True)],
)
def test_a_metric_is_marked_where_a_control_is_as_good_as_half_of_the_trained(
    tmp_path, value, better, marked
):
    made = against(tmp_path / "toy", [value])
    Leaderboard()(made, tmp_path)
    text = (tmp_path / "leaderboard.md").read_text()
    (found,) = Evidence(made).separation(VARIANCE).values()
    assert (found.better, found.pairs, found.separates) == (better, 2, not marked)
    heading = "explained variance‡ ↑" if marked else "explained variance ↑"
    assert heading in rows_of(text)["SAE"]
    assert ("‡: does not separate" in text.split("## Ranks")[0]) == marked
    assert ("explained variance (random)" in text) == marked
    for other in (Leaderboard().text(made), (tmp_path / "leaderboard.tex").read_text()):
        assert any(mark in other for mark in ("‡", "ddagger")) == marked


def test_separation_is_in_standard_errors_of_the_paired_difference(tmp_path):
    made = against(tmp_path / "toy", [0.1])
    Leaderboard()(made, tmp_path)
    gaps = [
        noisy(mean, 0.02, len(name)) - noisy(0.1, 0.02, 7)
        for name, mean in (("topk", 0.8), ("relu", 0.7))
    ]
    by_hand = np.median([gap.mean() / (gap.std(ddof=1) / np.sqrt(len(gap))) for gap in gaps])
    (found,) = Evidence(made).separation(VARIANCE).values()
    assert found.z == pytest.approx(by_hand, rel=0.1)  # the interval is a bootstrap's
    shown = rows_of((tmp_path / "leaderboard.md").read_text().split("Trained against controls")[1])
    assert shown["metric"] == ["metric", "random"]
    assert shown["explained variance ↑"][1] == f"+{found.z:.0f} (2/2)"
    assert "dead" not in str(shown)  # no trained SAE has it
    with (tmp_path / "separation.csv").open() as file:
        (line,) = csv.DictReader(file)
    assert (line["metric"], line["control"], line["separates"]) == (
        "explained_variance",
        "random",
        "True",
    )
    assert float(line["z"]) == found.z


@pytest.mark.parametrize(("values", "marked"), [([0.9, 0.1], False), ([0.9, 0.9, 0.1], True)])
def test_a_mark_takes_more_than_half_of_the_blocks(tmp_path, values, marked):
    made = against(tmp_path / "toy", values, (8.0, 16.0, 32.0)[: len(values)])
    (found,) = Evidence(made).separation(VARIANCE).values()
    assert (found.blocks, found.failed) == (len(values), values.count(0.9))
    assert found.separates != marked


def test_a_reference_and_a_control_of_another_sparsity_separate_nothing(tmp_path):
    rows = [row("explained_variance", noisy(0.9, 0.02, 7))]
    saes = {
        "topk": (trained("topk"), [row("explained_variance", noisy(0.8, 0.02, 1))]),
        "pca": (control("pca", kind="reference"), rows),
        "random": (control("random", 16.0), rows),
    }
    made = write(tmp_path / "toy", saes)
    assert Evidence(made).separation(VARIANCE) == {}
    Leaderboard()(made, tmp_path)
    assert "Trained against controls" not in (tmp_path / "leaderboard.md").read_text()
    assert (tmp_path / "separation.csv").read_text().count("\n") == 1


def test_latents_are_compared_with_a_control_unpaired(tmp_path):
    """By Welch's z, and with different numbers of latents."""
    mine, others = noisy(0.3, 0.1, 0, 200), noisy(0.5, 0.2, 1, 50)
    saes = {
        "topk": (trained("topk"), [row("cosine", mine, best="min", unit="latent")]),
        "random": (control("random"), [row("cosine", others, best="min", unit="latent")]),
    }
    made = write(tmp_path / "toy", saes)
    (found,) = Evidence(made).separation(Key("cosine", "core", "")).values()
    t = 0.2 / np.sqrt(0.1**2 / 200 + 0.2**2 / 50)
    assert found.z == pytest.approx(t * 1.959964 / scipy.stats.t.ppf(0.975, 49), rel=1e-6)
    assert found.better == 1


# What runs leave out


def test_what_runs_leave_out_is_counted_and_named_once(tmp_path):
    rows = [row("explained_variance", noisy(0.8, 0.02, 1))]
    both = Omission("12_us_long", "target has 4,326 values; expected 2 to 50.")
    one = Omission("7_x", "no latent fires")
    saes = {name: (trained(name), rows) for name in ("a", "b", "c")}
    omitted = {"a": [both, one], "b": [both, one], "c": [both]}
    made = write(tmp_path / "toy", saes, omitted)
    Leaderboard()(made, tmp_path)
    notes = (tmp_path / "leaderboard.md").read_text().split("## Not shown")[1]
    assert "- core leaves out 2 datasets or metrics, wholly or in part:" in notes
    assert "- core: 12_us_long: target has 4,326 values; expected 2 to 50 (all 3 SAEs)." in notes
    assert "- core: 7_x: no latent fires (a, b)." in notes
    assert notes.count("12_us_long") == 1
    assert "12_us_long" in Leaderboard().text(made)


def test_many_things_left_out_for_one_reason_are_one_line(tmp_path):
    """The reason is the same but for its numbers."""
    found = [Omission(f"set_{i}", f"{i} of {1000 + i:,} rows have no target") for i in range(42)]
    omitted = {"a": [*found, Omission("set_7", "one class")]}
    saes = {"a": (trained("a"), [row("explained_variance", noisy(0.8, 0.02, 1))])}
    made = write(tmp_path / "toy", saes, omitted)
    Leaderboard()(made, tmp_path)
    notes = (tmp_path / "leaderboard.md").read_text().split("## Not shown")[1]
    assert "- core leaves out 42 datasets or metrics, wholly or in part:" in notes
    assert "core: 42 alike, such as set_0: 0 of 1,000 rows have no target; they are set_0," in notes
    assert "set_11 and 30 more (a)." in notes and "set_12" not in notes  # in natural order
    assert "- core: set_7: one class (a)." in notes


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
    near = blocks(toy._replace(scores=scores))
    scores.loc[mine & (scores["metric"] == "l0"), "value"] = 1.11 * asked
    far = blocks(toy._replace(scores=scores))
    assert f"asked-for L0 {asked:g}" in near[given]
    assert "no L0 asked for" in far[given]


def blocks(read: results.Results) -> dict[str, str]:
    """The title of each SAE's block."""
    return {one.name: group.title for group in grouped(read.scores) for one in group.contenders}


def test_names_that_are_odd_are_shown_as_they_are():
    screen = Screen()
    screen.line("huge:A: only 3 of 5²")
    assert screen.text() == "huge:A: only 3 of 5²\n"
    assert sorted(["5²", "10", "5"], key=natural) == ["5", "5²", "10"]
