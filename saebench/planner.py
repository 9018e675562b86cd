"""What a run would do and what it would cost, before it does anything.

Counted, of a language model (LM) with P parameters in the blocks that run, and of SAEs of n latents and the wanted L0
on activations of d dimensions:

    operations per token   LM: 2 P (products with weights; attention between tokens is left out)
                           SAE in training: 2 d n + 10 d L0 (the dense encoder product; then, at the active latents
                           alone, pre-activations, the decoder and three gradients)
                           SAE in scoring: 2 d n + 2 d L0
    passes of the LM       one per group of SAEs that train together; in scoring one to each site, three resumed
                           above it (clean, zeroed, mean), one per group of SAEs and one per SAE; for an SAE that is
                           trained end to end one to its site and four above it (clean, replaced, and back)

The time is an estimate from a short measurement on the device: reading a batch at the sites, resuming above them, one
training step for each (variant, width) at its mean L0, and one batch of scoring for each width. What would take long
is measured on fewer tokens, or on fewer latents with proportionally smaller L0, and scaled. Building controls, the
decoder geometry, plots and evals that bring their own text or compare seeds are left out. Nothing is written.
"""

import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saebench import registry, results, runner, trainer
from saebench.cache import Cache
from saebench.progress import Meter, several
from saebench.runner import GROUP, Options, PlannedControl, Workbench, subject_of
from saebench.subject import LoadedModel, random_text
from saebench.suite import Suite, TrainedSAE
from saebench.synthetic import Subject, SyntheticSubject
from saebench.trainer import TrainRun
from saebench.types import Batch, Facts, SeedEval, Seen, Site, Skip, StreamEval, TextEval
from saebench.variants._training import Downstream, Lesson, Task

_ENOUGH_SECONDS = 0.4
_MOST_REPEATS = 5
_FIRST_TOKENS = 32
_LEAST_WIDTH = 1024
_LEAST_BATCH = 64
_CPU_PRODUCT = 2**30
_GPU_PRODUCT = 2**36
"""Largest batch times width times d of a step that is measured as it is."""
_REFERENCES = 3
"""Resumed passes whose losses all SAEs of a site share."""
_END_TO_END = 4
"""Resumed passes that a step end to end is worth: clean, replaced, and back, which costs two."""

_Key = TypeVar("_Key")


class Scored(NamedTuple):
    """An SAE that is still to be scored."""

    name: str
    place: tuple[Site, Site]
    """What it reads and what it predicts."""
    width: int
    l0: float
    untrained_lm: bool = False
    """Whether it is one of the LM before its training, as a control."""
    shuffled: bool = False
    """Whether evals with labels alone look at it."""


@dataclass(frozen=True)
class Work:
    """What is to be done."""

    suite: Suite
    options: Options
    lm: Subject
    widths: dict[Site, int]
    chosen: list[TrainRun]
    missing: list[TrainRun]
    groups: list[list[TrainRun]]
    """Of the missing, those that train in one pass over the LM."""
    scored: list[Scored]
    train_rows: int
    """Rows of text that one pass of training reads."""
    eval_rows: int
    text_read: bool
    """Whether the text was read; what is done already is not known without it."""
    cached: bool
    """Whether the cache has room for the activations of the evaluation text."""

    @property
    def context(self) -> int:
        return self.suite.text.context

    @property
    def batch_tokens(self) -> int:
        return self.suite.training.batch_tokens

    @property
    def steps(self) -> int:
        return self.suite.text.train_tokens // self.batch_tokens

    @property
    def train_tokens(self) -> int:
        """That each SAE sees."""
        return self.steps * self.batch_tokens

    @property
    def pass_tokens(self) -> int:
        """That the LM reads in one pass of training, special ones included."""
        return self.train_rows * self.context

    @property
    def eval_tokens(self) -> int:
        return self.eval_rows * self.context

    @property
    def streamed(self) -> list[Scored]:
        """What is to be scored on the evaluation text."""
        return [s for s in self.scored if not s.shuffled] if _streamed(self.suite) else []

    @property
    def places(self) -> list[tuple[Site, Site]]:
        """What SAEs read and predict that are to be scored on the evaluation text."""
        return list(dict.fromkeys(sae.place for sae in self.streamed))

    @property
    def through_lm(self) -> list[TrainRun]:
        """What is to be trained end to end."""
        return [run for run in self.missing if run.sae.recipe.end_to_end]

    def groups_at(self, place: tuple[Site, Site]) -> int:
        return math.ceil(sum(sae.place == place for sae in self.streamed) / GROUP)

    def models_at(self, place: tuple[Site, Site]) -> int:
        """2 where controls look at the LM before its training too."""
        return len({sae.untrained_lm for sae in self.streamed if sae.place == place})

    def reads(self, place: tuple[Site, Site]) -> int:
        """Passes of the LM over the evaluation text up to the sites."""
        once = 1 if self.cached else 2
        again = 0 if self.cached else self.groups_at(place)
        return once * self.models_at(place) + again

    def resumes(self, place: tuple[Site, Site]) -> int:
        """Passes of the LM over the evaluation text from the predicted site on."""
        if not (self.lm.predicts and any(e.needs_outcome for e in _streamed(self.suite))):
            return 0
        n = sum(sae.place == place for sae in self.streamed)
        return _REFERENCES * self.models_at(place) + self.groups_at(place) + n


