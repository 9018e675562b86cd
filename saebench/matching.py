"""Which direction of one dictionary is which of another.

nearest   of each row of a the row of b with the largest cosine: many rows may have the same one
assigned  one-to-one, the min(m, n) pairs with the largest total cosine (Hungarian assignment)
mutual    rows that are each other's nearest: one-to-one, and only those pairs about which both sides agree
greedy    mutual nearest neighbours, then those among the rows that are left, and so on: min(m, n) pairs
chance    the same of random directions of these shapes, because the nearest of many is near

The pairs of `mutual` are the clear ones, so that their mean cosine leaves out whatever was not found. That of `greedy`
is the mean over as many pairs as are assigned, and is hardly below theirs (tests/test_matching.py).

Rows are made unit; a row of zeros has cosine 0 with everything. `signed` takes the cosine as it is; without it
opposite directions are as good as equal ones, and every cosine given back is absolute.
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

MOST_ASSIGNED = 16_384
"""Rows on a side up to which pairs are assigned: time grows with the cube, and the matrix has 2 GiB there."""

_CHUNK = 2**26
"""Cosines that are held at a time, at the most: 256 MiB."""
_ROWS_FOR_CHANCE = 2_048
_PROGRESS = 0.01
"""Share of the rows left that a round of the greedy search must pair. Rows that are alike want the same partner, and a
round gives it to one of them alone."""


class Nearest(NamedTuple):
    """Of each of m rows the nearest other."""

    cosine: Float[Tensor, " m"]
    index: Int[Tensor, " m"]  # type: ignore[assignment]  # a tuple has a method of that name


class Matched(NamedTuple):
    """Pairs of rows, one-to-one: ascending in a."""

    a: Int[Tensor, " p"]
    b: Int[Tensor, " p"]
    cosine: Float[Tensor, " p"]


class Chance(NamedTuple):
    """What random directions give."""

    nearest: float
    """Mean cosine of a row of a to its nearest."""
    assigned: float | None
    """Mean cosine of assigned pairs; None where there are too many rows to assign."""
    mutual: float
    """Mean cosine of mutual nearest neighbours."""
    shared: float
    """Share of the rows of the smaller side that have a mutual nearest neighbour."""
    matched: float
    """Mean cosine of the pairs that `matched` gives. Where these are too many to assign, that of a row of the smaller
    side to its nearest, which is a little above it."""


def cosines(
    a: Float[Tensor, "m d"], b: Float[Tensor, "n d"], signed: bool
) -> Iterator[Float[Tensor, "chunk n"]]:
    """Of all rows of a with all of b, some rows at a time."""
    a, b = _unit(a), _unit(b)
    for rows in a.split(max(1, _CHUNK // len(b))):
        found = (rows @ b.T).clamp_(-1, 1)
        yield found if signed else found.abs_()


def nearest(a: Float[Tensor, "m d"], b: Float[Tensor, "n d"], signed: bool) -> Nearest:
    """Of each row of a the row of b with the largest cosine, on their device."""
    _check(a, b)
    best = [chunk.max(-1) for chunk in cosines(a, b, signed)]
    return Nearest(torch.cat([c.values for c in best]), torch.cat([c.indices for c in best]))


def assigned(a: Float[Tensor, "m d"], b: Float[Tensor, "n d"], signed: bool) -> Matched:
    """The min(m, n) pairs with the largest total cosine."""
    _check(a, b)
    if max(len(a), len(b)) > MOST_ASSIGNED:
        raise ValueError(
            f"{len(a):,} and {len(b):,} directions are too many to assign: at most {MOST_ASSIGNED:,} on a side; "
            "pair them greedily"
        )
    if len(a) > len(b):
        # SciPy would make a transposed copy of the whole matrix.
        turned = assigned(b, a, signed)
        order = turned.b.argsort()
        return Matched(turned.b[order], turned.a[order], turned.cosine[order])
    # Doubles, negated: what SciPy works on, so that it makes no copy of its own.
    cost = np.empty((len(a), len(b)))
    start = 0
    for chunk in cosines(a, b, signed):
        np.negative(chunk.cpu().numpy(), out=cost[start : start + len(chunk)])
        start += len(chunk)
    rows, columns = linear_sum_assignment(cost)
    cosine = torch.from_numpy(-cost[rows, columns]).float()
    places = (torch.from_numpy(rows), torch.from_numpy(columns), cosine)
    return Matched(*(place.to(a.device) for place in places))


def mutual(a: Float[Tensor, "m d"], b: Float[Tensor, "n d"], signed: bool) -> Matched:
    """The rows of a and b that are each other's nearest."""
    there, back = nearest(a, b, signed), nearest(b, a, signed)
    rows = torch.arange(len(a), device=a.device)
    both = back.index[there.index] == rows
    return Matched(rows[both], there.index[both], there.cosine[both])


