"""The two variants whose penalty is a divergence: `kl`, of mean activations, and `variational`, of latents."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from saebench import registry, sparse
from saebench.errors import UserError
from saebench.saes._dictionary import Scaling
from tests import toys

HIDDEN = ["sigmoid", "tanh", "relu"]
ACTIVATION = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu}
SHARE = {"sigmoid": lambda a: a, "tanh": torch.relu, "relu": lambda a: 1 - torch.exp(-a)}
D, WIDTH, N, L0 = 8, 40, 64, 4


def shaken(recipe, dtype=torch.float64):
    """A training with nothing at a special value."""
    training = recipe.start(toys.task(D, WIDTH, L0, recipe=recipe)).to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in training.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(dtype)
            parameter.add_((0.3 if key == "log_sigma" else 0.2) * noise)
    return training


def data(dtype=torch.float64, n=N):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(3)).to(dtype) / math.sqrt(D)


def leaves(training):
    return {k: p.detach().clone().requires_grad_() for k, p in training.named_parameters()}


def kept(a, n_kept):
    return a >= a.flatten().sort(descending=True).values[n_kept - 1]


def assert_same_gradients(training, loss, w, expected, near):
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=near)
    for key, parameter in training.named_parameters():
        assert w[key].grad.any(), key
        error = (parameter.grad - w[key].grad).abs().max() / w[key].grad.abs().max()
        assert float(error) < near, key


DTYPES = pytest.mark.parametrize(
    ("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["float64", "float32"]
)


# The classic SAE


def kl_reference(w, x, training, running):
    """Dense, with the running means given; the gradient of KL there goes whole to the batch's means."""
    hidden, recipe = training.recipe.hidden, training.recipe
    a = ACTIVATION[hidden](x @ w["encoder"].T + w["b_enc"])
    x_hat = torch.where(kept(a.detach(), L0 * len(x)), a, 0.0) @ w["decoder"] + w["b_dec"]
    mean = SHARE[hidden](a).mean(0)
    rates = running + mean - mean.detach()
    target = torch.full_like(rates, recipe.rate * L0 / WIDTH)
    divergence = kl_divergence(Bernoulli(target), Bernoulli(rates)).sum()
    return ((x - x_hat) ** 2).sum() / len(x) + recipe.kl_weight * divergence


@DTYPES
@pytest.mark.parametrize("hidden", HIDDEN)
def test_the_classic_loss_and_its_gradients_are_those_of_the_formula(hidden, dtype, near):
    recipe = toys.recipe("kl", hidden=hidden, kl_weight=0.3)
    training, x = shaken(recipe, dtype), data(dtype)
    first = SHARE[hidden](ACTIVATION[hidden](training.pre(data(dtype, 5)))).mean(0)
    training.loss(toys.lesson(recipe, data(dtype, 5), progress=0.0))
    torch.testing.assert_close(training.mean_activation, first)

    second = SHARE[hidden](ACTIVATION[hidden](training.pre(x))).mean(0)
    weight = N / (recipe.rate_memory * 64 * 200)  # of the batch in the mean
    running = (1 - weight) * first + weight * second
    assert 0 < weight < 1
    w = leaves(training)
    loss = training.loss(toys.lesson(recipe, x))
    assert_same_gradients(training, loss, w, kl_reference(w, x, training, running), near)


@pytest.mark.parametrize(
    ("bias", "direction"), [(-6.0, -1), (-1.0, 1)], ids=["too quiet", "too loud"]
)
def test_a_unit_off_its_rate_is_led_back_though_it_is_not_active(bias, direction):
    """Unit 0 is never among the largest, so that no gradient comes from reconstruction."""
    recipe = toys.recipe("kl", hidden="sigmoid", rate=0.8)  # a target of 0.08
    training = recipe.start(toys.task(D, WIDTH, L0, recipe=recipe))
    with torch.no_grad():
        training.b_enc.fill_(2.0)
        training.b_enc[0] = bias
        training.encoder[0] = 0.0
    training.loss(toys.lesson(recipe, data(torch.float32), progress=0.0)).backward()
    r = 1 / (
        1 + math.exp(-bias)
    )  # the gradient of KL is (r - rate) / (r (1 - r)), that of r is r (1 - r)
    assert training.b_enc.grad[0].item() == pytest.approx(recipe.kl_weight * (r - 0.08), rel=1e-4)
    assert direction * training.b_enc.grad[0] > 0 and not training.decoder.grad[0].any()


