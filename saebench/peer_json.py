"""Result files of sae_bench: scores of ours written as such, and such files read as rows of a leaderboard.

A file is about one SAE and one eval: `eval_result_metrics` holds numbers by category and key (Karvonen et al. 2025,
https://arxiv.org/abs/2503.09532). What is written under a key depends on the mode:

sb-0125   what the version behind the published results (January 2025) computes under it
sb-0.6    what sae_bench 0.6 computes under it
native    what its name says, by the definitions of `evals/`

A key without such a number is null where the other side allows it. Where it does not, it is -1, which stands for NaN
there. Either way `eval_result_unstructured` says why, and holds every score as it is here, with interval and unit.
Neither of its explained variances is computed here: one is a mean over tokens of ratios, one is taken about no mean.

What is read is kept apart: in a folder of its own, under evals of their own names, as SAEs of the kind `imported`.
Null and -1 become omissions.
"""

import hashlib
import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, final, get_args

import numpy as np
import pandas as pd

from saebench import __version__, strict
from saebench import results as files
from saebench.errors import UserError
from saebench.reports._table import newest
from saebench.results import Entry, Imported, Omission, Results

Mode = Literal["sb-0125", "sb-0.6", "native"]
MODES: tuple[Mode, ...] = get_args(Mode)
Best = Literal["min", "max"] | None

_NAN = -1
"""What stands for NaN in their files."""
_MOST_BYTES = 2**27
_MOST_SCORES = 1_000
_MOST_LETTERS = 200
"""Of a text that is shown."""
_MOST_IN_NAME = 100
_KEY = re.compile(r"[a-z0-9_]{1,100}")
_STREAM = "resid_pre|resid_mid|resid_post|attn_out|mlp_out"
_HOOK = re.compile(rf"blocks\.(\d{{1,4}})\.hook_({_STREAM})")
_SITE = re.compile(rf"(\d{{1,4}})\.({_STREAM})")

_CORE = {
    "model_behavior_preservation": ("kl_div_score", "kl_div_with_ablation", "kl_div_with_sae"),
    "model_performance_preservation": (
        "ce_loss_score",
        "ce_loss_with_ablation",
        "ce_loss_with_sae",
        "ce_loss_without_sae",
    ),
    "reconstruction_quality": ("explained_variance", "explained_variance_legacy", "mse", "cossim"),
    "shrinkage": ("l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias"),
    "sparsity": ("l0", "l1"),
    "misc_metrics": (
        "freq_over_1_percent",
        "freq_over_10_percent",
        "normalized_freq_over_1_percent",
        "normalized_freq_over_10_percent",
        "average_max_encoder_cosine_sim",
        "average_max_decoder_cosine_sim",
        "frac_alive",
    ),
}
"""Keys of their core eval by category; none of them may be null there."""
_OURS = {
    "kl_div_with_sae": "kl_divergence",
    "ce_loss_score": "loss_recovered",
    "ce_loss_with_ablation": "ce_loss_zero",
    "ce_loss_with_sae": "ce_loss_sae",
    "ce_loss_without_sae": "ce_loss_clean",
    "explained_variance": "explained_variance",
    "mse": "mse",
    "cossim": "cosine",
    "l2_ratio": "l2_ratio",
    "relative_reconstruction_bias": "shrinkage",
    "l0": "l0",
    "freq_over_10_percent": "dense_fraction",
    "average_max_decoder_cosine_sim": "max_decoder_cosine",
}
"""What a key of theirs is called here."""
_FROM_DENSITY = (
    "freq_over_1_percent",
    "normalized_freq_over_1_percent",
    "normalized_freq_over_10_percent",
)
_ANOTHER_VARIANCE = "theirs is not the explained variance that is computed here"
_NEVER = {
    "kl_div_score": "no KL divergence under ablation is computed here",
    "kl_div_with_ablation": "no KL divergence under ablation is computed here",
    "explained_variance_legacy": _ANOTHER_VARIANCE,
    "l2_norm_in": "no mean lengths are computed here",
    "l2_norm_out": "no mean lengths are computed here",
    "l1": "no sums of latents are computed here",
    "average_max_encoder_cosine_sim": "encoder directions are not compared with one another here",
}
_NOT_THEIRS = {
    "explained_variance": _ANOTHER_VARIANCE,
    "mse": "theirs depends on how many tokens a batch has",
}
_NOT_IN: dict[Mode, dict[str, str]] = {
    "sb-0125": _NOT_THEIRS | {"kl_div_with_sae": "the published results have none"},
    "sb-0.6": _NOT_THEIRS,
    "native": {},
}
"""Keys under which that version computes something else than is kept here."""
_PROBE_K = (1, 2, 5, 10, 20, 50, 100)
_NO_RAW_ACCURACY = "raw activations are probed for their AUC here"

