"""Sparse probing, against a dense calculation with NumPy and scikit-learn."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score

from saebench import logistic, sparse
from saebench.evals import sparse_probing
from saebench.evals.sparse_probing import K_CHOICES, SparseProbing
from saebench.labelled import Labelled, Texts
from saebench.types import Omitted, Score, Site, Skip
from tests import toys
from tests.models import byte_tokenizer
from tests.test_logistic import Largest
from tests.toys import WORDS, D

SITE = Site("toy", 0)
EVAL = SparseProbing(k=(1, 2, 5))


class Coder:
    """An SAE of any function; it has no weights."""

    def __init__(self, encode, d_sae, d_in=D):
        self.encode, self.d_sae, self.d_in = encode, d_sae, d_in

    def encode_sparse(self, x):
        return sparse.from_dense(self.encode(x))

    def decode(self, z):
        raise NotImplementedError

    decode_sparse = decode


@pytest.fixture(scope="module")
def lab():
    return toys.ToyLab()


@pytest.fixture(scope="module")
def reading(lab):
    return toys.labelled_text(lab)


@pytest.fixture(scope="module")
def prepared(lab, reading):
    return EVAL.prepare(lab, reading, SITE)


@pytest.fixture(scope="module")
def sae():
    """Some latents are dead, some rare, some dense."""
    sae = toys.sae_of("relu")
    sae.b_enc.copy_(torch.linspace(-8, 4, toys.D_SAE))
    return sae


def scores(sae, prepared, shuffled=False, eval_=EVAL):
    found = eval_.scores(sae, prepared, shuffled)
    return {score.metric: score for score in found if isinstance(score, Score)}


def values(*args, **kwargs):
    return {name: score.num for name, score in scores(*args, **kwargs).items()}


def same(found, expected, near=1e-12):
    """All but what conjugate gradients give, which is rounded differently."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = max(near, 2e-3) if name.endswith("_all") else near
        assert found[name] == pytest.approx(value, abs=tolerance), name


def only(prepared, *names):
    kept = [i for i, s in enumerate(prepared.sets) if s.name in names]
    tasks = np.repeat(np.arange(len(prepared.sets)), [len(s.tasks) for s in prepared.sets])
    return prepared._replace(
        sets=tuple(prepared.sets[i] for i in kept),
        activations=tuple(prepared.activations[i] for i in kept),
        raw=prepared.raw[np.isin(tasks, kept)],
    )


# The same from dense arrays


def pooled(set_, x):
    return np.stack([x[set_.example_of == i].mean(0) for i in range(set_.n_examples)])


def dense_ranking(Z, y):
    gap = np.abs(Z[y].mean(0) - Z[~y].mean(0))
    return [j for j in np.argsort(-gap.round(9), kind="stable") if Z[:, j].any()]


def dense_probe(Z, split, y):
    """AUC and accuracy on test, with C chosen on validation."""
    found = []
    for C in logistic.GRID:
        model = LogisticRegression(C=C, tol=1e-10, solver="newton-cholesky")
        f = model.fit(Z[split == 0], y[split == 0]).decision_function(Z)
        auc = roc_auc_score(y[split == 1], f[split == 1])
        loss = log_loss(y[split == 1], 1 / (1 + np.exp(-f[split == 1])))
        test, truth = f[split == 2], y[split == 2]
        accuracy = ((test > 0) == truth).mean()
        found.append((-auc, loss, C, roc_auc_score(truth, test), accuracy))
    return min(found)[3:]


def dense_scores(Z, set_, k):
    """For each task AUC and accuracy, with k of the scaled features and with all."""
    found = []
    for task in set_.tasks:
        split, rows = set_.split[task.examples], Z[task.examples]
        best = dense_ranking(rows[split == 0], task.y[split == 0])
        chosen = [*(rows[:, best[:n]] for n in k), rows]
        found.append([dense_probe(features, split, task.y) for features in chosen])
    return np.array(found)


def scaled(Z, train):
    active = Z[train] != 0
    scale = np.abs(Z[train]).sum(0) / np.maximum(active.sum(0), 1)
    return Z / np.where(scale > 0, scale, np.inf)


