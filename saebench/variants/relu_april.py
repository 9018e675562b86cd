"""ReLU SAE whose L1 penalty is weighted by free decoder norms (Anthropic, April 2024,
https://transformer-circuits.pub/2024/april-update/index.html).

f    = relu(x W_enc + b_enc)
loss = |x - f W_dec - b_dec|^2 + c sum_i f_i |d_i|

What counts is f_i |d_i|, so the norms need no constraint; they are folded into the encoder at export.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from saebench.saes._dictionary import Dictionary
from saebench.saes.relu import ReLU as ReLUSAE
from saebench.variants._training import (
    DictionaryTraining,
    Lesson,
    Penalised,
    PenaltyControl,
    Positive,
    Task,
    Training,
    squared_error,
)


@final
@dataclass(frozen=True, kw_only=True)
class ReLUApril(Penalised):
    decoder_norm: Positive
    """Length of the decoder rows, and of the encoder's, at the start."""

    def start(self, task: Task) -> Training:
        return _Training(self, task)


@final
class _Training(DictionaryTraining):
    unit_norm: ClassVar[bool] = False

    def __init__(self, recipe: ReLUApril, task: Task) -> None:
        super().__init__(task)
        self.control = PenaltyControl(task, recipe)
        with torch.no_grad():
            self.encoder.mul_(recipe.decoder_norm)
            self.decoder.mul_(recipe.decoder_norm)

    def loss(self, lesson: Lesson) -> Tensor:
        chosen, f = self.rectified(lesson.x)
        x_hat = self.predict(chosen, f, lesson.x)
        self.control.update(chosen.l0(f), len(lesson.x), lesson.progress)
        lengths = chosen.of_latent(torch.linalg.vector_norm(self.decoder, dim=-1))
        penalty = self.control.coefficient() * (f * lengths).sum() / len(lesson.x)
        return squared_error(lesson.target, x_hat) + penalty

    def export(self) -> Dictionary:
        lengths = torch.linalg.vector_norm(self.decoder, dim=-1)
        folded = {
            "W_enc": (self.encoder * lengths[:, None]).T,
            "W_dec": torch.nn.functional.normalize(self.decoder, dim=-1),
            "b_enc": self.b_enc * lengths,
        }
        return self.filled(ReLUSAE, folded)
