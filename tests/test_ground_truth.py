"""Worlds small enough to know by heart: what is found in them, and what is not.

That every metric is what plain NumPy says, and feels neither batches nor the order of latents, is in test_laws.
"""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from saebench import matching, sparse, stats
from saebench.evals.ground_truth import GroundTruth
from saebench.types import Facts, Omitted, Score, Seen, Site, Skip, Truth
from tests import toys

SITE = Site("toy", 0)


def truth_of(directions, parents=None, depths=None):
    n, d = directions.shape
    free = [-1] * n
    return Truth(
        torch.nn.functional.normalize(directions, dim=-1),
        torch.zeros(d),
        torch.ones(n),
        torch.tensor(parents or free),
        torch.tensor(depths or free),
    )


def facts_of(truth, target=SITE):
    d = 1 if truth is None else truth.directions.shape[1]
    return Facts(SITE, target, 1, 1, torch.zeros(d, dtype=torch.float64), truth)


def sae_of(W_dec):
    """Its code is given by the test."""
    sae = toys.Fixed(None)
    sae.W_dec = W_dec
    return sae


def tally_of(W_dec, z, truth, a, groups=1):
    """After z [n d_sae] and a [n n_features], some tokens at a time."""
    tally = GroundTruth().start(sae_of(W_dec), facts_of(truth))
    for some, features in zip(z.chunk(groups), a.chunk(groups), strict=True):
        x = features @ truth.directions
        batch = SimpleNamespace(x=x, features=sparse.from_dense(features))
        tally.update(Seen(batch, sparse.from_dense(some), x, None))
    return tally


def scores(*world, **how):
    return {s.metric: s for s in tally_of(*world, **how).scores() if isinstance(s, Score)}


def omitted(*world):
    return {s.what: s.reason for s in tally_of(*world).scores() if isinstance(s, Omitted)}


def values(*world, **how):
    return {name: stats.value(s.num, s.den, "ratio") for name, s in scores(*world, **how).items()}


PARENTS = [-1, -1, 0, 0, 1, 2, -1, -1]
DEPTHS = [0, 0, 1, 1, 1, 2, -1, -1]


def forest(n=400, d=16, seed=0):
    """Two trees and two free features, in superposition enough to overlap."""
    generator = torch.Generator().manual_seed(seed)
    a = 1 + torch.rand(n, len(PARENTS), generator=generator)
    a *= torch.rand(n, len(PARENTS), generator=generator) < torch.linspace(0.8, 0.4, len(PARENTS))
    for child, parent in enumerate(PARENTS):
        a[:, child] *= (a[:, parent] > 0) if parent >= 0 else 1
    return truth_of(torch.randn(len(PARENTS), d, generator=generator), PARENTS, DEPTHS), a


IDEAL = {
    "absorption": 0,
    "parent_miss": 0,
    "absorption_excess": 0,
    "magnitude_error": 0,
    "hedging": None,
}
"""Of an SAE that is the truth; whatever is not named here is 1."""


def test_the_true_dictionary_with_its_own_code_is_perfect():
    truth, a = forest()
    found, kept = values(truth.directions, a, truth, a), scores(truth.directions, a, truth, a)
    assert found.keys() == {metric.name for metric in GroundTruth.metrics}
    for name, value in found.items():
        if (expected := IDEAL.get(name, 1)) is not None:
            assert value == pytest.approx(expected, abs=1e-6), name
    assert found["hedging"] == pytest.approx(kept["hedging"].reference)
    assert 0 < kept["mcc"].reference < 0.8


def test_features_that_an_sae_has_no_room_for_are_not_recalled_but_cost_no_mcc():
    truth, a = forest()
    found = values(truth.directions[:3], a[:, :3], truth, a)
    assert found["mcc"] == pytest.approx(1) == found["f1"] == found["uniqueness"]
    assert found["feature_recall_07"] == found["feature_recall_09"] == 3 / 8
    share = (a[:, :3] > 0).sum() / (a > 0).sum()
    assert found["feature_recall_07_weighted"] == pytest.approx(float(share))


