"""Training: every loss and gradient against the formula in plain dense autograd, and what training must keep."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import relu

from saebench import registry, sparse, trainer
from saebench.variants import _training
from saebench.variants._training import Activity, PenaltyControl, ramp
from tests import toys

VARIANTS = registry.names("variants")
TRANSCODERS = [name for name in VARIANTS if registry.get("variants", name).target == "other"]
ACTIVATIONS = {
    "transcoder": ("relu", "batch_topk", "jumprelu"),
    "skip_transcoder": (
        *("relu", "relu_april", "gated", "p_anneal", "batch_topk", "matryoshka", "jumprelu"),
    ),
}

# Every variant, and the options that change its formula
CASES = {name: (name, {}) for name in VARIANTS} | {
    "relu, resampled": ("relu", {"resamplings": 2, "dead_after": 0.05}),
    "topk, k still falling": ("topk", {"k_anneal": 1.0}),
    "topk, 4 k latents as well": ("topk", {"multi_topk": 0.125}),
    "matryoshka, prefixes drawn": ("matryoshka", {"random_prefixes": True}),
    "jumprelu, tanh": ("jumprelu", {"sparsity_loss": "tanh", "pre_activation": 0.3}),
    "jumprelu, tanh alone": ("jumprelu", {"sparsity_loss": "tanh", "pre_activation": 0.0}),
    "end_to_end, later layers": ("end_to_end", {"later": 0.7}),
    "kl, relu": ("kl", {"hidden": "relu"}),
}
CASES |= {f"{t} of {a}": (t, {"activation": a}) for t, some in ACTIVATIONS.items() for a in some}


@pytest.fixture(params=VARIANTS)
def name(request):
    return request.param


@pytest.fixture(params=CASES)
def case(request):
    return request.param


def recipe(case, **changes):
    name, options = CASES[case]
    return toys.recipe(name, **(options | changes))


# The formulas of the modules' docstrings, dense, without anything of saebench


class Parts:
    """Copies of a training's parameters, each a leaf."""

    W_skip = None

    def __init__(self, training):
        trained = {k: p for k, p in training.named_parameters() if p.requires_grad}
        for key, parameter in trained.items():
            setattr(self, key, parameter.detach().clone().requires_grad_())
        self.names = list(trained)
        if "encoder" in trained and "decoder" not in trained:
            self.decoder = self.encoder

    def pre(self, x):
        return x @ self.encoder.T + self.b_enc

    def predict(self, f, x):
        x_hat = f @ self.decoder[: f.shape[1]] + self.b_dec
        return x_hat if self.W_skip is None else x_hat + x @ self.W_skip


def squared_error(x, x_hat):
    return ((x - x_hat) ** 2).sum() / len(x)


def auxk_loss(w, x, residual, dead, k):
    pre = w.pre(x)
    k = min(k, int(dead.sum()))
    if k == 0:
        return torch.zeros((), dtype=x.dtype)
    masked = torch.where(dead, pre, -math.inf)
    kept = torch.zeros_like(pre).scatter(1, masked.topk(k, dim=1).indices, 1.0)
    e_hat = relu(torch.where(kept > 0, pre, 0.0)) @ w.decoder
    e = residual.detach()
    return ((e - e_hat) ** 2).sum() / ((e - e.mean(0)) ** 2).sum()


def penalised(w, lesson, training, penalty):
    """A ReLU SAE; `penalty` takes latents, without the coefficient and the mean over tokens."""
    f = relu(w.pre(lesson.x))
    x_hat = w.predict(f, lesson.x)
    error = squared_error(lesson.target, x_hat)
    return x_hat, error + training.control.coefficient() * penalty(f) / len(f)


def relu_reference(w, lesson, training, before):
    return penalised(w, lesson, training, lambda f: f.sum())


def relu_april_reference(w, lesson, training, before):
    return penalised(w, lesson, training, lambda f: (f * w.decoder.norm(dim=1)).sum())


def p_anneal_reference(w, lesson, training, before):
    p, s = 0.2, 0.01  # the last stage
    return penalised(w, lesson, training, lambda f: ((f + s) ** p - s**p).sum())


def tied_reference(w, lesson, training, before):
    f = relu(lesson.x @ w.encoder.T + w.b_enc)
    x_hat = f @ w.encoder + w.b_dec
    penalty = training.control.coefficient() * f.sum() / len(f)
    return x_hat, squared_error(lesson.target, x_hat) + penalty


