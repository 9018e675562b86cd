"""A toy world in which every right answer can be worked out by hand.

Its "language model" is one linear readout of the stream: what it predicts at a position follows from the
activation there alone, so references and outcomes are a few lines of NumPy.
"""

import functools
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saebench import registry, sparse, stats, suite, trainer
from saebench.types import (
    SAE,
    Eval,
    Excerpt,
    Facts,
    Outcome,
    References,
    Score,
    Seen,
    Site,
    Skip,
    SparseCode,
    StreamEval,
    Truth,
)

D, D_SAE, VOCABULARY = 6, 24, 11
N_FEATURES = 10
LENGTHS = (5, 9, 1, 12, 3, 8, 6, 10)
"""Of the sequences; the third has no position with a next token, so fidelity has no unit for it."""


@dataclass(frozen=True)
class World:
    """The evaluation text at one site. Everything in float64, so that laws can be checked sharply."""

    x: Tensor  # [n d]
    sequence: Tensor  # [n]
    scored: Tensor  # [n], bool
    following: np.ndarray  # [n], the next token
    readout: np.ndarray  # [d vocabulary]
    truth: Truth | None = None
    features: SparseCode | None = None  # of all tokens

    @property
    def n_sequences(self) -> int:
        return int(self.sequence.max()) + 1

    @property
    def mean(self) -> Tensor:
        return self.x.double().mean(0)

    def facts(self) -> Facts:
        site = Site("toy", 0)
        return Facts(site, site, self.n_sequences, len(self.x), self.mean, self.truth)

    def batches(self, groups: Sequence[Sequence[int]] | None = None) -> Iterator["ToyBatch"]:
        """One batch for each group of sequences; all sequences in one where no groups are given."""
        for group in groups or [range(self.n_sequences)]:
            tokens = [torch.nonzero(self.sequence == s).squeeze(-1) for s in group]
            yield ToyBatch(self, torch.cat(tokens))

    def log_p(self, x: Tensor) -> np.ndarray:
        logits = x.double().numpy() @ self.readout
        top = logits.max(-1, keepdims=True)
        return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))

    def scaled(self, a: float) -> "World":
        """The same text of a model whose stream is a times as large."""
        features = self.features and self.features._replace(values=a * self.features.values)
        return replace(self, x=a * self.x, readout=self.readout / a, features=features)


@dataclass(frozen=True)
class ToyBatch:
    world: World
    tokens: Tensor

    @property
    def x(self) -> Tensor:
        return self.world.x[self.tokens]

    @property
    def target(self) -> Tensor:
        return self.x

    @property
    def sequence(self) -> Tensor:
        return self.world.sequence[self.tokens]

    @property
    def scored_sequence(self) -> Tensor:
        return self.sequence[self._scored]

    @property
    def features(self) -> SparseCode | None:
        if self.world.features is None:
            return None
        dense = sparse.to_dense(self.world.features, len(self.world.truth.directions))
        return sparse.from_dense(dense[self.tokens])

    @property
    def _scored(self) -> Tensor:
        return self.world.scored[self.tokens]

    def _loss(self, stream: Tensor) -> Tensor:
        log_p = self.world.log_p(stream)
        following = self.world.following[self.tokens.numpy()]
        loss = [-log_p[i, token] for i, token in enumerate(following) if self._scored[i]]
        return torch.tensor(np.array(loss))

    def references(self) -> References:
        mean = self.world.mean.expand(len(self.tokens), -1)
        return References(
            self._loss(self.x), self._loss(torch.zeros_like(self.x)), self._loss(mean)
        )

    def outcome(self, replacement: Tensor) -> Outcome:
        clean, new = self.world.log_p(self.x), self.world.log_p(replacement)
        kl = torch.from_numpy((np.exp(clean) * (clean - new)).sum(-1))
        same = torch.from_numpy(clean.argmax(-1) == new.argmax(-1))
        return Outcome(self._loss(replacement), kl[self._scored], same[self._scored])


