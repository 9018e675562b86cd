"""Sparse codes, and selections of pairs against plain dense autograd."""

import hypothesis.extra.numpy as st_numpy
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench import sparse

N, WIDTH, D = 13, 20, 5


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some_latents(n=N, width=WIDTH, share=0.2, seed=0):
    z = normal(n, width, seed=seed)
    z[normal(n, width, seed=seed + 1) > np.sqrt(2) * share - 1] = 0
    z[3] = 0  # a token without any latent
    return z


# Codes


def test_a_code_holds_ascending_latents_and_no_zeros():
    z = some_latents()
    code = sparse.from_dense(z)
    for i, row in enumerate(z.tolist()):
        own = slice(code.offsets[i], code.offsets[i + 1])
        assert code.indices[own].tolist() == [j for j, value in enumerate(row) if value != 0]
        assert code.values[own].tolist() == [value for value in row if value != 0]
    assert len(code.offsets) == N + 1


def test_a_code_gives_back_the_dense_latents():
    z = some_latents()
    assert torch.equal(sparse.to_dense(sparse.from_dense(z), WIDTH), z)


def test_negative_latents_are_kept():
    assert sparse.from_dense(torch.tensor([[0.0, -2.0]])).values.tolist() == [-2.0]


def test_rows_name_the_token_of_every_latent():
    z = torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.0, 3.0]])
    assert sparse.rows_of(sparse.from_dense(z)).tolist() == [0, 0, 2]


def test_decoding_is_the_dense_product():
    z, W_dec = some_latents(), normal(WIDTH, D, seed=5)
    found = sparse.decode(sparse.from_dense(z), W_dec)
    np.testing.assert_allclose(found, z.numpy() @ W_dec.numpy(), atol=1e-14)
    assert found[3].tolist() == [0] * D


def test_nothing_active_decodes_to_zeros():
    code = sparse.from_dense(torch.zeros(4, WIDTH))
    assert torch.equal(sparse.decode(code, torch.ones(WIDTH, D)), torch.zeros(4, D))


def test_no_tokens_are_a_code_too():
    code = sparse.from_dense(torch.zeros(0, WIDTH))
    assert len(code.indices) == 0 and code.offsets.tolist() == [0]


