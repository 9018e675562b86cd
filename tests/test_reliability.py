import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from saebench.errors import UserError
from saebench.reliability import files
from saebench.reliability.cards import Card, Panel, Reliability, card_of
from saebench.reliability.files import applying, as_json, read_card, read_verdicts
from saebench.reliability.invariance import WHATS
from saebench.reliability.rows import read_measured
from saebench.reliability.verdicts import Verdict, Verdicts, remarks, strongest, written_out

ROOT = Path(__file__).parent.parent
NAN = math.nan
Rows = list[dict[str, Any]]


def row(sae: str, value: float, **fields: Any) -> dict[str, Any]:
    """One number of a trained SAE, of the suite itself."""
    plain: dict[str, Any] = {
        "sae": sae,
        "kind": "trained",
        "family": "topk",
        "width": 64,
        "l0": 8.0,
        "seed": 0,
        "site": "1.resid_post",
        "tokens": 1000,
        "what": "base",
        "setting": "",
        "share": 1.0,
        "eval": "core",
        "version": 1,
        "params": "{}",
        "metric": "m",
        "best": "max",
        "ends": False,
        "value": value,
        "low": NAN,
        "high": NAN,
        "seconds": NAN,
        "bytes": NAN,
        "degraded": "",
        "amount": NAN,
    }
    assert fields.keys() <= plain.keys()
    return plain | fields


def control(family: str, value: float, **fields: Any) -> dict[str, Any]:
    named: dict[str, Any] = {"kind": "control", "family": family, "seed": NAN}
    there = named | fields
    return row("-".join(map(str, [family, *fields.values()])), value, **there)


def oracle(value: float, degraded: str = "", amount: float = 0.0, **fields: Any) -> dict[str, Any]:
    name = f"oracle-{degraded}{amount:g}"
    named: dict[str, Any] = {"kind": "control", "family": "oracle", "seed": NAN, "l0": NAN}
    return row(name, value, **(named | {"degraded": degraded, "amount": amount} | fields))


def made(rows: Rows, panel: Rows | None = None) -> Card:
    beside = None if panel is None else Panel("known", pd.DataFrame(panel))
    return card_of("toy", pd.DataFrame(rows), beside)


def only(rows: Rows, panel: Rows | None = None) -> Reliability:
    """The card of the one metric that is there."""
    (found,) = (m for m in made(rows, panel).metrics if m.eval != "ground_truth")
    return found


def drawn(sae: str, values: Sequence[float], **fields: Any) -> Rows:
    """The first is the suite's own too."""
    again = [row(sae, v, what="redraw", setting=str(i), **fields) for i, v in enumerate(values)]
    return [row(sae, values[0], **fields), *again]


DRAWN = {"a": (1.0, 2.0, 3.0), "b": (2.0, 4.0, 6.0), "c": (5.0, 5.0, 8.0)}


def three(**fields: Any) -> Rows:
    return [one for sae, values in DRAWN.items() for one in drawn(sae, values, **fields)]


# Noise


def test_noise_is_that_of_redraws_worked_out_by_hand():
    noise = only(three()).noise
    assert (noise.n_saes, noise.n_draws) == (3, 3)
    # Variances 1, 4 and 3; every difference of two SAEs varies by 1.
    assert noise.sd == pytest.approx(math.sqrt(8 / 3))
    assert noise.cv == pytest.approx(0.5)  # of 1/2, 2/4 and sqrt(3)/6
    assert noise.smallest_difference == pytest.approx(1.96 * math.sqrt(2) * math.sqrt(8 / 3))
    assert noise.smallest_paired_difference == pytest.approx(1.96)
    assert noise.signal_to_noise == pytest.approx(np.var([1, 2, 5], ddof=1) / (8 / 3))


def test_intervals_that_claim_half_of_the_noise_are_called_too_narrow():
    rows = [r | {"low": r["value"] - 1.96, "high": r["value"] + 1.96} for r in three()]
    assert only(rows).noise.interval_ratio == pytest.approx(math.sqrt(8 / 3))
    assert only(three()).noise.interval_ratio is None


def test_honest_intervals_have_a_ratio_of_one():
    rng = np.random.default_rng(0)
    rows = []
    for sae in range(40):
        values = rng.normal(sae, 0.3, 21).tolist()
        rows += [
            r | {"low": r["value"] - 0.588, "high": r["value"] + 0.588}
            for r in drawn(f"s{sae}", values)
        ]
    assert only(rows).noise.interval_ratio == pytest.approx(1, abs=0.05)


