"""Does what a suite asks for and what is not done yet: trains, scores, writes results and reports.

All SAEs of a group look at the same batch before the next one is read, so that the language model's own work (its
activations, its clean prediction) is done once for all of them; what an SAE costs is its encoder, its decoder and a
forward pass resumed above the site.
"""

import dataclasses
import fnmatch
import hashlib
import json
import logging
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

import saebench
from saebench import isolation, results, submitted, trainer
from saebench.cache import Cache
from saebench.checkpoints import Opened, one_at, open_checkpoint, where
from saebench.controls._control import Asked, Known, Material, Planned, TrainedControl
from saebench.errors import NothingToShow, UserError
from saebench.lab import ModelLab
from saebench.loaders._files import Limits
from saebench.loaders._loader import Member, Told
from saebench.loaders._native import read_native
from saebench.progress import Meter, say, several
from saebench.reliability.files import applying
from saebench.rescaling import LabInUnit, SubjectInUnit
from saebench.results import Entry, Omission, ScoreRow
from saebench.saes._dictionary import Dictionary
from saebench.saes._normalized import Normalized
from saebench.sites import parse_site
from saebench.subject import (
    BUILTIN_MODEL,
    LanguageModel,
    LoadedModel,
    load_model,
    random_model,
    rows_per_batch,
    untrained,
    untrained_identity,
)
from saebench.submitted import Submission
from saebench.suite import Checkpoint, Plugin, Suite, TrainedSAE, snapshot_name, twice
from saebench.synthetic import (
    LoadedWorld,
    Subject,
    SyntheticSubject,
    load_world,
    world_rows_per_batch,
    world_text,
)
from saebench.text import (
    Builtin,
    Draw,
    Files,
    HubDataset,
    Source,
    TextTokens,
    special_mask,
    tokenize,
)
from saebench.trainer import Stream, TrainRun
from saebench.types import (
    SAE,
    Batch,
    Eval,
    Omitted,
    Reading,
    Score,
    Seeded,
    SeedEval,
    Seen,
    Site,
    Skip,
    SparseCode,
    Spec,
    StreamEval,
    Tally,
    TextEval,
)

log = logging.getLogger(__name__)

GROUP = 8
"""SAEs that share a pass over the evaluation text: a stopped run loses the scores of no more than these."""

_CALIBRATION_TOKENS = 32_768
CONTROLS_VERSION = 1
"""Raised by every change that can move a control."""


class Options(NamedTuple):
    """Where a run reads and writes, from the command line."""

    results: Path
    checkpoints: Path
    cache: Path | None
    device: str
    only: str | None
    trust_remote_code: bool
    limits: Limits = Limits()
    """What strangers' files may be."""


@dataclass(frozen=True)
class Candidate:
    """An SAE to be scored, known before it is loaded."""

    name: str
    entry: Entry
    site: Site
    """What it reads."""
    target: Site
    """What it predicts: the same site, but for transcoders."""
    checksum: str
    """Of its weights; of a control, of everything that determines them."""
    load: Callable[[], SAE]
    untrained_lm: bool = False
    """Whether it is one of the language model before its training, and is scored there."""
    shuffled: bool = False
    """Whether it is scored with labels that were dealt out anew, and with nothing else."""
    parents_codes: bool = False
    """Whether its codes are those of another SAE."""
    origin: Spec | None = None
    """Of a checkpoint: where it is from."""
    family: str | None = None
    """Of one that the suite trains: the key of all that determines its weights but the seed."""


class EvalRun(NamedTuple):
    """One SAE under one eval: the smallest thing that is done or not done."""

    candidate: Candidate
    eval_name: str
    eval: Eval
    spec: Spec
    others: tuple[Candidate, ...] = ()
    """What a `SeedEval` compares it with: those that differ in their seed alone."""


class PlannedControl(NamedTuple):
    """A control SAE of a suite, before it is built or trained."""

    name: str
    control: Plugin
    planned: Planned
    site: Site
    run: TrainRun | None
    """Of one that is trained."""


Loaded = LoadedModel | LoadedWorld


class Stage(NamedTuple):
    """A language model, or what stands in its place, with the suite's text."""

    subject: Subject | SubjectInUnit
    stream: Stream
    """Of its activations, to train on."""
    lab: ModelLab | LabInUnit
    """For evals that bring their own text."""


