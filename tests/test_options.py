"""What single variants and their options do, each by hand."""

import copy
import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.stats
import torch
from pydantic import TypeAdapter, ValidationError

from saebench import registry, sparse, suite, trainer
from saebench.variants._training import PenaltyControl, Training
from tests import toys


def started(name, *, d_in=8, width=32, l0=4, tokens=64 * 200, **options):
    """A training of this variant, in float64."""
    chosen = toys.recipe(name, **options)
    return chosen.start(toys.task(d_in, width, l0, tokens, recipe=chosen)).double()


def lesson(training_name, x, progress=0.5, seed=0):
    return toys.lesson(toys.recipe(training_name), x, progress, seed)


def gradients(training, given):
    training.loss(given).backward()
    return {key: p.grad for key, p in training.named_parameters()}


def data(n=64, seed=0):
    return toys.sparse_data(n, seed=seed).double()


@pytest.fixture
def unsteered(monkeypatch):
    """Penalties keep their coefficient."""
    monkeypatch.setattr(PenaltyControl, "update", lambda *_: None)


# ReLU


@pytest.mark.parametrize("c", [0.1, 0.5, 1.2])
@pytest.mark.parametrize("name", ["relu", "relu_april"])
def test_the_optimum_of_the_relu_loss_is_shrunk_by_half_the_penalty(name, c, unsteered):
    """One feature of size g = 1: (1 - a)^2 + c a is least at a = 1 - c / 2, here with the decoder at 1."""
    training = started(name, d_in=1, width=1, l0=1, penalty=c)
    with torch.no_grad():
        training.decoder.fill_(1)
        training.encoder.fill_(0.7)
    optimizer = torch.optim.SGD([training.encoder], lr=0.2)
    for _ in range(100):
        optimizer.zero_grad()
        training.loss(lesson(name, torch.ones(1, 1, dtype=torch.float64))).backward()
        optimizer.step()
    assert float(training.encoder.detach()) == pytest.approx(1 - c / 2, rel=1e-6)


DEAD = 5
"""Of the latents, silenced from the start."""


def resampling(resamplings, steps, dead_after=0.1, width=32):
    learner = toys.Learner(
        toys.recipe("relu", resamplings=resamplings, dead_after=dead_after, lr=0.01),
        tokens=64 * steps,
        width=width,
    )
    silence(learner)
    return learner


def silence(learner):
    with torch.no_grad():
        learner.training.b_enc[:DEAD] = -100


def test_resampling_moves_dead_latents_to_inputs_and_nothing_else():
    """With 10 steps the first of two resamplings is due in the fourth: as long as nothing was due, all is the same."""
    moved, still = resampling(2, 10), resampling(0, 10)
    for learner in (moved, still):
        with torch.no_grad():
            learner.training.b_enc[:DEAD] = 0  # alive in the first step, so that Adam has moments
        for x in toys.sparse_data(64 * 4).split(64):
            learner.learn(x)
            if learner.seen == 64:
                silence(learner)
    ours, others = moved.training, still.training
    with torch.no_grad():
        for name in ("encoder", "decoder", "b_enc", "b_dec"):
            skipped = 0 if name == "b_dec" else DEAD
            a, b = getattr(ours, name), getattr(others, name)
            assert torch.equal(a[skipped:], b[skipped:]), name
            for moment in ("exp_avg", "exp_avg_sq"):
                kept, reference = moved.optimizer.state[a][moment], still.optimizer.state[b][moment]
                assert torch.equal(kept[skipped:], reference[skipped:]), (name, moment)
                assert not kept[:skipped].any() and reference[:skipped].any() == (skipped > 0)
        assert ours.b_enc[:DEAD].tolist() == [0] * DEAD
        alive = others.encoder[DEAD:].norm(dim=1).mean()
        toward = (x - others.b_dec) / (x - others.b_dec).norm(dim=1, keepdim=True)
        for row, direction in zip(ours.encoder[:DEAD], ours.decoder[:DEAD], strict=True):
            (drawn,) = (toward - direction).norm(dim=1).lt(1e-6).nonzero().flatten().tolist()
            torch.testing.assert_close(row, 0.2 * alive * x[drawn] / x[drawn].norm())
        assert not ours.activity.silent_for[:DEAD].any()


