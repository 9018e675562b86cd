"""`saebench submit`: refused, recognised, scored, replaced, and kept by later runs of the suite."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save

from saebench import checkpoints, results, runner, submission, submitted
from saebench.errors import UserError
from saebench.hub import Downloaded
from saebench.loaders._files import Limits
from saebench.results import Entry
from saebench.submitted import Submission
from tests.conftest import EVALS, Ended, Finished, Place, Run, WriteSuite

N_RUNS = len(EVALS)


class Home:
    """A copy of a finished suite, to which things are submitted."""

    def __init__(self, place: Place, suite: Path, saebench: Run) -> None:
        self.place, self.suite, self._saebench = place, suite, saebench
        self.folder = place.results()

    def submit(self, checkpoint: Path | str, *options: str, name: str = "mine") -> Ended:
        folders = ("results", "checkpoints", "cache")
        places = [part for f in folders for part in (f"--{f}", str(self.place.folder / f))]
        given = [checkpoint, "--suite", self.suite, "--name", name, "--format", "native"]
        return self._saebench("submit", *given, "--device", "cpu", *places, *options)

    def run(self) -> Ended:
        return self._saebench(*self.place.arguments(self.suite))

    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "submissions.json").read_text())
        return found

    def manifest(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "suite.json").read_text())
        return found

    def runs_of(self, name: str) -> set[str]:
        return {path.name for path in self.folder.glob(f"runs/{name}--*")}

    def board(self) -> str:
        return (self.folder / "leaderboard.md").read_text()


@pytest.fixture
def home(finished: Finished, place: Place, saebench: Run) -> Home:
    for name in ("results", "checkpoints", "cache"):
        shutil.copytree(finished.place.folder / name, place.folder / name)
    return Home(place, finished.plain, saebench)


@pytest.fixture
def bare(finished: Finished, place: Place, saebench: Run) -> Home:
    """The same suite, never run."""
    return Home(place, finished.plain, saebench)


def trained(finished: Finished, variant: str) -> Path:
    (folder,) = finished.place.checkpoints.glob(f"{variant}-*")
    return folder


def changed(folder: Path, to: Path, factor: float = 0.9, **record: Any) -> Path:
    """Somebody's checkpoint: one of ours with a decoder of another length."""
    shutil.copytree(folder, to)
    weights = load_file(to / "sae.safetensors")
    weights["W_dec"] = factor * weights["W_dec"]
    content = save(weights)
    (to / "sae.safetensors").write_bytes(content)
    about = json.loads((to / "sae.json").read_text()) | record
    about["checksum"] = hashlib.sha256(content).hexdigest()
    (to / "sae.json").write_text(json.dumps(about))
    return to


@pytest.fixture
def mine(finished: Finished, tmp_path: Path) -> Path:
    return changed(trained(finished, "topk"), tmp_path / "given" / "mine")


# What is scored


def test_a_submission_is_in_record_manifest_and_leaderboard_beside_all_baselines(
    home: Home, mine: Path
):
    before = home.manifest()
    ended = home.submit(mine)
    assert ended.code == 0, ended.err
    after = home.manifest()
    assert after["saes"].items() > before["saes"].items()
    assert after["runs"][: len(before["runs"])] == before["runs"]
    record = home.record()["mine"]
    assert len(record["runs"]) == N_RUNS
    assert after["runs"][len(before["runs"]) :] == record["runs"]
    assert record["origin"] == {"from": "local"} and record["format"] == "native"
    assert record["entry"] == after["saes"]["mine"]
    assert 0 < record["selfcheck"]["explained_variance"] < 1
    assert "| mine " in home.board()
    for line in ("self-check: ", "mine: 5 runs scored", "mine at 1.resid_post"):
        assert line in ended.out
    read = results.read(home.folder)
    assert read.stale == read.missing == []


