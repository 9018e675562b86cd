"""Streams, resumed forward passes and the evaluation text, on every family of architecture."""

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch

from saebench import subject as subject_module
from saebench import text
from saebench.cache import Cache
from saebench.errors import UserError
from saebench.sites import STREAMS, parse_site
from saebench.subject import LanguageModel, load_model, random_model, rows_per_batch
from saebench.types import Batch, Site
from tests.models import (
    BOS,
    CONTEXT,
    D_MLP,
    D_MODEL,
    LACKING,
    LAYERS,
    MODELS,
    NAMES,
    PARALLEL,
    VOCABULARY,
    byte_tokenizer,
    calls_of,
    tiny_model,
    tiny_tokens,
)

ASSETS = Path(__file__).parents[2] / "shared" / "assets"
STORIES = ASSETS / "stories260k-hf"
CLOSE = {"rtol": 1e-4, "atol": 1e-5}

IDS = ["-".join(pair) for pair in MODELS]
STREAMED = [
    (name, attention, stream)
    for name, attention in MODELS
    for stream in STREAMS
    if (name, stream) not in LACKING
]


def subject(name, attention="eager", folder=None, batch_rows=3, tokens=None):
    model = tiny_model(name, attention)
    identity = {"id": f"tiny-{name}", "revision": "0", "dtype": "float32"}
    return LanguageModel(model, tokens or tiny_tokens(), identity, Cache(folder), batch_rows)


def named(lm, name, layer, part):
    """A part of a block by its written-down name."""
    block = lm.model.get_submodule(NAMES[name].block.format(layer))
    return block if part == "block" else block.get_submodule(getattr(NAMES[name], part))


def first(value):
    return value[0] if isinstance(value, tuple) else value


def put(value, tensor):
    return (tensor, *value[1:]) if isinstance(value, tuple) else tensor


def plain_logits(lm, name, site, rows, stream):
    """Logits of a whole forward pass with a plain hook at the place that the name table says."""
    rows = rows.long()
    part, side = {
        "resid_pre": ("block", "in"),
        "resid_mid": ("attn_out", "mid"),
        "resid_post": ("block", "out"),
        "attn_z": ("attn_last", "in"),
        "attn_out": ("attn_out", "out"),
        "mlp_in": ("mlp", "in"),
        "mlp_hidden": ("mlp_last", "in"),
        "mlp_out": ("mlp_out", "out"),
    }[site.stream]
    block_input = []
    hooks = [
        named(lm, name, site.layer, "block").register_forward_pre_hook(
            lambda _m, args: block_input.append(args[0])
        )
    ]
    module = named(lm, name, site.layer, part)
    if side == "in":
        hooks.append(module.register_forward_pre_hook(lambda _m, args: (stream, *args[1:])))
    elif side == "out":
        hooks.append(module.register_forward_hook(lambda _m, _a, out: put(out, stream)))
    else:
        hooks.append(
            module.register_forward_hook(lambda _m, _a, out: put(out, stream - block_input[0]))
        )
    try:
        with torch.no_grad():
            return lm.model(input_ids=rows).logits
    finally:
        for hook in hooks:
            hook.remove()


def hooks_left(model):
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


# Streams


