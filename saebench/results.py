"""Finished runs as files, and the one table that every report is made from.

results/<suite>/suite.json                         what the suite consists of now
results/<suite>/runs/<sae>--<eval>--<hash12>.json  {spec, scores or skipped, provenance}
results/<suite>/runs/<same>.units.parquet          metric, unit, num, den: what was summed
results/<suite>/audit.json                         how far its metrics can be relied on, where that was measured

A run is named by the hash of everything that determined it, so a file that exists is a run that is
done, and changing anything makes another file. Files are written whole: beside their place, synced,
then renamed over it, the units first and the JSON last.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from saebench import stats
from saebench.errors import UserError
from saebench.reliability.files import applying
from saebench.reliability.verdicts import Verdict, written_out
from saebench.stats import Floats, Numbers, Statistic

Spec = Mapping[str, Any]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_RUN_FILE = re.compile(r"runs/[A-Za-z0-9][A-Za-z0-9._-]*\.json")
_FULL = (errno.ENOSPC, errno.EDQUOT)

SCORE_KEYS = (  # of a score in a run file
    "metric",
    "best",
    "unit",
    "statistic",
    "value",
    "ci_low",
    "ci_high",
    "n",
    "n_units",
    "reference",
    "doc",
)
_DTYPES = {
    "sae": "str",
    "kind": "str",
    "variant": "str",
    "width": "Int64",
    "target_l0": "float64",
    "seed": "Int64",
    "site": "str",
    "eval": "str",
    "version": "int64",
    "params": "str",
    "metric": "str",
    "best": "str",
    "unit": "str",
    "statistic": "str",
    "value": "float64",
    "ci_low": "float64",
    "ci_high": "float64",
    "n": "int64",
    "n_units": "int64",
    "reference": "float64",
    "worst": "float64",
    "ideal": "float64",
    "doc": "str",
    "file": "str",
}
_SKIP_COLUMNS = ("sae", "eval", "params", "reason", "file")
_OMITTED_COLUMNS = ("sae", "eval", "params", "what", "reason", "file")
_ONE_ROW = ["sae", "eval", "params", "metric", "version"]


class ScoreRow(NamedTuple):
    """One metric of one run: what it means, and its units."""

    metric: str
    best: Literal["min", "max"] | None
    unit: str
    statistic: Statistic
    doc: str
    num: Numbers
    den: Numbers
    n: int
    reference: float | None
    ids: Sequence[str] | None
    """Names of the units where they have some; None numbers them from 0."""
    clusters: Sequence[str] | None
    """What each unit is from, where units of one source are alike; None where each stands for itself."""
    ends: tuple[float, float] | None
    """The value of an SAE that is worth nothing and that of a perfect one, where there are such."""


class Imported(NamedTuple):
    """One metric as another tool measured it: a number without units."""

    metric: str
    best: Literal["min", "max"] | None
    unit: str
    doc: str
    value: float
    n: int
    """How many tokens lie behind it, 0 where nobody said."""


class Entry(NamedTuple):
    """An SAE of a suite, as asked for."""

    kind: Literal["trained", "control", "reference", "checkpoint", "imported"]
    """A control knows nothing of what the model learned, and a trained SAE must be clearly better than it. A reference,
    such as the identity, is there to read the others against. What is imported was measured by another tool: numbers
    without units, which nothing here is compared with."""
    variant: str
    width: int | None
    l0: float | None
    seed: int | None
    site: str


class Units(NamedTuple):
    """One metric of one SAE, unit by unit."""

    ids: NDArray[Any]
    num: Floats
    den: Floats
    clusters: NDArray[Any] | None
    """What each unit is from; None where each stands for itself."""


class Omission(NamedTuple):
    """What a run leaves out of its scores: a metric, a dataset, some rows of one."""

    what: str
    reason: str


class Results(NamedTuple):
    """Everything a report may know."""

    scores: pd.DataFrame
    skips: pd.DataFrame
    """Runs that have no scores, with the reason."""
    omitted: pd.DataFrame
    """What runs that have scores leave out, with the reason."""
    stale: list[str]
    """Run files that the manifest does not name: results of an earlier state of the suite."""
    missing: list[str]
    """Run files that the manifest names and that are not there yet."""
    suite: str
    folder: Path
    model: str
    text: str
    audits: tuple[Verdict, ...]
    """What is known of how far its metrics can be relied on."""


def key(spec: Spec) -> str:
    """The same question has the same name, whoever asks and whenever."""
    return hashlib.sha256(_canonical(spec).encode()).hexdigest()[:12]


def run_file(folder: Path, spec: Spec) -> Path:
    """Where the result of a run belongs; it exists once the run is done."""
    sae, eval_name = _safe(spec["sae"]["name"], "an SAE"), _safe(spec["eval"]["name"], "an eval")
    return folder / "runs" / f"{sae}--{eval_name}--{key(spec)}.json"


def done(folder: Path, spec: Spec) -> bool:
    """Whether a run is finished: its scores and their units are there, or the reason for neither."""
    run = run_file(folder, spec)
    return run.is_file() and (units_file(run).is_file() or "skipped" in _load(run))


def units_file(run: Path) -> Path:
    return run.with_suffix(".units.parquet")


def write(
    folder: Path,
    spec: Spec,
    rows: Sequence[ScoreRow],
    omitted: Sequence[Omission],
    provenance: Mapping[str, Any],
) -> Path:
    path = run_file(folder, spec)
    content = _json(
        {
            "spec": spec,
            "scores": _scores(rows),
            "omitted": [omission._asdict() for omission in omitted],
            "provenance": provenance,
        }
    )
    units = units_file(path)
    write_bytes_whole(units, _parquet(rows))
    try:
        write_text_whole(path, content)
    except BaseException:
        units.unlink(missing_ok=True)
        raise
    return path


def write_skip(folder: Path, spec: Spec, reason: str, provenance: Mapping[str, Any]) -> Path:
    path = run_file(folder, spec)
    write_text_whole(path, _json({"spec": spec, "skipped": reason, "provenance": provenance}))
    return path


def write_imported(
    folder: Path,
    spec: Spec,
    told: Sequence[Imported],
    omitted: Sequence[Omission],
    provenance: Mapping[str, Any],
) -> Path:
    """A run of another tool, which has no units."""
    path = run_file(folder, spec)
    content = {
        "spec": spec,
        "scores": [_told(score) for score in told],
        "omitted": [omission._asdict() for omission in omitted],
        "provenance": provenance,
    }
    write_text_whole(path, _json(content))
    return path


def write_manifest(
    folder: Path,
    suite: str,
    definition: Mapping[str, Any],
    saes: Mapping[str, Entry],
    runs: Sequence[str],
) -> bool:
    """Say what the suite consists of now. `runs` are paths below `folder`, in the suite's order."""
    for run in runs:
        if not _RUN_FILE.fullmatch(run):
            raise ValueError(f"a run file is named runs/<name>.json, got {run!r}")
    manifest = {
        "suite": suite,
        "definition": definition,
        "saes": {_safe(name, "an SAE"): entry._asdict() for name, entry in saes.items()},
        "runs": list(runs),
    }
    # The order of SAEs is the suite's: reports keep it for their colours.
    return write_text_whole(folder / "suite.json", _json(manifest, sort_keys=False))