@pytest.mark.slow
def test_its_scores_are_those_of_the_same_sae_in_a_suite_file(
    home: Home, mine: Path, run: Run, write_suite: WriteSuite, tmp_path: Path
):
    assert home.submit(mine).code == 0
    given = {"checkpoint": str(mine), "format": "native", "name": "mine"}
    beside = Place(tmp_path / "beside")
    assert run(write_suite(saes=[given], controls=[], reports=[]), at=beside).code == 0

    def scores(folder: Path) -> dict[str, Any]:
        runs = [json.loads(p.read_text()) for p in folder.glob("runs/mine--*.json")]
        return {r["spec"]["eval"]["name"]: (r["spec"], r["scores"]) for r in runs}

    assert scores(home.folder) == scores(beside.results())


def test_submitting_again_changes_no_file(home: Home, mine: Path):
    assert home.submit(mine).code == 0
    before = home.place.files("results")
    again = home.submit(mine)
    assert again.code == 0 and "nothing was missing" in again.out
    assert home.place.files("results") == before


@pytest.mark.slow
def test_what_is_missing_of_a_submission_is_made_by_the_same_command(home: Home, mine: Path):
    assert home.submit(mine).code == 0
    before = home.place.scores()
    (gone,) = home.folder.glob("runs/mine--fidelity--*.json")
    gone.unlink()
    again = home.submit(mine)
    assert again.code == 0 and "mine: 1 runs scored" in again.out
    assert home.place.scores() == before


def test_a_run_of_the_suite_keeps_submissions(home: Home, mine: Path):
    assert home.submit(mine).code == 0
    before = home.place.files("results")
    assert home.run().code == 0
    assert home.place.files("results") == before
    assert "| mine " in home.board()


@pytest.mark.slow
def test_a_suite_that_was_never_run_has_the_submission_alone_and_all_after_its_run(
    bare: Home, finished: Finished, mine: Path
):
    ended = bare.submit(mine)
    assert ended.code == 0, ended.err
    assert set(bare.manifest()["saes"]) == {"mine"}
    assert results.read(bare.folder).missing == []
    assert "| mine " in bare.board()
    shutil.copytree(finished.place.checkpoints, bare.place.checkpoints)
    assert bare.run().code == 0
    whole = results.entries(finished.place.results())
    assert set(bare.manifest()["saes"]) == {*whole, "mine"}
    assert results.read(bare.folder).missing == []


@pytest.mark.slow
def test_baselines_stay_where_their_checkpoints_are_not_here(home: Home, mine: Path):
    shutil.rmtree(home.place.checkpoints)
    before = home.manifest()
    assert home.submit(mine).code == 0
    assert set(home.manifest()["saes"]) == {*before["saes"], "mine"}
    assert "| relu-w32-l4-s0 " in home.board()


@pytest.mark.slow
def test_runs_of_a_submission_that_the_suite_no_longer_asks_for_are_left_out_and_said_so(
    home: Home, mine: Path, monkeypatch: pytest.MonkeyPatch
):
    from saebench.evals.shrinkage import Shrinkage

    assert home.submit(mine).code == 0
    monkeypatch.setattr(Shrinkage, "version", 99)
    ended = home.run()
    assert ended.code == 0
    assert "mine, a submission, has 4 of the 5 runs" in ended.err
    assert "--name mine makes those that are missing" in ended.err
    named = [r for r in home.manifest()["runs"] if r.startswith("runs/mine--")]
    assert len(named) == 4 and not any("shrinkage" in r for r in named)
    # The command that it names.
    assert home.submit(mine).code == 0
    assert len([r for r in home.manifest()["runs"] if r.startswith("runs/mine--")]) == N_RUNS


def test_no_path_of_this_machine_is_in_any_result(home: Home, mine: Path):
    assert home.submit(mine).code == 0
    for path in home.folder.rglob("*.json"):
        assert str(home.place.folder.parent) not in path.read_text(), path
        assert "given/mine" not in path.read_text(), path


