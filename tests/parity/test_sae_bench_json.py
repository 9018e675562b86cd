"""Exported result files in the classes and schemas that sae_bench publishes, and files of its own read here."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from saebench import peer_json, results
from tests.test_peer_json import board

core = pytest.importorskip("sae_bench.evals.core.eval_output", exc_type=ImportError)
probing = pytest.importorskip("sae_bench.evals.sparse_probing.eval_output", exc_type=ImportError)

CLASSES = {
    "core": core.CoreEvalOutput,
    "sparse_probing": probing.SparseProbingEvalOutput,
}


def schema(eval_type: str) -> dict[str, Any]:
    folder = resources.files("sae_bench.evals") / eval_type
    text = (folder / f"eval_output_schema_{eval_type}.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def problems(value: Any, wanted: dict[str, Any], whole: dict[str, Any], at: str) -> list[str]:
    """What a JSON schema objects to, of the parts of the language that these schemas use."""
    if "$ref" in wanted:
        return problems(value, whole["$defs"][wanted["$ref"].rpartition("/")[2]], whole, at)
    if "anyOf" in wanted:
        found = [problems(value, one, whole, at) for one in wanted["anyOf"]]
        return [] if [] in found else found[0]
    types = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "integer": int,
        "number": (int, float),
        "null": type(None),
    }
    kind = wanted.get("type")
    if kind and not isinstance(value, types[kind]):
        return [f"{at}: {value!r} is no {kind}"]
    if isinstance(value, dict):
        known = wanted.get("properties", {})
        lacks = [f"{at} lacks {key}" for key in wanted.get("required", []) if key not in value]
        # More than a schema asks for is allowed by it, and dropped by the classes.
        extra = [f"{at}: {key} is unknown" for key in value if known and key not in known]
        parts = [problems(v, known[k], whole, f"{at}.{k}") for k, v in value.items() if k in known]
        return [*lacks, *extra, *(one for part in parts for one in part)]
    if isinstance(value, list) and "items" in wanted:
        parts = [problems(one, wanted["items"], whole, at) for one in value]
        return [one for part in parts for one in part]
    return []


@pytest.mark.parametrize("mode", peer_json.MODES)
def test_their_classes_and_schemas_accept_every_exported_file(tmp_path: Path, mode: peer_json.Mode):
    paths = peer_json.export(board(tmp_path / "r"), tmp_path / "out", mode, None)
    assert len(paths) == (2 if mode == "native" else 1)
    for path in paths:
        text = path.read_text(encoding="utf-8")
        eval_type = json.loads(text)["eval_type_id"]
        read = TypeAdapter(CLASSES[eval_type]).validate_json(text)
        assert read.sae_lens_release_id == "toy" and read.sae_lens_id == "sae"
        assert problems(json.loads(text), schema(eval_type), schema(eval_type), "file") == []


def test_they_read_the_numbers_that_were_written(tmp_path: Path):
    paths = peer_json.export(board(tmp_path / "r"), tmp_path / "out", "native", None)
    read = TypeAdapter(core.CoreEvalOutput).validate_json(paths[0].read_text(encoding="utf-8"))
    metrics = read.eval_result_metrics
    assert metrics.reconstruction_quality.explained_variance == 0.75
    assert metrics.model_performance_preservation.ce_loss_score == 0.8
    assert metrics.sparsity.l0 == 3.0 and metrics.misc_metrics.frac_alive == 0.75
    assert read.eval_result_unstructured["saebench"]["mode"] == "native"


def test_their_schema_needs_each_key_of_the_core_eval_that_is_known_here():
    whole = schema("core")
    categories = whole["$defs"]["CoreMetricCategories"]["properties"]
    needed = {
        category: tuple(whole["$defs"][entry["$ref"].rpartition("/")[2]]["required"])
        for category, entry in categories.items()
    }
    tokens = needed.pop("token_stats")
    assert set(tokens) == {
        "total_tokens_eval_reconstruction",
        "total_tokens_eval_sparsity_variance",
    }
    assert {k: set(v) for k, v in needed.items()} == {k: set(v) for k, v in peer_json._CORE.items()}


def test_a_file_that_their_class_writes_is_read(tmp_path: Path):
    (path,) = peer_json.export(board(tmp_path / "r"), tmp_path / "out", "sb-0.6", None)
    theirs = TypeAdapter(core.CoreEvalOutput).validate_json(path.read_text(encoding="utf-8"))
    theirs.eval_result_unstructured = {}
    theirs.to_json_file(str(tmp_path / "theirs_eval_results.json"))
    peer_json.import_([tmp_path / "theirs_eval_results.json"], tmp_path / "in")
    scores = results.read(tmp_path / "in").scores.set_index("metric")["value"]
    assert scores["loss_recovered"] == 0.8 and scores["shrinkage"] == 0.75
    assert "explained_variance_uncentred" not in scores  # -1 there
