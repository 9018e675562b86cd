"""A checkpoint that somebody hands in: checked, recognised, scored on a suite, and kept with its results.

Only runs that are finished are recorded, and what is replaced goes to the history whole, after the new one is scored.
A stop in between leaves an earlier state of the tables, and the same command goes on from there.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from json import dumps, loads
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from safetensors.torch import save
from torch import nn

from saebench import results, runner, selfcheck, submitted
from saebench.checkpoints import Opened, locate, open_checkpoint, where
from saebench.errors import UserError
from saebench.loaders._files import Limits
from saebench.loaders._loader import Told
from saebench.progress import say
from saebench.results import Entry
from saebench.runner import Candidate, EvalRun, Options, Workbench
from saebench.selfcheck import SelfCheck
from saebench.submitted import Submission
from saebench.suite import Checkpoint, Suite
from saebench.types import SAE, Site


class Prepared(NamedTuple):
    """A checkpoint that is open and checked, and a suite to score it on."""

    bench: Workbench
    candidate: Candidate
    format: str
    check: SelfCheck


class Submitted(NamedTuple):
    """What became of a submission."""

    name: str
    """Under which it stands in the tables: an earlier one where it was recognised."""
    folder: Path
    """Of the suite's results."""
    check: SelfCheck
    failed: int
    """Runs that failed; the others are finished and kept."""
    told: str
    """One sentence."""


