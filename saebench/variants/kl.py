"""The classic sparse autoencoder (Ng 2011, CS294A lecture notes, "Sparse autoencoder").

a    = act(x W_enc + b_enc),  act: sigmoid, tanh or ReLU
z    = a where a is among the k n largest positive of the batch's n d_sae activations, else 0
r_i  = running mean of s(a_i);  s(a) = a for sigmoid, max(a, 0) for tanh, 1 - exp(-a) for ReLU
loss = |x - z W_dec - b_dec|^2 + kl_weight sum_i KL(rate || r_i),  |d_i| = 1
KL(rate || r) = rate ln(rate / r) + (1 - rate) ln((1 - rate) / (1 - r))

The lecture notes reconstruct from all units and leave open which are active. Here those above a threshold are, in
training and after it, so that nothing is lost at export; the threshold is the running mean of the smallest activation
that was kept, and thereby gives the wanted L0. What the KL does is to hold every unit's mean activation, active or
not, near the target: a unit that falls silent is pulled back, one that responds to everything is pushed down.

The mean of one batch is too few firings to tell a rate from, so KL is taken at the running mean, and its gradient is
that of KL there times that of the batch's own mean. It reaches every pair of token and unit where s is not flat, hence
one dense product more than other variants need; reconstruction and its gradients are sparse. s makes a number between 0
and 1 of an activation. A tanh unit is inactive at 0 here, and not at -1 as in the notes: a silent unit's code is zero.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple, final

import torch
from annotated_types import Ge, Interval
from jaxtyping import Float
from torch import Tensor

from saebench import sparse
from saebench.saes._dictionary import Dictionary
from saebench.saes.jumprelu import JumpReLU
from saebench.saes.saturating import Saturating
from saebench.variants._training import (
    DictionaryTraining,
    Lesson,
    Positive,
    Task,
    Training,
    Variant,
    squared_error,
)

_EDGE = 1e-6
"""Rates are kept this far from 0 and 1, where KL has poles."""


class _Units(NamedTuple):
    activation: Callable[[Tensor], Tensor]
    share: Callable[[Tensor], Tensor]
    """Between 0 and 1: what the mean activation is the mean of."""
    gain: float
    """Length of the encoder's rows at the start."""
    bias: float
    """At the start."""


_UNITS: Mapping[str, _Units] = {
    # A sigmoid is 1/2 at 0, far above any target rate, and flat: it starts lower and steeper.
    "sigmoid": _Units(torch.sigmoid, lambda a: a, gain=5.0, bias=-3.0),
    "tanh": _Units(torch.tanh, torch.relu, gain=1.0, bias=0.0),
    "relu": _Units(torch.relu, lambda a: -torch.expm1(-a), gain=1.0, bias=0.0),
}


@final
@dataclass(frozen=True, kw_only=True)
class KL(Variant):
    hidden: Literal["sigmoid", "tanh", "relu"]
    rate: Positive
    """Target of the mean activation as a multiple of l0 / width: about what a unit gives when it is active."""
    kl_weight: Annotated[float, Ge(0)]
    rate_memory: Annotated[float, Interval(gt=0, le=1)]
    """Share of the training tokens over which activations are averaged."""
    threshold_memory: Annotated[float, Interval(gt=0, le=1)]
    """Share of the training tokens over which the threshold is averaged."""

    def check(self, width: int, l0: float) -> None:
        super().check(width, l0)
        if self.rate * l0 >= width:
            raise ValueError(
                f"rate {self.rate:g} with l0 {l0:g} and width {width} is a target of "
                f"{self.rate * l0 / width:g}; rate l0 / width must be below 1"
            )

    def start(self, task: Task) -> Training:
        return _Training(self, task)


@final
class _Training(DictionaryTraining):
    mean_activation: Tensor
    threshold: Tensor

    def __init__(self, recipe: KL, task: Task) -> None:
        super().__init__(task)
        self.recipe, self.tokens, self.units = recipe, task.tokens, _UNITS[recipe.hidden]
        self.rate = recipe.rate * task.l0 / task.width
        self.register_buffer("mean_activation", torch.zeros(task.width))
        self.register_buffer("threshold", torch.zeros(()))
        with torch.no_grad():
            self.encoder.mul_(self.units.gain)
            self.b_enc.fill_(self.units.bias)

    def loss(self, lesson: Lesson) -> Tensor:
        pre = self.pre(lesson.x)
        a = self.units.activation(sparse.Everything(pre).pre(lesson.x, self.encoder, self.b_enc))
        chosen = self._choose(pre, a.detach(), lesson.progress)
        z = self.units.activation(chosen.pre(lesson.x, self.encoder, self.b_enc))
        error = squared_error(lesson.target, self.predict(chosen, z, lesson.x))
        rates = self._rates(self.units.share(a).mean(0), len(a), lesson.progress)
        return error + self.recipe.kl_weight * _kl(self.rate, rates).sum()

    @torch.no_grad()
    def _choose(
        self, pre: Float[Tensor, "n d_sae"], a: Float[Tensor, "n d_sae"], progress: float
    ) -> sparse.Pairs:
        """The largest activations; values of the pairs are pre-activations."""
        count = round(self.wanted * len(a))
        top, smallest = sparse.top_of_batch(a, count, guess=0.8 * self.threshold)
        self.threshold.lerp_(smallest, self._weight(len(a), self.recipe.threshold_memory, progress))
        return sparse.Pairs(pre, top.rows, top.columns)

    def _rates(
        self, mean: Float[Tensor, " d_sae"], n: int, progress: float
    ) -> Float[Tensor, " d_sae"]:
        """The running means, with the gradient of the batch's own."""
        weight = self._weight(n, self.recipe.rate_memory, progress)
        self.mean_activation.lerp_(mean.detach(), weight)
        return self.mean_activation.clamp(_EDGE, 1 - _EDGE) + (mean - mean.detach())

    def _weight(self, n: int, memory: float, progress: float) -> float:
        """Of a batch in a running mean. The first one sets it."""
        return 1.0 if progress == 0 else min(1.0, n / (memory * self.tokens))

    def export(self) -> Dictionary:
        """A JumpReLU SAE, for ReLU units; else a saturating one with all units of size 1."""
        threshold = self.threshold.expand(len(self.decoder))
        weights = {"b_enc": self.b_enc, "threshold": threshold}
        if self.recipe.hidden == "relu":
            return self.filled(JumpReLU, weights)
        weights["size"] = torch.ones_like(threshold)
        return self.filled(Saturating, weights, activation=self.recipe.hidden)


def _kl(rate: float, rates: Float[Tensor, " d_sae"]) -> Float[Tensor, " d_sae"]:
    """Of two coins: how far means are from the target, nats."""
    on = rate * (rate / rates).log()
    return on + (1 - rate) * ((1 - rate) / (1 - rates)).log()