def write_text_whole(path: Path, text: str) -> bool:
    return write_bytes_whole(path, text.encode())


def write_bytes_whole(path: Path, data: bytes) -> bool:
    """Whether anything was written: a file that already says the same is left alone."""
    if path.is_file() and path.read_bytes() == data:
        return False
    with whole_file(path, len(data)) as file:
        file.write(data)
    return True


@contextmanager
def whole_file(path: Path, size: int = 0) -> Iterator[BinaryIO]:
    """A file that appears at `path` once it is complete, and not at all if anything fails.

    `size` is what will be written, for the message of a full disk; 0 where that is not known.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync(path.parent)
    except OSError as error:
        with suppress(OSError):  # there is no folder where a file stands in its place
            partial.unlink(missing_ok=True)
        if error.errno in _FULL:
            raise _disk_full(path, size) from error
        raise _unwritable(path, error) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Only one process writes a suite's results; the lock dies with the process that holds it."""
    import fcntl  # POSIX only, and reports must open elsewhere too

    make_folder(folder)
    try:
        lock_file = (folder / ".lock").open("a")
    except OSError as error:
        raise _unwritable(folder, error) from error
    with lock_file as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{folder}: another run is writing these results. Only one may at a time. "
                "Wait until it has finished, or give another --results folder."
            ) from error
        # What a killed process left half written; nobody else writes below a held lock.
        for partial in [*folder.glob(".*.partial"), *folder.glob("runs/.*.partial")]:
            partial.unlink()
        yield


