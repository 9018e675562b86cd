"""Which direction is which: planted copies, brute force, and the floors of random directions."""

import itertools

import numpy as np
import pytest
import torch

from saebench import matching
from saebench.matching import assigned, chance, greedy, matched, mutual, nearest

BOTH = pytest.mark.parametrize("signed", [True, False], ids=["signed", "absolute"])


def directions(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def planted(m, n, d, noise, seed=0):
    """Noisy copies of m of n directions, the directions, and which is which."""
    generator = torch.Generator().manual_seed(seed)
    b = torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=-1)
    truth = torch.randperm(n, generator=generator)[:m]
    return b[truth] + noise * torch.randn(m, d, generator=generator) / d**0.5, b, truth


def cosines(a, b, signed):
    """By NumPy, in doubles."""
    a, b = a.double().numpy(), b.double().numpy()
    found = (a @ b.T) / np.outer(np.sqrt((a * a).sum(1)), np.sqrt((b * b).sum(1)))
    return found if signed else np.abs(found)


def pairs(found):
    return set(zip(found.a.tolist(), found.b.tolist(), strict=True))


def overlap(some, others):
    return len(pairs(some) & pairs(others)) / len(pairs(some))


@BOTH
@pytest.mark.parametrize("chunk", [2**26, 100, 1])
def test_the_nearest_row_is_the_one_with_the_largest_cosine(signed, chunk, monkeypatch):
    monkeypatch.setattr(matching, "_CHUNK", chunk)
    a, b = 3 * directions(40, 5), 0.01 * directions(33, 5, seed=1)
    found, expected = nearest(a, b, signed), cosines(a, b, signed)
    assert found.index.tolist() == expected.argmax(1).tolist()
    np.testing.assert_allclose(found.cosine.numpy(), expected.max(1), atol=1e-6)


def test_an_opposite_direction_is_near_only_where_signs_do_not_matter():
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[-3.0, 0.0], [1.0, 1.0]])
    signed, absolute = nearest(a, b, True), nearest(a, b, False)
    assert signed.index.item() == 1 and signed.cosine.item() == pytest.approx(0.5**0.5)
    assert absolute.index.item() == 0 and absolute.cosine.item() == 1


@BOTH
def test_a_row_of_zeros_has_cosine_zero_with_everything(signed):
    a = torch.cat([torch.zeros(1, 4), directions(3, 4)])
    assert nearest(a, directions(5, 4), False).cosine[0] == 0
    for pair in (assigned, greedy):
        found = pair(a, directions(5, 4), signed)
        assert found.cosine[0] == 0 and found.a.tolist() == [0, 1, 2, 3]


def test_rows_too_small_to_be_squared_have_a_direction_all_the_same():
    a = directions(20, 5)
    tiny = nearest(1e-30 * a, a, True)
    assert tiny.index.tolist() == list(range(20))
    torch.testing.assert_close(tiny.cosine, torch.ones(20))


@BOTH
@pytest.mark.parametrize(("m", "n"), [(4, 6), (6, 4), (5, 5)])
def test_no_other_assignment_has_a_larger_total(signed, m, n, monkeypatch):
    monkeypatch.setattr(matching, "_CHUNK", 12)  # two rows at a time
    a, b = directions(m, 3), directions(n, 3, seed=1)
    found, table = assigned(a, b, signed), cosines(a, b, signed)
    if m <= n:
        best = max(sum(table[range(m), p]) for p in itertools.permutations(range(n), m))
    else:
        best = max(sum(table[p, range(n)]) for p in itertools.permutations(range(m), n))
    assert found.cosine.sum().item() == pytest.approx(best, abs=1e-6)
    assert len(pairs(found)) == min(m, n) == len(set(found.b.tolist()))
    assert found.a.tolist() == sorted(set(found.a.tolist()))
    np.testing.assert_allclose(found.cosine.numpy(), table[found.a, found.b], atol=1e-6)


@BOTH
@pytest.mark.parametrize(("m", "n"), [(30, 50), (50, 30)])
def test_mutual_nearest_neighbours_are_each_others_best(signed, m, n):
    a, b = directions(m, 4), directions(n, 4, seed=1)
    table = cosines(a, b, signed)
    expected = {
        (i, j)
        for i, j in itertools.product(range(m), range(n))
        if table[i].argmax() == j and table[:, j].argmax() == i
    }
    found = mutual(a, b, signed)
    assert pairs(found) == expected and found.a.tolist() == sorted(found.a.tolist())
    np.testing.assert_allclose(found.cosine.numpy(), table[found.a, found.b], atol=1e-6)


@BOTH
@pytest.mark.parametrize(("m", "n"), [(30, 50), (50, 30), (40, 40)])
def test_greedy_pairs_are_those_of_taking_the_largest_cosine_again_and_again(signed, m, n):
    a, b = directions(m, 4), directions(n, 4, seed=1)
    table, expected = cosines(a, b, signed), set()
    while len(expected) < min(m, n):
        i, j = np.unravel_index(table.argmax(), table.shape)
        expected.add((int(i), int(j)))
        table[i], table[:, j] = -2, -2
    found = greedy(a, b, signed)
    assert pairs(found) == expected and found.a.tolist() == sorted(found.a.tolist())


