"""Every test here runs twice: on the PyTorch path, and in another process on the kernels, under Triton's interpreter.

On a machine with a GPU the kernels also run there, compiled. Triton reads TRITON_INTERPRET when it is imported, so
that one process cannot do both.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from saebench import kernels, sparse

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cuda"] if torch.cuda.is_available() and not INTERPRETED else []
# The interpreter cuts off what does not fit into bfloat16, where the compiled kernels round to the nearest.
BFLOAT16 = 2.0**-7 if INTERPRETED else 2.0**-8
NEAR = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: BFLOAT16}
"""Largest error of one sum, as a share of the sum of absolute values."""
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(params=["cpu", *DEVICES])
def device(request):
    return request.param


def normal(*shape, seed=0, dtype=torch.float32, device="cpu"):
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(device, dtype)


def integers(below, count, seed=0, device="cpu"):
    drawn = torch.randint(0, below, (count,), generator=torch.Generator().manual_seed(seed))
    return drawn.to(device)


def exact(tensor):
    return tensor.detach().cpu().double().numpy()


# Where they run


def test_triton_is_used_on_a_gpu_or_where_its_interpreter_is_asked_for(device):
    installed = find_spec("triton") is not None
    expected = installed and (INTERPRETED or device == "cuda")
    assert kernels.available(torch.zeros(1, device=device)) == expected


@needs_triton
def test_the_tests_are_about_the_kernels_where_there_are_any(device, monkeypatch):
    from saebench import _triton

    used = []
    for name in ("bag", "pair_dots"):
        monkeypatch.setattr(_triton, name, lambda *_, name=name, **__: used.append(name))
    if not kernels.available(torch.zeros(1, device=device)):
        pytest.skip("neither a GPU nor the interpreter")
    x, pairs = torch.ones(2, 2, device=device), torch.tensor([0, 1], device=device)
    for call in (
        lambda: kernels.bag(pairs, x, pairs, x[0]),
        lambda: kernels.pair_dots(pairs, pairs, x, x),
    ):
        with pytest.raises(TypeError):  # None is not a tensor, say the checks of signatures
            call()
    assert used == ["bag", "pair_dots"]


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the other process")
def test_all_of_this_and_sparse_training_hold_under_the_interpreter_too():
    here = Path(__file__)
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(here), str(here.with_name("test_sparse.py"))],
        cwd=here.parents[1],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


@pytest.mark.skipif(INTERPRETED, reason="this is the other process")
def test_triton_code_is_not_imported_before_it_is_needed():
    code = (
        "import sys, torch; from saebench import kernels;"
        "one = torch.ones(1, 1);"
        "kernels.bag(torch.tensor([0]), one, torch.tensor([0, 1]), one[0]);"
        "print('saebench._triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_kernel_compiles_for_gpus_that_are_not_here(capability, dtype, tmp_path, monkeypatch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from saebench import _triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tables = {"table", "a", "b"}
    positions = {"indices", "offsets", "rows", "columns"}
    constants = {"ROWS": 16, "COLUMNS": 128, "SUM": triton.language.float32}
    types = (
        dict.fromkeys(tables, f"*{dtype}")
        | dict.fromkeys(positions, "*i64")
        | dict.fromkeys(constants, "constexpr")
        | {"d": "i32", "nnz": "i32"}
    )
    for kernel in (_triton.bag_kernel, _triton.pair_dots_kernel):
        names = [parameter.name for parameter in kernel.params]
        source = ASTSource(
            fn=kernel,
            signature={name: types.get(name, "*fp32") for name in names},
            constexprs={(i,): constants[name] for i, name in enumerate(names) if name in constants},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert kernel.__name__ in compiled.asm["ptx"]


# Bags

SIZES = {
    "empty bags": [0, 3, 0, 0, 5, 1, 0],
    "one bag": [40],
    "a long bag among short ones": [2, 700, 1, 0, 17],
    "bags as long as a block": [16, 16, 32, 15, 17],
    "nothing at all": [0, 0, 0],
}


def some_bags(sizes, n=11, device="cpu", dtype=torch.float32):
    offsets = torch.tensor([0, *np.cumsum(sizes)], device=device)
    nnz = sum(sizes)
    return integers(n, nnz, device=device), offsets, normal(nnz, seed=1, dtype=dtype, device=device)


def looped_bags(indices, table, offsets, weights):
    """In float64, pair by pair; and the same of absolute values."""
    ends, table, weights = offsets.tolist(), exact(table), exact(weights)
    sums = np.zeros((2, len(ends) - 1, table.shape[1]))
    for j in range(len(ends) - 1):
        for p in range(ends[j], ends[j + 1]):
            term = weights[p] * table[indices[p]]
            sums[:, j] += term, abs(term)
    return sums


def assert_near(found, expected, size, near):
    assert found.shape == expected.shape
    assert (abs(exact(found) - expected) <= near * size).all()


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("d", [1, 64, 133])
@pytest.mark.parametrize("dtype", NEAR, ids=str)
def test_a_bag_is_its_weighted_rows_added_up(sizes, d, dtype, device):
    indices, offsets, weights = some_bags(sizes, device=device, dtype=dtype)
    table = normal(11, d, seed=2, dtype=dtype, device=device)
    found = kernels.bag(indices, table, offsets, weights)
    assert found.dtype == dtype
    assert_near(found, *looped_bags(indices, table, offsets, weights), NEAR[dtype])


def test_sums_of_bfloat16_rows_with_float32_weights_are_float32(device):
    indices, offsets, weights = some_bags([3, 4100, 0, 1], device=device)
    table = normal(11, 20, seed=2, dtype=torch.bfloat16, device=device)
    found = kernels.bag(indices, table, offsets, weights)
    assert found.dtype == torch.float32
    assert_near(found, *looped_bags(indices, table, offsets, weights), 1e-6)


def test_many_small_terms_in_bfloat16_are_not_lost(device):
    """In bfloat16 itself 256 + 1 = 256."""
    ones = torch.ones(4096, dtype=torch.bfloat16, device=device)
    indices, offsets = torch.zeros_like(ones, dtype=torch.int64), torch.tensor([0, 4096])
    found = kernels.bag(indices, ones[:3, None], offsets.to(device), ones)
    assert found.tolist() == [[4096.0]]
    assert kernels.pair_dots(indices[:1], indices[:1], ones[None], ones[None]).tolist() == [4096.0]


def test_bags_of_no_tokens_are_no_rows(device):
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    table, weights = normal(3, 4, device=device), torch.zeros(0, device=device)
    assert kernels.bag(nothing, table, torch.tensor([0], device=device), weights).shape == (0, 4)


def test_bags_of_views_are_those_of_copies(device):
    indices, offsets, weights = some_bags([3, 0, 6], device=device)
    wide = normal(20, 22, seed=2, device=device)
    every_second = torch.stack([indices, indices], 1).flatten()[::2]
    found = kernels.bag(every_second, wide.T[::2], offsets, torch.stack([weights] * 2, 1)[:, 1])
    expected = kernels.bag(indices, wide.T[::2].contiguous(), offsets, weights)
    torch.testing.assert_close(found, expected)


def test_the_same_bags_give_the_same_bits(device):
    indices, offsets, weights = some_bags([3, 0, 600], device=device)
    table = normal(11, 200, seed=2, device=device)
    first, second = (kernels.bag(indices, table, offsets, weights) for _ in range(2))
    assert torch.equal(first, second)


def test_a_bag_still_has_gradients_where_they_are_recorded(device):
    indices, offsets, weights = some_bags([3, 0, 6], device=device)
    table = normal(11, 5, seed=2, device=device)
    weights.requires_grad_()
    kernels.bag(indices, table, offsets, weights).sum().backward()
    np.testing.assert_allclose(exact(weights.grad), exact(table[indices]).sum(1), rtol=1e-5)


# Dot products of pairs


@pytest.mark.parametrize("nnz", [0, 1, 16, 50])
@pytest.mark.parametrize("d", [1, 64, 133, 300])
@pytest.mark.parametrize("dtype", NEAR, ids=str)
def test_a_pair_dot_is_that_of_two_rows(nnz, d, dtype, device):
    rows, columns = integers(5, nnz, device=device), integers(9, nnz, seed=1, device=device)
    a = normal(5, d, seed=2, dtype=dtype, device=device)
    b = normal(9, d, seed=3, dtype=dtype, device=device)
    found = kernels.pair_dots(rows, columns, a, b)
    products = exact(a)[rows.tolist()] * exact(b)[columns.tolist()]
    assert found.dtype == dtype
    assert_near(found, products.sum(1), abs(products).sum(1), NEAR[dtype])


def test_chunks_of_pairs_do_not_matter(device, monkeypatch):
    rows, columns = integers(5, 50, device=device), integers(9, 50, seed=1, device=device)
    a, b = normal(5, 7, device=device), normal(9, 7, seed=1, device=device)
    whole = kernels.pair_dots(rows, columns, a, b)
    monkeypatch.setattr(kernels, "_CHUNK", 40)
    torch.testing.assert_close(kernels.pair_dots(rows, columns, a, b), whole)


def test_pair_dots_of_a_repeated_row_need_no_copy_by_the_caller(device):
    """The gradient of a plain sum is one number, expanded."""
    rows, columns = integers(5, 20, device=device), integers(9, 20, seed=1, device=device)
    b = normal(9, 6, device=device)
    found = kernels.pair_dots(rows, columns, torch.ones((), device=device).expand(5, 6), b)
    np.testing.assert_allclose(
        exact(found), exact(b).sum(1)[columns.tolist()], rtol=1e-5, atol=1e-6
    )


# A whole sparse decoder

N, WIDTH, D = 9, 30, 21


def decoded(x, encoder, decoder, bias, device):
    """x_hat and the gradients of some loss, through `Pairs`."""
    pre = (x @ encoder.T + bias).detach()
    rows, columns = (pre > 0.5).nonzero(as_tuple=True)
    chosen = sparse.Pairs(pre, rows, columns)
    x_hat = chosen.decode(chosen.pre(x, encoder, bias), decoder)
    return x_hat, loss_gradients(x_hat, encoder, decoder, bias)


def loss_gradients(x_hat, *parameters):
    weight = normal(N, D, seed=6, device=x_hat.device).to(x_hat.dtype)
    loss = (weight * x_hat).sum() + x_hat.square().sum()
    return torch.autograd.grad(loss, parameters)


def test_sparse_decoding_has_the_gradients_of_the_path_of_the_cpu_and_of_dense_autograd(
    device, monkeypatch
):
    x = normal(N, D, device=device)
    shapes = ((WIDTH, D), (WIDTH, D), (WIDTH,))
    parameters = [
        normal(*shape, seed=seed, device=device).div(4).requires_grad_()
        for seed, shape in enumerate(shapes, 1)
    ]
    x_hat, gradients = decoded(x, *parameters, device)

    monkeypatch.setattr(kernels, "available", lambda tensor: False)
    x_hat_cpu, gradients_cpu = decoded(x, *parameters, device)
    torch.testing.assert_close(x_hat, x_hat_cpu, rtol=1e-5, atol=1e-6)
    for found, expected in zip(gradients, gradients_cpu, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    encoder, decoder, bias = (p.detach().double().requires_grad_() for p in parameters)
    pre = x.double() @ encoder.T + bias
    dense = torch.where(pre > 0.5, pre, 0) @ decoder
    dense_gradients = loss_gradients(dense, encoder, decoder, bias)
    for found, expected in zip(gradients, dense_gradients, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_decoder_in_bfloat16_gets_a_gradient_in_bfloat16(device):
    x, decoder = normal(N, D, device=device), normal(WIDTH, D, seed=2, dtype=torch.bfloat16)
    decoder = decoder.to(device).requires_grad_()
    pre = normal(N, WIDTH, seed=3, device=device)
    chosen = sparse.Pairs(pre, *(pre > 1).nonzero(as_tuple=True))
    values = pre[chosen.rows, chosen.columns].requires_grad_()
    x_hat = chosen.decode(values, decoder)
    to_values, to_decoder = torch.autograd.grad(((x - x_hat) ** 2).sum(), [values, decoder])
    error = exact(2 * (x_hat - x))
    dense = np.zeros((N, WIDTH))
    dense[chosen.rows.tolist(), chosen.columns.tolist()] = exact(values)
    assert to_decoder.dtype == torch.bfloat16 and to_values.dtype == torch.float32
    assert_near(to_decoder, dense.T @ error, abs(dense).T @ abs(error), BFLOAT16)
    dots = (error @ exact(decoder).T)[chosen.rows.tolist(), chosen.columns.tolist()]
    np.testing.assert_allclose(exact(to_values), dots, rtol=1e-4, atol=1e-4)
