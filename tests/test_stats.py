import subprocess
import sys
import time

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench import stats
from saebench.stats import Bootstrap, Column


def correlated(rng, n_sequences, n_tokens=32, spread=1.0):
    """Tokens of one sequence share an offset: sums over tokens, and tokens, by sequence."""
    offset = rng.normal(0, spread, n_sequences)
    tokens = 1 + offset[:, None] + rng.normal(0, 1, (n_sequences, n_tokens))
    return tokens.sum(1), np.full(n_sequences, float(n_tokens))


# Values


def test_a_ratio_is_the_ratio_of_sums_and_not_the_mean_of_ratios():
    assert stats.value(np.array([1, 9]), np.array([1, 3]), "ratio") == 2.5


@pytest.mark.parametrize(("statistic", "expected"), [("median", 3.0), ("q05", 1.2), ("q95", 4.8)])
def test_a_quantile_is_over_the_units_that_count(statistic, expected):
    num, den = np.array([5.0, 1.0, 3.0, 2.0, 4.0, 99.0]), np.array([1, 1, 1, 1, 1, 0])
    assert stats.value(num, den, statistic) == pytest.approx(expected)


@pytest.mark.parametrize("statistic", ["ratio", "median"])
def test_a_value_without_denominators_is_an_error(statistic):
    with pytest.raises(ValueError, match="no value"):
        stats.value(np.ones(2), np.zeros(2), statistic)


# Intervals


def test_an_interval_covers_the_truth_as_often_as_it_says_when_tokens_are_correlated():
    rng = np.random.default_rng(1)
    columns = [Column(*correlated(rng, 60)) for _ in range(1_000)]
    found = stats.intervals(columns, draws=1_000)
    covered = np.mean([low <= 1 <= high for low, high in found])
    assert 0.93 <= covered <= 0.97


def test_resampling_tokens_would_cover_far_too_rarely():
    """Why units are sequences: the same data with each token as its own unit."""
    rng = np.random.default_rng(1)
    columns = []
    for _ in range(200):
        num, den = correlated(rng, 60)
        columns.append(Column(np.repeat(num / den, 32), np.ones(60 * 32)))
    covered = np.mean([low <= 1 <= high for low, high in stats.intervals(columns, draws=200)])
    assert covered < 0.5


@pytest.mark.parametrize("n", [3, 8, 12])
def test_an_interval_of_few_units_is_not_too_bold(n):
    rng = np.random.default_rng(2)
    columns = [Column(rng.normal(1, 1, n), np.ones(n)) for _ in range(1_000)]
    found = stats.intervals(columns, draws=1_000)
    assert 0.92 <= np.mean([low <= 1 <= high for low, high in found]) <= 0.98


def test_an_interval_of_many_units_is_the_plain_percentile_interval():
    rng = np.random.default_rng(3)
    num, den = rng.gamma(3, 1, 500), rng.gamma(5, 1, 500)
    drawn = rng.integers(500, size=(4_000, 500))
    ratios = num[drawn].sum(1) / den[drawn].sum(1)
    found = stats.interval(num, den, "ratio")
    assert found == pytest.approx(np.quantile(ratios, [0.025, 0.975]), abs=0.1 * ratios.std())


def test_resampling_and_the_delta_method_agree_where_one_takes_over_from_the_other(monkeypatch):
    num, den = correlated(np.random.default_rng(4), 2_000)
    drawn = stats.interval(num, den, "ratio")
    monkeypatch.setattr(stats, "MANY_UNITS", 1_999)
    assert stats.interval(num, den, "ratio") == pytest.approx(drawn, abs=0.004)


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (10, 10), (50, 1_000)])
def test_a_proportion_has_the_wilson_interval(hits, n):
    num = np.repeat([1.0, 0.0], [hits, n - hits])
    expected = scipy.stats.binomtest(hits, n).proportion_ci(method="wilson")
    found = stats.interval(num, np.ones(n), "ratio")
    assert found == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("statistic", "q"), [("median", 0.5), ("q05", 0.05), ("q95", 0.95)])
