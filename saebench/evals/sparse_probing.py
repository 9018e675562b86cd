"""What a logistic probe reads off a few latents, on texts that it has not seen.

probe_auc_k<k>        = AUC on test of a probe on the k best latents; reference: on the k best raw dimensions
probe_auc_all         = the same on all latents; reference: on the whole raw activation
probe_accuracy_k<k>, probe_accuracy_all
                      = share of test examples that the same probe puts on the right side of probability 1/2
probe_auc_raw         = AUC on test of a probe on the whole raw activation
probe_auc_gain_k<k>   = probe_auc_k<k> - that on the k best raw dimensions
probe_auc_gain_all    = probe_auc_all - probe_auc_raw

Each is a mean over datasets; of a dataset with several classes, over its classes.

z_ij     latent j of example i: at its position, or the mean over its positions
s_j      mean of |z_ij| over the training examples of the dataset with z_ij != 0; probes see z_ij / s_j
best     by |mean of z_ij / s_j over positives - the same over negatives|, training examples of the task, equal ones in
         the order of latents; latents that are zero on all of them are never chosen
probe    L2 logistic regression (`saebench.logistic`) on the training examples alone; C from its grid by AUC on the
         validation examples, then by their log loss

For the activation itself, dimensions are centred and s_j is their standard deviation over the training examples. The
protocol follows sae-probes (Kantamneni et al. 2025, https://arxiv.org/abs/2502.16681), whose splits and L1 penalty it
does not share. Nothing is chosen on test examples.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from saebench import kernels, labelled, logistic, sparse
from saebench.codelabels import LEAST_PER_CLASS
from saebench.labelled import STDLIB, SYNTHETIC, Labelled, Options, ProbeSet, Task, Texts
from saebench.progress import Meter
from saebench.types import (
    SAE,
    Lab,
    Metric,
    Omitted,
    Score,
    Site,
    Skip,
    SparseCode,
    Spec,
    TextEval,
)

K_CHOICES = (1, 2, 5, 10, 20, 50)
"""Numbers of latents that a probe may have."""

_PARTS = ("train", "validation", "test")
_TOKENS = 8192
"""Activations that are encoded at a time, or those of one example."""
_HELD = 2**21
"""Numbers that probes are fitted on at a time, about."""
_DECIMALS = 9
"""To which differences of means are rounded, so that latents which are equal but for rounding are equal."""


def _metrics() -> tuple[Metric, ...]:
    found = []
    for name, what in [*((f"k{k}", _latents(k)) for k in K_CHOICES), ("all", "all latents")]:
        raw = (
            "the whole raw activation" if name == "all" else what.replace("latent", "raw dimension")
        )
        found += [
            Metric(
                f"probe_auc_{name}",
                "max",
                "dataset",
                f"AUC of a probe on {what}; reference: on {raw}",
                ends=(0.5, 1.0),
            ),
            Metric(f"probe_accuracy_{name}", "max", "dataset", f"accuracy of a probe on {what}"),
            Metric(
                f"probe_auc_gain_{name}",
                "max",
                "dataset",
                f"AUC of a probe on {what} - AUC on {raw}",
            ),
        ]
    raw_doc = "AUC of a probe on the whole raw activation: the same for all SAEs of a site"
    return (*found, Metric("probe_auc_raw", None, "dataset", raw_doc))


def _latents(k: int) -> str:
    return "the best latent" if k == 1 else f"the {k} best latents"


@final
@dataclass(frozen=True)
class SparseProbing(TextEval):
    datasets: tuple[Texts, ...] | None = None
    """None: the tasks that come along, which are of Python source for a language model, and of the world itself for a
    synthetic one."""
    k: tuple[int, ...] = (1, 2, 5, 20)
    """How many latents probes have; one on all latents is always there."""
    train: int = 1024
    """Examples of each task, at the most."""
    validation: int = 256
    test: int = 1024
    seed: int = 0
    """Of the split."""

    version: ClassVar = 1
    metrics: ClassVar = _metrics()
    codes_alone: ClassVar = True

    def __post_init__(self) -> None:
        if self.datasets == ():
            raise ValueError("datasets is empty; expected one or more")
        choices = ", ".join(map(str, K_CHOICES))
        if not self.k or not set(self.k) <= set(K_CHOICES):
            raise ValueError(f"k is {list(self.k)}; expected a list of some of {choices}")
        if len(set(self.k)) < len(self.k):
            raise ValueError(f"k is {list(self.k)}; expected each number once")
        least = 2 * LEAST_PER_CLASS
        for part in _PARTS:
            if getattr(self, part) < least:
                raise ValueError(f"{part} is {getattr(self, part)}; expected {least} or more")

    def parameters(self) -> Spec:
        assert self.datasets is not None, "a suite fills them in"
        datasets = [texts.identity() for texts in self.datasets]
        return super().parameters() | {"datasets": datasets, "k": sorted(self.k)}

    def filled_in(self, synthetic: bool) -> "SparseProbing":
        if self.datasets is not None:
            return self
        return replace(self, datasets=(Texts(source=SYNTHETIC if synthetic else STDLIB),))

    def read(self, lab: Lab) -> Labelled:
        datasets = self.filled_in(lab.truth is not None).datasets
        assert datasets is not None, "they are filled in"
        options = Options(self.train, self.validation, self.test, self.seed)
        return labelled.read(datasets, lab, options)

    def prepare(self, lab: Lab, reading: Labelled, site: Site) -> "_Prepared":
        sets = reading.sets
        activations = tuple(_read(lab, site, sets))
        spec = {
            "what": "probes on raw activations",
            "version": self.version,
            "site": str(site),
            "text": reading.fingerprint,
        }
        raw = lab.kept(spec, lambda: {"auc": _raw_auc(sets, activations)})
        return _Prepared(sets, activations, raw["auc"].numpy(), reading.omitted)

    def scores(self, sae: SAE, prepared: "_Prepared", shuffled: bool) -> Sequence[Score | Omitted]:
        if not prepared.sets:
            raise Skip(f"no dataset can be probed: {len(prepared.omitted)} are left out")
        k = sorted(self.k)
        features = (
            _sae_features(sae, set_, x)
            for set_, x in zip(prepared.sets, prepared.activations, strict=True)
        )
        found = _probe(prepared.sets, features, k, shuffled)
        raw = prepared.raw[:, [*(K_CHOICES.index(n) for n in k), len(K_CHOICES)]]
        return [*_scores(prepared.sets, k, found, raw), *prepared.omitted]


def _read(lab: Lab, site: Site, sets: Sequence[ProbeSet]) -> Iterator[Float[Tensor, "n_wanted d"]]:
    lengths = [sum(len(excerpt.ids) for excerpt in set_.excerpts) for set_ in sets]
    with Meter("reading texts to probe", sum(lengths), "tokens") as meter:
        for set_, length in zip(sets, lengths, strict=True):
            yield lab.activations(site, set_.excerpts)
            meter.advance(length)


class _Prepared(NamedTuple):
    """What all SAEs of a site share."""

    sets: tuple[ProbeSet, ...]
    activations: tuple[Tensor, ...]
    """[n_wanted d] for each set."""
    raw: Float[np.ndarray, "tasks probes"]
    """AUC on the best dimensions of the activation, for each of K_CHOICES, and on all."""
    omitted: tuple[Omitted, ...]


class _Features(NamedTuple):
    """z_ij / s_j of all examples of a set, for the latents that are not zero on some training example."""

    code: SparseCode
    latents: Int[Tensor, " m"]


class _Question(NamedTuple):
    """One task, in training, validation and test."""

    features: _Features
    examples: tuple[Tensor, ...]
    y: tuple[Tensor, ...]


class _Found(NamedTuple):
    """On test, for each k and, in the last column, for all latents."""

    auc: Float[np.ndarray, "tasks probes"]
    accuracy: Float[np.ndarray, "tasks probes"]


# Scores of datasets


def _scores(
    sets: Sequence[ProbeSet],
    k: Sequence[int],
    found: _Found,
    raw: Float[np.ndarray, "tasks probes"],
) -> list[Score]:
    names, sources, dataset = _datasets(sets)
    clusters = None if len(set(sources)) == len(sources) else sources
    n, one = sum(map(_n_test, sets)), np.ones(len(names))

    def score(metric: str, values: np.ndarray, reference: np.ndarray | None = None) -> Score:
        mean = np.bincount(dataset, values) / np.bincount(dataset)
        beside = None
        if reference is not None:
            beside = float(np.mean(np.bincount(dataset, reference) / np.bincount(dataset)))
        return Score(metric, mean, one, n, beside, names, clusters)

    scores = [score("probe_auc_raw", raw[:, -1])]
    for i, name in enumerate([*(f"k{number}" for number in k), "all"]):
        scores += [
            score(f"probe_auc_{name}", found.auc[:, i], raw[:, i]),
            score(f"probe_accuracy_{name}", found.accuracy[:, i]),
            score(f"probe_auc_gain_{name}", found.auc[:, i] - raw[:, i]),
        ]
    return scores


class _Datasets(NamedTuple):
    names: list[str]
    sources: list[str]
    of_task: Int[np.ndarray, " tasks"]


def _datasets(sets: Sequence[ProbeSet]) -> _Datasets:
    """Tasks that each stand alone ask different things of their text, and so are no cluster."""
    names: list[str] = []
    sources: list[str] = []
    of_task: list[int] = []
    for set_ in sets:
        for task in set_.tasks:
            if set_.each_alone or task is set_.tasks[0]:
                names.append(f"{set_.name}:{task.name}" if set_.each_alone else set_.name)
                sources.append(names[-1] if set_.each_alone else set_.source)
            of_task.append(len(names) - 1)
    return _Datasets(names, sources, np.array(of_task))


def _n_test(set_: ProbeSet) -> int:
    used = np.unique(np.concatenate([task.examples for task in set_.tasks]))
    return int((set_.split[used] == 2).sum())


# Features


def _sae_features(sae: SAE, set_: ProbeSet, x: Float[Tensor, "n_wanted d"]) -> _Features:
    code, train = _encoded(sae, set_, x), set_.split == 0
    if code.values.device.type == "mps":  # has no float64
        code = SparseCode(*(part.cpu() for part in code))
    in_train = torch.from_numpy(train).to(code.indices.device)[sparse.rows_of(code)]
    latents = code.indices[in_train].unique()
    known = torch.isin(code.indices, latents)
    indices = torch.searchsorted(latents, code.indices[known])
    values, in_train = code.values[known].double(), in_train[known]
    total = torch.bincount(indices[in_train], values[in_train].abs(), len(latents))
    scale = total / torch.bincount(indices[in_train], minlength=len(latents))
    ends = torch.cat([code.offsets.new_zeros(1), known.cumsum(0)])[code.offsets]
    return _Features(SparseCode(indices, values / scale[indices], ends), latents)


def _encoded(sae: SAE, set_: ProbeSet, x: Float[Tensor, "n_wanted d"]) -> SparseCode:
    """The mean code of each example, some examples at a time."""
    order = torch.from_numpy(np.argsort(set_.example_of, kind="stable"))
    lengths = np.bincount(set_.example_of, minlength=set_.n_examples)
    ends, first, parts = np.cumsum(lengths), 0, []
    device = _device(sae)
    while first < set_.n_examples:
        start = ends[first] - lengths[first]
        last = max(first + 1, int(np.searchsorted(ends, start + _TOKENS, side="right")))
        tokens = x[order[start : ends[last - 1]]].to(device, torch.float32)
        code = sae.encode_sparse(tokens)
        parts.append(_pooled(code, torch.from_numpy(lengths[first:last]).to(device), sae.d_sae))
        first = last
    return sparse.concatenate(parts)


def _device(sae: SAE) -> torch.device:
    weights = getattr(sae, "W_dec", None)
    return torch.device("cpu") if weights is None else weights.device


def _pooled(code: SparseCode, lengths: Int[Tensor, " e"], d_sae: int) -> SparseCode:
    """The mean over each example's tokens, which follow each other, from the active latents alone."""
    numbers = torch.arange(len(lengths), device=lengths.device)
    example = numbers.repeat_interleave(lengths)[sparse.rows_of(code)]
    pairs, order = torch.sort(example * d_sae + code.indices, stable=True)
    pairs, place = pairs.unique_consecutive(return_inverse=True)
    sums = torch.zeros(len(pairs), dtype=torch.float64, device=pairs.device)
    sums.index_add_(0, place, code.values[order].double())
    pairs, sums = pairs[sums != 0], sums[sums != 0]
    example = pairs // d_sae
    offsets = torch.searchsorted(example, torch.arange(len(lengths) + 1, device=pairs.device))
    return SparseCode(pairs % d_sae, sums / lengths[example], offsets)