def test_the_divergence_is_nothing_at_the_target_rate():
    recipe = toys.recipe("kl", hidden="sigmoid", rate=0.8, kl_weight=1e3)
    training = recipe.start(toys.task(D, WIDTH, L0, recipe=recipe)).double()
    with torch.no_grad():
        training.encoder.zero_()
        training.b_enc.fill_(math.log(0.08 / 0.92))
        training.decoder.zero_()
    x = data()
    loss = training.loss(toys.lesson(recipe, x, progress=0.0))
    assert loss.item() == pytest.approx(float((x**2).sum()) / N, rel=1e-9)


@pytest.mark.parametrize("hidden", HIDDEN)
def test_the_classic_sae_reconstructs_as_in_training(hidden):
    recipe = toys.recipe("kl", hidden=hidden, kl_weight=1e-9)
    training, x = shaken(recipe, torch.float32), data(torch.float32)
    loss = training.loss(toys.lesson(recipe, x, progress=0.0)).item()
    a = ACTIVATION[hidden](training.pre(x))
    smallest = a.flatten().sort(descending=True).values[L0 * N - 1]
    sae = training.export()
    torch.testing.assert_close(sae.threshold, smallest.expand(WIDTH), rtol=1e-6, atol=0)
    sae.threshold.mul_(1 - 1e-5)  # training kept the smallest, which is not above itself
    z = sae.encode(x)
    assert int((z != 0).sum()) == L0 * N
    assert float(((x - sae.decode(z)) ** 2).sum()) / N == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("hidden", HIDDEN)
def test_every_kind_of_unit_learns_and_has_the_wanted_l0(hidden):
    tokens = 128 * 150
    recipe = toys.recipe("kl", hidden=hidden, lr=0.01)
    learner = toys.Learner(recipe, width=32, l0=3, tokens=tokens)
    for x in toys.sparse_data(tokens).split(128):
        learner.learn(x)
    held_out, sae = toys.sparse_data(2000, seed=1), learner.training.export()
    z = sae.encode(held_out)
    assert float((z != 0).sum()) / 2000 == pytest.approx(3, rel=0.1)
    assert float((held_out - sae.decode(z)).square().sum()) / 2000 < 0.5
    assert (z != 0).any(0).all(), "no unit is dead"


def test_a_target_rate_of_one_or_more_is_refused():
    with pytest.raises(ValueError, match="rate 3 with l0 20 and width 40 is a target of 1.5"):
        toys.recipe("kl", rate=3.0).check(WIDTH, 20.0)


# Saturating units