def definition(folder: Path) -> dict[str, Any]:
    """The suite file as the manifest has it."""
    found: dict[str, Any] = _manifest(folder)["definition"]
    return found


def entries(folder: Path) -> dict[str, Entry]:
    """The SAEs of the manifest, in its order."""
    saes = _manifest(folder)["saes"]
    return {name: Entry(*(entry[k] for k in Entry._fields)) for name, entry in saes.items()}


def runs(folder: Path) -> list[str]:
    """The run files that the manifest names, whether they are there or not."""
    return list(_manifest(folder)["runs"])


def read_run(folder: Path, file: str) -> dict[str, Any]:
    """Spec, provenance, and scores or why there are none, as the file has them."""
    run = _load(folder / file)
    _need(run, folder / file, "spec", "provenance")
    return run


def read(folder: Path) -> Results:
    manifest = _manifest(folder)
    rows: list[dict[str, Any]] = []
    skips: list[dict[str, Any]] = []
    omitted: list[dict[str, Any]] = []
    missing = []
    for name in manifest["runs"]:
        path = folder / name
        if not path.is_file():
            missing.append(name)
            continue
        found = _run_rows(path, name, manifest["saes"])
        rows += found.scores
        skips += found.skips
        omitted += found.omitted
    definition = manifest["definition"]
    return Results(
        scores=_score_frame(rows, folder),
        skips=pd.DataFrame(skips, columns=list(_SKIP_COLUMNS)),
        omitted=pd.DataFrame(omitted, columns=list(_OMITTED_COLUMNS)),
        stale=_stale(folder, set(manifest["runs"])),
        missing=missing,
        suite=manifest["suite"],
        folder=folder,
        model=_describe_model(definition.get("model", {})),
        text=_describe_text(definition.get("text", {})),
        audits=applying(folder),
    )


def units(
    results: Results,
    metric: str,
    *,
    eval_name: str | None = None,
    params: str | None = None,
    saes: Sequence[str] | None = None,
) -> dict[str, Units]:
    """The kept units of one metric by SAE, read only now.

    `eval_name` and `params` are needed only where several evals or parameters have the metric.
    """
    rows = results.scores[results.scores["metric"] == metric]
    if eval_name is not None:
        rows = rows[rows["eval"] == eval_name]
    if params is not None:
        rows = rows[rows["params"] == params]
    if rows.empty:
        known = ", ".join(sorted(set(results.scores["metric"])))
        raise UserError(f"no SAE of {results.folder} has {metric!r}; there are: {known}")
    choices = rows[["eval", "params", "version"]].drop_duplicates()
    if len(choices) > 1:
        listed = "; ".join(f"{e} v{v} ({p})" for e, p, v in choices.to_numpy())
        raise UserError(f"{metric!r} is measured in several ways: {listed}. Name one of them.")
    if saes is not None:
        rows = rows[rows["sae"].isin(list(saes))]
    return {
        str(sae): units_in(results.folder / str(file), metric)
        for sae, file in zip(rows["sae"], rows["file"], strict=True)
    }


