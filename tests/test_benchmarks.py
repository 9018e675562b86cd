"""The benchmarks that need no peers, at tiny sizes, and the arithmetic of their comparisons."""

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saebench import stats
from tests.conftest import Place, Run, World, WriteSuite

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch):
    """Benchmarks are scripts: they find each other beside themselves."""
    monkeypatch.syspath_prepend(str(FOLDER))


def started(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str | Path) -> None:
    """A benchmark, in this process."""
    monkeypatch.setattr(sys, "argv", [str(FOLDER / f"{name}.py"), *map(str, arguments)])
    importlib.import_module(name).main()


def about(world: World) -> list[str | Path]:
    return ["--model", world.model, "--text", world.text, "--layer", "1", "--context", "32"]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.slow
def test_saes_are_scored_beside_their_floor(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import score

    def child(asked: Any, folder: str, *what: str) -> Any:
        options = [*about(world), "--tokens", asked.tokens, "--rounds", asked.rounds]
        started(monkeypatch, "score", *options, *what, "--answer", tmp_path / "answer.json")
        return read(tmp_path / "answer.json")

    monkeypatch.setattr(score, "_child", child)
    monkeypatch.setattr(score, "L0S", (16, 24))
    sizes = ["--tokens", "400", "--rounds", "1", "--widths", "64"]
    started(monkeypatch, "score", *about(world), *sizes, "--out", tmp_path)
    content = read(tmp_path / "score.json")
    assert [row["SAEs"] for row in content["rows"]] == ["4 of 64", "8 of 64"]
    for row in content["rows"]:
        assert row["each, s"] > 0 and row["floor, s"] > 0
        assert row["each / floor"] == pytest.approx(row["each, s"] / row["floor, s"])
        assert 400 <= row["tokens"] <= 400 + 32 and row["peak memory, MB"] > 50


def test_random_saes_of_every_architecture_have_the_asked_l0():
    import score

    x = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0)) + 1
    for l0 in (2, 5):
        for name, sae in score._architectures(x, 64, l0).items():
            assert (sae.encode(x) != 0).sum() / len(x) == pytest.approx(l0, rel=0.02), name


@pytest.mark.slow
def test_a_learning_rate_is_chosen_and_what_is_finished_is_kept(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sizes = [
        "--tokens",
        "1280",
        "--eval-tokens",
        "600",
        "--batch",
        "64",
        "--width",
        "40",
        "--passes",
        "100",
    ]
    sweep = ["--seeds", "0", "1", "--lrs", "1e-6", "1e-2", "--variants", "topk"]
    places = ["--work", tmp_path / "work", "--out", tmp_path / "out"]
    everything = [*about(world), *sizes, *sweep, *places]
    started(monkeypatch, "quality", *everything)
    content = read(tmp_path / "out" / "quality.json")
    best = {"8": 0.01, "16": 0.01, "32": 0.01}
    assert content["learning rates"]["ours"] == {"topk": best}, "one that learns nothing loses"
    assert [(row["wanted L0"], row["verdict"]) for row in content["rows"]] == [
        (l0, "no peer") for l0 in (8, 8, 16, 16, 32, 32)
    ]
    # Of the k latents that are kept, some are not positive after twenty steps.
    assert [row["L0"] for row in content["rows"][:4]] == pytest.approx([8, 8, 16, 16], rel=0.2)
    assert str(world.model) not in (tmp_path / "out" / "quality.json").read_text()
    trained = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("sae.safetensors")}
    assert len(trained) == 6 + 6
    started(monkeypatch, "quality", *everything)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("sae.safetensors")} == trained
    assert read(tmp_path / "out" / "quality.json")["rows"] == content["rows"]


def point(l0: float, value: float):
    import quality

    column = stats.Column(np.full(20, value), np.ones(20))
    return quality.Point(l0, dict.fromkeys(quality.METRICS, column))


def value(columns) -> float | None:
    return None if columns is None else stats.value(*columns["explained_variance"])


