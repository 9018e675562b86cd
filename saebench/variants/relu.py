"""ReLU SAE with an L1 penalty and unit decoder rows (Bricken et al. 2023, "Towards Monosemanticity").

f    = relu(x W_enc + b_enc)
loss = |x - f W_dec - b_dec|^2 + c sum_i f_i,  |d_i| = 1

Dead latents may be resampled, as there: some times in training each becomes an input that is explained badly, drawn
with a probability that grows with its squared loss; its encoder has a fifth of the others' mean norm, its bias and
Adam's moments begin at zero. Inputs are drawn from the batch at hand.
"""

from dataclasses import dataclass
from typing import Annotated, final

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor

from saebench.saes._dictionary import Dictionary
from saebench.saes.relu import ReLU as ReLUSAE
from saebench.variants._training import (
    Activity,
    DictionaryTraining,
    Lesson,
    Penalised,
    PenaltyControl,
    Share,
    Task,
    Training,
    squared_error,
)

_ENCODER_SHARE = 0.2


@final
@dataclass(frozen=True, kw_only=True)
class ReLU(Penalised):
    resamplings: Annotated[int, Ge(0)]
    """How often dead latents are resampled, evenly over the first half of training; 0 leaves them alone."""
    dead_after: Share
    """For resampling, a latent is dead that was silent for this share of the training tokens."""

    def start(self, task: Task) -> Training:
        return _Training(self, task)


@final
class _Training(DictionaryTraining):
    resampled: Tensor

    def __init__(self, recipe: ReLU, task: Task) -> None:
        super().__init__(task)
        self.control = PenaltyControl(task, recipe)
        self.resamplings = recipe.resamplings
        self.activity = Activity(task, recipe.dead_after)
        self.register_buffer("resampled", torch.zeros((), dtype=torch.int64))
        self._last: tuple[Lesson, Tensor] | None = None

    def loss(self, lesson: Lesson) -> Tensor:
        chosen, f = self.rectified(lesson.x)
        x_hat = self.predict(chosen, f, lesson.x)
        self.control.update(chosen.l0(f), len(f), lesson.progress)
        if self.resamplings:
            self.activity.update(chosen.fired(f), len(lesson.x))
            self._last = lesson, (lesson.target - x_hat.detach()).square().sum(1)
        penalty = self.control.coefficient() * f.sum() / len(lesson.x)
        return squared_error(lesson.target, x_hat) + penalty

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().after_step(optimizer)
        if self._last is not None and not self.frozen:
            lesson, error = self._last
            if int(2 * lesson.progress * self.resamplings) > int(self.resampled) < self.resamplings:
                self._resample(lesson, error, optimizer)
                self.resampled.add_(1)

    def _resample(
        self, lesson: Lesson, error: Float[Tensor, " n"], optimizer: torch.optim.Optimizer
    ) -> None:
        dead = self.activity.dead()
        n_dead = int(dead.sum())
        if n_dead == 0 or n_dead == len(dead) or not error.any():
            return
        weights = error.square()
        drawn = torch.multinomial(weights, n_dead, replacement=True, generator=lesson.generator)
        norm = torch.linalg.vector_norm(self.encoder[~dead], dim=-1).mean()
        self.decoder[dead] = _units(lesson.target[drawn] - self.b_dec)
        self.encoder[dead] = _ENCODER_SHARE * norm * _units(lesson.x[drawn].float())
        self.b_enc[dead] = 0.0
        for parameter in (self.encoder, self.decoder, self.b_enc):
            for name in ("exp_avg", "exp_avg_sq"):
                optimizer.state[parameter][name][dead] = 0.0
        self.activity.forget(dead)

    def export(self) -> Dictionary:
        return self.filled(ReLUSAE, {"b_enc": self.b_enc})


def _units(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return torch.nn.functional.normalize(x, dim=-1)