@pytest.mark.parametrize("n", [100, 1_237])
def test_a_quantile_lies_between_the_order_statistics_that_scipy_names(statistic, q, n):
    x = np.random.default_rng(5).normal(size=n)
    expected = scipy.stats.quantile_test(x, p=q).confidence_interval(0.95)
    found = stats.interval(x, np.ones(n), statistic)
    # SciPy's ends may be one order statistic wider or narrower: its two sides are two tests.
    ranks = [np.searchsorted(np.sort(x), end) for end in (*found, *expected)]
    assert abs(ranks[0] - ranks[2]) <= 1
    assert abs(ranks[1] - ranks[3]) <= 1


@pytest.mark.parametrize(("statistic", "q", "n"), [("median", 0.5, 25), ("q95", 0.95, 150)])
def test_a_quantile_interval_covers_at_least_what_it_says(statistic, q, n):
    rng = np.random.default_rng(6)
    truth = scipy.stats.norm.ppf(q)
    found = [stats.interval(rng.normal(size=n), np.ones(n), statistic) for _ in range(2_000)]
    assert np.mean([low <= truth <= high for low, high in found]) >= 0.94


def test_too_few_units_have_no_interval():
    assert stats.interval(np.ones(1), np.ones(1), "ratio") is None
    assert stats.interval(np.ones(0), np.ones(0), "ratio") is None
    assert stats.interval(np.arange(5.0), np.ones(5), "median") is None
    assert stats.interval(np.arange(6.0), np.ones(6), "median") == (0.0, 5.0)


def test_many_columns_at_once_are_the_same_as_one_by_one():
    rng = np.random.default_rng(7)
    columns = [Column(rng.gamma(2, 1, n), np.ones(n)) for n in (50, 80, 50)]
    columns.append(Column(rng.gamma(2, 1, 80), np.ones(80), "median"))
    assert stats.intervals(columns) == [stats.interval(*column) for column in columns]


def test_draws_in_chunks_are_the_same_draws(monkeypatch):
    columns = np.random.default_rng(8).normal(size=(30, 2))
    whole = Bootstrap(30, draws=100).sums(columns)
    monkeypatch.setattr(stats, "_CHUNK_BYTES", 30 * 8 * 7)
    np.testing.assert_allclose(Bootstrap(30, draws=100).sums(columns), whole, rtol=1e-12)


def test_every_draw_has_as_many_units_as_the_data():
    assert (Bootstrap(37, draws=50).sums(np.ones((37, 1))) == 37).all()


def test_thirty_metrics_of_two_thousand_sequences_take_less_than_two_seconds():
    rng = np.random.default_rng(9)
    columns = [Column(rng.gamma(2, 1, 2_000), np.ones(2_000)) for _ in range(30)]
    start = time.process_time()
    stats.intervals(columns)
    assert time.process_time() - start < 2


def test_a_million_latents_take_less_than_two_seconds():
    x = np.random.default_rng(10).gamma(2, 1, 1_000_000)
    start = time.process_time()
    for statistic in ("ratio", "median", "q05", "q95"):
        low, high = stats.interval(x, np.ones_like(x), statistic)
        assert low <= stats.value(x, np.ones_like(x), statistic) <= high
    assert time.process_time() - start < 2


# Differences


def test_a_small_difference_is_seen_in_pairs_that_intervals_overlap_on():
    rng = np.random.default_rng(11)
    shared, den = correlated(rng, 100)
    a, b = shared + rng.normal(0.5, 1, 100), shared + rng.normal(0, 1, 100)
    low_a, high_b = stats.interval(a, den, "ratio").low, stats.interval(b, den, "ratio").high
    found = stats.paired_difference(a, den, b, den, "ratio")
    assert low_a < high_b
    assert 0 < found.low < found.value < found.high
    assert found.p < 0.01


def test_an_sae_does_not_differ_from_itself():
    num, den = correlated(np.random.default_rng(12), 50)
    for statistic in ("ratio", "median"):
        assert stats.paired_difference(num, den, num, den, statistic) == (0, 0, 0, 1, 0)


@pytest.mark.parametrize("statistic", ["ratio", "median"])
@pytest.mark.parametrize("n", [6, 80])
def test_no_difference_is_found_where_there_is_none_more_than_one_time_in_twenty(statistic, n):
    rng = np.random.default_rng(13)
    den = np.ones(n)
    p = []
    for _ in range(400):
        shared = rng.normal(size=n)
        a, b = (Column(shared + rng.normal(size=n), den, statistic) for _ in range(2))
        p.append(stats.paired_differences(a, [b], Bootstrap(n, draws=400))[0].p)
    assert np.mean(np.array(p) < 0.05) < 0.08