class Workbench:
    """A suite with its model and text open."""

    def __init__(self, suite: Suite, suite_file: Path, options: Options) -> None:
        self.suite, self.options = suite, options
        if options.cache is not None:
            results.make_folder(options.cache)
        self.folder = options.results / suite.name
        self.loaded = open_model(suite, suite_file, options)
        self.tokens = open_text(suite, suite_file, self.loaded)
        self._folder = suite_file.parent
        self.stage = self._stage(self.loaded)
        for site in suite.all_sites():
            self.subject.check_site(site)
        self._given = [self._checkpoint(given, suite_file) for given in suite.checkpoints()]
        self._readings: dict[TextEval, Reading] = {}
        self._prepared: dict[tuple[TextEval, bool, Site], Any] = {}

    @property
    def subject(self) -> Subject:
        subject = self.stage.subject
        assert not isinstance(subject, SubjectInUnit), "there, SAEs are scored and nothing else"
        return subject

    @property
    def stream(self) -> Stream:
        return self.stage.stream

    @cached_property
    def untrained_stage(self) -> Stage:
        """The same architecture with random weights, on the same text."""
        assert isinstance(self.loaded, LoadedModel), "the suite was checked for controls of it"
        return self._stage(untrained(self.loaded))

    def _stage(self, loaded: Loaded) -> Stage:
        subject = subject_of(loaded, self.tokens, Cache(self.options.cache))
        rows = subject.batch_rows
        stream = Stream(
            subject,
            self.suite.all_sites(),
            self.tokens.train,
            special_mask(self.tokens.train, self.tokens.special_ids),
            tokens=self.suite.text.train_tokens,
            batch_tokens=self.suite.training.batch_tokens,
            buffer_tokens=self.suite.training.buffer_tokens,
            rows_at_a_time=rows,
        )
        tokenizer = loaded.tokenizer if isinstance(loaded, LoadedModel) else None
        return Stage(subject, stream, ModelLab(subject, tokenizer, self._folder))

    def stage_of(self, candidate: Candidate) -> Stage:
        return self.untrained_stage if candidate.untrained_lm else self.stage

    def train(self, runs: Sequence[TrainRun]) -> None:
        """What is missing of these, on the language model that each of them is for."""
        here, aside = by_model(runs, self.subject.identity)
        snapshots, checkpoints = self.suite.training.snapshots, self.options.checkpoints
        device = self.options.device
        trainer.train_missing(here, self.stream, snapshots, checkpoints, device)
        if any(run.to_train(checkpoints, snapshots) for run in aside):
            stream = self.untrained_stage.stream
            trainer.train_missing(aside, stream, snapshots, checkpoints, device)

    def reading(self, eval_: TextEval) -> Reading:
        """The text that an eval brings, read once."""
        if eval_ not in self._readings:
            self._readings[eval_] = eval_.read(self.stage.lab)
        return self._readings[eval_]

    def prepared(self, eval_: TextEval, candidate: Candidate) -> Any:
        """The model's part of an eval at the site that an SAE reads, computed once."""
        key = (eval_, candidate.untrained_lm, candidate.site)
        if key not in self._prepared:
            lab, reading = self.stage_of(candidate).lab, self.reading(eval_)
            self._prepared[key] = eval_.prepare(lab, reading, candidate.site)
        return self._prepared[key]

    def train_runs(self) -> list[TrainRun]:
        """Of the suite's own SAEs."""
        return [self._train_run(sae) for sae in self.suite.trained()]

    def controls(self) -> list[PlannedControl]:
        return planned_controls(self.suite, self.loaded, self.train_runs())

    def candidates(self) -> list[Candidate]:
        """SAEs that are trained by now, checkpoints and controls, in the suite's order."""
        runs = self.train_runs()
        trained = [self.trained(run) for run in runs if run.done(self.options.checkpoints)]
        planned = planned_controls(self.suite, self.loaded, runs)
        controls = filter(None, (self._control(control, runs) for control in planned))
        return [*trained, *self._given, *controls]

    def snapshots(self, run_: TrainRun) -> list[Candidate]:
        """A trained SAE or control as it was after each number of tokens that the suite keeps it at: none before it is
        finished.
        """
        checkpoints, wanted = self.options.checkpoints, self.suite.training.snapshots
        own = self._finished(run_) if run_.done(checkpoints) else None
        if own is None:
            return []
        missing = run_.snapshots_missing(checkpoints, wanted)
        there = {n: run_.snapshot(checkpoints, n) for n in wanted if n not in missing}
        return [
            dataclasses.replace(
                own,
                name=snapshot_name(own.name, tokens),
                checksum=trainer.recorded_checksum(folder),
                load=partial(_native, folder),
            )
            for tokens, folder in there.items()
        ]

    def _finished(self, run_: TrainRun) -> Candidate | None:
        """One of the suite's own SAEs, or a trained control."""
        if not run_.frozen and run_.model == self.subject.identity:
            return self.trained(run_)
        planned = {control.name: control for control in self.controls()}
        return self._control(planned[run_.sae.name], [])

    def names(self) -> list[str]:
        """Of all that is trained, given or built. Raises `UserError` where two of them are the same."""
        trained = [run.sae.name for run in self.train_runs()]
        controls = [control.name for control in self.controls()]
        names = [*trained, *(given.name for given in self._given), *controls]
        if again := twice(names):
            raise UserError(
                f"two SAEs of the suite would be called {again!r}; give the checkpoint another "
                "name, or each control once"
            )
        return names

    def eval_runs(self, candidates: Sequence[Candidate]) -> list[EvalRun]:
        return [
            self._eval_run(candidate, name, eval_, candidates)
            for candidate in candidates
            for name, eval_ in self.suite.evals
            if isinstance(eval_, TextEval) or not candidate.shuffled
        ]

    def _eval_run(
        self, candidate: Candidate, name: str, eval_: Eval, candidates: Sequence[Candidate]
    ) -> EvalRun:
        spec = self._spec(candidate, name, eval_)
        others = other_seeds(candidate, candidates) if isinstance(eval_, SeedEval) else []
        if others:  # without them it is skipped, and has the spec of any SAE
            spec["others"] = [other.checksum for other in others]
        return EvalRun(candidate, name, eval_, spec, tuple(others))

    def _train_run(self, sae: TrainedSAE) -> TrainRun:
        parent = self.suite.parent(sae)
        return TrainRun(
            sae,
            self.subject.identity,
            self.tokens.fingerprint_train,
            self.suite.text.train_tokens,
            self.suite.training.batch_tokens,
            self.suite.training.buffer_tokens,
            self.suite.training.dtype,
            parent=None if parent is None else self._train_run(parent),
        )

    def trained(self, run: TrainRun) -> Candidate:
        sae = run.sae
        folder = run.folder(self.options.checkpoints)
        checksum = run.checksum(self.options.checkpoints)
        place = where(sae.site, sae.target)
        entry = Entry("trained", sae.family, sae.width, sae.l0, sae.seed, place)
        return Candidate(
            sae.name,
            entry,
            sae.site,
            sae.target,
            checksum,
            lambda: _native(folder),
            family=family(run),
        )

    def _checkpoint(self, given: Checkpoint, suite_file: Path) -> Candidate:
        return self.given(given, self.opened(given, suite_file.parent))

    def opened(self, given: Checkpoint, beside: Path) -> Opened:
        """The files of a checkpoint. `beside`: relative paths are meant from here."""
        told = Told(given.site, given.predicts, given.k, given.norm)
        limits, cache = self.options.limits, self.options.cache
        return open_checkpoint(given.checkpoint, given.format, told, limits, cache, beside)

    def given(self, given: Checkpoint, opened: Opened) -> Candidate:
        """A checkpoint at one of the places that the suite looks at. Raises `UserError` where it is at none."""
        member = self._member(given, opened)
        sae, site, target = member.load(), member.site, member.target
        for at, d, does in ((site, sae.d_in, "reads"), (target, sae.d_out, "predicts")):
            if d != (width := self.subject.width(at)):
                raise UserError(
                    f"{given.name} {does} activations of {d} dimensions; those at {at} of "
                    f"{self.subject.identity['id']} have {width}. Was it trained on another model?"
                )
        entry = Entry("checkpoint", opened.format, sae.d_sae, None, None, where(site, target))
        return Candidate(
            given.name,
            entry,
            site,
            target,
            weights_checksum(sae),
            lambda: sae,
            origin=opened.origin,
        )

    def _member(self, given: Checkpoint, opened: Opened) -> Member:
        """Named by the sites of the suite, whatever names its files have for them."""
        places = {self._canonical(*place): place for place in self.places()}
        renamed = []
        for member in opened.members:
            try:
                found = self._canonical(member.site, member.target)
            except UserError:
                if len(opened.members) == 1:
                    raise
                continue  # a set of SAEs may have some at sites that another model has
            site, target = places.get(found, (member.site, member.target))
            renamed.append(member._replace(site=site, target=target))
        wanted = self.places()
        if given.site is not None:
            target = given.predicts or given.site
            wanted = [place for place in wanted if place[0] == given.site] or [(given.site, target)]
        return one_at(opened._replace(members=renamed, where=given.name), wanted)

    def _canonical(self, site: Site, target: Site) -> tuple[Site, Site]:
        return self.subject.canonical(site), self.subject.canonical(target)

    def places(self) -> list[tuple[Site, Site]]:
        """What SAEs of the suite read and predict."""
        trained = [(sae.site, sae.target) for sae in self.suite.trained()]
        return list(dict.fromkeys([*((site, site) for site in self.suite.sites), *trained]))

    def _control(self, planned: PlannedControl, runs: Sequence[TrainRun]) -> Candidate | None:
        """None where what it needs of these is not trained yet."""
        name, control, plan, site, run_ = planned
        kind = control.value.kind
        entry = Entry(kind, control.name, plan.width, plan.l0, None, str(site))
        if run_ is not None:
            if not run_.done(self.options.checkpoints):
                return None
            folder = run_.folder(self.options.checkpoints)
            checksum = run_.checksum(self.options.checkpoints)
            aside = control.value.untrained_lm
            return Candidate(name, entry, site, site, checksum, lambda: _native(folder), aside)
        parents = {run.sae.name: run for run in runs if run.sae.site == site}
        if plan.parent and not parents[plan.parent.name].done(self.options.checkpoints):
            return None
        spec = {
            "control": control.name,
            "version": CONTROLS_VERSION,
            "parameters": dataclasses.asdict(control.value),
            "planned": plan._replace(parent=None)._asdict()
            | {"parent": plan.parent and plan.parent.identity},
            "site": str(site),
            "model": self.subject.identity,
            "text": self.tokens.fingerprint_train,
            "buffer_tokens": self.suite.training.buffer_tokens,
        }

        def load() -> SAE:
            x = self.stream.calibration(site, _CALIBRATION_TOKENS).cpu()
            material = Material(
                x,
                lambda parent: _native(parents[parent].folder(self.options.checkpoints)),
                _known(self.subject),
            )
            with torch.no_grad():
                sae: SAE = control.value.build(plan, material)
            return sae

        made = f"made:{results.key(spec)}"
        built = control.value
        return Candidate(
            name,
            entry,
            site,
            site,
            made,
            load,
            shuffled=built.shuffled,
            parents_codes=built.has_parents_codes(plan),
        )

    def _spec(self, candidate: Candidate, eval_name: str, eval_: Eval) -> Spec:
        # Not that of its stage, which would make the untrained model to ask it for its name.
        model = self.stage.subject.identity
        if candidate.untrained_lm:
            model = _untrained_identity(self.loaded)
        text: Spec = {
            "fingerprint": self.tokens.fingerprint_eval,
            "context": self.tokens.context,
            "sequences": len(self.tokens.evaluation),
        }
        if isinstance(eval_, TextEval):
            text = {"fingerprint": self.reading(eval_).fingerprint}
        return {
            "sae": {"name": candidate.name, "checksum": candidate.checksum},
            "site": where(candidate.site, candidate.target),
            "model": model,
            "text": text,
            "eval": {
                "name": eval_name,
                "version": eval_.version,
                "params": eval_.parameters(),
            },
        }