_BEST: Mapping[str, Literal["min", "max"]] = {
    "kl_div_score": "max",
    "kl_div_with_sae": "min",
    "ce_loss_score": "max",
    "ce_loss_with_sae": "min",
    "explained_variance": "max",
    "explained_variance_legacy": "max",
    "mse": "min",
    "cossim": "max",
    "freq_over_10_percent": "min",
    "average_max_decoder_cosine_sim": "min",
    "frac_alive": "max",
}
_BEST_OF_OTHERS: tuple[tuple[str, Literal["min", "max"]], ...] = (
    (r"sae_(top_\d+_)?test_(accuracy|auc|f1)", "max"),
    (r"mean_(absorption_fraction|full_absorption)_score", "min"),
    (r"scr_metric_threshold_\d+", "max"),
    (r"tpp_threshold_\d+_(total_metric|intended_diff_only)", "max"),
    (r"(unlearning|autointerp|disentanglement|cause|isolation)_score", "max"),
)


class Foreign(NamedTuple):
    """One SAE in one eval of another tool."""

    name: str
    entry: Entry
    model: str
    text: str
    """What it was measured on."""
    context: int | None
    source: str
    """SHA-256 of what it was read from."""
    eval_name: str
    version: int
    told: Sequence[Imported]
    omitted: Sequence[Omission]
    provenance: Mapping[str, Any]


# Export


def export(results: Path, out: Path, mode: Mode, saes: Sequence[str] | None) -> list[Path]:
    """Writes out/<eval type>/<suite>_<sae>_eval_results.json; `saes` None is all. Returns what it wrote.

    Raises `UserError` for an SAE that is not there or was imported, and where one metric was measured in several ways.
    """
    found = files.read(results)
    if (found.scores["kind"] == "imported").any():
        raise UserError(f"{results} is imported; what was measured here can be exported")
    known = list(dict.fromkeys(map(str, found.scores["sae"])))
    for name in saes or []:
        if name not in known:
            raise UserError(
                f"{results} has no scores of {name!r}; there are: {', '.join(known)[:400]}"
            )
    paths = []
    for name in known if saes is None else saes:
        scored = _Scored(found, name)
        for content in (_core(scored, mode), _probing(scored, mode)):
            if content is not None:
                file = f"{_as_file(found.suite)}_{_as_file(name)}_eval_results.json"
                path = out / str(content["eval_type_id"]) / file
                text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
                files.write_text_whole(path, text + "\n")
                paths.append(path)
    return paths


@final
class _Scored:
    """What is known of one SAE."""

    def __init__(self, results: Results, name: str) -> None:
        self.results, self.name = results, name
        scores = newest(results.scores)
        self.rows = scores[scores["sae"] == name]
        self.entry = files.entries(results.folder)[name]
        self.text = files.definition(results.folder).get("text", {})
        self.runs = {
            file: files.read_run(results.folder, file) for file in sorted(set(self.rows["file"]))
        }

    def of_eval(self, name: str) -> "dict[str, Any] | None":
        """The run; None where there is none."""
        return next(
            (run for run in self.runs.values() if run["spec"]["eval"]["name"] == name), None
        )

    def row(self, metric: str) -> "pd.Series[Any] | None":
        found = self.rows[self.rows["metric"] == metric]
        if len(found) > 1:
            ways = "; ".join(found["params"])
            raise UserError(
                f"{self.name}: {metric} is measured in several ways ({ways}), and these files have room for one. "
                "Export the results of a suite with one of them."
            )
        return None if found.empty else found.iloc[0]

    def value(self, metric: str) -> float | None:
        row = self.row(metric)
        return None if row is None else float(row["value"])

    def n(self, metric: str) -> int:
        row = self.row(metric)
        return 0 if row is None else int(row["n"])

    def density(self) -> np.ndarray | None:
        """Of each latent; None where units were not kept."""
        row = self.row("density")
        if row is None or not files.has_units(self.results, str(row["file"])):
            return None
        units = files.units_in(self.results.folder / str(row["file"]), "density")
        return np.asarray(units.num / units.den)

    def why_not(self, metric: str) -> str:
        left_out, skips = self.results.omitted, self.results.skips
        reasons = left_out[(left_out["sae"] == self.name) & (left_out["what"] == metric)]["reason"]
        if len(reasons):
            return str(reasons.iloc[0])
        skipped = skips[skips["sae"] == self.name]
        told = "; ".join(f"{row.eval}: {row.reason}" for row in skipped.itertuples())
        return f"these results have no {metric}" + (f" ({told})" if told else "")