def test_a_mean_of_zero_has_no_coefficient_of_variation():
    rows = [*three(), *drawn("zero", (-1.0, 0.0, 1.0))]
    assert only(rows).noise.cv == pytest.approx(0.5)
    rows = [r for r in rows if r["sae"] not in ("a", "b")]
    noise = only(rows).noise
    assert noise.cv is None and "1 SAEs were drawn anew" in noise.missing["cv"]
    assert noise.sd == pytest.approx(math.sqrt(2))


def test_noise_larger_than_the_differences_between_saes_shows_as_a_signal_below_one():
    rng = np.random.default_rng(0)
    rows = [r for i in range(30) for r in drawn(f"s{i}", rng.normal(0.5, 0.1, 6).tolist())]
    ratio = only(rows).noise.signal_to_noise
    assert ratio is not None and 0.4 < ratio < 2


def test_only_what_was_drawn_anew_is_noise_and_controls_are_none_of_it():
    random = control("random", 0.0)
    rows = [*three(), random, random | {"value": 50.0, "what": "redraw"}, row("d", 90.0)]
    assert only(rows).noise._replace(signal_to_noise=0) == only(three()).noise._replace(
        signal_to_noise=0
    )
    rows = [row("a", 1.0), row("b", 2.0)]
    noise = only(rows).noise
    assert noise.n_saes == 0 and set(noise.missing.values()) >= {
        "no evaluation of a trained SAE was drawn anew"
    }


def test_what_only_rounding_moves_has_no_noise():
    rows = [
        r
        for i, sae in enumerate("abc")
        for r in drawn(sae, (0.1 * (i + 1), 0.1 * (i + 1) + 1e-16, 0.1 * (i + 1)))
    ]
    noise = only(rows).noise
    assert noise.sd == 0 and noise.signal_to_noise is None
    assert noise.missing["signal_to_noise"] == "the draws do not differ"


def test_the_noise_of_draws_of_a_quarter_of_the_tokens_is_halved():
    whole = only(three()).noise
    quarter = only([r | {"share": 0.25} for r in three()]).noise
    assert (whole.share, quarter.share) == (1.0, 0.25)
    for name in ("sd", "cv", "smallest_difference", "smallest_paired_difference"):
        assert getattr(quarter, name) == pytest.approx(getattr(whole, name) / 2)
    assert quarter.interval_ratio == pytest.approx(whole.interval_ratio)
    assert quarter.signal_to_noise == pytest.approx(whole.signal_to_noise * 4)
    noise = only([row("a", 1.0)]).noise
    assert noise.share is None and "share" in noise.missing


def test_saes_of_two_sites_are_no_pair_and_sites_are_no_signal():
    rows = [*drawn("a", (1.0, 2.0, 3.0)), *drawn("b", (101.0, 102.0, 103.0), site="9.resid_post")]
    noise = only(rows).noise
    assert noise.smallest_paired_difference is None and noise.signal_to_noise is None
    more = [row("a2", 3.0), row("b2", 103.0, site="9.resid_post")]
    assert only(rows + more).noise.signal_to_noise == pytest.approx(2)


# Training noise


def seeds(recipes: Sequence[Sequence[float]]) -> Rows:
    return [
        row(f"r{i}-s{s}", value, l0=float(i), seed=s)
        for i, values in enumerate(recipes)
        for s, value in enumerate(values)
    ]


def test_training_noise_agrees_with_analysis_of_variance():
    recipes = [(1.0, 2.0, 3.0), (4.0, 5.0, 9.0), (2.0, 2.0, 5.0)]
    found = only(seeds(recipes)).training_noise
    within = float(np.mean([np.var(values, ddof=1) for values in recipes]))
    between = float(scipy.stats.f_oneway(*recipes).statistic) * within
    assert (found.n_recipes, found.n_saes) == (3, 9)
    assert found.training_sd == pytest.approx(math.sqrt(within))
    assert found.recipe_sd == pytest.approx(math.sqrt((between - within) / 3))
    assert found.seed_share == pytest.approx(within / (within + (between - within) / 3))
    assert found.evaluation_sd is None and "evaluation_sd" in found.missing


