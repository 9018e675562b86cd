"""Checkpoints of dictionary_learning, written by hand; what to expect of them is worked out in NumPy."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from saebench import registry
from saebench.checkpoints import open_checkpoint
from saebench.errors import UserError
from saebench.exports._export import Origin
from saebench.exports.dictionary_learning import DictionaryLearning
from saebench.loaders._files import Limits
from saebench.loaders._loader import Told
from saebench.types import Site
from tests import toys

D, N, K = 5, 11, 3
CLASSES = {
    "AutoEncoder": {
        "encoder.weight": (N, D),
        "encoder.bias": (N,),
        "decoder.weight": (D, N),
        "bias": (D,),
    },
    "AutoEncoderNew": {
        "encoder.weight": (N, D),
        "encoder.bias": (N,),
        "decoder.weight": (D, N),
        "decoder.bias": (D,),
    },
    "GatedAutoEncoder": {
        "decoder_bias": (D,),
        "encoder.weight": (N, D),
        "r_mag": (N,),
        "gate_bias": (N,),
        "mag_bias": (N,),
        "decoder.weight": (D, N),
    },
    "AutoEncoderTopK": {
        "encoder.weight": (N, D),
        "encoder.bias": (N,),
        "decoder.weight": (D, N),
        "b_dec": (D,),
    },
    "BatchTopKSAE": {
        "encoder.weight": (N, D),
        "encoder.bias": (N,),
        "decoder.weight": (D, N),
        "b_dec": (D,),
        "threshold": (),
    },
    "MatryoshkaBatchTopKSAE": {
        "W_enc": (D, N),
        "b_enc": (N,),
        "W_dec": (N, D),
        "b_dec": (D,),
        "threshold": (),
    },
    "JumpReluAutoEncoder": {
        "W_enc": (D, N),
        "b_enc": (N,),
        "W_dec": (N, D),
        "b_dec": (D,),
        "threshold": (N,),
    },
}
KEPT_K = ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE")
BIASES = {
    "bias",
    "encoder.bias",
    "decoder.bias",
    "decoder_bias",
    "gate_bias",
    "mag_bias",
    "b_enc",
    "b_dec",
    "threshold",
}
ALLOWED = Limits(allow_pickle=True)
SITE = Site("resid_post", 4)


def tensors_of(dict_class, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    made = {
        name: (0.7 * torch.randn(shape, generator=generator)).to(dtype)
        for name, shape in CLASSES[dict_class].items()
    }
    if "threshold" in made:
        made["threshold"] = made["threshold"].abs()
    if dict_class in KEPT_K:
        made["k"] = torch.tensor(K, dtype=torch.int32)
    if dict_class == "AutoEncoderTopK":
        made["threshold"] = torch.tensor(-1.0)
    if dict_class == "MatryoshkaBatchTopKSAE":
        made["group_sizes"] = torch.tensor([4, 7])
    return made


def config_of(dict_class, /, **changes):
    trainer = {
        "trainer_class": "SomeTrainer",
        "dict_class": dict_class,
        "activation_dim": D,
        "dict_size": N,
        "lr": 0.001,
        "layer": 4,
        "lm_name": "org/model",
        "submodule_name": "resid_post_layer_4",
    }
    if dict_class in KEPT_K:
        trainer["k"] = K
    return {"trainer": trainer | changes, "buffer": {"io": "out", "ctx_len": 128}}


def write(folder, dict_class="AutoEncoderNew", tensors=None, config=None, pickled=False):
    folder.mkdir(parents=True, exist_ok=True)
    tensors = tensors_of(dict_class) if tensors is None else tensors
    if pickled:
        torch.save(tensors, folder / "ae.pt")
    else:
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "ae.safetensors")
    config = config_of(dict_class) if config is None else config
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def opened(folder, limits=ALLOWED, **told):
    return open_checkpoint(str(folder), None, Told(**told), limits, None, Path())


def only(folder, limits=ALLOWED, **told):
    (member,) = opened(folder, limits, **told).members
    return member


def relu(a):
    return np.maximum(a, 0)


def top(a):
    z = np.zeros_like(a)
    for row, pre in zip(z, a, strict=True):
        best = np.argsort(-pre)[:K]
        row[best] = pre[best]
    return z


def expected(dict_class, tensors, x):
    """Latents and reconstruction, as the classes define them."""
    p = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    if dict_class == "AutoEncoder":
        z = relu((x - p["bias"]) @ p["encoder.weight"].T + p["encoder.bias"])
        return z, z @ p["decoder.weight"].T + p["bias"]
    if dict_class == "AutoEncoderNew":
        z = relu(x @ p["encoder.weight"].T + p["encoder.bias"])
        return z, z @ p["decoder.weight"].T + p["decoder.bias"]
    if dict_class == "GatedAutoEncoder":
        pi = (x - p["decoder_bias"]) @ p["encoder.weight"].T
        z = (pi + p["gate_bias"] > 0) * relu(np.exp(p["r_mag"]) * pi + p["mag_bias"])
        return z, z @ p["decoder.weight"].T + p["decoder_bias"]
    if dict_class in ("AutoEncoderTopK", "BatchTopKSAE"):
        f = relu((x - p["b_dec"]) @ p["encoder.weight"].T + p["encoder.bias"])
        z = top(f) if dict_class == "AutoEncoderTopK" else f * (f > p["threshold"])
        return z, z @ p["decoder.weight"].T + p["b_dec"]
    centre = 0 if dict_class == "JumpReluAutoEncoder" else p["b_dec"]
    pre = (x - centre) @ p["W_enc"] + p["b_enc"]
    z = relu(pre * (pre > p["threshold"]))
    return z, z @ p["W_dec"] + p["b_dec"]


def lengths(tensors):
    return np.linalg.norm(tensors["decoder.weight"].double().numpy(), axis=0)


@pytest.fixture
def x():
    return torch.randn(40, D, generator=torch.Generator().manual_seed(1)) * 2 + 0.5


def agrees(sae, dict_class, tensors, x):
    z, x_hat = expected(dict_class, tensors, x.double().numpy())
    if dict_class == "AutoEncoder":
        z = z * lengths(tensors)
    assert 0.05 < (z != 0).mean() < 0.95
    np.testing.assert_allclose(sae.encode(x).numpy(), z, atol=1e-5)
    np.testing.assert_allclose(sae.decode(sae.encode(x)).numpy(), x_hat, atol=1e-5)


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dict_class", CLASSES)
def test_every_class_encodes_and_decodes_as_it_is_defined(tmp_path, x, dict_class, dtype, pickled):
    tensors = tensors_of(dict_class, dtype)
    found = opened(write(tmp_path / "sae", dict_class, tensors, pickled=pickled))
    (member,) = found.members
    assert found.format == "dictionary_learning"
    assert (member.site, member.target, member.model) == (SITE, SITE, "org/model")
    agrees(member.load(), dict_class, tensors, x)


def test_an_autoencoder_gets_directions_of_length_one_and_keeps_its_reconstructions(tmp_path):
    sae = only(write(tmp_path, "AutoEncoder")).load()
    np.testing.assert_allclose(sae.W_dec.norm(dim=-1).numpy(), np.ones(N), rtol=1e-6)


@pytest.mark.parametrize("dict_class", sorted(CLASSES.keys() - {"AutoEncoder"}))
def test_no_other_class_has_its_directions_rescaled(tmp_path, dict_class):
    sae = only(write(tmp_path, dict_class)).load()
    tensors = tensors_of(dict_class)
    W_dec = tensors["W_dec"] if "W_dec" in tensors else tensors["decoder.weight"].T
    assert torch.equal(sae.W_dec, W_dec)


def test_a_direction_of_length_zero_does_not_spoil_an_autoencoder(tmp_path, x):
    tensors = tensors_of("AutoEncoder")
    tensors["decoder.weight"][:, 2] = 0
    sae = only(write(tmp_path, "AutoEncoder", tensors)).load()
    _, x_hat = expected("AutoEncoder", tensors, x.double().numpy())
    np.testing.assert_allclose(sae.decode(sae.encode(x)).numpy(), x_hat, atol=1e-5)


def test_directions_of_length_one_are_left_bit_for_bit(tmp_path):
    tensors = tensors_of("AutoEncoder")
    tensors["decoder.weight"] /= tensors["decoder.weight"].norm(dim=0)
    sae = only(write(tmp_path, "AutoEncoder", tensors)).load()
    assert torch.equal(sae.W_dec, tensors["decoder.weight"].T)
    assert torch.equal(sae.W_enc, tensors["encoder.weight"].T)


def test_a_negative_threshold_of_a_jumprelu_lets_nothing_negative_through(tmp_path, x):
    tensors = tensors_of("JumpReluAutoEncoder")
    tensors["threshold"][:4] = -0.5
    sae = only(write(tmp_path, "JumpReluAutoEncoder", tensors)).load()
    agrees(sae, "JumpReluAutoEncoder", tensors, x)
    assert (sae.encode(x) >= 0).all()


def test_the_threshold_in_a_topk_checkpoint_changes_nothing(tmp_path, x):
    tensors = tensors_of("AutoEncoderTopK") | {"threshold": torch.tensor(1.5)}
    sae = only(write(tmp_path, "AutoEncoderTopK", tensors)).load()
    agrees(sae, "AutoEncoderTopK", tensors, x)


# How many latents


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def test_k_of_the_weights_or_of_the_configuration_is_enough(tmp_path):
    config = config_of("AutoEncoderTopK")
    del config["trainer"]["k"]
    tensors = tensors_of("AutoEncoderTopK")
    assert only(write(tmp_path / "a", "AutoEncoderTopK", tensors, config)).load().k == K
    old = without(tensors, "k", "threshold")  # as older releases write it
    assert only(write(tmp_path / "b", "AutoEncoderTopK", old)).load().k == K


def test_k_that_nobody_wrote_has_to_be_told(tmp_path):
    config = config_of("AutoEncoderTopK")
    del config["trainer"]["k"]
    folder = write(tmp_path, "AutoEncoderTopK", without(tensors_of("AutoEncoderTopK"), "k"), config)
    assert only(folder, k=2).load().k == 2
    with pytest.raises(UserError, match="does not say how many latents a token has"):
        only(folder).load()


def test_k_that_is_told_in_vain_is_refused(tmp_path):
    with pytest.raises(UserError, match="k has no meaning for this checkpoint"):
        opened(write(tmp_path / "a", "BatchTopKSAE"), k=2)
    with pytest.raises(UserError, match="k has no meaning for this checkpoint"):
        opened(write(tmp_path / "b", "AutoEncoderTopK"), k=2)
    config = config_of("AutoEncoderTopK")
    del config["trainer"]["k"]
    folder = write(tmp_path / "c", "AutoEncoderTopK", config=config)
    with pytest.raises(UserError, match="has k 3 itself; remove k"):
        only(folder, k=2).load()


# Sites


@pytest.mark.parametrize(
    "changes",
    [
        {"submodule_name": None},
        {"submodule_name": "resid_pre_layer_4"},
        {"submodule_name": "mlp_out_layer_4"},
        {"submodule_name": "resid_post"},
    ],
)
def test_a_submodule_that_may_be_anything_has_to_be_told(tmp_path, changes):
    folder = write(tmp_path, config=config_of("AutoEncoderNew", **changes))
    with pytest.raises(UserError, match="does not say at which site it was trained"):
        opened(folder)
    assert only(folder, site=Site("mlp_out", 4)).site == Site("mlp_out", 4)


def test_the_input_of_a_block_is_not_taken_for_its_output(tmp_path):
    folder = write(tmp_path, config=config_of("AutoEncoderNew") | {"buffer": {"io": "in"}})
    with pytest.raises(UserError, match="does not say at which site"):
        opened(folder)


def test_a_transcoder_has_to_be_told_both_of_its_sites(tmp_path):
    folder = write(tmp_path, config=config_of("AutoEncoderNew") | {"buffer": {"io": "in_and_out"}})
    mlp_in, mlp_out = Site("mlp_in", 4), Site("mlp_out", 4)
    with pytest.raises(UserError, match="site"):
        opened(folder, predicts=mlp_out)
    with pytest.raises(UserError, match="predicts"):
        opened(folder, site=mlp_in)
    member = only(folder, site=mlp_in, predicts=mlp_out)
    assert (member.site, member.target) == (mlp_in, mlp_out)


def test_a_site_that_contradicts_the_files_is_refused(tmp_path):
    folder = write(tmp_path)
    assert only(folder, site=SITE).site == SITE
    with pytest.raises(UserError, match=r"was trained at 4\.resid_post, and site says 5\."):
        opened(folder, site=Site("resid_post", 5))


def test_each_trainer_of_a_run_is_one_sae(tmp_path, x):
    for i, dict_class in enumerate(["AutoEncoder", "JumpReluAutoEncoder"]):
        config = config_of(dict_class, layer=i, submodule_name=f"resid_post_layer_{i}")
        write(tmp_path / "run" / f"trainer_{i}", dict_class, config=config)
    members = opened(tmp_path / "run").members
    assert [m.site.layer for m in members] == [0, 1]
    agrees(members[1].load(), "JumpReluAutoEncoder", tensors_of("JumpReluAutoEncoder"), x)
    (asked,) = opened(tmp_path / "run", site=Site("resid_post", 0)).members
    agrees(asked.load(), "AutoEncoder", tensors_of("AutoEncoder"), x)
    with pytest.raises(UserError, match=r"2 SAEs, none of which was trained at 7\.resid_post"):
        opened(tmp_path / "run", site=Site("resid_post", 7))


# Pickles


class Evil:
    """Makes a folder when it is unpickled by what runs code."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def test_nothing_is_unpickled_unless_the_user_allows_it(tmp_path):
    folder = write(tmp_path, pickled=True)
    member = only(folder, Limits())  # its structure is known without
    with pytest.raises(UserError, match="say --allow-pickle-weights"):
        member.load()