@BOTH
def test_rows_that_are_all_alike_are_paired_all_the_same(signed, monkeypatch):
    rounds = []
    monkeypatch.setattr(matching, "mutual", lambda *of: rounds.append(mutual(*of)) or rounds[-1])
    a = torch.ones(400, 3)
    found = greedy(a, directions(500, 3), signed)
    assert len(rounds) == 1
    assert found.a.tolist() == list(range(400)) and len(set(found.b.tolist())) == 400
    expected = cosines(a, directions(500, 3), signed)[found.a, found.b]
    np.testing.assert_allclose(found.cosine.numpy(), expected, atol=1e-6)


@BOTH
@pytest.mark.parametrize("pair", [assigned, mutual, greedy])
def test_noisy_copies_find_what_they_were_copied_from(signed, pair):
    a, b, truth = planted(300, 800, 64, noise=0.6)
    found = pair(a, b, signed)
    assert found.b.tolist() == truth.tolist()
    np.testing.assert_allclose(
        found.cosine.numpy(), cosines(a, b, True)[np.arange(300), truth], atol=1e-6
    )


@pytest.mark.parametrize(
    ("noise", "of_mutual", "of_greedy", "gap"),
    [
        (0.6, 1.0, 1.0, 1e-6),
        (1.0, 0.999, 0.995, 1e-3),
        (1.5, 0.97, 0.94, 0.004),
        (2.0, 0.88, 0.7, 0.008),
    ],
)
def test_mutual_and_greedy_pairs_are_nearly_those_of_the_assignment(
    noise, of_mutual, of_greedy, gap
):
    """Up to copies that can hardly be told from chance: 64 dimensions, cosine to the original 0.45 at noise 2."""
    a, b, _ = planted(2048, 2048, 64, noise)
    best, some, every = assigned(a, b, False), mutual(a, b, False), greedy(a, b, False)
    assert overlap(some, best) >= of_mutual and overlap(every, best) >= of_greedy
    assert len(pairs(every)) == 2048
    assert 0 <= best.cosine.mean() - every.cosine.mean() <= gap


def test_what_was_not_found_counts_in_greedy_pairs_as_it_does_in_assigned_ones():
    """Half of the rows are copies, half random: the mean over mutual neighbours alone would be far too high."""
    copies, b, _ = planted(500, 1000, 128, noise=0.2)
    a = torch.cat([copies, directions(500, 128, seed=5)])
    best, some, every = (pair(a, b, False).cosine.mean() for pair in (assigned, mutual, greedy))
    assert every == pytest.approx(float(best), abs=0.005) and some > best + 0.1


def test_too_many_rows_are_paired_greedily_and_not_assigned(monkeypatch):
    monkeypatch.setattr(matching, "MOST_ASSIGNED", 50)
    a, b = directions(40, 4), directions(60, 4, seed=1)
    with pytest.raises(ValueError, match="40 and 60 directions are too many to assign: at most 50"):
        assigned(a, b, True)
    assert pairs(matched(a, b, True)) == pairs(greedy(a, b, True)) != pairs(mutual(a, b, True))
    assert pairs(matched(a, b[:50], True)) == pairs(assigned(a, b[:50], True))


def test_nothing_is_matched_with_nothing():
    with pytest.raises(ValueError, match="nothing to match: 0 directions and 3"):
        nearest(torch.ones(0, 2), torch.ones(3, 2), True)


@pytest.mark.parametrize(
    ("m", "d", "mcc", "mmcs"), [(1024, 256, 0.194, 0.202), (2048, 256, 0.207, 0.214)]
)
def test_chance_is_what_another_program_measured(m, d, mcc, mmcs):
    """Random unit rows by NumPy and SciPy, of other draws; signed."""
    found = chance(m, m, d, True)
    assert found.assigned == pytest.approx(mcc, abs=0.002) and found.matched == found.assigned
    assert found.nearest == pytest.approx(mmcs, abs=0.002)
    absolute = chance(m, m, d, False)
    assert 0.005 < absolute.nearest - found.nearest < 0.02


def test_half_of_random_rows_have_a_mutual_nearest_neighbour():
    """The largest of a row is the largest of its column too with probability n / (m + n - 1) in many dimensions."""
    assert chance(1000, 1000, 512, True).shared == pytest.approx(0.5, abs=0.05)
    assert chance(500, 1500, 512, False).shared == pytest.approx(0.75, abs=0.06)
    assert chance(1500, 500, 512, False).shared == pytest.approx(0.75, abs=0.06)


def test_chance_beyond_assignment_is_close_to_what_greedy_pairs_of_random_rows_have(monkeypatch):
    monkeypatch.setattr(matching, "MOST_ASSIGNED", 500)
    found = chance(600, 2400, 128, False)
    pairs_of = greedy(directions(600, 128, seed=3), directions(2400, 128, seed=4), False)
    assert found.assigned is None
    assert 0 <= found.matched - float(pairs_of.cosine.mean()) < 0.006


def test_the_mean_over_a_sample_of_rows_is_that_over_all(monkeypatch):
    of_all = chance(2000, 1000, 64, False)
    chance.cache_clear()
    monkeypatch.setattr(matching, "_ROWS_FOR_CHANCE", 400)
    of_some = chance(2000, 1000, 64, False)
    chance.cache_clear()
    assert of_some.assigned == of_all.assigned
    assert of_some.nearest == pytest.approx(of_all.nearest, abs=0.006)
    assert of_some.shared != of_all.shared
    assert of_some.mutual == pytest.approx(of_all.mutual, abs=0.01)
    assert of_some.shared == pytest.approx(of_all.shared, abs=0.08)