def run(suite: Suite, suite_file: Path, options: Options) -> int:
    """The whole suite. Returns the number of runs that failed; the others are finished and kept."""
    bench = Workbench(suite, suite_file, options)
    results.make_folder(options.checkpoints)
    with results.lock(bench.folder):
        # What is wrong with checkpoints, controls and labelled texts shows before hours of training.
        names = bench.names()
        check_submissions(suite, bench.folder, names)
        check_chosen(options.only, names)
        bench.candidates()
        for eval_ in suite.evals:
            if isinstance(eval_.value, TextEval):
                bench.reading(eval_.value)
        trained = to_train(bench.train_runs(), bench.controls())
        bench.train(with_parents([r for r in trained if chosen(r.sae.name, options.only)]))
        missing = sum(not r.done(options.checkpoints) for r in trained)
        if missing:
            say(
                f"left out by --only, not trained yet and not in the tables: {several(missing, 'SAE')}"
            )
        candidates = bench.candidates()
        if not any(chosen(candidate.name, options.only) for candidate in candidates):
            left = ", ".join(r.sae.name for r in trained if not r.done(options.checkpoints))
            raise UserError(
                f"--only {options.only!r} names controls that are made of trained SAEs alone, and these are not "
                f"trained yet: {left}. Run without --only first, or with a pattern that has them"
            )
        runs = bench.eval_runs(candidates)
        to_do = [r for r in runs if _to_do(bench, r)]
        _write_manifest(bench, runs)
        failed = score(bench, to_do)
        try:
            write_reports(suite, bench.folder)
        except UserError as reason:
            if not failed:
                raise
            say(f"reports are not written: {reason}")
    return failed