@pytest.mark.parametrize(("name", "attention"), MODELS, ids=IDS)
def test_the_residual_stream_is_a_running_sum(name, attention):
    lm = subject(name, attention)
    for layer in range(LAYERS):
        has = [s for s in STREAMS if (name, s) not in LACKING]
        read = lm.read([Site(s, layer) for s in has], lm.eval_rows)
        pre, post, attn, mlp = (
            read[Site(s, layer)] for s in ("resid_pre", "resid_post", "attn_out", "mlp_out")
        )
        if name != PARALLEL:
            torch.testing.assert_close(read[Site("resid_mid", layer)], pre + attn, **CLOSE)
        torch.testing.assert_close(post, pre + attn + mlp, **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_a_module_and_the_stream_that_it_stands_for_are_one_site(name):
    lm = subject(name)
    block, parts = NAMES[name].block.format(1), NAMES[name]
    by_module = {
        f"{block}.output": Site("resid_post", 1),
        f"{block}.input": Site("resid_post", 0),
        f"{block}.{parts.mlp_out}.output": Site("mlp_out", 1),
        f"{block}.{parts.mlp_last}.input": Site("mlp_hidden", 1),
        f"{block}.{parts.attn_out}.output": Site("attn_out", 1),
    }
    assert {path: lm.canonical(Site(path)) for path in by_module} == by_module
    # As tools name modules that look at the model without its head.
    short = block.removeprefix(lm.model.base_model_prefix + ".")
    assert lm.canonical(Site(f"{short}.output")) == Site("resid_post", 1)
    assert lm.canonical(Site("resid_pre", 2)) == Site("resid_post", 1)
    assert lm.canonical(Site("resid_pre", 0)) == Site("resid_pre", 0)
    inside = next(path for path, _ in lm.model.named_modules() if path.endswith("mlp"))
    assert lm.canonical(Site(f"{inside}.input")) == Site("mlp_in", 0)
    with pytest.raises(UserError, match="nowhere"):
        lm.canonical(Site("nowhere.output"))


@pytest.mark.parametrize(("name", "attention"), MODELS, ids=IDS)
def test_resid_post_is_the_next_hidden_state(name, attention):
    lm = subject(name, attention)
    sites = [Site("resid_post", layer) for layer in range(LAYERS)]
    read = lm.read(sites, lm.eval_rows)
    with torch.no_grad():
        states = lm.model(input_ids=lm.eval_rows.long(), output_hidden_states=True).hidden_states
    for layer in range(LAYERS - 1):
        torch.testing.assert_close(read[sites[layer]], states[layer + 1], rtol=0, atol=0)
    following = lm.read([Site("resid_pre", LAYERS - 1)], lm.eval_rows)
    torch.testing.assert_close(*following.values(), states[LAYERS - 1], rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_mlp_maps_mlp_in_and_mlp_hidden_to_its_output(name):
    lm = subject(name)
    raw = Site(f"{NAMES[name].block.format(1)}.{NAMES[name].mlp}.output")
    sites = [Site("mlp_in", 1), Site("mlp_hidden", 1), raw]
    mlp_in, hidden, out = lm.read(sites, lm.eval_rows).values()
    assert hidden.shape[-1] == lm.width(Site("mlp_hidden", 1)) == D_MLP
    with torch.no_grad():
        torch.testing.assert_close(named(lm, name, 1, "mlp")(mlp_in), out, **CLOSE)
        torch.testing.assert_close(named(lm, name, 1, "mlp_last")(hidden), out, **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_above_the_deepest_site_is_computed(name):
    lm = subject(name)
    for layer in (0, 1):
        lm.check_site(Site("attn_out", layer))  # probes run now, and not within the count
    blocks = {str(i): block for i, block in enumerate(lm.blocks)}
    started = []
    hooks = [
        b.register_forward_pre_hook(lambda *_, i=i: started.append(i)) for i, b in blocks.items()
    ]
    with calls_of({"mlp": named(lm, name, 1, "mlp")}) as called:
        lm.read([Site("resid_post", 0), Site("attn_out", 1)], lm.eval_rows)
    for hook in hooks:
        hook.remove()
    assert started == ["0", "1"]
    # The MLP is only reached where it comes before the attention's output, which is nowhere.
    assert called == []


@pytest.mark.parametrize("name", NAMES)
def test_no_hook_is_left_behind(name):
    lm = subject(name)
    before = lm.model(input_ids=lm.eval_rows.long()).logits
    site = Site("mlp_out", 1)
    clean = lm.clean(site, lm.eval_rows)
    keep = torch.zeros_like(lm.eval_special)
    lm.splice(site, lm.eval_rows, torch.zeros_like(clean.stream), keep, clean)
    with pytest.raises(AssertionError):  # a pass that fails in the middle restores the model too
        lm.splice(site, lm.eval_rows, clean.stream, keep, clean._replace(base=None))
    assert hooks_left(lm.model) == []
    assert all("forward" not in vars(m) for m in lm.model.modules())
    torch.testing.assert_close(lm.model(input_ids=lm.eval_rows.long()).logits, before)


def test_what_is_read_can_be_trained_on():
    lm = subject("llama")
    stream = lm.read([Site("resid_post", 1)], lm.train_rows)[Site("resid_post", 1)]
    assert not stream.requires_grad
    weight = torch.ones(D_MODEL, requires_grad=True)
    (stream * weight).sum().backward()
    torch.testing.assert_close(weight.grad, stream.sum((0, 1)))


def test_reading_does_not_change_with_what_else_is_read():
    lm = subject("gemma2")
    alone = lm.read([Site("resid_pre", 1)], lm.eval_rows)[Site("resid_pre", 1)]
    among = lm.read([Site("mlp_out", 2), Site("resid_pre", 1), Site("attn_out", 0)], lm.eval_rows)
    assert list(among) == [Site("mlp_out", 2), Site("resid_pre", 1), Site("attn_out", 0)]
    assert torch.equal(alone, among[Site("resid_pre", 1)])


# Training through the model


def passage_of(lm, site):
    rows = lm.eval_rows[:4]
    special = torch.zeros(rows.shape, dtype=torch.bool)
    special[:, 0] = True
    return lm.passage(site, rows, special), rows, special


@pytest.mark.parametrize(
    ("name", "stream"), dict.fromkeys((name, stream) for name, _, stream in STREAMED)
)
def test_a_replaced_stream_diverges_as_one_that_a_plain_hook_replaces(name, stream):
    lm, site = subject(name), Site(stream, 0)  # a model that was asked for nothing before
    passage, rows, special = passage_of(lm, site)
    clean = lm.read([site], rows)[site]
    noisy = clean + 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    noisy[special] = clean[special]
    found, error = passage.divergence(noisy[~special], True)
    scored = torch.zeros(rows.shape, dtype=torch.bool)
    scored[:, 1:-1] = True
    q, p = (plain_logits(lm, name, site, rows, x)[scored].log_softmax(-1) for x in (noisy, clean))
    torch.testing.assert_close(found, (p.exp() * (p - q)).sum(-1).mean(), rtol=1e-3, atol=1e-6)
    assert error is not None and error > 0
    assert passage.divergence(noisy[~special], False) == (found, None)


@pytest.mark.parametrize("name", NAMES)
def test_the_error_of_later_layers_is_theirs_in_the_running_sum(name):
    # x -> x + 1 at the output of a block whose successors are switched off: every later stream is off by 1.
    lm, site = subject(name), Site("resid_post", 0)
    passage, *_ = passage_of(lm, site)
    streams = [Site("resid_post", layer) for layer in range(1, LAYERS)]
    for layer in range(1, LAYERS):
        for part in ("attn_out", "mlp_out"):
            named(lm, name, layer, part).register_forward_hook(
                lambda _m, _a, out: put(out, torch.zeros_like(first(out)))
            )
    clean = passage.x
    _, error = passage.divergence(clean + 1.0, True)
    spread = (clean - clean.mean(0)).square().sum()
    torch.testing.assert_close(error, clean.numel() / spread, **CLOSE)
    assert lm.later(site) == streams


def test_the_unreplaced_model_runs_once_for_all_that_is_put_in_its_place():
    lm = subject("llama")
    passage, *_ = passage_of(lm, Site("resid_post", 0))
    with calls_of({"above": lm.model.model.norm}) as runs:
        small, large = (passage.divergence(passage.x + by, False)[0] for by in (0.1, 1.0))
    assert len(runs) == 3 and large > small > 0


# Splicing


@pytest.mark.parametrize(("name", "attention", "stream"), STREAMED, ids="-".join)
def test_a_resumed_pass_gives_the_logits_of_a_whole_pass(name, attention, stream):
    lm = subject(name, attention)
    rows, keep = lm.eval_rows, lm.eval_special
    for layer in (0, LAYERS - 1):
        site = Site(stream, layer)
        clean = lm.clean(site, rows)
        noise = torch.randn(clean.stream.shape, generator=torch.Generator().manual_seed(layer))
        spliced = lm.splice(site, rows, noise, keep, clean)
        whole = torch.where(keep[..., None], clean.stream, noise)
        torch.testing.assert_close(spliced, plain_logits(lm, name, site, rows, whole), **CLOSE)
        clean_logits = lm.model(input_ids=rows.long()).logits
        assert (spliced - clean_logits).abs().max() > 0.01
        itself = lm.splice(site, rows, clean.stream, keep, clean)
        torch.testing.assert_close(itself, clean_logits, **CLOSE)


@pytest.mark.parametrize(("name", "attention"), MODELS, ids=IDS)
@pytest.mark.parametrize("side", ["input", "output"])
def test_a_module_named_by_its_path_is_spliced_like_the_stream_that_it_is(name, attention, side):
    lm = subject(name, attention)
    stream = {"input": "mlp_in", "output": "mlp_out"}[side]
    if name == "gemma2" and side == "output":
        stream = None  # a norm comes between the MLP's output and the residual stream
    site = parse_site({"module": f"{NAMES[name].block.format(1)}.{NAMES[name].mlp}", "side": side})
    clean = lm.clean(site, lm.eval_rows)
    logits = lm.splice(site, lm.eval_rows, -clean.stream, lm.eval_special, clean)
    whole = torch.where(lm.eval_special[..., None], clean.stream, -clean.stream)
    hook = named(lm, name, 1, "mlp").register_forward_hook(lambda _m, _a, _o: whole)
    if side == "input":
        hook.remove()
        hook = named(lm, name, 1, "mlp").register_forward_pre_hook(lambda _m, _a: (whole,))
    expected = lm.model(input_ids=lm.eval_rows.long()).logits
    hook.remove()
    torch.testing.assert_close(logits, expected, **CLOSE)
    if stream:
        assert torch.equal(clean.stream, lm.clean(Site(stream, 1), lm.eval_rows).stream)


def test_a_module_outside_the_blocks_can_be_spliced():
    lm = subject("llama")
    site = parse_site("model.norm.output")
    clean = lm.clean(site, lm.eval_rows)
    keep = torch.zeros_like(lm.eval_special)
    logits = lm.splice(site, lm.eval_rows, 2 * clean.stream, keep, clean)
    torch.testing.assert_close(logits, 2 * lm.model(input_ids=lm.eval_rows.long()).logits, **CLOSE)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("stream", "layer", "expected"),
    [
        ("resid_pre", 1, ["attn 1", "mlp 1", "attn 2", "mlp 2"]),
        ("resid_post", 1, ["attn 2", "mlp 2"]),
        ("resid_post", 2, []),
        ("resid_mid", 1, ["mlp 1", "attn 2", "mlp 2"]),
        ("attn_out", 1, ["mlp 1", "attn 2", "mlp 2"]),
        ("mlp_in", 1, ["mlp 1", "attn 2", "mlp 2"]),
        ("mlp_out", 1, ["attn 2", "mlp 2"]),
    ],
)
def test_what_lies_below_the_site_does_not_run(name, stream, layer, expected):
    if name == PARALLEL:
        if stream == "resid_mid":
            pytest.skip("blocks whose parts run in parallel have no resid_mid")
        if stream.startswith("mlp"):
            expected = ["attn 1", *expected]
    lm = subject(name)
    site = Site(stream, layer)
    clean = lm.clean(site, lm.eval_rows)
    lm.splice(site, lm.eval_rows, clean.stream, lm.eval_special, clean)
    inner = {}
    for i in range(LAYERS):
        # The last linear map runs only when its part is computed, and not when the part is skipped.
        attention = named(lm, name, i, "block").get_submodule(
            {"gemma2": "self_attn"}.get(name, NAMES[name].attn_out)
        )
        linear = [m for m in attention.modules() if m is not attention and list(m.parameters())]
        inner[f"attn {i}"] = linear[-1]
        inner[f"mlp {i}"] = named(lm, name, i, "mlp_last")
    with calls_of(inner) as called:
        lm.splice(site, lm.eval_rows, clean.stream, lm.eval_special, clean)
    assert called == expected


def test_gradients_reach_the_replacement():
    lm = subject("gpt2")
    site = Site("mlp_out", 1)
    clean = lm.clean(site, lm.eval_rows)
    replacement = clean.stream.clone().requires_grad_(True)
    lm.splice(site, lm.eval_rows, replacement, lm.eval_special, clean).sum().backward()
    assert replacement.grad[~lm.eval_special].abs().min(-1).values.max() > 0
    assert replacement.grad[lm.eval_special].abs().max() == 0


# Sites that do not exist


def test_a_parallel_block_has_no_resid_mid():
    with pytest.raises(
        UserError, match=r"no stream 'resid_mid' \(its attention and MLP run in par"
    ):
        subject(PARALLEL).check_site(Site("resid_mid", 1))


def test_a_layer_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(UserError, match="layer 3: LlamaForCausalLM has layers 0 to 2"):
        subject("llama").check_site(Site("resid_post", 3))


def test_a_module_that_is_not_there_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"nearest: model\.layers\.1\.mlp\)"):
        subject("llama").check_site(Site("model.layers.1.mpl.output"))


def test_a_module_without_one_activation_per_token_is_refused():
    with pytest.raises(UserError, match="one activation per token was expected"):
        subject("llama").check_site(Site("model.rotary_emb.output"))


def test_a_part_that_does_not_add_to_the_stream_is_not_offered_as_a_stream():
    lm = subject("llama")
    mlp = named(lm, "llama", 1, "mlp")
    whole = mlp.forward
    mlp.forward = lambda x: whole(x)  # still itself: offered
    lm.check_site(Site("mlp_out", 1))
    doubled = subject("llama")
    block = named(doubled, "llama", 1, "block")
    block.register_forward_hook(lambda _m, _a, out: 2 * out)
    with pytest.raises(UserError, match="no stream 'mlp_out'.*it has: resid_pre, resid_mid"):
        doubled.check_site(Site("mlp_out", 1))


def test_a_context_longer_than_the_models_is_refused():
    tokens = tiny_tokens()
    rows = np.full((2, 33), 5, dtype=np.int32)
    long = tokens._replace(train=rows, evaluation=rows, context=33)
    with pytest.raises(UserError, match="context 33: GPT2LMHeadModel takes at most 32 tokens"):
        subject("gpt2", tokens=long)


def test_tokens_of_another_tokenizer_are_refused():
    tokens = tiny_tokens()
    rows = tokens.evaluation.copy()
    rows[0, 3] = VOCABULARY
    with pytest.raises(UserError, match="token id 40, but LlamaForCausalLM knows only 40"):
        subject("llama", tokens=tokens._replace(evaluation=rows))


# The evaluation text


def numpy_log_softmax(logits):
    logits = np.asarray(logits, dtype=np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_a_batch_holds_the_tokens_that_are_not_special_in_order():
    lm = subject("llama")
    site = Site("resid_post", 1)
    whole = lm.read([site], lm.eval_rows)[site]
    x, sequence, scored = [], [], []
    for row, ids in enumerate(lm.tokens.evaluation):
        for position, token in enumerate(ids):
            if token == BOS:
                continue
            x.append(whole[row, position])
            sequence.append(row)
            if position + 1 < CONTEXT and ids[position + 1] != BOS:
                scored.append(row)
    batches = list(lm.evaluation(site))
    assert all(isinstance(batch, Batch) for batch in batches)
    assert len(batches) == 3
    torch.testing.assert_close(torch.cat([b.x for b in batches]), torch.stack(x), **CLOSE)
    assert torch.cat([b.sequence for b in batches]).tolist() == sequence
    assert torch.cat([b.scored_sequence for b in batches]).tolist() == scored
    facts = lm.facts(site, site)
    assert (facts.n_sequences, facts.n_tokens) == (7, len(x))
    torch.testing.assert_close(facts.mean, torch.stack(x).double().mean(0))


@pytest.mark.parametrize("stream", ["resid_post", "mlp_out", "mlp_hidden"])
def test_outcomes_and_references_are_those_of_a_loop_over_tokens(stream):
    lm = subject("gemma2")
    site = Site(stream, 1)
    rows, special = lm.eval_rows, lm.eval_special
    clean = lm.clean(site, rows)
    tokens = clean.stream[~special]
    replacement = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0))

    def logits(new):
        stream = clean.stream.clone()
        stream[~special] = new
        return numpy_log_softmax(plain_logits(lm, "gemma2", site, rows, stream))

    log_p = {
        "clean": logits(tokens),
        "spliced": logits(replacement),
        "zero": logits(torch.zeros_like(tokens)),
        "mean": logits(tokens.double().mean(0).float().expand_as(tokens)),
    }
    expected = {name: [] for name in (*log_p, "kl", "top1")}
    for row, ids in enumerate(lm.tokens.evaluation):
        for t in range(CONTEXT - 1):
            if BOS in ids[t : t + 2]:
                continue
            for name, values in log_p.items():
                expected[name].append(-values[row, t, ids[t + 1]])
            p, q = log_p["clean"][row, t], log_p["spliced"][row, t]
            expected["kl"].append((np.exp(p) * (p - q)).sum())
            expected["top1"].append(p.argmax() == q.argmax())

    done, outcomes, references = 0, [], []
    for batch in lm.evaluation(site):
        outcomes.append(batch.outcome(replacement[done : done + len(batch.x)]))
        references.append(batch.references())
        done += len(batch.x)
    close = {"rtol": 1e-4, "atol": 1e-4}
    for name in ("clean", "zero", "mean"):
        found = torch.cat([getattr(r, name) for r in references])
        np.testing.assert_allclose(found, expected[name], **close)
    np.testing.assert_allclose(torch.cat([o.loss for o in outcomes]), expected["spliced"], **close)
    np.testing.assert_allclose(torch.cat([o.kl for o in outcomes]), expected["kl"], **close)
    assert torch.cat([o.same_top1 for o in outcomes]).tolist() == expected["top1"]


