"""Training: every loss and gradient against the formula in plain dense autograd, and what training must keep."""

import copy
import dataclasses
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch.nn.functional import relu

from saebench import registry, sparse, suite
from saebench.variants import _training
from saebench.variants._training import Activity, AuxK, PenaltyControl, ramp
from tests import toys

VARIANTS = registry.names("variants")


@pytest.fixture(params=VARIANTS)
def name(request):
    return request.param


def recipe(name, **changes):
    return replace(suite.recipe(name, {}), **changes)


# The formulas of the modules' docstrings, dense, without anything of saebench


class Parts:
    """Copies of a training's parameters, each a leaf."""

    def __init__(self, training):
        for key, parameter in training.named_parameters():
            setattr(self, key, parameter.detach().clone().requires_grad_())
        self.names = [key for key, _ in training.named_parameters()]


def squared_error(x, x_hat):
    return ((x - x_hat) ** 2).sum() / len(x)


def auxk_loss(w, x, residual, dead, k):
    pre = x @ w.encoder.T + w.b_enc
    k = min(k, int(dead.sum()))
    if k == 0:
        return torch.zeros((), dtype=x.dtype)
    masked = torch.where(dead, pre, -math.inf)
    kept = torch.zeros_like(pre).scatter(1, masked.topk(k, dim=1).indices, 1.0)
    e_hat = relu(torch.where(kept > 0, pre, 0.0)) @ w.decoder
    e = residual.detach()
    return ((e - e_hat) ** 2).sum() / ((e - e.mean(0)) ** 2).sum()


def relu_reference(w, x, training, before):
    f = relu(x @ w.encoder.T + w.b_enc)
    x_hat = f @ w.decoder + w.b_dec
    return x_hat, squared_error(x, x_hat) + training.control.coefficient() * f.sum() / len(x)


def gated_reference(w, x, training, before):
    pi = x @ w.encoder.T
    gate = pi + w.b_enc
    f = (gate > 0) * relu(torch.exp(w.r_mag) * pi + w.b_mag)
    x_hat = f @ w.decoder + w.b_dec
    x_gate = relu(gate) @ w.decoder.detach() + w.b_dec.detach()
    penalty = training.control.coefficient() * relu(gate).sum() / len(x)
    return x_hat, squared_error(x, x_hat) + penalty + squared_error(x, x_gate)


def topk_reference(w, x, training, before):
    pre = x @ w.encoder.T + w.b_enc
    kept = torch.zeros_like(pre).scatter(1, pre.topk(training.k, dim=1).indices, 1.0)
    return with_auxk(w, x, relu(pre) * kept, training, before)


def batch_topk_reference(w, x, training, before):
    a = relu(x @ w.encoder.T + w.b_enc)
    count = round(training.k * len(x))
    smallest = a.flatten().sort(descending=True).values[count - 1]
    return with_auxk(w, x, a * (a >= smallest), training, before)


def with_auxk(w, x, f, training, before):
    x_hat = f @ w.decoder + w.b_dec
    aux = auxk_loss(w, x, x - x_hat, before.activity.dead(), training.auxk.k)
    return x_hat, squared_error(x, x_hat) + training.aux_coefficient * aux


def jumprelu_reference(w, x, training, before):
    """The straight-through gradients as terms that are zero but have them."""
    bandwidth = training.recipe.bandwidth
    pre = x @ w.encoder.T + w.b_enc
    jump = (pre > w.threshold).to(x.dtype).detach()
    inside = ((pre - w.threshold).abs() < bandwidth / 2).to(x.dtype).detach() / bandwidth
    nothing = w.threshold - w.threshold.detach()
    f = pre * jump - inside * w.threshold.detach() * nothing
    active = jump - inside * nothing
    x_hat = f @ w.decoder + w.b_dec
    l0 = active.sum() / len(x)
    return x_hat, squared_error(x, x_hat) + training.recipe.sparsity * (
        l0 / training.wanted - 1
    ) ** 2


REFERENCE = {
    "relu": relu_reference,
    "gated": gated_reference,
    "topk": topk_reference,
    "batch_topk": batch_topk_reference,
    "jumprelu": jumprelu_reference,
}
CHANGES = {"jumprelu": {"bandwidth": 0.4, "threshold": 0.3}, "relu": {"penalty": 0.2}}
D, WIDTH, N = 8, 40, 64


