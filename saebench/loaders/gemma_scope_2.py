"""Gemma Scope 2 (https://huggingface.co/google/gemma-scope-2): `config.json` beside `params.safetensors`.

z     = pre where pre > max(threshold, 0), else 0,  pre = x W_enc + b_enc
x_hat = z W_dec + b_dec + x affine_skip_connection

The sites are `hf_hook_point_in` and `hf_hook_point_out`. The four that are released for Gemma 3 become streams, which
are found whatever the model's modules are called; every other one stays the input or output of a module. Where there
is no `config.json`, the user says the sites. Cross-layer transcoders are refused.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, final

from torch import Tensor

from saebench.errors import UserError
from saebench.loaders._files import Source, check_keys
from saebench.loaders._loader import Loader, Member, Told, build, needless, the_site
from saebench.loaders._single import matrix, path_of, shapes_of
from saebench.saes._dictionary import Dictionary
from saebench.sites import parse_site
from saebench.types import Site

_KEYS = {
    "w_enc": "W_enc",
    "w_dec": "W_dec",
    "b_enc": "b_enc",
    "b_dec": "b_dec",
    "threshold": "threshold",
}
_SKIP = "affine_skip_connection"
_NEEDED = {"architecture", "hf_hook_point_in"}
_KNOWN = {"hf_hook_point_out", "model_name", "affine_connection", "type", "width", "l0"}
_STREAMS = {
    "input": "resid_pre",
    "output": "resid_post",
    "self_attn.o_proj.input": "attn_z",
    "pre_feedforward_layernorm.output": "mlp_in",
    "post_feedforward_layernorm.output": "mlp_out",
}


@final
class GemmaScope2(Loader):
    def fits(self, source: Source) -> bool:
        return any(_KEYS.keys() <= shapes_of(source, name).keys() for name in _files(source))

    def members(self, source: Source, told: Told) -> Sequence[Member]:
        where = str(source.path)
        needless(told, where, "k", "norm")
        name = _weights_file(source)
        config = _config(source, where)
        found = _site(config, "hf_hook_point_in", where)
        site = the_site(told.site, found, where)
        target = _target(told, site, _site(config, "hf_hook_point_out", where) or found, where)
        load = partial(_load, source, name, config)
        return [Member(site, target, config.get("model_name"), load)]


def _files(source: Source) -> list[str]:
    """One for an SAE or a transcoder, one for each layer of what goes across layers."""
    if source.path.is_file():
        return [name for name in source.names if name.endswith(".safetensors")]
    return [n for n in source.names if re.fullmatch(r"params(_layer_\d+)?\.safetensors", n)]


def _weights_file(source: Source) -> str:
    names = _files(source)
    if len(names) != 1 or "w_dec" not in (shapes := source.shapes(names[0])):
        raise UserError(
            f"{source.path} holds {', '.join(names[:8]) or 'no params.safetensors'}; expected one file of one SAE or "
            "transcoder (cross-layer transcoders, with a file for each layer, are not supported)"
        )
    if len(shapes["w_dec"]) == 3:
        raise UserError(f"{source.path} is a cross-layer transcoder, which is not supported")
    return names[0]


def _config(source: Source, where: str) -> Mapping[str, Any]:
    """Empty where there is none."""
    if not source.has("config.json"):
        return {}
    config, where = source.json("config.json"), f"{where}: config.json"
    check_keys(config, _NEEDED, _KNOWN, where)
    if config["architecture"] != "jump_relu":
        raise UserError(f"{where}: architecture is {config['architecture']!r}; expected jump_relu")
    if config.get("type", "sae") not in ("sae", "transcoder"):
        raise UserError(
            f"{where}: type is {config['type']!r}; expected sae or transcoder (clt and crosscoder, which are about "
            "several layers, are not supported)"
        )
    if not isinstance(config.get("model_name"), str | None):
        raise UserError(f"{where}: model_name is {config['model_name']!r}; expected a name")
    return config


def _site(config: Mapping[str, Any], key: str, where: str) -> Site | None:
    point = config.get(key)
    if point is None:
        return None
    if not isinstance(point, str):
        raise UserError(f"{where}: {key} is {point!r}; expected a module with .input or .output")
    part = re.fullmatch(r"(?:model\.)?(?:language_model\.)?layers\.(\d{1,6})\.(.+)", point)
    if part and part[2] in _STREAMS:
        return Site(_STREAMS[part[2]], int(part[1]))
    return parse_site(point)


def _target(told: Told, site: Site, found: Site | None, where: str) -> Site:
    if found is None and told.predicts is None:
        return site
    return the_site(told.predicts, found, where, "predicts")


def _load(source: Source, name: str, config: Mapping[str, Any]) -> Dictionary:
    where = str(path_of(source, name))
    tensors = source.tensors(name)
    check_keys(tensors, _KEYS, {_SKIP}, where)
    d_in, d_sae = matrix(tensors, "w_enc", where).shape
    d_out = matrix(tensors, "w_dec", where).shape[1]
    _check_against(config, d_sae, tensors, where)
    weights = {ours: tensors[theirs] for theirs, ours in _KEYS.items()}
    weights["threshold"] = weights["threshold"].clamp_min(0)
    if _SKIP in tensors:
        weights["W_skip"] = tensors[_SKIP]
    arguments = {"d_in": d_in, "d_sae": d_sae, "d_out": d_out, "skip": _SKIP in tensors}
    return build("jumprelu", arguments, weights, where)


def _check_against(
    config: Mapping[str, Any], d_sae: int, tensors: Mapping[str, Tensor], where: str
) -> None:
    if config.get("width", d_sae) != d_sae:
        raise UserError(
            f"{where} has {d_sae:,} latents; config.json says width {config['width']!r}"
        )
    skip = _SKIP in tensors
    if config.get("affine_connection", skip) is not skip:
        raise UserError(
            f"{where} has {'an' if skip else 'no'} {_SKIP}; config.json says affine_connection "
            f"{config['affine_connection']!r}"
        )
