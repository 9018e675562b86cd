"""Transcoders that circuit-tracer writes, and those of Gemma Scope that it reads, beside its own code.

It asks for older packages than are here; of what is tested here it needs none of them.
"""

import json
import warnings

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from saebench import registry
from saebench.loaders._files import Limits, Source
from saebench.loaders._loader import Told
from saebench.types import Site
from tests.parity.conftest import Agree

single = pytest.importorskip(
    "circuit_tracer.transcoder.single_layer_transcoder", exc_type=ImportError
)
activations = pytest.importorskip(
    "circuit_tracer.transcoder.activation_functions", exc_type=ImportError
)

D, N, TOKENS, LAYERS = 7, 23, 80, 2
DTYPES = (torch.float32, torch.bfloat16)
CPU = torch.device("cpu")


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def loaded(folder, format, told=Told()):  # noqa: B008  # a NamedTuple
    members = registry.get("loaders", format)().members(Source(folder, Limits()), told)
    return [member.load() for member in members]


def both(agree: Agree, row, ours, theirs, x, normalise=None):
    """`theirs` on what the format normalises, where it does."""
    given = x if normalise is None else normalise(x)
    with torch.no_grad():
        z, y = theirs.encode(given), theirs(given)
    beside = ours.beside(x)
    agree(*row, ours.encode(x), z)
    agree(*row, ours.decode(ours.encode(x)) + (0 if beside is None else beside), y)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("act", ["relu", "jumprelu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_set_of_transcoders(dtype, act, skip, tmp_path, agree):
    theirs = {i: transcoder(i, act, skip, dtype) for i in range(LAYERS)}
    whole = single.TranscoderSet(theirs, "mlp.hook_in", "mlp.hook_out")
    whole.to_safetensors(str(tmp_path))
    hooks = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
    config = {"model_kind": "transcoder_set", "model_name": "a/b", "revision": None} | hooks
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    row = ("circuit_tracer", f"{act}{'-skip' if skip else ''}", dtype)
    for i, ours in enumerate(loaded(tmp_path, "circuit_tracer")):
        both(agree, row, ours, theirs[i].float(), drawn(TOKENS, D, seed=5))


def transcoder(layer, act, skip, dtype):
    function = torch.nn.functional.relu
    if act == "jumprelu":
        function = activations.JumpReLU(drawn(N, seed=9).abs().to(dtype), 0.1)
    made = single.SingleLayerTranscoder(
        D, N, function, layer, skip_connection=skip, device=CPU, dtype=dtype
    )
    for seed, (name, parameter) in enumerate(made.named_parameters()):
        if "threshold" not in name:
            parameter.data = drawn(*parameter.shape, seed=10 * layer + seed, dtype=dtype)
    return made


def weights():
    return {
        "W_enc": drawn(D, N),
        "b_enc": drawn(N, seed=1),
        "W_dec": drawn(N, D, seed=2),
        "b_dec": drawn(D, seed=3),
        "threshold": drawn(N, seed=4).abs(),
    }


def test_a_transcoder_of_gemma_scope(tmp_path, agree):
    np.savez(tmp_path / "params.npz", **{key: value.numpy() for key, value in weights().items()})
    theirs = single.load_gemma_scope_transcoder(str(tmp_path / "params.npz"), 0, CPU)
    told = Told(Site("resid_mid", 0), Site("mlp_out", 0))
    (ours,) = loaded(tmp_path, "gemma_scope", told)
    row = ("gemma_scope", "transcoder", "float32")
    both(agree, row, ours, theirs, drawn(TOKENS, D, seed=5), gemma_norm)


def gemma_norm(x):
    """Of Gemma 2, but for its gain."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_of_gemma_scope_2(skip, tmp_path, agree):
    tensors = {key.replace("W", "w"): value for key, value in weights().items()}
    if skip:
        tensors["affine_skip_connection"] = drawn(D, D, seed=6)
    save_file(tensors, tmp_path / "params.safetensors")
    points = ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output")
    config = {
        "architecture": "jump_relu",
        "hf_hook_point_in": f"model.layers.0.{points[0]}",
        "hf_hook_point_out": f"model.layers.0.{points[1]}",
        "affine_connection": skip,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = str(tmp_path / "params.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about what it loads lazily
        theirs = single.load_gemma_scope_2_transcoder(path, 0, CPU)
    (ours,) = loaded(tmp_path, "gemma_scope_2")
    row = ("gemma_scope_2", "transcoder-skip" if skip else "transcoder", "float32")
    both(agree, row, ours, theirs, drawn(TOKENS, D, seed=5))
