"""Text: where documents come from, which side of the split they are on, how they become tokens.

Training and evaluation text never share a document: the side is decided by the hash of a document's
text, so that identical texts are on one side however often they occur. On each side the documents
form one stream, put apart by the model's BOS (its EOS where it has no BOS; by nothing where it has
neither). A row is that same token followed by the next `context - 1` tokens of the stream; what does
not fill a row at the end is dropped. Amounts of tokens always count the tokens that SAEs see: those
that are not special. The evaluation text takes no more than `EVAL_ROWS` rows' worth of a document, from
a place that its content decides: tokens of one document are alike, and many documents tell more than
much of a few.
"""

import hashlib
import importlib
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tokenize import open as open_source
from typing import Any, Literal, NamedTuple, final

import numpy as np
from jaxtyping import Bool, Int
from transformers import PreTrainedTokenizerBase

from saebench.errors import UserError

_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "_bundled", "encodings"}
_TESTS = {"test", "tests", "idle_test", "idle_tests"}
_FILE_KINDS = (".jsonl", ".txt", ".parquet")
_TXT_DOCUMENT_CHARACTERS = 2_000
_BATCH_CHARACTERS = 200_000


class TooShort(UserError):
    """There is less text than was asked for."""


EVAL_ROWS = 16
"""Of one document in the evaluation text, at the most."""


class Document(NamedTuple):
    name: str
    text: str


class Draw(NamedTuple):
    """One of several texts that the documents kept from training are dealt into."""

    number: int
    of: int


WHOLE = Draw(0, 1)


class TokenDocument(NamedTuple):
    """A document that came as token ids of the model's own tokenizer."""

    name: str
    ids: Int[np.ndarray, " n"]


@final
@dataclass(frozen=True)
class Builtin:
    """Text that is there wherever this package is: `builtin:python-stdlib`."""

    name: Literal["python-stdlib"]


@final
@dataclass(frozen=True)
class HubDataset:
    """A data set of the Hugging Face Hub (or what `datasets` takes for one)."""

    dataset: str
    config: str | None
    split: str
    field: str
    """Holds a text, or a list of token ids."""
    revision: str | None
    streaming: bool
    """Read over the network as needed; nothing is downloaded whole."""


@final
@dataclass(frozen=True)
class Files:
    """Local .jsonl, .parquet and .txt files.

    A .txt file is split at blank lines, and the pieces are grouped into documents of at least 2,000
    characters, so that one big file still gives documents for training and for evaluation.
    """

    pattern: str
    """Glob pattern: absolute, or relative to `folder`."""
    folder: Path
    field: str
    """Of .jsonl and .parquet: holds a text, or a list of token ids. Not used for .txt."""


Source = Builtin | HubDataset | Files


class TextTokens(NamedTuple):
    """The rows of tokens that SAEs are trained and scored on."""

    train: Int[np.ndarray, "train_rows context"]
    evaluation: Int[np.ndarray, "eval_rows context"]
    fingerprint_train: str
    fingerprint_eval: str
    special_ids: frozenset[int]
    context: int
    documents: Int[np.ndarray, " eval_rows"]
    """Which document each row of the evaluation text begins in. Rows of one document are alike, so that documents are
    what is resampled."""


