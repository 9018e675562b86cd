import time

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import PchipInterpolator

from saebench import frontiers, stats
from saebench.frontiers import Point
from saebench.stats import Bootstrap, Column

L0S = (8.0, 16.0, 32.0, 64.0)


def family(level, l0s=L0S, n=200, noise=0.05, seed=0, slope=0.1):
    """SAEs whose metric is level + slope ln L0, on sequences that differ far more than the families do."""
    shared = np.random.default_rng(99).normal(0, 0.2, n)
    rng = np.random.default_rng(seed)
    tokens = np.full(n, 32.0)
    return [
        Point(
            Column(l0 * tokens * (1 + rng.normal(0, 0.02, n)), tokens),
            Column(
                (level + slope * np.log(l0) + shared + rng.normal(0, noise, n)) * tokens, tokens
            ),
        )
        for l0 in l0s
    ]


def exact(metric, l0s, n=20):
    """SAEs whose every unit has the same value."""
    ones = np.ones(n)
    return [
        Point(Column(l0 * ones, ones), Column(m * ones, ones))
        for l0, m in zip(l0s, metric, strict=True)
    ]


points = st.lists(
    st.tuples(st.integers(1, 1_000), st.integers(-20, 20)),
    min_size=2,
    max_size=8,
    unique_by=lambda point: point[0],
)


# Area


def test_the_area_under_a_constant_is_the_constant():
    assert frontiers.area(np.array([1.0, 10.0, 50.0]), np.full(3, 0.7), 2.0, 40.0) == pytest.approx(
        0.7
    )


def test_the_area_under_two_points_is_that_of_a_line_in_ln_l0():
    # From (1, 0) to (e^2, 2): m = ln L0, of which the mean from e^0.5 to e^1.5 is 1.
    l0 = np.array([1.0, np.exp(2)])
    assert frontiers.area(l0, np.array([0.0, 2.0]), np.exp(0.5), np.exp(1.5)) == pytest.approx(1)


@given(points)
@settings(max_examples=200, deadline=None)
def test_the_area_is_that_of_scipys_interpolator(found):
    l0, metric = np.array(sorted(found), dtype=float).T
    curve = PchipInterpolator(np.log(l0), metric)
    low, high = (float(l0[0] * (l0[-1] / l0[0]) ** share) for share in (0.2, 0.7))
    expected = curve.integrate(np.log(low), np.log(high)) / np.log(high / low)
    order = np.random.default_rng(0).permutation(len(l0))
    assert frontiers.area(l0[order], metric[order], low, high) == pytest.approx(expected, abs=1e-9)


def test_the_curve_is_scipys_at_every_place_and_constant_beyond_its_ends():
    rng = np.random.default_rng(1)
    x = np.sort(rng.uniform(1, 100, (5, 7)), axis=1)
    y = rng.normal(size=(5, 7))
    curves = frontiers._curves(frontiers._Draws(x, y), x[0])
    places = np.linspace(-1, 6, 200)
    found = frontiers._at(curves, places)
    for i in range(5):
        inside = np.clip(places, *np.log(x[i, [0, -1]]))
        expected = PchipInterpolator(np.log(x[i]), y[i])(inside)
        np.testing.assert_allclose(found[i], expected, atol=1e-12)


def test_the_integral_beyond_the_ends_is_that_of_the_constant():
    l0, metric = np.array([[2.0, 4.0]]), np.array([[1.0, 3.0]])
    curves = frontiers._curves(frontiers._Draws(l0, metric), l0[0])
    # ln 2 before the first point at 1, ln 2 between them at 2 on average, ln 2 after the last at 3.
    assert frontiers._areas(curves, 1.0, 8.0)[0] == pytest.approx(2)


def test_saes_of_the_same_l0_count_as_their_mean():
    l0, metric = np.array([8.0, 8.0, 16.0]), np.array([0.4, 0.6, 0.9])
    expected = frontiers.area(np.array([8.0, 16.0]), np.array([0.5, 0.9]), 8.0, 16.0)
    assert frontiers.area(l0, metric, 8.0, 16.0) == pytest.approx(expected)


@pytest.mark.parametrize(("low", "high"), [(7.9, 16.0), (8.0, 16.1), (10.0, 10.0), (12.0, 9.0)])
def test_nothing_is_extrapolated(low, high):
    with pytest.raises(ValueError, match="goes from 8 to 16"):
        frontiers.area(np.array([8.0, 16.0]), np.array([0.5, 0.9]), low, high)


@pytest.mark.parametrize("l0", [[8.0], [8.0, 8.0], []])
def test_a_curve_needs_two_l0s(l0):
    with pytest.raises(ValueError, match="at least two different L0s"):
        frontiers.area(np.array(l0), np.ones(len(l0)), 8.0, 16.0)


