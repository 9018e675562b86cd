"""Goodfire's SAEs (https://huggingface.co/Goodfire): two linear layers in one .pt or .pth file.

z     = relu(x encoder_linear.weight' + encoder_linear.bias)
x_hat = z decoder_linear.weight' + decoder_linear.bias

The site is not in the file, so the user says it; the released ones read `resid_post`. The same tensors as safetensors
are read too, but not recognised: they are two linear layers like any others, as `linear_pair` has them.
"""

from collections.abc import Sequence
from functools import partial
from typing import final

from saebench.errors import UserError
from saebench.loaders._files import Source, as_tensors, check_keys
from saebench.loaders._loader import Loader, Member, Told, build, needless, the_site
from saebench.loaders._single import matrix, path_of, shapes_of, sole_file, weights_of
from saebench.saes._dictionary import Dictionary

_PICKLED = (".pt", ".pth")
_SUFFIXES = (*_PICKLED, ".safetensors")
_KEYS = {
    "encoder_linear.weight",
    "encoder_linear.bias",
    "decoder_linear.weight",
    "decoder_linear.bias",
}


@final
class Goodfire(Loader):
    def fits(self, source: Source) -> bool:
        name = sole_file(source, *_PICKLED)
        return name is not None and shapes_of(source, name).keys() >= _KEYS

    def members(self, source: Source, told: Told) -> Sequence[Member]:
        where = str(source.path)
        needless(told, where, "predicts", "k", "norm")
        name = sole_file(source, *_SUFFIXES)
        if name is None:
            raise UserError(f"{where}: expected one file that ends in {', '.join(_SUFFIXES)}")
        site = the_site(told.site, None, where)
        return [Member(site, site, None, partial(_load, source, name))]


def _load(source: Source, name: str) -> Dictionary:
    where = str(path_of(source, name))
    found = weights_of(source, name)
    check_keys(found, _KEYS, (), where)
    tensors = as_tensors(found, where)
    d_sae, d_in = matrix(tensors, "encoder_linear.weight", where).shape
    weights = {
        "W_enc": matrix(tensors, "encoder_linear.weight", where).T,
        "b_enc": tensors["encoder_linear.bias"],
        "W_dec": matrix(tensors, "decoder_linear.weight", where).T,
        "b_dec": tensors["decoder_linear.bias"],
    }
    return build("relu", {"d_in": d_in, "d_sae": d_sae}, weights, where)
