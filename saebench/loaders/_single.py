"""What loaders ask of a file of weights by itself, whatever it is called, and of single weights."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from torch import Tensor

from saebench.errors import UserError
from saebench.loaders._files import Limits, Source

_PICKLED = (".pt", ".pth")
_MOST = 1e12
"""Of a length, a factor or a threshold that is one."""


def sole_file(source: Source, *suffixes: str) -> str | None:
    """The only file with one of these suffixes, right in the folder; None where there is none or several."""
    found = [name for name in source.names if PurePosixPath(name).suffix in suffixes]
    return found[0] if len(found) == 1 and "/" not in found[0] else None


def path_of(source: Source, name: str) -> Path:
    return source.path if source.path.is_file() else source.root / name


def shapes_of(source: Source, name: str) -> dict[str, tuple[int, ...]]:
    """Of the tensors by name, () for what is none; empty where the file cannot be looked into.

    That is so for all that needs unpickling unless the user allows it.
    """
    if PurePosixPath(name).suffix in _PICKLED:
        path = path_of(source, name)
        about = path.stat()
        return _pickled_shapes(_File(path, source.limits, about.st_size, about.st_mtime_ns))
    try:
        return source.shapes(name)
    except UserError:
        return {}


def weights_of(source: Source, name: str) -> dict[str, Any]:
    """Named tensors, and whatever else is among them. Raises `UserError`."""
    unpickle = PurePosixPath(name).suffix in _PICKLED
    return source.pickled(name) if unpickle else dict(source.tensors(name))


def matrix(weights: Mapping[str, Tensor], name: str, where: str) -> Tensor:
    """Raises `UserError` where it is of another rank, so that it can be transposed."""
    if weights[name].ndim != 2:
        shape = tuple(weights[name].shape)
        raise UserError(f"{where}: {name} has the shape {shape}; expected a matrix")
    return weights[name]


def positive(value: object, what: str, where: str) -> float:
    """Raises `UserError` for anything but a number above zero."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < _MOST:
        raise UserError(f"{where}: {what} is {value!r}; expected a number above 0")
    return float(value)


class _File(NamedTuple):
    """With what tells it from a later one of the same name."""

    path: Path
    limits: Limits
    size: int
    changed: int


@lru_cache(maxsize=4)
def _pickled_shapes(file: _File) -> dict[str, tuple[int, ...]]:
    """Kept, because every loader asks and the file is read as a whole to answer."""
    try:
        found = Source(file.path, file.limits).pickled(file.path.name)
    except UserError:
        return {}
    return {
        key: tuple(value.shape) if isinstance(value, Tensor) else () for key, value in found.items()
    }
