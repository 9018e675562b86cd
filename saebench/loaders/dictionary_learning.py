"""Checkpoints of dictionary_learning (https://github.com/saprmarks/dictionary_learning): `config.json` and `ae.pt`.

`config.json` holds {trainer: {dict_class, ...}, buffer: {...}}. `ae.pt` has to be unpickled, so that it is read only
where the user allows it; the same tensors in `ae.safetensors` are taken instead where that file is there. Of a folder
of several trainers (`trainer_0`, `trainer_1`, ...) each is an SAE.

dict_class                here       encode
AutoEncoder               relu       relu((x - bias) W + b)
AutoEncoderNew            relu       relu(x W + b)
GatedAutoEncoder          gated      [pi + gate_bias > 0] relu(exp(r_mag) pi + mag_bias), pi = (x - decoder_bias) W
AutoEncoderTopK           topk       the k largest of relu((x - b_dec) W + b); a threshold in the file is not used
BatchTopKSAE,
MatryoshkaBatchTopKSAE    jumprelu   f = relu((x - b_dec) W + b) where f > threshold, one for all latents
JumpReluAutoEncoder       jumprelu   relu(a) where a = x W + b > threshold, each latent its own

Latents are those of the package after its own loading: an `AutoEncoder` whose decoder directions have another length
than 1 is rescaled so that they have it (the reconstruction stays), and no other class is. What is subtracted from x is
folded into the encoder's bias; a negative threshold of a JumpReLU is 0, since a relu follows it.

A run that was interrupted leaves {step, ae, optimizer, config, norm_factor} in `ae.pt`, of activations divided by
norm_factor. Biases and thresholds are multiplied by it, as the package does at the end of a run.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from saebench.errors import UserError
from saebench.loaders._centred import centred, finite
from saebench.loaders._files import Source, as_tensors, check_keys
from saebench.loaders._loader import Loader, Member, Told, build, needless, the_site, whole
from saebench.loaders._single import matrix
from saebench.saes._dictionary import Dictionary, Scaling
from saebench.types import Site


class _Class(NamedTuple):
    """How SAEs of one dict_class are built here."""

    architecture: str
    names: Mapping[str, str]
    """Of the weights: theirs to ours."""
    reads_centred: bool
    """Whether the decoder's bias is subtracted from x."""
    unused: frozenset[str] = frozenset()
    """Tensors that encoding and decoding do without."""


_ENCODER = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}
_PLAIN = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
_LINEAR = {**_ENCODER, "decoder.weight": "W_dec", "b_dec": "b_dec"}
_THRESHOLD = {"threshold": "threshold"}
_CLASSES = MappingProxyType(
    {
        "AutoEncoder": _Class(
            "relu", {**_ENCODER, "decoder.weight": "W_dec", "bias": "b_dec"}, reads_centred=True
        ),
        "AutoEncoderNew": _Class(
            "relu",
            {**_ENCODER, "decoder.weight": "W_dec", "decoder.bias": "b_dec"},
            reads_centred=False,
        ),
        "GatedAutoEncoder": _Class(
            "gated",
            {
                "encoder.weight": "W_enc",
                "r_mag": "r_mag",
                "gate_bias": "b_gate",
                "mag_bias": "b_mag",
                "decoder.weight": "W_dec",
                "decoder_bias": "b_dec",
            },
            reads_centred=True,
        ),
        "AutoEncoderTopK": _Class(
            "topk", _LINEAR, reads_centred=True, unused=frozenset({"k", "threshold"})
        ),
        "BatchTopKSAE": _Class(
            "jumprelu", {**_LINEAR, **_THRESHOLD}, reads_centred=True, unused=frozenset({"k"})
        ),
        "MatryoshkaBatchTopKSAE": _Class(
            "jumprelu",
            {**_PLAIN, **_THRESHOLD},
            reads_centred=True,
            unused=frozenset({"k", "group_sizes"}),
        ),
        "JumpReluAutoEncoder": _Class("jumprelu", {**_PLAIN, **_THRESHOLD}, reads_centred=False),
    }
)
_SHARED_THRESHOLD = ("BatchTopKSAE", "MatryoshkaBatchTopKSAE")

_USED = ("dict_class", "activation_dim", "dict_size", "k", "layer", "lm_name", "submodule_name")
_HOW_IT_WAS_TRAINED = (
    "trainer_class",
    "lr",
    "steps",
    "seed",
    "device",
    "wandb_name",
    "warmup_steps",
    "decay_start",
    "resample_steps",
    "l1_penalty",
    "sparsity_warmup_steps",
    "sparsity_function",
    "sparsity_penalty",
    "p_start",
    "p_end",
    "anneal_start",
    "sparsity_queue_length",
    "n_sparsity_updates",
    "auxk_alpha",
    "threshold_beta",
    "threshold_start_step",
    "top_k_aux",
    "group_fractions",
    "group_weights",
    "group_sizes",
    "bandwidth",
    "target_l0",
)
_INTERRUPTED = ("step", "optimizer", "config")


