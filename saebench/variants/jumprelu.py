"""JumpReLU SAE (Rajamanoharan et al. 2024, https://arxiv.org/abs/2407.14435).

f    = pre where pre > threshold, else 0,  pre = x W_enc + b_enc
loss = |x - x_hat|^2 + sparsity (L0 / wanted - 1)^2

The jump has no useful gradient with respect to the threshold, so a rectangle of width `bandwidth` about it stands
in (section 4): df/dthreshold = -threshold/bandwidth and dL0/dthreshold = -1/bandwidth where
|pre - threshold| < bandwidth / 2. It is applied to the pre-activation, before the jump, so that both halves of the
rectangle count; the threshold is learned itself, not its logarithm, which Adam would barely move.

Option `tanh` (Anthropic, January 2025, https://transformer-circuits.pub/2025/january-update): the penalty is
c sum_i tanh(tanh_scale f_i) with c steered to the wanted L0, the rectangle's gradient goes to the pre-activation
too, and p sum_i relu(threshold_i - pre_i) pulls silent latents back.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, final

import torch
from annotated_types import Ge
from torch import Tensor, nn

from saebench import sparse
from saebench.saes._dictionary import Dictionary
from saebench.saes.jumprelu import JumpReLU as JumpReLUSAE
from saebench.variants._training import (
    DictionaryTraining,
    Lesson,
    Penalised,
    PenaltyControl,
    Positive,
    Share,
    Task,
    Training,
    ramp,
    squared_error,
)


@final
@dataclass(frozen=True, kw_only=True)
class JumpReLU(Penalised):
    """`penalty` and `l0_descent` are for the option `tanh`, the quadratic loss has its own weight."""

    threshold: Positive
    """Of every latent at the start; activations have unit mean square."""
    bandwidth: Positive
    sparsity_loss: Literal["quadratic", "tanh"]
    sparsity: Positive
    """Weight of the quadratic loss."""
    sparsity_warmup: Share
    """Share of the training tokens over which that weight rises from 0."""
    tanh_scale: Positive
    pre_activation: Annotated[float, Ge(0)]
    """Coefficient p of the pull on silent latents, for `tanh`."""

    @property
    def float32(self) -> bool:
        return True  # which side of its threshold a latent is on

    def start(self, task: Task) -> Training:
        return _Training(self, task)


@final
class _Training(DictionaryTraining):
    def __init__(self, recipe: JumpReLU, task: Task) -> None:
        super().__init__(task)
        self.recipe = recipe
        self.threshold = nn.Parameter(torch.full((task.width,), recipe.threshold))
        self.non_negative = [self.threshold]
        self.control = PenaltyControl(task, recipe)

    def loss(self, lesson: Lesson) -> Tensor:
        tanh = self.recipe.sparsity_loss == "tanh"
        dense = self.pre(lesson.x)
        if tanh and self.recipe.pre_activation > 0:
            chosen: sparse.Selection = sparse.Everything(dense)  # silent latents have a say too
        else:
            # Pairs below the jump but inside the rectangle are not active, yet move the threshold.
            near = dense > self.threshold.detach() - self.recipe.bandwidth / 2
            chosen = sparse.select(dense, near)
        pre = chosen.pre(lesson.x, self.encoder, self.b_enc)
        threshold = chosen.of_latent(self.threshold)
        f, active = _Jump.apply(pre, threshold, self.recipe.bandwidth, tanh)
        error = squared_error(lesson.target, self.predict(chosen, f, lesson.x))
        if not tanh:
            return error + self._quadratic(active, lesson)
        self.control.update(chosen.l0(f), len(lesson.x), lesson.progress)
        return error + self._tanh(f, threshold - pre, len(lesson.x))

    def _quadratic(self, active: Tensor, lesson: Lesson) -> Tensor:
        weight = self.recipe.sparsity * ramp(lesson.progress, self.recipe.sparsity_warmup)
        off_target: Tensor = (active.sum() / len(lesson.x) / self.wanted - 1).square()
        return weight * off_target

    def _tanh(self, f: Tensor, below: Tensor, n: int) -> Tensor:
        penalty = self.control.coefficient() * (self.recipe.tanh_scale * f).tanh().sum()
        return (penalty + self.recipe.pre_activation * below.relu().sum()) / n

    def export(self) -> Dictionary:
        return self.filled(JumpReLUSAE, {"b_enc": self.b_enc, "threshold": self.threshold})


class _Jump(torch.autograd.Function):
    """(pre, threshold) -> (pre [pre > threshold], [pre > threshold]) with the straight-through gradients.

    With `to_input`, the rectangle's gradient goes to pre as well, with the other sign.
    """

    @staticmethod
    def forward(
        ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float, to_input: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth, ctx.to_input = bandwidth, to_input
        active = (pre > threshold).to(pre.dtype)
        return pre * active, active

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_f, grad_active = grads
        pre, threshold = ctx.saved_tensors
        inside = (pre - threshold).abs() < ctx.bandwidth / 2
        to_threshold = -(threshold * grad_f + grad_active) / ctx.bandwidth * inside
        to_pre = grad_f * (pre > threshold)
        if ctx.to_input:
            to_pre = to_pre - to_threshold
        while to_threshold.ndim > threshold.ndim:
            to_threshold = to_threshold.sum(0)
        return to_pre, to_threshold, None, None
