"""The command line: what it answers quickly, what it refuses, and how it ends."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from saebench import __version__, cli, registry
from tests.conftest import EVALS, VARIANTS, Finished, Place, Run, WriteSuite

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "datasets", "sklearn"}

WATCHED = """\
import sys
from saebench import cli
code = cli.main()
print(*sorted(sys.modules), file=open(sys.argv[-1], "w"))
sys.exit(code)
"""


def imported_by(folder: Path, *arguments: str) -> set[str]:
    """Packages that a command has imported, in a process of its own; it must end well."""
    seen = folder / "modules"
    code = WATCHED.replace("sys.argv[-1]", repr(str(seen)))
    subprocess.run(
        [sys.executable, "-c", code, *arguments],
        check=True,
        capture_output=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    return {name.partition(".")[0] for name in seen.read_text().split()}


# What is answered at once


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["run", "--help"], ["list", "variants"], ["list", "suites"]],
    ids=" ".join,
)
def test_what_needs_nothing_imports_nothing_heavy(tmp_path: Path, arguments: list[str]):
    assert imported_by(tmp_path, *arguments).isdisjoint(HEAVY | {"numpy", "pandas", "matplotlib"})


def test_reports_and_plots_do_without_torch(finished: Finished, tmp_path: Path):
    folder = str(finished.place.results())
    assert imported_by(tmp_path, "report", folder).isdisjoint(HEAVY | {"matplotlib"})
    pair = ("topk-w32-l4-s0", "relu-w32-l4-s0")
    modules = imported_by(tmp_path, "compare", *pair, "--results", folder)
    assert modules.isdisjoint(HEAVY | {"matplotlib"})
    figure = str(tmp_path / "figure.pdf")
    assert imported_by(tmp_path, "plot", folder, "--out", figure).isdisjoint(HEAVY)


def test_the_help_names_every_command(saebench: Run):
    ended = saebench("--help")
    assert ended.code == 0
    for command in ("run", "report", "plot", "compare", "check", "list"):
        assert f" {command} " in ended.out


@pytest.mark.parametrize("kind", registry.KINDS)
def test_list_names_what_a_suite_can_name(saebench: Run, kind: str):
    ended = saebench("list", kind)
    assert (ended.code, ended.err) == (0, "")
    named = [line.split()[0] for line in ended.out.partition("\n\n")[0].splitlines()]
    assert named == registry.names(kind)


def test_listed_plugins_say_what_they_are_and_variants_what_all_of_them_take(saebench: Run):
    listed = saebench("list", "variants").out
    assert "TopK SAE with the AuxK loss" in listed
    assert "input_noise" in listed


def test_list_names_variants_and_evals(saebench: Run):
    assert set(VARIANTS) <= set(saebench("list", "variants").out.split())
    assert set(EVALS) <= set(saebench("list", "evals").out.split())
    assert any(line.endswith("quickstart.yaml") for line in saebench("list", "suites").out.split())


def test_the_version_is_that_of_the_package(saebench: Run):
    ended = saebench("--version")
    assert (ended.code, ended.out) == (0, f"{__version__}\n")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == __version__


@pytest.mark.parametrize(
    "arguments", [["run"], ["nonsense"], ["list", "variant"], ["run", "x.yaml", "--nonsense"]]
)
def test_a_command_that_is_none_ends_with_2(saebench: Run, arguments: list[str]):
    ended = saebench(*arguments)
    assert ended.code == 2
    assert "Traceback" not in ended.err


# Suites


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_wrong_suite_is_one_message_and_nothing_else(
    saebench: Run,
    write_suite: WriteSuite,
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
):
    monkeypatch.chdir(place.folder)
    path = write_suite(contrls=["identity"])
    ended = saebench(command, path)
    assert (ended.code, ended.out) == (2, "")
    (line,) = ended.err.splitlines()
    assert line.startswith(f"saebench: {path}:")
    assert "contrls: unknown key 'contrls'; did you mean 'controls'?" in line
    assert list(place.folder.iterdir()) == [path]


def test_a_suite_that_is_not_there_is_told_where_others_are(saebench: Run):
    ended = saebench("run", "no-such-suite")
    assert ended.code == 2
    assert ended.err == (
        "saebench: there is no suite file no-such-suite; `saebench list suites` names those that come along\n"
    )


def test_a_suite_that_comes_along_is_found_by_its_name(
    saebench: Run, write_suite: WriteSuite, place: Place, monkeypatch: pytest.MonkeyPatch
):
    write_suite("along/mine.yaml")
    folders = {"suites": place.folder / "along", "baselines": registry.folder("baselines")}
    monkeypatch.setattr(registry, "folder", folders.__getitem__)
    monkeypatch.chdir(place.folder)
    (place.folder / "mine").mkdir()  # a folder of that name is no suite
    ended = saebench("run", "mine", "--dry-run", "--device", "cpu")
    assert ended.code == 0
    assert "to train: 1 of 1 SAE," in ended.out
    assert saebench("list", "suites").out == f"{place.folder / 'along' / 'mine.yaml'}\n"


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta", "cuda:", "-1"])
def test_a_device_that_is_not_there_is_refused(
    saebench: Run, write_suite: WriteSuite, place: Place, device: str
):
    ended = saebench(*place.arguments(write_suite()), f"--device={device}")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("saebench: --device is ")
    assert device in ended.err
    assert not place.results().exists()


def test_a_gpu_is_not_asked_for_where_there_is_none(
    saebench: Run, write_suite: WriteSuite, place: Place, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    ended = saebench(*place.arguments(write_suite()), "--device=cuda")
    assert ended.code == 2
    assert "torch sees 0 GPUs here; use --device cpu" in ended.err


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    run: Run, write_suite: WriteSuite, place: Place
):
    path = write_suite()
    ended = run(path, "--dry-run")
    assert ended.code == 0
    assert "to train: 1 of 1 SAE, 50 steps each, in 1 group\n" in ended.out
    assert "  train topk-w32-l4-s0" in ended.out
    assert "each is scored with: " + ", ".join(EVALS) in ended.out
    for cost in ("memory of cpu", "disk", "tokens", "floating-point operations", "time"):
        assert f"\n{cost}: " in ended.out
    assert re.search(r"an estimate from a measurement of \d+\.\d seconds on cpu", ended.out)
    assert "measuring: " in ended.err
    assert list(place.folder.iterdir()) == [path]


def test_a_dry_run_knows_what_is_done(finished: Finished, run: Run):
    before = finished.place.files(".")
    ended = run(finished.suite, "--dry-run", "--only", "relu*", at=finished.place)
    assert ended.code == 0
    assert "to train: 0 of 1 SAE," in ended.out
    assert "  done  relu-w32-l4-s0" in ended.out
    assert "to score: 0 SAEs" in ended.out
    assert "time: nothing is to be done" in ended.out
    assert finished.place.files(".") == before


@pytest.mark.parametrize("options", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_a_pattern_that_matches_nothing_is_refused(
    run: Run, write_suite: WriteSuite, place: Place, options: list[str]
):
    ended = run(write_suite(), "--only", "topk", *options)
    assert (ended.code, ended.out) == (2, "")
    assert "matches no SAE of the suite; there are: topk-w32-l4-s0, identity" in ended.err
    assert place.weights() == {}


def test_check_says_what_a_suite_would_do(
    saebench: Run, write_suite: WriteSuite, place: Place, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(place.folder)
    path = write_suite()
    ended = saebench("check", path, "--device", "cpu")
    assert ended.code == 0
    assert "to train: 1 of 1 SAE," in ended.out
    assert list(place.folder.iterdir()) == [path]


def test_check_finds_what_is_there_in_the_folders_that_it_is_told(
    saebench: Run, finished: Finished
):
    folders = ("results", "checkpoints", "cache")
    places = [p for f in folders for p in (f"--{f}", str(finished.place.folder / f))]
    ended = saebench("check", finished.plain, "--device", "cpu", *places)
    assert ended.code == 0
    assert "to train: 0 of 5 SAEs" in ended.out


def test_what_is_printed_does_not_wait_for_the_lines_of_progress(
    saebench: Run, monkeypatch: pytest.MonkeyPatch
):
    flushed: list[str] = []
    monkeypatch.setattr(sys.stdout, "flush", lambda: flushed.append("here"))
    cli._print("a line")
    assert flushed == ["here"]


def test_check_refuses_what_only_the_model_can_tell(saebench: Run, write_suite: WriteSuite):
    ended = saebench("check", write_suite(sites=[{"layer": 7, "stream": "resid_post"}]))
    assert (ended.code, ended.out) == (2, "")
    assert "layer 7: LlamaForCausalLM has layers 0 to 2" in ended.err


# Checkpoints


def test_check_describes_a_checkpoint(finished: Finished, saebench: Run):
    (folder,) = finished.place.checkpoints.glob("topk*")
    ended = saebench("check", folder)
    assert ended.code == 0
    assert "TopK, 16 dimensions, 32 latents" in ended.out
    assert "site: 1.resid_post" in ended.out


@pytest.mark.parametrize("damage", ["weights", "record", "both gone"])
def test_check_refuses_a_damaged_checkpoint(
    finished: Finished, saebench: Run, tmp_path: Path, damage: str
):
    (folder,) = finished.place.checkpoints.glob("topk*")
    mine = tmp_path / "mine"
    shutil.copytree(folder, mine)
    if damage == "weights":
        content = (mine / "sae.safetensors").read_bytes()
        (mine / "sae.safetensors").write_bytes(content[:-1])
    elif damage == "record":
        (mine / "sae.json").write_text("{")
    else:
        (mine / "sae.safetensors").unlink()
        (mine / "sae.json").unlink()
    ended = saebench("check", mine)
    assert (ended.code, ended.out) == (2, "")
    assert str(mine) in ended.err
    assert "Traceback" not in ended.err


# Reports and plots


def test_report_prints_the_leaderboard_and_writes_the_formats_asked_for(
    finished: Finished, saebench: Run, tmp_path: Path
):
    folder = tmp_path / "copy"
    shutil.copytree(finished.place.results(), folder)
    for board in folder.glob("leaderboard.*"):
        board.unlink()
    assert saebench("report", folder).out.startswith("Leaderboard: tiny\n")
    assert list(folder.glob("leaderboard.*")) == []
    ended = saebench("report", folder, "--format", "md, csv")
    assert ended.code == 0
    assert {path.name for path in folder.glob("leaderboard.*")} == {
        "leaderboard.md",
        "leaderboard.csv",
    }
    for name in ("leaderboard.md", "leaderboard.csv", "separation.csv"):
        assert (folder / name).read_bytes() == (finished.place.results() / name).read_bytes()


def test_a_report_of_nothing_says_what_to_run_first(saebench: Run, tmp_path: Path):
    for command in (
        ["report", tmp_path],
        ["plot", tmp_path, "--out", "x.pdf"],
        ["compare", "a", "b", "--results", tmp_path],
    ):
        ended = saebench(*command)
        assert (ended.code, ended.out) == (2, "")
        assert "no results of a suite here" in ended.err


def test_a_format_that_is_none_is_refused(finished: Finished, saebench: Run):
    ended = saebench("report", finished.place.results(), "--format", "docx")
    assert ended.code == 2
    assert "no format 'docx'; expected some of md, csv, tex" in ended.err


def test_a_report_is_sorted_by_any_metric_that_there_is(finished: Finished, saebench: Run):
    folder = finished.place.results()
    ended = saebench("report", folder, "--sort", "kl_divergence")
    assert ended.code == 0
    assert "rank: by KL divergence;" in ended.out
    ended = saebench("report", folder, "--sort", "kl_divergenc")
    assert (ended.code, ended.out) == (2, "")
    assert "No SAE has a metric 'kl_divergenc'" in ended.err


@pytest.mark.parametrize(
    ("ending", "magic"), [("pdf", b"%PDF"), ("svg", b"<?xml"), ("png", b"\x89PNG")]
)
def test_plot_writes_a_figure_of_any_two_metrics(
    finished: Finished, saebench: Run, tmp_path: Path, ending: str, magic: bytes
):
    out = tmp_path / "new" / f"fig.{ending}"
    ended = saebench(
        "plot", finished.place.results(), "--x", "l0", "--y", "shrinkage", "--out", out
    )
    assert (ended.code, ended.out) == (0, f"wrote {out}\n")
    assert out.read_bytes().startswith(magic)


@pytest.mark.parametrize("axis", ["--x", "--y"])
def test_a_metric_that_is_none_is_refused_with_those_there_are(
    finished: Finished, saebench: Run, tmp_path: Path, axis: str
):
    out = tmp_path / "fig.pdf"
    ended = saebench("plot", finished.place.results(), axis, "loss_recoverd", "--out", out)
    assert (ended.code, ended.out) == (2, "")
    assert "'loss_recoverd'" in ended.err
    assert "loss_recovered" in ended.err
    assert not out.exists()


@pytest.mark.parametrize("name", ["fig.xyz", "fig"])
def test_a_figure_of_an_unknown_format_is_refused(
    finished: Finished, saebench: Run, tmp_path: Path, name: str
):
    ended = saebench("plot", finished.place.results(), "--out", tmp_path / name)
    assert (ended.code, ended.out) == (2, "")
    assert ".pdf, .svg, .png" in ended.err
    assert list(tmp_path.iterdir()) == []


def test_an_audit_takes_its_panel_from_beside_the_results(
    saebench: Run, write_suite: WriteSuite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from saebench import auditor
    from saebench.reliability.cards import SCHEMA, Card

    asked: list[tuple[object, ...]] = []

    def audit(suite, path, options, extent, truth):
        asked.append((extent, truth))
        return Card(SCHEMA, suite.name, 0, ())

    monkeypatch.setattr(auditor, "audit", audit)
    arguments = (write_suite(), "--results", tmp_path / "results", "--draws", "3")
    assert saebench("audit", *arguments).code == 0
    panel = tmp_path / "results" / "synthetic_small"
    panel.mkdir(parents=True)
    (panel / "audit.csv").write_text("")
    assert saebench("audit", *arguments).code == 0
    assert saebench("audit", *arguments, "--truth", tmp_path).code == 0
    extent = auditor.Extent(draws=3, references=6, seeds=3)
    assert asked == [(extent, None), (extent, panel), (extent, tmp_path)]


def test_an_audit_of_one_draw_is_refused(saebench: Run, write_suite: WriteSuite):
    ended = saebench("audit", write_suite(), "--draws", "1")
    assert ended.code == 2 and "draws" in ended.err
