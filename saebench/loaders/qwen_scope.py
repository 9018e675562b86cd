"""Qwen Scope (https://huggingface.co/collections/Qwen/qwen-scope): `layerN.sae.pt`, one TopK SAE for each layer.

z     = relu(topk(x W_enc' + b_enc))        W_enc [d_sae d]
x_hat = z W_dec' + b_dec                    W_dec [d d_sae]

Neither k nor the site is in the file, so the user says them; the released ones read `resid_post`, and end in `L0_k`.
"""

from collections.abc import Sequence
from functools import partial
from typing import final

from saebench.errors import UserError
from saebench.loaders._files import Source, as_tensors, check_keys
from saebench.loaders._loader import Loader, Member, Told, build, needless, the_site
from saebench.loaders._single import matrix, path_of, shapes_of, sole_file
from saebench.saes._dictionary import Dictionary

_KEYS = {"W_enc", "W_dec", "b_enc", "b_dec"}


@final
class QwenScope(Loader):
    def fits(self, source: Source) -> bool:
        name = sole_file(source, ".pt")
        return name is not None and _is_transposed(shapes_of(source, name))

    def members(self, source: Source, told: Told) -> Sequence[Member]:
        where = str(source.path)
        needless(told, where, "predicts", "norm")
        name = sole_file(source, ".pt")
        if name is None:
            raise UserError(f"{where}: expected one .pt file; name one where there are several")
        if told.k is None:
            raise UserError(
                f"{where} does not say how many latents are active per token; say so with k"
            )
        site = the_site(told.site, None, where)
        return [Member(site, site, None, partial(_load, source, name, told.k))]


def _is_transposed(shapes: dict[str, tuple[int, ...]]) -> bool:
    """Against `W_enc [d d_sae]`, which others write under the same names."""
    if shapes.keys() != _KEYS or shapes["b_enc"] == shapes["b_dec"]:
        return False
    return shapes["W_enc"] == shapes["b_enc"] + shapes["b_dec"]


def _load(source: Source, name: str, k: int) -> Dictionary:
    where = str(path_of(source, name))
    found = source.pickled(name)
    check_keys(found, _KEYS, (), where)
    tensors = as_tensors(found, where)
    d_sae, d_in = matrix(tensors, "W_enc", where).shape
    weights = tensors | {key: matrix(tensors, key, where).T for key in ("W_enc", "W_dec")}
    return build("topk", {"d_in": d_in, "d_sae": d_sae, "k": k}, weights, where)
