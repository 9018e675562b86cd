"""BatchTopK SAE (Bussmann et al. 2024, https://arxiv.org/abs/2412.06410).

f    = a where a is among the k n largest of the batch's n d_sae values a = relu(x W_enc + b_enc), else 0
loss = |x - x_hat|^2 + aux_coefficient * auxk

Exported as a JumpReLU SAE with one learned threshold for all latents.
"""

from dataclasses import dataclass
from typing import final

from torch import Tensor

from saebench.saes._dictionary import Dictionary
from saebench.variants._batch import Batched, TopOfBatch
from saebench.variants._training import (
    AuxK,
    DictionaryTraining,
    Lesson,
    Task,
    Training,
    squared_error,
)


@final
@dataclass(frozen=True, kw_only=True)
class BatchTopK(Batched):
    def start(self, task: Task) -> Training:
        return _Training(self, task)


@final
class _Training(DictionaryTraining):
    def __init__(self, recipe: BatchTopK, task: Task) -> None:
        super().__init__(task)
        self.top, self.auxk = TopOfBatch(task, recipe), AuxK(task, recipe)

    def loss(self, lesson: Lesson) -> Tensor:
        pre = self.pre(lesson.x)
        chosen = self.top.choose(pre, lesson.progress)
        f = chosen.pre(lesson.x, self.encoder, self.b_enc).relu()
        x_hat = self.predict(chosen, f, lesson.x)
        aux = self.auxk.loss(self, lesson.x, lesson.target - x_hat, pre)
        self.auxk.activity.update(chosen.fired(f), len(lesson.x))
        return squared_error(lesson.target, x_hat) + aux

    def export(self) -> Dictionary:
        return self.top.export(self)
