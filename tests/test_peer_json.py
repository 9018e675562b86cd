"""Result files of sae_bench: what is written under which key, and what of them is read as what."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saebench import peer_json, results
from saebench.errors import NothingToShow, UserError
from saebench.reports import _compare
from saebench.reports._build import build
from saebench.reports._evidence import Evidence
from saebench.reports.leaderboard import Leaderboard
from saebench.reports.pareto import Pareto
from saebench.results import Entry, Omission, ScoreRow
from tests.boards import row, trained

DENSITY = [0.5, 0.05, 0.005, 0.0]
"""Of four latents: above 10 %, above 1 %, below, dead. Of all activations 0.5 / 0.555 are above 10 %."""
ROWS: dict[str, list[ScoreRow]] = {
    "sparsity": [
        row("l0", [2, 4], n=8, best=None),  # 3
        row("dead_fraction", [0, 0, 0, 1], unit="latent", best="min", n=8),  # 1/4
        row("density", DENSITY, unit="latent", best=None, n=8),
        row("dense_fraction", [1, 0, 0, 0], unit="latent", best="min", n=8),  # 1/4
    ],
    "reconstruction": [
        row("explained_variance", [6, 3], den=np.array([8, 4], float), n=8),  # 9/12
        row("mse", [2, 4], best="min", n=8),  # 3
        row("cosine", [0.5, 0.75], n=8),  # 0.625
    ],
    "fidelity": [
        row("loss_recovered", [3, 5], den=np.array([4, 6], float), n=6),  # 8/10
        row("kl_divergence", [0.25, 0.75], best="min", n=6),  # 0.5
        row("ce_loss_clean", [2, 3], best=None, n=6),
        row("ce_loss_sae", [3, 4], best="min", n=6),
        row("ce_loss_zero", [7, 8], best=None, n=6),
    ],
    "shrinkage": [
        row("shrinkage", [1, 2], den=np.array([2, 2], float), best=None, n=8),  # 3/4
        row("l2_ratio", [0.5, 1.0], best=None, n=8),  # 3/4
    ],
    "geometry": [row("max_decoder_cosine", [0.5, 0.0], unit="latent", best="min")],  # 1/4
    "sparse_probing": [
        row("probe_accuracy_k1", [0.5, 1.0], unit="dataset", ids=["d", "e"]),  # 0.75
        row("probe_accuracy_all", [1.0, 0.75], unit="dataset", ids=["d", "e"]),  # 0.875
    ],
}
NEVER = {
    "kl_div_score",
    "kl_div_with_ablation",
    "explained_variance_legacy",
    "l2_norm_in",
    "l2_norm_out",
    "l1",
    "average_max_encoder_cosine_sim",
}
PROBING = {
    "datasets": [{"source": "builtin:python-stdlib"}],
    "k": [1],
    "train": 64,
    "validation": 32,
    "test": 48,
    "seed": 3,
}


def board(
    folder: Path,
    evals: Sequence[str] = tuple(ROWS),
    omitted: Sequence[Omission] = (),
    entry: Entry | None = None,
) -> Path:
    """A suite of one SAE, its scores known by hand."""
    entry = entry or trained("topk", 3.0, width=4)
    runs = []
    for name in evals:
        probing = name == "sparse_probing"
        spec = {
            "sae": {"name": "sae", "checksum": "abc"},
            "site": entry.site,
            "model": {"id": "m", "dtype": "float32"},
            "text": {"fingerprint": "f", "context": 8, "sequences": 2},
            "eval": {"name": name, "version": 1, "params": PROBING if probing else {}},
        }
        left_out = omitted if name == "fidelity" else []
        path = results.write(folder, spec, ROWS[name], left_out, {"packages": {"torch": "2"}})
        runs.append(f"runs/{path.name}")
    definition = {"model": {"id": "m", "dtype": "float32"}, "text": {"source": "t", "context": 8}}
    results.write_manifest(folder, "toy", definition, {"sae": entry}, runs)
    return folder


def exported(folder: Path, out: Path, mode: peer_json.Mode) -> dict[str, Any]:
    """By eval type."""
    files = [json.loads(path.read_text()) for path in peer_json.export(folder, out, mode, None)]
    return {file["eval_type_id"]: file for file in files}


def flat(file: dict[str, Any]) -> dict[str, Any]:
    found = file["eval_result_metrics"].items()
    return {k: v for category, keys in found if category != "token_stats" for k, v in keys.items()}


def published(**changes: Any) -> dict[str, Any]:
    """As the results of January 2025 are, cut to a few keys."""
    whole = {
        "eval_type_id": "core",
        "eval_config": {"model_name": "gemma-2-2b", "dataset": "web", "context_size": 128},
        "eval_id": "e",
        "datetime_epoch_millis": 1,
        "eval_result_metrics": {
            "model_behavior_preservation": {"kl_div_score": -1, "kl_div_with_sae": -1.0},
            "model_performance_preservation": {"ce_loss_score": 0.96, "ce_loss_with_sae": 3.0},
            "reconstruction_quality": {"explained_variance": 0.7, "mse": 1.5, "cossim": None},
            "sparsity": {"l0": 20.5, "l1": 100},
            "token_stats": {
                "total_tokens_eval_reconstruction": 4096,
                "total_tokens_eval_sparsity_variance": 8192,
            },
        },
        "eval_result_details": [{"index": 0, "feature_density": 0.5}],
        "sae_bench_commit_hash": "c",
        "sae_lens_id": "blocks.12.hook_resid_post__trainer_3",
        "sae_lens_release_id": "release/with parts",
        "sae_lens_version": "5",
        "sae_cfg_dict": {
            "architecture": "topk",
            "d_sae": 16384,
            "hook_name": "blocks.12.hook_resid_post",
        },
        "eval_result_unstructured": {},
    }
    return whole | changes


def write(folder: Path, content: Any, name: str = "a_eval_results.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def values(folder: Path) -> dict[str, float]:
    scores = results.read(folder).scores
    return dict(zip(scores["metric"], scores["value"], strict=True))


# What is written


def test_native_files_have_our_numbers_under_the_keys_that_name_them(tmp_path: Path):
    core = exported(board(tmp_path / "r"), tmp_path / "out", "native")["core"]
    found = flat(core)
    assert {key for key, value in found.items() if value == -1} == NEVER
    expected = {
        "kl_div_with_sae": 0.5,
        "ce_loss_score": 0.8,
        "ce_loss_with_ablation": 7.5,
        "ce_loss_with_sae": 3.5,
        "ce_loss_without_sae": 2.5,
        "explained_variance": 0.75,
        "mse": 3.0,
        "cossim": 0.625,
        "l2_ratio": 0.75,
        "relative_reconstruction_bias": 0.75,
        "l0": 3.0,
        "freq_over_1_percent": 0.5,
        "freq_over_10_percent": 0.25,
        "normalized_freq_over_1_percent": 0.55 / 0.555,
        "normalized_freq_over_10_percent": 0.5 / 0.555,
        "average_max_decoder_cosine_sim": 0.25,
        "frac_alive": 0.75,
    }
    assert {k: v for k, v in found.items() if v != -1} == pytest.approx(expected)
    tokens = core["eval_result_metrics"]["token_stats"]
    assert list(tokens.values()) == [6, 8]


@pytest.mark.parametrize(
    ("mode", "more"),
    [
        ("sb-0125", {"explained_variance", "mse", "kl_div_with_sae"}),
        ("sb-0.6", {"explained_variance", "mse"}),
    ],
)
def test_no_number_stands_under_a_key_that_means_another_one_in_that_version(
    tmp_path: Path, mode: peer_json.Mode, more: set[str]
):
    folder = board(tmp_path / "r")
    found = exported(folder, tmp_path / "out", mode)
    assert set(found) == {"core"}  # probes are chosen and fitted otherwise there
    core = found["core"]
    assert {key for key, value in flat(core).items() if value == -1} == NEVER | more
    own = core["eval_result_unstructured"]["saebench"]
    assert set(own["not_measured"]) == NEVER | more
    kept = {score["metric"]: score for score in own["scores"]}
    assert kept["explained_variance"]["value"] == 0.75
    assert kept["mse"]["unit"] == "sequence" and kept["density"]["n_units"] == 4


def test_what_a_file_says_of_its_making_is_true_of_the_run(tmp_path: Path):
    folder = board(tmp_path / "r", ["sparsity", "reconstruction"])
    core = exported(folder, tmp_path / "out", "sb-0.6")["core"]
    config = core["eval_config"]
    assert (config["model_name"], config["llm_dtype"], config["dataset"]) == ("m", "float32", "t")
    batches = config["n_eval_reconstruction_batches"], config["n_eval_sparsity_variance_batches"]
    assert (config["context_size"], config["batch_size_prompts"], *batches) == (8, 1, 0, 2)
    done = {key for key, value in config.items() if key.startswith("compute") and value}
    assert done == {
        "compute_sparsity_metrics",
        "compute_variance_metrics",
        "compute_featurewise_density_statistics",
    }
    assert core["sae_cfg_dict"] == {
        "architecture": "topk",
        "model_name": "m",
        "d_sae": 4,
        "hook_layer": 2,
        "hook_name": "blocks.2.hook_resid_post",
    }
    newest = max(path.stat().st_mtime for path in folder.glob("runs/*.json"))
    assert core["datetime_epoch_millis"] == int(1000 * newest)
    assert (core["sae_lens_release_id"], core["sae_lens_id"]) == ("toy", "sae")
    assert core["sae_bench_commit_hash"] == "Unknown" and core["sae_lens_version"] is None


def test_what_an_eval_leaves_out_is_lacking_for_its_reason(tmp_path: Path):
    kept = [score for score in ROWS["fidelity"] if score.metric != "loss_recovered"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ROWS, "fidelity", kept)
        omitted = [Omission("loss_recovered", "ablating costs nothing")]
        folder = board(tmp_path / "r", ["fidelity"], omitted)
    core = exported(folder, tmp_path / "out", "native")["core"]
    reasons = core["eval_result_unstructured"]["saebench"]["not_measured"]
    assert flat(core)["ce_loss_score"] == -1
    assert reasons["ce_loss_score"] == "ablating costs nothing"
    assert reasons["l0"] == "these results have no l0"


def test_native_files_of_probes_have_accuracies_and_null_for_what_was_not_probed(tmp_path: Path):
    probing = exported(board(tmp_path / "r"), tmp_path / "out", "native")["sparse_probing"]
    sae, llm = (probing["eval_result_metrics"][category] for category in ("sae", "llm"))
    assert sae["sae_top_1_test_accuracy"] == 0.75 and sae["sae_test_accuracy"] == 0.875
    assert {value for key, value in sae.items() if "_1_" not in key and "top" in key} == {None}
    assert llm.pop("llm_test_accuracy") == -1 and set(llm.values()) == {None}
    config = probing["eval_config"]
    assert config["dataset_names"] == ["builtin:python-stdlib"] and config["random_seed"] == 3
    assert (config["probe_train_set_size"], config["probe_test_set_size"]) == (64, 48)


def test_the_same_results_are_written_as_the_same_bytes(tmp_path: Path):
    folder = board(tmp_path / "r")
    first = [path.read_bytes() for path in peer_json.export(folder, tmp_path / "a", "native", None)]
    again = [path.read_bytes() for path in peer_json.export(folder, tmp_path / "b", "native", None)]
    assert first == again and len(first) == 2


def test_densities_that_were_not_kept_are_lacking_and_not_zero(tmp_path: Path):
    folder = board(tmp_path / "r")
    for path in folder.glob("runs/sae--sparsity*.units.parquet"):
        path.unlink()
    found = flat(exported(folder, tmp_path / "out", "native")["core"])
    assert found["freq_over_1_percent"] == found["normalized_freq_over_10_percent"] == -1
    assert found["frac_alive"] == 0.75


def test_export_refuses_an_sae_that_is_not_there(tmp_path: Path):
    with pytest.raises(UserError, match="no scores of 'nobody'; there are: sae"):
        peer_json.export(board(tmp_path / "r"), tmp_path / "out", "native", ["nobody"])


# What is read


def test_a_published_file_becomes_a_row_with_our_names_where_they_mean_the_same(tmp_path: Path):
    new = peer_json.import_([write(tmp_path, published())], tmp_path / "in")
    found = results.read(tmp_path / "in")
    assert len(new) == 1 and values(tmp_path / "in") == {
        "loss_recovered": 0.96,
        "ce_loss_sae": 3.0,
        "explained_variance_legacy": 0.7,  # what the published files have under the other key
        "mse_by_batch": 1.5,
        "l0": 20.5,
        "l1": 100.0,
    }
    scores = found.scores.set_index("metric")
    assert set(scores["sae"]) == {"release_with_parts_blocks.12.hook_resid_post__trainer_3"}
    assert set(scores["eval"]) == {"sae_bench.core"} and set(scores["version"]) == {1}
    assert set(scores["kind"]) == {"imported"} and set(scores["variant"]) == {"topk"}
    assert set(scores["width"]) == {16384} and set(scores["site"]) == {"gemma-2-2b 12.resid_post"}
    assert scores["n"]["loss_recovered"] == 4096 and scores["n"]["l0"] == 8192
    assert scores["ci_low"].isna().all() and (scores["n_units"] == 0).all()
    assert (found.model, found.text) == ("gemma-2-2b", "web, sequences of 128 tokens")


def test_minus_one_and_null_become_omissions_with_a_reason(tmp_path: Path):
    peer_json.import_([write(tmp_path, published())], tmp_path / "in")
    omitted = results.read(tmp_path / "in").omitted
    reasons = dict(zip(omitted["what"], omitted["reason"], strict=True))
    assert reasons == {
        "kl_div_score": "kl_div_score is -1, which stands for not measured",
        "kl_divergence": "kl_div_with_sae is -1, which stands for not measured",
        "cosine": "cossim is null",
    }


def test_a_file_with_both_explained_variances_is_of_another_version(tmp_path: Path):
    content = published()
    quality = {"explained_variance": 0.98, "explained_variance_legacy": 0.78}
    content["eval_result_metrics"]["reconstruction_quality"] = quality
    peer_json.import_([write(tmp_path, content)], tmp_path / "in")
    found = results.read(tmp_path / "in").scores.set_index("metric")
    assert found["value"]["explained_variance_uncentred"] == 0.98
    assert found["value"]["explained_variance_legacy"] == 0.78
    assert set(found["version"]) == {2}


@pytest.mark.parametrize(
    ("eval_type", "metrics", "best"),
    [
        ("ravel", {"ravel": {"disentanglement_score": 0.6}}, {"disentanglement_score": "max"}),
        (
            "absorption_first_letter",
            {"mean": {"mean_full_absorption_score": 0.1, "mean_num_split_features": 1.3}},
            {"mean_full_absorption_score": "min", "mean_num_split_features": None},
        ),
        (
            "tpp",
            {"tpp_metrics": {"tpp_threshold_10_total_metric": 0.2, "tpp_threshold_2_x": None}},
            {"tpp_threshold_10_total_metric": "max"},
        ),
        (
            "sparse_probing",
            {"llm": {"llm_test_accuracy": 0.95}, "sae": {"sae_top_1_test_accuracy": 0.7}},
            {"llm_test_accuracy": None, "sae_top_1_test_accuracy": "max"},
        ),
    ],
)
def test_other_evals_keep_their_names_and_their_better_direction(
    tmp_path: Path, eval_type: str, metrics: dict[str, Any], best: dict[str, str | None]
):
    content = published(eval_type_id=eval_type, eval_result_metrics=metrics)
    peer_json.import_([write(tmp_path, content)], tmp_path / "in")
    scores = results.read(tmp_path / "in").scores
    directions = [b if b in ("min", "max") else None for b in scores["best"]]
    assert dict(zip(scores["metric"], directions, strict=True)) == best
    assert set(scores["eval"]) == {f"sae_bench.{eval_type}"}


def test_what_was_exported_natively_comes_back_under_its_own_names(tmp_path: Path):
    (path, _) = peer_json.export(board(tmp_path / "r"), tmp_path / "out", "native", None)
    peer_json.import_([path], tmp_path / "in")
    found = values(tmp_path / "in")
    assert found["explained_variance"] == 0.75 and found["mse"] == 3.0
    assert "l1" not in found
    read = results.read(tmp_path / "in")
    assert set(read.scores["eval"]) == {"saebench.core"}
    reasons = dict(zip(read.omitted["what"], read.omitted["reason"], strict=True))
    assert reasons["l1"] == "no sums of latents are computed here"


def test_the_same_file_twice_changes_nothing(tmp_path: Path):
    path, out = write(tmp_path, published()), tmp_path / "in"
    assert len(peer_json.import_([path, path], out)) == 1
    before = {p.name: p.stat().st_mtime_ns for p in out.rglob("*.json")}
    assert peer_json.import_([path], out) == []
    assert {p.name: p.stat().st_mtime_ns for p in out.rglob("*.json")} == before


def test_files_of_several_saes_and_evals_share_a_folder(tmp_path: Path):
    ravel = {"eval_type_id": "ravel", "eval_result_metrics": {"ravel": {"cause_score": 0.5}}}
    first = write(tmp_path, published())
    second = write(tmp_path, published(sae_lens_id="other"), "b.json")
    third = write(tmp_path, published(**ravel), "c.json")
    peer_json.import_([first], tmp_path / "in")
    assert len(peer_json.import_([first, second, third], tmp_path / "in")) == 2
    found = results.read(tmp_path / "in")
    assert found.scores["sae"].nunique() == 2 and not found.stale and not found.missing


def test_other_numbers_of_the_same_sae_are_refused_and_nothing_is_written(tmp_path: Path):
    out = tmp_path / "in"
    peer_json.import_([write(tmp_path, published())], out)
    before = sorted(p.name for p in out.rglob("*"))
    other = write(tmp_path, published(eval_id="another"), "b.json")
    with pytest.raises(UserError, match="has other results of release_with_parts"):
        peer_json.import_([write(tmp_path, published(sae_lens_id="new"), "c.json"), other], out)
    assert sorted(p.name for p in out.rglob("*")) == before


def test_an_sae_cannot_be_two_widths_at_once(tmp_path: Path):
    ravel = {"eval_type_id": "ravel", "eval_result_metrics": {"ravel": {"cause_score": 0.5}}}
    wider = published(**ravel, sae_cfg_dict=published()["sae_cfg_dict"] | {"d_sae": 4096})
    files = [write(tmp_path, published()), write(tmp_path, wider, "b.json")]
    with pytest.raises(UserError, match="width 16384 .* width 4096"):
        peer_json.import_(files, tmp_path / "in")


def test_nothing_is_imported_into_the_results_of_a_suite(tmp_path: Path):
    folder = board(tmp_path / "r")
    before = sorted(p.name for p in folder.rglob("*"))
    with pytest.raises(UserError, match="holds results of a suite"):
        peer_json.import_([write(tmp_path, published())], folder)
    assert sorted(p.name for p in folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "holds list"),
        ("{", "cannot be read"),
        ('{"eval_type_id": "core", "eval_type_id": "core"}', "is there twice"),
        ('{"a": NaN}', "NaN is not a number"),
        ('{"a": 1e999}', "too large"),
        ("[" * 100_000, "cannot be read"),
        ('{"a":' * 30 + "1" + "}" * 30, "nested more than"),
        (published(eval_type_id="../../etc"), "expected a name such as core"),
        (published(eval_type_id=None), "eval_type_id is None"),
        (published(eval_result_metrics={"sparsity": {"l0": "20"}}), "expected a number or null"),
        (published(eval_result_metrics={"sparsity": {"l0": True}}), "expected a number or null"),
        (published(eval_result_metrics={"sparsity": {"l0": {"a": 1}}}), "expected a number"),
        (published(eval_result_metrics={"sparsity": 1}), "expected named values"),
        (published(eval_result_metrics={"a": {"x y": 1}}), "is no name of a metric"),
        (published(eval_result_metrics={"a": {"l0": -1}}), "no number that was measured"),
        (published(eval_result_metrics={"a": {"l0": 1}, "b": {"l0": 1}}), "in two categories"),
        (
            published(eval_result_metrics={"a": {f"k{i}": 1 for i in range(1001)}}),
            "more than 1,000",
        ),
        (published(eval_config=[]), "eval_config is \\[\\]"),
        (published(sae_cfg_dict=[1]), "sae_cfg_dict is list"),
    ],
)
def test_what_is_no_result_file_is_refused_and_leaves_nothing(
    tmp_path: Path, content: Any, message: str
):
    path = write(tmp_path, content)
    with pytest.raises(UserError, match=message):
        peer_json.import_([path], tmp_path / "in")
    assert not (tmp_path / "in").exists()


def test_names_of_strangers_become_one_short_line_and_no_path(tmp_path: Path):
    config = {"architecture": "top\x1b[31mk\n" + "x" * 500, "d_sae": -3, "hook_name": "h" * 999}
    content = published(sae_lens_release_id="../" * 200, sae_lens_id=None, sae_cfg_dict=config)
    peer_json.import_([write(tmp_path, content)], tmp_path / "in")
    (entry,) = results.entries(tmp_path / "in").items()
    assert len(entry[0]) <= 100 and "/" not in entry[0] and entry[0][0].isalnum()
    assert entry[1].variant.startswith("top[31mk x") and len(entry[1].variant) == 200
    assert entry[1].width is None


# What reports make of it


def test_imported_rows_are_marked_and_neither_ranked_nor_given_an_interval(tmp_path: Path):
    files = [write(tmp_path, published(sae_lens_id=f"t{i}"), f"{i}.json") for i in range(3)]
    peer_json.import_(files, tmp_path / "in")
    found = results.read(tmp_path / "in")
    table = build(Evidence(found), ("loss_recovered",), "loss_recovered")
    rows = [row for block in table.blocks for row in block.rows]
    assert [block.title for block in table.blocks] == ["gemma-2-2b 12.resid_post, width 16,384"]
    assert {row.mark for row in rows} == {"imported"} and len(rows) == 3
    cells = [cell for row in rows for cell in row.cells]
    assert all(cell.standing is None and cell.number.interval is None for cell in cells)
    assert any(line.startswith("(imported):") for line in table.reading)
    assert not any("interval over" in line or "no ranks" in line for line in table.reading)
    text = Leaderboard(metrics=("loss_recovered",), sort="loss_recovered").text(found)
    assert "topk (imported)" in text
    written = Leaderboard(metrics=("loss_recovered",), sort="loss_recovered")(found, tmp_path / "o")
    tex = next(path for path in written if path.suffix == ".tex").read_text()
    assert r"$^\mathrm{i}$" in tex


def test_imported_saes_cannot_be_compared(tmp_path: Path):
    files = [write(tmp_path, published(sae_lens_id=f"t{i}"), f"{i}.json") for i in range(2)]
    peer_json.import_(files, tmp_path / "in")
    a, b = sorted(results.entries(tmp_path / "in"))
    with pytest.raises(UserError, match="is imported"):
        _compare.compare(a, b, [tmp_path / "in"], [])


def test_imported_saes_of_a_variant_are_one_line_and_the_figure_says_that_they_are(tmp_path: Path):
    files = []
    for i, (l0, recovered) in enumerate([(20, 0.96), (40, 0.97), (80, 0.98)]):
        content = published(sae_lens_id=f"t{i}")
        metrics = {"a": {"l0": l0}, "b": {"ce_loss_score": recovered}}
        files.append(write(tmp_path, content | {"eval_result_metrics": metrics}, f"{i}.json"))
    peer_json.import_(files, tmp_path / "in")
    figure = Pareto(x="l0", y="loss_recovered").draw(results.read(tmp_path / "in"))
    (panel,) = figure.axes
    lines = [line.get_xydata() for line in panel.lines if len(line.get_xdata()) == 3]
    np.testing.assert_allclose(lines[0], [[20, 0.96], [40, 0.97], [80, 0.98]])
    (legend,) = figure.legends
    assert "imported" in legend.get_title().get_text()
    assert [text.get_text() for text in legend.get_texts()] == ["topk"]


def test_a_figure_needs_a_metric_that_was_measured(tmp_path: Path):
    peer_json.import_([write(tmp_path, published())], tmp_path / "in")
    with pytest.raises(NothingToShow, match="kl_divergence"):
        Pareto(x="l0", y="kl_divergence").draw(results.read(tmp_path / "in"))
