"""The dictionary of a trained SAE without its encoder: codes are found by sparse coding at inference.

matching: non-negative orthogonal matching pursuit with as many latents as the wanted L0
fista:    the lasso, with the penalty whose mean L0 on the training stream is the wanted one

How far an SAE stays behind `matching` over its own dictionary is what its encoder loses; no way of encoding is known to
be the best, so it is a bound in practice and no theorem. One for each width and L0, made of the suite's first
SAE of that shape (or the first of the variant `of`). A code takes far longer to find than with an encoder.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from jaxtyping import Float
from torch import Tensor

from saebench.controls._control import Asked, BuiltControl, Material, Planned, beside_parents
from saebench.errors import UserError
from saebench.saes._dictionary import Dictionary
from saebench.saes._encoderless import Encoderless
from saebench.saes.fista import FISTA
from saebench.saes.pursuit import Pursuit as MatchingPursuit

_ITERATIONS = 100
"""Of FISTA; the objective is then within a thousandth of its minimum in tests/test_pursuit.py."""

_TOKENS = 1024
"""On which the penalty is found."""

_NEAR = 0.01
"""Relative error of the L0 that ends the search for the penalty."""

_HALVINGS = 30


@final
@dataclass(frozen=True)
class Pursuit(BuiltControl):
    method: Literal["matching", "fista"] = "matching"
    of: str | None = None

    kind: ClassVar = "reference"

    def plan(self, asked: Sequence[Asked]) -> list[Planned]:
        return beside_parents("pursuit", asked, self.of, f"-{self.method}")

    def build(self, planned: Planned, material: Material) -> Dictionary:
        assert planned.parent is not None and planned.l0 is not None, "planned from a trained SAE"
        parent = material.trained(planned.parent.name)
        if parent.d_in != parent.d_out:
            raise UserError(
                f"the control pursuit looks for codes of what an SAE reads; {planned.parent.name} predicts "
                "another stream. Give `of` a variant that is no transcoder"
            )
        if self.method == "matching":
            k = min(parent.d_sae, max(1, round(planned.l0)))
            return _over(parent, MatchingPursuit(parent.d_in, parent.d_sae, k=k))
        x = material.x
        sae = FISTA(parent.d_in, parent.d_sae, iterations=_ITERATIONS).to(x.device)
        _over(parent, sae)
        _set_penalty(sae, x[:: max(1, len(x) // _TOKENS)][:_TOKENS], planned.l0)
        return sae.cpu()


def _over(parent: Dictionary, sae: Encoderless) -> Encoderless:
    sae.W_dec.copy_(parent.W_dec)
    sae.b_dec.copy_(parent.b_dec)
    return sae


def _set_penalty(sae: FISTA, x: Float[Tensor, "n d_in"], l0: float) -> None:
    """By bisection of its logarithm: the larger the penalty, the fewer latents are active."""
    rows, _ = sae.directions()
    high = float(((x - sae.b_dec) @ rows.T).amax().clamp_min(1e-6))  # above it, none is
    low = high * 1e-6
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        sae.penalty.fill_(middle)
        found = len(sae.encode_sparse(x).indices) / len(x)
        if abs(found / l0 - 1) < _NEAR:
            return
        low, high = (middle, high) if found > l0 else (low, middle)