def test_unequal_numbers_of_seeds_count_as_searle_counts_them():
    recipes = [(1.0, 3.0), (7.0, 8.0, 9.0, 12.0)]
    found = only(seeds(recipes)).training_noise
    within = (2 + 14) / 4
    n0 = 6 - (4 + 16) / 6
    mean = np.mean([*recipes[0], *recipes[1]])
    between = 2 * (2 - mean) ** 2 + 4 * (9 - mean) ** 2
    assert found.recipe_sd == pytest.approx(math.sqrt((between - within) / n0))


def test_evaluation_noise_is_taken_off_training_noise():
    # What a draw does to both alike is no difference between seeds: only the paired differences are, of variance 2.
    rows = [*drawn("s0", (10.0, 12.0, 14.0), seed=0), *drawn("s1", (12.0, 15.0, 18.0), seed=1)]
    paired = np.var([-2.0, -3.0, -4.0], ddof=1)
    found = only(rows).training_noise
    assert found.evaluation_sd == pytest.approx(math.sqrt(paired / 2))
    assert found.training_sd == pytest.approx(math.sqrt(np.var([10, 12], ddof=1) - paired / 2))
    assert found.seed_share is None
    assert found.missing["seed_share"] == "one recipe alone was trained with two seeds"


def test_known_components_of_variance_are_found():
    rng = np.random.default_rng(1)
    rows = []
    for recipe, b in enumerate(rng.normal(0, 2.0, 40)):
        for seed, u in enumerate(rng.normal(0, 1.0, 4)):
            values = (b + u + rng.normal(0, 0.5, 4)).tolist()
            rows += drawn(f"r{recipe}-{seed}", values, l0=float(recipe), seed=seed)
    found = only(rows).training_noise
    assert found.evaluation_sd == pytest.approx(0.5, rel=0.05)
    assert found.training_sd == pytest.approx(1.0, rel=0.15)
    assert found.recipe_sd == pytest.approx(2.0, rel=0.2)
    assert found.seed_share == pytest.approx(1 / (1 + 4 + 0.25), abs=0.06)


def test_one_seed_says_nothing_of_training():
    found = only([row("a", 1.0), row("b", 2.0, l0=16.0)]).training_noise
    assert found.training_sd is None
    assert found.missing["training_sd"] == "no recipe was trained with two seeds"


# Order


def verdicts_of(found: Reliability) -> dict[tuple[str, str], str]:
    return {(k.better, k.worse): k.verdict for k in found.order.kinds if k.verdict != "not tested"}


IN_ORDER = [
    row("a", 0.8),
    row("b", 0.7, family="relu"),
    control("frozen_decoder", 0.4),
    control("random", 0.3),
    control("permuted_decoder", 0.1),
    oracle(1.0),
    oracle(0.9, "mixed", 0.25),
    oracle(0.85, "mixed", 0.5),
    oracle(0.95, "dropped", 0.25),
]


def turned(rows: Rows) -> Rows:
    return [r | {"value": -r["value"]} for r in rows]


def test_a_metric_that_ranks_as_it_must_passes_the_order_test():
    found = only(IN_ORDER)
    assert found.order.passes is True and found.warnings == ()
    assert set(verdicts_of(found).values()) == {"holds"}
    assert {(k.better, k.worse): (k.right, k.pairs) for k in found.order.kinds} == {
        ("oracle", "trained"): (2, 2),
        ("oracle", "degraded oracle"): (3, 3),
        ("degraded oracle", "more degraded"): (1, 1),
        ("trained", "frozen_decoder"): (2, 2),
        ("trained", "random"): (2, 2),
        ("trained", "permuted_decoder"): (2, 2),
    }
    down = [r | {"best": "min"} for r in turned(IN_ORDER)]
    assert only(down).order == found.order


def test_a_metric_with_its_order_reversed_is_caught():
    found = only(turned(IN_ORDER))
    assert found.order.passes is False and found.badge == "⚠"
    (warning,) = found.warnings
    assert "random no worse than trained in 2 of 2 pairs" in warning
    assert set(verdicts_of(found).values()) == {"fails"}


def test_equal_is_not_in_order():
    found = only([row("a", 0.5), control("random", 0.5)])
    assert verdicts_of(found) == {("trained", "random"): "fails"}