def _core(scored: _Scored, mode: Mode) -> dict[str, Any] | None:
    """None where none of its evals was run."""
    evals = ("sparsity", "reconstruction", "fidelity", "shrinkage", "geometry")
    runs = {name: run for name in evals if (run := scored.of_eval(name)) is not None}
    if not runs:
        return None
    density, lacks = scored.density(), dict[str, str]()
    metrics: dict[str, dict[str, float | int]] = {}
    for category, keys in _CORE.items():
        metrics[category] = {}
        for key in keys:
            value, reason = _core_value(scored, key, mode, density)
            metrics[category][key] = _NAN if value is None else value
            if value is None:
                lacks[key] = reason
    reconstructed, seen = scored.n("loss_recovered") or scored.n("ce_loss_sae"), _tokens(scored)
    metrics["token_stats"] = {
        "total_tokens_eval_reconstruction": reconstructed,
        "total_tokens_eval_sparsity_variance": seen,
    }
    spec = next(iter(runs.values()))["spec"]
    return _envelope(scored, "core", mode, _core_config(scored, spec, set(runs)), metrics, lacks)


def _tokens(scored: _Scored) -> int:
    return max(scored.n(metric) for metric in ("l0", "explained_variance", "l2_ratio"))


def _core_value(
    scored: _Scored, key: str, mode: Mode, density: np.ndarray | None
) -> tuple[float | None, str]:
    """The number, or why there is none."""
    reason = _NEVER.get(key) or _NOT_IN[mode].get(key)
    if reason is not None:
        return None, reason
    if key in _FROM_DENSITY:
        if density is None:
            return None, "the densities of latents were not kept"
        return _frequency(key, density), ""
    if key == "frac_alive":
        dead = scored.value("dead_fraction")
        return (None, scored.why_not("dead_fraction")) if dead is None else (1 - dead, "")
    value = scored.value(_OURS[key])
    return value, "" if value is not None else scored.why_not(_OURS[key])


def _frequency(key: str, density: np.ndarray) -> float:
    """Share of latents above a density, or of all activations that are theirs."""
    above = density > (0.01 if key.endswith("_1_percent") else 0.1)
    if not key.startswith("normalized"):
        return float(above.mean())
    total = density.sum()
    return float(density[above].sum() / total) if total > 0 else 0.0


def _core_config(scored: _Scored, spec: Mapping[str, Any], evals: set[str]) -> dict[str, Any]:
    """Sums are over whole sequences, so that a batch may be said to be one of them."""
    n = int(spec["text"].get("sequences", 0))
    return {
        **_model(spec),
        "batch_size_prompts": 1,
        "n_eval_reconstruction_batches": n if "fidelity" in evals else 0,
        "n_eval_sparsity_variance_batches": n,
        "dataset": _dataset(scored.text),
        "context_size": int(spec["text"].get("context", 0)),
        "compute_kl": "fidelity" in evals,
        "compute_ce_loss": "fidelity" in evals,
        "compute_l2_norms": "shrinkage" in evals,
        "compute_sparsity_metrics": "sparsity" in evals,
        "compute_variance_metrics": "reconstruction" in evals,
        "compute_featurewise_density_statistics": "sparsity" in evals,
        "compute_featurewise_weight_based_metrics": "geometry" in evals,
        "exclude_special_tokens_from_reconstruction": True,
        "verbose": False,
    }