def generic(name, dtype=torch.float64):
    """A training with nothing at a special value, half of its latents dead where it counts them."""
    training = recipe(name, **CHANGES.get(name, {})).start(toys.task(D, WIDTH)).to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in training.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(dtype)
            parameter.add_(0.1 * noise if key == "threshold" else 0.2 * noise)
        training.after_step()
    if hasattr(training, "activity"):
        training.activity.silent_for[::2] = 10**9
    return training


def data(dtype=torch.float64, n=N):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(3)).to(dtype) / math.sqrt(D)


def gradients(training, x):
    training.zero_grad()
    loss = training.loss(x, 0.9)
    loss.backward()
    return loss, {key: p.grad for key, p in training.named_parameters()}


def test_every_variant_has_a_reference():
    assert sorted(REFERENCE) == VARIANTS


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("share", [1.0, 0.0], ids=["pairs", "everything"])
def test_loss_and_gradients_are_those_of_the_formula(name, share, dtype, near, monkeypatch):
    monkeypatch.setattr(sparse, "DENSE_ABOVE", share)
    training, x = generic(name, dtype), data(dtype)
    before, w = copy.deepcopy(training), Parts(training)
    loss, found = gradients(training, x)
    _, expected = REFERENCE[name](w, x, training, before)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=near)
    for key in w.names:
        grad = getattr(w, key).grad
        assert grad.any(), key
        assert float((found[key] - grad).abs().max() / grad.abs().max()) < near, key


def test_the_switch_to_dense_products_moves_no_gradient(name, monkeypatch):
    grads = []
    for share in (1.0, 0.0):
        monkeypatch.setattr(sparse, "DENSE_ABOVE", share)
        grads.append(gradients(generic(name), data())[1])
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, rtol=1e-11, atol=1e-12)


def test_the_exported_sae_reconstructs_as_in_training(name):
    training, x = generic(name, torch.float32), data(torch.float32)
    before = copy.deepcopy(training)
    training.loss(x, 0.0)
    x_hat, _ = REFERENCE[name](Parts(training), x, training, before)
    sae = training.export()
    z = sae.encode(x)
    if name == "batch_topk":  # the smallest value that training kept is the threshold: not above it
        kept = sparse.to_dense(sparse.from_dense(z), WIDTH)
        assert int((kept != 0).sum()) == round(training.k * len(x)) - 1
        smallest = before.pre(x).flatten().sort(descending=True).values[round(training.k * N) - 1]
        assert torch.equal(sae.threshold, smallest.expand(WIDTH))
        sae.threshold.sub_(1e-6)
    found = sae.decode(sae.encode(x))
    torch.testing.assert_close(found, x_hat.detach(), rtol=1e-5, atol=1e-6)


# What training must keep


def test_the_export_is_an_architecture_of_saes(name):
    sae = recipe(name).start(toys.task()).export()
    architecture = type(sae).__module__.rpartition(".")[2]
    assert architecture in registry.names("saes")
    assert type(sae) is registry.get("saes", architecture)
    assert not any(weight.requires_grad for weight in sae.parameters())


def test_training_starts_with_unit_directions_and_the_encoder_on_them(name):
    training = recipe(name).start(toys.task())
    norms = training.decoder.detach().norm(dim=1).numpy()
    assert norms == pytest.approx(np.ones(32), abs=1e-6)
    assert torch.equal(training.encoder, training.decoder)
    assert training.encoder.data_ptr() != training.decoder.data_ptr()


def test_weights_follow_from_the_seed(name):
    first, again, other = (recipe(name).start(toys.task(seed=s)) for s in (0, 0, 1))
    assert torch.equal(first.encoder, again.encoder)
    assert not torch.equal(first.encoder, other.encoder)


def test_directions_stay_units_and_gradients_along_them_are_removed(name):
    learner = toys.Learner(recipe(name, lr=0.01), toys.task())
    for x in toys.sparse_data(64 * 5).split(64):
        learner.learn(x)
        norms = learner.training.decoder.detach().norm(dim=1).numpy()
        assert norms == pytest.approx(np.ones(32), abs=1e-6)
    training = learner.training
    training.loss(x, 0.5).backward()
    whole, d = training.decoder.grad.clone(), training.decoder.detach()
    training.after_backward()
    expected = whole - (whole * d).sum(1, keepdim=True) * d
    torch.testing.assert_close(training.decoder.grad, expected)
    assert (training.decoder.grad * d).sum(1).abs().max() < 1e-5 < whole.abs().max()


