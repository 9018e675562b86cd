"""Variational SAE: Gaussian latents on BatchTopK's choice (after Baker and Li 2025, https://arxiv.org/abs/2509.22994).

mu   = a where a is among the k n largest of the batch's n d_sae values a = relu(x W_enc + b_enc), else 0
z_i  = mu_i + sigma_i eps, eps ~ N(0, 1), where mu_i was chosen, else 0
KL_i = (mu_i^2 + sigma_i^2) / (2 prior^2) - 1/2 - ln(sigma_i / prior)
loss = |x - z W_dec - b_dec|^2 + kl_weight sum_{i chosen} KL_i + aux_coefficient * auxk,  |d_i| = 1

A latent that is not chosen is zero for certain and has no term. Each latent learns one sigma for all inputs. Decoder
rows are units, so that noise cannot be escaped by growing mu against a shrinking decoder, and the best sigma is known:
sigma^2 = kl_weight / (2 + kl_weight / prior^2). The mean path alone is exported, as a JumpReLU SAE with one learned
threshold.
"""

import math
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saebench.saes._dictionary import Dictionary
from saebench.variants._batch import Batched, TopOfBatch
from saebench.variants._training import (
    AuxK,
    DictionaryTraining,
    Lesson,
    Positive,
    Share,
    Task,
    Training,
    ramp,
    squared_error,
)


@final
@dataclass(frozen=True, kw_only=True)
class Variational(Batched):
    prior: Positive
    """Standard deviation of the prior; activations have unit mean square."""
    sigma: Positive
    """Standard deviation of every latent at the start."""
    kl_weight: Positive
    kl_warmup: Share
    """Share of the training tokens over which that weight rises from 0."""

    def start(self, task: Task) -> Training:
        return _Training(self, task)


@final
class _Training(DictionaryTraining):
    def __init__(self, recipe: Variational, task: Task) -> None:
        super().__init__(task)
        self.recipe = recipe
        self.top, self.auxk = TopOfBatch(task, recipe), AuxK(task, recipe)
        self.log_sigma = nn.Parameter(torch.full((task.width,), math.log(recipe.sigma)))

    def loss(self, lesson: Lesson) -> Tensor:
        pre = self.pre(lesson.x)
        chosen = self.top.choose(pre, lesson.progress)
        mu = chosen.pre(lesson.x, self.encoder, self.b_enc).relu()
        log_sigma = chosen.of_latent(self.log_sigma)
        eps = torch.randn(mu.shape, generator=lesson.generator, device=mu.device, dtype=mu.dtype)
        x_hat = self.predict(chosen, mu + log_sigma.exp() * eps, lesson.x)
        aux = self.auxk.loss(self, lesson.x, lesson.target - x_hat, pre)
        self.auxk.activity.update(chosen.fired(mu), len(lesson.x))
        weight = self.recipe.kl_weight * ramp(lesson.progress, self.recipe.kl_warmup)
        kl = _gaussian_kl(mu, log_sigma, self.recipe.prior).sum() / len(lesson.x)
        return squared_error(lesson.target, x_hat) + weight * kl + aux

    def export(self) -> Dictionary:
        return self.top.export(self)


def _gaussian_kl(
    mu: Float[Tensor, " nnz"], log_sigma: Float[Tensor, " nnz"], prior: float
) -> Float[Tensor, " nnz"]:
    """KL(N(mu, sigma^2) || N(0, prior^2)), nats."""
    variances = (mu.square() + (2 * log_sigma).exp()) / prior**2
    return 0.5 * (variances - 1) - log_sigma + math.log(prior)
