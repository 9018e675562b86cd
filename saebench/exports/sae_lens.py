"""The format of SAELens, version 6: `cfg.json` and `sae_weights.safetensors`, for its `SAE.load_from_disk`.

https://github.com/decoderesearch/SAELens. Weights are written as they are, with `apply_b_dec_to_input` off, so that
nothing is folded; W_skip is transposed, as SAELens keeps it. ReLU becomes standard, or transcoder; JumpReLU and Gated
keep their names. SAELens takes the ReLU of what is above a threshold.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from safetensors.torch import save_file

from saebench.errors import UserError
from saebench.exports._export import Export, Origin
from saebench.saes._dictionary import Dictionary
from saebench.saes.gated import Gated
from saebench.saes.jumprelu import JumpReLU
from saebench.saes.relu import ReLU
from saebench.saes.topk import TopK
from saebench.types import Site

_VERSION = "6.54.12"
"""Of SAELens, whose files these are like."""
_Names = Mapping[type[Dictionary], str]
_SAES: _Names = {ReLU: "standard", JumpReLU: "jumprelu", Gated: "gated", TopK: "topk"}
_TRANSCODERS: _Names = {ReLU: "transcoder", JumpReLU: "jumprelu_transcoder"}
_SKIPPING: _Names = {ReLU: "skip_transcoder", JumpReLU: "jumprelu_skip_transcoder"}
_HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_z": "attn.hook_z",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "mlp_in": "mlp.hook_in",
    "mlp_hidden": "mlp.hook_post",
}


@final
class SAELens(Export):
    def write(self, sae: Dictionary, origin: Origin, folder: Path) -> None:
        config = _config(sae, origin)
        weights = {name: weight.cpu().contiguous() for name, weight in sae.state_dict().items()}
        if "W_skip" in weights:
            weights["W_skip"] = weights["W_skip"].T.contiguous()
        save_file(weights, folder / "sae_weights.safetensors")
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / "cfg.json").write_text(text, encoding="utf-8")


def _config(sae: Dictionary, origin: Origin) -> Mapping[str, Any]:
    _check(sae)
    transcodes = origin.site != origin.target or sae.W_skip is not None or sae.d_in != sae.d_out
    more: dict[str, Any] = {"d_out": sae.d_out} if transcodes else {}
    if isinstance(sae, TopK):
        more |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    return more | {
        "architecture": _architecture(sae, transcodes),
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if origin.site.stream == "attn_z" else "none",
        "metadata": _metadata(origin, transcodes),
    }


def _check(sae: Dictionary) -> None:
    if type(sae) not in _SAES:
        raise UserError(
            f"the format sae_lens has no {type(sae).__name__}: its classes are those of ReLU, JumpReLU, Gated and TopK "
            "SAEs that read activations as they are; keep it in the format native"
        )
    if isinstance(sae, JumpReLU) and bool((sae.threshold < 0).any()):
        raise UserError(
            "the format sae_lens has no JumpReLU with thresholds below zero, because SAELens takes the ReLU of "
            "latents; keep it in the format native"
        )


def _architecture(sae: Dictionary, transcodes: bool) -> str:
    names = _SAES
    if transcodes:
        names = _TRANSCODERS if sae.W_skip is None else _SKIPPING
    if type(sae) not in names:
        raise UserError(
            f"the format sae_lens has no transcoder of {type(sae).__name__}, but of ReLU and JumpReLU; keep it in the "
            "format native"
        )
    return names[type(sae)]


def _metadata(origin: Origin, transcodes: bool) -> Mapping[str, Any]:
    sites = [origin.site, origin.target] if transcodes else [origin.site]
    by_module = {site.layer is None for site in sites}
    if len(by_module) == 2:
        raise UserError(
            f"the format sae_lens cannot name {origin.site} and {origin.target} together: it reads either modules of "
            "transformers or hooks of TransformerLens"
        )
    names = dict(zip(("hook_name", "hook_name_out"), map(_hook, sites), strict=False))
    class_name = "AutoModelForCausalLM" if True in by_module else "HookedTransformer"
    written = {"model_class_name": class_name, "sae_lens_version": _VERSION, **names}
    return written if origin.model is None else written | {"model_name": origin.model}


def _hook(site: Site) -> str:
    if site.layer is not None:
        return f"blocks.{site.layer}.{_HOOKS[site.stream]}"
    module, _, side = site.stream.rpartition(".")
    if side != "output":
        raise UserError(
            f"the format sae_lens cannot name {site}: of a module of transformers, SAELens reads what comes out; keep "
            "it in the format native"
        )
    return module
