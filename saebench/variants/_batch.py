"""BatchTopK's choice of latents, which several variants share."""

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Interval
from jaxtyping import Float
from torch import Tensor, nn

from saebench import sparse
from saebench.saes._dictionary import Dictionary
from saebench.saes.jumprelu import JumpReLU
from saebench.variants._training import DictionaryTraining, Revived, Task


@dataclass(frozen=True, kw_only=True)
class Batched(Revived):
    """A recipe that keeps the largest latents of a whole batch."""

    threshold_memory: Annotated[float, Interval(gt=0, le=1)]
    """Share of the training tokens over which the threshold is averaged."""


class TopOfBatch(nn.Module):
    """Keeps the k n largest of a batch's n d_sae positive pre-activations (Bussmann et al. 2024).

    A token must encode the same alone as in a batch, so a threshold is learned along the way, the running mean of
    the smallest value that was kept.
    """

    threshold: Tensor

    def __init__(self, task: Task, recipe: Batched) -> None:
        super().__init__()
        self.k, self.memory = task.l0, recipe.threshold_memory * task.tokens
        self.register_buffer("threshold", torch.zeros(()))

    def choose(self, pre: Float[Tensor, "n d_sae"], progress: float) -> sparse.Pairs:
        n = len(pre)
        chosen, smallest = sparse.top_of_batch(pre, round(self.k * n), guess=0.8 * self.threshold)
        # The first batch sets the threshold, so that no average starts from a value that was never seen.
        share = 1.0 if progress == 0 else min(1.0, n / self.memory)
        self.threshold.lerp_(smallest, share)
        return chosen

    def export(self, training: DictionaryTraining) -> Dictionary:
        """A JumpReLU SAE with the threshold for every latent."""
        threshold = self.threshold.expand(len(training.decoder))
        return training.filled(JumpReLU, {"b_enc": training.b_enc, "threshold": threshold})
