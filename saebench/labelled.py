"""Labelled text for probing: where it comes from, what is asked of it, and how it is split.

A dataset is rows of a prompt and a target. Prompts that are the same tokens count once, and not at all where their
targets differ, so that no text is in training and in test. Of each class the rows are put in an order given by
hashes of the seed and the prompt, and cut into training, validation and test: where a row stands in its file, and what
other datasets there are, changes nothing. With two classes one question is asked, and the second class in sorted order
(by value where all are numbers) is the positive one; with more, each class is asked for against the rest. Every task is
balanced within each split: its negatives are as many as its positives, drawn from the other classes equally as far
as they last.

What cannot be used, from a single row to a whole dataset, is left out with the reason, and the rest goes on.
"""

import gzip
import hashlib
import json
import math
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import accumulate, combinations, pairwise
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, NamedTuple, final

import numpy as np
from jaxtyping import Bool, Int

from saebench import codelabels, text, worldlabels
from saebench.codelabels import LEAST_PER_CLASS, SPLITS, lacking
from saebench.errors import UserError
from saebench.types import Excerpt, Lab, Omitted, Spec

STDLIB: Final = "builtin:python-stdlib"
SYNTHETIC: Final = "builtin:synthetic"
MOST_CLASSES = 20
"""Of a dataset: numbers of more values than these are quantities."""
SHARED = 0.1
"""Share of the prompts of the smaller of two datasets; with more in common, they are from one source."""
MISSING = ("", "NA", "N/A", "<NA>", "NaN", "nan", "NULL", "null")
"""What stands in a file for a target that is not there."""
FILE_KINDS = (".csv", ".csv.gz", ".csv.zst", ".jsonl", ".parquet")

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?inf(inity)?", re.IGNORECASE)
_BATCH_CHARACTERS = 500_000
_BROKEN = (OSError, EOFError, zlib.error, ValueError, NotImplementedError, RecursionError)
"""What reading a file that is not what its name says can raise."""


@final
@dataclass(frozen=True)
class Texts:
    """Labelled datasets of one origin: exactly one of `source`, `files` and `dataset` is given."""

    source: Literal["builtin:python-stdlib", "builtin:synthetic"] | None = None
    """The tokens of held-out Python source, with the labels of `codelabels`; or tokens of the synthetic world that the
    suite is about, with those of `worldlabels`."""
    files: str | None = None
    """A path or pattern of .csv, .csv.zst, .csv.gz, .jsonl or .parquet files, relative to the suite file. Each file is
    a dataset."""
    dataset: str | None = None
    """Hub id of a dataset."""
    config: str | None = None
    split: str | None = None
    """Of a dataset. Its rows are split anew; `train[:10000]` takes the first of them."""
    revision: str | None = None
    text: str = "prompt"
    """The column with the text."""
    label: str = "target"
    """The column with the class."""
    pool: Literal["last", "mean"] = "last"
    """Whether a text is known by the activation at its last token, or by the mean over all that are not special."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        given = [n for n in ("source", "files", "dataset") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of source, files and dataset; got {' and '.join(given) or 'none'}"
            )
        for name in ("config", "split", "revision"):
            if self.dataset is None and getattr(self, name) is not None:
                raise ValueError(f"{name} has no meaning beside {given[0]}; remove it")
        if self.dataset is not None and self.split is None:
            raise ValueError("a dataset needs split, such as `split: train`")
        for field in fields(self):
            changed = getattr(self, field.name) != field.default
            if self.source is not None and changed and field.name != "source":
                raise ValueError(f"{field.name} has no meaning beside source; remove it")
        if self.text == self.label:
            raise ValueError(
                f"text and label are both the column {self.text!r}; expected two columns"
            )

    def identity(self) -> Spec:
        """For results: no folder of this machine."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if self.source is not None:
            return {"source": self.source}
        if self.files is not None:
            given["files"] = Path(self.files).name
        if self.dataset is not None and Path(self.dataset).is_absolute():
            given["dataset"] = Path(self.dataset).name
        return given


class Options(NamedTuple):
    """Examples of a task for each split, at the most, and the seed of what is drawn."""

    train: int
    validation: int
    test: int
    seed: int


class Task(NamedTuple):
    """One binary question about some examples of a set."""

    name: str
    """Empty where the set asks one thing only, else the class that is asked for."""
    examples: Int[np.ndarray, " n"]
    """Numbers of the set's examples, ascending."""
    y: Bool[np.ndarray, " n"]


