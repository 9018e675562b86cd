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
class Gated(Variant):
    penalty: Positive
    """Coefficient c at the start; from there it is steered to the wanted L0."""
    l0_descent: Share
    """Share of the training tokens over which L0 is brought down to the wanted value."""

    def start(self, task: Task) -> Training:
        return _Training(self, task)


@final
class _Training(Training):
    """`b_enc` is the paper's b_gate."""

    def __init__(self, recipe: Gated, task: Task) -> None:
        super().__init__(task)
        self.r_mag = nn.Parameter(torch.zeros(task.width))
        self.b_mag = nn.Parameter(torch.zeros(task.width))
        self.control = PenaltyControl(task, recipe.penalty, recipe.l0_descent)

    def loss(self, x: Tensor, progress: float) -> Tensor:
        pre = self.pre(x)
        chosen = sparse.select(pre, pre > 0)
        gate = chosen.pre(x, self.encoder, self.b_enc)
        pi = gate - chosen.of_latent(self.b_enc)
        magnitude = chosen.of_latent(self.r_mag.exp()) * pi + chosen.of_latent(self.b_mag)
        open_gate = gate.relu()
        f = magnitude.relu() * (gate > 0)
        x_hat = chosen.decode(f, self.decoder) + self.b_dec
        x_gate = chosen.decode(open_gate, self.decoder.detach()) + self.b_dec.detach()
        self.control.update(chosen.l0(f), len(x), progress)
        penalty = self.control.coefficient() * open_gate.sum() / len(x)
        return squared_error(x, x_hat) + penalty + squared_error(x, x_gate)

    def export(self) -> Dictionary:
        sae = GatedSAE(self.decoder.shape[1], self.decoder.shape[0])
        gates = {"b_gate": self.b_enc, "b_mag": self.b_mag, "r_mag": self.r_mag}
        sae.load_state_dict(self.shared_weights() | gates)
        return sae
