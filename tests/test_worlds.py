"""Synthetic worlds: the published laws, and that a token is what it is said to be made of."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, norm

from saebench import sparse, worlds
from saebench.worlds import LARGE, SMALL, World

TOKENS, CHUNK = 20_000, 2_000
TINY = replace(SMALL, n_features=40, d=6, roots=2, branching=2, depth=2, separation_steps=0)


@pytest.fixture(scope="module")
def small():
    return World(SMALL, "cpu")


@pytest.fixture(scope="module")
def a(small):
    """True magnitudes of many tokens."""
    return torch.cat([small.magnitudes(seed, CHUNK) for seed in range(TOKENS // CHUNK)])


# The laws


def test_base_rates_are_those_of_the_published_configuration():
    rates = worlds.base_rates(LARGE).double().numpy()
    q = np.arange(1, 16_385) ** -0.5
    expected = 5e-4 + (0.4 - 5e-4) * (q - q.min()) / (q.max() - q.min())
    assert rates == pytest.approx(expected, rel=1e-5)
    assert (rates[0], rates[-1]) == pytest.approx((0.4, 5e-4))
    assert rates.sum() == pytest.approx(59.1, abs=0.05) and (np.diff(rates) < 0).all()


def test_trees_of_the_published_configuration_have_10880_features():
    parents = worlds.parents(LARGE)
    assert LARGE.tree == 1 + 4 + 16 + 64 and LARGE.roots * LARGE.tree == 10_880
    assert int((parents[:128] < 0).sum()) == 128
    assert int((parents[128:10_880] >= 0).sum()) == 10_752
    assert int((parents[10_880:] < 0).sum()) == 5_504
    assert set(parents[parents >= 0].bincount().tolist()) == {4}
    assert parents[[128, 131, 132, 639, 640, 643, 644]].tolist() == [0, 0, 1, 127, 128, 128, 129]


def test_depths_say_how_far_from_its_root_a_feature_is(small):
    parents = small.parents.tolist()
    for feature in (0, 7, 8, 39, 40, 167, 168, 679, 680, 1023):
        above, steps = feature, 0
        while parents[above] >= 0:
            above, steps = parents[above], steps + 1
        expected = steps if above < SMALL.roots else -1
        assert small.depths[feature] == expected, feature


def test_rates_of_children_are_raised_as_published():
    rates = worlds.base_rates(LARGE)
    raised = worlds.compensated(LARGE, rates)
    assert float(raised.max()) == pytest.approx(0.915, abs=5e-4)
    p = rates.double().tolist()
    for parent, children in ((0, range(128, 132)), (128, range(640, 644))):
        for child in children:
            others = sum(p[other] for other in children if other != child)
            expected = p[child] / p[parent] * (1 + others / p[parent])
            assert float(raised[child]) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(raised[:128], rates[:128])
    assert torch.equal(raised[10_880:], rates[10_880:])


def test_a_world_whose_trees_do_not_fit_is_refused():
    with pytest.raises(ValueError, match="8 trees of 85 features do not fit into 600 features"):
        replace(SMALL, n_features=600)


# What is sampled


def test_a_child_never_fires_without_its_parent(small, a):
    children = (small.parents >= 0).nonzero().flatten()
    fires = a > 0
    assert not bool((fires[:, children] & ~fires[:, small.parents[children]]).any())
    assert int(fires[:, children].sum()) > TOKENS


def test_of_the_children_of_one_parent_at_most_one_fires(a):
    last = SMALL.roots * SMALL.tree
    siblings = (a[:, SMALL.roots : last] > 0).view(TOKENS, -1, SMALL.branching)
    assert int(siblings.sum(-1).max()) == 1


def expected_rates(recipe, p, raised):
    """Were features independent: a child fires with its parent and, of k that want to, it is left once in k."""
    rates, level, first = [float(q) for q in p[: recipe.roots]], 0, recipe.roots
    while level < recipe.depth:
        n = recipe.roots * recipe.branching ** (level + 1)
        above = first - n // recipe.branching
        for child in range(first, first + n):
            start = first + (child - first) // recipe.branching * recipe.branching
            others = [float(raised[i]) for i in range(start, start + 4) if i != child]
            wanting = np.array([1.0])  # how many of the others want to fire
            for q in others:
                wanting = np.convolve(wanting, [1 - q, q])
            left = (wanting / np.arange(1, 5)).sum()
            parent = rates[above + (child - first) // recipe.branching]
            rates.append(parent * float(raised[child]) * left)
        first, level = first + n, level + 1
    return np.array([*rates, *map(float, p[first:])])


def test_the_hierarchy_takes_from_each_generation_what_follows_from_its_rules(small, a):
    raised = worlds.compensated(SMALL, small.rates)
    expected = expected_rates(SMALL, small.rates, raised)
    measured = (a > 0).double().mean(0).numpy()
    for depth in (0, 1, 2, 3, -1):
        here = (small.depths == depth).numpy()
        assert measured[here].sum() == pytest.approx(expected[here].sum(), rel=0.06), depth


def test_the_l0_of_the_small_world_is_near_7(a):
    assert float((a > 0).sum() / TOKENS) == pytest.approx(7.3, abs=0.2)


def test_features_fire_together_as_often_as_their_factors_say(small, a):
    """The share of two roots that fire together is an integral of the normal density of their correlation."""
    fires = (a[:, : SMALL.roots] > 0).double().numpy()
    factors, p = small.factors.double().numpy(), small.rates.double().numpy()
    z, correlations = [], []
    for i in range(SMALL.roots):
        for j in range(i):
            rho = float(factors[i] @ factors[j])
            high = norm.isf([p[i], p[j]])
            both = multivariate_normal([0, 0], [[1, rho], [rho, 1]]).cdf(-high)
            found = (fires[:, i] * fires[:, j]).mean()
            z.append((found - both) / np.sqrt(both * (1 - both) / TOKENS))
            correlations.append(rho)
    assert np.abs(z).max() < 4.5 and np.abs(correlations).max() > 0.05


def test_magnitudes_fall_from_5_to_4_over_the_features(small, a):
    def mean_of(features):
        return float(a[:, features].sum() / (a[:, features] > 0).sum())

    assert mean_of(slice(0, SMALL.roots)) == pytest.approx(5.0, abs=0.05)
    free = slice(SMALL.roots * SMALL.tree, None)
    expected = float((small.rates * small.mean_magnitudes)[free].sum() / small.rates[free].sum())
    assert mean_of(free) == pytest.approx(expected, abs=0.1)
    assert small.mean_magnitudes[[0, -1]].tolist() == [5.0, 4.0]


def test_the_magnitude_of_a_child_follows_its_parents(small, a):
    """Divided by its parent's over the mean, a child's magnitude has its own mean and spread again."""
    child = 8 + int((a[:, 8:40] > 0).sum(0).argmax())
    parent = int(small.parents[child])
    on = a[:, child] > 0
    above = a[on, parent] / small.mean_magnitudes[parent]
    own = a[on, child] / above
    assert float(own.mean()) == pytest.approx(float(small.mean_magnitudes[child]), abs=0.1)
    assert float(own.std()) == pytest.approx(float(small.spreads[child]), rel=0.1)
    assert abs(float(torch.corrcoef(torch.stack([own, above]))[0, 1])) < 0.1


def test_a_token_is_the_sum_of_its_features_and_the_offset(small):
    x, features = small.sample(5, 300)
    magnitudes = small.magnitudes(5, 300)
    assert torch.equal(sparse.to_dense(features, SMALL.n_features), magnitudes)
    expected = magnitudes.double() @ small.directions.double() + small.offset.double()
    torch.testing.assert_close(x.double(), expected, rtol=0, atol=1e-5)


def test_directions_are_unit_vectors_and_the_offset_has_its_length(small):
    assert small.directions.norm(dim=-1).numpy() == pytest.approx(np.ones(1024), abs=1e-6)
    assert float(small.offset.norm()) == pytest.approx(0.5)


def test_the_same_seed_gives_the_same_bits_in_another_world_of_the_recipe():
    one, other = World(TINY, "cpu"), World(TINY, "cpu")
    first, again = one.sample(3, 50), other.sample(3, 50)
    assert torch.equal(first.x, again.x)
    assert all(map(torch.equal, first.features, again.features))
    assert not torch.equal(one.sample(3, 50).x, one.sample(4, 50).x)
    assert one.fingerprint == other.fingerprint
    assert one.fingerprint != World(replace(TINY, seed=43), "cpu").fingerprint


def test_the_number_of_threads_changes_no_bit_of_a_token(small):
    """A dense product would not pass this."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = small.sample(3, 256)
        torch.set_num_threads(2)
        together = small.sample(3, 256)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone.x, together.x)
    assert all(map(torch.equal, alone.features, together.features))


