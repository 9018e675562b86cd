"""`saebench run` from a suite file to reports: whole, repeated, stopped, disturbed and extended."""

import errno
import fnmatch
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import save

from saebench import cli, registry, results, runner, suite, trainer
from saebench.evals.sparsity import Sparsity
from saebench.saes.relu import ReLU
from saebench.suite import Plugin
from saebench.types import SAE, Facts, Metric, Score, Seen, Site, StreamEval, Tally
from tests.conftest import EVALS, VARIANTS, Finished, Place, Run, World, WriteSuite

TRAINED = [f"{variant}-w32-l4-s0" for variant in VARIANTS]
REFERENCES = ["identity", "pca-4", "pca-full"]
CONTROLS = ["random-w32-l4", "permuted_decoder-w32-l4"]

# Runs the command line, saves often, and dies at the n-th call of something.
DYING = """\
import os, signal, sys, torch
from saebench import cli, runner, trainer

signal_name, where, number = sys.argv.pop(1).split(":")
left = int(number)

def dying(function):
    def until(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), getattr(signal, signal_name))
        return function(*args, **kwargs)
    return until

class Clock:
    now = 0
    def monotonic(self):
        self.now += 1
        return self.now

torch.set_num_threads(1)
trainer.time, trainer.SECONDS_BETWEEN_SAVES, runner.GROUP = Clock(), 5, 1
if where == "learn":
    trainer._Pupil.learn = dying(trainer._Pupil.learn)
elif where == "update":
    runner._Scoring.update = dying(runner._Scoring.update)
else:
    os.fsync = dying(os.fsync)
sys.exit(cli.main())
"""


def start_dying(place: Place, suite_file: Path, end: str) -> subprocess.CompletedProcess[str]:
    script = place.folder / "dying.py"
    script.write_text(DYING)
    return subprocess.run(
        [sys.executable, script, end, *place.arguments(suite_file)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(cli.__file__).parents[1])},
        timeout=600,
    )


def leftovers(place: Place) -> list[str]:
    """What nobody needs once everything is done."""
    names = ("*.partial", "*.part", "training.pt")
    return [str(path) for name in names for path in place.folder.rglob(name)]


def values(place: Place, metric: str) -> dict[str, float]:
    scores = results.read(place.results()).scores
    rows = scores[scores["metric"] == metric]
    return dict(zip(rows["sae"], rows["value"], strict=True))


# The whole way


def test_a_run_leaves_results_reports_and_nothing_unfinished(finished: Finished):
    assert finished.code == 0
    found = {path.name for path in finished.place.results().iterdir()}
    reports = {f"leaderboard.{ending}" for ending in ("md", "csv", "tex")} | {"separation.csv"}
    reports |= {f"pareto_l0_loss_recovered.{ending}" for ending in ("pdf", "svg", "png")}
    assert found == {"suite.json", "runs", ".lock", ".reports"} | reports
    assert leftovers(finished.place) == []


def test_every_sae_has_every_eval_and_controls_are_marked(finished: Finished):
    read = results.read(finished.place.results())
    assert read.missing == read.stale == []
    pairs = set(zip(read.scores["sae"], read.scores["eval"], strict=True))
    everyone = TRAINED + CONTROLS + REFERENCES
    assert pairs == {(sae, name) for sae in everyone for name in EVALS}
    kinds = read.scores.groupby("kind")["sae"].unique().apply(set).to_dict()
    marked = {"trained": TRAINED, "control": CONTROLS, "reference": REFERENCES}
    assert kinds == {kind: set(names) for kind, names in marked.items()}
    board = (finished.place.results() / "leaderboard.md").read_text()
    for kind, names in marked.items():
        for name in names:
            assert (f"| {name} *({kind})*" in board) == (kind != "trained")
            assert f"| {name} " in board


def test_the_identity_loses_nothing(finished: Finished):
    for metric in ("loss_recovered", "explained_variance"):
        assert values(finished.place, metric)["identity"] == pytest.approx(1, abs=1e-6)


def test_trained_saes_beat_the_controls_that_have_learned_nothing(finished: Finished):
    explained = values(finished.place, "explained_variance")
    assert min(explained[name] for name in TRAINED) > explained["random-w32-l4"]
    assert min(explained[name] for name in TRAINED) > explained["permuted_decoder-w32-l4"]


