"""The format of SAELens: a folder with `cfg.json` and `sae_weights.safetensors`, of version 6 or earlier.

https://github.com/decoderesearch/SAELens. What its classes do at inference is folded into the weights, so that latents
are theirs but for the two cases named here:

pre   = (x - b_dec) W_enc + b_enc        b_enc - b_dec W_enc becomes the bias, where apply_b_dec_to_input is set
norm  = |d_i| of decoder row i           where rescale_acts_by_decoder_norm is set: W_enc norm, b_enc norm, W_dec / norm
z     = relu(pre) where pre > threshold  thresholds below zero are zero
x_hat = (c z) W_dec + b_dec              c W_dec becomes the decoder, where a fine-tuning factor c is kept

BatchTopK and Matryoshka BatchTopK, as training checkpoints, become JumpReLU SAEs of their `topk_threshold`, as SAELens
makes them of it. Input normalisation (`normalize_activations`):

none                       or already folded by SAELens
expected_average_only_in   trained on s x, s = sqrt(d) / mean length: `scaling_factor` of `activation_scaler.json`, or
                           from `norm`. Folded; latents are theirs / s, in the unit of x
covariance_whitening       trained on (x - mean) M: `activation_whitening.safetensors`. Folded
layer_norm                 per token, as `Normalized`; latents are theirs times the token's scale
constant_norm_rescale      the same with the token's length

SAELens multiplies by the standard deviation alone where it undoes a layer norm; here the 1e-5 that it divided by as
well is undone too. How the language model was processed (`model_from_pretrained_kwargs`) is not looked at.
"""

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from saebench.errors import UserError
from saebench.loaders._centred import centred, finite
from saebench.loaders._files import Source, check_keys
from saebench.loaders._loader import (
    Loader,
    Member,
    Told,
    build,
    flag,
    needless,
    the_site,
    whole,
)
from saebench.loaders._sae_lens_keys import FLAT_KEYS, KEYS, METADATA, NEEDED
from saebench.saes._dictionary import Dictionary, Scaling
from saebench.saes._normalized import Norm, Normalized
from saebench.sites import parse_site
from saebench.types import Site

_CONFIG, _WEIGHTS = "cfg.json", "sae_weights.safetensors"
_SCALER, _WHITENING = "activation_scaler.json", "activation_whitening.safetensors"


class _Kind(NamedTuple):
    sae: str
    """The module of `saes/` that computes the same."""
    vectors: tuple[str, ...] = ("b_enc",)
    """Weights of one number per latent."""
    transcodes: bool = False
    skip: bool = False


_KINDS = {
    "standard": _Kind("relu"),
    "gated": _Kind("gated", ("b_gate", "b_mag", "r_mag")),
    "jumprelu": _Kind("jumprelu", ("b_enc", "threshold")),
    "topk": _Kind("topk"),
    "batchtopk": _Kind("jumprelu"),
    "matryoshka_batchtopk": _Kind("jumprelu"),
    "transcoder": _Kind("relu", transcodes=True),
    "skip_transcoder": _Kind("relu", transcodes=True, skip=True),
    "jumprelu_transcoder": _Kind("jumprelu", ("b_enc", "threshold"), transcodes=True),
    "jumprelu_skip_transcoder": _Kind(
        "jumprelu", ("b_enc", "threshold"), transcodes=True, skip=True
    ),
}
_OF_BATCH = ("batchtopk", "matryoshka_batchtopk")
_UNREAD = {
    "abstopk": "it keeps the largest absolute values, so latents can be negative",
    "matching_pursuit": "it has no encoder, and chooses latents one after the other",
    "temporal": "it attends to earlier tokens, and here a token is encoded by itself",
}
_PER_TOKEN: Mapping[str, tuple[Norm, float]] = {
    "layer_norm": ("layer", 1e-5),
    "constant_norm_rescale": ("length", 0.0),
}
_SCALED, _WHITENED = "expected_average_only_in", "covariance_whitening"
_NORMALIZATIONS = ("none", _SCALED, _WHITENED, *_PER_TOKEN)
_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "hook_point_layer": "hook_layer",
    "activation_fn_str": "activation_fn",
}