def world(offset: float = 3.0, dtype: torch.dtype = torch.float64) -> World:
    rng = np.random.default_rng(0)
    n = sum(LENGTHS)
    sequence = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    last = np.append(sequence[1:] != sequence[:-1], True)
    x = rng.normal(size=(n, D)) * rng.uniform(0.5, 2, D) + offset
    unembedding = rng.normal(size=(D, VOCABULARY))
    unembedding -= unembedding.mean(0)  # blind to the offset
    return World(
        torch.from_numpy(x).to(dtype),
        torch.from_numpy(sequence),
        torch.from_numpy(~last & (np.arange(n) % 6 != 0)),
        (x @ unembedding).argmax(
            -1
        ),  # what the model predicts, so that ablating the stream costs something
        unembedding,
        *made_up_features(n, dtype),
    )


PARENTS = (-1, -1, 0, 0, 2, 2, 1, -1, -1, -1)
DEPTHS = (0, 0, 1, 1, 2, 2, 1, -1, -1, -1)


def made_up_features(n: int, dtype: torch.dtype) -> tuple[Truth, SparseCode]:
    """Of which the stream is not made: sums over what is active do not ask. A child is silent where its parent is."""
    rng = np.random.default_rng(1)
    a = rng.uniform(1, 3, (n, N_FEATURES)) * (rng.random((n, N_FEATURES)) < 0.6)
    for child, parent in enumerate(PARENTS):
        a[:, child] *= (a[:, parent] > 0) if parent >= 0 else 1
    parents, depths = torch.tensor(PARENTS), torch.tensor(DEPTHS)
    directions, offset = _directions(N_FEATURES, D, 94).to(dtype), torch.zeros(D, dtype=dtype)
    magnitudes = torch.full((N_FEATURES,), 2.0, dtype=dtype)
    truth = Truth(directions, offset, magnitudes, parents, depths)
    return truth, sparse.from_dense(torch.from_numpy(a).to(dtype))


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("this must not be called")


class Fixed:
    """An SAE with nothing but a reconstruction: its latents are whatever the test gives."""

    def __init__(self, x_hat: Any, b_dec: Tensor | None = None) -> None:
        self.d_in = self.d_sae = D
        self.x_hat = x_hat
        self.W_dec = self.W_enc = torch.eye(D, dtype=torch.float64)
        self.b_dec = b_dec

    def encode(self, x: Tensor) -> Tensor:
        return self.x_hat(x)

    def decode(self, z: Tensor) -> Tensor:
        return z

    def encode_sparse(self, x: Tensor) -> Any:
        from saebench import sparse

        return sparse.from_dense(self.encode(x))

    def decode_sparse(self, code: Any) -> Tensor:
        from saebench import sparse

        return sparse.to_dense(code, self.d_sae)


def all_evals() -> list[Eval]:
    """Those that look at the world's text; the others bring their own (`labelled_text`)."""
    made = [registry.get("evals", name)() for name in registry.names("evals")]
    return [eval_ for eval_ in made if isinstance(eval_, StreamEval)]


def all_metrics() -> list[str]:
    return [metric.name for eval_ in all_evals() for metric in eval_.metrics]


def scores(
    sae: SAE,
    world: World,
    groups: Sequence[Sequence[int]] | None = None,
    evals: Sequence[Eval] | None = None,
) -> dict[str, Score]:
    """Every metric of every eval that applies, computed as the runner does."""
    found: dict[str, Score] = {}
    for eval_ in all_evals() if evals is None else evals:
        try:
            tally = eval_.start(sae, world.facts())
            for batch in world.batches(groups):
                code = sae.encode_sparse(batch.x)
                x_hat = sae.decode_sparse(code)
                tally.update(Seen(batch, code, x_hat, batch.outcome(x_hat)))
            given = [score for score in tally.scores() if isinstance(score, Score)]
            found |= {score.metric: score for score in given}
        except Skip:
            continue
    return found


def values(*args: Any, **kwargs: Any) -> dict[str, float]:
    statistic = {m.name: m.statistic for eval_ in all_evals() for m in eval_.metrics}
    return {
        name: stats.value(score.num, score.den, statistic[name])
        for name, score in scores(*args, **kwargs).items()
    }


WORDS = 600
"""Tokens of the toy lab's language model, whose stream knows nothing but the token itself."""


