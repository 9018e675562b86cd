"""The solver against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch.utils._python_dispatch import TorchDispatchMode

from saebench import logistic, sparse
from saebench.logistic import GRID, fit_few, fit_many, padded


class Problem:
    """Examples for training, and enough for a test on which a swap of two is far below 1e-3.

    Classes overlap, unless `noise` is 0.
    """

    def __init__(self, seed, n, k, density=1.0, noise=1.0, shift=0.0):
        rng = np.random.default_rng(seed)
        X = rng.exponential(size=(n + 1000, k)) * rng.choice([-1, 1, 1], size=k) + shift
        X[rng.random(X.shape) >= density] = 0
        score = X @ rng.normal(size=k)
        score += noise * score.std() * rng.normal(size=n + 1000)
        y = score > np.median(score)
        self.X, self.y, self.X_test, self.y_test = X[:n], y[:n], X[n:], y[n:]

    def reference(self, C, **options):
        model = LogisticRegression(C=C, max_iter=10_000, **options).fit(self.X, self.y)
        return model.decision_function(self.X_test)


def few(problems):
    X = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(p.X) for p in problems], True)
    return fit_few(X, padded([torch.from_numpy(p.y) for p in problems]))


def many(problems):
    codes = [sparse.from_dense(torch.from_numpy(p.X)) for p in problems]
    n_features = max(p.X.shape[1] for p in problems)
    return fit_many(codes, n_features, padded([torch.from_numpy(p.y) for p in problems]))


def agree(fit, problems, near):
    """Test AUC with every C, and the function itself on the test examples."""
    for i, problem in enumerate(problems):
        k = problem.X.shape[1]
        for j, C in enumerate(GRID):
            found = problem.X_test @ fit.w[i, j, :k].numpy() + fit.b[i, j].item()
            auc = roc_auc_score(problem.y_test, found)
            # With the weakest penalty it is lbfgs that stops early, by up to 2e-3.
            usual = roc_auc_score(problem.y_test, problem.reference(C, tol=1e-6))
            assert auc == pytest.approx(usual, abs=1e-3 if C < 1000 else 3e-3), (i, C)
            exact = problem.reference(C, tol=1e-10, solver="newton-cholesky")
            assert auc == pytest.approx(roc_auc_score(problem.y_test, exact), abs=1e-3), (i, C)
            assert np.abs(found - exact).max() < near * (1 + np.abs(exact).max()), (i, C)
            assert not fit.w[i, j, k:].any()


SIZES = (200, 60, 101)


@pytest.mark.parametrize("k", [1, 2, 5, 20, 50])
def test_a_few_features_agree_with_scikit_learn(k):
    problems = [Problem(seed, n, k, shift=seed) for seed, n in enumerate(SIZES)]
    agree(few(problems), problems, near=1e-6)


@pytest.mark.parametrize("density", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("k", [40, 400])
def test_many_features_agree_with_scikit_learn(k, density):
    problems = [Problem(seed, n, k, density) for seed, n in enumerate(SIZES)]
    agree(many(problems), problems, near=2e-2)


@pytest.mark.parametrize("solve", [few, many])
def test_classes_that_can_be_told_apart_agree_with_scikit_learn(solve):
    problems = [Problem(seed, n, 6, noise=0) for seed, n in enumerate(SIZES)]
    fit = solve(problems)
    agree(fit, problems, near=2e-2)
    train = [p.X @ fit.w[i, -1].numpy() + fit.b[i, -1].item() > 0 for i, p in enumerate(problems)]
    assert all((t == p.y).mean() > 0.98 for t, p in zip(train, problems, strict=True))


def test_far_from_the_origin_both_ways_find_the_same():
    problems = [Problem(3, 200, 5, shift=100.0)]
    a, b = few(problems), many(problems)
    X = torch.from_numpy(problems[0].X_test)
    scores = [X @ fit.w[0].mT + fit.b[0] for fit in (a, b)]
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("solve", [few, many])
def test_the_gradient_vanishes_at_the_solution(solve):
    problem = Problem(0, 200, 10)
    fit = solve([problem])
    X, y = torch.from_numpy(problem.X), torch.from_numpy(problem.y).double()
    for j, C in enumerate(GRID):
        w, b = fit.w[0, j].clone().requires_grad_(), fit.b[0, j].clone().requires_grad_()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(X @ w + b, y, reduction="sum")
        gradients = torch.autograd.grad(loss + w.square().sum() / (2 * C), (w, b))
        scale = (X.abs().sum(0).max() / 2).item()
        assert max(g.abs().max().item() for g in gradients) < 2e-4 * scale, C


@pytest.mark.parametrize("solve", [few, many])
def test_a_solution_does_not_depend_on_what_is_solved_beside_it(solve):
    problems = [Problem(seed, n, 30, 0.4) for seed, n in enumerate(SIZES)]
    together = solve(problems)
    for i, problem in enumerate(problems):
        alone = solve([problem])
        torch.testing.assert_close(alone.w[0], together.w[i], rtol=1e-3, atol=5e-3)
        torch.testing.assert_close(alone.b[0], together.b[i], rtol=1e-3, atol=5e-3)


def test_how_many_hessians_are_held_does_not_matter(monkeypatch):
    problems = [Problem(seed, 50, 3) for seed in range(4)]
    whole = few(problems)
    monkeypatch.setattr(logistic, "_CHUNK", 1)
    torch.testing.assert_close(few(problems).w, whole.w)


@pytest.mark.parametrize("solve", [few, many])
def test_without_any_feature_the_intercept_is_the_log_odds(solve):
    problem = Problem(0, 50, 4)
    problem.X = np.zeros_like(problem.X)
    problem.y = np.arange(50) < 10
    fit = solve([problem])
    assert not fit.w.any() and fit.b.numpy() == pytest.approx(np.log(10 / 40), abs=1e-4)


def test_a_feature_that_is_never_active_has_no_weight():
    problem = Problem(0, 80, 5)
    problem.X[:, 2] = 0
    for fit in (few([problem]), many([problem])):
        assert not fit.w[..., 2].any() and fit.w[..., 3].all()


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor had that was made meanwhile."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, tuple | list) else [out]
        sizes = [t.numel() for t in made if isinstance(t, torch.Tensor) and not t.is_sparse_csr]
        self.numbers = max([self.numbers, *sizes])
        return out


def test_wide_features_are_never_made_dense():
    n, width, active = 300, 20_000, 8
    rng = np.random.default_rng(0)
    indices = np.sort(rng.integers(width // active, size=(n, active)) * active + np.arange(active))
    code = sparse.from_columns(
        torch.from_numpy(indices), torch.from_numpy(rng.random((n, active)) + 0.1)
    )
    y = torch.from_numpy(rng.random(n) < 0.5)
    with Largest() as largest:
        fit = fit_many([code], width, padded([y]))
    assert fit.w.shape == (1, len(GRID), width)
    assert largest.numbers <= fit.w.numel() < n * width / 30


# The area under the curve


def test_auc_is_that_of_scikit_learn_with_ties_and_padding():
    rng = np.random.default_rng(0)
    scores = [rng.integers(-3, 4, size=(2, n)) / 3 for n in (40, 17, 300)]
    ys = [rng.random(n) < 0.3 for n in (40, 17, 300)]
    ys[1][:2] = True, False
    given = padded([torch.from_numpy(y) for y in ys])
    filled = torch.full((3, 2, 300), 99.0, dtype=torch.float64)
    for row, s in zip(filled, scores, strict=True):
        row[:, : s.shape[1]] = torch.from_numpy(s)
    y, used = (part[:, None].expand(3, 2, 300) for part in given)
    expected = [[roc_auc_score(y, row) for row in s] for y, s in zip(ys, scores, strict=True)]
    assert logistic.auc(filled, y, used).numpy() == pytest.approx(np.array(expected), abs=1e-14)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.1, 0.2, 0.8, 0.9], 1),
        ([0.9, 0.8, 0.2, 0.1], 0),
        ([7, 7, 7, 7], 0.5),
        ([1, 2, 2, 3], 0.875),
    ],
)
def test_auc_of_two_negatives_and_two_positives(scores, expected):
    y = torch.tensor([False, False, True, True])
    assert logistic.auc(torch.tensor(scores).double(), y, torch.ones_like(y)) == expected


def test_one_class_has_no_auc():
    y = torch.ones(4, dtype=torch.bool)
    with pytest.raises(AssertionError, match="lacks one of the classes"):
        logistic.auc(torch.arange(4.0), y, y)


# The choice of C


def chosen(scores, y):
    given = padded([torch.tensor(y)])
    return logistic.choose(torch.tensor([scores], dtype=torch.float64), given).item()


def test_the_best_auc_is_chosen_whatever_the_loss():
    assert chosen([[0, 0.2, 0.1, 0.3], [-90, 80, 90, 91]], [False, False, True, True]) == 1


def test_of_equal_aucs_the_least_log_loss_is_chosen():
    assert chosen([[-9, 1, 2, 9], [-1, -1, 1, 1], [-3, -3, 3, 3]], [False, False, True, True]) == 2


def test_of_equal_aucs_and_losses_the_smallest_C_is_chosen():
    scores = [[0, 1, 0, 1], [-2, -2, 2, 2], [-2, -2, 2, 2]]
    assert chosen(scores, [False, False, True, True]) == 1


def test_padding_has_no_say_in_the_choice():
    given = padded([torch.tensor([False, True]), torch.tensor([False, True, True, True])])
    scores = torch.zeros(2, 2, 4, dtype=torch.float64)
    scores[0, 0, :2] = torch.tensor([-1.0, 1.0])
    scores[0, 1] = torch.tensor([0.0, 0.0, 50.0, 50.0])
    assert logistic.choose(scores, given)[0] == 0


def test_the_number_of_threads_is_as_it_was_before():
    before = torch.get_num_threads()
    many([Problem(0, 60, 3)])
    assert torch.get_num_threads() == before