def gated_reference(w, lesson, training, before):
    x, y = lesson.x, lesson.target
    pi = x @ w.encoder.T
    gate = pi + w.b_enc
    f = (gate > 0) * relu(torch.exp(w.r_mag) * pi + w.b_mag)
    x_hat = w.predict(f, x)
    frozen = copy.copy(w)
    frozen.decoder, frozen.b_dec = w.decoder.detach(), w.b_dec.detach()
    frozen.W_skip = None if w.W_skip is None else w.W_skip.detach()
    x_gate = frozen.predict(relu(gate), x)
    penalty = training.control.coefficient() * relu(gate).sum() / len(x)
    return x_hat, squared_error(y, x_hat) + penalty + squared_error(y, x_gate)


def topk_reference(w, lesson, training, before):
    pre = w.pre(lesson.x)

    def latents(k):
        return relu(pre) * torch.zeros_like(pre).scatter(1, pre.topk(k, dim=1).indices, 1.0)

    k = round(8 - 4 * lesson.progress) if training.recipe.k_anneal else 4
    x_hat, loss = with_auxk(w, lesson, latents(k), training, before)
    more = squared_error(lesson.target, w.predict(latents(16), lesson.x))
    return x_hat, loss + training.recipe.multi_topk * more


def top_of_batch(w, lesson):
    a = relu(w.pre(lesson.x))
    return a * (a >= a.flatten().sort(descending=True).values[4 * len(a) - 1])


def batch_topk_reference(w, lesson, training, before):
    return with_auxk(w, lesson, top_of_batch(w, lesson), training, before)


def matryoshka_reference(w, lesson, training, before):
    f, ends = top_of_batch(w, lesson), [2, 4, 9, 19, 40]
    if training.recipe.random_prefixes:
        drawn = torch.rand(4, generator=torch.Generator().manual_seed(0)).tolist()
        ends = [math.ceil(40**u) for u in sorted(drawn)] + [40]
    errors = [squared_error(lesson.target, w.predict(f[:, :m], lesson.x)) for m in ends]
    x_hat, with_aux = with_auxk(w, lesson, f, training, before)
    return x_hat, sum(errors) / 5 + with_aux - errors[-1]


def with_auxk(w, lesson, f, training, before):
    x_hat = w.predict(f, lesson.x)
    residual, dead = lesson.target - x_hat, before.auxk.activity.dead()
    k = {8: 4, 11: 6}[x_hat.shape[1]]  # half of d_out
    aux = auxk_loss(w, lesson.x, residual, dead, k) / 32
    return x_hat, squared_error(lesson.target, x_hat) + aux


def jumprelu_reference(w, lesson, training, before):
    """The straight-through gradients as terms that are zero but have them."""
    options = training.recipe
    pre, tanh = w.pre(lesson.x), options.sparsity_loss == "tanh"
    jump = (pre > w.threshold).to(pre.dtype).detach()
    inside = ((pre - w.threshold).abs() < options.bandwidth / 2).to(pre.dtype) / options.bandwidth
    distance = w.threshold - pre if tanh else w.threshold
    nothing = distance - distance.detach()
    f = pre * jump - inside * w.threshold.detach() * nothing
    x_hat = w.predict(f, lesson.x)
    error = squared_error(lesson.target, x_hat)
    if tanh:
        penalty = training.control.coefficient() * torch.tanh(4 * f).sum()
        pull = options.pre_activation * relu(w.threshold - pre).sum()
        return x_hat, error + (penalty + pull) / len(f)
    l0 = (jump - inside * nothing).sum() / len(f)
    return x_hat, error + options.sparsity * (l0 / 4 - 1) ** 2


def rescaled_reference(w, lesson, training, before):
    parent = before.parent
    f = relu(lesson.x @ parent.W_enc + parent.b_enc)
    x_hat = (f * torch.exp(w.log_scale)) @ parent.W_dec + parent.b_dec
    return x_hat, squared_error(lesson.target, x_hat)