def _raw_features(set_: ProbeSet, x: Float[Tensor, "n_wanted d"]) -> _Features:
    """The activation itself, standardised; dimensions that do not vary in training are left out."""
    example = torch.from_numpy(set_.example_of)
    pooled = torch.zeros(set_.n_examples, x.shape[1], dtype=torch.float64)
    for chunk, of in zip(x.split(_TOKENS), example.split(_TOKENS), strict=True):
        pooled.index_add_(0, of, chunk.double())
    pooled /= torch.bincount(example, minlength=set_.n_examples)[:, None]
    train = pooled[torch.from_numpy(set_.split == 0)]
    (varying,) = (train != train[0]).any(0).nonzero(as_tuple=True)
    std, mean = torch.std_mean(train[:, varying], 0, correction=0)
    return _Features(sparse.from_dense((pooled[:, varying] - mean) / std), varying)


def _raw_auc(sets: Sequence[ProbeSet], activations: Sequence[Tensor]) -> Tensor:
    features = (_raw_features(set_, x) for set_, x in zip(sets, activations, strict=True))
    return torch.from_numpy(_probe(sets, features, K_CHOICES, shuffled=False).auc)


# Probes


def _probe(
    sets: Sequence[ProbeSet], features: Iterable[_Features], k: Sequence[int], shuffled: bool
) -> _Found:
    parts = [_judged(questions, k) for questions in _some(_questions(sets, features, shuffled))]
    if not parts:
        return _Found(np.empty((0, len(k) + 1)), np.empty((0, len(k) + 1)))
    return _Found(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def _questions(
    sets: Sequence[ProbeSet], features: Iterable[_Features], shuffled: bool
) -> Iterator[_Question]:
    for set_, seen in zip(sets, features, strict=True):
        device = seen.latents.device
        for task in set_.tasks:
            parts = [set_.split[task.examples] == part for part in range(len(_PARTS))]
            y = _shuffled(set_, task, parts) if shuffled else task.y
            yield _Question(
                seen,
                tuple(torch.from_numpy(task.examples[part]).to(device) for part in parts),
                tuple(torch.from_numpy(y[part]).to(device) for part in parts),
            )


def _shuffled(
    set_: ProbeSet, task: Task, parts: Sequence[Bool[np.ndarray, " n"]]
) -> Bool[np.ndarray, " n"]:
    """Labels that mean nothing where something is learned or chosen; those of the test stay."""
    digest = hashlib.sha256(f"{set_.name}:{task.name}".encode()).digest()
    rng, y = np.random.default_rng(list(digest)), task.y.copy()
    for part in parts[:2]:
        y[part] = rng.permutation(y[part])
    return y


def _some(questions: Iterable[_Question]) -> Iterator[list[_Question]]:
    """As many as are solved together."""
    group: list[_Question] = []
    held = 0
    for question in questions:
        group.append(question)
        counts = question.features.code.offsets.diff()
        held += int(counts[question.examples[0]].sum())
        held += 2 * len(logistic.GRID) * len(question.features.latents)
        if held >= _HELD:
            yield group
            group, held = [], 0
    if group:
        yield group


def _judged(questions: Sequence[_Question], k: Sequence[int]) -> _Found:
    *learned, test = (logistic.padded(ys) for ys in zip(*(q.y for q in questions), strict=True))
    columns = []
    for scores in _test_scores(questions, k, learned):
        right = ((scores > 0) == test.y) & test.used
        columns.append((logistic.auc(scores, *test), right.sum(1).double() / test.used.sum(1)))
    return _Found(*(torch.stack(part, 1).cpu().numpy() for part in zip(*columns, strict=True)))


def _test_scores(
    questions: Sequence[_Question], k: Sequence[int], learned: Sequence[logistic.Labels]
) -> Iterator[Float[Tensor, "tasks n"]]:
    """Of one probe for each task: with every k, then with all latents. No label of a test is seen here."""
    train, validation = learned
    best = [_best(q, max(k)) for q in questions]
    X = [
        pad_sequence(
            [_columns(q, i, b, max(k)) for q, b in zip(questions, best, strict=True)], True
        )
        for i in range(len(_PARTS))
    ]
    for n in k:
        fit = logistic.fit_few(X[0][..., :n], train)
        validated, tested = (fit.w @ x[..., :n].mT + fit.b[..., None] for x in X[1:])
        yield _of_best(validated, tested, validation)
    n_features = max(1, *(len(q.features.latents) for q in questions))
    fit = logistic.fit_many([_rows(q, 0) for q in questions], n_features, train)
    yield _of_best(_linear(fit, questions, 1), _linear(fit, questions, 2), validation)


def _of_best(
    validated: Float[Tensor, "tasks c n_validation"],
    tested: Float[Tensor, "tasks c n_test"],
    validation: logistic.Labels,
) -> Float[Tensor, "tasks n_test"]:
    C = logistic.choose(validated, validation)
    return tested[torch.arange(len(C), device=C.device), C]


def _best(question: _Question, k: int) -> Int[Tensor, " at_most_k"]:
    """The latents whose means differ most, best first: k, or as many as there are."""
    code, y, m = _rows(question, 0), question.y[0], len(question.features.latents)
    share = torch.where(y, 1 / y.sum(), -1 / (~y).sum()).double()[sparse.rows_of(code)]
    gap = (
        torch.bincount(code.indices, share * code.values, m)
        .double()
        .abs()
        .round(decimals=_DECIMALS)
    )
    fires = torch.bincount(code.indices, minlength=m) > 0
    order = torch.where(fires, gap, -1.0).sort(descending=True, stable=True).indices[:k]
    return order[fires[order]]


def _rows(question: _Question, part: int) -> SparseCode:
    """Of the examples of one part of the split."""
    return sparse.take(question.features.code, question.examples[part])


def _columns(
    question: _Question, part: int, latents: Int[Tensor, " at_most_k"], k: int
) -> Float[Tensor, "n k"]:
    """Some latents, dense, with zeros where there are fewer than k."""
    code = _rows(question, part)
    place = latents.new_full(question.features.latents.shape, -1)
    place[latents] = torch.arange(len(latents), device=latents.device)
    column = place[code.indices]
    known = column >= 0
    X = code.values.new_zeros(len(code.offsets) - 1, k)
    X[sparse.rows_of(code)[known], column[known]] = code.values[known]
    return X


def _linear(
    fit: logistic.Fit, questions: Sequence[_Question], part: int
) -> Float[Tensor, "tasks c n"]:
    scores = []
    for w, b, question in zip(fit.w, fit.b, questions, strict=True):
        code = _rows(question, part)
        scores.append(kernels.bag(code.indices, w.T.contiguous(), code.offsets, code.values) + b)
    return pad_sequence(scores, True).mT
