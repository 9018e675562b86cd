"""Sparse probing from a suite file to the leaderboard, with datasets that cannot be used among those that can."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saebench import results
from tests.conftest import Place, Run, World, WriteSuite

EXTRA = {"variant": "relu", "width": 32, "l0": 4, "lr": 0.01}
EVERY_CONTROL = [
    "identity",
    "pca",
    "random",
    {"permuted_decoder": {"of": "topk"}},
    {"frozen_decoder": {"of": "topk"}},
    {"untrained_lm": {"of": "topk"}},
    {"shuffled_labels": {"of": "topk"}},
]


def dataset(path: Path, rows: list[tuple[str, Any]], columns: str = "prompt,target") -> None:
    path.write_text(columns + "\n" + "".join(f"{text},{target}\n" for text, target in rows))


def questions(n: int) -> list[tuple[str, Any]]:
    """Whether a text ends in a letter of the first half."""
    rng = np.random.default_rng(0)
    endings = rng.choice(list("abcdefgh"), size=n)
    words = ["".join(rng.choice(list("abcdefgh"), size=12)) for _ in range(n)]
    return [(f"{word} {end}", int(end < "e")) for word, end in zip(words, endings, strict=True)]


@pytest.fixture
def datasets(tmp_path: Path) -> Path:
    """Three that can be probed, and one of every kind that cannot."""
    folder = tmp_path / "sets"
    folder.mkdir()
    good = questions(300)
    dataset(folder / "good.csv", good)
    dataset(folder / "related.csv", good[:150])
    dataset(folder / "other.csv", [(f"x{text}", target) for text, target in good[150:]])
    dataset(folder / "one_class.csv", [(text, 1) for text, _ in good])
    dataset(folder / "few_rows.csv", good[:12])
    dataset(folder / "no_column.csv", good, columns="prompt,label")
    dataset(folder / "regression.csv", [(t, f"{i / 7:.3f}") for i, (t, _) in enumerate(good)])
    dataset(folder / "no_targets.csv", [(text, "") for text, _ in good])
    dataset(folder / "no_tokens.csv", [("", target) for _, target in good])
    rare = [(text, int(i < 3)) for i, (text, _) in enumerate(good)]
    dataset(folder / "rare_class.csv", rare)
    (folder / "broken.jsonl").write_text("this is no JSON\n")
    return folder


BAD = {
    "one_class",
    "few_rows",
    "no_column",
    "regression",
    "no_targets",
    "no_tokens",
    "rare_class",
    "broken",
}


def probing(**changes: Any) -> dict[str, Any]:
    sizes = {"train": 64, "validation": 20, "test": 40, "k": [1, 5]}
    files = [{"files": "sets/*.csv"}, {"files": "sets/*.jsonl"}]
    return {"sparse_probing": {"datasets": files} | sizes | changes}


def test_what_cannot_be_probed_is_named_with_its_reason_and_the_rest_goes_on(
    run: Run, write_suite: WriteSuite, place: Place, datasets: Path
):
    board = {"leaderboard": {"metrics": ["explained_variance", "probe_auc_k5", "probe_auc_all"]}}
    assert (
        run(write_suite(evals=["sparsity", "reconstruction", probing()], reports=[board])).code == 0
    )
    found = results.read(place.results())
    units = results.units(found, "probe_auc_all")["topk-w32-l4-s0"]
    assert sorted(units.ids) == ["good", "other", "related"]
    # Two of them share their texts, and count as one where something is resampled.
    by_set = dict(zip(units.ids, units.clusters, strict=True))
    assert by_set["good"] == by_set["related"] != by_set["other"]
    named = set(found.omitted["what"])
    assert all(any(what.startswith(bad) for what in named) for bad in BAD), named
    written = (place.results() / "leaderboard.md").read_text()
    for bad in BAD:
        assert bad in written, bad
    value = found.scores.set_index(["sae", "metric"])["value"]
    assert value["topk-w32-l4-s0", "probe_auc_all"] > 0.8
    assert value["topk-w32-l4-s0", "probe_auc_raw"] > 0.8


def test_a_pattern_that_matches_nothing_is_one_message(
    run: Run, write_suite: WriteSuite, place: Place
):
    ended = run(write_suite(evals=["sparsity", probing(datasets=[{"files": "nowhere/*.csv"}])]))
    assert ended.code == 2 and "nowhere/*.csv" in ended.err and "Traceback" not in ended.err


def test_nothing_that_can_be_probed_is_a_skip_with_the_count(
    run: Run, write_suite: WriteSuite, place: Place, datasets: Path
):
    only = probing(datasets=[{"files": "sets/one_class.csv"}])
    assert run(write_suite(evals=["sparsity", only])).code == 0
    skips = results.read(place.results()).skips
    assert set(skips["eval"]) == {"sparse_probing"}
    assert "no dataset can be probed" in skips["reason"].iloc[0]


def test_an_sae_more_moves_no_number_of_any_other(
    run: Run, write_suite: WriteSuite, tmp_path: Path, definition: dict[str, Any], datasets: Path
):
    """Run apart from the start, with every eval and control: of the others the same is written, byte by byte."""
    evals = ["sparsity", "reconstruction", "fidelity", "shrinkage", "geometry", probing()]
    same = {"evals": evals, "controls": EVERY_CONTROL, "reports": []}
    alone, beside = Place(tmp_path / "alone"), Place(tmp_path / "beside")
    assert run(write_suite(**same), at=alone).code == 0
    assert run(write_suite(saes=[EXTRA, *definition["saes"]], **same), at=beside).code == 0
    before, after = written(alone), written(beside)
    assert len(before) > 50 and before.items() <= after.items()
    added = {name for name in after.keys() - before.keys() if name.endswith(".json")}
    assert {name.partition("--")[0] for name in added} == {"relu-w32-l4-s0"}


def written(place: Place) -> dict[str, bytes]:
    """Every run file without its provenance, which has seconds and the date of nothing else."""
    found = {}
    for path in place.results().glob("runs/*"):
        content = path.read_bytes()
        if path.suffix == ".json":
            run = json.loads(content)
            del run["provenance"]
            content = json.dumps(run).encode()
        found[path.name] = content
    return found


def test_the_same_probes_are_found_in_any_group_and_again(
    run: Run, write_suite: WriteSuite, world: World, place: Place, datasets: Path
):
    suite_file = write_suite(evals=["sparsity", probing()])
    assert run(suite_file).code == 0
    before = written(place)
    for path in place.results().glob("runs/*sparse_probing*"):
        path.unlink()
    assert run(suite_file, "--no-cache").code == 0
    assert written(place) == before


def test_a_control_with_the_codes_of_a_trained_sae_is_not_probed(
    run: Run, write_suite: WriteSuite, place: Place, datasets: Path
):
    """It would tie with its parent by construction, and mark probing as telling nothing apart."""
    controls = ["permuted_decoder", "shuffled_labels"]
    assert run(write_suite(evals=["sparsity", probing()], controls=controls)).code == 0
    found = results.read(place.results())
    (skipped,) = found.skips.itertuples()
    assert (skipped.sae, skipped.eval) == ("permuted_decoder-w32-l4", "sparse_probing")
    assert "its codes are those of the SAE that it is made of" in skipped.reason
    scored = found.scores[found.scores["eval"] == "sparse_probing"]["sae"]
    assert set(scored) == {"topk-w32-l4-s0", "shuffled_labels-w32-l4"}


def test_what_is_wrong_with_datasets_and_names_shows_before_any_training(
    run: Run, write_suite: WriteSuite, place: Place, datasets: Path
):
    nowhere = write_suite(evals=["sparsity", probing(datasets=[{"files": "nowhere.csv"}])])
    assert run(nowhere).code == 2 and place.weights() == {}
    saes = [{"variant": variant, "width": 32, "l0": 4} for variant in ("topk", "relu")]
    again = [{"frozen_decoder": {"of": "topk"}}, {"frozen_decoder": {"of": "relu"}}]
    ended = run(write_suite(saes=saes, controls=again))
    assert ended.code == 2 and "would be called 'frozen_decoder-w32-l4'" in ended.err
    assert place.weights() == {}


def test_a_suite_of_probes_alone_is_finished_and_has_a_leaderboard_by_them(
    run: Run, saebench: Run, write_suite: WriteSuite, place: Place, datasets: Path
):
    ended = run(write_suite(evals=[probing()], controls=[], reports=[]))
    assert ended.code == 0 and "no SAE has any of l0" in ended.out
    shown = saebench("report", place.results(), "--sort", "probe_auc_k5")
    assert shown.code == 0 and "probe AUC k5" in shown.out


def test_controls_whose_parents_are_left_out_and_not_trained_are_refused(
    run: Run, write_suite: WriteSuite, place: Place, datasets: Path
):
    suite_file = write_suite(evals=["sparsity", probing()], controls=["shuffled_labels"])
    ended = run(suite_file, "--only", "shuffled*")
    assert ended.code == 2 and "not trained yet: topk-w32-l4-s0" in ended.err


def test_a_parameter_deep_inside_an_eval_is_named_with_its_line(run: Run, write_suite: WriteSuite):
    suite_file = write_suite(evals=["sparsity", probing(datasets=[{"files": "x.csv", "foo": 3}])])
    line = suite_file.read_text().splitlines().index("      foo: 3") + 1
    ended = run(suite_file)
    assert ended.code == 2
    assert f":{line}: evals.1.sparse_probing.datasets.0.foo" in ended.err
    assert "there is no such parameter" in ended.err


def test_a_model_that_is_untrained_already_has_no_control_before_its_training(
    run: Run, write_suite: WriteSuite, place: Place
):
    model = {"config": {"model_type": "llama"}, "weights": "random"}
    ended = run(write_suite(model=model, controls=["untrained_lm"]))
    assert ended.code == 2 and "untrained_lm" in ended.err and "random weights" in ended.err
