"""TopK SAE with the AuxK loss for dead latents (Gao et al. 2024, https://arxiv.org/abs/2406.04093).

f    = relu(topk(x W_enc + b_enc))
loss = |x - x_hat|^2 + aux_coefficient * auxk

Options: k falls from d to its value in the first part of training (as in dictionary_learning); Multi-TopK adds the
error of a reconstruction from 4 k latents (appendix A.5 there, with weight 1/8).
"""

from dataclasses import dataclass
from typing import Annotated, final

from annotated_types import Ge
from torch import Tensor

from saebench import sparse
from saebench.saes._dictionary import Dictionary
from saebench.saes.topk import TopK as TopKSAE
from saebench.variants._training import (
    AuxK,
    DictionaryTraining,
    Lesson,
    Revived,
    Share,
    Task,
    Training,
    ramp,
    squared_error,
)


@final
@dataclass(frozen=True, kw_only=True)
class TopK(Revived):
    k_anneal: Share
    """Share of the training tokens over which k falls in a line from d to its value; 0 keeps it."""
    multi_topk: Annotated[float, Ge(0)]
    """Weight of the error with 4 k latents; 0 leaves it out."""

    def check(self, width: int, l0: float) -> None:
        super().check(width, l0)
        if l0 != round(l0):
            raise ValueError(f"l0 is {l0:g}; topk keeps k latents, a whole number")

    def start(self, task: Task) -> Training:
        return _Training(self, task)


@final
class _Training(DictionaryTraining):
    def __init__(self, recipe: TopK, task: Task) -> None:
        super().__init__(task)
        self.recipe, self.k = recipe, round(task.l0)
        self.k_start = max(self.k, min(task.d_in, task.width))
        self.auxk = AuxK(task, recipe)

    def loss(self, lesson: Lesson) -> Tensor:
        pre = self.pre(lesson.x)
        chosen = sparse.top_per_token(pre, self.k_now(lesson.progress))
        f = chosen.pre(lesson.x, self.encoder, self.b_enc).relu()
        x_hat = self.predict(chosen, f, lesson.x)
        aux = self.auxk.loss(self, lesson.x, lesson.target - x_hat, pre)
        self.auxk.activity.update(chosen.fired(f), len(lesson.x))
        return squared_error(lesson.target, x_hat) + aux + self._more(lesson, pre)

    def k_now(self, progress: float) -> int:
        return round(self.k_start + (self.k - self.k_start) * ramp(progress, self.recipe.k_anneal))

    def _more(self, lesson: Lesson, pre: Tensor) -> Tensor:
        """The error with four times as many latents."""
        if self.recipe.multi_topk == 0:
            return pre.new_zeros(())
        chosen = sparse.top_per_token(pre, min(4 * self.k, pre.shape[1]))
        f = chosen.pre(lesson.x, self.encoder, self.b_enc).relu()
        error = squared_error(lesson.target, self.predict(chosen, f, lesson.x))
        return self.recipe.multi_topk * error

    def export(self) -> Dictionary:
        return self.filled(TopKSAE, {"b_enc": self.b_enc}, k=self.k)