def test_the_provenance_of_runs_says_where_the_weights_are_from(home: Home, mine: Path):
    assert home.submit(mine).code == 0
    for path in home.folder.glob("runs/mine--*.json"):
        run = json.loads(path.read_text())
        assert run["provenance"]["origin"] == {"from": "local"}
        assert run["provenance"]["weights"] == home.record()["mine"]["checksum"]


def test_a_checkpoint_of_the_hub_is_recorded_and_handed_on_by_its_commit(
    home: Home, mine: Path, monkeypatch: pytest.MonkeyPatch
):
    commit = "0123456789" * 4
    monkeypatch.setattr(checkpoints, "download", lambda *_: Downloaded(mine, commit))
    assert submission.fetched("org/sae@main", Limits(), mine) == f"org/sae@{commit}"
    assert submission.fetched("org/sae@v1/a/b", Limits(), mine) == f"org/sae@{commit}/a/b"
    assert submission.fetched(str(mine), Limits(), None) == str(mine)
    assert home.submit("org/sae@main").code == 0
    origin = home.record()["mine"]["origin"]
    assert (origin["from"], origin["id"], origin["revision"]) == ("hub", "org/sae", commit)
    for path in home.folder.glob("runs/mine--*.json"):
        assert json.loads(path.read_text())["provenance"]["origin"] == origin


# What is recognised


def test_the_weights_of_a_trained_sae_are_recognised_and_not_scored(home: Home, finished: Finished):
    before = home.place.files("results")
    ended = home.submit(trained(finished, "topk"))
    assert ended.code == 0
    assert "these weights are there already: the trained SAE topk-w32-l4-s0; " in ended.out
    assert home.place.files("results") == before


def test_trained_saes_are_recognised_in_results_of_before_weights_were_noted(
    home: Home, finished: Finished
):
    for path in home.folder.glob("runs/topk*.json"):
        run = json.loads(path.read_text())
        del run["provenance"]["weights"]
        path.write_text(json.dumps(run))
    ended = home.submit(trained(finished, "topk"))
    assert "these weights are there already: the trained SAE topk-w32-l4-s0; " in ended.out


def test_the_weights_of_an_earlier_submission_are_recognised_under_another_name(
    home: Home, mine: Path, tmp_path: Path
):
    assert home.submit(mine).code == 0
    before = home.place.files("results")
    moved = shutil.copytree(mine, tmp_path / "moved")
    ended = home.submit(moved, name="other")
    assert ended.code == 0
    told = "these weights are there already: the earlier submission mine; nothing was scored"
    assert f"{told}\n" in ended.out
    assert home.place.files("results") == before


@pytest.mark.slow
def test_to_replace_with_weights_that_have_another_name_replaces_nothing_and_says_so(
    home: Home, mine: Path, finished: Finished, tmp_path: Path
):
    assert home.submit(mine).code == 0
    other = changed(trained(finished, "topk"), tmp_path / "other", 0.8)
    assert home.submit(other, name="perm").code == 0
    before = home.place.files("results")
    ended = home.submit(mine, "--replace", name="perm")
    assert ended.code == 0
    assert "the earlier submission mine; nothing was scored" in ended.out
    assert "perm keeps the weights that it has, and nothing was replaced" in ended.out
    assert home.place.files("results") == before


# What is refused


@pytest.mark.parametrize("name", ["topk-w32-l4-s0", "identity", "permuted_decoder-w32-l4"])
def test_names_of_the_suites_own_saes_cannot_be_taken(home: Home, mine: Path, name: str):
    before = home.place.files("results")
    ended = home.submit(mine, name=name)
    assert ended.code == 2 and f"{name} is the name of an SAE of the suite tiny itself" in ended.err
    assert home.place.files("results") == before


