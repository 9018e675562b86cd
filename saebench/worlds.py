"""A world whose true features are known: what activations would be if they were sparse sums of directions.

x = a D + b        D: n_features unit directions in d dimensions, more of them than dimensions; a: their magnitudes,
                   most of them zero; b: a constant offset

A token is drawn like this (SynthSAEBench, https://arxiv.org/abs/2602.14687):

1. firing          feature i has the base rate p_i, Zipf's law between `most` and `least`; correlated normal variables
                   g = e F^T + sqrt(1 - |F_i|^2) e' with F of low rank say which fire: g_i above the quantile of p'_i
2. magnitude       relu(m_i + s_i e), with m falling linearly over the features
3. hierarchy       trees of features, `branching` children each: a child is silent where its parent is, its magnitude is
                   scaled by its parent's over the parent's mean, and of children of one parent at most one fires

p' is p, raised for children so that their rates stay near p (Hierarchy.factors): p'_i = p_i / p_parent * (1 + the sum
of the siblings' p over p_parent), at most 1. It makes up for a part of what the hierarchy takes, not for all.

Features are numbered from the most frequent: roots first, then all children of roots, and so on; those outside of the
trees come last.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saebench import sparse
from saebench.types import SparseCode

_NEAR_ONE = 0.99
"""The most of a feature's firing that the low-rank part may explain."""


@dataclass(frozen=True)
class Recipe:
    """All that determines a world."""

    n_features: int
    d: int
    roots: int
    """Trees; the other features are in none."""
    branching: int
    depth: int
    """Generations below the roots."""
    exponent: float
    """Of Zipf's law of the base rates."""
    most: float
    """Base rate of the most frequent feature."""
    least: float
    """Base rate of the rarest."""
    magnitudes: tuple[float, float]
    """Mean magnitude of the first and of the last feature."""
    spread: tuple[float, float]
    """Mean and standard deviation of the normal variable whose absolute value is a feature's own spread."""
    rank: int
    """Of the correlations between features."""
    correlation: float
    """Standard deviation of the entries of F."""
    offset: float
    """Length of b."""
    separation_steps: int
    """Gradient steps that push directions apart."""
    seed: int

    def __post_init__(self) -> None:
        if self.roots * self.tree > self.n_features:
            raise ValueError(
                f"{self.roots} trees of {self.tree} features do not fit into {self.n_features} features"
            )

    @property
    def tree(self) -> int:
        """Features of one tree."""
        return sum(self.branching**level for level in range(self.depth + 1))


LARGE = Recipe(
    n_features=16_384,
    d=768,
    roots=128,
    branching=4,
    depth=3,
    exponent=0.5,
    most=0.4,
    least=5e-4,
    magnitudes=(5.0, 4.0),
    spread=(0.5, 0.5),
    rank=25,
    correlation=0.1,
    offset=0.5,
    separation_steps=100,
    seed=42,
)
"""The published configuration, with a true L0 near 34."""

SMALL = replace(LARGE, n_features=1_024, d=64, roots=8)
"""The same laws at a sixteenth of the features: seconds on a CPU."""


class Sampled(NamedTuple):
    """Some tokens with what they are made of."""

    x: Float[Tensor, "n d"]
    features: SparseCode


Separate = Callable[[Tensor, int], Tensor]
"""Directions [n_features d] and a number of steps -> directions that are further apart."""


