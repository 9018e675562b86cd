"""ReLU SAE whose penalty goes from L1 towards L0 (Karvonen et al. 2024, https://arxiv.org/abs/2408.00113, section 4).

f    = relu(x W_enc + b_enc)
loss = |x - f W_dec - b_dec|^2 + c sum_i ((f_i + s)^p - s^p),  |d_i| = 1

p falls from 1 in equal stages. At each the coefficient is multiplied by the ratio of the penalty's old to its new
value, so that the penalty goes on where it was. The slope of f^p at zero is infinite for p < 1, and would be all
that is left of a clipped gradient; the smoothing s makes it p s^(p - 1).
"""

from dataclasses import dataclass
from typing import Annotated, final

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from saebench.saes._dictionary import Dictionary
from saebench.saes.relu import ReLU as ReLUSAE
from saebench.variants._training import (
    DictionaryTraining,
    Lesson,
    Penalised,
    PenaltyControl,
    Positive,
    Share,
    Task,
    Training,
    squared_error,
)


@final
@dataclass(frozen=True, kw_only=True)
class PAnneal(Penalised):
    p_end: Annotated[float, Interval(gt=0, le=1)]
    """The power in the last stage."""
    stages: Annotated[int, Ge(1)]
    """Steps in which p falls."""
    anneal_start: Annotated[float, Interval(ge=0, lt=1)]
    """Share of the training tokens before p begins to fall."""
    anneal_end: Share
    """Share of the training tokens after which p stays."""
    smoothing: Positive

    def __post_init__(self) -> None:
        if self.anneal_end <= self.anneal_start:
            raise ValueError(
                f"anneal_end is {self.anneal_end}; expected more than anneal_start, {self.anneal_start}"
            )

    def start(self, task: Task) -> Training:
        return _Training(self, task)

    def power(self, progress: float) -> float:
        """p at this point of the training."""
        way = (progress - self.anneal_start) / (self.anneal_end - self.anneal_start)
        stage = min(self.stages, max(0, int(way * self.stages)))
        return 1 - (1 - self.p_end) * stage / self.stages


@final
class _Training(DictionaryTraining):
    p: Tensor

    def __init__(self, recipe: PAnneal, task: Task) -> None:
        super().__init__(task)
        self.recipe = recipe
        self.control = PenaltyControl(task, recipe)
        self.register_buffer("p", torch.ones(()))

    def loss(self, lesson: Lesson) -> Tensor:
        chosen, f = self.rectified(lesson.x)
        x_hat = self.predict(chosen, f, lesson.x)
        self._enter(self.recipe.power(lesson.progress), f)
        self.control.update(chosen.l0(f), len(lesson.x), lesson.progress)
        penalty = self.control.coefficient() * self._lp(f, self.p) / len(lesson.x)
        return squared_error(lesson.target, x_hat) + penalty

    def _lp(self, f: Tensor, p: Tensor) -> Tensor:
        s = self.recipe.smoothing
        return ((f + s).pow(p) - s**p).sum()

    @torch.no_grad()
    def _enter(self, p: float, f: Tensor) -> None:
        """A new stage begins where the old one ended. Within a stage nothing changes."""
        if p < 1:
            new = torch.full_like(self.p, p)
            before, after = self._lp(f, self.p), self._lp(f, new)
            self.control.scale(torch.where(after > 0, before / after, 1.0))
            self.p.copy_(new)

    def export(self) -> Dictionary:
        return self.filled(ReLUSAE, {"b_enc": self.b_enc})