@pytest.mark.parametrize("name", NAMES)
def test_replacing_by_the_clean_activations_changes_nothing(name):
    lm = subject(name)
    for batch in lm.evaluation(Site("mlp_out", 1)):
        outcome = batch.outcome(batch.x)
        assert outcome.kl.abs().max() == 0
        assert outcome.same_top1.all()
        torch.testing.assert_close(outcome.loss, batch.references().clean, rtol=0, atol=0)


def test_a_transcoder_reads_one_site_and_replaces_another():
    lm = subject("qwen2")
    read, predicted = Site("mlp_in", 1), Site("mlp_out", 1)
    for batch, of_target in zip(
        lm.evaluation(read, predicted), lm.evaluation(predicted), strict=True
    ):
        assert not torch.equal(batch.x, batch.target)
        assert torch.equal(batch.target, of_target.x)
        assert batch.outcome(batch.target).kl.abs().max() == 0
        for ours, theirs in zip(batch.references(), of_target.references(), strict=True):
            assert torch.equal(ours, theirs)


def everything(lm, site):
    """All numbers of an evaluation, with a replacement that stands for an SAE."""
    numbers = [lm.facts(site, site).mean]
    for batch in lm.evaluation(site):
        outcome = batch.outcome(batch.x * 0.9 + 0.1)
        numbers += [batch.x, batch.sequence, batch.scored_sequence, *outcome, *batch.references()]
    return numbers