@pytest.mark.parametrize("allow", [False, True])
def test_code_in_a_pickle_never_runs(tmp_path, allow):
    folder = write(
        tmp_path / "sae", tensors={"encoder.weight": Evil(tmp_path / "pwned")}, pickled=True
    )
    with pytest.raises(UserError):
        only(folder, Limits(allow_pickle=allow)).load()
    assert not (tmp_path / "pwned").exists()


def test_a_safetensors_file_is_taken_before_a_pickle(tmp_path, x):
    write(tmp_path, tensors={"encoder.weight": Evil(tmp_path / "pwned")}, pickled=True)
    sae = only(write(tmp_path), Limits()).load()
    agrees(sae, "AutoEncoderNew", tensors_of("AutoEncoderNew"), x)


# Runs that were interrupted


def interrupted(dict_class, norm_factor):
    tensors = tensors_of(dict_class)
    state = {"step": 10, "ae": tensors, "optimizer": {"state": {}}, "config": {}}
    return tensors, state | {"norm_factor": norm_factor}


@pytest.mark.parametrize("dict_class", CLASSES)
def test_an_interrupted_run_gives_an_sae_of_raw_activations(tmp_path, x, dict_class):
    """Biases and thresholds are in units of activations / 2.5, and nothing else is."""
    tensors, state = interrupted(dict_class, 2.5)
    sae = only(write(tmp_path, dict_class, state, pickled=True)).load()
    raw = {n: 2.5 * t if n in BIASES and t.is_floating_point() else t for n, t in tensors.items()}
    agrees(sae, dict_class, raw, 2.5 * x)


