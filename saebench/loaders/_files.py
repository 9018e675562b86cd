"""Strangers' files, read with care: nothing here runs code, follows a path out of the folder, or trusts a size.

A safetensors header is checked before a tensor is made of it: its length, its keys, dtypes, shapes and offsets, which
have to cover the file exactly. What needs unpickling is read only where the user allows it, and then by
`torch.load(weights_only=True)`, without a second try.
"""

import json
import math
import os
import pickle
import stat
import zipfile
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, final

import numpy as np
import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saebench.errors import UserError

_GIB = 1024**3
_MOST_HEADER = 2**20
_MOST_TEXT = 2**20
_MOST_TENSORS = 1_024
_MOST_FILES = 10_000
_DEEPEST = 20
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4}


class Limits(NamedTuple):
    """What the user allows strangers' files."""

    max_bytes: int = 8 * _GIB
    """Of all files of a checkpoint together."""
    allow_pickle: bool = False
    """Whether weights that need unpickling are read at all."""


@final
class Source:
    """A folder, or one file by itself, that holds a checkpoint."""

    def __init__(self, path: Path, limits: Limits) -> None:
        """Raises `UserError` where there is nothing, or more than the limits allow."""
        if not path.exists():
            raise UserError(f"there is no {path}; expected the folder or the file of a checkpoint")
        self.path, self.limits = path, limits
        self.root = (path if path.is_dir() else path.parent).resolve()
        self._sizes = _sizes(self.root) if path.is_dir() else {path.name: _size(path)}
        total = sum(self._sizes.values())
        if total > limits.max_bytes:
            raise UserError(
                f"{path} holds {total / _GIB:.2f} GiB; --max-size allows {limits.max_bytes / _GIB:.2f}"
            )

    @property
    def names(self) -> list[str]:
        """Of all files, as paths below the folder with `/` between, sorted."""
        return sorted(self._sizes)

    def has(self, *names: str) -> bool:
        return all(name in self._sizes for name in names)

    def within(self, folder: str) -> "Source":
        """The same for a folder below this one."""
        _check_inside(folder)
        return Source(self.root / folder, self.limits)

    def json(self, name: str) -> dict[str, Any]:
        """An object. Keys that are there twice, numbers that are none and deep nesting are refused."""
        return _parsed(self._path(name), _json)

    def yaml(self, name: str) -> dict[str, Any]:
        """A mapping of plain values, without anchors."""
        return _parsed(self._path(name), _yaml)

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """Of the tensors of a safetensors file, from its checked header alone."""
        return {key: tuple(entry["shape"]) for key, entry in _header(self._path(name)).items()}

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Of a safetensors file."""
        path = self._path(name)
        header = _header(path)
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in header}
        except SafetensorError as error:
            raise UserError(f"{path} is not a safetensors file: {error}") from None

    def arrays(self, name: str) -> dict[str, Tensor]:
        """Of an .npz file of plain numbers."""
        path = self._path(name)
        _check_zip(path, self.limits.max_bytes)
        try:
            with np.load(path, allow_pickle=False) as file:
                return {key: torch.from_numpy(np.array(file[key])) for key in file.files}
        except (ValueError, OSError, TypeError, EOFError, zipfile.BadZipFile, SyntaxError) as error:
            raise UserError(f"{path} is not an .npz file of plain numbers: {error}") from None

    def pickled(self, name: str) -> dict[str, Any]:
        """What torch.save wrote, of plain values and tensors only. Raises `UserError` unless this is allowed."""
        path = self._path(name)
        if not self.limits.allow_pickle:
            raise UserError(
                f"{path} has to be unpickled, which is not safe with strangers' files. If it is your own, or you "
                "trust where it is from, say --allow-pickle-weights"
            )
        if zipfile.is_zipfile(path):
            _check_zip(path, self.limits.max_bytes)
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except (
            pickle.UnpicklingError,
            RuntimeError,
            ValueError,
            EOFError,
            OSError,
            KeyError,
        ) as error:
            first = str(error).partition("\n")[0]
            raise UserError(f"{path} cannot be read as weights alone: {first}") from None
        except (AttributeError, TypeError, IndexError, AssertionError, OverflowError) as error:
            raise UserError(f"{path} is damaged: {error}") from None
        if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
            raise UserError(f"{path} holds {type(found).__name__}; expected named tensors")
        return found

    def _path(self, name: str) -> Path:
        _check_inside(name)
        if name not in self._sizes:
            there = ", ".join(self.names[:8]) or "nothing"
            raise UserError(f"{self.path} has no {name}; it has {there}")
        return self.root / name


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


def _check_inside(name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts:
        raise UserError(f"{name!r} leads out of the checkpoint's folder; expected a path below it")


def _sizes(root: Path) -> dict[str, int]:
    """Bytes of all files below a folder. Links and anything that is not a plain file are refused."""
    found: dict[str, int] = {}
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = Path(folder) / name
            if path.is_symlink():
                raise UserError(
                    f"{path} is a link; a checkpoint has to be plain files, so that none leads out of its folder"
                )
            if name in files:
                found[path.relative_to(root).as_posix()] = _size(path)
        if len(found) > _MOST_FILES:
            raise UserError(f"{root} has more than {_MOST_FILES} files; expected one checkpoint")
    lower = [name.lower() for name in found]
    if len(set(lower)) < len(lower):
        raise UserError(f"{root} has files whose names differ in case alone; rename one")
    return found


def _size(path: Path) -> int:
    found = path.lstat() if not path.is_symlink() else path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path} is no plain file; expected the files of a checkpoint")
    return found.st_size


def _parsed(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    if path.stat().st_size > _MOST_TEXT:
        raise UserError(f"{path} has more than {_MOST_TEXT:,} bytes; a configuration is shorter")
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        first = str(error).partition("\n")[0]
        raise UserError(f"{path} cannot be read: {first or 'nested too deeply'}") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UserError(f"{path} holds {type(found).__name__}; expected named values")
    _check_depth(found, path, _DEEPEST)
    return found


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_distinct, parse_constant=_no_number)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        again = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {again!r} is there twice")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _yaml(text: str) -> Any:
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it has aliases (*name), which a few lines of can stand for billions")
    return yaml.safe_load(text)


def _check_depth(value: Any, path: Path, left: int) -> None:
    if left == 0:
        raise UserError(f"{path} is nested more than {_DEEPEST} deep")
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            _check_depth(part, path, left - 1)


def _check_zip(path: Path, most: int) -> None:
    """Before anything is unpacked: a few bytes can stand for very many."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if len(members) > _MOST_TENSORS + 16 or sum(member.file_size for member in members) > most:
        raise UserError(
            f"{path} would unpack to more than --max-size or more than {_MOST_TENSORS} parts"
        )


