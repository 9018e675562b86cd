"""Sparse coding without an encoder: non-negative orthogonal matching pursuit over the decoder.

Starting from r = x - b_dec, k times: the latent i with the largest d_i . r is added to the chosen ones, and
z = argmin |x - b_dec - z W_dec|^2 over z >= 0, z_j = 0 for latents not chosen; r is what z leaves over. Directions
are compared at unit length.

Pati et al. 1993 (https://doi.org/10.1109/ACSSC.1993.342465), with z >= 0 as in Nguyen et al. 2019
(https://doi.org/10.1109/TSP.2019.2943225): a latent whose value would become negative leaves again, which makes this
the active-set method of Lawson and Hanson (1974), stopped at k latents. Plain matching pursuit, which never changes
a value once it is found, takes as many products with the dictionary and explains less: the weaker bound on what a
dictionary can do at a given L0.
"""

from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saebench.errors import UserError
from saebench.saes._encoderless import Encoderless

_CHUNK = 2**25
"""Elements of the chosen directions, and of their Gram matrices, that are held at a time."""

_NOISE = 100
"""Times the rounding unit: a smaller share of the activation is taken for nothing left over."""

_STEPS = 2
"""Times k steps at the most: latents that leave are replaced."""


@final
class Pursuit(Encoderless):
    def __init__(self, d_in: int, d_sae: int, *, k: int) -> None:
        super().__init__(d_in, d_sae)
        if not 0 < k <= d_sae:
            raise UserError(f"k is {k}; it must be from 1 to the width, {d_sae}")
        self.k = k

    def arguments(self) -> dict[str, Any]:
        return super().arguments() | {"k": self.k}

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        rows, norms = self.directions()
        few = max(1, _CHUNK // (self.k * (self.k + self.d_in)))
        return (
            torch.cat([_pursue(part, rows, self.k) for part in (x - self.b_dec).split(few)]) / norms
        )


def _pursue(
    x: Float[Tensor, "n d"], rows: Float[Tensor, "d_sae d"], k: int
) -> Float[Tensor, "n d_sae"]:
    nobody = len(rows)
    rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    code = x.new_zeros(len(x), len(rows))
    search = _Search(x, nobody, k)
    for step in range(_STEPS * k):
        correlation = search.residual @ rows.T
        at_chosen = correlation.gather(1, search.latents)
        best, latent = correlation.scatter_(1, search.latents, 0.0).max(1)
        going = (best > search.noise) & (search.latents == nobody).any(1)
        search.finish(~going, code)
        if not len(search.x):
            break
        # Slots are filled from the first, so that those behind the number of steps are free.
        used = min(step + 1, k)
        search.add(rows[latent[going]], latent[going], best[going], at_chosen[going, :used])
    search.finish(torch.ones_like(search.token, dtype=torch.bool), code)
    return code[:, :nobody]


class _Search:
    """The chosen latents of tokens that are not finished, in k slots. A free slot holds nobody and zeros.

    `inverse` is that of the Gram matrix of the chosen directions, kept by rank-one updates. Values are corrected by
    the correlations that are left, not computed anew, so that its rounding errors do not add up.
    """

    def __init__(self, x: Float[Tensor, "n d"], nobody: int, k: int) -> None:
        n, d = x.shape
        self.nobody, self.x, self.residual = nobody, x, x
        self.token = torch.arange(n, device=x.device)
        self.noise = _NOISE * torch.finfo(x.dtype).eps * torch.linalg.vector_norm(x, dim=-1)
        self.latents = torch.full((n, k), nobody, device=x.device)
        self.values, self.atoms = x.new_zeros(n, k), x.new_zeros(n, k, d)
        self.inverse = x.new_zeros(n, k, k)

    def finish(self, done: Bool[Tensor, " n"], code: Float[Tensor, "all d_sae_and_nobody"]) -> None:
        """Writes these tokens into `code` and goes on without them."""
        if not done.any():
            return
        code[self.token[done, None], self.latents[done]] = self.values[done]
        for name in ("x", "residual", "token", "noise", "latents", "values", "atoms", "inverse"):
            setattr(self, name, getattr(self, name)[~done])

    def add(
        self,
        row: Float[Tensor, "n d"],
        latent: Int[Tensor, " n"],
        correlation: Float[Tensor, " n"],
        at_chosen: Float[Tensor, "n used"],
    ) -> None:
        """One latent more for every token, and the values that fit best; all in the first `used` slots."""
        used = at_chosen.shape[1]
        token = torch.arange(len(row), device=row.device)
        atoms, inverse = self.atoms[:, :used], self.inverse[:, :used, :used]
        free = self.latents[:, :used] == self.nobody
        slot = (free * torch.arange(used, 0, -1, device=row.device)).argmax(1)
        overlap = (atoms @ row[:, :, None]).squeeze(-1)
        border = (inverse @ overlap[:, :, None]).squeeze(-1)
        rest = 1 - (overlap * border).sum(1)
        border[token, slot] = -1
        scaled = border / rest.clamp_min(torch.finfo(row.dtype).eps ** 0.5)[:, None]
        inverse += scaled[:, :, None] * border[:, None, :]
        atoms[token, slot], self.latents[token, slot] = row, latent
        at_chosen[token, slot] = correlation
        values = self.values[:, :used]
        self._move(values + (inverse @ at_chosen[:, :, None]).squeeze(-1))
        self.residual = self.x - (values[:, None, :] @ atoms).squeeze(1)

    def _move(self, target: Float[Tensor, "n used"]) -> None:
        """Values go to their target, or to where the first of them becomes zero: that latent leaves."""
        used = target.shape[1]
        values = self.values[:, :used]
        while len(rows := (target < 0).any(1).nonzero().squeeze(1)):
            now, goal, inverse = values[rows], target[rows], self.inverse[rows, :used, :used]
            share, slot = torch.where(goal < 0, now / (now - goal), torch.inf).min(1)
            token = torch.arange(len(rows), device=rows.device)
            now = now + share[:, None] * (goal - now)
            column = inverse[token, slot]
            column_of_pivot = column / column[token, slot][:, None]
            goal = goal - goal[token, slot][:, None] * column_of_pivot
            inverse = inverse - column[:, :, None] * column_of_pivot[:, None, :]
            inverse[token, slot], inverse[token, :, slot] = 0, 0
            now[token, slot], goal[token, slot] = 0, 0
            values[rows], target[rows], self.inverse[rows, :used, :used] = now, goal, inverse
            self.latents[rows, slot], self.atoms[rows, slot] = self.nobody, 0
        values.copy_(target)
