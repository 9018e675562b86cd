"""The few operations that make sparse training fast, each on the CPU and on a GPU.

bag         out_j = sum_{p of bag j} w_p table[i_p]      decoding, and gradients onto latents
pair_dots   out_p = a[r_p] . b[c_p]                      the gradient of decoding with respect to the values

On a GPU they are kernels in Triton, which is imported at the first use; without Triton, and on a CPU, they are
calls of PyTorch with the same results. Sums are taken in float32 whatever the type of the tables (in float64 for
float64), and rounded once, to the type to which PyTorch promotes the inputs. The kernels are tested under Triton's
interpreter.
"""

import os
from functools import cache
from importlib.util import find_spec

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

_CHUNK = 2**22
"""Elements of gathered rows that are held at a time."""
_CAPABILITY = (8, 0)
"""Of the oldest GPU of NVIDIA that Triton supports."""


def available(tensor: Tensor) -> bool:
    """Whether Triton can work on this tensor: on a GPU, or where its interpreter is asked for, anywhere."""
    if tensor.is_cuda:
        return _has_triton() and _supported(tensor.get_device())
    return os.environ.get("TRITON_INTERPRET") == "1" and _has_triton()


def bag(
    indices: Int[Tensor, " nnz"],
    table: Float[Tensor, "rows d"],
    offsets: Int[Tensor, " bags_plus_1"],
    weights: Float[Tensor, " nnz"],
) -> Float[Tensor, "bags d"]:
    """Sums of weighted rows of the table. Bag j has the pairs from offsets[j] up to offsets[j + 1].

    Where a gradient is recorded this is `embedding_bag`, with its own.
    """
    recorded = torch.is_grad_enabled() and (table.requires_grad or weights.requires_grad)
    if available(table) and not recorded:
        from saebench import _triton

        return _triton.bag(indices, table, offsets, weights)
    kept = torch.promote_types(table.dtype, weights.dtype)
    return embedding_bag(
        indices,
        table.to(kept),
        offsets,
        mode="sum",
        per_sample_weights=weights.to(kept),
        include_last_offset=True,
    )


@torch.no_grad()
def pair_dots(
    rows: Int[Tensor, " nnz"],
    columns: Int[Tensor, " nnz"],
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "m d"],
) -> Float[Tensor, " nnz"]:
    """For each pair the dot product of a row of `a` and a row of `b`; no gradient."""
    if available(a):
        from saebench import _triton

        return _triton.pair_dots(rows, columns, a, b)
    kept = torch.promote_types(a.dtype, b.dtype)
    summed = torch.promote_types(kept, torch.float32)
    size = max(1, _CHUNK // max(1, a.shape[1]))
    chunks = zip(rows.split(size), columns.split(size), strict=True)
    dots = [torch.linalg.vecdot(a[r].to(summed), b[c].to(summed)) for r, c in chunks]
    return torch.cat(dots).to(kept)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def _supported(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= _CAPABILITY
