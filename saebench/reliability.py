"""How far a metric can be relied on: what an audit measured of it, as a card, and the badge that tables show.

An audit scores the SAEs of a suite again and again: on evaluation text and splits drawn anew, at snapshots of their
training, in other batches, numbers, contexts, amounts of tokens and units. Seven questions are asked of each metric,
that is of each (metric, eval, version, parameters):

noise            how far it moves when the evaluation is drawn anew, and which difference one run can show
training noise   how much of its variance is the training seed
order            whether it ranks oracle > trained > frozen decoder, random and permuted decoder
progress         whether it rises with the tokens an SAE was trained on
truth            whether it ranks SAEs as agreement with known features does (arXiv 2602.14687)
invariance       what moves it that should not
cost             seconds and bytes

`Noise`, `TrainingNoise` ... have the formulas. What was not measured is None, with the reason in words in `missing`
under the name of the field. All is pure NumPy on one table of what was measured, so that a card can be made again
without any model. Values of a metric that is better when small are turned round before they are ranked.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, cast, get_args, get_origin, get_type_hints

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from saebench import stats, strict
from saebench.errors import UserError
from saebench.stats import Floats

SCHEMA = 1
FILE = "audit.json"
"""In the folder of a suite's results."""
PASSED: Literal["✓"] = "✓"
WARNING: Literal["⚠"] = "⚠"
WHATS = ("batch", "dtype", "context", "tokens", "unit")
"""What is changed to see what a metric depends on."""
SHIPPED = Path(__file__).with_name("reliability.json")
"""What audits of this project found, for results that were never audited themselves."""
COLUMNS = {  # of the table of what was measured
    "sae": str,
    "kind": str,
    "family": str,
    "width": float,
    "l0": float,
    "seed": float,
    "site": str,
    "tokens": float,
    "what": str,
    "setting": str,
    "share": float,
    "eval": str,
    "version": int,
    "params": str,
    "metric": str,
    "best": str,
    "ends": bool,
    "value": float,
    "low": float,
    "high": float,
    "seconds": float,
    "bytes": float,
    "degraded": str,
    "amount": float,
}

ENOUGH_SAES = 3
"""For a median coefficient of variation."""
ENOUGH_POINTS = 3
"""For a rank correlation over snapshots, or within one L0."""
ENOUGH_FOR_TRUTH = 30
MATCHED = 1.05
"""Up to so many times the L0 of the oracle, a trained SAE is compared with it."""
HOLDS = 0.9
"""Share of pairs that must be in order."""
RISES = 0.8
"""Rank correlation with training tokens above which a metric is said to rise."""
BATCH_SHARE = 1e-6
UNIT_SHARE = 1e-3

_Z = 1.96
_NOTHING = 1e-12
_TRUTH = "ground_truth"
_AS_GOOD = 1e-6  # of a value: rounding in float32

Badge = Literal["✓", "⚠", ""]
Best = Literal["min", "max"] | None
Integers = NDArray[np.int64]


class Version(NamedTuple):
    """A metric as defined and measured in one way."""

    metric: str
    eval: str
    version: int
    params: str
    """Canonical JSON."""


class Noise(NamedTuple):
    """How far trained SAEs move when their evaluation is drawn anew: y_ir of SAE i in draw r.

    sd                          s = sqrt(sum_ir (y_ir - y_i.)^2 / sum_i (R_i - 1))
    cv                          median over SAEs of s_i / |y_i.|
    smallest_difference         1.96 sqrt(2) s: two SAEs, each on a draw of its own
    smallest_paired_difference  1.96 s_d, two SAEs on the same draw, with
                                s_d^2 = mean over pairs of SAEs of a site of var_r(y_ir - y_jr)
    signal_to_noise             variance of base values between all trained SAEs of a site / s^2
    interval_ratio              s / sqrt(mean_ir ((high_ir - low_ir) / 3.92)^2): near 1 the reported 95 % intervals
                                cover what they claim, above 1 they are too narrow

    Draws that have fewer tokens than the suite's evaluation (`share` of them) are noisier than it is: their deviations
    from y_i. are taken times sqrt(share), as those of means over independent documents are.
    """

    n_saes: int
    n_draws: int
    """Of the SAE that has most."""
    share: float | None
    """Evaluation tokens of a draw over those of the suite."""
    sd: float | None
    cv: float | None
    smallest_difference: float | None
    smallest_paired_difference: float | None
    signal_to_noise: float | None
    interval_ratio: float | None
    missing: dict[str, str]


class TrainingNoise(NamedTuple):
    """One-way random effects of recipe and seed: y = site + recipe b + seed u + evaluation e, on the same draw for all.

    With mean squares MS_between recipes of a site and MS_within a recipe over base values,

    evaluation_sd  sigma_e = s_d / sqrt(2), of the paired differences of `Noise`: what a draw does to every SAE alike
                   is no difference between seeds
    training_sd    sigma_u = sqrt(max(0, MS_within - sigma_e^2)); sigma_e is left in where it was not measured
    recipe_sd      sigma_b = sqrt(max(0, (MS_between - MS_within) / n_0)), n_0 the seeds of a recipe: their mean n, less
                   what unequal numbers take from it, (N - sum n^2 / N) / (recipes - 1)
    seed_share     sigma_u^2 / (sigma_b^2 + sigma_u^2 + sigma_e^2)
    """

    n_recipes: int
    """With two seeds or more: family, width, asked-for L0 and site are the same."""
    n_saes: int
    evaluation_sd: float | None
    training_sd: float | None
    recipe_sd: float | None
    seed_share: float | None
    missing: dict[str, str]