@pytest.mark.parametrize("sizes", [[13], [1] * 13, [4, 0, 9], [3, 1, 5, 4]])
def test_codes_of_consecutive_tokens_join(sizes):
    z = some_latents()
    joined = sparse.concatenate([sparse.from_dense(part) for part in z.split(sizes)])
    for found, expected in zip(joined, sparse.from_dense(z), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("d_sae", [1, 512, 2**20, 2**26])
def test_chunks_of_tokens_have_small_dense_latents_whatever_the_width(d_sae):
    x = torch.arange(600.0).reshape(300, 2)
    chunks = sparse.token_chunks(x, d_sae)
    assert torch.equal(torch.cat(chunks), x)
    assert all(len(chunk) == 1 or len(chunk) * d_sae <= 2**25 for chunk in chunks)


# Selections


def everything(pre, mask):
    return sparse.Everything(pre)


def pairs(pre, mask):
    return sparse.Pairs(pre, *mask.nonzero(as_tuple=True))


class Parts:
    """Parameters of a small SAE, each a leaf."""

    def __init__(self, dtype):
        self.x = normal(N, D, seed=1, dtype=dtype)
        self.encoder, self.decoder = normal(WIDTH, D, seed=2), normal(WIDTH, D, seed=3)
        self.bias, self.scale = normal(WIDTH, seed=4) - 1, normal(WIDTH, seed=5)
        self.names = ("encoder", "decoder", "bias", "scale")
        for name in self.names:
            setattr(self, name, getattr(self, name).to(dtype).requires_grad_())

    def dense_pre(self):
        return self.x @ self.encoder.T + self.bias

    def gradients(self, x_hat, values):
        """Of some loss that weighs every output differently."""
        weight = normal(N, D, seed=6, dtype=self.x.dtype)
        loss = (weight * x_hat).sum() + x_hat.square().sum() + values.square().sum()
        return torch.autograd.grad(loss, [getattr(self, name) for name in self.names])


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("form", [everything, pairs])
def test_a_selection_has_the_gradients_of_plain_autograd(form, dtype, near):
    parts = Parts(dtype)
    pre = parts.dense_pre()
    f = (pre * parts.scale.exp()).relu()
    expected = parts.gradients(f @ parts.decoder, f)

    dense = pre.detach()
    chosen = form(dense, dense > 0)
    values = chosen.pre(parts.x, parts.encoder, parts.bias)
    values = (values * chosen.of_latent(parts.scale.exp())).relu()
    x_hat = chosen.decode(values, parts.decoder)
    found = parts.gradients(x_hat, values)

    torch.testing.assert_close(x_hat, (f @ parts.decoder).detach(), rtol=near, atol=near)
    for name, a, b in zip(parts.names, found, expected, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < near, name


@pytest.mark.parametrize("form", [everything, pairs])
def test_a_constant_decoder_gets_no_gradient(form):
    parts = Parts(torch.float64)
    dense = parts.dense_pre().detach()
    chosen = form(dense, dense > 0)
    values = chosen.pre(parts.x, parts.encoder, parts.bias).relu()
    chosen.decode(values, parts.decoder.detach()).square().sum().backward()
    assert parts.decoder.grad is None
    assert parts.encoder.grad is not None and parts.encoder.grad.any()


@pytest.mark.parametrize("form", [everything, pairs])
def test_firing_and_l0_count_values_above_zero_only(form):
    pre = torch.tensor([[0.0, -1.0, 2.0], [3.0, 0.0, 1.0]])
    chosen = form(pre, torch.ones(2, 3, dtype=torch.bool))
    values = chosen.pre(torch.zeros(2, 1), torch.zeros(3, 1), torch.zeros(3))
    assert chosen.fired(values).tolist() == [True, False, True]
    assert chosen.l0(values).item() == 1.5


def test_an_empty_selection_has_gradients_of_zero():
    parts = Parts(torch.float64)
    pre = parts.dense_pre().detach()
    chosen = pairs(pre, torch.zeros_like(pre, dtype=torch.bool))
    values = chosen.pre(parts.x, parts.encoder, parts.bias)
    values = values * chosen.of_latent(parts.scale)
    x_hat = chosen.decode(values, parts.decoder)
    assert not x_hat.any() and chosen.l0(values) == 0
    for gradient in parts.gradients(x_hat, values):
        assert not gradient.any()


def test_a_mask_is_sparse_up_to_the_switch_and_dense_above():
    pre = normal(10, 10)
    at = torch.zeros(100, dtype=torch.bool)
    at[: round(sparse.DENSE_ABOVE * 100)] = True
    above = at.clone()
    above[-1] = True
    assert isinstance(sparse.select(pre, at.reshape(10, 10)), sparse.Pairs)
    assert isinstance(sparse.select(pre, above.reshape(10, 10)), sparse.Everything)


def test_both_sides_of_the_switch_give_the_same_result(monkeypatch):
    parts = Parts(torch.float64)
    dense = parts.dense_pre().detach()
    results = []
    for share in (1.0, 0.0):
        monkeypatch.setattr(sparse, "DENSE_ABOVE", share)
        chosen = sparse.select(dense, dense > 0)
        values = chosen.pre(parts.x, parts.encoder, parts.bias).relu()
        x_hat = chosen.decode(values, parts.decoder)
        results.append((chosen, x_hat, chosen.l0(values), chosen.fired(values)))
    (sparse_one, x1, l1, fired1), (dense_one, x2, l2, fired2) = results
    assert isinstance(sparse_one, sparse.Pairs) and isinstance(dense_one, sparse.Everything)
    torch.testing.assert_close(x1, x2, rtol=1e-13, atol=1e-13)
    assert l1 == l2 and torch.equal(fired1, fired2)


PREFIXES = {
    "one": [20],
    "several": [3, 4, 11, 20],
    "empty": [0, 5, 20],
    "the same twice": [4, 4, 13, 13, 20],
}


def by_loop(f, decoder, ends):
    """One decode for each prefix."""
    return torch.stack([f[:, :end] @ decoder[:end] for end in ends], 1)


@pytest.mark.parametrize("ends", PREFIXES.values(), ids=PREFIXES)
@pytest.mark.parametrize("form", [everything, pairs])
def test_prefixes_are_decoded_as_one_by_one(form, ends):
    parts = Parts(torch.float64)
    pre = parts.dense_pre()
    f = (pre * parts.scale.exp()).relu()
    weight = normal(N, len(ends), D, seed=8)

    def gradients(x_hats, values):
        loss = (weight * x_hats).sum() + x_hats.square().sum() + values.square().sum()
        return torch.autograd.grad(loss, [getattr(parts, name) for name in parts.names])

    slow = by_loop(f, parts.decoder, ends)
    expected = gradients(slow, f)

    dense = pre.detach()
    chosen = form(dense, dense > 0)
    values = chosen.pre(parts.x, parts.encoder, parts.bias)
    values = (values * chosen.of_latent(parts.scale.exp())).relu()
    fast = chosen.decode_prefixes(values, parts.decoder, torch.tensor(ends))
    assert fast.shape == (N, len(ends), D)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    for name, a, b in zip(parts.names, gradients(fast, values), expected, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 1e-12, name


@pytest.mark.parametrize("ends", PREFIXES.values(), ids=PREFIXES)
@pytest.mark.parametrize("form", [everything, pairs])
def test_gradients_of_prefixes_are_those_of_small_differences(form, ends):
    dense = Parts(torch.float64).dense_pre().detach()
    chosen = form(dense, dense > 0.5)
    values, decoder = dense if form is everything else dense[dense > 0.5], normal(WIDTH, D, seed=3)
    weight = normal(N, len(ends), D, seed=8)

    def loss(values, decoder):
        parts = chosen.decode_prefixes(values, decoder, torch.tensor(ends))
        return (weight * parts).sum() + parts.square().sum()

    at = [values.clone().requires_grad_(), decoder.clone().requires_grad_()]
    grads = torch.autograd.grad(loss(*at), at)
    for seed in range(3):
        step = [1e-5 * normal(*t.shape, seed=20 + seed) for t in (values, decoder)]
        up, down = (
            loss(values + sign * step[0], decoder + sign * step[1]).item() for sign in (1, -1)
        )
        slope = sum(float((g * s).sum()) for g, s in zip(grads, step, strict=True))
        assert (up - down) / 2 == pytest.approx(slope, rel=1e-6)


def test_the_last_prefix_is_the_whole_reconstruction():
    parts = Parts(torch.float64)
    dense = parts.dense_pre().detach()
    for form in (everything, pairs):
        chosen = form(dense, dense > 0)
        values = chosen.pre(parts.x, parts.encoder, parts.bias).relu()
        last = chosen.decode_prefixes(values, parts.decoder, torch.tensor([5, WIDTH]))[:, -1]
        torch.testing.assert_close(last, chosen.decode(values, parts.decoder))


def test_prefixes_of_nothing_are_zeros():
    dense = torch.zeros(N, WIDTH, dtype=torch.float64)
    decoder = normal(WIDTH, D, seed=3).requires_grad_()
    chosen = pairs(dense, dense > 0)
    values = torch.zeros(0, dtype=torch.float64, requires_grad=True)
    parts = chosen.decode_prefixes(values, decoder, torch.tensor([4, 4, WIDTH]))
    assert parts.shape == (N, 3, D) and not parts.any()
    parts.square().sum().backward()
    assert not decoder.grad.any() and values.grad.shape == (0,)


def test_top_per_token_are_the_largest_of_each_token():
    pre = normal(N, WIDTH)
    chosen = sparse.top_per_token(pre, 3)
    for i, row in enumerate(pre.tolist()):
        own = chosen.columns[chosen.rows == i].tolist()
        assert sorted(own) == sorted(sorted(range(WIDTH), key=lambda j: -row[j])[:3])


COARSE = st.integers(-4, 4).map(float)  # few different values: many ties
FINE = st.floats(-5, 5, width=32)
SHAPE = st.tuples(st.integers(1, 6), st.integers(1, 8))
PRE = st_numpy.arrays(np.float32, SHAPE, elements=st.one_of(COARSE, FINE))


@settings(deadline=None, database=None, max_examples=150)
@given(PRE, st.integers(1, 60), st.floats(-3, 8, width=32))
def test_the_top_of_a_batch_is_that_of_a_full_sort_for_any_guess(pre, count, guess):
    chosen, smallest = sparse.top_of_batch(torch.from_numpy(pre), count, torch.tensor(guess))
    found = pre[chosen.rows.numpy(), chosen.columns.numpy()]
    expected = sorted((v for v in pre.ravel() if v > 0), reverse=True)[:count]
    assert sorted(found, reverse=True) == expected
    assert len(set(zip(chosen.rows.tolist(), chosen.columns.tolist(), strict=True))) == len(found)
    assert chosen.rows.tolist() == sorted(chosen.rows.tolist())
    if expected:
        assert smallest.item() == expected[-1]


@pytest.mark.parametrize(
    ("guess", "sorted_values"),
    [(0.0, [130]), (1.0, [129]), (100.0, [30]), (110.0, []), (111.0, [130])],
)
def test_only_what_is_above_the_guess_is_sorted_for_the_top_of_a_batch(
    guess, sorted_values, monkeypatch
):
    """The 20 largest of the numbers from -129 to 130; too high a guess makes it look at all positive ones."""
    pre, topk, sizes = torch.arange(-129.0, 131).view(N, WIDTH), torch.Tensor.topk, []
    monkeypatch.setattr(
        torch.Tensor, "topk", lambda x, *a, **k: sizes.append(x.numel()) or topk(x, *a, **k)
    )
    chosen, smallest = sparse.top_of_batch(pre, 20, torch.tensor(guess))
    assert (len(chosen.rows), smallest.item()) == (20, 111)
    assert sizes == sorted_values


def test_a_batch_without_anything_positive_has_no_top():
    guess = torch.tensor(0.3)
    chosen, smallest = sparse.top_of_batch(-torch.ones(2, 3), 4, guess)
    assert len(chosen.rows) == 0 and smallest == guess