@pytest.mark.parametrize("n", [50, 90])
def test_p_is_below_five_percent_just_where_the_interval_leaves_out_zero(n):
    rng = np.random.default_rng(14)
    for _ in range(60):
        a, b = rng.normal(0.3, 1, n), rng.normal(0, 1, n)
        found = stats.paired_difference(a, np.ones(n), b, np.ones(n), "ratio")
        if abs(found.p - 0.05) > 0.01:
            assert (found.p < 0.05) == (found.low > 0 or found.high < 0)


@pytest.mark.parametrize("n", [60, 1_000])
def test_p_goes_on_where_no_draw_lies_beyond_zero(n):
    """So that Holm over hundreds of pairs leaves something to find; close to a paired t test."""
    rng = np.random.default_rng(20)
    shared = rng.normal(size=n)
    a, b = shared + rng.normal(8 / np.sqrt(n), 1, n), shared + rng.normal(0, 1, n)
    found = stats.paired_difference(a, np.ones(n), b, np.ones(n), "ratio")
    expected = scipy.stats.ttest_rel(a, b).pvalue
    assert expected < 1e-4
    assert np.log(found.p) == pytest.approx(np.log(expected), rel=0.15)


def test_p_never_rises_where_the_difference_grows():
    rng = np.random.default_rng(21)
    noise, ones = rng.normal(size=80), np.ones(80)
    p = [
        stats.paired_difference(noise + shift, ones, np.zeros(80), ones, "ratio").p
        for shift in np.linspace(0.2, 1, 60) - noise.mean()
    ]
    assert (np.diff(p) <= 0).all()
    assert p[-1] < 1e-9


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([1.0, 2.0, 3.0], 2 / 8),  # only all plus and all minus are as far from zero
        ([3.0, -1.0, 1.0], 6 / 8),  # |3 + 1 + 1|, |3 + 1 - 1|, |3 - 1 + 1|, each with both signs
        ([0.1, 0.2, -0.3], 1.0),  # zero but for rounding
        ([0.1, 0.2, 0.3, -0.6], 1.0),
        ([0.0, 0.0], 1.0),
        ([5.0], 1.0),
    ],
)
def test_sign_flips_are_as_counted_by_hand(differences, expected):
    assert stats.sign_flip(np.array(differences)) == expected


@pytest.mark.parametrize("n", [2, 5, 9, 12])
def test_a_few_sign_flips_are_those_of_scipy(n):
    rng = np.random.default_rng(22)
    for _ in range(5):
        d = rng.normal(0.5, 1, n)
        expected = scipy.stats.permutation_test(
            (d,), np.mean, permutation_type="samples", n_resamples=np.inf
        )
        assert stats.sign_flip(d) == pytest.approx(expected.pvalue)


def test_many_sign_flips_are_those_of_scipy():
    d = np.random.default_rng(23).gamma(2, 1, 30) - 1.5
    expected = scipy.stats.permutation_test(
        (d,), np.mean, permutation_type="samples", n_resamples=20_000, rng=24
    )
    assert stats.sign_flip(d) == pytest.approx(expected.pvalue, abs=0.01)


@pytest.mark.parametrize("n", [2, 5])
def test_five_units_or_fewer_never_reach_five_percent(n):
    assert stats.sign_flip(np.ones(n)) == 2 / 2**n > 0.05
    found = stats.paired_difference(
        2 + np.arange(n) / 10, np.ones(n), np.ones(n), np.ones(n), "ratio"
    )
    assert found.p == 2 / 2**n


def test_no_units_have_no_sign_flips():
    with pytest.raises(ValueError, match="at least one unit"):
        stats.sign_flip(np.ones(0))


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=10), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_sign_flips_know_neither_the_order_nor_the_direction(differences, random):
    p = stats.sign_flip(np.array(differences))
    assert stats.sign_flip(-np.array(differences)) == p
    random.shuffle(differences)
    assert stats.sign_flip(np.array(differences)) == pytest.approx(p)