@pytest.mark.parametrize("scale", [torch.linspace(0.01, 50, 8), -torch.ones(8)])
def test_the_length_and_sign_of_a_decoder_row_do_not_matter_where_its_code_makes_up_for_them(scale):
    truth, a = forest()
    noisy = truth.directions + 0.1 * torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    z = 0.9 * a
    z[::3] = 0
    before = values(noisy, z, truth, a)
    after = values(scale[:, None] * noisy, z / scale, truth, a)
    assert after == pytest.approx(before, rel=1e-5)
    assert before["magnitude_ratio"] < 0.95 and before["f1"] < 1


@pytest.mark.parametrize("groups", [2, 7, 400])
def test_batches_do_not_matter(groups):
    """Of single tokens too, some of which have no feature, no latent or neither."""
    truth, a = forest()
    z = a.roll(1, 0) * 0.7 + a * (torch.arange(400) % 3 == 0)[:, None]
    z[:50], a[25:75] = 0, 0
    whole = values(truth.directions, z, truth, a)
    assert values(truth.directions, z, truth, a, groups=groups) == pytest.approx(whole, rel=1e-12)
    assert 0.1 < whole["f1"] < 0.9 and 0 < whole["absorption"] < 1
    assert scores(truth.directions, z, truth, a, groups=groups)["f1"].n == 400


def test_the_order_of_latents_does_not_matter():
    truth, a = forest()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    z = a.roll(1, 0)
    found = values(truth.directions[order], z[:, order], truth, a)
    assert found == pytest.approx(values(truth.directions, z, truth, a), rel=1e-12)


def test_the_numbers_of_features_do_not_matter():
    """Backwards, a root is the last of a token, next to the first feature of the next one."""
    truth, a = forest()
    z = a.roll(1, 0)
    parents = [7 - p if p >= 0 else -1 for p in reversed(PARENTS)]
    backwards = truth_of(truth.directions.flip(0), parents, DEPTHS[::-1])
    found = values(truth.directions, z, backwards, a.flip(1))
    assert found == pytest.approx(values(truth.directions, z, truth, a), rel=1e-6)


def test_a_latent_that_is_never_active_counts_as_zero_and_is_not_live():
    truth, a = forest()
    z = a.clone()
    z[:, [0, 6]] = 0
    found = scores(truth.directions, z, truth, a)
    assert found["f1"].num.tolist() == [0, 1, 1, 1, 1, 1, 0, 1]
    assert found["f1_live"].den.tolist() == [0, 1, 1, 1, 1, 1, 0, 1]
    means = {name: stats.value(s.num, s.den, "ratio") for name, s in found.items()}
    assert means["f1"] == means["precision"] == means["recall"] == 6 / 8
    assert means["f1_live"] == 1 == means["f1_depth_0"] == means["f1_free"]
    counts = (a > 0).sum(0)
    lost = (counts[0] + counts[6]) / counts.sum()
    assert means["f1_weighted"] == pytest.approx(1 - float(lost))


def test_a_latent_with_a_negative_value_is_active():
    truth = truth_of(torch.eye(2))
    a = torch.tensor([[1.0, 0], [2, 0], [0, 3]])
    found = values(-torch.eye(2), -a, truth, a)
    assert found["f1"] == 1 == found["magnitude_ratio"] and found["magnitude_error"] == 0


def test_precision_recall_and_f1_of_a_few_tokens():
    """Latent 0 is of feature 0: active on tokens 0, 1, 2, 5; its feature on 1, 2, 3. Latent 1 is always active."""
    truth = truth_of(torch.eye(2))
    a = torch.tensor([[0, 0], [1, 0], [1, 0], [1, 0], [0, 2], [0, 0]]).float()
    z = torch.tensor([[1, 1], [2, 1], [3, 1], [0, 1], [0, 1], [1, 1]]).float()
    found = scores(torch.eye(2), z, truth, a)
    assert found["precision"].num.tolist() == pytest.approx([2 / 4, 1 / 6])
    assert found["recall"].num.tolist() == pytest.approx([2 / 3, 1])
    assert found["f1"].num.tolist() == pytest.approx([4 / 7, 2 / 7])
    # Given back: 2 and 3 of 1 and 1, and 1 of 2.
    assert found["magnitude_ratio"].num.tolist() == [5, 1]
    assert found["magnitude_ratio"].den.tolist() == [2, 2]
    assert found["magnitude_error"].num.tolist() == [3, 1]


