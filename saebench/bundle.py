"""A submission as one file: its run files with their units, what was asked, and checksums. No weights.

manifest.json     format, saebench, suite {name, definition}, name, submission, files {name: {bytes, sha256}}
runs/<run>.json   as in the results folder, and beside it
runs/<run>.units.parquet

The archive is a plain zip: nothing is compressed, members follow each other without a gap, manifest first and the
rest in order, all of one date. The same submission gives the same bytes.

A bundle is a stranger's file, and `inspect` believes nothing of it. Sizes and names are looked at before any content is
read, checksums before any content is parsed. Every value and interval is recomputed from the units, and units that
follow from one another have to agree. All that is wrong is listed, as far as it can be told without trusting what is
known to be wrong.
"""

import hashlib
import io
import json
import re
import stat
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from saebench import __version__, relations, results, submitted
from saebench.errors import UserError
from saebench.relations import Counted
from saebench.results import Entry
from saebench.scrutiny import (
    LONGEST_NAME,
    Owner,
    Run,
    examined,
    is_count,
    is_name,
    is_text,
    json_object,
    shown,
    wrong_keys,
)
from saebench.submitted import Submission

FORMAT = 1
MANIFEST = "manifest.json"

DECISIVE = ("name", "model", "sites", "text", "evals")
"""Of a suite's definition: what scores depend on."""

MOST_BYTES = 256 * 2**20
_MOST_MEMBERS = 1_000
_MOST_JSON = 4 * 2**20
_MOST_DIRECTORY = _MOST_MEMBERS * 512
_MEMBER = re.compile(r"runs/[A-Za-z0-9][A-Za-z0-9._-]{0,250}(\.json|\.units\.parquet)")
_CHECKSUM = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DATE = (1980, 1, 1, 0, 0, 0)
_MODE = stat.S_IFREG | 0o644
_END = struct.Struct("<4s4H2LH")
_LOCAL_HEADER = 30

_MANIFEST_KEYS = {"format", "saebench", "suite", "name", "submission", "files"}
_SUBMISSION_KEYS = {"entry", "checksum", "format", "origin", "selfcheck", "runs"}


class Bundle(NamedTuple):
    name: str
    suite: str
    definition: dict[str, Any]
    """Of the suite, as the submitter had it."""
    submission: dict[str, Any]
    saebench: str
    """The version that made it."""
    runs: dict[str, Run]
    """By file."""

    @property
    def checksum(self) -> str:
        return str(self.submission["checksum"])


class Inspection(NamedTuple):
    bundle: Bundle | None
    """None where it is too damaged to be read at all."""
    problems: tuple[str, ...]


def write(folder: Path, name: str, out: Path) -> None:
    """The submission `name` of a results folder, as a zip file. Raises `UserError`, and writes nothing then."""
    if out.suffix != ".zip":
        raise UserError(f"the bundle is to be {out}; expected a file whose name ends in .zip")
    data = _packed(folder, name)
    found = _inspected(data)
    if found.problems:
        listed = "".join(f"\n- {problem}" for problem in found.problems)
        raise UserError(
            f"the results of {name} in {folder} are not as saebench wrote them; submit it again with --replace:{listed}"
        )
    results.write_bytes_whole(out, data)


def read(path: Path) -> Bundle:
    """A bundle in which nothing is wrong. Raises `UserError` that lists all that is."""
    bundle, problems = inspect(path)
    if problems or bundle is None:
        listed = "".join(f"\n- {problem}" for problem in problems)
        raise UserError(f"{path} is refused:{listed}")
    return bundle


def inspect(path: Path) -> Inspection:
    """All that can be said of a bundle without running anything. Raises `UserError` where there is no file."""
    if not path.is_file():
        raise UserError(f"there is no file {path}; expected a bundle, a .zip that saebench wrote")
    if (size := path.stat().st_size) > MOST_BYTES:
        return Inspection(None, (f"it has {size:,} bytes; a bundle has at most {MOST_BYTES:,}",))
    return _inspected(path.read_bytes())


