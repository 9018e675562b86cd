"""What the tokens of a synthetic world are made of, as exact labels: its probing tasks.

feature i       the feature fires; against tokens where it does not. Frequent ones fire on 0.5 to 20 % of tokens
rare feature i  the same of features that fire on 0.07 to 0.5 %: most dictionaries are too small to hold them
i and j         both fire; against tokens where one of them does alone
i or j          one of them fires, or both; against tokens where neither does
child i of p    the feature fires; against tokens where its parent p fires and it does not

A conjunction is of two features that fire on 3 to 20 % of tokens and are of different trees. Which features are asked
for is drawn by the seed, and rates are those of the tokens that are asked about, which are of no text of training or
evaluation. That single features, frequent and rare, and conjunctions show whether probing is valid is an idea of the
audit by https://arxiv.org/abs/2605.18229.
"""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from saebench.codelabels import SPLITS, CodeTokens, Drawn, lacking
from saebench.types import Excerpt, KnownTokens, Lab, Omitted, Truth

NAME = "synthetic"
TOKENS = 60_000
"""That are asked about, in whole rows."""

_FREQUENT, _RARE, _COMBINED = (0.005, 0.2), (0.0007, 0.005), (0.03, 0.2)
"""Firing rates: from, and up to but not with."""
_SINGLE, _PAIRS, _CHILDREN = 24, 12, 12
"""Tasks of each kind, at the most."""
_SHARES = (0.4, 0.2, 0.4)
"""Of the tokens, for training, validation and test."""

Mask = Bool[np.ndarray, " tokens"]


class _Question(NamedTuple):
    name: str
    positive: Mask
    negative: Mask
    """Never both; of a token that is neither, the task asks nothing."""


def read(lab: Lab, truth: Truth, sizes: tuple[int, int, int], seed: int) -> CodeTokens:
    """Up to `sizes` examples for training, validation and test of each task, half of them positive."""
    known = lab.known_tokens(seed, TOKENS)
    split = _split(known.rows.size, seed)
    drawn: dict[str, Drawn] = {}
    omitted: list[Omitted] = []
    for asked in _questions(_Fired(known), truth, seed):
        found = _drawn(asked, split, sizes, seed)
        if isinstance(found, Drawn):
            drawn[asked.name] = found
        else:
            omitted.append(Omitted(f"{NAME}:{asked.name}", found))
    used = np.unique(np.concatenate([np.empty(0, np.int64), *(d.examples for d in drawn.values())]))
    tasks = {name: Drawn(np.searchsorted(used, d.examples), d.y) for name, d in drawn.items()}
    return CodeTokens(_excerpts(known.rows, used), split[used], tasks, tuple(omitted))


class _Fired:
    """On which tokens each feature fires."""

    def __init__(self, known: KnownTokens) -> None:
        counts = known.features.offsets.diff().numpy()
        indices = known.features.indices.numpy()
        order = np.argsort(indices, kind="stable")
        self._tokens: Int[np.ndarray, " nnz"] = np.repeat(np.arange(len(counts)), counts)[order]
        self._features = indices[order]
        self.n = len(counts)

    def mask(self, feature: int) -> Mask:
        first, last = np.searchsorted(self._features, [feature, feature + 1])
        mask = np.zeros(self.n, dtype=bool)
        mask[self._tokens[first:last]] = True
        return mask

    def between(self, rates: tuple[float, float]) -> Int[np.ndarray, " features"]:
        """Features that fire as often as that, ascending."""
        features, counts = np.unique(self._features, return_counts=True)
        low, high = rates
        return features[(counts >= low * self.n) & (counts < high * self.n)]


def _questions(fired: _Fired, truth: Truth, seed: int) -> Iterator[_Question]:
    parents = truth.parents.cpu().numpy()
    for kind, rates in (("feature", _FREQUENT), ("rare feature", _RARE)):
        for i in _some(fired.between(rates), _SINGLE, f"{seed} {kind}"):
            fires = fired.mask(i)
            yield _Question(f"{kind} {i}", fires, ~fires)
    for i, j in _pairs(fired.between(_COMBINED), parents, f"{seed} pairs"):
        one, other = fired.mask(i), fired.mask(j)
        yield _Question(f"{i} and {j}", one & other, one ^ other)
        yield _Question(f"{i} or {j}", one | other, ~(one | other))
    frequent = fired.between(_FREQUENT)
    for i in _some(frequent[parents[frequent] >= 0], _CHILDREN, f"{seed} children"):
        fires, parent = fired.mask(i), int(parents[i])
        yield _Question(f"child {i} of {parent}", fires, fired.mask(parent) & ~fires)


def _some(features: Int[np.ndarray, " m"], most: int, drawn_by: str) -> list[int]:
    """Ascending."""
    return sorted(_generator(drawn_by).permutation(features)[:most].tolist())


def _pairs(
    features: Int[np.ndarray, " m"], parents: Int[np.ndarray, " n_features"], drawn_by: str
) -> list[tuple[int, int]]:
    """Neighbours in a random order, where they are of different trees: no feature is in two of them."""
    order = _generator(drawn_by).permutation(features).tolist()
    pairs = [sorted(pair) for pair in zip(order[::2], order[1::2], strict=False)]
    apart = [(i, j) for i, j in pairs if _root(i, parents) != _root(j, parents)]
    return sorted(apart[:_PAIRS])


def _root(feature: int, parents: Int[np.ndarray, " n_features"]) -> int:
    while parents[feature] >= 0:
        feature = int(parents[feature])
    return feature


def _split(n: int, seed: int) -> Int[np.ndarray, " tokens"]:
    """0, 1 or 2 for each token."""
    ends = np.round(np.cumsum(_SHARES[:-1]) * n).astype(np.int64)
    ordered = np.searchsorted(ends, np.arange(n), "right")
    split = np.empty(n, dtype=np.int64)
    split[_generator(f"{seed} split").permutation(n)] = ordered
    return split


def _drawn(
    asked: _Question, split: Int[np.ndarray, " tokens"], sizes: tuple[int, int, int], seed: int
) -> Drawn | str:
    """As many positives as negatives in each split, or why that cannot be."""
    sides = asked.positive, asked.negative
    groups = [
        [np.flatnonzero(side & (split == part)) for side in sides] for part in range(len(SPLITS))
    ]
    reason = lacking(*([len(group[side]) for group in groups] for side in range(2)))
    if reason is not None:
        return reason
    chosen: list[np.ndarray] = []
    for group, size, part in zip(groups, sizes, SPLITS, strict=True):
        draw = _generator(f"{seed} {asked.name} {part}")
        n = min(size // 2, *map(len, group))
        chosen += [draw.choice(side, n, replace=False) for side in group]
    examples = np.sort(np.concatenate(chosen))
    return Drawn(examples, asked.positive[examples])


def _excerpts(
    rows: Int[np.ndarray, "rows length"], used: Int[np.ndarray, " m"]
) -> tuple[Excerpt, ...]:
    """Of rows that have an example; `used` are the numbers of their tokens, ascending."""
    of_row, position = np.divmod(used, rows.shape[1])
    numbers, first = np.unique(of_row, return_index=True)
    wanted = np.split(position, first[1:]) if len(numbers) else []
    return tuple(Excerpt(rows[i], w) for i, w in zip(numbers, wanted, strict=True))


def _generator(drawn_by: str) -> np.random.Generator:
    return np.random.default_rng(list(hashlib.sha256(drawn_by.encode()).digest()))