def test_probes_are_those_of_a_dense_calculation_with_scikit_learn(sae, prepared):
    found, names, raw = scores(sae, prepared), [], []
    expected = []
    for set_, x in zip(prepared.sets, prepared.activations, strict=True):
        Z = scaled(pooled(set_, sae.encode(x).double().numpy()), set_.split == 0)
        probes = dense_scores(Z, set_, EVAL.k)
        x = pooled(set_, x.double().numpy())
        train = x[set_.split == 0]
        raws = dense_scores((x - train.mean(0)) / train.std(0), set_, EVAL.k)
        if set_.each_alone:
            names += [f"{set_.name}:{task.name}" for task in set_.tasks]
            expected += list(probes)
            raw += list(raws)
        else:
            names.append(set_.name)
            expected.append(probes.mean(0))
            raw.append(raws.mean(0))
    expected, raw = np.array(expected), np.array(raw)
    assert found["probe_auc_k1"].ids == names == ["noisy", "mean", "classes", "each:0", "each:1"]
    for i, end in enumerate(["k1", "k2", "k5", "all"]):
        auc = found[f"probe_auc_{end}"]
        assert auc.num == pytest.approx(expected[:, i, 0], abs=1e-3), end
        assert auc.reference == pytest.approx(raw[:, i, 0].mean(), abs=1e-3)
        gain = found[f"probe_auc_gain_{end}"].num
        assert gain == pytest.approx(expected[:, i, 0] - raw[:, i, 0], abs=2e-3)
        accuracy = found[f"probe_accuracy_{end}"].num
        assert accuracy == pytest.approx(expected[:, i, 1], abs=1 / 120 + 1e-9)
    assert found["probe_auc_raw"].num == pytest.approx(raw[:, -1, 0], abs=1e-3)
    assert 0.6 < expected[:, 1, 0].mean() < 0.95, "otherwise this would show little"


def test_mean_pooling_and_scaling_are_those_of_a_dense_calculation(sae, prepared):
    set_, x = prepared.sets[1], prepared.activations[1]
    features = sparse_probing._sae_features(sae, set_, x)
    Z = scaled(pooled(set_, sae.encode(x).double().numpy()), set_.split == 0)
    live = np.flatnonzero(Z[set_.split == 0].any(0))
    assert features.latents.tolist() == live.tolist() and 5 < len(live) < toys.D_SAE
    found = sparse.to_dense(features.code, len(live)).numpy()
    assert found == pytest.approx(Z[:, live], abs=1e-6)


def test_examples_may_come_in_any_order(sae, prepared):
    """Excerpts are sorted by length, and an example may have positions in several."""
    set_, x = prepared.sets[1], prepared.activations[1]
    order = np.random.default_rng(0).permutation(len(x))
    shuffled = set_._replace(example_of=set_.example_of[order])
    a = sparse_probing._sae_features(sae, set_, x).code
    b = sparse_probing._sae_features(sae, shuffled, x[order]).code
    assert torch.equal(a.indices, b.indices) and torch.equal(a.offsets, b.offsets)
    torch.testing.assert_close(a.values, b.values)


# Laws


def test_a_latent_that_is_the_label_is_all_that_a_probe_needs(lab):
    y = lab.table[:, 0] > 0.5
    tokens = np.arange(WORDS)[:, None]
    set_ = toys.probe_set("easy", tokens, y.numpy())
    prepared = EVAL.prepare(lab, Labelled((set_,), (), ""), SITE)
    noise = torch.randn(D, 30, generator=torch.Generator().manual_seed(0))
    sae = Coder(lambda x: torch.cat([(x @ noise).relu(), (x[:, :1] > 0.5) * 0.01], 1), 31)
    found = values(sae, prepared)
    for end in ("k1", "k2", "k5", "all"):
        assert found[f"probe_auc_{end}"].tolist() == [1.0]
        assert found[f"probe_accuracy_{end}"].tolist() == [1.0]
    (question,) = sparse_probing._questions((set_,), [features_of(sae, prepared)], False)
    assert sparse_probing._best(question, 1).tolist() == [30]


