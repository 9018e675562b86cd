"""How a site is written: as `{layer, stream}`, as `{module, side}`, or as one string.

Strings are `4.resid_post`, a module path with `.input` or `.output`, or a TransformerLens hook name
such as `blocks.4.hook_resid_post`.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from saebench.errors import UserError
from saebench.types import Site

STREAMS = (
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_z",
    "attn_out",
    "mlp_in",
    "mlp_out",
    "mlp_hidden",
)
_SIDES = ("input", "output")
_ALIASES = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "attn.hook_z": "attn_z",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "mlp.hook_in": "mlp_in",
    "mlp.hook_post": "mlp_hidden",
}
_FORMS = (
    "{layer: 4, stream: resid_post}, {module: model.layers.4.mlp, side: output} or a "
    "TransformerLens name such as blocks.4.hook_resid_post"
)


def parse_site(written: str | Mapping[str, Any]) -> Site:
    """The site that a suite, a checkpoint or a person means; `parse_site(str(site)) == site`."""
    if isinstance(written, str):
        return _from_text(written)
    keys = set(written)
    if keys == {"layer", "stream"}:
        return Site(stream=_stream(written["stream"]), layer=_layer(written["layer"]))
    if keys == {"module", "side"}:
        return _module(str(written["module"]), str(written["side"]))
    raise UserError(f"{dict(written)} is not a site: expected {_FORMS}")


def nearest(given: str, choices: Iterable[str]) -> str:
    """` (nearest: ...)`, for error messages; empty where nothing is near."""
    close = difflib.get_close_matches(given, list(choices), n=1)
    return f" (nearest: {close[0]})" if close else ""


def _from_text(text: str) -> Site:
    lens = re.fullmatch(r"blocks\.(\d+)\.(.+)", text)
    if lens and "hook" in lens[2]:
        if lens[2] not in _ALIASES:
            raise UserError(
                f"{text!r}: TransformerLens hook {lens[2]!r} has no stream here"
                f"{nearest(lens[2], _ALIASES)}; there are: {', '.join(_ALIASES)}; or name the "
                "module: {module: ..., side: input or output}"
            )
        return Site(stream=_ALIASES[lens[2]], layer=int(lens[1]))
    short = re.fullmatch(r"(\d+)\.(\w+)", text)
    if short:
        return Site(stream=_stream(short[2]), layer=int(short[1]))
    module, _, side = text.rpartition(".")
    if module and side in _SIDES:
        return _module(module, side)
    raise UserError(f"{text!r} is not a site: expected {_FORMS}")


def _stream(given: object) -> str:
    if given not in STREAMS:
        raise UserError(
            f"no stream {given!r}{nearest(str(given), STREAMS)}; there are: {', '.join(STREAMS)}"
        )
    return str(given)


def _layer(given: object) -> int:
    if not isinstance(given, int) or isinstance(given, bool) or given < 0:
        raise UserError(f"layer {given!r}: expected a whole number, counted from 0")
    return given


def _module(path: str, side: str) -> Site:
    if side not in _SIDES:
        raise UserError(f"side {side!r} of module {path!r}: expected one of {', '.join(_SIDES)}")
    if not path:
        raise UserError("an empty module path is not a site; give one such as model.layers.2.mlp")
    return Site(stream=f"{path}.{side}", layer=None)