@pytest.mark.parametrize(("wrong", "verdict"), [(1, "holds"), (2, "fails")])
def test_nine_pairs_of_ten_must_be_in_order(wrong, verdict):
    rows = [row(f"s{i}", 0.1 if i < wrong else 0.9) for i in range(10)]
    assert verdicts_of(only([*rows, control("random", 0.5)])) == {("trained", "random"): verdict}


def test_only_what_stands_at_one_place_is_a_pair():
    rows = [row("a", 0.2, l0=8.0), row("b", 0.9, l0=64.0)]
    elsewhere = [
        control("random", 0.5, l0=64.0),
        control("random", 0.99, l0=8.0, site="2.resid_post"),
        control("random", 0.99, l0=8.0, width=128),
    ]
    assert verdicts_of(only(rows + elsewhere)) == {("trained", "random"): "holds"}
    without = control("random", 0.5, l0=NAN)
    (kind,) = (k for k in only([*rows, without]).order.kinds if k.worse == "random")
    assert (kind.right, kind.pairs) == (1, 2)


def test_an_oracle_is_not_compared_with_saes_of_more_active_latents():
    saes = [row("sparse", 0.5), row("dense", 2.0), oracle(1.0)]
    l0 = {"sparse": 5.0, "dense": 9.0, saes[-1]["sae"]: 6.0}
    counted = [s | {"metric": "l0", "best": "", "value": l0[s["sae"]]} for s in saes]

    def pairs(rows: Rows) -> tuple[int, int]:
        found = next(m for m in made(rows).metrics if m.metric == "m")
        kind = next(k for k in found.order.kinds if (k.better, k.worse) == ("oracle", "trained"))
        return kind.right, kind.pairs

    assert pairs([*saes, *counted]) == (1, 1)
    assert pairs(saes) == (1, 2)  # where nobody knows


def test_a_trained_oracle_is_no_oracle_and_nothing_is_tested_without_controls():
    found = only([row("a", 0.5), row("b", 0.9)])
    assert found.order.passes is None and "passes" in found.order.missing
    assert found.badge == ""


def test_a_metric_without_a_direction_is_not_ranked():
    found = only([r | {"best": None} for r in turned(IN_ORDER)])
    assert found.order.passes is None and found.order.kinds == ()
    assert found.badge == "" and found.best is None


def test_only_the_suite_itself_is_put_in_order():
    worse = [r | {"what": "tokens", "setting": "64"} for r in turned(IN_ORDER)]
    assert only([*IN_ORDER, *worse]).order.passes is True


# Progress


def curve(sae: str, tokens: Sequence[float], values: Sequence[float], **fields: Any) -> Rows:
    found = [
        row(f"{sae}@{t}", v, what="snapshot", tokens=t, **fields)
        for t, v in zip(tokens, values, strict=True)
    ]
    return [*found[:-1], row(sae, values[-1], tokens=tokens[-1], **fields)]


def test_progress_is_spearmans_correlation_with_tokens():
    tokens, values = [1, 2, 4, 8, 16], [0.1, 0.3, 0.2, 0.5, 0.4]
    found = only(curve("a", tokens, values)).progress
    assert found.median == pytest.approx(scipy.stats.spearmanr(tokens, values).statistic)
    assert (found.n_curves, found.rising) == (1, 0)


def test_progress_is_the_median_over_families_and_counts_those_that_rise():
    t = [1, 2, 3, 4]
    rows = [
        *curve("a", t, [1, 2, 3, 4]),
        *curve("b", t, [1, 2, 3, 4], family="relu"),
        *curve("c", t, [4, 3, 2, 1], l0=16.0),
        *curve("d", t, [1, 1, 1, 1], seed=1),
    ]
    found = only(rows).progress
    assert (found.n_curves, found.median, found.rising) == (4, 0.5, 2)
    down = only([r | {"best": "min"} for r in turned(rows)]).progress
    assert down == found


def test_controls_make_no_progress():
    found = only(curve("a", [1, 2, 3, 4], [4, 3, 2, 1], kind="control", family="frozen_decoder"))
    assert found.progress.n_curves == 0


def test_two_points_are_no_progress():
    found = only(curve("a", [1, 2], [0.1, 0.2])).progress
    assert found.median is None and "3 points" in found.missing["median"]


# Truth


