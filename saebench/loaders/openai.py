"""The SAEs of OpenAI (Gao et al. 2024, https://arxiv.org/abs/2406.04093): one .pt file, or its tensors as safetensors.

z     = act((x - pre_bias) W_enc + latent_bias)            act: TopK with ReLU, or ReLU
x_hat = z W_dec + pre_bias

With TopK, x is every activation with its mean taken off and divided by its standard deviation (of d - 1, plus 1e-5),
and x_hat is taken back. The site is not in the file, so the user says it. Safetensors hold tensors alone, so there
TopK is told by the user's k; a ReLU SAE cannot be told from one, and needs its .pt file.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, final

from torch import Tensor

from saebench.errors import UserError
from saebench.loaders._centred import centred
from saebench.loaders._files import Source, as_tensors, check_keys
from saebench.loaders._loader import Loader, Member, Told, build, needless, the_site
from saebench.loaders._single import matrix, path_of, shapes_of, sole_file, weights_of
from saebench.saes._dictionary import Dictionary
from saebench.saes._normalized import Normalized

_KEYS = {"pre_bias", "encoder.weight", "latent_bias", "decoder.weight"}
_UNUSED = {"stats_last_nonzero", "latents_activation_frequency", "latents_mean_square"}
_ACTIVATION = {"activation", "activation_state_dict"}
_EPS = 1e-5


@final
class OpenAI(Loader):
    def fits(self, source: Source) -> bool:
        name = sole_file(source, ".pt", ".safetensors")
        return name is not None and shapes_of(source, name).keys() >= _KEYS

    def members(self, source: Source, told: Told) -> Sequence[Member]:
        where = str(source.path)
        needless(told, where, "predicts", "norm")
        name = sole_file(source, ".pt", ".safetensors")
        if name is None:
            raise UserError(f"{where}: expected one .pt or .safetensors file")
        site = the_site(told.site, None, where)
        return [Member(site, site, None, partial(_load, source, name, told))]


def _load(source: Source, name: str, told: Told) -> Dictionary | Normalized:
    where = str(path_of(source, name))
    found = weights_of(source, name)
    check_keys(found, _KEYS, _UNUSED | _ACTIVATION, where)
    k = _k(found, told, where)
    weights = as_tensors({key: found[key] for key in _KEYS}, where)
    sae = _built(weights, k, where)
    return sae if k is None else Normalized(sae, norm="layer", eps=_EPS, undone=True)


def _built(weights: Mapping[str, Tensor], k: int | None, where: str) -> Dictionary:
    d_sae, d_in = matrix(weights, "encoder.weight", where).shape
    arguments = {"d_in": d_in, "d_sae": d_sae} | ({} if k is None else {"k": k})
    ours = {
        "W_enc": matrix(weights, "encoder.weight", where).T,
        "b_enc": weights["latent_bias"],
        "W_dec": matrix(weights, "decoder.weight", where).T,
        "b_dec": weights["pre_bias"],
    }
    return centred(build("relu" if k is None else "topk", arguments, ours, where), where)


def _k(found: Mapping[str, Any], told: Told, where: str) -> int | None:
    """Of TopK; None for ReLU."""
    if "activation" not in found:
        if told.k is None:
            raise UserError(
                f"{where} does not say its activation. If it is TopK, say k; else use the .pt file that names it"
            )
        return told.k
    needless(told, where, "k")
    state = found.get("activation_state_dict", {})
    if found["activation"] == "ReLU" and state == {}:
        return None
    if found["activation"] != "TopK" or not isinstance(state, dict):
        raise UserError(f"{where}: activation is {found['activation']!r}; expected TopK or ReLU")
    check_keys(map(str, state), {"k", "postact_fn"}, (), f"{where}: activation_state_dict")
    if state["postact_fn"] != "ReLU" or type(state["k"]) is not int:
        raise UserError(
            f"{where}: the activation is TopK with k {state['k']!r} and postact_fn {state['postact_fn']!r}; expected a "
            "whole number and ReLU"
        )
    return state["k"]
