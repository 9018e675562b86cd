"""What is kept on disk between runs, each file named by the hash of all that determined it.

A file is written under a name of its own and renamed when it is whole, so a reader never sees half
of one and two processes that write the same thing do no harm. Whatever cannot be kept, for want of
a folder or of disk space, is computed again: nothing here ever fails a run.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO, RawIOBase
from pathlib import Path
from typing import final

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from saebench.types import Spec

_LOG = logging.getLogger(__name__)
_RESERVE = 1.05
_ABANDONED_AFTER = 7 * 24 * 3600.0
_STORED_AS: dict[torch.dtype, torch.dtype] = {torch.bfloat16: torch.uint16}  # NumPy has no bfloat16
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def spec_hash(spec: Spec) -> str:
    """The same for equal specs, whatever the order of their keys."""
    text = json.dumps(spec, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@final
class ArrayWriter:
    """Takes one array piece by piece along its first dimension."""

    def __init__(self, file: RawIOBase, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._file = file
        self._stored = _STORED_AS.get(dtype, dtype)
        self.shape, self.dtype, self.rows, self.failed = shape, dtype, 0, False
        header = BytesIO()
        described = {"descr": _numpy_dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, described)
        with self._noticing_full_disk():
            _write_all(file, memoryview(header.getvalue()))

    def append(self, piece: Tensor) -> None:
        """After the disk has filled up this does nothing: the array is not kept."""
        assert piece.dtype == self.dtype, f"an array of {self.dtype} was given {piece.dtype}"
        assert piece.shape[1:] == self.shape[1:], f"{self.shape} was given {tuple(piece.shape)}"
        self.rows += len(piece)
        if not self.failed:
            with self._noticing_full_disk():
                stored = piece.detach().cpu().contiguous().view(self._stored)
                _write_all(self._file, stored.numpy().data.cast("B"))

    def finish(self) -> bool:
        """Everything is on the disk; False where it is not and the file must go."""
        if not self.failed:
            assert self.rows == self.shape[0], f"{self.rows} of {self.shape[0]} rows were written"
            with self._noticing_full_disk():
                os.fsync(self._file.fileno())
        return not self.failed

    @contextmanager
    def _noticing_full_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            self.failed = True
            _LOG.warning("the disk filled up while caching; the rest is recomputed when needed")


@final
class Cache:
    """A folder of arrays and of small tensor dicts. Without a folder it keeps nothing; one that cannot be written to is
    read.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._adds = False
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._adds = os.access(folder, os.W_OK | os.X_OK)
            if self._adds:
                _remove_abandoned(folder)
            else:
                _LOG.warning("%s cannot be written to: what it lacks is computed again", folder)

    def has_room(self, n_bytes: int) -> bool:
        """Whether files of so many bytes would be kept, with 5 % to spare."""
        if self.folder is None or not self._adds:
            return False
        free = shutil.disk_usage(self.folder).free
        if free < n_bytes * _RESERVE:
            _LOG.warning(
                "not cached: %.2f GB, with %.2f GB free in %s; it is recomputed when needed",
                n_bytes / 1e9,
                free / 1e9,
                self.folder,
            )
            return False
        return True

    def array(self, spec: Spec, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """The array, mapped from disk; None where it is missing, cut short or another one."""
        path = self._path(spec, _suffix(dtype))
        if path is None or not path.exists():
            return None
        try:
            # Copy-on-write: torch wants writable memory, and the file stays as it is.
            mapped = np.load(path, mmap_mode="c", allow_pickle=False)
            whole = path.stat().st_size == mapped.offset + mapped.nbytes
        except (ValueError, EOFError, OSError, AttributeError):
            whole = False
        if not whole or mapped.shape != shape or mapped.dtype != _numpy_dtype(dtype):
            _LOG.warning("%s is damaged or foreign; computed again", path.name)
            return None
        return torch.from_numpy(mapped).view(dtype)

    @contextmanager
    def writing(
        self, spec: Spec, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Iterator[ArrayWriter | None]:
        """A file that gets its name when the block ends well; None where it is not kept."""
        path = self._path(spec, _suffix(dtype))
        n_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if path is None or not self.has_room(n_bytes):
            yield None
            return
        part = _part(path)
        try:
            # Unbuffered, so that closing the file never meets a full disk.
            with part.open("wb", buffering=0) as file:
                writer = ArrayWriter(file, shape, dtype)
                yield writer
                kept = writer.finish()
            if kept:
                part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def tensors(self, spec: Spec) -> dict[str, Tensor] | None:
        """A small dict of tensors; None where it is missing or damaged."""
        path = self._path(spec, ".safetensors")
        if path is None or not path.exists():
            return None
        try:
            return load_file(path)
        except (SafetensorError, OSError):
            _LOG.warning("%s is damaged; computed again", path.name)
            return None

    def keep_tensors(self, spec: Spec, tensors: dict[str, Tensor]) -> None:
        path = self._path(spec, ".safetensors")
        content = to_bytes({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
        if path is None or not self.has_room(len(content)):
            return
        part = _part(path)
        try:
            with part.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            _LOG.warning("the disk is full; %s is computed again when needed", path.name)
        finally:
            part.unlink(missing_ok=True)

    def _path(self, spec: Spec, suffix: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{spec_hash(spec)}{suffix}"


def _numpy_dtype(dtype: torch.dtype) -> np.dtype:
    return torch.empty(0, dtype=_STORED_AS.get(dtype, dtype)).numpy().dtype


def _suffix(dtype: torch.dtype) -> str:
    """The dtype is part of the name, because bfloat16 is stored as the integers of its bits."""
    return f".{str(dtype).removeprefix('torch.')}.npy"


def _write_all(file: RawIOBase, content: memoryview) -> None:
    while content:
        content = content[file.write(content) or 0 :]


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _part(path: Path) -> Path:
    """A name that no other writer has, and that says whose it is."""
    return path.with_name(f"{path.name}.{_host()}.{os.getpid()}.{uuid.uuid4().hex}.part")


def _remove_abandoned(folder: Path) -> None:
    """Unfinished files of processes that are gone; those of other machines after a week."""
    for part in folder.glob("*.part"):
        fields = part.name.split(".")
        if len(fields) < 5 or not fields[-3].isdigit():
            continue
        own = fields[-4] == _host() and os.name == "posix"
        try:
            gone = not _alive(int(fields[-3])) if own else _older_than(part, _ABANDONED_AFTER)
        except FileNotFoundError:
            continue
        if gone:
            part.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _older_than(path: Path, seconds: float) -> bool:
    return time.time() - path.stat().st_mtime > seconds