@pytest.mark.parametrize("resamplings", [1, 2, 3])
def test_resampling_happens_as_often_as_asked_evenly_over_the_first_half(resamplings):
    learner, found = resampling(resamplings, 40, dead_after=0.05), []
    for step, x in enumerate(toys.sparse_data(64 * 40).split(64)):
        learner.learn(x)
        if learner.training.b_enc[0] > -50:
            found.append(step)
            silence(learner)
    assert found == [math.ceil(40 * k / (2 * resamplings)) for k in range(1, resamplings + 1)]


def test_what_was_resampled_before_a_restart_is_not_resampled_after_it():
    first, second = resampling(1, 40, dead_after=0.05), resampling(1, 40, dead_after=0.05)
    batches = toys.sparse_data(64 * 40).split(64)
    for x in batches[:25]:
        first.learn(x)
    silence(first)
    second.training.load_state_dict(copy.deepcopy(first.training.state_dict()))
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.seen = first.seen
    for x in batches[25:]:
        second.learn(x)
    assert (second.training.b_enc[:DEAD] < -50).all()
    assert second.training.activity.dead()[:DEAD].all()


def test_inputs_are_drawn_by_their_squared_loss():
    learner = resampling(1, 10, width=2000)
    x = toys.sparse_data(64)
    learner.learn(x)
    training = learner.training
    training.activity.silent_for[:1000] = 10**9
    error = torch.zeros(64)
    error[7], error[9] = 1.0, 2.0  # so 1 : 4
    with torch.no_grad():
        training._resample(toys.lesson(learner.recipe, x), error, learner.optimizer)
    drawn = torch.nn.functional.normalize(x - training.b_dec.detach(), dim=-1)
    found = (training.decoder.detach()[:1000, None] - drawn[None, [7, 9]]).norm(dim=-1) < 1e-5
    assert found.any(1).all()
    assert scipy.stats.binomtest(int(found[:, 1].sum()), 1000, 0.8).pvalue > 0.01


@pytest.mark.parametrize("n_dead", [0, 32])
def test_nothing_is_resampled_when_no_latent_or_every_latent_is_dead(n_dead):
    learner = resampling(1, 10)
    for x in toys.sparse_data(128).split(64):
        learner.learn(x)
    learner.training.activity.silent_for[:] = 10**9 * (torch.arange(32) < n_dead)
    before = copy.deepcopy(learner.training.state_dict())
    with torch.no_grad():
        learner.training._resample(
            toys.lesson(learner.recipe, x), torch.ones(64), learner.optimizer
        )
    after = learner.training.state_dict()
    assert all(torch.equal(after[key], weight) for key, weight in before.items())


# April update


