"""Any object with `encode` and `decode` as an SAE: what people have in a notebook.

It is asked for `encode(x) -> z` and `decode(z) -> x_hat` on `[n d]` tensors, on its own device and in its own dtype
where it is a module. `W_enc [d_in d_sae]`, `W_dec [d_sae d_out]` and `b_dec [d_out]` are passed on where it has
tensors of these shapes, in float32; evals that need one it lacks say so.
"""

import hashlib
from collections.abc import Iterator
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saebench import sparse
from saebench.errors import UserError
from saebench.types import SparseCode

_ALONE = 8
"""Tokens that are encoded one by one, and have to come out as they do together."""
_TOLERANCE = 1e-2


@final
class Wrapped:
    """An SAE whose shapes were checked on a few activations."""

    def __init__(self, of: Any, x: Float[Tensor, "n d_in"], d_out: int) -> None:
        """`x`: some activations, also for their device. Raises `UserError` where something is not as expected."""
        for name in ("encode", "decode"):
            if not callable(getattr(of, name, None)):
                raise UserError(
                    f"{type(of).__name__} has no {name}; expected an object with encode(x) and decode(z)"
                )
        self._of, self._device = of, x.device
        self._own = _first_weight(of)
        self.d_in, self.d_out = x.shape[1], d_out
        with torch.no_grad():
            z = self._checked_code(x)
            self.d_sae = z.shape[1]
            self._check_prediction(z)
            self._check_alone(x, z)
        for name, shape in (
            ("W_enc", (self.d_in, self.d_sae)),
            ("W_dec", (self.d_sae, d_out)),
            ("b_dec", (d_out,)),
        ):
            setattr(self, name, self._passed_on(name, shape))

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        return self._here(self._of.encode(self._there(x)))

    def decode(self, z: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_out"]:
        return self._here(self._of.decode(self._there(z)))

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> SparseCode:
        chunks = sparse.token_chunks(x, self.d_sae)
        return sparse.concatenate([sparse.from_dense(self.encode(chunk)) for chunk in chunks])

    def decode_sparse(self, code: SparseCode) -> Float[Tensor, "n d_out"]:
        parts = [self.decode(sparse.to_dense(part, self.d_sae)) for part in self._parts(code)]
        return torch.cat([code.values.new_zeros(0, self.d_out), *parts])

    def checksum(self, x: Float[Tensor, "n d_in"]) -> str:
        """SHA-256 over its codes and predictions on these activations: of what it does, not of how it is made."""
        digest = hashlib.sha256(f"{type(self._of).__name__} {self.d_in} {self.d_sae}".encode())
        with torch.no_grad():
            code = self.encode_sparse(x)
            for found in (*code, self.decode_sparse(code)):
                digest.update(found.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _parts(self, code: SparseCode) -> Iterator[SparseCode]:
        """Of some tokens at a time."""
        n = len(code.offsets) - 1
        step = max(1, 2**25 // self.d_sae)
        for start in range(0, n, step):
            offsets = code.offsets[start : min(start + step, n) + 1]
            first, last = int(offsets[0]), int(offsets[-1])
            yield SparseCode(code.indices[first:last], code.values[first:last], offsets - first)

    def _there(self, x: Tensor) -> Tensor:
        return x if self._own is None else x.to(self._own.device, self._own.dtype)

    def _here(self, found: Tensor) -> Tensor:
        return found.detach().to(self._device, torch.float32)

    def _checked_code(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        z = self._of.encode(self._there(x))
        if not isinstance(z, Tensor) or z.ndim != 2 or len(z) != len(x):
            raise UserError(
                f"encode gave {_shown(z)} for activations of shape {list(x.shape)}; expected [{len(x)}, d_sae]"
            )
        return self._here(z)

    def _check_prediction(self, z: Float[Tensor, "n d_sae"]) -> None:
        x_hat = self._of.decode(self._there(z))
        if not isinstance(x_hat, Tensor) or x_hat.shape != (len(z), self.d_out):
            raise UserError(
                f"decode gave {_shown(x_hat)} for latents of shape {list(z.shape)}; expected "
                f"[{len(z)}, {self.d_out}]"
            )

    def _check_alone(self, x: Float[Tensor, "n d_in"], z: Float[Tensor, "n d_sae"]) -> None:
        """Otherwise scores would depend on how the text is cut into batches."""
        for i in range(min(_ALONE, len(x))):
            alone = self._checked_code(x[i : i + 1])[0]
            if float((alone - z[i]).norm()) > _TOLERANCE * float(z[i].norm()) + 1e-6:
                raise UserError(
                    f"{type(self._of).__name__} encodes a token alone differently than among others (or differently "
                    "each time); give it in the form that it has for inference, such as with a threshold in place of "
                    "a top-k over the batch"
                )

    def _passed_on(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        found = getattr(self._of, name, None)
        if not isinstance(found, Tensor) or tuple(found.shape) != shape:
            return None
        return self._here(found)


def _first_weight(of: Any) -> Tensor | None:
    if not isinstance(of, nn.Module):
        return None
    return next((p for p in of.parameters() if p.is_floating_point()), None)


def _shown(found: Any) -> str:
    return f"shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
