"""A suite file is read strictly: what is wrong is named with file, line, field and the nearest valid choice."""

import dataclasses
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
    "missing key": ("context: 32, ", "", 4, "text.context", ["missing"]),
    "no model": (
        "{id: some/model}",
        "{dtype: float32}",
        2,
        "model",
        ["exactly one of id and config"],
    ),
    "two models": ("{id:", "{config: {}, id:", 2, "model", ["got id and config"]),
    "random weights of a trained model": (
        "{id:",
        "{weights: random, id:",
        2,
        "model.weights",
        ["weights has no meaning beside id"],
    ),
    "a tokenizer beside an id": (
        "{id:",
        "{tokenizer: x, id:",
        2,
        "model.tokenizer",
        ["tokenizer has no meaning beside id"],
    ),
    "a config whose weights are not said": (
        "{id: some/model}",
        "{config: {model_type: gpt2}}",
        2,
        "model",
        ["say `weights: random`"],
    ),
    "a config with a revision": (
        "{id: some/model}",
        "{config: {model_type: gpt2}, weights: random, revision: main}",
        2,
        "model.revision",
        ["revision has no meaning beside config"],
    ),
    "a config of no type": (
        "{id: some/model}",
        "{config: {hidden_size: 8}, weights: random}",
        2,
        "model.config",
        ["no model_type"],
    ),
    "weights that are not random": (
        "{id: some/model}",
        "{config: {model_type: gpt2}, weights: trained}",
        2,
        "model.weights",
        ["'trained'", "'random'"],
    ),
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
    "a number of yes": ("l0: 4}", "l0: 4, multi_topk: yes}", 7, "saes.0.multi_topk", ["True"]),
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
    began = time.process_time()
    message = refusal(tmp_path, "\n".join([*lines, *kept, f"{key}: *a29"]))
    assert time.process_time() - began < 1
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
    found = dataclasses.asdict(suite.recipe(variant, {"lr": 0.5}))
    inner = found.pop("inner", None)
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}
    assert plain == baseline | {"lr": 0.5}
    assert inner is None or inner["lr"] == 0.5


@pytest.mark.parametrize("path", registry.suites(), ids=lambda path: path.stem)
def test_the_suites_that_come_along_are_valid(path: Path):
    assert suite.load(path).name == path.stem


@pytest.mark.parametrize("name", ["pythia-70m", "pythia-160m", "gpt2-small", "gemma-2-2b"])
def test_a_public_suite_is_the_standard_grid(name: str):
    found = suite.load(registry.folder("suites") / f"{name}.yaml")
    saes = found.trained()
    assert len(saes) == len({sae.name for sae in saes}) == 7 * 6 * 3
    assert {sae.l0 for sae in saes} == {20, 40, 80, 160, 320, 640}
    assert {sae.width for sae in saes} == {4096, 16384, 65536}
    assert found.text.train_tokens == 500_000_000
    # What no one has looked up is not written: a hash would be.
    assert found.model.revision == ("step143000" if name.startswith("pythia") else None)


@pytest.mark.parametrize("name", ["pythia-70m", "pythia-160m", "gpt2-small", "gemma-2-2b"])
def test_a_public_suite_says_how_to_rehearse_it(tmp_path: Path, name: str):
    """The line in the comment is one that can be put in the place of the model."""
    text = (registry.folder("suites") / f"{name}.yaml").read_text(encoding="utf-8")
    (said,) = [line for line in text.splitlines() if line.startswith("#   model: ")]
    (model,) = [line for line in text.splitlines() if line.startswith("model: ")]
    found = loaded(tmp_path, text.replace(model, said.removeprefix("#   "))).model
    assert found.weights == "random"
    assert isinstance(found.config, dict)
    assert found.dtype == suite.load(registry.folder("suites") / f"{name}.yaml").model.dtype


def test_a_model_may_be_an_architecture_alone(tmp_path):
    text = VALID.replace("{id: some/model}", "{config: {model_type: gpt2}, weights: random}")
    assert loaded(tmp_path, text).model.config == {"model_type": "gpt2"}
    named = VALID.replace("{id: some/model}", "{config: folder/config.json, weights: random}")
    assert loaded(tmp_path, named).model.config == "folder/config.json"


def test_a_definition_is_plain_data_with_every_default_filled_in(tmp_path):
    definition = json.loads(json.dumps(loaded(tmp_path, VALID).definition(), allow_nan=False))
    absent = dict.fromkeys(("revision", "config", "weights", "tokenizer"))
    assert definition["model"] == absent | {"id": "some/model", "dtype": "float32"}
    assert definition["sites"] == ["1.resid_post"]
    sweeps = {"variant": "topk", "width": [32], "l0": [4.0], "seed": [0]}
    assert definition["saes"] == [sweeps | {"reads": None, "predicts": None, "of": None}]
    assert definition["reports"][0]["leaderboard"]["formats"] == ["md", "csv", "tex"]