def panel_rows(metric: str, values: Sequence[float], **fields: Any) -> Rows:
    """Ten recipes with as many seeds as it takes, at two L0."""
    return [
        row(
            f"s{i}",
            float(value),
            family=f"f{i % 5}",
            l0=float(8 + i % 2),
            seed=i // 10,
            metric=metric,
            **fields,
        )
        for i, value in enumerate(values)
    ]


def known(metric: Sequence[float], f1: Sequence[float], mcc: Sequence[float]) -> Rows:
    truth = [("f1", f1), ("mcc", mcc)]
    rows = [r for name, values in truth for r in panel_rows(name, values, eval="ground_truth")]
    return [*panel_rows("m", metric), *rows]


def features(n: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """F1 and MCC of recipes, and of their seeds, and noise to add."""
    rng = np.random.default_rng(3)
    recipes = rng.uniform(0.2, 0.9, 10)[np.arange(n) % 10]
    f1 = recipes + 0.02 * rng.standard_normal(n)
    return f1, f1 + 0.05 * rng.standard_normal(n), rng.standard_normal(n)


def test_truth_is_spearmans_correlation_overall_and_within_l0():
    f1, mcc, noise = features()
    metric = f1 + 0.2 * noise
    found = only(known(metric, f1, mcc)).truth
    assert found.panel == "toy" and found.n_saes == 40
    for truth, overall, within in (
        (f1, found.f1, found.f1_within_l0),
        (mcc, found.mcc, found.mcc_within_l0),
    ):
        assert overall is not None and within is not None
        assert overall.value == pytest.approx(scipy.stats.spearmanr(metric, truth).statistic)
        each = [scipy.stats.spearmanr(metric[i::2], truth[i::2]).statistic for i in (0, 1)]
        assert within.value == pytest.approx(np.mean(each))
        assert within.low < within.value < within.high


def test_the_interval_of_truth_is_that_of_a_bootstrap_of_recipes():
    f1, mcc, noise = features()
    metric = np.round(f1 + 0.3 * noise, 1)  # with ties
    found = only(known(metric, f1, mcc)).truth.f1
    assert found is not None
    rng = np.random.default_rng(8)
    draws = []
    for _ in range(1000):
        chosen = np.concatenate([np.arange(r, 40, 10) for r in rng.integers(10, size=10)])
        draws.append(scipy.stats.spearmanr(metric[chosen], f1[chosen]).statistic)
    # Ten recipes: the ends lie further out than percentiles, by t_9 and sqrt(10 / 9).
    tail = scipy.stats.norm.cdf(-math.sqrt(10 / 9) * scipy.stats.t.ppf(0.975, 9))
    low, high = np.quantile(draws, [tail, 1 - tail])
    assert found.low == pytest.approx(low, abs=0.06)
    assert found.high == pytest.approx(high, abs=0.03)


def test_a_metric_that_agrees_with_known_features_passes_and_earns_its_badge():
    f1, mcc, noise = features()
    rows = [
        *known(f1 + 0.05 * noise, f1, mcc),
        *(control("random", -9.0, l0=x) for x in (8.0, 9.0)),
    ]
    found = only(rows)
    assert found.truth.passes is True and found.order.passes is True
    assert found.badge == "✓" and found.warnings == ()


@pytest.mark.parametrize("sign", [-1, 0])
def test_a_metric_that_falls_with_truth_or_knows_nothing_of_it_is_caught(sign):
    f1, mcc, noise = features()
    found = only(known(sign * f1 + 0.05 * noise, f1, mcc))
    assert found.truth.passes is False and found.badge == "⚠"
    assert found.warnings[0].startswith("fails the truth test (rank correlation ")
    assert found.warnings[0].endswith(" with MCC on toy)")


def test_a_metric_that_rises_with_one_truth_and_falls_with_the_other_fails():
    f1, _, _ = features()
    truth = only(known(f1, f1, -f1)).truth
    assert truth.f1 is not None and truth.f1.low > 0
    assert truth.mcc is not None and truth.mcc.high < 0
    assert truth.passes is False


def test_a_metric_that_is_better_when_small_is_turned_round_before_it_is_compared():
    f1, mcc, noise = features()
    rows = known(-f1 + 0.05 * noise, f1, mcc)
    rows = [r | {"best": "min"} if r["metric"] == "m" else r for r in rows]
    assert only(rows).truth.passes is True


def test_twenty_nine_saes_are_too_few():
    f1, mcc, _ = features(29)
    truth = only(known(f1, f1, mcc)).truth
    assert truth.passes is None and truth.n_saes == 29
    assert truth.missing["f1"] == "29 trained SAEs of toy have it; 30 are needed"


def test_truth_may_come_from_the_audit_of_another_suite():
    f1, mcc, noise = features()
    panel = known(f1 + 0.05 * noise, f1, mcc)
    mine = [row("x", 0.5), control("random", 0.1)]
    found = only(mine, panel)
    assert found.truth.passes is True and found.truth.panel == "known" and found.badge == "✓"
    # Probes have other datasets there; another version is another metric.
    assert only([r | {"params": '{"k":2}'} for r in mine], panel).truth.passes is True
    assert only([r | {"version": 2} for r in mine], panel).truth.n_saes == 0
    assert only(mine).truth.missing["passes"] == "no panel with known features was audited"


def test_truth_is_not_judged_by_itself_and_must_be_there_once():
    f1, mcc, _ = features()
    rows = known(f1, f1, mcc)
    own = [m for m in made(rows).metrics if m.eval == "ground_truth"]
    assert [m.truth.missing["passes"] for m in own] == ["it is truth itself"] * 2
    with pytest.raises(UserError, match="has f1 of ground_truth in 0 ways"):
        only([row("x", 0.5)], [row("x", 0.5)])


def test_a_metric_that_is_the_same_for_all_saes_has_no_correlation():
    f1, mcc, _ = features()
    truth = only(known(np.ones(40), f1, mcc)).truth
    assert truth.f1 is None and truth.missing["f1"] == "all SAEs have the same value"
    assert truth.passes is None


# Invariance


def changed(what: str, values: dict[str, float], setting: str = "x", **fields: Any) -> Rows:
    return [row(sae, v, what=what, setting=setting, **fields) for sae, v in values.items()]


def test_the_largest_move_is_told_in_sd_of_noise():
    rows = [*three(), *changed("tokens", {"a": 1.5, "b": -1.0, "c": 5.0}, "64")]
    tokens = only(rows).invariance.tokens
    assert tokens is not None and tokens.missing == {}
    assert (tokens.setting, tokens.n_saes, tokens.largest) == ("64", 3, 3.0)
    assert tokens.in_noise == pytest.approx(3 / math.sqrt(8 / 3))


def test_without_redraws_moves_are_told_in_what_intervals_imply():
    ends = {"low": 0.0, "high": 1.96}
    rows = [row("a", 1.0, **ends), *changed("dtype", {"a": 2.0})]
    dtype = only(rows).invariance.dtype
    assert dtype is not None and dtype.in_noise == pytest.approx(2)
    dtype = only([row("a", 1.0), *changed("dtype", {"a": 2.0})]).invariance.dtype
    assert dtype is not None and dtype.in_noise is None and "in_noise" in dtype.missing


@pytest.mark.parametrize(("moved", "mark"), [(0.9e-6, ""), (1.2e-6, "depends on the batch size")])
def test_another_batch_may_move_a_value_by_a_millionth_of_it(moved, mark):
    rows = [row("a", 5.0), *changed("batch", {"a": 5.0 * (1 + moved)})]
    found = only(rows)
    assert found.invariance.batch is not None and found.invariance.batch.mark == mark
    assert found.warnings == ()


@pytest.mark.parametrize(("moved", "passes"), [(0.0009, True), (0.0011, False)])
def test_a_metric_with_ends_must_not_move_with_the_unit(moved, passes):
    base = [row("a", 0.0, ends=True), row("b", 1.0, ends=True)]
    rows = [*base, *changed("unit", {"a": moved, "b": 1.0}, "x10+3", ends=True)]
    found = only(rows)
    assert found.invariance.passes is passes and found.badge == ("" if passes else "⚠")
    if not passes:
        assert found.warnings == ("fails the unit test (moves by 0.0011 at x10+3)",)


def test_a_metric_without_ends_that_moves_with_the_unit_is_marked_and_does_not_fail():
    rows = [row("a", 1.0), row("b", 2.0), *changed("unit", {"a": 100.0, "b": 200.0})]
    found = only(rows)
    assert found.invariance.unit is not None
    assert found.invariance.unit.mark == "depends on the unit of activations"
    assert found.invariance.passes is None and found.badge == ""


def test_a_metric_that_moves_with_the_unit_loses_the_badge_of_order_and_truth():
    f1, mcc, noise = features()
    rows = [
        *known(f1 + 0.05 * noise, f1, mcc),
        *(control("random", -9.0, l0=x) for x in (8.0, 9.0)),
    ]
    rows = [r | {"ends": True} for r in rows]
    rows += [row("s0", 9.0, family="f0", what="unit", setting="x10+3", ends=True)]
    found = only(rows)
    assert found.truth.passes and found.order.passes and found.badge == "⚠"


# Cost


def test_cost_is_that_of_the_eval_and_no_metric_of_its_own():
    price = {"what": "cost", "seconds": 2.0, "bytes": 100.0}
    rows = [row("a", 1.0), row("a", 2.0, metric="n"), row("a", NAN, **price)]
    rows += [
        row("a", NAN, metric="n", **price),
        row("b", NAN, metric="n", **(price | {"bytes": 7.0})),
    ]
    card = made([*rows, row("a", 1.0, eval="other")])
    assert [(m.metric, m.eval) for m in card.metrics] == [
        ("m", "core"),
        ("n", "core"),
        ("m", "other"),
    ]
    assert [m.cost[:3] for m in card.metrics] == [(2, 2.0, 100.0)] * 2 + [(0, None, None)]


# The table and the file


def whole() -> Card:
    """With everything measured of one metric, and little of another."""
    f1, mcc, noise = features()
    rows = [
        *known(f1 + 0.05 * noise, f1, mcc),
        *IN_ORDER,
        *three(),
        row("x", 1.0, metric="shrinkage"),
    ]
    rows = [r for i, r in enumerate(rows) if r not in rows[:i]]
    rows = [r for r in rows if (r["sae"], r["value"]) not in (("a", 0.8), ("b", 0.7))]
    rows += curve("z", [1, 2, 3], [0.1, 0.2, 0.3], family="gated")
    for what in WHATS:
        rows += changed(what, {"a": 1.0, "b": 2.5})
    return made([*rows, row("a", NAN, what="cost", seconds=1.5, bytes=2.0**20)])


def test_a_card_reads_back_as_it_was_written(tmp_path):
    card = whole()
    path = tmp_path / "audit.json"
    path.write_text(as_json(card), encoding="utf-8")
    assert read_card(path) == card


def test_every_number_that_is_not_there_has_its_reason():
    lenses = [lens for m in whole().metrics for lens in m if hasattr(lens, "missing")]
    assert len(lenses) == 7 * len(whole().metrics)
    for lens in lenses:
        empty = {k for k, v in lens._asdict().items() if v is None and k != "panel"}
        assert empty == lens.missing.keys() and all(lens.missing.values())


def test_the_table_reads_back_from_csv_with_the_same_card(tmp_path):
    rows = [
        r | {"best": r["best"] or None} for r in [*IN_ORDER, row("c", 2.0, metric="n", best=None)]
    ]
    rows += [row("a", NAN, what="cost", seconds=1.0, bytes=5.0)]
    frame = pd.DataFrame(rows)
    frame.to_csv(tmp_path / "audit.csv", index=False)
    again = read_measured(tmp_path / "audit.csv")
    assert card_of("toy", again, None) == card_of("toy", frame, None)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda c: c | {"schema": 2}, "has the schema 2; expected 1"),
        (lambda c: c | {"more": 1}, "it.more is 1: Extra inputs are not permitted"),
        (lambda c: {k: v for k, v in c.items() if k != "suite"}, "it.suite: Field required"),
        (lambda c: c | {"suite": 3}, "it.suite is 3: Input should be a valid string"),
        (
            lambda c: c | {"metrics": [1]},
            "it.metrics.0 is 1: Input should be an array or an object",
        ),
        (
            lambda c: c["metrics"][0].update(badge="?") or c,
            "badge is '[?]': Input should be '✓', '⚠' or ''",
        ),
        (lambda c: c["metrics"][0]["noise"].update(missing={}) or c, "missing names other fields"),
        (
            lambda c: c["metrics"][0].update(params="[]") or c,
            "it.metrics.0.params is no JSON object",
        ),
        (lambda c: [c], "has the schema None"),
    ],
)
def test_a_damaged_card_is_refused_with_what_to_do(tmp_path, damage, says):
    content = json.loads(as_json(made([row("a", 1.0)])))
    path = tmp_path / "audit.json"
    path.write_text(json.dumps(damage(content)), encoding="utf-8")
    with pytest.raises(UserError, match=says) as refused:
        read_card(path)
    assert str(path) in str(refused.value) and "saebench audit" in str(refused.value)


