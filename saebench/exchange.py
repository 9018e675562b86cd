"""A checkpoint in another tool's format, read back before it is handed over.

What was written is loaded by the loader of the same format and has to be the same function on random activations:
the same reconstruction of the same latents, and the same latents, up to rounding to float32. A format that folds one
weight into another rounds it, and where two latents or a latent and its threshold are nearer than that, either may be
active; so a small share of tokens may have other latents.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from saebench import registry
from saebench.checkpoints import Opened, open_checkpoint, where
from saebench.errors import UserError
from saebench.exports._export import Export, Origin
from saebench.loaders._files import Limits
from saebench.loaders._loader import Member, Told
from saebench.results import make_folder
from saebench.saes._dictionary import Dictionary

_TOLERANCE = 1e-5
"""Of the largest value of a token, or of 1 where that is smaller."""
_TOKENS = 128
_AT_A_TIME = 8
_MOST_ON_EDGES = 0.03
"""Share of tokens that may have other latents."""


def export(opened: Opened, told: Told, format: str, out: Path) -> list[str]:
    """Writes the SAE of a checkpoint, at the site that is told if it has several, into the new folder `out`.

    Returns the names of the files. Raises `UserError`, and leaves nothing behind, where the format cannot say what the
    SAE is, or what was written is another function.
    """
    writer: Export = registry.get("exports", format)()
    member = _the_one(opened, told)
    sae = member.load()
    if not isinstance(sae, Dictionary):
        raise UserError(
            f"{opened.where} normalises activations token by token, which {format} has no place for"
        )
    with _new_folder(out) as folder:
        writer.write(sae, Origin(member.site, member.target, member.model), folder)
        _check_same(sae, _read_back(folder, format, member), format)
        return sorted(path.name for path in folder.iterdir())


def _the_one(opened: Opened, told: Told) -> Member:
    fitting = [m for m in opened.members if told.site in (None, m.site)]
    if len(fitting) == 1:
        return fitting[0]
    has = ", ".join(where(m.site, m.target) for m in opened.members)
    raise UserError(f"{opened.where} has SAEs at {has}; say with --site which of them to export")


def _read_back(folder: Path, format: str, member: Member) -> Dictionary:
    # Not every format says the site, or may leave it to the name of the folder.
    told = Told(site=member.site, predicts=None if member.target == member.site else member.target)
    ours = Limits(sys.maxsize, allow_pickle=True)
    opened = open_checkpoint(str(folder), format, told, ours, None, Path())
    (read,) = opened.members
    if (read.site, read.target) != (member.site, member.target):
        raise UserError(
            f"{format} cannot say {where(member.site, member.target)}: read back, it is "
            f"{where(read.site, read.target)}"
        )
    sae = read.load()
    if not isinstance(sae, Dictionary):
        raise UserError(f"{format}: read back, it normalises activations token by token")
    return sae


@torch.no_grad()
def _check_same(ours: Dictionary, theirs: Dictionary, format: str) -> None:
    shapes = [(sae.d_in, sae.d_sae, sae.d_out) for sae in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise UserError(f"{format}: read back, the shape is {shapes[1]}; expected {shapes[0]}")
    on_edges = 0
    for x in _activations(ours).split(_AT_A_TIME):
        z = ours.encode(x)
        apart = _apart(_whole(ours, x, z), _whole(theirs, x, z))
        if not bool((apart <= _TOLERANCE).all()):
            raise UserError(
                f"{format}: read back, the same latents give another reconstruction (off by {apart.max():.2g} of "
                "its size); nothing was written"
            )
        on_edges += int((~(_apart(z, theirs.encode(x)) <= _TOLERANCE)).sum())
    if on_edges > _MOST_ON_EDGES * _TOKENS:
        raise UserError(
            f"{format}: read back, {on_edges} of {_TOKENS} random activations have other latents; nothing was written"
        )


def _activations(sae: Dictionary) -> Float[Tensor, "n d_in"]:
    """Short to long, about what the SAE decodes nothing to where that is an activation that it reads."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_TOKENS, sae.d_in, generator=generator)
    x *= torch.logspace(-1, 2, _TOKENS)[:, None]
    return x + sae.b_dec if sae.d_in == sae.d_out else x


def _whole(
    sae: Dictionary, x: Float[Tensor, "n d_in"], z: Float[Tensor, "n d_sae"]
) -> Float[Tensor, "n d_out"]:
    beside = sae.beside(x)
    return sae.decode(z) if beside is None else sae.decode(z) + beside


def _apart(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """The largest difference of each token, as a share of its largest value."""
    return (a - b).abs().amax(-1) / a.abs().amax(-1).clamp_min(1.0)


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that appears as `out` once it is complete, and not at all if anything fails."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; name a folder that is new or empty")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    make_folder(partial)
    try:
        yield partial
        partial.replace(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