class Pairs(NamedTuple):
    """Of all pairs at one site, width and asked-for L0 (where both have one), those in which `better` is better.

    A tie is none. `holds` is at least 90 % of them. Beside an oracle stand SAEs of at most 1.05 times its measured L0.
    """

    better: str
    worse: str
    right: int
    pairs: int
    verdict: Literal["holds", "fails", "not tested"]


class Order(NamedTuple):
    """`passes`: every kind of pair that is there holds."""

    kinds: tuple[Pairs, ...]
    passes: bool | None
    missing: dict[str, str]


class Progress(NamedTuple):
    """Spearman's correlation of the metric with training tokens, over the snapshots of one SAE and the whole of it.

    A metric that is the same at all snapshots does not rise: 0.
    """

    n_curves: int
    median: float | None
    rising: int | None
    """How many correlations are above 0.8."""
    missing: dict[str, str]


class Correlation(NamedTuple):
    """Spearman's, with a 95 % interval."""

    value: float
    low: float
    high: float


class Truth(NamedTuple):
    """Spearman's correlation of the metric with `f1` and `mcc` of ground_truth, over trained SAEs of a synthetic panel.

    The 95 % intervals come from 2,000 draws of recipes (family, width, asked-for L0), because seeds of a recipe are
    alike, widened as in `stats`. Within L0 it is the mean over asked-for L0 of the correlation among the SAEs of one.
    `passes`: one of the two overall intervals lies above 0, and none below.
    """

    panel: str | None
    """The suite whose features are known."""
    n_saes: int
    f1: Correlation | None
    mcc: Correlation | None
    f1_within_l0: Correlation | None
    mcc_within_l0: Correlation | None
    passes: bool | None
    missing: dict[str, str]


class Change(NamedTuple):
    """The largest |value - base| over SAEs and settings."""

    setting: str
    """Where it is largest."""
    n_saes: int
    largest: float
    in_noise: float | None
    """Over the sd of `Noise`, or over that which the reported intervals imply where nothing was drawn anew."""
    mark: str
    """What is to be said of it in words, empty where nothing is."""
    missing: dict[str, str]


class Invariance(NamedTuple):
    """What happens to values when something else is changed.

    batch    marked beyond 1e-6 of the larger of the two values
    unit     activations x and the SAE both at a x + b: a metric with ends must not move by more than 1e-3 of its range
             (largest less smallest base value of the audit, controls and references too) or by 1e-6 of its
             largest value, whichever is more; one without ends that does is marked
    """

    batch: Change | None
    dtype: Change | None
    context: Change | None
    tokens: Change | None
    unit: Change | None
    passes: bool | None
    """The unit, of a metric with ends."""
    missing: dict[str, str]


class Cost(NamedTuple):
    """Of the metric's whole eval alone, on one SAE: the median time and the largest memory over those measured."""

    n_saes: int
    seconds: float | None
    bytes: float | None
    missing: dict[str, str]


class Reliability(NamedTuple):
    """All that is known of one metric version."""

    metric: str
    eval: str
    version: int
    params: str
    """Canonical JSON."""
    best: Best
    ends: bool
    badge: Badge
    """✓: order and truth pass, and the unit does where it was tested. ⚠: one of the three fails."""
    warnings: tuple[str, ...]
    noise: Noise
    training_noise: TrainingNoise
    order: Order
    progress: Progress
    truth: Truth
    invariance: Invariance
    cost: Cost


class Card(NamedTuple):
    schema: int
    suite: str
    n_saes: int
    metrics: tuple[Reliability, ...]


class Panel(NamedTuple):
    """What was measured of a suite whose evals include ground_truth."""

    suite: str
    measured: pd.DataFrame


class Verdict(NamedTuple):
    """What tables show of one metric version."""

    metric: str
    eval: str
    version: int
    params: str
    suite: str
    """Whose audit it is."""
    badge: Badge
    warnings: tuple[str, ...]


class Verdicts(NamedTuple):
    schema: int
    verdicts: tuple[Verdict, ...]


class Remarks(NamedTuple):
    """The badge of one column of a table, with its warnings as parts of a sentence."""

    badge: Badge
    warnings: tuple[str, ...]


class Missing(NamedTuple):
    """Instead of a number."""

    reason: str


def card(suite: str, measured: pd.DataFrame, panel: Panel | None) -> Card:
    """`panel` is where truth comes from if this suite's own evals do not include ground_truth."""
    frame = tidy(measured)
    rows = _by_version(frame)
    own = any(version.eval == _TRUTH for version in rows)
    known: _Known | None = None
    if own:
        known = _known(suite, rows)
    elif panel is not None:
        known = _known(panel.suite, _by_version(tidy(panel.measured)))
    costs = _costs(frame)
    found = [
        _reliability(version, of, known, costs.get(version[1:], [])) for version, of in rows.items()
    ]
    saes = {row.sae for of in rows.values() for row in of}
    return Card(SCHEMA, suite, len(saes), tuple(found))


def read_measured(path: Path) -> pd.DataFrame:
    """The table of an audit, as its audit.csv has it."""
    try:
        frame = pd.read_csv(path, dtype={"params": str, "setting": str})
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read: {error}; expected the audit.csv of a suite's results"
        ) from None
    return tidy(frame)


