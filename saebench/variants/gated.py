"""Gated SAE (Rajamanoharan et al. 2024, https://arxiv.org/abs/2404.16014).

pi   = x W_enc,  gate = pi + b_gate
f    = [gate > 0] * relu(exp(r_mag) pi + b_mag)
loss = |x - f W_dec - b_dec|^2 + c sum_i relu(gate_i) + |x - relu(gate) W_dec' - b_dec'|^2

The decoder of the last term (primed) is a constant: it teaches the gate what to let through and leaves the
dictionary alone. Every term lives on the pairs with an open gate, so one encoder product serves both paths.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from saebench import sparse
from saebench.saes._dictionary import Dictionary
from saebench.saes.gated import Gated as GatedSAE
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
class Gated(Penalised):
    def start(self, task: Task) -> Training:
        return _Training(self, task)


@final
class _Training(DictionaryTraining):
    """`b_enc` is the paper's b_gate."""

    def __init__(self, recipe: Gated, task: Task) -> None:
        super().__init__(task)
        self.r_mag = nn.Parameter(torch.zeros(task.width))
        self.b_mag = nn.Parameter(torch.zeros(task.width))
        self.control = PenaltyControl(task, recipe)

    def loss(self, lesson: Lesson) -> Tensor:
        x, target = lesson.x, lesson.target
        pre = self.pre(x)
        chosen = sparse.select(pre, pre > 0)
        gate = chosen.pre(x, self.encoder, self.b_enc)
        pi = gate - chosen.of_latent(self.b_enc)
        magnitude = chosen.of_latent(self.r_mag.exp()) * pi + chosen.of_latent(self.b_mag)
        open_gate = gate.relu()
        f = magnitude.relu() * (gate > 0)
        x_gate = chosen.decode(open_gate, self.decoder.detach()) + self.beside(x).detach()
        self.control.update(chosen.l0(f), len(x), lesson.progress)
        penalty = self.control.coefficient() * open_gate.sum() / len(x)
        error = squared_error(target, self.predict(chosen, f, x))
        return error + penalty + squared_error(target, x_gate)

    def export(self) -> Dictionary:
        gates = {"b_gate": self.b_enc, "b_mag": self.b_mag, "r_mag": self.r_mag}
        return self.filled(GatedSAE, gates)
