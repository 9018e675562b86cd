"""Strangers' files, read with care: nothing here runs code, follows a path out of the folder, or trusts a size.

Every file is opened once, as a plain file and no link, and what was checked is what is read: a safetensors header is
checked before a tensor is made of it (its length, keys, dtypes, shapes and offsets, which have to cover the file
exactly), and the tensors are then read from the same open file, by those offsets. What zip archives (.npz, .pt) unpack
to is added up before anything is unpacked. What needs unpickling is read only where the user allows it, and
then by `torch.load(weights_only=True)`, without a second try.
"""

import copy
import math
import os
import pickle
import stat
import struct
import tokenize
import unicodedata
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from saebench import strict
from saebench.errors import UserError

_GIB = 1024**3
_MOST_HEADER = 2**20
_MOST_JSON = 2**20
_MOST_YAML = 2**16
_MOST_TENSORS = 1_024
_MOST_DIMENSIONS = 4
_MOST_FILES = 10_000
_DEEPEST_FOLDER = 16
_MOST_MEMBERS = _MOST_TENSORS + 16
_MOST_DIRECTORY = 2**20
_MOST_PICKLED = 2**21
_MOST_RATIO = 20
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}
_NUMPY = ("float64", "float32", "float16", "int64", "int32")
_SAFE_TORCH = (2, 10)
"""Before, weights_only=True could be made to run code (CVE-2025-32434) or to corrupt memory (CVE-2026-24747)."""
_UNPICKLING = (
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    EOFError,
    OSError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    NameError,
    ImportError,
    struct.error,
)
"""What torch's unpickler may stumble over in a file that is none."""


class Limits(NamedTuple):
    """What the user allows strangers' files."""

    max_bytes: int = 8 * _GIB
    """Of all files of a checkpoint together."""
    allow_pickle: bool = False
    """Whether weights that need unpickling are read at all."""


