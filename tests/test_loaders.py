"""Formats that no package on PyPI writes: checkpoints as they are documented, and what they compute in NumPy."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from saebench import registry, sparse
from saebench.errors import UserError
from saebench.loaders._files import Limits, Source
from saebench.loaders._loader import Member, Told
from saebench.saes._normalized import Normalized
from saebench.types import Site

D, N, K, TOKENS = 7, 23, 4, 60
RESID = Site("resid_post", 3)
MID, MLP_IN, MLP_OUT = Site("resid_mid", 3), Site("mlp_in", 3), Site("mlp_out", 3)
Values = dict[str, torch.Tensor]
Reference = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class Case(NamedTuple):
    """A checkpoint that has been written, and what is to be expected of it."""

    path: Path
    told: Told
    site: Site
    target: Site
    model: str | None
    expected: Reference
    """x -> latents, reconstruction."""


CASES: dict[str, Callable[[Path], Case]] = {}
"""By format and variant."""
FIXTURES: dict[str, Callable[[Path], Path]] = {}
"""The same, and those of other formats: what writes a checkpoint into an empty folder and says where it is."""


def case(name: str) -> Callable[[Callable[[Path], Case]], Callable[[Path], Case]]:
    def enter(write: Callable[[Path], Case]) -> Callable[[Path], Case]:
        CASES[name] = write
        FIXTURES[name] = lambda folder: write(folder).path
        return write

    return enter


def fixture(name: str) -> Callable[[Callable[[Path], Path]], Callable[[Path], Path]]:
    def enter(write: Callable[[Path], Path]) -> Callable[[Path], Path]:
        FIXTURES[name] = write
        return write

    return enter


# Weights and the formulas, in float64


def drawn(dtype: torch.dtype = torch.float32, seed: int = 0) -> Values:
    """With decoder directions of many lengths, rounded to a dtype."""
    rng = np.random.default_rng(seed)
    lengths = rng.uniform(0.4, 2.5, size=(N, 1))
    directions = rng.normal(size=(N, D))
    values = {
        "W_enc": rng.normal(size=(D, N)) / np.sqrt(D),
        "b_enc": 0.3 * rng.normal(size=N),
        "W_dec": lengths * directions / np.linalg.norm(directions, axis=1, keepdims=True),
        "b_dec": rng.normal(size=D),
        "threshold": rng.uniform(0.1, 0.9, size=N),
        "skip": rng.normal(size=(D, D)),
    }
    return {key: torch.from_numpy(value).to(dtype) for key, value in values.items()}


def exact(values: Values) -> dict[str, np.ndarray]:
    return {key: value.double().numpy() for key, value in values.items()}


def relu(pre: np.ndarray) -> np.ndarray:
    return np.maximum(pre, 0)


def jump(pre: np.ndarray, threshold: np.ndarray | float) -> np.ndarray:
    return np.where(pre > threshold, pre, 0)


def top(pre: np.ndarray, k: int = K) -> np.ndarray:
    kept = np.sort(pre, axis=1)[:, -k][:, None]
    return np.where(pre >= kept, np.maximum(pre, 0), 0)


def affine(values: Values, act: Callable[[np.ndarray], np.ndarray]) -> Reference:
    """act(x W + b) W_dec + b_dec."""
    w = exact(values)

    def expected(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        z = act(x @ w["W_enc"] + w["b_enc"])
        return z, z @ w["W_dec"] + w["b_dec"]

    return expected


def normalised(inner: Reference, eps: float) -> Reference:
    return lambda x: inner(x / np.sqrt((x**2).mean(1, keepdims=True) + eps))


def tokens(scale: float = 1.0) -> np.ndarray:
    x = np.random.default_rng(9).normal(size=(TOKENS, D)) * scale + 0.2
    return x.astype(np.float32).astype(np.float64)


def opened(path: Path, format: str, told: Told, pickle: bool = True) -> list[Member]:
    loader = registry.get("loaders", format)()
    return list(loader.members(Source(path, Limits(allow_pickle=pickle)), told))


# Gemma Scope


def gemma_scope(folder: Path, changes: dict[str, Any] | None = None, name: str = "params") -> Path:
    values = {key: value.numpy() for key, value in drawn().items() if key != "skip"}
    values["threshold"][0] = -0.5
    values |= changes or {}
    np.savez(folder / f"{name}.npz", **{k: v for k, v in values.items() if v is not None})
    return folder


def gemma_formula() -> Reference:
    """f = pre where pre > threshold and pre > 0."""
    threshold = np.array([-0.5, *exact(drawn())["threshold"][1:]])
    return affine(drawn(), lambda pre: jump(pre, threshold) * (pre > 0))


@case("gemma_scope/sae")
def _(folder: Path) -> Case:
    return Case(gemma_scope(folder), Told(RESID), RESID, RESID, None, gemma_formula())


@case("gemma_scope/file")
def _(folder: Path) -> Case:
    path = gemma_scope(folder, {"scaling_factor": np.ones(N, np.float32)}, "other") / "other.npz"
    return Case(path, Told(RESID), RESID, RESID, None, gemma_formula())


@case("gemma_scope/lower-case")
def _(folder: Path) -> Case:
    values = drawn()
    renamed = {"W_enc": None, "w_enc": values["W_enc"], "W_dec": None, "w_dec": values["W_dec"]}
    return Case(gemma_scope(folder, renamed), Told(RESID), RESID, RESID, None, gemma_formula())


@case("gemma_scope/transcoder")
def _(folder: Path) -> Case:
    told = Told(MID, MLP_OUT)
    return Case(gemma_scope(folder), told, MID, MLP_OUT, None, normalised(gemma_formula(), 1e-6))


# Gemma Scope 2

GEMMA_2 = {
    "architecture": "jump_relu",
    "model_name": "google/gemma-3-1b-pt",
    "hf_hook_point_in": "model.layers.3.output",
    "hf_hook_point_out": "model.layers.3.output",
    "affine_connection": False,
    "type": "sae",
    "width": N,
    "l0": 60,
}
TRANSCODER_2 = GEMMA_2 | {
    "hf_hook_point_in": "model.layers.3.pre_feedforward_layernorm.output",
    "hf_hook_point_out": "model.layers.3.post_feedforward_layernorm.output",
    "affine_connection": True,
    "type": "transcoder",
}


def gemma_scope_2(
    folder: Path, config: dict[str, Any] | None, dtype: torch.dtype = torch.float32
) -> Path:
    values = drawn(dtype)
    names = {"W_enc": "w_enc", "W_dec": "w_dec", "skip": "affine_skip_connection"}
    if config is None or not config["affine_connection"]:
        values.pop("skip")
    save_file({names.get(key, key): v for key, v in values.items()}, folder / "params.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@case("gemma_scope_2/sae")
def _(folder: Path) -> Case:
    expected = affine(drawn(), lambda pre: jump(pre, exact(drawn())["threshold"]))
    path = gemma_scope_2(folder, GEMMA_2)
    return Case(path, Told(), RESID, RESID, "google/gemma-3-1b-pt", expected)


@case("gemma_scope_2/transcoder")
def _(folder: Path) -> Case:
    w = exact(drawn(torch.bfloat16))
    inner = affine(drawn(torch.bfloat16), lambda pre: jump(pre, w["threshold"]))

    def expected(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        z, x_hat = inner(x)
        return z, x_hat + x @ w["skip"]

    path = gemma_scope_2(folder, TRANSCODER_2, torch.bfloat16)
    return Case(path, Told(), MLP_IN, MLP_OUT, "google/gemma-3-1b-pt", expected)


@case("gemma_scope_2/alone")
def _(folder: Path) -> Case:
    expected = affine(drawn(), lambda pre: jump(pre, exact(drawn())["threshold"]))
    return Case(gemma_scope_2(folder, None), Told(RESID), RESID, RESID, None, expected)


# OpenAI


def openai_tensors(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    w = drawn(dtype)
    return {
        "pre_bias": w["b_dec"],
        "encoder.weight": w["W_enc"].T.contiguous(),
        "latent_bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T.contiguous(),
        "stats_last_nonzero": torch.zeros(N, dtype=torch.int64),
        "latents_activation_frequency": torch.ones(N),
        "latents_mean_square": torch.ones(N),
    }


TOPK_STATE = {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}
RELU_STATE: dict[str, Any] = {"activation": "ReLU", "activation_state_dict": {}}


def openai_formula(k: int | None, dtype: torch.dtype = torch.float32) -> Reference:
    w = exact(drawn(dtype))

    def expected(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean = x.mean(1, keepdims=True) if k else 0.0
        std = x.std(1, ddof=1, keepdims=True) + 1e-5 if k else 1.0
        pre = ((x - mean) / std - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
        f = top(pre, k) if k else relu(pre)
        return f * std, (f @ w["W_dec"] + w["b_dec"]) * std + mean

    return expected


@case("openai/topk")
def _(folder: Path) -> Case:
    torch.save(openai_tensors() | TOPK_STATE, folder / "3.pt")
    return Case(folder / "3.pt", Told(RESID), RESID, RESID, None, openai_formula(K))


@case("openai/relu")
def _(folder: Path) -> Case:
    torch.save(openai_tensors() | RELU_STATE, folder / "3.pt")
    return Case(folder, Told(RESID), RESID, RESID, None, openai_formula(None))


@case("openai/safetensors")
def _(folder: Path) -> Case:
    save_file(openai_tensors(torch.float16), folder / "3.safetensors")
    expected = openai_formula(K, torch.float16)
    return Case(folder, Told(RESID, k=K), RESID, RESID, None, expected)


# OpenMOSS: its two formats share what they mean

NORM_IN, NORM_OUT = 5.5, 1.75


def moss_formula(
    act: Callable[[np.ndarray], np.ndarray],
    by_length: bool = True,
    norms: tuple[float, float] | None = (NORM_IN, NORM_OUT),
    dtype: torch.dtype = torch.float32,
) -> Reference:
    """Gated by pre |d|, of activations whose mean length is made sqrt(d); latents along decoder directions, raw."""
    w = exact(drawn(dtype))
    s_in, s_out = (np.sqrt(D) / norm for norm in norms) if norms else (1.0, 1.0)
    lengths = np.linalg.norm(w["W_dec"], axis=1) if by_length else np.ones(N)

    def expected(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pre = (x * s_in) @ w["W_enc"] + w["b_enc"]
        f = act(pre * lengths) / lengths
        return f * lengths / s_out, (f @ w["W_dec"] + w["b_dec"]) / s_out

    return expected


def token_wise(inner: Reference) -> Reference:
    def expected(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        s = np.linalg.norm(x, axis=1, keepdims=True) / np.sqrt(D)
        z, x_hat = inner(x / s)
        return z * s, x_hat * s

    return expected


MOSS = {
    "sae_type": "sae",
    "d_model": D,
    "expansion_factor": N / D,
    "use_decoder_bias": True,
    "act_fn": "jumprelu",
    "norm_activation": "dataset-wise",
    "sparsity_include_decoder_norm": True,
    "top_k": K,
    "hook_point_in": "blocks.3.hook_resid_mid",
    "hook_point_out": "blocks.3.hook_mlp_out",
    "use_glu_encoder": False,
    "jumprelu_threshold_window": 2.0,
    "use_triton_kernel": False,
    "sparsity_threshold_for_triton_spmm_kernel": 0.996,
}
MOSS_SAE = {
    "hook_point_in": "blocks.3.hook_resid_post",
    "hook_point_out": "blocks.3.hook_resid_post",
}


def moss_tensors(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Values:
    w = drawn(dtype)
    tensors = {
        "W_E": w["W_enc"],
        "b_E": w["b_enc"],
        "W_D": w["W_dec"],
        "b_D": w["b_dec"],
        f"dataset_average_activation_norm.{config['hook_point_out']}": torch.tensor(NORM_OUT),
        f"dataset_average_activation_norm.{config['hook_point_in']}": torch.tensor(NORM_IN),
    }
    if config["act_fn"] == "jumprelu":
        tensors["activation_function.log_jumprelu_threshold"] = w["threshold"].log()
    return tensors


def openmoss(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    config = {k: v for k, v in (MOSS | changes).items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(moss_tensors(MOSS | changes, dtype), folder / "sae_weights.safetensors")
    return folder


def gated(dtype: torch.dtype) -> Callable[[np.ndarray], np.ndarray]:
    """By thresholds whose logarithms were rounded."""
    threshold = np.exp(drawn(dtype)["threshold"].log().double().numpy())
    return lambda pre: jump(pre, threshold)


@case("openmoss/jumprelu-transcoder")
def _(folder: Path) -> Case:
    expected = moss_formula(gated(torch.float32))
    return Case(openmoss(folder), Told(), MID, MLP_OUT, None, expected)


@case("openmoss/jumprelu-bfloat16")
def _(folder: Path) -> Case:
    dtype = torch.bfloat16
    path = openmoss(folder, dtype, sparsity_include_decoder_norm=False, **MOSS_SAE)
    expected = moss_formula(gated(dtype), False, (NORM_IN, NORM_IN), dtype)
    return Case(path, Told(), RESID, RESID, None, expected)


@case("openmoss/topk-token-wise")
def _(folder: Path) -> Case:
    path = openmoss(folder, act_fn="topk", norm_activation="token-wise", **MOSS_SAE)
    return Case(path, Told(), RESID, RESID, None, token_wise(moss_formula(top, norms=None)))


@case("openmoss/relu-folded")
def _(folder: Path) -> Case:
    path = openmoss(folder, act_fn="relu", norm_activation="inference", **MOSS_SAE)
    return Case(path, Told(), RESID, RESID, None, moss_formula(relu, norms=None))


@case("openmoss/pt")
def _(folder: Path) -> Case:
    config = MOSS | {"act_fn": "topk"}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({"sae": moss_tensors(config), "version": "2.0"}, folder / "sae_weights.pt")
    return Case(folder, Told(), MID, MLP_OUT, None, moss_formula(top))


# Llama Scope

LLAMA = {
    "device": "cuda:0",
    "seed": 42,
    "dtype": "torch.bfloat16",
    "hook_point_in": "blocks.3.hook_resid_post",
    "hook_point_out": "blocks.3.hook_resid_post",
    "use_decoder_bias": True,
    "apply_decoder_bias_to_pre_encoder": False,
    "expansion_factor": N / D,
    "d_model": D,
    "d_sae": N,
    "bias_init_method": "all_zero",
    "act_fn": "jumprelu",
    "jump_relu_threshold": 0.25,
    "norm_activation": "dataset-wise",
    "dataset_average_activation_norm": {"in": NORM_IN, "out": NORM_IN},
    "decoder_exactly_fixed_norm": False,
    "sparsity_include_decoder_norm": True,
    "use_glu_encoder": False,
    "init_decoder_norm": 0.5,
    "init_encoder_norm": None,
    "init_encoder_with_decoder_transpose": True,
    "lp": 1,
    "l1_coefficient": 8e-05,
    "l1_coefficient_warmup_steps": 78125,
    "top_k": 50,
    "k_warmup_steps": 78125,
    "use_batch_norm_mse": True,
    "use_ghost_grads": False,
    "tp_size": 1,
    "ddp_size": 1,
}


def llama_tensors(dtype: torch.dtype = torch.float32) -> Values:
    w = drawn(dtype)
    return {
        "encoder.weight": w["W_enc"].T.contiguous(),
        "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T.contiguous(),
        "decoder.bias": w["b_dec"],
    }


def llama_scope(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    config = {k: v for k, v in (LLAMA | changes).items() if v is not ...}
    (folder / "hyperparams.json").write_text(json.dumps(config))
    (folder / "checkpoints").mkdir()
    save_file(llama_tensors(dtype), folder / "checkpoints" / "final.safetensors")
    return folder


def llama_formula(theta: float, norms: tuple[float, float], dtype: torch.dtype) -> Reference:
    """One threshold for all, in the unit of raw predicted activations."""
    s_out = np.sqrt(D) / norms[1]
    return moss_formula(lambda pre: jump(pre, theta * s_out), True, norms, dtype)


@case("llama_scope/residual")
def _(folder: Path) -> Case:
    expected = llama_formula(0.25, (NORM_IN, NORM_IN), torch.bfloat16)
    return Case(llama_scope(folder, torch.bfloat16), Told(), RESID, RESID, None, expected)


@case("llama_scope/transcoder")
def _(folder: Path) -> Case:
    path = llama_scope(
        folder,
        hook_point_in="blocks.3.ln2.hook_normalized",
        hook_point_out="blocks.3.hook_mlp_out",
        dataset_average_activation_norm={"in": np.sqrt(D), "out": NORM_OUT},
    )
    inner = llama_formula(0.25, (np.sqrt(D), NORM_OUT), torch.float32)
    return Case(path, Told(), MID, MLP_OUT, None, normalised(inner, 1e-5))


R1 = {
    "sae_type": "sae",
    "hook_point_in": "blocks.3.hook_resid_post",
    "hook_point_out": "blocks.3.hook_resid_post",
    "d_model": D,
    "expansion_factor": N / D,
    "use_decoder_bias": True,
    "use_glu_encoder": False,
    "act_fn": "jumprelu",
    "jump_relu_threshold": 0.0,
    "apply_decoder_bias_to_pre_encoder": False,
    "norm_activation": "dataset-wise",
    "sparsity_include_decoder_norm": False,
    "force_unit_decoder_norm": False,
    "top_k": 50,
    "sae_pretrained_name_or_path": None,
    "strict_loading": True,
    "use_triton_kernel": False,
    "sparsity_threshold_for_triton_spmm_kernel": 0.99,
    "jumprelu_threshold_window": 2.0,
}


def r1(folder: Path, dropped: str = "", **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(R1 | changes))
    tensors = llama_tensors() | {
        "log_jumprelu_threshold": drawn()["threshold"].log(),
        "dataset_average_activation_norm.blocks.3.hook_resid_post": torch.tensor(NORM_IN),
    }
    kept = {key: value for key, value in tensors.items() if key != dropped}
    save_file(kept, folder / "sae_weights.safetensors")
    return folder


@case("llama_scope/r1")
def _(folder: Path) -> Case:
    expected = moss_formula(gated(torch.float32), False, (NORM_IN, NORM_IN))
    return Case(r1(folder), Told(), RESID, RESID, None, expected)


# Goodfire, Qwen Scope


def goodfire_tensors(dtype: torch.dtype = torch.float32) -> Values:
    tensors = llama_tensors(dtype)
    return {
        key.replace("encoder.", "encoder_linear.").replace("decoder.", "decoder_linear."): value
        for key, value in tensors.items()
    }


@case("goodfire/pt")
def _(folder: Path) -> Case:
    torch.save(goodfire_tensors(torch.bfloat16), folder / "sae.pt")
    expected = affine(drawn(torch.bfloat16), relu)
    return Case(folder / "sae.pt", Told(RESID), RESID, RESID, None, expected)


@case("goodfire/pth")
def _(folder: Path) -> Case:
    torch.save(goodfire_tensors(), folder / "sae.pth")
    return Case(folder, Told(RESID), RESID, RESID, None, affine(drawn(), relu))


def qwen_tensors(dtype: torch.dtype = torch.float32) -> Values:
    w = drawn(dtype)
    turned = {key: w[key].T.contiguous() for key in ("W_enc", "W_dec")}
    return turned | {key: w[key] for key in ("b_enc", "b_dec")}


@case("qwen_scope/pt")
def _(folder: Path) -> Case:
    torch.save(qwen_tensors(), folder / "layer3.sae.pt")
    told = Told(RESID, k=K)
    return Case(folder / "layer3.sae.pt", told, RESID, RESID, None, affine(drawn(), top))


# circuit-tracer

TRACED = {
    "model_kind": "transcoder_set",
    "model_name": "Qwen/Qwen3-0.6B",
    "feature_input_hook": "mlp.hook_in",
    "feature_output_hook": "mlp.hook_out",
}


def traced_tensors(dtype: torch.dtype = torch.float32, seed: int = 0) -> Values:
    w = drawn(dtype, seed)
    return {
        "W_enc": w["W_enc"].T.contiguous(),
        "b_enc": w["b_enc"],
        "W_dec": w["W_dec"],
        "b_dec": w["b_dec"],
    }


def circuit_tracer(folder: Path, tensors: Values, layers: int = 4, **changes: Any) -> Path:
    config = {k: v for k, v in (TRACED | changes).items() if v is not ...}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for i in range(layers):
        save_file(
            tensors if i == 3 else traced_tensors(seed=i + 1), folder / f"layer_{i}.safetensors"
        )
    return folder


@case("circuit_tracer/relu-skip")
def _(folder: Path) -> Case:
    w = exact(drawn(torch.bfloat16))
    inner = affine(drawn(torch.bfloat16), relu)

    def expected(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        z, x_hat = inner(x)
        return z, x_hat + x @ w["skip"].T

    tensors = traced_tensors(torch.bfloat16) | {"W_skip": drawn(torch.bfloat16)["skip"]}
    path = circuit_tracer(folder, tensors)
    return Case(path, Told(MLP_IN), MLP_IN, MLP_OUT, "Qwen/Qwen3-0.6B", expected)


@case("circuit_tracer/jumprelu")
def _(folder: Path) -> Case:
    w = drawn()
    tensors = traced_tensors() | {"activation_function.threshold": w["threshold"]}
    uris = [f"hf://someone/set/layer_{i}.safetensors?revision=main" for i in range(4)]
    path = circuit_tracer(
        folder, tensors, feature_input_hook="hook_resid_mid", scan="x", transcoders=uris
    )
    expected = affine(w, lambda pre: jump(pre, exact(w)["threshold"]))
    return Case(path, Told(MID), MID, MLP_OUT, "Qwen/Qwen3-0.6B", expected)


@case("circuit_tracer/topk")
def _(folder: Path) -> Case:
    path = circuit_tracer(folder, traced_tensors(), k=K, activation="topk", model_name=...)
    return Case(path, Told(MLP_IN), MLP_IN, MLP_OUT, None, affine(drawn(), top))


# Other formats, as far as it matters for telling them apart


@fixture("native/relu")
def _(folder: Path) -> Path:
    w = drawn()
    save_file({k: w[k] for k in ("W_enc", "b_enc", "W_dec", "b_dec")}, folder / "sae.safetensors")
    (folder / "sae.json").write_text("{}")
    return folder


PLAIN = ("W_enc", "b_enc", "W_dec", "b_dec")


@fixture("sae_lens/standard")
def _(folder: Path) -> Path:
    save_file({key: drawn()[key] for key in PLAIN}, folder / "sae_weights.safetensors")
    config = {"architecture": "standard", "d_in": D, "d_sae": N, "dtype": "float32"}
    about = {"hook_name": "blocks.3.hook_resid_post", "sae_lens_version": "6.54.12"}
    normal = {"apply_b_dec_to_input": True, "normalize_activations": "none"}
    (folder / "cfg.json").write_text(json.dumps(config | normal | {"metadata": about}))
    return folder


@fixture("dictionary_learning/jumprelu")
def _(folder: Path) -> Path:
    torch.save({key: drawn()[key] for key in (*PLAIN, "threshold")}, folder / "ae.pt")
    trainer = {"dict_class": "JumpReluAutoEncoder", "layer": 3, "activation_dim": D, "dict_size": N}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    return folder


@fixture("sparsify/topk")
def _(folder: Path) -> Path:
    w, tensors = drawn(), llama_tensors()
    encoder = {key: tensors[key] for key in ("encoder.weight", "encoder.bias")}
    save_file(encoder | {key: w[key] for key in ("W_dec", "b_dec")}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "num_latents": N, "k": K}))
    return folder


@fixture("linear_pair/safetensors")
def _(folder: Path) -> Path:
    save_file(llama_tensors(), folder / "sae.safetensors")
    return folder


# What they compute


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_computes_what_its_documentation_says(name, tmp_path):
    written = CASES[name](tmp_path)
    (member,) = opened(written.path, name.partition("/")[0], written.told)
    assert (member.site, member.target, member.model) == written[2:5]
    sae = member.load()
    for scale in (1.0, 4.0):
        x = torch.from_numpy(tokens(scale)).float()
        z, x_hat = written.expected(tokens(scale))
        assert 0.02 < (z != 0).mean() < 0.9, "the example says nothing"
        code = sae.encode(x)
        torch.testing.assert_close(code.double().numpy(), z, rtol=2e-5, atol=2e-5)
        beside = sae.beside(x)
        found = sae.decode(code) + (0 if beside is None else beside)
        torch.testing.assert_close(found.double().numpy(), x_hat, rtol=3e-5, atol=3e-5)
        dense = sparse.to_dense(sae.encode_sparse(x), sae.d_sae)
        torch.testing.assert_close(dense, code, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_weights_come_as_float32_without_gradients(name, tmp_path):
    written = CASES[name](tmp_path)
    (member,) = opened(written.path, name.partition("/")[0], written.told)
    for weight in member.load().parameters():
        assert weight.dtype == torch.float32 and not weight.requires_grad


# Which format it is


@pytest.mark.parametrize("name", FIXTURES)
def test_a_checkpoint_is_recognised_as_its_own_format_alone(name, tmp_path):
    source = Source(FIXTURES[name](tmp_path), Limits(allow_pickle=True))
    loaders = registry.names("loaders")
    fitting = [n for n in loaders if registry.get("loaders", n)().fits(source)]
    assert fitting == [name.partition("/")[0]]


@pytest.mark.parametrize("name", ["openai/topk", "goodfire/pt", "goodfire/pth", "qwen_scope/pt"])
def test_a_pickled_file_is_not_looked_into_unless_the_user_allows_it(name, tmp_path):
    written = CASES[name](tmp_path)
    format = name.partition("/")[0]
    assert not registry.get("loaders", format)().fits(Source(written.path, Limits()))
    (member,) = opened(written.path, format, written.told, pickle=False)
    with pytest.raises(UserError, match="--allow-pickle-weights"):
        member.load()


def broken(folder: Path) -> None:
    """Files with the names of every format, and nothing in them that is one."""
    for name in ("params.safetensors", "sae_weights.safetensors", "layer_0.safetensors", "a.pt"):
        (folder / name).write_bytes(b"\xff" * 40)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "final.safetensors").write_bytes(b"")
    for name in ("config.json", "hyperparams.json", "cfg.json", "config.yaml"):
        (folder / name).write_bytes(b"\xff{[")


@pytest.mark.parametrize("name", sorted({n.partition("/")[0] for n in CASES}))
def test_damaged_files_of_other_formats_are_not_recognised(name, tmp_path):
    broken(tmp_path)
    assert not registry.get("loaders", name)().fits(Source(tmp_path, Limits(allow_pickle=True)))


@pytest.mark.parametrize("name", CASES)
def test_a_tensor_that_nobody_knows_is_refused_by_its_name(name, tmp_path):
    written = CASES[name](tmp_path)
    path = written.path
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        add_tensor(file)
    with pytest.raises(UserError, match="mystery"):
        for member in opened(path, name.partition("/")[0], written.told):
            member.load()


def add_tensor(file: Path) -> None:
    if file.suffix == ".npz":
        with np.load(file) as found:
            arrays = dict(found)
        np.savez(file, mystery=np.zeros(2), **arrays)
    elif file.suffix == ".safetensors":
        save_file(load_file(file) | {"mystery": torch.zeros(2)}, file)
    elif file.suffix in (".pt", ".pth"):
        found = torch.load(file, weights_only=True)
        inner = found.get("sae", found)
        inner["mystery"] = torch.zeros(2)
        torch.save(found, file)


CONFIGURED = [
    (gemma_scope_2, "gemma_scope_2", {"config": GEMMA_2 | {"mystery": 1}}),
    (openmoss, "openmoss", {"mystery": 1}),
    (llama_scope, "llama_scope", {"mystery": 1}),
    (r1, "llama_scope", {"mystery": 1}),
    (circuit_tracer, "circuit_tracer", {"tensors": traced_tensors(), "mystery": 1}),
]


@pytest.mark.parametrize(("write", "format", "changes"), CONFIGURED)
def test_a_key_that_nobody_knows_is_refused_by_its_name(write, format, changes, tmp_path):
    with pytest.raises(UserError, match="mystery"):
        opened(write(tmp_path, **changes), format, Told())


# What the user has to say, and must not


@pytest.mark.parametrize("name", CASES)
def test_what_contradicts_the_files_is_refused(name, tmp_path):
    written = CASES[name](tmp_path)
    told = written.told._replace(norm=2.0)
    with pytest.raises(UserError, match="norm"):
        opened(written.path, name.partition("/")[0], told)
    if written.told.site is None:
        with pytest.raises(UserError, match="5.resid_pre"):
            opened(written.path, name.partition("/")[0], Told(Site("resid_pre", 5)))


@pytest.mark.parametrize(
    "name",
    [
        "gemma_scope/sae",
        "gemma_scope_2/alone",
        "openai/topk",
        "goodfire/pt",
        "qwen_scope/pt",
    ],
)
def test_a_site_that_the_files_do_not_say_has_to_be_said(name, tmp_path):
    written = CASES[name](tmp_path)
    with pytest.raises(UserError, match="say so with site"):
        opened(written.path, name.partition("/")[0], written.told._replace(site=None))


def test_qwen_scope_needs_k(tmp_path):
    written = CASES["qwen_scope/pt"](tmp_path)
    with pytest.raises(UserError, match="say so with k"):
        opened(written.path, "qwen_scope", Told(RESID))


def test_openai_safetensors_need_k_and_its_pt_files_must_not_have_it(tmp_path):
    safe = CASES["openai/safetensors"](tmp_path)
    (member,) = opened(safe.path, "openai", Told(RESID))
    with pytest.raises(UserError, match="say k"):
        member.load()
    (tmp_path / "3.safetensors").unlink()
    topk = CASES["openai/topk"](tmp_path)
    (member,) = opened(topk.path, "openai", Told(RESID, k=3))
    with pytest.raises(UserError, match="k has no meaning"):
        member.load()


# Refusals, format by format


def load_all(path: Path, format: str, told: Told) -> None:
    for member in opened(path, format, told):
        member.load()


@pytest.mark.parametrize(("changes", "told", "match"), [
    ({"scaling_factor": np.full(N, 1.5)}, Told(RESID), "scaling_factor is not 1"),
    ({"W_enc": None}, Told(RESID), "lacks W_enc"),
    ({"W_enc": np.zeros(3)}, Told(RESID), "expected a matrix"),
    ({"b_enc": np.zeros(N + 1)}, Told(RESID), "b_enc"),
    ({"b_dec": np.full(D, np.nan)}, Told(RESID), "not finite"),
    ({}, Told(Site("model.embed_tokens.output")), "embedding"),
    ({}, Told(MLP_IN, MLP_OUT), "expected resid_mid"),
    ({}, Told(RESID, k=3), "k has no meaning"),
])  # fmt: skip
def test_gemma_scope_refuses(changes, told, match, tmp_path):
    with pytest.raises(UserError, match=match):
        load_all(gemma_scope(tmp_path, changes), "gemma_scope", told)


def test_several_npz_files_are_no_checkpoint(tmp_path):
    gemma_scope(gemma_scope(tmp_path), name="other")
    with pytest.raises(UserError, match=r"expected one \.npz"):
        opened(tmp_path, "gemma_scope", Told(RESID))


@pytest.mark.parametrize(("changes", "match"), [
    ({"architecture": "topk"}, "architecture is 'topk'"),
    ({"type": "clt"}, "type is 'clt'"),
    ({"type": "crosscoder"}, "type is 'crosscoder'"),
    ({"width": N + 1}, "width 24"),
    ({"hf_hook_point_in": 3}, "hf_hook_point_in is 3"),
    ({"hf_hook_point_in": "model.layers.3"}, "not a site"),
    ({"model_name": ["x"]}, "model_name"),
])  # fmt: skip
def test_gemma_scope_2_refuses(changes, match, tmp_path):
    with pytest.raises(UserError, match=match):
        load_all(gemma_scope_2(tmp_path, GEMMA_2 | changes), "gemma_scope_2", Told())


def test_an_empty_configuration_of_gemma_scope_2_is_not_none(tmp_path):
    gemma_scope_2(tmp_path, None)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="lacks architecture, hf_hook_point_in"):
        opened(tmp_path, "gemma_scope_2", Told(RESID))


@pytest.mark.parametrize("said", [True, False])
def test_an_affine_path_is_there_if_and_only_if_the_configuration_says_so(said, tmp_path):
    gemma_scope_2(tmp_path, TRANSCODER_2 | {"affine_connection": not said})
    config = TRANSCODER_2 | {"affine_connection": said}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"affine_connection {said}"):
        load_all(tmp_path, "gemma_scope_2", Told())


@pytest.mark.parametrize(("point", "site"), [
    ("model.layers.11.self_attn.o_proj.input", Site("attn_z", 11)),
    ("model.language_model.layers.2.output", Site("resid_post", 2)),
    ("model.layers.0.input", Site("resid_pre", 0)),
    ("model.layers.2.self_attn.q_proj.output", Site("model.layers.2.self_attn.q_proj.output")),
    ("model.norm.output", Site("model.norm.output")),
])  # fmt: skip
def test_a_hook_point_of_gemma_scope_2_is_a_stream_or_a_module(point, site, tmp_path):
    config = {k: v for k, v in GEMMA_2.items() if k != "hf_hook_point_out"}
    gemma_scope_2(tmp_path, config | {"hf_hook_point_in": point})
    (member,) = opened(tmp_path, "gemma_scope_2", Told())
    assert member.site == site == member.target


def test_cross_layer_transcoders_of_gemma_scope_2_are_refused(tmp_path):
    gemma_scope_2(tmp_path, None)
    tensors = drawn()
    layers = {
        "w_enc": tensors["W_enc"],
        "w_dec": tensors["W_dec"][:, None].repeat(1, 4, 1),
        **{key: tensors[key] for key in ("b_enc", "b_dec", "threshold")},
    }
    save_file(layers, tmp_path / "params.safetensors")
    with pytest.raises(UserError, match="cross-layer transcoder"):
        opened(tmp_path, "gemma_scope_2", Told(RESID))
    (tmp_path / "params.safetensors").unlink()
    for i in range(2):
        save_file(layers, tmp_path / f"params_layer_{i}.safetensors")
    assert registry.get("loaders", "gemma_scope_2")().fits(Source(tmp_path, Limits()))
    with pytest.raises(UserError, match="cross-layer transcoders"):
        opened(tmp_path, "gemma_scope_2", Told(RESID))


@pytest.mark.parametrize(("state", "match"), [
    ({"activation": "JumpReLU", "activation_state_dict": {}}, "activation is 'JumpReLU'"),
    ({"activation": "TopK", "activation_state_dict": {"k": K}}, "lacks postact_fn"),
    ({"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "Identity"}}, "Identity"),
    ({"activation": "TopK", "activation_state_dict": {"k": 2.5, "postact_fn": "ReLU"}}, "k 2.5"),
    ({"activation": "TopK", "activation_state_dict": {"k": N + 1, "postact_fn": "ReLU"}}, "k is 24"),
    ({"activation": "TopK"}, "lacks k"),
    (TOPK_STATE | {"pre_bias": 3}, "pre_bias is int"),
    (TOPK_STATE | {"pre_bias": torch.zeros(D, 1)}, "b_dec"),
    (TOPK_STATE | {"encoder.weight": torch.zeros(N)}, "expected a matrix"),
])  # fmt: skip
def test_openai_refuses(state, match, tmp_path):
    torch.save(openai_tensors() | state, tmp_path / "a.pt")
    with pytest.raises(UserError, match=match):
        load_all(tmp_path, "openai", Told(RESID))


@pytest.mark.parametrize(("changes", "match"), [
    ({"act_fn": "batchtopk"}, "act_fn is 'batchtopk'"),
    ({"act_fn": "layertopk"}, "act_fn is 'layertopk'"),
    ({"norm_activation": "batch-wise"}, "norm_activation is 'batch-wise'"),
    ({"norm_activation": "token-wise"}, "directions without lengths"),
    ({"use_glu_encoder": True}, "use_glu_encoder is True"),
    ({"sae_type": "clt"}, "sae_type is 'clt'"),
    ({"sae_type": "lorsa"}, "sae_type is 'lorsa'"),
    ({"use_decoder_bias": False}, "has b_D"),
    ({"use_decoder_bias": 1}, "use_decoder_bias is 1"),
    ({"expansion_factor": 2}, "the encoder is 7 x 23"),
    ({"expansion_factor": -1}, "expansion_factor is -1"),
    ({"d_model": "7"}, "d_model is '7'"),
    ({"hook_point_in": 4}, "hook_point_in is 4"),
    ({"hook_point_in": "blocks.3.ln2.hook_normalized"}, "ln2.hook_normalized"),
    ({"act_fn": "topk", "top_k": 0}, "k is 0"),
    ({"act_fn": "topk", "top_k": ...}, "lacks top_k"),
    ({"act_fn": ...}, "act_fn"),
])  # fmt: skip
def test_openmoss_refuses(changes, match, tmp_path):
    if changes.get("act_fn") is ... or changes.get("top_k") is ...:
        openmoss(tmp_path)
        config = {k: v for k, v in (MOSS | changes).items() if v is not ...}
        (tmp_path / "config.json").write_text(json.dumps(config))
    else:
        openmoss(tmp_path, **changes)
    with pytest.raises(UserError, match=match):
        load_all(tmp_path, "openmoss", Told())


@pytest.mark.parametrize("length", [0.0, -3.0, float("nan"), float("inf")])
def test_a_mean_length_that_is_none_is_refused(length, tmp_path):
    openmoss(tmp_path, **MOSS_SAE)
    tensors = moss_tensors(MOSS | MOSS_SAE)
    tensors["dataset_average_activation_norm.blocks.3.hook_resid_post"] = torch.tensor(length)
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    with pytest.raises(UserError, match="expected a number above 0"):
        load_all(tmp_path, "openmoss", Told())


def test_sharded_weights_are_refused(tmp_path):
    openmoss(tmp_path)
    (tmp_path / "sae_weights.safetensors").unlink()
    (tmp_path / "sae_weights.dcp").mkdir()
    (tmp_path / "sae_weights.dcp" / "__0_0.distcp").write_bytes(b"x")
    assert registry.get("loaders", "openmoss")().fits(Source(tmp_path, Limits()))
    with pytest.raises(UserError, match="sharded"):
        load_all(tmp_path, "openmoss", Told())


@pytest.mark.parametrize(("changes", "match"), [
    ({"jump_relu_threshold": -1.0}, "jump_relu_threshold is -1.0"),
    ({"jump_relu_threshold": "x"}, "jump_relu_threshold is 'x'"),
    ({"jump_relu_threshold": False}, "jump_relu_threshold is False"),
    ({"jump_relu_threshold": ...}, "lacks jump_relu_threshold"),
    ({"dataset_average_activation_norm": {"in": 3.0}}, "dataset_average_activation_norm"),
    ({"dataset_average_activation_norm": {"in": 3.0, "out": 0}}, "norm out is 0"),
    ({"apply_decoder_bias_to_pre_encoder": True}, "apply_decoder_bias_to_pre_encoder is True"),
    ({"d_sae": N + 1}, "d_sae is 24"),
    ({"hook_point_out": "blocks.3.ln2.hook_normalized"}, "ln2.hook_normalized"),
])  # fmt: skip
def test_llama_scope_refuses(changes, match, tmp_path):
    with pytest.raises(UserError, match=match):
        load_all(llama_scope(tmp_path, **changes), "llama_scope", Told())


def test_a_threshold_of_llama_scope_does_not_depend_on_the_unit_of_its_input(tmp_path):
    """Ten times longer inputs with a ten times larger mean length: the same latents."""
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    one = opened(llama_scope(tmp_path / "a"), "llama_scope", Told())[0].load()
    longer = {"in": 10 * NORM_IN, "out": NORM_IN}
    path = llama_scope(tmp_path / "b", dataset_average_activation_norm=longer)
    ten = opened(path, "llama_scope", Told())[0].load()
    x = torch.from_numpy(tokens()).float()
    torch.testing.assert_close(one.encode(x), ten.encode(10 * x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dropped", "changes", "match"), [
    ("log_jumprelu_threshold", {}, "lacks log_jumprelu_threshold"),
    ("dataset_average_activation_norm.blocks.3.hook_resid_post", {}, "dataset-wise needs"),
    ("", {"sae_type": "crosscoder"}, "sae_type is 'crosscoder'"),
    ("", {"act_fn": "relu"}, "has log_jumprelu_threshold"),
])  # fmt: skip
def test_the_r1_layout_refuses(dropped, changes, match, tmp_path):
    with pytest.raises(UserError, match=match):
        load_all(r1(tmp_path, dropped, **changes), "llama_scope", Told())


def test_two_linear_layers_of_goodfire_are_read_as_safetensors_where_the_format_is_said(tmp_path):
    save_file(goodfire_tensors(), tmp_path / "sae.safetensors")
    (member,) = opened(tmp_path, "goodfire", Told(RESID), pickle=False)
    x = torch.from_numpy(tokens()).float()
    z, _ = affine(drawn(), relu)(tokens())
    torch.testing.assert_close(member.load().encode(x).double().numpy(), z, rtol=1e-5, atol=1e-5)


def test_weights_that_are_not_transposed_are_no_qwen_scope(tmp_path):
    w = drawn()
    torch.save({k: w[k] for k in ("W_enc", "W_dec", "b_enc", "b_dec")}, tmp_path / "sae.pt")
    source = Source(tmp_path, Limits(allow_pickle=True))
    assert not registry.get("loaders", "qwen_scope")().fits(source)
    with pytest.raises(UserError, match="do not fit together"):
        load_all(tmp_path, "qwen_scope", Told(RESID, k=K))


def test_one_of_several_files_has_to_be_named(tmp_path):
    for layer in range(2):
        torch.save(qwen_tensors(), tmp_path / f"layer{layer}.sae.pt")
    with pytest.raises(UserError, match="name one"):
        opened(tmp_path, "qwen_scope", Told(RESID, k=K))


def test_a_set_of_transcoders_has_one_for_each_layer(tmp_path):
    members = opened(circuit_tracer(tmp_path, traced_tensors()), "circuit_tracer", Told())
    assert [m.site for m in members] == [Site("mlp_in", i) for i in range(4)]
    assert [m.target for m in members] == [Site("mlp_out", i) for i in range(4)]
    first = exact(drawn(seed=1))["W_dec"]
    torch.testing.assert_close(members[0].load().W_dec.double().numpy(), first)


THRESHOLD = {"activation_function.threshold": torch.ones(N)}


@pytest.mark.parametrize(("tensors", "changes", "told", "match"), [
    ({}, {"model_kind": "cross_layer_transcoder"}, Told(), "cross-layer transcoder"),
    ({}, {"model_kind": "x"}, Told(), "model_kind is 'x'"),
    ({}, {"feature_input_hook": 3}, Told(), "feature_input_hook is 3"),
    ({}, {"feature_input_hook": "ln2.hook_normalized"}, Told(), "ln2.hook_normalized"),
    ({}, {"feature_input_hook": ...}, Told(), "lacks feature_input_hook"),
    ({}, {"activation": "topk"}, Told(), "is relu"),
    ({}, {"activation": "topk", "k": 3}, Told(k=4), "k is said to be 4, and 3"),
    ({}, {"k": "3"}, Told(), "k is '3'"),
    ({"k": torch.zeros(2)}, {}, Told(), "k is not one whole number"),
    (THRESHOLD, {"k": 3}, Told(), "expected one of them"),
    (THRESHOLD, {"activation": "relu"}, Told(), "is jumprelu"),
    ({"W_skip": torch.zeros(D)}, {}, Told(), "expected a matrix"),
    ({}, {"transcoders": ["hf://a/b/c/params.npz"] * 4}, Told(), "elsewhere"),
    ({}, {"transcoders": "hf://a/b/layer_0.safetensors"}, Told(), "elsewhere"),
    ({}, {}, Told(Site("mlp_in", 9)), "no transcoder as site"),
])  # fmt: skip
def test_circuit_tracer_refuses(tensors, changes, told, match, tmp_path):
    path = circuit_tracer(tmp_path, traced_tensors() | tensors, **changes)
    with pytest.raises(UserError, match=match):
        load_all(path, "circuit_tracer", told)


def test_a_set_without_layers_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no layer_0\.safetensors"):
        opened(circuit_tracer(tmp_path, {}, layers=0), "circuit_tracer", Told())


def test_one_threshold_of_circuit_tracer_stands_for_all_latents(tmp_path):
    tensors = traced_tensors() | {"activation_function.threshold": torch.tensor(0.5)}
    path = circuit_tracer(tmp_path, tensors)
    (member,) = opened(path, "circuit_tracer", Told(MLP_IN))
    z, _ = affine(drawn(), lambda pre: jump(pre, 0.5))(tokens())
    found = member.load().encode(torch.from_numpy(tokens()).float())
    torch.testing.assert_close(found.double().numpy(), z, rtol=1e-5, atol=1e-5)


def test_per_token_normalisation_is_part_of_the_sae_where_the_format_has_it(tmp_path):
    wrapped = set()
    for name, write in CASES.items():
        folder = tmp_path / name.replace("/", "-")
        folder.mkdir()
        written = write(folder)
        (member,) = opened(written.path, name.partition("/")[0], written.told)
        if isinstance(sae := member.load(), Normalized):
            wrapped.add((name, sae.norm, sae.undone))
    assert wrapped == {
        ("gemma_scope/transcoder", "rms", False),
        ("openai/topk", "layer", True),
        ("openai/safetensors", "layer", True),
        ("openmoss/topk-token-wise", "length", True),
        ("llama_scope/transcoder", "rms", False),
    }
