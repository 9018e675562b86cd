"""Sparse coding over a dictionary, against scipy, scikit-learn and closed forms."""

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from sklearn.linear_model import Lasso
from torch.nn.functional import normalize

from saebench.errors import UserError
from saebench.saes import pursuit
from saebench.saes.fista import FISTA
from saebench.saes.pursuit import Pursuit
from saebench.saes.topk import TopK
from tests import toys


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(d, rows):
    return torch.linalg.qr(random(d, d)).Q[:rows]


def matching(W_dec, k, b_dec=0.0):
    sae = Pursuit(W_dec.shape[1], len(W_dec), k=k).to(W_dec.dtype)
    sae.W_dec.copy_(W_dec)
    sae.b_dec.fill_(b_dec)
    return sae


def lasso(W_dec, penalty, iterations=100):
    sae = FISTA(W_dec.shape[1], len(W_dec), iterations=iterations).to(W_dec.dtype)
    sae.W_dec.copy_(W_dec)
    sae.penalty.fill_(penalty)
    return sae


def sparse_code(n, d_sae, active, seed=1):
    """Exactly `active` latents per token, from 0.5 to 1.5."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(n, d_sae, generator=generator).argsort(1)
    values = 0.5 + torch.rand(n, d_sae, generator=generator, dtype=torch.float64)
    return values * (order < active)


# Matching pursuit


def test_pursuit_recovers_a_code_over_an_orthonormal_dictionary():
    z = sparse_code(100, 12, active=5)
    sae = matching(orthonormal(16, 12) * torch.linspace(0.2, 3, 12)[:, None], k=5, b_dec=2.0)
    torch.testing.assert_close(sae.encode(sae.decode(z)), z)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_pursuit_recovers_a_code_over_an_incoherent_dictionary(dtype, near):
    W_dec = normalize(random(400, 200), dim=-1)
    z = sparse_code(100, 400, active=6)
    sae = matching(W_dec, k=6, b_dec=-1.0).to(dtype)
    found = sae.encode(sae.decode(z.to(dtype)))
    assert float((found - z).abs().max()) < near
    assert torch.equal(found != 0, z != 0)


def test_pursuit_stops_when_the_activation_is_used_up():
    z = sparse_code(50, 400, active=3)
    for dtype in (torch.float64, torch.float32):
        sae = matching(normalize(random(400, 200), dim=-1), k=20).to(dtype)
        assert (sae.encode(sae.decode(z.to(dtype))) != 0).sum(1).tolist() == [3] * 50


def greedy(W_dec, x, k):
    """Non-negative orthogonal matching pursuit, one token at a time, solved anew at every step."""
    unit = W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True)
    z, chosen, left = np.zeros(len(W_dec)), [], 0
    while len(chosen) < k:
        correlation = unit @ (x - z @ W_dec)
        correlation[chosen] = 0
        if correlation.max() < 1e-12:
            break
        tried = [*chosen, int(correlation.argmax())]
        z[tried], _ = nnls(W_dec[tried].T, x)
        chosen = [i for i in tried if z[i] > 0]
        left += len(tried) - len(chosen)
    return z, left


@pytest.mark.parametrize(("d", "d_sae", "k"), [(12, 60, 3), (12, 60, 9), (30, 20, 20), (8, 50, 8)])
def test_pursuit_is_greedy_choice_with_least_squares_at_every_step(d, d_sae, k):
    W_dec = (random(d_sae, d) + 0.3) * torch.linspace(0.3, 3, d_sae)[:, None]
    x = random(80, d, seed=5)
    expected, left = zip(*(greedy(W_dec.numpy(), row, k) for row in x.numpy()), strict=True)
    found = matching(W_dec, k).encode(x).numpy()
    assert found == pytest.approx(np.array(expected), abs=1e-9)
    assert ((found != 0).sum(1) == (np.array(expected) != 0).sum(1)).all()
    assert sum(left) > 5 or k == 3 or d > d_sae, "latents that leave are part of what this compares"


def test_pursuit_with_all_latents_is_non_negative_least_squares():
    W_dec, x = random(20, 30) + 0.3, random(60, 30, seed=2)
    expected = [nnls(W_dec.T.numpy(), row)[0] for row in x.numpy()]
    found = matching(W_dec, k=20).encode(x)
    assert found.numpy() == pytest.approx(np.array(expected), abs=1e-9)
    assert 3 < (found != 0).sum(1).double().mean() < 17


def test_pursuit_keeps_its_digits_in_float32_among_nearly_parallel_directions():
    """Cosines of 0.99: the values are still those of least squares over the chosen latents."""
    common = normalize(random(1, 40, seed=9)).float()
    W_dec = common + 0.1 * normalize(random(200, 40), dim=-1).float()
    x = 3 * common + 0.1 * random(60, 40, seed=3).float()
    sae = matching(W_dec, k=24)
    z = sae.encode(x)
    for row, code in zip(x.double().numpy(), z.double().numpy(), strict=True):
        chosen = np.flatnonzero(code)
        _, least = nnls(W_dec.double().numpy()[chosen].T, row)
        found = np.linalg.norm(row - code @ W_dec.double().numpy())
        assert found == pytest.approx(least, rel=1e-5)
    assert (z != 0).sum(1).double().mean() > 5


def test_pursuit_has_as_many_latents_as_asked_for_and_none_negative():
    z = matching(random(300, 40), k=16).encode(random(200, 40, seed=3))
    assert (z != 0).sum(1).tolist() == [16] * 200 and bool((z >= 0).all())


def test_pursuit_explains_more_with_every_latent():
    x, error = random(100, 20, seed=4), [torch.full((100,), torch.inf, dtype=torch.float64)]
    for k in (1, 2, 4, 8, 16):
        sae = matching(random(100, 20), k)
        error.append((x - sae.decode(sae.encode(x))).square().sum(1))
    assert all((after < before).all() for before, after in zip(error[:-1], error[1:], strict=True))


def test_an_activation_without_positive_correlations_has_no_latents():
    sae = matching(torch.eye(5), k=3, b_dec=1.0)
    assert not sae.encode(torch.ones(2, 5)).any()
    assert not sae.encode(torch.tensor([[-1.0, 0, 1, 1, -5]])).any()
    assert sae.encode(torch.tensor([[2.0, 0, 1, 1, -5]])).tolist() == [[1, 0, 0, 0, 0]]


def test_rows_of_zeros_are_never_chosen_and_equal_rows_only_once():
    W_dec = torch.cat([torch.eye(4), torch.eye(4), torch.zeros(3, 4)])
    x = 1 + torch.rand(20, 4, generator=torch.Generator().manual_seed(0))
    sae = matching(W_dec, k=8)
    z = sae.encode(x)
    assert (z != 0).sum(1).tolist() == [4] * 20 and not z[:, 8:].any()
    torch.testing.assert_close(sae.decode(z), x)


def test_how_many_tokens_are_pursued_at_a_time_does_not_matter(monkeypatch):
    sae, x = matching(random(60, 12), k=5), random(30, 12, seed=7)
    whole = sae.encode(x)
    monkeypatch.setattr(pursuit, "_CHUNK", 5 * 17 * 4)
    torch.testing.assert_close(sae.encode(x), whole)


@pytest.mark.parametrize("k", [0, 13])
def test_pursuit_refuses_a_k_beyond_its_width(k):
    with pytest.raises(UserError, match=f"k is {k}"):
        Pursuit(4, 12, k=k)


def trained_topk(x, d_sae, k, steps=400):
    """A TopK SAE trained by plain autograd."""
    d = x.shape[1]
    rows = normalize(random(d_sae, d).float(), dim=-1)
    encoder, decoder = rows.T.clone().requires_grad_(), rows.clone().requires_grad_()
    adam = torch.optim.Adam([encoder, decoder], lr=3e-3)
    for _ in range(steps):
        pre = x @ encoder
        top = pre.topk(k, dim=-1)
        z = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
        loss = (x - z @ decoder).square().sum(1).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    sae = TopK(d, d_sae, k=k)
    sae.W_enc.copy_(encoder.detach())
    sae.W_dec.copy_(decoder.detach())
    return sae


def test_pursuit_explains_more_than_the_encoder_that_the_dictionary_was_trained_with():
    x = toys.sparse_data(1000, d=16, features=48, active=4)
    sae = trained_topk(x, 48, k=4)
    by_encoder = (x - sae.decode(sae.encode(x))).square().sum()
    other = matching(sae.W_dec.float(), k=4)
    by_pursuit = (x - other.decode(other.encode(x))).square().sum()
    assert by_pursuit < 0.8 * by_encoder < 0.4 * x.square().sum()


# FISTA


@pytest.mark.parametrize("penalty", [0.1, 0.7])
def test_fista_over_an_orthonormal_dictionary_is_soft_thresholding(penalty):
    W_dec, x = orthonormal(10, 8), random(50, 10, seed=1)
    z = lasso(W_dec, penalty).encode(x)
    torch.testing.assert_close(z, (x @ W_dec.T - penalty).relu())


def objective(W_dec, x, z, penalty):
    return ((x - z @ W_dec) ** 2).sum(1) / 2 + penalty * z.sum(1)


@pytest.mark.parametrize("penalty", [0.3, 1.0])
def test_fista_minimises_what_scikit_learns_lasso_does(penalty):
    W_dec, x = normalize(random(64, 16), dim=-1), 2 * random(30, 16, seed=1)
    d, rows = W_dec.shape[1], W_dec.numpy()
    theirs = Lasso(penalty / d, positive=True, fit_intercept=False, tol=1e-10, max_iter=100_000)
    expected = np.array([theirs.fit(rows.T, row).coef_.copy() for row in x.numpy()])
    least = objective(rows, x.numpy(), expected, penalty)
    found = lasso(W_dec, penalty).encode(x).numpy()
    assert objective(rows, x.numpy(), found, penalty).sum() / least.sum() - 1 < 1e-3
    exact = lasso(W_dec, penalty, iterations=3000).encode(x).numpy()
    assert objective(rows, x.numpy(), exact, penalty) == pytest.approx(least, rel=1e-6)
    assert exact == pytest.approx(expected, abs=2e-3)
    assert ((exact != 0) == (expected != 0)).mean() > 0.999


def test_what_fista_finds_meets_the_conditions_of_a_minimum():
    """Active latents have a correlation of the penalty with what is left over, the others no larger one."""
    W_dec, x, penalty = normalize(random(40, 12), dim=-1), 2 * random(30, 12, seed=1), 0.5
    sae = lasso(W_dec, penalty, iterations=5000)
    z = sae.encode(x)
    correlation = (x - sae.decode(z)) @ W_dec.T
    assert correlation[z > 0].numpy() == pytest.approx(penalty, abs=1e-5)
    assert float(correlation[z == 0].max()) < penalty + 1e-5
    assert 0.05 < float((z != 0).double().mean()) < 0.5


def test_fista_with_more_dimensions_than_latents_is_non_negative_least_squares_at_no_penalty():
    W_dec, x = random(10, 30), random(20, 30, seed=1)
    expected = [nnls(W_dec.T.numpy(), row)[0] for row in x.numpy()]
    found = lasso(W_dec, 0.0, iterations=1000).encode(x).numpy()
    assert found == pytest.approx(np.array(expected), abs=1e-8)


@pytest.mark.parametrize("build", [lambda W: matching(W, k=4), lambda W: lasso(W, 0.4)])
def test_how_length_is_shared_between_latents_and_rows_does_not_matter(build):
    W_dec, x = random(30, 8), random(40, 8, seed=1)
    lengths = torch.linspace(0.1, 5, 30, dtype=torch.float64)
    one, other = build(W_dec), build(W_dec * lengths[:, None])
    torch.testing.assert_close(other.encode(x) * lengths, one.encode(x))


def test_fista_over_nothing_finds_nothing():
    assert not lasso(torch.zeros(5, 3), 0.1).encode(torch.ones(2, 3)).any()


def test_fista_refuses_no_iterations():
    with pytest.raises(UserError, match="iterations is 0"):
        FISTA(4, 12, iterations=0)