@pytest.mark.parametrize("text", ["", "{", '{"schema": 1, "schema": 1}', '{"schema": NaN}'])
def test_what_is_no_json_is_refused(tmp_path, text):
    path = tmp_path / "audit.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="cannot be read"):
        read_card(path)


def test_a_table_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="it lacks amount"):
        made([{k: v for k, v in row("a", 1.0).items() if k != "amount"}])
    with pytest.raises(UserError, match="no finite value of m of a"):
        made([row("a", NAN)])
    with pytest.raises(UserError, match="has m of a twice for base"):
        made([row("a", 1.0), row("a", 2.0)])
    with pytest.raises(UserError, match="cannot be read"):
        read_measured(tmp_path / "audit.csv")


# Badges


def verdict(suite: str, badge: str, *warnings: str, **fields: Any) -> Verdict:
    plain: dict[str, Any] = {"metric": "m", "eval": "core", "version": 1, "params": "{}"}
    return Verdict(**(plain | fields), suite=suite, badge=badge, warnings=warnings)  # type: ignore[arg-type]


def test_a_failure_anywhere_is_a_failure():
    found = [verdict("a", "✓"), verdict("b", "⚠", "fails x"), verdict("c", "")]
    assert strongest(found) == (found[1],)
    assert strongest(found[::2]) == (found[0],)
    assert strongest(found[2:]) == ()
    remarked = remarks(found, "m", "core", 1, "")
    assert remarked == ("⚠", ("fails x in the audit of b",))


