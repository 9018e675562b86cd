"""Measures how far the metrics of a suite can be relied on: `saebench audit`.

The suite is run first where that is not done. Then some of its SAEs, the references, are scored again under conditions
that should not matter, and others are trained again with other seeds or looked at before their training was over:

    base       the suite itself, with the controls that it lacks, and with further seeds of some references
    redraw     evaluation texts and splits drawn anew: of held-out documents disjoint parts
    snapshot   one SAE of each family, after ever more training tokens
    batch      half as many rows at a time
    dtype      the language model in bfloat16
    context    half the context
    tokens     half the evaluation tokens
    unit       activations and SAE in another unit: x -> a x + b, the very same SAE otherwise
    cost       seconds and memory of each eval alone, on one SAE

What was measured is one table, audit.csv; what follows from it is worked out by `reliability`, which needs no model.
Scores are kept below audit/, so that a stopped audit goes on where it was.
"""

import dataclasses
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from saebench import registry, results, runner
from saebench.errors import UserError
from saebench.progress import say
from saebench.reliability.cards import Card, Panel, card_of
from saebench.reliability.files import as_json
from saebench.reliability.rows import read_measured
from saebench.reports import _audit_figures, _card
from saebench.rescaling import InUnitSAE, LabInUnit, SubjectInUnit, Unit
from saebench.runner import Candidate, EvalRun, Options, Workbench
from saebench.suite import Plugin, Suite, step_reaching
from saebench.text import TooShort
from saebench.trainer import TrainRun
from saebench.types import SAE, Eval, StreamEval, TextEval

FOLDER = "audit"
CONTROLS = ("random", "frozen_decoder", "permuted_decoder")
"""That the order of a metric is tested against; the oracle too, where features are known."""
_UNITS = (Unit(10.0, 0.0), Unit(1.0, 3.0))
_N_SNAPSHOTS = 6
_LEAST_REFERENCES = 3
_PANEL = "synthetic_small"
_LEAST_REDRAWN = 2_000
"""Evaluation tokens of one draw: with fewer, nothing can be said of noise."""
_DEGRADED = re.compile(r"-(mixed|dropped|permuted)(\d+)$")


class Extent(NamedTuple):
    """How much is measured."""

    draws: int
    """Evaluation texts that are drawn."""
    references: int
    """SAEs that are scored under every condition."""
    seeds: int
    """Trainings of each of the first three references, where the suite does not have as many itself."""


class _Bench(NamedTuple):
    """A suite under one condition."""

    what: str
    setting: str
    workbench: Workbench
    share: float = 1.0
    """Its evaluation tokens over those of the suite."""


Row = dict[str, Any]


def audit(
    suite: Suite, suite_file: Path, options: Options, extent: Extent, truth: Path | None
) -> Card:
    """Measures what is missing, and writes audit.{csv,json,md} and the figures beside the suite's results.

    `truth`: the results of an audited suite on a synthetic subject, whose panel says how metrics agree with it; for
    a suite that is none itself. Raises `UserError` where there are fewer than three SAEs to begin with.
    """
    panel = None if truth is None or suite.model.synthetic else _panel(truth)
    _check(suite)
    if failed := runner.run(suite, suite_file, options):
        raise UserError(f"{failed} runs of the suite failed (see above); an audit needs them all")
    auditor = _Auditor(suite, suite_file, options, extent)
    measured = pd.DataFrame(auditor.rows())
    folder = auditor.folder.parent
    card = _write(folder, measured, panel)
    runner.write_reports(suite, folder)  # with the badges
    return card


def panel_beside(folder: Path) -> Path | None:
    """The audited suite on a synthetic subject that comes along, if its results are in this folder."""
    found = folder / _PANEL
    return found if (found / "audit.csv").is_file() else None


def _check(suite: Suite) -> None:
    n = sum(sae.of is None for sae in suite.trained())
    if n < _LEAST_REFERENCES:
        raise UserError(
            f"the suite {suite.name} trains {n} SAEs that start from no other; an audit needs {_LEAST_REFERENCES} or "
            "more to say how large noise is"
        )


def _write(folder: Path, measured: pd.DataFrame, panel: Panel | None) -> Card:
    results.write_text_whole(folder / "audit.csv", measured.to_csv(index=False))
    card = card_of(folder.name, measured, panel)
    results.write_text_whole(folder / "audit.json", as_json(card))
    results.write_text_whole(folder / "audit.md", _card.markdown(card))
    _audit_figures.draw(measured, card, folder)
    return card