@pytest.mark.parametrize("n", [4, 30])
def test_few_paired_units_are_tested_by_the_sign_flips_of_their_differences(n):
    rng = np.random.default_rng(25)
    a, b = rng.normal(0.5, 1, n), rng.normal(0, 1, n)
    found = stats.paired_difference(4 * a, np.full(n, 4.0), 4 * b, np.full(n, 4.0), "ratio")
    # All denominators are alike, so that the influences are the plain differences.
    assert found.p == pytest.approx(stats.sign_flip(a - b))
    assert found.value == pytest.approx((a - b).mean())


@pytest.mark.parametrize("n", [6, 30, 80])
def test_swapping_a_and_b_turns_the_sign_of_their_difference(n):
    rng = np.random.default_rng(26)
    a, b = (rng.gamma(2, 1, (2, n)) for _ in range(2))
    there = stats.paired_difference(*a, *b, "ratio")
    back = stats.paired_difference(*b, *a, "ratio")
    assert there.value == -back.value
    assert there.low == pytest.approx(-back.high)
    assert (there.p, there.detectable) == pytest.approx((back.p, back.detectable))


@pytest.mark.parametrize("n", [5, 30, 80])
def test_the_detectable_difference_is_as_worked_by_hand(n):
    d, ones = np.arange(n) / 7, np.ones(n)
    found = stats.paired_difference(d, ones, np.zeros(n), ones, "ratio")
    t = scipy.stats.t.ppf([0.975, 0.8], n - 1).sum()
    assert found.detectable == pytest.approx(t * d.std(ddof=1) / np.sqrt(n))


def test_the_detectable_difference_of_medians_comes_from_the_width_of_the_interval():
    rng = np.random.default_rng(27)
    a, b, ones = rng.normal(size=60), rng.normal(size=60), np.ones(60)
    t975, t80 = scipy.stats.t.ppf([0.975, 0.8], 59)
    for found in (
        stats.paired_difference(a, ones, b, ones, "median"),
        stats.independent_difference(Column(a, ones, "median"), Column(b, ones, "median")),
    ):
        assert found.detectable == pytest.approx((found.high - found.low) / 2 / t975 * (t975 + t80))


def test_all_pairs_at_once_are_the_same_as_one_by_one():
    rng = np.random.default_rng(28)
    columns = [Column(*rng.gamma(2, 1, (2, 60))) for _ in range(4)]
    pairs = [(0, 1), (2, 1), (3, 0)]
    found = stats.differences_in_pairs(columns, pairs, Bootstrap(60))
    for (i, j), difference in zip(pairs, found, strict=True):
        alone = stats.paired_difference(*columns[i][:2], *columns[j][:2], "ratio")
        assert difference == pytest.approx(alone)


def test_differences_of_many_units_agree_with_a_paired_t_test():
    rng = np.random.default_rng(15)
    n = stats.MANY_UNITS + 1
    shared = rng.normal(size=n)
    a, b = shared + rng.normal(0.02, 1, n), shared + rng.normal(0, 1, n)
    found = stats.paired_difference(a, np.ones(n), b, np.ones(n), "ratio")
    assert found.p == pytest.approx(scipy.stats.ttest_rel(a, b).pvalue, rel=1e-2)


def test_independent_means_agree_with_a_welch_test():
    rng = np.random.default_rng(16)
    a, b = rng.normal(0.1, 1, 3_000), rng.normal(0, 2, 5_000)
    columns = Column(a, np.ones(3_000)), Column(b, np.ones(5_000))
    expected = scipy.stats.ttest_ind(a, b, equal_var=False).pvalue
    assert stats.independent_difference(*columns).p == pytest.approx(expected, rel=2e-2)


def test_one_unit_tells_no_difference():
    one = np.ones(1)
    assert stats.paired_difference(one, one, 2 * one, one, "ratio") is None


def test_paired_columns_of_different_lengths_are_an_error():
    a, b = Column(np.ones(3), np.ones(3)), Column(np.ones(4), np.ones(4))
    with pytest.raises(ValueError, match="same number of units"):
        stats.paired_differences(a, [b], Bootstrap(3))