def test_an_interrupted_run_without_normalisation_is_as_it_is(tmp_path, x):
    tensors, state = interrupted("BatchTopKSAE", None)
    sae = only(write(tmp_path, "BatchTopKSAE", state, pickled=True)).load()
    agrees(sae, "BatchTopKSAE", tensors, x)


@pytest.mark.parametrize("norm_factor", [0, -1.0, float("nan"), float("inf"), "2", True])
def test_a_norm_factor_that_is_none_is_refused(tmp_path, norm_factor):
    _, state = interrupted("AutoEncoder", norm_factor)
    with pytest.raises(UserError, match="expected a number above 0|is not a number"):
        only(write(tmp_path, "AutoEncoder", state, pickled=True)).load()


def test_an_interrupted_run_that_lacks_its_norm_factor_is_refused(tmp_path):
    _, state = interrupted("AutoEncoder", 1.0)
    del state["norm_factor"]
    with pytest.raises(UserError, match="interrupted run.* lacks norm_factor"):
        only(write(tmp_path, "AutoEncoder", state, pickled=True)).load()


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dict_class": "IdentityDict"}, "dict_class 'IdentityDict'; expected one of AutoEncoder,"),
        ({"dict_class": ["AutoEncoder"]}, "expected one of AutoEncoder,"),
        ({"use_pca_whitening": True}, "has use_pca_whitening, which this format does not have"),
        ({"norm_factor": 2.0}, "has norm_factor, which this format does not have"),
        ({"layer": 3}, "layer 3 and submodule_name 'resid_post_layer_4'"),
        ({"activation_dim": "5"}, "activation_dim is '5'; expected a whole number"),
        ({"dict_size": 0}, "dict_size is 0; expected a whole number"),
        ({"k": True}, "k is True; expected a whole number"),
    ],
)
def test_a_configuration_that_is_not_understood_is_refused(tmp_path, changes, message):
    folder = write(tmp_path, config=config_of("AutoEncoderNew", **changes))
    with pytest.raises(UserError, match=message):
        opened(folder)