class ProbeSet(NamedTuple):
    """Texts as tokens, the examples in them, one split, and what is asked."""

    name: str
    source: str
    """Sets that have texts in common have it in common: the name of the first of them."""
    pool: Literal["last", "mean", "token"]
    """What the activation of an example is: that of its one position (`last`, `token`) or the mean over them."""
    excerpts: tuple[Excerpt, ...]
    """Sorted by length."""
    example_of: Int[np.ndarray, " n_wanted"]
    """The example that each wanted position belongs to, excerpt after excerpt."""
    n_examples: int
    split: Int[np.ndarray, " n_examples"]
    """0 training, 1 validation, 2 test: the same for all tasks."""
    tasks: tuple[Task, ...]
    each_alone: bool
    """Whether each task counts as a dataset of its own, or all of them together as one."""


class Labelled(NamedTuple):
    """All sets of an eval."""

    sets: tuple[ProbeSet, ...]
    omitted: tuple[Omitted, ...]
    fingerprint: str


class _Unusable(ValueError):
    """A dataset is left out; the message says why."""


class _Table(NamedTuple):
    """The two columns of a dataset, as they were read."""

    prompts: Sequence[Any]
    targets: Sequence[Any]


class _Row(NamedTuple):
    prompt: str
    target: str
    order: bytes
    """Hash of the seed and the prompt."""
    ids: Int[np.ndarray, " length"]


class _Found(NamedTuple):
    """A set, and hashes of all prompts of its dataset."""

    made: ProbeSet
    prompts: frozenset[bytes]


def read(datasets: Sequence[Texts], lab: Lab, options: Options) -> Labelled:
    """All sets of all datasets, in this order; without running the model.

    Raises `UserError` where files or a dataset cannot be found. What is found but cannot be used is named in `omitted`,
    even where that is everything.
    """
    _check(options)
    _check_sources(datasets, lab)
    found: list[_Found] = []
    omitted: list[Omitted] = []
    for texts in datasets:
        if texts.source is not None:
            found += _built_in(texts.source, lab, options, omitted)
            continue
        for name, load in _tables(texts, lab.folder):
            try:
                rows = _rows(name, load(), lab, options.seed, texts.label, omitted)
                made = _set(name, texts.pool, rows, lab, options, omitted)
            except _Unusable as error:
                omitted.append(Omitted(name, str(error)))
            else:
                found.append(_Found(made, frozenset(row.order for row in rows)))
    sets = _with_sources(found)
    return Labelled(sets, tuple(omitted), _fingerprint(sets))


def _check(options: Options) -> None:
    for name, size in zip(SPLITS, options[:3], strict=True):
        if size < 2 * LEAST_PER_CLASS:
            raise UserError(
                f"{name} is {size}; expected {2 * LEAST_PER_CLASS} examples or more, half of them positive"
            )


def _check_sources(datasets: Sequence[Texts], lab: Lab) -> None:
    """A world has no text but its own, and a language model has no world."""
    for texts in datasets:
        if (texts.source == SYNTHETIC) != (lab.truth is not None):
            raise UserError(
                f"the labelled tokens of {SYNTHETIC} go with the models {SYNTHETIC}-small and {SYNTHETIC}-16k, and "
                f"these with no other texts; got the model {lab.identity['id']} and the texts "
                f"{', '.join(map(str, texts.identity().values()))}"
            )


def _built_in(source: str, lab: Lab, options: Options, omitted: list[Omitted]) -> list[_Found]:
    if source == SYNTHETIC:
        assert lab.truth is not None, "the sources were checked"
        name, read_ = worldlabels.NAME, partial(worldlabels.read, lab, lab.truth)
    else:
        name, read_ = codelabels.NAME, partial(codelabels.read, lab)
    found = read_(options[:3], options.seed)
    omitted += found.omitted
    if not found.tasks:
        return []
    n = len(found.split)
    made = ProbeSet(
        name=name,
        source=name,
        pool="token",
        excerpts=found.excerpts,
        example_of=np.arange(n),
        n_examples=n,
        split=found.split,
        tasks=tuple(Task(task, *drawn) for task, drawn in found.tasks.items()),
        each_alone=True,
    )
    return [_Found(made, frozenset())]


# Where rows come from


def _tables(texts: Texts, folder: Path) -> Iterator[tuple[str, Callable[[], _Table]]]:
    """Every dataset by its name, to be loaded."""
    if texts.files is None:
        table = _hub_table(texts)
        yield _hub_name(texts), table
        return
    for path in text.matching(texts.files, folder):
        yield _stem(path), partial(_file_table, path, texts)


def _stem(path: Path) -> str:
    kind = _file_kind(path)
    return _writable(path.name if kind is None else path.name.removesuffix(kind))


