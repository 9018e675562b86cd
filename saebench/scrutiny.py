"""A stranger's run file with its units, looked at closely before it is believed.

Its form is what this package writes, and nothing else. Its name follows from what was asked. Numbers are finite and in
the range that their metric can have, unit by unit; counts agree; every value and every interval is recomputed from
the units, and has to be what the file says. Nothing here runs a model: what the units say themselves is not checked.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saebench import results, stats, strict
from saebench.errors import UserError
from saebench.results import Units

LONGEST_NAME = 300
_LONGEST_TEXT = 2_000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MOST_ROWS = 2**24
_MOST_UNPACKED = 2**30
_METRIC = re.compile(r"[a-z0-9_]{1,80}")
_SPEC_KEYS = {"sae", "site", "model", "text", "eval"}
_SCORE_KEYS = {*results.SCORE_KEYS, "ends"}
_SHARE, _COSINE, _ANY_LOSS = (0.0, 1.0), (-1.0, 1.0), (0.0, math.inf)
_RANGES = {  # what a value can be at all; of a unit too
    "explained_variance": (-math.inf, 1.0),
    "mse": _ANY_LOSS,
    "cosine": _COSINE,
    "dead_fraction": _SHARE,
    "density": _SHARE,
    "dense_fraction": _SHARE,
    "top1_agreement": _SHARE,
    "kl_divergence": _ANY_LOSS,
    "ce_loss_clean": _ANY_LOSS,
    "ce_loss_sae": _ANY_LOSS,
    "ce_loss_zero": _ANY_LOSS,
    "ce_loss_mean": _ANY_LOSS,
    "l2_ratio": _ANY_LOSS,
    "max_decoder_cosine": _COSINE,
    "encoder_decoder_cosine": _COSINE,
    "encoder_decoder_cosine_q05": _COSINE,
    "encoder_decoder_cosine_q95": _COSINE,
    "encoder_decoder_cosine_weighted": _COSINE,
    "mcc": _SHARE,
    "feature_recall_07": _SHARE,
    "feature_recall_09": _SHARE,
    "feature_recall_07_weighted": _SHARE,
    "uniqueness": _SHARE,
    "hedging": _SHARE,
    "precision": _SHARE,
    "recall": _SHARE,
    "f1": _SHARE,
    "f1_live": _SHARE,
    "f1_weighted": _SHARE,
    "absorption": _SHARE,
    "parent_miss": _SHARE,
    "absorption_excess": _COSINE,
}
_PROBE_RANGES = (("probe_auc_gain_", _COSINE), ("probe_auc_", _SHARE), ("probe_accuracy_", _SHARE))
PER_TOKEN = (
    "l0",
    "mse",
    "cosine",
    "top1_agreement",
    "kl_divergence",
    "ce_loss_increase",
    "ce_loss_clean",
    "ce_loss_sae",
    "ce_loss_zero",
    "ce_loss_mean",
)
"""Means over tokens, whose denominators are counts, and known without any SAE."""
_ROUNDING = 1e-6
_SAME_VALUE = 1e-9
_SAME_END = 1e-6


class Owner(NamedTuple):
    """The SAE that runs are said to be of."""

    name: str
    checksum: str
    site: str
    width: int


class Run(NamedTuple):
    content: dict[str, Any]
    """Of the run file."""
    units: dict[str, Units]
    """By metric; empty where the run was skipped."""

    @property
    def eval_name(self) -> str:
        return str(self.content["spec"]["eval"]["name"])


def examined(
    file: str, data: bytes, units: bytes | None, owner: Owner
) -> tuple[Run | None, list[str]]:
    """A run and all that is wrong with it; None where it cannot be read, or says nothing that could be checked."""
    content, problem = json_object(data)
    if content is None:
        return None, [problem]
    problems = list(_wrong_run(file, content))
    if problems:
        return None, problems
    problems = list(_foreign(content["spec"], owner))
    if "skipped" in content:
        if units is not None:
            problems.append("it was skipped, and has units")
        return Run(content, {}), problems
    if units is None:
        return None, [*problems, "its units are not there"]
    found, problem = _units(units)
    if problem:
        return None, [*problems, f"units: {problem}"]
    return Run(content, found), [*problems, *_wrong_scores(content["scores"], found, owner.width)]


def _wrong_run(file: str, content: Mapping[str, Any]) -> Iterator[str]:
    """Whether it has the form of a run file, and the name that its content gives it."""
    kind = {"skipped"} if "skipped" in content else {"scores", "omitted"}
    yield from wrong_keys(content, {"spec", "provenance"} | kind, "it")
    problems = list(_wrong_spec(content.get("spec")))
    yield from problems
    if not problems:
        own = results.run_file(Path(), content["spec"]).name
        if file != f"runs/{own}":
            yield f"what was asked gives it the name {own}: its spec was changed, or it was renamed"
    if not isinstance(content.get("provenance"), dict):
        yield "its provenance is none"
    if "skipped" in content:
        if not is_text(content["skipped"], _LONGEST_TEXT):
            yield "the reason why it was skipped is no text"
        return
    yield from _wrong_omissions(content.get("omitted"))
    scores = content.get("scores")
    if not isinstance(scores, list):
        yield "its scores are no list"
        return
    for score in scores:
        yield from _wrong_form(score)


def _wrong_spec(spec: Any) -> Iterator[str]:
    yield from wrong_keys(spec, _SPEC_KEYS, "spec")
    if not isinstance(spec, dict) or set(spec) != _SPEC_KEYS:
        return
    sae, eval_ = spec["sae"], spec["eval"]
    yield from wrong_keys(sae, {"name", "checksum"}, "sae")
    yield from wrong_keys(eval_, {"name", "version", "params"}, "eval")
    if isinstance(sae, dict) and not is_name(sae.get("name")):
        yield f"{shown(sae.get('name'))} cannot name an SAE"
    if isinstance(eval_, dict):
        if not is_name(eval_.get("name")):
            yield f"{shown(eval_.get('name'))} cannot name an eval"
        if not is_count(eval_.get("version")) or not isinstance(eval_.get("params"), dict):
            yield "version or parameters of its eval are none"
    if not isinstance(spec["model"], dict) or not isinstance(spec["text"], dict):
        yield "its model or text is none"
    if not is_text(spec["site"], LONGEST_NAME):
        yield "its site is no text"
    if not _is_finite_all_over(spec):
        yield "its spec has numbers that are not finite"


def _wrong_omissions(omitted: Any) -> Iterator[str]:
    if not isinstance(omitted, list) or not all(
        isinstance(one, dict)
        and set(one) == {"what", "reason"}
        and all(is_text(part, _LONGEST_TEXT) for part in one.values())
        for one in omitted
    ):
        yield "what it leaves out is no list of what and reason"


def _wrong_form(score: Any) -> Iterator[str]:
    problems = list(wrong_keys(score, _SCORE_KEYS, "a score"))
    if problems:
        yield from problems
        return
    metric = score["metric"]
    if not isinstance(metric, str) or not _METRIC.fullmatch(metric):
        yield f"{shown(metric)} cannot name a metric"
        return
    directions, statistics = ("min", "max", None), ("ratio", "median", "q05", "q95")
    if score["best"] not in directions or score["statistic"] not in statistics:
        yield f"{metric}: direction or statistic are none"
    if not is_text(score["unit"], 100) or not is_text(score["doc"], _LONGEST_TEXT):
        yield f"{metric}: unit or definition are no text"
    yield from (f"{metric}: {problem}" for problem in _wrong_numbers(score))


def _wrong_numbers(score: Mapping[str, Any]) -> Iterator[str]:
    for part in ("value", "ci_low", "ci_high", "reference"):
        if not (_is_number(score[part]) or (score[part] is None and part != "value")):
            yield f"{part} is {shown(score[part])}, which is no finite number"
    for part in ("n", "n_units"):
        if not is_count(score[part]):
            yield f"{part} is {shown(score[part])}; expected a whole number, 0 or more"
    if (score["ci_low"] is None) != (score["ci_high"] is None):
        yield "an interval has two ends or none"
    ends = score["ends"]
    pair = isinstance(ends, list) and len(ends) == 2 and all(map(_is_number, ends))
    if ends is not None and not pair:
        yield f"ends are {shown(ends)}; expected two numbers or null"


def _foreign(spec: Mapping[str, Any], owner: Owner) -> Iterator[str]:
    for what, given, expected in (
        ("SAE", spec["sae"]["name"], owner.name),
        ("checksum", spec["sae"]["checksum"], owner.checksum),
        ("site", spec["site"], owner.site),
    ):
        if given != expected:
            yield f"its {what} is {shown(given)}, and that of the submission {shown(expected)}"


# Scores and their units


def _units(data: bytes) -> tuple[dict[str, Units], str]:
    """Units by metric, and what is wrong with them, empty where nothing is."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        about = pq.read_metadata(pa.BufferReader(data))
        unpacked = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
        if about.num_rows > _MOST_ROWS or unpacked > _MOST_UNPACKED:
            return {}, f"{about.num_rows:,} rows of {unpacked:,} bytes are too many"
        # Repeated texts stay codes, so that a short one cannot become gigabytes.
        texts = [
            field.name for field in about.schema.to_arrow_schema() if _is_text_type(field.type)
        ]
        file = pq.ParquetFile(pa.BufferReader(data), read_dictionary=texts)
        if problem := _wrong_columns(file.schema_arrow):
            return {}, problem
        table = file.read(use_threads=False)
        if any(column.null_count for column in table.columns[:4]):
            return {}, "some have no value"
        return _by_metric(table), ""
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        return {}, f"they cannot be read: {shown(error)}"