def test_f1_by_depth_and_rarity_of_what_latents_are_of():
    """Six features of one chain and one free one; feature j is active on the first 10, 8, 6, 4, 2 and 1 tokens."""
    counts = [10, 8, 6, 4, 2, 1]
    truth = truth_of(torch.eye(6), [-1, 0, 1, 2, -1, -1], [0, 1, 2, 3, -1, -1])
    a = (torch.arange(10)[:, None] < torch.tensor(counts)).float()
    # Two latents of feature 0, and one of each other but the last; each is active on the first token alone.
    W_dec, z = torch.eye(6)[[0, 0, 1, 2, 3, 4, 5]], torch.zeros(10, 7)
    z[0, :6] = 1
    found = values(W_dec, z, truth, a)
    f1 = [2 / (1 + count) for count in counts]
    assert found["f1_depth_0"] == pytest.approx(f1[0])
    assert found["f1_depth_1"] == pytest.approx(f1[1])
    assert found["f1_depth_2"] == pytest.approx((f1[2] + f1[3]) / 2)
    assert found["f1_free"] == pytest.approx(f1[4])  # 5 has no active latent
    # Quartiles of 10, 8, 6, 4, 2 are 4 and 8, which belong to their quarters.
    assert found["f1_rare"] == pytest.approx((f1[3] + f1[4]) / 2)
    assert found["f1_frequent"] == pytest.approx((2 * f1[0] + f1[1]) / 3)


def test_a_soft_threshold_shrinks_magnitudes_by_what_it_takes():
    truth, a = forest()
    found = values(truth.directions, (a - 0.25).relu(), truth, a)
    on = (a > 0).sum()
    assert found["magnitude_ratio"] == pytest.approx(float(1 - 0.25 * on / a.sum()), rel=1e-5)
    assert found["magnitude_error"] == pytest.approx(float(0.25 * on / a.sum()), rel=1e-5)


# Hierarchy


FAMILY = truth_of(torch.eye(6), [-1, 0, 0, -1, 3, -1], [0, 1, 1, 0, 1, -1])
"""0 has the children 1 and 2, and 3 has the child 4."""


def absorbed():
    """Ten tokens, and what the latents of 0 and 3 do on them."""
    a, z = torch.zeros(10, 6), torch.zeros(10, 6)
    a[:8, 0] = 1  # the parent is active on 0 to 7,
    a[0:3, 1] = 1  # with child 1 on 0, 1, 2
    a[3:5, 2] = 1  # with child 2 on 3, 4; alone on 5, 6, 7
    z[[2, 5, 6, 8], 0] = 1  # its latent: silent on 0, 1; on 3, 4; and on 7
    a[6:10, 3] = 1
    a[6:10, 4] = 1  # never without its child
    z[6:9, 3] = 1  # silent on 9
    return a, z


def test_absorption_of_a_few_tokens():
    a, z = absorbed()
    found = scores(torch.eye(6), z, FAMILY, a)
    absorption, miss, excess = (
        found[name] for name in ("absorption", "parent_miss", "absorption_excess")
    )
    assert absorption.ids == ["1", "2", "4"] and absorption.clusters == ["0", "0", "3"]
    assert absorption.num.tolist() == [2, 2, 1] and absorption.den.tolist() == [3, 2, 4]
    assert miss.ids == ["0"] and miss.num.tolist() == [1] and miss.den.tolist() == [3]
    # Of 3 and 2 tokens a third would have been missed anyway; about feature 3 nothing can be said.
    assert excess.ids == ["1", "2"] and excess.den.tolist() == [3, 2]
    assert excess.num.tolist() == pytest.approx([2 - 3 / 3, 2 - 2 / 3])
    assert absorption.n == 9 and miss.n == 3 and excess.n == 5


def test_a_latent_that_misses_its_feature_at_random_absorbs_nothing():
    truth, a = forest(n=20_000)
    z = a * (torch.rand(a.shape, generator=torch.Generator().manual_seed(5)) < 0.7)
    found = values(truth.directions, z, truth, a)
    assert found["absorption"] == pytest.approx(0.3, abs=0.01)
    assert found["parent_miss"] == pytest.approx(0.3, abs=0.02)
    assert found["absorption_excess"] == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize(("angle", "counts"), [(45.6, False), (44.4, True)])
