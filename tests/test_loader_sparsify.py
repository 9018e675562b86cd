"""Checkpoints of EleutherAI's sparsify, written by hand; what to expect of them is worked out in NumPy."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from saebench import registry
from saebench.checkpoints import one_at, open_checkpoint
from saebench.errors import UserError
from saebench.exports._export import Origin
from saebench.exports.sparsify import Sparsify
from saebench.loaders._files import Limits
from saebench.loaders._loader import Told
from saebench.types import Site
from tests import toys

D, N, K = 5, 12, 3
SITE = Site("resid_post", 4)
MLP_IN, MLP_OUT = Site("layers.3.mlp.input"), Site("layers.3.mlp.output")


def tensors_of(skip=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    shapes = {"encoder.weight": (N, D), "encoder.bias": (N,), "W_dec": (N, D), "b_dec": (D,)}
    if skip:
        shapes["W_skip"] = (D, D)
    return {n: torch.randn(shape, generator=generator).to(dtype) for n, shape in shapes.items()}


def config_of(**changes):
    """As the newest release writes it; None leaves a key out."""
    config = {
        "activation": "topk",
        "expansion_factor": 32,
        "normalize_decoder": True,
        "num_latents": N,
        "k": K,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": D,
    }
    return {name: value for name, value in (config | changes).items() if value is not None}


def write(folder, tensors=None, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(**changes)
    tensors = tensors_of(config.get("skip_connection") is True) if tensors is None else tensors
    save_file(tensors, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def opened(folder, format=None, **told):
    return open_checkpoint(str(folder), format, Told(**told), Limits(), None, Path())


def only(folder, **told):
    (member,) = opened(folder, **told).members
    return member


def expected(tensors, x, transcode, activation):
    """Latents and prediction; the largest of each group, or of all."""
    p = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    centre = 0 if transcode else p["b_dec"]
    pre = np.maximum((x - centre) @ p["encoder.weight"].T + p["encoder.bias"], 0)
    z = np.zeros_like(pre)
    for row, a in zip(z, pre, strict=True):
        if activation == "topk":
            best = np.argsort(-a)[:K]
        else:
            size = N // K
            best = [size * group + a[size * group :][:size].argmax() for group in range(K)]
        row[best] = a[best]
    y_hat = z @ p["W_dec"] + p["b_dec"]
    return z, y_hat + (x @ p["W_skip"].T if "W_skip" in p else 0)


def predicts(sae, x):
    y_hat, beside = sae.decode(sae.encode(x)), sae.beside(x)
    return y_hat if beside is None else y_hat + beside


@pytest.fixture
def x():
    return torch.randn(40, D, generator=torch.Generator().manual_seed(1)) * 2 + 0.5


def agrees(sae, tensors, x, transcode=False, activation="topk"):
    z, y_hat = expected(tensors, x.double().numpy(), transcode, activation)
    assert 0.1 < (z != 0).mean() <= K / N
    np.testing.assert_allclose(sae.encode(x).numpy(), z, atol=1e-5)
    np.testing.assert_allclose(predicts(sae, x).numpy(), y_hat, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
@pytest.mark.parametrize("transcode", [False, True], ids=["sae", "transcoder"])
@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_it_encodes_and_predicts_as_it_is_defined(tmp_path, x, activation, transcode, skip, dtype):
    tensors = tensors_of(skip, dtype)
    settings = {"activation": activation, "transcode": transcode, "skip_connection": skip}
    folder = write(tmp_path / "sae", tensors, **settings)
    found = opened(folder, site=SITE, predicts=MLP_OUT if transcode else None)
    (member,) = found.members
    assert found.format == "sparsify"
    assert (member.site, member.target) == (SITE, MLP_OUT if transcode else SITE)
    agrees(member.load(), tensors, x, transcode, activation)


def test_a_transcoder_keeps_its_weights_bit_for_bit(tmp_path):
    tensors = tensors_of(skip=True)
    folder = write(tmp_path, tensors, transcode=True, skip_connection=True)
    sae = only(folder, site=MLP_IN, predicts=MLP_OUT).load()
    assert torch.equal(sae.W_enc.T, tensors["encoder.weight"])
    assert torch.equal(sae.get_parameter("b_enc"), tensors["encoder.bias"])
    assert torch.equal(sae.W_dec, tensors["W_dec"])
    assert torch.equal(sae.b_dec, tensors["b_dec"])
    assert torch.equal(sae.W_skip.T, tensors["W_skip"])


@pytest.mark.parametrize("num_latents", [0, None])
def test_the_width_follows_from_the_expansion_where_it_is_not_given(tmp_path, x, num_latents):
    generator = torch.Generator().manual_seed(5)
    shapes = {"encoder.weight": (3 * D, D), "encoder.bias": (3 * D,), "W_dec": (3 * D, D)}
    tensors = {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    tensors["b_dec"] = torch.zeros(D)
    folder = write(tmp_path, tensors, num_latents=num_latents, expansion_factor=3)
    assert only(folder, site=SITE).load().d_sae == 15


def test_what_older_releases_did_not_write_was_off(tmp_path, x):
    missing = dict.fromkeys(["activation", "transcode", "skip_connection", "multi_topk"])
    folder = write(tmp_path, **missing, signed=False)
    agrees(only(folder, site=SITE).load(), tensors_of(), x)


# Sites


def test_a_folder_by_itself_has_to_be_told_its_sites(tmp_path):
    for name in ("layers.4", "transcoder"):  # the name of a folder is no evidence
        folder = write(tmp_path / name, transcode=name == "transcoder")
        with pytest.raises(UserError, match="does not say at which site"):
            opened(folder)
    with pytest.raises(UserError, match="say so with predicts"):
        opened(tmp_path / "transcoder", site=MLP_IN)
    with pytest.raises(UserError, match="remove predicts"):
        opened(tmp_path / "layers.4", site=SITE, predicts=MLP_OUT)


@pytest.fixture
def whole_run(tmp_path):
    """Three hookpoints, one of them with two seeds, and earlier states of the run."""
    run = tmp_path / "run"
    for name in ("layers.2", "embed_tokens", "layers.3.mlp/seed0", "layers.3.mlp/seed1"):
        write(run / name)
    write(run / "best" / "layers.2" / "layers.2")
    (run / "config.json").write_text(json.dumps({"sae": {}, "model": "org/model", "lr": 1e-3}))
    (run / "state.pt").write_bytes(b"never read")
    return run


def test_a_whole_run_gives_the_output_of_each_module_its_saes(whole_run, x):
    members = opened(whole_run).members
    assert [str(m.site) for m in members] == [
        "embed_tokens.output",
        "2.resid_post",
        "layers.3.mlp.output",
        "layers.3.mlp.output",
    ]
    assert all(m.target == m.site and m.model == "org/model" for m in members)
    agrees(members[1].load(), tensors_of(), x)


def test_a_site_chooses_among_those_of_a_run(whole_run):
    assert only(whole_run, site=Site("resid_post", 2)).site == Site("resid_post", 2)
    assert len(opened(whole_run, site=MLP_OUT).members) == 2
    assert one_at(opened(whole_run), [(Site("resid_post", 2),) * 2]).site.layer == 2
    with pytest.raises(
        UserError, match=r"no SAE as site .*; it has embed_tokens\.output, 2\.resid"
    ):
        opened(whole_run, site=Site("resid_post", 3))


@pytest.mark.parametrize(
    ("hookpoint", "site", "target"),
    [
        ("layers.3.mlp", MLP_IN, MLP_OUT),
        ("h.11", Site("resid_pre", 11), Site("resid_post", 11)),
        ("decoder.layers.0", Site("resid_pre", 0), Site("resid_post", 0)),
        ("layers.0.self_attn", Site("layers.0.self_attn.input"), Site("layers.0.self_attn.output")),
    ],
)
def test_a_transcoder_reads_the_input_of_its_module(tmp_path, hookpoint, site, target):
    write(tmp_path / hookpoint, transcode=True)
    member = only(tmp_path)
    assert (member.site, member.target, member.model) == (site, target, None)
    assert only(tmp_path, predicts=target).target == target


@pytest.mark.parametrize("name", ["runs/layers.2", "layers.2/seed0/old", "layers.2/seedy"])
def test_a_folder_that_no_run_has_is_refused(tmp_path, name):
    write(tmp_path / name)
    with pytest.raises(UserError, match="is not where a run keeps an SAE"):
        opened(tmp_path)


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"signed": True}, "has signed true: latents by their size, negative ones too"),
        ({"signed": 0}, "signed is 0; expected true or false"),
        ({"activation": "jumprelu"}, "activation 'jumprelu'; expected one of topk, groupmax"),
        ({"activation": ["topk"]}, "expected one of topk, groupmax"),
        ({"transcode": "yes"}, "transcode is 'yes'; expected true or false"),
        ({"hop": 1}, "has hop, which this format does not have"),
        ({"k": 0}, "k is 0; expected a whole number"),
        ({"k": 3.0}, r"k is 3\.0; expected a whole number"),
        ({"d_in": "5"}, "d_in is '5'; expected a whole number"),
        ({"num_latents": -1}, "num_latents is -1; expected a whole number"),
        ({"num_latents": 0, "expansion_factor": None}, "expansion_factor is None; expected"),
    ],
)
def test_a_configuration_that_is_not_understood_is_refused(tmp_path, changes, message):
    folder = write(tmp_path, tensors_of(), **changes)
    with pytest.raises(UserError, match=message):
        opened(folder, site=SITE)


@pytest.mark.parametrize("key", ["k", "d_in"])
def test_a_configuration_that_lacks_something_is_refused(tmp_path, key):
    folder = write(tmp_path, **{key: None})
    with pytest.raises(UserError, match="is in no known format"):
        opened(folder, site=SITE)
    with pytest.raises(UserError, match=f"lacks {key}"):
        opened(folder, "sparsify", site=SITE)


@pytest.mark.parametrize(
    ("changes", "tensors", "message"),
    [
        ({"skip_connection": True}, tensors_of(), "lacks W_skip"),
        ({}, tensors_of(skip=True), "has W_skip, which this format does not have"),
        ({"num_latents": N + 1}, tensors_of(), "do not fit together"),
        ({"d_in": D + 1}, tensors_of(), "do not fit together"),
        ({"d_in": 10**9}, tensors_of(), "d_in is 1000000000; expected"),
        ({"k": N + 1}, tensors_of(), "k is 13; it must be from 1 to the width, 12"),
        ({"activation": "groupmax", "k": 5}, tensors_of(), "k is 5; it must divide the width"),
        ({}, tensors_of() | {"b_dec": torch.full((D,), torch.inf)}, "not finite"),
        ({}, tensors_of() | {"b_dec": torch.full((D,), 3e38)}, "too large"),
        ({}, {n: t for n, t in tensors_of().items() if n != "W_dec"}, "lacks W_dec"),
        (
            {},
            tensors_of() | {"encoder.weight": torch.zeros(N)},
            r"encoder\.weight has the shape \(12,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_the_configuration_are_refused(tmp_path, changes, tensors, message):
    member = only(write(tmp_path, tensors, **changes), site=SITE)
    with pytest.raises(UserError, match=message):
        member.load()


def test_k_and_norm_are_told_in_vain(tmp_path):
    folder = write(tmp_path)
    for told in ({"k": 3}, {"norm": 1.0}):
        with pytest.raises(UserError, match="has no meaning for this checkpoint"):
            opened(folder, site=SITE, **told)


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "cfg.json").write_text(json.dumps(config_of()))
    with pytest.raises(UserError, match=r"no cfg\.json with a sae\.safetensors beside it"):
        opened(tmp_path, "sparsify", site=SITE)


@pytest.mark.parametrize("text", ["{", "[]", '{"k": 1, "k": 2}'])
def test_a_configuration_that_cannot_be_read_fits_no_format(tmp_path, text):
    write(tmp_path)
    (tmp_path / "cfg.json").write_text(text)
    with pytest.raises(UserError, match="is in no known format"):
        opened(tmp_path, site=SITE)


# GroupMax


def test_groupmax_keeps_the_largest_of_each_run_of_latents():
    sae = registry.get("saes", "groupmax")(2, 6, k=2)
    sae.W_enc.copy_(torch.tensor([[1.0, 2.0, 3.0, -1.0, -2.0, -3.0], [0, 0, 0, 0, 0, 0]]))
    assert sae.encode(torch.tensor([[1.0, 9.0]])).tolist() == [[0, 0, 3, 0, 0, 0]]
    assert sae.encode(torch.tensor([[-1.0, 9.0]])).tolist() == [[0, 0, 0, 0, 0, 3]]
    sae.b_enc.copy_(torch.tensor([0, 4, 0, 5, 0, 0]))
    assert sae.encode(torch.tensor([[1.0, 0.0]])).tolist() == [[0, 6, 0, 4, 0, 0]]


@pytest.mark.parametrize("k", [0, 5, 13, -2])
def test_groupmax_refuses_groups_of_several_sizes(k):
    with pytest.raises(UserError, match=f"k is {k}; it must divide the width, 12, into groups"):
        registry.get("saes", "groupmax")(D, 12, k=k)


# Exports

HERE = Origin(SITE, SITE, "org/model")
ACROSS = Origin(MLP_IN, MLP_OUT, "org/model")


@pytest.mark.parametrize("origin", [HERE, ACROSS], ids=["sae", "transcoder"])
@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
@pytest.mark.parametrize("architecture", ["topk", "groupmax"])
def test_what_is_exported_is_read_again_bit_for_bit_but_for_a_folded_bias(
    tmp_path, architecture, skip, origin
):
    sae = toys.sae_of(architecture, 7, 20, skip=skip)
    Sparsify().write(sae, origin, tmp_path)
    again = only(tmp_path, site=origin.site, predicts=origin.target).load()
    assert type(again) is type(sae) and again.arguments() == sae.arguments()
    for name, weight in sae.state_dict().items():
        if name == "b_enc" and origin == HERE:
            torch.testing.assert_close(again.state_dict()[name], weight, rtol=1e-6, atol=2e-6)
        else:
            assert torch.equal(again.state_dict()[name], weight), name


def test_an_exported_sae_subtracts_its_decoder_bias_first(tmp_path, x):
    sae = toys.sae_of("topk", D, N)
    Sparsify().write(sae, HERE, tmp_path)
    tensors = load_file(tmp_path / "sae.safetensors")
    p = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    pre = (x.double().numpy() - p["b_dec"]) @ p["encoder.weight"].T + p["encoder.bias"]
    W_enc, b_enc = sae.W_enc.double().numpy(), sae.b_enc.double().numpy()
    np.testing.assert_allclose(pre, x.double().numpy() @ W_enc + b_enc, atol=1e-5)


def test_no_file_is_left_of_what_cannot_be_said(tmp_path):
    with pytest.raises(UserError, match="one width for what is read and what is predicted"):
        Sparsify().write(toys.sae_of("topk", D, N, d_out=D + 1), ACROSS, tmp_path)
    for name in sorted(set(registry.names("saes")) - {"topk", "groupmax"}):
        with pytest.raises(UserError, match="sparsify has TopK and GroupMax"):
            Sparsify().write(toys.sae_of(name), HERE, tmp_path)
    assert not list(tmp_path.iterdir())
