"""Sparse codes, and training through the active latents alone.

After the active latents of a batch are chosen, nothing needs the dense `[n d_sae]` any more: the decoder, its
gradient and the gradient of the encoder are sums over active (token, latent) pairs. On a CPU every one of these is
one call of `embedding_bag`'s forward, the only sparse product of PyTorch that runs at the speed of memory in both
directions: the gradient with respect to a matrix is the same sum with the pairs sorted by latent. On a GPU it is
a kernel (`kernels.bag`).

An untrained SAE is far from sparse, so a selection has two forms with one interface, and `select` takes
whichever is cheaper. Matrices are kept row by row here, encoder and decoder both `[d_sae d]`.
"""

from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, final, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saebench import kernels
from saebench.types import SparseCode

DENSE_ABOVE = 0.1
"""Share of active pairs above which the dense products are faster (benchmarks/train_step.py)."""

_CHUNK = 2**25
"""Elements of a dense block of latents that is held at a time, at the most."""
_CACHED = 2**19
"""Elements of one that stays in a processor's cache, so that several passes over it are cheap."""
_ROWS = 64
"""Rows of one below which its product is slow."""


def from_dense(z: Float[Tensor, "n d_sae"]) -> SparseCode:
    """The entries that are not zero."""
    rows, columns = nonzero(z != 0)
    return SparseCode(columns, z[rows, columns], _offsets(rows, len(z)))


def from_pairs(
    rows: Int[Tensor, " pairs"],
    columns: Int[Tensor, " pairs"],
    values: Float[Tensor, " pairs"],
    n: int,
) -> SparseCode:
    """Of n tokens, from pairs sorted by token and latent; those that are zero are left out."""
    active = values != 0
    if not bool(active.all()):
        rows, columns, values = rows[active], columns[active], values[active]
    return SparseCode(columns, values, _offsets(rows, n))


def from_columns(columns: Int[Tensor, "n k"], values: Float[Tensor, "n k"]) -> SparseCode:
    """Of k latents for every token, in ascending order; those that are zero are left out."""
    active = values != 0
    offsets = torch.zeros(len(values) + 1, dtype=torch.int64, device=values.device)
    torch.cumsum(active.sum(1), 0, out=offsets[1:])
    return SparseCode(columns[active], values[active], offsets)


def to_dense(code: SparseCode, d_sae: int) -> Float[Tensor, "n d_sae"]:
    z = code.values.new_zeros(len(code.offsets) - 1, d_sae)
    z[rows_of(code), code.indices] = code.values
    return z


def rows_of(code: SparseCode) -> Int[Tensor, " nnz"]:
    """The token that each active latent belongs to."""
    counts = code.offsets.diff()
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)


def decode(code: SparseCode, W_dec: Float[Tensor, "d_sae d"]) -> Float[Tensor, "n d"]:
    """sum_i z_i d_i for every token; no bias."""
    return kernels.bag(code.indices, W_dec, code.offsets, code.values)


def concatenate(codes: list[SparseCode]) -> SparseCode:
    """Codes of consecutive tokens as one."""
    if len(codes) == 1:
        return codes[0]
    ends = [code.offsets[1:] for code in codes]
    starts = np.cumsum([0, *(len(code.indices) for code in codes)])
    offsets = [codes[0].offsets[:1], *(e + int(s) for e, s in zip(ends, starts[:-1], strict=True))]
    return SparseCode(
        torch.cat([code.indices for code in codes]),
        torch.cat([code.values for code in codes]),
        torch.cat(offsets),
    )


def take(code: SparseCode, rows: Int[Tensor, " m"]) -> SparseCode:
    """Some tokens, in this order."""
    counts = code.offsets.diff()[rows]
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    shift = (code.offsets[rows] - offsets[:-1]).repeat_interleave(counts)
    pairs = shift + torch.arange(len(shift), device=shift.device)
    return SparseCode(code.indices[pairs], code.values[pairs], offsets)


