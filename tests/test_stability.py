"""Stability over seeds: laws of the numbers, and suites with several seeds through the whole pipeline."""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment

from saebench import cli, matching, planner, registry, results, runner, stats, suite, verification
from saebench.evals import stability
from saebench.evals.stability import Stability
from saebench.scrutiny import Run as ScoredRun
from saebench.types import Omitted, Score, Seeded, Skip
from tests import toys
from tests.conftest import Place, Run, World, WriteSuite, whole_definition
from tests.test_submit import changed

WIDTH, D = 48, 16
NAMES = [metric.name for metric in Stability.metrics]


def sae(seed: int = 0, width: int = WIDTH, d: int = D) -> Any:
    return toys.sae_of("relu", d, width, seed)


def permuted(of: Any, order: Sequence[int]) -> Any:
    """The same latents in another order."""
    other = sae(width=len(order), d=of.d_in)
    other.W_dec.copy_(of.W_dec[order])
    other.W_enc.copy_(of.W_enc[:, order])
    return other


def of_rows(W_dec: Any, W_enc: Any) -> Any:
    made = sae(width=len(W_dec), d=len(W_dec[0]))
    made.W_dec.copy_(torch.tensor(W_dec))
    made.W_enc.copy_(torch.tensor(W_enc).T)
    return made


def seeded(of: Any, density: Any = None) -> Seeded:
    rates = np.linspace(0.5, 0.01, of.d_sae) if density is None else np.array(density, float)
    return Seeded(of, rates, 1000)


def scores(one: Seeded, *others: Seeded) -> dict[str, Score]:
    found = Stability().scores(one, others)
    return {score.metric: score for score in found if isinstance(score, Score)}


def values(one: Seeded, *others: Seeded) -> dict[str, float]:
    found = scores(one, *others)
    return {name: stats.value(score.num, score.den, "ratio") for name, score in found.items()}


# Laws


def test_an_sae_beside_itself_in_another_order_is_wholly_stable():
    order = np.random.default_rng(0).permutation(WIDTH).tolist()
    found = values(seeded(sae()), seeded(permuted(sae(), order)))
    assert found == {name: pytest.approx(1, abs=1e-6) for name in NAMES}


def test_random_directions_are_at_their_reference():
    found = scores(seeded(sae(0, 1500, 32)), seeded(sae(1, 1500, 32)))
    for score in found.values():
        value = stats.value(score.num, score.den, "ratio")
        assert value == pytest.approx(score.reference, abs=0.05), score.metric
    assert found["stability_mmcs"].reference == pytest.approx(0.57, abs=0.05)
    assert found["stability"].reference < 0.01


def test_the_length_of_a_direction_does_not_matter():
    plain, long = (sae(3) for _ in range(2))
    scale = torch.linspace(0.1, 9, WIDTH)
    long.W_dec.mul_(scale[:, None])
    long.W_enc.mul_(scale.flip(0))
    near = permuted(sae(3), range(WIDTH))
    near.W_dec.add_(0.3 * sae(4).W_dec)
    for a, b in ((plain, long), (long, plain)):
        assert values(seeded(a), seeded(near)) == pytest.approx(values(seeded(b), seeded(near)))
        assert values(seeded(near), seeded(a)) == pytest.approx(values(seeded(near), seeded(b)))


def test_the_order_of_latents_and_of_other_seeds_does_not_matter():
    order = np.random.default_rng(1).permutation(WIDTH).tolist()
    near = permuted(sae(3), order)
    near.W_dec.add_(0.3 * sae(4).W_dec)
    rates = np.linspace(0, 0.3, WIDTH)
    found = values(seeded(sae(3), rates), seeded(near), seeded(sae(5)))
    turned = values(seeded(permuted(sae(3), order), rates[order]), seeded(sae(5)), seeded(near))
    assert turned == pytest.approx(found)