def test_holm_is_as_worked_by_hand():
    # Sorted 0.01 0.02 0.03 0.04 times 4 3 2 1, then never falling.
    np.testing.assert_allclose(stats.holm([0.04, 0.01, 0.03, 0.02]), [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(stats.holm([0.9, 0.8]), [1.0, 1.0])
    assert len(stats.holm([])) == 0


# Wins, ties and losses


def test_wins_are_counted_unit_by_unit_where_both_have_a_value():
    a = Column(np.array([1.0, 4.0, 3.0, 5.0, -2.0]), np.array([2.0, 4.0, 3.0, 0.0, -1.0]))
    b = Column(np.array([2.0, 1.0, 9.0, 1.0, 1.0]), np.array([2.0, 1.0, 3.0, 1.0, 1.0]))
    # 0.5 against 1, 1 against 1, 1 against 3, nothing against 1, 2 against 1.
    assert stats.win_tie_loss(a, b, "max") == (1, 1, 2)
    assert stats.win_tie_loss(a, b, "min") == (2, 1, 1)
    assert stats.win_tie_loss(b, a, "max") == (2, 1, 1)


def test_columns_over_other_units_have_no_wins():
    with pytest.raises(ValueError, match="same units, got 2 and 3"):
        stats.win_tie_loss(Column(np.ones(2), np.ones(2)), Column(np.ones(3), np.ones(3)), "max")


# Clusters


def test_clusters_are_summed_in_the_order_in_which_they_first_come():
    column = Column(np.array([1.0, 2.0, 3.0, 4.0]), np.array([1, 1, 2, 1]))
    found = stats.clustered(column, ["b", "a", "b", "a"])
    np.testing.assert_array_equal(found.num, [4, 6])
    np.testing.assert_array_equal(found.den, [3, 2])
    assert stats.value(*found) == stats.value(*column) == 2


def test_units_that_are_each_their_own_cluster_stay_as_they_are():
    column = Column(np.arange(3.0), np.ones(3))
    assert stats.clustered(column, ["c", "a", "b"]) is column


def test_copies_of_a_unit_make_an_interval_no_narrower():
    rng = np.random.default_rng(29)
    once = Column(rng.normal(size=15), np.ones(15))
    copied = Column(np.repeat(once.num, 6), np.ones(90))
    names = [str(i // 6) for i in range(90)]
    plain, honest = stats.interval(*copied), stats.interval(*stats.clustered(copied, names))
    assert honest == pytest.approx(stats.interval(*once))
    # By sqrt(6), and a little for how few clusters there are.
    assert 2.4 < (honest.high - honest.low) / (plain.high - plain.low) < 3


def test_quantiles_are_not_summed_by_cluster():
    with pytest.raises(ValueError, match="median cannot be summed"):
        stats.clustered(Column(np.ones(2), np.ones(2), "median"), ["a", "a"])


# Training seeds


def seed_columns(values, den=4.0):
    """values [seeds units]"""
    return [Column(np.array(row) * den, np.full(len(row), den)) for row in values]


def test_the_noise_of_two_seeds_on_three_units_is_as_worked_by_hand():
    """Values 2 and 4, z = (-1, 0, 1) and (-2, 0, 2), mean (-1.5, 0, 1.5), what is left (0.5, 0, -0.5) twice:
    V = 1 / (1 * 2 * 3) = 1/6; W = 2.25 / 3 - 1/12 = 2/3; variance of the mean 2 / 2 + 2/3, so that t is
    (1 * t_1 + 2/3 * t_2) / (5/3)."""
    found = stats.seeds(seed_columns([[1, 2, 3], [2, 4, 6]]), paired=True)
    assert found.mean == 3
    assert found.training_sd == pytest.approx(np.sqrt(2 - 1 / 6))
    assert found.evaluation_sd == pytest.approx(np.sqrt((1 / 3 + 4 / 3) / 2))
    assert found.n_seeds == 2
    t = scipy.stats.t.ppf(0.975, [1, 2]) @ [3 / 5, 2 / 5]
    half = t * np.sqrt(5 / 3)
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half))


def test_unpaired_seeds_share_no_noise():
    rng = np.random.default_rng(30)
    columns = seed_columns([rng.normal(mean, 1, n) for mean, n in [(0, 50), (1, 60), (2, 70)]])
    found = stats.seeds(columns, paired=False)
    values = [c.num.mean() / 4 for c in columns]
    squared = [(c.num / 4).var(ddof=1) / len(c.num) for c in columns]
    assert found.evaluation_sd == pytest.approx(np.sqrt(np.mean(squared)))
    expected = np.sqrt(np.var(values, ddof=1) - np.mean(squared))
    assert found.training_sd == pytest.approx(expected)
    ends = scipy.stats.t.interval(0.95, 2, np.mean(values), scipy.stats.sem(values))
    assert (found.low, found.high) == pytest.approx(ends)


def test_noise_that_all_seeds_share_is_not_training_noise():
    rng = np.random.default_rng(31)
    shared = rng.normal(size=100)
    found = stats.seeds(seed_columns([shared + offset for offset in (0, 0.1, 0.2)]), paired=True)
    assert found.training_sd == pytest.approx(0.1)
    # ... but the mean of the recipe is as uncertain as each of its seeds.
    parts = np.array([0.1**2 / 3, shared.var(ddof=1) / 100])
    half = scipy.stats.t.ppf(0.975, [2, 99]) @ parts / np.sqrt(parts.sum())
    assert found.high - found.mean == pytest.approx(half)


def test_seeds_that_do_not_differ_have_no_training_noise():
    values = np.random.default_rng(32).normal(size=60)
    found = stats.seeds(seed_columns([values, values, values]), paired=True)
    assert found.training_sd == 0
    error = values.std(ddof=1) / np.sqrt(60)
    assert found.evaluation_sd == pytest.approx(error)
    half = scipy.stats.t.ppf(0.975, 59) * error
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half))


