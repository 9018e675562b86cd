"""Controls against independent implementations, and what makes each of them a fair one."""

from collections.abc import Callable

import numpy as np
import pytest
import sklearn.decomposition
import torch

from saebench.controls._control import Asked, Material, Planned
from saebench.controls.identity import Identity
from saebench.controls.pca import PCA
from saebench.controls.permuted_decoder import PermutedDecoder
from saebench.controls.random import Random
from saebench.errors import UserError
from saebench.saes.jumprelu import JumpReLU
from tests import toys

D, N = 10, 1500
ASKED = [
    Asked("a", "topk", 32, 4.0, "hash a"),
    Asked("b", "relu", 32, 4.0, "hash b"),
    Asked("c", "relu", 32, 8.0, "hash c"),
    Asked("d", "relu", 64, 8.0, "hash d"),
]


@pytest.fixture(scope="module")
def x():
    """Activations with a large mean and directions of very different weight."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(D, D, generator=generator) * torch.linspace(0.1, 3, D)
    return torch.randn(N, D, generator=generator) @ mixing.T + 5


def no_parent(name: str) -> object:
    raise AssertionError("this control has no parent")


def material(x, trained: Callable = no_parent):
    return Material(x, trained)


def explained(sae, x):
    x_hat = sae.decode_sparse(sae.encode_sparse(x)).double()
    x = x.double()
    return 1 - float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())


def l0(sae, x):
    return len(sae.encode_sparse(x).indices) / len(x)


# Identity


def test_the_identity_gives_back_every_activation_exactly(x):
    sae = Identity().build(Planned("", None, None), material(x))
    assert torch.equal(sae.decode_sparse(sae.encode_sparse(x)), x)
    assert torch.equal(sae.decode(sae.encode(x)), x)


# Principal components


def pca(x, k):
    return PCA().build(Planned(f"-{k}", None, k), material(x))


@pytest.mark.parametrize("k", [1, 3, 9])
def test_principal_components_explain_what_scikit_learn_says(x, k):
    theirs = sklearn.decomposition.PCA(k).fit(x.double().numpy())
    assert explained(pca(x, k), x) == pytest.approx(
        theirs.explained_variance_ratio_.sum(), abs=1e-6
    )
    ours, rows = pca(x, k).W_dec.numpy(), theirs.components_
    assert np.abs((ours * rows).sum(1)) == pytest.approx(np.ones(k), abs=1e-5)


@pytest.mark.parametrize("k", [1, 4, 8])
def test_no_other_fixed_directions_explain_more(x, k):
    centred = (x - x.mean(0)).double().numpy()
    rng = np.random.default_rng(0)
    best = explained(pca(x, k), x)
    for _ in range(50):
        basis, _ = np.linalg.qr(rng.normal(size=(D, k)))
        kept = (centred @ basis) @ basis.T
        assert 1 - ((centred - kept) ** 2).sum() / (centred**2).sum() < best


def test_all_components_give_back_every_activation(x):
    sae = PCA().build(Planned("-full", None, None), material(x))
    assert sae.d_sae == D and l0(sae, x) == D
    torch.testing.assert_close(sae.decode(sae.encode(x)), x, rtol=1e-5, atol=1e-4)
    assert explained(sae, x) == pytest.approx(1, abs=1e-10)


def test_more_components_than_dimensions_are_all_of_them(x):
    assert pca(x, 3 * D).d_sae == D


def test_there_is_one_pca_for_each_l0_of_the_suite_and_one_with_everything():
    assert [(p.suffix, p.l0) for p in PCA().plan(ASKED)] == [("-4", 4), ("-8", 8), ("-full", None)]


# Random directions


@pytest.mark.parametrize("wanted", [1.0, 6.0, 20.0])
def test_random_directions_have_the_wanted_l0(x, wanted):
    sae = Random().build(Planned("", 64, wanted), material(x))
    assert sae.d_sae == 64 and l0(sae, x) == pytest.approx(wanted, rel=0.02)


def test_random_directions_have_an_l0_above_half_their_width_too(x):
    sae = Random().build(Planned("", 32, 25.0), material(x))
    assert l0(sae, x) == pytest.approx(25, rel=0.02)


def test_the_gain_of_random_directions_is_that_of_least_squares(x):
    sae = Random().build(Planned("", 64, 6.0), material(x))
    z = sae.encode(x).double().numpy()
    assert sae.b_dec.numpy() == pytest.approx(x.mean(0).numpy(), rel=1e-5)
    directions = sae.W_enc.T.double().numpy()
    assert np.linalg.norm(directions, axis=1) == pytest.approx(np.ones(64), abs=1e-6)
    regressor = (z @ directions).ravel()[:, None]
    gain = np.linalg.lstsq(regressor, (x - x.mean(0)).double().numpy().ravel())[0][0]
    assert sae.W_dec.double().numpy() == pytest.approx(gain * directions, rel=1e-3, abs=1e-6)
    assert 0 < explained(sae, x) < explained(pca(x, 6), x)


def test_random_directions_follow_from_their_seed(x):
    planned = Planned("", 64, 6.0)
    first, again = (Random().build(planned, material(x)) for _ in range(2))
    assert torch.equal(first.W_dec, again.W_dec)
    assert not torch.equal(first.W_dec, Random(seed=1).build(planned, material(x)).W_dec)


def test_there_is_one_set_of_random_directions_for_each_shape_of_the_suite():
    assert [p.suffix for p in Random().plan(ASKED)] == ["-w32-l4", "-w32-l8", "-w64-l8"]


# Permuted decoder


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "gated"])
def test_a_permuted_decoder_has_the_code_and_the_rows_of_its_parent(x, architecture):
    parent = toys.sae_of(architecture, D, 32)
    planned = Planned("", 32, 4.0, ASKED[0])
    sae = PermutedDecoder().build(
        planned, material(x, lambda name: toys.sae_of(architecture, D, 32))
    )
    assert torch.equal(sae.encode(x), parent.encode(x))
    assert torch.equal(sae.b_dec, parent.b_dec)
    assert sorted(map(tuple, sae.W_dec.tolist())) == sorted(map(tuple, parent.W_dec.tolist()))
    moved = (sae.W_dec != parent.W_dec).any(1).float().mean()
    assert moved == 1


def test_the_parent_is_the_first_of_its_shape():
    planned = PermutedDecoder().plan(ASKED)
    assert [(p.suffix, p.parent.name) for p in planned] == [
        ("-w32-l4", "a"),
        ("-w32-l8", "c"),
        ("-w64-l8", "d"),
    ]
    of_relu = PermutedDecoder(of="relu").plan(ASKED)
    assert [p.parent.name for p in of_relu] == ["b", "c", "d"]


@pytest.mark.parametrize("control", [PermutedDecoder(of="gated"), PermutedDecoder()])
def test_a_permuted_decoder_without_a_parent_is_refused(control):
    with pytest.raises(UserError, match="has no parent"):
        control.plan([] if control.of is None else ASKED)


@pytest.mark.parametrize("seed", range(10))
def test_no_latent_keeps_its_own_row_in_a_permuted_decoder(seed):
    parent = JumpReLU(4, 8)
    parent.W_dec.copy_(torch.arange(8.0)[:, None].expand(8, 4))
    asked = Asked("p", "jumprelu", 8, 2.0, "hash")
    (planned,) = PermutedDecoder(seed=seed).plan([asked])
    material = Material(torch.zeros(1, 4), lambda _name: parent)
    dealt = PermutedDecoder(seed=seed).build(planned, material).W_dec[:, 0]
    assert sorted(dealt.tolist()) == list(range(8))
    assert (dealt != torch.arange(8.0)).all()
