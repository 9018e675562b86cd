"""Labelled tasks of a synthetic world against what its tokens are made of."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from saebench import labelled, sparse, worldlabels
from saebench.cache import Cache
from saebench.controls._control import Known, Material, Planned
from saebench.controls.oracle import Oracle
from saebench.errors import UserError
from saebench.evals.sparse_probing import SparseProbing
from saebench.lab import ModelLab
from saebench.labelled import SYNTHETIC, Options, Texts
from saebench.synthetic import SITE, SyntheticSubject, world_text
from saebench.types import Omitted
from saebench.worlds import SMALL, World
from tests.toys import ToyLab

RECIPE = replace(
    SMALL, n_features=100, d=24, roots=4, branching=2, depth=3, least=2e-4, separation_steps=20
)
TOKENS = 4_000
SIZES = (200, 60, 200)
OURS = (Texts(source=SYNTHETIC),)


def subject_of(cache=None, context=64):
    identity = {"id": "tiny", "revision": "0", "dtype": "float32"}
    tokens = world_text(context, 640, 640, 0)
    return SyntheticSubject(World(RECIPE, "cpu"), tokens, identity, Cache(cache), 10)


@pytest.fixture(scope="module", autouse=True)
def _few_tokens():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worldlabels, "TOKENS", TOKENS)
        yield


@pytest.fixture(scope="module")
def lab():
    return ModelLab(subject_of(), None, Path())


@pytest.fixture(scope="module")
def found(lab):
    return worldlabels.read(lab, lab.truth, SIZES, 0)


@pytest.fixture(scope="module")
def fires(lab, found):
    """Which features fire on each example, from the world itself: row after row."""
    rows = [
        lab.subject.world.magnitudes(int(e.ids[0]), len(e.ids))[e.wanted] for e in found.excerpts
    ]
    return (torch.cat(rows) > 0).numpy()


def answer(name, fires, parents):
    """Positives and negatives that a task should have, read off its name."""
    words = name.split()
    if words[1] == "and":
        i, j = int(words[0]), int(words[2])
        return fires[:, i] & fires[:, j], fires[:, i] ^ fires[:, j]
    if words[1] == "or":
        either = fires[:, int(words[0])] | fires[:, int(words[2])]
        return either, ~either
    if words[0] == "child":
        i, parent = int(words[1]), int(words[3])
        assert parents[i] == parent
        return fires[:, i], fires[:, parent] & ~fires[:, i]
    i = int(words[-1])
    return fires[:, i], ~fires[:, i]


def test_labels_are_those_of_the_world(lab, found, fires):
    parents = lab.truth.parents.tolist()
    for name, task in found.tasks.items():
        positive, negative = answer(name, fires, parents)
        assert positive[task.examples[task.y]].all(), name
        assert negative[task.examples[~task.y]].all(), name


def test_every_task_is_balanced_in_every_split_and_no_larger_than_asked(found):
    for name, task in found.tasks.items():
        for part, size in enumerate(SIZES):
            y = task.y[found.split[task.examples] == part]
            assert 10 <= len(y) <= size and y.sum() * 2 == len(y), name
        assert (np.diff(task.examples) > 0).all()


def test_there_are_tasks_of_every_kind(found):
    kinds = ("feature ", "rare feature ", " and ", " or ", "child ")
    counts = [sum(kind in name for name in found.tasks) for kind in kinds]
    assert all(counts), counts
    assert sum(name.startswith("feature ") for name in found.tasks) <= 24
    assert counts[2] <= 12 and counts[3] <= 12 and counts[4] <= 12


def test_rates_of_single_features_are_in_their_range(lab, found):
    known = lab.known_tokens(0, TOKENS)
    rates = known.features.indices.bincount(minlength=RECIPE.n_features) / known.rows.size
    for name in found.tasks:
        if name.startswith(("feature", "rare feature")):
            low, high = (0.0007, 0.005) if name.startswith("rare") else (0.005, 0.2)
            assert low <= float(rates[int(name.split()[-1])]) < high, name


def test_conjunctions_are_of_different_trees_and_have_no_feature_in_common(lab, found):
    parents, seen = lab.truth.parents.tolist(), []

    def root(i):
        return i if parents[i] < 0 else root(parents[i])

    for name in found.tasks:
        if " and " in name:
            i, j = map(int, name.split(" and "))
            assert root(i) != root(j)
            seen += [i, j]
    assert len(set(seen)) == len(seen)


def test_what_has_too_few_examples_is_named(found):
    assert found.omitted and all(o.what.startswith("synthetic:") for o in found.omitted)
    assert not {o.what.removeprefix("synthetic:") for o in found.omitted} & found.tasks.keys()
    assert all("positive" in o.reason or "negative" in o.reason for o in found.omitted)


def test_the_tokens_are_of_no_text_and_the_same_whatever_the_context(lab, found):
    other = ModelLab(subject_of(context=32), None, Path())
    again = worldlabels.read(other, other.truth, SIZES, 0)
    assert all(
        np.array_equal(a.ids, b.ids) and np.array_equal(a.wanted, b.wanted)
        for a, b in zip(found.excerpts, again.excerpts, strict=True)
    )
    ids = np.concatenate([excerpt.ids for excerpt in found.excerpts])
    texts = lab.subject.tokens
    assert not np.isin(ids, texts.train).any() and not np.isin(ids, texts.evaluation).any()
    assert all(len(excerpt.ids) <= lab.longest for excerpt in found.excerpts)


def read(lab, seed=0):
    return labelled.read(OURS, lab, Options(*SIZES, seed))


def test_reading_again_gives_the_same_and_another_seed_something_else(lab):
    assert read(lab).fingerprint == read(lab).fingerprint != read(lab, seed=1).fingerprint
    ids = [{int(e.ids[0]) for e in read(lab, seed).sets[0].excerpts} for seed in (0, 1)]
    assert not ids[0] & ids[1]


def test_each_task_counts_alone(lab):
    (made,) = read(lab).sets
    assert made.each_alone and made.name == "synthetic" and made.pool == "token"


def test_a_feature_of_which_too_few_tokens_are_left_is_omitted(lab, monkeypatch):
    monkeypatch.setattr(worldlabels, "TOKENS", 128)
    nothing = worldlabels.read(lab, lab.truth, SIZES, 0)
    assert nothing.omitted and all(isinstance(o, Omitted) for o in nothing.omitted)
    assert read(lab).omitted


# Probes


@pytest.fixture(scope="module")
def eval_():
    sizes = dict(zip(("train", "validation", "test"), SIZES, strict=True))
    return SparseProbing(k=(1, 2), **sizes).filled_in(True)


@pytest.fixture(scope="module")
def prepared(eval_, lab):
    return prepared_by(eval_, lab)


def prepared_by(eval_, lab):
    """With few questions of each kind: probes of all of them take long."""
    with pytest.MonkeyPatch.context() as patch:
        for name, n in (("_SINGLE", 4), ("_PAIRS", 3), ("_CHILDREN", 3)):
            patch.setattr(worldlabels, name, n)
        return eval_.prepare(lab, eval_.read(lab), SITE)


def scores(eval_, lab, prepared, suffix=""):
    width = RECIPE.n_features
    known = Known(lab.subject.truth, lab.subject.features_of)
    material = Material(torch.zeros(1, RECIPE.d), lambda name: name, known)
    sae = Oracle().build(Planned(f"-w{width}{suffix}", width, None), material)
    found = [s for s in eval_.scores(sae, prepared, False) if not isinstance(s, Omitted)]
    return {s.metric: dict(zip(s.ids, s.num.tolist(), strict=True)) for s in found}


def test_one_latent_of_the_oracle_answers_what_is_asked_of_one_feature_and_no_conjunction(
    eval_, lab, prepared
):
    found = scores(eval_, lab, prepared)
    for name, auc in found["probe_auc_k1"].items():
        single = "feature" in name or "child" in name
        assert auc == 1 if single else auc < 1, name
    assert sum(found["probe_auc_k2"].values()) > sum(found["probe_auc_k1"].values())


def test_an_oracle_knows_tokens_whose_activations_were_kept_on_disk(eval_, tmp_path):
    first, again = (ModelLab(subject_of(tmp_path), None, Path()) for _ in range(2))
    found = scores(eval_, first, prepared_by(eval_, first))
    again.subject.read = lambda *_: pytest.fail("read again")
    assert scores(eval_, again, prepared_by(eval_, again)) == found


def test_a_spoilt_oracle_answers_less(eval_, lab, prepared):
    def mean(suffix):
        found = scores(eval_, lab, prepared, suffix)
        return np.mean(list(found["probe_auc_k1"].values()))

    assert mean("") > mean("-mixed50") > mean("-dropped50")
    assert mean("") == mean("-permuted50")


# What goes with what


def test_a_language_model_has_no_tokens_of_a_world():
    with pytest.raises(UserError, match="got the model toy and the texts builtin:synthetic"):
        labelled.read(OURS, ToyLab(), Options(*SIZES, 0))


@pytest.mark.parametrize("texts", [Texts(source="builtin:python-stdlib"), Texts(files="a.csv")])
def test_a_world_has_no_text_but_its_own(lab, texts):
    with pytest.raises(UserError, match="these with no other texts; got the model tiny"):
        labelled.read((texts,), lab, Options(*SIZES, 0))


def test_tasks_that_come_along_are_chosen_by_the_kind_of_model():
    said = [SparseProbing().filled_in(synthetic).parameters() for synthetic in (False, True)]
    assert [s["datasets"] for s in said] == [
        [{"source": "builtin:python-stdlib"}],
        [{"source": "builtin:synthetic"}],
    ]
    chosen = SparseProbing(datasets=(Texts(files="a.csv"),))
    assert chosen.filled_in(True) is chosen


def test_features_are_not_held_dense(lab, monkeypatch):
    monkeypatch.setattr(sparse, "to_dense", lambda *_: pytest.fail("dense"))
    assert worldlabels.read(lab, lab.truth, SIZES, 0).tasks
