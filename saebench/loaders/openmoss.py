"""OpenMOSS's Llamascopium 2 (https://github.com/OpenMOSS/Language-Model-SAEs): `config.json` and `sae_weights`.

The weights are `sae_weights.safetensors`, or `sae_weights.pt`, which has to be unpickled: W_E [d d_sae], b_E,
W_D [d_sae d], b_D, and for jumprelu the logarithms of thresholds. How they encode is said in `_openmoss.py`. Latents
come in the unit of what is predicted, and where `sparsity_include_decoder_norm` is true as lengths along it.

`inference` says that the normalisation was folded into the weights, which are taken as they are: that library leaves
thresholds as they were when it folds, and so does this one. Refused are sharded weights (`.dcp`), GLU encoders,
batchtopk, batch-wise normalisation, and everything that is about several layers or heads.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from saebench.errors import UserError
from saebench.loaders._files import Source, as_tensors, check_keys
from saebench.loaders._loader import Loader, Member, Told, needless, the_site
from saebench.loaders._openmoss import (
    FORM_KEYS,
    NORM_PREFIX,
    assembled,
    hook,
    read_form,
    stored_norms,
)
from saebench.loaders._single import shapes_of
from saebench.saes._dictionary import Dictionary
from saebench.saes._normalized import Normalized
from saebench.sites import parse_site

_FILES = ("sae_weights.safetensors", "sae_weights.pt")
_NEEDED = FORM_KEYS | {"sae_type", "expansion_factor", "hook_point_in", "hook_point_out"}
_UNUSED = {
    "device",
    "dtype",
    "jumprelu_threshold_window",
    "promote_act_fn_dtype",
    "sae_pretrained_name_or_path",
    "sparsity_threshold_for_csr",
    "sparsity_threshold_for_triton_spmm_kernel",
    "strict_loading",
    "use_triton_kernel",
}
_WEIGHTS = {"W_E": "W_enc", "b_E": "b_enc", "W_D": "W_dec"}
_THRESHOLD = "activation_function.log_jumprelu_threshold"


@final
class OpenMoss(Loader):
    def fits(self, source: Source) -> bool:
        named = any(name.partition("/")[0].startswith("sae_weights.") for name in source.names)
        if not named or not source.has("config.json"):
            return False
        if source.has(_FILES[0]) and "encoder.weight" in shapes_of(source, _FILES[0]):
            return False  # that of `llama_scope`
        try:
            return source.json("config.json").keys() >= {"sae_type", "expansion_factor", "act_fn"}
        except UserError:
            return False

    def members(self, source: Source, told: Told) -> Sequence[Member]:
        where = str(source.path)
        needless(told, where, "k", "norm")
        config = source.json("config.json")
        _check_kind(config, where)
        check_keys(config, _NEEDED, _UNUSED | {"top_k"}, f"{where}: config.json")
        found, goal = (
            parse_site(hook(config, f"hook_point_{end}", where)) for end in ("in", "out")
        )
        site = the_site(told.site, found, where)
        target = the_site(told.predicts, goal, where, "predicts")
        return [Member(site, target, None, partial(_load, source, config))]


def _check_kind(config: Mapping[str, Any], where: str) -> None:
    if config.get("sae_type") != "sae":
        raise UserError(
            f"{where}: sae_type is {config.get('sae_type')!r}; expected sae (what is about several layers, heads or "
            "sites is not supported)"
        )


def _load(source: Source, config: Mapping[str, Any]) -> Dictionary | Normalized:
    where = str(source.path)
    form = read_form(config, where)
    tensors = _tensors(source, where)
    gated = form.architecture == "jumprelu"
    bias = {"b_D"} if config["use_decoder_bias"] else set()
    needed = _WEIGHTS.keys() | bias | ({_THRESHOLD} if gated else set())
    plain = {key: tensors[key] for key in tensors if not key.startswith(NORM_PREFIX)}
    check_keys(plain, needed, (), where)
    weights = {ours: tensors[theirs] for theirs, ours in _WEIGHTS.items()}
    weights["b_dec"] = tensors["b_D"] if bias else torch.zeros(form.d_model)
    if gated:
        weights["threshold"] = tensors[_THRESHOLD].to(torch.float32).exp()
    hooks = hook(config, "hook_point_in", where), hook(config, "hook_point_out", where)
    norms = stored_norms(tensors, *hooks, where) if form.norm == "dataset-wise" else None
    return assembled(form, weights, norms, hooks[0] != hooks[1], where)


def _tensors(source: Source, where: str) -> dict[str, Tensor]:
    if source.has(_FILES[0]):
        return source.tensors(_FILES[0])
    if not source.has(_FILES[1]):
        raise UserError(
            f"{where}: expected {' or '.join(_FILES)}; sharded weights (.dcp) have to be saved as one of these first"
        )
    found = source.pickled(_FILES[1])
    check_keys(found, {"sae"}, {"version"}, f"{where}: {_FILES[1]}")
    if not isinstance(found["sae"], dict):
        raise UserError(f"{where}: {_FILES[1]} holds no named tensors under sae")
    return as_tensors(found["sae"], f"{where}: {_FILES[1]}")