class Parts(NamedTuple):
    """A cost, by where it comes from."""

    train_lm: float
    train_saes: float
    score_lm: float
    score_saes: float


class _Kind(NamedTuple):
    """SAEs whose training steps take the same time, but for their L0."""

    variant: str
    recipe: Any
    width: int
    d_in: int
    d_out: int


class Pace(NamedTuple):
    """How fast this device is."""

    read: float
    """Seconds per token that the LM reads up to the deepest site."""
    resume: dict[Site, float]
    """Seconds per token from the site on."""
    step: dict[_Kind, float]
    """Seconds per training step, at the mean L0 of the kind."""
    score: dict[tuple[int, int, int], float]
    """Seconds per token to score an SAE of (width, d_in, d_out), the LM's part left out."""
    took: float
    cut: list[str]
    """What was measured smaller than it is."""


def _streamed(suite: Suite) -> list[StreamEval]:
    """Evals on the suite's evaluation text, whose cost is counted here."""
    return [eval_.value for eval_ in suite.evals if isinstance(eval_.value, StreamEval)]


def plan(suite: Suite, suite_file: Path, options: Options) -> list[str]:
    """What `runner.run` would do, and its cost on this device, in lines."""
    work = _open(suite, suite_file, options)
    return [
        *_what(work),
        *_memory(work),
        *_disk(work),
        *_tokens(work),
        *_operations_lines(work),
        *_time(work),
        *_names(work),
    ]


def _open(suite: Suite, suite_file: Path, options: Options) -> Work:
    writes_nothing = options._replace(cache=None)
    if suite.text.dataset is not None:
        return _unread(suite, suite_file, writes_nothing, options)
    bench = Workbench(suite, suite_file, writes_nothing)
    names = bench.names()
    runner.check_submissions(suite, bench.folder, names)
    runner.check_chosen(options.only, names)
    runs, controls = bench.train_runs(), bench.controls()
    candidates = bench.candidates()
    to_do = {
        run.candidate.name
        for run in bench.eval_runs(candidates)
        if not results.done(bench.folder, run.spec)
    }
    done = {candidate.name for candidate in candidates} - to_do
    share = 1 - float(bench.stream.special.mean())
    rows = math.ceil(bench.stream.steps * bench.stream.batch_tokens / share / suite.text.context)
    return _work(
        suite,
        options,
        bench.subject,
        chosen=_chosen(options, runs, controls),
        scored=[s for s in _all_scored(suite, bench.subject, runs, controls) if s.name not in done],
        train_rows=rows,
        eval_rows=len(bench.tokens.evaluation),
        text_read=True,
    )


def _unread(suite: Suite, suite_file: Path, writes_nothing: Options, options: Options) -> Work:
    """A suite whose text is far away: its rows are counted, not read."""
    loaded = runner.open_model(suite, suite_file, writes_nothing)
    assert isinstance(loaded, LoadedModel), "a dataset is the text of a language model"
    context = suite.text.context
    lm = subject_of(loaded, random_text(loaded.model, 1, context), Cache(None))
    for site in suite.all_sites():
        lm.check_site(site)
    runs = [_run(suite, lm, sae) for sae in suite.trained()]
    controls = runner.planned_controls(suite, loaded, runs)
    scored = _all_scored(suite, lm, runs, controls)
    names = [*(r.sae.name for r in runs), *(s.name for s in scored)]
    runner.check_submissions(suite, options.results / suite.name, names)
    runner.check_chosen(options.only, names)
    return _work(
        suite,
        options,
        lm,
        chosen=_chosen(options, runs, controls),
        scored=scored,
        train_rows=math.ceil(suite.text.train_tokens / context),
        eval_rows=math.ceil(suite.text.eval_tokens / context),
        text_read=False,
    )