def adopt(path: Path, folder: Path, replace: bool) -> str:
    """Puts the runs of a bundle into the results of its suite, and gives the name. Raises `UserError`.

    What was adopted before is left alone: other numbers under its name are refused, or with `replace` take its place,
    and it becomes history. Nothing is run: `verification` is what says whether to trust a bundle.
    """
    found = read(path)
    submitted.check_name(found.name)
    ours = results.definition(folder)
    differing = [part for part in DECISIVE if found.definition.get(part) != ours.get(part)]
    if differing:
        raise UserError(
            f"{path} is of a suite with another {', '.join(differing)} than the results in {folder}, and their "
            "numbers are not to be mixed"
        )
    if (other := _other_text(found, folder)) is not None:
        raise UserError(
            f"{path}: {other} was scored on another text than in {folder}, and the two are not to be mixed"
        )
    with results.lock(folder):
        records, entries = submitted.read(folder), results.entries(folder)
        there = records.get(found.name)
        if there is None and found.name in entries:
            raise UserError(
                f"{folder} has an SAE {found.name} of the suite's own; ask for another name"
            )
        members, _ = _members(path.read_bytes())
        given = found.submission
        entry = Entry(**given["entry"])
        mine = Submission(**given | {"entry": entry, "runs": tuple(given["runs"])})
        contents = {file: data for file, data in members.items() if file != MANIFEST}
        if not replace and (difference := _overwritten(folder, there, mine, contents)):
            raise UserError(
                f"{folder} has a submission {found.name} {difference}. Nothing was changed: ask for another name, or "
                "adopt it with --replace, which keeps what is there as history"
            )
        if there is not None and _overwritten(folder, there, mine, contents):
            submitted.keep_history(folder, found.name, there)
        for file in sorted(contents):
            results.write_bytes_whole(folder / file, contents[file])
        submitted.write(folder, records | {found.name: mine})
        gone = set(() if there is None else there.runs) - set(mine.runs)
        kept = [run for run in results.runs(folder) if run not in gone]
        runs = list(dict.fromkeys([*kept, *mine.runs]))
        results.write_manifest(folder, found.suite, ours, entries | {found.name: entry}, runs)
        submitted.drop_replaced(folder, found.name, mine.runs)
    return found.name


def _overwritten(
    folder: Path, there: Submission | None, mine: Submission, contents: Mapping[str, bytes]
) -> str:
    """In what a bundle differs from what a folder has under its name; empty where nothing is lost."""
    if there is not None and there.checksum != mine.checksum:
        return "of other weights"
    for file, data in sorted(contents.items()):
        if (folder / file).is_file() and (folder / file).read_bytes() != data:
            return f"with another content of {file}"
    if there is not None and there != mine:
        differing = [
            part for part in Submission._fields if getattr(there, part) != getattr(mine, part)
        ]
        return f"with another {', '.join(differing)}"
    return ""


def _other_text(found: Bundle, folder: Path) -> str | None:
    """The first run that was asked what a run of the folder was asked too, of other content."""
    there: dict[str, Any] = {}
    for file in results.runs(folder):
        if (folder / file).is_file():
            spec = results.read_run(folder, file)["spec"]
            there.setdefault(results.key(spec["eval"]), spec["text"])
    for file, run in found.runs.items():
        spec = run.content["spec"]
        if there.get(results.key(spec["eval"]), spec["text"]) != spec["text"]:
            return file
    return None


# Writing


