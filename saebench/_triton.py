"""GPU kernels for training, written in Triton. Imported on demand by `kernels`, which says what they compute.

Every sum has one order that depends on the shapes alone and no atomic addition, so that a repeated run gives the
same bits. Positions are 64-bit integers: a table of 2^20 rows of 4096 has more entries than 32 bits can count.
"""

# mypy: disable-error-code="import-not-found, import-untyped, untyped-decorator"
# Triton has no types, and an installation without a GPU does not have Triton.

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

_ROWS = 16
"""Rows of a table in flight at a time."""
_COLUMNS = 128


@triton.jit
@no_type_check  # these are programs in Triton's language; run-time checks of types have no place in them
def bag_kernel(  # noqa: PLR0913
    indices,
    table,
    offsets,
    weights,
    out,
    d,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUM: tl.constexpr,
):
    """One bag, one block of columns."""
    bag = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < d
    start = tl.load(offsets + bag).to(tl.int64)
    end = tl.load(offsets + bag + 1).to(tl.int64)
    # As many sums as rows in flight, added up once at the end: within the loop no thread waits for another.
    sums = tl.zeros([ROWS, COLUMNS], dtype=SUM)
    for first in range(start, end, ROWS):
        pairs = first + tl.arange(0, ROWS)
        there = pairs < end
        rows = tl.load(indices + pairs, mask=there, other=0).to(tl.int64)
        weight = tl.load(weights + pairs, mask=there, other=0).to(SUM)
        found = tl.load(
            table + rows[:, None] * d + columns[None, :],
            mask=there[:, None] & inside[None, :],
            other=0,
        )
        sums += weight[:, None] * found.to(SUM)
    tl.store(out + bag * d + columns, tl.sum(sums, 0), mask=inside)


@triton.jit
@no_type_check
def pair_dots_kernel(  # noqa: PLR0913
    rows,
    columns,
    a,
    b,
    out,
    nnz,
    d,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUM: tl.constexpr,
):
    """A few consecutive pairs."""
    pairs = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = pairs < nnz
    of_a = a + tl.load(rows + pairs, mask=there, other=0).to(tl.int64) * d
    of_b = b + tl.load(columns + pairs, mask=there, other=0).to(tl.int64) * d
    sums = tl.zeros([ROWS, COLUMNS], dtype=SUM)
    for first in range(0, d, COLUMNS):
        inner = first + tl.arange(0, COLUMNS)
        mask = there[:, None] & (inner < d)[None, :]
        left = tl.load(of_a[:, None] + inner[None, :], mask=mask, other=0).to(SUM)
        right = tl.load(of_b[:, None] + inner[None, :], mask=mask, other=0).to(SUM)
        sums += left * right
    tl.store(out + pairs, tl.sum(sums, 1), mask=there)


def bag(
    indices: Int[Tensor, " nnz"],
    table: Float[Tensor, "rows d"],
    offsets: Int[Tensor, " bags_plus_1"],
    weights: Float[Tensor, " nnz"],
) -> Float[Tensor, "bags d"]:
    """Long bags are not split: a program walks through its bag, `_ROWS` rows at a time.

    The blocks of columns and the other bags keep the GPU busy meanwhile, and no partial sums are written.
    Programs are ordered with the bags first, so that those which run together share one block of columns of the
    table, which has a better chance of staying in the cache than the whole.
    """
    bags, d = len(offsets) - 1, table.shape[1]
    kept = torch.promote_types(table.dtype, weights.dtype)
    out = torch.empty(bags, d, dtype=kept, device=table.device)
    if out.numel() == 0:  # a GPU refuses to start no program at all
        return out
    columns = min(_COLUMNS, triton.next_power_of_2(d))
    with torch.cuda.device_of(table):
        bag_kernel[bags, triton.cdiv(d, columns)](
            indices.contiguous(),
            table.contiguous(),
            offsets.contiguous(),
            weights.contiguous(),
            out,
            d,
            ROWS=_ROWS,
            COLUMNS=columns,
            SUM=_sum_type(kept),
        )
    return out


def pair_dots(
    rows: Int[Tensor, " nnz"],
    columns: Int[Tensor, " nnz"],
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "m d"],
) -> Float[Tensor, " nnz"]:
    """Pairs in the order of tokens share a row of `a` with their neighbours, which then is in the cache."""
    nnz, d = len(rows), a.shape[1]
    kept = torch.promote_types(a.dtype, b.dtype)
    out = torch.empty(nnz, dtype=kept, device=a.device)
    if nnz == 0:
        return out
    with torch.cuda.device_of(a):
        pair_dots_kernel[(triton.cdiv(nnz, _ROWS),)](
            rows.contiguous(),
            columns.contiguous(),
            a.contiguous(),
            b.contiguous(),
            out,
            nnz,
            d,
            ROWS=_ROWS,
            COLUMNS=min(_COLUMNS, triton.next_power_of_2(d)),
            SUM=_sum_type(kept),
        )
    return out


def _sum_type(kept: torch.dtype) -> tl.dtype:
    return tl.float64 if kept == torch.float64 else tl.float32
