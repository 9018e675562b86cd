"""Evals that bring their own text, and the controls that are trained or relabelled, through the whole pipeline."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch

from saebench import lab, results, runner, suite
from saebench.cache import Cache
from saebench.lab import ModelLab
from saebench.loaders._native import read_native
from saebench.subject import LanguageModel, load_model
from saebench.suite import Plugin
from saebench.text import Files, tokenize
from saebench.types import SAE, Excerpt, Lab, Metric, Omitted, Score, Site, Skip, TextEval
from tests import toys
from tests.conftest import Place, Run, World, WriteSuite

SITE = Site("resid_post", 1)


def lab_of(world: World, cache: Path | None) -> ModelLab:
    loaded = load_model(str(world.model), None, "float32", "cpu")
    source = Files(world.text.name, world.text.parent, "text")
    tokens = tokenize(source, loaded.tokenizer, 16, 200, 100, 0.5)
    subject = LanguageModel(loaded.model, tokens, loaded.identity, Cache(cache), 4)
    return ModelLab(subject, loaded.tokenizer, world.text.parent)


def excerpts(*lengths: int) -> list[Excerpt]:
    rng = np.random.default_rng(0)
    return [
        Excerpt(rng.integers(3, 259, size=n), np.unique(np.array([0, n // 2, n - 1])))
        for n in lengths
    ]


# Activations of excerpts


@pytest.fixture(params=["kept", "not kept"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path if request.param == "kept" else None


def test_an_excerpt_has_the_activations_that_it_has_alone(world: World, cache: Path | None):
    found, given = lab_of(world, cache), excerpts(2, 5, 5, 17, 40)
    x = found.activations(SITE, given)
    alone = [
        found.subject.read([SITE], torch.from_numpy(e.ids)[None])[SITE][
            0, torch.from_numpy(e.wanted)
        ]
        for e in given
    ]
    torch.testing.assert_close(x, torch.cat(alone), atol=1e-5, rtol=1e-4)


def test_activations_are_read_once_and_kept(world: World, tmp_path: Path, monkeypatch: Any):
    given = excerpts(3, 4)
    first = lab_of(world, tmp_path).activations(SITE, given)
    later = lab_of(world, tmp_path)
    monkeypatch.setattr(later.subject, "read", toys.never)
    assert torch.equal(later.activations(SITE, given), first)


def test_other_positions_and_other_tokens_are_other_activations(world: World, tmp_path: Path):
    found, (given,) = lab_of(world, tmp_path), excerpts(6)
    moved = given._replace(wanted=np.array([1, 2, 3]))
    changed = given._replace(ids=given.ids[::-1].copy())
    three = [found.activations(SITE, [e]) for e in (given, moved, changed)]
    assert not torch.equal(three[0], three[1]) and not torch.equal(three[0], three[2])


def test_batches_hold_so_many_tokens_filled_up_and_lose_no_excerpt():
    given = excerpts(2, 3, 3, 9, 1, 30)
    batches = list(lab._batches(given, 12))
    assert [len(e.ids) for batch in batches for e in batch] == [2, 3, 3, 9, 1, 30]
    filled = [len(batch) * max(len(e.ids) for e in batch) for batch in batches]
    assert all(n <= 12 for n in filled[:-1]) and len(batches) == 4


def test_no_excerpt_gives_no_activation(world: World):
    assert lab_of(world, None).activations(SITE, []).shape == (0, 16)


def test_what_was_computed_is_kept_for_the_same_spec(world: World, tmp_path: Path):
    found = lab_of(world, tmp_path)
    one = {"x": torch.tensor([1.0])}
    assert torch.equal(found.kept({"of": "a"}, lambda: one)["x"], one["x"])
    assert torch.equal(found.kept({"of": "a"}, toys.never)["x"], one["x"])
    two = {"x": torch.tensor([2.0])}
    assert torch.equal(found.kept({"of": "b"}, lambda: two)["x"], two["x"])


def test_an_excerpt_is_no_longer_than_the_model_has_positions_for(world: World):
    assert lab_of(world, None).longest == 64


# An eval with its own text in a suite


class Letters(NamedTuple):
    fingerprint: str
    excerpts: list[Excerpt]
    y: np.ndarray


@dataclass(frozen=True)
class Active(TextEval):
    """Share of latents that are active in some excerpt; labels as a test can see them."""

    n: int

    version: ClassVar = 1
    metrics: ClassVar = (Metric("share_active", "max", "dataset", "of latents"),)

    def read(self, lab: Lab) -> Letters:
        calls.append(f"read {self.n}")
        return Letters(f"letters {self.n}", excerpts(*range(4, 4 + self.n)), np.arange(self.n))

    def prepare(self, lab: Lab, reading: Letters, site: Site) -> torch.Tensor:
        calls.append(f"prepare {self.n} {lab.identity['id']} {site}")
        return lab.activations(site, reading.excerpts).float()

    def scores(self, sae: SAE, prepared: Any, shuffled: bool) -> Sequence[Score | Omitted]:
        if self.n == 13:
            raise Skip("unlucky")
        if self.n == 17 and not shuffled:
            raise ZeroDivisionError("a defect of the eval")
        fired = sae.encode(prepared).ne(0).any(0).double().mean()
        num = np.array([float(fired), 1.0, float(shuffled)])
        names = ["a", "b", "c"]
        score = Score("share_active", num, np.ones(3), 3, ids=names, clusters=["s", "s", "t"])
        return [score, Omitted("letter q", "it is rare")]


calls: list[str] = []


def run_with(place: Place, path: Path, *evals: TextEval) -> int:
    calls.clear()
    asked = suite.load(path).model_copy(
        update={"evals": [Plugin("active", e) for e in evals], "reports": []}
    )
    folders = (place.folder / "results", place.checkpoints, place.folder / "cache")
    return runner.run(asked, path, runner.Options(*folders, "cpu", None, False))


@pytest.fixture
def suite_file(write_suite: WriteSuite) -> Path:
    saes = [{"variant": v, "width": 32, "l0": 4, "lr": 0.01} for v in ("topk", "relu")]
    return write_suite(saes=saes, controls=["untrained_lm"], reports=[])


def test_the_own_text_is_read_once_and_seen_once_by_each_model(place: Place, suite_file: Path):
    assert run_with(place, suite_file, Active(3)) == 0
    (read, *prepared) = calls
    assert read == "read 3"
    assert [c.split()[2].partition(":")[0] for c in prepared] == ["model", "untrained"]
    frame = results.read(place.results()).scores.set_index("sae")
    assert set(frame.index) == {"topk-w32-l4-s0", "relu-w32-l4-s0", "untrained_lm-w32-l4"}
    assert run_with(place, suite_file, Active(3)) == 0
    assert calls == ["read 3"]


def test_its_fingerprint_its_clusters_and_what_it_leaves_out_are_in_the_file(
    place: Place, suite_file: Path
):
    assert run_with(place, suite_file, Active(3)) == 0
    found = results.read(place.results())
    (path,) = place.results().glob("runs/topk*.json")
    run = json.loads(path.read_text())
    assert run["spec"]["text"] == {"fingerprint": "letters 3"}
    assert run["omitted"] == [{"what": "letter q", "reason": "it is rare"}]
    assert set(found.omitted["what"]) == {"letter q"} and len(found.omitted) == 3
    units = results.units(found, "share_active")["topk-w32-l4-s0"]
    assert list(units.ids) == ["a", "b", "c"] and list(units.clusters) == ["s", "s", "t"]
    column = results.column(units, "ratio")
    assert list(column.den) == [2.0, 1.0] and column.num[1] == 0.0


def test_a_skip_and_a_failure_leave_the_other_evals_alone(place: Place, suite_file: Path):
    assert run_with(place, suite_file, Active(3), Active(13), Active(17)) == 3
    found = results.read(place.results())
    assert set(found.scores["params"]) == {"n=3"} and set(found.skips["params"]) == {"n=13"}
    assert set(found.skips["reason"]) == {"unlucky"} and len(found.missing) == 3


# Controls that are trained, and one with other labels


def test_shuffled_labels_are_scored_by_evals_with_labels_alone(
    place: Place, write_suite: WriteSuite
):
    saes = [{"variant": "topk", "width": 32, "l0": 4, "lr": 0.01}]
    path = write_suite(saes=saes, controls=[], reports=[])
    evals = [Plugin("active", Active(3)), *suite.load(path).evals]
    controls = [suite.plugin("controls", "shuffled_labels")]
    loaded = suite.load(path).model_copy(update={"evals": evals, "controls": controls})
    folders = (place.folder / "results", place.checkpoints, None)
    assert runner.run(loaded, path, runner.Options(*folders, "cpu", None, False)) == 0
    scores = results.read(place.results()).scores
    assert set(scores[scores["sae"] == "shuffled_labels-w32-l4"]["eval"]) == {"active"}
    found = results.units(results.read(place.results()), "share_active")
    assert {sae: units.num[2] for sae, units in found.items()} == {
        "topk-w32-l4-s0": 0.0,
        "shuffled_labels-w32-l4": 1.0,
    }


def test_shuffled_labels_without_an_eval_that_has_labels_are_refused(
    run: Run, write_suite: WriteSuite, place: Place
):
    ended = run(write_suite(controls=["shuffled_labels"]))
    assert ended.code == 2 and "shuffled_labels" in ended.err and "sparse_probing" in ended.err
    assert not place.checkpoints.exists()


def checkpoint(place: Place, name: str) -> Any:
    (folder,) = place.checkpoints.glob(f"{name}--*")
    return read_native(folder).sae, json.loads((folder / "sae.json").read_text())


def test_a_frozen_decoder_is_the_random_start_and_its_encoder_is_trained(
    run: Run, write_suite: WriteSuite, place: Place
):
    saes = [
        {"variant": "tied", "width": 32, "l0": 4, "lr": 0.01},
        {"variant": "relu", "width": 32, "l0": 4, "lr": 0.01},
    ]
    assert run(write_suite(saes=saes, controls=["frozen_decoder"])).code == 0
    frozen, record = checkpoint(place, "frozen_decoder-w32-l4")
    assert record["training"]["variant"] == "relu" and record["training"]["frozen_decoder"] is True
    start = suite.recipe("relu", {}).start(toys.task(d_in=16))
    torch.testing.assert_close(frozen.W_dec, start.decoder.detach(), atol=1e-7, rtol=0)
    directions = torch.nn.functional.normalize(frozen.W_enc.T, dim=-1)
    assert (directions - frozen.W_dec).abs().max() > 0.05
    free, _ = checkpoint(place, "relu-w32-l4-s0")
    assert (free.W_dec - start.decoder).abs().max() > 0.05


def test_what_cannot_be_frozen_is_refused(run: Run, write_suite: WriteSuite, place: Place):
    saes = [{"variant": "tied", "width": 32, "l0": 4, "lr": 0.01}]
    ended = run(write_suite(saes=saes, controls=["frozen_decoder"]))
    assert ended.code == 2 and "frozen_decoder has no parent" in ended.err
    assert place.weights() == {}


def test_the_control_without_a_trained_model_learns_and_is_scored_on_random_weights(
    run: Run, write_suite: WriteSuite, place: Place
):
    saes = [{"variant": "topk", "width": 32, "l0": 4, "lr": 0.01}]
    assert run(write_suite(saes=saes, controls=["untrained_lm"])).code == 0
    _, record = checkpoint(place, "untrained_lm-w32-l4")
    assert record["training"]["model"]["id"] == "untrained:model"
    (path,) = place.results().glob("runs/untrained_lm*--reconstruction--*.json")
    assert json.loads(path.read_text())["spec"]["model"]["id"] == "untrained:model"
    found = results.read(place.results())
    assert "untrained_lm-w32-l4" in set(found.scores["sae"])
    # What a model loses says nothing of one that predicts nothing.
    assert list(zip(found.skips["sae"], found.skips["eval"], strict=True)) == [
        ("untrained_lm-w32-l4", "fidelity")
    ]


def test_controls_that_are_trained_move_no_weight_of_the_others(
    run: Run, write_suite: WriteSuite, place: Place
):
    saes = [{"variant": "topk", "width": 32, "l0": 4, "lr": 0.01}]
    assert run(write_suite(saes=saes, controls=[])).code == 0
    ((name, before),) = place.weights().items()
    for folder in place.checkpoints.iterdir():
        for file in folder.iterdir():
            file.unlink()
    assert run(write_suite(saes=saes, controls=["frozen_decoder", "untrained_lm"])).code == 0
    assert place.weights()[name] == before and len(place.weights()) == 3


def test_what_is_resampled_is_the_document_not_the_sequences_cut_from_it(
    run: Run, write_suite: WriteSuite, place: Place, definition: Any
):
    """Texts of some 250 bytes in rows of 32 tokens: sequences of one text are one cluster."""
    assert run(write_suite(evals=["reconstruction", "geometry"])).code == 0
    found = results.read(place.results())
    units = results.units(found, "explained_variance")["topk-w32-l4-s0"]
    sizes = np.unique(units.clusters, return_counts=True)[1]
    assert len(units.num) == sizes.sum() and sizes.max() > 1
    assert len(results.column(units, "ratio").num) == len(sizes)
    # Latents are no sequences, and each stands for itself.
    assert results.units(found, "max_decoder_cosine")["topk-w32-l4-s0"].clusters is None