# Variants that need more than a width and an L0


def with_saes(*entries: str) -> str:
    """The valid suite, with these SAEs; the first is on line 7."""
    lines = "".join(f"\n  - {{{entry}}}" for entry in entries)
    return VALID.replace("\n  - {variant: topk, width: 32, l0: 4}", lines)


PAIR = "reads: 1.mlp_in, predicts: 1.mlp_out"
SHAPE = "width: 32, l0: 4"

# (the entry of the SAE, field, parts of the message)
BAD_RECIPES = {
    "l0 above the width": ("variant: relu, width: 32, l0: 33", "l0", ["33", "from 1 to 32"]),
    "l0 below one": ("variant: gated, width: 32, l0: 0.5", "l0", ["0.5", "from 1 to 32"]),
    "l0 of zero": ("variant: relu, width: 32, l0: 0", "l0.0", ["0"]),
    "one of several l0 above the width": (
        "variant: jumprelu, width: [64, 32], l0: [8, 40]",
        "l0",
        ["l0 is 40", "width 32"],
    ),
    "k that is not whole": ("variant: topk, width: 32, l0: 4.5", "l0", ["4.5", "topk", "whole"]),
    "k of a transcoder that is not whole": (
        f"variant: transcoder, width: 32, l0: 4.5, {PAIR}",
        "l0",
        ["4.5", "topk", "whole"],
    ),
    "l0 of a transcoder above its width": (
        f"variant: skip_transcoder, activation: relu, width: 32, l0: 33, {PAIR}",
        "l0",
        ["33", "from 1 to 32"],
    ),
    "negative width": ("variant: tied, width: -32, l0: 4", "width.0", ["-32"]),
    "unknown option": (f"variant: p_anneal, {SHAPE}, p_ende: 0.5", "p_ende", ["mean 'p_end'"]),
    "option of another variant": (
        f"variant: relu, {SHAPE}, k_anneal: 0.5",
        "k_anneal",
        ["relu has no parameter 'k_anneal'"],
    ),
    "unknown option of the activation": (
        f"variant: transcoder, activation: jumprelu, {SHAPE}, {PAIR}, bandwith: 0.1",
        "bandwith",
        ["jumprelu has no parameter 'bandwith'", "mean 'bandwidth'"],
    ),
    "option of another activation": (
        f"variant: transcoder, {SHAPE}, {PAIR}, bandwidth: 0.1",
        "bandwidth",
        ["topk has no parameter 'bandwidth'"],
    ),
    "unknown activation": (
        f"variant: transcoder, activation: topkk, {SHAPE}, {PAIR}",
        "",
        ["'topkk'", "mean 'topk'"],
    ),
    "activation that is bound to one site": (
        f"variant: transcoder, activation: tied, {SHAPE}, {PAIR}",
        "",
        ["tied", "cannot predict another site"],
    ),
    "prefixes that do not ascend": (
        f"variant: matryoshka, {SHAPE}, prefixes: [[0.5, 0.25, 1.0]]",
        "",
        ["[0.5, 0.25, 1.0]", "ascending"],
    ),
    "prefixes that do not end with all": (
        f"variant: matryoshka, {SHAPE}, prefixes: [0.25, 0.5]",
        "",
        ["[0.25, 0.5]", "end with 1"],
    ),
    "a prefix that is no number": (
        f"variant: matryoshka, {SHAPE}, prefixes: [.nan, 1.0]",
        "prefixes",
        ["prefixes is (nan, 1.0)", "expected finite numbers"],
    ),
    "annealing that ends before it starts": (
        f"variant: p_anneal, {SHAPE}, anneal_start: 0.5, anneal_end: 0.4",
        "",
        ["anneal_end is 0.4", "more than anneal_start"],
    ),
    "negative noise": (f"variant: topk, {SHAPE}, input_noise: -0.1", "input_noise", ["-0.1"]),
    "resampling half a time": (f"variant: relu, {SHAPE}, resamplings: 0.5", "resamplings", ["0.5"]),
    "unknown sparsity loss": (
        f"variant: jumprelu, {SHAPE}, sparsity_loss: tan",
        "sparsity_loss",
        ["'tan'", "'tanh'"],
    ),
    "a transcoder that reads nothing": (
        f"variant: transcoder, {SHAPE}, predicts: 1.mlp_out",
        "reads",
        ["transcoder needs reads"],
    ),
    "a transcoder that predicts nothing": (
        f"variant: skip_transcoder, {SHAPE}, reads: 1.mlp_in",
        "predicts",
        ["skip_transcoder needs predicts"],
    ),
    "an SAE with a site of its own": (
        f"variant: relu, {SHAPE}, reads: 1.mlp_in",
        "reads",
        ["relu reads and predicts one site; remove reads"],
    ),
    "an SAE with a target": (
        f"variant: end_to_end, {SHAPE}, predicts: 1.mlp_out",
        "predicts",
        ["remove predicts"],
    ),
    "a target that is what is read": (
        f"variant: skip_transcoder, {SHAPE}, reads: 1.mlp_in, predicts: blocks.1.mlp.hook_in",
        "predicts",
        ["reads 1.mlp_in and predicts the same", "name another site"],
    ),
    "a target that is no site": (
        f"variant: transcoder, {SHAPE}, reads: 1.mlp_in, predicts: 1.mlp_outt",
        "predicts",
        ["mlp_outt", "mlp_out"],
    ),
    "a rescaled SAE of nothing": (f"variant: rescaled, {SHAPE}", "of", ["rescaled needs of"]),
    "an SAE that starts from no other": (
        f"variant: topk, {SHAPE}, of: relu",
        "of",
        ["topk starts from no other SAE; remove of"],
    ),
}