def test_an_sae_without_active_latents_has_no_place_on_the_curve():
    with pytest.raises(ValueError, match="above zero, got 0"):
        frontiers.area(np.array([0.0, 8.0]), np.ones(2), 1.0, 8.0)


# Two families


def test_the_better_family_is_better_by_what_it_was_made_better():
    found = frontiers.compare(family(0.52), family(0.5, seed=1), "max", paired=True)
    assert found.low_l0 == pytest.approx(8, rel=0.01)
    assert found.high_l0 == pytest.approx(64, rel=0.01)
    assert found.difference.low < 0.02 < found.difference.high
    assert found.difference.low > 0
    assert found.difference.p < 0.01
    assert found.difference.value == pytest.approx(found.a - found.b)
    assert found.crossings == ()
    assert found.dominates == "a"


@pytest.mark.parametrize("n", [6, 40])
def test_swapping_the_families_turns_the_sign(n):
    a, b = family(0.55, n=n), family(0.5, seed=1, l0s=L0S[1:], n=n)
    there, back = frontiers.compare(a, b, "max", True), frontiers.compare(b, a, "max", True)
    assert (there.a, there.b) == pytest.approx((back.b, back.a))
    assert there.difference.value == pytest.approx(-back.difference.value)
    assert there.difference.low == pytest.approx(-back.difference.high, abs=1e-9)
    assert there.difference.p == pytest.approx(back.difference.p)
    assert (there.dominates, back.dominates) in [("a", "b"), (None, None)]


def test_the_smaller_is_better_where_asked_for():
    found = frontiers.compare(family(0.55), family(0.5, seed=1), "min", paired=True)
    assert found.difference.value > 0
    assert found.dominates == "b"


def test_the_order_of_units_and_of_saes_does_not_matter():
    a, b = family(0.52, n=40), family(0.5, seed=1, n=40)
    order = np.random.default_rng(2).permutation(40)
    turned = [
        [Point(*(Column(c.num[order], c.den[order]) for c in point)) for point in reversed(these)]
        for these in (a, b)
    ]
    found, again = frontiers.compare(a, b, "max", True), frontiers.compare(*turned, "max", True)
    assert found.difference.value == pytest.approx(again.difference.value)
    width = found.difference.high - found.difference.low
    assert again.difference.low == pytest.approx(found.difference.low, abs=0.1 * width)


def test_a_family_does_not_differ_from_itself():
    a = family(0.5)
    found = frontiers.compare(a, a, "max", paired=True)
    assert found.difference == (0, 0, 0, 1, 0)
    assert found.dominates is None
    assert found.crossings == ()


def test_pairing_sees_what_families_over_other_units_do_not_show():
    a, b = family(0.51, slope=0.05), family(0.5, seed=1, slope=0.05)
    paired = frontiers.compare(a, b, "max", paired=True).difference
    apart = frontiers.compare(a, b, "max", paired=False).difference
    assert paired.p < 0.05 < apart.p
    assert paired.detectable < apart.detectable / 3


def test_the_interval_of_the_area_is_that_of_a_plain_bootstrap():
    """The same with scipy's interpolator, one draw after the other."""
    a, b = family(0.52, n=30), family(0.5, seed=1, n=30)
    found = frontiers.compare(a, b, "max", paired=True)
    rng, drawn = np.random.default_rng(3), []
    for _ in range(1_000):
        picks = rng.integers(30, size=30)
        areas = []
        for these in (a, b):
            l0, m = (
                np.array([point[k].num[picks].sum() / point[k].den[picks].sum() for point in these])
                for k in (0, 1)
            )
            grid = np.linspace(np.log(found.low_l0), np.log(found.high_l0), 500)
            curve = PchipInterpolator(np.log(l0), m)
            areas.append(curve(np.clip(grid, *np.log(l0[[0, -1]]))).mean())
        drawn.append(areas[0] - areas[1])
    wide = scipy.stats.t.ppf(0.975, 29) * np.sqrt(30 / 29) * np.std(drawn)
    assert found.difference.low == pytest.approx(found.difference.value - wide, abs=0.15 * wide)
    assert found.difference.high == pytest.approx(found.difference.value + wide, abs=0.15 * wide)