@pytest.mark.parametrize("stream", ["resid_post", "resid_mid", "mlp_out"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_and_uncached_numbers_are_the_same_to_the_bit(stream, dtype, tmp_path):
    site = Site(stream, 1)
    runs = []
    for folder in (None, tmp_path, tmp_path):  # never cached; written; read back
        lm = subject("llama", "sdpa", folder)
        lm.model.to(dtype)
        runs.append(everything(lm, site))
    assert len(list(tmp_path.iterdir())) >= 3
    for numbers in zip(*runs, strict=True):
        assert all(torch.equal(numbers[0], other) for other in numbers[1:])


def test_a_cached_text_is_not_read_again(tmp_path):
    site = Site("resid_post", 1)
    everything(subject("llama", folder=tmp_path), site)
    lm = subject("llama", folder=tmp_path)
    lm.width(site)  # one short probe
    lm._arities  # noqa: B018
    with calls_of({"below": named(lm, "llama", 0, "mlp_last")}) as called:
        everything(lm, site)
    assert called == []


def test_a_damaged_cache_is_computed_again(tmp_path):
    site = Site("mlp_out", 1)
    expected = everything(subject("llama", folder=tmp_path), site)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-7])
    found = everything(subject("llama", folder=tmp_path), site)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_full_disk_costs_time_and_not_numbers(tmp_path, monkeypatch, caplog):
    site = Site("mlp_out", 1)
    expected = everything(subject("llama"), site)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=100))
    found = everything(subject("llama", folder=tmp_path), site)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert list(tmp_path.iterdir()) == []
    assert "recomputed when needed" in caplog.text