class _Config(NamedTuple):
    """What `cfg.json` says that matters, whatever its version."""

    architecture: str
    kind: _Kind
    d_in: int
    d_sae: int
    d_out: int
    k: int | None
    subtracts: bool
    """Whether b_dec is taken off the input."""
    rescaled: bool
    """Whether latents count by the length of their decoder row."""
    finetuned: bool
    normalization: str
    metadata: Mapping[str, Any]


@final
class SAELens(Loader):
    def fits(self, source: Source) -> bool:
        return source.has(_CONFIG, _WEIGHTS)

    def members(self, source: Source, told: Told) -> Sequence[Member]:
        where = str(source.path)
        needless(told, where, "k")
        config = _config(source.json(_CONFIG), where)
        factor = _factor(source, config, told, where)
        _check_shapes(source.shapes(_WEIGHTS), config, where)
        if config.normalization == _WHITENED and not source.has(_WHITENING):
            raise UserError(
                f"{where} was trained on whitened activations, and {_WHITENING} is missing"
            )
        site = _site(told.site, config.metadata, "hook_name", where)
        target = site
        if config.kind.transcodes or config.metadata.get("hook_name_out") is not None:
            target = _site(told.predicts, config.metadata, "hook_name_out", where)
        else:
            needless(told, where, "predicts")
        model = _text(config.metadata, "model_name", where)
        return [Member(site, target, model, partial(_load, source, config, factor, where))]


def _config(written: Mapping[str, Any], where: str) -> _Config:
    _kind(written.get("architecture", "standard"), where)  # a strange one has strange keys as well
    found, finetuned = _of_any_version(written, where)
    metadata = found["metadata"]
    if not isinstance(metadata, dict):
        raise UserError(f"{where}: metadata is {metadata!r}; expected named values")
    check_keys(metadata, (), METADATA, f"{where}: metadata of {_CONFIG}")
    _check_plain(found, metadata, where)
    kind = _kind(found["architecture"], where)
    config = _Config(
        architecture=found["architecture"],
        kind=kind,
        d_in=whole(found, "d_in", where),
        d_sae=whole(found, "d_sae", where),
        d_out=whole(found, "d_out" if kind.transcodes else "d_in", where),
        k=whole(found, "k", where) if kind.sae == "topk" else None,
        subtracts=flag(found, "apply_b_dec_to_input", where),
        rescaled=flag(found, "rescale_acts_by_decoder_norm", where),
        finetuned=finetuned,
        normalization=found["normalize_activations"],
        metadata=metadata,
    )
    _check_transcoder(config, where)
    return config


def _of_any_version(written: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], bool]:
    """As of version 6, and whether latents have factors of a fine-tuning, as they could before."""
    if _is_of_6(written):
        check_keys(written, NEEDED, KEYS, f"{where}: {_CONFIG}")
        return written, False
    flat = {_RENAMED.get(key, key): value for key, value in written.items()}
    check_keys(flat, ("d_in", "d_sae"), FLAT_KEYS, f"{where}: {_CONFIG}")
    return _of_6(flat, where), flag(flat, "finetuning_scaling_factor", where)


def _is_of_6(written: Mapping[str, Any]) -> bool:
    """What names no version is older than versions are, unless it has the shape of 6."""
    version = str(written.get("sae_lens_version") or "")
    major = re.match(r"(\d{1,4})\.", version)
    return "metadata" in written or (major is not None and int(major[1]) >= 6)


def _of_6(flat: Mapping[str, Any], where: str) -> dict[str, Any]:
    """As version 6 would write it. What a file leaves out was not there to be chosen when it was written."""
    found = {key: value for key, value in flat.items() if key in KEYS}
    found.setdefault("architecture", "standard")
    found.setdefault("apply_b_dec_to_input", True)
    hook_z = "hook_z" in str(flat.get("hook_name"))
    found.setdefault("reshape_activations", "hook_z" if hook_z else "none")
    normalization = flat.get("normalize_activations")
    if normalization is None or isinstance(normalization, bool):
        found["normalize_activations"] = _SCALED if normalization else "none"
    function = flat.get("activation_fn", "relu")
    if function == "topk":
        kept = flat.get("activation_fn_kwargs")
        k = kept.get("k") if isinstance(kept, dict) else None
        found |= {"architecture": "topk", "k": k}
    elif function != "relu":
        raise UserError(f"{where}: activation_fn is {function!r}; expected relu or topk")
    return found | {"metadata": {key: flat[key] for key in flat if key in METADATA}}


