"""A synthetic world in the place of a language model: through training, scoring, submitting and checking."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from saebench import results, sparse, synthetic
from saebench.cache import Cache
from saebench.errors import UserError
from saebench.synthetic import SITE, SyntheticSubject, load_world, world_text
from saebench.types import Batch, Lab, Site
from saebench.worlds import SMALL
from tests.conftest import Ended, Place, Run

NAME = "builtin:synthetic-small"
TINY = replace(
    SMALL, n_features=80, d=12, roots=4, branching=2, depth=2, least=0.005, separation_steps=0
)


@pytest.fixture(autouse=True)
def _tiny_world(monkeypatch):
    monkeypatch.setitem(synthetic.WORLDS, NAME, TINY)


def subject_of(dtype="float32", context=32, train=640, evaluation=640, seed=0, rows=4):
    loaded = load_world(NAME, dtype, "cpu", Cache(None))
    tokens = world_text(context, train, evaluation, seed)
    return SyntheticSubject(loaded.world, tokens, loaded.identity, Cache(None), rows)


# Rows


def test_rows_of_training_evaluation_and_tasks_never_meet():
    texts = [world_text(32, 100_000, 50_000, seed) for seed in (0, 1, 31)]
    subject = subject_of()
    rows = [
        texts[0].train,
        *(text.evaluation for text in texts),
        *(subject.task_rows(seed, 60_000) for seed in (0, 1, 4095)),
    ]
    ids = np.concatenate([part.ravel() for part in rows])
    assert len(np.unique(ids)) == len(ids) and ids.min() == 0 and ids.dtype == np.int32


def test_there_are_as_many_tokens_as_were_asked_for_and_no_row_more():
    text = world_text(32, 100, 64, 0)
    assert text.train.shape == (4, 32) and text.evaluation.shape == (2, 32)
    assert text.documents.tolist() == [0, 1] and not text.special_ids


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ((32, 64, 2**24 + 1, 0), "eval_tokens is 16,777,217"),
        ((32, 64, 64, 32), "eval_seed 32; .* seeds 0 to 31"),
        ((32, 2**30 + 1, 64, 0), "train_tokens is 1,073,741,825"),
    ],
)
def test_more_tokens_than_a_world_has_are_refused(asked, said):
    with pytest.raises(UserError, match=said):
        world_text(*asked)


@pytest.mark.parametrize(("seed", "tokens"), [(4096, 60_000), (-1, 60_000), (0, 2**17 + 1)])
def test_more_tokens_than_there_are_to_ask_about_are_refused(seed, tokens):
    with pytest.raises(UserError, match=f"the seed is {seed}, for {tokens:,} tokens"):
        subject_of().task_rows(seed, tokens)


# Activations


def test_a_row_is_the_same_alone_as_beside_others():
    subject = subject_of()
    together = subject.read([SITE], subject.eval_rows)[SITE]
    for row, x in zip(subject.eval_rows, together, strict=True):
        assert torch.equal(subject.read([SITE], row[None])[SITE][0], x)
    active = subject.sample(subject.eval_rows).features.offsets.diff() > 0
    distinct = len(torch.unique(together.flatten(0, 1), dim=0))
    assert distinct == int(active.sum()) + 1 > 500  # where nothing fires, only the offset is left


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_batches_of_any_size_are_the_same_text_with_its_features(rows):
    subject = subject_of(rows=rows)
    batches = list(subject.evaluation(SITE))
    assert all(isinstance(batch, Batch) for batch in batches)
    x = torch.cat([batch.x for batch in batches])
    assert torch.equal(x, subject.read([SITE], subject.eval_rows)[SITE].flatten(0, 1))
    assert torch.cat([batch.sequence for batch in batches]).tolist() == [
        row for row in range(20) for _ in range(32)
    ]
    features = sparse.concatenate([batch.features for batch in batches])
    made = sparse.to_dense(features, 80).double() @ subject.truth.directions.double()
    torch.testing.assert_close(x.double(), made + subject.truth.offset.double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(subject.facts(SITE, SITE).mean, x.double().mean(0))


def test_a_text_too_large_to_keep_gives_the_same_batches(monkeypatch):
    kept = torch.cat([batch.x for batch in subject_of().evaluation(SITE)])
    monkeypatch.setattr(synthetic, "_KEPT_BYTES", 0)
    subject = subject_of()
    for _ in range(2):
        assert torch.equal(torch.cat([batch.x for batch in subject.evaluation(SITE)]), kept)
    subject.features_of(kept)


def test_bfloat16_rounds_activations_and_keeps_their_features():
    whole, half = subject_of(), subject_of("bfloat16")
    one, other = (s.sample(s.eval_rows) for s in (whole, half))
    assert torch.equal(other.x, one.x.bfloat16().float()) and not torch.equal(other.x, one.x)
    assert half.read([SITE], half.eval_rows)[SITE].dtype == torch.bfloat16
    found = half.features_of(other.x[5:9])
    assert all(map(torch.equal, found, sparse.take(one.features, torch.arange(5, 9))))


def test_features_of_tokens_that_were_never_sampled_are_not_made_up():
    subject = subject_of()
    with pytest.raises(ValueError, match="no token was sampled yet"):
        subject.features_of(torch.zeros(1, 12))
    subject.sample(subject.eval_rows[:1])
    with pytest.raises(ValueError, match="of no token that was sampled"):
        subject.features_of(subject.read([SITE], subject.eval_rows[1:2])[SITE][0])


def test_there_is_one_site_by_two_names():
    subject = subject_of()
    assert subject.canonical(Site("resid_pre", 0)) == SITE == subject.canonical(SITE)
    for site in (Site("resid_post", 1), Site("mlp_out", 0)):
        with pytest.raises(UserError, match="synthetic-small has no site"):
            subject.check_site(site)


def test_an_unknown_world_is_refused_with_the_names_there_are():
    with pytest.raises(UserError, match="no synthetic world .*16k"):
        load_world("builtin:synthetic-large", "float32", "cpu", Cache(None))


def test_another_recipe_is_another_model(monkeypatch):
    before = load_world(NAME, "float32", "cpu", Cache(None)).identity
    monkeypatch.setitem(synthetic.WORLDS, NAME, replace(TINY, seed=43))
    assert (
        load_world(NAME, "float32", "cpu", Cache(None)).identity["revision"] != before["revision"]
    )


# Suites


EVALS = ["sparsity", "reconstruction", "fidelity", "shrinkage", "geometry"]


def whole(**changes: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "model": {"id": NAME},
        "sites": ["0.resid_post"],
        "text": {
            "source": "builtin:synthetic",
            "context": 32,
            "train_tokens": 3200,
            "eval_tokens": 640,
        },
        "training": {"batch_tokens": 64, "buffer_tokens": 1024},
        "saes": [{"variant": "topk", "width": 40, "l0": 4, "lr": 0.01}],
        "controls": ["identity", "random", "permuted_decoder", "oracle"],
        "evals": EVALS,
        "reports": ["leaderboard"],
    } | changes


@pytest.fixture
def write(place: Place):
    def suite(file: str = "suite.yaml", **changes: Any):
        path = place.folder / file
        path.write_text(yaml.safe_dump(whole(**changes), sort_keys=False), encoding="utf-8")
        return path

    return suite


def scored(place: Place):
    return results.read(place.results())


def test_a_suite_runs_skips_fidelity_with_its_reason_and_has_nothing_left_to_do(
    run: Run, place: Place, write
):
    suite = write()
    ended = run(suite)
    assert ended.code == 0, ended.err
    found = scored(place)
    skipped = found.skips
    fidelity = skipped[skipped["eval"] == "fidelity"]
    assert set(fidelity["sae"]) == set(found.scores["sae"])
    assert all("there is no language model whose loss could rise" in r for r in fidelity["reason"])
    ev = found.scores[found.scores["metric"] == "explained_variance"].set_index("sae")["value"]
    for way in ("mixed", "dropped", "permuted"):
        assert ev["oracle-w40"] > ev[f"oracle-w40-{way}25"] > ev[f"oracle-w40-{way}50"]
    assert ev["identity"] == pytest.approx(1) and ev["topk-w40-l4-s0"] > ev["random-w40-l4"]
    kinds = found.scores.set_index("sae")["kind"]
    assert set(kinds[kinds.index.str.startswith("oracle")]) == {"reference"}
    board = (place.results() / "leaderboard.md").read_text()
    assert "| oracle-w40-dropped25 *(reference)*" in board
    before = place.files("results", "checkpoints")
    assert run(suite).code == 0 and place.files("results", "checkpoints") == before


def test_another_draw_scores_the_same_saes_on_another_text(run: Run, place: Place, write):
    text = whole()["text"] | {"eval_draws": 2}
    plain = {"controls": [], "evals": ["sparsity"]}
    assert run(write(text=text, **plain)).code == 0
    first, weights = place.scores(), place.weights()
    assert run(write(text=text | {"eval_draw": 1}, **plain)).code == 0
    assert place.weights() == weights and len(place.scores()) == 2 * len(first)
    prints = {spec["text"]["fingerprint"] for spec, _ in place.scores().values()}
    assert len(prints) == 2


def test_bfloat16_suites_run(run: Run, place: Place, write):
    ended = run(write(model={"id": NAME, "dtype": "bfloat16"}))
    assert ended.code == 0, ended.err
    found = scored(place).scores
    assert set(found[found["sae"] == "oracle-w40"]["metric"]) >= {"l0", "explained_variance"}


def test_a_dry_run_plans_and_writes_nothing(run: Run, place: Place, write):
    ended = run(write(), "--dry-run")
    assert ended.code == 0 and "to score: 11 SAEs" in ended.out, ended
    assert not place.files("results", "checkpoints", "cache")


WRONG = {
    "another site": ({"sites": ["1.resid_post"]}, "has no site 1.resid_post"),
    "text of another kind": (
        {"text": whole()["text"] | {"source": "builtin:python-stdlib"}},
        "text.source: the text builtin:synthetic goes with",
    ),
    "a language model": (
        {"model": {"id": "builtin:pylm"}, "controls": []},
        "text.source: the text builtin:synthetic goes with",
    ),
    "end to end": (
        {"saes": [{"variant": "end_to_end", "width": 40, "l0": 4}]},
        "saes.0: end_to_end is trained through a language model",
    ),
    "untrained_lm": ({"controls": ["untrained_lm"]}, "controls.0: untrained_lm is of a language"),
    "an oracle of a language model": (
        {
            "model": {"id": "builtin:pylm"},
            "text": whole()["text"] | {"source": "builtin:python-stdlib"},
        },
        "controls.3: oracle is made of the true features, and nobody knows those of a language",
    ),
    "too many tokens": (
        {"text": whole()["text"] | {"eval_tokens": 2**24 + 1}},
        "at most 16,777,216 evaluation tokens",
    ),
    "an unknown world": ({"model": {"id": "builtin:synthetic-tiny"}}, "no synthetic world"),
    "labelled Python": (
        {"evals": [{"sparse_probing": {"datasets": [{"source": "builtin:python-stdlib"}]}}]},
        "these with no other texts; got the model builtin:synthetic-small",
    ),
    "a share of nothing": (
        {"controls": [{"oracle": {"permuted": [0.01]}}]},
        "spoils 0 of 40 latents with permuted 0.01",
    ),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_what_a_world_cannot_do_is_refused_before_anything_is_done(
    run: Run, place: Place, write, case
):
    changes, said = case
    ended = run(write(**changes))
    assert ended.code == 2 and said in ended.err, ended
    assert not place.files("checkpoints")


def test_a_checkpoint_is_checked_submitted_and_verified(
    run: Run, saebench: Run, place: Place, write
):
    suite = write(saes=[{"variant": "topk", "width": 40, "l0": [2, 4, 6], "lr": 0.01}])
    assert run(suite).code == 0
    mine = next(place.checkpoints.glob("topk-w40-l4-*"))
    folders = [p for n in ("results", "checkpoints", "cache") for p in (f"--{n}", place.folder / n)]
    changed = scaled(mine, place.folder / "mine")

    def command(*arguments: Any) -> Ended:
        return saebench(*arguments, "--device", "cpu")

    assert command("check", changed).code == command("check", suite).code == 0
    bundle = place.folder / "mine.zip"
    ended = command(
        "submit", changed, "--suite", suite, "--name", "mine", "--bundle", bundle, *folders
    )
    assert ended.code == 0 and "mine" in (place.results() / "leaderboard.md").read_text(), ended
    ended = command(
        "verify", bundle, "--suite", suite, "--checkpoint", changed, "--cache", place.folder / "k"
    )
    assert ended.code == 0, ended


def scaled(source, out):
    import hashlib
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(source, out)
    weights = load_file(out / "sae.safetensors")
    save_file(weights | {"W_dec": 0.9 * weights["W_dec"]}, out / "sae.safetensors")
    record = json.loads((out / "sae.json").read_text())
    record["checksum"] = hashlib.sha256((out / "sae.safetensors").read_bytes()).hexdigest()
    (out / "sae.json").write_text(json.dumps(record))
    return out


def test_probing_finds_its_tasks_without_being_told(run: Run, place: Place, write, monkeypatch):
    monkeypatch.setattr("saebench.worldlabels.TOKENS", 2_000)
    monkeypatch.setattr("saebench.worldlabels._SINGLE", 4)
    monkeypatch.setattr("saebench.worldlabels._PAIRS", 1)
    monkeypatch.setattr("saebench.worldlabels._CHILDREN", 1)
    small = {"sparse_probing": {"k": [1], "train": 100, "validation": 20, "test": 100}}
    ended = run(
        write(
            evals=["sparsity", small],
            controls=[{"oracle": {"mixed": [], "dropped": [], "permuted": []}}],
        )
    )
    assert ended.code == 0, ended.err
    found = scored(place).scores
    auc = found[found["metric"] == "probe_auc_k1"].set_index("sae")["value"]
    assert auc["oracle-w40"] > auc["topk-w40-l4-s0"]
    specs = [spec for spec, _ in place.scores().values() if spec["eval"]["name"] != "sparsity"]
    assert all(
        spec["eval"]["params"]["datasets"] == [{"source": "builtin:synthetic"}] for spec in specs
    )


def test_the_lab_of_a_world_is_a_lab():
    from pathlib import Path

    from saebench.lab import ModelLab

    lab = ModelLab(subject_of(), None, Path())
    known = lab.known_tokens(3, 300)
    assert isinstance(lab, Lab) and known.rows.shape == (3, 128)
    assert len(known.features.offsets) == 3 * 128 + 1