def tidy(measured: pd.DataFrame) -> pd.DataFrame:
    """The columns in their types, with text that is nowhere empty for None. Raises `UserError` where it is no such
    table."""
    lacking = [name for name in COLUMNS if name not in measured.columns]
    if lacking:
        raise UserError(
            f"this is no table of an audit: it lacks {', '.join(lacking)}. Run `saebench audit` again"
        )
    frame = measured[list(COLUMNS)].copy()
    for name, kind in COLUMNS.items():
        if kind is str:
            frame[name] = frame[name].astype(object).where(frame[name].notna(), "").astype(str)
        elif kind is bool:
            frame[name] = frame[name].astype(str).str.lower() == "true"
        else:
            frame[name] = frame[name].astype(kind)
    scored = frame[frame["what"] != "cost"]
    if not np.isfinite(scored["value"].to_numpy()).all():
        row = scored[~np.isfinite(scored["value"].to_numpy())].iloc[0]
        raise UserError(
            f"the audit has no finite value of {row['metric']} of {row['sae']} ({row['what']}). Where a metric does "
            "not apply, its row is left out"
        )
    one = ["what", "setting", "sae", "tokens", "metric", "eval", "version", "params"]
    twice = scored[scored.duplicated(one)]
    if len(twice):
        row = twice.iloc[0]
        raise UserError(
            f"the audit has {row['metric']} of {row['sae']} twice for {row['what']} {row['setting']}. "
            "Run `saebench audit` again"
        )
    return frame


# The card as a file