def _probing(scored: _Scored, mode: Mode) -> dict[str, Any] | None:
    """Latents are scaled before they are chosen here and C is too, so that only the names are theirs."""
    run = scored.of_eval("sparse_probing")
    if run is None or mode != "native":
        return None
    accuracies = {
        f"sae_top_{k}_test_accuracy": scored.value(f"probe_accuracy_k{k}") for k in _PROBE_K
    }
    sae = {"sae_test_accuracy": scored.value("probe_accuracy_all")} | accuracies
    lacks = {key: "no probe on so many latents" for key, value in sae.items() if value is None}
    llm: dict[str, float | None] = {"llm_test_accuracy": _NAN}
    llm |= {f"llm_top_{k}_test_accuracy": None for k in _PROBE_K}
    lacks |= dict.fromkeys(llm, _NO_RAW_ACCURACY)
    params = run["spec"]["eval"]["params"]
    config = {
        **_model(run["spec"]),
        "random_seed": params["seed"],
        "dataset_names": [_dataset(texts) for texts in params["datasets"]],
        "probe_train_set_size": params["train"],
        "probe_test_set_size": params["test"],
        "k_values": params["k"],
        "lower_vram_usage": False,
    }
    return _envelope(scored, "sparse_probing", mode, config, {"llm": llm, "sae": sae}, lacks)


def _envelope(  # noqa: PLR0913  (the parts of a file)
    scored: _Scored,
    eval_type: str,
    mode: Mode,
    config: Mapping[str, Any],
    metrics: Mapping[str, Mapping[str, float | int | None]],
    lacks: Mapping[str, str],
) -> dict[str, Any]:
    identity = f"{eval_type} {mode} {' '.join(scored.runs)}"
    newest_run = max((scored.results.folder / file).stat().st_mtime for file in scored.runs)
    return {
        "eval_type_id": eval_type,
        "eval_config": config,
        "eval_id": str(uuid.uuid5(uuid.NAMESPACE_OID, identity)),
        "datetime_epoch_millis": int(newest_run * 1000),
        "eval_result_metrics": metrics,
        "eval_result_details": [],
        "sae_bench_commit_hash": "Unknown",
        "sae_lens_id": scored.name,
        "sae_lens_release_id": scored.results.suite,
        "sae_lens_version": None,
        "sae_cfg_dict": _sae_config(scored),
        "eval_result_unstructured": {"saebench": _own(scored, mode, lacks)},
    }


def _sae_config(scored: _Scored) -> dict[str, Any]:
    """What is known of it."""
    entry, found = scored.entry, dict[str, Any]()
    found["architecture"] = entry.variant
    spec = next(iter(scored.runs.values()))["spec"]
    found["model_name"] = spec["model"]["id"]
    if entry.width is not None:
        found["d_sae"] = entry.width
    if place := _SITE.fullmatch(entry.site):
        found["hook_layer"] = int(place[1])
        found["hook_name"] = f"blocks.{place[1]}.hook_{place[2]}"
    return found


def _own(scored: _Scored, mode: Mode, lacks: Mapping[str, str]) -> dict[str, Any]:
    """What their files have no place for."""
    first = next(iter(scored.runs.values()))
    columns = ["eval", "version", "params", "metric", "best", "unit", "statistic", "value"]
    columns += ["ci_low", "ci_high", "n", "n_units", "reference", "doc"]
    return {
        "version": __version__,
        "mode": mode,
        "not_measured": dict(lacks),
        "suite": scored.results.suite,
        "sae": scored.entry._asdict() | {"name": scored.name, "checksum": _checksum(first)},
        "text": first["spec"].get("text"),
        "scores": [
            {key: None if pd.isna(value) else value for key, value in row.items()}
            for row in scored.rows[columns].astype(object).to_dict("records")
        ],
        "packages": first["provenance"].get("packages"),
    }


def _checksum(run: Mapping[str, Any]) -> str | None:
    found: str | None = run["spec"]["sae"].get("checksum")
    return found


def _model(spec: Mapping[str, Any]) -> dict[str, str]:
    return {
        "model_name": str(spec["model"]["id"]),
        "llm_dtype": str(spec["model"].get("dtype", "")),
    }