@pytest.mark.parametrize(("entry", "field", "parts"), BAD_RECIPES.values(), ids=BAD_RECIPES)
def test_bad_recipes_are_refused_with_their_line_before_a_model_is_loaded(
    tmp_path: Path, entry: str, field: str, parts: list[str]
):
    """The model of the suite does not exist: nobody asks for it."""
    message = refusal(tmp_path, with_saes(entry))
    place = ".".join(["saes.0", *([field] if field else [])])
    assert message.startswith(f"{tmp_path / 'suite.yaml'}:7: {place}"), message
    for part in parts:
        assert part in message


def test_what_is_wrong_with_several_fields_together_is_all_that_is_told(tmp_path):
    """And not the value of every other field."""
    message = refusal(tmp_path, with_saes(f"variant: matryoshka, {SHAPE}, prefixes: [8, 32]"))
    told = "saes.0: variant matryoshka: prefixes are [8.0, 32.0]; expected ascending shares above 0 that end with 1"
    assert message == f"{tmp_path / 'suite.yaml'}:7: {told}"


def test_a_rescaled_sae_with_two_parents_is_refused(tmp_path: Path):
    parents = f"variant: relu, {SHAPE}, lr: [0.001, 0.002]"
    message = refusal(tmp_path, with_saes(parents, f"variant: rescaled, of: relu, {SHAPE}"))
    assert "relu-w32-l4-s0-lr0.001, relu-w32-l4-s0-lr0.002, and there must be one" in message


@pytest.mark.parametrize(
    "parent",
    [
        "variant: topk, width: 32, l0: 4",
        "variant: relu, width: 64, l0: 4",
        "variant: relu, width: 32, l0: 8",
        "variant: relu, width: 32, l0: 4, seed: 1",
    ],
)
def test_a_rescaled_sae_without_its_parent_in_the_suite_is_refused(tmp_path: Path, parent: str):
    message = refusal(tmp_path, with_saes(parent, f"variant: rescaled, of: relu, {SHAPE}"))
    assert message.startswith(f"{tmp_path / 'suite.yaml'}:6: saes: rescaled-w32-l4-s0")
    assert "a relu SAE of width 32, l0 4 and seed 0; the suite trains none" in message


@pytest.mark.parametrize("of", ["transcoder", "rescaled"])
def test_a_parent_gives_back_what_it_reads_and_has_no_parent_itself(tmp_path: Path, of: str):
    text = with_saes(
        f"variant: transcoder, {SHAPE}, reads: 1.resid_post, predicts: 1.mlp_out",
        f"variant: relu, {SHAPE}",
        f"variant: rescaled, of: {of}, {SHAPE}",
    )
    assert f"starts from a {of} SAE" in refusal(tmp_path, text)


def test_a_rescaled_sae_starts_from_the_one_of_its_shape_at_its_site(tmp_path):
    text = with_saes(
        "variant: rescaled, of: relu, width: 32, l0: [4, 8], seed: 1",
        "variant: relu, width: [16, 32], l0: [4, 8], seed: [0, 1]",
        "variant: topk, width: 32, l0: [4, 8], seed: 1",
    ).replace("[{layer: 1, stream: resid_post}]", "[0.resid_post, 1.mlp_out]")
    found = loaded(tmp_path, text)
    parents = {sae.name: found.parent(sae).name for sae in found.trained() if sae.of}
    assert parents == {
        f"rescaled-w32-l{l0}-s1-{site}": f"relu-w32-l{l0}-s1-{site}"
        for l0 in (4, 8)
        for site in ("0.resid_post", "1.mlp_out")
    }
    assert all(found.parent(sae) is None for sae in found.trained() if not sae.of)


