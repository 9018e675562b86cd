"""JumpReLU SAE (Rajamanoharan et al. 2024, https://arxiv.org/abs/2407.14435).

f    = pre where pre > threshold, else 0,  pre = x W_enc + b_enc
loss = |x - x_hat|^2 + sparsity (L0 / wanted - 1)^2

The jump has no useful gradient with respect to the threshold, so a rectangle of width `bandwidth` about it stands
in (section 4): df/dthreshold = -threshold/bandwidth and dL0/dthreshold = -1/bandwidth where
|pre - threshold| < bandwidth / 2. It is applied to the pre-activation, before the jump, so that both halves of the
rectangle count; the threshold is learned itself, not its logarithm, which Adam would barely move.
"""

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from saebench import sparse
from saebench.saes._dictionary import Dictionary
from saebench.saes.jumprelu import JumpReLU as JumpReLUSAE
from saebench.variants._training import (
    Positive,
    Share,
    Task,
    Training,
    Variant,
    ramp,
    squared_error,
)


@final
@dataclass(frozen=True, kw_only=True)
class JumpReLU(Variant):
    threshold: Positive
    """Of every latent at the start; activations have unit mean square."""
    bandwidth: Positive
    sparsity: Positive
    """Weight of the quadratic loss."""
    sparsity_warmup: Share
    """Share of the training tokens over which that weight rises from 0."""

    def start(self, task: Task) -> Training:
        return _Training(self, task)


@final
class _Training(Training):
    def __init__(self, recipe: JumpReLU, task: Task) -> None:
        super().__init__(task)
        self.recipe, self.wanted = recipe, task.l0
        self.threshold = nn.Parameter(torch.full((task.width,), recipe.threshold))
        self.non_negative = [self.threshold]

    def loss(self, x: Tensor, progress: float) -> Tensor:
        half = self.recipe.bandwidth / 2
        dense = self.pre(x)
        # Pairs below the jump but inside the rectangle are not active, yet move the threshold.
        chosen = sparse.select(dense, dense > self.threshold.detach() - half)
        pre = chosen.pre(x, self.encoder, self.b_enc)
        threshold = chosen.of_latent(self.threshold)
        f, active = _Jump.apply(pre, threshold, self.recipe.bandwidth)
        x_hat = chosen.decode(f, self.decoder) + self.b_dec
        off_target = (active.sum() / len(x) / self.wanted - 1).square()
        weight = self.recipe.sparsity * ramp(progress, self.recipe.sparsity_warmup)
        total: Tensor = squared_error(x, x_hat) + weight * off_target
        return total

    def export(self) -> Dictionary:
        sae = JumpReLUSAE(self.decoder.shape[1], self.decoder.shape[0])
        sae.load_state_dict(
            self.shared_weights() | {"b_enc": self.b_enc, "threshold": self.threshold}
        )
        return sae


class _Jump(torch.autograd.Function):
    """(pre, threshold) -> (pre [pre > threshold], [pre > threshold]) with the straight-through gradients."""

    @staticmethod
    def forward(
        ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        active = (pre > threshold).to(pre.dtype)
        return pre * active, active

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_f, grad_active = grads
        pre, threshold = ctx.saved_tensors
        inside = (pre - threshold).abs() < ctx.bandwidth / 2
        to_threshold = -(threshold * grad_f + grad_active) / ctx.bandwidth * inside
        while to_threshold.ndim > threshold.ndim:
            to_threshold = to_threshold.sum(0)
        return grad_f * (pre > threshold), to_threshold, None
