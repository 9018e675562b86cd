"""SAEs of activations that are normalised token by token, against the formulas in NumPy."""

import numpy as np
import pytest
import torch

from saebench import sparse
from saebench.saes._normalized import Normalized
from saebench.saes.jumprelu import JumpReLU
from saebench.saes.relu import ReLU
from saebench.saes.topk import TopK

D, N, K, TOKENS = 6, 17, 3, 40
NORMS = ["layer", "length", "rms"]
EPS = 1e-3
"""Large enough to be seen."""


def filled(sae):
    generator = torch.Generator().manual_seed(1)
    for weight in sae.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator))
    return sae


def architectures(skip, d_out=D):
    inner = [ReLU(D, N, d_out, skip), JumpReLU(D, N, d_out, skip), TopK(D, N, d_out, skip, k=K)]
    return [filled(sae) for sae in inner]


def activations(scale=1.0):
    x = torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(2))
    return scale * (x * torch.linspace(0.1, 5, TOKENS)[:, None] + 1)


def moments(x, norm):
    """Shift and scale of every token."""
    if norm == "layer":
        return x.mean(1, keepdims=True), x.std(1, ddof=1, keepdims=True) + EPS
    if norm == "rms":
        return 0.0, np.sqrt((x**2).sum(1, keepdims=True) / D + EPS)
    return 0.0, np.linalg.norm(x, axis=1, keepdims=True) / np.sqrt(D)


def encoded(sae, x):
    """In float64, by the formula of each architecture."""
    w = {key: value.double().numpy() for key, value in sae.state_dict().items()}
    pre = x @ w["W_enc"] + w["b_enc"]
    if isinstance(sae, ReLU):
        return np.maximum(pre, 0)
    if isinstance(sae, JumpReLU):
        return np.where(pre > w["threshold"], pre, 0)
    return np.where(pre >= np.sort(pre, 1)[:, -K][:, None], np.maximum(pre, 0), 0)


def expected(sae, x, norm, undone):
    """Latents and reconstruction."""
    w = {key: value.double().numpy() for key, value in sae.state_dict().items()}
    shift, scale = moments(x, norm)
    normal = (x - shift) / scale
    f = encoded(sae, normal)
    y = f @ w["W_dec"] + w["b_dec"] + (normal @ w["W_skip"] if "W_skip" in w else 0)
    return (f * scale, y * scale + shift) if undone else (f, y)


def near(found, numbers):
    torch.testing.assert_close(found.double().numpy(), numbers, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("undone", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("which", range(3))
def test_latents_and_reconstruction_are_those_of_the_formulas(which, norm, undone, skip):
    inner = architectures(skip)[which]
    sae, x = Normalized(inner, norm, EPS, undone), activations()
    z, x_hat = expected(inner, x.double().numpy(), norm, undone)
    near(sae.encode(x), z)
    near(sae.decode(sae.encode(x)) + sae.beside(x), x_hat)


@pytest.mark.parametrize("undone", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("which", range(3))
def test_sparse_codes_are_the_dense_ones(which, norm, undone):
    sae, x = Normalized(architectures(True)[which], norm, EPS, undone), activations()
    code = sae.encode_sparse(x)
    torch.testing.assert_close(sparse.to_dense(code, N), sae.encode(x))
    torch.testing.assert_close(sae.decode_sparse(code), sae.decode(sae.encode(x)))


@pytest.mark.parametrize("undone", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_a_token_is_the_same_alone_as_in_a_batch(norm, undone):
    sae, x = Normalized(architectures(True)[2], norm, EPS, undone), activations()
    for whole, of_one in ((sae.encode(x), sae.encode), (sae.beside(x), sae.beside)):
        torch.testing.assert_close(whole[:5], torch.cat([of_one(row[None]) for row in x[:5]]))


def test_a_transcoder_predicts_a_site_of_another_width():
    inner = architectures(True, d_out=9)[1]
    sae, x = Normalized(inner, "rms", EPS, undone=False), activations()
    z, y = expected(inner, x.double().numpy(), "rms", undone=False)
    assert (sae.d_in, sae.d_sae, sae.d_out) == (D, N, 9)
    near(sae.decode(sae.encode(x)) + sae.beside(x), y)


@pytest.mark.parametrize("undone", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_a_token_of_zeros_gives_finite_numbers(norm, undone):
    sae, x = Normalized(architectures(True)[0], norm, EPS, undone), torch.zeros(2, D)
    code = sae.encode_sparse(x)
    for found in (sae.encode(x), sae.beside(x), sae.decode_sparse(code), code.values):
        assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize("norm", NORMS)
def test_a_token_of_zeros_is_predicted_as_zeros_where_the_norm_is_undone_without_an_eps(norm):
    sae = Normalized(architectures(True)[1], norm, 1e-30, undone=True)
    x = torch.zeros(2, D)
    x_hat = sae.decode(sae.encode(x)) + sae.beside(x)
    torch.testing.assert_close(x_hat, x)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_length_and_unit_go_together_where_the_norm_is_undone(scale):
    """Activations in another unit give latents in that unit, and the same ones active."""
    sae = Normalized(architectures(False)[1], "length", 0.0, undone=True)
    x = activations()
    torch.testing.assert_close(sae.encode(scale * x), scale * sae.encode(x), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("norm", ["length", "rms"])
def test_nothing_is_active_for_no_tokens(norm):
    sae = Normalized(architectures(True)[2], norm, EPS, undone=True)
    nothing = torch.zeros(0, D)
    assert sae.encode(nothing).shape == (0, N) and sae.beside(nothing).shape == (0, D)
    assert len(sae.encode_sparse(nothing).values) == 0


def test_what_tells_two_of_the_same_weights_apart_is_among_the_arguments():
    inner = architectures(False)[2]
    arguments = Normalized(inner, "layer", EPS, undone=True).arguments()
    assert arguments["inner"]["k"] == K and arguments["architecture"] == "TopK"
    others = [("rms", EPS, True), ("layer", 0.0, True), ("layer", EPS, False)]
    for norm, eps, undone in others:
        assert Normalized(inner, norm, eps, undone).arguments() != arguments
