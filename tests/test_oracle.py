"""The oracle against what its world is made of, and that each way of spoiling it is worse with its share."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from saebench import sparse, suite
from saebench.cache import Cache
from saebench.controls._control import Asked, Known, Material, Planned
from saebench.controls.oracle import Oracle
from saebench.errors import UserError
from saebench.synthetic import LoadedWorld, SyntheticSubject, world_text
from saebench.types import SAE, Site
from saebench.worlds import SMALL, World

RECIPE = replace(
    SMALL, n_features=120, d=24, roots=4, branching=2, depth=2, least=0.01, separation_steps=50
)
WIDTH, TOKENS = 60, 3_200
ASKED = [
    Asked(name, "topk", width, l0, name, Site("resid_post", 0), suite.recipe("topk", {}))
    for name, width, l0 in (("a", WIDTH, 4.0), ("b", WIDTH, 8.0), ("c", 500, 8.0))
]


@pytest.fixture(scope="module")
def subject():
    loaded = LoadedWorld(World(RECIPE, "cpu"), {"id": "tiny", "revision": "0", "dtype": "float32"})
    tokens = world_text(64, 640, TOKENS, 0)
    return SyntheticSubject(loaded.world, tokens, loaded.identity, Cache(None), 10)


@pytest.fixture(scope="module")
def sampled(subject):
    return subject.sample(subject.eval_rows)


def oracle(subject, suffix="", width=WIDTH, **options):
    known = Known(subject.truth, subject.features_of)
    planned = Planned(f"-w{width}{suffix}", width, None)
    return Oracle(**options).build(planned, Material(torch.zeros(1, RECIPE.d), _never, known))


def _never(name):
    raise AssertionError(f"the oracle is made of no trained SAE; it asked for {name}")


def explained(sae, x):
    x_hat = sae.decode_sparse(sae.encode_sparse(x)).double()
    x = x.double()
    return 1 - float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())


def dense(sampled):
    return sparse.to_dense(sampled.features, RECIPE.n_features)


# The true features


def test_the_codes_of_the_oracle_are_the_true_magnitudes(subject, sampled):
    sae = oracle(subject)
    assert isinstance(sae, SAE) and (sae.d_in, sae.d_sae) == (RECIPE.d, WIDTH)
    assert torch.equal(sae.encode(sampled.x), dense(sampled)[:, :WIDTH])
    assert torch.equal(sae.W_dec, subject.world.directions[:WIDTH])
    assert torch.equal(sae.b_dec, subject.world.offset)


def test_it_encodes_tokens_in_any_order_and_of_any_batch(subject, sampled):
    sae, few = oracle(subject), torch.tensor([17, 3, 900, 3])
    expected = dense(sampled)[few, :WIDTH]
    assert torch.equal(sparse.to_dense(sae.encode_sparse(sampled.x[few]), WIDTH), expected)
    assert sae.encode(sampled.x[:0]).shape == (0, WIDTH)


def test_it_explains_what_its_features_are_of_the_activations(subject, sampled):
    a, truth = dense(sampled).double().numpy(), subject.truth
    rest = a[:, WIDTH:] @ truth.directions[WIDTH:].double().numpy()
    x = sampled.x.double().numpy()
    expected = 1 - (rest**2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert 0.3 < expected < 0.99
    assert explained(oracle(subject), sampled.x) == pytest.approx(expected, abs=1e-5)


def test_an_oracle_that_is_wide_enough_has_all_features_and_explains_everything(subject, sampled):
    sae = oracle(subject, width=500)
    assert sae.d_sae == RECIPE.n_features
    assert explained(sae, sampled.x) == pytest.approx(1, abs=1e-9)


def test_activations_that_the_world_never_gave_are_refused(subject, sampled):
    with pytest.raises(ValueError, match="of no token that was sampled"):
        oracle(subject).encode(sampled.x[:3] + 1e-4)


def test_decoding_a_sparse_code_is_decoding_the_dense_one(subject, sampled):
    for suffix in ("", "-mixed50", "-dropped50", "-permuted50"):
        sae, x = oracle(subject, suffix), sampled.x[:200]
        torch.testing.assert_close(
            sae.decode_sparse(sae.encode_sparse(x)), sae.decode(sae.encode(x))
        )


# Spoilt oracles


@pytest.mark.parametrize("way", ["mixed", "dropped", "permuted"])
@pytest.mark.parametrize("seed", [0, 1])
def test_each_share_that_is_spoilt_makes_it_worse(subject, sampled, way, seed):
    options = {way: (0.25, 0.5, 1.0), "seed": seed}
    suffixes = ("", f"-{way}25", f"-{way}50", f"-{way}100")
    found = [explained(oracle(subject, suffix, **options), sampled.x) for suffix in suffixes]
    assert (np.diff(found) < -0.02).all(), found


def spoilt(subject, suffix):
    """Latents that write something else than their feature."""
    same = (oracle(subject, suffix).W_dec == subject.world.directions[:WIDTH]).all(-1)
    return {i for i, one in enumerate(same.tolist()) if not one}


@pytest.mark.parametrize("way", ["mixed", "dropped", "permuted"])
def test_what_is_spoilt_at_a_share_is_spoilt_at_a_larger_one(subject, way):
    few, many = (spoilt(subject, f"-{way}{share}") for share in (25, 50))
    assert (len(few), len(many)) == (15, 30) and few < many


def test_a_dropped_latent_never_fires_and_the_others_are_as_they_were(subject, sampled):
    sae, gone = oracle(subject, "-dropped25"), sorted(spoilt(subject, "-dropped25"))
    expected = dense(sampled)[:, :WIDTH].clone()
    expected[:, gone] = 0
    assert torch.equal(sae.encode(sampled.x), expected)
    assert sae.W_dec.norm(dim=-1).numpy() == pytest.approx(np.ones(WIDTH), abs=1e-6)


def test_permuted_latents_write_one_anothers_features_and_keep_their_codes(subject, sampled):
    sae, changed = oracle(subject, "-permuted50"), sorted(spoilt(subject, "-permuted50"))
    assert torch.equal(sae.encode(sampled.x), oracle(subject).encode(sampled.x))
    rows = {tuple(row) for row in sae.W_dec[changed].tolist()}
    assert rows == {tuple(row) for row in subject.world.directions[changed].tolist()}


def test_a_mixed_latent_is_the_projection_of_two_features_on_their_middle(subject, sampled):
    """Which two is found by looking; the rest follows from the formula."""
    sae, a = oracle(subject, "-mixed50"), dense(sampled).double()
    D = subject.world.directions[:WIDTH].double()
    z, others = sae.encode(sampled.x).double(), []
    for j in sorted(spoilt(subject, "-mixed50")):
        middles = torch.nn.functional.normalize(D[j] + D, dim=-1)
        near = (middles @ sae.W_dec[j].double() > 1 - 1e-6).nonzero().flatten().tolist()
        (m,) = near
        u = middles[m]
        expected = (a[:, [j]] * D[j] + a[:, [m]] * D[m]) @ u
        torch.testing.assert_close(z[:, j], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(z[:, j] != 0, (a[:, j] != 0) | (a[:, m] != 0)) and m != j
        others.append(m)
    assert len(set(others)) == len(others)
    kept = sorted(set(range(WIDTH)) - spoilt(subject, "-mixed50"))
    assert torch.equal(z[:, kept], a[:, kept])


def test_codes_of_spoilt_oracles_are_sorted_and_have_no_zeros(subject, sampled):
    for suffix in ("-mixed50", "-dropped50", "-permuted50"):
        code = oracle(subject, suffix).encode_sparse(sampled.x)
        assert bool((code.values != 0).all())
        for start, end in zip(code.offsets[:-1], code.offsets[1:], strict=True):
            assert bool((code.indices[start:end].diff() > 0).all())


def test_the_same_seed_spoils_the_same_latents_and_another_others(subject):
    one, again = (oracle(subject, "-mixed25").W_dec for _ in range(2))
    assert torch.equal(one, again)
    assert not torch.equal(one, oracle(subject, "-mixed25", seed=1).W_dec)


# What is planned


def test_there_is_one_of_each_kind_for_each_width():
    planned = Oracle(dropped=(), permuted=(0.125,)).plan(ASKED)
    ways = ("", "-mixed25", "-mixed50", "-permuted12.5")
    assert [p.suffix for p in planned] == [f"-w{w}{way}" for w in (WIDTH, 500) for way in ways]
    assert {p.l0 for p in planned} == {None}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mixed": (0.25, 1.5)}, r"mixed has 1\.5; expected shares above 0 up to 1"),
        ({"dropped": (0.0,)}, "dropped has 0; expected"),
        ({"permuted": (0.5, 0.5)}, "a share is there twice"),
    ],
)
def test_shares_that_are_none_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        Oracle(**given)


def test_a_share_of_too_few_latents_is_refused():
    with pytest.raises(
        UserError, match=r"spoils 1 of 60 latents with permuted 0\.02; .* 2 or more"
    ):
        Oracle(permuted=(0.02,)).plan(ASKED)


def test_an_oracle_whose_rows_are_exchanged_has_the_codes_of_the_whole_one():
    control = Oracle()
    told = {planned.suffix: control.has_parents_codes(planned) for planned in control.plan(ASKED)}
    assert {suffix for suffix, same in told.items() if same} == {
        suffix for suffix in told if "permuted" in suffix
    }
    assert sum(told.values()) == 4  # of two shares and two widths