def _packed(folder: Path, name: str) -> bytes:
    submission = _submission(folder, name)
    contents: dict[str, bytes] = {}
    for run in submission.runs:
        path = folder / run
        if not path.is_file():
            raise UserError(f"{path} is gone; submit {name} again")
        contents[run] = path.read_bytes()
        units = results.units_file(path)
        if units.is_file():
            contents[f"runs/{units.name}"] = units.read_bytes()
    definition = results.definition(folder)
    manifest = {
        "format": FORMAT,
        "saebench": __version__,
        "suite": {"name": definition["name"], "definition": definition},
        "name": name,
        "submission": submission._asdict() | {"entry": submission.entry._asdict()},
        "files": {
            file: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for file, data in contents.items()
        },
    }
    text = json.dumps(manifest, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
    members = {MANIFEST: (text + "\n").encode()} | dict(sorted(contents.items()))
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        for file, data in members.items():
            info = zipfile.ZipInfo(file, _DATE)
            info.create_system, info.external_attr = 3, _MODE << 16
            archive.writestr(info, data)
    return sink.getvalue()


def _submission(folder: Path, name: str) -> Submission:
    there = submitted.read(folder)
    if name not in there:
        raise UserError(
            f"{folder} has no submission {name!r}; there are: {', '.join(sorted(there)) or 'none'}. "
            f"`saebench submit CHECKPOINT --suite SUITE --name {name}` makes it"
        )
    return there[name]


# The archive


def _inspected(data: bytes) -> Inspection:
    members, problems = _members(data)
    if problems:
        return Inspection(None, tuple(problems))
    manifest, problems = _manifest(members)
    if manifest is None:
        return Inspection(None, tuple(problems))
    owner = _owner(manifest)
    runs: dict[str, Run] = {}
    for file in sorted(members):
        if file.endswith(".json") and file != MANIFEST:
            units = members.get(_units_of(file))
            run, wrong = examined(file, members[file], units, owner)
            problems += [f"{file}: {problem}" for problem in wrong]
            if run is not None:
                runs[file] = run
    problems += _together(manifest, members, runs)
    suite = manifest["suite"]
    bundle = Bundle(
        manifest["name"],
        suite["name"],
        suite["definition"],
        manifest["submission"],
        manifest["saebench"],
        runs,
    )
    return Inspection(bundle, tuple(problems))


def _owner(manifest: Mapping[str, Any]) -> Owner:
    submission = manifest["submission"]
    entry = submission["entry"]
    return Owner(manifest["name"], submission["checksum"], entry["site"], entry["width"])


def _units_of(run: str) -> str:
    return run.removesuffix(".json") + ".units.parquet"


def _members(data: bytes) -> tuple[dict[str, bytes], list[str]]:
    """Contents by name; nothing is read where anything is wrong with names, sizes or the layout."""
    problems = list(_end(data))
    if problems:
        return {}, problems
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except (zipfile.BadZipFile, struct.error, OSError, ValueError, NotImplementedError) as error:
        return {}, [f"it is no zip file: {error}"]
    with archive:
        infos = archive.infolist()
        problems = [problem for info in infos for problem in _wrong_member(info)]
        problems += _repeated(infos)
        problems += _layout(infos, len(data))
        if problems:
            return {}, problems
        found = {}
        for info in infos:
            try:
                found[info.filename] = archive.read(info)
            except (zipfile.BadZipFile, EOFError, OSError, ValueError, RuntimeError) as error:
                problems.append(f"{info.filename} is damaged: {error}")
        return found, problems


def _end(data: bytes) -> Iterator[str]:
    """The record at the end of a zip file says how much there is to look at."""
    if len(data) < _END.size:
        yield "it is no zip file: it is too short"
        return
    signature, *numbers, comment = _END.unpack(data[-_END.size :])
    if signature != b"PK\x05\x06" or comment:
        yield "it is no zip file as saebench writes them: it does not end as one"
        return
    disk, first, here, members, size, offset = numbers
    if (disk, first) != (0, 0) or here != members:
        yield "it is a part of a zip file"
    if members > _MOST_MEMBERS or size > _MOST_DIRECTORY:
        yield f"it has {members:,} members; a bundle has at most {_MOST_MEMBERS:,}"
    if offset + size + _END.size != len(data):
        yield "it has bytes beside its members"


def _wrong_member(info: zipfile.ZipInfo) -> Iterator[str]:
    name = shown(info.filename)
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind == stat.S_IFLNK:
        yield f"{name} is a link"
    elif kind not in (0, stat.S_IFREG) or info.is_dir():
        yield f"{name} is no file"
    if info.orig_filename.startswith(("/", "\\")) or re.match("[A-Za-z]:", info.orig_filename):
        yield f"{name} is an absolute name"
    elif ".." in re.split(r"[/\\]", info.orig_filename):
        yield f"{name} leads out of the bundle"
    elif info.orig_filename != MANIFEST and not _MEMBER.fullmatch(info.orig_filename):
        yield f"{name} does not belong into a bundle, which has {MANIFEST} and runs/NAME.json with .units.parquet"
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        amounts = f"{info.compress_size:,} bytes stand for {info.file_size:,}"
        yield f"{name} is compressed ({amounts}); nothing is, in a bundle"
    if info.flag_bits & ~0x800:
        yield f"{name} is encrypted or streamed"
    if info.filename.endswith(".json") and info.file_size > _MOST_JSON:
        yield f"{name} has {info.file_size:,} bytes; expected at most {_MOST_JSON:,}"


def _repeated(infos: Sequence[zipfile.ZipInfo]) -> Iterator[str]:
    """Names that are one file on some disks count as the same."""
    seen: set[str] = set()
    for info in infos:
        if info.filename.lower() in seen:
            yield f"{shown(info.filename)} is there twice"
        seen.add(info.filename.lower())


def _layout(infos: Sequence[zipfile.ZipInfo], size: int) -> Iterator[str]:
    """Each member begins where the one before it ends, so that no two share bytes and none are hidden."""
    at = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset != at:
            begins = f"begins at byte {info.header_offset:,}, expected {at:,}"
            yield f"{shown(info.filename)} {begins}: members overlap or leave gaps"
            return
        at += _LOCAL_HEADER + len(info.orig_filename.encode()) + info.file_size
    directory = sum(46 + len(info.orig_filename.encode()) for info in infos)
    if at + directory + _END.size != size:
        yield "it has bytes that belong to no member"


# The manifest


def _manifest(members: Mapping[str, bytes]) -> tuple[dict[str, Any] | None, list[str]]:
    """None where so much is wrong that nothing else can be checked."""
    if MANIFEST not in members:
        return None, [f"it has no {MANIFEST}"]
    content, problem = json_object(members[MANIFEST])
    if content is None:
        return None, [f"{MANIFEST}: {problem}"]
    problems = list(_wrong_manifest(content))
    if problems:
        return None, [f"{MANIFEST}: {problem}" for problem in problems]
    return content, list(_wrong_files(content["files"], members))


def _wrong_manifest(content: Mapping[str, Any]) -> Iterator[str]:
    if content.get("format") != FORMAT:
        yield f"format {shown(content.get('format'))}; this version of saebench reads {FORMAT}"
        return
    yield from wrong_keys(content, _MANIFEST_KEYS, "it")
    suite, files, submission = (content.get(key) for key in ("suite", "files", "submission"))
    yield from wrong_keys(suite, {"name", "definition"}, "suite")
    if isinstance(suite, dict):
        if not is_name(suite.get("name")):
            yield f"{shown(suite.get('name'))} cannot name a suite"
        if not isinstance(suite.get("definition"), dict):
            yield "the definition of the suite is none"
    if not is_name(content.get("name")):
        yield f"{shown(content.get('name'))} cannot name an SAE"
    if not is_text(content.get("saebench"), 100):
        yield "the version of saebench is none"
    if not isinstance(files, dict) or not all(_is_file_entry(entry) for entry in files.values()):
        yield "files is not a list of names with bytes and sha256"
    yield from _wrong_submission(submission)


def _wrong_submission(submission: Any) -> Iterator[str]:
    problems = list(wrong_keys(submission, _SUBMISSION_KEYS, "submission"))
    if problems:
        yield from problems
        return
    yield from _wrong_entry(submission["entry"])
    checksum = submission["checksum"]
    if not isinstance(checksum, str) or not _CHECKSUM.fullmatch(checksum):
        yield f"its checksum is {shown(checksum)}, which is not that of weights"
    if not is_text(submission["format"], 100):
        yield "its format is no text"
    if not isinstance(submission["selfcheck"], dict):
        yield "its self-check is none"
    yield from _wrong_origin(submission["origin"])
    runs = submission["runs"]
    if not isinstance(runs, list) or not runs or not all(isinstance(run, str) for run in runs):
        yield "it has no list of runs"


def _wrong_entry(entry: Any) -> Iterator[str]:
    problems = list(wrong_keys(entry, set(Entry._fields), "entry"))
    if problems:
        yield from problems
        return
    width = entry["width"]
    if entry["kind"] != "checkpoint":
        yield f"it is submitted as {shown(entry['kind'])}; expected a checkpoint"
    if not is_count(width) or not width:
        yield f"its width is {shown(width)}; expected a whole number above 0"
    if not is_text(entry["variant"], 100) or not is_text(entry["site"], LONGEST_NAME):
        yield "its variant or site is no text"
    if entry["l0"] is not None or entry["seed"] is not None:
        yield "nobody asked a checkpoint for an L0 or a seed, and it has one"


def _wrong_origin(origin: Any) -> Iterator[str]:
    if not isinstance(origin, dict) or origin.get("from") not in ("local", "hub"):
        yield "where it is from is neither local nor the Hub"
    elif origin["from"] == "hub" and not (
        isinstance(origin.get("revision"), str) and _COMMIT.fullmatch(origin["revision"])
    ):
        yield f"it is from the Hub at {shown(origin.get('revision'))}; expected a commit of 40 hexadecimal digits"


def _wrong_files(files: Mapping[str, Any], members: Mapping[str, bytes]) -> Iterator[str]:
    there = set(members) - {MANIFEST}
    for file in sorted(set(files) - there):
        yield f"{shown(file)} is listed and not there"
    for file in sorted(there - set(files)):
        yield f"{shown(file)} is there and not listed"
    for file in sorted(there & set(files)):
        data, listed = members[file], files[file]
        if len(data) != listed["bytes"]:
            yield f"{file} has {len(data):,} bytes; {listed['bytes']:,} are listed"
        if hashlib.sha256(data).hexdigest() != listed["sha256"]:
            yield f"{file} is not the file that is listed: its SHA-256 differs"


def _is_file_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and set(entry) == {"bytes", "sha256"}
        and is_count(entry["bytes"])
        and isinstance(entry["sha256"], str)
    )