def _chosen(
    options: Options, runs: Sequence[TrainRun], controls: Sequence[PlannedControl]
) -> list[TrainRun]:
    """All that is to be trained, controls included."""
    trained = runner.to_train(runs, controls)
    return [run for run in trained if runner.chosen(run.sae.name, options.only)]


def _run(suite: Suite, lm: Subject, sae: TrainedSAE) -> TrainRun:
    """Of a text that is not read."""
    parent = suite.parent(sae)
    return TrainRun(
        sae,
        lm.identity,
        "not read",
        suite.text.train_tokens,
        suite.training.batch_tokens,
        suite.training.buffer_tokens,
        suite.training.dtype,
        parent=None if parent is None else _run(suite, lm, parent),
    )


def _work(  # noqa: PLR0913  (what differs between a text that was read and one that was not)
    suite: Suite,
    options: Options,
    lm: Subject,
    *,
    chosen: list[TrainRun],
    scored: list[Scored],
    train_rows: int,
    eval_rows: int,
    text_read: bool,
) -> Work:
    widths = {site: lm.width(site) for site in suite.all_sites()}
    needed = runner.with_parents(chosen)
    kept = suite.training.snapshots
    missing = [run for run in needed if not text_read or run.to_train(options.checkpoints, kept)]
    budget = trainer.memory_for_training(options.device)
    activations = _cache_bytes(lm, suite, widths, eval_rows)
    return Work(
        suite,
        options,
        lm,
        widths,
        chosen,
        missing,
        [
            group
            for on_one_model in runner.by_model(missing, lm.identity)
            for stage in trainer.stages(on_one_model)
            for group in trainer.split_groups(stage, widths, budget)
        ],
        [sae for sae in scored if runner.chosen(sae.name, options.only)],
        train_rows,
        eval_rows,
        text_read,
        options.cache is not None and _free_disk(options.cache) > activations,
    )


def _all_scored(
    suite: Suite, lm: Subject, runs: Sequence[TrainRun], controls: Sequence[PlannedControl]
) -> list[Scored]:
    """Trained SAEs, checkpoints (of a width that is not known here: that of the site) and controls."""
    trained = [Scored(r.sae.name, (r.sae.site, r.sae.target), r.sae.width, r.sae.l0) for r in runs]
    first = suite.sites[0]
    d = lm.width(first)
    given = [Scored(c.name, (first, first), d, float(d)) for c in suite.checkpoints()]
    return [*trained, *given, *(_scored_control(lm, control) for control in controls)]


def _scored_control(lm: Subject, control: PlannedControl) -> Scored:
    planned, site = control.planned, control.site
    d = lm.width(site)
    aside = control.run is not None and control.run.model != lm.identity
    width, l0 = planned.width or d, float(planned.l0 or d)
    return Scored(control.name, (site, site), width, l0, aside, control.control.value.shuffled)


# What is counted


def operations(work: Work) -> Parts:
    """Floating-point operations."""
    lm = work.lm
    below = {site: lm.parameters_below(site) for site in work.widths}
    above = {site: lm.parameters_above(site) for site in work.widths}
    read = len(work.groups) * work.pass_tokens * max(below.values())
    end_to_end = sum(below[r.sae.site] + _END_TO_END * above[r.sae.site] for r in work.through_lm)
    scored = sum(
        work.reads(place) * max(below[site] for site in place)
        + work.resumes(place) * above[place[1]]
        for place in work.places
    )
    return Parts(
        2.0 * (read + work.train_tokens * end_to_end),
        float(work.train_tokens * sum(_step_operations(work, run) for run in work.missing)),
        2.0 * work.eval_tokens * scored,
        float(work.eval_tokens * sum(_score_operations(work, sae) for sae in work.streamed)),
    )


def _step_operations(work: Work, run: TrainRun) -> float:
    """Per token. At the active latents two products are as long as what is read, three as what is predicted."""
    d_in, d_out = work.widths[run.sae.site], work.widths[run.sae.target]
    return 2 * d_in * run.sae.width + run.sae.l0 * (4 * d_in + 6 * d_out)