def test_a_peer_is_read_off_in_a_line_over_the_logarithm_of_l0():
    import quality

    points = [point(32, 0.9), point(8, 0.5), point(100, 0.95)]
    assert value(quality._between(points, 16)) == pytest.approx(0.7)  # half way from ln 8 to ln 32
    assert value(quality._between(points, 8)) == pytest.approx(0.5)
    assert value(quality._between(points, 32)) == pytest.approx(0.9)


@pytest.mark.parametrize(("l0", "found"), [(7.5, 0.5), (4, None), (34, 0.9), (40, None)])
def test_a_peer_that_has_no_run_at_that_l0_is_not_made_up(l0: float, found: float | None):
    import quality

    assert value(quality._between([point(8, 0.5), point(32, 0.9)], l0)) == pytest.approx(found)


def test_a_peer_without_a_living_latent_has_no_number():
    import quality

    assert quality._between([point(0, 0.1)], 8) is None


def test_a_verdict_follows_the_interval_of_the_difference():
    import quality

    rng = np.random.default_rng(0)
    den = rng.uniform(1, 2, 200)
    num = den * rng.uniform(0.5, 0.6, 200)
    ours, worse = stats.Column(num, den), stats.Column(num - 0.1 * den, den)
    assert quality._compared(ours, worse)["verdict"] == "better"
    assert quality._compared(worse, ours)["verdict"] == "worse"
    assert quality._compared(ours, ours)["verdict"] == "equal"
    assert quality._compared(ours, worse)["difference"] == pytest.approx(0.1)


def test_works_are_timed_in_turn():
    import _common

    order: list[str] = []
    works = {"floor": lambda: order.append("floor"), "score": lambda: order.append("score")}
    seconds = _common.in_turn(works, rounds=2, warmup=1)
    assert order == ["floor", "score"] * 3
    assert {name: len(spent) for name, spent in seconds.items()} == {"floor": 2, "score": 2}


def test_a_table_has_the_keys_of_its_rows_as_columns():
    import _common

    rows = [{"name": "a", "seconds": 1.23456, "n": 12345, "none": None}, {"name": "b", "n": 1}]
    lines = _common.table(rows).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["name", "seconds", "n", "none"]
    assert cells[2:] == [["a", "1.23", "12,345", ""], ["b", "", "1", ""]]


def test_a_command_is_noted_without_the_paths_of_its_machine(monkeypatch: pytest.MonkeyPatch):
    import _common

    monkeypatch.setattr(sys, "argv", ["/x/benchmarks/score.py", "--model", "/x/y/model", "--wide"])
    assert _common.command() == "python benchmarks/score.py --model model --wide"


def test_the_memory_of_this_process_is_counted_in_bytes():
    import _common

    held = np.ones(30_000_000)
    assert held.nbytes < _common.peak_memory() < math.inf


def test_saes_are_measured_again_on_parts_and_with_other_splits(
    world: World, run: Run, write_suite: WriteSuite, place: Place, monkeypatch: pytest.MonkeyPatch
):
    rows = [f"{word * 3} {i},{i % 2}" for i, word in enumerate(["ab", "cd"] * 60)]
    (place.folder / "letters.csv").write_text("prompt,target\n" + "\n".join(rows))
    sizes = {"train": 40, "validation": 20, "test": 20, "k": [1, 5]}
    probing = {"sparse_probing": {"datasets": [{"files": "letters.csv"}], **sizes}}
    path = write_suite(evals=["sparsity", "reconstruction", probing], controls=[])
    assert run(path).code == 0
    folders = ["--checkpoints", place.checkpoints, "--work", place.folder / "work"]
    counts = ["--parts", "2", "--seeds", "2", "--out", place.folder]
    started(monkeypatch, "reseed", path, *folders, *counts)
    rows_of = {row["metric"]: row for row in read(place.folder / "reseed_suite.json")["rows"]}
    # One SAE and one pair of parts. A single dataset has no interval.
    assert rows_of["explained_variance"]["differences"] == 1
    assert rows_of["explained_variance"]["sd"] > 0 and rows_of["explained_variance"]["stated"] > 0
    assert "probe_auc_k1" not in rows_of
