"""Tied SAE: one matrix of unit rows encodes and decodes (Cunningham et al. 2023, https://arxiv.org/abs/2309.08600).

f    = relu(x D^T + b_enc)
loss = |x - f D - b_dec|^2 + c sum_i f_i,  |d_i| = 1

Exported as a ReLU SAE.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from saebench.saes._dictionary import Dictionary
from saebench.saes.relu import ReLU as ReLUSAE
from saebench.variants._training import (
    DictionaryTraining,
    Lesson,
    Penalised,
    PenaltyControl,
    Task,
    Training,
    squared_error,
)


@final
@dataclass(frozen=True, kw_only=True)
class Tied(Penalised):
    target: ClassVar = "same"
    own_decoder: ClassVar = False

    def start(self, task: Task) -> Training:
        return _Training(self, task)


@final
class _Training(DictionaryTraining):
    def __init__(self, recipe: Tied, task: Task) -> None:
        super().__init__(task)
        self.encoder = self.decoder
        self.control = PenaltyControl(task, recipe)

    def loss(self, lesson: Lesson) -> Tensor:
        chosen, f = self.rectified(lesson.x)
        x_hat = self.predict(chosen, f, lesson.x)
        self.control.update(chosen.l0(f), len(lesson.x), lesson.progress)
        penalty = self.control.coefficient() * f.sum() / len(lesson.x)
        return squared_error(lesson.target, x_hat) + penalty

    def export(self) -> Dictionary:
        return self.filled(ReLUSAE, {"b_enc": self.b_enc})