@final
class DictionaryLearning(Loader):
    def fits(self, source: Source) -> bool:
        try:
            return any("dict_class" in _trainer(source, folder) for folder in _folders(source))
        except UserError:
            return False

    def members(self, source: Source, told: Told) -> Sequence[Member]:
        folders = _folders(source)
        if not folders:
            raise UserError(
                f"{source.path} has no config.json with an ae.pt or ae.safetensors beside it; expected both"
            )
        needless(told, str(source.path), "norm")
        found = [_member(source, folder, told, alone=len(folders) == 1) for folder in folders]
        members = [member for member in found if member is not None]
        if not members:
            raise UserError(
                f"{source.path} has {len(folders)} SAEs, none of which was trained at {told.site}; remove site, or "
                "give another"
            )
        return members


class _Config(NamedTuple):
    """What `config.json` says that matters."""

    dict_class: str
    d_in: int | None
    d_sae: int | None
    k: int | None
    site: Site | None
    transcodes: bool
    model: str | None


def _folders(source: Source) -> list[str]:
    """Of the SAEs, as prefixes of the names of their files."""
    prefixes = [n.removesuffix("config.json") for n in source.names if _last(n) == "config.json"]
    return [p for p in prefixes if source.has(f"{p}ae.safetensors") or source.has(f"{p}ae.pt")]


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _trainer(source: Source, folder: str) -> dict[str, Any]:
    found = source.json(f"{folder}config.json").get("trainer")
    if not isinstance(found, dict):
        raise UserError(f"{source.path / folder}config.json has no trainer with its settings")
    return found


def _member(source: Source, folder: str, told: Told, alone: bool) -> Member | None:
    """None where it is one of several, and was trained elsewhere than at what the user asks for."""
    where = str(source.path / folder)
    config = _config(source, folder, where)
    if not alone and config.site is not None and told.site not in (None, config.site):
        return None
    if config.dict_class != "AutoEncoderTopK" or config.k is not None:
        needless(told, where, "k")
    site = the_site(told.site, config.site, where)
    same = None if config.transcodes else site
    target = the_site(told.predicts, same, where, "predicts")
    return Member(site, target, config.model, partial(_load, source, folder, config, told.k, where))


def _config(source: Source, folder: str, where: str) -> _Config:
    trainer = _trainer(source, folder)
    where = f"{where}: the trainer in config.json"
    check_keys(trainer, ["dict_class"], [*_USED, *_HOW_IT_WAS_TRAINED], where)
    dict_class = trainer["dict_class"]
    if not isinstance(dict_class, str) or dict_class not in _CLASSES:
        raise UserError(
            f"{where} has dict_class {dict_class!r}; expected one of {', '.join(_CLASSES)}"
        )
    buffer = source.json(f"{folder}config.json").get("buffer")
    io = buffer.get("io", "out") if isinstance(buffer, dict) else "out"
    model = trainer.get("lm_name")
    return _Config(
        dict_class,
        _whole_or_none(trainer, "activation_dim", where),
        _whole_or_none(trainer, "dict_size", where),
        _whole_or_none(trainer, "k", where),
        _site(trainer, where) if io == "out" else None,
        io == "in_and_out",
        model if isinstance(model, str) else None,
    )


def _whole_or_none(trainer: Mapping[str, Any], name: str, where: str) -> int | None:
    return None if trainer.get(name) is None else whole(trainer, name, where)


def _site(trainer: Mapping[str, Any], where: str) -> Site | None:
    """Only one spelling of submodule_name, which is the user's own, says for certain which stream is meant."""
    name, layer = trainer.get("submodule_name"), trainer.get("layer")
    spelled = re.fullmatch(r"resid_post_layer_(\d{1,4})", name) if isinstance(name, str) else None
    if spelled is None:
        return None
    found = int(spelled[1])
    if layer not in (None, found):
        raise UserError(f"{where} has layer {layer!r} and submodule_name {name!r}; which is it?")
    return Site("resid_post", found)


