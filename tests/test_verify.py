"""Submissions that are verified: alone, against the suite, against the checkpoint."""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.torch import load_file, save_file

from saebench import bundle, cli, results, runner
from saebench.stats import intervals, value
from tests.conftest import EVALS, Place, Run, World, whole_definition
from tests.test_bundle import repacked, unpacked


class Submitted(NamedTuple):
    place: Place
    suite: Path
    checkpoint: Path
    bundle: Path

    def arguments(self) -> list[str]:
        return ["--cache", str(self.place.folder / "cache"), "--device", "cpu"]


def changed_weights(source: Path, out: Path, factor: float) -> Path:
    """The same SAE with a decoder of another length, as a checkpoint of this project."""
    shutil.copytree(source, out)
    weights = load_file(out / "sae.safetensors")
    weights["W_dec"] = weights["W_dec"] * factor
    save_file(weights, out / "sae.safetensors")
    record = json.loads((out / "sae.json").read_text())
    record["checksum"] = hashlib.sha256((out / "sae.safetensors").read_bytes()).hexdigest()
    (out / "sae.json").write_text(json.dumps(record))
    return out


@pytest.fixture(scope="module")
def submitted(world: World, tmp_path_factory: pytest.TempPathFactory) -> Submitted:
    """A checkpoint that was submitted, with a bundle of it, to a suite of three SAEs."""
    place = Place(tmp_path_factory.mktemp("submitted"))
    definition = whole_definition(world) | {
        "saes": [{"variant": "topk", "width": 32, "l0": [2, 4, 8], "lr": 0.01}],
        "controls": ["random"],
        "evals": EVALS,
        "reports": ["leaderboard"],
    }
    suite = place.folder / "suite.yaml"
    suite.write_text(yaml.safe_dump(definition), encoding="utf-8")
    folders = [p for n in ("results", "checkpoints", "cache") for p in (f"--{n}", place.folder / n)]
    out = place.folder / "mine.zip"

    def command(*arguments: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["saebench", *map(str, arguments), "--device", "cpu"])
            assert cli.main() == 0

    command("run", suite, *folders)
    trained = next(place.checkpoints.glob("topk-w32-l4-*"))
    mine = changed_weights(trained, place.folder / "mine", 0.97)
    command("submit", mine, "--suite", suite, "--name", "mine", "--bundle", out, *folders)
    return Submitted(place, suite, mine, out)


Changed = Callable[[dict[str, bytes]], None]


@pytest.fixture
def tampered(submitted: Submitted, tmp_path: Path) -> Callable[[Changed], Path]:
    """A bundle whose content was changed, with the checksums that go with it."""

    def write(change: Changed) -> Path:
        members = unpacked(submitted.bundle)
        change(members)
        return repacked(members, tmp_path / "tampered.zip")

    return write


def run_of(members: dict[str, bytes], eval_name: str) -> str:
    return next(n for n in members if f"--{eval_name}--" in n and n.endswith(".json"))


def rewritten(
    members: dict[str, bytes], eval_name: str, change: Callable[[dict[str, list[Any]]], None]
) -> None:
    """Changes units of a run, and computes the values and intervals that follow from them."""
    file = run_of(members, eval_name)
    units = file.replace(".json", ".units.parquet")
    columns = pq.read_table(pa.BufferReader(members[units])).to_pydict()
    change(columns)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    members[units] = bytes(sink.getvalue())
    run = json.loads(members[file])
    for score in run["scores"]:
        here = [i for i, metric in enumerate(columns["metric"]) if metric == score["metric"]]
        num, den = (np.array([columns[part][i] for i in here]) for part in ("num", "den"))
        ids = np.array([columns["unit"][i] for i in here])
        clusters = [columns["cluster"][i] for i in here] if "cluster" in columns else [None]
        named = None if None in clusters else np.array(clusters)
        found = results.Units(ids, num, den, named)
        (ends,) = intervals([results.column(found, score["statistic"])])
        score["value"] = value(num, den, score["statistic"])
        score["ci_low"], score["ci_high"] = ends or (None, None)
        score["n_units"] = len(here)
    members[file] = json.dumps(run).encode()


def refused(saebench: Run, submitted: Submitted, path: Path, *options: str | Path) -> str:
    ended = saebench("verify", path, "--suite", submitted.suite, *submitted.arguments(), *options)
    assert ended.code == 2
    return ended.out + ended.err


# What is as it should be


def test_a_bundle_alone_is_verified_and_what_was_not_looked_at_is_named(
    saebench: Run, submitted: Submitted
):
    ended = saebench("verify", submitted.bundle)
    assert ended.code == 0
    assert "5 runs" in ended.out
    assert "- the suite (--suite)\n- the units themselves" in ended.out