# All runs together


def _together(
    manifest: Mapping[str, Any], members: Mapping[str, bytes], runs: Mapping[str, Run]
) -> Iterator[str]:
    yield from _wrong_list(manifest["submission"]["runs"], members)
    specs = [run.content["spec"] for run in runs.values()]
    if len({results.key(spec["model"]) for spec in specs}) > 1:
        yield "its runs are of several models"
    # Evals that bring their own text name no more than its fingerprint.
    texts = {results.key(spec["text"]) for spec in specs if "sequences" in spec["text"]}
    if len(texts) > 1:
        yield "its runs are of several evaluation texts"
    asked = [results.key(spec["eval"]) for spec in specs]
    if len(set(asked)) < len(asked):
        yield "it has two runs of one eval with the same parameters"
    if specs and specs[0]["model"] != manifest["suite"]["definition"].get("model"):
        yield "the model of its runs is not that of its suite"
    yield from _unrelated(runs.values(), manifest["submission"]["entry"]["width"])


def _unrelated(runs: Iterable[Run], width: int) -> Iterator[str]:
    numbers, problems = relations.collected(_numbers(run) for run in runs)
    yield from problems
    yield from relations.broken(numbers, width)


def _numbers(run: Run) -> dict[str, Counted]:
    n = {score["metric"]: score["n"] for score in run.content.get("scores", ())}
    return {metric: Counted(units, n.get(metric, 0)) for metric, units in run.units.items()}


def _wrong_list(listed: Sequence[str], members: Mapping[str, bytes]) -> Iterator[str]:
    there = {file for file in members if file.endswith(".json") and file != MANIFEST}
    if len(set(listed)) < len(listed):
        yield "the submission names a run twice"
    for file in sorted(set(listed) - there):
        yield f"{shown(file)} is a run of the submission and not there"
    for file in sorted(there - set(listed)):
        yield f"{shown(file)} is there and no run of the submission"
    owned = {_units_of(file) for file in there}
    for file in sorted(members):
        if file.endswith(".units.parquet") and file not in owned:
            yield f"{file} are units of no run"