def features_of(sae, prepared):
    return sparse_probing._sae_features(sae, prepared.sets[0], prepared.activations[0])


@pytest.mark.parametrize("factor", [2.0**-20, 1e3])
def test_the_scale_of_a_latent_does_not_matter(sae, prepared, factor):
    scales = factor ** torch.linspace(-1, 1, toys.D_SAE)
    other = Coder(lambda x: sae.encode(x) * scales, toys.D_SAE)
    same(values(other, prepared), values(sae, prepared), near=1e-9)


def test_the_sign_of_a_latent_does_not_matter(sae, prepared):
    same(values(Coder(lambda x: -sae.encode(x), toys.D_SAE), prepared), values(sae, prepared))


def test_the_order_of_latents_does_not_matter(sae, prepared):
    order = torch.randperm(toys.D_SAE, generator=torch.Generator().manual_seed(1))
    other = Coder(lambda x: sae.encode(x)[:, order], toys.D_SAE)
    same(values(other, prepared), values(sae, prepared), near=1e-9)


def test_latents_that_never_fire_do_not_matter(sae, prepared):
    other = Coder(lambda x: torch.nn.functional.pad(sae.encode(x), (50, 70)), toys.D_SAE + 120)
    same(values(other, prepared), values(sae, prepared))


def test_how_much_is_done_at_a_time_does_not_matter(sae, prepared, monkeypatch):
    whole = values(sae, prepared)
    monkeypatch.setattr(sparse_probing, "_TOKENS", 7)
    monkeypatch.setattr(sparse_probing, "_HELD", 1)
    same(values(sae, prepared), whole)


def test_labels_that_are_dealt_out_anew_cannot_be_learned(lab, sae):
    y = lab.table[:, 0] > 0.5
    rng = np.random.default_rng(0)
    sets = tuple(
        toys.probe_set(f"set {i}", rng.permutation(WORDS)[:, None], None, tasks=())
        for i in range(9)
    )
    sets = tuple(
        s._replace(tasks=toys.probe_set("", [[0]] * WORDS, y[[e.ids[0] for e in s.excerpts]]).tasks)
        for s in sets
    )
    prepared = EVAL.prepare(lab, Labelled(sets, (), ""), SITE)
    found, control = values(sae, prepared), values(sae, prepared, shuffled=True)
    for end in ("k1", "k5", "all"):
        mean, error = (
            control[f"probe_auc_{end}"].mean(),
            control[f"probe_auc_{end}"].std() / 9**0.5,
        )
        assert abs(mean - 0.5) < 3.5 * error and error < 0.07
        assert found[f"probe_auc_{end}"].mean() > 0.75
    again = values(sae, prepared, shuffled=True)
    assert all(again[name].tolist() == control[name].tolist() for name in control)
    assert control["probe_auc_raw"].tolist() == found["probe_auc_raw"].tolist()


def test_dealing_out_anew_keeps_each_split_s_counts_and_the_test_s_labels(prepared):
    set_ = prepared.sets[0]
    parts = [set_.split == part for part in range(3)]
    y = sparse_probing._shuffled(set_, set_.tasks[0], parts)
    old = set_.tasks[0].y
    assert [y[p].sum() for p in parts] == [old[p].sum() for p in parts]
    assert (y[parts[2]] == old[parts[2]]).all()
    assert (y[parts[0]] != old[parts[0]]).any() and (y[parts[1]] != old[parts[1]]).any()