def _score_operations(work: Work, sae: Scored) -> float:
    d_in, d_out = (work.widths[site] for site in sae.place)
    return 2 * d_in * sae.width + 2 * d_out * sae.l0


def seconds(work: Work, pace: Pace) -> Parts:
    """Time on the device that was measured."""
    end_to_end = sum(pace.read + _END_TO_END * pace.resume[r.sae.site] for r in work.through_lm)
    scored = sum(
        work.reads(place) * pace.read + work.resumes(place) * pace.resume.get(place[1], 0.0)
        for place in work.places
    )
    return Parts(
        len(work.groups) * work.pass_tokens * pace.read + work.train_tokens * end_to_end,
        work.steps * math.fsum(pace.step[_kind(work, run)] for run in work.missing),
        float(work.eval_tokens * scored),
        work.eval_tokens * math.fsum(pace.score[_shape(work, sae)] for sae in work.streamed),
    )


def device_bytes(work: Work) -> dict[str, int]:
    """What lies in the memory of the device when it is fullest."""
    return {
        "SAEs of the largest group": max((_group_bytes(work, g) for g in work.groups), default=0),
        "activation buffer": 4 * work.suite.training.buffer_tokens * sum(work.widths.values()),
    } | work.lm.memory()


def disk_bytes(work: Work) -> dict[str, int]:
    """What a run writes; the training state only until a group is trained."""
    weights = [[_weights_bytes(work, run) for run in group] for group in work.groups]
    units = {"sequence": work.eval_rows, "dataset": 0, "feature": _n_features(work.lm)}
    metrics = [metric for eval_ in work.suite.evals for metric in eval_.value.metrics]
    return {
        "cache": _cache_bytes(work.lm, work.suite, work.widths, work.eval_rows)
        if work.cached
        else 0,
        "checkpoints": (1 + len(work.suite.training.snapshots)) * sum(map(sum, weights)),
        "training state": 3 * max(map(sum, weights), default=0),
        "results": sum(
            16 * (units | {"latent": sae.width})[metric.unit]
            for sae in work.scored
            for metric in metrics
        ),
    }


def _n_features(lm: Subject) -> int:
    """That are known: of a language model none are."""
    return lm.world.recipe.n_features if isinstance(lm, SyntheticSubject) else 0


def _group_bytes(work: Work, group: Sequence[TrainRun]) -> int:
    return sum(
        trainer.training_bytes(run, work.widths[run.sae.site], work.widths[run.sae.target])
        for run in group
    )


def _weights_bytes(work: Work, run: TrainRun) -> int:
    d_in, d_out = work.widths[run.sae.site], work.widths[run.sae.target]
    return 4 * ((d_in + d_out + 1) * run.sae.width + d_out)


def _cache_bytes(lm: Subject, suite: Suite, sites: Iterable[Site], eval_rows: int) -> int:
    """Activations of the evaluation text at each site, and the stream below where it is inside a block."""
    kept = []
    for site in sites:
        kept.append(site)
        layer = lm.layer(site)
        if layer is not None and not site.stream.startswith("resid"):
            kept.append(Site("resid_pre", layer))
    item = torch.empty((), dtype=lm.dtype).element_size()
    return eval_rows * suite.text.context * item * sum(lm.width(s) for s in dict.fromkeys(kept))


def _free_disk(folder: Path) -> int:
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free


# What is measured


class _Clock:
    """Times work on one device."""

    def __init__(self, device: str) -> None:
        self.device, self.began = device, time.perf_counter()

    def seconds(self, work: Callable[[], object]) -> float:
        """The fastest of a few repeats; the first, where it takes long already."""
        first = self._once(work)
        if first > _ENOUGH_SECONDS:
            return first
        repeats = max(1, min(_MOST_REPEATS, int(_ENOUGH_SECONDS / 2 / first)))
        return min(self._once(work) for _ in range(repeats))

    @property
    def passed(self) -> float:
        return time.perf_counter() - self.began

    def _once(self, work: Callable[[], object]) -> float:
        self._wait()
        began = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)