# Directions


def test_the_gradient_that_pushes_directions_apart_is_that_of_the_formula():
    rows = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows.requires_grad_()
    overlaps = rows @ rows.T
    apart = overlaps.square().sum() - overlaps.diagonal().square().sum()
    (apart + 9 * (overlaps.diagonal() - 1).square().sum()).backward()
    torch.testing.assert_close(worlds._overlap_gradient(rows.detach()), rows.grad)


def test_directions_overlap_less_after_they_are_pushed_apart():
    start = torch.randn(60, 12, generator=torch.Generator().manual_seed(1))

    def overlap(steps):
        rows = worlds.separated(start, steps)
        return float((rows @ rows.T).square().sum())

    assert overlap(300) < overlap(100) < overlap(0)


@pytest.mark.slow
def test_the_large_world_has_the_documented_l0_rates_and_overlap():
    world = World(LARGE, "cpu")
    a = world.magnitudes(0, 3_000)
    assert int((a > 0).sum()) / 3_000 == pytest.approx(34.8, abs=1.0)
    ratios = (a > 0).double().mean(0) / world.rates.double()
    ratio = {depth: float(ratios[world.depths == depth].mean()) for depth in (0, 1, 2, 3, -1)}
    assert ratio == pytest.approx({0: 1.00, 1: 0.75, 2: 0.46, 3: 0.35, -1: 1.01}, abs=0.05)
    largest = [
        (part @ world.directions.T).abs().topk(2, dim=-1).values[:, 1]
        for part in world.directions.split(1024)
    ]
    assert float(torch.cat(largest).mean()) == pytest.approx(0.15, abs=0.01)
