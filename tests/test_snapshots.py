"""SAEs kept as they were half way: what they are, and that keeping them changes nothing."""

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from saebench import registry, results, runner, suite, trainer
from saebench.errors import UserError
from saebench.loaders._native import read_native
from saebench.runner import Options, Workbench, to_train, with_parents
from saebench.trainer import TrainRun
from saebench.types import Site
from tests.conftest import Ended, Place, WriteSuite

BATCH, STEPS = 64, 10
TRAINED_CONTROLS = ["frozen_decoder", "untrained_lm"]


def every_variant() -> list[dict[str, Any]]:
    """An entry for each; transcoders and what starts from another SAE have what they need."""
    entries = []
    for name in registry.names("variants"):
        variant = registry.get("variants", name)
        places = {"reads": "1.mlp_in", "predicts": "1.mlp_out"}
        entry = {"variant": name, "width": 32, "l0": 4, "lr": 0.01}
        entry |= places if variant.target == "other" else {}
        entry |= {"of": "relu"} if variant.from_parent else {}
        entries.append(entry)
    return entries


Open = Callable[..., Workbench]


@pytest.fixture
def bench(write_suite: WriteSuite, definition: dict[str, Any], tmp_path: Path) -> Open:
    """A workbench of 10 steps of 64 tokens, with snapshots at these token counts."""

    def opened(snapshots: Sequence[int], folder: str = "one", **changes: Any) -> Workbench:
        training = {"batch_tokens": BATCH, "buffer_tokens": 4 * BATCH, "snapshots": [*snapshots]}
        text = definition["text"] | {"train_tokens": STEPS * BATCH}
        file = write_suite(**{"text": text, "training": training} | changes)
        place = tmp_path / folder
        options = Options(place / "results", place / "checkpoints", None, "cpu", None, False)
        return Workbench(suite.load(file), file, options)

    return opened


def runs(bench: Workbench) -> list[TrainRun]:
    return with_parents(to_train(bench.train_runs(), bench.controls()))


def train(bench: Workbench) -> dict[str, bytes]:
    """The finished weights of every SAE."""
    bench.train(runs(bench))
    folders = {run.sae.name: run.folder(bench.options.checkpoints) for run in runs(bench)}
    return {name: (folder / "sae.safetensors").read_bytes() for name, folder in folders.items()}


def kept(bench: Workbench) -> dict[tuple[str, str], bytes]:
    """The weights of every snapshot, by its SAE and its number of tokens."""
    found = bench.options.checkpoints.glob("*/snapshots/*/sae.json")
    return {
        (path.parents[2].name, path.parent.name): path.with_name("sae.safetensors").read_bytes()
        for path in found
    }


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "sae.json").read_text())
    return found


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, save: bool = True) -> None:
    """Ctrl-C before this step of training, with the state saved after every step before it."""
    learn = trainer._Pupil.learn

    def interrupted(self: trainer._Pupil, batch: dict[Site, torch.Tensor]) -> None:
        if self.step == step:
            raise KeyboardInterrupt
        learn(self, batch)
        if save:
            self.save()

    monkeypatch.setattr(trainer._Pupil, "learn", interrupted)


def stopped_at(monkeypatch: pytest.MonkeyPatch, bench: Workbench, step: int) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, step)
        train(bench)