def stdlib_documents(with_tests: bool = False) -> Iterator[Document]:
    """The running Python's own library, and the English prose of its `help()` topics."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        skipped = _SKIPPED if with_tests else _SKIPPED | _TESTS
        if skipped.intersection(parts) or parts[:2] == ("pydoc_data", "topics"):
            continue
        try:
            with open_source(path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
        if text.strip():
            yield Document(".".join(parts), text)
    for topic, text in sorted(importlib.import_module("pydoc_data.topics").topics.items()):
        yield Document(f"pydoc_data.topics:{topic}", text)


def documents(source: Source) -> Iterator[Document | TokenDocument]:
    """The documents of a source, read as they are asked for, always in the same order."""
    if isinstance(source, Builtin):
        return _shuffled_stdlib()
    if isinstance(source, HubDataset):
        return _hub_documents(source)
    return _file_documents(source)


def is_eval(document: Document | TokenDocument, eval_share: float) -> bool:
    """Whether a document is kept for evaluation: by its content, never by place or name."""
    return (
        int.from_bytes(hashlib.sha256(_content(document)).digest()[:8], "big") / 2**64 < eval_share
    )


def hand_of(document: Document | TokenDocument, n: int) -> int:
    """To which of n texts a document is dealt: by its content too, and apart from the side it is on."""
    digest = hashlib.sha256(b"hand of " + _content(document)).digest()
    return int.from_bytes(digest[:8], "big") % n


def _content(document: Document | TokenDocument) -> bytes:
    if isinstance(document, TokenDocument):
        return document.ids.astype("<i8").tobytes()
    return document.text.encode("utf-8", "surrogatepass")


def tokenize(  # noqa: PLR0913  (all of these determine the tokens, and a suite names each)
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    train_tokens: int,
    eval_tokens: int,
    eval_share: float = 0.1,
    train_passes: int = 1,
    draw: Draw = WHOLE,
) -> TextTokens:
    """Just enough rows for both amounts; reading stops there.

    `train_passes` is how many times the trainer may go over the training rows: with 4, a quarter of
    `train_tokens` is enough. What there is beyond that is used all the same, up to `train_tokens`: tokens are only
    repeated where there are no more of them.
    """
    _check_amounts(context, eval_share, train_passes)
    between = separator(tokenizer)
    special = special_ids(tokenizer)
    least = -(-train_tokens // train_passes)
    train = _Side(train_tokens, context, between, special, None)
    held_out = _Side(eval_tokens, context, between, special, EVAL_ROWS * context)
    wanted = _wanted(documents(source), train, held_out, eval_share, draw)
    for side, ids in _encoded(wanted, tokenizer):
        side.add(ids)
    if not (train.has(least) and held_out.has(eval_tokens)):
        raise TooShort(
            f"the text ends too early: it has {train.count:,} of {least:,} training tokens"
            f"{f' (times {train_passes} passes)' if train_passes > 1 else ''} and "
            f"{held_out.count:,} of {held_out.needed:,} evaluation tokens, special tokens not "
            "counted. Lower train_tokens or eval_tokens, raise train_passes, or give more text"
        )
    rows, eval_rows = train.rows(), held_out.rows()
    return TextTokens(
        train=rows,
        evaluation=eval_rows,
        fingerprint_train=_fingerprint(rows, special),
        fingerprint_eval=_fingerprint(eval_rows, special),
        special_ids=special,
        context=context,
        documents=held_out.documents()[: len(eval_rows)],
    )


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """BOS, EOS, PAD and whatever else the tokenizer marks as special."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added.union(tokenizer.all_special_ids))


def special_mask(
    rows: Int[np.ndarray, "*shape"], special_ids: frozenset[int]
) -> Bool[np.ndarray, "*shape"]:
    """True where the token is special, and so is seen by no SAE."""
    return np.isin(rows, np.array(sorted(special_ids), dtype=np.int64))


