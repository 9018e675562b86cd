"""BatchTopK SAE (Bussmann et al. 2024, https://arxiv.org/abs/2412.06410).

f    = a where a is among the k n largest of the batch's n d_sae values a = relu(x W_enc + b_enc), else 0
loss = |x - x_hat|^2 + aux_coefficient * auxk

A token must encode the same alone as in a batch, so a threshold is learned along the way, the running mean of the
smallest value that was kept, and the SAE is exported as a JumpReLU SAE with that threshold for every latent.
"""

from dataclasses import dataclass
from typing import Annotated, final

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from saebench import sparse
from saebench.saes._dictionary import Dictionary
from saebench.saes.jumprelu import JumpReLU
from saebench.variants._training import (
    Activity,
    AuxK,
    Positive,
    Share,
    Task,
    Training,
    Variant,
    squared_error,
)


@final
@dataclass(frozen=True, kw_only=True)
class BatchTopK(Variant):
    aux_coefficient: Annotated[float, Ge(0)]
    aux_k_share: Positive
    """Dead latents used per token for the auxiliary loss, as a share of d_in."""
    dead_after: Share
    """A latent is dead that was silent for this share of the training tokens."""
    threshold_memory: Annotated[float, Interval(gt=0, le=1)]
    """Share of the training tokens over which the threshold is averaged."""

    def start(self, task: Task) -> Training:
        return _Training(self, task)


@final
class _Training(Training):
    threshold: Tensor

    def __init__(self, recipe: BatchTopK, task: Task) -> None:
        super().__init__(task)
        self.k = task.l0
        self.aux_coefficient = recipe.aux_coefficient
        self.memory = recipe.threshold_memory * task.tokens
        self.activity = Activity(task, recipe.dead_after)
        self.auxk = AuxK(round(recipe.aux_k_share * task.d_in))
        self.register_buffer("threshold", torch.zeros(()))

    def loss(self, x: Tensor, progress: float) -> Tensor:
        pre = self.pre(x)
        count = round(self.k * len(x))
        chosen, smallest = sparse.top_of_batch(pre, count, guess=0.8 * self.threshold)
        f = chosen.pre(x, self.encoder, self.b_enc).relu()
        x_hat = chosen.decode(f, self.decoder) + self.b_dec
        aux = self.auxk.loss(self, x, x - x_hat, pre, self.activity.dead())
        self.activity.update(chosen.fired(f), len(x))
        # The first batch sets the threshold, so that no average starts from a value that was never seen.
        share = 1.0 if progress == 0 else min(1.0, len(x) / self.memory)
        self.threshold.lerp_(smallest, share)
        return squared_error(x, x_hat) + self.aux_coefficient * aux

    def export(self) -> Dictionary:
        sae = JumpReLU(self.decoder.shape[1], self.decoder.shape[0])
        threshold = self.threshold.expand(len(self.decoder))
        sae.load_state_dict(self.shared_weights() | {"b_enc": self.b_enc, "threshold": threshold})
        return sae