def test_other_text_another_model_and_another_site_are_cached_apart(tmp_path):
    lm = subject("llama", folder=tmp_path)
    specs = [
        lm._spec("mean", Site("resid_post", 1)),
        lm._spec("mean", Site("resid_post", 2)),
        subject("llama", folder=tmp_path, tokens=tiny_tokens(seed=1))._spec(
            "mean", Site("resid_post", 1)
        ),
        subject("qwen2", folder=tmp_path)._spec("mean", Site("resid_post", 1)),
        subject("llama", "sdpa", folder=tmp_path)._spec("mean", Site("resid_post", 1)),
        subject("llama", folder=tmp_path, batch_rows=2)._spec("mean", Site("resid_post", 1)),
    ]
    assert len({json.dumps(spec, sort_keys=True) for spec in specs}) == len(specs)


def test_batches_of_rows_keep_the_logits_small():
    model = tiny_model("llama")
    assert rows_per_batch(model, 128) == 64
    model.get_input_embeddings().weight.data = torch.zeros(256_000, D_MODEL)
    assert rows_per_batch(model, 1024) == 1
    assert rows_per_batch(model, 128) * 128 * 256_000 * 4 <= 2**28


# Loading


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "tiny")
    byte_tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_local_folder_is_known_by_its_content_and_not_by_its_place(folder, tmp_path):
    loaded = load_model(str(folder), None, "float32", "cpu")
    assert loaded.identity["id"] == "tiny"
    assert loaded.identity["revision"].startswith("sha256:")
    assert str(tmp_path) not in json.dumps(loaded.identity)
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "tiny")
    assert load_model(str(moved), None, "float32", "cpu").identity == loaded.identity
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    assert load_model(str(moved), None, "float32", "cpu").identity != loaded.identity