def test_one_seed_has_the_interval_of_its_units():
    columns = seed_columns([np.random.default_rng(33).normal(size=60)])
    found = stats.seeds(columns, paired=True)
    assert (found.low, found.high) == stats.interval(*columns[0])
    assert found.training_sd is None
    assert found.evaluation_sd == pytest.approx((columns[0].num / 4).std(ddof=1) / np.sqrt(60))


def test_what_one_unit_cannot_say_is_left_out():
    paired = stats.seeds(seed_columns([[1], [2]]), paired=True)
    assert paired == (1.5, None, None, None, None, 2)
    apart = stats.seeds(seed_columns([[1], [2]]), paired=False)
    ends = scipy.stats.t.interval(0.95, 1, 1.5, 0.5)
    assert apart == (1.5, pytest.approx(ends[0]), pytest.approx(ends[1]), None, None, 2)
    assert stats.seeds(seed_columns([[1]]), paired=True) == (1, None, None, None, None, 1)


def test_medians_over_the_same_units_share_their_noise_too():
    rng = np.random.default_rng(34)
    shared = rng.normal(size=400)
    columns = [Column(shared + offset, np.ones(400), "median") for offset in (0.0, 0.1, 0.2)]
    found = stats.seeds(columns, paired=True)
    assert found.training_sd == pytest.approx(0.1)
    assert found.evaluation_sd == pytest.approx(1.2533 / 20, rel=0.2)


def test_no_seeds_and_seeds_over_other_units_are_errors():
    with pytest.raises(ValueError, match="at least one seed"):
        stats.seeds([], paired=True)
    with pytest.raises(ValueError, match="same number of units"):
        stats.seeds(seed_columns([[1, 2], [1, 2, 3]]), paired=True)


# Frontiers and bounds


@pytest.mark.parametrize("best", ["min", "max"])
def test_the_frontier_is_what_no_point_beats_by_brute_force(best):
    rng = np.random.default_rng(19)
    for _ in range(50):
        x, y = rng.integers(0, 6, size=(2, 12)).astype(float)
        sign = -1 if best == "max" else 1
        expected = [
            i
            for i in range(12)
            if not any(
                x[j] <= x[i]
                and sign * y[j] <= sign * y[i]
                and (x[j] < x[i] or sign * y[j] < sign * y[i])
                for j in range(12)
            )
        ]
        found = stats.frontier(x, y, best)
        assert sorted(found) == expected
        assert (np.diff(x[found]) >= 0).all()


def test_the_rule_of_three_is_close_to_the_exact_bound():
    assert stats.rule_of_three(1_000) == pytest.approx(1 - 0.05 ** (1 / 1_000), rel=5e-3)


def test_importing_stats_imports_neither_torch_nor_scipy():
    code = "import sys, saebench.stats; print(sorted({'torch', 'scipy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