class World:
    """The tensors of a recipe, on one device."""

    def __init__(self, recipe: Recipe, device: str, separate: Separate | None = None) -> None:
        """`separate`: in the place of `separated`, whoever has its result already."""
        self.recipe, self.device = recipe, device
        generator = torch.Generator().manual_seed(recipe.seed)
        self.rates = base_rates(recipe)
        self.mean_magnitudes = torch.linspace(*recipe.magnitudes, recipe.n_features)
        spread, sd = recipe.spread
        self.spreads = torch.randn(recipe.n_features, generator=generator).mul(sd).add(spread).abs()
        self.directions = (separate or separated)(
            torch.randn(recipe.n_features, recipe.d, generator=generator).to(device),
            recipe.separation_steps,
        )
        offset = torch.randn(recipe.d, generator=generator)
        self.offset = (offset / offset.norm() * recipe.offset).to(device)
        self.factors = correlation_factors(recipe, generator).to(device)
        self.own = (1 - self.factors.square().sum(-1)).sqrt()
        quantile = torch.special.ndtri(1 - compensated(recipe, self.rates).double())
        self.thresholds = quantile.float().to(device)
        self.parents = parents(recipe)
        for name in ("mean_magnitudes", "spreads"):
            setattr(self, name, getattr(self, name).to(device))

    def sample(self, seed: int, n: int) -> Sampled:
        """n tokens, which the seed determines on a kind of device.

        x is a sum over the features that fire, in their order: the bits of a dense product would depend on the number
        of threads.
        """
        features = sparse.from_dense(self.magnitudes(seed, n))
        return Sampled(sparse.decode(features, self.directions) + self.offset, features)

    def magnitudes(self, seed: int, n: int) -> Float[Tensor, "n n_features"]:
        """Of the features of n tokens."""
        generator = torch.Generator(self.device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=self.device)

        recipe = self.recipe
        shared = normal(n, recipe.rank) @ self.factors.T
        fires = torch.addcmul(shared, self.own, normal(n, recipe.n_features)) > self.thresholds
        spread = normal(n, recipe.n_features).mul_(self.spreads)
        a = spread.add_(self.mean_magnitudes).relu_().mul_(fires)
        chance = torch.rand(n, recipe.n_features, generator=generator, device=self.device)
        for level in self._levels:
            self._inherit(a, level, chance)
        return a

    @cached_property
    def fingerprint(self) -> str:
        """Of the bits that it has here: what depends on the number of threads, and on the processor."""
        digest = hashlib.sha256(torch.backends.cpu.get_cpu_capability().encode())
        for part in (self.directions, self.offset, self.factors, self.thresholds, self.spreads):
            digest.update(part.cpu().numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def depths(self) -> Int[Tensor, " n_features"]:
        """Generation of each feature: 0 of roots; -1 of those outside of the trees."""
        found = torch.full((self.recipe.n_features,), -1)
        found[: self.recipe.roots] = 0
        for generation, (first, last) in enumerate(self._levels, 1):
            found[first:last] = generation
        return found

    @cached_property
    def _levels(self) -> list[tuple[int, int]]:
        """First and last feature of each generation below the roots."""
        return list(generations(self.recipe))[1:]

    def _inherit(
        self,
        a: Float[Tensor, "n n_features"],
        level: tuple[int, int],
        chance: Float[Tensor, "n n_features"],
    ) -> None:
        """Children of silent parents are silent, the others scaled, and of siblings one is left: in place."""
        first, last = level
        branching = self.recipe.branching
        parent = self.parents[first:last].to(a.device)
        children = a[:, first:last]
        children.mul_(a[:, parent] / self.mean_magnitudes[parent])
        siblings = children.view(len(a), -1, branching)
        lot = torch.where(siblings > 0, chance[:, first:last].view_as(siblings), -1.0)
        kept = lot == lot.amax(-1, keepdim=True)
        siblings.mul_(kept)


def base_rates(recipe: Recipe) -> Float[Tensor, " n_features"]:
    """p_i = least + (most - least) (q_i - q_min) / (q_max - q_min) with q_i = i^-exponent, i from 1."""
    q = torch.arange(1, recipe.n_features + 1, dtype=torch.float64).pow(-recipe.exponent)
    share = (q - q[-1]) / (q[0] - q[-1])
    return (recipe.least + (recipe.most - recipe.least) * share).float()


def generations(recipe: Recipe) -> list[tuple[int, int]]:
    """First and last feature of each generation, roots first: `[first, last)`."""
    found, first = [], 0
    for level in range(recipe.depth + 1):
        last = first + recipe.roots * recipe.branching**level
        found.append((first, last))
        first = last
    return found


def parents(recipe: Recipe) -> Int[Tensor, " n_features"]:
    """Of each feature; -1 where there is none."""
    found = torch.full((recipe.n_features,), -1)
    levels = generations(recipe)
    for (above, _), (first, last) in zip(levels[:-1], levels[1:], strict=True):
        found[first:last] = above + torch.arange(last - first) // recipe.branching
    return found


def compensated(
    recipe: Recipe, rates: Float[Tensor, " n_features"]
) -> Float[Tensor, " n_features"]:
    """Rates at which children have to fire for themselves, given what the hierarchy takes from them."""
    raised = rates.clone()
    above = parents(recipe)
    for first, last in generations(recipe)[1:]:
        own, parent = rates[first:last], rates[above[first:last]]
        siblings = own.view(-1, recipe.branching)
        others = (siblings.sum(-1, keepdim=True) - siblings).flatten()
        raised[first:last] = own / parent * (1 + others / parent)
    return raised.clamp_max(1.0)


def correlation_factors(
    recipe: Recipe, generator: torch.Generator
) -> Float[Tensor, "n_features rank"]:
    """F, shrunk where it would explain more than all of a feature's firing."""
    factors = recipe.correlation * torch.randn(recipe.n_features, recipe.rank, generator=generator)
    explained = float(factors.square().sum(-1).max()) if recipe.rank else 0.0
    return factors * math.sqrt(_NEAR_ONE / explained) if explained >= 1 else factors


def separated(
    directions: Float[Tensor, "n_features d"], steps: int
) -> Float[Tensor, "n_features d"]:
    """Unit directions pushed apart: Adam on sum_{i != j} <D_i, D_j>^2 + n sum_i (|D_i|^2 - 1)^2."""
    rows = torch.nn.functional.normalize(directions, dim=-1).requires_grad_(steps > 0)
    optimizer = torch.optim.Adam([rows], lr=3e-4) if steps else None
    for _ in range(steps):
        assert optimizer is not None, "there is one where there are steps"
        rows.grad = _overlap_gradient(rows.detach())
        optimizer.step()
    return torch.nn.functional.normalize(rows.detach(), dim=-1)


def _overlap_gradient(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """By D^T D [d d], never by the n x n overlaps: sum_{i,j} <D_i, D_j>^2 = |D^T D|^2."""
    square = rows.square().sum(-1, keepdim=True)
    together = 4 * rows @ (rows.T @ rows)
    alone = 4 * square * rows
    length = 4 * len(rows) * (square - 1) * rows
    return together - alone + length