def asked_of(run_: TrainRun) -> Asked:
    """A trained SAE as controls see it."""
    sae = run_.sae
    key = results.key(run_.spec())
    return Asked(sae.name, sae.variant, sae.width, sae.l0, key, sae.site, sae.recipe)


def planned_controls(
    suite: Suite, loaded: Loaded, runs: Sequence[TrainRun]
) -> list[PlannedControl]:
    """All controls of a suite that trains these."""
    found = []
    for site in suite.sites:
        here = {r.sae.name: r for r in runs if r.sae.site == r.sae.target == site}
        asked = [asked_of(run_) for run_ in here.values()]
        after = f"-{site}" if len(suite.sites) > 1 else ""
        for control in suite.controls:
            for planned in control.value.plan(asked):
                name = control.name + planned.suffix + after
                run_ = None
                if isinstance(control.value, TrainedControl):
                    assert planned.parent is not None, "planned from a trained SAE"
                    run_ = _control_run(name, control, here[planned.parent.name], loaded)
                found.append(PlannedControl(name, control, planned, site, run_))
    return found


def _control_run(name: str, control: Plugin, parent: TrainRun, loaded: Loaded) -> TrainRun:
    """The parent's training with something taken away."""
    aside = control.value.untrained_lm
    return dataclasses.replace(
        parent,
        sae=parent.sae._replace(name=name, family=control.name),
        model=_untrained_identity(loaded) if aside else parent.model,
        frozen=control.value.frozen,
    )


def _untrained_identity(loaded: Loaded) -> Spec:
    assert isinstance(loaded, LoadedModel), "the suite was checked for controls of it"
    return untrained_identity(loaded)


def to_train(runs: Sequence[TrainRun], controls: Sequence[PlannedControl]) -> list[TrainRun]:
    """All SAEs that a suite trains, controls included."""
    return [*runs, *(control.run for control in controls if control.run is not None)]


def by_model(runs: Sequence[TrainRun], identity: Spec) -> tuple[list[TrainRun], list[TrainRun]]:
    """Those on the suite's language model, and controls on the same before its training."""
    here = [run_ for run_ in runs if run_.model == identity]
    return here, [run_ for run_ in runs if run_.model != identity]


def family(run_: TrainRun) -> str:
    """Key of all that determines an SAE but its seed, and the seed of the SAE that it starts from."""
    parent = None if run_.parent is None else family(run_.parent)
    return results.key(run_.spec() | {"seed": None, "parent": parent})