def _writable(name: str) -> str:
    """Names of files and fields of JSON can hold what no text file can: halves of characters."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _file_kind(path: Path) -> str | None:
    return next((kind for kind in FILE_KINDS if path.name.endswith(kind)), None)


def _file_table(path: Path, texts: Texts) -> _Table:
    try:
        columns = _columns(path, texts)
    except _BROKEN as error:
        said = str(error).replace(str(path), path.name).partition("\n")[0]
        raise _Unusable(_writable(f"it cannot be read: {type(error).__name__}: {said}")) from error
    return _chosen(columns, texts)


def _columns(path: Path, texts: Texts) -> Mapping[str, Sequence[Any]]:
    kind = _file_kind(path)
    if kind is None:
        raise ValueError(f"expected a file that ends in one of {', '.join(FILE_KINDS)}")
    if kind == ".jsonl":
        return _jsonl_columns(path)
    if kind == ".parquet":
        return _parquet_columns(path, texts)
    return _csv_columns(path, kind, texts)


def _check_once(names: Sequence[str], texts: Texts) -> None:
    for name in (texts.text, texts.label):
        if names.count(name) > 1:
            raise ValueError(f"the column {name!r} is there {names.count(name)} times")


def _csv_columns(path: Path, kind: str, texts: Texts) -> dict[str, list[str]]:
    """Everything as it is written: what is missing, and what is a number, is decided later for all formats alike."""
    import pandas as pd  # half a second, as is pyarrow, and most runs read no such file
    import pyarrow

    with ExitStack() as stack:
        file: Any = stack.enter_context(path.open("rb"))
        if kind == ".csv.gz":
            file = stack.enter_context(gzip.open(file))
        elif kind == ".csv.zst":
            file = stack.enter_context(pyarrow.CompressedInputStream(file, "zstd"))
        # The header is read as a row: pandas would give two columns of one name two names, and leave out what a row
        # has beyond the header.
        table = pd.read_csv(file, dtype=str, na_filter=False, header=None)
    names = table.iloc[0].tolist()
    _check_once(names, texts)
    return {name: table[i].tolist()[1:] for i, name in enumerate(names)}


def _jsonl_columns(path: Path) -> dict[str, list[Any]]:
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is no JSON object")
                rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _parquet_columns(path: Path, texts: Texts) -> dict[str, list[Any]]:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    names = file.schema_arrow.names
    _check_once(names, texts)
    wanted = [name for name in (texts.text, texts.label) if name in names]
    table = file.read(columns=wanted)
    return {name: table[name].to_pylist() if name in wanted else [] for name in names}


def _chosen(columns: Mapping[str, Sequence[Any]], texts: Texts) -> _Table:
    for name in (texts.text, texts.label):
        if name not in columns:
            there = _writable(", ".join(columns)) or "none"
            raise _Unusable(f"no column {name!r}; there are: {there}")
    return _Table(columns[texts.text], columns[texts.label])


def _hub_name(texts: Texts) -> str:
    identity = texts.identity()
    return "/".join(identity[key] for key in ("dataset", "config") if key in identity)


def _hub_table(texts: Texts) -> Callable[[], _Table]:
    import datasets  # takes a second to import, and most runs have no use for it

    try:
        rows = datasets.load_dataset(
            texts.dataset, texts.config, split=texts.split, revision=texts.revision
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"data set {texts.dataset!r} (config {texts.config!r}, split {texts.split!r}, revision "
            f"{texts.revision!r}) could not be loaded: {error.__cause__ or error}. Without a network, set "
            "HF_HUB_OFFLINE=1 to use what was downloaded before, or name local files: {files: '*.csv'}"
        ) from error

    def load() -> _Table:
        table = _chosen({name: rows[name] for name in rows.column_names}, texts)
        names = rows.features[texts.label]
        if not isinstance(names, datasets.ClassLabel):
            return _Table(list(table.prompts), list(table.targets))
        # Below zero is what such a column holds where the class is kept secret.
        known = [None if t is None or t < 0 else names.int2str(t) for t in table.targets]
        return _Table(list(table.prompts), known)

    return load


# Rows that can be used


def _rows(  # noqa: PLR0913  (a dataset, and whom to tell what of it is left out)
    name: str, table: _Table, lab: Lab, seed: int, label: str, omitted: list[Omitted]
) -> list[_Row]:
    """Each text once, sorted by length."""
    total = len(table.prompts)

    def leave_out(n: int, one: str, many: str) -> None:
        if n:
            omitted.append(Omitted(name, f"{n:,} of {total:,} rows {one if n == 1 else many}"))

    pairs = [(p, _written(t)) for p, t in zip(table.prompts, table.targets, strict=True)]
    targeted = [(p, t) for p, t in pairs if t is not None]
    leave_out(total - len(targeted), "has no target", "have no target")
    given = [(p, t) for p, t in targeted if _is_text(p)]
    leave_out(len(targeted) - len(given), "has no text", "have no text")
    names = _classes({t for _, t in given}, label)
    ids = _tokenized(sorted({p for p, _ in given}), lab)
    seen = [(p, names[t]) for p, t in given if p in ids]
    leave_out(len(given) - len(seen), "has a prompt of no tokens", "have prompts of no tokens")
    same = defaultdict[bytes, list[tuple[str, str]]](list)
    for p, t in seen:
        same[ids[p].tobytes()].append((p, t))
    clear = [group for group in same.values() if len({t for _, t in group}) == 1]
    n_clear = sum(map(len, clear))
    leave_out(
        len(seen) - n_clear,
        "has a prompt that is there with another target too",
        "have a prompt that is there with another target too",
    )
    leave_out(n_clear - len(clear), "repeats another row", "repeat other rows")
    kept = [_Row(p, t, _order(seed, p), ids[p]) for p, t in map(min, clear)]
    return sorted(kept, key=lambda row: (len(row.ids), row.ids.tobytes()))


def _written(target: Any) -> str | None:
    """A target as text; None where there is none."""
    if isinstance(target, float) and math.isnan(target):
        return None
    if isinstance(target, str | bool | int | float):
        written = _writable(str(target)).strip()
        return None if written in MISSING else written
    return None


def _is_text(prompt: Any) -> bool:
    """A lone surrogate, which JSON can hold, is no text."""
    if not isinstance(prompt, str):
        return False
    try:
        prompt.encode()
    except UnicodeEncodeError:
        return False
    return True


def _classes(targets: Collection[str], label: str) -> dict[str, str]:
    """The class that each target stands for: 1 and 1.0 are one. Raises where they are no classes."""
    numbers = all(map(_NUMBER.fullmatch, targets))
    values: Collection[Any] = {float(t) for t in targets} if numbers else targets
    if len(values) > MOST_CLASSES:
        so = "so it is a regression; probes here are for classes"
        most = f"at most {MOST_CLASSES} classes are probed"
        raise _Unusable(f"{label} has {len(values):,} values, {so if numbers else most}")
    if not numbers:
        return {t: t for t in targets}
    for value in values:
        if not value.is_integer():
            raise _Unusable(
                f"{label} has values that are no whole numbers, such as {value:g}, so it is a regression; probes "
                "here are for classes"
            )
    return {t: str(int(float(t))) for t in targets}


def _tokenized(prompts: list[str], lab: Lab) -> dict[str, np.ndarray]:
    """Token ids of the prompts that have any; of a long one the last, after the token that puts documents apart."""
    front = text.separator(lab.tokenizer)
    before = [] if front is None else [front]
    special = text.special_ids(lab.tokenizer)
    kept = lab.longest - len(before)
    found = {}
    for some in _batches(prompts):
        encoded = lab.tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]
        for prompt, ids in zip(some, encoded, strict=True):
            if not special.issuperset(ids[-kept:]):
                found[prompt] = np.array([*before, *ids[-kept:]], dtype=np.int64)
    return found


def _batches(prompts: list[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for prompt in prompts:
        batch.append(prompt)
        characters += len(prompt)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _order(seed: int, prompt: str) -> bytes:
    return hashlib.sha256(f"{seed} {prompt}".encode()).digest()


# What is asked


def _set(  # noqa: PLR0913  (a dataset, and whom to tell what of it is left out)
    name: str,
    pool: Literal["last", "mean"],
    rows: list[_Row],
    lab: Lab,
    options: Options,
    omitted: list[Omitted],
) -> ProbeSet:
    groups = _groups(rows, options)
    tasks = []
    for asked in list(groups)[1:] if len(groups) == 2 else groups:
        task = _task("" if len(groups) == 2 else asked, asked, groups)
        if isinstance(task, Task):
            tasks.append(task)
        elif len(groups) == 2:
            raise _Unusable(task)
        else:
            omitted.append(Omitted(f"{name}:{asked}", task))
    if not tasks:
        raise _Unusable("none of its classes can be asked for")
    split = np.zeros(len(rows), dtype=np.int64)
    for parts in groups.values():
        for number, part in enumerate(parts):
            split[part] = number
    used = np.unique(np.concatenate([task.examples for task in tasks]))
    special = text.special_ids(lab.tokenizer)
    excerpts = tuple(_excerpt(rows[i].ids, pool, special) for i in used)
    return ProbeSet(
        name=name,
        source=name,
        pool=pool,
        excerpts=excerpts,
        example_of=np.repeat(np.arange(len(used)), [len(e.wanted) for e in excerpts]),
        n_examples=len(used),
        split=split[used],
        tasks=tuple(t._replace(examples=np.searchsorted(used, t.examples)) for t in tasks),
        each_alone=False,
    )


_Groups = dict[str, list[list[int]]]
"""For each class in sorted order the rows of each split, in the order of their hashes."""


def _groups(rows: list[_Row], options: Options) -> _Groups:
    classes = sorted({row.target for row in rows}, key=_sorting({row.target for row in rows}))
    if len(classes) < 2:
        of = f" ({classes[0]!r})" if classes else ""
        raise _Unusable(
            f"{len(classes) or 'no'} class{of} in {len(rows):,} usable rows; a probe needs two"
        )
    groups: _Groups = {}
    for name in classes:
        members = [i for i, row in enumerate(rows) if row.target == name]
        members.sort(key=lambda i: rows[i].order)
        ends = np.cumsum([0, *_sizes(len(members), options)])
        groups[name] = [members[a:b] for a, b in pairwise(ends.tolist())]
    return groups


def _sorting(classes: Collection[str]) -> Callable[[str], Any]:
    return float if all(map(_NUMBER.fullmatch, classes)) else str


def _sizes(n: int, options: Options) -> list[int]:
    """Rows of a class for each split: half of what a task has there, or all there are in the same proportions."""
    wanted = [size // 2 for size in options[:3]]
    total = sum(wanted)
    if n >= total:
        return wanted
    return [n * b // total - n * a // total for a, b in pairwise(accumulate(wanted, initial=0))]


def _task(name: str, asked: str, groups: _Groups) -> Task | str:
    """One class against all others, or why it cannot be asked for."""
    positives = groups[asked]
    others = [
        [parts[i] for key, parts in groups.items() if key != asked] for i in range(len(SPLITS))
    ]
    counts = [sum(map(len, other)) for other in others]
    reason = lacking([len(part) for part in positives], counts)
    if reason is not None:
        return reason
    yes: list[int] = []
    no: list[int] = []
    for part, other, n_others in zip(positives, others, counts, strict=True):
        n = min(len(part), n_others)
        yes += part[:n]
        no += _evenly(other, n)
    examples = np.sort(np.array(yes + no, dtype=np.int64))
    return Task(name, examples, np.isin(examples, yes))


def _evenly(groups: Sequence[Sequence[int]], n: int) -> list[int]:
    """n in all, as many from each group as from any other that has them: the small ones give what they have."""
    taken: list[int] = []
    for done, group in enumerate(sorted(groups, key=len)):
        taken += group[: (n - len(taken)) // (len(groups) - done)]
    return taken


def _excerpt(
    ids: Int[np.ndarray, " length"], pool: Literal["last", "mean"], special: frozenset[int]
) -> Excerpt:
    # One call of NumPy for a handful of tokens would take longer.
    seen = [i for i, token in enumerate(ids.tolist()) if token not in special]
    return Excerpt(ids, np.array(seen if pool == "mean" else seen[-1:], dtype=np.int64))


# All sets together


def _with_sources(found: list[_Found]) -> tuple[ProbeSet, ...]:
    """Sets that share prompts, directly or through others, get the name of the first of them as their source."""
    names = [one.made.name for one in found]
    for name, n in Counter(names).items():
        if n > 1:
            raise UserError(f"{n} datasets are called {name!r}; rename files, or leave one out")
    source = {name: name for name in names}
    for a, b in combinations(found, 2):
        smaller = min(len(a.prompts), len(b.prompts))
        if len(a.prompts & b.prompts) > SHARED * smaller:
            first, second = sorted((source[a.made.name], source[b.made.name]))
            source = {name: first if s == second else s for name, s in source.items()}
    return tuple(one.made._replace(source=source[one.made.name]) for one in found)


def _fingerprint(sets: Iterable[ProbeSet]) -> str:
    digest = hashlib.sha256()
    for one in sets:
        names = {"name": one.name, "source": one.source, "pool": one.pool, "alone": one.each_alone}
        digest.update(json.dumps(names | {"tasks": [t.name for t in one.tasks]}).encode())
        arrays = [
            *(array for excerpt in one.excerpts for array in excerpt),
            one.example_of,
            one.split,
            *(array for task in one.tasks for array in (task.examples, task.y)),
        ]
        digest.update(np.array([len(a) for a in arrays], dtype="<i8").tobytes())
        for array in arrays:
            digest.update(array.astype("<i8").tobytes())
    return digest.hexdigest()