def _dataset(text: Mapping[str, Any]) -> str:
    parts = [text.get("source") or text.get("dataset") or text.get("files")]
    return " ".join(str(part) for part in [*parts, text.get("config"), text.get("split")] if part)


def _as_file(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)


# Import


def import_(paths: Sequence[Path], out: Path) -> list[str]:
    """Reads result files into the folder `out`, which holds what is imported alone; returns the new run files.

    A file that was imported before changes nothing. Nothing is written unless all of them can be read.
    """
    if not paths:
        raise UserError("import takes result files (*_eval_results.json) and a folder; got no file")
    return add([read_file(path) for path in paths], out)


def add(rows: Sequence[Foreign], out: Path) -> list[str]:
    """Rows into a folder of such; returns the run files that are new."""
    _check_folder(out)
    with files.lock(out):
        there = (out / "suite.json").is_file()
        before = list(files.runs(out)) if there else []
        entries = files.entries(out) if there else {}
        facts = files.definition(out)["imported"] if there else {}
        taken = {_of_run(files.read_run(out, run)): run for run in before if (out / run).is_file()}
        new: dict[str, Foreign] = {}
        for row in rows:
            run = f"runs/{files.run_file(out, _spec(row)).name}"
            _check_same(entries.setdefault(row.name, row.entry), row, out)
            other = taken.setdefault((row.name, row.eval_name), run)
            if other != run:
                raise UserError(
                    f"{out} has other results of {row.name} in {row.eval_name}, {other}. Import into another folder, "
                    "or delete what is there."
                )
            new |= {} if run in before else {run: row}
        for row in new.values():
            files.write_imported(out, _spec(row), row.told, row.omitted, row.provenance)
        definition = _definition(facts, rows)
        files.write_manifest(out, out.resolve().name, definition, entries, [*before, *new])
    return list(new)


def _check_folder(out: Path) -> None:
    """It is one of imports, or not there yet."""
    if (out / "suite.json").is_file():
        if "imported" not in files.definition(out):
            raise UserError(
                f"{out} holds results of a suite; what is imported is never mixed with these. Name another folder."
            )
    elif out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; the last argument is the folder to import into")


def _check_same(entry: Entry, row: Foreign, out: Path) -> None:
    if entry != row.entry:
        raise UserError(
            f"{row.name} of {out} is {_described(entry)}, and the file says {_described(row.entry)}. These are two "
            "SAEs; import the file into another folder."
        )


def _described(entry: Entry) -> str:
    return f"{entry.variant} of width {entry.width} at {entry.site}"


def _of_run(run: Mapping[str, Any]) -> tuple[str, str]:
    return run["spec"]["sae"]["name"], run["spec"]["eval"]["name"]


def _spec(row: Foreign) -> dict[str, Any]:
    return {
        "sae": {"name": row.name, "checksum": f"imported:{row.source}"},
        "site": row.entry.site,
        "model": {"id": row.model},
        "text": {"dataset": row.text, "context": row.context},
        "eval": {"name": row.eval_name, "version": row.version, "params": {}},
    }


def _definition(before: Mapping[str, Sequence[Any]], rows: Sequence[Foreign]) -> dict[str, Any]:
    """For captions: of all that is in the folder."""

    def union(name: str, found: Sequence[Any]) -> list[Any]:
        return sorted({*before.get(name, ()), *(one for one in found if one is not None)})

    models = union("models", [row.model for row in rows])
    texts = union("texts", [row.text for row in rows])
    contexts = union("contexts", [row.context for row in rows])
    return {
        "imported": {"models": models, "texts": texts, "contexts": contexts},
        "model": {"id": ", ".join(models)},
        "text": {
            "source": ", ".join(texts),
            "context": contexts[0] if len(contexts) == 1 else None,
        },
    }


