"""Gemma Scope (Lieberum et al. 2024, https://arxiv.org/abs/2408.05147): one `params.npz` for each SAE.

z     = pre where pre > max(threshold, 0), else 0,  pre = x W_enc + b_enc
x_hat = z W_dec + b_dec

Neither the model nor the site is in the file, so the user says them: `resid_post` of a layer, `mlp_out`, or `attn_z`.

A transcoder reads what enters the MLP, root-mean-square normalised but without the gain of the norm, and predicts
`mlp_out`. No module of the model gives that, so the site to say is `resid_mid`, the stream before the norm, and the
normalisation is part of the SAE: x / sqrt(mean of x^2 + 1e-6), as Gemma 2 has it.

SAEs of the embedding are refused. They were trained on another scale than the model's embedding module gives, and on
which one the file does not say. A `scaling_factor` other than one, which files of another origin have, is refused too.
"""

from collections.abc import Sequence
from functools import partial
from typing import final

import torch
from torch import Tensor

from saebench.errors import UserError
from saebench.loaders._files import Source, check_keys
from saebench.loaders._loader import Loader, Member, Told, build, needless, the_site
from saebench.loaders._single import matrix, path_of, sole_file
from saebench.saes._dictionary import Dictionary
from saebench.saes._normalized import Normalized
from saebench.types import Site

_KEYS = {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}
_EPS = 1e-6
"""Of Gemma 2's norms."""


@final
class GemmaScope(Loader):
    def fits(self, source: Source) -> bool:
        return sole_file(source, ".npz") is not None

    def members(self, source: Source, told: Told) -> Sequence[Member]:
        where = str(source.path)
        needless(told, where, "k", "norm")
        name = sole_file(source, ".npz")
        if name is None:
            raise UserError(f"{where}: expected one .npz file, such as params.npz")
        site = the_site(told.site, None, where)
        target = site if told.predicts is None else told.predicts
        _check_site(site, target, where)
        load = partial(_load, source, name, transcodes=site != target)
        return [Member(site, target, None, load)]


def _load(source: Source, name: str, transcodes: bool) -> Dictionary | Normalized:
    where = str(path_of(source, name))
    weights = _renamed(source.arrays(name))
    check_keys(weights, _KEYS, {"scaling_factor"}, where)
    _check_scaling(weights.pop("scaling_factor", None), where)
    d_in, d_sae = matrix(weights, "W_enc", where).shape
    d_out = matrix(weights, "W_dec", where).shape[1]
    arguments = {"d_in": d_in, "d_sae": d_sae, "d_out": d_out}
    weights["threshold"] = weights["threshold"].clamp_min(0)
    sae = build("jumprelu", arguments, weights, where)
    return Normalized(sae, norm="rms", eps=_EPS, undone=False) if transcodes else sae


def _renamed(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Some files write `w_enc` and `w_dec`."""
    return {
        key.replace("w_", "W_") if key in ("w_enc", "w_dec") else key: arrays[key] for key in arrays
    }


def _check_site(site: Site, target: Site, where: str) -> None:
    if "embed" in site.stream:
        raise UserError(
            f"{where}: SAEs of the embedding were trained on a scale that the file does not say, and are not supported"
        )
    if site != target and site.stream != "resid_mid":
        raise UserError(
            f"{where}: a transcoder of Gemma Scope reads the stream before the MLP, which it normalises itself; site "
            f"is {site}, expected resid_mid of the layer, such as 4.resid_mid"
        )


def _check_scaling(factor: Tensor | None, where: str) -> None:
    if factor is not None and not bool((factor.to(torch.float64) == 1).all()):
        raise UserError(
            f"{where}: scaling_factor is not 1 throughout, and what it scales is not documented; expected none"
        )
