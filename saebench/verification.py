"""Whether a submission is what it says: the bundle alone, against the suite, against the checkpoint.

Three stages, each of which needs more than the one before it:

bundle       everything that `bundle.inspect` looks at; every eval and metric is one of the versions installed here
suite        the definition, the model's revision, the evaluation text and the parameters of every eval are those of the
             suite here; which sequences are units, how many tokens each has, and which document it is from; in every
             sequence, all that is the same for every SAE: its variance, squared length, and losses without an SAE
checkpoint   its weights are those that were scored, and units of a random sample of sequences, or of all, are the same
             when scored again, as are units that follow from weights alone

Facts about the whole text are computed from the whole text, so that a sequence has the same units in a sample as in the
full run. What depends on all sequences together (rates of latents, one global rescale) is not compared in a sample, and
is named among what was not checked.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from saebench import bundle, registry, relations
from saebench.bundle import Bundle
from saebench.checkpoints import where
from saebench.errors import UserError
from saebench.relations import Counted
from saebench.results import Entry, Units
from saebench.runner import (
    Candidate,
    Options,
    Workbench,
    as_candidate,
    on_device,
    predicted,
    public_definition,
    run_name,
)
from saebench.saes.linear import Linear
from saebench.scrutiny import PER_TOKEN, Run, shown
from saebench.stats import Floats
from saebench.submitted import Submission
from saebench.suite import Checkpoint, Suite
from saebench.types import (
    SAE,
    Batch,
    Eval,
    Facts,
    Metric,
    Omitted,
    Outcome,
    Score,
    SeedEval,
    Seen,
    Skip,
    SparseCode,
    StreamEval,
    Tally,
    TextEval,
)

TOLERANCE = 1e-4
"""Relative difference of a recomputed unit up to which it counts as the same."""
SEQUENCES = 64
"""How many are scored again, at least."""

_OF_PERFECT = ("reconstruction", "fidelity", "shrinkage")
"""Evals with sums over the text that are the same for every SAE."""
_NEVER_SKIPPED = ("reconstruction", "fidelity")
"""Whether these have a score is a matter of the text alone."""
_WITHOUT_SAE = {
    "explained_variance": ("den",),
    "rescale_gain": ("den",),
    "l2_ratio": ("den",),
    "ce_loss_clean": ("num",),
    "ce_loss_zero": ("num",),
    "ce_loss_mean": ("num",),
    "loss_recovered": ("den",),
    "loss_recovered_mean": ("den",),
}
"""What of their units is the same for every SAE."""
_CANCELLED = 1e-9
_OF_WEIGHTS = (
    "max_decoder_cosine",
    "encoder_decoder_cosine",
    "encoder_decoder_cosine_q05",
    "encoder_decoder_cosine_q95",
)
_OF_ALL_SEQUENCES = ("rescale_gain",)
"""Units of a sequence that have a sum over all sequences in them."""
_IN_NATS = ("ce_loss_increase", "kl_divergence")
"""Differences of large numbers, which may be close to zero."""
_NATS = 1e-5
_TEXT_TOLERANCE = 0.01
"""Of probes: AUCs move in steps, where two texts change places."""
_MOST_LISTED = 5


class Place(NamedTuple):
    """The suite here, and where it keeps what it computes."""

    suite: Suite
    file: Path
    options: Options


class Sampling(NamedTuple):
    sequences: int | None
    """How many, at least; None for all of them."""
    seed: int
    tolerance: float
    texts: bool
    """Whether evals that bring their own text are scored again too, all of them."""


class Report(NamedTuple):
    checked: tuple[str, ...]
    unchecked: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def text(self) -> str:
        parts = [("checked", self.checked), ("not checked", self.unchecked)]
        lines = [line for title, items in parts if items for line in (title, *_bullets(items))]
        if self.problems:
            return "\n".join([*lines, "refused", *_bullets(self.problems)])
        return "\n".join([*lines, "Nothing is wrong in what was checked."])


def verify(
    path: Path, place: Place | None, checkpoint: Checkpoint | None, sampling: Sampling
) -> Report:
    """All three stages, as far as there is something to do them with; none follows one that fails.

    Raises `UserError` where the bundle, the suite or the checkpoint cannot be opened.
    """
    found, problems = bundle.inspect(path)
    if found is None:
        return Report((), ("anything else: the bundle cannot be read",), problems)
    problems += tuple(_wrong_versions(found))
    if problems:
        return Report((), ("the suite", "the units themselves"), problems)
    checked = [*_about_bundle(found)]
    if place is None:
        return Report(tuple(checked), ("the suite (--suite)", "the units themselves"), ())
    bench = Workbench(place.suite, place.file, place.options)
    problems = tuple(_against_suite(found, bench, sampling.tolerance))
    if problems:
        return Report(tuple(checked), ("the units themselves",), problems)
    checked.append(
        f"suite: definition, model, text and evals are those of {place.suite.name} here; units are its "
        f"{len(bench.tokens.evaluation):,} sequences, of the documents they are from"
    )
    checked.append(
        "all sequences: what is the same for every SAE (tokens, variance and squared length of the activations, losses "
        "of the model untouched and ablated, denominators)"
    )
    if checkpoint is None:
        return Report(tuple(checked), ("the units themselves (--checkpoint)",), ())
    again = _scored_again(found, bench, checkpoint, sampling)
    return Report((*checked, *again.checked), again.unchecked, again.problems)


def _bullets(items: Sequence[str]) -> Iterator[str]:
    return (f"- {item}" for item in items)


def _about_bundle(found: Bundle) -> Iterator[str]:
    scores = sum(len(run.units) for run in found.runs.values())
    skipped = [run.eval_name for run in found.runs.values() if "skipped" in run.content]
    evals = ", ".join(dict.fromkeys(run.eval_name for run in found.runs.values()))
    yield f"bundle: {found.name}, submitted to {found.suite}; {len(found.runs)} runs ({evals})"
    if skipped:
        yield f"skipped by the submitter: {', '.join(skipped)}"
    yield f"values and intervals: recomputed from the units of {scores} scores, and in range"
    yield "evals and metrics: the versions installed here"


# The bundle


def _wrong_versions(found: Bundle) -> Iterator[str]:
    for file, run in found.runs.items():
        yield from (f"{file}: {problem}" for problem in _wrong_eval(run))


def _wrong_eval(run: Run) -> Iterator[str]:
    about = run.content["spec"]["eval"]
    if about["name"] not in registry.names("evals"):
        yield f"there is no eval {shown(about['name'])} here"
        return
    eval_ = registry.get("evals", about["name"])
    if about["version"] != eval_.version:
        yield f"{about['name']} is of version {about['version']}; this saebench has {eval_.version}"
        return
    if issubclass(eval_, SeedEval) and "scores" in run.content:
        yield f"{about['name']} compares seeds, and a submission has one alone: it has to be skipped"
        return
    known = {metric.name: metric for metric in eval_.metrics}
    for score in run.content.get("scores", ()):
        metric = known.get(score["metric"])
        if metric is None:
            yield f"{about['name']} has no metric {score['metric']}"
        elif (wrong := _redefined(score, metric)) is not None:
            yield f"{score['metric']}: {wrong}"


def _redefined(score: Mapping[str, Any], metric: Metric) -> str | None:
    ends = None if metric.ends is None else list(metric.ends)
    for what, expected in (
        ("best", metric.best),
        ("unit", metric.unit),
        ("statistic", metric.statistic),
        ("ends", ends),
    ):
        if score[what] != expected:
            return f"{what} is {shown(score[what])}, and here {shown(expected)}"
    return None


# The suite


def _against_suite(found: Bundle, bench: Workbench, tolerance: float) -> Iterator[str]:
    ours = json.loads(json.dumps(public_definition(bench)))
    for part in bundle.DECISIVE:
        for difference in _differing(found.definition.get(part), ours[part], part):
            yield f"the suite has another {difference}"
    try:
        candidate = as_candidate(found.name, _submission(found))
    except UserError as error:
        yield str(error)
        return
    if (candidate.site, candidate.target) not in bench.places():
        places = ", ".join(where(*place) for place in bench.places())
        yield f"it is an SAE at {shown(candidate.entry.site)}; the suite looks at {places}"
        return
    problems = list(_wrong_runs(found, bench, candidate))
    for file, run in found.runs.items():
        problems += [f"{file}: {problem}" for problem in _wrong_units(run, bench)]
    yield from problems
    if not problems:
        yield from _wrong_facts(found, bench, candidate, tolerance)


def _submission(found: Bundle) -> Submission:
    given = found.submission
    return Submission(**given | {"entry": Entry(**given["entry"]), "runs": tuple(given["runs"])})


def _wrong_runs(found: Bundle, bench: Workbench, candidate: Candidate) -> Iterator[str]:
    """Every run that the suite asks for, and no other."""
    asked = {run_name(bench, run): run for run in bench.eval_runs([candidate])}
    others = {file: run for file, run in found.runs.items() if file not in asked}
    for file, run_ in asked.items():
        if file in found.runs:
            continue
        twin = next((f for f, other in others.items() if other.eval_name == run_.eval_name), None)
        if twin is None:
            yield f"it has no run of {run_.eval_name}, which the suite asks for"
            continue
        spec = json.loads(json.dumps(run_.spec))
        for difference in _differing(others.pop(twin).content["spec"], spec, ""):
            yield f"{twin} was asked with another {difference}"
    for file in others:
        yield f"{file} is no run that the suite asks for"


def _differing(given: Any, expected: Any, at: str) -> Iterator[str]:
    """Paths into two specs where these differ, with both values."""
    if isinstance(given, dict) and isinstance(expected, dict):
        for key in dict.fromkeys([*expected, *given]):
            yield from _differing(given.get(key), expected.get(key), f"{at} {shown(key)}".strip())
    elif given != expected:
        yield f"{at}: {shown(json.dumps(given))}, and here {shown(json.dumps(expected))}"


def _wrong_units(run: Run, bench: Workbench) -> Iterator[str]:
    eval_ = registry.get("evals", run.eval_name)
    if not issubclass(eval_, StreamEval):
        return
    tokens = _counts(bench, scored=eval_.needs_outcome)
    units_of = {metric.name: metric.unit for metric in eval_.metrics}
    n = {score["metric"]: score["n"] for score in run.content.get("scores", ())}
    for metric, units in run.units.items():
        if units_of[metric] == "sequence":
            wrong = _wrong_sequences(metric, units, n[metric], tokens, bench.tokens.documents)
            yield from (f"{metric}: {problem}" for problem in wrong)


def _counts(bench: Workbench, scored: bool) -> NDArray[np.int64]:
    """Tokens of each sequence: all but special ones, or those after which a prediction is scored."""
    subject = bench.subject
    if scored:
        before = [subject.scored_before(row) for row in range(len(subject.eval_rows) + 1)]
        return np.asarray(np.diff(before), dtype=np.int64)
    return np.asarray((~subject.eval_special).sum(1).cpu().numpy(), dtype=np.int64)


def _wrong_sequences(
    metric: str,
    units: Units,
    n: int,
    tokens: NDArray[np.int64],
    documents: NDArray[Any],
) -> Iterator[str]:
    """Sequences without a token are no units; all others are."""
    try:
        ids = np.array([int(unit) for unit in units.ids], dtype=np.int64)
    except ValueError:
        yield "its units are no numbers of sequences"
        return
    expected = np.flatnonzero(tokens > 0)
    if not np.array_equal(ids, expected):
        yield f"its units are {len(ids):,} sequences; the text has {len(expected):,} with tokens, and all of them count"
        return
    if n != tokens.sum():
        yield f"it is said to be of {n:,} tokens; the text has {tokens.sum():,}"
    if metric in PER_TOKEN and not np.array_equal(units.den, tokens[ids]):
        wrong = int(np.flatnonzero(units.den != tokens[ids])[0])
        yield f"sequence {ids[wrong]} is said to have {units.den[wrong]:g} tokens; it has {tokens[ids[wrong]]}"
    given = None if units.clusters is None else [str(cluster) for cluster in units.clusters]
    several = len(np.unique(documents)) < len(documents)
    if given != ([str(documents[i]) for i in ids] if several else None):
        yield "its sequences are said to be from other documents than they are"


def _wrong_facts(
    found: Bundle, bench: Workbench, candidate: Candidate, tolerance: float
) -> Iterator[str]:
    """What is the same for every SAE, in all sequences: that of a perfect reconstruction is known without one."""
    runs = [run for run in _runs(found, StreamEval) if run.eval_name in _OF_PERFECT]
    ours = _of_perfect(runs, bench, candidate)
    given = {metric: Counted(units, 0) for run in runs for metric, units in run.units.items()}
    for run in runs:
        if run.eval_name in _NEVER_SKIPPED:
            yield from _left_out(run, ours)
    for metric, parts in _WITHOUT_SAE.items():
        for part in parts if {metric} <= set(given) & set(ours) else ():
            units, known = given[metric].units, ours[metric]
            pair = (getattr(units, part), getattr(known, part))
            per_token = ours["ce_loss_clean"].den if metric.startswith("loss_recovered") else 0.0
            yield from _unlike(
                f"{part} of {metric}", units.ids, *pair, _NATS * per_token, tolerance
            )
    if {"mse", "shrinkage"} <= set(given) & set(ours):
        error, products = given["mse"].units.num, given["shrinkage"].units
        slack = _CANCELLED * (error + products.num + 2 * np.abs(products.den))
        lengths = (relations.squared_length(given), ours["shrinkage"].num)
        what = "squared length of the activations (from mse and shrinkage)"
        yield from _unlike(what, products.ids, *lengths, slack, tolerance)


def _of_perfect(runs: Sequence[Run], bench: Workbench, candidate: Candidate) -> dict[str, Score]:
    """Scores of an SAE that gives everything back; the language model is not run for it."""
    subject, site, target = bench.subject, candidate.site, candidate.target
    facts = subject.facts(site, target)
    stand_in = on_device(
        Linear(subject.width(site), 1, subject.width(target)), bench.options.device
    )
    evals = [
        eval_
        for eval_ in (_eval(bench, run) for run in runs)
        if isinstance(eval_, StreamEval) and (subject.predicts or not eval_.needs_outcome)
    ]
    tallies = [eval_.start(stand_in, facts) for eval_ in evals]
    outcome = any(eval_.needs_outcome for eval_ in evals)
    with torch.no_grad():
        for batch in subject.evaluation(site, target) if tallies else ():
            undisturbed = _undisturbed(batch) if outcome else None
            seen = Seen(batch, _no_code(batch.x), batch.target, undisturbed)
            for tally in tallies:
                tally.update(seen)
    found: dict[str, Score] = {}
    for tally in tallies:
        with suppress(Skip):  # then it has no unit, of this SAE or of another
            found |= {score.metric: score for score in tally.scores() if isinstance(score, Score)}
    return found


def _undisturbed(batch: Batch) -> Outcome:
    clean = batch.references().clean
    return Outcome(clean, torch.zeros_like(clean), torch.ones_like(clean, dtype=torch.bool))


def _no_code(x: Float[Tensor, "n d_in"]) -> SparseCode:
    offsets = torch.zeros(len(x) + 1, dtype=torch.int64, device=x.device)
    return SparseCode(offsets[:0], x.new_zeros(0), offsets)


def _left_out(run: Run, ours: Mapping[str, Score]) -> Iterator[str]:
    for metric in registry.get("evals", run.eval_name).metrics:
        if metric.name in ours and metric.name not in run.units:
            yield f"{metric.name} is left out, and every SAE has it on this text"
        elif metric.name in run.units and metric.name not in ours:
            yield f"{metric.name} is there, and no SAE has it on this text"


def _unlike(  # noqa: PLR0913  (two columns, and what counts as a difference)
    what: str,
    ids: NDArray[Any],
    given: Floats,
    ours: Floats,
    slack: Floats | float,
    tolerance: float,
) -> Iterator[str]:
    off = np.maximum(np.abs(given - ours) - slack, 0) / _size(ours)
    wrong = np.flatnonzero(~(off <= tolerance))
    for i in wrong[:_MOST_LISTED]:
        yield f"{what}, sequence {shown(ids[i])}: given {given[i]:.8g}, and the text here gives {ours[i]:.8g}"
    if len(wrong) > _MOST_LISTED:
        yield f"{what}: {len(wrong) - _MOST_LISTED:,} other sequences differ too"


# The checkpoint


class _Again(NamedTuple):
    checked: tuple[str, ...]
    unchecked: tuple[str, ...]
    problems: tuple[str, ...]


class _Compared(NamedTuple):
    """One metric, given and scored again."""

    problems: tuple[str, ...]
    largest: float
    """Relative difference."""


def _scored_again(
    found: Bundle, bench: Workbench, checkpoint: Checkpoint, sampling: Sampling
) -> _Again:
    candidate = bench.given(checkpoint, bench.opened(checkpoint, Path()))
    if candidate.checksum != found.checksum:
        problem = (
            f"the checkpoint has the checksum {candidate.checksum[:12]}..., and what was scored has "
            f"{found.checksum[:12]}...: these are other weights, or another architecture"
        )
        return _Again((), ("the units themselves",), (problem,))
    if candidate.entry.site != found.submission["entry"]["site"]:
        given = found.submission["entry"]["site"]
        problem = f"the checkpoint is of {candidate.entry.site}, and what was scored of {given}"
        return _Again((), ("the units themselves",), (problem,))
    sae = on_device(candidate.load(), bench.options.device)
    with torch.no_grad():
        stream = _stream_again(found, bench, candidate, sae, sampling)
        texts = _texts_again(found, bench, candidate, sae, sampling)
    return _Again(
        ("checkpoint: the weights that were scored", *stream.checked, *texts.checked),
        stream.unchecked + texts.unchecked,
        stream.problems + texts.problems,
    )


class _Tallied(NamedTuple):
    run: Run
    eval: StreamEval
    tally: Tally


class _Started(NamedTuple):
    """Evals on the evaluation text, before any batch is seen."""

    tallied: list[_Tallied]
    unchecked: list[str]
    problems: list[str]


def _stream_again(
    found: Bundle, bench: Workbench, candidate: Candidate, sae: SAE, sampling: Sampling
) -> _Again:
    subject = bench.subject
    facts = subject.facts(candidate.site, candidate.target)
    sample = _batches(facts.n_sequences, subject.batch_rows, sampling)
    n_scored = sum(sample.values())
    whole = n_scored == facts.n_sequences
    tallied, unchecked, problems = _started(found, bench, sae, facts)
    outcome = any(one.eval.needs_outcome for one in tallied)
    batches: Iterator[Batch] = subject.evaluation(candidate.site, candidate.target)
    for number, batch in enumerate(batches):
        if number in sample:
            code = sae.encode_sparse(batch.x)
            x_hat = predicted(sae, batch.x, code)
            seen = Seen(batch, code, x_hat, batch.outcome(x_hat) if outcome else None)
            for one in tallied:
                one.tally.update(seen)
    compared: list[_Compared] = []
    for run, eval_, tally in tallied:
        again = _compared_run(run, eval_, tally.scores, whole, sampling.tolerance)
        compared += again.compared
        unchecked += again.unchecked
    problems += [problem for one in compared for problem in one.problems]
    if whole:
        checked = f"all {n_scored:,} sequences: {_summary(compared)}"
    else:
        share = _percent(n_scored, facts.n_sequences)
        checked = (
            f"{n_scored:,} of {facts.n_sequences:,} sequences (--seed {sampling.seed}): one changed sequence is found "
            f"with a chance of {share}; {_summary(compared)}"
        )
        unchecked.append(
            f"what the SAE does in the other {facts.n_sequences - n_scored:,} sequences (--all)"
        )
    return _Again((checked,), tuple(unchecked), tuple(problems))


def _percent(part: int, whole: int) -> str:
    """Never 100 % of less than all."""
    return f"{100 * part // whole} %" if 100 * part >= whole else "less than 1 %"


def _started(found: Bundle, bench: Workbench, sae: SAE, facts: Facts) -> _Started:
    started = _Started([], [], [])
    for run in _runs(found, StreamEval):
        eval_ = _eval(bench, run)
        assert isinstance(eval_, StreamEval), "runs of this kind alone"
        try:
            tally = eval_.start(sae, facts)
        except Skip as reason:
            if "skipped" not in run.content:
                started.problems.append(f"{run.eval_name} has scores; here it is skipped: {reason}")
            continue
        if "skipped" in run.content:
            started.unchecked.append(f"{run.eval_name}: whether it has to be skipped")
        else:
            started.tallied.append(_Tallied(run, eval_, tally))
    return started


def _summary(compared: Sequence[_Compared]) -> str:
    largest = max((one.largest for one in compared), default=0.0)
    return f"{len(compared)} metrics scored again; the largest relative difference is {largest:.1g}"


def _batches(n_sequences: int, rows: int, sampling: Sampling) -> dict[int, int]:
    """Random batches, until they have as many sequences as asked for: their numbers, and how many each has."""
    n_batches = -(-n_sequences // rows)
    chosen: dict[int, int] = {}
    for number in np.random.default_rng(sampling.seed).permutation(n_batches).tolist():
        if sampling.sequences is not None and sum(chosen.values()) >= sampling.sequences:
            break
        chosen[number] = min(rows, n_sequences - number * rows)
    return chosen


def _runs(found: Bundle, kind: type[Eval]) -> list[Run]:
    return [
        run for run in found.runs.values() if issubclass(registry.get("evals", run.eval_name), kind)
    ]


def _eval(bench: Workbench, run: Run) -> Eval:
    """With the parameters that the run has."""
    params = run.content["spec"]["eval"]["params"]
    for name, eval_ in bench.suite.evals:
        if name == run.eval_name and json.loads(json.dumps(eval_.parameters())) == params:
            found: Eval = eval_
            return found
    raise AssertionError("every run is one that the suite asks for")


class _RunAgain(NamedTuple):
    compared: list[_Compared]
    unchecked: list[str]


def _compared_run(
    run: Run,
    eval_: Eval,
    scores: Callable[[], Sequence[Score | Omitted]],
    whole: bool,
    tolerance: float,
) -> _RunAgain:
    try:
        again = {score.metric: score for score in scores() if isinstance(score, Score)}
    except Skip as reason:
        return _RunAgain([], [f"{run.eval_name}: the sample has nothing to score ({reason})"])
    omitted = {one["what"] for one in run.content["omitted"]}
    compared, unchecked = [], []
    for metric in eval_.metrics:
        given, ours = run.units.get(metric.name), again.get(metric.name)
        if given is None and ours is None:
            continue
        if given is None and whole and metric.name not in omitted:
            compared.append(_Compared((f"{metric.name} is left out without a reason",), 0.0))
        elif given is None or ours is None:
            unchecked.append(f"{metric.name}: it is left out in the bundle or in the sample")
        elif whole or (metric.unit == "sequence" and metric.name not in _OF_ALL_SEQUENCES):
            compared.append(_compared(metric, given, ours, tolerance, den=True))
        elif metric.name in _OF_WEIGHTS:
            compared.append(_compared(metric, given, ours, tolerance, den=False))
        else:
            unchecked.append(f"{metric.name}: it needs all sequences (--all)")
    return _RunAgain(compared, unchecked)


def _compared(metric: Metric, given: Units, ours: Score, tolerance: float, den: bool) -> _Compared:
    """Units that were scored again, in pairs with those that were given."""
    ids = range(len(ours.num)) if ours.ids is None else ours.ids
    places = {str(unit): i for i, unit in enumerate(given.ids)}
    lacking = [unit for unit in map(str, ids) if unit not in places]
    if lacking:
        return _Compared((f"{metric.name} has no {metric.unit} {shown(lacking[0])}",), 0.0)
    at = np.array([places[str(unit)] for unit in ids], dtype=np.int64)
    slack = _NATS * np.abs(np.asarray(ours.den, np.float64)) if metric.name in _IN_NATS else 0.0
    pairs = [(given.num[at], np.asarray(ours.num, np.float64), slack)]
    if den:
        pairs.append((given.den[at], np.asarray(ours.den, np.float64), 0.0))
    # A unit that is close to zero by chance is as exact as the others.
    shares = [np.maximum(np.abs(a - b) - s, 0) / _size(b) for a, b, s in pairs]
    worst = np.max(shares, axis=0, initial=0.0)
    wrong = np.flatnonzero(worst > tolerance)
    listed = [
        f"{metric.name}, {metric.unit} {shown(list(ids)[i])}: given {given.num[at[i]]:.8g} / {given.den[at[i]]:.8g}, "
        f"scored again {ours.num[i]:.8g} / {ours.den[i]:.8g}"
        for i in wrong[:_MOST_LISTED]
    ]
    if len(wrong) > _MOST_LISTED:
        listed.append(f"{metric.name}: {len(wrong) - _MOST_LISTED:,} other units differ too")
    return _Compared(tuple(listed), float(worst.max(initial=0.0)))


def _size(values: Floats) -> Floats:
    """Of each value, or of a typical one where that is larger; 1 where all are zero."""
    typical = float(np.sqrt(np.mean(np.square(values)))) if len(values) else 0.0
    return np.maximum(np.abs(values), typical or 1.0)


def _texts_again(
    found: Bundle, bench: Workbench, candidate: Candidate, sae: SAE, sampling: Sampling
) -> _Again:
    runs = _runs(found, TextEval)
    if not runs:
        return _Again((), (), ())
    if not sampling.texts:
        return _Again((), tuple(f"{run.eval_name}: its own texts (--texts)" for run in runs), ())
    compared: list[_Compared] = []
    unchecked: list[str] = []
    for run in runs:
        if "skipped" in run.content:
            unchecked.append(f"{run.eval_name}: whether it has to be skipped")
            continue
        eval_ = _eval(bench, run)
        assert isinstance(eval_, TextEval), "runs of this kind alone"
        prepared = bench.prepared(eval_, candidate)
        scores = eval_.scores(sae, prepared, False)
        tolerance = max(sampling.tolerance, _TEXT_TOLERANCE)
        again = _compared_run(run, eval_, lambda s=scores: s, True, tolerance)  # type: ignore[misc]
        compared += again.compared
        unchecked += again.unchecked
    problems = tuple(problem for one in compared for problem in one.problems)
    return _Again((f"texts of evals: {_summary(compared)}",), tuple(unchecked), problems)