def read_file(path: Path) -> Foreign:
    """One result file, checked. Raises `UserError`."""
    content, source = _parsed(path)
    eval_type = _text(content, "eval_type_id", path)
    if not _KEY.fullmatch(eval_type):
        raise UserError(f"{path}: eval_type_id is {eval_type!r}; expected a name such as core")
    config, sae = _object(content, "eval_config", path), content.get("sae_cfg_dict") or {}
    if not isinstance(sae, dict):
        raise UserError(f"{path}: sae_cfg_dict is {type(sae).__name__}; expected named values")
    metrics = _metrics(content, path)
    model = _shown(config.get("model_name") or sae.get("model_name") or "unknown model")
    mode, reasons = _own_words(content)
    told, omitted = _told(eval_type, metrics, mode, reasons, path)
    return Foreign(
        name=_name(content, path),
        entry=_entry(sae, model),
        model=model,
        text=_texts(config),
        context=_whole(config.get("context_size", config.get("context_length"))),
        source=source,
        eval_name=f"{'saebench' if mode == 'native' else 'sae_bench'}.{eval_type}",
        version=_version(eval_type, metrics, mode),
        told=told,
        omitted=omitted,
        provenance=_provenance(content, config, path),
    )


def _parsed(path: Path) -> tuple[dict[str, Any], str]:
    """With the SHA-256 of its bytes."""
    if not path.is_file():
        raise UserError(f"there is no file {path}; expected a result file, *_eval_results.json")
    if path.stat().st_size > _MOST_BYTES:
        raise UserError(f"{path} has more than {_MOST_BYTES:,} bytes; a result file is shorter")
    data = path.read_bytes()
    try:
        content = strict.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {str(error) or 'nested too deeply'}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}; expected named values")
    # One row per latent can be very much, and nothing of it is imported.
    content.pop("eval_result_details", None)
    strict.check_depth(content, str(path))
    return content, hashlib.sha256(data).hexdigest()


