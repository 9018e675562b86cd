"""Controls against independent implementations, and what makes each of them a fair one."""

from collections.abc import Callable

import numpy as np
import pytest
import sklearn.cluster
import sklearn.decomposition
import torch

from saebench import suite
from saebench.controls import ica
from saebench.controls._control import Asked, Material, Planned
from saebench.controls.ica import ICA
from saebench.controls.identity import Identity
from saebench.controls.kmeans import KMeans
from saebench.controls.neurons import Neurons
from saebench.controls.pca import PCA
from saebench.controls.permuted_decoder import PermutedDecoder
from saebench.controls.pursuit import Pursuit
from saebench.controls.random import Random
from saebench.errors import UserError
from saebench.saes.jumprelu import JumpReLU
from saebench.saes.relu import ReLU
from saebench.types import Site
from tests import toys

D, N = 10, 1500
RECIPE = suite.recipe("topk", {})
ASKED = [
    Asked("a", "topk", 32, 4.0, "hash a", Site("resid_post", 0), RECIPE),
    Asked("b", "relu", 32, 4.0, "hash b", Site("resid_post", 0), RECIPE),
    Asked("c", "relu", 32, 8.0, "hash c", Site("resid_post", 0), RECIPE),
    Asked("d", "relu", 64, 8.0, "hash d", Site("resid_post", 0), RECIPE),
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
    asked = Asked("p", "jumprelu", 8, 2.0, "hash", Site("resid_post", 0), RECIPE)
    (planned,) = PermutedDecoder(seed=seed).plan([asked])
    material = Material(torch.zeros(1, 4), lambda _name: parent)
    dealt = PermutedDecoder(seed=seed).build(planned, material).W_dec[:, 0]
    assert sorted(dealt.tolist()) == list(range(8))
    assert (dealt != torch.arange(8.0)).all()


# Sparse coding over a trained dictionary


@pytest.mark.parametrize("wanted", [2.0, 5.0])
@pytest.mark.parametrize("method", ["matching", "fista"])
def test_a_pursuit_has_the_dictionary_of_its_parent_and_the_wanted_l0(x, method, wanted):
    parent = toys.sae_of("relu", D, 32)
    planned = Planned("", 32, wanted, ASKED[1])
    sae = Pursuit(method).build(planned, material(x - 5, lambda name: parent))
    assert torch.equal(sae.W_dec, parent.W_dec) and torch.equal(sae.b_dec, parent.b_dec)
    assert l0(sae, x - 5) == pytest.approx(wanted, rel=0.05)
    assert bool((sae.encode(x - 5) >= 0).all()) and not hasattr(sae, "W_enc")


def test_a_pursuit_explains_more_than_the_control_of_its_l0_without_a_choice_of_latents(x):
    """Over random directions: those of the control `random`, which has only a threshold and a gain to fit."""
    fixed = Random().build(Planned("", 64, 4.0), material(x))
    planned = Planned("", 64, 4.0, ASKED[3])
    by = {
        m: Pursuit(m).build(planned, material(x, lambda name: fixed)) for m in ("matching", "fista")
    }
    assert explained(by["matching"], x) > explained(fixed, x) + 0.2
    assert explained(by["matching"], x) > explained(by["fista"], x) > explained(fixed, x)


def test_pursuits_say_how_they_look_for_codes_in_their_names():
    assert [p.suffix for p in Pursuit().plan(ASKED)] == [
        "-matching-w32-l4",
        "-matching-w32-l8",
        "-matching-w64-l8",
    ]
    planned = Pursuit("fista", of="relu").plan(ASKED)
    assert [(p.suffix, p.parent.name) for p in planned] == [
        ("-fista-w32-l4", "b"),
        ("-fista-w32-l8", "c"),
        ("-fista-w64-l8", "d"),
    ]


def test_a_pursuit_without_a_parent_is_refused():
    with pytest.raises(
        UserError, match="pursuit has no parent: .* the suite trains none of the variant 'gated'"
    ):
        Pursuit(of="gated").plan(ASKED)


def test_a_pursuit_over_a_transcoder_is_refused(x):
    parent = ReLU(D, 32, D + 1)
    with pytest.raises(UserError, match="a predicts another stream"):
        Pursuit().build(Planned("", 32, 4.0, ASKED[0]), material(x, lambda name: parent))


# Independent components


def laplace(n, d, seed=0):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(d, d)) * np.linspace(0.5, 3, d)[:, None]
    sources = rng.laplace(size=(n, d))
    return sources, mixing, torch.from_numpy(sources @ mixing + 4).float()


def test_independent_components_recover_the_sources_up_to_sign_and_order():
    sources, mixing, x = laplace(8000, 5)
    sae = ICA().build(Planned("-10", None, 10), material(x))
    z = sae.encode(x).numpy()
    found = z[:, :5] - z[:, 5:]
    agree = np.abs(np.corrcoef(found.T, sources.T)[:5, 5:])
    assert sorted(agree.argmax(1)) == list(range(5)) and agree.max(1).min() > 0.99
    rows = mixing[agree.argmax(1)]
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert np.abs((sae.W_dec[:5].numpy() * rows).sum(1)) == pytest.approx(np.ones(5), abs=0.03)


