"""Checkpoints of EleutherAI's sparsify (https://github.com/EleutherAI/sparsify): `cfg.json` and `sae.safetensors`.

A whole run is a folder with one such folder for each hookpoint, which is the path of a module below the base model
(`layers.10`, `layers.3.mlp`, `embed_tokens`), and within it one for each seed (`seed0`, ...) where there are several.
SAEs read and predict the module's output; transcoders (`transcode`) read its input and predict its output. A block's
output is `resid_post` here. What is below `best`, earlier states of the same run, is left out. A folder by itself does
not say where it was trained.

z     = topk or groupmax of relu((x - b_dec) W_enc + b_enc)        transcoders: of relu(x W_enc + b_enc)
x_hat = z W_dec + b_dec + x W_skip                                 W_skip where the file has it

Everything is kept as it is, but b_dec is folded into b_enc where it is subtracted from x. What older releases did not
write (`activation`, `transcode`, `skip_connection`) was topk and false then.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, final

from saebench.errors import UserError
from saebench.loaders._centred import centred
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
from saebench.loaders._single import matrix
from saebench.saes._dictionary import Dictionary
from saebench.types import Site

_NEEDED = ("d_in", "k")
_OPTIONAL = (
    "activation",
    "expansion_factor",
    "normalize_decoder",
    "num_latents",
    "multi_topk",
    "skip_connection",
    "transcode",
    "signed",
)
_ARCHITECTURES = ("topk", "groupmax")
_BLOCK = re.compile(r"(?:decoder\.|language_model\.)?(?:layers|h|blocks)\.(\d{1,4})")
_HOOKPOINT = re.compile(r"(?P<module>[^/]+)/(?:seed\d+/)?")


@final
class Sparsify(Loader):
    def fits(self, source: Source) -> bool:
        folders = _folders(source)
        try:
            return bool(folders) and set(_NEEDED) <= source.json(f"{folders[0]}cfg.json").keys()
        except UserError:
            return False

    def members(self, source: Source, told: Told) -> Sequence[Member]:
        needless(told, str(source.path), "k", "norm")
        folders = _folders(source)
        if not folders:
            raise UserError(
                f"{source.path} has no cfg.json with a sae.safetensors beside it; expected both, in the folder or in "
                "one for each hookpoint"
            )
        if folders == [""]:
            return [_member(source, "", None, told)]
        every = [_member(source, f, _module(f, source), Told()) for f in folders]
        asked = [m for m in every if told.site in (None, m.site)]
        asked = [m for m in asked if told.predicts in (None, m.target)]
        if not asked:
            there = ", ".join(dict.fromkeys(str(m.site) for m in every))
            raise UserError(f"{source.path} has no SAE as site and predicts say; it has {there}")
        return asked


class _Config(NamedTuple):
    """`cfg.json`, checked."""

    activation: str
    d_in: int
    d_sae: int
    k: int
    transcodes: bool
    skip: bool


def _folders(source: Source) -> list[str]:
    """Of the SAEs, as prefixes of the names of their files."""
    names = [name for name in source.names if name.rpartition("/")[2] == "cfg.json"]
    prefixes = [name.removesuffix("cfg.json") for name in names]
    found = [prefix for prefix in prefixes if source.has(f"{prefix}sae.safetensors")]
    return [prefix for prefix in found if not prefix.startswith("best/")]


def _module(folder: str, source: Source) -> str:
    hookpoint = _HOOKPOINT.fullmatch(folder)
    if hookpoint is None:
        raise UserError(
            f"{source.path / folder} is not where a run keeps an SAE; expected folders named by hookpoint, with at "
            "most seedN within them. Give one by itself, with its site"
        )
    return hookpoint["module"]


def _member(source: Source, folder: str, module: str | None, told: Told) -> Member:
    where = str(source.path / folder)
    config = _config(source.json(f"{folder}cfg.json"), where)
    before, after = (None, None) if module is None else _sites(module)
    site = the_site(told.site, before if config.transcodes else after, where)
    target = the_site(told.predicts, after if config.transcodes else site, where, "predicts")
    model = source.json("config.json").get("model") if source.has("config.json") else None
    return Member(
        site,
        target,
        model if isinstance(model, str) else None,
        partial(_load, source, folder, config, where),
    )


def _sites(module: str) -> tuple[Site, Site]:
    """Its input and its output."""
    block = _BLOCK.fullmatch(module)
    if block is None:
        return Site(f"{module}.input"), Site(f"{module}.output")
    return Site("resid_pre", int(block[1])), Site("resid_post", int(block[1]))


def _config(found: Mapping[str, Any], where: str) -> _Config:
    where = f"{where}: cfg.json"
    check_keys(found, _NEEDED, _OPTIONAL, where)
    activation = found.get("activation", "topk")
    if activation not in _ARCHITECTURES:
        raise UserError(
            f"{where} has activation {activation!r}; expected one of {', '.join(_ARCHITECTURES)}"
        )
    if flag(found, "signed", where):
        raise UserError(
            f"{where} has signed true: latents by their size, negative ones too, which no architecture here has"
        )
    d_in = whole(found, "d_in", where)
    return _Config(
        activation,
        d_in,
        _width(found, d_in, where),
        whole(found, "k", where),
        flag(found, "transcode", where),
        flag(found, "skip_connection", where),
    )


def _width(found: Mapping[str, Any], d_in: int, where: str) -> int:
    """num_latents of 0, as it is by default, stands for expansion_factor times as many as dimensions."""
    if found.get("num_latents", 0) in (0, None):
        return d_in * whole(found, "expansion_factor", where)
    return whole(found, "num_latents", where)


def _load(source: Source, folder: str, config: _Config, where: str) -> Dictionary:
    tensors = source.tensors(f"{folder}sae.safetensors")
    needed = ["encoder.weight", "encoder.bias", "W_dec", "b_dec"]
    check_keys(tensors, [*needed, "W_skip"] if config.skip else needed, (), where)
    weights = {
        # nn.Linear keeps its weights as [out in], and so is the skip connection kept.
        "W_enc": matrix(tensors, "encoder.weight", where).T,
        "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
    }
    if config.skip:
        weights["W_skip"] = matrix(tensors, "W_skip", where).T
    arguments = {"d_in": config.d_in, "d_sae": config.d_sae, "skip": config.skip, "k": config.k}
    sae = build(config.activation, arguments, weights, where)
    return sae if config.transcodes else centred(sae, where)