def learned_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that are learned from now on."""
    seen: list[int] = []
    learn = trainer._Pupil.learn

    def noted(self: trainer._Pupil, batch: dict[Site, torch.Tensor]) -> None:
        seen.append(self.step)
        learn(self, batch)

    monkeypatch.setattr(trainer._Pupil, "learn", noted)
    return seen


# What a snapshot is


def test_snapshots_change_no_bit_of_what_any_variant_or_control_becomes(bench: Open):
    whole: dict[str, Any] = {"saes": every_variant(), "controls": TRAINED_CONTROLS}
    without = train(bench([], "without", **whole))
    given = bench([1, 300, 640], "with", **whole)
    assert train(given) == without
    n_variants = len(registry.names("variants"))
    assert len(without) > n_variants + 1  # with a control of each kind at least
    assert len(kept(given)) == 3 * len(without)


def test_a_snapshot_is_the_sae_after_the_first_step_that_reaches_its_tokens(
    bench: Open, monkeypatch: pytest.MonkeyPatch
):
    """Of every variant: the training half way, exported, on scaled activations."""
    half_way: dict[str, tuple[Any, Any, Any]] = {}
    learn = trainer._Pupil.learn

    def noted(self: trainer._Pupil, batch: dict[Site, torch.Tensor]) -> None:
        learn(self, batch)
        if self.step == 5:  # 256 tokens are too few, 320 are more than 300
            scaling = self.stream.statistics()
            sites = (self.run.sae.site, self.run.sae.target)
            state = copy.deepcopy(self.training)
            half_way[self.run.sae.name] = (state, *(scaling[site] for site in sites))

    monkeypatch.setattr(trainer._Pupil, "learn", noted)
    given = bench([300], saes=every_variant())
    train(given)
    for run in given.train_runs():
        folder = run.snapshot(given.options.checkpoints, 300)
        assert record(folder)["tokens_seen"] == 320
        assert record(folder)["training"] == json.loads(json.dumps(run.spec()))
        training, read, predicted = half_way.pop(run.sae.name)
        with torch.no_grad():
            expected, found = training.export(), read_native(folder).sae
            u = torch.randn(50, expected.d_in, generator=torch.Generator().manual_seed(0))
            y = expected.decode(expected.encode(u))
            x = u * read.scale + read.mean
            y_raw = found.decode(found.encode(x))
            if expected.W_skip is not None:
                y, y_raw = y + expected.beside(u), y_raw + found.beside(x)
        torch.testing.assert_close(
            y_raw, y * predicted.scale + predicted.mean, rtol=1e-4, atol=2e-4
        )
    assert half_way == {}


def test_the_last_snapshot_is_the_finished_sae_even_where_the_last_tokens_fill_no_batch(
    bench: Open, definition: dict[str, Any]
):
    tokens = STEPS * BATCH + 30
    given = bench([64, tokens], text=definition["text"] | {"train_tokens": tokens})
    (finished,) = train(given).values()
    (run,) = runs(given)
    places = [run.snapshot(given.options.checkpoints, n) for n in (64, tokens)]
    first, last = ((place / "sae.safetensors").read_bytes() for place in places)
    assert last == finished != first
    assert [record(place)["tokens_seen"] for place in places] == [64, STEPS * BATCH]


def test_snapshots_are_no_part_of_what_names_an_sae_or_of_the_suites_record(bench: Open):
    (with_,), (without,) = (bench(n).train_runs() for n in ([64], []))
    assert with_ == without
    assert bench([64]).suite.definition() == bench([]).suite.definition()


def test_what_starts_from_another_sae_has_snapshots_of_its_own_training(bench: Open):
    saes = [e for e in every_variant() if e["variant"] in ("relu", "rescaled")]
    given = bench([128], saes=saes)
    train(given)
    child = next(run for run in given.train_runs() if run.parent is not None)
    assert child.parent is not None
    mine = record(child.snapshot(given.options.checkpoints, 128))
    parents = record(child.parent.snapshot(given.options.checkpoints, 128))
    assert (mine["training"]["variant"], parents["training"]["variant"]) == ("rescaled", "relu")
    assert mine["training"]["parent"] == results.key(child.parent.spec())
    assert mine["checksum"] != parents["checksum"]


def test_weights_that_are_not_finite_are_never_kept(bench: Open):
    given = bench([128], saes=[{"variant": "relu", "width": 32, "l0": 4, "lr": 1e38}])
    with pytest.raises(UserError, match="not finite; lower its lr"):
        train(given)
    assert kept(given) == {}


def test_what_has_diverged_learns_no_more_and_the_others_go_on(
    bench: Open, monkeypatch: pytest.MonkeyPatch
):
    """It shows where the first snapshot is due, or the state is saved."""
    bad = {"variant": "relu", "width": 32, "l0": 4, "lr": 1e38}
    good = {"variant": "topk", "width": 32, "l0": 4}
    alone = bench([128, 256], "alone", saes=[good])
    weights = train(alone)
    for snapshots, pause in (([128, 256], 1e9), ([], -1.0)):
        given = bench(snapshots, f"with {len(snapshots)} snapshots", saes=[bad, good])
        with monkeypatch.context() as patch, pytest.raises(UserError, match="training relu-w32-l4"):
            patch.setattr(trainer, "SECONDS_BETWEEN_SAVES", pause)
            seen = learned_steps(patch)
            train(given)
        assert STEPS < len(seen) < 2 * STEPS
        (done,) = (r for r in runs(given) if r.done(given.options.checkpoints))
        folder = done.folder(given.options.checkpoints)
        assert (folder / "sae.safetensors").read_bytes() == weights[done.sae.name]
        assert kept(given) == (kept(alone) if snapshots else {})


def test_nothing_is_read_for_saes_that_have_all_diverged(
    bench: Open, monkeypatch: pytest.MonkeyPatch
):
    given = bench([128], saes=[{"variant": "relu", "width": 32, "l0": 4, "lr": 1e38}])
    seen = learned_steps(monkeypatch)
    with pytest.raises(UserError, match="not finite"):
        train(given)
    assert seen == [0, 1]


# Stopped, and asked for later


@pytest.mark.parametrize("step", [2, 4, 9])
def test_a_stopped_training_goes_on_to_the_same_snapshots_and_weights(
    bench: Open, monkeypatch: pytest.MonkeyPatch, step: int
):
    saes = [{"variant": v, "width": 32, "l0": 4} for v in ("topk", "batch_topk", "jumprelu")]
    undisturbed = bench([128, 256, 640], "undisturbed", saes=saes)
    weights = train(undisturbed)
    stopped = bench([128, 256, 640], "stopped", saes=saes)
    stopped_at(monkeypatch, stopped, step)
    assert len(kept(stopped)) == 3 * (step >= 2) + 3 * (step >= 4)
    seen = learned_steps(monkeypatch)
    assert train(stopped) == weights
    assert min(seen) == step
    assert kept(stopped) == kept(undisturbed)
    assert not list(stopped.options.checkpoints.rglob("training.pt"))


def test_a_snapshot_that_was_half_written_is_written_by_the_next_run(
    bench: Open, monkeypatch: pytest.MonkeyPatch
):
    undisturbed = bench([128, 256], "undisturbed")
    weights = train(undisturbed)
    stopped, write = bench([128, 256], "stopped"), results.write_text_whole

    def killed(path: Path, text: str) -> bool:
        if path.parts[-3:] == ("snapshots", "256", "sae.json"):
            path.with_name(".sae.json.1.partial").write_text(text[:20])
            raise KeyboardInterrupt
        return write(path, text)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(results, "write_text_whole", killed)
        train(stopped)
    (run,) = runs(stopped)
    assert run.snapshots_missing(stopped.options.checkpoints, [128, 256]) == [256]
    assert train(stopped) == weights
    assert kept(stopped) == kept(undisturbed)
    assert not list(stopped.options.checkpoints.rglob("*.partial"))


def times(bench: Workbench) -> dict[Path, int]:
    """When each file of the finished SAEs was written."""
    found = bench.options.checkpoints.glob("*/sae.*")
    return {path: path.stat().st_mtime_ns for path in found}


def test_snapshots_that_are_asked_for_later_are_those_of_a_training_that_knew(
    bench: Open, capfd: pytest.CaptureFixture[str]
):
    knew = bench([128, 320], "knew", controls=TRAINED_CONTROLS)
    train(knew)
    later = bench([], controls=TRAINED_CONTROLS)
    train(later)
    before = times(later)
    capfd.readouterr()
    train(bench([128, 320], controls=TRAINED_CONTROLS))
    assert "trained again for their snapshots: " in capfd.readouterr().err
    assert kept(later) == kept(knew)
    assert times(later) == before
    assert not list(later.options.checkpoints.rglob("retraining"))


def test_nothing_is_trained_again_where_every_snapshot_is_there_or_none_is_wanted(
    bench: Open, monkeypatch: pytest.MonkeyPatch
):
    train(bench([128, 320]))
    seen = learned_steps(monkeypatch)
    for wanted in ([128, 320], [128], []):
        train(bench(wanted))
    assert seen == []
    train(bench([128, 320, 500]))
    assert seen == [*range(STEPS)]
    assert len(kept(bench([]))) == 3


def test_a_training_for_snapshots_that_is_stopped_goes_on(
    bench: Open, monkeypatch: pytest.MonkeyPatch
):
    knew = bench([128, 320], "knew")
    train(knew)
    train(bench([]))
    stopped = bench([128, 320])
    stopped_at(monkeypatch, stopped, 7)
    assert kept(stopped) == {}  # not before it is known to be the same SAE
    seen = learned_steps(monkeypatch)
    train(stopped)
    assert seen == [7, 8, 9]
    assert kept(stopped) == kept(knew)


def test_a_stopped_training_that_has_gone_past_a_new_snapshot_starts_anew(
    bench: Open, monkeypatch: pytest.MonkeyPatch
):
    knew = bench([128, 320], "knew")
    weights = train(knew)
    stopped_at(monkeypatch, bench([320]), 6)
    seen = learned_steps(monkeypatch)
    assert train(bench([128, 320])) == weights
    assert seen == [*range(STEPS)]
    assert kept(bench([])) == kept(knew)


def test_an_sae_that_becomes_another_one_is_left_as_it_is_without_snapshots(bench: Open):
    """As on another machine, whose sums are in another order."""
    first = bench([], saes=[{"variant": v, "width": 32, "l0": 4} for v in ("topk", "relu")])
    train(first)
    folders = {run.sae.variant: run.folder(first.options.checkpoints) for run in runs(first)}
    other = record(folders["topk"]) | {"checksum": "of other weights"}
    (folders["topk"] / "sae.json").write_text(json.dumps(other))
    before = times(first)
    again = bench([64], saes=[{"variant": v, "width": 32, "l0": 4} for v in ("topk", "relu")])
    with pytest.raises(UserError) as refused:
        train(again)
    said = str(refused.value)
    assert "topk-w32-l4-s0" in said and str(folders["topk"]) in said and "Delete" in said
    assert "relu-w32" not in said
    assert times(first) == before
    assert {name for name, _ in kept(again)} == {folders["relu"].name}
    assert not (folders["topk"] / "retraining").exists()


def test_a_plan_counts_what_is_trained_again_for_its_snapshots(
    saebench: Callable[..., Ended], write_suite: WriteSuite, place: Place
):
    def planned(snapshots: list[int]) -> str:
        training = {"batch_tokens": 64, "buffer_tokens": 1024, "snapshots": snapshots}
        return saebench(*place.arguments(write_suite(training=training)), "--dry-run").out

    assert saebench(*place.arguments(write_suite())).code == 0
    assert "to train: 0 of 1 SAE," in planned([])
    assert "to train: 1 of 1 SAE," in planned([640])


# As candidates


def test_snapshots_are_candidates_of_their_own_that_a_suite_does_not_score(bench: Open):
    given = bench([128, 640], controls=["identity", *TRAINED_CONTROLS])
    before = {run.sae.name: given.snapshots(run) for run in runs(given)}
    assert set(before) >= {"topk-w32-l4-s0"} and not any(before.values())
    train(given)
    candidates = {candidate.name: candidate for candidate in given.candidates()}
    for run in runs(given):
        own = candidates[run.sae.name]
        found = given.snapshots(run)
        assert [c.name for c in found] == [f"{own.name}-at-128", f"{own.name}-at-640"]
        assert not {c.name for c in found} & candidates.keys()
        places = [run.snapshot(given.options.checkpoints, n) for n in (128, 640)]
        assert [c.checksum for c in found] == [record(place)["checksum"] for place in places]
        assert found[0].checksum != own.checksum == found[1].checksum
        for candidate in found:
            shared = ("entry", "site", "target", "untrained_lm", "shuffled", "parents_codes")
            assert all(getattr(candidate, n) == getattr(own, n) for n in shared)
        first, last = (runner.weights_checksum(c.load()) for c in found)
        assert first != last == runner.weights_checksum(own.load())


def test_snapshots_that_are_not_there_are_no_candidates(bench: Open):
    train(bench([128]))
    more = bench([128, 256])
    (run,) = runs(more)
    assert [c.name for c in more.snapshots(run)] == ["topk-w32-l4-s0-at-128"]


def test_a_snapshots_damaged_record_is_named(bench: Open):
    given = bench([128])
    train(given)
    (run,) = runs(given)
    path = run.snapshot(given.options.checkpoints, 128) / "sae.json"
    path.write_text("{")
    with pytest.raises(UserError, match="damaged") as refused:
        given.snapshots(run)
    assert str(path) in str(refused.value)


# The suite


@pytest.mark.parametrize(
    ("snapshots", "said"),
    [
        ([0, 64], ["training.snapshots.0", "0", "greater than 0"]),
        ([-5], ["training.snapshots.0", "-5"]),
        ([128, 64], ["training.snapshots.1", "64 after 128", "ascend, such as [64, 128]"]),
        ([128, 128], ["training.snapshots.1", "128 after 128"]),
        ([64, 641], ["training.snapshots.1", "641", "at most train_tokens (640)"]),
        ([10, 64], ["training.snapshots.1", "10 and 64", "the same step of 64 tokens"]),
        (["many"], ["training.snapshots.0", "many"]),
        (64, ["training.snapshots", "64", "list"]),
    ],
)
def test_token_counts_that_make_no_sense_are_refused(bench: Open, snapshots: Any, said: list[str]):
    with pytest.raises(UserError) as refused:
        bench(
            [],
            training={"batch_tokens": 64, "buffer_tokens": 128, "snapshots": snapshots},
        )
    assert all(part in str(refused.value) for part in said), str(refused.value)


def test_two_snapshots_in_what_is_left_beside_whole_batches_are_refused(
    bench: Open, definition: dict[str, Any]
):
    text = definition["text"] | {"train_tokens": 670}
    with pytest.raises(UserError, match="630 and 670, which the same step"):
        bench([630, 670], text=text)


def test_a_checkpoint_called_as_a_snapshot_is_refused(bench: Open, definition: dict[str, Any]):
    other = {"checkpoint": "somewhere", "name": "topk-w32-l4-s0-at-64"}
    with pytest.raises(UserError, match="both called 'topk-w32-l4-s0-at-64'"):
        bench([64], saes=[*definition["saes"], other])