def _check_plain(found: Mapping[str, Any], metadata: Mapping[str, Any], where: str) -> None:
    normalization, shape = found["normalize_activations"], found["reshape_activations"]
    if normalization not in _NORMALIZATIONS:
        raise UserError(
            f"{where}: normalize_activations is {normalization!r}; expected one of {', '.join(_NORMALIZATIONS)}"
        )
    if shape not in ("none", "hook_z"):
        raise UserError(f"{where}: reshape_activations is {shape!r}; expected none or hook_z")
    for name in ("hook_head_index", "hook_head_index_out"):
        if metadata.get(name) is not None:
            raise UserError(
                f"{where} is about one attention head ({name} is {metadata[name]!r}); only all heads' outputs "
                "together are a stream here (attn_z)"
            )


def _check_transcoder(config: _Config, where: str) -> None:
    if not config.kind.transcodes:
        return
    if config.subtracts:
        raise UserError(
            f"{where}: apply_b_dec_to_input is set, and the b_dec of a transcoder is no bias of its input"
        )
    if config.normalization in (_SCALED, _WHITENED):
        raise UserError(
            f"{where}: a transcoder with normalize_activations {config.normalization} does not say how its target "
            "was scaled; fold the normalisation in SAELens"
        )
    if config.kind.skip and config.normalization != "none":
        raise UserError(
            f"{where}: {config.architecture} with normalize_activations {config.normalization} cannot be said here: "
            "its skip connection reads what is not normalised"
        )


def _kind(architecture: object, where: str) -> _Kind:
    if isinstance(architecture, str) and architecture in _KINDS:
        return _KINDS[architecture]
    why = _UNREAD.get(str(architecture), "no such class comes with SAELens, so a plug-in wrote it")
    raise UserError(
        f"{where}: architecture {architecture!r} is not read: {why}; there are: {', '.join(_KINDS)}"
    )


def _text(found: Mapping[str, Any], name: str, where: str) -> str | None:
    given = found.get(name)
    if given is not None and not isinstance(given, str):
        raise UserError(f"{where}: {name} is {given!r}; expected a name")
    return given or None


def _site(told: Site | None, metadata: Mapping[str, Any], name: str, where: str) -> Site:
    """A hook of TransformerLens, or, of a model of transformers, a module whose output is read."""
    option = "site" if name == "hook_name" else "predicts"
    hook = _text(metadata, name, where)
    if hook is None:
        return the_site(told, None, where, option)
    if metadata.get("model_class_name") == "AutoModelForCausalLM":
        return the_site(told, parse_site(f"{hook}.output"), where, option)
    try:
        found = parse_site(hook)
    except UserError as error:
        if told is None:
            raise UserError(f"{where}: {name} {error}. Say what it is with {option}") from None
        return told
    return the_site(told, found, where, option)


def _factor(source: Source, config: _Config, told: Told, where: str) -> float | None:
    """What activations were multiplied by before training, where that is not folded yet."""
    kept = source.json(_SCALER).get("scaling_factor") if source.has(_SCALER) else None
    if config.normalization != _SCALED:
        needless(told, where, "norm")
        if kept is not None:
            raise UserError(
                f"{where}: {_SCALER} scales by {kept!r}, and normalize_activations is {config.normalization}"
            )
        return None
    if kept is not None:
        needless(told, where, "norm")
        return _positive(kept, f"{where}: scaling_factor")
    if told.norm is None:
        raise UserError(
            f"{where} was trained on activations scaled to a mean length of sqrt({config.d_in}), and does not say "
            "what it was before; say so with norm (the mean length of an activation of the text it was trained on)"
        )
    return math.sqrt(config.d_in) / _positive(told.norm, f"{where}: norm")


def _positive(given: object, what: str) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given < math.inf:
        raise UserError(f"{what} is {given!r}; expected a number above 0")
    return float(given)