def test_dead_latents_are_left_out_on_both_sides():
    live = list(range(30))
    rates = np.where(np.arange(WIDTH) < 30, 0.1 + np.arange(WIDTH) / 100, 0)
    few = values(seeded(permuted(sae(0), live), rates[:30]), seeded(permuted(sae(1), live)))
    ours, theirs = sae(0), sae(1)
    theirs.W_dec[30:] = ours.W_dec[:18]  # twins of live latents
    ours.W_dec[30:] = theirs.W_dec[:18]
    dead = scores(seeded(ours, rates), seeded(theirs, rates))
    assert {n: stats.value(s.num, s.den, "ratio") for n, s in dead.items()} == pytest.approx(few)
    assert all(not score.den[30:].any() and not score.num[30:].any() for score in dead.values())


def test_of_several_other_seeds_the_mean_is_taken():
    same, other = seeded(sae(0)), seeded(sae(1))
    one, both = values(same, other), values(same, same, other)
    for name in NAMES:
        assert both[name] == pytest.approx((1 + one[name]) / 2, abs=1e-6), name
    assert scores(same, same, other)["stability"].den.tolist() == [2] * WIDTH


# Numbers by hand, and by another implementation


def test_three_latents_by_hand():
    eye = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    ours = seeded(of_rows(eye, eye), [0.1, 0.2, 0.3])
    # The first is the same, the second has another encoder, the third points away.
    theirs = of_rows([eye[0], eye[1], [0.0, -0.6, -0.8]], [eye[0], [0.0, 0.6, 0.8], eye[2]])
    assert values(ours, seeded(theirs)) == pytest.approx(
        {
            "stability_mmcs": 2 / 3,
            "stability_mmcs_back": 2 / 3,
            "stability_mcc": (1 + 1 - 0.8) / 3,
            "stability_mcc_abs": (1 + 1 + 0.8) / 3,
            "shared_07": 1 / 3,
            "mutual_nearest": 2 / 3,
            "stability": 2 / 3,
            "stability_frequent": 0,
            "stability_rare": 1,
        }
    )


def by_numpy(one: Seeded, others: Sequence[Seeded]) -> dict[str, float]:
    """Latent by latent, with whole matrices of cosines."""

    def unit(rows: np.ndarray) -> np.ndarray:
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def rows(of: Seeded) -> tuple[np.ndarray, np.ndarray]:
        live = of.density > 0
        weights = (of.sae.W_dec.numpy(), of.sae.W_enc.numpy().T)
        return tuple(unit(w.astype(np.float64)[live]) for w in weights)

    parts: dict[str, list[float]] = {name: [] for name in NAMES}
    decoder, encoder = rows(one)
    rates = one.density[one.density > 0]
    often = rates > np.median(rates)
    for other in others:
        there, their_encoder = rows(other)
        cos = decoder @ there.T
        parts["stability_mmcs"] += cos.max(1).tolist()
        parts["stability_mmcs_back"] += cos.max(0).tolist()
        i, j = linear_sum_assignment(cos, maximize=True)
        parts["stability_mcc"] += cos[i, j].tolist()
        k, m = linear_sum_assignment(abs(cos), maximize=True)
        parts["stability_mcc_abs"] += abs(cos[k, m]).tolist()
        agree = (encoder[i] * their_encoder[j]).sum(1) >= 0.7
        shared = np.zeros(len(decoder))
        shared[i] = (cos[i, j] >= 0.7) & agree
        parts["shared_07"] += shared.tolist()
        found = cos.argmax(1)
        parts["mutual_nearest"] += [cos[:, b].argmax() == a for a, b in enumerate(found)]
        near = cos.max(1) >= 0.7
        parts["stability"] += near.tolist()
        parts["stability_frequent"] += near[often].tolist()
        parts["stability_rare"] += near[~often].tolist()
    return {name: float(np.mean(part)) for name, part in parts.items()}