class ToyLab:
    """Activations that can be looked up: row t of the table, wherever token t stands."""

    identity = {"id": "toy"}
    tokenizer = None
    longest = 64
    folder = Path()
    truth = None

    def __init__(self, d: int = D, dtype: torch.dtype = torch.float32) -> None:
        self.table = _directions(WORDS, d, 95).to(dtype) * 3 + 0.5
        self.computed: list[Any] = []
        """What was asked to be kept."""

    def width(self, site: Site) -> int:
        return self.table.shape[1]

    def known_tokens(self, seed: int, n: int) -> Any:
        never(seed, n)

    def activations(self, site: Site, excerpts: Sequence[Excerpt]) -> Tensor:
        ids = [e.ids[e.wanted] for e in excerpts]
        return self.table[torch.from_numpy(np.concatenate([np.empty(0, np.int64), *ids]))]

    def kept(self, spec: Any, compute: Any) -> Any:
        self.computed.append(spec)
        return compute()


def probe_set(  # noqa: PLR0913  (what a test is about)
    name: str,
    tokens: Sequence[Sequence[int]],
    y: Any,
    pool: Any = "last",
    tasks: Any = None,
    each_alone: bool = False,
    source: str | None = None,
) -> Any:
    """Examples of these tokens, split in turn: of every five three are for training and one each for the others."""
    from saebench.labelled import ProbeSet, Task

    n = len(tokens)
    ids = [np.array(t, dtype=np.int64) for t in tokens]
    wanted = [np.arange(0 if pool == "mean" else len(t) - 1, len(t)) for t in ids]
    return ProbeSet(
        name=name,
        source=source or name,
        pool=pool,
        excerpts=tuple(Excerpt(*pair) for pair in zip(ids, wanted, strict=True)),
        example_of=np.repeat(np.arange(n), [len(w) for w in wanted]),
        n_examples=n,
        split=np.array([0, 0, 0, 1, 2])[np.arange(n) % 5],
        tasks=tasks or (Task("", np.arange(n), np.asarray(y, dtype=bool)),),
        each_alone=each_alone,
    )


def labelled_text(lab: ToyLab) -> Any:
    """Three sets, with each kind of pooling; what they ask can be seen in the activations, more or less."""
    from saebench.labelled import Labelled, Task
    from saebench.types import Omitted

    rng = np.random.default_rng(0)
    table = lab.table.double().numpy()
    alone = rng.permutation(WORDS)[:, None]
    texts = [rng.integers(WORDS, size=size) for size in np.sort(rng.integers(1, 7, size=500))]
    means = np.array([table[t, 1].mean() for t in texts])
    kinds = np.digitize(table[alone[:, 0], 2] + rng.normal(size=WORDS), [-0.5, 1.5])
    classes = [Task(str(c), np.arange(WORDS), kinds == c) for c in range(3)]
    noisy = table[alone[:, 0], 0] + rng.normal(size=WORDS) > 0.5
    sets = (
        probe_set("noisy", alone, noisy),
        probe_set("mean", texts, means > np.median(means), pool="mean"),
        probe_set("classes", alone, None, tasks=tuple(classes), source="noisy"),
        probe_set("each", alone, None, "token", tasks=tuple(classes[:2]), each_alone=True),
    )
    return Labelled(sets, (Omitted("left:out", "for a reason"),), "toy text")


SAMPLE = {int: 4, float: 0.1, str: "tanh"}
"""A legal value for any extra argument of an architecture."""


def sae_of(name: str, d_in: int = D, d_sae: int = D_SAE, seed: int = 0, **transcoder: Any) -> Any:
    """An SAE of one architecture with random weights; what must not be negative is not."""
    build = registry.get("saes", name)
    extra = [p for p in inspect.signature(build).parameters.values() if p.kind == p.KEYWORD_ONLY]
    sae = build(d_in, d_sae, **transcoder, **{p.name: SAMPLE[p.annotation] for p in extra})
    generator = torch.Generator().manual_seed(seed)
    for key, weight in sae.named_parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5)
        if key in ("threshold", "penalty", "size"):
            weight.abs_()
    return sae


def fold(sae: Any, mean: Tensor, scale: float) -> None:
    """As the trainer does for an SAE that reads what it gives back."""
    from saebench.saes._dictionary import Scaling

    sae.fold(Scaling(mean, scale), Scaling(mean, scale))


def aligned(sae: Any) -> Any:
    """The same with an encoder near its decoder, so that reconstructions point along activations."""
    if hasattr(sae, "W_enc"):
        sae.W_enc.mul_(0.5).add_(sae.W_dec.T)
    sae.W_dec.mul_(0.1)
    return sae