NAMES = ["../mine", "a b", "", "-x", "x" * 101, "a\n", "a.", "CON", "nul", "Aux.v2", "com1"]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_cannot_name_a_file_are_refused_before_the_model_is_opened(
    home: Home, mine: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    unopened(monkeypatch)
    ended = home.submit(mine, f"--name={name}")
    assert ended.code == 2 and "cannot be the name of a submission" in ended.err
    assert "give another --name" in ended.err and ended.err.count("\n") == 1
    assert len(ended.err) < 300 and "pattern" not in ended.err


@pytest.mark.parametrize("name", ["con-v2", "commune", "com12", "a.b"])
def test_names_that_only_begin_like_those_of_devices_are_fine(name: str):
    submitted.check_name(name)


def unopened(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: object) -> None:
        raise AssertionError("a model was opened for what is refused anyway")

    monkeypatch.setattr(runner, "open_model", opened)


def test_names_that_differ_in_case_alone_are_refused(home: Home, mine: Path):
    assert home.submit(mine).code == 0
    before = home.place.files("results")
    for name, there in (("Mine", "mine"), ("TopK-w32-l4-s0", "topk-w32-l4-s0"), ("Identity", "")):
        ended = home.submit(mine, name=name)
        assert ended.code == 2, ended.out
        assert f"{name} differs from {there or name.lower()}" in ended.err
        assert "in case alone" in ended.err
    assert home.place.files("results") == before


@pytest.mark.parametrize("damage", ["cut", "not finite", "a trained SAE's name"])
def test_what_needs_no_model_is_refused_before_one_is_opened(
    home: Home, finished: Finished, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
):
    factor = float("nan") if damage == "not finite" else 1.0
    given = changed(trained(finished, "topk"), tmp_path / "given", factor)
    if damage == "cut":
        (given / "sae.safetensors").write_bytes((given / "sae.safetensors").read_bytes()[:-1])
    unopened(monkeypatch)
    name = "topk-w32-l4-s0" if damage.startswith("a ") else "mine"
    assert home.submit(given, name=name).code == 2


def test_an_isolated_submission_is_refused_for_its_name_before_any_download(
    home: Home, monkeypatch: pytest.MonkeyPatch
):
    def download(*_: object) -> None:
        raise AssertionError("something was downloaded for a name that is refused")

    monkeypatch.setattr(checkpoints, "download", download)
    for name in ("a b", "topk-w32-l4-s0", "TOPK-w32-l4-s0"):
        ended = home.submit("org/sae@main", "--isolate", name=name)
        assert ended.code == 2 and "give another --name" in ended.err


@pytest.mark.parametrize("name", ["mine", "Mine"])
@pytest.mark.parametrize("option", ["--device=cpu", "--dry-run"])
def test_a_suite_that_took_the_name_of_a_submission_is_not_run(
    home: Home, finished: Finished, mine: Path, tmp_path: Path, name: str, option: str
):
    assert home.submit(mine).code == 0
    own = changed(trained(finished, "topk"), tmp_path / "own", 0.7)
    whole = yaml.safe_load(finished.plain.read_text())
    whole["saes"].append({"checkpoint": str(own), "format": "native", "name": name})
    home.suite = tmp_path / "taken.yaml"
    home.suite.write_text(yaml.safe_dump(whole, sort_keys=False))
    before = home.place.files("results")
    ended = home._saebench(*home.place.arguments(home.suite), option)
    assert ended.code == 2, ended.err
    assert f"is called {name}, and that is the name of an earlier submission" in ended.err
    assert "another name, or delete the record of mine in" in ended.err
    assert home.place.files("results") == before
    # Nor does a submission of something else drop it.
    other = changed(trained(finished, "topk"), tmp_path / "other", 0.8)
    assert home.submit(other, name="other").code == 2
    assert home.place.files("results") == before


@pytest.mark.slow
def test_the_way_out_of_a_name_that_the_suite_took_loses_nothing(
    home: Home, finished: Finished, mine: Path, tmp_path: Path
):
    assert home.submit(mine).code == 0
    own = changed(trained(finished, "topk"), tmp_path / "own", 0.7)
    whole = yaml.safe_load(finished.plain.read_text())
    whole["saes"].append({"checkpoint": str(own), "format": "native", "name": "mine"})
    home.suite = tmp_path / "taken.yaml"
    home.suite.write_text(yaml.safe_dump(whole, sort_keys=False))
    old = home.runs_of("mine")
    (home.folder / "submissions.json").write_text("{}\n")
    assert home.run().code == 0
    assert old < home.runs_of("mine")
    ended = home.submit(mine, name="renamed")
    assert ended.code == 0 and "renamed: 5 runs scored" in ended.out
    assert {"mine", "renamed"} <= set(home.manifest()["saes"])


def test_an_sae_of_another_layer_is_refused_with_the_layer_that_it_is_of(
    bare: Home, finished: Finished, write_suite: WriteSuite, tmp_path: Path
):
    """Trained at 1.resid_post, and said to be of 2.resid_post."""
    wrong = changed(
        trained(finished, "jumprelu"),
        tmp_path / "wrong",
        1.0,
        site={"stream": "resid_post", "layer": 2},
        target={"stream": "resid_post", "layer": 2},
    )
    bare.suite = write_suite(sites=[{"layer": 2, "stream": "resid_post"}])
    ended = bare.submit(wrong)
    assert ended.code == 2
    assert "of the variance at 2.resid_post, and " in ended.err
    assert " at 1.resid_post" in ended.err and "it was probably trained there" in ended.err
    assert not bare.folder.exists() or not list(bare.folder.glob("runs/*"))


def negative(finished: Finished, to: Path) -> Path:
    return changed(trained(finished, "topk"), to, -3.0)


def test_an_sae_that_explains_nothing_needs_force_and_results_say_so(
    home: Home, finished: Finished, tmp_path: Path
):
    bad = negative(finished, tmp_path / "bad")
    before = home.place.files("results")
    ended = home.submit(bad)
    assert ended.code == 2 and "the self-check refuses this SAE" in ended.err
    assert "--force" in ended.err and "?." not in ended.err and ".." not in ended.err
    assert home.place.files("results") == before
    assert home.submit(bad, "--force").code == 0
    record = home.record()["mine"]
    assert "explains -" in record["selfcheck"]["forced"]
    run = json.loads((home.folder / record["runs"][0]).read_text())
    assert run["provenance"]["origin"]["forced"] == record["selfcheck"]["forced"]
    again = home.submit(bad)  # what was forced once is known
    assert again.code == 0 and "nothing was missing" in again.out


def test_weights_that_are_not_finite_are_refused_even_with_force(
    home: Home, finished: Finished, tmp_path: Path
):
    broken = changed(trained(finished, "topk"), tmp_path / "broken", float("nan"))
    ended = home.submit(broken, "--force")
    assert ended.code == 2 and "not finite" in ended.err


def test_a_dry_run_says_what_would_be_scored_and_writes_nothing(bare: Home, mine: Path):
    before = bare.place.files(".")
    ended = bare.submit(mine, "--dry-run")
    assert ended.code == 0
    assert "self-check: " in ended.out
    assert f"would score {N_RUNS} runs: {', '.join(EVALS)}" in ended.out
    assert bare.place.files(".") == before
    assert not bare.folder.exists() and not (bare.place.folder / "cache").exists()


# What is replaced


def test_other_weights_under_a_taken_name_need_replace(
    home: Home, mine: Path, finished: Finished, tmp_path: Path
):
    assert home.submit(mine).code == 0
    before = home.place.files("results")
    other = changed(trained(finished, "topk"), tmp_path / "other", 0.8)
    ended = home.submit(other)
    assert ended.code == 2 and "--replace" in ended.err
    assert home.place.files("results") == before
    old = home.record()["mine"]
    old_files = {p.name: p.read_bytes() for p in home.folder.glob("runs/mine--*")}
    assert home.submit(other, "--replace").code == 0
    new = home.record()["mine"]
    assert new["checksum"] != old["checksum"]
    place = home.folder / "history" / f"mine--{old['checksum'][:12]}"
    assert {p.name: p.read_bytes() for p in (place / "runs").iterdir()} == old_files
    assert json.loads((place / "submission.json").read_text()) == {"mine": old}
    assert home.runs_of("mine").isdisjoint(old_files)
    assert {name for name in home.runs_of("mine") if name.endswith(".json")} == {
        Path(run).name for run in new["runs"]
    }
    assert results.read(home.folder).stale == []
    # Later runs of the suite know the new one alone.
    after = home.place.files("results")
    assert home.run().code == 0
    assert home.place.files("results") == after


# What fails


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: object) -> Iterator[None]:
        raise error

    monkeypatch.setattr(runner._Scoring, "update", fail)