def test_the_latents_of_ica_are_what_scikit_learn_transforms_to():
    _, _, x = laplace(3000, 6, seed=1)
    theirs = sklearn.decomposition.FastICA(
        6, whiten="unit-variance", whiten_solver="eigh", random_state=3
    )
    s = theirs.fit_transform(x.double().numpy())
    lengths = np.linalg.norm(theirs.mixing_, axis=0)
    both = np.concatenate([s * lengths, -s * lengths], axis=1)
    for k in (1, 4, 12):
        z = ICA(seed=3).build(Planned(f"-{k}", None, k), material(x)).encode(x).numpy()
        smallest_kept = np.sort(both, axis=1)[:, -k][:, None]
        expected = np.where(both >= smallest_kept, both, 0).clip(min=0)
        assert z == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_independent_components_have_the_l0_of_the_suite_and_explain_more_with_it(x, k):
    sae = ICA().build(Planned(f"-{k}", None, k), material(x))
    assert l0(sae, x) == k and sae.d_sae == 2 * D
    less = ICA().build(Planned("-1", None, 1), material(x))
    assert k == 1 or explained(sae, x) > explained(less, x) + 0.1


def test_all_independent_components_give_back_every_activation(x):
    sae = ICA().build(Planned("-99", None, 99), material(x))
    torch.testing.assert_close(sae.decode(sae.encode(x)), x, rtol=1e-4, atol=1e-3)


def test_ica_leaves_out_directions_in_which_nothing_varies(x):
    flat = torch.cat([torch.zeros(N, 1), x, x[:, :2].sum(1, keepdim=True)], dim=1)
    sae = ICA().build(Planned("-99", None, 99), material(flat))
    assert sae.d_sae == 2 * D
    torch.testing.assert_close(sae.decode(sae.encode(flat)), flat, rtol=1e-4, atol=1e-3)


def test_ica_that_does_not_converge_says_so_and_goes_on(x, capsys):
    sae = ICA(max_iterations=1).build(Planned("-3", None, 3), material(x))
    assert "ica has not converged after 1 iterations over 1,500 tokens" in capsys.readouterr().err
    assert l0(sae, x) == 3


def test_the_components_are_looked_for_once_for_all_l0(x, monkeypatch):
    fit, fits = ica._fit, []
    monkeypatch.setattr(ica, "_fit", lambda *args: fits.append(args) or fit(*args))
    seed = ICA(seed=77)
    one, other = (seed.build(Planned(f"-{k}", None, k), material(x.clone())) for k in (2, 5))
    assert len(fits) == 1 and torch.equal(one.W_dec, other.W_dec)
    ICA(seed=78).build(Planned("-2", None, 2), material(x))
    ICA(seed=78).build(Planned("-2", None, 2), material(x + 1))
    assert len(fits) == 3


def test_there_is_one_ica_for_each_l0_of_the_suite():
    assert [(p.suffix, p.width, p.l0) for p in ICA().plan(ASKED)] == [
        ("-4", None, 4),
        ("-8", None, 8),
    ]


# Clusters


def test_every_activation_comes_back_as_its_nearest_centre(x):
    sae = KMeans().build(Planned("-w32", 32, None), material(x))
    centres = (sae.W_dec + sae.b_dec).double().numpy()
    nearest = ((x.double().numpy()[:, None] - centres) ** 2).sum(-1).argmin(1)
    assert sae.encode(x).argmax(1).tolist() == nearest.tolist()
    assert sae.decode_sparse(sae.encode_sparse(x)).numpy() == pytest.approx(
        centres[nearest], abs=1e-4
    )
    assert l0(sae, x) == 1 and set(sae.encode(x).unique().tolist()) == {0, 1}


def test_the_centres_are_as_good_as_those_of_scikit_learns_full_k_means(x):
    sae = KMeans().build(Planned("-w16", 16, None), material(x))
    theirs = sklearn.cluster.KMeans(16, n_init=1, random_state=0).fit(x.double().numpy())
    variance = float((x.double() - x.double().mean(0)).square().sum())
    assert explained(sae, x) == pytest.approx(1 - theirs.inertia_ / variance, abs=0.03)


def test_there_are_no_more_centres_than_tokens_and_it_is_said(x, capsys):
    few = x[:50]
    sae = KMeans().build(Planned("-w64", 64, None), material(few))
    assert sae.d_sae == 50 and "50 centres instead of 64" in capsys.readouterr().err
    assert explained(sae, few) > 0.9


def test_there_is_one_k_means_for_each_width_and_none_has_an_l0_asked_for():
    planned = KMeans().plan(ASKED)
    assert [(p.suffix, p.width, p.l0) for p in planned] == [("-w32", 32, None), ("-w64", 64, None)]


# Neurons

HIDDEN = [sae._replace(site=Site("mlp_hidden", 1)) for sae in ASKED]


@pytest.mark.parametrize("k", [1, 3, 10, 40])
def test_the_neurons_of_largest_magnitude_are_kept_as_they_are(x, k):
    sae = Neurons().build(Planned(f"-{k}", None, k), material(x))
    h = (x - 5).numpy()
    order = np.argsort(-np.abs(h), axis=1)[:, : min(k, D)]
    expected = np.zeros_like(h)
    np.put_along_axis(expected, order, np.take_along_axis(h, order, axis=1), axis=1)
    code = sae.encode_sparse(torch.from_numpy(h))
    assert np.array_equal(sae.decode_sparse(code).numpy(), expected)
    assert bool((code.values > 0).all()) and len(code.values) == min(k, D) * N


def test_neurons_stand_beside_saes_of_the_hidden_layer_alone():
    assert [(p.suffix, p.l0) for p in Neurons().plan(HIDDEN)] == [("-4", 4), ("-8", 8)]
    elsewhere = [sae._replace(site=Site("mlp_out", 1)) for sae in ASKED]
    assert Neurons().plan(elsewhere) == Neurons().plan(ASKED) == []