@functools.cache
def recipe(name: str, **options: Any) -> Any:
    """A variant's baseline with these overrides."""
    return suite.recipe(name, options)


def task(
    d_in: int = 8,
    width: int = 32,
    l0: float = 4,
    tokens: int = 64 * 200,
    seed: int = 0,
    recipe: Any = None,
) -> Any:
    """What a variant is trained for. With a `recipe`, also what it needs besides: another target, or a parent."""
    from saebench.variants._training import Task

    transcodes = recipe is not None and recipe.target == "other"
    return Task(
        d_in=d_in,
        d_out=d_in + WIDER if transcodes else d_in,
        width=width,
        l0=l0,
        tokens=tokens,
        generator=torch.Generator().manual_seed(seed),
        transcodes=transcodes,
        skip=False,
        parent=shrunk(d_in, width, seed) if recipe is not None and recipe.from_parent else None,
    )


WIDER = 3
"""Dimensions that the toy transcoders' target has more than their input, so that mix-ups show."""


def shrunk(d_in: int, width: int, seed: int = 0) -> Any:
    """A ReLU SAE that looks trained on `sparse_data`: its directions, with latents that are too small."""
    from saebench.saes.relu import ReLU

    rows = _directions(width, d_in, 99 + seed)
    sae = ReLU(d_in, width)
    sae.load_state_dict(
        {
            "W_enc": 0.3 * rows.T,
            "W_dec": rows,
            "b_enc": torch.full((width,), -0.15),
            "b_dec": torch.full((d_in,), 0.01),
        }
    )
    return sae


def _directions(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=-1)


def other_site(x: Tensor) -> Tensor:
    """The stream that toy transcoders predict: wider, and no linear map of what they read."""
    d = x.shape[1]
    M = (_directions(d, d + WIDER, 98)).to(x.dtype)
    return 0.6 * x @ M + (x @ M.flip(0)).abs()


class Readout:
    """A language model of one linear readout, with one later layer, that an SAE is trained through."""

    def __init__(self, x: Tensor) -> None:
        d = x.shape[1]
        self.x = x
        self.logits = 3 * _directions(d, VOCABULARY, 97).to(x.dtype)
        self.layer = _directions(d, 5, 96).to(x.dtype)

    def __call__(self, x_hat: Tensor, later: bool) -> Any:
        from saebench.variants._training import Downstream

        p, q = ((x @ self.logits).log_softmax(-1) for x in (self.x, x_hat))
        kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
        return Downstream(kl, self.later(x_hat) if later else None)

    def later(self, x_hat: Tensor) -> Tensor:
        a, b = self.x @ self.layer, x_hat @ self.layer
        return (a - b).square().sum() / len(a)


def lesson(recipe: Any, x: Tensor, progress: float = 0.9, seed: int = 0) -> Any:
    """One batch as the trainer hands it to this variant."""
    from saebench.variants._training import Lesson

    return Lesson(
        x=x,
        target=other_site(x) if recipe.target == "other" else x,
        progress=progress,
        generator=torch.Generator().manual_seed(seed),
        downstream=Readout(x) if recipe.end_to_end else None,
    )


def sparse_data(
    n: int, d: int = 8, features: int = 32, active: float = 2.0, seed: int = 0
) -> Tensor:
    """Sums of a few of `features` directions, centred and of unit mean square."""
    generator = torch.Generator().manual_seed(seed)
    directions = _directions(features, d, 99)
    on = torch.rand(n, features, generator=generator) < active / features
    x = (on * (0.5 + torch.rand(n, features, generator=generator))) @ directions
    x = x - x.mean(0)
    return x / x.square().sum(1).mean().sqrt()


class Learner:
    """Trains as the trainer does, step by step, without files and groups."""

    def __init__(self, recipe: Any, **shape: Any) -> None:
        self.recipe, self.task = recipe, task(recipe=recipe, **shape)
        self.training = recipe.start(self.task)
        self.optimizer = trainer.optimizer_of(self.training, recipe)
        self.seen = 0

    def learn(self, x: Tensor) -> float:
        given = lesson(self.recipe, x, self.seen / self.task.tokens, seed=self.seen)
        share = len(x) / self.task.tokens
        loss = trainer.learn(self.training, self.optimizer, self.recipe, given, share)
        self.seen += len(x)
        return loss.item()