def measure(work: Work) -> Pace:
    """A few seconds of the work, on random tokens and random activations."""
    clock = _Clock(work.options.device)
    kinds = _mean_l0s((_kind(work, run), run.sae.l0) for run in work.missing)
    shapes = _mean_l0s((_shape(work, sae), sae.l0) for sae in work.streamed)
    cut: list[str] = []
    resumed = [place[1] for place in work.places if work.resumes(place)]
    sites = list(dict.fromkeys([*resumed, *(run.sae.site for run in work.through_lm)]))
    with Meter("measuring", 1 + len(sites) + len(kinds) + len(shapes), "pieces of work") as meter:
        read = _read_seconds(work, clock)
        meter.advance(1)
        resume = {}
        for site in sites:
            resume[site] = _resume_seconds(work, clock, site, read)
            meter.advance(1)
        step = {}
        for kind, l0 in kinds.items():
            step[kind] = _step_seconds(work, clock, kind, l0, cut)
            meter.advance(1)
        score = {}
        for shape, l0 in shapes.items():
            score[shape] = _score_seconds(work, clock, shape, l0, cut)
            meter.advance(1)
    return Pace(read, resume, step, score, clock.passed, list(dict.fromkeys(cut)))


def _kind(work: Work, run: TrainRun) -> _Kind:
    sae, widths = run.sae, work.widths
    return _Kind(sae.variant, sae.recipe, sae.width, widths[sae.site], widths[sae.target])


def _shape(work: Work, sae: Scored) -> tuple[int, int, int]:
    d_in, d_out = (work.widths[site] for site in sae.place)
    return sae.width, d_in, d_out


def _mean_l0s(found: Iterable[tuple[_Key, float]]) -> dict[_Key, float]:
    l0s: dict[_Key, list[float]] = {}
    for key, l0 in found:
        l0s.setdefault(key, []).append(l0)
    return {key: sum(values) / len(values) for key, values in l0s.items()}