def on_common_units(found: Mapping[str, Units]) -> dict[str, Units]:
    """The same units in the same order for every SAE, so that these may be compared in pairs."""
    first = next(iter(found.values()))
    if all(np.array_equal(u.ids, first.ids) for u in found.values()):
        return dict(found)
    common = set(first.ids).intersection(*(set(u.ids) for u in found.values()))
    kept = [unit for unit in first.ids if unit in common]
    aligned = {}
    for sae, u in found.items():
        places = {unit: i for i, unit in enumerate(u.ids)}
        order = np.array([places[unit] for unit in kept], dtype=np.int64)
        clusters = None if u.clusters is None else u.clusters[order]
        aligned[sae] = Units(u.ids[order], u.num[order], u.den[order], clusters)
    return aligned


def has_units(results: Results, file: str) -> bool:
    """Whether the units of a run file were kept: numbers alone are enough to show a score."""
    return units_file(results.folder / file).is_file()


def _safe(name: str, what: str) -> str:
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{name!r} cannot name {what}: it becomes part of file names. Use up to 100 of the "
            "letters A-Z and a-z, digits, '.', '_' and '-', starting with a letter or a digit."
        )
    return name


def _canonical(spec: Spec) -> str:
    return json.dumps(spec, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _json(content: Mapping[str, Any], *, sort_keys: bool = True) -> str:
    text = json.dumps(content, indent=2, sort_keys=sort_keys, allow_nan=False, ensure_ascii=False)
    return text + "\n"


def _scores(rows: Sequence[ScoreRow]) -> list[dict[str, Any]]:
    names = [row.metric for row in rows]
    if len(set(names)) < len(names):
        raise ValueError(f"an eval gives each metric once, got {', '.join(names)}")
    for row in rows:
        _check(row)
    values = [_value(row) for row in rows]
    found = stats.intervals([column(row, row.statistic) for row in rows])
    return [_score(*of_row) for of_row in zip(rows, values, found, strict=True)]


def _check(row: ScoreRow) -> None:
    if not (np.isfinite(row.num).all() and np.isfinite(row.den).all()):
        raise ValueError(f"{row.metric}: num and den must be finite in every unit")
    if row.reference is not None and not np.isfinite(row.reference):
        raise ValueError(f"{row.metric}: the reference must be finite, got {row.reference}")
    if row.ids is not None and (len(row.ids) != len(row.num) or len(set(row.ids)) < len(row.ids)):
        raise ValueError(f"{row.metric}: every one of the {len(row.num)} units needs its own name")
    if row.clusters is not None and len(row.clusters) != len(row.num):
        raise ValueError(f"{row.metric}: every one of the {len(row.num)} units needs its cluster")


def _value(row: ScoreRow) -> float:
    try:
        return stats.value(row.num, row.den, row.statistic)
    except ValueError as error:
        raise ValueError(f"{row.metric}: {error}; an eval without a value raises Skip") from error


def _score(row: ScoreRow, value: float, ends: stats.Interval | None) -> dict[str, Any]:
    numbers = [value] if ends is None else [value, *ends]
    if not np.isfinite(numbers).all():
        raise ValueError(f"{row.metric}: value and interval must be finite, got {numbers}")
    return {
        "metric": row.metric,
        "best": row.best,
        "unit": row.unit,
        "statistic": row.statistic,
        "value": value,
        "ci_low": None if ends is None else ends.low,
        "ci_high": None if ends is None else ends.high,
        "n": int(row.n),
        "n_units": len(row.num),
        "reference": None if row.reference is None else float(row.reference),
        "ends": None if row.ends is None else list(row.ends),
        "doc": row.doc,
    }


def _told(given: Imported) -> dict[str, Any]:
    if not math.isfinite(given.value):
        raise ValueError(f"{given.metric}: the value must be finite, got {given.value}")
    nothing = dict.fromkeys(("ci_low", "ci_high", "reference", "ends"))
    return given._asdict() | nothing | {"statistic": "ratio", "n_units": 0}


def _parquet(rows: Sequence[ScoreRow]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sizes = [len(row.num) for row in rows]
    named = any(row.ids is not None for row in rows)
    ids = [row.ids if row.ids is not None else np.arange(len(row.num)) for row in rows]
    flat = np.concatenate(ids) if ids else np.arange(0)
    codes = np.repeat(np.arange(len(rows), dtype=np.int32), sizes)
    metrics = pa.array([row.metric for row in rows], type=pa.string())
    columns = {
        "metric": pa.DictionaryArray.from_arrays(codes, metrics),
        "unit": pa.array(flat.astype(str) if named else flat.astype(np.int64)),
        "num": _flat([row.num for row in rows]),
        "den": _flat([row.den for row in rows]),
    }
    if any(row.clusters is not None for row in rows):
        nobody: tuple[None] = (None,)
        named_from = [name for r in rows for name in r.clusters or nobody * len(r.num)]
        columns["cluster"] = pa.array(named_from, pa.string())
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    return bytes(sink.getvalue())


def _flat(columns: Sequence[Numbers]) -> Floats:
    return np.concatenate([np.zeros(0), *columns]).astype(np.float64)


def _sync(folder: Path) -> None:
    """A rename survives a power cut once its folder is on the disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_full(path: Path, needed: int) -> UserError:
    """`needed` is 0 where nobody knows."""
    free = _size(shutil.disk_usage(path.parent).free)
    amount = f"{_size(needed)} are needed, {free} are free" if needed else f"{free} are free"
    return UserError(
        f"{path}: the disk is full. {amount}. "
        "Make room and run the same command again: runs that are done are kept."
    )


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path} cannot be written: {error.strerror}. Give a folder where files can be written."
    )


def _size(n_bytes: int) -> str:
    size = float(n_bytes)
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: this is not valid JSON ({error}). It was not written by saebench run, or was "
            "changed since. Delete it and run the suite again."
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(content).__name__}.")
    return content


def _need(content: Any, path: Path, *keys: str) -> None:
    lacking = [k for k in keys if not isinstance(content, dict) or k not in content]
    if lacking:
        raise UserError(
            f"{path}: {', '.join(map(repr, lacking))} expected and not found. It was not written "
            "by this saebench. Delete it and run the suite again."
        )


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "suite.json"
    if not path.is_file():
        raise UserError(
            f"{folder}: no results of a suite here (no suite.json). Expected a folder that "
            "`saebench run SUITE` has written, results/<suite>; run that first."
        )
    manifest = _load(path)
    _need(manifest, path, "suite", "definition", "saes", "runs")
    for part, kind in (("definition", dict), ("saes", dict), ("runs", list)):
        if not isinstance(manifest[part], kind):
            raise UserError(
                f"{path}: {part!r} is not what saebench writes there. Run the suite again."
            )
    for entry in manifest["saes"].values():
        _need(entry, path, *Entry._fields)
    for run in manifest["runs"]:
        if not isinstance(run, str) or not _RUN_FILE.fullmatch(run):
            raise UserError(f"{path}: a run is named runs/<name>.json, found {run!r}.")
    return manifest


def _stale(folder: Path, named: set[str]) -> list[str]:
    present = {f"runs/{path.name}" for path in (folder / "runs").glob("*.json")}
    return sorted(present - named)


class _RunRows(NamedTuple):
    scores: list[dict[str, Any]]
    skips: list[dict[str, Any]]
    omitted: list[dict[str, Any]]


def _run_rows(path: Path, name: str, saes: Mapping[str, Any]) -> _RunRows:
    """What one run file says."""
    run = _load(path)
    _need(run, path, "spec", "provenance")
    spec = run["spec"]
    _need(spec, path, "sae", "eval")
    _need(spec["sae"], path, "name")
    _need(spec["eval"], path, "name", "version", "params")
    sae = spec["sae"]["name"]
    if sae not in saes:
        raise UserError(f"{path}: {sae!r} is not among the SAEs of suite.json beside runs/.")
    asked = {
        "sae": sae,
        "eval": spec["eval"]["name"],
        "params": written_out(spec["eval"]["params"]),
        "file": name,
    }
    if "skipped" in run:
        return _RunRows([], [asked | {"reason": run["skipped"]}], [])
    _need(run, path, "scores")
    for score in run["scores"]:
        _need(score, path, *SCORE_KEYS)
    entry = dict(saes[sae])
    about = asked | entry | {"target_l0": entry["l0"], "version": spec["eval"]["version"]}
    scores = [about | score | _ends(score) for score in run["scores"]]
    # Files of before omissions were noted have none.
    omitted = [asked | omission for omission in run.get("omitted", [])]
    for omission in omitted:
        _need(omission, path, *_OMITTED_COLUMNS)
    return _RunRows(scores, [], omitted)


def _ends(score: Mapping[str, Any]) -> dict[str, float]:
    """Most metrics have none."""
    worst, ideal = score.get("ends") or (math.nan, math.nan)
    return {"worst": worst, "ideal": ideal}


def _score_frame(rows: Sequence[Mapping[str, Any]], folder: Path) -> pd.DataFrame:
    frame = pd.DataFrame([{k: row[k] for k in _DTYPES} for row in rows], columns=list(_DTYPES))
    frame = frame.astype(_DTYPES)
    twice = frame[frame.duplicated(_ONE_ROW, keep=False)]
    if len(twice):
        sae, metric = twice.iloc[0][["sae", "metric"]]
        files = ", ".join(sorted(set(twice["file"])))
        raise UserError(
            f"{folder}: {sae!r} has {metric!r} twice with the same parameters, in {files}. "
            "One run of a suite gives one. Delete the file that does not belong."
        )
    return frame


def units_in(run: Path, metric: str) -> Units:
    """The kept units of one metric of one run file."""
    import pyarrow.parquet as pq

    path = units_file(run)
    if not path.is_file():
        raise UserError(
            f"{path}: the kept units of this run are gone, and comparisons need them. Delete "
            f"{run.name} beside it and run the suite again."
        )
    # Whole and by one thread: these files are small, and setting up a filtered read costs more.
    try:
        table = pq.ParquetFile(path).read(use_threads=False)
        names = table.column("metric").combine_chunks()
        here = names.indices.to_numpy() == names.dictionary.to_pylist().index(metric)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path}: these are no units of {metric}: {error}. It was not written by saebench run, or was "
            f"changed since. Delete it and {run.name} beside it, and run the suite again."
        ) from error
    ids, num, den = (table.column(name).to_numpy()[here] for name in ("unit", "num", "den"))
    clusters = None
    if "cluster" in table.column_names:
        named = table.column("cluster").to_numpy(zero_copy_only=False)[here]
        clusters = None if all(name is None for name in named) else named
    return Units(ids, num, den, clusters)


def column(units: Units | ScoreRow, statistic: Statistic) -> stats.Column:
    """What is resampled: the units, or what they are from where several are from one source."""
    whole = stats.Column(units.num, units.den, statistic)
    return whole if units.clusters is None else stats.clustered(whole, list(units.clusters))


def _describe_model(model: Mapping[str, Any]) -> str:
    """For captions: the id, and what else decides which model it is."""
    revision = model.get("revision")
    parts = [str(model.get("id", "unknown model"))]
    if revision:
        parts[0] += f"@{str(revision).removeprefix('sha256:')[:8]}"
    if model.get("dtype"):
        parts.append(str(model["dtype"]))
    return ", ".join(parts)


def _describe_text(text: Mapping[str, Any]) -> str:
    """For captions: where the tokens come from, and in sequences of what length."""
    named = text.get("source") or text.get("dataset") or text.get("files") or "unknown text"
    parts = [named, text.get("config"), text.get("split")]
    source = " ".join(str(part) for part in parts if part)
    if text.get("context"):
        return f"{source}, sequences of {text['context']} tokens"
    return source
