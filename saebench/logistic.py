"""L2-regularised logistic regression: many problems at once, each over a grid of C.

w, b = argmin  sum_i log(1 + exp(-t_i (w . x_i + b))) + |w|^2 / (2 C)        t_i = 1 where y_i, otherwise -1

This is the objective of scikit-learn's `LogisticRegression(C=C)`: the sum over examples is not divided by their number,
and the intercept b is not penalised.

fit_few    up to some dozens of features. Newton's method: all problems and all C are one batch.
fit_many   features are sparse rows, of any width. Newton's method with conjugate gradients inside (Lin, Weng and
           Keerthi 2008, https://www.jmlr.org/papers/v9/lin08b.html), along the grid from small C to large, each
           solution the start of the next (Chu et al. 2015, https://doi.org/10.1145/2783258.2783336). No matrix of
           features by features, examples by examples or examples by features is ever made.

Everything is in float64, on the device of the inputs. But for rounding, a solution does not depend
on what else is in the batch.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.linalg import vecdot
from torch.nn.functional import softplus
from torch.nn.utils.rnn import pad_sequence

from saebench.sparse import rows_of
from saebench.types import SparseCode

GRID = tuple(10.0**exponent for exponent in range(-4, 4))
"""Values of C, ascending; sae-probes (Kantamneni et al. 2025, arXiv 2502.16681) has ten from 1e-5 to 1e5."""

_STEPS = 100
"""Of Newton's method, at the most."""
_EXACT = 1e-12
"""It ends after a step whose squared Newton decrement is below this share of the objective ..."""
_NEARLY = 1e-5
"""... or below this one, where conjugate gradients make it inexact."""
_FORCING = 0.2
"""Conjugate gradients end when the residual has fallen to this share ..."""
_INNER_STEPS = 1000
"""... or after so many steps."""
_HALVINGS = 30
_ROUNDING = 1e-12
"""Share by which an objective may rise, because sums are rounded."""
_TINY = 1e-100
_CHUNK = 2**22
"""Numbers that are held at a time to build Hessians."""


class Fit(NamedTuple):
    """Linear functions w . x + b, one for each problem and C."""

    w: Float[Tensor, "problems c features"]
    b: Float[Tensor, "problems c"]


class Labels(NamedTuple):
    """Of the examples of several problems, each padded to the longest."""

    y: Bool[Tensor, "problems n"]
    used: Bool[Tensor, "problems n"]
    """False where there is only padding."""


def padded(labels: Sequence[Bool[Tensor, " _"]]) -> Labels:
    used = [torch.ones_like(y) for y in labels]
    return Labels(pad_sequence(list(labels), True), pad_sequence(used, True))


def auc(
    scores: Float[Tensor, "*batch n"], y: Bool[Tensor, "*batch n"], used: Bool[Tensor, "*batch n"]
) -> Float[Tensor, "*batch"]:
    """P(score of a positive > that of a negative) + P(equal) / 2, which is Mann-Whitney's U / (positives negatives)."""
    positive = y & used
    n_positive, n_negative = positive.sum(-1), (used & ~y).sum(-1)
    assert bool(((n_positive > 0) & (n_negative > 0)).all()), "a problem lacks one of the classes"
    scores = scores.double().masked_fill(~used, torch.inf).contiguous()  # padding ranks last
    ascending = scores.sort(-1).values
    below = torch.searchsorted(ascending, scores)
    not_above = torch.searchsorted(ascending, scores, right=True)
    ranks = (below + not_above + 1).double() / 2
    u = torch.where(positive, ranks, 0.0).sum(-1) - (n_positive * (n_positive + 1)).double() / 2
    return u / (n_positive * n_negative)