def end_to_end_reference(w, lesson, training, before):
    model = lesson.downstream
    f = relu(w.pre(lesson.x))
    x_hat = w.predict(f, lesson.x)
    p, q = (torch.softmax(x @ model.logits, -1) for x in (model.x, x_hat))
    kl = (p * (p / q).log()).sum() / len(f)
    a, b = model.x @ model.layer, x_hat @ model.layer
    later = ((a - b) ** 2).sum() / len(f)
    penalty = training.control.coefficient() * f.sum() / len(f)
    return x_hat, kl + training.recipe.later * later + penalty


def kl_reference(w, lesson, training, before):
    """The gradient of the divergence at the running means, half of which are the batch's own, goes to these whole."""
    pre, tanh = relu(w.pre(lesson.x)), training.recipe.hidden == "tanh"
    a = torch.tanh(pre) if tanh else pre
    mean = (a if tanh else 1 - torch.exp(-a)).mean(0)
    r = (before.mean_activation + mean.detach()) / 2 + mean - mean.detach()
    p = 0.3 * 4 / 40
    divergence = (p * torch.log(p / r) + (1 - p) * torch.log((1 - p) / (1 - r))).sum()
    x_hat = w.predict(a * (top_of_batch(w, lesson) > 0), lesson.x)
    return x_hat, squared_error(lesson.target, x_hat) + 0.01 * divergence


def variational_reference(w, lesson, training, before):
    mu = top_of_batch(w, lesson)
    eps, sigma = torch.zeros_like(mu), torch.exp(w.log_sigma).expand_as(mu)
    generator = torch.Generator().manual_seed(0)
    eps[mu > 0] = torch.randn(4 * len(mu), generator=generator, dtype=mu.dtype)
    _, loss = with_auxk(w, lesson, mu + sigma * eps, training, before)
    divergence = ((mu**2 + sigma**2) / 2 - 0.5 - torch.log(sigma)) * (mu > 0)
    return w.predict(mu, lesson.x), loss + 0.003 * divergence.sum() / len(mu)


REFERENCE = {
    "relu": relu_reference,
    "relu_april": relu_april_reference,
    "tied": tied_reference,
    "p_anneal": p_anneal_reference,
    "gated": gated_reference,
    "topk": topk_reference,
    "batch_topk": batch_topk_reference,
    "matryoshka": matryoshka_reference,
    "jumprelu": jumprelu_reference,
    "rescaled": rescaled_reference,
    "end_to_end": end_to_end_reference,
    "kl": kl_reference,
    "variational": variational_reference,
}
CHANGES = {"jumprelu": {"bandwidth": 0.4, "threshold": 0.3}, "relu": {"penalty": 0.2}}
D, WIDTH, N = 8, 40, 64


def loss_of(case):
    """The variant whose formula it is: a transcoder has that of its activation."""
    return getattr(recipe(case), "activation", CASES[case][0])


def generic(case, dtype=torch.float64):
    """A training with nothing at a special value, half of its latents dead where it counts them."""
    chosen = recipe(case, **CHANGES.get(loss_of(case), {}))
    training = chosen.start(toys.task(D, WIDTH, recipe=chosen)).to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in training.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(dtype)
            if parameter.requires_grad:
                parameter.add_(0.1 * noise if key == "threshold" else 0.2 * noise)
        training.after_step(trainer.optimizer_of(training, chosen))
    if hasattr(training, "auxk"):
        training.auxk.activity.silent_for[::2] = 10**9
    return training


def data(dtype=torch.float64, n=N):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(3)).to(dtype) / math.sqrt(D)


def lesson(case, dtype=torch.float64, progress=None):
    """What is read differs from the target for every variant."""
    x = data(dtype)
    if progress is None:
        progress = 0.5 if case == "topk, k still falling" else 0.9
    noise = torch.randn(N, D, generator=torch.Generator().manual_seed(4)).to(dtype)
    return toys.lesson(recipe(case), x, progress)._replace(x=x + 0.1 * noise)


def gradients(training, lesson):
    training.zero_grad()
    loss = training.loss(lesson)
    loss.backward()
    return loss, {key: p.grad for key, p in training.named_parameters() if p.requires_grad}


def test_a_step_has_one_dense_product_with_the_encoder_and_none_back_to_the_input(
    case, monkeypatch
):
    """A gradient that goes through `x - b_dec` costs another product, for a bias alone."""
    training, given = generic(case), lesson(case)
    if not hasattr(training, "pre"):
        pytest.skip("the encoder is another SAE's")
    pre, products = training.pre, []
    monkeypatch.setattr(training, "pre", lambda x: products.append(x) or pre(x))
    x = given.x.requires_grad_(training.W_skip is None)
    training.loss(given).backward()
    assert len(products) == 1
    assert x.grad is None