def test_a_second_run_changes_no_file(finished: Finished, run: Run):
    before = finished.place.files("results", "checkpoints", "cache")
    assert run(finished.suite, at=finished.place).code == 0
    assert finished.place.files("results", "checkpoints", "cache") == before


def test_without_the_cache_the_scores_are_the_same(
    finished: Finished, run: Run, saebench: Run, place: Place
):
    shutil.copytree(finished.place.checkpoints, place.checkpoints)
    assert run(finished.plain, "--no-cache").code == 0
    assert not (place.folder / "cache").exists()
    assert place.scores() == finished.place.scores()


def test_no_path_of_this_machine_is_in_any_result(finished: Finished):
    for path in [
        *finished.place.results().rglob("*.json"),
        *finished.place.checkpoints.rglob("*.json"),
    ]:
        assert str(finished.place.folder.parent) not in path.read_text()


# Stopping in the middle


def test_a_run_killed_again_and_again_ends_as_if_undisturbed(finished: Finished, place: Place):
    # After the saves of two steps, while the third of five SAEs learns from the 30th of 50.
    ended = start_dying(place, finished.plain, "SIGKILL:learn:148")
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert len(list(place.checkpoints.glob("*/training.pt"))) == len(VARIANTS)
    assert place.weights() == {}
    # Between SAEs that are scored.
    ended = start_dying(place, finished.plain, "SIGKILL:update:7")
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert "continuing at step 27 of 50" in ended.stderr
    assert place.weights() == finished.place.weights()
    assert 0 < len(place.scores()) < len(finished.place.scores())
    # The command that a user has.
    ended = subprocess.run(
        [Path(sys.executable).with_name("saebench"), *place.arguments(finished.plain)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("Leaderboard: tiny")
    assert "Traceback" not in ended.stderr
    assert place.weights() == finished.place.weights()
    assert place.scores() == finished.place.scores()
    assert leftovers(place) == []


def every_variant() -> list[dict[str, Any]]:
    """An entry for each; transcoders and what starts from another SAE have what they need."""
    places = {"reads": "1.mlp_in", "predicts": "1.mlp_out"}
    entries = []
    for name in registry.names("variants"):
        variant = registry.get("variants", name)
        entry = {"variant": name, "width": 32, "l0": 4, "lr": 0.01}
        entry |= places if variant.target == "other" else {}
        entry |= {"of": "relu"} if variant.from_parent else {}
        entries.append(entry)
    return entries


@pytest.mark.slow
def test_every_variant_is_killed_and_continued_to_the_same_bits(
    run: Run, write_suite: WriteSuite, place: Place
):
    suite_file = write_suite(saes=every_variant(), evals=["sparsity"], controls=[], reports=[])
    assert run(suite_file).code == 0
    undisturbed = place.weights()
    assert len(undisturbed) == len(registry.names("variants"))
    shutil.rmtree(place.checkpoints)
    # In the first stage, where all but `rescaled` learn side by side, and in its own.
    first = len(undisturbed) - 1
    for number in (first * 30 + 3, first * 25 + 10):
        ended = start_dying(place, suite_file, f"SIGKILL:learn:{number}")
        assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert run(suite_file).code == 0
    assert place.weights() == undisturbed
    assert leftovers(place) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3, 100, 6))