def test_nothing_is_chosen_on_test(sae, prepared, monkeypatch):
    """With other labels on test, every probe gives every test example the same score as before."""
    learned = []
    judge = sparse_probing._test_scores

    def noted(*args):
        for found in judge(*args):
            learned.append(found.clone())
            yield found

    monkeypatch.setattr(sparse_probing, "_test_scores", noted)
    before = values(sae, prepared)
    first = learned.copy()
    learned.clear()
    corrupted = []
    for set_ in prepared.sets:
        rng = np.random.default_rng(0)
        tasks = []
        for task in set_.tasks:
            y, test = task.y.copy(), set_.split[task.examples] == 2
            y[test] = rng.random(test.sum()) < 0.5
            tasks.append(task._replace(y=y))
        corrupted.append(set_._replace(tasks=tuple(tasks)))
    after = values(sae, prepared._replace(sets=tuple(corrupted)))
    assert all(torch.equal(a, b) for a, b in zip(first, learned, strict=True)) and len(first) == 4
    assert np.abs(after["probe_auc_all"] - before["probe_auc_all"]).max() > 0.05


def test_an_sae_that_never_fires_knows_nothing(prepared):
    dead = Coder(lambda x: torch.zeros(len(x), 9), 9)
    found = scores(dead, prepared)
    for end in ("k1", "k5", "all"):
        assert found[f"probe_auc_{end}"].num.tolist() == [0.5] * 5
    y, split = prepared.sets[3].tasks[0].y, prepared.sets[3].split
    majority = y[split == 0].mean() > 0.5
    expected = (y[split == 2] == majority).mean()
    assert expected != 0.5 and found["probe_accuracy_all"].num[3] == expected


def test_latents_that_fire_on_no_training_example_of_a_task_are_not_chosen(lab):
    set_ = toys.probe_set("x", np.arange(20)[:, None], np.arange(20) % 2 == 0)
    z = torch.zeros(WORDS, 3)
    z[[3, 4, 8, 9, 13, 14, 18, 19], 0] = 1  # validation and test alone
    z[:10, 1] = 1
    z[:20, 2] = 1
    prepared = EVAL.prepare(lab, Labelled((set_,), (), ""), SITE)._replace(activations=(z[:20],))
    sae = Coder(lambda x: x, 3)
    features = features_of(sae, prepared)
    (question,) = sparse_probing._questions((set_,), [features], False)
    assert features.latents.tolist() == [1, 2]
    assert sorted(sparse_probing._best(question, 5).tolist()) == [0, 1]


def test_memory_does_not_grow_with_width_times_tokens(lab):
    """Two million latents: a dense code of a single token would be seen."""
    width, tokens = 2**21, np.random.default_rng(0).integers(WORDS, size=(500, 20))
    y = np.arange(500) % 3 == 0
    set_ = toys.probe_set("wide", tokens, y, pool="mean")
    prepared = EVAL.prepare(lab, Labelled((set_,), (), ""), SITE)

    class Wide(Coder):
        def encode_sparse(self, x):
            columns = (x[:, :4].abs() * 1e4).long().sort(1).values * 4 + torch.arange(4)
            return sparse.from_columns(columns, x[:, :4].abs() + 0.1)

    with Largest() as largest:
        found = values(Wide(lambda x: x, width), prepared)
    assert found["probe_auc_all"].shape == (1,)
    assert largest.numbers < width


# What is scored, and what is not


def test_sets_of_one_source_are_a_cluster(sae, prepared):
    found = scores(sae, prepared)["probe_auc_all"]
    assert found.clusters == ["noisy", "mean", "noisy", "each:0", "each:1"]
    assert found.n == sum((s.split == 2).sum() for s in prepared.sets)
    apart = scores(sae, only(prepared, "mean", "each"))["probe_auc_all"]
    assert apart.clusters is None and apart.ids == ["mean", "each:0", "each:1"]


def test_only_what_is_asked_for_is_scored(sae, prepared):
    found = scores(sae, prepared, eval_=SparseProbing(k=(50, 1)))
    ends = {name.rpartition("_")[2] for name in found}
    assert ends == {"k1", "k50", "all", "raw"}
    few = only(prepared, "noisy")
    a, b = (values(sae, few, eval_=SparseProbing(k=k)) for k in ((1,), (1, 2, 20)))
    assert all(a[name].tolist() == b[name].tolist() for name in a if "k1" in name)