def test_a_parent_counts_if_half_of_its_latent_is_its_own(angle, counts):
    """|cos| >= 0.7, the rest being in a direction of nobody."""
    a, z = absorbed()
    W_dec, directions = torch.eye(7), torch.eye(7)[:6]
    turn = torch.tensor(angle).deg2rad()
    W_dec[0, 0], W_dec[0, 6] = turn.cos(), turn.sin()
    truth = truth_of(directions, FAMILY.parents.tolist(), FAMILY.depths.tolist())
    found = scores(W_dec[:6], z, truth, a)
    assert found["absorption"].ids == (["1", "2", "4"] if counts else ["4"])
    assert (found["magnitude_ratio"].den[0] > 0) == counts


def test_a_latent_of_a_child_is_not_its_parents_even_where_it_has_most_of_it():
    """Both are in one latent, a little more of the child: nobody can say that the parent's latent is silent."""
    a, z = absorbed()
    W_dec = torch.eye(6)
    W_dec[0] = torch.tensor([1, 1.01, 0, 0, 0, 0])
    assert scores(W_dec, z, FAMILY, a)["absorption"].ids == ["4"]


def test_hedging_is_how_much_of_its_family_is_in_a_latent():
    """Latent 0 has its child in it, latent 2 its sibling, latent 3 a stranger; 4 is silent and 5 has no family."""
    a, z = absorbed()
    z[0, [2, 3]] = 1
    W_dec = torch.eye(6)
    W_dec[0, 1], W_dec[2, 1], W_dec[3, 5], W_dec[4, 3], W_dec[5, 0] = 0.5, 0.75, 0.6, 0.9, 0.9
    found = scores(W_dec, z, FAMILY, a)["hedging"]
    assert found.num.tolist() == pytest.approx([0.5 / 1.25**0.5, 0, 0.6, 0, 0, 0])
    assert found.den.tolist() == [1, 0, 1, 1, 0, 0] and found.reference == 0
    z[0, 4] = 1
    found = scores(W_dec, z, FAMILY, a)["hedging"]
    assert found.num[4] == pytest.approx(0.9 / 1.81**0.5) and found.den[4] == 1  # its parent


# Chance


def test_an_sae_of_random_directions_is_near_its_chance():
    generator = torch.Generator().manual_seed(9)
    truth = truth_of(torch.randn(500, 32, generator=generator))
    a = (torch.rand(600, 500, generator=generator) < 0.05).float()
    W_dec = torch.randn(200, 32, generator=generator)
    z = (torch.rand(600, 200, generator=generator) < 0.05).float()
    found, kept = values(W_dec, z, truth, a), scores(W_dec, z, truth, a)
    assert found["mcc"] == pytest.approx(kept["mcc"].reference, abs=0.01) and found["mcc"] > 0.4
    assert found["mcc_above_chance"] == pytest.approx(0, abs=0.02)
    assert found["uniqueness"] == pytest.approx(kept["uniqueness"].reference, abs=0.06)
    assert found["f1"] == pytest.approx(0.05, abs=0.01)  # two independent coins of 5 %
    assert found["feature_recall_09"] == 0


def test_the_reference_of_uniqueness_is_what_picking_at_random_gives():
    truth = truth_of(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)))
    rng = np.random.default_rng(0)
    drawn = np.mean([len(set(rng.integers(50, size=30))) / 30 for _ in range(4000)])
    W_dec, z = torch.randn(30, 8, generator=torch.Generator().manual_seed(1)), torch.ones(2, 30)
    found = scores(W_dec, z, truth, torch.ones(2, 50))["uniqueness"]
    assert found.reference == pytest.approx(drawn, abs=0.003)


def test_dictionaries_rank_by_how_much_of_the_truth_is_in_them():
    truth, a = forest()
    noise = torch.randn(8, 16, generator=torch.Generator().manual_seed(2)) / 4
    ranked = []
    for share in (0.0, 0.3, 0.6, 0.9):
        W_dec = (1 - share) * truth.directions + share * noise
        swapped = a.clone()
        swapped[: int(400 * share)] = a[: int(400 * share)].roll(1, 0)
        ranked.append(values(W_dec, swapped, truth, a))
    for name in ("mcc", "mcc_above_chance", "f1", "f1_live", "precision", "recall"):
        assert [v[name] for v in ranked] == sorted((v[name] for v in ranked), reverse=True), name