def test_a_run_killed_while_it_writes_anything_ends_as_if_undisturbed(
    finished: Finished, run: Run, place: Place, number: int
):
    assert start_dying(place, finished.plain, f"SIGKILL:fsync:{number}").returncode < 0
    assert run(finished.plain).code == 0
    assert place.weights() == finished.place.weights()
    assert place.scores() == finished.place.scores()
    assert leftovers(place) == []


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ctrl-C at this step of training, with the state saved after the first."""
    learn = trainer._Pupil.learn

    def interrupted(self: trainer._Pupil, batch: dict[Site, torch.Tensor]) -> None:
        if self.step == step:
            # What Python makes of Ctrl-C; a real signal is lost where a parent ignores SIGINT.
            raise KeyboardInterrupt
        learn(self, batch)

    monkeypatch.setattr(trainer, "SECONDS_BETWEEN_SAVES", -1.0)
    monkeypatch.setattr(trainer._Pupil, "learn", interrupted)


def test_a_stopped_run_says_in_one_line_that_it_goes_on_and_does(
    finished: Finished,
    run: Run,
    write_suite: WriteSuite,
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
):
    with monkeypatch.context() as patch:
        stop_at(patch, 10)
        ended = run(write_suite())
    assert ended.code == 130
    assert ended.err == "saebench: stopped; the same command goes on from here\n"
    ended = run(write_suite())
    assert ended.code == 0
    assert "continuing at step " in ended.err
    assert place.weights().items() <= finished.place.weights().items()


@pytest.mark.parametrize("damaged", [b"", b"not a state", None], ids=["empty", "other", "half"])
def test_a_damaged_training_state_is_named_and_can_be_deleted(
    finished: Finished,
    run: Run,
    write_suite: WriteSuite,
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    damaged: bytes | None,
):
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert run(write_suite()).code == 130
    (state,) = place.checkpoints.glob("*/training.pt")
    content = state.read_bytes()
    state.write_bytes(content[: len(content) // 2] if damaged is None else damaged)
    ended = run(write_suite())
    assert ended.code == 2
    assert ended.err.startswith(f"saebench: {state} is damaged")
    assert "delete it" in ended.err
    state.unlink()
    assert run(write_suite()).code == 0
    assert place.weights().items() <= finished.place.weights().items()


# What one SAE has to do with another


def test_an_sae_is_the_same_whoever_is_trained_beside_it(
    finished: Finished, run: Run, write_suite: WriteSuite, place: Place
):
    assert run(write_suite()).code == 0
    (alone,) = place.weights().items()
    assert alone in finished.place.weights().items()
    topk = {file: s for file, s in place.scores().items() if file.startswith("topk")}
    assert len(topk) == len(EVALS)
    assert topk.items() <= finished.place.scores().items()


def test_an_sae_more_changes_no_byte_of_the_others(
    run: Run, write_suite: WriteSuite, place: Place, definition: dict[str, Any]
):
    assert run(write_suite()).code == 0
    before = place.files("results/tiny/runs", "checkpoints")
    more = [*definition["saes"], {"variant": "relu", "width": 32, "l0": 4}]
    assert run(write_suite(saes=more)).code == 0
    after = place.files("results/tiny/runs", "checkpoints")
    assert before.items() < after.items()
    assert {Path(name).name.partition("--")[0] for name in after.keys() - before.keys()} == {
        "relu-w32-l4-s0",
        "sae.json",
        "sae.safetensors",
    }


def test_groups_that_memory_allows_change_no_weight(
    finished: Finished,
    run: Run,
    write_suite: WriteSuite,
    place: Place,
    definition: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(trainer, "memory_for_training", lambda device: 1.0)
    relu = definition["saes"][0] | {"variant": "relu"}
    ended = run(write_suite(saes=[relu, *definition["saes"]]))
    assert "training 1 SAE (group 2 of 2)" in ended.err
    assert len(place.weights()) == 2
    assert place.weights().items() <= finished.place.weights().items()


def test_a_part_and_then_the_whole_is_the_whole(finished: Finished, run: Run, place: Place):
    ended = run(finished.plain, "--only", "*topk*")
    assert ended.code == 0
    assert "left out by --only, not trained yet and not in the tables: 3 SAEs" in ended.err
    assert len(place.weights()) == 2
    scored = {file.partition("--")[0] for file in place.scores()}
    assert scored == {"topk-w32-l4-s0", "batch_topk-w32-l4-s0"}
    assert "runs are not done yet" in (place.results() / "leaderboard.md").read_text()
    assert run(finished.plain).code == 0
    assert place.weights() == finished.place.weights()
    # The parent of the permuted decoder was another one then; its files are kept and not shown.
    assert finished.place.scores().items() <= place.scores().items()
    board = (finished.place.results() / "leaderboard.csv").read_text()
    assert (place.results() / "leaderboard.csv").read_text() == board


def test_a_suite_that_was_edited_shows_nothing_of_what_it_was(
    run: Run, saebench: Run, write_suite: WriteSuite, place: Place, definition: dict[str, Any]
):
    assert run(write_suite()).code == 0
    before = place.files("results/tiny/runs")
    text = definition["text"] | {"eval_tokens": 500}
    ended = run(write_suite(text=text))
    assert ended.code == 0
    assert before.items() < place.files("results/tiny/runs").items()
    note = f"{len(before) // 2} result files of an earlier state of this suite are kept in runs/"
    for shown in (
        ended.out,
        saebench("report", place.results()).out,
        (place.results() / "leaderboard.md").read_text(),
    ):
        assert note in shown
    scores = pd.read_csv(place.results() / "leaderboard.csv")
    assert not scores.duplicated(["sae", "metric"]).any()
    assert set(scores["file"]).isdisjoint(Path(name).name for name in before)
    assert run(write_suite()).code == 0
    assert before.items() < place.files("results/tiny/runs").items()


# Checkpoints


def test_a_checkpoint_scores_as_the_sae_that_it_is(
    finished: Finished, run: Run, write_suite: WriteSuite, place: Place
):
    (folder,) = finished.place.checkpoints.glob("jumprelu*")
    shutil.copytree(folder, place.folder / "beside" / "mine")
    mine = {"checkpoint": "beside/mine", "format": "native", "name": "mine"}
    assert run(write_suite(saes=[mine])).code == 0
    scored = [run_[1] for file, run_ in place.scores().items() if file.startswith("mine--")]
    asked = [r[1] for file, r in finished.place.scores().items() if file.startswith("jumprelu")]
    assert len(scored) == len(EVALS)
    assert sorted(scored, key=str) == sorted(asked, key=str)
    board = (place.results() / "leaderboard.md").read_text()
    assert "| mine " in board
    assert str(place.folder) not in (place.results() / "suite.json").read_text()


def write_transcoder(folder: Path, d: int, b_dec: torch.Tensor) -> None:
    """Without latents that fire: it predicts b_dec, whatever it reads."""
    sae = ReLU(d, 8, d)
    sae.b_enc.fill_(-1.0)
    sae.b_dec.copy_(b_dec)
    content = save(dict(sae.state_dict()))
    folder.mkdir()
    (folder / "sae.safetensors").write_bytes(content)
    record = {
        "format": 2,
        "architecture": "relu",
        "arguments": sae.arguments(),
        "site": {"stream": "mlp_in", "layer": 1},
        "target": {"stream": "mlp_out", "layer": 1},
        "checksum": hashlib.sha256(content).hexdigest(),
    }
    (folder / "sae.json").write_text(json.dumps(record))


def test_a_transcoder_is_scored_by_replacing_what_it_predicts(
    run: Run, write_suite: WriteSuite, place: Place
):
    write_transcoder(place.folder / "nothing", 16, torch.zeros(16))
    given = {"checkpoint": "nothing", "format": "native", "name": "nothing"}
    transcoder = {"variant": "transcoder", "width": 32, "l0": 4, "lr": 0.01}
    transcoder |= {"reads": "1.mlp_in", "predicts": "1.mlp_out"}
    skipping = transcoder | {"variant": "skip_transcoder"}
    evals = ["reconstruction", "fidelity", "geometry", "shrinkage"]
    assert run(write_suite(saes=[transcoder, skipping, given], evals=evals)).code == 0
    explained = values(place, "explained_variance")
    # Predicting zeros is zero ablation of the MLP's output, to the bit.
    assert values(place, "ce_loss_sae")["nothing"] == values(place, "ce_loss_zero")["nothing"]
    assert explained["nothing"] <= 0  # zeros explain less than the mean does
    for name in ("transcoder-w32-l4-s0", "skip_transcoder-w32-l4-s0"):
        assert explained[name] > 0.2
    assert explained["skip_transcoder-w32-l4-s0"] > explained["transcoder-w32-l4-s0"]
    assert "transcoder-w32-l4-s0" not in values(place, "encoder_decoder_cosine")
    board = (place.results() / "leaderboard.md").read_text()
    assert "1.mlp_in to 1.mlp_out" in board


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("nowhere", "expected the path of a checkpoint"),
        (".", "has no sae.json"),
    ],
)
def test_a_checkpoint_that_is_none_is_refused_before_training(
    run: Run,
    write_suite: WriteSuite,
    place: Place,
    definition: dict[str, Any],
    checkpoint: str,
    message: str,
):
    mine = {"checkpoint": checkpoint, "format": "native", "name": "mine"}
    ended = run(write_suite(saes=[*definition["saes"], mine]))
    assert ended.code == 2
    assert message in ended.err
    assert place.files("results", "checkpoints") == {}


def test_a_checkpoint_of_another_site_is_refused(
    finished: Finished, run: Run, write_suite: WriteSuite
):
    (folder,) = finished.place.checkpoints.glob("jumprelu*")
    mine = {"checkpoint": str(folder), "format": "native", "name": "mine"}
    ended = run(write_suite(saes=[mine], sites=[{"layer": 0, "stream": "resid_post"}]))
    assert ended.code == 2
    assert "mine was trained at 1.resid_post; the suite looks at 0.resid_post" in ended.err


def test_a_checkpoint_of_another_width_is_refused(
    finished: Finished, run: Run, write_suite: WriteSuite, place: Place
):
    (folder,) = finished.place.checkpoints.glob("jumprelu*")
    mine = place.folder / "mine"
    shutil.copytree(folder, mine)
    record = json.loads((mine / "sae.json").read_text())
    record["site"] = record["target"] = {"stream": "mlp_hidden", "layer": 1}
    (mine / "sae.json").write_text(json.dumps(record))
    given = {"checkpoint": "mine", "format": "native", "name": "mine"}
    ended = run(write_suite(saes=[given], sites=[{"layer": 1, "stream": "mlp_hidden"}]))
    assert ended.code == 2
    assert "16 dimensions; those at 1.mlp_hidden of model have 24" in ended.err


def test_a_checkpoint_named_like_a_control_is_refused(
    finished: Finished, run: Run, write_suite: WriteSuite, place: Place
):
    (folder,) = finished.place.checkpoints.glob("jumprelu*")
    mine = {"checkpoint": str(folder), "format": "native", "name": "identity"}
    ended = run(write_suite(saes=[mine]))
    assert ended.code == 2
    assert "two SAEs of the suite would be called 'identity'" in ended.err


def test_damaged_weights_are_noticed_by_their_checksum(
    run: Run, write_suite: WriteSuite, place: Place
):
    path = write_suite()
    assert run(path).code == 0
    weights = place.weights()
    (file,) = place.checkpoints.glob("*/sae.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    shutil.rmtree(place.results())
    ended = run(path)
    assert ended.code == 2
    assert f"{file} is not the file that sae.json describes" in ended.err
    assert "Traceback" not in ended.err
    shutil.rmtree(file.parent)
    assert run(path).code == 0
    assert place.weights() == weights


@pytest.mark.parametrize("damaged", ["{", "[]", "{}"])
def test_a_damaged_record_of_an_sae_is_named(
    run: Run, write_suite: WriteSuite, place: Place, damaged: str
):
    path = write_suite()
    assert run(path).code == 0
    (record,) = place.checkpoints.glob("*/sae.json")
    record.write_text(damaged)
    ended = run(path)
    assert ended.code == 2
    assert f"{record} is damaged" in ended.err


@pytest.mark.parametrize(
    "damaged",
    [
        "{",
        "[]",
        "{}",
        '{"suite": "tiny", "definition": {}, "saes": [], "runs": []}',
        '{"suite": "tiny", "definition": {}, "saes": {}, "runs": 5}',
        '{"suite": "tiny", "definition": [], "saes": {}, "runs": []}',
        '{"suite": "tiny", "definition": {}, "saes": {}, "runs": ["../x.json"]}',
    ],
)
def test_a_damaged_manifest_is_named(saebench: Run, finished: Finished, place: Place, damaged: str):
    shutil.copytree(finished.place.results(), place.results())
    manifest = place.results() / "suite.json"
    manifest.write_text(damaged)
    ended = saebench("report", place.results())
    assert (ended.code, ended.out) == (2, "")
    assert str(manifest) in ended.err
    assert "Traceback" not in ended.err


def test_the_next_run_mends_a_damaged_manifest(run: Run, write_suite: WriteSuite, place: Place):
    path = write_suite()
    assert run(path).code == 0
    whole = place.files("results")
    (place.results() / "suite.json").write_text("{")
    assert run(path).code == 0
    mended = place.files("results")
    assert mended.pop("results/tiny/suite.json")[0] == whole.pop("results/tiny/suite.json")[0]
    assert mended == whole


# Disturbed


class FullDisk(io.FileIO):
    """Takes half of what is written first, then no more."""

    def write(self, data: Any) -> int:
        super().write(bytes(data)[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")


def fill_disk(monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    """For files whose name matches."""
    open_ = Path.open

    def open_full(self: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if mode == "wb" and fnmatch.fnmatchcase(self.name, pattern):
            return FullDisk(self, "wb")
        return open_(self, mode, *args, **options)

    monkeypatch.setattr(Path, "open", open_full)


FULL = {
    "the training state": ".training.pt.*",
    "the weights": ".sae.safetensors.*",
    "the record of an SAE": ".sae.json.*",
    "the manifest": ".suite.json.*",
    "the units of a run": ".*.units.parquet.*",
    "a run": ".*--fidelity--*.json.*",
    "a report": ".leaderboard.csv.*",
}


@pytest.mark.parametrize("pattern", FULL.values(), ids=FULL)
def test_a_full_disk_is_named_and_the_same_command_goes_on(
    finished: Finished,
    run: Run,
    write_suite: WriteSuite,
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    pattern: str,
):
    monkeypatch.setattr(trainer, "SECONDS_BETWEEN_SAVES", -1.0)
    path = write_suite()
    with monkeypatch.context() as patch:
        fill_disk(patch, pattern)
        ended = run(path)
    assert ended.code == 2
    assert "the disk is full" in ended.err
    assert "run the same command again" in ended.err
    assert "Traceback" not in ended.err
    assert list(place.folder.rglob("*.partial")) == []
    assert run(path).code == 0
    assert place.weights().items() <= finished.place.weights().items()
    assert place.scores().items() <= finished.place.scores().items()
    assert len(place.scores()) == 2 * len(EVALS)


def test_a_disk_without_room_for_the_cache_only_costs_time(
    finished: Finished,
    run: Run,
    write_suite: WriteSuite,
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
):
    fill_disk(monkeypatch, "*.part")
    assert run(write_suite()).code == 0
    assert place.files("cache") == {}
    assert len(place.scores()) == 2 * len(EVALS)
    assert place.scores().items() <= finished.place.scores().items()


def test_results_that_another_run_writes_are_left_alone(
    run: Run, write_suite: WriteSuite, place: Place
):
    with results.lock(place.results()):
        ended = run(write_suite())
    assert ended.code == 2
    assert "another run is writing these results" in ended.err
    assert set(place.files("results", "checkpoints")) == {"results/tiny/.lock"}
    assert run(write_suite()).code == 0


@pytest.mark.slow
def test_two_suites_do_not_write_to_the_same_results_at_once(
    finished: Finished, run: Run, write_suite: WriteSuite, place: Place
):
    """The first is stopped in the middle, not killed: it holds its lock and its files."""
    script = place.folder / "dying.py"
    script.write_text(DYING)
    first = subprocess.Popen(
        [sys.executable, script, "SIGSTOP:learn:40", *place.arguments(finished.plain)],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        _, status = os.waitpid(first.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        other = write_suite(saes=[{"variant": "relu", "width": 64, "l0": 8}])
        assert run(other).code == 2
        first.send_signal(signal.SIGCONT)
        assert first.wait(timeout=300) == 0
    finally:
        first.kill()
        first.wait()
    assert place.scores() == finished.place.scores()
    assert run(other).code == 0


def test_results_that_cannot_be_written_are_named(run: Run, write_suite: WriteSuite, place: Place):
    (place.folder / "results").write_text("a file, not a folder")
    ended = run(write_suite())
    assert ended.code == 2
    assert f"{place.results()} cannot be written" in ended.err


def test_one_sae_that_fails_leaves_the_others_finished(
    finished: Finished,
    run: Run,
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    shutil.copytree(finished.place.checkpoints, place.checkpoints)
    start = Sparsity.start

    def fragile(self: Sparsity, sae: SAE, facts: Facts) -> Tally:
        if type(sae).__name__ == "TopK":
            raise ZeroDivisionError("a defect of the eval")
        return start(self, sae, facts)

    with monkeypatch.context() as patch:
        patch.setattr(Sparsity, "start", fragile)
        ended = run(finished.plain)
    assert ended.code == 1
    assert "scoring topk-w32-l4-s0 failed" in caplog.text
    assert "ZeroDivisionError: a defect of the eval" in caplog.text
    # The permuted decoder was made of a TopK or of another SAE.
    kept = {file.partition("--")[0] for file in place.scores()}
    assert "topk-w32-l4-s0" not in kept
    assert {"relu-w32-l4-s0", "batch_topk-w32-l4-s0", "identity"} <= kept
    assert "runs are not done yet" in (place.results() / "leaderboard.md").read_text()
    assert run(finished.plain).code == 0
    assert place.scores() == finished.place.scores()


def test_a_failure_of_every_sae_is_a_failure_of_runs(
    run: Run, write_suite: WriteSuite, monkeypatch: pytest.MonkeyPatch
):
    def broken(self: Sparsity, sae: SAE, facts: Facts) -> Tally:
        raise ZeroDivisionError("a defect of the eval")

    monkeypatch.setattr(Sparsity, "start", broken)
    ended = run(write_suite())
    assert ended.code == 1
    assert f"{2 * len(EVALS)} runs failed" in ended.err


# One eval in two ways


@dataclass(frozen=True)
class Above(StreamEval):
    """Share of tokens with at least k active latents."""

    k: int

    version: ClassVar = 1
    metrics: ClassVar = (Metric("share_above", None, "dataset", "tokens with k latents or more"),)

    def start(self, sae: SAE, facts: Facts) -> Tally:
        return _AboveTally(self.k)


class _AboveTally:
    def __init__(self, k: int) -> None:
        self.k, self.found, self.n = k, 0, 0

    def update(self, seen: Seen) -> None:
        counts = seen.code.offsets.diff()
        self.found += int((counts >= self.k).sum())
        self.n += len(counts)

    def scores(self) -> list[Score]:
        return [
            Score("share_above", np.array([float(self.found)]), np.array([float(self.n)]), self.n)
        ]


def test_an_eval_with_two_parameters_gives_two_scores(write_suite: WriteSuite, place: Place):
    path = write_suite(controls=[])
    loaded = suite.load(path)
    evals = [Plugin("above", Above(1)), Plugin("above", Above(5))]
    asked = loaded.model_copy(update={"evals": evals, "reports": []})
    folders = (place.folder / "results", place.checkpoints, place.folder / "cache")
    assert runner.run(asked, path, runner.Options(*folders, "cpu", None, False)) == 0
    scores = results.read(place.results()).scores
    assert dict(zip(scores["params"], scores["value"], strict=True)) == {"k=1": 1.0, "k=5": 0.0}


# What cannot be run


def text_of(definition: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"text": definition["text"] | changes}


def test_a_layer_that_the_model_does_not_have(run: Run, write_suite: WriteSuite, place: Place):
    ended = run(write_suite(sites=[{"layer": 3, "stream": "resid_post"}]))
    assert (ended.code, ended.out) == (2, "")
    assert "layer 3: LlamaForCausalLM has layers 0 to 2" in ended.err
    assert place.files("results", "checkpoints") == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 65}, "takes at most 64 tokens; lower it"),
        ({"context": 1}, "context 1: a row needs at least 2 tokens"),
        ({"train_tokens": 10**6}, "the text ends too early"),
        ({"eval_tokens": 10**6}, "the text ends too early"),
        ({"files": "nothing*.jsonl"}, "no file matches 'nothing*.jsonl'"),
        ({"field": "body"}, "text.jsonl:1: no field 'body'; there are: text"),
    ],
    ids=lambda value: str(next(iter(value.items()))) if isinstance(value, dict) else "",
)
def test_text_that_does_not_fit(
    run: Run,
    write_suite: WriteSuite,
    definition: dict[str, Any],
    place: Place,
    changes: dict[str, Any],
    message: str,
):
    ended = run(write_suite(**text_of(definition, **changes)))
    assert (ended.code, ended.out) == (2, "")
    assert message in ended.err
    assert ended.err.startswith("saebench: ")
    assert "Traceback" not in ended.err
    assert place.files("results", "checkpoints") == {}


@pytest.mark.parametrize("given", ["no/such-model-of-anybody", "./nowhere", "nowhere"])
def test_a_model_that_is_not_there_says_what_to_do_offline(
    run: Run, write_suite: WriteSuite, place: Place, monkeypatch: pytest.MonkeyPatch, given: str
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ended = run(write_suite(model={"id": given}))
    assert (ended.code, ended.out) == (2, "")
    for part in (repr(given), "HF_HUB_OFFLINE=1", "folder", "builtin:pylm"):
        assert part in ended.err
    assert "Traceback" not in ended.err
    assert place.files("results", "checkpoints") == {}


def test_folders_are_meant_from_the_suite_file(
    world: World,
    run: Run,
    write_suite: WriteSuite,
    definition: dict[str, Any],
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
):
    shutil.copytree(world.model, place.folder / "beside")
    shutil.copy(world.text, place.folder / "beside.jsonl")
    elsewhere = place.folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    path = write_suite(model={"id": "beside"}, **text_of(definition, files="beside.jsonl"))
    assert run(path).code == 0
    assert list(elsewhere.iterdir()) == []
    recorded = yaml.safe_load((place.results() / "suite.json").read_text())["definition"]
    assert recorded["model"]["id"] == "beside"


def test_a_control_without_a_parent_is_refused_before_training(
    run: Run, write_suite: WriteSuite, place: Place
):
    ended = run(write_suite(controls=[{"permuted_decoder": {"of": "relu"}}]))
    assert ended.code == 2
    assert "trains none of the variant 'relu'" in ended.err
    assert place.weights() == {}


def test_weights_that_are_not_finite_are_refused(run: Run, write_suite: WriteSuite, place: Place):
    ended = run(write_suite(saes=[{"variant": "topk", "width": 32, "l0": 4, "lr": 1e38}]))
    assert ended.code == 2
    assert "lower its lr" in ended.err
    assert place.weights() == {}


def test_an_sae_that_diverges_leaves_the_others_trained(
    finished: Finished, run: Run, write_suite: WriteSuite, place: Place
):
    shape = {"width": 32, "l0": 4}
    good = {"variant": "relu", **shape, "lr": 0.01}
    bad = {"variant": "topk", **shape, "lr": 1e38}
    of_bad, of_good = ({"variant": "rescaled", **shape, "of": of} for of in ("topk", "relu"))
    ended = run(write_suite(saes=[bad, good, of_bad]))
    assert ended.code == 2
    assert "training topk-w32-l4-s0 led to weights that are not finite; lower its lr" in ended.err
    assert "has weights that are not finite at step 50 of 50 and learns no more" in ended.err
    assert len(place.weights()) == 1
    assert place.weights().items() <= finished.place.weights().items()
    before = place.files("checkpoints")
    assert run(write_suite(saes=[bad | {"lr": 0.01}, good, of_good])).code == 0
    assert place.files("checkpoints").items() > before.items()


# Reports and kept files


def test_reports_that_a_stop_left_behind_are_made_by_the_next_run(
    run: Run, write_suite: WriteSuite, place: Place, monkeypatch: pytest.MonkeyPatch
):
    assert run(write_suite()).code == 0
    wider = write_suite(saes=[{"variant": "topk", "width": 32, "l0": [4, 8], "lr": 0.01}])
    with monkeypatch.context() as patch:
        patch.setattr(runner, "write_reports", interrupted)
        assert run(wider).code == 130
    board = place.results() / "leaderboard.md"
    assert "topk-w32-l8-s0" not in board.read_text()
    assert run(wider).code == 0
    assert "topk-w32-l8-s0" in board.read_text()


def interrupted(*_arguments: object) -> None:
    raise KeyboardInterrupt


def test_units_that_were_deleted_are_measured_again(
    run: Run, write_suite: WriteSuite, place: Place
):
    suite_file = write_suite()
    assert run(suite_file).code == 0
    before = place.files("results")
    (lost,) = place.results().glob("runs/topk*--reconstruction--*.units.parquet")
    lost.unlink()
    assert run(suite_file).code == 0
    assert lost.read_bytes() == before[str(lost.relative_to(place.folder))][0]


def test_a_text_without_a_position_to_score_skips_fidelity_and_keeps_the_rest(
    run: Run, write_suite: WriteSuite, definition: dict[str, Any], place: Place
):
    assert run(write_suite(text=definition["text"] | {"context": 2})).code == 0
    read = results.read(place.results())
    assert set(read.skips["eval"]) == {"fidelity"}
    assert "no position" in read.skips["reason"].iloc[0]
    assert {"explained_variance", "shrinkage", "encoder_decoder_cosine"} <= set(
        read.scores["metric"]
    )


@pytest.mark.parametrize("option", ["--checkpoints", "--cache", "--results"])
def test_a_folder_that_cannot_be_made_is_named(
    run: Run, write_suite: WriteSuite, place: Place, option: str
):
    (place.folder / "file").write_text("in the way")
    ended = run(write_suite(), option, str(place.folder / "file" / "below"))
    assert ended.code == 2
    assert "file/below" in ended.err and "cannot be written" in ended.err
    assert "Traceback" not in ended.err


def test_a_report_of_a_metric_that_nobody_measures_is_refused_before_training(
    run: Run, write_suite: WriteSuite, place: Place
):
    ended = run(write_suite(reports=[{"pareto": {"x": "l0", "y": "loss_recoverd"}}]))
    assert ended.code == 2
    assert "loss_recoverd" in ended.err and "'loss_recovered'" in ended.err
    assert not place.checkpoints.exists()