def choose(scores: Float[Tensor, "problems c n"], given: Labels) -> Int[Tensor, " problems"]:
    """Which C has the best AUC; of equal ones that with the least log loss; then the first."""
    y, used = (part[:, None].expand(scores.shape) for part in given)
    found = auc(scores, y, used)
    loss = torch.where(used, softplus(scores) - y * scores, 0.0).sum(-1)
    best = found == found.amax(-1, keepdim=True)
    return torch.where(best, loss, torch.inf).argmin(-1)


# A few features


@torch.no_grad()
def fit_few(X: Float[Tensor, "problems n k"], given: Labels, grid: Sequence[float] = GRID) -> Fit:
    size = max(1, _CHUNK // (len(grid) * X.shape[1] * (X.shape[2] + 1)))
    parts = zip(X.split(size), given.y.split(size), given.used.split(size), strict=True)
    fits = [_newton(x.double(), Labels(y, used), grid) for x, y, used in parts]
    return Fit(torch.cat([fit.w for fit in fits]), torch.cat([fit.b for fit in fits]))


def _newton(X: Float[Tensor, "problems n k"], given: Labels, grid: Sequence[float]) -> Fit:
    """The intercept is the last of k + 1 coordinates."""
    X = torch.where(given.used[..., None], torch.cat([X, torch.ones_like(X[..., :1])], -1), 0.0)
    y, weight = given.y[:, None].double(), given.used[:, None].double()
    ridge = X.new_tensor([[1 / C] * (X.shape[2] - 1) + [0.0] for C in grid])
    w, f = X.new_zeros(len(X), *ridge.shape), X.new_zeros(len(X), len(grid), X.shape[1])
    active = torch.ones(w.shape[:2], dtype=torch.bool, device=X.device)

    def objective(w: Tensor, f: Tensor) -> Tensor:
        return (weight * (softplus(f) - y * f)).sum(-1) + (ridge * w * w).sum(-1) / 2

    for _ in range(_STEPS):
        p = f.sigmoid()
        gradient = (weight * (p - y)) @ X + ridge * w
        dw = _solved(X, weight * p * (1 - p), ridge, gradient)
        share = _share(objective, (w, f), (dw, dw @ X.mT), active)
        w, f = w + share * dw, f + share * (dw @ X.mT)
        active = active & (-vecdot(gradient, dw) > _EXACT * objective(w, f))
        if not active.any():
            break
    return Fit(w[..., :-1], w[..., -1])


def _solved(
    X: Float[Tensor, "problems n k"],
    curvature: Float[Tensor, "problems c n"],
    ridge: Float[Tensor, "c k"],
    gradient: Float[Tensor, "problems c k"],
) -> Float[Tensor, "problems c k"]:
    """Newton's step: -(X^T D X + ridge)^-1 gradient."""
    hessian = (curvature[:, :, None] * X.mT[:, None]) @ X[:, None] + torch.diag_embed(ridge)
    # Examples that are all far from the border leave nothing to find the intercept with.
    hessian[..., -1, -1] += _TINY
    step: Tensor = torch.linalg.solve(hessian, -gradient)
    return step


def _share(
    objective: Callable[[Tensor, Tensor], Tensor],
    at: tuple[Tensor, Tensor],
    step: tuple[Tensor, Tensor],
    active: Bool[Tensor, "*batch"],
) -> Float[Tensor, "*batch 1"]:
    """How much of a step is taken: all of it, halved until the objective does not rise; nothing where not active."""
    (w, f), (dw, df) = at, step
    before = objective(w, f)
    allowed = before + _ROUNDING * before.abs()
    share = active.to(w.dtype)
    for _ in range(_HALVINGS):
        rises = objective(w + share[..., None] * dw, f + share[..., None] * df) > allowed
        if not rises.any():
            break
        share = torch.where(rises, share / 2, share)
    return share[..., None]


# Many sparse features. From here on the intercept is the last coordinate of every vector of features.


@torch.no_grad()
def fit_many(
    codes: Sequence[SparseCode], n_features: int, given: Labels, grid: Sequence[float] = GRID
) -> Fit:
    """One problem for each code; its rows are the examples, as many as are used.

    Problems do not wait for each other: in each step some are at a conjugate gradient, others at a new gradient.
    """
    with _one_thread():
        return _path(codes, n_features, given, grid)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Thousands of products of some microseconds each: several threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _path(
    codes: Sequence[SparseCode], n_features: int, given: Labels, grid: Sequence[float]
) -> Fit:
    rows = [_Rows.of(code, n_features) for code in codes]
    C = torch.tensor(grid, dtype=torch.float64, device=given.y.device)
    fit = Fit(C.new_zeros(len(rows), len(grid), n_features), C.new_zeros(len(rows), len(grid)))
    design, state = _Design(rows, given.y.shape[1]), _State.start(rows, given)
    while True:
        _advance(state, design, C, fit)
        left = state.stage < len(grid)
        if not left.any():
            return fit
        # Those that take longest need not carry the others.
        if 4 * int(left.sum()) <= 3 * len(left):
            state = state.only(left)
            design = _Design([rows[i] for i in state.problem.tolist()], given.y.shape[1])


class _Rows(NamedTuple):
    """The examples of one problem."""

    code: SparseCode
    by_feature: SparseCode
    """The same with rows and columns exchanged."""
    mean: Float[Tensor, " features"]
    squares: Float[Tensor, " n"]
    """|x_i - mean|^2"""

    @staticmethod
    def of(code: SparseCode, n_features: int) -> "_Rows":
        n, rows, values = len(code.offsets) - 1, rows_of(code), code.values.double()
        columns, order = torch.sort(code.indices, stable=True)
        starts = torch.searchsorted(columns, torch.arange(n_features + 1, device=columns.device))
        mean = torch.bincount(code.indices, values, n_features).double() / n  # float32, if empty
        squares = torch.bincount(rows, values * (values - 2 * mean[code.indices]), n).double()
        return _Rows(
            SparseCode(code.indices, values, code.offsets),
            SparseCode(rows[order], values[order], starts),
            mean,
            squares + mean.square().sum(),
        )


@final
class _Design:
    """x_ij - mean_j of several problems, and a 1. The mean is taken off the results of sparse products.

    Centring changes nothing but the intercept, and conjugate gradients need a third fewer steps.
    """

    def __init__(self, rows: Sequence[_Rows], n: int) -> None:
        self.mean = torch.stack([r.mean for r in rows])
        n_features = self.mean.shape[1]
        self._matrix = _diagonal([r.code for r in rows], n, n_features)
        self._transposed = _diagonal([r.by_feature for r in rows], n_features, n)

    def times(self, w: Float[Tensor, "t features_plus_1"]) -> Float[Tensor, "t n"]:
        w, b = w[:, :-1], w[:, -1]
        products = (self._matrix @ w.flatten()).view(len(w), -1)
        return products.add_((b - vecdot(self.mean, w))[:, None])

    def transposed_times(self, u: Float[Tensor, "t n"]) -> Float[Tensor, "t features_plus_1"]:
        products = (self._transposed @ u.flatten()).view(len(u), -1)
        total = u.sum(1, keepdim=True)
        return torch.cat([products.addcmul_(self.mean, total, value=-1), total], 1)


def _diagonal(parts: Sequence[SparseCode], n_rows: int, n_columns: int) -> Tensor:
    """One sparse matrix with all parts along its diagonal, each padded to so many rows."""
    offsets, start = [], 0
    for part in parts:
        ends = part.offsets[1:] + start
        start += len(part.indices)
        offsets.append(torch.nn.functional.pad(ends, (0, n_rows - len(ends)), value=start))
    columns = [part.indices + i * n_columns for i, part in enumerate(parts)]
    first = offsets[0].new_zeros(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(
            torch.cat([first, *offsets]).int(),  # MKL would convert longer ones in every product
            torch.cat(columns).int(),
            torch.cat([part.values for part in parts]),
            (len(parts) * n_rows, len(parts) * n_columns),
            check_invariants=False,
        )


@dataclass
class _State:
    """Where each of t problems stands."""

    problem: Int[Tensor, " t"]
    y: Float[Tensor, "t n"]
    weight: Float[Tensor, "t n"]
    squares: Float[Tensor, "t n"]

    stage: Int[Tensor, " t"]
    """Which C of the grid; their number, where all are done."""
    steps: Int[Tensor, " t"]
    """Of Newton's method, with this C."""
    w: Float[Tensor, "t features_plus_1"]
    f: Float[Tensor, "t n"]
    """What the linear function gives."""
    slope: Float[Tensor, "t n"]
    """Derivative of the log loss in f, and the second one."""
    curvature: Float[Tensor, "t n"]

    fresh: Bool[Tensor, " t"]
    """Whether the gradient at w is still to be computed."""
    inner_steps: Int[Tensor, " t"]
    """Of conjugate gradients, towards Newton's step."""
    dw: Float[Tensor, "t features_plus_1"]
    df: Float[Tensor, "t n"]
    residual: Float[Tensor, "t features_plus_1"]
    direction: Float[Tensor, "t features_plus_1"]
    scale: Float[Tensor, "t features_plus_1"]
    """The preconditioner: one number for all features, another for the intercept."""
    size: Float[Tensor, " t"]
    """residual^2 / scale, and what it is to fall to."""
    goal: Float[Tensor, " t"]
    decrement: Float[Tensor, " t"]
    """Newton's, squared."""

    @staticmethod
    def start(rows: Sequence[_Rows], given: Labels) -> "_State":
        y, weight = given.y.double(), given.used.double()
        vector, number = y.new_zeros(len(y), len(rows[0].mean) + 1), y.new_zeros(len(y))
        count = number.long()
        return _State(
            problem=torch.arange(len(y), device=y.device),
            y=y,
            weight=weight,
            squares=pad_sequence([r.squares for r in rows], True),
            stage=count.clone(),
            steps=count.clone(),
            w=vector.clone(),
            f=torch.zeros_like(y),
            slope=weight * (0.5 - y),
            curvature=weight / 4,
            fresh=torch.ones_like(count, dtype=torch.bool),
            inner_steps=count.clone(),
            dw=vector.clone(),
            df=torch.zeros_like(y),
            residual=vector.clone(),
            direction=vector.clone(),
            scale=torch.ones_like(vector),
            size=number.clone(),
            goal=number.clone(),
            decrement=number.clone(),
        )

    def only(self, left: Bool[Tensor, " t"]) -> "_State":
        return _State(**{field.name: getattr(self, field.name)[left] for field in fields(self)})


def _advance(s: _State, design: _Design, C: Float[Tensor, " c"], fit: Fit) -> None:
    """One product with the features and one with their transpose, for every problem."""
    penalty = 1 / C[s.stage.clamp(max=len(C) - 1)]
    along = design.times(s.direction)
    back = design.transposed_times(torch.where(s.fresh[:, None], s.slope, s.curvature.mul(along)))
    inner = ~s.fresh & (s.stage < len(C))
    _conjugate(s, inner, along, back + _penalised(s.direction, penalty))
    ended = inner & ((s.size <= s.goal) | (s.inner_steps >= _INNER_STEPS))
    (fresh,), (ended,) = s.fresh.nonzero(as_tuple=True), ended.nonzero(as_tuple=True)
    if len(fresh):
        _begin(s, fresh, back[fresh], penalty[fresh])
    if len(ended):
        _step(s, ended, penalty[ended])
        _finish(s, ended, penalty[ended], design.mean, fit)


def _penalised(w: Float[Tensor, "t k"], penalty: Float[Tensor, " t"]) -> Float[Tensor, "t k"]:
    product = w * penalty[:, None]
    product[:, -1] = 0
    return product


def _conjugate(
    s: _State,
    inner: Bool[Tensor, " t"],
    along: Float[Tensor, "t n"],
    product: Float[Tensor, "t k"],
) -> None:
    """One step along the direction, of which `product` is that with the Hessian; nothing where not `inner`."""
    bend = vecdot(s.direction, product)
    length = torch.where(inner & (bend > 0), s.size / bend, 0.0)
    s.dw.addcmul_(s.direction, length[:, None])
    s.df.addcmul_(along, length[:, None])
    s.residual.addcmul_(product, length[:, None], value=-1)
    s.decrement += length * s.size
    scaled = s.residual / s.scale
    size = vecdot(s.residual, scaled)
    turn = torch.where(inner & (s.size > 0), size / s.size, 0.0)
    s.direction.mul_(turn[:, None]).add_(scaled)
    s.size = size
    s.inner_steps += 1


def _begin(
    s: _State,
    i: Int[Tensor, " j"],
    back: Float[Tensor, "j k"],
    penalty: Float[Tensor, " j"],
) -> None:
    """Conjugate gradients, where the gradient of the log loss is now known."""
    residual = -(back + _penalised(s.w[i], penalty))
    curvature, n_features = s.curvature[i], max(1, back.shape[1] - 1)
    mean = vecdot(curvature, s.squares[i]) / n_features + penalty
    scale = mean[:, None].repeat(1, back.shape[1])
    scale[:, -1] = curvature.sum(1) + _TINY
    direction = residual / scale
    s.residual[i], s.direction[i], s.scale[i] = residual, direction, scale
    s.size[i] = vecdot(residual, direction)
    s.goal[i] = _FORCING**2 * s.size[i]
    s.dw[i], s.df[i], s.decrement[i], s.inner_steps[i] = 0.0, 0.0, 0.0, 0
    s.fresh[i] = False


def _step(s: _State, i: Int[Tensor, " j"], penalty: Float[Tensor, " j"]) -> None:
    """Newton's, where it is found."""
    at, step = (s.w[i], s.f[i]), (s.dw[i], s.df[i])
    objective = _objective(s, i, penalty)
    share = _share(objective, at, step, torch.ones_like(i, dtype=torch.bool))
    w, f = (x + share * dx for x, dx in zip(at, step, strict=True))
    p = f.sigmoid()
    s.w[i], s.f[i] = w, f
    s.slope[i], s.curvature[i] = s.weight[i] * (p - s.y[i]), s.weight[i] * p * (1 - p)
    s.steps[i] += 1


def _objective(
    s: _State, i: Int[Tensor, " j"], penalty: Float[Tensor, " j"]
) -> Callable[[Tensor, Tensor], Tensor]:
    y, weight = s.y[i], s.weight[i]

    def objective(w: Tensor, f: Tensor) -> Tensor:
        loss = (weight * (softplus(f) - y * f)).sum(1)
        return loss + penalty * w[:, :-1].square().sum(1) / 2

    return objective


def _finish(
    s: _State,
    i: Int[Tensor, " j"],
    penalty: Float[Tensor, " j"],
    mean: Float[Tensor, "t features"],
    fit: Fit,
) -> None:
    """Goes on to the next C where the step was small enough, and to the next gradient elsewhere."""
    allowed = _NEARLY * _objective(s, i, penalty)(s.w[i], s.f[i])
    done = i[(s.decrement[i] <= allowed) | (s.steps[i] >= _STEPS)]
    w, b = s.w[done, :-1], s.w[done, -1]
    fit.w[s.problem[done], s.stage[done]] = w
    fit.b[s.problem[done], s.stage[done]] = b - vecdot(mean[done], w)
    s.stage[done] += 1
    s.steps[done] = 0
    s.fresh[i] = s.stage[i] < fit.b.shape[1]
    s.direction[i] = s.residual[i] = 0.0