def _wrong_columns(schema: Any) -> str:
    import pyarrow as pa

    names = ["metric", "unit", "num", "den"]
    if schema.names not in (names, [*names, "cluster"]):
        return f"columns are {shown(schema.names)}; expected {', '.join(names)} and perhaps cluster"
    for name in ("num", "den"):
        if schema.field(name).type != pa.float64():
            return f"{name} is not of 64-bit floating-point numbers"
    if schema.field("unit").type != pa.int64() and not _is_of_texts(schema.field("unit").type):
        return "unit is neither of whole numbers nor of texts"
    if not all(
        _is_of_texts(schema.field(n).type) for n in schema.names if n in ("metric", "cluster")
    ):
        return "metric or cluster are not of texts"
    return ""


def _is_text_type(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_of_texts(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_dictionary(kind) and pa.types.is_string(kind.value_type))


def _by_metric(table: Any) -> dict[str, Units]:
    columns = {name: table.column(name).combine_chunks() for name in table.column_names}
    for name in ("metric", "cluster", "unit"):
        if name in columns and hasattr(columns[name], "dictionary"):
            texts = columns[name].dictionary.to_pylist()
            if any(len(text) > LONGEST_NAME for text in texts):
                raise ValueError(f"{name} has names of more than {LONGEST_NAME} characters")
            if name == "metric" and len(texts) > 1_000:
                raise ValueError("more than 1,000 metrics")
    codes = columns["metric"].indices.to_numpy()
    found = {}
    for code, metric in enumerate(columns["metric"].dictionary.to_pylist()):
        here = codes == code
        if metric in found:
            raise ValueError(f"{metric} is there twice")
        ids, num, den = (_plain(columns[name])[here] for name in ("unit", "num", "den"))
        clusters = None
        if "cluster" in columns:
            named = _plain(columns["cluster"])[here]
            clusters = None if all(name is None for name in named) else named
        found[metric] = Units(ids, num, den, clusters)
    return found


def _plain(column: Any) -> Any:
    return column.to_numpy(zero_copy_only=False)


def _wrong_scores(
    scores: Sequence[Mapping[str, Any]], units: Mapping[str, Units], width: int
) -> Iterator[str]:
    names = [score["metric"] for score in scores]
    if len(set(names)) < len(names):
        yield "it has a metric twice"
    for name in sorted(set(units) - set(names)):
        yield f"it has units of {shown(name)}, and no such score"
    for score in scores:
        metric = score["metric"]
        if metric not in units:
            yield f"{metric} has no units"
            continue
        yield from (f"{metric}: {problem}" for problem in _wrong_score(score, units[metric], width))


def _wrong_score(score: Mapping[str, Any], units: Units, width: int) -> Iterator[str]:
    num, den = units.num, units.den
    if len(num) != score["n_units"]:
        yield f"{score['n_units']:,} units are named, and {len(num):,} are there"
    if len(set(units.ids)) < len(units.ids):
        yield "a unit is there twice"
    if not (np.isfinite(num).all() and np.isfinite(den).all()):
        yield "some units are not finite"
        return
    if units.clusters is not None and any(name is None for name in units.clusters):
        yield "some units have a cluster and some have none"
        return
    yield from _out_of_range(score, units, _range(score["metric"], width))
    if score["metric"] in PER_TOKEN and den.sum() != score["n"]:
        yield f"it is a mean over {score['n']:,} tokens, and its units have {den.sum():,.0f}"
    yield from _not_recomputed(score, units)


def _range(metric: str, width: int) -> tuple[float, float]:
    if metric == "l0":
        return 0.0, float(width)
    for prefix, found in _PROBE_RANGES:
        if metric.startswith(prefix):
            return found
    return _RANGES.get(metric, (-math.inf, math.inf))


def _out_of_range(
    score: Mapping[str, Any], units: Units, within: tuple[float, float]
) -> Iterator[str]:
    low, high = within
    if not low - _ROUNDING <= score["value"] <= high + _ROUNDING:
        yield f"its value is {score['value']:.6g}; none is outside of {low:g} to {high:g}"
    if math.isinf(low) and math.isinf(high):
        return
    num, den = units.num, units.den
    if (den < 0).any():
        yield f"unit {shown(units.ids[np.argmax(den < 0)])} has a denominator below 0"
        return
    if score["statistic"] != "ratio":
        num, den = num[den > 0], np.ones(int((den > 0).sum()))
    slack = _ROUNDING * np.maximum(den, 1.0)
    wrong = np.zeros(len(num), dtype=bool)
    if not math.isinf(low):
        wrong |= num < low * den - slack
    if not math.isinf(high):
        wrong |= num > high * den + slack
    if wrong.any():
        yield f"{int(wrong.sum()):,} units have values outside of {low:g} to {high:g}"


def _not_recomputed(score: Mapping[str, Any], units: Units) -> Iterator[str]:
    try:
        value = stats.value(units.num, units.den, score["statistic"])
        column = results.column(units, score["statistic"])
    except ValueError as error:
        yield str(error)
        return
    if not math.isclose(value, score["value"], rel_tol=_SAME_VALUE, abs_tol=1e-15):
        yield f"its value is {score['value']:.12g}, and its units give {value:.12g}"
    (ends,) = stats.intervals([column])
    given = (score["ci_low"], score["ci_high"])
    if ends is None or None in given:
        if (ends is None) != (None in given):
            yield f"its interval is {_interval(*given)}, and its units give {_interval(*(ends or (None, None)))}"
        return
    if not all(
        math.isclose(a, b, rel_tol=_SAME_END, abs_tol=_SAME_END * max(abs(value), 1e-9))
        for a, b in zip(given, ends, strict=True)
    ):
        yield f"its interval is {_interval(*given)}, and its units give {_interval(*ends)}"


def _interval(low: float | None, high: float | None) -> str:
    return "none" if low is None or high is None else f"{low:.6g} to {high:.6g}"


# What strangers write


def json_object(data: bytes) -> tuple[dict[str, Any] | None, str]:
    try:
        found = strict.loads(data.decode("utf-8"))
        strict.check_depth(found, "it")
    except (ValueError, RecursionError, UserError) as error:
        return None, f"it cannot be read: {shown(error)}"
    if not isinstance(found, dict):
        return None, "it holds no JSON object"
    return found, ""


def wrong_keys(content: Any, expected: set[str], what: str) -> Iterator[str]:
    if not isinstance(content, dict):
        yield f"{what} is no JSON object"
        return
    lacking, unknown = sorted(expected - set(content)), sorted(set(content) - expected)
    if lacking:
        yield f"{what} lacks {', '.join(lacking)}"
    if unknown:
        yield f"{what} has {', '.join(map(shown, unknown))}, which nobody knows"


def is_name(given: Any) -> bool:
    return isinstance(given, str) and _NAME.fullmatch(given) is not None


def is_text(given: Any, most: int) -> bool:
    return isinstance(given, str) and 0 < len(given) <= most


def is_count(given: Any) -> bool:
    return type(given) is int and 0 <= given < 2**53


def _is_number(given: Any) -> bool:
    return type(given) in (int, float) and abs(given) < 2**1000 and math.isfinite(given)


def _is_finite_all_over(given: Any) -> bool:
    if isinstance(given, dict):
        return all(map(_is_finite_all_over, given.values()))
    if isinstance(given, list):
        return all(map(_is_finite_all_over, given))
    return not isinstance(given, float) or math.isfinite(given)


def shown(given: Any) -> str:
    """What a stranger wrote, in a message: short, and nothing in it moves the cursor."""
    text = str(given)
    brief = text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in brief)
