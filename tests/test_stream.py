"""The stream of training activations, and the small laws of the trainer."""

import copy
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from saebench import suite, trainer
from saebench.errors import UserError
from saebench.saes._dictionary import Scaling
from saebench.suite import TrainedSAE
from saebench.trainer import (
    Stream,
    TrainRun,
    _Pupil,
    _schedule,
    learn,
    optimizer_of,
    split_groups,
    stages,
    training_bytes,
)
from saebench.types import Site
from tests import toys

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

    def passage(self, site, rows, special):
        raise NotImplementedError


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
    mean, scale = found = text.statistics()[SITE]
    assert isinstance(found, Scaling)
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


def run(width, site=SITE, target=None, parent=None):
    sae = TrainedSAE(
        name=f"w{width}",
        variant="relu",
        family="relu",
        recipe=toys.recipe("relu"),
        width=width,
        l0=8.0,
        seed=0,
        site=site,
        target=target or site,
        of=None,
    )
    return TrainRun(sae, {"id": "toy"}, "text", 1000, 50, 500, "float32", parent)


def test_the_memory_of_training_is_counted_by_hand():
    # Matrices of 16 x 100 and 100 x 24, each with its gradient and two moments; two blocks of 50 x 100 latents.
    assert training_bytes(run(100), 16, 24) == 4 * ((16 + 24) * 100 * 4 + 2 * 50 * 100)


def test_runs_are_packed_into_as_much_memory_as_there_is_the_largest_first():
    runs = [run(width) for width in (100, 100, 200, 100, 900, 100)]
    one = training_bytes(run(100), 16, 16)
    groups = split_groups(runs, {SITE: 16}, 3.0 * one)
    assert [[r.sae.width for r in group] for group in groups] == [
        [900],  # larger than the budget: alone
        [200, 100],
        [100, 100, 100],
    ]


def test_a_group_is_full_exactly_at_its_budget():
    one = float(training_bytes(run(100), 16, 16))
    assert len(split_groups([run(100), run(100)], {SITE: 16}, 2 * one)) == 1
    assert len(split_groups([run(100), run(100)], {SITE: 16}, 2 * one - 1)) == 2


def test_the_widths_of_both_its_sites_count_for_the_memory_of_a_run():
    runs = [run(100), run(100, SITE, OTHER)]
    budget = float(training_bytes(runs[0], 16, 16) + training_bytes(runs[1], 16, 64))
    assert len(split_groups(runs, {SITE: 16, OTHER: 64}, budget)) == 1
    assert len(split_groups(runs, {SITE: 16, OTHER: 65}, budget)) == 2


def test_what_starts_from_another_sae_is_trained_after_all_that_do_not():
    one, two = run(100), run(200)
    after = run(100, parent=one)
    assert stages([after, two, one]) == [[two, one], [after]]
    assert stages([one, two]) == [[one, two]]
    assert stages([after]) == [[after]]  # its parent was finished before
    assert stages([]) == []


@pytest.mark.parametrize(
    "change",
    [{"tokens": 1001}, {"batch_tokens": 51}, {"buffer_tokens": 501}, {"text": "other"}],
)
def test_everything_that_moves_weights_names_the_checkpoint(change):
    one = run(100)
    assert dataclasses.replace(one, **change).folder(Path()) != one.folder(Path())
    seeded = dataclasses.replace(one, sae=one.sae._replace(seed=1))
    assert seeded.folder(Path()) != one.folder(Path())
    aimed = dataclasses.replace(one, sae=one.sae._replace(target=OTHER))
    assert aimed.folder(Path()) != one.folder(Path())


def test_what_moves_its_parent_names_the_checkpoint_of_an_sae_too():
    child = run(100, parent=run(100))
    seeded = dataclasses.replace(child.parent, sae=child.parent.sae._replace(seed=1))
    folders = {
        c.folder(Path()) for c in (child, run(100), dataclasses.replace(child, parent=seeded))
    }
    assert len(folders) == 3


# Whole sequences, for what is trained through the language model