@final
class _Side:
    """The stream of one side of the split, as far as it is needed."""

    def __init__(
        self,
        needed: int,
        context: int,
        separator: int | None,
        special: frozenset[int],
        most: int | None,
    ) -> None:
        """`most`: tokens of one document; None takes all."""
        self._most = most
        self.needed, self.context, self.separator, self.special = (
            needed,
            context,
            separator,
            special,
        )
        self._pieces: list[np.ndarray] = []
        self._begins: list[int] = []
        self._streamed = self._length = 0

    @property
    def full(self) -> bool:
        """Enough even after the end that fills no row is dropped."""
        return self.needed == 0 or self._streamed >= self.needed + self.context

    @property
    def count(self) -> int:
        """Tokens in whole rows that are not special."""
        return int((~special_mask(self._whole_rows(), self.special)).sum())

    def has(self, tokens: int) -> bool:
        """Of no more tokens than are needed."""
        return self.full or self.count >= tokens

    def add(self, ids: Int[np.ndarray, " n"]) -> None:
        if len(ids) and ids[0] == self.separator:
            ids = ids[1:]
        ids = _some_of(ids, self._most)
        if not len(ids):
            return
        if self._pieces and self.separator is not None:
            self._pieces.append(np.array([self.separator], dtype=np.int32))
            self._length += 1
        self._begins.append(self._length)
        self._length += len(ids)
        self._pieces.append(ids.astype(np.int32))
        self._streamed += int((~special_mask(ids, self.special)).sum())

    def rows(self) -> Int[np.ndarray, "rows context"]:
        """The first rows that hold as many tokens as are needed."""
        rows = self._whole_rows()
        counts = np.cumsum((~special_mask(rows, self.special)).sum(1))
        return rows[: int(np.searchsorted(counts, self.needed)) + 1] if self.needed else rows[:0]

    def documents(self) -> Int[np.ndarray, " rows"]:
        """The number of the document that each row begins in."""
        width = self.context - (self.separator is not None)
        starts = np.arange(self._length // width) * width
        return np.maximum(np.searchsorted(self._begins, starts, side="right") - 1, 0)

    def _whole_rows(self) -> Int[np.ndarray, "rows context"]:
        stream = np.concatenate([np.empty(0, np.int32), *self._pieces])
        width = self.context - (self.separator is not None)
        rows = stream[: len(stream) // width * width].reshape(-1, width)
        return rows if self.separator is None else np.insert(rows, 0, self.separator, axis=1)


def _some_of(ids: Int[np.ndarray, " n"], most: int | None) -> Int[np.ndarray, " m"]:
    """So many in a row, from a place that the document's content decides: beginnings are unlike the rest."""
    if most is None or len(ids) <= most:
        return ids
    digest = hashlib.sha256(b"part of " + ids.astype("<i8").tobytes()).digest()
    start = int.from_bytes(digest[:8], "big") % (len(ids) - most + 1)
    return ids[start : start + most]


def _wanted(
    found: Iterator[Document | TokenDocument],
    train: _Side,
    held_out: _Side,
    eval_share: float,
    draw: Draw,
) -> Iterator[tuple[_Side, Document | TokenDocument]]:
    """Documents with the side they are on, until both sides are full."""
    while not (train.full and held_out.full):
        document = next(found, None)
        if document is None:
            return
        side = held_out if is_eval(document, eval_share) else train
        if not side.full and (side is train or hand_of(document, draw.of) == draw.number):
            yield side, document


def _encoded(
    wanted: Iterator[tuple[_Side, Document | TokenDocument]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[_Side, np.ndarray]]:
    """Token ids, document after document; texts are tokenized many at a time, which is faster."""
    sides: list[_Side] = []
    texts: list[str] = []
    characters = 0

    def flush() -> Iterator[tuple[_Side, np.ndarray]]:
        if texts:
            encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            for side, ids in zip(sides, encoded, strict=True):
                yield side, np.array(ids, dtype=np.int32)
        sides.clear()
        texts.clear()

    for side, document in wanted:
        if isinstance(document, TokenDocument):
            yield side, document.ids
            continue
        sides.append(side)
        texts.append(document.text)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield from flush()
            characters = 0
    yield from flush()


def _check_amounts(context: int, eval_share: float, train_passes: int) -> None:
    if context < 2:
        raise UserError(f"context {context}: a row needs at least 2 tokens")
    if not 0 < eval_share < 1:
        raise UserError(f"eval_share {eval_share}: expected a share between 0 and 1, such as 0.1")
    if train_passes < 1:
        raise UserError(f"train_passes {train_passes}: expected 1 or more")


def separator(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that stands in front of a text and between two: BOS, or EOS where there is none."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    found = eos if bos is None else bos
    return None if found is None else int(found)


def _fingerprint(rows: Int[np.ndarray, "rows context"], special: frozenset[int]) -> str:
    shape = {"context": rows.shape[1], "special_ids": sorted(special)}
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    digest.update(rows.astype("<i4").tobytes())
    return digest.hexdigest()


def _shuffled_stdlib() -> Iterator[Document]:
    """In an order given by hashes, so that any first part is like the whole."""
    ordered = sorted(
        stdlib_documents(),
        key=lambda d: hashlib.sha256(f"order of {d.name}".encode()).digest(),
    )
    yield from ordered


def _hub_documents(source: HubDataset) -> Iterator[Document | TokenDocument]:
    import datasets  # takes a second to import, and most runs have no use for it

    try:
        rows = datasets.load_dataset(
            source.dataset,
            source.config,
            split=source.split,
            revision=source.revision,
            streaming=source.streaming,
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"data set {source.dataset!r} (config {source.config!r}, split {source.split!r}, "
            f"revision {source.revision!r}) could not be loaded: {error}. Without a network, set "
            "HF_HUB_OFFLINE=1 to use what was downloaded before, or name local files: "
            "{files: '*.jsonl', field: text}"
        ) from error
    for number, row in enumerate(rows):
        yield _document(f"{source.dataset}:{number}", row, source.field)


def matching(pattern: str, folder: Path) -> list[Path]:
    """The file of that very name, else all files that the pattern describes: relative to `folder`, or absolute."""
    try:
        given = Path(pattern).expanduser()
        if (folder / given).is_file():
            return [folder / given]
        root = Path(given.anchor) if given.is_absolute() else folder
        relative = given.relative_to(root) if given.is_absolute() else given
        paths = sorted(p for p in root.glob(str(relative)) if p.is_file())
    # The last two are what Python 3.11 says of "." and of the home of somebody unknown.
    except (ValueError, OSError, IndexError, RuntimeError) as error:
        raise UserError(
            f"{pattern!r} names no files: {error}; expected a path, or a pattern such as 'texts/*.csv'"
        ) from error
    if not paths:
        raise UserError(
            f"no file matches {pattern!r} (looked in {root}); a pattern is relative to the folder of the suite "
            "file, or absolute"
        )
    return paths


def _file_documents(source: Files) -> Iterator[Document | TokenDocument]:
    for path in matching(source.pattern, source.folder):
        if path.suffix not in _FILE_KINDS:
            raise UserError(f"{path}: expected a file that ends in one of {', '.join(_FILE_KINDS)}")
        if path.suffix == ".txt":
            yield from _txt_documents(path)
        elif path.suffix == ".jsonl":
            yield from _jsonl_documents(path, source.field)
        else:
            yield from _parquet_documents(path, source.field)


def _txt_documents(path: Path) -> Iterator[Document]:
    lines: list[str] = []
    characters = number = 0
    with path.open(encoding="utf-8") as file:
        for line in file:
            lines.append(line)
            characters += len(line)
            if not line.strip() and characters >= _TXT_DOCUMENT_CHARACTERS:
                yield Document(f"{path.name}:{number}", "".join(lines))
                lines, characters, number = [], 0, number + 1
    if "".join(lines).strip():
        yield Document(f"{path.name}:{number}", "".join(lines))


def _jsonl_documents(path: Path, field: str) -> Iterator[Document | TokenDocument]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not a JSON object: {error}") from error
            yield _document(f"{path.name}:{number}", row, field)


def _parquet_documents(path: Path, field: str) -> Iterator[Document | TokenDocument]:
    import pyarrow.parquet  # half a second, and most runs read no parquet

    file = pyarrow.parquet.ParquetFile(path)
    if field not in file.schema_arrow.names:
        raise UserError(_no_field(path.name, field, file.schema_arrow.names))
    number = 0
    for batch in file.iter_batches(columns=[field]):
        for row in batch.to_pylist():
            yield _document(f"{path.name}:{number}", row, field)
            number += 1


def _document(name: str, row: Any, field: str) -> Document | TokenDocument:
    if not isinstance(row, dict) or field not in row:
        raise UserError(_no_field(name, field, list(row) if isinstance(row, dict) else []))
    value = row[field]
    if isinstance(value, str):
        return Document(name, value)
    ids = np.asarray(value)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(
            f"{name}: field {field!r} holds {type(value).__name__}; expected a text or a list of "
            "token ids"
        )
    return TokenDocument(name, ids)


def _no_field(name: str, field: str, fields: list[str]) -> str:
    return f"{name}: no field {field!r}; there are: {', '.join(map(str, fields)) or 'none'}"
