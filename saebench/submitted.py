"""What was submitted to a suite: the record beside its results, and the history of what was replaced.

results/<suite>/submissions.json                     {name: {entry, checksum, format, origin, selfcheck, runs}}
results/<suite>/history/<name>--<checksum12>/        a replaced submission: submission.json, runs/; one
                                                     with other numbers of the same weights ends in -2, -3 ...

The record is written whole, and read strictly: other people's results are merged with it.
"""

import re
from collections.abc import Mapping
from itertools import count
from json import dumps
from pathlib import Path
from typing import Any, NamedTuple

from saebench import results, strict
from saebench.errors import UserError
from saebench.results import Entry

FILE = "submissions.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_DEVICES = {"con", "nul", "aux", "prn"} | {f"{d}{n}" for d in ("com", "lpt") for n in range(10)}
"""No file of Windows can have these names, with whatever suffix."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Submission(NamedTuple):
    """A checkpoint that somebody has submitted."""

    entry: Entry
    checksum: str
    """SHA-256 of its architecture and weights; of an object without weights, of what it does."""
    format: str
    origin: Mapping[str, Any]
    """Where it is from; no path of any machine."""
    selfcheck: Mapping[str, Any]
    """What the self-check found, in numbers, and under `forced` why it would have refused it."""
    runs: tuple[str, ...]
    """Finished run files, as paths below the results folder."""


def check_name(name: str) -> None:
    """Raises `UserError` for what cannot name files on every system."""
    shown = repr(name if len(name) <= 40 else f"{name[:40]}...")
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{shown} cannot be the name of a submission; expected 1 to 100 letters (A to Z), digits, dots, "
            "underscores and hyphens, of which the first is a letter or a digit; give another --name"
        )
    if name.endswith("."):
        raise UserError(
            f"{shown} cannot be the name of a submission: it ends in a dot, which some file systems drop; "
            "give another --name"
        )
    if name.partition(".")[0].lower() in _DEVICES:
        raise UserError(
            f"{shown} cannot be the name of a submission: Windows keeps it for a device; give another --name"
        )


def read(folder: Path) -> dict[str, Submission]:
    """All submissions by name. Raises `UserError` where the record is not what `write` makes."""
    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        content = strict.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from None
    strict.check_depth(content, str(path))
    if not isinstance(content, dict):
        raise _damaged(path, f"it holds a {type(content).__name__}, not named submissions")
    return {name: _submission(path, name, given) for name, given in content.items()}


def write(folder: Path, submissions: Mapping[str, Submission]) -> None:
    """A record that already says the same is left alone."""
    content = {name: _plain(submission) for name, submission in submissions.items()}
    if content or (folder / FILE).is_file():
        results.write_text_whole(folder / FILE, _json(content))


def keep_history(folder: Path, name: str, submission: Submission) -> Path:
    """Copies a submission that is to be replaced, with its run files. Its place is named by its checksum."""
    contents = {"submission.json": _json({name: _plain(submission)}).encode()}
    for run in submission.runs:
        for file in (folder / run, results.units_file(folder / run)):
            if file.is_file():
                contents[f"runs/{file.name}"] = file.read_bytes()
    own = folder / "history" / f"{name}--{submission.checksum[:12]}"
    places = (own if n == 1 else own.with_name(f"{own.name}-{n}") for n in count(1))
    place = next(place for place in places if _fits(place, contents))
    for file_name in reversed(contents):
        results.write_bytes_whole(place / file_name, contents[file_name])
    return place


def _fits(place: Path, contents: Mapping[str, bytes]) -> bool:
    """Whether nothing else is kept there; a copy that a stop left unfinished may go on."""
    return all(
        path.is_file() and path.read_bytes() == contents.get(path.relative_to(place).as_posix())
        for path in place.rglob("*")
        if not path.is_dir()
    )


def drop_replaced(folder: Path, name: str, runs: tuple[str, ...]) -> None:
    """Deletes run files of this name that are whole in the history and are none of its `runs` now.

    Last, after nothing names them any more; what a stop leaves here is deleted by the next submission of the name.
    """
    places = (f"history/{name}--{'?' * 12}{end}/runs/*" for end in ("", "-[2-9]*"))
    for copy in (path for place in places for path in folder.glob(place)):
        run = folder / "runs" / copy.name
        named = f"runs/{copy.name.removesuffix('.units.parquet').removesuffix('.json')}.json"
        if run.is_file() and named not in runs and run.read_bytes() == copy.read_bytes():
            run.unlink()


def _plain(submission: Submission) -> dict[str, Any]:
    return submission._asdict() | {
        "entry": submission.entry._asdict(),
        "runs": list(submission.runs),
    }


def _json(content: Mapping[str, Any]) -> str:
    return dumps(content, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def _submission(path: Path, name: str, given: Any) -> Submission:
    if not _NAME.fullmatch(name):
        raise _damaged(path, f"{name[:120]!r} cannot name an SAE")
    _check_fields(path, name, given, Submission._fields)
    entry, runs = given["entry"], given["runs"]
    _check_fields(path, f"{name}.entry", entry, Entry._fields)
    kinds = {"variant": str, "site": str, "width": int, "l0": (int, float), "seed": int}
    for field, kind in kinds.items():
        optional = field in ("width", "l0", "seed")
        if not (optional and entry[field] is None) and not _is(entry[field], kind):
            raise _damaged(path, f"{name}.entry.{field} is {entry[field]!r:.80}")
    if entry["kind"] != "checkpoint":
        raise _damaged(path, f"{name}.entry.kind is {entry['kind']!r:.80}, not 'checkpoint'")
    if not isinstance(given["checksum"], str) or not _SHA256.fullmatch(given["checksum"]):
        raise _damaged(path, f"{name}.checksum is no SHA-256")
    for field, plain in (("format", str), ("origin", dict), ("selfcheck", dict), ("runs", list)):
        if not isinstance(given[field], plain):
            raise _damaged(path, f"{name}.{field} is {given[field]!r:.80}")
    own = re.compile(rf"runs/{re.escape(name)}--[A-Za-z0-9._-]+\.json")
    for run in runs:
        if not isinstance(run, str) or not own.fullmatch(run):
            raise _damaged(path, f"{name}.runs names {run!r:.120}, which is no run of it")
    return Submission(**given | {"entry": Entry(**entry), "runs": tuple(runs)})


def _is(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _check_fields(path: Path, what: str, given: Any, fields: tuple[str, ...]) -> None:
    if not isinstance(given, dict) or set(given) != set(fields):
        has = ", ".join(map(str, given)) if isinstance(given, dict) else type(given).__name__
        raise _damaged(path, f"{what} has {has[:200]}; expected {', '.join(fields)}")


def _damaged(path: Path, why: str) -> UserError:
    return UserError(
        f"{path} is not the record that saebench submit writes: {why}. Restore the file, or delete it and submit again"
    )