def test_every_variant_has_a_reference():
    assert sorted([*REFERENCE, *TRANSCODERS]) == VARIANTS


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("share", [1.0, 0.0], ids=["pairs", "everything"])
def test_loss_and_gradients_are_those_of_the_formula(case, share, dtype, near, monkeypatch):
    monkeypatch.setattr(sparse, "DENSE_ABOVE", share)
    training = generic(case, dtype)
    before, w = copy.deepcopy(training), Parts(training)
    loss, found = gradients(training, lesson(case, dtype))
    _, expected = REFERENCE[loss_of(case)](w, lesson(case, dtype), training, before)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=near)
    for key in w.names:
        grad = getattr(w, key).grad
        assert grad.any(), key
        assert float((found[key] - grad).abs().max() / grad.abs().max()) < near, key


def test_the_exported_sae_reconstructs_as_in_training(case):
    training = generic(case, torch.float32)
    before = copy.deepcopy(training)
    batched = hasattr(training, "top") or loss_of(case) == "kl"
    given = lesson(case, torch.float32, progress=0.0 if batched else 1.0)
    training.loss(given)
    x_hat, _ = REFERENCE[loss_of(case)](Parts(training), given, training, before)
    sae, x = training.export(), given.x
    if batched:  # the smallest value that training kept is the threshold: not above it
        assert int((sae.encode(x) != 0).sum()) == 4 * N - 1
        smallest = before.pre(x).flatten().sort(descending=True).values[4 * N - 1]
        smallest = torch.tanh(smallest) if case == "kl" else smallest  # of activations
        assert torch.equal(sae.threshold, smallest.expand(WIDTH))
        sae.threshold.sub_(1e-6)
    found = sae.decode(sae.encode(x))
    if sae.W_skip is not None:
        found = found + x @ sae.W_skip
    torch.testing.assert_close(found, x_hat.detach(), rtol=1e-5, atol=1e-6)


# What training must keep


def test_the_export_is_an_architecture_of_saes(case):
    chosen = recipe(case)
    sae = chosen.start(toys.task(recipe=chosen)).export()
    architecture = type(sae).__module__.rpartition(".")[2]
    assert architecture in registry.names("saes")
    assert type(sae) is registry.get("saes", architecture)
    assert not any(weight.requires_grad for weight in sae.parameters())
    assert (sae.d_in, sae.d_sae) == (8, 32)
    assert sae.d_out == (8 + toys.WIDER if CASES[case][0] in TRANSCODERS else 8)
    assert (sae.W_skip is not None) == (CASES[case][0] == "skip_transcoder")


def test_training_starts_with_unit_directions_and_the_encoder_on_them(case):
    chosen = recipe(case)
    training = chosen.start(toys.task(recipe=chosen))
    if not hasattr(training, "decoder"):
        pytest.skip("the directions are another SAE's")
    length = 0.1 if loss_of(case) == "relu_april" else 1.0
    for matrix in (training.encoder, training.decoder):
        norms = matrix.detach().norm(dim=1).numpy()
        assert norms == pytest.approx(np.full(32, length), rel=1e-6)
    one = training.encoder.data_ptr() == training.decoder.data_ptr()
    assert one == (case == "tied")
    if chosen.target != "other":
        assert torch.equal(training.encoder, training.decoder)


def test_weights_follow_from_the_seed(case):
    chosen = recipe(case)
    starts = (chosen.start(toys.task(seed=seed, recipe=chosen)) for seed in (0, 0, 1))
    first, again, other = (start.export().W_dec for start in starts)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_directions_stay_units_and_gradients_along_them_are_removed(case):
    learner = toys.Learner(recipe(case, lr=0.01))
    training = learner.training
    if not getattr(training, "unit_norm", False):
        pytest.skip("norms are free")
    for x in toys.sparse_data(64 * 5).split(64):
        learner.learn(x)
        norms = training.decoder.detach().norm(dim=1).numpy()
        assert norms == pytest.approx(np.ones(32), abs=1e-6)
    training.loss(toys.lesson(learner.recipe, x)).backward()
    whole, d = training.decoder.grad.clone(), training.decoder.detach()
    training.after_backward()
    expected = whole - (whole * d).sum(1, keepdim=True) * d
    torch.testing.assert_close(training.decoder.grad, expected)
    assert (training.decoder.grad * d).sum(1).abs().max() < 1e-5 < whole.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_no_seed_leads_to_nan(name, seed):
    learner = toys.Learner(recipe(name, lr=0.02), width=24, l0=3, tokens=16 * 15, seed=seed)
    losses = [learner.learn(x) for x in toys.sparse_data(16 * 15, seed=seed).split(16)]
    assert np.isfinite(losses).all()
    assert all(torch.isfinite(w).all() for w in learner.training.export().state_dict().values())