def test_transcoders_have_sites_of_their_own_and_all_sites_are_known(tmp_path):
    text = with_saes(f"variant: topk, {SHAPE}", f"variant: transcoder, {SHAPE}, {PAIR}")
    found = loaded(tmp_path, text)
    sites = {sae.name: (str(sae.site), str(sae.target)) for sae in found.trained()}
    assert sites == {
        "topk-w32-l4-s0": ("1.resid_post", "1.resid_post"),
        "transcoder-w32-l4-s0": ("1.mlp_in", "1.mlp_out"),
    }
    assert [str(site) for site in found.all_sites()] == ["1.resid_post", "1.mlp_in", "1.mlp_out"]


def test_several_pairs_of_sites_are_part_of_the_names_of_transcoders(tmp_path):
    other = "reads: 0.mlp_in, predicts: 0.mlp_out"
    text = with_saes(
        f"variant: transcoder, {SHAPE}, {PAIR}", f"variant: skip_transcoder, {SHAPE}, {other}"
    )
    assert [sae.name for sae in loaded(tmp_path, text).trained()] == [
        "transcoder-w32-l4-s0-1.mlp_in-1.mlp_out",
        "skip_transcoder-w32-l4-s0-0.mlp_in-0.mlp_out",
    ]


def test_several_sites_of_a_suite_do_not_multiply_its_transcoders(tmp_path):
    text = with_saes(f"variant: transcoder, {SHAPE}, {PAIR}").replace(
        "[{layer: 1, stream: resid_post}]", "[0.resid_post, 1.resid_post]"
    )
    assert [sae.name for sae in loaded(tmp_path, text).trained()] == ["transcoder-w32-l4-s0"]


@pytest.mark.parametrize(
    ("entry", "names"),
    {
        "texts": (
            "variant: jumprelu, width: 32, l0: 4, sparsity_loss: [quadratic, tanh]",
            ["jumprelu-w32-l4-s0-sparsity_lossquadratic", "jumprelu-w32-l4-s0-sparsity_losstanh"],
        ),
        "activations": (
            f"variant: transcoder, {SHAPE}, {PAIR}, activation: [topk, relu]",
            ["transcoder-w32-l4-s0-activationtopk", "transcoder-w32-l4-s0-activationrelu"],
        ),
        "an option of the activation": (
            f"variant: transcoder, activation: relu, {SHAPE}, {PAIR}, penalty: [3e-2, 0.1]",
            ["transcoder-w32-l4-s0-penalty0.03", "transcoder-w32-l4-s0-penalty0.1"],
        ),
        "whole numbers": (
            f"variant: relu, {SHAPE}, resamplings: [0, 4]",
            ["relu-w32-l4-s0-resamplings0", "relu-w32-l4-s0-resamplings4"],
        ),
        "yes and no": (
            f"variant: matryoshka, {SHAPE}, random_prefixes: [false, true]",
            [
                "matryoshka-w32-l4-s0-random_prefixesFalse",
                "matryoshka-w32-l4-s0-random_prefixesTrue",
            ],
        ),
        "one list, which is one value": (
            f"variant: matryoshka, {SHAPE}, prefixes: [0.25, 1.0]",
            ["matryoshka-w32-l4-s0"],
        ),
        "lists": (
            f"variant: matryoshka, {SHAPE}, prefixes: [[0.25, 1.0], [0.5, 1.0]]",
            ["matryoshka-w32-l4-s0-prefixes0.25-1", "matryoshka-w32-l4-s0-prefixes0.5-1"],
        ),
    }.values(),
)
def test_swept_options_of_every_kind_are_part_of_the_name(
    tmp_path: Path, entry: str, names: list[str]
):
    saes = loaded(tmp_path, with_saes(entry)).trained()
    assert [sae.name for sae in saes] == names
    assert len({repr(sae.recipe) for sae in saes}) == len({s.family for s in saes}) == len(names)


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


def test_a_draw_that_there_is_not_is_refused(tmp_path: Path):
    drawn = VALID.replace("eval_tokens: 600", "eval_tokens: 600, eval_draws: 3, eval_draw: {}")
    assert "eval_draw is 3" in refusal(tmp_path, drawn.replace("{}", "3"))
    assert loaded(tmp_path, drawn.replace("{}", "2")).text.eval_draw == 2