def test_more_latents_than_there_are_is_all_of_them(sae, prepared):
    few = only(prepared, "noisy", "mean")
    found = values(sae, few, eval_=SparseProbing(k=(50,)))
    assert found["probe_auc_k50"] == pytest.approx(found["probe_auc_all"], abs=1e-3)


def test_what_is_left_out_comes_with_the_scores(sae, prepared):
    assert EVAL.scores(sae, prepared, False)[-1] == Omitted("left:out", "for a reason")


def test_without_any_dataset_the_eval_is_skipped(lab, sae):
    omitted = (Omitted("a", "empty"), Omitted("b", "no classes"))
    prepared = EVAL.prepare(lab, Labelled((), omitted, ""), SITE)
    with pytest.raises(Skip, match="no dataset can be probed: 2 are left out"):
        EVAL.scores(sae, prepared, False)


def test_raw_probes_are_kept_by_text_and_site_whatever_k_is_asked_for(reading):
    lab = toys.ToyLab()
    for eval_, site in ((EVAL, SITE), (SparseProbing(k=(20,)), SITE), (EVAL, Site("toy", 1))):
        assert eval_.prepare(lab, reading, site).raw.shape == (7, len(K_CHOICES) + 1)
    assert lab.computed[0] == lab.computed[1] != lab.computed[2]
    json.dumps(lab.computed[0])


def test_a_dimension_that_does_not_vary_is_left_out(lab):
    lab = toys.ToyLab()
    lab.table[:, 2] = 0.1
    set_ = toys.probe_set("x", np.arange(WORDS)[:, None], np.arange(WORDS) % 2 == 0)
    prepared = EVAL.prepare(lab, Labelled((set_,), (), ""), SITE)
    features = sparse_probing._raw_features(set_, prepared.activations[0])
    assert features.latents.tolist() == [0, 1, 3, 4, 5] and np.isfinite(prepared.raw).all()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"k": (3,)}, r"k is \[3\]; expected a list of some of 1, 2, 5, 10, 20, 50"),
        ({"k": ()}, r"k is \[\]; expected"),
        ({"k": (5, 5)}, r"k is \[5, 5\]; expected each number once"),
        ({"train": 9}, "train is 9; expected 10 or more"),
        ({"test": 0}, "test is 0; expected 10 or more"),
        ({"datasets": ()}, "datasets is empty; expected one or more"),
    ],
)
def test_what_cannot_be_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        SparseProbing(**given)


def test_parameters_name_no_folder_and_not_the_order_of_k():
    eval_ = SparseProbing(datasets=(Texts(files="/home/somebody/sets/*.csv"),), k=(5, 1))
    assert "somebody" not in json.dumps(eval_.parameters())
    assert eval_.parameters() == dataclasses.replace(eval_, k=(1, 5)).parameters()
    assert eval_.parameters()["k"] == [1, 5]


def test_files_are_read_and_probed(tmp_path, sae):
    """From text to scores: whether the last letter is in the first half of the alphabet."""
    rng = np.random.default_rng(0)
    words = sorted({"".join(rng.choice(list("abcdefgh"), 6)) for _ in range(400)})
    rows = [f"{word},{'early' if word[-1] < 'e' else 'late'}" for word in words]
    (tmp_path / "half.csv").write_text("prompt,target\n" + "\n".join(rows))
    (tmp_path / "one.csv").write_text("prompt,target\na,x\nb,x\n")
    lab = toys.ToyLab()
    lab.tokenizer, lab.folder = byte_tokenizer(), tmp_path
    eval_ = SparseProbing(
        datasets=(Texts(files="*.csv"),), k=(1, 20), train=200, validation=50, test=100
    )
    reading = eval_.read(lab)
    found = eval_.scores(sae, eval_.prepare(lab, reading, SITE), False)
    by_name = {score.metric: score for score in found if isinstance(score, Score)}
    assert by_name["probe_auc_all"].ids == ["half"] and by_name["probe_auc_all"].n == 100
    assert by_name["probe_auc_all"].num > by_name["probe_auc_k1"].num > 0.5
    assert [o.what for o in found if isinstance(o, Omitted)] == ["one"]