def test_a_checkpoint_without_some_weights_is_refused(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"weights are missing .*layers\.1\.mlp\.up_proj"):
        load_model(str(folder), None, "float32", "cpu")


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model("llama").state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_model(str(folder), None, "float32", "cpu")


def test_an_unreachable_model_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="'nobody/nothing'.*HF_HUB_OFFLINE=1"):
        load_model("nobody/nothing", None, "float32", "cpu")


def test_an_unknown_dtype_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="nearest: bfloat16"):
        load_model("builtin:pylm", None, "bfloat", "cpu")


CONFIG = {
    "model_type": "gpt_neox",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 4096,
}


def random_of(dtype="float32", tokenizer="builtin:pylm", **changes):
    return random_model({**CONFIG, **changes}, tokenizer, dtype, "cpu")


def test_random_weights_are_the_same_every_time_and_leave_the_random_state_alone():
    before = torch.random.get_rng_state()
    one = random_of()
    torch.rand(3)
    other = random_of()
    weights = [dict(m.model.named_parameters()) for m in (one, other)]
    assert all(torch.equal(w, weights[1][name]) for name, w in weights[0].items())
    assert one.identity == other.identity
    torch.random.set_rng_state(before)
    random_of()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not one.model.training
    assert not any(p.requires_grad for p in one.model.parameters())


