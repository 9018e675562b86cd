import subprocess
import sys
import time

import numpy as np
import pytest
import scipy.stats

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
    start = time.perf_counter()
    stats.intervals(columns)
    assert time.perf_counter() - start < 2


def test_a_million_latents_take_less_than_two_seconds():
    x = np.random.default_rng(10).gamma(2, 1, 1_000_000)
    start = time.perf_counter()
    for statistic in ("ratio", "median", "q05", "q95"):
        low, high = stats.interval(x, np.ones_like(x), statistic)
        assert low <= stats.value(x, np.ones_like(x), statistic) <= high
    assert time.perf_counter() - start < 2


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
        assert stats.paired_difference(num, den, num, den, statistic) == (0.0, 0.0, 0.0, 1.0)


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


@pytest.mark.parametrize("n", [5, 40])
def test_p_is_below_five_percent_just_where_the_interval_leaves_out_zero(n):
    rng = np.random.default_rng(14)
    for _ in range(60):
        a, b = rng.normal(0.4, 1, n), rng.normal(0, 1, n)
        found = stats.paired_difference(a, np.ones(n), b, np.ones(n), "ratio")
        if abs(found.p - 0.05) > 0.01:
            assert (found.p < 0.05) == (found.low > 0 or found.high < 0)


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


def test_a_tie_group_is_the_best_and_those_that_cannot_be_told_apart_from_it():
    rng = np.random.default_rng(17)
    shared = rng.normal(size=200)
    den = np.ones(200)
    scores = {"best": 1.0, "twin": 1.0, "worse": 0.8, "worst": 0.0}
    columns = {
        name: Column(shared + mean + rng.normal(0, 0.1, 200), den) for name, mean in scores.items()
    }
    assert stats.tie_group(columns, "max", paired=True) == {"best", "twin"}
    assert stats.tie_group(columns, "min", paired=True) == {"worst"}


def test_latents_of_two_saes_are_compared_without_pairs():
    rng = np.random.default_rng(18)
    columns = {
        name: Column(rng.normal(mean, 1, n), np.ones(n), "median")
        for name, mean, n in [("a", 0.5, 800), ("b", 0.5, 1_000), ("c", 0.0, 900)]
    }
    assert stats.tie_group(columns, "max", paired=False) == {"a", "b"}


def test_the_only_sae_is_its_own_tie_group():
    assert stats.tie_group({"a": Column(np.ones(3), np.ones(3))}, "max", paired=True) == {"a"}


def test_hundreds_of_saes_can_still_be_told_apart():
    n_saes, den = 120, np.ones(50)
    columns = {str(i): Column(np.full(50, float(i)), den) for i in range(n_saes)}
    assert stats.tie_group(columns, "max", paired=True) == {"119"}


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