def test_another_implementation_gives_the_same_where_both_sides_differ_in_size():
    rng = np.random.default_rng(2)
    one = seeded(sae(6), rng.random(WIDTH) * (rng.random(WIDTH) < 0.9))
    others = []
    for seed, alive in ((7, 0.6), (8, 1.0)):
        near = permuted(sae(6), rng.permutation(WIDTH).tolist())
        near.W_dec.add_(sae(seed).W_dec * torch.rand(WIDTH, 1))
        near.W_enc.add_(sae(seed + 2).W_enc * torch.rand(1, WIDTH))
        others.append(seeded(near, rng.random(WIDTH) * (rng.random(WIDTH) < alive)))
    found = values(one, *others)
    assert found == pytest.approx(by_numpy(one, others), abs=1e-6)
    assert 0.1 < found["shared_07"] < found["stability"] < 0.95, "a case with some of each"


def test_directions_of_an_sae_that_predicts_another_site_are_compared_where_they_are():
    a, b = (toys.sae_of("relu", 5, 12, seed, d_out=9) for seed in (0, 0))
    assert values(seeded(a), seeded(b)) == {n: pytest.approx(1, abs=1e-6) for n in NAMES}


@pytest.mark.parametrize(("d", "share"), [(1, 0.5), (2, np.arccos(0.7) / np.pi), (3, 0.15)])
def test_the_chance_of_a_near_direction_is_the_size_of_its_cap(d: int, share: float):
    assert stability._any_near(1, d) == pytest.approx(share)
    assert stability._any_near(4, d) == pytest.approx(1 - (1 - share) ** 4)


# What does not apply


def test_more_latents_than_can_be_assigned_are_paired_greedily(monkeypatch: Any):
    near = sae(0)
    near.W_dec.add_(0.2 * sae(1).W_dec)
    exact = values(seeded(sae(0)), seeded(near))
    monkeypatch.setattr(matching, "MOST_ASSIGNED", 40)
    matching.chance.cache_clear()
    found = values(seeded(sae(0)), seeded(near))
    matching.chance.cache_clear()
    assert found == pytest.approx(exact, abs=0.05)
    assert found["stability_mcc"] <= exact["stability_mcc"] + 1e-6


def test_latents_that_all_fire_alike_have_no_frequent_half():
    found = Stability().scores(seeded(sae(0), np.full(WIDTH, 0.1)), [seeded(sae(1))])
    (omitted,) = (part for part in found if isinstance(part, Omitted))
    assert omitted.what == "stability_frequent"
    assert "stability_rare" in {part.metric for part in found if isinstance(part, Score)}


@pytest.mark.parametrize("silent", [0, 1])
def test_an_sae_or_another_seed_without_a_live_latent_is_skipped(silent: int):
    both = [seeded(sae(i), np.zeros(WIDTH) if i == silent else None) for i in range(2)]
    with pytest.raises(Skip, match="no latent of it, or of another seed of it, fires on 1,000"):
        scores(*both)


def test_an_sae_without_decoder_directions_is_skipped():
    bare = toys.Fixed(lambda x: x)
    del bare.W_dec
    with pytest.raises(Skip, match="no decoder directions"):
        scores(seeded(bare), seeded(bare))


def test_a_sample_without_a_token_is_refused():
    with pytest.raises(ValueError, match="tokens is 0; expected 1 or more"):
        Stability(tokens=0)


# Suites


TOPK = {"variant": "topk", "width": 32, "l0": 4, "lr": 0.01, "seed": [0, 1]}
RELU = {"variant": "relu", "width": 32, "l0": 4, "lr": 0.01}
SHOWN = ["stability_mcc", "shared_07"]


class Done(NamedTuple):
    """A suite that has been run: two seeds of one recipe, one of another, and a control of each kind."""

    place: Place
    definition: dict[str, Any]