@pytest.mark.parametrize("seed", range(10))
def test_no_seed_leads_to_nan(name, seed):
    learner = toys.Learner(recipe(name, lr=0.02), toys.task(width=24, l0=3, seed=seed))
    losses = [learner.learn(x) for x in toys.sparse_data(16 * 30, seed=seed).split(16)]
    assert np.isfinite(losses).all()
    assert all(torch.isfinite(w).all() for w in learner.training.export().state_dict().values())


def test_training_explains_more_at_the_wanted_l0(name):
    tokens = 64 * 600
    learner = toys.Learner(recipe(name, lr=0.01), toys.task(width=32, l0=3, tokens=tokens))
    held_out = toys.sparse_data(2000, seed=1)

    def explained():
        sae = learner.training.export()
        return 1 - float((held_out - sae.decode(sae.encode(held_out))).square().sum()) / 2000

    before = explained()
    for x in toys.sparse_data(tokens).split(64):
        learner.learn(x)
    l0 = float((learner.training.export().encode(held_out) != 0).sum()) / 2000
    assert l0 == pytest.approx(3, rel=0.15)
    assert explained() > max(before, 0) + 0.2 and explained() > 0.65


def test_what_was_saved_half_way_continues_with_the_same_losses(name):
    batches = toys.sparse_data(64 * 8).split(64)
    task = {"width": 32, "l0": 4, "tokens": 64 * 8}
    through = toys.Learner(recipe(name, lr=0.01), toys.task(**task))
    losses = [through.learn(x) for x in batches]

    first = toys.Learner(recipe(name, lr=0.01), toys.task(**task))
    for x in batches[:4]:
        first.learn(x)
    second = toys.Learner(recipe(name, lr=0.01), toys.task(**task, seed=5))
    second.training.load_state_dict(copy.deepcopy(first.training.state_dict()))
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.seen = first.seen
    assert [second.learn(x) for x in batches[4:]] == losses[4:]
    for key, weight in through.training.state_dict().items():
        assert torch.equal(second.training.state_dict()[key], weight), key


def test_the_loss_at_the_start_is_finite_for_one_token(name):
    training = recipe(name).start(toys.task())
    assert math.isfinite(training.loss(torch.ones(1, 8), 0.0).item())


def test_a_batch_that_activates_nothing_is_survived(name):
    learner = toys.Learner(recipe(name), toys.task())
    with torch.no_grad():
        learner.training.b_enc.fill_(-100)
    assert math.isfinite(learner.learn(toys.sparse_data(64)))
    weights = learner.training.state_dict()
    assert all(w.isfinite().all() for key, w in weights.items() if key != "control.start")


# ReLU


@pytest.mark.parametrize("c", [0.1, 0.5, 1.2])
def test_the_optimum_of_the_relu_loss_is_shrunk_by_half_the_penalty(c, monkeypatch):
    """One feature of size g = 1: (1 - a)^2 + c a is least at a = 1 - c / 2."""
    monkeypatch.setattr(PenaltyControl, "update", lambda *_: None)
    training = recipe("relu", penalty=c).start(toys.task(1, 1, 1)).double()
    with torch.no_grad():
        training.decoder.fill_(1)
        training.encoder.fill_(0.7)
    optimizer = torch.optim.SGD([training.encoder], lr=0.2)
    for _ in range(100):
        optimizer.zero_grad()
        training.loss(torch.ones(1, 1, dtype=torch.float64), 0.5).backward()
        optimizer.step()
    assert float(training.encoder.detach()) == pytest.approx(1 - c / 2, rel=1e-6)


# Gated


def test_the_gate_teaches_neither_dictionary_nor_bias(monkeypatch):
    """With magnitudes switched off, only the two terms of the gate are left."""
    training = generic("gated")
    with torch.no_grad():
        training.b_mag.fill_(-1e3)
    _, found = gradients(training, data())
    expected_bias = -2 * (data() - training.b_dec.detach()).mean(0)  # of |x - b_dec|^2
    torch.testing.assert_close(found["b_dec"], expected_bias)
    assert not found["decoder"].any()
    assert found["encoder"].any() and found["b_enc"].any()
    assert not found["r_mag"].any() and not found["b_mag"].any()