def test_with_few_units_the_interval_is_students_of_the_differences():
    """Constant L0s and straight curves make the area linear in the units: a plain t interval over them."""
    n, rng = 7, np.random.default_rng(4)
    ones, l0s = np.ones(n), (8.0, 16.0)
    means = rng.normal(0.5, 0.1, (2, n))
    a, b = ([Point(Column(l0 * ones, ones), Column(mean, ones)) for l0 in l0s] for mean in means)
    found = frontiers.compare(a, b, "max", paired=True).difference
    expected = scipy.stats.ttest_rel(*means)
    assert found.p == pytest.approx(expected.pvalue)
    assert found[1:3] == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_an_l0_over_other_units_is_held_at_its_value():
    rng = np.random.default_rng(5)
    sequences = np.ones(500)

    def of(level, spread):
        l0s = [Column(rng.normal(l0, spread, 500), sequences) for l0 in (8.0, 16.0)]
        sets = [Column(level + shared + rng.normal(0, 0.01, 20), np.ones(20)) for _ in l0s]
        return [Point(*pair) for pair in zip(l0s, sets, strict=True)]

    shared = rng.normal(0.8, 0.1, 20)
    found = frontiers.compare(of(0.02, 0), of(0.0, 3), "max", paired=True)
    assert found.difference.low < 0.02 < found.difference.high
    assert found.dominates == "a"


def test_draws_in_which_an_sae_is_silent_are_left_out():
    """An SAE that is active in one of 12 sequences alone has no ln L0 in a third of all draws."""
    a, b = family(0.6, n=12), family(0.5, n=12, seed=1)
    rare = np.zeros(12)
    rare[3] = 32 * 12 * 8.0
    a[0] = Point(Column(rare, a[0].l0.den), a[0].metric)
    found = frontiers.compare(a, b, "max", paired=True)
    assert found.low_l0 == pytest.approx(8, rel=0.02)
    assert np.isfinite(found.difference).all()
    assert found.difference.low < 0.1 < found.difference.high


def test_so_many_units_that_they_are_not_resampled_give_the_same_interval(monkeypatch):
    a, b = family(0.505, n=400), family(0.5, n=400, seed=1)
    drawn = frontiers.compare(a, b, "max", paired=True).difference
    monkeypatch.setattr(stats, "MANY_UNITS", 399)
    normal = frontiers.compare(a, b, "max", paired=True).difference
    assert normal == pytest.approx(drawn, abs=0.1 * (drawn.high - drawn.low))


def test_two_families_that_cross_once_say_where():
    # Lines in ln L0 from 0 to 3 and from 1 to 2: they meet half-way, at sqrt(8 * 32) = 16.
    found = frontiers.compare(exact([0, 3], [8, 32]), exact([1, 2], [8, 32]), "max", paired=True)
    assert found.crossings == pytest.approx((16,))
    assert found.dominates is None
    assert found.difference.value == pytest.approx(0)


def test_curves_that_touch_do_not_cross():
    above, below = exact([1, 2, 1], [4, 8, 16]), exact([3, 2, 3], [4, 8, 16])
    found = frontiers.compare(above, below, "max", paired=True)
    assert found.crossings == ()
    assert found.dominates is None


def test_crossings_are_the_roots_of_scipys_curves():
    rng = np.random.default_rng(6)
    l0s = np.exp(np.arange(6.0))
    for _ in range(20):
        y = rng.normal(size=(2, 6))
        found = frontiers.compare(exact(y[0], l0s), exact(y[1], l0s), "max", paired=True)
        gap = PchipInterpolator(np.arange(6.0), y[0] - y[1])
        curves = [PchipInterpolator(np.arange(6.0), row) for row in y]
        for l0 in found.crossings:
            assert curves[0](np.log(l0)) == pytest.approx(float(curves[1](np.log(l0))), abs=1e-9)
        # Between two points the sign of the gap changes as often as at the points, or twice more.
        assert len(found.crossings) % 2 == (np.sign(gap(0)) != np.sign(gap(5)))


def test_a_family_that_is_better_only_at_one_end_does_not_dominate():
    found = frontiers.compare(family(0.3, slope=0.16), family(0.5, seed=1), "max", paired=True)
    assert len(found.crossings) == 1
    assert found.dominates is None