def _object(content: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    found = content.get(key)
    if not isinstance(found, dict):
        raise UserError(
            f"{path}: {key} is {_shown(found)}; expected named values, as in sae_bench's result files"
        )
    return found


def _text(content: Mapping[str, Any], key: str, path: Path) -> str:
    found = content.get(key)
    if not isinstance(found, str):
        raise UserError(
            f"{path}: {key} is {_shown(found)}; expected a text, as in sae_bench's result files"
        )
    return found


def _metrics(content: Mapping[str, Any], path: Path) -> dict[str, dict[str, float | None]]:
    """By category."""
    found = _object(content, "eval_result_metrics", path)
    for category in found:
        for key, value in _object(found, category, path).items():
            if not _KEY.fullmatch(key):
                raise UserError(f"{path}: {_shown(key)} is no name of a metric")
            if not (value is None or type(value) in (int, float)):
                raise UserError(f"{path}: {key} is {_shown(value)}; expected a number or null")
    if sum(map(len, found.values())) > _MOST_SCORES:
        raise UserError(f"{path} has more than {_MOST_SCORES:,} metrics; a result file has fewer")
    return {
        category: {key: None if value is None else float(value) for key, value in keys.items()}
        for category, keys in found.items()
    }


def _own_words(content: Mapping[str, Any]) -> tuple[Mode | None, Mapping[str, Any]]:
    """Of a file that `export` wrote: its mode, and why what is lacking is."""
    unstructured = content.get("eval_result_unstructured")
    own = unstructured.get("saebench") if isinstance(unstructured, dict) else None
    if not isinstance(own, dict):
        return None, {}
    reasons = own.get("not_measured")
    mode = next((mode for mode in MODES if mode == own.get("mode")), None)
    return mode, reasons if isinstance(reasons, dict) else {}


def _version(eval_type: str, metrics: Mapping[str, Mapping[str, Any]], mode: Mode | None) -> int:
    """Of the core eval, 1 is that of the published results, 2 the one since, which has a second explained variance."""
    if eval_type != "core" or mode in ("sb-0125", "native"):
        return 1
    return 2 if "explained_variance_legacy" in metrics.get("reconstruction_quality", {}) else 1


def _told(
    eval_type: str,
    metrics: Mapping[str, Mapping[str, float | None]],
    mode: Mode | None,
    reasons: Mapping[str, Any],
    path: Path,
) -> tuple[list[Imported], list[Omission]]:
    version, told, omitted = _version(eval_type, metrics, mode), list[Imported](), list[Omission]()
    for category, key, value in _numbers(metrics):
        metric = _called(eval_type, key, version, mode)
        if metric in {one.metric for one in told}:
            raise UserError(f"{path}: {key} is there in two categories; expected each number once")
        if value is None or value == _NAN:
            stands = "null" if value is None else "-1, which stands for not measured"
            omitted.append(Omission(metric, _shown(reasons.get(key) or f"{key} is {stands}")))
            continue
        unit = "sequence" if eval_type == "core" else "dataset"
        n = _n(metrics, category) if eval_type == "core" else 0
        doc = _doc(eval_type, key, metric, mode)
        told.append(Imported(metric, _best(eval_type, key), unit, doc, float(value), n))
    if not told:
        raise UserError(f"{path} has no number that was measured")
    return told, omitted


def _numbers(
    metrics: Mapping[str, Mapping[str, float | None]],
) -> Iterator[tuple[str, str, float | None]]:
    for category, found in metrics.items():
        if category != "token_stats":
            for key, value in found.items():
                yield category, key, value


def _called(eval_type: str, key: str, version: int, mode: Mode | None) -> str:
    """Our name where a metric means the same here, theirs where it does not."""
    if eval_type != "core":
        return key
    if mode != "native" and key == "explained_variance":
        return "explained_variance_legacy" if version == 1 else "explained_variance_uncentred"
    if mode != "native" and key == "mse":
        return "mse_by_batch"
    return _OURS.get(key, key)


def _doc(eval_type: str, key: str, metric: str, mode: Mode | None) -> str:
    more = {
        "explained_variance_legacy": ": mean over tokens of 1 - squared error / squared distance from the batch's mean",
        "explained_variance_uncentred": ": 1 - squared error / squared length, less a term that grows with the scale",
        "mse_by_batch": ": squared error per token, over the number of tokens of a batch",
    }
    owner = "saebench" if mode == "native" else "sae_bench"
    return f"{key} of {owner}'s {eval_type}{more.get(metric, '')}"


def _best(eval_type: str, key: str) -> Best:
    if eval_type == "core":
        return _BEST.get(key)
    return next((best for names, best in _BEST_OF_OTHERS if re.fullmatch(names, key)), None)


def _n(metrics: Mapping[str, Mapping[str, float | None]], category: str) -> int:
    """Tokens behind the numbers of a category."""
    resumed = category in ("model_behavior_preservation", "model_performance_preservation")
    which = "reconstruction" if resumed else "sparsity_variance"
    return int(max(0.0, metrics.get("token_stats", {}).get(f"total_tokens_eval_{which}") or 0.0))


def _name(content: Mapping[str, Any], path: Path) -> str:
    """Release and id; of an SAE that sae_lens does not know, the id says nothing."""
    parts = [content.get("sae_lens_release_id"), content.get("sae_lens_id")]
    told = [part for part in parts if isinstance(part, str) and part not in ("", "custom_sae")]
    whole = "_".join(told) or path.name.removesuffix(".json").removesuffix("_eval_results")
    name = re.sub(r"^[^A-Za-z0-9]+", "", _as_file(whole)) or "sae"
    if len(name) <= _MOST_IN_NAME:
        return name
    return f"{name[: _MOST_IN_NAME - 9]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def _entry(sae: Mapping[str, Any], model: str) -> Entry:
    hook = sae.get("hook_name")
    place = _HOOK.fullmatch(hook) if isinstance(hook, str) else None
    site = f"{place[1]}.{place[2]}" if place else _shown(hook or "unknown site")
    variant = _shown(sae.get("architecture") or "unknown architecture")
    # Folders may hold SAEs of several models.
    return Entry("imported", variant, _whole(sae.get("d_sae")), None, None, f"{model} {site}")


def _whole(value: Any) -> int | None:
    return value if type(value) is int and 0 < value < 2**53 else None


def _texts(config: Mapping[str, Any]) -> str:
    names = config.get("dataset") or config.get("dataset_names") or "unknown text"
    return _shown(", ".join(map(str, names)) if isinstance(names, list) else names)


def _provenance(
    content: Mapping[str, Any], config: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    keys = ("eval_id", "datetime_epoch_millis", "sae_bench_commit_hash", "sae_lens_version")
    said = {key: content.get(key) for key in keys}
    return {"imported": {"file": path.name, "eval_config": dict(config)} | said}


def _shown(given: object) -> str:
    """One line of what can be printed, and not too much of it."""
    line = " ".join(str(given)[: 10 * _MOST_LETTERS].split())
    return "".join(letter for letter in line if letter.isprintable())[:_MOST_LETTERS]
