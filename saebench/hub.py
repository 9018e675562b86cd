"""Files of a checkpoint on the Hugging Face Hub, at one commit.

Sizes are asked for before anything is downloaded, and only files that some format reads are. They are kept below the
cache by commit, next to the listing of that commit, so that a second look needs no network:

    hub/<org>--<name>/<commit>.json     every file of the commit with its size and hash, as the Hub lists them
    hub/<org>--<name>/<commit>/...      plain files, each moved here once its size and hash were those of the listing
"""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError, of whichever HTTP library it is built on
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)
from huggingface_hub.utils._validators import validate_repo_id

from saebench.errors import UserError
from saebench.loaders._files import Limits, check_inside
from saebench.progress import Meter, say

_WEIGHTS = (".safetensors", ".npz")
_PICKLES = (".pt", ".pth")
_TEXTS = (".json", ".yaml", ".yml")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_GIB = 1024**3
_SECONDS = 30.0
_MOST_FILES = 100_000
_SLACK = 64 * 1024**2
"""Bytes that a file may be sent beyond twice its size, for downloads that start again."""


class Reference(NamedTuple):
    repo: str
    revision: str
    """A commit, tag or branch."""
    folder: str
    """Below the repository's root; empty for all of it. May also name one file."""


class Downloaded(NamedTuple):
    path: Path
    commit: str


class _File(NamedTuple):
    """As the Hub lists it."""

    size: int
    hash: str
    """SHA-256 of what it holds, or, where git keeps the file itself, its name in git (40 digits)."""


class _Listing(NamedTuple):
    commit: str
    files: Mapping[str, _File]


def download(reference: Reference, limits: Limits, cache: Path) -> Downloaded:
    """The files of a checkpoint as plain files below the cache, and the commit that they are of.

    Raises `UserError` where the Hub does not give them, and where they are more than the limits allow: nothing is
    downloaded then. A commit that is here already needs no network.
    """
    shelf = cache / "hub" / reference.repo.replace("/", "--")
    with _explained(reference):
        validate_repo_id(reference.repo)
        listing = _kept(shelf, reference.revision) or _asked(reference)
        wanted = _wanted(listing, reference, limits)
        folder = shelf / listing.commit
        missing = {n: f for n, f in wanted.items() if not _is_there(folder / n, f)}
        if missing:
            _check_room(missing, cache)
            shelf.mkdir(parents=True, exist_ok=True)
            _fetch(reference.repo, listing.commit, missing, shelf)
        _keep(shelf, listing)
    return Downloaded(folder / reference.folder, listing.commit)


def _kept(shelf: Path, revision: str) -> _Listing | None:
    """From an earlier look at this commit. A branch may have moved and is always asked for."""
    if not _COMMIT.fullmatch(revision):
        return None
    try:
        files = json.loads((shelf / f"{revision}.json").read_text(encoding="utf-8"))
        return _Listing(revision, {n: _File(int(size), str(h)) for n, (size, h) in files.items()})
    except (OSError, ValueError, TypeError, AttributeError):  # none, or damaged
        return None


def _keep(shelf: Path, listing: _Listing) -> None:
    path = shelf / f"{listing.commit}.json"
    if path.exists() and _kept(shelf, listing.commit) == listing:
        return
    with tempfile.TemporaryDirectory(prefix=".part-", dir=shelf) as staging:
        written = Path(staging) / "listing"
        written.write_text(json.dumps(listing.files, indent=1), encoding="utf-8")
        written.replace(path)


def _asked(reference: Reference) -> _Listing:
    try:
        info = huggingface_hub.HfApi().model_info(
            reference.repo, revision=reference.revision, files_metadata=True, timeout=_SECONDS
        )
    except (TypeError, KeyError, AttributeError) as error:  # the client looks into what it got
        raise ValueError(f"{type(error).__name__} on reading it") from error
    commit = str(info.sha)
    if not _COMMIT.fullmatch(commit):
        raise ValueError(f"the commit is {commit!r}")
    if _COMMIT.fullmatch(reference.revision) and commit != reference.revision:
        raise ValueError(f"it gives commit {commit} for {reference.revision}")
    siblings = info.siblings or []
    if len(siblings) > _MOST_FILES:
        raise UserError(f"{reference.repo} has more than {_MOST_FILES:,} files")
    if commit != reference.revision:
        say(f"{reference.repo}@{reference.revision} is commit {commit}")
    return _Listing(commit, {str(file.rfilename): _described(file) for file in siblings})