def test_a_badge_is_of_one_version_and_a_pass_of_its_own_parameters():
    passed = [verdict("a", "✓", params='{"k":[1,2],"datasets":"x"}')]
    assert remarks(passed, "m", "core", 1, "datasets=x, k=[1, 2]").badge == "✓"
    assert remarks(passed, "m", "core", 1, "datasets=y, k=[1, 2]").badge == ""
    assert remarks(passed, "m", "core", 2, "datasets=x, k=[1, 2]").badge == ""
    failed = [verdict("a", "⚠", "fails x", params='{"k":2}')]
    assert remarks(failed, "m", "core", 1, "k=3").warnings == (
        "fails x in the audit of a, with other parameters",
    )
    assert remarks(failed, "m", "core", 2, "k=2").badge == ""


def test_parameters_are_written_as_results_write_them():
    assert written_out({"b": [1, 2], "a": None}) == "a=None, b=[1, 2]"


def test_a_folders_own_audit_stands_for_what_is_shipped_of_its_suite(tmp_path, monkeypatch):
    shipped = Verdicts(1, (verdict("toy", "⚠", "old"), verdict("else", "⚠", "fails y")))
    file = tmp_path / "shipped.json"
    file.write_text(as_json(shipped), encoding="utf-8")
    monkeypatch.setattr(files, "SHIPPED", file)
    assert applying(tmp_path) == shipped.verdicts
    card = made([row("a", 1.0)])
    (tmp_path / "audit.json").write_text(as_json(card), encoding="utf-8")
    found = applying(tmp_path)
    assert [(v.suite, v.badge) for v in found] == [("toy", ""), ("else", "⚠")]


def _tool() -> Any:
    spec = importlib.util.spec_from_file_location("tool", ROOT / "tools/reliability.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_shipped_is_what_the_audits_in_results_say():
    assert files.SHIPPED.read_text(encoding="utf-8") == _tool().made(ROOT / "results")


def test_the_tool_gathers_what_audits_found(tmp_path):
    for suite, rows in (("one", turned(IN_ORDER)), ("two", IN_ORDER)):
        (tmp_path / suite).mkdir()
        card = made(rows)._replace(suite=suite)
        (tmp_path / suite / "audit.json").write_text(as_json(card), encoding="utf-8")
    (tmp_path / "shipped.json").write_text(_tool().made(tmp_path), encoding="utf-8")
    (found,) = read_verdicts(tmp_path / "shipped.json")
    assert (found.suite, found.badge, found.metric) == ("one", "⚠", "m")


def test_a_card_is_made_without_torch():
    code = "import sys, saebench.reports._card, saebench.reliability.files; print('torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"