@pytest.mark.parametrize("threshold", [-1.0, -1e-3])
def test_a_threshold_that_was_never_set_is_refused_with_the_reason(tmp_path, threshold):
    tensors = tensors_of("BatchTopKSAE") | {"threshold": torch.tensor(threshold)}
    with pytest.raises(UserError, match="never set, because training ended before threshold_start"):
        only(write(tmp_path, "BatchTopKSAE", tensors)).load()


@pytest.mark.parametrize(
    ("dict_class", "changes", "message"),
    [
        ("AutoEncoderNew", {"bias": torch.zeros(D)}, "has bias, which this format does not have"),
        ("AutoEncoderNew", {"encoder.bias": torch.zeros(N - 1)}, "do not fit together"),
        ("AutoEncoderNew", {"encoder.weight": torch.zeros(N)}, "expected a matrix"),
        ("AutoEncoderNew", {"encoder.weight": torch.zeros(N + 1, D)}, "dict_size 11; the weights"),
        ("AutoEncoderNew", {"encoder.bias": torch.full((N,), torch.nan)}, "not finite"),
        ("AutoEncoder", {"encoder.weight": torch.full((N, D), 3e38)}, "too large"),
        ("JumpReluAutoEncoder", {"W_enc": torch.zeros(N)}, "expected a matrix"),
        ("JumpReluAutoEncoder", {"threshold": torch.tensor(1.0)}, "do not fit together"),
        ("BatchTopKSAE", {"threshold": torch.zeros(N)}, "expected one number"),
        ("BatchTopKSAE", {"k": torch.tensor(2)}, "k is 2 in the weights, 3 in config.json"),
        ("AutoEncoderTopK", {"k": torch.tensor(3.0)}, "k is torch.float32"),
        ("AutoEncoderTopK", {"k": torch.tensor([3, 3])}, r"shape \(2,\); expected one"),
    ],
)
def test_weights_that_are_not_understood_are_refused(tmp_path, dict_class, changes, message):
    folder = write(tmp_path, dict_class, tensors_of(dict_class) | changes)
    with pytest.raises(UserError, match=message):
        only(folder).load()