def other_seeds(candidate: Candidate, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that differ from it in their seed alone, in the order of their checksums."""
    if candidate.family is None:
        return []
    others = [c for c in candidates if c.family == candidate.family and c.name != candidate.name]
    return sorted(others, key=lambda other: other.checksum)


def with_parents(runs: Sequence[TrainRun]) -> list[TrainRun]:
    """What has to be trained for these: none is there twice."""
    needed = [*(run.parent for run in runs if run.parent is not None), *runs]
    return list({results.key(run.spec()): run for run in needed}.values())


def score(bench: Workbench, runs: Sequence[EvalRun]) -> int:
    """Returns how many runs failed; the others are finished and kept."""
    streamed = [run_ for run_ in runs if isinstance(run_.eval, StreamEval)]
    texts = [run_ for run_ in runs if isinstance(run_.eval, TextEval)]
    seeds = [run_ for run_ in runs if isinstance(run_.eval, SeedEval)]
    failed = _score_stream(bench, streamed) + _score_texts(bench, texts)
    return failed + _score_seeds(bench, seeds)


def _score_stream(bench: Workbench, runs: Sequence[EvalRun]) -> int:
    """In groups that share a pass over the evaluation text."""
    if not runs:
        return 0
    failed = 0
    by_place: dict[tuple[bool, Site, Site], dict[str, list[EvalRun]]] = {}
    for run_ in runs:
        candidate = run_.candidate
        place = (candidate.untrained_lm, candidate.site, candidate.target)
        by_place.setdefault(place, {}).setdefault(candidate.name, []).append(run_)
    n_saes = sum(map(len, by_place.values()))
    tokens = bench.stage.subject.n_tokens
    with Meter(f"scoring {several(n_saes, 'SAE')}", n_saes * tokens, "tokens") as meter:
        for saes in by_place.values():
            jobs = list(saes.values())
            for start in range(0, len(jobs), GROUP):
                failed += _score_group(bench, jobs[start : start + GROUP], meter)
    return failed


def _score_texts(bench: Workbench, runs: Sequence[EvalRun]) -> int:
    """With evals that bring their own text: the model's part first, for all SAEs of a site."""
    if not runs:
        return 0
    failures = _Failures()
    by_sae: dict[str, list[EvalRun]] = {}
    for run_ in runs:
        by_sae.setdefault(run_.candidate.name, []).append(run_)
        with failures.noting([run_]):
            bench.prepared(_own_text(run_), run_.candidate)
    with Meter(
        f"scoring {several(len(by_sae), 'SAE')} on texts of evals", len(runs), "runs"
    ) as meter:
        for job in by_sae.values():
            left = [run_ for run_ in job if not failures.has([run_])]
            with failures.noting(left):
                sae = on_device(job[0].candidate.load(), bench.options.device)
            for run_ in job:
                if not failures.has([run_]):
                    with failures.noting([run_]):
                        _score_text(bench, run_, sae)
                meter.advance(1)
    return failures.count


def _score_text(bench: Workbench, run_: EvalRun, sae: SAE) -> None:
    began = time.perf_counter()
    eval_, candidate = _own_text(run_), run_.candidate

    def provenance() -> Spec:
        took = round(time.perf_counter() - began, 3)
        return _provenance(bench.options.device) | _about(candidate, sae) | {"seconds": took}

    try:
        if candidate.parents_codes and eval_.codes_alone:
            raise Skip(
                "its codes are those of the SAE that it is made of, whose scores it would have"
            )
        with torch.no_grad():
            found = eval_.scores(sae, bench.prepared(eval_, candidate), candidate.shuffled)
    except Skip as reason:
        results.write_skip(bench.folder, run_.spec, str(reason), provenance())
        return
    _write(bench, run_, found, provenance())


def _own_text(run_: EvalRun) -> TextEval:
    assert isinstance(run_.eval, TextEval), "the other kinds are scored elsewhere"
    return run_.eval


def _score_seeds(bench: Workbench, runs: Sequence[EvalRun]) -> int:
    """With evals that compare seeds, one family at a time."""
    if not runs:
        return 0
    failures = _Failures()
    families: dict[str | None, list[EvalRun]] = {}
    with Meter("comparing SAEs with their other seeds", len(runs), "runs") as meter:
        for run_ in runs:
            if run_.others:
                families.setdefault(run_.candidate.family, []).append(run_)
                continue
            with failures.noting([run_]):
                _skip_seedless(bench, run_)
            meter.advance(1)
        for members in families.values():
            _score_family(bench, members, failures, meter)
    return failures.count


def _skip_seedless(bench: Workbench, run_: EvalRun) -> None:
    candidate = run_.candidate
    reason = "no other seed of it is trained in this suite"
    if candidate.family is None:
        kind = candidate.entry.kind
        reason = f"it would be compared with other seeds of itself, and a {kind} has none"
    about = _provenance(bench.options.device) | _origin(candidate) | {"seconds": 0.0}
    results.write_skip(bench.folder, run_.spec, reason, about)


def _score_family(
    bench: Workbench, runs: Sequence[EvalRun], failures: "_Failures", meter: Meter
) -> None:
    """Weights are loaded once for all of them."""
    saes: dict[str, SAE] = {}
    counted: dict[int, dict[str, Seeded]] = {}
    with failures.noting(runs):
        for run_ in runs:
            for member in (run_.candidate, *run_.others):
                if member.name not in saes:
                    saes[member.name] = on_device(member.load(), bench.options.device)
        for tokens in {_of_seeds(run_).tokens for run_ in runs}:
            counted[tokens] = _seeded(bench, runs[0].candidate, saes, tokens)
    for run_ in runs:
        if not failures.has([run_]):
            with failures.noting([run_]):
                _score_seed(bench, run_, counted[_of_seeds(run_).tokens])
        meter.advance(1)


def _score_seed(bench: Workbench, run_: EvalRun, seeded: Mapping[str, Seeded]) -> None:
    began = time.perf_counter()
    one, others = seeded[run_.candidate.name], [seeded[other.name] for other in run_.others]

    def provenance() -> Spec:
        took = round(time.perf_counter() - began, 3)
        about = _about(run_.candidate, one.sae)
        return _provenance(bench.options.device) | about | {"seconds": took}

    try:
        with torch.no_grad():
            found = _of_seeds(run_).scores(one, others)
    except Skip as reason:
        results.write_skip(bench.folder, run_.spec, str(reason), provenance())
        return
    _write(bench, run_, found, provenance())


@torch.no_grad()
def _seeded(
    bench: Workbench, place: Candidate, saes: Mapping[str, SAE], tokens: int
) -> dict[str, Seeded]:
    """SAEs of one place with their firing rates, counted in one pass over the first tokens."""
    fires = {name: np.zeros(sae.d_sae, dtype=np.int64) for name, sae in saes.items()}
    n = 0
    for batch in bench.stage_of(place).subject.evaluation(place.site, place.target):
        x = batch.x[: tokens - n]
        for name, sae in saes.items():
            indices = sae.encode_sparse(x).indices
            fires[name] += torch.bincount(indices, minlength=sae.d_sae).cpu().numpy()
        n += len(x)
        if n >= tokens:
            break
    return {name: Seeded(sae, fires[name] / max(n, 1), n) for name, sae in saes.items()}


def _of_seeds(run_: EvalRun) -> SeedEval:
    assert isinstance(run_.eval, SeedEval), "the other kinds are scored elsewhere"
    return run_.eval


def write_reports(suite: Suite, folder: Path) -> None:
    """All reports, unless they were made from these very runs and are still there.

    What they were made from is noted last, so that a stop in between leaves nothing stale.
    """
    wanted = [r.value for r in suite.reports]
    basis = {
        "saebench": saebench.__version__,
        "manifest": (folder / "suite.json").read_text(encoding="utf-8"),
        "runs": sorted(path.name for path in (folder / "runs").glob("*")),
        "reports": [[r.name, dataclasses.asdict(r.value)] for r in suite.reports],
        "audits": applying(folder),
    }
    note, key = folder / ".reports", results.key(basis)
    whole = all(path.exists() for report in wanted for path in report.files(folder))
    if whole and note.exists() and note.read_text() == key:
        return
    finished, left_out = results.read(folder), False
    for report in wanted:
        try:
            report(finished, folder)
        except NothingToShow as reason:  # such as a metric that every run of it leaves out
            say(f"a report is left out: {reason}")
            left_out = True
    if not left_out:
        results.write_text_whole(note, key)


class _Scoring:
    """One SAE of a group, with the running sums of its evals."""

    def __init__(self, bench: Workbench, runs: Sequence[EvalRun]) -> None:
        self.bench, self.runs = bench, runs
        candidate = runs[0].candidate
        self.sae = on_device(candidate.load(), bench.options.device)
        self.seconds = 0.0
        facts = bench.stage_of(candidate).subject.facts(candidate.site, candidate.target)
        self.tallies: list[tuple[EvalRun, Tally]] = []
        self.needs_outcome = False
        for run_ in runs:
            assert isinstance(run_.eval, StreamEval), "the other kinds are scored elsewhere"
            try:
                if run_.eval.needs_outcome and not bench.stage.subject.predicts:
                    raise Skip(
                        "activations of a synthetic world: there is no language model whose loss could rise"
                    )
                if candidate.untrained_lm and run_.eval.needs_outcome:
                    raise Skip("a language model before its training predicts nothing to lose")
                self.tallies.append((run_, run_.eval.start(self.sae, facts)))
                self.needs_outcome |= run_.eval.needs_outcome
            except Skip as reason:
                self._skip(run_, reason)

    def update(self, batch: Batch) -> None:
        began = time.perf_counter()
        code = self.sae.encode_sparse(batch.x)
        x_hat = predicted(self.sae, batch.x, code)
        outcome = batch.outcome(x_hat) if self.needs_outcome else None
        seen = Seen(batch, code, x_hat, outcome)
        for _, tally in self.tallies:
            tally.update(seen)
        self.seconds += time.perf_counter() - began

    def finish(self, run_: EvalRun, tally: Tally) -> None:
        try:
            found = tally.scores()
        except Skip as reason:
            self._skip(run_, reason)
            return
        _write(self.bench, run_, found, self._provenance())

    def _skip(self, run_: EvalRun, reason: Skip) -> None:
        results.write_skip(self.bench.folder, run_.spec, str(reason), self._provenance())

    def _provenance(self) -> Spec:
        here = _provenance(self.bench.options.device)
        return here | self._about | {"seconds": round(self.seconds, 3)}

    @cached_property
    def _about(self) -> Spec:
        return _about(self.runs[0].candidate, self.sae)


def _write(
    bench: Workbench, run_: EvalRun, found: Sequence[Score | Omitted], provenance: Spec
) -> None:
    documents = bench.tokens.documents
    rows = [_row(run_.eval, part, documents) for part in found if isinstance(part, Score)]
    omitted = [Omission(*part) for part in found if isinstance(part, Omitted)]
    results.write(bench.folder, run_.spec, rows, omitted, provenance)


def _score_group(bench: Workbench, jobs: Sequence[Sequence[EvalRun]], meter: Meter) -> int:
    """Of SAEs that read one site and predict one site."""
    place = jobs[0][0].candidate
    subject = bench.stage_of(place).subject
    scorings: list[_Scoring] = []
    failures = _Failures()
    for runs in jobs:
        with failures.noting(runs):
            scorings.append(_Scoring(bench, runs))
    with torch.no_grad():
        for batch in subject.evaluation(place.site, place.target):
            for scoring in list(scorings):
                with failures.noting(scoring.runs):
                    scoring.update(batch)
                if failures.has(scoring.runs):
                    scorings.remove(scoring)
            meter.advance(len(batch.x) * len(jobs))
    for scoring in scorings:
        for run_, tally in scoring.tallies:
            with failures.noting([run_]):
                scoring.finish(run_, tally)
    return failures.count


class _Failures:
    """Failed work is logged and counted, and the rest goes on. What the user can mend stops the suite."""

    def __init__(self) -> None:
        self.count = 0
        self._failed: set[tuple[str, str]] = set()

    @contextmanager
    def noting(self, runs: Sequence[EvalRun]) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if isolation.ran_out(error):
                raise isolation.no_memory() from error
            log.exception("scoring %s failed", runs[0].candidate.name)
            self._failed |= {(r.candidate.name, r.eval_name) for r in runs}
            self.count += len(runs)

    def has(self, runs: Sequence[EvalRun]) -> bool:
        """Whether any of them has failed."""
        return any((r.candidate.name, r.eval_name) in self._failed for r in runs)


def _about(candidate: Candidate, sae: SAE) -> Spec:
    """Where a scored SAE is from, and the checksum by which its weights are recognised in another file or format."""
    known = isinstance(sae, Dictionary | Normalized)
    weights = {"weights": weights_checksum(sae)} if known else {}
    return weights | _origin(candidate)


def _origin(candidate: Candidate) -> Spec:
    return {} if candidate.origin is None else {"origin": candidate.origin}


def weights_checksum(sae: SAE) -> str:
    """SHA-256 over the architecture with its arguments, and names, shapes and bytes of the weights."""
    assert isinstance(sae, Dictionary | Normalized), "loaders give these"
    digest = hashlib.sha256(results.key(sae.arguments() | {"class": type(sae).__name__}).encode())
    for name, weight in sorted(sae.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def open_model(suite: Suite, suite_file: Path, options: Options) -> Loaded:
    asked, beside = suite.model, suite_file.parent
    if asked.id is not None and asked.synthetic:
        return load_world(asked.id, asked.dtype, options.device, Cache(options.cache))
    if asked.id is not None:
        return load_model(
            _local(asked.id, beside),
            asked.revision,
            asked.dtype,
            options.device,
            options.trust_remote_code,
        )
    assert asked.config is not None, "a suite names a model by its id or its config"
    tokenizer = _local(asked.tokenizer or BUILTIN_MODEL, beside)
    return random_model(_config(asked.config, beside), tokenizer, asked.dtype, options.device)


def _config(given: dict[str, Any] | str, beside: Path) -> dict[str, Any]:
    """The content of a config.json, from the suite or from the file that it names."""
    if isinstance(given, dict):
        return given
    path = beside / Path(given).expanduser()
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"the model's config {path} cannot be read: {error}; expected a config.json of transformers"
        ) from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(f"{path} has no model_type; expected a config.json of transformers")
    return config


def subject_of(loaded: Loaded, tokens: TextTokens, cache_: Cache) -> Subject:
    if isinstance(loaded, LoadedWorld):
        rows = world_rows_per_batch(loaded.world, tokens.context)
        return SyntheticSubject(loaded.world, tokens, loaded.identity, cache_, rows)
    rows = rows_per_batch(loaded.model, tokens.context)
    return LanguageModel(loaded.model, tokens, loaded.identity, cache_, rows)


def open_text(suite: Suite, suite_file: Path, loaded: Loaded) -> TextTokens:
    text = suite.text
    if isinstance(loaded, LoadedWorld):
        return world_text(text.context, text.train_tokens, text.eval_tokens, text.eval_draw)
    return tokenize(
        _source(suite, suite_file),
        loaded.tokenizer,
        text.context,
        text.train_tokens,
        text.eval_tokens,
        text.eval_share,
        text.train_passes,
        Draw(text.eval_draw, text.eval_draws),
    )


def _source(suite: Suite, suite_file: Path) -> Source:
    text = suite.text
    field = text.field or "text"
    if text.files is not None:
        return Files(text.files, suite_file.parent, field)
    if text.dataset is not None:
        split = text.split or "train"
        return HubDataset(text.dataset, text.config, split, field, text.revision, text.streaming)
    return Builtin("python-stdlib")


def _local(name: str, beside: Path) -> str:
    """Local folders are meant from where the suite file is."""
    folder = beside / name
    return str(folder) if folder.is_dir() else name


def _known(subject: Subject) -> Known | None:
    if isinstance(subject, SyntheticSubject):
        return Known(subject.truth, subject.features_of)
    return None


def _native(folder: Path) -> Dictionary:
    return read_native(folder).sae


def predicted(sae: SAE, x: Float[Tensor, "n d_in"], code: SparseCode) -> Float[Tensor, "n d_out"]:
    """What the SAE decodes, with what it predicts beside the latents."""
    x_hat = sae.decode_sparse(code)
    beside = getattr(sae, "beside", None)
    more: Tensor | None = None if beside is None else beside(x)
    return x_hat if more is None else x_hat + more


def on_device(sae: SAE, device: str) -> SAE:
    return sae.to(device) if isinstance(sae, nn.Module) else sae


def chosen(name: str, pattern: str | None) -> bool:
    return pattern is None or fnmatch.fnmatchcase(name, pattern)


def check_chosen(only: str | None, names: Sequence[str]) -> None:
    if not any(chosen(name, only) for name in names):
        raise UserError(
            f"--only {only!r} matches no SAE of the suite; there are: {', '.join(dict.fromkeys(names))}"
        )


def check_submissions(suite: Suite, folder: Path, names: Sequence[str]) -> None:
    """Raises `UserError` where an SAE of the suite is called as what was submitted to it before.

    Names that differ in case alone are the same to some file systems.
    """
    own = {name.lower(): name for name in names}
    for name in submitted.read(folder):
        mine = own.get(name.lower())
        if mine is None:
            continue
        also = "" if mine == name else f" but for its case ({name})"
        given = any(checkpoint.name == mine for checkpoint in suite.checkpoints())
        rename = "give the checkpoint in the suite file another name, or " if given else ""
        raise UserError(
            f"an SAE of the suite {suite.name} is called {mine}, and that is the name of an earlier submission{also}. "
            f"Nothing was done, and nothing is lost. To go on, {rename}delete the record of {name} in "
            f"{folder / submitted.FILE}, run the suite, and submit its checkpoint again under another --name"
        )


def _to_do(bench: Workbench, run_: EvalRun) -> bool:
    wanted = chosen(run_.candidate.name, bench.options.only)
    return wanted and not results.done(bench.folder, run_.spec)


def _write_manifest(bench: Workbench, runs: Sequence[EvalRun]) -> None:
    entries = {r.candidate.name: r.candidate.entry for r in runs}
    write_manifest(bench, entries, [run_name(bench, r) for r in runs])


def write_manifest(bench: Workbench, saes: Mapping[str, Entry], runs: Sequence[str]) -> None:
    """Of the suite's own SAEs, and of what was submitted to it."""
    entries, files = dict(saes), list(runs)
    for name, submission in submitted.read(bench.folder).items():
        asked = [run_name(bench, r) for r in bench.eval_runs([as_candidate(name, submission)])]
        there = [file for file in asked if file in submission.runs]
        if len(there) < len(asked):
            say(
                f"{name}, a submission, has {len(there)} of the {len(asked)} runs that the suite asks for now; "
                f"`saebench submit` with the same checkpoint and --name {name} makes those that are missing"
            )
        if there:
            entries[name] = submission.entry
            files += there
    results.write_manifest(bench.folder, bench.suite.name, public_definition(bench), entries, files)


def run_name(bench: Workbench, run_: EvalRun) -> str:
    """As the manifest has it."""
    return f"runs/{results.run_file(bench.folder, run_.spec).name}"


def as_candidate(name: str, submission: Submission) -> Candidate:
    """What was submitted earlier, whose weights nobody has here."""

    def load() -> SAE:
        raise UserError(f"the weights of {name} are not kept with its results; submit it again")

    site, _, target = submission.entry.site.partition(" to ")
    reads, predicts = parse_site(site), parse_site(target or site)
    return Candidate(name, submission.entry, reads, predicts, submission.checksum, load)


def public_definition(bench: Workbench) -> Spec:
    """The suite as it was run: revisions resolved, and no path of this machine."""
    definition = bench.suite.definition()
    definition["model"] = dict(bench.subject.identity)
    if bench.suite.text.files is not None:
        definition["text"]["files"] = Path(bench.suite.text.files).name
    for given in definition["saes"]:
        if "checkpoint" in given:
            given["checkpoint"] = Path(given["checkpoint"]).name
    return definition


def _row(eval_: Eval, score_: Score, documents: Int[np.ndarray, " sequences"]) -> ScoreRow:
    """`documents`: what each sequence of the evaluation text is from."""
    metric = next(m for m in eval_.metrics if m.name == score_.metric)
    clusters = score_.clusters
    if metric.unit == "sequence" and len(np.unique(documents)) < len(documents):
        numbers = range(len(documents)) if score_.ids is None else map(int, score_.ids)
        clusters = [str(documents[number]) for number in numbers]
    return ScoreRow(
        metric=metric.name,
        best=metric.best,
        unit=metric.unit,
        statistic=metric.statistic,
        doc=metric.doc,
        num=score_.num,
        den=score_.den,
        n=score_.n,
        reference=score_.reference,
        ids=score_.ids,
        clusters=clusters,
        ends=metric.ends,
    )


def _provenance(device: str) -> dict[str, Any]:
    on_gpu = device.startswith("cuda")
    packages = ("torch", "transformers", "numpy", "scipy", "pandas")
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "saebench": saebench.__version__,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device)
        if on_gpu
        else f"cpu, {torch.get_num_threads()} threads",
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }


@cache
def _commit() -> str | None:
    """Commit of the checkout this package runs from, with `+` where files differ; None when installed."""
    folder = Path(saebench.__file__).parent
    if not (folder.parent / ".git").exists():
        return None
    git = ["git", "-C", str(folder)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        status = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")