@pytest.mark.parametrize("n", [6, 100])
def test_the_band_is_wider_than_the_interval_at_one_place(n):
    rng = np.random.default_rng(7)
    draws = rng.normal(
        size=(2_000 if n == 100 else n, 50)
    )  # 50 places that know nothing of each other
    margin = frontiers._band_margin(draws, n) if n == 100 else frontiers._jackknife_margin(draws)
    error = draws.std(axis=0) if n == 100 else frontiers._jackknife_error(draws)
    assert (margin > 1.3 * scipy.stats.t.ppf(0.975, n - 1) * error).all()
    if n == 100:
        # The largest of 50 independent normal variables: P(|z| < c)^50 = 0.95.
        c = scipy.stats.norm.ppf((1 + 0.95 ** (1 / 50)) / 2)
        assert margin / error == pytest.approx(np.full(50, c * stats.widening(n)), rel=0.04)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([8.0, 16.0], [17.0, 40.0], "one goes from 8 to 16, the other from 17 to 40"),
        ([8.0, 16.0], [16.0, 40.0], "no range of L0 in common"),
        ([8.0], [8.0, 16.0], "at least two different L0s, got 8"),
        ([8.0, 16.0], [], "at least two different L0s, got none"),
    ],
)
def test_families_that_cannot_be_compared_are_an_error(a, b, message):
    with pytest.raises(ValueError, match=message):
        frontiers.compare(exact([0.5] * len(a), a), exact([0.5] * len(b), b), "max", paired=True)


def test_paired_families_over_other_units_are_an_error():
    with pytest.raises(ValueError, match=r"same number of units, got \[20, 21\]"):
        frontiers.compare(exact([0, 1], [8, 16]), exact([0, 1], [8, 16], n=21), "max", paired=True)
    with pytest.raises(ValueError, match="at least two units"):
        one = exact([0, 1], [8, 16], n=1)
        frontiers.compare(one, one, "max", paired=True)


def test_medians_of_latents_are_compared_without_pairs():
    rng = np.random.default_rng(8)

    def of(level):
        return [
            Point(
                Column(np.full(50, l0), np.ones(50)),
                Column(rng.normal(level, 1, n), np.ones(n), "median"),
            )
            for l0, n in [(8.0, 900), (16.0, 1_000)]
        ]

    found = frontiers.compare(of(0.5), of(0.0), "max", paired=False)
    assert found.dominates == "a"
    # The mean over the line is that of its two ends: sd of a median is 1.2533 / sqrt(n).
    error = np.sqrt(2 * (1 / 900 + 1 / 1_000)) * 1.2533 / 2
    half = (found.difference.high - found.difference.low) / 2
    assert half == pytest.approx(1.96 * error, rel=0.15)


def test_drawn_medians_are_those_of_resampled_latents():
    column = Column(np.random.default_rng(9).normal(size=41), np.ones(41), "q05")
    found = stats.independent_draws(column, 4_000, seed=1)
    picks = next(Bootstrap(41, 4_000, seed=2).picks())
    expected = np.quantile(column.num[picks], 0.05, axis=1)
    assert scipy.stats.ks_2samp(found, expected).pvalue > 0.01


def test_two_families_of_ten_saes_take_less_than_three_seconds():
    l0s = tuple(np.geomspace(4, 400, 10))
    a, b = family(0.5, l0s, n=1_000), family(0.5, l0s, n=1_000, seed=1)
    start = time.process_time()
    frontiers.compare(a, b, "max", paired=True)
    assert time.process_time() - start < 3


# Hypervolume


@pytest.mark.parametrize(
    ("l0", "metric", "expected"),
    [
        ([1.0], [1.0], 1.0),  # perfect at one active latent
        ([10.0], [0.5], 2 / 3 * 0.5),
        ([10.0, 100.0], [0.5, 0.8], 1 / 3 * 0.5 + 1 / 3 * 0.8),
        ([10.0, 100.0], [0.5, 0.4], 2 / 3 * 0.5),  # the second is beaten on both
        ([1_000.0, 2_000.0], [1.0, 1.0], 0.0),  # outside of the box
        ([10.0], [-0.2], 0.0),  # worse than nothing
        ([0.0, 0.5], [0.5, 0.5], 0.5),  # as at L0 1
        ([], [], 0.0),
    ],
)
def test_hypervolumes_are_as_worked_by_hand(l0, metric, expected):
    found = frontiers.hypervolume(np.array(l0), np.array(metric), worst=0.0, ideal=1.0)
    assert found == pytest.approx(expected)


def test_a_metric_that_is_best_in_the_middle_counts_from_both_sides():
    l0 = np.array([10.0])
    above, below = (
        frontiers.hypervolume(l0, np.array([m]), worst=0.0, ideal=1.0) for m in (1.25, 0.75)
    )
    assert above == below == pytest.approx(2 / 3 * 0.75)