def token_chunks(x: Float[Tensor, "n d"], d_sae: int) -> tuple[Tensor, ...]:
    """Some tokens at a time, so that their dense latents stay small whatever the width."""
    rows = _CHUNK // d_sae
    if not x.is_cuda:
        rows = min(rows, max(_ROWS, _CACHED // d_sae))
    return tuple(x.split(max(1, rows)))


@runtime_checkable
class Selection(Protocol):
    """Some (token, latent) pairs of a batch, and what training computes on them.

    "Values" are one number for each pair, in a shape of the selection's own; elementwise operations on them are
    written once and hold for every form.
    """

    def pre(
        self,
        x: Float[Tensor, "n d"],
        encoder: Float[Tensor, "d_sae d"],
        bias: Float[Tensor, " d_sae"],
    ) -> Tensor:
        """x . e_i + b_i at the pairs, with gradients to encoder and bias (none to x)."""
        ...

    def of_latent(self, vector: Float[Tensor, " d_sae"]) -> Tensor:
        """A number per latent, as values."""
        ...

    def decode(self, values: Tensor, decoder: Float[Tensor, "d_sae d"]) -> Float[Tensor, "n d"]:
        """The sum of values times decoder rows for every token, with gradients to both."""
        ...

    def decode_prefixes(
        self, values: Tensor, decoder: Float[Tensor, "d_sae d"], ends: Int[Tensor, " n_prefixes"]
    ) -> Float[Tensor, "n n_prefixes d"]:
        """The same with the latents below each of the ascending `ends` alone, the last of which is d_sae.

        Every row is added once.
        """
        ...

    def fired(self, values: Tensor) -> Bool[Tensor, " d_sae"]:
        """Which latents have a value above zero for some token."""
        ...

    def l0(self, values: Tensor) -> Float[Tensor, ""]:
        """Values above zero per token."""
        ...


@final
class Everything:
    """All pairs: values are `[n d_sae]`."""

    def __init__(self, pre: Float[Tensor, "n d_sae"]) -> None:
        self._pre = pre

    def pre(self, x: Tensor, encoder: Tensor, bias: Tensor) -> Tensor:
        return _DensePre.apply(x, encoder, bias, self._pre)  # type: ignore[no-any-return]

    def of_latent(self, vector: Tensor) -> Tensor:
        return vector

    def decode(self, values: Tensor, decoder: Tensor) -> Tensor:
        return values @ decoder

    def decode_prefixes(self, values: Tensor, decoder: Tensor, ends: Tensor) -> Tensor:
        starts = [0, *ends.tolist()]
        parts = [values[:, a:b] @ decoder[a:b] for a, b in pairwise(starts)]
        return torch.stack(parts, 1).cumsum(1)

    def fired(self, values: Tensor) -> Tensor:
        return (values > 0).any(0)

    def l0(self, values: Tensor) -> Tensor:
        return (values > 0).sum() / len(values)


@final
class Pairs:
    """Chosen pairs, sorted by token: values are `[nnz]`."""

    def __init__(
        self,
        pre: Float[Tensor, "n d_sae"],
        rows: Int[Tensor, " nnz"],
        columns: Int[Tensor, " nnz"],
    ) -> None:
        self.n, self.d_sae = pre.shape
        self.rows, self.columns = rows, columns
        self.offsets = _offsets(rows, self.n)
        self._values = pre[rows, columns]

    def pre(self, x: Tensor, encoder: Tensor, bias: Tensor) -> Tensor:
        return _PairsPre.apply(x, encoder, bias, self)  # type: ignore[no-any-return]

    def of_latent(self, vector: Tensor) -> Tensor:
        return _Pick.apply(vector, self.columns)  # type: ignore[no-any-return]

    def decode(self, values: Tensor, decoder: Tensor) -> Tensor:
        return _PairsDecode.apply(values, decoder, self, self.rows, self.offsets)  # type: ignore[no-any-return]

    def decode_prefixes(self, values: Tensor, decoder: Tensor, ends: Tensor) -> Tensor:
        n_prefixes = len(ends)
        # Latents ascend within a token, so that tokens and prefixes are already in order.
        rows = self.rows * n_prefixes + torch.bucketize(self.columns, ends, right=True)
        offsets = _offsets(rows, self.n * n_prefixes)
        parts: Tensor = _PairsDecode.apply(values, decoder, self, rows, offsets)
        return parts.view(self.n, n_prefixes, -1).cumsum(1)

    def fired(self, values: Tensor) -> Tensor:
        fired = torch.zeros(self.d_sae, dtype=torch.bool, device=values.device)
        fired[self.columns[values > 0]] = True
        return fired

    def l0(self, values: Tensor) -> Tensor:
        return (values > 0).sum() / self.n

    @cached_property
    def by_latent(self) -> "_ByLatent":
        columns, order = torch.sort(self.columns, stable=True)
        return _ByLatent(order, _offsets(columns, self.d_sae))

    def onto_latents(
        self, values: Tensor, x: Float[Tensor, "m d"], rows: Int[Tensor, " nnz"]
    ) -> Float[Tensor, "d_sae d"]:
        """For each latent the sum of values times the rows of x that its pairs name."""
        order, offsets = self.by_latent
        return kernels.bag(rows[order], x, offsets, values[order])


class _ByLatent(NamedTuple):
    order: Tensor
    offsets: Tensor


def select(pre: Float[Tensor, "n d_sae"], mask: Bool[Tensor, "n d_sae"]) -> Everything | Pairs:
    """The pairs of a mask, or all pairs where the mask is too dense for sparse products to pay."""
    rows, columns = nonzero(mask)
    if len(rows) > DENSE_ABOVE * mask.numel():
        return Everything(pre)
    return Pairs(pre, rows, columns)


def top_per_token(pre: Float[Tensor, "n d_sae"], k: int) -> Pairs:
    """The k largest latents of every token."""
    columns = pre.topk(k, dim=-1, sorted=False).indices
    rows = torch.arange(len(pre), device=pre.device).repeat_interleave(k)
    return Pairs(pre, rows, columns.flatten())


def top_of_batch(
    pre: Float[Tensor, "n d_sae"], count: int, guess: Float[Tensor, ""]
) -> tuple[Pairs, Float[Tensor, ""]]:
    """The `count` largest positive pairs of the whole batch, and the smallest value among them.

    Exact for any guess, and quick where `guess` is a little below the answer: only the entries above it are sorted.
    """
    rows, columns = nonzero(pre > guess.clamp_min(0))
    if len(rows) < count and guess > 0:
        rows, columns = nonzero(pre > 0)
    values = pre[rows, columns]
    if len(values) > count:
        kept = values.topk(count, sorted=False).indices.sort().values
        rows, columns, values = rows[kept], columns[kept], values[kept]
    return Pairs(pre, rows, columns), values.min() if len(values) else guess


def nonzero(mask: Bool[Tensor, "n d_sae"]) -> tuple[Int[Tensor, " nnz"], Int[Tensor, " nnz"]]:
    """Rows and columns of what is true, row after row."""
    if mask.device.type == "cpu":  # NumPy's search is several times faster than torch's here
        flat = torch.from_numpy(np.flatnonzero(mask.numpy()))
        return flat // mask.shape[1], flat % mask.shape[1]
    rows, columns = mask.nonzero(as_tuple=True)
    return rows, columns


def _offsets(ascending: Int[Tensor, " nnz"], n: int) -> Int[Tensor, " n_plus_1"]:
    """Where each of 0 to n - 1 begins, and the end. A search, unlike a histogram, keeps no GPU waiting."""
    return torch.searchsorted(ascending, torch.arange(n + 1, device=ascending.device))


class _DensePre(torch.autograd.Function):
    """Hands on the product that the selection was made from, so that it is computed once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, encoder: Tensor, bias: Tensor, pre: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return pre.view_as(pre)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return None, grad.T @ x.to(grad.dtype), grad.sum(0), None


class _PairsPre(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, encoder: Tensor, bias: Tensor, pairs: Pairs) -> Tensor:
        ctx.save_for_backward(x)
        ctx.pairs = pairs
        return pairs._values.view_as(pairs._values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        pairs: Pairs = ctx.pairs
        return (
            None,
            pairs.onto_latents(grad, x, pairs.rows),
            _sum_by(pairs.columns, grad, pairs.d_sae),
            None,
        )


class _Pick(torch.autograd.Function):
    """vector[columns], whose gradient is a histogram rather than an indexed addition."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(columns)
        ctx.d_sae = len(vector)
        return vector[columns]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (columns,) = ctx.saved_tensors
        return _sum_by(columns, grad, ctx.d_sae), None


class _PairsDecode(torch.autograd.Function):
    """Pair i adds to the row rows[i] of the result; the offsets say where the pairs of each row begin."""

    @staticmethod
    def forward(  # noqa: PLR0913  (autograd hands on one argument for each input)
        ctx: Any, values: Tensor, decoder: Tensor, pairs: Pairs, rows: Tensor, offsets: Tensor
    ) -> Tensor:
        ctx.pairs, ctx.rows = pairs, rows
        if kernels.available(decoder):
            ctx.save_for_backward(decoder)
            ctx.values, ctx.out = values.detach(), None
            return kernels.bag(pairs.columns, decoder, offsets, values)
        with torch.enable_grad():  # embedding_bag's own gradient with respect to the values
            ctx.values = values.detach().requires_grad_()
            ctx.out = kernels.bag(pairs.columns, decoder.detach(), offsets, ctx.values)
        return ctx.out.detach()  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        to_values, to_decoder = None, None
        if ctx.needs_input_grad[0] and ctx.out is None:
            (decoder,) = ctx.saved_tensors
            to_values = kernels.pair_dots(ctx.rows, ctx.pairs.columns, grad, decoder)
        elif ctx.needs_input_grad[0]:
            (to_values,) = torch.autograd.grad(ctx.out, ctx.values, grad)
        if ctx.needs_input_grad[1]:
            to_decoder = ctx.pairs.onto_latents(ctx.values.detach(), grad, ctx.rows)
        return to_values, to_decoder, None, None, None


def _sum_by(columns: Tensor, values: Tensor, d_sae: int) -> Tensor:
    if columns.is_cuda:  # a histogram would wait for the largest number
        return values.new_zeros(d_sae).index_add_(0, columns, values)
    return torch.bincount(columns, weights=values, minlength=d_sae).to(values.dtype)
