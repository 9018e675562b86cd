"""ReLU SAE with an L1 penalty and unit decoder rows (Bricken et al. 2023, "Towards Monosemanticity").

f    = relu(x W_enc + b_enc)
loss = |x - f W_dec - b_dec|^2 + c sum_i f_i,  |d_i| = 1
"""

from dataclasses import dataclass
from typing import final

from torch import Tensor

from saebench import sparse
from saebench.saes._dictionary import Dictionary
from saebench.saes.relu import ReLU as ReLUSAE
from saebench.variants._training import (
    PenaltyControl,
    Positive,
    Share,
    Task,
    Training,
    Variant,
    squared_error,
)


@final
@dataclass(frozen=True, kw_only=True)
class ReLU(Variant):
    penalty: Positive
    """Coefficient c at the start; from there it is steered to the wanted L0."""
    l0_descent: Share
    """Share of the training tokens over which L0 is brought down to the wanted value."""

    def start(self, task: Task) -> Training:
        return _Training(self, task)


@final
class _Training(Training):
    def __init__(self, recipe: ReLU, task: Task) -> None:
        super().__init__(task)
        self.control = PenaltyControl(task, recipe.penalty, recipe.l0_descent)

    def loss(self, x: Tensor, progress: float) -> Tensor:
        pre = self.pre(x)
        chosen = sparse.select(pre, pre > 0)
        f = chosen.pre(x, self.encoder, self.b_enc).relu()
        x_hat = chosen.decode(f, self.decoder) + self.b_dec
        self.control.update(chosen.l0(f), len(x), progress)
        return squared_error(x, x_hat) + self.control.coefficient() * f.sum() / len(x)

    def export(self) -> Dictionary:
        sae = ReLUSAE(self.decoder.shape[1], self.decoder.shape[0])
        sae.load_state_dict(self.shared_weights() | {"b_enc": self.b_enc})
        return sae