def test_nothing_is_half_written_when_scoring_fails(
    home: Home, mine: Path, monkeypatch: pytest.MonkeyPatch
):
    before = home.place.files("results")
    with monkeypatch.context() as patch:
        failing(patch, RuntimeError("broken"))
        ended = home.submit(mine)
    assert ended.code == 1 and "it is not in the tables" in ended.out
    assert home.place.files("results") == before
    assert home.submit(mine).code == 0


def test_a_stop_while_scoring_leaves_the_earlier_state_and_the_command_goes_on(
    home: Home, mine: Path, monkeypatch: pytest.MonkeyPatch
):
    before = home.place.files("results")
    with monkeypatch.context() as patch:
        failing(patch, KeyboardInterrupt())
        assert home.submit(mine).code == 130
    assert home.place.files("results") == before
    with monkeypatch.context() as patch:
        patch.setattr(runner, "write_reports", _interrupted)
        assert home.submit(mine).code == 130
    assert home.submit(mine).code == 0
    assert "| mine " in home.board()


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_where_the_new_one_cannot_be_scored_the_earlier_result_stays(
    home: Home, mine: Path, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert home.submit(mine).code == 0
    before = home.place.files("results")
    other = changed(trained(finished, "topk"), tmp_path / "other", 0.8)
    with monkeypatch.context() as patch:
        failing(patch, RuntimeError("broken"))
        ended = home.submit(other, "--replace")
    assert ended.code == 1 and "the earlier result stays" in ended.out
    assert home.place.files("results") == before


# The record


ENTRY = Entry("checkpoint", "native", 32, None, None, "1.resid_post")
GIVEN = Submission(
    ENTRY, "ab" * 32, "native", {"from": "local"}, {"l0": 3.0}, ("runs/a--x--1.json",)
)


def test_a_record_is_read_as_it_was_written(tmp_path: Path):
    submitted.write(tmp_path, {"a": GIVEN})
    assert submitted.read(tmp_path) == {"a": GIVEN}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("checksum", "abc"),
        ("checksum", 3),
        ("format", None),
        ("origin", []),
        ("selfcheck", None),
        ("runs", ["runs/b--x--1.json"]),
        ("runs", ["../a--x--1.json"]),
        ("runs", "runs/a--x--1.json"),
        ("entry", {}),
        ("entry", ENTRY._asdict() | {"kind": "trained"}),
        ("entry", ENTRY._asdict() | {"width": "32"}),
        ("entry", ENTRY._asdict() | {"width": True}),
        ("more", 1),
    ],
)
def test_a_record_that_was_tampered_with_is_refused(tmp_path: Path, field: str, value: object):
    submitted.write(tmp_path, {"a": GIVEN})
    content = json.loads((tmp_path / "submissions.json").read_text())
    content["a"][field] = value
    (tmp_path / "submissions.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="is not the record that saebench submit writes"):
        submitted.read(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', '{"a": {}, "a": {}}', '{"../a": {}}'])
def test_a_record_that_is_no_record_is_refused(tmp_path: Path, text: str):
    (tmp_path / "submissions.json").write_text(text)
    with pytest.raises(UserError, match="is not the record"):
        submitted.read(tmp_path)
