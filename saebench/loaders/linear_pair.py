"""The plain reference class: two `torch.nn.Linear` with ReLU between, as one state dict.

x_hat = W_2 relu(W_1 x + b_1) + b_2

One file, with `NAME.weight [n d]` and `NAME.bias [n]` of the encoder, `NAME.weight [d n]` and, where there is one,
`NAME.bias [d]` of the decoder. The names are anybody's: the encoder is the one that widens, n > d. Nothing beside these
is read: whether a further vector is subtracted from x, added to x_hat or both, no file says. A .pt or .pth file has to
be unpickled, and is not recognised by itself.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple, final

import torch
from torch import Tensor

from saebench.errors import UserError
from saebench.loaders._files import Source, as_tensors
from saebench.loaders._loader import Loader, Member, Told, build, needless, the_site
from saebench.saes._dictionary import Dictionary

_SAFE, _PICKLED = (".safetensors",), (".pt", ".pth")
_EXPECTED = (
    "expected NAME.weight [n, d] and NAME.bias [n] of an encoder, NAME.weight [d, n] and perhaps NAME.bias [d] of a "
    "decoder, with n above d, and nothing else"
)


class _Pair(NamedTuple):
    encoder: str
    decoder: str
    d_in: int
    d_sae: int


@final
class LinearPair(Loader):
    def fits(self, source: Source) -> bool:
        """A configuration beside it would say more than two names do, so that this would be another format."""
        if len(source.names) != 1 or not source.names[0].endswith(_SAFE):
            return False
        try:
            _pair(source.shapes(source.names[0]), str(source.path))
        except UserError:
            return False
        return True

    def members(self, source: Source, told: Told) -> Sequence[Member]:
        where = str(source.path)
        needless(told, where, "predicts", "k", "norm")
        name = _file(source)
        if name.endswith(_SAFE):
            _pair(source.shapes(name), where)
        site = the_site(told.site, None, where)
        return [Member(site, site, None, partial(_load, source, name))]


def _file(source: Source) -> str:
    for endings in (_SAFE, _PICKLED):
        found = [name for name in source.names if name.endswith(endings)]
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(
                f"{source.path} has several: {', '.join(found)}; name the one that is meant"
            )
    raise UserError(f"{source.path} has no .safetensors, .pt or .pth file; expected one")


def _load(source: Source, name: str) -> Dictionary:
    where = str(source.path)
    found = source.tensors(name) if name.endswith(_SAFE) else source.pickled(name)
    weights = as_tensors(found, where)
    pair = _pair({key: tuple(tensor.shape) for key, tensor in weights.items()}, where)
    arguments = {"d_in": pair.d_in, "d_sae": pair.d_sae}
    return build("relu", arguments, _renamed(weights, pair), where)


def _pair(shapes: Mapping[str, tuple[int, ...]], where: str) -> _Pair:
    """Raises `UserError` where the shapes are not those of two layers, or do not say which of them encodes."""
    matrices = {key.removesuffix(".weight"): s for key, s in shapes.items() if len(s) == 2}
    if len(matrices) == 2:
        decoder, encoder = sorted(matrices, key=lambda name: matrices[name][0])
        d_sae, d_in = matrices[encoder]
        expected = {
            f"{encoder}.weight": (d_sae, d_in),
            f"{encoder}.bias": (d_sae,),
            f"{decoder}.weight": (d_in, d_sae),
        }
        bias = {f"{decoder}.bias": (d_in,)}
        if d_sae > d_in and dict(shapes) in (expected, expected | bias):
            return _Pair(encoder, decoder, d_in, d_sae)
    raise UserError(f"{where} has {str(dict(shapes))[:1000]}; {_EXPECTED}")


def _renamed(weights: Mapping[str, Tensor], pair: _Pair) -> Mapping[str, Tensor]:
    nothing = torch.zeros(pair.d_in)
    return {
        "W_enc": weights[f"{pair.encoder}.weight"].T,
        "b_enc": weights[f"{pair.encoder}.bias"],
        "W_dec": weights[f"{pair.decoder}.weight"].T,
        "b_dec": weights.get(f"{pair.decoder}.bias", nothing),
    }