def _described(file: Any) -> _File:
    if type(file.size) is not int or file.size < 0:
        raise ValueError(f"the size of {file.rfilename} is {file.size!r}")
    hash = file.blob_id if file.lfs is None else file.lfs.sha256
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", str(hash)):
        raise ValueError(f"the hash of {file.rfilename} is {hash!r}")
    return _File(file.size, str(hash))


def _wanted(listing: _Listing, reference: Reference, limits: Limits) -> dict[str, _File]:
    """The files below the folder that some format reads. Raises `UserError` where that is nothing, or too much."""
    where = "/".join(part for part in (reference.repo, reference.folder) if part)
    where += f" at {listing.commit[:12]}"
    if reference.folder:
        check_inside(reference.folder)
    below = {n: f for n, f in listing.files.items() if _is_below(n, reference.folder)}
    if not below:
        there = ", ".join(sorted(listing.files)[:8]) or "nothing"
        raise UserError(f"there is no {where}; the repository has {there}")
    for name in below:
        check_inside(name)
    suffixes = _WEIGHTS + _TEXTS + (_PICKLES if limits.allow_pickle else ())
    found = {n: f for n, f in below.items() if n.lower().endswith(suffixes)}
    if not any(n.lower().endswith(_WEIGHTS + _PICKLES) for n in found):
        if any(n.lower().endswith(_PICKLES) for n in below):
            raise UserError(
                f"the weights of {where} have to be unpickled, which is not safe with strangers' files. If they are "
                "your own, or you trust where they are from, say --allow-pickle-weights"
            )
        raise UserError(
            f"{where} has no weights in files that end in {', '.join(_WEIGHTS + _PICKLES)}; it has "
            f"{', '.join(sorted(below)[:8])}"
        )
    total = sum(file.size for file in found.values())
    if total > limits.max_bytes:
        raise UserError(
            f"{where} is {total / _GIB:.2f} GiB; --max-size allows {limits.max_bytes / _GIB:.2f}. Nothing was "
            "downloaded. Name one folder of it (org/name@revision/folder), or raise --max-size"
        )
    return found


def _is_below(name: str, folder: str) -> bool:
    hidden = any(part.startswith(".") and part != ".." for part in name.split("/"))
    return not hidden and (not folder or name == folder or name.startswith(f"{folder}/"))


def _is_there(path: Path, file: _File) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size == file.size


def _check_room(missing: Mapping[str, _File], cache: Path) -> None:
    existing = next(p for p in (cache, *cache.absolute().parents) if p.is_dir())
    free, needed = shutil.disk_usage(existing).free, sum(f.size for f in missing.values())
    if needed > free:
        raise UserError(
            f"{needed / _GIB:.2f} GiB have to be downloaded, and the disk of {cache} has {free / _GIB:.2f} left"
        )


def _fetch(repo: str, commit: str, missing: Mapping[str, _File], shelf: Path) -> None:
    """Each file goes to its place once it is whole; what was interrupted is deleted."""
    total = sum(file.size for file in missing.values())
    with (
        tempfile.TemporaryDirectory(prefix=".part-", dir=shelf) as staging,
        Meter(f"downloading {repo}", total, "bytes") as meter,
    ):
        for name, file in sorted(missing.items()):
            counted = _Counted(meter, file.size)
            huggingface_hub.hf_hub_download(
                repo, name, revision=commit, local_dir=staging, tqdm_class=counted.bars()
            )
            counted.reached(file.size)
            _check_content(Path(staging) / name, name, file)
            target = shelf / commit / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (Path(staging) / name).replace(target)


