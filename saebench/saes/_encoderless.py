"""What architectures without an encoder share: codes follow from the activation and the dictionary alone.

They give back what they read, so there are no transcoders among them.
"""

from abc import ABC
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saebench.saes._dictionary import Dictionary, Scaling


class Encoderless(Dictionary, ABC):
    def __init__(self, d_in: int, d_sae: int) -> None:
        super().__init__(d_in, d_sae, encoder=False)

    def arguments(self) -> dict[str, Any]:
        return {"d_in": self.d_in, "d_sae": self.d_sae}

    def fold(self, read: Scaling, predicted: Scaling) -> None:
        self._fold_decoder(read, predicted)

    def directions(self) -> tuple[Float[Tensor, "d_sae d"], Float[Tensor, " d_sae"]]:
        """Decoder rows of unit norm, and the norms they had. A row of zeros stays one, with a norm of 1."""
        norms = torch.linalg.vector_norm(self.W_dec, dim=-1)
        norms = norms.where(norms > 0, 1.0)
        return self.W_dec / norms[:, None], norms
