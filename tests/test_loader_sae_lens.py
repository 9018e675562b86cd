"""The format of SAELens, from files written here by hand: what is computed, what is asked and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saebench import registry
from saebench.checkpoints import open_checkpoint
from saebench.errors import UserError
from saebench.exports._export import Origin
from saebench.exports.sae_lens import SAELens as Export
from saebench.loaders._files import Limits
from saebench.loaders._loader import Member, Told
from saebench.saes._dictionary import Dictionary
from saebench.saes._normalized import Normalized
from saebench.sites import STREAMS, parse_site
from saebench.types import Site

SITE = Site("resid_post", 4)
NOTHING = Told()
METADATA = {"sae_lens_version": "6.20.0", "hook_name": "blocks.4.hook_resid_post"}
CONFIG = {
    "architecture": "standard",
    "d_in": 2,
    "d_sae": 3,
    "dtype": "float32",
    "device": "cpu",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
}
FLAT = {
    "d_in": 2,
    "d_sae": 3,
    "dtype": "torch.float32",
    "hook_point": "blocks.4.hook_resid_post",
    "hook_point_layer": 4,
    "model_name": "gpt2-small",
}
W_ENC = np.array([[1.0, -2.0, 0.5], [0.0, 1.0, 2.0]])
B_ENC = np.array([0.5, 1.0, -1.0])
W_DEC = np.array([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]])
B_DEC = np.array([1.0, -1.0])
X = np.array([[2.0, 1.0], [-3.0, 0.5], [0.0, -4.0], [5.0, 3.0]])
BASE = {"W_enc": W_ENC, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
THRESHOLD = np.array([1.0, 0.0, 2.5])


def write(
    folder: Path,
    weights: dict[str, Any] = BASE,
    metadata: dict[str, Any] | None = None,
    drop: str | None = None,
    **config: Any,
) -> Path:
    """A checkpoint of version 6."""
    whole = CONFIG | {"metadata": METADATA | (metadata or {})} | config
    return save(folder, {k: v for k, v in whole.items() if k != drop}, weights)


def save(folder: Path, config: dict[str, Any], weights: dict[str, Any] = BASE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float32)
        for name, value in weights.items()
    }
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def member(folder: Path, told: Told = NOTHING) -> Member:
    (found,) = open_checkpoint(str(folder), None, told, Limits(), None, folder).members
    return found


def encoded(folder: Path, told: Told = NOTHING, x: np.ndarray = X) -> np.ndarray:
    return member(folder, told).load().encode(torch.tensor(x).float()).numpy()


def rebuilt(folder: Path, told: Told = NOTHING, x: np.ndarray = X) -> np.ndarray:
    """Decoded, and what is beside that."""
    sae = member(folder, told).load()
    tokens = torch.tensor(x).float()
    beside = sae.beside(tokens)
    decoded = sae.decode(sae.encode(tokens))
    return (decoded if beside is None else decoded + beside).numpy()


def pre(x: np.ndarray = X) -> np.ndarray:
    """With b_dec taken off the input."""
    return (x - B_DEC) @ W_ENC + B_ENC


def relu(a: np.ndarray) -> np.ndarray:
    return np.maximum(a, 0)


def near(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)


def test_the_site_and_the_model_are_those_of_the_metadata(tmp_path: Path):
    found = member(write(tmp_path, metadata={"model_name": "gpt2-small"}))
    assert (found.site, found.target, found.model) == (SITE, SITE, "gpt2-small")


def test_nothing_is_said_of_a_model_that_has_no_name(tmp_path: Path):
    assert member(write(tmp_path)).model is None


def test_the_decoder_bias_is_taken_off_the_input(tmp_path: Path):
    folder = write(tmp_path)
    # (2 - 1, 1 + 1) W_enc + b_enc = (1, -2 + 2, 0.5 + 4) + (0.5, 1, -1)
    near(encoded(folder)[0], np.array([1.5, 1.0, 3.5]))
    near(rebuilt(folder)[0], np.array([4.5 + 3.5 + 1, 6 + 2 - 1]))


def test_the_decoder_bias_is_left_in_the_input_where_the_files_say_so(tmp_path: Path):
    folder = write(tmp_path, apply_b_dec_to_input=False)
    near(encoded(folder), relu(X @ W_ENC + B_ENC))


def test_a_latent_of_jumprelu_is_what_is_above_its_threshold_and_above_zero(tmp_path: Path):
    threshold = np.array([-2.0, 1.0, 3.5])
    folder = write(tmp_path, BASE | {"threshold": threshold}, architecture="jumprelu")
    near(encoded(folder), np.where(pre() > threshold, relu(pre()), 0))
    assert encoded(folder)[0, 2] == 0, "3.5 is not above 3.5"


def test_older_training_kept_the_logarithm_of_thresholds(tmp_path: Path):
    weights = BASE | {"log_threshold": np.log([1.4, 0.9, 3.6])}
    folder = write(tmp_path, weights, architecture="jumprelu")
    near(encoded(folder)[0], np.array([1.5, 1.0, 0.0]))


def test_a_gate_opens_what_is_scaled_by_the_magnitude(tmp_path: Path):
    b_gate, b_mag, r_mag = np.array([0.5, -9.0, 0.0]), np.array([1.0, 2, 3]), np.log([2.0, 1, 3])
    weights = {"W_enc": W_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
    folder = write(
        tmp_path, weights | {"b_gate": b_gate, "b_mag": b_mag, "r_mag": r_mag}, architecture="gated"
    )
    pi = (X - B_DEC) @ W_ENC
    near(encoded(folder), np.where(pi + b_gate > 0, relu(np.exp(r_mag) * pi + b_mag), 0))


@pytest.mark.parametrize("rescale", [True, False])
def test_topk_chooses_by_the_length_of_decoder_rows_where_it_was_trained_so(
    tmp_path: Path, rescale: bool
):
    folder = write(tmp_path, architecture="topk", k=1, rescale_acts_by_decoder_norm=rescale)
    norm = np.array([5.0, 2.0, 1.0]) if rescale else np.ones(3)
    # Of the first token the latents are 1.5, 1 and 3.5, and times the norms 7.5, 2 and 3.5.
    expected = np.array([7.5, 0, 0]) if rescale else np.array([0, 0, 3.5])
    near(encoded(folder)[0], expected)
    near(rebuilt(folder)[0], expected / norm @ W_DEC + B_DEC)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
@pytest.mark.parametrize("rescale", [True, False])
def test_training_on_the_top_of_a_batch_leaves_one_threshold(
    tmp_path: Path, architecture: str, rescale: bool
):
    weights = BASE | {"topk_threshold": torch.tensor(3.0, dtype=torch.float64)}
    folder = write(
        tmp_path, weights, architecture=architecture, k=1.5, rescale_acts_by_decoder_norm=rescale
    )
    norm = np.array([5.0, 2.0, 1.0]) if rescale else np.ones(3)
    latents = np.where(pre() * norm > 3, pre() * norm, 0)
    near(encoded(folder), latents)
    near(rebuilt(folder), latents / norm @ W_DEC + B_DEC)


OUT = {"metadata": {"hook_name_out": "blocks.4.hook_mlp_out"}, "apply_b_dec_to_input": False}
W_OUT, B_OUT = np.array([[1.0], [2.0], [3.0]]), np.array([0.25])
TRANSCODER = {"W_enc": W_ENC, "b_enc": B_ENC, "W_dec": W_OUT, "b_dec": B_OUT}


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("jumprelu", [True, False])
def test_a_transcoder_predicts_another_site(tmp_path: Path, skip: bool, jumprelu: bool):
    W_skip = np.array([[0.5, -1.0]])  # [d_out d_in]
    weights = TRANSCODER | ({"W_skip": W_skip} if skip else {})
    weights |= {"threshold": THRESHOLD} if jumprelu else {}
    name = f"{'jumprelu_' if jumprelu else ''}{'skip_' if skip else ''}transcoder"
    folder = write(tmp_path, weights, architecture=name, d_out=1, **OUT)
    found = member(folder)
    assert (found.site, found.target) == (SITE, Site("mlp_out", 4))
    z = relu(X @ W_ENC + B_ENC)
    z = np.where(z > THRESHOLD, z, 0) if jumprelu else z
    near(encoded(folder), z)
    near(rebuilt(folder), z @ W_OUT + B_OUT + (X @ W_skip.T if skip else 0))


def test_the_target_of_a_transcoder_can_be_told(tmp_path: Path):
    folder = write(
        tmp_path, TRANSCODER, architecture="transcoder", d_out=1, apply_b_dec_to_input=False
    )
    with pytest.raises(UserError, match="predicts"):
        member(folder)
    assert member(folder, Told(predicts=Site("mlp_out", 4))).target == Site("mlp_out", 4)


def test_an_inner_scale_is_folded_so_that_latents_have_the_unit_of_activations(tmp_path: Path):
    folder = write(tmp_path, normalize_activations="expected_average_only_in")
    norm = 8.0
    s = math.sqrt(2) / norm
    z = relu(pre(s * X))
    near(encoded(folder, Told(norm=norm)), z / s)
    near(rebuilt(folder, Told(norm=norm)), (z @ W_DEC + B_DEC) / s)
    with pytest.raises(UserError, match="say so with norm"):
        member(folder)


def test_the_scale_of_a_training_checkpoint_is_beside_it(tmp_path: Path):
    folder = write(tmp_path, normalize_activations="expected_average_only_in")
    (folder / "activation_scaler.json").write_text('{"scaling_factor": 0.5}')
    near(encoded(folder), relu(pre(0.5 * X)) / 0.5)
    with pytest.raises(UserError, match="norm has no meaning"):
        member(folder, Told(norm=2.0))


@pytest.mark.parametrize("scale", ["0", "-1", '"2"', "true"])
def test_a_scale_that_is_none_is_refused(tmp_path: Path, scale: str):
    folder = write(tmp_path, normalize_activations="expected_average_only_in")
    (folder / "activation_scaler.json").write_text(f'{{"scaling_factor": {scale}}}')
    with pytest.raises(UserError, match="scaling_factor is .*; expected a number above 0"):
        member(folder)


def test_a_scale_that_contradicts_the_configuration_is_refused(tmp_path: Path):
    folder = write(tmp_path)
    (folder / "activation_scaler.json").write_text('{"scaling_factor": 0.5}')
    with pytest.raises(UserError, match="scales by 0.5, and normalize_activations is none"):
        member(folder)


def test_whitening_is_folded(tmp_path: Path):
    folder = write(tmp_path, normalize_activations="covariance_whitening")
    with pytest.raises(UserError, match="activation_whitening.safetensors is missing"):
        member(folder)
    mean, matrix = np.array([1.0, 2.0]), np.array([[2.0, 1.0], [1.0, 1.0]])
    inverse = np.linalg.inv(matrix)
    whitening = {"mean": mean, "matrix": matrix, "inverse_matrix": inverse}
    tensors = {name: torch.tensor(value) for name, value in whitening.items()}
    save_file(tensors, folder / "activation_whitening.safetensors")
    z = relu(pre((X - mean) @ matrix))
    near(encoded(folder), z)
    near(rebuilt(folder), (z @ W_DEC + B_DEC) @ inverse + mean)
    save_file({"mean": torch.ones(3)}, folder / "activation_whitening.safetensors")
    with pytest.raises(UserError, match="activation_whitening.safetensors has .*expected"):
        encoded(folder)


def test_the_layer_norm_of_a_token_is_undone(tmp_path: Path):
    folder = write(tmp_path, normalize_activations="layer_norm")
    mean, std = X.mean(1, keepdims=True), X.std(1, keepdims=True, ddof=1) + 1e-5
    z = relu(pre((X - mean) / std))
    near(encoded(folder), z * std)
    near(rebuilt(folder), (z @ W_DEC + B_DEC) * std + mean)
    assert isinstance(member(folder).load(), Normalized)


def test_the_length_of_a_token_is_undone(tmp_path: Path):
    folder = write(tmp_path, normalize_activations="constant_norm_rescale")
    scale = np.linalg.norm(X, axis=1, keepdims=True) / math.sqrt(2)
    z = relu(pre(X / scale))
    near(encoded(folder), z * scale)
    near(rebuilt(folder), (z @ W_DEC + B_DEC) * scale)


def test_a_transcoder_of_normalised_activations_predicts_raw_ones(tmp_path: Path):
    folder = write(
        tmp_path,
        TRANSCODER,
        architecture="transcoder",
        d_out=1,
        normalize_activations="layer_norm",
        **OUT,
    )
    mean, std = X.mean(1, keepdims=True), X.std(1, keepdims=True, ddof=1) + 1e-5
    z = relu((X - mean) / std @ W_ENC + B_ENC)
    near(encoded(folder), z)
    near(rebuilt(folder), z @ W_OUT + B_OUT)


# --- before version 6 ---


def test_a_flat_configuration_is_read_with_what_was_usual_then(tmp_path: Path):
    folder = save(tmp_path, FLAT)
    found = member(folder)
    assert (found.site, found.model) == (SITE, "gpt2-small")
    near(encoded(folder), relu(pre()))


@pytest.mark.parametrize("value", [False, None, "none"])
def test_normalisation_was_a_flag_once(tmp_path: Path, value: object):
    near(encoded(save(tmp_path, FLAT | {"normalize_activations": value})), relu(pre()))


def test_normalisation_that_is_flagged_is_by_the_mean_length(tmp_path: Path):
    folder = save(tmp_path, FLAT | {"normalize_activations": True})
    with pytest.raises(UserError, match="say so with norm"):
        member(folder)


def test_topk_was_an_activation_function_once(tmp_path: Path):
    function = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 1}}
    found = member(save(tmp_path, FLAT | function | {"sae_lens_version": "5.10.7"})).load()
    assert (found.encode(torch.tensor(X).float()) > 0).sum(1).max() == 1


@pytest.mark.parametrize("kwargs", [None, {}, {"k": "two"}])
def test_topk_without_a_k_is_refused(tmp_path: Path, kwargs: object):
    config = FLAT | {"activation_fn": "topk", "activation_fn_kwargs": kwargs}
    with pytest.raises(UserError, match="k is .*; expected a whole number"):
        member(save(tmp_path, config))


def test_other_activation_functions_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="activation_fn is 'tanh-relu'; expected relu or topk"):
        member(save(tmp_path, FLAT | {"activation_fn_str": "tanh-relu"}))


def test_factors_of_a_fine_tuning_scale_what_is_decoded_alone(tmp_path: Path):
    factors = np.array([2.0, 0.5, 1.0])
    weights = BASE | {"scaling_factor": factors}
    folder = save(tmp_path, FLAT | {"finetuning_scaling_factor": True}, weights)
    near(encoded(folder), relu(pre()))
    near(rebuilt(folder), (factors * relu(pre())) @ W_DEC + B_DEC)


def test_factors_of_one_mean_nothing(tmp_path: Path):
    folder = save(tmp_path, FLAT, BASE | {"scaling_factor": np.ones(3)})
    near(rebuilt(folder), relu(pre()) @ W_DEC + B_DEC)


def test_factors_that_are_not_announced_are_refused(tmp_path: Path):
    folder = save(tmp_path, FLAT, BASE | {"scaling_factor": np.array([2.0, 1.0, 1.0])})
    with pytest.raises(UserError, match="finetuning_scaling_factor is not set"):
        encoded(folder)


# --- sites ---


def test_the_outputs_of_all_heads_are_one_stream(tmp_path: Path):
    hook = {"hook_name": "blocks.4.attn.hook_z"}
    assert member(write(tmp_path, metadata=hook, reshape_activations="hook_z")).site == Site(
        "attn_z", 4
    )
    old = save(tmp_path / "old", FLAT | {"hook_point": "blocks.4.attn.hook_z"})
    assert member(old).site == Site("attn_z", 4)


def test_a_module_of_transformers_is_read_where_it_ends(tmp_path: Path):
    metadata = {"hook_name": "model.layers.4", "model_class_name": "AutoModelForCausalLM"}
    assert member(write(tmp_path, metadata=metadata)).site == Site("model.layers.4.output", None)


def test_a_hook_without_a_stream_has_to_be_told(tmp_path: Path):
    folder = write(tmp_path, metadata={"hook_name": "blocks.4.ln2.hook_normalized"})
    with pytest.raises(UserError, match=r"'ln2.hook_normalized' has no stream.*with site"):
        member(folder)
    assert member(folder, Told(site=Site("mlp_in", 4))).site == Site("mlp_in", 4)


def test_a_site_that_contradicts_the_files_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"trained at 4.resid_post, and site says 3.resid_post"):
        member(write(tmp_path), Told(site=Site("resid_post", 3)))


def test_without_a_hook_the_site_has_to_be_told(tmp_path: Path):
    folder = write(tmp_path, metadata={"hook_name": None})
    with pytest.raises(UserError, match="does not say at which site"):
        member(folder)
    assert member(folder, Told(site=SITE)).site == SITE


# --- refusals ---

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "key": ({"act_scale": 2}, "cfg.json has act_scale, which this format does not have"),
    "metadata key": ({"metadata": {"act_scale": 2}}, "metadata of cfg.json has act_scale, which"),
    "missing key": ({"drop": "normalize_activations"}, "lacks normalize_activations"),
    "missing architecture": ({"drop": "architecture"}, "lacks architecture"),
    "temporal": ({"architecture": "temporal"}, "'temporal' is not read: it attends"),
    "plug-in": ({"architecture": "mine"}, "'mine' is not read: no such class comes with SAELens"),
    "no name": ({"architecture": ["topk"]}, "is not read"),
    "k": ({"architecture": "topk"}, "k is None; expected a whole number above 0"),
    "large k": ({"architecture": "topk", "k": 4}, "k is 4; it must be from 1 to the width"),
    "width": ({"d_sae": 2.0}, "d_sae is 2.0; expected a whole number"),
    "flag": ({"apply_b_dec_to_input": 1}, "apply_b_dec_to_input is 1; expected true or false"),
    "normalisation": (
        {"normalize_activations": "constant_scalar_rescale"},
        "normalize_activations is 'constant_scalar_rescale'; expected one of none,",
    ),
    "reshaping": ({"reshape_activations": "heads"}, "reshape_activations is 'heads'"),
    "one head": ({"metadata": {"hook_head_index": 3}}, "one attention head .hook_head_index is 3"),
    "model": ({"metadata": {"model_name": 7}}, "model_name is 7; expected a name"),
    "shape": ({"d_in": 3}, "not those of standard .W_dec, W_enc, b_dec.: got"),
    "tensor": ({"architecture": "jumprelu"}, "not those of jumprelu .threshold."),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_configuration_that_is_not_understood_is_refused(tmp_path: Path, what: str):
    changes, message = REFUSED[what]
    with pytest.raises(UserError, match=message):
        member(write(tmp_path, **changes)).load()


TRANSCODERS_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bias": ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input is set"),
    "scale": (
        {"normalize_activations": "expected_average_only_in"},
        "does not say how its target was scaled",
    ),
    "skip": (
        {"architecture": "skip_transcoder", "normalize_activations": "layer_norm"},
        "its skip connection reads what is not normalised",
    ),
    "width": ({"d_out": None}, "d_out is None"),
}


@pytest.mark.parametrize("what", TRANSCODERS_REFUSED)
def test_a_transcoder_that_is_not_understood_is_refused(tmp_path: Path, what: str):
    changes, message = TRANSCODERS_REFUSED[what]
    config = {"architecture": "transcoder", "d_out": 1} | OUT | changes
    with pytest.raises(UserError, match=message):
        member(write(tmp_path, TRANSCODER, **config))


def test_a_flat_configuration_with_a_strange_key_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="cfg.json has jump, which"):
        member(save(tmp_path, FLAT | {"jump": 0.1}))


def test_metadata_that_is_no_object_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="metadata is 'none'; expected named values"):
        member(save(tmp_path, CONFIG | {"metadata": "none"}))


@pytest.mark.parametrize("name", ["W_extra", "finetuning_scaling_factor"])
def test_an_unknown_tensor_is_refused(tmp_path: Path, name: str):
    with pytest.raises(UserError, match=f"not those of standard .{name}."):
        member(write(tmp_path, BASE | {name: np.ones(3)}))


@pytest.mark.parametrize("value", [math.inf, math.nan, 3e38])
def test_weights_beyond_float32_are_refused(tmp_path: Path, value: float):
    """The last is finite, and no longer so after the decoder bias went through the encoder."""
    folder = write(tmp_path, BASE | {"b_dec": np.array([value, value])})
    with pytest.raises(UserError, match="not finite|too large"):
        encoded(folder)


def test_whole_numbers_are_no_weights(tmp_path: Path):
    folder = write(tmp_path, BASE | {"b_enc": torch.ones(3, dtype=torch.int64)})
    with pytest.raises(UserError, match="b_enc is of torch.int64; expected floating point"):
        encoded(folder)


@pytest.mark.parametrize("told", [Told(k=2), Told(norm=2.0), Told(predicts=SITE)])
def test_what_the_files_say_themselves_need_not_be_told(tmp_path: Path, told: Told):
    with pytest.raises(UserError, match="has no meaning"):
        member(write(tmp_path), told)


# --- exports ---


def made(architecture: str, d_out: int = 2, **arguments: Any) -> Dictionary:
    sae = registry.get("saes", architecture)(2, 3, d_out, **arguments)
    random = torch.Generator().manual_seed(0)
    for weight in sae.parameters():
        weight.data = torch.rand(weight.shape, generator=random)
    return sae


def origin(site: Site = SITE, target: Site | None = None, model: str | None = None) -> Origin:
    return Origin(site, target or site, model)


def test_what_is_written_is_what_is_there(tmp_path: Path):
    sae = made("topk", k=2)
    Export().write(sae, origin(model="gpt2"), tmp_path)
    written = json.loads((tmp_path / "cfg.json").read_text())
    assert written["architecture"] == "topk" and written["k"] == 2
    assert written["rescale_acts_by_decoder_norm"] is False
    assert written["apply_b_dec_to_input"] is False and written["normalize_activations"] == "none"
    assert written["metadata"]["model_name"] == "gpt2"
    assert written["metadata"]["hook_name"] == "blocks.4.hook_resid_post"
    weights = load_file(tmp_path / "sae_weights.safetensors")
    for name, weight in sae.state_dict().items():
        assert torch.equal(weights.pop(name), weight), name
    assert not weights


def test_the_skip_of_a_transcoder_is_written_with_outputs_first(tmp_path: Path):
    sae = made("relu", d_out=1, skip=True)
    Export().write(sae, origin(target=Site("mlp_out", 4)), tmp_path)
    weights = load_file(tmp_path / "sae_weights.safetensors")
    assert sae.W_skip is not None and torch.equal(weights["W_skip"], sae.W_skip.T)
    back = member(tmp_path)
    assert back.target == Site("mlp_out", 4)
    loaded = back.load()
    assert isinstance(loaded, Dictionary) and torch.equal(loaded.state_dict()["W_skip"], sae.W_skip)


@pytest.mark.parametrize("stream", STREAMS)
def test_every_stream_has_its_hook(tmp_path: Path, stream: str):
    Export().write(made("relu"), origin(Site(stream, 3)), tmp_path)
    hook = json.loads((tmp_path / "cfg.json").read_text())["metadata"]["hook_name"]
    assert parse_site(hook) == member(tmp_path).site == Site(stream, 3)


def test_the_output_of_a_module_is_named_by_the_module(tmp_path: Path):
    site = Site("model.layers.4.mlp.output", None)
    Export().write(made("relu"), origin(site), tmp_path)
    metadata = json.loads((tmp_path / "cfg.json").read_text())["metadata"]
    assert metadata["model_class_name"] == "AutoModelForCausalLM"
    assert metadata["hook_name"] == "model.layers.4.mlp"
    assert member(tmp_path).site == site


@pytest.mark.parametrize(
    ("site", "target", "message"),
    [
        (Site("model.layers.4.mlp.input"), None, "cannot name model.layers.4.mlp.input"),
        (SITE, Site("model.layers.4.mlp.output"), "together"),
    ],
)
def test_sites_that_it_cannot_name_are_refused(
    tmp_path: Path, site: Site, target: Site | None, message: str
):
    with pytest.raises(UserError, match=message):
        Export().write(made("relu"), origin(site, target), tmp_path)
    assert not any(tmp_path.iterdir())


UNSAID: dict[str, tuple[dict[str, Any], Site, str]] = {
    "linear": ({}, SITE, "no Linear"),
    "saturating": ({"activation": "tanh"}, SITE, "no Saturating"),
    "topk": ({"k": 2}, Site("mlp_out", 4), "no transcoder of TopK"),
    "gated": ({}, Site("mlp_out", 4), "no transcoder of Gated"),
}


@pytest.mark.parametrize("architecture", UNSAID)
def test_what_it_cannot_say_is_refused(tmp_path: Path, architecture: str):
    arguments, target, message = UNSAID[architecture]
    with pytest.raises(UserError, match=message):
        Export().write(made(architecture, **arguments), origin(target=target), tmp_path)
    assert not any(tmp_path.iterdir())


def test_thresholds_below_zero_are_not_written(tmp_path: Path):
    sae = made("jumprelu")
    sae.threshold[1] = -0.5
    with pytest.raises(UserError, match="thresholds below zero"):
        Export().write(sae, origin(), tmp_path)
