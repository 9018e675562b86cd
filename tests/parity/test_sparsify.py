"""sparsify's own checkpoints, read by ours; and ours, read by theirs."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from saebench.checkpoints import open_checkpoint
from saebench.exports._export import Origin
from saebench.exports.sparsify import Sparsify
from saebench.loaders._files import Limits
from saebench.loaders._loader import Told
from saebench.types import Site
from tests import toys

pytest.importorskip("sparsify", exc_type=ImportError)

from sparsify import (  # noqa: E402
    SparseCoder,
    SparseCoderConfig,
    TrainConfig,
    Trainer,
    sparse_coder,
    utils,
)

D = 7
MLP_IN, MLP_OUT = Site("layers.3.mlp.input"), Site("layers.3.mlp.output")
HERE = Site("resid_post", 3)
WIDTHS = {"topk": (23, 4), "groupmax": (24, 4)}
"""Latents, and how many of them are active; groups have one size."""


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    """Theirs decodes by a kernel for GPUs wherever Triton is installed."""
    monkeypatch.setattr(sparse_coder, "decoder_impl", utils.eager_decode)


@pytest.fixture
def x():
    return torch.randn(200, D) * 2 + 1


def coder(activation, dtype=torch.float32, **settings):
    n, k = WIDTHS[activation]
    config = {"activation": activation, "k": k, "num_latents": n} | settings
    made = SparseCoder(D, SparseCoderConfig(**config), dtype=dtype)
    for parameter in made.parameters():
        parameter.data.copy_(torch.randn(parameter.shape) * 0.5)
    return made


def read(folder, **told):
    """By ours, and recognised without being told."""
    found = open_checkpoint(str(folder), None, Told(**told), Limits(), None, Path())
    assert found.format == "sparsify"
    return found.members


def dense(theirs, x):
    """Their latents, and what they predict of them."""
    with torch.no_grad():
        top = theirs.encode(x)
        z = torch.zeros(len(x), theirs.num_latents).scatter_(-1, top.top_indices, top.top_acts)
        y_hat = theirs(x, x).sae_out
    return z, y_hat


def predicted(ours, x):
    y_hat, beside = ours.decode(ours.encode(x)), ours.beside(x)
    return y_hat if beside is None else y_hat + beside


def both_agree(agree, name, dtype, ours, theirs, x):
    z, y_hat = dense(theirs.float(), x)
    assert 0.02 < (z != 0).float().mean() < 0.5, "nothing would be shown"
    agree("sparsify", name, dtype, ours.encode(x), z)
    agree("sparsify", name, dtype, predicted(ours, x), y_hat)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
@pytest.mark.parametrize("transcode", [False, True], ids=["sae", "transcoder"])
@pytest.mark.parametrize("activation", WIDTHS)
def test_what_they_wrote_is_the_same_function_here(
    tmp_path, agree, x, activation, transcode, skip, dtype
):
    made = coder(activation, dtype, transcode=transcode, skip_connection=skip)
    made.save_to_disk(tmp_path / "layers.3.mlp")
    theirs = SparseCoder.load_from_disk(tmp_path / "layers.3.mlp")
    (member,) = read(tmp_path)
    assert (member.site, member.target) == (MLP_IN if transcode else MLP_OUT, MLP_OUT)
    parts = [activation, "transcoder" if transcode else "SAE", "skip" if skip else ""]
    both_agree(agree, " ".join(parts).strip(), dtype, member.load(), theirs, x)


def test_a_width_by_expansion_is_that_of_theirs(tmp_path, agree, x):
    coder("topk", num_latents=0, expansion_factor=3).save_to_disk(tmp_path)
    (member,) = read(tmp_path, site=HERE)
    ours, theirs = member.load(), SparseCoder.load_from_disk(tmp_path)
    assert ours.d_sae == theirs.num_latents == 21
    both_agree(agree, "topk SAE", torch.float32, ours, theirs, x)


def test_a_folder_of_several_is_what_theirs_loads_from_it(tmp_path, agree, x):
    for name in ("layers.3", "layers.10", "embed_tokens"):
        coder("topk").save_to_disk(tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps({"model": "org/model"}))
    theirs = SparseCoder.load_many(str(tmp_path), local=True)
    ours = {str(m.site): m for m in read(tmp_path)}
    sites = {"layers.3": "3.resid_post", "layers.10": "10.resid_post"}
    sites["embed_tokens"] = "embed_tokens.output"
    assert ours.keys() == set(sites.values()) and theirs.keys() == sites.keys()
    for name, site in sites.items():
        assert ours[site].model == "org/model"
        both_agree(agree, "topk SAE", torch.float32, ours[site].load(), theirs[name], x)


@pytest.mark.parametrize("transcode", [False, True], ids=["sae", "transcoder"])
@pytest.mark.parametrize("activation", WIDTHS)
def test_one_of_theirs_after_some_training_is_the_same_function_here(
    tmp_path, agree, activation, transcode
):
    """The steps of their trainer, on its own loss: unit directions for SAEs, none for transcoders."""
    n, k = WIDTHS[activation]
    config = SparseCoderConfig(activation=activation, k=k, num_latents=n, transcode=transcode)
    made = SparseCoder(D, config)
    optimizer = torch.optim.Adam(made.parameters(), lr=0.01)
    mixed = torch.randn(D, D)
    for _ in range(60):
        x = torch.randn(64, D) + 1
        made(x, (x @ mixed).abs() if transcode else x).fvu.backward()
        if not transcode:
            made.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        if not transcode:
            made.set_decoder_norm_to_unit_norm()
    made.save_to_disk(tmp_path)
    (member,) = read(tmp_path, site=HERE, predicts=MLP_OUT if transcode else None)
    name = f"{activation} {'transcoder' if transcode else 'SAE'}"
    both_agree(agree, name, torch.float32, member.load(), made, torch.randn(200, D) + 1)


@pytest.mark.parametrize("transcode", [False, True], ids=["sae", "transcoder"])
def test_a_run_of_their_trainer_is_read_as_it_is_laid_out(tmp_path, agree, transcode):
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=D + 1,
            intermediate_size=12,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )
    ids = torch.randint(0, 50, (64, 16)).tolist()
    config = TrainConfig(
        SparseCoderConfig(k=4, num_latents=23, transcode=transcode),
        batch_size=8,
        hookpoints=["layers.1", "layers.2.mlp"],
        optimizer="adam",
        lr=0.01,
        lr_warmup_steps=1,
        save_dir=str(tmp_path),
        run_name="run",
        log_to_wandb=False,
    )
    Trainer(config, Dataset.from_dict({"input_ids": ids}).with_format("torch"), model).fit()
    members = read(tmp_path / "run")
    pre, post = Site("resid_pre", 1), Site("resid_post", 1)
    mlp = [Site("layers.2.mlp.input"), Site("layers.2.mlp.output")]
    places = [(pre, post), tuple(mlp)] if transcode else [(post, post), (mlp[1], mlp[1])]
    assert [(m.site, m.target) for m in members] == places
    name, x = f"topk {'transcoder' if transcode else 'SAE'}", torch.randn(200, D + 1)
    for member, hookpoint in zip(members, config.hookpoints, strict=True):
        theirs = SparseCoder.load_from_disk(tmp_path / "run" / hookpoint)
        both_agree(agree, name, torch.float32, member.load(), theirs, x)


@pytest.mark.parametrize("transcode", [False, True], ids=["sae", "transcoder"])
@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
@pytest.mark.parametrize("architecture", WIDTHS)
def test_what_ours_wrote_is_the_same_function_there_and_comes_back(
    tmp_path, agree, x, architecture, skip, transcode
):
    ours = toys.sae_of(architecture, D, WIDTHS[architecture][0], skip=skip)
    origin = Origin(MLP_IN, MLP_OUT, None) if transcode else Origin(HERE, HERE, None)
    Sparsify().write(ours, origin, tmp_path)
    theirs = SparseCoder.load_from_disk(tmp_path)
    both_agree(agree, f"{architecture} exported", torch.float32, ours, theirs, x)
    theirs.save_to_disk(tmp_path / "back")
    (member,) = read(tmp_path / "back", site=origin.site, predicts=origin.target)
    again = member.load().state_dict()
    for name, weight in ours.state_dict().items():
        if name == "b_enc" and not transcode:
            torch.testing.assert_close(again[name], weight, rtol=1e-6, atol=2e-6)
        else:
            assert torch.equal(again[name], weight), name
