"""Llama Scope (He et al. 2024, https://arxiv.org/abs/2410.20526) and its successor for the R1 distillation.

The first has `hyperparams.json` beside `checkpoints/final.safetensors`; the second `config.json` beside
`sae_weights.safetensors`. Both hold encoder.weight [d_sae d], encoder.bias, decoder.weight [d d_sae] and decoder.bias,
of activations normalised by their mean length; how they encode is said in `_openmoss.py`.

Thresholds differ. In the second, each latent has its own, the exponential of `log_jumprelu_threshold`, in the unit of
normalised activations. In the first there is one for all, `jump_relu_threshold`, in the unit of the raw activations
that are predicted: the library sets it after it has undone the normalisation and given decoder directions length 1.
(Released values say so, too: times sqrt(d) / norm_out they are between 1.6 and 2.1, of transcoders as well.)

Transcoders read `ln2.hook_normalized`, what enters the MLP, root-mean-square normalised but without the gain of the
norm. No module gives that, so the site is `resid_mid` and x / sqrt(mean of x^2 + 1e-5), the norm of Llama 3.1, is
part of the SAE.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from saebench.errors import UserError
from saebench.loaders._files import Source, check_keys
from saebench.loaders._loader import Loader, Member, Told, needless, the_site
from saebench.loaders._openmoss import (
    FORM_KEYS,
    NORM_PREFIX,
    Form,
    assembled,
    hook,
    read_form,
    stored_norms,
)
from saebench.loaders._single import matrix, positive, shapes_of
from saebench.saes._dictionary import Dictionary
from saebench.saes._normalized import Normalized
from saebench.sites import parse_site
from saebench.types import Site

_FIRST = ("hyperparams.json", "checkpoints/final.safetensors")
_R1 = ("config.json", "sae_weights.safetensors")
_WEIGHTS = {"encoder.weight", "encoder.bias", "decoder.weight"}
_NEEDED = FORM_KEYS | {"hook_point_in", "hook_point_out", "apply_decoder_bias_to_pre_encoder"}
_DECISIVE = {
    "d_sae",
    "dataset_average_activation_norm",
    "expansion_factor",
    "jump_relu_threshold",
    "sae_type",
    "top_k",
}
_UNUSED = {
    "bias_init_method",
    "ddp_size",
    "decoder_exactly_fixed_norm",
    "device",
    "dtype",
    "force_unit_decoder_norm",
    "init_decoder_norm",
    "init_encoder_norm",
    "init_encoder_with_decoder_transpose",
    "init_search",
    "initial_k",
    "jumprelu_threshold_window",
    "k_warmup_steps",
    "l1_coefficient",
    "l1_coefficient_warmup_steps",
    "lp",
    "sae_pretrained_name_or_path",
    "seed",
    "sparsity_threshold_for_triton_spmm_kernel",
    "strict_loading",
    "tp_size",
    "use_batch_norm_mse",
    "use_ghost_grads",
    "use_triton_kernel",
}
"""How it was trained, which does not change what it computes."""
_NORMALIZED = re.compile(r"blocks\.(\d{1,6})\.ln2\.hook_normalized")
_EPS = 1e-5
"""Of Llama 3.1's norms."""


@final
class LlamaScope(Loader):
    def fits(self, source: Source) -> bool:
        return _layout(source) is not None

    def members(self, source: Source, told: Told) -> Sequence[Member]:
        where = str(source.path)
        needless(told, where, "k", "norm")
        layout = _layout(source)
        if layout is None:
            raise UserError(f"{where}: expected {' and '.join(_FIRST)}, or {' and '.join(_R1)}")
        config = source.json(layout[0])
        check_keys(config, _NEEDED, _DECISIVE | _UNUSED, f"{where}: {layout[0]}")
        if config.get("sae_type", "sae") != "sae":
            raise UserError(f"{where}: sae_type is {config['sae_type']!r}; expected sae")
        site = the_site(told.site, _site(hook(config, "hook_point_in", where)), where)
        goal = parse_site(hook(config, "hook_point_out", where))
        target = the_site(told.predicts, goal, where, "predicts")
        return [Member(site, target, None, partial(_load, source, layout, config))]


def _layout(source: Source) -> tuple[str, str] | None:
    """The names of its configuration and of its weights."""
    for layout in (_FIRST, _R1):
        if source.has(*layout) and shapes_of(source, layout[1]).keys() >= _WEIGHTS:
            return layout
    return None


def _site(name: str) -> Site:
    normalized = _NORMALIZED.fullmatch(name)
    return Site("resid_mid", int(normalized[1])) if normalized else parse_site(name)


def _load(
    source: Source, layout: tuple[str, str], config: Mapping[str, Any]
) -> Dictionary | Normalized:
    where = str(source.path)
    form = read_form(config, where)
    first = layout == _FIRST
    weights, tensors = _weights(source.tensors(layout[1]), form, config, first, where)
    hooks = hook(config, "hook_point_in", where), hook(config, "hook_point_out", where)
    norms = None
    if form.norm == "dataset-wise":
        norms = _first_norms(config, where) if first else stored_norms(tensors, *hooks, where)
    sae = assembled(form, weights, norms, hooks[0] != hooks[1], where)
    if first and form.architecture == "jumprelu":
        inner = sae.inner if isinstance(sae, Normalized) else sae
        inner.get_parameter("threshold").fill_(_threshold(config, where))
    if isinstance(sae, Dictionary) and _NORMALIZED.fullmatch(hooks[0]):
        return Normalized(sae, norm="rms", eps=_EPS, undone=False)
    return sae


def _weights(
    tensors: dict[str, Tensor], form: Form, config: Mapping[str, Any], first: bool, where: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Under our names, and what else there is."""
    beside = {key: value for key, value in tensors.items() if key.startswith(NORM_PREFIX)}
    theirs = {key: value for key, value in tensors.items() if key not in beside}
    gated = form.architecture == "jumprelu"
    bias = {"decoder.bias"} if config["use_decoder_bias"] else set()
    thresholds = {"log_jumprelu_threshold"} if gated and not first else set()
    check_keys(theirs, _WEIGHTS | bias | thresholds, (), where)
    weights = {
        "W_enc": matrix(theirs, "encoder.weight", where).T,
        "b_enc": theirs["encoder.bias"],
        "W_dec": matrix(theirs, "decoder.weight", where).T,
        "b_dec": theirs["decoder.bias"] if bias else torch.zeros(form.d_model),
    }
    if thresholds:
        weights["threshold"] = theirs["log_jumprelu_threshold"].to(torch.float32).exp()
    elif gated:
        weights["threshold"] = torch.zeros(form.d_sae)
    return weights, beside


def _first_norms(config: Mapping[str, Any], where: str) -> tuple[float, float]:
    norms = config.get("dataset_average_activation_norm")
    if not isinstance(norms, dict) or norms.keys() != {"in", "out"}:
        raise UserError(
            f"{where}: dataset_average_activation_norm is {norms!r}; expected {{in: ..., out: ...}}"
        )
    read, predicted = (positive(norms[end], f"the norm {end}", where) for end in ("in", "out"))
    return read, predicted


def _threshold(config: Mapping[str, Any], where: str) -> float:
    if "jump_relu_threshold" not in config:
        raise UserError(f"{where} lacks jump_relu_threshold")
    given = config["jump_relu_threshold"]
    if given == 0 and not isinstance(given, bool):
        return 0.0
    return positive(given, "jump_relu_threshold", where)