@cache
def _header_of(path: Path, size: int, changed: int) -> dict[str, Any]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(_MOST_HEADER, size - 8):
            raise UserError(
                f"{path} is not a safetensors file: its header claims {length:,} bytes, the file has {size:,}"
            )
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_distinct, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: the safetensors header cannot be read: {error}") from None
    if not isinstance(header, dict) or len(header) > _MOST_TENSORS:
        raise UserError(f"{path}: expected a header that names at most {_MOST_TENSORS} tensors")
    header.pop("__metadata__", None)
    _check_offsets(path, header, size - 8 - length)
    return header


def _header(path: Path) -> dict[str, Any]:
    """Name -> dtype, shape, data_offsets: checked."""
    about = path.stat()
    return _header_of(path, about.st_size, about.st_mtime_ns)


def _check_offsets(path: Path, header: dict[str, Any], n_bytes: int) -> None:
    spans = sorted(_span(path, name, entry) for name, entry in header.items())
    at = 0
    for start, end, name in spans:
        if start != at:
            raise UserError(f"{path}: the bytes of {name} overlap with others or leave a gap")
        at = end
    if at != n_bytes:
        raise UserError(f"{path} has {n_bytes:,} bytes of tensors; its header speaks of {at:,}")


def _span(path: Path, name: str, entry: Any) -> tuple[int, int, str]:
    def whole(values: Any) -> bool:
        return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{path}: {name} needs dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise UserError(f"{path}: {name} is of {dtype!r}; expected one of {', '.join(_ITEM_BYTES)}")
    if not whole(shape) or len(shape) > 4 or not whole(offsets) or len(offsets) != 2:
        raise UserError(f"{path}: {name} has a shape or offsets that are none")
    if offsets[1] - offsets[0] != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise UserError(
            f"{path}: {name} of shape {shape} in {dtype} has other bytes than its offsets say"
        )
    return offsets[0], offsets[1], name
