"""SAEs that encode x - b_dec, turned into the same SAEs of x."""

import torch

from saebench.errors import UserError
from saebench.saes._dictionary import Dictionary, Scaling


def centred(sae: Dictionary, where: str) -> Dictionary:
    """The same SAE, with the decoder bias no longer subtracted from what is encoded: b_enc - b_dec W_enc instead.

    In place. An affine path beside the latents still reads x. Raises `UserError` where the result is beyond float32.
    """
    b_dec = sae.b_dec.clone()
    sae.fold(Scaling(b_dec, 1.0), Scaling(torch.zeros_like(b_dec), 1.0))
    sae.b_dec.copy_(b_dec)
    return finite(sae, where)


def finite(sae: Dictionary, where: str) -> Dictionary:
    """Raises `UserError` where a weight overflowed while it was folded."""
    for name, weight in sae.state_dict().items():
        if not bool(torch.isfinite(weight).all()):
            raise UserError(f"{where}: {name} is too large to be used on raw activations")
    return sae
