"""Whether the statistics do what they say: data are made many times from a known truth, and what is claimed is counted.

Run with -s to see the numbers. Bootstraps are drawn anew every 50 repetitions, so that what the claims have in common
does not decide the count.
"""

from collections.abc import Iterator

import numpy as np
import pytest
import scipy.stats

from saebench import ranks, stats
from saebench.frontiers import Point, compare
from saebench.stats import Bootstrap, Column

REPEATS = 2_000
BLOCK = 50
DRAWS = 1_000


def blocks(repeats: int = REPEATS) -> Iterator[int]:
    return iter(range(repeats // BLOCK))


def sequences(rng, n, truth=0.8, n_saes=1):
    """Explained variance by sequence: squared errors over variances, summed over tokens that share an offset.

    The SAEs of one draw share their sequences, and so most of their noise. n_tokens differs between sequences.
    """
    n_tokens = rng.integers(16, 64, n).astype(float)
    scale = n_tokens * rng.gamma(4, 0.25, n)  # variance of the stream in each sequence
    hardness = rng.normal(0, 0.1, n)  # correlates the tokens of a sequence, in every SAE alike
    found = []
    for _ in range(n_saes):
        share = (
            truth + hardness + rng.normal(0, 0.03, n) + rng.normal(0, 0.3, n) / np.sqrt(n_tokens)
        )
        found.append(Column(share * scale, scale))
    return found


def datasets(rng, n_sources, n_saes=1):
    """AUC by dataset, from 1 to 5 datasets of each source, which are alike; summed by source."""
    sizes = rng.integers(1, 6, n_sources)
    names = [str(i) for i, size in enumerate(sizes) for _ in range(size)]
    of_source = np.repeat(rng.normal(0, 0.08, n_sources), sizes)
    of_set = rng.normal(0, 0.04, len(names))
    found = []
    for _ in range(n_saes):
        own = np.repeat(rng.normal(0, 0.01, n_sources), sizes) + rng.normal(0, 0.015, len(names))
        auc = Column(0.8 + of_source + of_set + own, np.ones(len(names)))
        found.append(stats.clustered(auc, names))
    return found


def proportion_of(hits, what):
    share = float(np.mean(hits))
    print(f"\n{what}: {100 * share:.1f} %", end="")  # noqa: T201 - what was counted is the point
    return share


DATA = {
    "100 sequences": lambda rng, n: sequences(rng, 100, n_saes=n),
    "12 sources of datasets": lambda rng, n: datasets(rng, 12, n),
    "47 sources of datasets": lambda rng, n: datasets(rng, 47, n),
}


@pytest.mark.parametrize("data", DATA)
def test_intervals_cover_the_truth_as_often_as_they_say(data):
    rng, covered = np.random.default_rng(1), []
    for seed in blocks():
        columns = [DATA[data](rng, 1)[0] for _ in range(BLOCK)]
        found = stats.intervals(columns, DRAWS, seed)
        covered += [low <= 0.8 <= high for low, high in found]
    assert 0.93 <= proportion_of(covered, f"coverage, {data}") <= 0.97


def test_an_interval_from_resampled_tokens_covers_far_less():
    """Why units are sequences: the same sums, as if each of the tokens were a unit of its own."""
    rng, covered = np.random.default_rng(2), []
    for seed in blocks(200):
        columns = []
        for _ in range(BLOCK):
            of_sequence = sequences(rng, 100)[0]
            share = of_sequence.num / of_sequence.den
            tokens = np.repeat(share, 32) + rng.normal(0, 0.3, 3_200)
            columns.append(Column(tokens, np.ones(3_200)))
        covered += [low <= 0.8 <= high for low, high in stats.intervals(columns, 200, seed)]
    assert proportion_of(covered, "coverage, tokens") < 0.75


def paired_p(pairs, seed):
    """p-values of pairs of columns. Sources of datasets are as many in all."""
    columns = [column for pair in pairs for column in pair]
    places = [(2 * i, 2 * i + 1) for i in range(len(pairs))]
    units = Bootstrap(len(columns[0].num), DRAWS, seed)
    return np.array([found.p for found in stats.differences_in_pairs(columns, places, units)])


@pytest.mark.parametrize("data", DATA)
def test_the_paired_test_finds_what_is_not_there_one_time_in_twenty(data):
    rng, found = np.random.default_rng(3), []
    for seed in blocks():
        found += [*(paired_p([DATA[data](rng, 2) for _ in range(BLOCK)], seed) < 0.05)]
    assert 0.035 <= proportion_of(found, f"level, {data}") <= 0.065


@pytest.mark.parametrize("data", DATA)
def test_pairs_find_what_unpaired_columns_do_not(data):
    rng, paired, apart = np.random.default_rng(4), [], []
    for seed in blocks(1_000):
        pairs = [DATA[data](rng, 2) for _ in range(BLOCK)]
        pairs = [(Column(a.num + 0.015 * a.den, a.den), b) for a, b in pairs]
        paired += [*(paired_p(pairs, seed) < 0.05)]
        apart += [stats.independent_difference(*pair).p < 0.05 for pair in pairs]
    power = proportion_of(paired, f"power, {data}, paired")
    assert power > proportion_of(apart, f"power, {data}, unpaired") + 0.2


@pytest.mark.parametrize("n", [12, 40, 100])
def test_a_detectable_difference_is_found_four_times_in_five(n):
    rng = np.random.default_rng(5)
    t = scipy.stats.t.ppf([0.975, 0.8], n - 1).sum()
    true = t / np.sqrt(n)  # of differences whose standard deviation is 1
    ones = np.ones(n)
    p, said = [], []
    for seed in blocks(1_000):
        made = [(rng.normal(true, 1, n), np.zeros(n)) for _ in range(BLOCK)]
        columns = [Column(x, ones) for pair in made for x in pair]
        places = [(2 * i, 2 * i + 1) for i in range(BLOCK)]
        for found in stats.differences_in_pairs(columns, places, Bootstrap(n, DRAWS, seed)):
            p.append(found.p)
            said.append(found.detectable)
    assert np.mean(said) == pytest.approx(true, rel=0.03)
    assert 0.76 <= proportion_of(np.array(p) < 0.05, f"power, {n} units") <= 0.84


@pytest.mark.parametrize(
    ("n_seeds", "training"), [(2, 0.05), (3, 0.0), (3, 0.05), (5, 0.0), (5, 0.01), (5, 0.05)]
)
def test_the_mean_of_a_recipe_is_covered_and_its_noise_told_apart(n_seeds, training):
    """Sequences that are hard for every seed alike (0.1), and for one seed alone (0.03), and training noise."""
    rng, covered, variance = np.random.default_rng(6), [], []
    for _ in range(1_000):
        columns = [
            Column(c.num + u * c.den, c.den)
            for c, u in zip(
                sequences(rng, 100, n_saes=n_seeds), rng.normal(0, training, n_seeds), strict=True
            )
        ]
        found = stats.seeds(columns, paired=True)
        covered.append(found.low <= 0.8 <= found.high)
        variance.append(found.training_sd**2)
    what = f"coverage, {n_seeds} seeds, training noise {training:g}"
    assert 0.92 <= proportion_of(covered, what) <= 0.98
    if training >= 0.05:  # below, an estimate that is never negative is biased upwards
        assert np.mean(variance) == pytest.approx(training**2, rel=0.1)


@pytest.mark.parametrize("training", [0.0, 0.1])
def test_the_mean_of_a_recipe_is_covered_without_pairs(training):
    rng, covered = np.random.default_rng(7), []
    for _ in range(1_000):
        u = rng.normal(0, training, 5)
        columns = [Column(0.5 + shift + rng.normal(0, 1, 200), np.ones(200)) for shift in u]
        found = stats.seeds(columns, paired=False)
        covered.append(found.low <= 0.5 <= found.high)
    what = f"coverage, unpaired seeds, training noise {training:g}"
    assert 0.92 <= proportion_of(covered, what) <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("n", [12, 100])
def test_no_rank_interval_of_a_metric_leaves_out_the_true_rank_more_than_one_time_in_twenty(n):
    """Two pairs of equals, of which each member may come first: a rank interval must hold both places."""
    truth = {"a": 0.03, "b": 0.03, "c": 0.0, "d": 0.0, "e": -0.01}
    true_ranks = {"a": (1, 2), "b": (1, 2), "c": (3, 4), "d": (3, 4), "e": (5, 5)}
    rng, held, narrow = np.random.default_rng(8), [], []
    for seed in range(1_000):
        columns = {
            name: Column(c.num + truth[name] * c.den, c.den)
            for name, c in zip(truth, sequences(rng, n, n_saes=5), strict=True)
        }
        found = ranks.rank(columns, "max", paired=True, bootstrap=Bootstrap(n, DRAWS, seed)).ranks
        held.append(
            all(
                found[name][0] <= first and last <= found[name][1]
                for name, (first, last) in true_ranks.items()
            )
        )
        narrow.append(found["a"] == (1, 2))
    proportion_of(narrow, f"best pair told from the rest, {n} units")
    # 95 % with the error of 1,000 repetitions: two standard errors below.
    assert proportion_of(held, f"all five true ranks held, {n} units") >= 0.936


@pytest.mark.slow
@pytest.mark.parametrize("n", [7, 40])
def test_the_difference_of_two_families_is_covered(n):
    rng, covered, wrong = np.random.default_rng(9), [], []
    l0s = (8.0, 16.0, 32.0)
    for _ in range(400):
        columns = sequences(rng, n, n_saes=6)
        points = [
            Point(Column(l0 * rng.gamma(50, 0.02, n) * c.den, c.den), c)
            for l0, c in zip(l0s * 2, columns, strict=True)
        ]
        found = compare(points[:3], points[3:], "max", paired=True)
        covered.append(found.difference.low <= 0 <= found.difference.high)
        wrong.append(found.dominates is not None)
    assert proportion_of(wrong, f"wrongly dominates, {n} units") <= 0.05
    # 93 to 97 % with one standard error of 400 repetitions.
    assert 0.92 <= proportion_of(covered, f"coverage, area difference, {n} units") <= 0.98
