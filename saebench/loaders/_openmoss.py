"""What the checkpoint formats of OpenMOSS have in common (https://github.com/OpenMOSS/Language-Model-SAEs).

x~    = x sqrt(d) / norm_in                     norm_in, norm_out: mean lengths of the activations it was trained on
pre   = x~ W_enc + b_enc
z     = pre where act(pre |d_i|) is not 0       |d_i| taken for 1 where sparsity_include_decoder_norm is false
x_hat = (z W_dec + b_dec) norm_out / sqrt(d)

That is `dataset-wise` normalisation. With `token-wise` norm_in and norm_out are the length of the activation itself,
which is known where input and output are one site; with `inference` or `none` activations are taken as they are.

Where decoder lengths take part, they are put into the encoder, so that decoder directions have length 1 and latents
are what the activation function saw: the same function, with latents on the scale that its thresholds have.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saebench.errors import UserError
from saebench.loaders._centred import finite
from saebench.loaders._loader import build
from saebench.loaders._single import matrix, positive
from saebench.saes._dictionary import Dictionary, Scaling
from saebench.saes._normalized import Normalized

NORM_PREFIX = "dataset_average_activation_norm."
FORM_KEYS = {
    "d_model",
    "act_fn",
    "norm_activation",
    "sparsity_include_decoder_norm",
    "use_decoder_bias",
    "use_glu_encoder",
}
_ACTIVATIONS = ("relu", "topk", "jumprelu")
_NORMS = ("dataset-wise", "token-wise", "inference", "none")


class Form(NamedTuple):
    """What a configuration says of how an SAE encodes."""

    d_model: int
    d_sae: int
    architecture: str
    k: object
    """Of TopK."""
    by_length: bool
    """Whether decoder lengths take part in what is active."""
    norm: str


def read_form(config: Mapping[str, Any], where: str) -> Form:
    """Raises `UserError` for what is not supported."""
    act, norm = config["act_fn"], config["norm_activation"]
    if act not in _ACTIVATIONS:
        raise UserError(
            f"{where}: act_fn is {act!r}; expected one of {', '.join(_ACTIVATIONS)} (batchtopk compares the tokens of "
            "a batch, so that none has a code of its own: convert it to jumprelu with the library that wrote it)"
        )
    if norm not in _NORMS:
        raise UserError(
            f"{where}: norm_activation is {norm!r}; expected one of {', '.join(_NORMS)}"
        )
    for key in ("use_glu_encoder", "apply_decoder_bias_to_pre_encoder"):
        if config.get(key, False) is not False:
            raise UserError(f"{where}: {key} is {config[key]!r}; only false is supported")
    for key in ("sparsity_include_decoder_norm", "use_decoder_bias"):
        if not isinstance(config[key], bool):
            raise UserError(f"{where}: {key} is {config[key]!r}; expected true or false")
    if act == "topk" and "top_k" not in config:
        raise UserError(f"{where} lacks top_k")
    d_model = config["d_model"]
    d_sae = _width(config, where)
    by_length = config["sparsity_include_decoder_norm"]
    return Form(d_model, d_sae, act, config.get("top_k"), by_length, norm)


def hook(config: Mapping[str, Any], key: str, where: str) -> str:
    """The name of a site. Raises `UserError` where it is none."""
    if not isinstance(config[key], str):
        raise UserError(
            f"{where}: {key} is {config[key]!r}; expected a name such as blocks.4.hook_resid_post"
        )
    return str(config[key])


def stored_norms(
    tensors: Mapping[str, Tensor], hook_in: str, hook_out: str, where: str
) -> tuple[float, float]:
    """Of input and output, from the tensors beside the weights. Raises `UserError` where they are missing."""
    keys = [NORM_PREFIX + name for name in (hook_in, hook_out)]
    if lacks := [key for key in keys if key not in tensors or tensors[key].numel() != 1]:
        raise UserError(f"{where} lacks {', '.join(lacks)}, a number, which dataset-wise needs")
    read, predicted = (positive(float(tensors[key]), key, where) for key in keys)
    return read, predicted


def assembled(
    form: Form,
    weights: Mapping[str, Tensor],
    norms: tuple[float, float] | None,
    transcodes: bool,
    where: str,
) -> Dictionary | Normalized:
    """The SAE of raw activations. `norms`, of input and output, are given with dataset-wise normalisation."""
    _check_shape(form, weights, where)
    arguments = {"d_in": form.d_model, "d_sae": form.d_sae}
    if form.architecture == "topk":
        arguments["k"] = form.k  # type: ignore[assignment]  # `build` refuses what is none
    sae = build(form.architecture, arguments, weights, where)
    if form.by_length:
        _put_lengths_into_encoder(sae)
    if norms is not None:
        read, predicted = (norm / math.sqrt(form.d_model) for norm in norms)
        nothing = torch.zeros(form.d_model)
        sae.fold(Scaling(nothing, read), Scaling(nothing, predicted))
    finite(sae, where)
    if form.norm != "token-wise":
        return sae
    if transcodes:
        raise UserError(
            f"{where}: with token-wise normalisation a transcoder predicts directions without lengths; not supported"
        )
    return Normalized(sae, norm="length", eps=0.0, undone=True)


def _width(config: Mapping[str, Any], where: str) -> int:
    d_model, d_sae = config["d_model"], config.get("d_sae")
    if type(d_model) is not int or d_model < 1:
        raise UserError(f"{where}: d_model is {d_model!r}; expected a whole number above 0")
    if "expansion_factor" not in config:
        if type(d_sae) is not int:
            raise UserError(f"{where}: d_sae is {d_sae!r}; expected a whole number above 0")
        return d_sae
    width = round(d_model * positive(config["expansion_factor"], "expansion_factor", where))
    if d_sae not in (None, width):
        raise UserError(f"{where}: d_sae is {d_sae!r}, and d_model times expansion_factor {width}")
    return width


def _check_shape(form: Form, weights: Mapping[str, Tensor], where: str) -> None:
    found = tuple(matrix(weights, "W_enc", where).shape)
    if found != (form.d_model, form.d_sae):
        raise UserError(
            f"{where}: the encoder is {found[0]} x {found[1]}; the configuration says {form.d_model} x {form.d_sae}"
        )


def _put_lengths_into_encoder(sae: Dictionary) -> None:
    """A latent without a decoder direction was never active, and stays so."""
    lengths = sae.W_dec.norm(dim=1)
    sae.W_enc.mul_(lengths)
    sae.get_parameter("b_enc").mul_(lengths)
    sae.W_dec.div_(lengths.clamp_min(torch.finfo(lengths.dtype).tiny)[:, None])
