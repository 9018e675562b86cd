"""A suite file is read strictly: what is wrong is named with file, line, field and the nearest valid choice."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from saebench import registry, suite
from saebench.errors import UserError

SUITES = Path(__file__).parents[1] / "suites"

VALID = """\
name: tiny
model: {id: some/model}
sites: [{layer: 1, stream: resid_post}]
text: {source: builtin:python-stdlib, context: 32, train_tokens: 3200, eval_tokens: 600}
training: {batch_tokens: 64, buffer_tokens: 1024}
saes:
  - {variant: topk, width: 32, l0: 4}
controls: [identity]
evals:
  - sparsity
  - fidelity
reports: [leaderboard]
"""


def loaded(folder: Path, text: str) -> suite.Suite:
    path = folder / "suite.yaml"
    path.write_text(text, encoding="utf-8")
    return suite.load(path)


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(UserError) as caught:
        loaded(folder, text)
    return str(caught.value)


def test_the_example_that_the_others_change_is_valid(tmp_path):
    found = loaded(tmp_path, VALID)
    assert [sae.name for sae in found.trained()] == ["topk-w32-l4-s0"]
    assert [e.name for e in found.evals] == ["sparsity", "fidelity"]


# (what is replaced, by what, line, field, parts of the message)
WRONG = {
    "unknown top-level key": ("controls:", "control:", 8, "control", ["did you mean 'controls'"]),
    "unknown key in model": ("{id:", "{revison: x, id:", 2, "model.revison", ["'revision'"]),
    "unknown key in text": ("context: 32", "contxt: 32", 4, "text.contxt", ["'context'"]),
    "unknown key in training": (
        "buffer_tokens",
        "bufer_tokens",
        5,
        "training.bufer_tokens",
        ["did you mean 'buffer_tokens'"],
    ),
    "missing key": ("{id: some/model}", "{dtype: float32}", 2, "model.id", ["missing"]),
    "unknown dtype": ("{id:", "{dtype: fp32, id:", 2, "model.dtype", ["'fp32'", "'float32'"]),
    "unknown variant": ("topk", "topkk", 7, "saes.0.variant", ["'topkk'", "'topk'", "jumprelu"]),
    "unknown eval": ("fidelity", "fidelty", 11, "evals.1", ["'fidelty'", "mean 'fidelity'"]),
    "unknown control": ("identity", "identiti", 8, "controls.0", ["mean 'identity'"]),
    "unknown report": ("[leaderboard]", "[leaderbord]", 12, "reports.0", ["mean 'leaderboard'"]),
    "unknown stream": ("resid_post", "resid_pots", 3, "sites.0", ["resid_pots", "resid_post"]),
    "a site that is a number": ("[{layer: 1, stream: resid_post}]", "[5]", 3, "sites.0", ["5"]),
    "no site": ("[{layer: 1, stream: resid_post}]", "[]", 3, "sites", ["at least 1"]),
    "negative layer": ("layer: 1", "layer: -1", 3, "sites.0", ["-1"]),
    "unknown parameter of a report": (
        "[leaderboard]",
        "[{pareto: {xx: l0}}]",
        12,
        "reports.0.pareto.xx",
        ["mean 'x'"],
    ),
    "unknown format of a report": (
        "[leaderboard]",
        "[{leaderboard: {formats: [html]}}]",
        12,
        "reports.0",
        ["'html'", "md"],
    ),
    "parameters that are no mapping": (
        "[identity]",
        "[{identity: 5}]",
        8,
        "controls.0.identity",
        ["5"],
    ),
    "unknown field of a recipe": (
        "l0: 4}",
        "l0: 4, lrr: 1.0}",
        7,
        "saes.0.lrr",
        ["topk has no parameter 'lrr'", "mean 'lr'"],
    ),
    "recipe field of another variant": (
        "l0: 4}",
        "l0: 4, bandwidth: 1.0}",
        7,
        "saes.0.bandwidth",
        ["topk has no parameter"],
    ),
    "recipe field of the wrong type": ("l0: 4}", "l0: 4, lr: fast}", 7, "saes.0.lr", ["'fast'"]),
    "negative recipe field": ("l0: 4}", "l0: 4, lr: -1.0}", 7, "saes.0.lr", ["-1.0", "than 0"]),
    "endless recipe field": ("l0: 4}", "l0: 4, lr: .inf}", 7, "saes.0.lr", ["inf", "finite"]),
    "share above one": ("l0: 4}", "l0: 4, lr_decay: 1.5}", 7, "saes.0.lr_decay", ["1.5"]),
    "recipe field without values": ("l0: 4}", "l0: 4, lr: []}", 7, "saes.0.lr", ["empty"]),
    "negative width": ("width: 32", "width: -32", 7, "saes.0.width.0", ["-32"]),
    "width zero": ("width: 32", "width: 0", 7, "saes.0.width.0", ["0"]),
    "fractional width": ("width: 32", "width: 3.5", 7, "saes.0.width.0", ["3.5"]),
    "no width": ("width: 32", "width: []", 7, "saes.0.width", ["at least 1"]),
    "l0 above width": ("l0: 4", "l0: 33", 7, "saes.0.l0", ["33", "from 1 to 32"]),
    "l0 below one": ("l0: 4", "l0: 0.5", 7, "saes.0.l0", ["0.5", "from 1 to 32"]),
    "l0 not a number": ("l0: 4", "l0: .nan", 7, "saes.0.l0.0", ["nan"]),
    "fractional l0 for topk": ("l0: 4", "l0: 4.5", 7, "saes.0.l0", ["4.5", "whole"]),
    "negative seed": ("l0: 4", "l0: 4, seed: -1", 7, "saes.0.seed.0", ["-1"]),
    "the same SAE twice": ("l0: 4", "l0: [4, 4]", 6, "saes", ["'topk-w32-l4-s0'"]),
    "the same eval twice": ("- fidelity", "- sparsity", 9, "evals", ["sparsity is there twice"]),
    "no SAE": ("\n  - {variant: topk, width: 32, l0: 4}", " []", 6, "saes", ["at least 1"]),
    "an SAE that is a name": ("{variant: topk, width: 32, l0: 4}", "topk", 7, "saes.0", ["'topk'"]),
    "neither variant nor checkpoint": ("variant: topk, ", "", 7, "saes.0", ["width, l0"]),
    "unknown format of a checkpoint": (
        "{variant: topk, width: 32, l0: 4}",
        "{checkpoint: x, format: nativ, name: mine}",
        7,
        "saes.0.format",
        ["mean 'native'"],
    ),
    "unknown key of a checkpoint": (
        "{variant: topk, width: 32, l0: 4}",
        "{checkpoint: x, format: native, nam: mine}",
        7,
        "saes.0.nam",
        ["mean 'name'"],
    ),
    "a name that is a path": ("name: tiny", "name: ../tiny", 1, "name", ["../tiny"]),
    "two sources of text": ("{source:", "{files: x, source:", 4, "text", ["exactly one of"]),
    "no source of text": ("source: builtin:python-stdlib, ", "", 4, "text", ["exactly one of"]),
    "half a batch in the buffer": (
        "buffer_tokens: 1024",
        "buffer_tokens: 1000",
        5,
        "training.buffer_tokens",
        ["1000", "multiple of batch_tokens (64)", "such as 1024"],
    ),
    "less text than a batch": (
        "train_tokens: 3200",
        "train_tokens: 63",
        4,
        "text.train_tokens",
        ["63", "batch_tokens (64)"],
    ),
    "a key that is there twice": ("controls:", "evals: [sparsity]\ncontrols:", 10, "", ["'evals'"]),
}


@pytest.mark.parametrize(("old", "new", "line", "field", "parts"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named_with_its_line_and_the_nearest_choice(
    tmp_path: Path, old: str, new: str, line: int, field: str, parts: list[str]
):
    assert VALID.count(old) == 1
    message = refusal(tmp_path, VALID.replace(old, new))
    place = f"{tmp_path / 'suite.yaml'}:{line}: {field}"
    assert message.startswith(place), message
    for part in parts:
        assert part in message


def test_every_mistake_of_a_file_is_named_at_once(tmp_path):
    message = refusal(tmp_path, VALID.replace("topk", "topkk").replace("fidelity", "fidelty"))
    assert len(message.splitlines()) == 2


@pytest.mark.parametrize("text", ["", "- a list", "just a text", "7"])
def test_a_file_that_is_no_mapping_is_told_the_keys_of_one(tmp_path: Path, text: str):
    message = refusal(tmp_path, text)
    assert "expected a mapping with the keys name, model, sites" in message


def test_invalid_yaml_is_named_with_its_line(tmp_path):
    message = refusal(tmp_path, VALID.replace("[identity]", "[identity"))
    assert "not valid YAML" in message
    assert "line 9" in message


def test_keys_that_are_no_text_are_refused(tmp_path):
    assert "5" in refusal(tmp_path, VALID + "5: 6\n")


def test_tags_that_would_run_code_are_refused(tmp_path):
    message = refusal(tmp_path, VALID + "extra: !!python/object/apply:os.getcwd []\n")
    assert "not valid YAML" in message


@pytest.mark.parametrize("key", ["controls", "extra", "saes", "name"])
def test_aliases_of_aliases_are_refused_at_once(tmp_path: Path, key: str):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    kept = [line for line in VALID.splitlines() if not line.startswith(f"{key}:")]
    began = time.monotonic()
    message = refusal(tmp_path, "\n".join([*lines, *kept, f"{key}: *a29"]))
    assert time.monotonic() - began < 1
    assert "aliases" in message
    assert len(message) < 1000


def test_an_alias_may_save_writing_the_same_twice(tmp_path):
    text = VALID.replace("width: 32", "width: &w [32, 64]").replace(
        "l0: 4}", "l0: 4}\n  - {variant: relu, width: *w, l0: 4}"
    )
    assert [sae.width for sae in loaded(tmp_path, text).trained()] == [32, 64, 32, 64]


def test_an_alias_of_itself_is_refused(tmp_path):
    assert "aliases" in refusal(tmp_path, VALID.replace("[identity]", "&a [*a]"))


def test_a_list_in_a_list_in_a_list_and_so_on_is_refused(tmp_path):
    assert "too deep" in refusal(tmp_path, f"name: {'[' * 5000}{']' * 5000}")


def test_a_missing_file_a_folder_and_another_encoding_are_refused(tmp_path):
    with pytest.raises(UserError, match="no suite file"):
        suite.load(tmp_path / "missing.yaml")
    with pytest.raises(UserError, match="cannot be read as a suite file"):
        suite.load(tmp_path)
    path = tmp_path / "latin.yaml"
    path.write_bytes("name: Überblick".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.yaml cannot be read as a suite file.*utf-8"):
        suite.load(path)


# What a suite stands for


def test_every_list_is_a_sweep_in_the_order_of_the_file(tmp_path):
    text = VALID.replace("width: 32, l0: 4}", "width: [32, 64], l0: [4, 8], seed: [0, 1]}")
    assert [sae.name for sae in loaded(tmp_path, text).trained()] == [
        "topk-w32-l4-s0",
        "topk-w32-l4-s1",
        "topk-w32-l8-s0",
        "topk-w32-l8-s1",
        "topk-w64-l4-s0",
        "topk-w64-l4-s1",
        "topk-w64-l8-s0",
        "topk-w64-l8-s1",
    ]


@pytest.mark.parametrize("written", ["[3.0e-4, 1.0e-3]", "[3e-4, 1e-3]"], ids=["dot", "no dot"])
def test_a_swept_field_of_the_recipe_is_part_of_the_name(tmp_path: Path, written: str):
    """YAML takes 3e-4 for a text; nobody who writes it means one."""
    saes = loaded(tmp_path, VALID.replace("l0: 4}", f"l0: 4, lr: {written}}}")).trained()
    assert [sae.name for sae in saes] == ["topk-w32-l4-s0-lr0.0003", "topk-w32-l4-s0-lr0.001"]
    assert [sae.recipe.lr for sae in saes] == [3e-4, 1e-3]


def test_several_sites_are_part_of_the_names(tmp_path):
    text = VALID.replace(
        "[{layer: 1, stream: resid_post}]", "[0.resid_post, blocks.1.hook_mlp_out]"
    )
    names = [sae.name for sae in loaded(tmp_path, text).trained()]
    assert names == ["topk-w32-l4-s0-0.resid_post", "topk-w32-l4-s0-1.mlp_out"]


@pytest.mark.parametrize("variant", registry.names("variants"))
def test_what_a_suite_does_not_override_is_the_baselines(variant: str):
    baseline = yaml.safe_load((registry.folder("baselines") / f"{variant}.yaml").read_text())
    found = suite.recipe(variant, {"lr": 0.5})
    assert vars(found) == baseline | {"lr": 0.5}


@pytest.mark.parametrize("path", registry.suites(), ids=lambda path: path.stem)
def test_the_suites_that_come_along_are_valid(path: Path):
    assert suite.load(path).name == path.stem


def test_a_definition_is_plain_data_with_every_default_filled_in(tmp_path):
    definition = json.loads(json.dumps(loaded(tmp_path, VALID).definition(), allow_nan=False))
    assert definition["model"] == {"id": "some/model", "revision": None, "dtype": "float32"}
    assert definition["sites"] == ["1.resid_post"]
    assert definition["saes"] == [{"variant": "topk", "width": [32], "l0": [4.0], "seed": [0]}]
    assert definition["reports"][0]["leaderboard"]["formats"] == ["md", "csv", "tex"]


# The schema for editors


def test_the_committed_schema_is_up_to_date():
    written = json.loads((SUITES / "suite.schema.json").read_text(encoding="utf-8"))
    assert written == suite.json_schema(), (
        "write it anew: python -c 'import json, pathlib; from saebench import suite; pathlib.Path("
        '"suites/suite.schema.json").write_text(json.dumps(suite.json_schema(), indent=2) + "\\n")\''
    )


@pytest.mark.parametrize("path", registry.suites(), ids=lambda path: path.stem)
def test_the_suites_that_come_along_fit_the_schema(path: Path):
    schema = suite.json_schema()
    assert fits(yaml.safe_load(path.read_text(encoding="utf-8")), schema, schema["$defs"])


@pytest.mark.parametrize(
    ("old", "new"),
    [("topk", "topkk"), ("fidelity", "fidelty"), ("width: 32", "width: -1"), ("sites", "site")],
)
def test_the_schema_refuses_what_is_refused(old: str, new: str):
    schema = suite.json_schema()
    assert fits(yaml.safe_load(VALID), schema, schema["$defs"])
    assert not fits(yaml.safe_load(VALID.replace(old, new)), schema, schema["$defs"])


def fits(value: Any, schema: dict[str, Any], defs: dict[str, Any]) -> bool:
    """As much of JSON Schema as this schema uses."""
    if "$ref" in schema:
        return fits(value, defs[schema["$ref"].rpartition("/")[2]], defs)
    choices = schema.get("anyOf") or schema.get("oneOf")
    if choices and not any(fits(value, choice, defs) for choice in choices):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
        "null": type(None),
    }
    if "type" in schema and not isinstance(value, kinds[schema["type"]]):
        return False
    if "exclusiveMinimum" in schema and not value > schema["exclusiveMinimum"]:
        return False
    if isinstance(value, list):
        items = schema.get("items", {})
        return len(value) >= schema.get("minItems", 0) and all(fits(v, items, defs) for v in value)
    if isinstance(value, dict):
        known = schema.get("properties", {})
        others = schema.get("additionalProperties", True)
        return (
            set(schema.get("required", [])) <= value.keys()
            and all(fits(key, schema.get("propertyNames", {}), defs) for key in value)
            and all(fits(v, known[k], defs) for k, v in value.items() if k in known)
            and (others is not False or value.keys() <= known.keys())
        )
    return True
