import re
import time
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench import ranks, stats
from saebench.stats import Bootstrap, Column


def noisy(means, n=200, noise=0.1, seed=0):
    """One column for each mean, over the same units, which differ far more than the columns do."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=n)
    return {
        name: Column(shared + mean + rng.normal(0, noise, n), np.ones(n))
        for name, mean in means.items()
    }


def letters_of(pairs, n):
    differ = np.zeros((n, n), dtype=bool)
    for i, j in pairs:
        differ[i, j] = differ[j, i] = True
    return ranks.letters(differ)


# Rank intervals


def test_clearly_different_saes_have_one_rank_each():
    found = ranks.rank(noisy({"b": 2.0, "c": 1.0, "a": 3.0}), "max", paired=True)
    assert found.ranks == {"a": (1, 1), "b": (2, 2), "c": (3, 3)}
    assert found.groups == {"a": "a", "b": "b", "c": "c"}
    assert found.p_best == {"a": 1.0, "b": 0.0, "c": 0.0}


def test_the_smallest_is_first_where_smaller_is_better():
    found = ranks.rank(noisy({"b": 2.0, "c": 1.0, "a": 3.0}), "min", paired=True)
    assert found.ranks == {"c": (1, 1), "b": (2, 2), "a": (3, 3)}
    assert found.p_best["c"] == 1


def test_twins_share_their_ranks_and_their_letter():
    columns = noisy({"best": 1.0, "twin": 1.0, "worse": 0.5})
    found = ranks.rank(columns, "max", paired=True)
    assert found.ranks == {"best": (1, 2), "twin": (1, 2), "worse": (3, 3)}
    assert found.groups == {"best": "a", "twin": "a", "worse": "b"}
    assert found.p_best["best"] + found.p_best["twin"] == pytest.approx(1)


def test_saes_with_the_same_units_split_the_first_place():
    column = noisy({"a": 1.0})["a"]
    found = ranks.rank({"a": column, "b": column}, "max", paired=True)
    assert found.p_best == {"a": 0.5, "b": 0.5}


def test_ranks_agree_with_holm_over_all_pairs_tested_one_by_one():
    means = {str(i): 0.02 * i for i in range(7)}
    columns = noisy(means, n=60)
    pairs = list(combinations(columns, 2))
    p = [stats.paired_difference(*columns[a][:2], *columns[b][:2], "ratio").p for a, b in pairs]
    differ = {pair for pair, adjusted in zip(pairs, stats.holm(p), strict=True) if adjusted < 0.05}
    assert 0 < len(differ) < len(pairs)
    values = {name: stats.value(*column) for name, column in columns.items()}
    found = ranks.rank(columns, "max", paired=True)
    for name in columns:
        others = [set(pair) - {name} for pair in differ if name in pair]
        above = sum(values[other] > values[name] for (other,) in others)
        assert found.ranks[name] == (1 + above, 7 - (len(others) - above))


def test_pairing_tells_apart_what_unpaired_columns_do_not():
    columns = noisy({"a": 1.0, "b": 0.9}, n=300)
    assert ranks.rank(columns, "max", paired=True).ranks["a"] == (1, 1)
    assert ranks.rank(columns, "max", paired=False).ranks["a"] == (1, 2)


def test_the_order_of_units_and_of_saes_does_not_matter():
    columns = noisy({str(i): 0.02 * i for i in range(6)}, n=30)
    order = np.random.default_rng(1).permutation(30)
    turned = {name: Column(c.num[order], c.den[order]) for name, c in reversed(columns.items())}
    a, b = (ranks.rank(these, "max", paired=True) for these in (columns, turned))
    assert a.ranks == b.ranks
    assert a.groups == b.groups


def test_latents_of_several_saes_are_ranked_without_pairs():
    rng = np.random.default_rng(2)
    columns = {
        name: Column(rng.normal(mean, 1, n), np.ones(n), "median")
        for name, mean, n in [("a", 0.5, 800), ("b", 0.5, 1_000), ("c", 0.0, 900)]
    }
    found = ranks.rank(columns, "max", paired=False)
    assert found.ranks == {"a": (1, 2), "b": (1, 2), "c": (3, 3)}
    assert found.p_best["c"] < 1e-3


def test_what_has_one_unit_cannot_be_told_apart():
    columns = {name: Column(np.array([x]), np.ones(1)) for name, x in [("a", 1.0), ("b", 2.0)]}
    for paired in (True, False):
        found = ranks.rank(columns, "max", paired=paired)
        assert found.ranks == {"a": (1, 2), "b": (1, 2)}
        assert found.groups == {"b": "a", "a": "a"}


def test_the_only_sae_is_the_first():
    found = ranks.rank(noisy({"a": 1.0}), "max", paired=True)
    assert found == ({"a": (1, 1)}, {"a": "a"}, {"a": 1.0})


@pytest.mark.parametrize("paired", [True, False])
def test_no_sae_has_no_ranks(paired):
    assert ranks.rank({}, "max", paired=paired) == ({}, {}, {})


@pytest.mark.parametrize("n_units", [47, 50])
def test_forty_saes_can_still_be_told_apart(n_units):
    columns = noisy({str(i): float(i) for i in range(40)}, n=n_units)
    found = ranks.rank(columns, "min", paired=True, bootstrap=Bootstrap(n_units, 500))
    assert found.ranks["0"] == (1, 1)
    assert found.ranks["39"] == (40, 40)


# Letters


@pytest.mark.parametrize(
    ("differ", "expected"),
    [
        ([], ["a", "a", "a"]),
        ([(0, 2)], ["a", "ab", "b"]),  # the middle one resembles both
        ([(0, 1), (0, 2)], ["a", "b", "b"]),
        ([(0, 1), (0, 2), (1, 2)], ["a", "b", "c"]),
        ([(0, 1)], ["a", "b", "ab"]),  # the last is too noisy to be told from either
    ],
)
def test_letters_of_three_are_as_worked_by_hand(differ, expected):
    assert letters_of(differ, 3) == expected


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)).filter(lambda p: p[0] < p[1])))
@settings(max_examples=200, deadline=None)
def test_two_share_a_letter_just_where_they_cannot_be_told_apart(differ):
    found = letters_of(differ, 8)
    for i, j in combinations(range(8), 2):
        assert bool(set(found[i]) & set(found[j])) == ((i, j) not in differ)
    assert found[0].startswith("a")


def test_letters_go_on_after_the_alphabet():
    found = letters_of(combinations(range(106), 2), 106)
    assert found[25:27] == ["z", "A"]
    assert found[51:53] == ["Z", ".a"]
    assert found[104:] == ["..a", "..b"]


# How often each is the best


def test_the_chance_of_being_best_is_that_of_the_normal_distribution():
    """Two columns whose difference is 1 standard error of the difference above zero."""
    rng = np.random.default_rng(3)
    n = 400
    noise = rng.normal(size=n)
    noise = (noise - noise.mean()) / noise.std()
    shared = rng.normal(size=n)
    columns = {
        "a": Column(shared + noise + 1 / np.sqrt(n), np.ones(n)),
        "b": Column(shared, np.ones(n)),
    }
    found = ranks.rank(columns, "max", paired=True).p_best
    assert found["a"] == pytest.approx(0.8413, abs=0.03)  # Phi(1)
    assert sum(found.values()) == pytest.approx(1)


def test_unpaired_chances_are_those_of_independent_noise():
    rng = np.random.default_rng(4)
    noise = rng.normal(size=400)
    noise = (noise - noise.mean()) / noise.std()
    columns = {
        "a": Column(noise + np.sqrt(2) / 20, np.ones(400)),
        "b": Column(noise, np.ones(400)),
    }
    found = ranks.rank(columns, "max", paired=False).p_best
    assert found["a"] == pytest.approx(0.8413, abs=0.03)


def test_so_many_units_that_they_are_not_resampled_give_the_same_chances(monkeypatch):
    columns = noisy({"a": 0.0, "b": 0.004, "c": 0.002}, n=1_000)
    resampled = ranks.rank(columns, "max", paired=True).p_best
    monkeypatch.setattr(stats, "MANY_UNITS", 999)
    assert ranks.rank(columns, "max", paired=True).p_best == pytest.approx(resampled, abs=0.04)


def test_draws_that_say_nothing_are_left_out():
    num, den = np.zeros(12), np.zeros(12)
    num[0], den[0] = 1.0, 1.0
    columns = {"a": Column(num, den), "b": Column(np.full(12, 0.5), np.ones(12))}
    found = ranks.rank(columns, "max", paired=True)
    assert found.p_best == {"a": 1.0, "b": 0.0}


@pytest.mark.parametrize("paired", [True, False])
def test_thirty_saes_of_a_thousand_units_take_less_than_two_seconds(paired):
    columns = noisy({str(i): 0.01 * i for i in range(30)}, n=1_000)
    start = time.process_time()
    ranks.rank(columns, "max", paired=paired)
    assert time.process_time() - start < 2


# Who cannot be told apart from the best


def tied(columns, best, paired):
    """Those that share a letter with the first."""
    found = ranks.rank(columns, best, paired)
    value = {
        name: stats.value(*column) * (1 if best == "max" else -1)
        for name, column in columns.items()
    }
    leader = max(value, key=lambda name: value[name])
    shared = {name: set(re.findall(r"\.*[A-Za-z]", found.groups[name])) for name in columns}
    return {name for name in columns if shared[name] & shared[leader]}


def test_a_tie_group_is_the_best_and_those_that_cannot_be_told_apart_from_it():
    rng = np.random.default_rng(17)
    shared = rng.normal(size=200)
    den = np.ones(200)
    scores = {"best": 1.0, "twin": 1.0, "worse": 0.8, "worst": 0.0}
    columns = {
        name: Column(shared + mean + rng.normal(0, 0.1, 200), den) for name, mean in scores.items()
    }
    assert tied(columns, "max", True) == {"best", "twin"}
    assert tied(columns, "min", True) == {"worst"}


def test_latents_of_two_saes_are_compared_without_pairs():
    rng = np.random.default_rng(18)
    columns = {
        name: Column(rng.normal(mean, 1, n), np.ones(n), "median")
        for name, mean, n in [("a", 0.5, 800), ("b", 0.5, 1_000), ("c", 0.0, 900)]
    }
    assert tied(columns, "max", False) == {"a", "b"}


def test_the_only_sae_is_its_own_tie_group():
    assert tied({"a": Column(np.ones(3), np.ones(3))}, "max", True) == {"a"}


def test_hundreds_of_saes_can_still_be_told_apart():
    n_saes, den = 120, np.ones(50)
    columns = {str(i): Column(np.full(50, float(i)), den) for i in range(n_saes)}
    assert tied(columns, "max", True) == {"119"}