# JumpReLU


def test_straight_through_gradients_follow_the_rectangle_on_both_halves():
    """By hand: threshold 1, bandwidth 0.5, so the rectangle reaches from 0.75 to 1.25."""
    from saebench.variants.jumprelu import _Jump

    pre = torch.tensor([0.7, 0.8, 1.2, 1.3], dtype=torch.float64).requires_grad_()
    threshold = torch.ones(4, dtype=torch.float64).requires_grad_()
    f, active = _Jump.apply(pre, threshold, 0.5)
    assert f.tolist() == [0, 0, 1.2, 1.3] and active.tolist() == [0, 0, 1, 1]
    grads = torch.autograd.grad(3 * f.sum(), (pre, threshold), retain_graph=True)
    assert grads[0].tolist() == [0, 0, 3, 3]
    assert grads[1].tolist() == [0, -6, -6, 0]  # 3 * -threshold / bandwidth
    to_pre, to_threshold = torch.autograd.grad(5 * active.sum(), (pre, threshold))
    assert to_pre.tolist() == [0, 0, 0, 0]
    assert to_threshold.tolist() == [0, -10, -10, 0]  # 5 * -1 / bandwidth


def test_too_many_active_latents_raise_the_threshold_and_too_few_lower_it():
    for wanted, sign in ((1.0, -1), (39.0, 1)):
        training = recipe("jumprelu", bandwidth=0.4, sparsity=1e3).start(
            toys.task(D, WIDTH, l0=wanted)
        )
        _, found = gradients(training, data(torch.float32))
        assert (found["threshold"] * sign > 0).all()  # descent goes against the gradient


def test_thresholds_never_become_negative():
    learner = toys.Learner(recipe("jumprelu", lr=1.0), toys.task(l0=31))
    for x in toys.sparse_data(64 * 3).split(64):
        learner.learn(x)
        assert (learner.training.threshold >= 0).all()


# TopK and BatchTopK


def test_the_threshold_of_the_first_batch_is_taken_whole_and_then_averaged():
    training = recipe("batch_topk", threshold_memory=0.1).start(toys.task(l0=2, tokens=64 * 100))
    seen = []
    for i, x in enumerate(toys.sparse_data(64 * 4).split(64)):
        seen.append(float(training.pre(x).flatten().sort(descending=True).values[2 * 64 - 1]))
        training.loss(x, i / 100)
    expected = seen[0]
    for smallest in seen[1:]:
        expected += 0.1 * (smallest - expected)  # a batch is a tenth of the memory
    assert float(training.threshold) == pytest.approx(expected, rel=1e-6)


def test_a_threshold_needs_a_memory():
    fields = dataclasses.asdict(recipe("batch_topk")) | {"threshold_memory": 0.0}
    with pytest.raises(ValidationError, match="threshold_memory"):
        TypeAdapter(registry.get("variants", "batch_topk")).validate_python(fields)


@pytest.mark.parametrize("n_dead", [0, 1, 3, 20])
def test_auxk_is_the_formula_and_reaches_encoder_and_decoder(n_dead):
    training, x = generic("topk"), data()
    dead = torch.arange(WIDTH) < n_dead
    w, residual = Parts(training), 0.3 * data().flip(0)
    found = AuxK(4).loss(training, x, residual, training.pre(x), dead)
    expected = auxk_loss(w, x, residual, dead, 4)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    if n_dead == 0:
        assert found.item() == 0 and not found.requires_grad
        return
    found.backward()
    expected.backward()
    for key in ("encoder", "decoder", "b_enc"):
        grad = getattr(w, key).grad
        torch.testing.assert_close(getattr(training, key).grad, grad, rtol=1e-11, atol=1e-13)
        assert grad[:n_dead].any() and not grad[n_dead:].any()
    assert training.b_dec.grad is None


def test_auxk_sends_nothing_back_into_the_residual():
    training, x = generic("topk"), data()
    residual = (0.3 * data()).requires_grad_()
    AuxK(4).loss(training, x, residual, training.pre(x), torch.ones(WIDTH) > 0).backward()
    assert residual.grad is None