def _check_shapes(found: Mapping[str, tuple[int, ...]], config: _Config, where: str) -> None:
    """Before anything is computed of weights."""
    d_in, d_sae, d_out, kind = config.d_in, config.d_sae, config.d_out, config.kind
    expected: dict[str, tuple[int, ...]] = {name: (d_sae,) for name in kind.vectors}
    expected |= {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    if kind.skip:
        expected["W_skip"] = (d_out, d_in)
    if config.architecture in _OF_BATCH:
        expected["topk_threshold"] = ()
    if "log_threshold" in found and "threshold" in expected:
        expected["log_threshold"] = expected.pop("threshold")
    if "scaling_factor" in found:
        expected["scaling_factor"] = (d_sae,)
    if found != expected:
        wrong = ", ".join(sorted({name for name, _ in found.items() ^ expected.items()}))
        raise UserError(
            f"{where}: the tensors of {_WEIGHTS} are not those of {config.architecture} ({wrong[:400]}): got "
            f"{str(dict(found))[:1000]}, expected {expected}"
        )


def _load(
    source: Source, config: _Config, factor: float | None, where: str
) -> Dictionary | Normalized:
    weights = _floats(source.tensors(_WEIGHTS), where)
    _set_threshold(weights, config)
    _scale_decoder(weights, config, where)
    if config.rescaled:
        _count_by_norm(weights)
    if config.kind.skip:
        weights["W_skip"] = weights["W_skip"].T
    sae = build(config.kind.sae, _arguments(config), weights, where)
    if config.subtracts:
        sae = centred(sae, where)
    if factor is not None:
        scaling = Scaling(torch.zeros(config.d_in), 1 / factor)
        sae.fold(scaling, scaling)
    if config.normalization == _WHITENED:
        _fold_whitening(sae, _floats(source.tensors(_WHITENING), where), where)
    finite(sae, where)
    if config.normalization not in _PER_TOKEN:
        return sae
    norm, eps = _PER_TOKEN[config.normalization]
    return Normalized(sae, norm, eps, undone=not config.kind.transcodes)


def _arguments(config: _Config) -> dict[str, Any]:
    shape = {"d_in": config.d_in, "d_sae": config.d_sae, "d_out": config.d_out}
    k = {} if config.k is None else {"k": config.k}
    return shape | {"skip": config.kind.skip} | k


def _floats(found: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    for name, tensor in found.items():
        if not tensor.is_floating_point():
            raise UserError(f"{where}: {name} is of {tensor.dtype}; expected floating point")
    return {name: tensor.float() for name, tensor in found.items()}


def _set_threshold(weights: dict[str, Tensor], config: _Config) -> None:
    if "topk_threshold" in weights:
        weights["threshold"] = weights.pop("topk_threshold").expand(config.d_sae)
    if "log_threshold" in weights:
        weights["threshold"] = weights.pop("log_threshold").exp()
    if "threshold" in weights:
        weights["threshold"] = weights["threshold"].clamp_min(0)


def _scale_decoder(weights: dict[str, Tensor], config: _Config, where: str) -> None:
    """By the factors of a fine-tuning, which multiply latents as they are decoded. For a time all had some, of one."""
    factors = weights.pop("scaling_factor", None)
    if factors is None or torch.allclose(factors, torch.ones_like(factors)):
        return
    if not config.finetuned:
        raise UserError(
            f"{where}: there is a scaling_factor, and finetuning_scaling_factor is not set"
        )
    weights["W_dec"] = factors[:, None] * weights["W_dec"]


def _count_by_norm(weights: dict[str, Tensor]) -> None:
    norm = weights["W_dec"].norm(dim=-1).clamp_min(1e-8)
    weights["W_enc"] = weights["W_enc"] * norm
    weights["b_enc"] = weights["b_enc"] * norm
    weights["W_dec"] = weights["W_dec"] / norm[:, None]


def _fold_whitening(sae: Dictionary, whitening: Mapping[str, Tensor], where: str) -> None:
    """An SAE of (x - mean) M, in place: first one of x - mean, then one of x."""
    d = sae.d_in
    expected = {"mean": (d,), "matrix": (d, d), "inverse_matrix": (d, d)}
    if (found := {name: tuple(t.shape) for name, t in whitening.items()}) != expected:
        raise UserError(f"{where}: {_WHITENING} has {found}; expected {expected}")
    sae.W_enc.copy_(whitening["matrix"] @ sae.W_enc)
    sae.W_dec.copy_(sae.W_dec @ whitening["inverse_matrix"])
    sae.b_dec.copy_(sae.b_dec @ whitening["inverse_matrix"])
    mean = Scaling(whitening["mean"], 1.0)
    sae.fold(mean, mean)