def greedy(a: Float[Tensor, "m d"], b: Float[Tensor, "n d"], signed: bool) -> Matched:
    """The min(m, n) pairs that come from taking the largest cosine among the rows that have no partner yet.

    Rows that are as good as alike, for which this would take forever, are paired in their order.
    """
    left_a, left_b = (torch.arange(len(rows), device=a.device) for rows in (a, b))
    found: list[Matched] = []
    while len(left_a) and len(left_b):
        some, others = a[left_a], b[left_b]
        pairs = mutual(some, others, signed)
        if len(pairs.a) < _PROGRESS * min(len(some), len(others)):
            pairs = _in_order(some, others, signed)
        found.append(Matched(left_a[pairs.a], left_b[pairs.b], pairs.cosine))
        left_a, left_b = _without(left_a, pairs.a), _without(left_b, pairs.b)
    rows, columns, cosine = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = rows.argsort()
    return Matched(rows[order], columns[order], cosine[order])


def matched(a: Float[Tensor, "m d"], b: Float[Tensor, "n d"], signed: bool) -> Matched:
    """min(m, n) pairs: assigned, or greedy where there are too many rows to assign."""
    few = max(len(a), len(b)) <= MOST_ASSIGNED
    return assigned(a, b, signed) if few else greedy(a, b, signed)


@cache
def chance(m: int, n: int, d: int, signed: bool) -> Chance:
    """Of one draw of normal directions, the same one for the same shapes.

    What is a mean over rows is taken over 2,048 of them, which is enough for three digits.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, d, generator=generator) for rows in (m, n))
    near = nearest(a[:_ROWS_FOR_CHANCE], b, signed).cosine.mean()
    together = None
    if max(m, n) <= MOST_ASSIGNED:
        together = float(assigned(a, b, signed).cosine.mean())
    few, many = (a, b) if m <= n else (b, a)
    there = nearest(few[:_ROWS_FOR_CHANCE], many, signed)
    back = nearest(many[there.index], few, signed)
    both = back.index == torch.arange(len(there.index))
    return Chance(
        nearest=float(near),
        assigned=together,
        mutual=float(there.cosine[both].mean()),
        shared=float(both.float().mean()),
        matched=float(there.cosine.mean()) if together is None else together,
    )


def _in_order(some: Float[Tensor, "m d"], others: Float[Tensor, "n d"], signed: bool) -> Matched:
    places = torch.arange(min(len(some), len(others)), device=some.device)
    cosine = (_unit(some[places]) * _unit(others[places])).sum(-1).clamp_(-1, 1)
    return Matched(places, places, cosine if signed else cosine.abs_())


def _without(left: Int[Tensor, " m"], places: Int[Tensor, " p"]) -> Int[Tensor, " rest"]:
    stays = torch.ones(len(left), dtype=torch.bool, device=left.device)
    stays[places] = False
    return left[stays]


def _check(a: Tensor, b: Tensor) -> None:
    if not len(a) or not len(b):
        raise ValueError(f"there is nothing to match: {len(a)} directions and {len(b)}")


def _unit(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    rows = rows.detach().float()
    # In doubles, so that the squares of small numbers are not zero.
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float64).float()
    return rows / torch.where(norms > 0, norms, 1)