def ids(rows):
    """Which rows of the text these are."""
    return (rows[:, 0] // CONTEXT).tolist()


def test_sequences_are_whole_rows_of_about_a_batch_of_tokens_with_their_specials():
    rows, special = stream(batch=50).sequences(3)
    assert rows.shape == special.shape == (3, CONTEXT)  # 50 // 16
    for found, marked, number in zip(rows, special, ids(rows), strict=True):
        assert found.tolist() == numbered()[number].tolist()
        assert marked.tolist() == specials()[number].tolist()


def test_there_is_a_sequence_where_a_batch_is_shorter_than_one():
    rows, _ = stream(batch=10).sequences(0)
    assert rows.shape == (1, CONTEXT)


def test_every_step_has_other_sequences_until_the_text_is_through():
    text = stream(batch=32, buffer=160)  # two rows at a step: 20 steps
    seen = [number for step in range(20) for number in ids(text.sequences(step)[0])]
    assert sorted(seen) == list(range(ROWS)) and seen != sorted(seen)


def test_sequences_go_on_when_the_text_is_through():
    text = stream(batch=32, buffer=160)
    assert ids(text.sequences(20)[0]) == ids(text.sequences(0)[0])


def test_sequences_follow_from_the_step_alone():
    """Whoever was asked before, however many tokens are in a block, however many rows are read at a time."""
    one, other = stream(), stream(buffer=40, rows_at_a_time=1)
    list(other.batches(0))
    for step in (7, 2, 28):
        for a, b in zip(one.sequences(step), other.sequences(step), strict=True):
            assert torch.equal(a, b)


# One step


class Recorded(torch.optim.Adam):
    """Keeps the gradients and the learning rate that each step was made with."""

    def __init__(self, training, recipe):
        super().__init__(training.parameters(), lr=recipe.lr)
        self.training, self.steps = training, []

    def step(self, closure=None):
        grads = {k: p.grad.clone() for k, p in self.training.named_parameters()}
        self.steps.append((grads, self.param_groups[0]["lr"]))
        return super().step(closure)


def recorded(**options):
    recipe = toys.recipe("topk", **options)
    training = recipe.start(toys.task(recipe=recipe))
    return training, recipe, Recorded(training, recipe)


def lengths(grads):
    return float(torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt())


def test_gradients_along_the_decoder_are_removed_before_the_rest_is_clipped():
    """The other way round, less than the allowed norm would be left, which Adam would not notice but its moments."""
    training, recipe, optimizer = recorded(grad_clip=1e-3)
    decoder = training.decoder.detach().clone()
    learn(training, optimizer, recipe, toys.lesson(recipe, toys.sparse_data(64)), 0.01)
    ((grads, _),) = optimizer.steps
    assert lengths(grads) == pytest.approx(1e-3, rel=1e-3)
    assert (grads["decoder"] * decoder).sum(1).abs().max() < 1e-9


def test_gradients_below_the_allowed_norm_are_left_alone():
    training, recipe, optimizer = recorded(grad_clip=1e3)
    given = toys.lesson(recipe, toys.sparse_data(64))
    free = copy.deepcopy(training)
    learn(training, optimizer, recipe, given, 0.01)
    free.loss(given).backward()
    free.after_backward()
    for key, parameter in free.named_parameters():
        torch.testing.assert_close(optimizer.steps[0][0][key], parameter.grad)


def test_no_step_keeps_gradients_of_the_one_before():
    training, recipe, optimizer = recorded(grad_clip=1e3, lr=1e-30)
    for _ in range(3):
        learn(training, optimizer, recipe, toys.lesson(recipe, toys.sparse_data(64)), 0.01)
    assert all(p.grad is None for p in training.parameters())
    first, *others = [lengths(grads) for grads, _ in optimizer.steps]
    assert others == pytest.approx([first, first], rel=1e-5)


def test_a_step_has_the_learning_rate_of_its_place_in_the_training():
    training, recipe, optimizer = recorded(lr=0.5, lr_warmup=0.1, lr_decay=0.2)
    for progress in (0.0, 0.05, 0.5, 0.9, 0.95):
        given = toys.lesson(recipe, toys.sparse_data(64), progress)
        learn(training, optimizer, recipe, given, 0.05)
    found = [lr for _, lr in optimizer.steps]
    assert found == pytest.approx([0.25, 0.5, 0.5, 0.25, 0.125])


def test_a_step_gives_the_loss_that_it_was_made_from():
    training, recipe, optimizer = recorded()
    given = toys.lesson(recipe, toys.sparse_data(64))
    expected = copy.deepcopy(training).loss(given)
    found = learn(training, optimizer, recipe, given, 0.01)
    assert found.item() == expected.item() and not found.requires_grad


def test_the_optimiser_has_the_recipes_betas_and_every_parameter():
    recipe = toys.recipe("gated", lr=0.25, beta1=0.5, beta2=0.75)
    training = recipe.start(toys.task())
    (group,) = optimizer_of(training, recipe).param_groups
    assert (group["lr"], group["betas"]) == (0.25, (0.5, 0.75))
    assert len(group["params"]) == 6
    assert group["fused"]  # a pass over the weights instead of one for each operation


def test_the_model_may_read_ahead_and_the_batches_are_the_same():
    with ThreadPoolExecutor(1) as thread:
        for first in (0, 3, 7):
            alone, ahead = (list(stream().batches(first, a)) for a in (None, thread))
            assert len(alone) == len(ahead) > 0
            for one, other in zip(alone, ahead, strict=True):
                assert all(torch.equal(one[site], other[site]) for site in one)


@pytest.mark.parametrize(
    ("variant", "options", "precise"),
    [
        ("topk", {}, False),
        ("jumprelu", {}, True),
        ("transcoder", {}, False),
        ("transcoder", {"activation": "jumprelu"}, True),
        ("skip_transcoder", {"activation": "jumprelu"}, True),
    ],
)
def test_what_asks_for_float32_reads_it_where_batches_are_in_bfloat16(
    variant, options, precise, monkeypatch, tmp_path
):
    target = OTHER if variant in ("transcoder", "skip_transcoder") else SITE
    one = run(8, SITE, target)
    sae = one.sae._replace(recipe=toys.recipe(variant, **options), l0=2.0)
    text, seen = stream(sites=(SITE, OTHER)), []
    monkeypatch.setattr(trainer, "learn", lambda *given: seen.append(given[3]))
    pupil = _Pupil(dataclasses.replace(one, sae=sae, dtype="bfloat16"), text, [], tmp_path, "cpu")
    pupil.learn(next(text.batches(0)))
    (lesson,) = seen
    assert lesson.x.dtype == (torch.float32 if precise else torch.bfloat16)
    assert lesson.target.dtype == torch.float32


@pytest.mark.parametrize("variant", ["relu", "gated", "topk", "matryoshka", "jumprelu", "kl"])
def test_batches_in_bfloat16_teach_nearly_the_same(variant):
    """Pre-activations are rounded to 8 bits, so that many are alike; weights, thresholds, moments and the loss stay in
    float32.
    """
    explained, tokens = [], 64 * 300
    recipe = suite.recipe(variant, {"lr": 0.01})
    for dtype in (torch.float32, torch.bfloat16):
        learner = toys.Learner(recipe, tokens=tokens)
        for step, x in enumerate(toys.sparse_data(tokens).split(64)):
            given = toys.lesson(recipe, x, 64 * step / tokens, seed=step)
            given = given._replace(x=given.x.to(dtype))
            learn(learner.training, learner.optimizer, recipe, given, 64 / tokens)
        assert {p.dtype for p in learner.training.parameters()} == {torch.float32}
        held_out = toys.sparse_data(1000, seed=1)
        sae = learner.training.export()
        z = sae.encode(held_out)
        assert float((z != 0).sum()) / 1000 == pytest.approx(4, rel=0.1)
        error = held_out - sae.decode(z)
        explained.append(1 - float(error.square().sum()) / 1000)
    assert explained[0] > 0.5
    assert explained[1] == pytest.approx(explained[0], abs=0.05)
    assert explained[1] != explained[0]