@pytest.fixture(scope="module")
def done(world: World, tmp_path_factory: pytest.TempPathFactory) -> Done:
    place = Place(tmp_path_factory.mktemp("seeds"))
    changes = {
        "saes": [TOPK, RELU],
        "evals": ["sparsity", "reconstruction", "fidelity", "stability"],
        "controls": ["identity", "random", "frozen_decoder"],
        "reports": [{"leaderboard": {"metrics": ["explained_variance", *SHOWN]}}],
    }
    path = place.folder / "suite.yaml"
    path.write_text(yaml.safe_dump(whole_definition(world) | changes), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["saebench", *place.arguments(path)])
        assert cli.main() == 0
    return Done(place, changes)


@pytest.fixture
def two_seeds(done: Done, place: Place, write_suite: WriteSuite) -> Path:
    """The suite with all that was made of it, to go on with."""
    for name in ("results", "checkpoints", "cache"):
        shutil.copytree(done.place.folder / name, place.folder / name)
    return write_suite(**done.definition)


@pytest.fixture
def unscored(done: Done, place: Place, write_suite: WriteSuite) -> Path:
    """The suite trained and not scored, with evals that are quick."""
    shutil.copytree(done.place.checkpoints, place.checkpoints)
    changes = {"evals": ["sparsity", "stability"], "controls": [], "reports": []}
    return write_suite(**done.definition | changes)


def runs(place: Place, eval_name: str = "stability") -> dict[str, Any]:
    """What the manifest names, by SAE."""
    files = results.runs(place.results())
    there = [file for file in files if (place.results() / file).is_file()]
    read = [results.read_run(place.results(), file) for file in there]
    mine = [run for run in read if run["spec"]["eval"]["name"] == eval_name]
    return {run["spec"]["sae"]["name"]: run for run in mine}


def checksums(place: Place) -> dict[str, str]:
    return {name: run["spec"]["sae"]["checksum"] for name, run in runs(place).items()}


def test_seeds_are_compared_and_what_has_none_is_skipped_with_its_reason(done: Done):
    found, known = runs(done.place), checksums(done.place)
    tokens = runs(done.place, "sparsity")["topk-w32-l4-s0"]["scores"][0]["n"]
    for seed in (0, 1):
        mine = found[f"topk-w32-l4-s{seed}"]
        assert mine["spec"]["others"] == [known[f"topk-w32-l4-s{1 - seed}"]]
        assert {score["metric"] for score in mine["scores"]} == set(NAMES)
        assert {score["n"] for score in mine["scores"]} == {tokens}
    left = {name: mine["skipped"] for name, mine in found.items() if "skipped" in mine}
    assert left["relu-w32-l4-s0"] == "no other seed of it is trained in this suite"
    for name, kind in (
        ("identity", "reference"),
        ("random-w32-l4", "control"),
        ("frozen_decoder-w32-l4", "control"),
    ):
        assert left[name].endswith(f"other seeds of itself, and a {kind} has none")
    assert all("others" not in found[name]["spec"] for name in left)


def test_a_leaderboard_shows_what_it_is_asked_for_and_says_what_is_skipped(done: Done):
    board = (done.place.results() / "leaderboard.md").read_text()
    header = next(line for line in board.splitlines() if line.startswith("| SAE"))
    assert "stability" in header and "shared" in header
    assert "no other seed of it is trained in this suite" in board


def test_scores_are_those_of_the_weights_with_the_latents_that_fire(done: Done):
    read = results.read(done.place.results())
    fired = {sae: units.num > 0 for sae, units in results.units(read, "density").items()}
    names = ["topk-w32-l4-s0", "topk-w32-l4-s1"]
    rows = []
    for name in names:
        (file,) = done.place.checkpoints.glob(f"{name}--*/sae.safetensors")
        W_dec = load_file(file)["W_dec"].double()
        rows.append(torch.nn.functional.normalize(W_dec[torch.from_numpy(fired[name])], dim=-1))
    cosines = (rows[0] @ rows[1].T).numpy()
    scored = read.scores[read.scores["eval"] == "stability"].set_index(["sae", "metric"])["value"]
    assert scored[names[0], "stability_mmcs"] == pytest.approx(cosines.max(1).mean(), abs=1e-5)
    assert scored[names[1], "stability_mmcs"] == pytest.approx(cosines.max(0).mean(), abs=1e-5)
    assert scored[names[0], "stability_mmcs_back"] == pytest.approx(cosines.max(0).mean(), abs=1e-5)
    i, j = linear_sum_assignment(cosines, maximize=True)
    assert scored[names[0], "stability_mcc"] == pytest.approx(cosines[i, j].mean(), abs=1e-5)