def _check_content(path: Path, name: str, file: _File) -> None:
    if path.is_symlink() or path.stat().st_size != file.size:
        raise OSError(f"{name} came with another size than the Hub lists")
    with path.open("rb") as content:
        if len(file.hash) == 64:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        else:
            named = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
            while part := content.read(2**20):
                named.update(part)
            found = named.hexdigest()
    if found != file.hash:
        raise OSError(f"{name} came with another content than the Hub lists")


class _Counted:
    """Progress of one file, which the Hub's client reports to bars that it makes itself, several for some stores."""

    def __init__(self, meter: Meter, size: int) -> None:
        self._meter, self._size, self._done = meter, size, 0

    def bars(self) -> type:
        """What takes the place of a class of tqdm."""
        counted = self

        class Bar(_Bar):
            def __init__(self, *_args: Any, **_kwargs: Any) -> None:
                super().__init__(counted)

        return Bar

    def reached(self, n_bytes: int) -> None:
        if n_bytes > 2 * self._size + _SLACK:
            raise OSError("the server sends more than the Hub lists")
        further = min(n_bytes, self._size) - self._done
        if further > 0:
            self._done += further
            self._meter.advance(further)


class _Bar:
    """What the Hub's client calls, of a tqdm bar."""

    def __init__(self, counted: _Counted) -> None:
        self._counted, self.n, self.total = counted, 0, None

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """There is nothing to close."""

    def update(self, amount: int | float | None = 1) -> None:
        # Taken back by the client where a download starts again; what was sent was sent.
        self.n += max(0, int(amount or 0))
        self._counted.reached(self.n)

    def __getattr__(self, name: str) -> Any:
        if name in (
            "close",
            "refresh",
            "set_postfix_str",
            "set_description_str",
            "set_description",
        ):
            return lambda *_args, **_kwargs: None
        raise AttributeError(name)


@contextmanager
def _explained(reference: Reference) -> Iterator[None]:
    """Whatever goes wrong between here and the Hub is one message."""
    try:
        yield
    except LocalEntryNotFoundError as error:  # how the client says that a request for a file failed
        raise UserError(_words(error.__cause__ or error, reference)) from None
    except (
        EntryNotFoundError,
        HTTPError,
        OfflineModeIsEnabled,
        OSError,
        RuntimeError,
        XetDownloadError,
        ValueError,
    ) as error:
        raise UserError(_words(error, reference)) from None


def _words(error: BaseException, reference: Reference) -> str:
    repo, host = reference.repo, constants.ENDPOINT
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    first = str(error).strip().partition("\n")[0]
    if isinstance(error, OfflineModeIsEnabled):
        return (
            f"{repo} at {reference.revision} is not in the cache, and HF_HUB_OFFLINE forbids to download it; unset "
            "it, or give the 40 digits of a commit that was downloaded before"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{host} has no revision {reference.revision!r} of {repo}; expected a commit, tag or branch"
    if isinstance(error, GatedRepoError) or status == 403:
        return (
            f"{repo} is gated, or you may not read it: accept its conditions on {host}/{repo} and log in "
            "(hf auth login, or HF_TOKEN)"
        )
    if isinstance(error, EntryNotFoundError):
        return (
            f"{host} lists a file of {repo} at {reference.revision} and does not have it: {first}"
        )
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        return (
            f"{host} has no repository {repo}, or it is private; check the name, or log in (hf auth login, or "
            "HF_TOKEN)"
        )
    if status is not None:
        return f"{host} answered with {status} for {repo}; try again later"
    if isinstance(error, HTTPError):
        return (
            f"{host} did not answer, or not to the end ({type(error).__name__}: {first}); check the network and run "
            "it again"
        )
    if isinstance(error, OSError | RuntimeError | XetDownloadError):
        return f"{repo} could not be downloaded ({first}); run it again"
    return f"{host} answers for {repo} with what is no answer of a Hub: {type(error).__name__}: {first}"