def explained(recipe, sae, x):
    """Of the variance of the target; for a variant trained through a language model, of its divergence."""
    y = toys.lesson(recipe, x).target
    y_hat = sae.decode(sae.encode(x))
    if sae.W_skip is not None:
        y_hat = y_hat + x @ sae.W_skip
    if recipe.end_to_end:
        model = toys.Readout(x)
        return 1 - float(model(y_hat, False).kl / model(y.mean(0).expand_as(y), False).kl)
    return 1 - float((y - y_hat).square().sum() / (y - y.mean(0)).square().sum())


def test_training_explains_more_at_the_wanted_l0(name):
    chosen, tokens = recipe(name, lr=0.01), 128 * 250
    learner = toys.Learner(chosen, width=32, l0=3, tokens=tokens)
    held_out = toys.sparse_data(2000, seed=1)
    before = explained(chosen, learner.training.export(), held_out)
    for x in toys.sparse_data(tokens).split(128):
        learner.learn(x)
    sae = learner.training.export()
    if not chosen.from_parent:  # whose L0 that is
        l0 = float((sae.encode(held_out) != 0).sum()) / 2000
        assert l0 == pytest.approx(3, rel=0.15)
    after = explained(chosen, sae, held_out)
    assert after > max(before, 0) + 0.2 and after > 0.5


def test_what_was_saved_half_way_continues_with_the_same_losses(case):
    batches = toys.sparse_data(64 * 8).split(64)
    shape = {"width": 32, "l0": 4, "tokens": 64 * 8}
    through = toys.Learner(recipe(case, lr=0.01), **shape)
    losses = [through.learn(x) for x in batches]

    first = toys.Learner(recipe(case, lr=0.01), **shape)
    for x in batches[:4]:
        first.learn(x)
    second = toys.Learner(recipe(case, lr=0.01), **shape, seed=5)
    second.training.load_state_dict(copy.deepcopy(first.training.state_dict()))
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.seen = first.seen
    assert [second.learn(x) for x in batches[4:]] == losses[4:]
    for key, weight in through.training.state_dict().items():
        found = second.training.state_dict()[key]
        torch.testing.assert_close(found, weight, rtol=0, atol=0, equal_nan=True)


def finite(training):
    state = training.state_dict()  # the controller's start is not a number until L0 was seen
    return all(w.isfinite().all() for key, w in state.items() if key != "control.start")


def test_batches_of_one_token_are_survived(case):
    learner = toys.Learner(recipe(case), tokens=3)
    for x in toys.sparse_data(64)[:3].split(1):
        assert math.isfinite(learner.learn(x))
        assert finite(learner.training)


@pytest.mark.parametrize("share", [1.0, -1.0], ids=["pairs", "everything"])
def test_batches_that_activate_nothing_are_survived(case, share, monkeypatch):
    monkeypatch.setattr(sparse, "DENSE_ABOVE", share)
    learner = toys.Learner(recipe(case))
    with torch.no_grad():
        for key, parameter in learner.training.named_parameters():
            if key.endswith("b_enc"):
                parameter.fill_(-100)
    for x in toys.sparse_data(128).split(64):
        assert math.isfinite(learner.learn(x))
        assert finite(learner.training)


def test_an_activation_of_exactly_zero_is_survived(case):
    """Where x is nothing and so is the bias: the slope of a power or a norm there must not spread."""
    learner = toys.Learner(recipe(case), tokens=4 * 64)
    for _ in range(4):
        assert math.isfinite(learner.learn(torch.zeros(64, 8)))
        assert finite(learner.training)


