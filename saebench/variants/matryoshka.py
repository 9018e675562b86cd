"""Matryoshka SAE on BatchTopK (Bussmann et al. 2025, https://arxiv.org/abs/2503.17547).

f      = BatchTopK over all latents
x_hat_m = b_dec + sum_{i < m} f_i d_i           for some prefixes m_1 < ... < m_G = d_sae
loss   = mean over m of |x - x_hat_m|^2 + aux_coefficient * auxk

Every prefix must reconstruct by itself, so the first latents are general ones. A row is added once, whatever the
number of prefixes. Prefixes are fixed shares of the width or, as an option, drawn anew at each step (after
Nabeshima 2024). Exported as a JumpReLU SAE with one learned threshold.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saebench.saes._dictionary import Dictionary
from saebench.variants._batch import Batched, TopOfBatch
from saebench.variants._training import (
    AuxK,
    DictionaryTraining,
    Lesson,
    Task,
    Training,
)


@final
@dataclass(frozen=True, kw_only=True)
class Matryoshka(Batched):
    prefixes: tuple[float, ...]
    """Ascending shares of the width; the last is 1."""
    random_prefixes: bool
    """Draws as many prefixes at every step, their logarithms uniform between 0 and ln(width); the last stays."""

    def __post_init__(self) -> None:
        ends = (0.0, *self.prefixes)
        if ends[-1] != 1 or any(a >= b for a, b in pairwise(ends)):
            raise ValueError(
                f"prefixes are {list(self.prefixes)}; expected ascending shares above 0 that end with 1"
            )

    def start(self, task: Task) -> Training:
        return _Training(self, task)


@final
class _Training(DictionaryTraining):
    def __init__(self, recipe: Matryoshka, task: Task) -> None:
        super().__init__(task)
        self.recipe = recipe
        self.top, self.auxk = TopOfBatch(task, recipe), AuxK(task, recipe)

    def loss(self, lesson: Lesson) -> Tensor:
        pre = self.pre(lesson.x)
        chosen = self.top.choose(pre, lesson.progress)
        f = chosen.pre(lesson.x, self.encoder, self.b_enc).relu()
        parts = chosen.decode_prefixes(f, self.decoder, self.ends(lesson.generator))
        residuals = (lesson.target - self.beside(lesson.x))[:, None] - parts
        aux = self.auxk.loss(self, lesson.x, residuals[:, -1], pre)
        self.auxk.activity.update(chosen.fired(f), len(lesson.x))
        return residuals.square().sum() / (parts.shape[0] * parts.shape[1]) + aux

    def ends(self, generator: torch.Generator) -> Int[Tensor, " n_prefixes"]:
        """How many latents each prefix has."""
        width, device = len(self.decoder), self.decoder.device
        shares: Float[Tensor, " n_prefixes"] = torch.tensor(self.recipe.prefixes, device=device)
        if self.recipe.random_prefixes:
            drawn = torch.rand(len(shares) - 1, generator=generator, device=device).sort().values
            shares = torch.cat([width ** (drawn - 1), shares[-1:]])
        return (shares * width).ceil().long()

    def export(self) -> Dictionary:
        return self.top.export(self)