@final
class Source:
    """A folder, or one file by itself, that holds a checkpoint. Hidden files (.git, .cache) are passed over."""

    def __init__(self, path: Path, limits: Limits) -> None:
        """Raises `UserError` where there is nothing, or more than the limits allow."""
        self.path, self.limits = path, limits
        with _reading(path):
            # The user may name a link; what is below a folder may be none.
            real = path.resolve()
            kind = real.stat().st_mode
            if stat.S_ISDIR(kind):
                self.root, self._files = real, _files_below(real)
            elif stat.S_ISREG(kind):
                self.root, self._files = real.parent, {path.name: real}
            else:
                raise UserError(f"{path} is no plain file; expected the files of a checkpoint")
            total = sum(file.lstat().st_size for file in self._files.values())
        if total > limits.max_bytes:
            raise UserError(
                f"{path} holds {total / _GIB:.2f} GiB; --max-size allows {limits.max_bytes / _GIB:.2f}"
            )
        self._headers: dict[str, Mapping[str, _Entry]] = {}
        self._read: dict[str, dict[str, Any] | str] = {}

    @property
    def names(self) -> list[str]:
        """Of all files, as paths below the folder with `/` between, sorted."""
        return sorted(self._files)

    def has(self, *names: str) -> bool:
        return all(name in self._files for name in names)

    def within(self, folder: str) -> "Source":
        """The same for a folder below this one."""
        check_inside(folder)
        return Source(self.root / folder, self.limits)

    def json(self, name: str) -> dict[str, Any]:
        """An object. Keys that are there twice, numbers that are none and deep nesting are refused."""
        return self._parsed(name, strict.loads, _MOST_JSON)

    def yaml(self, name: str) -> dict[str, Any]:
        """A mapping of plain values, without aliases and tags."""
        return self._parsed(name, strict.loads_yaml, _MOST_YAML)

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """Of the tensors of a safetensors file, from its checked header alone."""
        if name not in self._headers:
            with self._opened(name) as file:
                self._headers[name] = _header(file, self._shown(name)).entries
        return {key: entry.shape for key, entry in self._headers[name].items()}

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Of a safetensors file."""
        with self._opened(name) as file:
            header = _header(file, self._shown(name))
            return {
                key: _tensor(file, header.starts_at, entry) for key, entry in header.entries.items()
            }

    def arrays(self, name: str) -> dict[str, Tensor]:
        """Of an .npz file of plain numbers."""
        with self._opened(name) as file:
            return _arrays(file, self._shown(name), self.limits.max_bytes)

    def pickled(self, name: str) -> dict[str, Any]:
        """What torch.save wrote, of plain values and tensors only. Raises `UserError` unless this is allowed."""
        where = self._shown(name)
        if not self.limits.allow_pickle:
            self._real(name)
            raise UserError(
                f"{where} has to be unpickled, which is not safe with strangers' files. If it is your own, or you "
                "trust where it is from, say --allow-pickle-weights"
            )
        _check_torch(torch.__version__)
        with self._opened(name) as file:
            return _pickled(file, where, self.limits.max_bytes)

    def _parsed(self, name: str, parse: Callable[[str], Any], most: int) -> dict[str, Any]:
        """Once: every loader that is asked whether a checkpoint is its own looks into the same few files."""
        if name not in self._read:
            try:
                self._read[name] = self._parsed_once(name, parse, most)
            except UserError as error:
                self._read[name] = str(error)
        found = self._read[name]
        if isinstance(found, str):
            raise UserError(found)
        return copy.deepcopy(found)

    def _parsed_once(self, name: str, parse: Callable[[str], Any], most: int) -> dict[str, Any]:
        where = self._shown(name)
        with self._opened(name) as file:
            text = file.read(most + 1)
        if len(text) > most:
            raise UserError(f"{where} has more than {most:,} bytes; a configuration is shorter")
        try:
            found = parse(text.decode("utf-8"))
        except RecursionError:
            raise UserError(f"{where} is nested too deeply") from None
        except ValueError as error:
            first = str(error).partition("\n")[0]
            raise UserError(f"{where} cannot be read: {first}") from None
        if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
            raise UserError(f"{where} holds {type(found).__name__}; expected named values")
        strict.check_depth(found, where)
        return found

    def _real(self, name: str) -> Path:
        check_inside(name)
        if name not in self._files:
            there = ", ".join(self.names[:8]) or "nothing"
            raise UserError(f"{self.path} has no {name}; it has {there}")
        return self._files[name]

    def _shown(self, name: str) -> str:
        return str(
            self.path if name == self.path.name and self.root != self.path else self.root / name
        )

    @contextmanager
    def _opened(self, name: str) -> Iterator[BinaryIO]:
        """The file of that name, once more found to be plain, and no link."""
        path = self._real(name)
        # A pipe would wait for a writer; a link may have been put in place since the folder was looked at.
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        with _reading(path), os.fdopen(os.open(path, flags), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UserError(f"{path} is no plain file; expected the files of a checkpoint")
            yield file


def as_tensors(found: dict[str, Any], where: str) -> dict[str, Tensor]:
    """Raises `UserError` where something else is among them."""
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{where}: {name} is {type(value).__name__}; expected a tensor")
    return found


def check_keys(
    found: Iterable[str], needed: Iterable[str], allowed: Iterable[str], where: str
) -> None:
    """Raises `UserError` for what is missing, and for what nobody knows the meaning of."""
    found, needed = set(found), set(needed)
    if lacks := sorted(needed - found):
        raise UserError(f"{where} lacks {', '.join(lacks)}")
    if extra := sorted(found - needed - set(allowed)):
        raise UserError(
            f"{where} has {', '.join(extra)[:400]}, which this format does not have; nothing is guessed"
        )


def check_inside(name: str) -> None:
    """Raises `UserError` for a path that leads out of the folder that it is meant from."""
    path = PurePosixPath(name)
    plain = name.isprintable() and "\\" not in name
    if path.is_absolute() or ".." in path.parts or not plain or not path.parts:
        raise UserError(f"{name!r} leads out of the checkpoint's folder; expected a path below it")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What the system says of a file or folder, in a message."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(
            f"there is no {path}; expected the folder or the file of a checkpoint"
        ) from None
    except MemoryError:
        raise UserError(f"{path} needs more memory than there is") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


# Folders


def _files_below(root: Path) -> dict[str, Path]:
    """All files below a folder by name. Links and anything that is not a plain file are refused."""
    found: dict[str, Path] = {}
    folders = [(root, 0)]
    seen = 0
    while folders:
        folder, depth = folders.pop()
        if depth > _DEEPEST_FOLDER:
            raise UserError(f"{root} has folders more than {_DEEPEST_FOLDER} deep")
        with os.scandir(folder) as entries:
            for entry in entries:
                seen += 1
                if seen > _MOST_FILES:
                    raise UserError(
                        f"{root} has more than {_MOST_FILES:,} files; expected one checkpoint"
                    )
                if entry.name.startswith("."):
                    continue
                path = folder / entry.name
                if _is_folder(entry, path):
                    folders.append((path, depth + 1))
                else:
                    found[path.relative_to(root).as_posix()] = path
    _check_distinct(root, found)
    return found


def _is_folder(entry: os.DirEntry[str], path: Path) -> bool:
    if not entry.name.isprintable() or "\\" in entry.name:
        raise UserError(
            f"{str(path)!r} has characters in its name that no checkpoint has; rename it"
        )
    kind = entry.stat(follow_symlinks=False).st_mode
    if stat.S_ISLNK(kind):
        raise UserError(
            f"{path} is a link; a checkpoint has to be plain files, so that none leads out of its folder. Copy what "
            "the links stand for, such as with cp -rL"
        )
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
        raise UserError(f"{path} is no plain file; expected the files of a checkpoint")
    return stat.S_ISDIR(kind)


def _check_distinct(root: Path, names: Iterable[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            raise UserError(
                f"{root} has files whose names differ in case alone: {other} and {name}; rename one"
            )


# Safetensors


class _Entry(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int
    """In bytes, from where the header ends."""


class _Header(NamedTuple):
    starts_at: int
    """Where the bytes of tensors start."""
    entries: Mapping[str, _Entry]


def _header(file: BinaryIO, where: str) -> _Header:
    """Checked: the tensors cover what follows the header without gap or overlap."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 10 or not 2 <= length <= min(_MOST_HEADER, size - 8):
        raise UserError(
            f"{where} is not a safetensors file: its header claims {length:,} bytes, the file has {size:,}"
        )
    try:
        header = strict.loads(file.read(length).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: the safetensors header cannot be read: {error}") from None
    if not isinstance(header, dict) or len(header) > _MOST_TENSORS:
        raise UserError(f"{where}: expected a header that names at most {_MOST_TENSORS:,} tensors")
    strict.check_depth(header, where)
    _check_metadata(header.pop("__metadata__", {}), where)
    entries = {name: _entry(where, name, entry) for name, entry in header.items()}
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.start != at:
            raise UserError(f"{where}: the bytes of {name} overlap with others or leave a gap")
        at = entry.end
    if at != size - 8 - length:
        raise UserError(
            f"{where} has {size - 8 - length:,} bytes of tensors; its header speaks of {at:,}"
        )
    return _Header(8 + length, entries)


def _check_metadata(metadata: Any, where: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise UserError(f"{where}: __metadata__ is no mapping of names to text")


def _entry(where: str, name: str, entry: Any) -> _Entry:
    def whole(values: Any) -> bool:
        return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{where}: {name} needs dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise UserError(f"{where}: {name} is of {dtype!r}; expected one of {', '.join(_DTYPES)}")
    if not whole(shape) or len(shape) > _MOST_DIMENSIONS or not whole(offsets) or len(offsets) != 2:
        raise UserError(f"{where}: {name} has a shape or offsets that are none")
    if offsets[1] - offsets[0] != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise UserError(
            f"{where}: {name} of shape {shape} in {dtype} has other bytes than its offsets say"
        )
    return _Entry(_DTYPES[dtype], tuple(shape), *offsets)


def _tensor(file: BinaryIO, starts_at: int, entry: _Entry) -> Tensor:
    content = bytearray(entry.end - entry.start)
    file.seek(starts_at + entry.start)
    if _fill(file, content) != len(content):
        raise OSError("it became shorter while it was read")
    if not content:
        return torch.empty(entry.shape, dtype=entry.dtype)
    return torch.frombuffer(content, dtype=entry.dtype).reshape(entry.shape)


def _fill(file: BinaryIO, content: bytearray) -> int:
    """How many bytes there were."""
    view, at = memoryview(content), 0
    while at < len(view) and (n := file.readinto(view[at:])):  # type: ignore[attr-defined]
        at += n
    return at


# Zip archives: .npz and .pt


def _archive(file: BinaryIO, where: str, most: int) -> zipfile.ZipFile:
    """Before anything is unpacked: a few bytes can stand for very many."""
    size = os.fstat(file.fileno()).st_size
    if not _directory_is_small(file, size):
        raise UserError(
            f"{where} is no archive of at most {_MOST_MEMBERS:,} parts, or has something behind its end; expected "
            "what numpy.savez or torch.save (since PyTorch 1.6) writes"
        )
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise UserError(f"{where} is damaged: {error}") from None
    members = archive.infolist()
    names = [member.filename for member in members]
    if len(set(names)) < len(names):
        raise UserError(f"{where} has two parts of one name")
    for member in members:
        check_inside(member.filename)
        if member.flag_bits & 1 or member.compress_type not in (
            zipfile.ZIP_STORED,
            zipfile.ZIP_DEFLATED,
        ):
            raise UserError(f"{where}: {member.filename} is encrypted or packed in an unusual way")
    unpacked = sum(member.file_size for member in members)
    if unpacked > min(most, _MOST_RATIO * size + 2**20):
        raise UserError(
            f"{where} would unpack to {unpacked / _GIB:.2f} GiB, which is more than --max-size, or more than "
            f"{_MOST_RATIO} times its size; weights are never packed so tightly"
        )
    return archive


def _directory_is_small(file: BinaryIO, size: int) -> bool:
    """Whether the last bytes are the end of a zip's directory, which names few members."""
    tail_length = min(size, 22 + 20)
    file.seek(size - tail_length)
    tail = file.read(tail_length)
    file.seek(0)
    if len(tail) < 22 or tail[-22:-18] != b"PK\5\6" or tail[-2:] != b"\0\0":
        return False
    _, n_members, length, start = struct.unpack("<HHII", tail[-14:-2])
    if tail.startswith(b"PK\6\7") and len(tail) == 42:
        (at,) = struct.unpack("<Q", tail[8:16])
        if at > size - 56 - 42:
            return False
        file.seek(at)
        record = file.read(56)
        file.seek(0)
        if record[:4] != b"PK\6\6" or at + 56 + 42 != size:
            return False
        n_members, length, start = struct.unpack("<QQQ", record[32:56])
    return bool(n_members <= _MOST_MEMBERS and length <= _MOST_DIRECTORY and start + length <= size)


def _arrays(file: BinaryIO, where: str, most: int) -> dict[str, Tensor]:
    found = {}
    with _archive(file, where, most) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of headers that numpy finds odd
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name in found or name == member.filename:
                raise UserError(f"{where}: {member.filename} is no array, or is there twice")
            try:
                with archive.open(member) as part:
                    found[name] = _array(part, member.file_size)
            except (
                *(ValueError, TypeError, EOFError, SyntaxError, RecursionError, MemoryError),
                *(zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, OverflowError),
                tokenize.TokenError,
            ) as error:
                first = str(error).partition("\n")[0]
                raise UserError(
                    f"{where}: {member.filename} is no array of plain numbers: {first}"
                ) from None
    return found


def _array(part: Any, size: int) -> Tensor:
    """Of an .npy file, whose header is read as a literal and whose size has to be what the header says."""
    version = np.lib.format.read_magic(part)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(part, max_header_size=1_000)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(part, max_header_size=1_000)
    else:
        raise ValueError(f"version {version} of the format")
    if dtype.name not in _NUMPY or not dtype.isnative:
        raise ValueError(f"it holds {dtype}; expected one of {', '.join(_NUMPY)}")
    if len(shape) > _MOST_DIMENSIONS or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"the shape {str(shape)[:100]} is none")
    n_bytes = math.prod(shape) * dtype.itemsize
    if n_bytes != size - part.tell():
        raise ValueError(f"shape {shape} takes {n_bytes:,} bytes; there are {size - part.tell():,}")
    content = bytearray(part.read(n_bytes))
    if len(content) != n_bytes or part.read(1):
        raise ValueError("it ends early")
    array = np.ndarray(shape, dtype, buffer=content, order="F" if fortran else "C")
    return torch.from_numpy(array)


def _check_torch(version: str) -> None:
    release = tuple(int(part) for part in version.partition("+")[0].split(".")[:2])
    if release < _SAFE_TORCH:
        raise UserError(
            f"weights that need unpickling are read with PyTorch 2.10 or later, and this is {version}: those before "
            "can be made to run code. Install a later one"
        )


def _pickled(file: BinaryIO, where: str, most: int) -> dict[str, Any]:
    with _archive(file, where, most) as archive:
        members = archive.infolist()
        pickles = [m for m in members if m.filename.endswith("data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > _MOST_PICKLED:
            raise UserError(f"{where} is not what torch.save writes of weights")
        if any(m.compress_type != zipfile.ZIP_STORED for m in members):
            raise UserError(f"{where} is packed, which torch.save never does")
        unpacked = sum(m.file_size for m in members)
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is there for old files
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
        except RecursionError:
            raise UserError(f"{where} is nested too deeply") from None
        except _UNPICKLING as error:
            first = str(error).partition("\n")[0]
            raise UserError(f"{where} cannot be read as weights alone: {first}") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UserError(f"{where} holds {type(found).__name__}; expected named tensors")
    _Unpickled(where, unpacked).check(found, strict.DEEPEST)
    return found


class _Unpickled:
    """Few bytes of a pickle can stand for very many: values inside values, and views that repeat one storage."""

    def __init__(self, where: str, n_bytes: int) -> None:
        self._where, self._left, self._values = where, 4 * n_bytes, 100_000

    def check(self, value: Any, deeper: int) -> None:
        """Raises `UserError`."""
        self._values -= 1
        if deeper == 0 or self._values < 0:
            raise UserError(f"{self._where} is nested too deeply, or too much")
        if isinstance(value, Tensor):
            self._check_tensor(value)
        elif isinstance(value, dict):
            for key, part in value.items():
                self.check(key, deeper - 1)
                self.check(part, deeper - 1)
        elif isinstance(value, list | tuple | set):
            for part in value:
                self.check(part, deeper - 1)
        elif type(value) is int and abs(value) >= 2**63:
            raise UserError(f"{self._where} has a number that is too large")
        elif type(value) is float and not math.isfinite(value):
            raise UserError(f"{self._where} has {value}, which is not a number")

    def _check_tensor(self, tensor: Tensor) -> None:
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
        if not plain or tensor.is_meta or tensor.is_quantized or tensor.is_nested:
            raise UserError(f"{self._where} has a tensor that is no plain array of numbers")
        n_bytes = tensor.numel() * tensor.element_size()
        self._left -= n_bytes
        if n_bytes > tensor.untyped_storage().nbytes() or self._left < 0:
            raise UserError(f"{self._where} has tensors that are larger than what is in the file")