def _load(
    source: Source, folder: str, config: _Config, told_k: int | None, where: str
) -> Dictionary:
    tensors, norm_factor = _tensors(source, folder, where)
    kind = _CLASSES[config.dict_class]
    check_keys(tensors, kind.names, kind.unused, where)
    weights = {ours: _ours(tensors, theirs, where) for theirs, ours in kind.names.items()}
    d_in, d_sae = _widths(weights, config, where)
    arguments: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae}
    k = _k(tensors, config.k, where)
    if kind.architecture == "topk":
        arguments["k"] = _told_or_found(told_k, k, where)
    if config.dict_class in _SHARED_THRESHOLD:
        weights["threshold"] = _for_all(weights["threshold"], d_sae, where)
    sae = build(kind.architecture, arguments, weights, where)
    if config.dict_class == "JumpReluAutoEncoder":
        sae.get_parameter("threshold").clamp_(min=0)
    if config.dict_class == "AutoEncoder":
        _unit_directions(sae)
    if norm_factor is not None:
        whole = Scaling(torch.zeros(d_in), norm_factor)
        sae.fold(whole, whole)
    return centred(sae, where) if kind.reads_centred else finite(sae, where)


def _tensors(source: Source, folder: str, where: str) -> tuple[dict[str, Tensor], float | None]:
    """And what activations were divided by, where they were and weights do not know it yet."""
    if source.has(f"{folder}ae.safetensors"):
        return source.tensors(f"{folder}ae.safetensors"), None
    found = source.pickled(f"{folder}ae.pt")
    if not isinstance(found.get("ae"), dict):
        return as_tensors(found, where), None
    check_keys(found, ["ae", "norm_factor"], _INTERRUPTED, f"{where} (an interrupted run)")
    return as_tensors(found["ae"], where), _norm_factor(found["norm_factor"], where)


def _norm_factor(found: Any, where: str) -> float | None:
    if found is None:
        return None
    if type(found) not in (int, float) or not 0 < found < float("inf"):
        raise UserError(f"{where} has norm_factor {found!r}; expected a number above 0, or None")
    return float(found)


def _ours(tensors: Mapping[str, Tensor], name: str, where: str) -> Tensor:
    """nn.Linear keeps its weights as [out in]."""
    return matrix(tensors, name, where).T if name.endswith(".weight") else tensors[name]


def _widths(weights: Mapping[str, Tensor], config: _Config, where: str) -> tuple[int, int]:
    d_in, d_sae = matrix(weights, "W_enc", where).shape
    if config.d_in not in (None, d_in) or config.d_sae not in (None, d_sae):
        raise UserError(
            f"{where}: config.json says activation_dim {config.d_in} and dict_size {config.d_sae}; the weights have "
            f"{d_in} and {d_sae}"
        )
    return d_in, d_sae


def _k(tensors: Mapping[str, Tensor], configured: int | None, where: str) -> int | None:
    """Of the file or else of config.json; where both say it, they agree."""
    if "k" not in tensors:
        return configured
    tensor = tensors["k"]
    if tensor.numel() != 1 or tensor.is_floating_point() or tensor.is_complex():
        raise UserError(
            f"{where}: k is {tensor.dtype} of shape {tuple(tensor.shape)}; expected one"
        )
    if configured not in (None, int(tensor)):
        raise UserError(f"{where}: k is {int(tensor)} in the weights, {configured} in config.json")
    return int(tensor)


def _told_or_found(told: int | None, found: int | None, where: str) -> int:
    if told is None:
        if found is None:
            raise UserError(
                f"{where} does not say how many latents a token has; say so with k (k: in a suite file, --k on the "
                "command line)"
            )
        return found
    if found is not None:
        raise UserError(f"{where} has k {found} itself; remove k")
    return told


def _for_all(threshold: Tensor, d_sae: int, where: str) -> Tensor:
    if threshold.numel() != 1 or not threshold.is_floating_point():
        raise UserError(
            f"{where}: threshold is {threshold.dtype} of shape {tuple(threshold.shape)}; expected one number"
        )
    if threshold < 0:
        raise UserError(
            f"{where} has threshold {threshold.item():g}: it was never set, because training ended before "
            "threshold_start_step. Without one a token cannot be encoded alone; train for longer, or set it"
        )
    return threshold.reshape(1).expand(d_sae)


def _unit_directions(sae: Dictionary) -> None:
    """Latents of a ReLU SAE take over the length of their directions. Those of length 0 stay as they are."""
    length = sae.W_dec.norm(dim=-1)
    if torch.allclose(length, torch.ones_like(length)):
        return  # the package, too, leaves alone what is as near to 1 as this
    length = torch.where(length > 0, length, 1.0)
    sae.W_dec.div_(length[:, None])
    for weight in (sae.W_enc, sae.get_parameter("b_enc")):
        weight.mul_(length)
