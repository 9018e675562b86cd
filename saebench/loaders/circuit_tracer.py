"""Sets of transcoders as circuit-tracer reads them (https://github.com/decoderesearch/circuit-tracer).

A folder holds `config.yaml` and `layer_0.safetensors`, `layer_1.safetensors`, ..., each a transcoder of its own:

z     = act(x W_enc' + b_enc)                   W_enc [d_sae d]
x_hat = z W_dec + b_dec + x W_skip'             W_skip where the file has it

act is JumpReLU where the file has `activation_function.threshold`, TopK where `k` is said in the file, in
`config.yaml` or by the user, else ReLU. `feature_input_hook` and `feature_output_hook` say the sites, by their
TransformerLens names. `mlp.hook_out` is `mlp_out`: circuit-tracer has it for families alone where what the MLP gives is
what is added to the stream. `ln2.hook_normalized` is refused, since the files do not say which norm that is.

circuit-tracer's TopK keeps the k largest pre-activations whatever their sign; here one that is not above zero is not
active. Both agree for all tokens with k positive pre-activations.

A config that lists where its files are on a hub is read where they are the files of this very folder. Cross-layer
transcoders are refused.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, final

from torch import Tensor

from saebench.errors import UserError
from saebench.loaders._files import Source, check_keys
from saebench.loaders._loader import Loader, Member, Told, build, needless
from saebench.loaders._single import matrix
from saebench.saes._dictionary import Dictionary
from saebench.sites import parse_site
from saebench.types import Site

_NEEDED = {"model_kind", "feature_input_hook", "feature_output_hook"}
_KNOWN = {"model_name", "scan", "revision", "activation", "k", "transcoders"}
_KEYS = {"W_enc", "W_dec", "b_enc", "b_dec"}
_THRESHOLD = "activation_function.threshold"
_ALIASES = {"mlp.hook_out": "hook_mlp_out"}
_ARCHITECTURES = {"relu": "relu", "jumprelu": "jumprelu", "jump_relu": "jumprelu", "topk": "topk"}
_LAYER = re.compile(r"layer_(\d{1,6})\.safetensors")


@final
class CircuitTracer(Loader):
    def fits(self, source: Source) -> bool:
        try:
            return source.has("config.yaml") and source.yaml("config.yaml").keys() >= _NEEDED
        except UserError:
            return False

    def members(self, source: Source, told: Told) -> Sequence[Member]:
        where = str(source.path)
        needless(told, where, "norm")
        config = source.yaml("config.yaml")
        _check_config(config, where)
        layers = _layers(source)
        _check_listed(config.get("transcoders"), layers, where)
        every = [_member(source, layers[i], i, config, told) for i in sorted(layers)]
        asked = [m for m in every if told.site in (None, m.site)]
        asked = [m for m in asked if told.predicts in (None, m.target)]
        if not asked:
            there = ", ".join(f"{m.site} to {m.target}" for m in every)
            raise UserError(f"{where} has no transcoder as site and predicts say; it has {there}")
        return asked


def _check_config(config: Mapping[str, Any], where: str) -> None:
    if config.get("model_kind") == "cross_layer_transcoder":
        raise UserError(f"{where} is a cross-layer transcoder, which is not supported")
    check_keys(config, _NEEDED, _KNOWN, f"{where}: config.yaml")
    if config["model_kind"] != "transcoder_set":
        raise UserError(f"{where}: model_kind is {config['model_kind']!r}; expected transcoder_set")
    for key in ("feature_input_hook", "feature_output_hook"):
        if not isinstance(config[key], str):
            raise UserError(f"{where}: {key} is {config[key]!r}; expected a name")
    if not isinstance(config.get("model_name"), str | None):
        raise UserError(f"{where}: model_name is {config['model_name']!r}; expected a name")


def _layers(source: Source) -> dict[int, str]:
    matches = [match for name in source.names if (match := _LAYER.fullmatch(name))]
    if not matches:
        raise UserError(
            f"{source.path} has no layer_0.safetensors, layer_1.safetensors, ...; expected one for each layer"
        )
    return {int(match[1]): match[0] for match in matches}


def _check_listed(listed: object, layers: Mapping[int, str], where: str) -> None:
    """Whether what a config lists are the files that are here."""
    if listed is None:
        return
    uris = listed if isinstance(listed, list) else []
    matches = [re.fullmatch(r"(hf://[^/]+/[^/]+)/([^/?]+)(\?.*)?", str(uri)) for uri in uris]
    names = {i: match[2] for i, match in enumerate(matches) if match}
    repositories = {match[1] for match in matches if match}
    if len(names) < len(uris) or names != dict(layers) or len(repositories) != 1:
        raise UserError(
            f"{where}: config.yaml lists transcoders that are elsewhere; expected {', '.join(layers.values())} of one "
            "repository, as they are here. Load the files it lists by themselves"
        )


def _member(source: Source, name: str, layer: int, config: Mapping[str, Any], told: Told) -> Member:
    site, target = (
        _site(config[key], layer) for key in ("feature_input_hook", "feature_output_hook")
    )
    return Member(
        site, target, config.get("model_name"), partial(_load, source, name, config, told.k)
    )


def _site(hook: str, layer: int) -> Site:
    return parse_site(f"blocks.{layer}.{_ALIASES.get(hook, hook)}")


def _load(source: Source, name: str, config: Mapping[str, Any], k: int | None) -> Dictionary:
    where = str(source.root / name)
    tensors = source.tensors(name)
    check_keys(tensors, _KEYS, {_THRESHOLD, "W_skip", "k"}, where)
    d_sae, d_in = matrix(tensors, "W_enc", where).shape
    d_out = matrix(tensors, "W_dec", where).shape[1]
    weights = {key: tensors[key] for key in _KEYS} | {"W_enc": tensors["W_enc"].T}
    arguments = {"d_in": d_in, "d_sae": d_sae, "d_out": d_out, "skip": "W_skip" in tensors}
    if "W_skip" in tensors:
        weights["W_skip"] = matrix(tensors, "W_skip", where).T
    if _THRESHOLD in tensors:
        found = tensors[_THRESHOLD]
        weights["threshold"] = found.reshape(1).expand(d_sae) if found.numel() == 1 else found
    chosen = _k(tensors, config, k, where)
    if chosen is not None:
        arguments["k"] = chosen
    architecture = _architecture(_THRESHOLD in tensors, chosen is not None, config, where)
    return build(architecture, arguments, weights, where)


def _k(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], told: int | None, where: str
) -> int | None:
    said = [] if told is None else [told]
    if config.get("k") is not None:
        if type(config["k"]) is not int:
            raise UserError(f"{where}: k is {config['k']!r}; expected a whole number above 0")
        said.append(config["k"])
    if "k" in tensors:
        if tensors["k"].numel() != 1 or not 0 < float(tensors["k"]) < 2**31:
            raise UserError(f"{where}: k is not one whole number above 0")
        said.append(int(tensors["k"]))
    if any(k != said[0] for k in said):
        raise UserError(f"{where}: k is said to be {', and '.join(map(str, said))}")
    return said[0] if said else None


def _architecture(gated: bool, top: bool, config: Mapping[str, Any], where: str) -> str:
    if gated and top:
        raise UserError(f"{where} has a threshold, and k is said too; expected one of them")
    found = "jumprelu" if gated else "topk" if top else "relu"
    named = config.get("activation")
    if named is not None and _ARCHITECTURES.get(str(named).lower()) != found:
        raise UserError(
            f"{where}: config.yaml says activation {named!r}; what is there (a threshold, k, or neither) is {found}"
        )
    return found