def test_a_bundle_is_verified_against_its_suite(saebench: Run, submitted: Submitted):
    ended = saebench("verify", submitted.bundle, "--suite", submitted.suite, *submitted.arguments())
    assert ended.code == 0
    assert "definition, model, text and evals are those of tiny here" in ended.out
    assert "- the units themselves (--checkpoint)" in ended.out


def test_units_of_a_sample_are_scored_again(
    saebench: Run, submitted: Submitted, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(runner, "rows_per_batch", lambda model, context: 2)
    options = ["--checkpoint", submitted.checkpoint, "--sample", "2", "--seed", "3"]
    ended = saebench(
        "verify", submitted.bundle, "--suite", submitted.suite, *submitted.arguments(), *options
    )
    assert ended.code == 0, ended.out
    assert "all sequences: what is the same for every SAE" in ended.out
    chance = "one changed sequence is found with a chance of 10 %"
    assert f"2 of 20 sequences (--seed 3): {chance}" in ended.out
    assert "- density: it needs all sequences (--all)" in ended.out
    assert "- what the SAE does in the other 18 sequences (--all)" in ended.out


def test_all_units_are_the_same_when_all_are_scored_again(saebench: Run, submitted: Submitted):
    options = ["--checkpoint", submitted.checkpoint, "--all"]
    ended = saebench(
        "verify", submitted.bundle, "--suite", submitted.suite, *submitted.arguments(), *options
    )
    assert ended.code == 0, ended.out
    assert "not checked" not in ended.out
    assert "all 20 sequences" in ended.out
    # Every metric of the five evals: 4 + 3 + 9 + 4 + 5.
    assert "25 metrics scored again; the largest relative difference is 0" in ended.out


def test_a_sample_of_all_is_a_mistake(saebench: Run, submitted: Submitted):
    ended = saebench("verify", submitted.bundle, "--all", "--sample", "3")
    assert ended.code == 2
    assert "--all is every sequence, and --sample 3 some" in ended.err


def test_a_seed_is_drawn_anew_each_time(
    saebench: Run, submitted: Submitted, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(runner, "rows_per_batch", lambda model, context: 2)
    options = ["--suite", submitted.suite, "--checkpoint", submitted.checkpoint, "--sample", "1"]
    arguments = ["verify", submitted.bundle, *options, *submitted.arguments()]
    first, second = (saebench(*arguments).out for _ in range(2))
    assert (
        first.partition("--seed ")[2].split(")")[0] != second.partition("--seed ")[2].split(")")[0]
    )


# What is not


def test_a_changed_unit_whose_value_fits_it_is_found_by_scoring_again(
    saebench: Run, submitted: Submitted, tampered: Callable[[Changed], Path]
):
    def better(columns: dict[str, list[Any]]) -> None:
        columns["num"][columns["metric"].index("kl_divergence")] = 0.0

    path = tampered(lambda members: rewritten(members, "fidelity", better))
    assert bundle.inspect(path).problems == ()
    message = refused(saebench, submitted, path, "--checkpoint", submitted.checkpoint, "--all")
    assert "kl_divergence, sequence 0: given" in message


def test_a_changed_rate_of_a_latent_is_found_when_all_are_scored_again(
    saebench: Run, submitted: Submitted, tampered: Callable[[Changed], Path]
):
    def swapped(columns: dict[str, list[Any]]) -> None:
        here = [i for i, metric in enumerate(columns["metric"]) if metric == "density"]
        least, most = (end(here, key=lambda i: columns["num"][i]) for end in (min, max))
        num = columns["num"]
        num[least], num[most] = num[most], num[least]
        for metric in ("dead_fraction", "dense_fraction"):
            a, b = (columns["metric"].index(metric) + i - here[0] for i in (least, most))
            num[a], num[b] = num[b], num[a]

    path = tampered(lambda members: rewritten(members, "sparsity", swapped))
    assert bundle.inspect(path).problems == ()
    message = refused(saebench, submitted, path, "--checkpoint", submitted.checkpoint, "--all")
    assert "density, latent" in message


def test_a_unit_that_does_not_agree_with_others_is_found_in_the_bundle_alone(
    saebench: Run, tampered: Callable[[Changed], Path]
):
    def perfect(columns: dict[str, list[Any]]) -> None:
        at = columns["metric"].index("explained_variance")
        columns["num"][at] = columns["den"][at] = 1e6

    ended = saebench("verify", tampered(lambda m: rewritten(m, "reconstruction", perfect)))
    assert ended.code == 2
    assert "den - num of explained_variance = num of mse: this does not hold" in ended.out


def test_a_variance_that_the_text_does_not_have_is_found_without_the_checkpoint(
    saebench: Run, submitted: Submitted, tampered: Callable[[Changed], Path]
):
    def heavier(columns: dict[str, list[Any]]) -> None:
        at = columns["metric"].index("explained_variance")
        columns["num"][at] += 1e6
        columns["den"][at] += 1e6

    def as_heavy(columns: dict[str, list[Any]]) -> None:
        columns["den"][columns["metric"].index("rescale_gain")] += 1e6

    def both(members: dict[str, bytes]) -> None:
        rewritten(members, "reconstruction", heavier)
        rewritten(members, "shrinkage", as_heavy)

    path = tampered(both)
    assert bundle.inspect(path).problems == ()
    assert "den of explained_variance, sequence 0: given 1001839" in refused(
        saebench, submitted, path
    )


def test_an_error_that_no_reconstruction_has_is_found_without_the_checkpoint(
    saebench: Run, submitted: Submitted, tampered: Callable[[Changed], Path]
):
    def better(columns: dict[str, list[Any]]) -> None:
        num = columns["num"]
        variance, error = (columns["metric"].index(m) for m in ("explained_variance", "mse"))
        saved = 0.1 * num[error]
        num[variance] += saved
        num[error] -= saved

    path = tampered(lambda members: rewritten(members, "reconstruction", better))
    message = refused(saebench, submitted, path)
    assert "squared length of the activations (from mse and shrinkage), sequence 0" in message


def test_a_loss_of_the_ablated_model_is_found_without_the_checkpoint(
    saebench: Run, submitted: Submitted, tampered: Callable[[Changed], Path]
):
    def worse(columns: dict[str, list[Any]]) -> None:
        zero, share = (columns["metric"].index(m) for m in ("ce_loss_zero", "loss_recovered"))
        columns["num"][zero] += 1e3
        columns["num"][share] += 1e3
        columns["den"][share] += 1e3

    path = tampered(lambda members: rewritten(members, "fidelity", worse))
    assert bundle.inspect(path).problems == ()
    message = refused(saebench, submitted, path)
    assert "num of ce_loss_zero, sequence 0" in message
    assert "den of loss_recovered, sequence 0" in message


def test_a_metric_that_was_left_out_without_need_is_found_without_the_checkpoint(
    saebench: Run, submitted: Submitted, tampered: Callable[[Changed], Path]
):
    def without(members: dict[str, bytes]) -> None:
        file = run_of(members, "reconstruction")
        run = json.loads(members[file])
        run["scores"] = [score for score in run["scores"] if score["metric"] != "mse"]
        run["omitted"] = [{"what": "mse", "reason": "none"}]
        members[file] = json.dumps(run).encode()

        def fewer(columns: dict[str, list[Any]]) -> None:
            kept = [i for i, metric in enumerate(columns["metric"]) if metric != "mse"]
            for name, column in columns.items():
                columns[name] = [column[i] for i in kept]

        rewritten(members, "reconstruction", fewer)

    path = tampered(without)
    assert bundle.inspect(path).problems == ()
    assert "mse is left out, and every SAE has it" in refused(saebench, submitted, path)


def test_a_unit_that_was_left_out_is_found_without_the_checkpoint(
    saebench: Run, submitted: Submitted, tampered: Callable[[Changed], Path]
):
    def fewer(columns: dict[str, list[Any]]) -> None:
        metrics = columns["metric"]
        kept = [i for i in range(1, len(metrics)) if metrics[i] == metrics[i - 1]]
        for name, column in columns.items():
            columns[name] = [column[i] for i in kept]

    def without_the_first(members: dict[str, bytes]) -> None:
        file = run_of(members, "fidelity")
        units = pq.read_table(pa.BufferReader(members[file.replace(".json", ".units.parquet")]))
        lost = int(units.to_pydict()["den"][units.to_pydict()["metric"].index("ce_loss_clean")])
        run = json.loads(members[file])
        for score in run["scores"]:
            score["n"] -= lost
        members[file] = json.dumps(run).encode()
        rewritten(members, "fidelity", fewer)

    path = tampered(without_the_first)
    assert bundle.inspect(path).problems == ()
    assert "all of them count" in refused(saebench, submitted, path)


def test_tokens_that_a_sequence_does_not_have_are_found_without_the_checkpoint(
    saebench: Run, submitted: Submitted, tampered: Callable[[Changed], Path]
):
    def moved(columns: dict[str, list[Any]]) -> None:
        for metric in set(columns["metric"]) - {"loss_recovered", "loss_recovered_mean"}:
            at = columns["metric"].index(metric)
            columns["den"][at] += 1
            columns["den"][at + 1] -= 1

    path = tampered(lambda members: rewritten(members, "fidelity", moved))
    assert bundle.inspect(path).problems == ()
    message = refused(saebench, submitted, path)
    assert "ce_loss_clean: sequence 0 is said to have" in message


def test_weights_that_were_not_scored_are_refused(
    saebench: Run, submitted: Submitted, tmp_path: Path
):
    other = changed_weights(submitted.checkpoint, tmp_path / "other", 0.99)
    message = refused(saebench, submitted, submitted.bundle, "--checkpoint", other)
    assert "these are other weights" in message


def test_another_definition_of_the_suite_is_refused(
    saebench: Run, submitted: Submitted, tmp_path: Path
):
    definition = yaml.safe_load(submitted.suite.read_text())
    definition["text"]["eval_tokens"] = 500
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(definition))
    ended = saebench("verify", submitted.bundle, "--suite", other, *submitted.arguments())
    assert ended.code == 2
    assert "the suite has another text eval_tokens: 600, and here 500" in ended.out


def test_a_run_that_the_suite_asks_for_and_the_bundle_lacks_is_named(
    saebench: Run, submitted: Submitted, tampered: Callable[[Changed], Path]
):
    def without(members: dict[str, bytes]) -> None:
        file = run_of(members, "geometry")
        del members[file], members[file.replace(".json", ".units.parquet")]
        manifest = json.loads(members["manifest.json"])
        manifest["submission"]["runs"].remove(file)
        members["manifest.json"] = json.dumps(manifest).encode()

    path = tampered(without)
    assert bundle.inspect(path).problems == ()
    assert "it has no run of geometry" in refused(saebench, submitted, path)


def test_an_eval_of_another_version_is_refused(saebench: Run, tampered: Callable[[Changed], Path]):
    def older(members: dict[str, bytes]) -> None:
        file = run_of(members, "sparsity")
        run = json.loads(members[file])
        run["spec"]["eval"]["version"] = 1
        name = f"runs/{results.run_file(Path(), run['spec']).name}"
        members[name] = json.dumps(run).encode()
        old, new = (n.replace(".json", ".units.parquet") for n in (file, name))
        members[new] = members.pop(old)
        del members[file]
        manifest = json.loads(members["manifest.json"])
        runs = manifest["submission"]["runs"]
        runs[runs.index(file)] = name
        members["manifest.json"] = json.dumps(manifest).encode()

    ended = saebench("verify", tampered(older))
    assert ended.code == 2
    assert "sparsity is of version 1; this saebench has 2" in ended.out


def test_a_metric_with_another_direction_is_refused(
    saebench: Run, tampered: Callable[[Changed], Path]
):
    def turned(members: dict[str, bytes]) -> None:
        file = run_of(members, "reconstruction")
        run = json.loads(members[file])
        next(s for s in run["scores"] if s["metric"] == "mse")["best"] = "max"
        members[file] = json.dumps(run).encode()

    ended = saebench("verify", tampered(turned))
    assert ended.code == 2
    assert "mse: best is max, and here min" in ended.out


def test_what_is_no_bundle_is_refused_in_one_message(saebench: Run, tmp_path: Path):
    path = tmp_path / "notes.zip"
    path.write_text("nothing of the kind")
    ended = saebench("verify", path)
    assert (ended.code, ended.err) == (2, "")
    assert "it is no zip file" in ended.out


def test_a_checkpoint_without_a_suite_is_a_mistake(saebench: Run, submitted: Submitted):
    ended = saebench("verify", submitted.bundle, "--checkpoint", submitted.checkpoint)
    assert ended.code == 2
    assert "say on which with --suite" in ended.err


def test_a_bundle_of_an_earlier_submission_has_the_same_bytes(
    saebench: Run, submitted: Submitted, tmp_path: Path
):
    out = tmp_path / "again.zip"
    assert saebench("bundle", submitted.place.results(), "mine", out).code == 0
    assert out.read_bytes() == submitted.bundle.read_bytes()


def test_the_standing_is_printed_after_a_submission_and_names_the_family(
    saebench: Run, submitted: Submitted
):
    folders = [
        part
        for name in ("results", "checkpoints", "cache")
        for part in (f"--{name}", submitted.place.folder / name)
    ]
    arguments = ["--suite", submitted.suite, "--name", "mine", "--device", "cpu"]
    ended = saebench("submit", submitted.checkpoint, *arguments, *folders)
    assert ended.code == 0
    assert "the topk frontier at L0 = 4" in ended.out