def test_a_second_run_changes_nothing(run: Run, two_seeds: Path, place: Place):
    before = place.files("results", "checkpoints", "cache")
    assert run(two_seeds).code == 0
    assert place.files("results", "checkpoints", "cache") == before


def test_a_third_seed_makes_new_results_of_the_others_and_of_nothing_else(
    run: Run, unscored: Path, done: Done, place: Place, write_suite: WriteSuite
):
    assert run(unscored).code == 0
    before = place.files("results/tiny/runs")
    quick = {"evals": ["sparsity", "stability"], "controls": [], "reports": []}
    saes = [TOPK | {"seed": [0, 1, 2]}, RELU]
    assert run(write_suite(**done.definition | quick | {"saes": saes})).code == 0
    after = place.files("results/tiny/runs")
    assert {file: after[file] for file in before} == before
    new = sorted(Path(file).name.split("--")[:2] for file in after.keys() - before.keys())
    topk = [f"topk-w32-l4-s{seed}" for seed in range(3)]
    both = [[name, "stability"] for name in topk] + [[topk[2], "sparsity"]]
    assert new == sorted(2 * both), "a file of scores and one of units each"
    found, known = runs(place), checksums(place)
    for name in topk:
        others = sorted(known[other] for other in topk if other != name)
        assert found[name]["spec"]["others"] == others


def test_only_some_are_scored_and_the_others_are_loaded_all_the_same(
    run: Run, unscored: Path, place: Place
):
    assert run(unscored, "--only", "topk*-s0").code == 0
    (scored,) = place.results().glob("runs/*--stability--*.json")
    assert scored.name.startswith("topk-w32-l4-s0")
    assert len(json.loads(scored.read_text())["spec"]["others"]) == 1


def test_a_seed_that_is_trained_later_takes_the_place_of_the_reason(
    run: Run, unscored: Path, place: Place
):
    (other,) = place.checkpoints.glob("topk-w32-l4-s1--*")
    aside = other.rename(place.folder / "aside")
    assert run(unscored, "--only", "topk*-s0").code == 0
    assert "no other seed" in runs(place)["topk-w32-l4-s0"]["skipped"]
    aside.rename(other)
    assert run(unscored).code == 0
    assert all("scores" in runs(place)[f"topk-w32-l4-s{seed}"] for seed in (0, 1))


def test_what_is_alike_but_for_its_seed_is_one_family(
    write_suite: WriteSuite, place: Place, monkeypatch: Any
):
    swept = TOPK | {"width": [16, 32], "l0": [2, 4]}
    rated = RELU | {"lr": [0.01, 0.02], "seed": [0, 1]}
    scaled = {"variant": "rescaled", "of": "topk", "width": 32, "l0": 4, "seed": [0, 1]}
    path = write_suite(saes=[swept, rated, scaled], evals=["stability"], controls=[])
    loaded = suite.load(path)
    folders = (place.folder / "results", place.checkpoints, None)
    bench = runner.Workbench(loaded, path, runner.Options(*folders, "cpu", None, False))
    families: dict[str, list[str]] = {}
    for train_run in bench.train_runs():
        families.setdefault(runner.family(train_run), []).append(train_run.sae.name)
    assert len(families) == 4 + 2 + 1
    for names in families.values():
        first, second = names
        assert first.replace("-s0", "-s1") == second