# Dead latents


def test_silence_is_counted_in_tokens_and_ended_by_a_value_above_zero():
    activity = Activity(toys.task(width=3, tokens=1000), dead_after=0.1)
    activity.update(torch.tensor([True, False, False]), 60)
    assert activity.silent_for.tolist() == [0, 60, 60]
    activity.update(torch.tensor([False, True, False]), 40)
    assert activity.silent_for.tolist() == [40, 0, 100]
    assert activity.dead().tolist() == [False] * 3  # 100 of 1000 is not yet more than a tenth
    activity.update(torch.tensor([False, False, False]), 1)
    assert activity.dead().tolist() == [False, False, True]


@pytest.mark.parametrize("name", ["topk", "batch_topk"])
def test_a_latent_that_is_kept_at_zero_has_not_fired(name):
    training = recipe(name).start(toys.task(D, WIDTH, l0=WIDTH))
    with torch.no_grad():
        training.b_enc[:10] = -100
    training.loss(data(torch.float32), 0.0)
    assert training.activity.silent_for[:10].tolist() == [N] * 10
    assert not training.activity.silent_for[10:].any()


# Steering


class Plant:
    """ln L0 follows -slope ln(coefficient) with a lag, as latents do."""

    def __init__(self, slope, lag):
        self.slope, self.lag, self.state = slope, lag, math.log(300.0)

    def step(self, coefficient, share):
        target = math.log(300.0) - self.slope * math.log(coefficient / 0.03)
        self.state += (target - self.state) * min(1, share / self.lag)
        return math.exp(self.state)


@pytest.mark.parametrize("wanted", [8.0, 64.0])
@pytest.mark.parametrize("slope", [0.4, 0.8, 1.2])
@pytest.mark.parametrize("lag", [0.002, 0.02])
def test_steering_settles_at_the_wanted_l0(wanted, slope, lag):
    steps, plant = 2000, Plant(slope, lag)
    control = PenaltyControl(toys.task(l0=wanted, tokens=steps * 100), 0.03, 0.3)
    found = []
    for step in range(steps):
        found.append(plant.step(control.coefficient(), 1 / steps))
        control.update(found[-1], 100, step / steps)
    settled = found[steps // 2 :]
    assert min(settled) > 0.9 * wanted and max(settled) < 1.1 * wanted
    assert found[-1] == pytest.approx(wanted, rel=0.01)


def test_the_goal_descends_from_where_training_starts():
    control = PenaltyControl(toys.task(l0=10), 0.03, 0.5)
    control.update(1000.0, 1, 0.0)
    assert control.coefficient() == pytest.approx(0.03)  # no error yet
    control.update(100.0, 1, 0.25)  # half way in logarithms: still on the line
    assert control.coefficient() == pytest.approx(0.03, rel=1e-4)
    control.update(100.0, 1, 0.5)  # the line is at 10 now: too many
    assert control.coefficient() > 0.04


@pytest.mark.parametrize("l0", [0.0, 5.0])
def test_steering_goes_on_after_a_batch_without_active_latents(l0):
    control = PenaltyControl(toys.task(l0=10), 0.03, 0.0)
    control.update(l0, 64, 0.0)
    control.update(0.0, 64, 0.1)
    assert math.isfinite(control.coefficient()) and control.coefficient() < 0.03


def test_steering_survives_a_restart():
    def steer(control, steps):
        for step in steps:
            control.update(50.0 - step, 64, step / 20)
        return control.coefficient()

    through = steer(PenaltyControl(toys.task(), 0.03, 0.3), range(20))
    first, second = (PenaltyControl(toys.task(), c, 0.3) for c in (0.03, 1.0))
    steer(first, range(9))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert steer(second, range(9, 20)) == through


@pytest.mark.parametrize(
    ("progress", "share", "expected"),
    [(0.0, 0.2, 0.0), (0.1, 0.2, 0.5), (0.7, 0.2, 1.0), (0.0, 0.0, 1.0)],
)
def test_a_ramp_rises_in_a_line(progress, share, expected):
    assert ramp(progress, share) == expected


def test_the_variants_share_one_squared_error():
    x, x_hat = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 2)
    assert _training.squared_error(x, x_hat).item() == (1 + 4 + 9 + 16) / 2
