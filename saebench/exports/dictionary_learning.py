"""For dictionary_learning (https://github.com/saprmarks/dictionary_learning): `config.json` and `ae.pt`.

here        dict_class             what is folded
ReLU        AutoEncoderNew         nothing; an AutoEncoder would have its decoder rescaled when it is loaded
JumpReLU    JumpReluAutoEncoder    nothing; a BatchTopKSAE would subtract b_dec from x
TopK        AutoEncoderTopK        b_enc + b_dec W_enc is written for b_enc, since b_dec is subtracted from x there
Gated       GatedAutoEncoder       the same for both biases: b_gate + c and b_mag + exp(r_mag) c, c = b_dec W_enc

`ae.pt` is a plain dictionary of tensors written by torch.save, because the package reads nothing else.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from saebench.errors import UserError
from saebench.exports._export import Export, Origin
from saebench.saes._dictionary import Dictionary
from saebench.saes.gated import Gated
from saebench.saes.jumprelu import JumpReLU
from saebench.saes.relu import ReLU
from saebench.saes.topk import TopK


class _Written(NamedTuple):
    dict_class: str
    weights: Mapping[str, Tensor]
    settings: Mapping[str, Any]
    """What config.json has for this class alone."""


@final
class DictionaryLearning(Export):
    def write(self, sae: Dictionary, origin: Origin, folder: Path) -> None:
        if origin.site != origin.target or sae.d_in != sae.d_out or sae.W_skip is not None:
            raise UserError(
                "dictionary_learning has SAEs that give back what they read; this is a transcoder"
            )
        written = _written(sae)
        trainer = {
            "dict_class": written.dict_class,
            "activation_dim": sae.d_in,
            "dict_size": sae.d_sae,
            "layer": origin.site.layer,
            "lm_name": origin.model,
            "submodule_name": _submodule(origin),
            **written.settings,
        }
        kept = {name: w.detach().cpu().clone() for name, w in written.weights.items()}
        torch.save({name: w.contiguous() for name, w in kept.items()}, folder / "ae.pt")
        text = json.dumps({"trainer": trainer}, indent=4) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")


def _submodule(origin: Origin) -> str:
    """As the package's own recipes spell it; other sites as they are written here."""
    site = origin.site
    return f"resid_post_layer_{site.layer}" if site.stream == "resid_post" else str(site)


def _written(sae: Dictionary) -> _Written:
    if isinstance(sae, ReLU):
        return _Written(
            "AutoEncoderNew", {**_linear(sae, sae.b_enc), "decoder.bias": sae.b_dec}, {}
        )
    if isinstance(sae, JumpReLU):
        return _jumprelu(sae)
    if isinstance(sae, TopK):
        return _topk(sae)
    if isinstance(sae, Gated):
        return _gated(sae)
    raise UserError(
        f"dictionary_learning has no class for {type(sae).__name__}; it has them for ReLU, Gated, TopK and JumpReLU"
    )


def _linear(sae: Dictionary, bias: Tensor) -> dict[str, Tensor]:
    """nn.Linear keeps its weights as [out in]."""
    return {
        "encoder.weight": sae.W_enc.T,
        "encoder.bias": bias,
        "decoder.weight": sae.W_dec.T,
    }


def _jumprelu(sae: JumpReLU) -> _Written:
    if bool((sae.threshold < 0).any()):
        raise UserError(
            "a threshold is negative, so that latents can be negative; a JumpReluAutoEncoder has a relu after it"
        )
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    return _Written("JumpReluAutoEncoder", {n: sae.get_parameter(n) for n in names}, {})


def _topk(sae: TopK) -> _Written:
    weights = {
        **_linear(sae, sae.b_enc + sae.b_dec @ sae.W_enc),
        "b_dec": sae.b_dec,
        "k": torch.tensor(sae.k, dtype=torch.int32),
        "threshold": torch.tensor(-1.0),  # never set: it is not what a token is encoded by
    }
    return _Written("AutoEncoderTopK", weights, {"k": sae.k})


def _gated(sae: Gated) -> _Written:
    shift = sae.b_dec @ sae.W_enc
    weights = {
        "decoder_bias": sae.b_dec,
        "encoder.weight": sae.W_enc.T,
        "r_mag": sae.r_mag,
        "gate_bias": sae.b_gate + shift,
        "mag_bias": sae.b_mag + sae.r_mag.exp() * shift,
        "decoder.weight": sae.W_dec.T,
    }
    return _Written("GatedAutoEncoder", weights, {})