# Dead latents


@pytest.mark.parametrize("n_dead", [0, 1, 3, 20])
def test_auxk_is_the_formula_and_reaches_encoder_and_decoder(n_dead):
    training, x = generic("topk"), data()
    training.auxk.activity.silent_for[:] = 10**9 * (torch.arange(WIDTH) < n_dead)
    w, residual = Parts(training), 0.3 * data().flip(0)
    found = training.auxk.loss(training, x, residual, training.pre(x))
    expected = auxk_loss(w, x, residual, torch.arange(WIDTH) < n_dead, 4) / 32
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
    training.auxk.loss(training, x, residual, training.pre(x)).backward()
    assert residual.grad is None


@pytest.mark.parametrize("n", [1, 2, 64])
def test_a_residual_without_spread_leaves_dead_latents_nothing_to_explain(n):
    training, x = generic("topk"), torch.ones(n, D, dtype=torch.float64)
    loss = training.auxk.loss(training, x, 0.5 * x, training.pre(x))
    assert loss.item() == 0
    loss.backward()
    assert not training.encoder.grad.any() and not training.decoder.grad.any()


def test_silence_is_counted_in_tokens_and_ended_by_a_value_above_zero():
    activity = Activity(toys.task(width=3, tokens=1000), dead_after=0.1)
    activity.update(torch.tensor([True, False, False]), 60)
    assert activity.silent_for.tolist() == [0, 60, 60]
    activity.update(torch.tensor([False, True, False]), 40)
    assert activity.silent_for.tolist() == [40, 0, 100]
    assert activity.dead().tolist() == [False] * 3  # 100 of 1000 is not yet more than a tenth
    activity.update(torch.tensor([False, False, False]), 1)
    assert activity.dead().tolist() == [False, False, True]
    activity.forget(torch.tensor([False, False, True]))
    assert activity.silent_for.tolist() == [41, 1, 0]


@pytest.mark.parametrize("name", ["topk", "batch_topk", "matryoshka", "transcoder"])
def test_a_latent_that_is_kept_at_zero_has_not_fired(name):
    chosen = recipe(name)
    training = chosen.start(toys.task(D, WIDTH, l0=WIDTH, recipe=chosen))
    with torch.no_grad():
        training.b_enc[:10] = -100
    training.loss(lesson(name, torch.float32, progress=0.0))
    silent_for = training.auxk.activity.silent_for
    assert silent_for[:10].tolist() == [N] * 10
    assert not silent_for[10:].any()


# Steering


def control(wanted, penalty=0.03, l0_descent=0.3, tokens=64 * 200):
    options = recipe("relu", penalty=penalty, l0_descent=l0_descent)
    return PenaltyControl(toys.task(l0=wanted, tokens=tokens), options)


def update(control, l0, n, progress):
    control.update(torch.tensor(l0), n, progress)
    return control.coefficient().item()


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
    steered = control(wanted, tokens=steps * 100)
    found, coefficient = [], 0.03
    for step in range(steps):
        found.append(plant.step(coefficient, 1 / steps))
        coefficient = update(steered, found[-1], 100, step / steps)
    settled = found[steps // 2 :]
    assert min(settled) > 0.9 * wanted and max(settled) < 1.1 * wanted
    assert found[-1] == pytest.approx(wanted, rel=0.01)


def test_the_goal_descends_from_where_training_starts():
    steered = control(10, l0_descent=0.5)
    assert update(steered, 1000.0, 1, 0.0) == pytest.approx(0.03)  # no error yet
    # Half way in logarithms: still on the line.
    assert update(steered, 100.0, 1, 0.25) == pytest.approx(0.03, rel=1e-4)
    assert update(steered, 100.0, 1, 0.5) > 0.04  # the line is at 10 now: too many


@pytest.mark.parametrize("l0", [0.0, 5.0])
def test_steering_goes_on_after_a_batch_without_active_latents(l0):
    steered = control(10, l0_descent=0.0)
    update(steered, l0, 64, 0.0)
    assert 0 < update(steered, 0.0, 64, 0.1) < 0.03


def test_steering_survives_a_restart():
    def steer(steered, steps):
        return [update(steered, 50.0 - step, 64, step / 20) for step in steps][-1]

    through = steer(control(4), range(20))
    first, second = control(4), control(4, penalty=1.0)
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
