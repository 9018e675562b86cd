"""The plan of a run: what it counts are sums by hand, what it measures is scaled rightly, and it writes nothing."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from saebench import planner, registry, suite, trainer
from saebench.runner import Options
from saebench.types import Site
from tests.conftest import WriteSuite

GIB = 2**30
NEOX = {"model_type": "gpt_neox", "vocab_size": 4096}
# The hidden size of the public model; vocabulary, depth and Gemma's MLP cut down.
REHEARSALS: dict[str, tuple[dict[str, Any], int, int]] = {
    "pythia-70m": (
        NEOX
        | {"hidden_size": 512, "num_hidden_layers": 5, "num_attention_heads": 8}
        | {"intermediate_size": 2048},
        3,
        # Attention and MLP of a block are 12 d^2 weights, with 9 d biases and two norms of 2 d.
        4 * (12 * 512**2 + 13 * 512),
    ),
    "pythia-160m": (
        NEOX
        | {"hidden_size": 768, "num_hidden_layers": 3, "num_attention_heads": 12}
        | {"intermediate_size": 3072},
        1,
        2 * (12 * 768**2 + 13 * 768),
    ),
    "gpt2-small": (
        {"model_type": "gpt2", "n_embd": 768, "n_layer": 3, "n_head": 12, "vocab_size": 4096},
        2,
        2 * (12 * 768**2 + 13 * 768),
    ),
    "gemma-2-2b": (
        {"model_type": "gemma2", "hidden_size": 2304, "num_hidden_layers": 2}
        | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
        | {"intermediate_size": 64, "vocab_size": 4096},
        0,
        # Queries and output of 8 heads, keys and values of 4, three matrices of the MLP, four norms.
        2304 * 256 * (8 + 8 + 4 + 4) + 3 * 2304 * 64 + 4 * 2304,
    ),
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured on as little as can be."""
    # Installed packages are searched for plug-ins at every look.
    monkeypatch.setattr(registry, "_added", functools.cache(registry._added))
    monkeypatch.setattr(planner, "_CPU_PRODUCT", 2**20)
    monkeypatch.setattr(planner, "_LEAST_WIDTH", 64)
    monkeypatch.setattr(planner, "_ENOUGH_SECONDS", 0.01)


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(
        tmp_path / "results", tmp_path / "checkpoints", tmp_path / "cache", "cpu", None, False
    )


def rehearsal(folder: Path, name: str, text: dict[str, Any] | None = None) -> Path:
    """A public suite with a small random model, and the bundled text where no other is given."""
    given = yaml.safe_load((registry.folder("suites") / f"{name}.yaml").read_text("utf-8"))
    config, layer, _ = REHEARSALS[name]
    given["model"] = {"config": config, "weights": "random", "dtype": given["model"]["dtype"]}
    given["sites"][0]["layer"] = layer
    if text is None:
        amounts = {"context": 1024, "train_tokens": 10_240, "eval_tokens": 2_000}
        given["text"] = {"source": "builtin:python-stdlib"} | amounts
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(given), encoding="utf-8")
    return path


def opened(path: Path, options: Options) -> planner.Work:
    return planner._open(suite.load(path), path, options)


@pytest.mark.slow
@pytest.mark.parametrize("name", REHEARSALS)
def test_a_public_suite_can_be_rehearsed(
    tmp_path: Path, options: Options, monkeypatch: pytest.MonkeyPatch, name: str
):
    # Weights, gradients and two moments of both matrices, and twice the latents of a batch.
    d = REHEARSALS[name][0].get("hidden_size", 768)
    per_latent = 4 * (4 * 2 * d + 2 * 2048)
    whole = per_latent * 6 * (4096 + 16384 + 65536)
    monkeypatch.setattr(trainer, "memory_for_training", lambda _device: float(whole))
    path = rehearsal(tmp_path, name)
    plan = planner.plan(suite.load(path), path, options)
    assert "to train: 126 of 126 SAEs, 5 steps each, in 7 groups" in plan
    groups = [line for line in plan if line.startswith("  group")]
    size = f"{whole / GIB:,.2f} GiB"
    # 42 SAEs of each width, 64, 16 or 4 units large, into 504: 7 x 64 + 3 x 16 + 2 x 4 six times, then the rest.
    assert groups == [
        f"  group {i}: {n} SAEs, {size}, 1 pass over the language model"
        for i, n in enumerate([12] * 6 + [24 + 30], 1)
    ]
    # 126, and for each of the 18 shapes one random and one permuted; identity, and PCA with 6 L0s and all.
    assert "to score: 170 SAEs, controls included" in plan
    assert any("an estimate from a measurement of" in line for line in plan)
    assert any("of width 65,536 measured at width 64" in line for line in plan)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", REHEARSALS)