@given(st.lists(st.tuples(st.floats(0.5, 3_000), st.floats(-0.5, 1)), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_the_hypervolume_is_the_share_of_a_fine_grid_that_some_sae_dominates(saes):
    l0, metric = np.array(saes).T
    x = (np.arange(400) + 0.5) / 400 * 3
    y = (np.arange(400) + 0.5) / 400
    beaten = np.zeros((400, 400), dtype=bool)
    for at, m in saes:
        beaten |= (np.log10(at) <= x)[:, None] & (1 - m <= y)[None]
    found = frontiers.hypervolume(l0, metric, worst=0.0, ideal=1.0)
    assert found == pytest.approx(beaten.mean(), abs=0.02)


@given(st.lists(st.tuples(st.floats(0.5, 3_000), st.floats(-0.5, 1)), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_one_more_sae_never_makes_a_hypervolume_smaller(saes):
    l0, metric = np.array(saes).T
    fewer = frontiers.hypervolume(l0[1:], metric[1:], worst=0.0, ideal=1.0)
    assert frontiers.hypervolume(l0, metric, worst=0.0, ideal=1.0) >= fewer - 1e-12


def test_the_hypervolume_is_that_of_moocore():
    moocore = pytest.importorskip("moocore")
    rng = np.random.default_rng(10)
    l0, loss = 10 ** rng.uniform(0, 3, 12), rng.uniform(0, 1, 12)
    expected = moocore.hypervolume(np.stack([np.log10(l0) / 3, loss], axis=1), ref=[1, 1])
    assert frontiers.hypervolume(l0, 1 - loss, worst=0.0, ideal=1.0) == pytest.approx(expected)


def test_a_box_without_height_and_a_negative_l0_are_errors():
    with pytest.raises(ValueError, match="must differ, got 1 for both"):
        frontiers.hypervolume(np.ones(1), np.ones(1), worst=1.0, ideal=1.0)
    with pytest.raises(ValueError, match="never negative, got -1"):
        frontiers.hypervolume(np.array([-1.0]), np.ones(1), worst=0.0, ideal=1.0)


# One SAE against a family


def test_an_sae_is_compared_with_the_curve_at_its_own_l0():
    # m = ln L0 is a line there; at the geometric mean of 8 and 16 it is 3.5 ln 2.
    l0 = 8 * np.sqrt(2)
    baselines = exact(np.log([8.0, 16.0, 32.0]), [8.0, 16.0, 32.0])
    (sae,) = exact([3.5 * np.log(2) + 0.012], [l0])
    found = frontiers.at_point(sae, baselines)
    assert (found.l0, found.frontier) == pytest.approx((l0, 3.5 * np.log(2)))
    assert found.difference[:3] == pytest.approx((0.012, 0.012, 0.012))


@pytest.mark.parametrize("l0", [7.9, 64.1])
def test_no_frontier_is_extrapolated(l0):
    (sae,) = exact([1.0], [l0])
    with pytest.raises(ValueError, match="nothing is extrapolated"):
        frontiers.at_point(sae, exact([1.0, 2.0], [8.0, 64.0]))


def test_an_sae_beside_one_of_few_units_has_the_interval_of_students_paired_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 0.2, 8), rng.normal(0.8, 0.2, 8)
    ones = np.ones(8)
    ends = exact([0.1, 2.0], [8.0, 32.0], n=8)
    family = [ends[0], Point(Column(16 * ones, ones), Column(b, ones)), ends[1]]
    found = frontiers.at_point(Point(Column(16 * ones, ones), Column(a, ones)), family).difference
    test = scipy.stats.ttest_rel(a, b)
    assert found.p == pytest.approx(test.pvalue)
    assert found[:3] == pytest.approx((np.mean(a - b), *test.confidence_interval(0.95)), rel=1e-6)


def test_every_draw_reads_its_own_curve_at_its_own_l0():
    sae, *baselines = family(0.5, (12.0, *L0S), n=40)
    found = frontiers.at_point(sae, baselines).difference
    counts = np.concatenate(
        [[np.bincount(p, minlength=40) for p in picks] for picks in Bootstrap(40).picks()]
    )

    def drawn(column):
        return (counts @ column.num) / (counts @ column.den)

    l0s, metrics = (
        np.stack([drawn(point[part]) for point in baselines], axis=1) for part in (0, 1)
    )
    places = np.log(drawn(sae.l0))
    curves = [
        float(PchipInterpolator(np.log(x), y)(at))
        for x, y, at in zip(l0s, metrics, places, strict=True)
    ]
    expected = stats.from_draws(found.value, drawn(sae.metric) - np.array(curves), 40)
    assert found == pytest.approx(expected, rel=1e-9)


def test_what_documents_do_to_all_saes_alike_is_no_difference_from_the_frontier():
    sae, *baselines = family(0.5, (12.0, *L0S), noise=0.0)
    found = frontiers.at_point(sae, baselines).difference
    alone = stats.interval(*sae.metric)
    assert found.high - found.low < 0.2 * (alone.high - alone.low)