# More latents than can be assigned


def test_twenty_thousand_latents_are_scored_in_seconds():
    generator = torch.Generator().manual_seed(4)
    truth = truth_of(torch.randn(1_000, 16, generator=generator))
    a = torch.zeros(2_000, 1_000)
    a[torch.arange(2_000), torch.randint(1_000, (2_000,), generator=generator)] = 1
    W_dec = torch.randn(20_000, 16, generator=generator)
    W_dec[5_000:6_000] = truth.directions
    # Each token has its feature's latent, and another.
    columns = torch.stack([a.argmax(1) + 5_000, torch.full((2_000,), 19_999)], 1)
    code = sparse.from_columns(columns, torch.ones(2_000, 2))
    batch = SimpleNamespace(x=a @ truth.directions, features=sparse.from_dense(a))
    started = time.process_time()
    tally = GroundTruth().start(sae_of(W_dec), facts_of(truth))
    tally.update(Seen(batch, code, batch.x, None))
    found = {s.metric: s for s in tally.scores() if isinstance(s, Score)}
    assert time.process_time() - started < 10
    means = {name: stats.value(s.num, s.den, "ratio") for name, s in found.items()}
    assert len(W_dec) > matching.MOST_ASSIGNED
    assert means["mcc"] == pytest.approx(1) == means["feature_recall_09"]
    assert found["f1"].num[columns[0, 0]] == 1 and found["f1"].num[:5_000].sum() == 0
    assert means["f1_live"] == pytest.approx(0.999, abs=0.002) and means["f1"] < 0.05
    assert found["mcc"].reference == pytest.approx(0.79, abs=0.05)


# What cannot be asked


def test_where_nobody_knows_the_features_it_is_skipped():
    with pytest.raises(Skip, match="nobody knows the features of these activations"):
        GroundTruth().start(sae_of(torch.eye(2)), facts_of(None))


def test_an_sae_without_directions_is_skipped():
    with pytest.raises(Skip, match="no decoder directions"):
        GroundTruth().start(sae_of(None), facts_of(FAMILY))


def test_what_predicts_another_site_is_skipped():
    facts = facts_of(FAMILY, target=Site("toy", 1))
    with pytest.raises(Skip, match="predicts another site"):
        GroundTruth().start(sae_of(torch.eye(6)), facts)


def test_an_sae_that_is_silent_has_no_live_latents_and_says_so():
    a, z = absorbed()
    found, reasons = values(torch.eye(6), 0 * z, FAMILY, a), omitted(torch.eye(6), 0 * z, FAMILY, a)
    assert found["f1"] == 0 == found["f1_weighted"] and found["absorption"] == 1
    assert reasons["f1_live"] == "no latent is ever active" == reasons["f1_rare"]
    assert reasons["magnitude_ratio"].startswith("no latent has |cosine| 0.7 or more")
    assert set(reasons) == {
        "hedging", "f1_live", "f1_depth_0", "f1_depth_1", "f1_depth_2", "f1_free", "f1_rare",
        "f1_frequent", "magnitude_ratio", "magnitude_error",
    }  # fmt: skip


def test_features_that_are_never_active_leave_out_what_is_about_their_activity():
    a, z = absorbed()
    reasons = omitted(torch.eye(6), z, FAMILY, 0 * a)
    assert {"feature_recall_07_weighted", "f1_weighted", "absorption", "parent_miss"} <= set(
        reasons
    )
    assert all(reasons.values())
    found = values(torch.eye(6), z, FAMILY, 0 * a)
    assert found["precision"] == 0 == found["recall"] == found["f1"] and found["mcc"] == 1


def test_every_metric_that_may_be_left_out_has_its_reason():
    """With no latents and no features active, all that can be left out is."""
    a, z = absorbed()
    truth = truth_of(torch.eye(6))
    found = (
        omitted(torch.eye(6), 0 * z, truth, 0 * a).keys()
        | values(torch.eye(6), 0 * z, truth, 0 * a).keys()
    )
    assert found == {metric.name for metric in GroundTruth.metrics}