def test_operations_bytes_and_tokens_are_those_of_a_sum_by_hand(
    tmp_path: Path, options: Options, monkeypatch: pytest.MonkeyPatch, name: str
):
    monkeypatch.setattr(trainer, "memory_for_training", lambda _device: 1e15)
    config, layer, below = REHEARSALS[name]
    d = config.get("hidden_size", 768)
    work = opened(rehearsal(tmp_path, name, text={}), options)
    site = work.suite.sites[0]
    assert work.lm.parameters_below(site) == below
    # Blocks are alike, so those above the site are worth the others; the output matrix is not left out.
    blocks, resid_post = len(work.lm.blocks), site.stream == "resid_post"
    assert work.lm.parameters_above(site) == (
        below // (layer + resid_post) * (blocks - layer - resid_post) + 4096 * d
    )

    found = planner.operations(work)
    assert found.train_lm == 2 * below * 488_282 * 1024
    widths, l0s = 4096 + 16384 + 65536, 20 + 40 + 80 + 160 + 320 + 640
    assert found.train_saes == 244_140 * 2048 * 7 * (6 * 2 * d * widths + 3 * 10 * d * l0s)
    # One pass to the site; three for the references, one for each of 22 groups of 8, one for each SAE.
    above = work.lm.parameters_above(site)
    assert found.score_lm == 2 * (below + (3 + 22 + 170) * above) * 977 * 1024

    memory = planner.device_bytes(work)
    assert memory["SAEs of the largest group"] == 7 * 6 * 4 * (8 * d + 4096) * widths
    assert memory["activation buffer"] == 4 * 262_144 * d
    size = 2 if name == "gemma-2-2b" else 4
    assert memory["language model"] == size * sum(p.numel() for p in work.lm.model.parameters())
    disk = planner.disk_bytes(work)
    weights = 4 * 7 * 6 * ((2 * d + 1) * widths + 3 * d)
    assert (disk["checkpoints"], disk["training state"]) == (weights, 3 * weights)
    assert disk["cache"] == 977 * 1024 * d * size


def test_a_pass_reads_as_many_rows_as_hold_the_tokens(write_suite: WriteSuite, options: Options):
    work = opened(write_suite(), options)
    tokens = work.lm.tokens
    seen = (~np.isin(tokens.train, sorted(tokens.special_ids))).sum(1)
    needed = int(np.searchsorted(np.cumsum(seen), 3200)) + 1
    assert abs(work.train_rows - needed) <= 1
    assert work.eval_rows == len(tokens.evaluation)


def test_a_text_of_the_hub_is_counted_and_not_read(
    tmp_path: Path, options: Options, monkeypatch: pytest.MonkeyPatch
):
    import datasets

    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("the text was asked for")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(trainer, "memory_for_training", lambda _device: 100.0 * GIB)
    path = rehearsal(tmp_path, "pythia-70m", text={})
    plan = planner.plan(suite.load(path), path, options)
    # 42 SAEs of each width take 1/8, 1/2 and 2 GiB: the widest go first, and then 32 of the next fit.
    assert [line for line in plan if line.startswith("  group")] == [
        "  group 1: 74 SAEs, 100.00 GiB, 1 pass over the language model",
        "  group 2: 52 SAEs, 10.25 GiB, 1 pass over the language model",
    ]
    whole = "\n".join(plan)
    assert "what is trained or scored already is not known" in whole
    assert "evaluation tokens in 977 sequences of 1024" in whole
    # 488,282 rows hold half a billion tokens; 244,140 batches of 2,048 are what is trained on.
    assert "reads 1,000,001,536 to train (2 x 500,000,768)" in whole
    assert "SAEs learn from 62,999,838,720 (126 x 499,998,720)" in whole
    assert list(tmp_path.iterdir()) == [path]