def _shape_for(work: Work, seconds_per_token: float) -> tuple[int, int]:
    """Rows and context of a batch that takes about as long as one measurement may."""
    tokens = max(_FIRST_TOKENS, int(_ENOUGH_SECONDS / seconds_per_token))
    context = min(work.context, tokens)
    return max(1, min(work.lm.batch_rows, tokens // context)), context


def _read_seconds(work: Work, clock: _Clock) -> float:
    def of(rows: int, context: int) -> float:
        lm, sites = work.lm.on_random_text(rows, context), list(work.widths)
        return clock.seconds(lambda: lm.read(sites, lm.train_rows)) / (rows * context)

    return of(*_shape_for(work, of(1, min(work.context, _FIRST_TOKENS))))


def _resume_seconds(work: Work, clock: _Clock, site: Site, read: float) -> float:
    below = max(1, max(work.lm.parameters_below(s) for s in work.widths))
    rows, context = _shape_for(work, read * work.lm.parameters_above(site) / below)
    batches: Iterator[Batch] = work.lm.on_random_text(rows, context).evaluation(site)
    batch = next(batches)
    batch.outcome(batch.target)  # the clean prediction, which all SAEs share
    return clock.seconds(lambda: batch.outcome(batch.target)) / (rows * context)


def _smaller(work: Work, width: int, d: int, tokens: int) -> tuple[int, int]:
    """Width and tokens of a step that takes not too long."""
    most = _GPU_PRODUCT if work.options.device.startswith("cuda") else _CPU_PRODUCT
    while width * d * tokens > most and width > _LEAST_WIDTH:
        width = max(_LEAST_WIDTH, width // 2)
    while width * d * tokens > most and tokens > _LEAST_BATCH:
        tokens //= 2
    return width, tokens


def _noted(cut: list[str], what: str, small: tuple[int, int], whole: tuple[int, int]) -> float:
    """How many times the whole is as large as what is measured of it."""
    if small != whole:
        cut.append(
            f"{what} of width {whole[0]:,} measured at width {small[0]:,} on {small[1]:,} tokens, and scaled"
        )
    return math.prod(whole) / math.prod(small)


def _step_seconds(work: Work, clock: _Clock, kind: _Kind, l0: float, cut: list[str]) -> float:
    """Of a smaller SAE with proportionally smaller L0, where a step takes long."""
    whole = (kind.width, work.batch_tokens)
    small = _smaller(work, kind.width, kind.d_in, work.batch_tokens)
    times = _noted(cut, "training steps", small, whole)
    k = max(1, round(l0 * small[0] / kind.width))
    return clock.seconds(_training_step(work, kind, *small, k)) * times


def _training_step(
    work: Work, kind: _Kind, width: int, tokens: int, k: int
) -> Callable[[], object]:
    """A step of a new SAE whose encoder bias is such that about k latents are active."""
    device, recipe = work.options.device, kind.recipe
    task = Task(
        d_in=kind.d_in,
        d_out=kind.d_out,
        width=width,
        l0=k,
        tokens=work.train_tokens,
        generator=torch.Generator().manual_seed(0),
        transcodes=recipe.target == "other",
        skip=False,
        parent=_random_topk(kind.d_in, kind.d_out, width, k) if recipe.from_parent else None,
    )
    training = recipe.start(task).to(device)
    bias = dict(training.named_parameters()).get("b_enc")
    if bias is not None:
        # Pre-activations of random directions are normal with a deviation of 1 / sqrt(d).
        quantile = math.sqrt(2) * torch.erfinv(torch.tensor(1 - 2 * min(k / width, 0.5))).item()
        bias.data.fill_(-quantile / math.sqrt(kind.d_in))
    optimizer = trainer.optimizer_of(training, recipe)
    x, target = (torch.randn(tokens, d, device=device) / math.sqrt(d) for d in kind[-2:])
    if kind.d_in == kind.d_out:
        target = x
    generator = torch.Generator(device).manual_seed(0)
    lesson = Lesson(x, target, 0.0, generator, _pretended if recipe.end_to_end else None)
    share = work.batch_tokens / work.train_tokens
    return lambda: trainer.learn(training, optimizer, recipe, lesson, share)


def _pretended(prediction: Tensor, later: bool) -> Downstream:
    """In the place of the LM, whose part is counted apart."""
    error = prediction.square().mean()
    return Downstream(error, error if later else None)


def _random_topk(d_in: int, d_out: int, width: int, k: int) -> Any:
    sae = registry.get("saes", "topk")(d_in, width, d_out, k=k)
    generator = torch.Generator().manual_seed(0)
    for weight in (sae.W_enc, sae.W_dec):
        weight.copy_(torch.randn(weight.shape, generator=generator) / math.sqrt(d_in))
    return sae


def _score_seconds(
    work: Work, clock: _Clock, shape: tuple[int, int, int], l0: float, cut: list[str]
) -> float:
    """Per token: codes, reconstruction and the sums of the evals that ask for no language model."""
    width, d_in, d_out = shape
    tokens = max(_LEAST_BATCH, min(work.lm.batch_rows * work.context, work.batch_tokens))
    small = _smaller(work, width, d_in, tokens)
    times = _noted(cut, "scoring", small, (width, tokens))
    k = max(1, min(small[0], round(l0 * small[0] / width)))
    device = work.options.device
    sae = _random_topk(d_in, d_out, small[0], k).to(device)
    x, target = (torch.randn(small[1], d, device=device) for d in (d_in, d_out))
    batch = _RandomBatch(x, target, torch.arange(small[1], device=device) // work.context)
    return clock.seconds(lambda: _score(work, sae, batch)) * times / tokens


class _RandomBatch(NamedTuple):
    """As much of a batch of activations as evals read that ask for no language model."""

    x: Float[Tensor, "n d_in"]
    target: Float[Tensor, "n d_out"]
    sequence: Int[Tensor, " n"]


@torch.no_grad()
def _score(work: Work, sae: Any, batch: Any) -> None:
    code = sae.encode_sparse(batch.x)
    seen = Seen(batch, code, sae.decode_sparse(code), None)
    d_out, site = batch.target.shape[1], work.suite.sites[0]
    mean = torch.zeros(d_out, dtype=torch.float64, device=batch.x.device)
    facts = Facts(site, site, work.eval_rows, work.eval_tokens, mean)
    for eval_ in _streamed(work.suite):
        if not eval_.needs_outcome:
            try:
                eval_.start(sae, facts).update(seen)
            except Skip:
                continue


# What is said


def _what(work: Work) -> list[str]:
    suite, identity = work.suite, work.lm.identity
    n = work.lm.n_parameters
    budget = trainer.memory_for_training(work.options.device)
    lines = [
        f"model: {identity['id']} at {identity['revision']}, {identity['dtype']}, {n:,} parameters",
        f"text: {suite.text.train_tokens:,} training tokens, {suite.text.eval_tokens:,} evaluation "
        f"tokens in {work.eval_rows:,} sequences of {work.context}",
    ]
    if not work.text_read:
        lines.append(
            "the text is on the Hub and is not read for a plan: rows are tokens / context, and what is "
            "trained or scored already is not known"
        )
    lines.append(
        f"to train: {len(work.missing)} of {several(len(work.chosen), 'SAE')}, {work.steps:,} steps each, in "
        f"{several(len(work.groups), 'group')}"
    )
    for number, group in enumerate(work.groups, 1):
        size = _group_bytes(work, group)
        fits = "" if size <= budget else ", more than there is for it"
        lines.append(
            f"  group {number}: {several(len(group), 'SAE')}, {_gib(size)}{fits}, 1 pass over the language model"
        )
    return [*lines, f"to score: {several(len(work.scored), 'SAE')}, controls included"]


def _memory(work: Work) -> list[str]:
    device = work.options.device
    parts = device_bytes(work)
    budget = trainer.memory_for_training(device)
    return [
        f"memory of {device}: {_gib(sum(parts.values()))} needed ({_listed(parts)}); "
        f"{_gib(trainer.free_memory(device))} free now that the language model is loaded, of which "
        f"{_gib(budget)} for SAEs in training"
    ]


def _disk(work: Work) -> list[str]:
    parts = disk_bytes(work)
    free = _free_disk(work.options.checkpoints)
    needed = sum(parts.values())
    short = ", which is too little" if needed > free else ""
    lines = [f"disk: {_gib(needed)} ({_listed(parts)}); {_gib(free)} free{short}"]
    if not work.cached:
        wanted = _cache_bytes(work.lm, work.suite, work.widths, work.eval_rows)
        lines.append(
            f"  the cache has no room for {_gib(wanted)} of activations: they are computed anew for every "
            f"{GROUP} SAEs"
        )
    return lines


def _tokens(work: Work) -> list[str]:
    passes = len(work.groups)
    score = sum(work.reads(place) + work.resumes(place) for place in work.places)
    return [
        f"tokens: the language model reads {passes * work.pass_tokens:,} to train ({passes} x "
        f"{work.pass_tokens:,}) and {score * work.eval_tokens:,} to score ({score} whole or resumed passes x "
        f"{work.eval_tokens:,}); SAEs learn from {len(work.missing) * work.train_tokens:,} "
        f"({len(work.missing)} x {work.train_tokens:,}) and are scored on "
        f"{len(work.streamed) * work.eval_tokens:,}"
    ]


def _operations_lines(work: Work) -> list[str]:
    found = operations(work)
    return [
        f"floating-point operations: {sum(found):.2e} (training: language model {found.train_lm:.2e}, SAEs "
        f"{found.train_saes:.2e}; scoring: language model {found.score_lm:.2e}, SAEs {found.score_saes:.2e})"
    ]


def _time(work: Work) -> list[str]:
    if not work.missing and not work.scored:
        return ["time: nothing is to be done"]
    pace = measure(work)
    found = seconds(work, pace)
    return [
        f"time: about {_duration(sum(found))} (training: language model {_duration(found.train_lm)}, SAEs "
        f"{_duration(found.train_saes)}; scoring: language model {_duration(found.score_lm)}, SAEs "
        f"{_duration(found.score_saes)}); an estimate from a measurement of {pace.took:.1f} seconds on "
        f"{_device_name(work.options.device)}",
        *(f"  {note}" for note in pace.cut),
        *_left_out(work.suite),
    ]


def _left_out(suite: Suite) -> list[str]:
    lines = []
    for kind, what in ((TextEval, "on texts of their own"), (SeedEval, "between seeds")):
        names = [eval_.name for eval_ in suite.evals if isinstance(eval_.value, kind)]
        if names:
            lines.append(f"  {', '.join(names)}: {what}, not in the estimate")
    return lines


def _names(work: Work) -> list[str]:
    suite = work.suite
    missing = {run.sae.name for run in work.missing}
    given = ", ".join(c.name for c in suite.checkpoints()) or "none"
    controls = ", ".join(c.name for c in suite.controls) or "none"
    return [
        *(f"  {'train' if r.sae.name in missing else 'done '} {r.sae.name}" for r in work.chosen),
        f"checkpoints: {given}; controls: {controls}",
        f"each is scored with: {', '.join(e.name for e in suite.evals)}",
    ]


def _listed(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {_gib(size)}" for name, size in parts.items())


def _gib(size: int | float) -> str:
    return f"{size / 2**30:,.2f} GiB"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.1f} s"


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    return f"{device}, {torch.get_num_threads()} threads"