@pytest.mark.parametrize("dict_class", CLASSES)
def test_a_weight_that_is_missing_is_named(tmp_path, dict_class):
    for name in CLASSES[dict_class]:
        folder = write(tmp_path / name, dict_class, without(tensors_of(dict_class), name))
        with pytest.raises(UserError, match=f"lacks {name}"):
            only(folder).load()


def test_pickled_values_that_are_no_tensors_are_refused(tmp_path):
    folder = write(
        tmp_path, tensors=tensors_of("AutoEncoderNew") | {"encoder.bias": 3}, pickled=True
    )
    with pytest.raises(UserError, match="encoder.bias is int; expected a tensor"):
        only(folder).load()


def test_a_mean_norm_is_told_in_vain(tmp_path):
    with pytest.raises(UserError, match="norm has no meaning"):
        opened(write(tmp_path), norm=3.0)


@pytest.mark.parametrize("text", ['{"trainer": 3}', "{}", "[]", "{", '{"trainer": {"lr": 1}}'])
def test_a_folder_without_a_dict_class_is_not_taken_for_this_format(tmp_path, text):
    write(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="is in no known format"):
        opened(tmp_path)
    with pytest.raises(UserError):
        open_checkpoint(str(tmp_path), "dictionary_learning", Told(), ALLOWED, None, Path())