def test_a_group_larger_than_the_memory_is_named(
    tmp_path: Path, options: Options, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(trainer, "memory_for_training", lambda _device: 1.0 * GIB)
    path = rehearsal(tmp_path, "pythia-70m", text={})
    lines = planner._what(opened(path, options))
    larger = [line for line in lines if "more than there is for it" in line]
    assert len(larger) == 42  # each of the widest alone
    assert all(": 1 SAE, 2.00 GiB, " in line for line in larger)


def test_where_the_cache_has_no_room_the_text_is_read_for_every_group(
    write_suite: WriteSuite, options: Options, monkeypatch: pytest.MonkeyPatch
):
    path = write_suite()
    work = opened(path, options)
    place = (Site("resid_post", 1), Site("resid_post", 1))
    assert work.places == [place]
    assert (work.cached, work.reads(place)) == (True, 1)
    monkeypatch.setattr(planner, "_free_disk", lambda _folder: 100)
    work = opened(path, options)
    # The pass for the mean, that for the references, and one for the two SAEs together.
    assert (work.cached, work.reads(place)) == (False, 3)
    assert any("the cache has no room" in line for line in planner._disk(work))
    assert planner.disk_bytes(work)["cache"] == 0


def test_without_an_eval_that_asks_for_it_no_pass_is_resumed(
    write_suite: WriteSuite, options: Options
):
    work = opened(write_suite(evals=["sparsity", "reconstruction"]), options)
    assert work.resumes(work.places[0]) == 0
    assert planner.operations(work).score_lm == 2 * work.eval_tokens * work.lm.parameters_below(
        Site("resid_post", 1)
    )


@pytest.mark.parametrize(
    ("stream", "below", "above"),
    [
        (Site("resid_pre", 1), 1, 2),
        (Site("resid_post", 1), 2, 1),
        (Site("mlp_out", 1), 2, 2),
        (Site("model.layers.1.mlp.output"), 2, 2),
        (Site("model.norm.input"), 3, 3),
    ],
    ids=str,
)
def test_the_blocks_that_run_are_those_below_and_above_the_site(
    write_suite: WriteSuite, options: Options, stream: Site, below: int, above: int
):
    lm = opened(write_suite(), options).lm
    block = sum(p.numel() for p in lm.blocks[0].parameters())
    assert lm.parameters_below(stream) == below * block
    assert lm.parameters_above(stream) == above * block + 259 * 16


@pytest.mark.parametrize("variant", registry.names("variants"))
def test_a_step_of_every_variant_can_be_measured(
    write_suite: WriteSuite, options: Options, variant: str
):
    build = registry.get("variants", variant)
    entry: dict[str, Any] = {"variant": variant, "width": 64, "l0": 4}
    saes = [entry]
    if build.from_parent:
        entry["of"] = "topk"
        saes = [{"variant": "topk", "width": 64, "l0": 4}, entry]
    if build.target == "other":
        entry |= {"reads": "1.mlp_in", "predicts": "1.mlp_out"}
    work = opened(write_suite(saes=saes), options)
    pace = planner.measure(work)
    assert len(pace.step) == len(saes)
    assert all(0 < time < 10 for time in pace.step.values())


def test_the_encoder_bias_of_a_measured_step_makes_as_many_latents_active_as_are_wanted(
    write_suite: WriteSuite, options: Options, monkeypatch: pytest.MonkeyPatch
):
    seen = []
    monkeypatch.setattr(
        trainer,
        "learn",
        lambda training, _o, _r, lesson, _s: seen.append(
            (training.pre(lesson.x) > 0).float().sum(1).mean().item()
        ),
    )
    saes = [{"variant": "relu", "width": 2048, "l0": 64}]
    work = opened(write_suite(saes=saes), options)
    kind = planner._kind(work, work.missing[0])
    for k in (16, 64, 256):
        planner._training_step(work, kind._replace(d_in=256, d_out=256), 2048, 512, k)()
        assert seen[-1] == pytest.approx(k, rel=0.25)


def test_what_is_measured_on_less_is_scaled_by_how_much_less():
    cut: list[str] = []
    assert planner._noted(cut, "steps", (64, 32), (64, 32)) == 1
    assert cut == []
    assert planner._noted(cut, "steps", (64, 32), (256, 64)) == 8
    assert cut == ["steps of width 256 measured at width 64 on 32 tokens, and scaled"]


def test_the_time_is_the_sum_of_passes_steps_and_tokens(write_suite: WriteSuite, options: Options):
    work = opened(write_suite(), options)
    site = Site("resid_post", 1)
    (kind,) = {planner._kind(work, run) for run in work.missing}
    scores = {(32, 16, 16): 7.0, (16, 16, 16): 11.0}
    pace = planner.Pace(2.0, {site: 3.0}, {kind: 5.0}, scores, 0.0, [])
    found = planner.seconds(work, pace)
    assert found.train_lm == 2.0 * work.train_rows * 32
    assert found.train_saes == 5.0 * (3200 // 64)
    # Three references, one pass for the group, one for the SAE and one for the identity.
    assert found.score_lm == work.eval_rows * 32 * (2.0 + 3.0 * (3 + 1 + 2))
    assert found.score_saes == work.eval_rows * 32 * (7.0 + 11.0)


def test_a_measurement_is_about_as_long_as_the_work(options: Options):
    clock = planner._Clock("cpu")
    import time

    assert 0.02 <= clock.seconds(lambda: time.sleep(0.02)) < 1


def test_the_wrong_pattern_is_refused_without_the_text(tmp_path: Path, options: Options):
    from saebench.errors import UserError

    path = rehearsal(tmp_path, "pythia-70m", text={})
    with pytest.raises(UserError, match="--only 'nonsense' matches no SAE"):
        opened(path, options._replace(only="nonsense"))


def test_durations_are_told_in_the_unit_that_suits_them():
    told = [planner._duration(s) for s in (1.0, 119.0, 240.0, 7200.0, 86_400.0, 864_000.0)]
    assert told == ["1.0 s", "119.0 s", "4.0 min", "2.0 h", "24.0 h", "10.0 days"]


def test_evals_with_labels_alone_cost_no_pass_over_the_evaluation_text(
    write_suite: WriteSuite, options: Options
):
    probes = {"sparse_probing": {"train": 10, "validation": 10, "test": 10}}
    controls = ["shuffled_labels"]
    both = opened(write_suite(evals=["sparsity", probes], controls=controls), options)
    without = opened(write_suite(evals=["sparsity"], controls=[]), options)
    assert len(both.scored) > len(without.scored)
    assert planner.operations(both)[2:] == planner.operations(without)[2:]
    alone = opened(write_suite(evals=[probes], controls=controls), options)
    assert planner.operations(alone)[2:] == (0, 0) and alone.scored == both.scored