def test_weights_are_loaded_once_for_a_family(
    run: Run, unscored: Path, done: Done, place: Place, write_suite: WriteSuite, monkeypatch: Any
):
    loaded: list[str] = []
    native = runner._native

    def counting(folder: Path) -> Any:
        loaded.append(folder.name.partition("--")[0])
        return native(folder)

    monkeypatch.setattr(runner, "_native", counting)
    evals = ["stability", {"stability": {"tokens": 100}}]
    path = write_suite(**done.definition | {"evals": evals, "controls": [], "reports": []})
    assert run(path).code == 0
    assert sorted(loaded) == ["topk-w32-l4-s0", "topk-w32-l4-s1"]
    scores = results.read(place.results()).scores
    n = {params: set(of["n"]) for params, of in scores.groupby("params")}
    assert n["tokens=100"] == {100} and min(n["tokens=131072"]) > 500


@pytest.mark.parametrize("where", ["densities", "scores"])
def test_what_fails_leaves_the_rest_finished(
    run: Run, unscored: Path, place: Place, monkeypatch: Any, caplog: Any, where: str
):
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("a defect of the eval")

    owner, name = (runner, "_seeded") if where == "densities" else (Stability, "scores")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, broken)
        ended = run(unscored)
    assert ended.code == 1 and "2 runs failed" in ended.err
    assert "scoring topk-w32-l4-s0 failed" in caplog.text
    kept = {path.name.rpartition("--")[0] for path in place.results().glob("runs/*.json")}
    topk = {f"topk-w32-l4-s{seed}--sparsity" for seed in (0, 1)}
    assert kept == topk | {f"relu-w32-l4-s0--{name}" for name in ("sparsity", "stability")}


def test_what_the_eval_skips_is_kept_with_its_reason(
    run: Run, unscored: Path, place: Place, monkeypatch: Any
):
    def silent(bench: Any, at: Any, saes: Any, tokens: int) -> dict[str, Seeded]:
        return {name: Seeded(sae, np.zeros(sae.d_sae), 5) for name, sae in saes.items()}

    monkeypatch.setattr(runner, "_seeded", silent)
    assert run(unscored).code == 0
    assert "fires on 5 tokens" in runs(place)["topk-w32-l4-s0"]["skipped"]


# Elsewhere


def test_a_submission_has_no_other_seed(
    run: Run, saebench: Run, two_seeds: Path, place: Place, tmp_path: Path
):
    (trained,) = place.checkpoints.glob("relu-*")
    mine = changed(trained, tmp_path / "given" / "mine")
    folders = [
        part
        for name in ("results", "checkpoints", "cache")
        for part in (f"--{name}", place.folder / name)
    ]
    ended = saebench("submit", mine, "--suite", two_seeds, "--name", "mine", *folders)
    assert ended.code == 0, ended.err
    told = "it would be compared with other seeds of itself, and a checkpoint has none"
    assert runs(place)["mine"]["skipped"] == told
    assert run(two_seeds).code == 0
    assert runs(place)["mine"]["skipped"] == told, "the next run asks the same of it"


def test_a_bundle_with_scores_that_compare_seeds_is_refused():
    spec = {"eval": {"name": "stability", "version": Stability.version, "params": {}}}
    scored = ScoredRun({"spec": spec, "scores": []}, {})
    (problem,) = verification._wrong_eval(scored)
    assert "has to be skipped" in problem
    assert not list(verification._wrong_eval(ScoredRun({"spec": spec, "skipped": "none"}, {})))


def test_the_plan_says_what_it_leaves_out(write_suite: WriteSuite):
    path = write_suite(evals=["sparsity", "stability"])
    assert planner._left_out(suite.load(path)) == [
        "  stability: between seeds, not in the estimate"
    ]


def test_it_is_among_the_evals_that_a_suite_can_name():
    assert registry.get("evals", "stability") is Stability