def test_a_folder_without_weights_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_of("AutoEncoder")))
    with pytest.raises(UserError, match=r"no config\.json with an ae\.pt"):
        open_checkpoint(str(tmp_path), "dictionary_learning", Told(), ALLOWED, None, Path())


# Exports

FOLDED = {"relu": set(), "jumprelu": set(), "topk": {"b_enc"}, "gated": {"b_gate", "b_mag"}}
ORIGIN = Origin(SITE, SITE, "org/model")


@pytest.mark.parametrize("architecture", FOLDED)
def test_what_is_exported_is_read_again_bit_for_bit_but_for_folded_biases(tmp_path, architecture):
    sae = toys.sae_of(architecture, 7, 23)
    DictionaryLearning().write(sae, ORIGIN, tmp_path)
    member = only(tmp_path)
    again = member.load()
    assert (member.site, member.target, member.model) == (SITE, SITE, "org/model")
    assert again.arguments() == sae.arguments()
    for name, weight in sae.state_dict().items():
        if name in FOLDED[architecture]:
            torch.testing.assert_close(again.state_dict()[name], weight, rtol=1e-6, atol=2e-6)
        else:
            assert torch.equal(again.state_dict()[name], weight), name


def test_an_exported_topk_subtracts_its_decoder_bias_first(tmp_path, x):
    sae = toys.sae_of("topk", D, N)
    DictionaryLearning().write(sae, ORIGIN, tmp_path)
    tensors = torch.load(tmp_path / "ae.pt", weights_only=True)
    assert tensors.keys() == tensors_of("AutoEncoderTopK").keys() and tensors["k"] == sae.k == 4
    p = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    pre = (x.double().numpy() - p["b_dec"]) @ p["encoder.weight"].T + p["encoder.bias"]
    W_enc, b_enc = sae.W_enc.double().numpy(), sae.b_enc.double().numpy()
    np.testing.assert_allclose(pre, x.double().numpy() @ W_enc + b_enc, atol=1e-5)


def test_a_site_without_a_spelling_has_to_be_told_again(tmp_path):
    site = Site("mlp_out", 2)
    DictionaryLearning().write(toys.sae_of("relu"), Origin(site, site, None), tmp_path)
    with pytest.raises(UserError, match="does not say at which site"):
        opened(tmp_path)
    assert only(tmp_path, site=site).model is None


def test_no_file_is_left_of_what_cannot_be_said(tmp_path):
    transcoder = Origin(Site("mlp_in", 1), Site("mlp_out", 1), None)
    negative = toys.sae_of("jumprelu")
    negative.threshold[3] = -0.1
    skip = toys.sae_of("relu", skip=True)
    for sae, origin, message in [
        (toys.sae_of("relu"), transcoder, "this is a transcoder"),
        (toys.sae_of("relu", d_out=9), ORIGIN, "this is a transcoder"),
        (skip, ORIGIN, "this is a transcoder"),
        (negative, ORIGIN, "a threshold is negative"),
    ]:
        with pytest.raises(UserError, match=message):
            DictionaryLearning().write(sae, origin, tmp_path)
    for name in sorted(set(registry.names("saes")) - FOLDED.keys()):
        with pytest.raises(UserError, match="dictionary_learning has no class for"):
            DictionaryLearning().write(toys.sae_of(name), ORIGIN, tmp_path)
    assert not list(tmp_path.iterdir())