def as_json(card: Card | Verdicts) -> str:
    return json.dumps(_plain(card), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read(path: Path) -> Card:
    return cast(Card, _read(path, Card))


def read_verdicts(path: Path) -> tuple[Verdict, ...]:
    return cast(Verdicts, _read(path, Verdicts)).verdicts


def written_out(params: Mapping[str, Any]) -> str:
    """As tables name the parameters of an eval."""
    return ", ".join(f"{k}={params[k]}" for k in sorted(params))


# Badges


def verdicts(card: Card) -> tuple[Verdict, ...]:
    return tuple(Verdict(*m[:4], card.suite, m.badge, m.warnings) for m in card.metrics)


def strongest(found: Iterable[Verdict]) -> tuple[Verdict, ...]:
    """Of each metric version the audits in which it failed, or else in which it passed: a failure is one anywhere."""
    by_version: dict[Version, list[Verdict]] = {}
    for verdict in found:
        by_version.setdefault(Version(*verdict[:4]), []).append(verdict)
    kept = []
    for version in sorted(by_version):
        of = sorted(by_version[version], key=lambda verdict: verdict.suite)
        failed = [verdict for verdict in of if verdict.badge == WARNING]
        kept += failed or [verdict for verdict in of if verdict.badge == PASSED]
    return tuple(kept)


def applying(folder: Path) -> tuple[Verdict, ...]:
    """To the results in a folder: those of its own audit, and of the audits of other suites that the package ships."""
    shipped = read_verdicts(SHIPPED)
    audit = folder / FILE
    if not audit.is_file():
        return shipped
    card = read(audit)
    return verdicts(card) + tuple(v for v in shipped if v.suite != card.suite)


def remarks(
    found: Sequence[Verdict], metric: str, eval_name: str, version: int, params: str
) -> Remarks:
    """Of a column of a table, whose `params` are as `written_out`.

    A warning holds for the metric whatever its parameters, such as the datasets of probes, which differ from suite to
    suite; a pass only for the same ones.
    """
    about = [v for v in found if v[:3] == (metric, eval_name, version)]
    same = {v: written_out(json.loads(v.params)) == params for v in about}
    warnings = tuple(
        f"{warning} in the audit of {v.suite}{'' if same[v] else ', with other parameters'}"
        for v in about
        for warning in v.warnings
    )
    if warnings:
        return Remarks(WARNING, warnings)
    passed = any(v.badge == PASSED and same[v] for v in about)
    return Remarks(PASSED if passed else "", ())


# Rows


class _Row(NamedTuple):
    sae: str
    kind: str
    family: str
    width: float | None
    l0: float | None
    seed: float | None
    site: str
    tokens: float | None
    what: str
    setting: str
    share: float | None
    best: Best
    ends: bool
    value: float
    low: float | None
    high: float | None
    degraded: str
    amount: float | None
    active: float | None
    """L0 as the suite itself measured it; None where it does not."""

    @property
    def recipe(self) -> tuple[str, float | None, float | None, str]:
        return self.family, self.width, self.l0, self.site

    @property
    def better(self) -> float:
        """Larger is better."""
        return -self.value if self.best == "min" else self.value

    @property
    def is_panel(self) -> bool:
        return self.kind == "trained" and self.what == "base"


class _Price(NamedTuple):
    """Of one eval alone, on one SAE; NaN where it was not measured."""

    seconds: float
    bytes: float


_Run = tuple[str, int, str]


def _by_version(frame: pd.DataFrame) -> dict[Version, list[_Row]]:
    found: dict[Version, list[_Row]] = {}
    of_base = frame[(frame["what"] == "base") & (frame["metric"] == "l0")]
    active = dict(zip(of_base["sae"], of_base["value"], strict=True))
    for record in frame[frame["what"] != "cost"].to_dict("records"):
        plain = {str(k): _none_for_nan(v) for k, v in record.items()}
        best = plain["best"] if plain["best"] in ("min", "max") else None
        own = {name: plain[name] for name in _Row._fields if name not in ("best", "active")}
        row = _Row(**own, best=best, active=active.get(plain["sae"]))
        version = Version(plain["metric"], plain["eval"], int(plain["version"]), plain["params"])
        found.setdefault(version, []).append(row)
    return found


def _none_for_nan(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _costs(frame: pd.DataFrame) -> dict[_Run, list[_Price]]:
    """By eval, version and parameters."""
    found: dict[_Run, dict[str, _Price]] = {}
    for row in frame[frame["what"] == "cost"].to_dict("records"):
        run = str(row["eval"]), int(row["version"]), str(row["params"])
        price = _Price(float(row["seconds"]), float(row["bytes"]))
        # All metrics of an eval have its price.
        found.setdefault(run, {})[str(row["sae"])] = price
    return {run: list(prices.values()) for run, prices in found.items()}


def _reliability(
    version: Version,
    rows: Sequence[_Row],
    known: "_Known | None",
    costs: Sequence[_Price],
) -> Reliability:
    best, ends = rows[0].best, rows[0].ends
    draws = _draws(rows)
    noise = _noise(rows, draws)
    order = _order(rows)
    truth = _truth(version, best, known)
    invariance = _invariance(rows, _yardstick(rows, noise))
    warnings = (*_order_fails(order), *_truth_fails(truth), *_unit_fails(invariance))
    passed = order.passes is True and truth.passes is True
    badge: Badge = WARNING if warnings else PASSED if passed else ""
    return Reliability(
        *version,
        best=best,
        ends=ends,
        badge=badge,
        warnings=warnings,
        noise=noise,
        training_noise=_training_noise(rows, draws),
        order=order,
        progress=_progress(rows),
        truth=truth,
        invariance=invariance,
        cost=_cost(costs),
    )


def _split(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Of what may be `Missing`: None, and the reasons beside it."""
    reasons = {name: part.reason for name, part in parts.items() if isinstance(part, Missing)}
    plain = {name: None if isinstance(part, Missing) else part for name, part in parts.items()}
    return plain | {"missing": reasons}


# Noise


class _Draws(NamedTuple):
    """Trained SAEs that were drawn anew."""

    sites: list[str]
    y: Floats
    """[n_saes n_draws], NaN where an SAE was not in a draw."""
    implied: list[float]
    """Standard deviations that the intervals of these values imply."""
    share: float | Missing


def _draws(rows: Sequence[_Row]) -> _Draws:
    drawn = [row for row in rows if row.what == "redraw" and row.kind == "trained"]
    saes = list(dict.fromkeys(row.sae for row in drawn))
    draws = list(dict.fromkeys(row.setting for row in drawn))
    y = np.full((len(saes), len(draws)), np.nan)
    for row in drawn:
        y[saes.index(row.sae), draws.index(row.setting)] = row.value
    sites = {row.sae: row.site for row in drawn}
    shares = [row.share for row in drawn if row.share is not None]
    if not shares:
        nothing = Missing("no evaluation of a trained SAE was drawn anew")
        return _Draws([sites[sae] for sae in saes], y, _implied(drawn), nothing)
    share = min(shares)
    mean = np.array([[float(_finite(x).mean())] for x in y])
    smaller = math.sqrt(share)
    implied = [smaller * sd for sd in _implied(drawn)]
    return _Draws([sites[sae] for sae in saes], mean + smaller * (y - mean), implied, share)


def _implied(rows: Iterable[_Row]) -> list[float]:
    return [
        (row.high - row.low) / (2 * _Z)
        for row in rows
        if row.low is not None and row.high is not None
    ]


def _noise(rows: Sequence[_Row], draws: _Draws) -> Noise:
    counts = np.isfinite(draws.y).sum(axis=1)
    s = _pooled_sd(draws.y)
    d = s if isinstance(s, Missing) else _paired_sd(draws)
    parts = {
        "share": draws.share,
        "sd": s,
        "cv": s if isinstance(s, Missing) else _cv(draws.y),
        "smallest_difference": s if isinstance(s, Missing) else _Z * math.sqrt(2) * s,
        "smallest_paired_difference": d if isinstance(d, Missing) else _Z * d,
        "signal_to_noise": _signal_to_noise(rows, s),
        "interval_ratio": _interval_ratio(s, draws.implied),
    }
    return Noise(n_saes=len(draws.y), n_draws=int(counts.max(initial=0)), **_split(parts))


def _pooled_sd(y: Floats) -> float | Missing:
    """sqrt of the mean variance within rows, by degrees of freedom."""
    freedom = int((np.isfinite(y).sum(axis=1) - 1).clip(0).sum())
    if freedom == 0:
        return Missing("no evaluation of a trained SAE was drawn anew")
    squares = sum(float(np.square(x - x.mean()).sum()) for x in map(_finite, y) if len(x))
    sd = math.sqrt(squares / freedom)
    # What only rounding moves does not move.
    return sd if sd > _NOTHING * float(np.nanmax(np.abs(y))) else 0.0


def _finite(x: Floats) -> Floats:
    return x[np.isfinite(x)]


def _cv(y: Floats) -> float | Missing:
    found = []
    for x in map(_finite, y):
        if len(x) > 1 and abs(float(x.mean())) > _NOTHING:
            found.append(float(x.std(ddof=1)) / abs(float(x.mean())))
    if len(found) < ENOUGH_SAES:
        return Missing(
            f"{len(found)} SAEs were drawn anew and have a mean that is not 0; {ENOUGH_SAES} are needed"
        )
    return float(np.median(found))


def _paired_sd(draws: _Draws) -> float | Missing:
    pairs = [
        draws.y[i] - draws.y[j]
        for i, j in combinations(range(len(draws.y)), 2)
        if draws.sites[i] == draws.sites[j]
    ]
    found = _pooled_sd(np.array(pairs)) if pairs else None
    if found is None or isinstance(found, Missing):
        return Missing("no two trained SAEs of one site were in the same new draws")
    return found


def _signal_to_noise(rows: Sequence[_Row], s: float | Missing) -> float | Missing:
    if isinstance(s, Missing):
        return s
    if s == 0:
        return Missing("the draws do not differ")
    panel = [row for row in rows if row.is_panel]
    squares, freedom = _within([(row.site, row.value) for row in panel])
    if freedom == 0:
        return Missing("no two trained SAEs are at one site")
    between = math.sqrt(squares / freedom)
    largest = max(abs(row.value) for row in panel)
    return (between / s) ** 2 if between > _NOTHING * largest else 0.0


def _within(labelled: Iterable[tuple[Any, float]]) -> tuple[float, int]:
    """Sum of squares about the means of groups, and its degrees of freedom."""
    groups: dict[Any, list[float]] = {}
    for label, value in labelled:
        groups.setdefault(label, []).append(value)
    squares = sum(float(np.square(np.array(g) - np.mean(g)).sum()) for g in groups.values())
    return squares, sum(len(g) - 1 for g in groups.values())


def _interval_ratio(s: float | Missing, implied: Sequence[float]) -> float | Missing:
    if isinstance(s, Missing):
        return s
    claimed = math.sqrt(float(np.mean(np.square(implied)))) if implied else 0.0
    if claimed == 0:
        return Missing("no interval is reported that has a length")
    return s / claimed


def _yardstick(rows: Sequence[_Row], noise: Noise) -> float | Missing:
    """The sd in which changes are measured."""
    if noise.sd:
        return noise.sd
    implied = _implied(row for row in rows if row.is_panel)
    claimed = math.sqrt(float(np.mean(np.square(implied)))) if implied else 0.0
    return claimed or Missing("neither new draws nor intervals say how large noise is")


# Training noise


def _training_noise(rows: Sequence[_Row], draws: _Draws) -> TrainingNoise:
    recipes: dict[Any, list[_Row]] = {}
    for row in rows:
        if row.is_panel and row.seed is not None:
            recipes.setdefault(row.recipe, []).append(row)
    several = {recipe: of for recipe, of in recipes.items() if len({row.seed for row in of}) > 1}
    panel = [row for of in several.values() for row in of]
    paired = _paired_sd(draws)
    e = paired if isinstance(paired, Missing) else paired / math.sqrt(2)
    parts: dict[str, float | Missing] = {"evaluation_sd": e} | _effects(panel, e)
    return TrainingNoise(n_recipes=len(several), n_saes=len(panel), **_split(parts))


def _effects(panel: Sequence[_Row], e: float | Missing) -> dict[str, float | Missing]:
    if not panel:
        one = Missing("no recipe was trained with two seeds")
        return {"training_sd": one, "recipe_sd": one, "seed_share": one}
    squares, freedom = _within([(row.recipe, row.value) for row in panel])
    within = squares / freedom
    evaluation = 0.0 if isinstance(e, Missing) else e**2
    training = max(0.0, within - evaluation)
    between = _between_recipes(panel, within)
    share: float | Missing
    if isinstance(between, Missing):
        share = between
    else:
        whole = between + training + evaluation
        share = training / whole if whole > 0 else Missing("all SAEs have the same value")
    recipe = between if isinstance(between, Missing) else math.sqrt(between)
    return {"training_sd": math.sqrt(training), "recipe_sd": recipe, "seed_share": share}


def _between_recipes(panel: Sequence[_Row], within: float) -> float | Missing:
    """The variance between recipes of a site."""
    squares_site, _ = _within([(row.site, row.value) for row in panel])
    squares_recipe, _ = _within([(row.recipe, row.value) for row in panel])
    sizes: dict[str, list[int]] = {}
    for recipe in dict.fromkeys(row.recipe for row in panel):
        n = sum(row.recipe == recipe for row in panel)
        sizes.setdefault(recipe[-1], []).append(n)
    freedom = sum(len(n) - 1 for n in sizes.values())
    if freedom == 0:
        return Missing("one recipe alone was trained with two seeds")
    n0 = sum(sum(n) - sum(i * i for i in n) / sum(n) for n in sizes.values()) / freedom
    return max(0.0, ((squares_site - squares_recipe) / freedom - within) / n0)


# Order


def _is(family: str) -> Callable[[_Row], bool]:
    return lambda row: row.family == family and row.kind != "trained" and not row.degraded


def _is_trained(row: _Row) -> bool:
    return row.kind == "trained"


def _is_degraded(row: _Row) -> bool:
    return row.family == "oracle" and bool(row.degraded)


def _always(_: _Row, __: _Row) -> bool:
    return True


def _as_sparse(oracle: _Row, trained: _Row) -> bool:
    """An oracle has the L0 that it has; what has more active latents can explain more without knowing more."""
    if oracle.active is None or trained.active is None:
        return True
    return trained.active <= MATCHED * oracle.active


def _less_degraded(a: _Row, b: _Row) -> bool:
    return a.degraded == b.degraded and (a.amount or 0.0) < (b.amount or 0.0)


class _Rule(NamedTuple):
    better: str
    worse: str
    is_better: Callable[[_Row], bool]
    is_worse: Callable[[_Row], bool]
    compares: Callable[[_Row, _Row], bool]


_RULES = (
    _Rule("oracle", "trained", _is("oracle"), _is_trained, _as_sparse),
    _Rule("oracle", "degraded oracle", _is("oracle"), _is_degraded, _always),
    _Rule("degraded oracle", "more degraded", _is_degraded, _is_degraded, _less_degraded),
    _Rule("trained", "frozen_decoder", _is_trained, _is("frozen_decoder"), _always),
    _Rule("trained", "random", _is_trained, _is("random"), _always),
    _Rule("trained", "permuted_decoder", _is_trained, _is("permuted_decoder"), _always),
)


def _order(rows: Sequence[_Row]) -> Order:
    if rows[0].best is None:
        return Order((), None, {"passes": "the metric has no better direction"})
    base = [row for row in rows if row.what == "base"]
    kinds = tuple(_ordered(rule, base) for rule in _RULES)
    tested = [kind for kind in kinds if kind.verdict != "not tested"]
    if not tested:
        return Order(kinds, None, {"passes": "no oracle or control stands beside a trained SAE"})
    return Order(kinds, all(kind.verdict == "holds" for kind in tested), {})


def _ordered(rule: _Rule, base: Sequence[_Row]) -> Pairs:
    worse = [row for row in base if rule.is_worse(row)]
    found = [
        a.better > b.better
        for a in filter(rule.is_better, base)
        for b in worse
        if _same_place(a, b) and rule.compares(a, b)
    ]
    right, n = sum(found), len(found)
    verdict: Literal["holds", "fails", "not tested"]
    verdict = "not tested" if n == 0 else "holds" if right >= HOLDS * n else "fails"
    return Pairs(rule.better, rule.worse, right, n, verdict)


def _same_place(a: _Row, b: _Row) -> bool:
    same_l0 = a.l0 is None or b.l0 is None or a.l0 == b.l0
    return (a.site, a.width) == (b.site, b.width) and same_l0


def _order_fails(order: Order) -> list[str]:
    failed = [
        f"{kind.worse} no worse than {kind.better} in {kind.pairs - kind.right} of {kind.pairs} pairs"
        for kind in order.kinds
        if kind.verdict == "fails"
    ]
    return [f"fails the order test ({'; '.join(failed)})"] if failed else []


# Progress


def _progress(rows: Sequence[_Row]) -> Progress:
    if rows[0].best is None:
        return _no_progress("the metric has no better direction")
    curves: dict[Any, dict[float, float]] = {}
    for row in rows:
        if row.kind == "trained" and row.what == "snapshot" and row.tokens is not None:
            curves.setdefault((*row.recipe, row.seed), {})[row.tokens] = row.better
    for row in rows:
        curve = curves.get((*row.recipe, row.seed))
        if row.is_panel and row.tokens is not None and curve is not None:
            curve.setdefault(row.tokens, row.better)
    long = [curve for curve in curves.values() if len(curve) >= ENOUGH_POINTS]
    if not long:
        return _no_progress(f"no trained SAE was scored at {ENOUGH_POINTS} points of its training")
    found = [_rank_correlation(np.array([*c]), np.array([*c.values()])) for c in long]
    rho = [0.0 if math.isnan(r) else r for r in found]
    return Progress(len(rho), float(np.median(rho)), sum(r > RISES for r in rho), {})


def _no_progress(reason: str) -> Progress:
    return Progress(0, None, None, {"median": reason, "rising": reason})


# Truth


class _Known(NamedTuple):
    """A panel of trained SAEs on activations whose features are known."""

    suite: str
    rows: dict[Version, list[_Row]]
    truth: dict[str, dict[str, float]]
    """`f1` and `mcc`, by SAE."""


class _Beside(NamedTuple):
    """SAEs that have the metric and the truth."""

    metric: Floats
    truth: Floats
    recipes: Integers
    l0: Floats


def _known(suite: str, rows: Mapping[Version, Sequence[_Row]]) -> _Known:
    panel = {version: [row for row in of if row.is_panel] for version, of in rows.items()}
    truth = {name: _of_truth(suite, name, panel) for name in ("f1", "mcc")}
    return _Known(suite, panel, truth)


def _of_truth(suite: str, name: str, panel: Mapping[Version, Sequence[_Row]]) -> dict[str, float]:
    ways = [version for version in panel if version[:2] == (name, _TRUTH)]
    if len(ways) != 1:
        raise UserError(
            f"the audit of {suite} has {name} of {_TRUTH} in {len(ways)} ways; expected one. Audit a suite that has "
            f"{_TRUTH} once"
        )
    return {row.sae: row.better for row in panel[ways[0]]}


def _truth(version: Version, best: Best, known: _Known | None) -> Truth:
    if best is None:
        return _no_truth(known, 0, "the metric has no better direction")
    if version.eval == _TRUTH:
        return _no_truth(known, 0, "it is truth itself")
    if known is None:
        return _no_truth(None, 0, "no panel with known features was audited")
    rows = _same_metric(version, known)
    found = {name: _beside(rows, truth) for name, truth in known.truth.items()}
    n_saes = min(len(beside.metric) for beside in found.values())
    if n_saes < ENOUGH_FOR_TRUTH:
        reason = f"{n_saes} trained SAEs of {known.suite} have it; {ENOUGH_FOR_TRUTH} are needed"
        return _no_truth(known, n_saes, reason)
    overall = {name: _correlation(beside) for name, beside in found.items()}
    within = {f"{name}_within_l0": _correlation_in_l0(beside) for name, beside in found.items()}
    passes = _is_true([c for c in overall.values() if isinstance(c, Correlation)])
    parts = {**overall, **within, "passes": passes}
    return Truth(panel=known.suite, n_saes=n_saes, **_split(parts))


def _no_truth(known: _Known | None, n_saes: int, reason: str) -> Truth:
    names = ("f1", "mcc", "f1_within_l0", "mcc_within_l0", "passes")
    parts = dict.fromkeys(names, Missing(reason))
    return Truth(panel=None if known is None else known.suite, n_saes=n_saes, **_split(parts))


def _same_metric(version: Version, known: _Known) -> Sequence[_Row]:
    """The same parameters if there are such, or the only ones: probes have other datasets on every subject."""
    if version in known.rows:
        return known.rows[version]
    others = [of for other, of in known.rows.items() if other[:3] == version[:3]]
    return others[0] if len(others) == 1 else []


def _beside(rows: Sequence[_Row], truth: Mapping[str, float]) -> _Beside:
    here = [row for row in rows if row.sae in truth]
    names = list(dict.fromkeys(row.recipe for row in here))
    return _Beside(
        np.array([row.better for row in here], dtype=np.float64),
        np.array([truth[row.sae] for row in here], dtype=np.float64),
        np.array([names.index(row.recipe) for row in here], dtype=np.int64),
        np.array([math.nan if row.l0 is None else row.l0 for row in here], dtype=np.float64),
    )


def _is_true(found: Sequence[Correlation]) -> bool | Missing:
    if not found:
        return Missing("it has no rank correlation with the truth")
    above, below = any(c.low > 0 for c in found), any(c.high < 0 for c in found)
    return above and not below


def _correlation(beside: _Beside) -> Correlation | Missing:
    return _with_interval(beside, lambda c: _spearman(beside.metric, beside.truth, c))


def _correlation_in_l0(beside: _Beside) -> Correlation | Missing:
    levels = [level for level in np.unique(beside.l0).tolist() if not math.isnan(level)]
    groups = [beside.l0 == level for level in levels]
    groups = [here for here in groups if int(here.sum()) >= ENOUGH_POINTS]
    if not groups:
        return Missing(f"no asked-for L0 has {ENOUGH_POINTS} SAEs")

    def mean(counts: Floats) -> Floats:
        each = [_spearman(beside.metric[h], beside.truth[h], counts[:, h]) for h in groups]
        return _mean_of_finite(np.stack(each))

    return _with_interval(beside, mean)


def _with_interval(beside: _Beside, value: Callable[[Floats], Floats]) -> Correlation | Missing:
    """`value` maps how often each SAE counts, [draws n_saes], to a correlation in each draw."""
    observed = float(value(np.ones((1, len(beside.metric))))[0])
    if math.isnan(observed):
        return Missing("all SAEs have the same value")
    n_recipes = int(beside.recipes.max()) + 1
    if n_recipes < 2:
        return Missing("all SAEs are of one recipe")
    drawn = stats.Bootstrap(n_recipes).sums(np.eye(n_recipes))
    draws = value(drawn[:, beside.recipes])
    if np.isfinite(draws).mean() < stats.LEVEL:
        return Missing("most recipes have the same value")
    found = stats.from_draws(observed, draws, n_recipes)
    return Correlation(observed, found.low, found.high)


def _mean_of_finite(x: Floats) -> Floats:
    """Over rows; NaN where none is finite."""
    there = np.isfinite(x)
    n = there.sum(axis=0)
    total = np.where(there, x, 0.0).sum(axis=0)
    return np.asarray(np.divide(total, n, out=np.full(x.shape[1], np.nan), where=n > 0))


def _rank_correlation(x: Floats, y: Floats) -> float:
    """Spearman's; NaN where one of them is constant."""
    return float(_spearman(x, y, np.ones((1, len(x))))[0])


def _spearman(x: Floats, y: Floats, counts: Floats) -> Floats:
    """Spearman's correlation of x and y [n] in which each pair stands as often as counts [draws n] says; ties have
    their mean rank."""
    middle = (counts.sum(axis=1, keepdims=True) + 1) / 2  # the mean of all ranks
    a, b = _ranks(x, counts) - middle, _ranks(y, counts) - middle
    both, aa, bb = (np.einsum("dn,dn,dn->d", counts, *two) for two in ((a, b), (a, a), (b, b)))
    scale = np.sqrt(aa * bb)
    found = np.divide(both, scale, out=np.full(len(counts), np.nan), where=scale > _NOTHING)
    return np.asarray(found)


def _ranks(x: Floats, counts: Floats) -> Floats:
    """[draws n]: mean rank of each value among all copies, from 1."""
    order = np.argsort(x, kind="stable")
    ordered = x[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    copies = np.add.reduceat(counts[:, order], starts, axis=1)
    ranks = np.cumsum(copies, axis=1) - (copies - 1) / 2
    return ranks[:, np.unique(x, return_inverse=True)[1]]


def _truth_fails(truth: Truth) -> list[str]:
    if truth.passes is not False:
        return []
    found = (("F1", truth.f1), ("MCC", truth.mcc))
    told = " and ".join(
        f"{c.value:.2f} [{c.low:.2f}, {c.high:.2f}] with {name}" for name, c in found if c
    )
    return [f"fails the truth test (rank correlation {told} on {truth.panel})"]


# Invariance


def _invariance(rows: Sequence[_Row], noise: float | Missing) -> Invariance:
    base = {row.sae: row for row in rows if row.what == "base"}
    changed = {what: _changes(rows, base, what) for what in WHATS}
    parts: dict[str, Any] = {
        what: _change(what, pairs, base, noise) if pairs else Missing("not measured")
        for what, pairs in changed.items()
    }
    if not rows[0].ends:
        parts["passes"] = Missing("the metric has no ends, so it may be in the unit of activations")
    elif not changed["unit"]:
        parts["passes"] = Missing("not measured")
    else:
        parts["passes"] = not _moves_with_unit(changed["unit"], base)
    return Invariance(**_split(parts))


class _Moved(NamedTuple):
    row: _Row
    base: float

    @property
    def by(self) -> float:
        return abs(self.row.value - self.base)

    @property
    def relative(self) -> float:
        return self.by / max(abs(self.row.value), abs(self.base), _NOTHING)


def _changes(rows: Sequence[_Row], base: Mapping[str, _Row], what: str) -> list[_Moved]:
    return [
        _Moved(row, base[row.sae].value) for row in rows if row.what == what and row.sae in base
    ]


def _change(
    what: str, moved: Sequence[_Moved], base: Mapping[str, _Row], noise: float | Missing
) -> Change:
    most = max(moved, key=lambda one: one.by)
    mark = ""
    if what == "batch" and max(one.relative for one in moved) > BATCH_SHARE:
        mark = "depends on the batch size"
    if what == "unit" and not most.row.ends and _moves_with_unit(moved, base):
        mark = "depends on the unit of activations"
    part = noise if isinstance(noise, Missing) else most.by / noise
    n_saes = len({one.row.sae for one in moved})
    split = _split({"in_noise": part})
    return Change(most.row.setting, n_saes, most.by, mark=mark, **split)


def _moves_with_unit(moved: Sequence[_Moved], base: Mapping[str, _Row]) -> bool:
    values = np.array([row.value for row in base.values()])
    allowed = max(UNIT_SHARE * float(np.ptp(values)), _AS_GOOD * float(np.abs(values).max()))
    return max(one.by for one in moved) > allowed


def _unit_fails(invariance: Invariance) -> list[str]:
    if invariance.passes is not False or invariance.unit is None:
        return []
    unit = invariance.unit
    return [f"fails the unit test (moves by {unit.largest:.2g} at {unit.setting})"]


# Cost


def _cost(found: Sequence[_Price]) -> Cost:
    seconds = [price.seconds for price in found if math.isfinite(price.seconds)]
    memory = [price.bytes for price in found if math.isfinite(price.bytes)]
    parts = {
        "seconds": float(np.median(seconds)) if seconds else Missing("not measured"),
        "bytes": max(memory) if memory else Missing("not measured"),
    }
    return Cost(n_saes=len(found), **_split(parts))


# Reading and writing


def _plain(value: Any) -> Any:
    """Named tuples as objects, for JSON."""
    if hasattr(value, "_asdict"):
        return {name: _plain(part) for name, part in value._asdict().items()}
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return value


def _read(path: Path, kind: type[Card] | type[Verdicts]) -> Any:
    again = "Run `saebench audit` again, or delete it"
    try:
        content = strict.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}. {again}") from None
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise UserError(f"{path} has the schema {schema!r}; expected {SCHEMA}. {again}")
    try:
        return _built(kind, content, "it")
    except ValueError as error:
        raise UserError(f"{path} is no reliability card: {error}. {again}") from None


def _built(kind: Any, value: Any, where: str) -> Any:
    """The value as the type that a field is annotated with."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType, Literal):
        return _one_of(kind, value, where)
    if origin is tuple:
        items = _of(list, value, where)
        return tuple(_built(parts[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    if origin is dict:
        return {k: _built(parts[1], v, f"{where}.{k}") for k, v in _of(dict, value, where).items()}
    if hasattr(kind, "_fields"):
        return _named(kind, _of(dict, value, where), where)
    if kind is float and type(value) is int:
        return float(value)
    return _of(kind, value, where)


def _one_of(kind: Any, value: Any, where: str) -> Any:
    choices = get_args(kind)
    if get_origin(kind) is Literal:
        if value not in choices:
            raise ValueError(
                f"{where} is {value!r}; expected one of {', '.join(map(repr, choices))}"
            )
        return value
    (other,) = (choice for choice in choices if choice is not NoneType)
    return None if value is None else _built(other, value, where)


def _of(kind: Any, value: Any, where: str) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{where} is {type(value).__name__}; expected {kind.__name__}")
    return value


def _named(kind: Any, value: Mapping[str, Any], where: str) -> Any:
    if set(value) != set(kind._fields):
        wrong = sorted(set(value) ^ set(kind._fields))
        raise ValueError(f"{where} lacks, or has beyond what is known, {', '.join(wrong)}")
    hints = get_type_hints(kind)
    found = kind(**{name: _built(hints[name], value[name], f"{where}.{name}") for name in hints})
    if "missing" in hints:
        empty = {name for name in hints if getattr(found, name) is None and name != "panel"}
        if empty != set(found.missing):
            raise ValueError(f"{where}.missing names other fields than those that are null")
    if "params" in hints:
        _check_params(found.params, where)
    return found


def _check_params(params: str, where: str) -> None:
    try:
        readable = isinstance(strict.loads(params), dict)
    except (ValueError, RecursionError):
        readable = False
    if not readable:
        raise ValueError(f"{where}.params is no JSON object")
