"""What is true of a metric whatever the SAE, and the same numbers from plain NumPy.

Every metric of every eval stands in each table here, so that a new eval cannot arrive untested.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn import metrics

from saebench import matching, registry, sparse
from saebench.evals import geometry
from saebench.evals.fidelity import Fidelity
from saebench.evals.geometry import Geometry
from saebench.evals.ground_truth import GroundTruth
from saebench.evals.reconstruction import Reconstruction
from saebench.evals.shrinkage import Shrinkage
from saebench.evals.sparsity import Sparsity
from saebench.types import Omitted, Score, Seen, Skip
from tests import toys

CODE = "is of the code, whatever comes back from it"
WEIGHTS = "is of the weights"
MODEL = "is of the model alone"
TEXT = "has the same value as another metric, checked in a test of its own"
FOUND = "asks which features were found, whatever comes back from the code"
UNDEFINED = "has no value where the reconstruction never moves"

FEATURES = [metric.name for metric in GroundTruth.metrics]

PERFECT: dict[str, float | str] = {  # its value for x_hat = x, or why there is none
    "explained_variance": 1,
    "mse": 0,
    "cosine": 1,
    "loss_recovered": 1,
    "loss_recovered_mean": 1,
    "ce_loss_increase": 0,
    "kl_divergence": 0,
    "top1_agreement": 1,
    "ce_loss_clean": MODEL,
    "ce_loss_sae": TEXT,
    "ce_loss_zero": MODEL,
    "ce_loss_mean": MODEL,
    "shrinkage": 1,
    "shrinkage_centred": 1,
    "l2_ratio": 1,
    "rescale_gain": 0,
    "l0": CODE,
    "dead_fraction": CODE,
    "density": CODE,
    "dense_fraction": CODE,
    "encoder_decoder_cosine": WEIGHTS,
    "encoder_decoder_cosine_q05": WEIGHTS,
    "encoder_decoder_cosine_q95": WEIGHTS,
    "encoder_decoder_cosine_weighted": WEIGHTS,
    "max_decoder_cosine": WEIGHTS,
    **dict.fromkeys(FEATURES, FOUND),
}
MEAN = PERFECT | {  # the same for x_hat = mean(x), b_dec = mean(x)
    "explained_variance": 0,
    "mse": TEXT,
    "cosine": "depends on how large the mean is beside the spread",
    "loss_recovered": "is above 0 where the mean is a better guess than zero",
    "loss_recovered_mean": 0,
    "ce_loss_increase": TEXT,
    "kl_divergence": "depends on the model",
    "top1_agreement": "depends on the model",
    "shrinkage": 1,  # the mean needs no rescaling: sum |m|^2 = sum m . x
    "shrinkage_centred": UNDEFINED,
    "l2_ratio": "depends on how large the mean is beside the spread",
    "rescale_gain": 0,
}
POWER = dict.fromkeys(PERFECT, 0) | {"mse": 2}  # of a, when the stream is a times as large

LOOSE = dict.fromkeys(  # computed in float32; all else in float64
    ("max_decoder_cosine", "mcc", "mcc_above_chance", "hedging"), 1e-6
)


@pytest.fixture(scope="module")
def world():
    return toys.world()


@pytest.fixture(scope="module")
def sae():
    """A ReLU SAE with dead latents, dense ones, and a bias near the mean of the stream."""
    sae = toys.aligned(toys.sae_of("relu").double())
    sae.b_enc[:5] = -100
    sae.b_enc[5:8] = 20
    sae.b_dec.fill_(0.5)
    return sae


def same(found, expected, tolerance=1e-11):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        near = LOOSE.get(name, tolerance)
        assert found[name] == pytest.approx(value, rel=near, abs=near), name


@pytest.mark.parametrize("table", [PERFECT, MEAN, POWER], ids=["perfect", "mean", "power"])
def test_every_metric_has_its_law(table):
    assert sorted(table) == sorted(toys.all_metrics())


def test_a_toy_sae_is_scored_on_every_metric(sae, world):
    assert sorted(toys.scores(sae, world)) == sorted(toys.all_metrics())


# Laws


@pytest.mark.parametrize("offset", [0.0, 3.0, 1e4])
def test_a_perfect_sae_scores_perfect(offset):
    world = toys.world(offset)
    found = toys.values(toys.Fixed(lambda x: x, world.mean), world)
    for name, expected in PERFECT.items():
        if not isinstance(expected, str):
            assert found[name] == pytest.approx(expected, abs=1e-12), name
    assert found["explained_variance"] == 1 and found["mse"] == 0 == found["ce_loss_increase"]
    assert found["ce_loss_sae"] == found["ce_loss_clean"]


@pytest.mark.parametrize("offset", [0.5, 3.0, 1e4])
def test_predicting_the_mean_explains_nothing(offset):
    world = toys.world(offset)
    found = toys.values(toys.Fixed(lambda x: world.mean.expand_as(x), world.mean), world)
    for name, expected in MEAN.items():
        if not isinstance(expected, str):
            assert found[name] == pytest.approx(expected, abs=1e-12), name
    assert found["explained_variance"] == 0 == found["loss_recovered_mean"]
    assert found["mse"] == pytest.approx(np.var(world.x.numpy(), axis=0).sum())
    assert found["ce_loss_sae"] == found["ce_loss_mean"]
    assert "shrinkage_centred" not in found


def test_zeros_recover_no_loss(world):
    found = toys.values(toys.Fixed(torch.zeros_like), world, evals=[Fidelity(), Reconstruction()])
    assert found["loss_recovered"] == 0 and found["cosine"] == 0


@pytest.mark.parametrize(
    "groups", [[[s] for s in range(8)], [[0, 1, 2], [3], [4, 5, 6, 7]]], ids=["single", "uneven"]
)
def test_chunking_does_not_matter(sae, world, groups):
    same(toys.values(sae, world, groups), toys.values(sae, world))


def test_the_order_of_sequences_does_not_matter(sae, world):
    shuffled = [[5, 0], [7], [3, 2, 6], [1, 4]]
    same(toys.values(sae, world, shuffled), toys.values(sae, world))


def test_which_number_a_sequence_has_does_not_matter(sae, world):
    renamed = replace(world, sequence=world.n_sequences - 1 - world.sequence)
    same(toys.values(sae, renamed), toys.values(sae, world))


@pytest.mark.parametrize("a", [2.0**-10, 2.0**10])  # powers of two scale float32 without rounding
def test_the_unit_of_activations_does_not_matter(sae, world, a):
    scaled = toys.sae_of("relu").double()
    scaled.load_state_dict(sae.state_dict())
    toys.fold(scaled, torch.zeros(toys.D, dtype=torch.float64), a)
    expected = {name: v * a ** POWER[name] for name, v in toys.values(sae, world).items()}
    same(toys.values(scaled, world.scaled(a)), expected)


def test_explained_variance_does_not_feel_a_shift_of_sae_and_stream(sae, world):
    moved = toys.sae_of("relu").double()
    moved.load_state_dict(sae.state_dict())
    shift = torch.linspace(-50, 90, toys.D, dtype=torch.float64)
    toys.fold(moved, shift, 7.0)
    there = replace(world, x=7 * world.x + shift)
    before, after = (
        toys.values(s, w, evals=[Reconstruction()])["explained_variance"]
        for s, w in ((sae, world), (moved, there))
    )
    assert after == pytest.approx(before, rel=1e-11)


def test_the_order_of_latents_does_not_matter(sae, world):
    order = torch.randperm(toys.D_SAE, generator=torch.Generator().manual_seed(1))
    other = toys.sae_of("relu").double()
    weights = sae.state_dict()
    other.load_state_dict(
        {
            "W_enc": weights["W_enc"][:, order],
            "W_dec": weights["W_dec"][order],
            "b_enc": weights["b_enc"][order],
            "b_dec": weights["b_dec"],
        }
    )
    same(toys.values(other, world), toys.values(sae, world))


def test_repeating_gives_the_same_number(sae, world):
    assert toys.values(sae, world) == toys.values(sae, world)


# The same numbers from plain NumPy, over the whole stream at once


class Whole:
    """The whole stream, dense, as arrays."""

    def __init__(self, sae, world):
        self.x = world.x.double().numpy()
        self.z = sae.encode(world.x).numpy()
        x_hat = sae.decode(sae.encode(world.x))
        self.x_hat = x_hat.double().numpy()
        self.W_dec = sae.W_dec.numpy()
        self.W_enc = sae.W_enc.numpy() if hasattr(sae, "W_enc") else None
        self.b_dec = sae.b_dec.numpy()
        self.firing = (self.z != 0).mean(0)
        scored = world.scored.numpy()
        following = world.following[scored]
        streams = {
            "clean": world.x,
            "sae": x_hat,
            "zero": torch.zeros_like(world.x),
            "mean": world.mean.expand_as(world.x),
        }
        log_p = {name: world.log_p(stream)[scored] for name, stream in streams.items()}
        self.loss = {
            name: np.mean([-row[token] for row, token in zip(p, following, strict=True)])
            for name, p in log_p.items()
        }
        clean, new = log_p["clean"], log_p["sae"]
        self.kl = np.mean([(np.exp(p) * (p - q)).sum() for p, q in zip(clean, new, strict=True)])
        self.same = np.mean(clean.argmax(1) == new.argmax(1))
        self.known = Known(self, world)

    def variance(self):
        return ((self.x - self.x.mean(0)) ** 2).sum()

    def explained(self, x_hat):
        return 1 - ((self.x - x_hat) ** 2).sum() / self.variance()

    def gamma(self, shift=0.0):
        x, x_hat = self.x - shift, self.x_hat - shift
        return (x_hat * x_hat).sum() / (x_hat * x).sum()

    def live_cosines(self):
        pairs = zip(self.W_enc.T, self.W_dec, self.firing, strict=True)
        return [cosine(e, d) for e, d, rate in pairs if rate > 0]

    def weighted_cosine(self):
        pairs = list(zip(self.W_enc.T, self.W_dec, self.firing, strict=True))
        return sum(rate * cosine(e, d) for e, d, rate in pairs) / self.firing.sum()

    def nearest(self):
        rows = self.W_dec
        return np.mean(
            [max(cosine(a, b) for j, b in enumerate(rows) if j != i) for i, a in enumerate(rows)]
        )


class Known:
    """The same with its true features, asked token by token."""

    def __init__(self, whole, world):
        self.z, self.a = whole.z, sparse.to_dense(world.features, toys.N_FEATURES).numpy()
        self.W, self.D = whole.W_dec, world.truth.directions.numpy()
        self.cosines = np.array([[abs(cosine(d, D)) for D in self.D] for d in self.W])
        self.of, self.best = self.cosines.argmax(1), self.cosines.argmax(0)
        self.on, self.active = self.z != 0, self.a != 0
        self.live = [i for i in range(len(self.W)) if self.on[:, i].any()]
        self.latents = range(len(self.W))
        self.counts = self.active.sum(0)

    def mcc(self, chance=0.0):
        rows, columns = linear_sum_assignment(-self.cosines)
        return (self.cosines[rows, columns].mean() - chance) / (1 - chance)

    def chance(self):
        """Which has tests of its own."""
        return matching.chance(*self.cosines.shape, toys.D, False).matched

    def found(self, bound, weights=None):
        return np.average(self.cosines.max(0) >= bound, weights=weights)

    def mean(self, score, latents, weights=None):
        pairs = [(self.active[:, self.of[i]], self.on[:, i]) for i in latents]
        scores = [score(truth, said, zero_division=0) for truth, said in pairs]
        return np.average(scores, weights=weights) if scores else None

    def live_at(self, *depths):
        f1, live = metrics.f1_score, self.live
        return self.mean(f1, [i for i in live if toys.DEPTHS[self.of[i]] in depths])

    def live_where(self, wanted):
        """Of features whose count compares so with the quartile."""
        counts = sorted(self.counts[j] for j in {self.of[i] for i in self.live})
        return self.mean(
            metrics.f1_score, [i for i in self.live if wanted(self.counts[self.of[i]], counts)]
        )

    def relatives(self, feature):
        above, family = toys.PARENTS[feature], set()
        for other, parent in enumerate(toys.PARENTS):
            if parent == feature or other == above or (parent == above and parent >= 0):
                family.add(other)
        return family - {feature}

    def hedging(self):
        mixed = [
            max(self.cosines[i, sorted(r)]) for i in self.live if (r := self.relatives(self.of[i]))
        ]
        return np.mean(mixed) if mixed else None

    def parents(self):
        for parent in sorted(set(toys.PARENTS) - {-1}):
            latent = self.best[parent]
            if self.of[latent] == parent and self.cosines[latent, parent] >= 0.7:
                yield parent, latent, [c for c, p in enumerate(toys.PARENTS) if p == parent]

    def absorption(self):
        missed = [
            not self.on[t, latent]
            for _, latent, children in self.parents()
            for child in children
            for t in np.flatnonzero(self.active[:, child])
        ]
        return np.mean(missed) if missed else None

    def alone(self, parent, children):
        return self.active[:, parent] & ~self.active[:, children].any(1)

    def parent_miss(self):
        missed = [~self.on[self.alone(p, c), latent] for p, latent, c in self.parents()]
        missed = np.concatenate([*missed, []])
        return missed.mean() if len(missed) else None

    def absorption_excess(self):
        above, tokens = 0, 0
        for parent, latent, children in self.parents():
            alone = self.alone(parent, children)
            if alone.any():
                usual = (~self.on[alone, latent]).mean()
                for child in children:
                    with_child = self.active[:, child]
                    above += (~self.on[with_child, latent]).sum() - usual * with_child.sum()
                    tokens += with_child.sum()
        return above / tokens if tokens else None

    def magnitudes(self):
        """What is given back, and the truth."""
        near = [i for i in self.latents if self.cosines[i].max() >= 0.7]
        pairs = [
            (self.z[t, i] * (self.W[i] @ self.D[self.of[i]]), self.a[t, self.of[i]])
            for i in near
            for t in np.flatnonzero(self.on[:, i] & self.active[:, self.of[i]])
        ]
        return np.array(pairs).T

    def ratio(self):
        back, a = self.magnitudes()
        return back.sum() / a.sum()

    def error(self):
        back, a = self.magnitudes()
        return abs(back - a).sum() / a.sum()


def cosine(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


def norms(x):
    return np.sqrt((x**2).sum(1))


INDEPENDENT = {
    "explained_variance": lambda w: w.explained(w.x_hat),
    "mse": lambda w: ((w.x - w.x_hat) ** 2).sum(1).mean(),
    "cosine": lambda w: np.mean([cosine(a, b) for a, b in zip(w.x, w.x_hat, strict=True)]),
    "loss_recovered": lambda w: (
        (w.loss["zero"] - w.loss["sae"]) / (w.loss["zero"] - w.loss["clean"])
    ),
    "loss_recovered_mean": lambda w: (
        (w.loss["mean"] - w.loss["sae"]) / (w.loss["mean"] - w.loss["clean"])
    ),
    "ce_loss_increase": lambda w: w.loss["sae"] - w.loss["clean"],
    "kl_divergence": lambda w: w.kl,
    "top1_agreement": lambda w: w.same,
    "ce_loss_clean": lambda w: w.loss["clean"],
    "ce_loss_sae": lambda w: w.loss["sae"],
    "ce_loss_zero": lambda w: w.loss["zero"],
    "ce_loss_mean": lambda w: w.loss["mean"],
    "shrinkage": lambda w: w.gamma(),
    "shrinkage_centred": lambda w: w.gamma(w.b_dec),
    "l2_ratio": lambda w: np.mean(norms(w.x_hat) / norms(w.x)),
    "rescale_gain": lambda w: w.explained(w.x_hat / w.gamma()) - w.explained(w.x_hat),
    "l0": lambda w: (w.z != 0).sum(1).mean(),
    "dead_fraction": lambda w: np.mean(~(w.z != 0).any(0)),
    "density": lambda w: w.firing.mean(),
    "dense_fraction": lambda w: np.mean(w.firing > 0.1),
    "encoder_decoder_cosine": lambda w: np.median(w.live_cosines()),
    "encoder_decoder_cosine_q05": lambda w: np.quantile(w.live_cosines(), 0.05),
    "encoder_decoder_cosine_q95": lambda w: np.quantile(w.live_cosines(), 0.95),
    "encoder_decoder_cosine_weighted": Whole.weighted_cosine,
    "max_decoder_cosine": Whole.nearest,
    "mcc": lambda w: w.known.mcc(),
    "mcc_above_chance": lambda w: w.known.mcc(w.known.chance()),
    "feature_recall_07": lambda w: w.known.found(0.7),
    "feature_recall_09": lambda w: w.known.found(0.9),
    "feature_recall_07_weighted": lambda w: w.known.found(0.7, w.known.counts),
    "uniqueness": lambda w: len(set(w.known.of)) / len(w.known.of),
    "hedging": lambda w: w.known.hedging(),
    "precision": lambda w: w.known.mean(metrics.precision_score, w.known.latents),
    "recall": lambda w: w.known.mean(metrics.recall_score, w.known.latents),
    "f1": lambda w: w.known.mean(metrics.f1_score, w.known.latents),
    "f1_live": lambda w: w.known.mean(metrics.f1_score, w.known.live),
    "f1_weighted": lambda w: w.known.mean(
        metrics.f1_score, w.known.latents, w.known.counts[w.known.of]
    ),
    "f1_depth_0": lambda w: w.known.live_at(0),
    "f1_depth_1": lambda w: w.known.live_at(1),
    "f1_depth_2": lambda w: w.known.live_at(2, 3),
    "f1_free": lambda w: w.known.live_at(-1),
    "f1_rare": lambda w: w.known.live_where(lambda n, counts: n <= np.quantile(counts, 0.25)),
    "f1_frequent": lambda w: w.known.live_where(lambda n, counts: n >= np.quantile(counts, 0.75)),
    "absorption": lambda w: w.known.absorption(),
    "parent_miss": lambda w: w.known.parent_miss(),
    "absorption_excess": lambda w: w.known.absorption_excess(),
    "magnitude_ratio": lambda w: w.known.ratio(),
    "magnitude_error": lambda w: w.known.error(),
}


def test_every_metric_has_an_independent_computation():
    assert sorted(INDEPENDENT) == sorted(toys.all_metrics())


@pytest.mark.parametrize("architecture", registry.names("saes"))
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_every_metric_is_what_plain_numpy_says(architecture, offset):
    world, sae = toys.world(offset), toys.aligned(toys.sae_of(architecture).double())
    toys.fold(sae, torch.full((toys.D,), offset, dtype=torch.float64), 1.5)
    whole = Whole(sae, world)
    found = toys.values(sae, world, [[0, 1], [2, 3, 4, 5, 6], [7]])
    needs_encoder = [name for name in INDEPENDENT if name.startswith("encoder_decoder_cosine")]
    left_out = [] if hasattr(sae, "W_enc") else needs_encoder
    expected = {name: of(whole) for name, of in INDEPENDENT.items() if name not in left_out}
    # None: nothing that the metric is about is there, such as an active latent of a root.
    same(found, {name: v for name, v in expected.items() if v is not None}, tolerance=1e-9)


@pytest.mark.parametrize("offset", [10.0, 1e4])
def test_explained_variance_keeps_its_digits_in_float32_under_a_large_mean(offset):
    world = toys.world(offset, dtype=torch.float32)
    noise = torch.randn(world.x.shape, generator=torch.Generator().manual_seed(0)) * 0.1
    x_hat = world.x + noise
    sae = toys.Fixed(lambda x: x_hat)
    x, back = world.x.numpy().astype(np.longdouble), x_hat.numpy().astype(np.longdouble)
    expected = 1 - ((x - back) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    found = toys.values(sae, world, evals=[Reconstruction()])
    assert 0.9 < expected < 1
    assert found["explained_variance"] == pytest.approx(float(expected), abs=1e-12)


def test_scores_are_kept_for_every_sequence_that_has_tokens(sae, world):
    found = toys.scores(sae, world)
    x, x_hat = world.x, sae.decode(sae.encode(world.x))
    of_third = world.sequence == 3
    error = float((x - x_hat)[of_third].square().sum())
    assert found["mse"].num[3] == pytest.approx(error) and found["mse"].den[3] == 12
    assert len(found["mse"].num) == 8 and found["mse"].n == len(x)
    # Sequence 2 has one token and so no next one: fidelity has no unit for it.
    assert len(found["ce_loss_sae"].num) == 7
    assert found["ce_loss_sae"].n == int(world.scored.sum()) == found["ce_loss_sae"].den.sum()
    assert len(found["density"].num) == toys.D_SAE


# Traps


def test_latents_that_are_negative_count_as_active():
    sae, world = toys.Fixed(lambda x: -x), toys.world()
    assert toys.values(sae, world, evals=[Sparsity()])["l0"] == toys.D


def test_a_density_of_exactly_a_tenth_is_not_dense():
    z = torch.zeros(30, toys.D, dtype=torch.float64)
    z[:3, 0], z[:4, 1] = 1, 1
    world = toys.World(
        torch.ones(30, toys.D, dtype=torch.float64),
        torch.zeros(30, dtype=torch.int64),
        torch.ones(30, dtype=torch.bool),
        np.zeros(30, dtype=np.int64),
        np.zeros((toys.D, toys.VOCABULARY)),
    )
    found = toys.scores(toys.Fixed(lambda x: z), world, evals=[Sparsity()])
    assert found["dense_fraction"].num.tolist() == [0, 1, 0, 0, 0, 0]
    assert found["dead_fraction"].num.tolist() == [0, 0, 1, 1, 1, 1]
    assert found["dead_fraction"].reference == 3 / 30


def test_an_activation_of_zero_has_no_l2_ratio_and_no_nan(world):
    x = world.x.clone()
    x[4] = 0
    found = toys.values(toys.Fixed(lambda x: x / 2), replace(world, x=x), evals=[Shrinkage()])
    assert found["l2_ratio"] == pytest.approx(0.5) == found["shrinkage"]


def test_a_reconstruction_that_points_away_has_no_shrinkage(world):
    tally = Shrinkage().start(toys.Fixed(lambda x: -x), world.facts())
    assert toys.scores(toys.Fixed(lambda x: -x), world, evals=[Shrinkage()]) == {}
    batch = next(world.batches())
    tally.update(toys.Seen(batch, toys.Fixed(lambda x: x).encode_sparse(batch.x), -batch.x, None))
    with pytest.raises(Skip, match="do not point along"):
        tally.scores()


def test_one_global_rescale_gains_what_was_lost_by_shrinking(world):
    half = toys.values(toys.Fixed(lambda x: x / 2), world)
    assert half["shrinkage"] == pytest.approx(0.5)
    assert half["explained_variance"] + half["rescale_gain"] == pytest.approx(1)


def test_dead_latents_have_no_say_in_the_encoder_decoder_cosine(sae, world):
    before = toys.values(sae, world)
    other = toys.sae_of("relu").double()
    other.load_state_dict(sae.state_dict())
    other.W_enc[:, :5] = other.W_dec[:5].T  # perfectly aligned, and never active
    after = toys.values(other, world)
    for end in ("", "_q05", "_q95", "_weighted"):
        assert after["encoder_decoder_cosine" + end] == before["encoder_decoder_cosine" + end]


def test_an_sae_without_directions_skips_geometry(world):
    sae = toys.Fixed(lambda x: x)
    sae.W_dec = None
    with pytest.raises(Skip, match="no decoder directions"):
        Geometry().start(sae, world.facts())


def test_a_sample_of_latents_is_compared_with_all_others(world):
    sae = toys.sae_of("relu", d_sae=300).double()
    everyone = toys.scores(sae, world, evals=[Geometry()])["max_decoder_cosine"].num
    some = toys.scores(sae, world, evals=[Geometry(sample=40)])["max_decoder_cosine"]
    assert len(some.num) == some.n == 40
    assert all(np.isclose(everyone, value, atol=1e-6).any() for value in some.num)
    assert len(np.unique(some.num)) > 30
    again = toys.scores(sae, world, evals=[Geometry(sample=40)])["max_decoder_cosine"]
    assert again.num.tolist() == some.num.tolist()


def test_how_many_latents_are_compared_at_a_time_does_not_matter(sae, world, monkeypatch):
    whole = toys.scores(sae, world, evals=[Geometry()])["max_decoder_cosine"]
    monkeypatch.setattr(geometry, "_CHUNK", 3 * toys.D_SAE)
    parts = toys.scores(sae, world, evals=[Geometry()])["max_decoder_cosine"]
    assert parts.num == pytest.approx(whole.num, abs=1e-6)


def test_random_directions_have_the_nearest_neighbours_that_are_known_for_them():
    """8,192 directions in 512 dimensions: 0.167 measured elsewhere, below sqrt(2 ln F / d) = 0.188."""
    sae = toys.Fixed(lambda x: x)
    sae.W_dec = torch.ones(8192, 512)
    sae.W_enc = None
    world = toys.world()
    found = toys.scores(sae, world, evals=[Geometry(sample=1)])["max_decoder_cosine"]
    assert found.reference == pytest.approx(0.167, abs=0.001)
    assert found.num == pytest.approx(1)


# Closed form: an L1 penalty c takes c / 2 from every active latent


@pytest.mark.parametrize("c", [0.1, 0.6])
@pytest.mark.parametrize("g", [0.5, 1.0, 40.0])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_l1_shrinkage_has_its_closed_form(c, g, dtype, near):
    sae = toys.sae_of("relu", toys.D, toys.D).to(dtype)
    sae.W_enc.copy_(torch.eye(toys.D))
    sae.W_dec.copy_(torch.eye(toys.D))
    sae.b_enc.fill_(-c / 2)
    sae.b_dec.zero_()
    n = sum(toys.LENGTHS)
    x = g * torch.eye(toys.D, dtype=dtype).repeat(n // toys.D, 1)
    world = replace(
        toys.world(),
        x=x,
        sequence=torch.arange(len(x)) // 6,
        scored=torch.ones(len(x), dtype=torch.bool),
    )
    assert sae.encode(x).amax(1) == pytest.approx(np.full(len(x), g - c / 2), rel=near)
    found = toys.values(sae, world)
    for name in ("shrinkage", "shrinkage_centred", "l2_ratio"):
        assert found[name] == pytest.approx(1 - c / (2 * g), rel=near), name
    assert found["l0"] == 1 and found["cosine"] == pytest.approx(1)
    assert found["mse"] == pytest.approx((c / 2) ** 2, rel=20 * near * g / c)


def test_features_of_different_size_shrink_by_the_ratio_of_totals(world):
    sae = toys.sae_of("relu", toys.D, toys.D).double()
    sae.W_enc.copy_(torch.eye(toys.D))
    sae.W_dec.copy_(torch.eye(toys.D))
    sae.b_enc.fill_(-0.1)
    sae.b_dec.zero_()
    sizes = torch.linspace(0.5, 3, len(world.x), dtype=torch.float64)
    x = torch.zeros_like(world.x)
    x[:, 2] = sizes
    found = toys.values(sae, replace(world, x=x), evals=[Shrinkage()])
    g = sizes.numpy()
    assert found["shrinkage"] == pytest.approx(((g - 0.1) ** 2).sum() / ((g - 0.1) * g).sum())
    assert found["l2_ratio"] == pytest.approx(np.mean((g - 0.1) / g))


def test_shares_of_what_ablation_costs_are_left_out_where_it_costs_nothing():
    """A model that ignores its stream: only what is no share is scored."""
    world = toys.world()
    deaf = replace(world, readout=np.zeros_like(world.readout))
    sae = toys.sae_of("relu").double()
    tally = Fidelity().start(sae, deaf.facts())
    for batch in deaf.batches():
        code = sae.encode_sparse(batch.x)
        x_hat = sae.decode_sparse(code)
        tally.update(Seen(batch, code, x_hat, batch.outcome(x_hat)))
    found = tally.scores()
    left_out = [part.what for part in found if isinstance(part, Omitted)]
    assert left_out == ["loss_recovered", "loss_recovered_mean"]
    values = {s.metric: s.num.sum() / s.den.sum() for s in found if isinstance(s, Score)}
    assert values["ce_loss_increase"] == pytest.approx(0, abs=1e-12)
    assert values["ce_loss_clean"] == pytest.approx(np.log(toys.VOCABULARY))