def test_a_random_model_is_known_by_its_whole_config():
    identity = random_of().identity
    assert identity["id"] == "random:gpt_neox"
    assert identity["revision"].startswith("sha256:")
    # What is not said has the value that transformers gives it: saying so changes nothing.
    assert random_of(hidden_act="gelu").identity == identity
    assert random_of(hidden_act="relu").identity["revision"] != identity["revision"]
    assert random_of(initializer_range=0.1).identity["revision"] != identity["revision"]
    assert random_of(transformers_version="4.0.0").identity == identity


def test_random_weights_have_the_dtype_asked_for():
    loaded = random_of("bfloat16")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.identity["dtype"] == "bfloat16"


def test_a_random_model_has_the_parameters_of_the_model_it_stands_for():
    """Pythia 70M has 18,915,328 parameters besides its embeddings (its model card)."""
    sizes = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8}
    model = random_of(**sizes, intermediate_size=2048).model
    assert sum(p.numel() for p in model.parameters()) == 18_915_328 + 2 * 4096 * 512


def test_a_random_model_runs_at_its_sites_and_touches_no_network(monkeypatch):
    import socket

    def refuse(*_args, **_kwargs):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    loaded = random_of()
    tokens = text.tokenize(text.Builtin("python-stdlib"), loaded.tokenizer, 32, 0, 100)
    lm = LanguageModel(loaded.model, tokens, loaded.identity, Cache(None), 2)
    assert lm.width(Site("resid_post", 1)) == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "nonsense"}, "type 'nonsense' is none that transformers knows"),
        ({"model_type": "t5"}, "no causal language model could be made .* type 't5'"),
        ({"hidden_size": "wide"}, "'gpt_neox' is none that transformers knows: .*hidden_size"),
        ({"hidden_size": 17}, "'gpt_neox' is none that transformers knows: .*divisible"),
        ({"num_hidden_layer": 3}, "has no 'num_hidden_layer'; did you mean 'num_hidden_layers'"),
        ({"vocab_size": 1000}, "has 4096 tokens, but the config a vocab_size of 1000"),
        ({"hidden_size": 0}, "could be made of the config of type 'gpt_neox': ZeroDivisionError"),
        ({"hidden_act": "swisch"}, "could be made .* type 'gpt_neox': KeyError: 'swisch'"),
        (
            {"model_type": "llama", "pad_token_id": 5000},
            "type 'llama': AssertionError: Padding_idx",
        ),
    ],
)
def test_a_config_that_makes_no_language_model_is_refused(changes, message):
    config = {"model_type": "t5"} if changes.get("model_type") == "t5" else {**CONFIG, **changes}
    with pytest.raises(UserError, match=message) as caught:
        random_model(config, "builtin:pylm", "float32", "cpu")
    assert len(str(caught.value)) < 1000


def test_keys_of_older_config_files_are_taken():
    """As in the published config.json of Pythia."""
    random_of(rotary_pct=0.25, rotary_emb_base=10000, architectures=["GPTNeoXForCausalLM"])