def checkpoint(**fields: Any) -> Checkpoint:
    """As a suite file would name it. Raises `UserError`."""
    submitted.check_name(fields["name"])
    try:
        return Checkpoint(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        named = ".".join(map(str, first["loc"])) or "the checkpoint"
        said = first["msg"].removeprefix("Value error, ")
        raise UserError(f"--{named} is {first['input']!r:.80}: {said}") from None


def fetched(given: str, limits: Limits, cache: Path | None) -> str:
    """The same checkpoint by its commit, its files downloaded and not looked into."""
    _, origin = locate(given, limits, cache, Path())
    if origin["from"] != "hub":
        return given
    folder = f"/{origin['folder']}" if origin["folder"] else ""
    return f"{origin['id']}@{origin['revision']}{folder}"


def tidy(folder: Path) -> None:
    """Removes what a killed process was writing; whoever takes the lock does."""
    if folder.is_dir():
        with suppress(UserError), results.lock(folder):  # another run may hold it by now
            pass


def submit(  # noqa: PLR0913  (what is submitted, to what, and two permissions)
    suite: Suite,
    suite_file: Path,
    options: Options,
    given: Checkpoint,
    *,
    replace: bool,
    force: bool,
) -> Submitted:
    """Scores a checkpoint on a suite and adds it to its results. Raises `UserError` where it is refused."""
    return keep(prepare(suite, suite_file, options, given, dry=False), replace=replace, force=force)


def prepare(
    suite: Suite, suite_file: Path, options: Options, given: Checkpoint, *, dry: bool
) -> Prepared:
    """Opens, validates and checks. Relative paths are meant from the current folder.

    `dry`: nothing is written, but for what has to be downloaded.
    """
    check_early(suite, options.results / suite.name, given.name)
    told = Told(given.site, given.predicts, given.k, given.norm)
    opened = open_checkpoint(
        given.checkpoint, given.format, told, options.limits, options.cache, Path()
    )
    opened = _weights_read(opened)
    bench = Workbench(suite, suite_file, options._replace(cache=None) if dry else options)
    candidate = bench.given(given, opened)
    return Prepared(bench, candidate, opened.format, checked(bench, candidate))


def check_early(suite: Suite, folder: Path, name: str) -> None:
    """A name, as far as that can be done before there is a model to plan controls for. Raises `UserError`."""
    own = [*(sae.name for sae in suite.trained()), *(given.name for given in suite.checkpoints())]
    _check_free(suite.name, own, submitted.read(folder), name)


def _weights_read(opened: Opened) -> Opened:
    """What is wrong with weights shows before a model is opened for them.

    Those of a set of SAEs wait: which of them is meant shows by the sites that the model has.
    """
    if len(opened.members) > 1:
        return opened
    (member,) = opened.members
    sae = member.load()
    return opened._replace(members=[member._replace(load=lambda: sae)])


def checked(bench: Workbench, candidate: Candidate) -> SelfCheck:
    sae, place = candidate.load(), (candidate.site, candidate.target)
    sae = runner.on_device(sae, bench.options.device)
    return selfcheck.check(
        sae,
        place,
        selfcheck.reader(bench),
        lambda: selfcheck.other_places(bench, sae, place),
    )


def missing(prepared: Prepared) -> list[EvalRun]:
    """What would be scored."""
    runs = prepared.bench.eval_runs([prepared.candidate])
    return [run for run in runs if not results.done(prepared.bench.folder, run.spec)]


def keep(prepared: Prepared, *, replace: bool, force: bool) -> Submitted:
    """Scores what is missing of it, and adds it to the suite's record, tables and plots."""
    bench, name = prepared.bench, prepared.candidate.name
    _check_name(bench, name)
    with results.lock(bench.folder):
        record = submitted.read(bench.folder)
        if (known := known_as(bench, prepared.candidate, record)) is not None:
            other, what = known
            told = f"these weights are there already: {what} {other}; nothing was scored"
            if name in record:
                told += f"; {name} keeps the weights that it has, and nothing was replaced"
            return Submitted(other, bench.folder, prepared.check, 0, told)
        earlier = record.get(name)
        if earlier is not None and earlier.checksum != prepared.candidate.checksum and not replace:
            raise UserError(
                f"{name} was submitted before with other weights (SHA-256 {earlier.checksum[:12]}; these have "
                f"{prepared.candidate.checksum[:12]}). Give another --name, or --replace, which keeps the old result "
                "as history"
            )
        _check_allowed(prepared.check, force or _forced_before(prepared, earlier))
        return _scored(prepared, record)


def known_as(
    bench: Workbench, candidate: Candidate, record: dict[str, Submission]
) -> tuple[str, str] | None:
    """An SAE of these results that has the same weights under another name, and what it is.

    Weights are recognised in any format; of a trained SAE without a checksum of that kind in its results, by that of
    the file that this project would write.
    """
    for name, submission in record.items():
        if name != candidate.name and submission.checksum == candidate.checksum:
            return name, "the earlier submission"
    if not _has_manifest(bench.folder):
        return None
    kinds = {name: entry.kind for name, entry in results.entries(bench.folder).items()}
    own_file = _file_checksum(candidate.load())
    for file in results.runs(bench.folder):
        if not (bench.folder / file).is_file():
            continue
        run = results.read_run(bench.folder, file)
        name, here = run["spec"]["sae"]["name"], run["spec"]["sae"]["checksum"]
        weights = run["provenance"].get("weights")
        same_file = weights is None and own_file is not None and here == own_file
        if name != candidate.name and (same_file or candidate.checksum in (here, weights)):
            return name, _KINDS.get(kinds.get(name, ""), "an SAE")
    return None


_KINDS = {
    "trained": "the trained SAE",
    "control": "the control",
    "reference": "the reference",
    "checkpoint": "the suite's checkpoint",
}


def _file_checksum(sae: SAE) -> str | None:
    """As `trainer.write_checkpoint` has it; None for what is no set of weights."""
    if not isinstance(sae, nn.Module):
        return None
    weights = {name: weight.cpu().contiguous() for name, weight in sae.state_dict().items()}
    return hashlib.sha256(save(weights)).hexdigest()


def _check_name(bench: Workbench, name: str) -> None:
    own = bench.names()
    _check_free(bench.suite.name, own, submitted.read(bench.folder), name)
    runner.check_submissions(bench.suite, bench.folder, own)


def _check_free(
    suite_name: str, own: Sequence[str], record: Mapping[str, Submission], name: str
) -> None:
    submitted.check_name(name)
    if name in own:
        raise UserError(
            f"{name} is the name of an SAE of the suite {suite_name} itself; give another --name"
        )
    for other in (*own, *record):
        if other != name and other.lower() == name.lower():
            raise UserError(
                f"{name} differs from {other}, which is there already, in case alone, and some file systems take "
                "the two for one; give another --name"
            )


def _check_allowed(check: SelfCheck, forced: bool) -> None:
    if check.refused is None or (forced and check.finite):
        return
    stop = "" if check.refused.endswith("?") else "."
    known = f"{stop} If it is known to be that bad, --force scores it all the same"
    way_out = known if check.finite else ""
    raise UserError(f"the self-check refuses this SAE: {check.refused}{way_out}")


def _forced_before(prepared: Prepared, earlier: Submission | None) -> bool:
    return (
        earlier is not None
        and earlier.checksum == prepared.candidate.checksum
        and "forced" in earlier.selfcheck
    )


def _scored(prepared: Prepared, record: dict[str, Submission]) -> Submitted:
    bench, candidate, check = prepared.bench, _marked(prepared), prepared.check
    name, folder = candidate.name, bench.folder
    runs = bench.eval_runs([candidate])
    to_do = [run for run in runs if not results.done(folder, run.spec)]
    failed = runner.score(bench, to_do)
    done = tuple(runner.run_name(bench, r) for r in runs if results.done(folder, r.spec))
    earlier = record.get(name)
    replaced = earlier is not None and earlier.checksum != candidate.checksum
    nothing_scored = not done or (earlier is None and failed >= len(to_do) > 0)
    if nothing_scored or (replaced and failed):
        kept = "the earlier result stays" if replaced else "it is not in the tables"
        return Submitted(name, folder, check, failed, f"{name} could not be scored: {kept}")
    if earlier is not None and replaced:
        place = submitted.keep_history(folder, name, earlier)
        say(f"the result of the earlier {name} is kept in {place}")
    record[name] = _recorded(prepared, candidate, None if replaced else earlier, done)
    saes, files = _of_the_suite(bench, record)
    submitted.write(folder, record)
    runner.write_manifest(bench, saes, files)
    submitted.drop_replaced(folder, name, done)
    _write_reports(bench, failed)
    told = f"{name}: {len(to_do) - failed} runs scored" if to_do else f"{name}: nothing was missing"
    return Submitted(name, folder, check, failed, told)


def _marked(prepared: Prepared) -> Candidate:
    """With the reason why the self-check would have refused it in the provenance of every run."""
    refused, candidate = prepared.check.refused, prepared.candidate
    if refused is None:
        return candidate
    return dataclasses.replace(candidate, origin=(candidate.origin or {}) | {"forced": refused})


def _recorded(
    prepared: Prepared, candidate: Candidate, earlier: Submission | None, done: tuple[str, ...]
) -> Submission:
    if earlier is not None:  # the same weights: what was written of them stays
        return earlier._replace(runs=done)
    refused = prepared.check.refused
    forced = {} if refused is None else {"forced": refused}
    origin = {k: v for k, v in (candidate.origin or {}).items() if k != "forced"}
    return Submission(
        candidate.entry,
        candidate.checksum,
        prepared.format,
        origin,
        prepared.check.numbers() | forced,
        done,
    )


def _of_the_suite(
    bench: Workbench, record: dict[str, Submission]
) -> tuple[dict[str, Entry], list[str]]:
    """The suite's own SAEs and runs for the manifest, as far as they are of the same kind.

    They are those of the last run, which need not have been here: its checkpoints may be elsewhere.
    """
    if not _has_manifest(bench.folder):
        return {}, []
    if _of_saes(results.definition(bench.folder)) != _of_saes(runner.public_definition(bench)):
        say("the suite has changed since it was run; `saebench run` brings its own SAEs up to date")
        runs = bench.eval_runs(bench.candidates())
        runs = [run for run in runs if results.done(bench.folder, run.spec)]
        entries = {run.candidate.name: run.candidate.entry for run in runs}
        return entries, [runner.run_name(bench, run) for run in runs]
    entries = {n: e for n, e in results.entries(bench.folder).items() if n not in record}
    asks = _asks(bench)
    files = [f for f in results.runs(bench.folder) if _run_of(f) in entries]
    current = [f for f in files if not (bench.folder / f).is_file() or asks(bench.folder, f)]
    if len(current) < len(files):
        say(
            f"{len(files) - len(current)} runs are of evals as they were before; they are left out of the tables until "
            "`saebench run` makes them anew"
        )
    return {n: e for n, e in entries.items() if n in set(map(_run_of, current))}, current


def _of_saes(definition: Mapping[str, Any]) -> dict[str, Any]:
    """What decides which SAEs a suite has; runs say themselves of which evals they are."""
    plain: dict[str, Any] = loads(dumps(definition))
    return {name: value for name, value in plain.items() if name not in ("evals", "reports")}


def _asks(bench: Workbench) -> Callable[[Path, str], bool]:
    """Whether a run is of an eval, in its version, that the suite has now, on its text."""
    nobody = Entry("checkpoint", "", None, None, None, str(bench.suite.sites[0]))
    asked = Candidate("nobody", nobody, bench.suite.sites[0], bench.suite.sites[0], "", _nothing)
    wanted = [
        {part: loads(dumps(run.spec[part])) for part in ("text", "eval")}
        for run in bench.eval_runs([asked])
    ]

    def asks(folder: Path, file: str) -> bool:
        spec = results.read_run(folder, file)["spec"]
        return {part: spec.get(part) for part in ("text", "eval")} in wanted

    return asks


def _nothing() -> SAE:
    raise AssertionError("asked for its spec alone")


def _run_of(file: str) -> str:
    """The name of the SAE."""
    return file.removeprefix("runs/").rsplit("--", 2)[0]


def _has_manifest(folder: Path) -> bool:
    return (folder / "suite.json").is_file()


def _write_reports(bench: Workbench, failed: int) -> None:
    try:
        runner.write_reports(bench.suite, bench.folder)
    except UserError as reason:
        if not failed:
            raise
        say(f"reports are not written: {reason}")


def described(prepared: Prepared) -> list[str]:
    """What would be done, for a dry run."""
    bench, candidate = prepared.bench, prepared.candidate
    _check_name(bench, candidate.name)
    place: tuple[Site, Site] = (candidate.site, candidate.target)
    lines = [
        f"format: {prepared.format}",
        f"{candidate.name}: {candidate.entry.width} latents at {where(*place)}, SHA-256 {candidate.checksum[:12]}",
    ]
    record = submitted.read(bench.folder)
    if (known := known_as(bench, candidate, record)) is not None:
        other, what = known
        told = f"these weights are there already: {what} {other}; nothing would be scored"
        return [*lines, told]
    to_do = missing(prepared)
    evals = ", ".join(dict.fromkeys(run.eval_name for run in to_do))
    lines.append(f"would score {len(to_do)} runs: {evals}" if to_do else "nothing is missing")
    earlier = record.get(candidate.name)
    if earlier is not None and earlier.checksum != candidate.checksum:
        lines.append("other weights were submitted under this name: it would need --replace")
    if prepared.check.refused is not None:
        lines.append(f"the self-check would refuse it: {prepared.check.refused}")
    return lines