def _panel(folder: Path) -> Panel:
    path = folder / "audit.csv"
    if not path.is_file():
        raise UserError(
            f"{folder} has no audit.csv; expected the results of an audited suite on a synthetic subject: "
            "run `saebench audit synthetic_small` first"
        )
    return Panel(folder.name, read_measured(path))


class _Auditor:
    """One audit of one suite."""

    def __init__(self, suite: Suite, suite_file: Path, options: Options, extent: Extent) -> None:
        self.suite, self.file, self.extent = suite, suite_file, extent
        self.options = options._replace(only=None)
        self.folder = options.results / suite.name / FOLDER
        self.base = self._bench("base", "", self._with_controls())
        bench = self.base.workbench
        self.runs = bench.train_runs()
        self.references = _spread([r for r in self.runs if r.parent is None], extent.references)

    def rows(self) -> list[Row]:
        """Everything measured, condition after condition."""
        found: list[Row] = []
        for measure in (self._base, self._redraws, self._snapshots, self._others, self._units):
            found += measure()
        return found + self._costs()

    # Conditions

    def _base(self) -> list[Row]:
        bench = self.base.workbench
        further = self._other_seeds()
        bench.train(runner.with_parents(runner.to_train(self.runs + further, bench.controls())))
        more = [bench.trained(run) for run in further]
        return self._measured(self.base, [*bench.candidates(), *more])

    def _redraws(self) -> list[Row]:
        say(f"the evaluation text is drawn {self.extent.draws} times")
        found: list[Row] = []
        tokens = self._tokens_of_a_draw()
        for draw in range(self.extent.draws):
            text = {"eval_draws": self.extent.draws, "eval_draw": draw, "eval_tokens": tokens}
            evals = [Plugin(e.name, _reseeded(e.value, draw)) for e in self.suite.evals]
            suite = _changed(self.suite, text=text).model_copy(update={"evals": evals})
            share = tokens / self.suite.text.eval_tokens
            found += self._again(self._bench("redraw", str(draw), suite, share))
        return found

    def _snapshots(self) -> list[Row]:
        """Of each family, an SAE with a middling L0 and the first seed."""
        counts = self.suite.training.snapshots or self._counts()
        bench = self._bench("snapshot", "", _changed(self.suite, training={"snapshots": counts}))
        chosen = _one_of_each_family(self.runs)
        bench.workbench.train(runner.with_parents(chosen))
        kept = [bench.workbench.snapshots(run) for run in chosen]
        seen = {c.name: n for of in kept for n, c in zip(counts, of, strict=True)}
        rows = self._measured(bench, [candidate for of in kept for candidate in of])
        return [row | {"tokens": seen[row["sae"]]} for row in rows]

    def _counts(self) -> list[int]:
        """Numbers of tokens from a fiftieth of the training to all of it, no two of one step."""
        tokens, batch = self._trained_on, self.suite.training.batch_tokens
        wanted = np.geomspace(max(batch, tokens / 50), tokens, _N_SNAPSHOTS)
        steps = {step_reaching(int(n), tokens // batch, batch) for n in wanted}
        return [step * batch for step in sorted(steps)]

    def _others(self) -> list[Row]:
        suite, text = self.suite, self.suite.text
        fewer = self._bench("batch", "half the rows", suite)
        subject = fewer.workbench.subject
        subject.batch_rows = max(1, subject.batch_rows // 2)
        benches = [fewer]
        if suite.model.dtype != "bfloat16":
            lower = _changed(suite, model={"dtype": "bfloat16"})
            benches.append(self._bench("dtype", "bfloat16", lower))
        if not suite.model.synthetic:  # where every token stands alone
            half = text.context // 2
            shorter = _changed(suite, text={"context": half})
            benches.append(self._bench("context", str(half), shorter))
        half = text.eval_tokens // 2
        benches.append(
            self._bench("tokens", str(half), _changed(suite, text={"eval_tokens": half}), 0.5)
        )
        return [row for bench in benches for row in self._again(bench)]

    def _units(self) -> list[Row]:
        found: list[Row] = []
        for unit in _UNITS:
            bench = self._bench("unit", unit.name, self.suite)
            stage = bench.workbench.stage
            bench.workbench.stage = stage._replace(
                subject=SubjectInUnit(stage.subject, unit), lab=LabInUnit(stage.lab, unit)
            )
            there = [_in_unit(c, unit, self.options.device) for c in self._candidates()]
            found += self._measured(bench, there)
        return found

    def _costs(self) -> list[Row]:
        """Each eval alone on the first reference, after all of them were once: what SAEs share is done by then."""
        candidate, found = self._candidates()[0], []
        with tempfile.TemporaryDirectory() as scratch:
            bench = _Bench("cost", "", self._workbench(self.suite, Path(scratch) / "before"))
            runs = [
                run
                for run in bench.workbench.eval_runs([candidate])
                if isinstance(run.eval, StreamEval | TextEval)
            ]
            self._score(bench, runs)
            bench.workbench.folder = Path(scratch) / "timed"
            for run in runs:
                with _measuring(self.options.device) as costs:
                    self._score(bench, [run])
                (cost,) = costs
                nothing = {"value": None, "low": None, "high": None}
                found += [row | nothing | cost._asdict() for row in self._scored(bench, run)]
        return found

    # What they are made of

    def _with_controls(self) -> Suite:
        has = {control.name for control in self.suite.controls}
        wanted = (*CONTROLS, "oracle") if self.suite.model.synthetic else CONTROLS
        more = [
            Plugin(name, registry.get("controls", name)()) for name in wanted if name not in has
        ]
        return self.suite.model_copy(update={"controls": [*self.suite.controls, *more]})

    def _other_seeds(self) -> list[TrainRun]:
        """Further trainings of the first references."""
        found = []
        for run in self.references[:3]:
            alike = runner.family(run)
            there = {r.sae.seed for r in self.runs if runner.family(r) == alike}
            missing = [s for s in range(self.extent.seeds + len(there)) if s not in there]
            for seed in missing[: max(0, self.extent.seeds - len(there))]:
                found.append(dataclasses.replace(run, sae=run.sae.with_seed(seed)))
        return found

    def _candidates(self) -> list[Candidate]:
        return [self.base.workbench.trained(run) for run in self.references]

    def _again(self, bench: _Bench) -> list[Row]:
        return self._measured(bench, self._candidates())

    def _measured(self, bench: _Bench, candidates: Sequence[Candidate]) -> list[Row]:
        """Scores what is missing. Evals that compare seeds have nothing to say of one SAE under another condition."""
        workbench = bench.workbench
        runs = [
            run
            for run in workbench.eval_runs(candidates)
            if bench.what == "base" or isinstance(run.eval, StreamEval | TextEval)
        ]
        self._score(bench, [run for run in runs if self._done_in(bench, run) is None])
        return [row for run in runs for row in self._scored(bench, run)]

    def _score(self, bench: _Bench, runs: Sequence[EvalRun]) -> None:
        if failed := runner.score(bench.workbench, runs):
            raise UserError(f"{failed} runs of the audit failed (see above); the others are kept")

    def _done_in(self, bench: _Bench, run: EvalRun) -> Path | None:
        """The folder that has it: what the suite itself has is not done again."""
        own = [bench.workbench.folder, *([self.folder.parent] if bench.what == "base" else [])]
        return next((folder for folder in own if results.done(folder, run.spec)), None)

    def _scored(self, bench: _Bench, run: EvalRun) -> list[Row]:
        folder = self._done_in(bench, run)
        assert folder is not None, "scored just now"
        content = results.read_run(folder, f"runs/{results.run_file(folder, run.spec).name}")
        entry, params = run.candidate.entry, self._params[run.eval_name]
        degraded = _DEGRADED.search(run.candidate.name)
        about = {
            "sae": run.candidate.name,
            "kind": entry.kind,
            "family": entry.variant,
            "width": entry.width,
            "l0": entry.l0,
            "seed": entry.seed,
            "site": entry.site,
            "tokens": self._trained_on,
            "what": bench.what,
            "setting": bench.setting,
            "share": bench.share if isinstance(run.eval, StreamEval) else 1.0,
            "degraded": degraded[1] if degraded else "",
            "amount": int(degraded[2]) / 100 if degraded else 0.0,
            "eval": run.eval_name,
            "version": run.eval.version,
            "params": params,
        }
        return [
            about
            | {
                "metric": score["metric"],
                "best": score["best"],
                "ends": score["ends"] is not None,
                "value": score["value"],
                "low": score["ci_low"],
                "high": score["ci_high"],
                "seconds": None,
                "bytes": None,
            }
            for score in content.get("scores", ())
        ]

    @cached_property
    def _params(self) -> dict[str, str]:
        """Of the suite's evals, whatever seeds they are drawn with here."""
        return {e.name: json.dumps(e.value.parameters(), sort_keys=True) for e in self.suite.evals}

    @property
    def _trained_on(self) -> int:
        batch = self.suite.training.batch_tokens
        return self.suite.text.train_tokens // batch * batch

    def _tokens_of_a_draw(self) -> int:
        """As many as the suite's evaluation, or as the documents dealt to each draw have."""
        tokens = self.suite.text.eval_tokens
        while tokens >= _LEAST_REDRAWN:
            draws = range(self.extent.draws)
            if all(self._enough(draw, tokens) for draw in draws):
                return tokens
            tokens //= 2
        raise UserError(
            f"the text kept from training is too short to be dealt into {self.extent.draws} parts of "
            f"{_LEAST_REDRAWN:,} tokens; raise eval_share or give more text"
        )

    def _enough(self, draw: int, tokens: int) -> bool:
        text = {"eval_draws": self.extent.draws, "eval_draw": draw, "eval_tokens": tokens}
        least = {"train_tokens": self.suite.training.batch_tokens}
        suite = _changed(self.suite, text=text | least)
        try:
            runner.open_text(suite, self.file, self.base.workbench.loaded)
        except TooShort:
            return False
        return True

    def _bench(self, what: str, setting: str, suite: Suite, share: float = 1.0) -> _Bench:
        name = f"{what}-{re.sub(r'[^A-Za-z0-9.]+', '-', setting)}" if setting else what
        return _Bench(what, setting, self._workbench(suite, self.folder / name), share)

    def _workbench(self, suite: Suite, folder: Path) -> Workbench:
        found = Workbench(suite, self.file, self.options)
        found.folder = folder
        return found


def _changed(suite: Suite, **parts: dict[str, Any]) -> Suite:
    """Fields of parts of a suite replaced, by values that are known to be right."""
    made = {name: getattr(suite, name).model_copy(update=fields) for name, fields in parts.items()}
    return suite.model_copy(update=made)


def _reseeded(eval_: Eval, seed: int) -> Eval:
    """Splits drawn anew, where an eval has some."""
    has = any(field.name == "seed" for field in dataclasses.fields(eval_))
    return dataclasses.replace(eval_, **{"seed": seed}) if has else eval_


def _spread(runs: Sequence[TrainRun], n: int) -> list[TrainRun]:
    """So many of them, from all over the list."""
    places = np.linspace(0, len(runs) - 1, min(n, len(runs))).round().astype(int)
    return [runs[place] for place in places]


def _one_of_each_family(runs: Sequence[TrainRun]) -> list[TrainRun]:
    """With the middle of the family's L0, of the first site, width and seed."""
    families: dict[str, list[TrainRun]] = {}
    for run in runs:
        families.setdefault(run.sae.family, []).append(run)
    chosen = []
    for members in families.values():
        first = members[0].sae
        alike = [
            r
            for r in members
            if (r.sae.width, r.sae.seed, r.sae.site) == (first.width, first.seed, first.site)
        ]
        alike.sort(key=lambda r: r.sae.l0)
        chosen.append(alike[len(alike) // 2])
    return chosen


def _in_unit(candidate: Candidate, unit: Unit, device: str) -> Candidate:
    def load() -> SAE:
        return InUnitSAE(runner.on_device(candidate.load(), device), unit)

    return dataclasses.replace(candidate, load=load)


class _Cost(NamedTuple):
    seconds: float
    bytes: int | None


@contextmanager
def _measuring(device: str) -> Iterator[list[_Cost]]:
    """Adds the time of what happens inside, and how far memory rose above where it was."""
    found: list[_Cost] = []
    memory = _CUDAMemory(device) if device.startswith("cuda") else _HostMemory()
    began = time.perf_counter()
    with memory:
        yield found
    found.append(_Cost(time.perf_counter() - began, memory.risen))


class _CUDAMemory:
    def __init__(self, device: str) -> None:
        self.device = device
        self.risen: int | None = None

    def __enter__(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)
        self._before = torch.cuda.memory_allocated(self.device)

    def __exit__(self, *_: object) -> None:
        self.risen = torch.cuda.max_memory_allocated(self.device) - self._before


class _HostMemory:
    """Looked at every few milliseconds, where the system says what is resident."""

    _EVERY = 0.005
    _STATM = Path("/proc/self/statm")

    def __init__(self) -> None:
        self.risen: int | None = None
        self._done = threading.Event()
        self._peak = 0

    def __enter__(self) -> None:
        if self._STATM.exists():
            self._before = self._peak = self._resident()
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._STATM.exists():
            self._watcher.join()
            self.risen = self._peak - self._before

    def _watch(self) -> None:
        while not self._done.wait(self._EVERY):
            self._peak = max(self._peak, self._resident())

    def _resident(self) -> int:
        return int(self._STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