def test_a_tokenizer_may_be_a_folder(folder):
    assert len(random_of(tokenizer=str(folder), vocab_size=259).tokenizer) == 259
    with pytest.raises(UserError, match="tokenizer '.*nowhere' could not be loaded"):
        random_of(tokenizer=str(folder / "nowhere"))


def test_what_a_branch_stood_for_goes_into_the_identity(monkeypatch, folder):
    """A suite that names no revision, or a branch, has the commit in its results."""
    commit = "0123456789abcdef" * 2 + "01234567"
    asked = []

    def download(_id, file, revision):
        asked.append(revision)
        return f"/hub/snapshots/{commit}/{file}"

    def with_report(_source, **options):
        asked.append(options["revision"])
        return tiny_model("llama"), {"missing_keys": [], "mismatched_keys": []}

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(subject_module, "_with_report", with_report)
    monkeypatch.setattr(
        subject_module.AutoTokenizer, "from_pretrained", lambda *_, **__: byte_tokenizer()
    )
    for revision in (None, "step143000"):
        asked.clear()
        identity = load_model("some/model", revision, "float32", "cpu").identity
        assert identity == {"id": "some/model", "revision": commit, "dtype": "float32"}
        assert asked == [revision, commit]


# How sites are written


@pytest.mark.parametrize(
    ("written", "site"),
    [
        ({"layer": 2, "stream": "resid_post"}, Site("resid_post", 2)),
        ("2.resid_post", Site("resid_post", 2)),
        ("blocks.4.hook_resid_pre", Site("resid_pre", 4)),
        ("blocks.4.hook_resid_mid", Site("resid_mid", 4)),
        ("blocks.14.hook_resid_post", Site("resid_post", 14)),
        ("blocks.4.hook_attn_out", Site("attn_out", 4)),
        ("blocks.4.hook_mlp_out", Site("mlp_out", 4)),
        ("blocks.4.mlp.hook_post", Site("mlp_hidden", 4)),
        ("blocks.4.mlp.hook_in", Site("mlp_in", 4)),
        ({"module": "model.layers.2.mlp", "side": "output"}, Site("model.layers.2.mlp.output")),
        ("model.layers.2.mlp.input", Site("model.layers.2.mlp.input")),
    ],
)
def test_a_site_is_understood_and_printed_so_that_it_is_understood_again(written, site):
    assert parse_site(written) == site
    assert parse_site(str(site)) == site


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (
            {"layer": 2, "stream": "resid_pst"},
            r"'resid_pst' \(nearest: resid_post\); there are: resid",
        ),
        ({"layer": -1, "stream": "resid_post"}, "layer -1: expected a whole number"),
        ({"layer": True, "stream": "resid_post"}, "layer True: expected a whole number"),
        ({"layer": 2}, "is not a site: expected"),
        ({"module": "model.layers.2.mlp", "side": "out"}, "expected one of input, output"),
        ("blocks.4.hook_resid_pots", r"nearest: hook_resid_post"),
        ("blocks.4.attn.hook_q", "has no stream here"),
        ("layer four", "is not a site"),
    ],
)
def test_a_site_that_is_not_understood_is_refused_with_what_is(written, message):
    with pytest.raises(UserError, match=message):
        parse_site(written)


# A trained model


@pytest.mark.skipif(not STORIES.is_dir(), reason="the real model is not beside this checkout")
def test_a_trained_model_predicts_stories_and_not_when_ablated():
    model, tokenizer, identity = load_model(str(STORIES), None, "float32", "cpu")
    assert identity["id"] == "stories260k-hf"
    source = text.Files("tinystories_clean.jsonl", folder=ASSETS / "text", field="text")
    tokens = text.tokenize(source, tokenizer, 512, 0, 10_000)
    lm = LanguageModel(model, tokens, identity, Cache(None), 8)
    # A row begins in the middle of a story, where the model is worse than it is on whole stories.
    stories_begun = lm.eval_special[:, :-1].cumsum(1)
    scored = ~lm.eval_special[:, :-1] & ~lm.eval_special[:, 1:]
    whole = (stories_begun > 1)[scored]
    losses = {}
    for site in (Site("resid_post", 2),):
        batches = [b.references() for b in lm.evaluation(site)]
        for name in ("clean", "zero", "mean"):
            loss = torch.cat([getattr(b, name) for b in batches])
            losses[site, name] = loss[whole].mean().item()
        assert 1.3 < losses[site, "clean"] < 1.5
        assert losses[site, "mean"] > losses[site, "clean"] + 0.05
    # Nothing of the text gets past the residual stream when all of it is replaced.
    assert losses[Site("resid_post", 2), "zero"] > 4