@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
def test_a_saturating_unit_gives_no_more_than_its_size_and_nothing_below_its_threshold(activation):
    sae = registry.get("saes", "saturating")(1, 2, activation=activation)
    sae.W_enc.copy_(torch.tensor([[1.0, 2.0]]))
    sae.b_enc.copy_(torch.tensor([0.0, 1.0]))
    sae.size.copy_(torch.tensor([2.0, 0.5]))
    sae.threshold.copy_(torch.tensor([0.3, 0.4]))
    act = {"sigmoid": lambda a: 1 / (1 + math.exp(-a)), "tanh": math.tanh}[activation]
    for x in (-3.0, -0.5, 0.0, 0.2, 1.0, 50.0):
        whole = [2.0 * act(x / 2.0), 0.5 * act((2 * x + 1) / 0.5 if x < 50 else 40.0)]
        expected = [v if v > t else 0.0 for v, t in zip(whole, (0.3, 0.4), strict=True)]
        assert sae.encode(torch.tensor([[x]]))[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_a_saturating_transcoder_folds_both_scales():
    sae = registry.get("saes", "saturating")(D, WIDTH, d_out=3, activation="tanh").double()
    generator = torch.Generator().manual_seed(5)
    for weight in sae.parameters():
        weight.copy_(torch.rand(weight.shape, generator=generator, dtype=torch.float64) - 0.2)
    sae.size.abs_().add_(0.5)
    x = data()
    read = Scaling(torch.linspace(-3, 4, D, dtype=torch.float64), 2.5)
    predicted = Scaling(torch.linspace(1, 2, 3, dtype=torch.float64), 0.4)
    z, x_hat = sae.encode(x), sae.decode(sae.encode(x))
    sae.fold(read, predicted)
    raw = read.scale * x + read.mean
    torch.testing.assert_close(sae.encode(raw), predicted.scale * z)
    torch.testing.assert_close(
        sae.decode(sae.encode(raw)), predicted.scale * x_hat + predicted.mean
    )


def test_an_unknown_activation_is_refused():
    with pytest.raises(UserError, match="activation is 'softmax'; expected one of sigmoid, tanh"):
        registry.get("saes", "saturating")(D, WIDTH, activation="softmax")


# The variational SAE


def variational_reference(w, x, recipe, progress):
    pre = x @ w["encoder"].T + w["b_enc"]
    on = kept(torch.relu(pre.detach()), L0 * len(x))
    eps = torch.zeros_like(pre)
    drawn = torch.randn(int(on.sum()), generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    eps[on] = drawn
    mu, sigma = torch.relu(pre), w["log_sigma"].exp().expand_as(pre)
    x_hat = torch.where(on, mu + sigma * eps, 0.0) @ w["decoder"] + w["b_dec"]
    prior = Normal(torch.zeros((), dtype=x.dtype), recipe.prior)
    divergence = kl_divergence(Normal(mu[on], sigma[on]), prior).sum() / len(x)
    weight = recipe.kl_weight * min(1, progress / recipe.kl_warmup)
    return ((x - x_hat) ** 2).sum() / len(x) + weight * divergence


@DTYPES
@pytest.mark.parametrize("progress", [0.05, 0.9])
def test_the_variational_loss_and_its_gradients_are_those_of_the_formula(progress, dtype, near):
    recipe = toys.recipe("variational", kl_weight=0.3, prior=0.7, sigma=0.4)
    training, x = shaken(recipe, dtype), data(dtype)
    w = leaves(training)
    expected = variational_reference(w, x, recipe, progress)
    loss = training.loss(toys.lesson(recipe, x, progress))
    assert_same_gradients(training, loss, w, expected, near)


@pytest.mark.parametrize(("weight", "prior"), [(0.1, 1.0), (0.5, 0.4)])
def test_sigma_goes_to_its_known_optimum(weight, prior):
    recipe = toys.recipe("variational", kl_weight=weight, prior=prior, sigma=1.0, kl_warmup=0.0)
    training = recipe.start(toys.task(1, 1, 1, recipe=recipe)).double()
    with torch.no_grad():
        training.encoder.fill_(1)
        training.decoder.fill_(1)
    optimizer = torch.optim.SGD([training.log_sigma], lr=0.2)
    for step in range(150):
        optimizer.zero_grad()
        x = torch.ones(256, 1, dtype=torch.float64)
        training.loss(toys.lesson(recipe, x, 0.5, seed=step)).backward()
        optimizer.step()
    variance = weight / (2 + weight / prior**2)
    assert float((2 * training.log_sigma.detach()).exp()) == pytest.approx(variance, rel=0.08)


def test_noise_is_of_the_step_and_the_export_has_none():
    recipe = toys.recipe("variational", sigma=0.5)
    training, x = shaken(recipe, torch.float32), data(torch.float32)
    losses = [training.loss(toys.lesson(recipe, x, seed=seed)).item() for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    sae = training.export()
    assert type(sae) is registry.get("saes", "jumprelu")
    code = sparse.from_dense(sae.encode(x))
    assert torch.equal(code.values, training.pre(x)[sparse.rows_of(code), code.indices])
