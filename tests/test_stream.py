"""The stream of training activations, and the small laws of the trainer."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from saebench import suite
from saebench.errors import UserError
from saebench.suite import TrainedSAE
from saebench.trainer import Stream, TrainRun, _schedule, split_groups, training_bytes
from saebench.types import Site

SITE, OTHER = Site("resid_post", 0), Site("mlp_out", 1)
ROWS, CONTEXT = 40, 16


class Reader:
    """Every token has its own number, and is read as (number, 7); the rows it was asked for are kept."""

    identity = {"reader": "toy"}

    def __init__(self):
        self.asked = []

    def read(self, sites, rows):
        self.asked.append(rows[:, 0].div(CONTEXT, rounding_mode="floor").tolist())
        number = rows.double()
        return {site: torch.stack([number, torch.full_like(number, 7)], -1) for site in sites}


def numbered():
    return np.arange(ROWS * CONTEXT).reshape(ROWS, CONTEXT)


def specials():
    """The first token of every row, one row with nothing else, and some more."""
    special = np.zeros((ROWS, CONTEXT), dtype=bool)
    special[:, 0] = True
    special[5] = True
    special[9, 3:8] = True
    return special


USABLE = numbered()[~specials()]
PER_PASS = len(USABLE)  # 40 * 15 - 15 - 5 = 580


def stream(tokens=PER_PASS, batch=20, buffer=140, rows_at_a_time=3, special=None, sites=(SITE,)):
    return Stream(
        Reader(),
        list(sites),
        numbered(),
        specials() if special is None else special,
        tokens=tokens,
        batch_tokens=batch,
        buffer_tokens=buffer,
        rows_at_a_time=rows_at_a_time,
    )


def numbers(stream, first=0, site=SITE):
    """Which tokens each batch holds: scaling and centring undone."""
    mean, scale = stream.statistics()[site]
    return [
        (batch[site] * scale + mean)[:, 0].round().long().tolist()
        for batch in stream.batches(first)
    ]


def test_every_batch_holds_just_as_many_tokens():
    batches = numbers(stream())
    assert len(batches) == PER_PASS // 20 == 29
    assert {len(batch) for batch in batches} == {20}


def test_a_pass_uses_every_token_once_and_no_special_one():
    used = [token for batch in numbers(stream()) for token in batch]
    assert sorted(used) == sorted(USABLE.tolist())


def test_each_pass_uses_every_token_once_in_another_order():
    batches = numbers(stream(tokens=3 * PER_PASS, batch=20, buffer=PER_PASS))
    used = [token for batch in batches for token in batch]
    passes = [used[i * PER_PASS : (i + 1) * PER_PASS] for i in range(3)]
    for one in passes:
        assert sorted(one) == sorted(USABLE.tolist())
    assert passes[0] != passes[1] != passes[2]


def test_later_passes_read_the_rows_in_another_order():
    size = ROWS * CONTEXT  # a block is a pass
    text = stream(tokens=2 * size, buffer=size, special=np.zeros((ROWS, CONTEXT), bool))
    list(text.batches(0))
    asked = [row for call in text.subject.asked for row in call]
    first, second = asked[:ROWS], asked[ROWS:]
    assert sorted(first) == sorted(second) == list(range(ROWS))
    assert first != sorted(first) and first != second


def test_a_block_is_a_run_of_the_text_of_just_the_buffers_size():
    """Which tokens are shuffled together depends on the text alone, not on how it is read."""
    text = stream()
    batches = numbers(text)
    order = [token for row in text._order for token in numbered()[row][~specials()[row]].tolist()]
    per_block = 140 // 20
    for start in range(0, len(batches), per_block):
        found = sorted(token for batch in batches[start : start + per_block] for token in batch)
        assert found == sorted(order[start * 20 : (start + per_block) * 20])


@pytest.mark.parametrize("first", [0, 1, 6, 7, 8, 20, 28])
def test_batches_from_any_step_on_are_those_of_the_whole_run(first):
    whole = [batch[SITE] for batch in stream().batches(0)]
    resumed = [batch[SITE] for batch in stream().batches(first)]
    assert len(resumed) == len(whole) - first
    assert all(torch.equal(a, b) for a, b in zip(resumed, whole[first:], strict=True))


def test_after_the_last_step_there_is_nothing():
    assert list(stream().batches(29)) == []


@pytest.mark.parametrize("rows_at_a_time", [1, 2, 7, 100])
def test_how_many_rows_are_read_at_a_time_does_not_matter(rows_at_a_time):
    other = stream(rows_at_a_time=rows_at_a_time)
    assert numbers(other) == numbers(stream())
    assert max(len(call) for call in other.subject.asked) <= rows_at_a_time


def test_resuming_reads_no_more_than_the_first_block_and_what_is_left():
    text = stream()
    list(text.batches(28))
    rows = sum(len(call) for call in text.subject.asked)
    assert rows <= 2 * (140 / 14 + 3) < ROWS


def test_a_batch_mixes_many_rows():
    special = np.zeros((ROWS, CONTEXT), dtype=bool)
    text = stream(tokens=ROWS * CONTEXT, batch=20, buffer=320, special=special)
    rows_in_block = 320 // CONTEXT
    expected = rows_in_block * (1 - (1 - 1 / rows_in_block) ** 20)  # of uniform draws
    found = [len({token // CONTEXT for token in batch}) for batch in numbers(text)]
    assert np.mean(found) > 0.9 * expected and min(found) > 0.5 * expected


def test_all_sites_have_the_same_tokens_from_one_read():
    text = stream(sites=(SITE, OTHER))
    assert numbers(text, site=SITE) == numbers(text, site=OTHER)
    alone = stream()
    numbers(alone)
    numbers(alone, site=SITE)
    assert text.subject.asked == alone.subject.asked


def test_statistics_are_of_the_first_block_in_float64():
    text = stream()
    order = [token for row in text._order for token in numbered()[row][~specials()[row]].tolist()]
    block = np.stack([order[:140], np.full(140, 7)], 1).astype(np.float64)
    mean, scale = text.statistics()[SITE]
    assert mean.numpy() == pytest.approx(block.mean(0))
    assert scale == pytest.approx(np.sqrt(((block - block.mean(0)) ** 2).sum(1).mean()), rel=1e-12)


def test_what_is_trained_on_is_centred_and_of_unit_mean_square():
    text = stream(buffer=PER_PASS)
    x = torch.cat([batch[SITE] for batch in text.batches(0)])
    assert x.dtype == torch.float32
    assert x.mean(0).numpy() == pytest.approx([0, 0], abs=1e-6)
    assert float(x.square().sum(1).mean()) == pytest.approx(1, rel=1e-6)


def test_calibration_is_the_start_of_the_stream_as_it_is():
    text = stream()
    found = text.calibration(SITE, 50)
    order = [token for row in text._order for token in numbered()[row][~specials()[row]].tolist()]
    assert found[:, 0].tolist() == order[:50] and found[:, 1].tolist() == [7] * 50


def test_a_stream_without_spread_is_refused():
    class Constant(Reader):
        def read(self, sites, rows):
            return {site: torch.ones(*rows.shape, 2) for site in sites}

    text = stream()
    text.subject = Constant()
    with pytest.raises(UserError, match="spread of 0"):
        text.statistics()


# Schedules and groups


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (0.0, 0.05, 0.5),  # half way up a warm-up of a tenth
        (0.05, 0.1, 1.0),
        (0.3, 0.35, 1.0),
        (0.75, 0.8, 1.0),  # the decay over the last fifth has not begun
        (0.9, 0.95, 0.5),
        (0.95, 1.0, 0.25),  # the last step still moves
    ],
)
def test_the_learning_rate_rises_holds_and_falls(before, after, expected):
    assert _schedule(before, after, 0.1, 0.2) == pytest.approx(expected)


def test_without_warm_up_and_decay_the_learning_rate_is_constant():
    assert _schedule(0.0, 0.01, 0.0, 0.0) == _schedule(0.99, 1.0, 0.0, 0.0) == 1.0


def run(width, site=SITE):
    sae = TrainedSAE(f"w{width}", "relu", suite.recipe("relu", {}), width, 8.0, 0, site)
    return TrainRun(sae, {"id": "toy"}, "text", 1000, 50, 500)


def test_the_memory_of_training_is_counted_by_hand():
    # Two matrices of 16 x 100, each with its gradient and two moments; two blocks of 50 x 100 latents.
    assert training_bytes(run(100), 16) == 4 * (2 * 16 * 100 * 4 + 2 * 50 * 100)


def test_runs_are_grouped_in_order_as_far_as_memory_goes():
    runs = [run(width) for width in (100, 100, 200, 100, 900, 100)]
    one = training_bytes(run(100), 16)
    groups = split_groups(runs, {SITE: 16}, 3.0 * one)
    assert [[r.sae.width for r in group] for group in groups] == [
        [100, 100],
        [200, 100],
        [900],  # larger than the budget: alone
        [100],
    ]
    assert [r for group in groups for r in group] == runs


def test_a_group_is_full_exactly_at_its_budget():
    one = float(training_bytes(run(100), 16))
    assert len(split_groups([run(100), run(100)], {SITE: 16}, 2 * one)) == 1
    assert len(split_groups([run(100), run(100)], {SITE: 16}, 2 * one - 1)) == 2


def test_the_width_of_its_site_counts_for_the_memory_of_a_run():
    runs = [run(100), run(100, OTHER)]
    budget = float(training_bytes(runs[0], 16) + training_bytes(runs[1], 64))
    assert len(split_groups(runs, {SITE: 16, OTHER: 64}, budget)) == 1
    assert len(split_groups(runs, {SITE: 16, OTHER: 65}, budget)) == 2


@pytest.mark.parametrize(
    "change",
    [{"tokens": 1001}, {"batch_tokens": 51}, {"buffer_tokens": 501}, {"text": "other"}],
)
def test_everything_that_moves_weights_names_the_checkpoint(change):
    one = run(100)
    assert dataclasses.replace(one, **change).folder(Path()) != one.folder(Path())
    seeded = dataclasses.replace(one, sae=one.sae._replace(seed=1))
    assert seeded.folder(Path()) != one.folder(Path())