def test_the_april_penalty_is_the_same_however_length_is_shared():
    """A latent twice as large on a direction half as long is the same latent."""
    training, x = started("relu_april"), data()
    other = copy.deepcopy(training)
    with torch.no_grad():
        other.encoder.mul_(2)
        other.b_enc.mul_(2)
        other.decoder.div_(2)
    losses = [t.loss(lesson("relu_april", x)).item() for t in (training, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    first, second = training.export(), other.export()
    torch.testing.assert_close(first.W_enc, second.W_enc)
    assert first.W_dec.norm(dim=1).numpy() == pytest.approx(np.ones(32))


def test_april_directions_are_free_to_grow():
    learner = toys.Learner(toys.recipe("relu_april", lr=0.01))
    for x in toys.sparse_data(64 * 20).split(64):
        learner.learn(x)
    norms = learner.training.decoder.detach().norm(dim=1)
    assert (norms - 0.1).abs().max() > 0.02 and norms.std() > 0.001


# Tied


def test_a_tied_sae_stays_tied():
    learner = toys.Learner(toys.recipe("tied", lr=0.01))
    for x in toys.sparse_data(64 * 5).split(64):
        learner.learn(x)
    assert learner.training.encoder is learner.training.decoder
    sae = learner.training.export()
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    shapes = [tuple(p.shape) for g in learner.optimizer.param_groups for p in g["params"]]
    assert sorted(shapes) == [(8,), (32,), (32, 8)]


# p-annealing


@pytest.mark.parametrize(
    ("progress", "p"),
    [(0.0, 1.0), (0.19, 1.0), (0.29, 1.0), (0.31, 0.8), (0.41, 0.6), (0.51, 0.4), (0.61, 0.2)]
    + [(1.0, 0.2)],
)
def test_p_falls_in_equal_stages(progress, p):
    stages = {"p_end": 0.2, "stages": 4, "anneal_start": 0.2, "anneal_end": 0.6}
    assert toys.recipe("p_anneal", **stages).power(progress) == pytest.approx(p)


@pytest.mark.parametrize(
    ("steps", "stages"),
    [(41, range(11)), (5, [0, 2, 5, 9, 10])],
    ids=["each", "several at once"],
)
def test_the_penalty_goes_on_where_it_was_at_every_stage(steps, stages, unsteered):
    training, x = started("p_anneal", penalty=0.05), data()
    pre = (x @ training.encoder.T + training.b_enc).detach()
    f = pre.relu()
    error = float((x - f @ training.decoder.detach()).square().sum() / len(x))
    penalty = 0.05 * float(f.sum()) / len(x)  # as it is with p = 1
    powers, coefficients = [], []
    for progress in np.linspace(0, 1, steps):
        loss = training.loss(lesson("p_anneal", x, float(progress))).item()
        assert loss - error == pytest.approx(penalty, rel=1e-6)
        powers.append(round(training.p.item(), 6))
        coefficients.append(training.control.coefficient().item())
    assert sorted(set(powers)) == pytest.approx([1 - 0.08 * s for s in reversed(stages)])
    assert len(set(coefficients)) == len(stages)


@pytest.mark.parametrize("share", [1.0, -1.0], ids=["pairs", "everything"])
def test_the_slope_of_the_penalty_at_zero_is_finite(share, monkeypatch):
    """f is exactly zero for some latents and above zero for others."""
    monkeypatch.setattr(sparse, "DENSE_ABOVE", share)
    training = started("p_anneal")
    with torch.no_grad():
        training.b_enc[:16] = -100
        training.encoder[16:20] = 0
    found = gradients(training, lesson("p_anneal", data(), 1.0))
    assert training.p == pytest.approx(0.2)
    assert all(grad.isfinite().all() for grad in found.values())
    assert not found["b_enc"][:20].any() and found["b_enc"][20:].any()


def test_annealing_must_end_after_it_starts():
    with pytest.raises(ValueError, match=r"anneal_end is 0\.1; expected more than anneal_start"):
        suite.recipe("p_anneal", {"anneal_end": 0.1})


# Gated


@pytest.mark.parametrize("name", ["gated", "skip_transcoder"])
def test_the_gate_teaches_neither_dictionary_nor_bias(name):
    """With magnitudes switched off, only the two terms of the gate are left."""
    training = started(name, **({"activation": "gated"} if name != "gated" else {}))
    given = lesson(name, data())
    with torch.no_grad():
        training.b_mag.fill_(-1e3)
        training.b_dec.add_(0.1)
    found = gradients(training, given)
    residual = given.target - 0.1  # what b_dec alone leaves over; an affine path starts at zero
    torch.testing.assert_close(found["b_dec"], -2 * residual.mean(0))
    if training.W_skip is not None:
        torch.testing.assert_close(found["W_skip"], -2 * given.x.T @ residual / len(residual))
    assert not found["decoder"].any()
    assert found["encoder"].any() and found["b_enc"].any()
    assert not found["r_mag"].any() and not found["b_mag"].any()


# JumpReLU


@pytest.mark.parametrize("tanh", [False, True])
def test_straight_through_gradients_follow_the_rectangle_on_both_halves(tanh):
    """By hand: threshold 1, bandwidth 0.5, so the rectangle reaches from 0.75 to 1.25."""
    from saebench.variants.jumprelu import _Jump

    pre = torch.tensor([0.7, 0.8, 1.2, 1.3], dtype=torch.float64).requires_grad_()
    threshold = torch.ones(4, dtype=torch.float64).requires_grad_()
    f, active = _Jump.apply(pre, threshold, 0.5, tanh)
    assert f.tolist() == [0, 0, 1.2, 1.3] and active.tolist() == [0, 0, 1, 1]
    to_pre, to_threshold = torch.autograd.grad(3 * f.sum(), (pre, threshold), retain_graph=True)
    assert to_threshold.tolist() == [0, -6, -6, 0]  # 3 * -threshold / bandwidth
    assert to_pre.tolist() == ([0, 6, 9, 3] if tanh else [0, 0, 3, 3])
    to_pre, to_threshold = torch.autograd.grad(5 * active.sum(), (pre, threshold))
    assert to_threshold.tolist() == [0, -10, -10, 0]  # 5 * -1 / bandwidth
    assert to_pre.tolist() == ([0, 10, 10, 0] if tanh else [0, 0, 0, 0])


def test_too_many_active_latents_raise_the_threshold_and_too_few_lower_it():
    for wanted, sign in ((1.0, -1), (31.0, 1)):
        training = started("jumprelu", l0=wanted, bandwidth=0.4, sparsity=1e3)
        found = gradients(training, lesson("jumprelu", data()))
        assert (found["threshold"] * sign > 0).all()  # descent goes against the gradient


@pytest.mark.parametrize("wanted", [31, 1.5])
def test_thresholds_never_become_negative(wanted):
    learner = toys.Learner(toys.recipe("jumprelu", lr=1.0), l0=wanted)
    for x in toys.sparse_data(64 * 3).split(64):
        learner.learn(x)
        assert (learner.training.threshold >= 0).all()


def test_the_weight_of_the_quadratic_loss_rises_from_nothing():
    training, x = started("jumprelu", sparsity_warmup=0.2, sparsity=10.0), data()
    at = {p: training.loss(lesson("jumprelu", x, p)).item() for p in (0.0, 0.1, 0.2, 0.9)}
    full = at[0.2] - at[0.0]
    assert full > 0.1
    assert at[0.1] - at[0.0] == pytest.approx(full / 2)
    assert at[0.9] == at[0.2]


def test_silent_latents_are_pulled_back_with_their_coefficient():
    """With everything far below the threshold, the pull is all that reaches the encoder: p for every token."""
    training = started("jumprelu", sparsity_loss="tanh", pre_activation=0.25)
    with torch.no_grad():
        training.b_enc.fill_(-3)
    found = gradients(training, lesson("jumprelu", data()))
    assert found["b_enc"].tolist() == pytest.approx([-0.25] * 32)
    assert found["threshold"].tolist() == pytest.approx([0.25] * 32)


def test_the_tanh_penalty_is_steered_and_the_quadratic_loss_is_not():
    for loss in ("tanh", "quadratic"):
        training = started("jumprelu", l0=1, sparsity_loss=loss, penalty=0.03, l0_descent=0.0)
        training.loss(lesson("jumprelu", data()))
        moved = training.control.coefficient().item() / 0.03
        assert moved > 1.05 if loss == "tanh" else moved == pytest.approx(1)


# TopK


@pytest.mark.parametrize(
    ("progress", "k"), [(0.0, 8), (0.125, 7), (0.25, 6), (0.375, 5), (0.5, 4), (0.9, 4)]
)
def test_k_falls_in_a_line_from_d_to_its_value(progress, k):
    training, x = started("topk", d_in=8, l0=4, k_anneal=0.5), data(1)
    with torch.no_grad():
        training.b_enc.add_(10)  # so that every latent is positive
    training.loss(lesson("topk", torch.ones_like(x), progress))
    assert int((training.auxk.activity.silent_for == 0).sum()) == k
    assert training.export().k == 4


def test_k_starts_at_the_width_or_at_k_where_d_is_beyond_them():
    assert started("topk", d_in=8, width=6, l0=2, k_anneal=1.0).k_now(0.0) == 6
    assert started("topk", d_in=8, width=32, l0=20, k_anneal=1.0).k_now(0.0) == 20
    assert started("topk", d_in=8, width=32, l0=4).k_now(0.0) == 4


def test_four_k_latents_are_at_most_all():
    """Where 4 k is beyond the width, the second reconstruction is that of a ReLU SAE."""
    x, losses = data(), []
    for weight in (0.0, 0.125):
        training = started("topk", width=10, l0=4, multi_topk=weight, aux_coefficient=0.0)
        losses.append(training.loss(lesson("topk", x)).item())
    x_hat = training.pre(x).relu() @ training.decoder.detach()
    expected = float((x - x_hat).square().sum() / len(x)) / 8
    assert losses[1] - losses[0] == pytest.approx(expected, rel=1e-10)


# BatchTopK and Matryoshka


@pytest.mark.parametrize("name", ["batch_topk", "matryoshka"])
def test_the_threshold_of_the_first_batch_is_taken_whole_and_then_averaged(name):
    training = started(name, l0=2, tokens=64 * 100, threshold_memory=0.1)
    seen = []
    for i, x in enumerate(data(64 * 4).split(64)):
        seen.append(float(training.pre(x).flatten().sort(descending=True).values[2 * 64 - 1]))
        training.loss(lesson(name, x, i / 100))
    expected = seen[0]
    for smallest in seen[1:]:
        expected += 0.1 * (smallest - expected)  # a batch is a tenth of the memory
    assert float(training.top.threshold) == pytest.approx(expected, rel=1e-12)


def test_a_threshold_needs_a_memory():
    fields = dataclasses.asdict(toys.recipe("batch_topk")) | {"threshold_memory": 0.0}
    with pytest.raises(ValidationError, match="threshold_memory"):
        TypeAdapter(registry.get("variants", "batch_topk")).validate_python(fields)


def test_fixed_prefixes_are_shares_of_the_width():
    for width, expected in ((32, [1, 3, 7, 15, 32]), (40, [2, 4, 9, 19, 40])):
        training = started("matryoshka", width=width)
        assert training.ends(torch.Generator()).tolist() == expected


def test_the_error_counts_once_however_many_prefixes_there_are():
    """All active latents are within the first prefix, so every prefix has the same reconstruction."""
    x, losses = data(), []
    for prefixes in ((1.0,), (0.5, 1.0), (0.5, 0.6, 0.7, 0.8, 1.0)):
        training = started("matryoshka", aux_coefficient=0.0)
        training.recipe = dataclasses.replace(training.recipe, prefixes=prefixes)
        with torch.no_grad():
            training.b_enc[16:] = -100
        losses.append(training.loss(lesson("matryoshka", x)).item())
    plain = started("batch_topk", aux_coefficient=0.0)
    with torch.no_grad():
        plain.b_enc[16:] = -100
    assert losses == pytest.approx([plain.loss(lesson("batch_topk", x)).item()] * 3)


def test_drawn_prefixes_ascend_to_the_width_and_follow_from_the_step():
    training = started("matryoshka", width=1000, random_prefixes=True)

    def drawn(seed):
        return training.ends(torch.Generator().manual_seed(seed)).tolist()

    for seed in range(50):
        ends = drawn(seed)
        assert len(ends) == 5 and ends[-1] == 1000 and ends[0] >= 1
        assert all(a <= b for a, b in pairwise(ends))
        assert drawn(seed) == ends
    assert drawn(0) != drawn(1)


def test_drawn_prefixes_have_uniform_logarithms():
    training = started("matryoshka", random_prefixes=True)
    training.decoder = torch.nn.Parameter(torch.empty(2**20, 1))
    generator = torch.Generator().manual_seed(0)
    logs = [math.log2(end) / 20 for _ in range(100) for end in training.ends(generator)[:-1]]
    assert scipy.stats.kstest(logs, "uniform").pvalue > 0.01


@pytest.mark.parametrize(
    "prefixes", [[], [0.5], [0.5, 0.25, 1.0], [0.5, 0.5, 1.0], [0.0, 1.0], [0.5, 1.0, 2.0], [-1, 1]]
)
def test_prefixes_that_do_not_ascend_to_the_width_are_refused(prefixes):
    with pytest.raises(ValueError, match="expected ascending shares above 0 that end with 1"):
        suite.recipe("matryoshka", {"prefixes": prefixes})


# Transcoders


def test_skip_transcoders_start_with_no_affine_path_and_learn_one():
    learner = toys.Learner(toys.recipe("skip_transcoder", lr=0.01), tokens=64 * 20)
    assert not learner.training.W_skip.any()
    for x in toys.sparse_data(64 * 20).split(64):
        learner.learn(x)
    assert learner.training.W_skip.shape == (8, 11) and learner.training.W_skip.all()


def test_an_affine_map_is_left_to_the_affine_path():
    """y = x A + c: the loss goes to zero with no latent's help."""
    learner = toys.Learner(
        toys.recipe("skip_transcoder", lr=0.02, aux_coefficient=0.0), tokens=64 * 200
    )
    A = torch.randn(8, 11, generator=torch.Generator().manual_seed(5)) / 3
    with torch.no_grad():
        learner.training.b_enc.fill_(-100)
    for i, x in enumerate(toys.sparse_data(64 * 200).split(64)):
        given = toys.lesson(learner.recipe, x, i / 200)._replace(target=x @ A + 0.3)
        trainer.learn(learner.training, learner.optimizer, learner.recipe, given, 1 / 200)
    torch.testing.assert_close(learner.training.W_skip.detach(), A, rtol=0, atol=0.01)
    assert learner.training.b_dec.tolist() == pytest.approx([0.3] * 11, abs=0.01)


@pytest.mark.parametrize("name", ["transcoder", "skip_transcoder"])
@pytest.mark.parametrize("activation", ["tied", "rescaled", "end_to_end", "transcoder"])
def test_transcoders_have_no_activation_that_is_bound_to_one_site(name, activation):
    with pytest.raises(ValueError, match=f"activation is {activation}, which cannot predict"):
        suite.recipe(name, {"activation": activation})


# Rescaled


def test_scales_undo_a_shrinkage_and_leave_the_rest_of_the_parent_alone():
    """Targets are the parent's reconstructions with every latent twice as large."""
    learner = toys.Learner(toys.recipe("rescaled", lr=0.02), tokens=64 * 200)
    parent = copy.deepcopy(learner.task.parent)
    before = {key: weight.clone() for key, weight in parent.state_dict().items()}
    for i, x in enumerate(toys.sparse_data(64 * 200).split(64)):
        given = toys.lesson(learner.recipe, x, i / 200)
        given = given._replace(target=parent.decode(2 * parent.encode(x)))
        trainer.learn(learner.training, learner.optimizer, learner.recipe, given, 1 / 200)
    sae = learner.training.export()
    torch.testing.assert_close(sae.W_dec, 2 * before["W_dec"], rtol=0.02, atol=0.005)
    for key, weight in before.items():
        assert torch.equal(learner.training.parent.state_dict()[key], weight)
        assert key == "W_dec" or torch.equal(sae.state_dict()[key], weight)


def test_a_scale_starts_at_one_and_is_always_positive():
    learner = toys.Learner(toys.recipe("rescaled", lr=5.0))
    parent = learner.task.parent
    assert torch.equal(learner.training.export().W_dec, parent.W_dec)
    for x in toys.sparse_data(64 * 5).split(64):
        learner.learn(-x)
    ratio = (learner.training.export().W_dec / parent.W_dec).mean(1)
    assert (ratio > 0).all() and (ratio < 0.9).any()


# End to end


@pytest.mark.parametrize("later", [0.0, 0.5])
def test_later_layers_are_looked_at_only_where_they_count(later):
    asked = []
    given = lesson("end_to_end", data())

    def downstream(x_hat, later):
        asked.append(later)
        return given.downstream(x_hat, later)

    training = started("end_to_end", later=later)
    training.loss(given._replace(downstream=downstream))
    assert asked == [later > 0]


# Denoising


class Watched(Training):
    """Has one number to learn, and keeps what it was taught with."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.lessons = []

    def loss(self, lesson):
        self.lessons.append(lesson)
        return self.weight.square()

    def export(self):
        raise NotImplementedError


def watched(noise, x, seed=0):
    training, chosen = Watched(), toys.recipe("relu", input_noise=noise)
    given = toys.lesson(chosen, x, seed=seed)
    trainer.learn(training, trainer.optimizer_of(training, chosen), chosen, given, 0.1)
    return given, training.lessons[0]


def test_the_input_is_corrupted_and_the_target_stays_clean():
    x = toys.sparse_data(4000)
    given, seen = watched(0.5, x)
    noise = seen.x - x
    # A sum of 32,000 squares of standard normals over 4,000 tokens; its standard deviation is 0.8 % of it.
    assert float(noise.square().sum(1).mean()) == pytest.approx(0.25, rel=0.03)
    assert float((noise * x).sum() / x.square().sum()) == pytest.approx(0, abs=0.02)
    assert scipy.stats.kstest(noise.flatten() / (0.5 / math.sqrt(8)), "norm").pvalue > 0.01
    assert seen.target is given.target and torch.equal(given.target, x)
    assert (seen.progress, seen.downstream) == (given.progress, given.downstream)


def test_noise_follows_from_the_step():
    x = toys.sparse_data(64)
    first, again, other = (watched(0.5, x, seed)[1].x for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_without_noise_nothing_is_drawn():
    given, seen = watched(0.0, toys.sparse_data(64))
    assert seen is given
    fresh = torch.Generator().manual_seed(0)
    assert torch.equal(given.generator.get_state(), fresh.get_state())


def test_a_denoising_sae_shrinks_what_it_reads_to_what_is_likely():
    """One latent, x and noise both normal of unit mean square: the best estimate of x is half of what is read."""
    learner = toys.Learner(
        toys.recipe("topk", input_noise=1.0, lr=0.02, aux_coefficient=0.0),
        d_in=1,
        width=2,
        l0=2,
        tokens=256 * 200,
    )
    for x in torch.randn(256 * 200, 1, generator=torch.Generator().manual_seed(0)).split(256):
        learner.learn(x)
    sae, x = learner.training.export(), torch.tensor([[-1.5], [-0.5], [0.5], [1.5]])
    assert sae.decode(sae.encode(x)).flatten().tolist() == pytest.approx((x / 2).flatten(), abs=0.1)
