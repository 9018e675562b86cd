"""`saebench export` and `saebench import`, and the reference results that are kept in the form of an import."""

import csv
import hashlib
import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from saebench import exchange, results
from saebench.checkpoints import open_checkpoint
from saebench.exports._export import Export, Origin
from saebench.exports.sae_lens import SAELens
from saebench.loaders._files import Limits
from saebench.loaders._loader import Told
from saebench.reports.pareto import Pareto
from saebench.saes._dictionary import Dictionary
from saebench.saes.relu import ReLU
from saebench.saes.topk import TopK
from saebench.types import Site
from tests.conftest import Run
from tests.test_peer_json import board, published
from tests.test_peer_json import write as write_result

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "results" / "reference"
D, N, K = 5, 11, 3


def sae(kind: type[Dictionary] = TopK) -> Dictionary:
    made = TopK(D, N, k=K) if kind is TopK else kind(D, N)
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return made


def checkpoint(folder: Path, kind: type[Dictionary] = TopK) -> Path:
    """In the format of this project, by its description."""
    folder.mkdir(parents=True)
    made = sae(kind)
    save_file(made.state_dict(), folder / "sae.safetensors")
    record = {
        "format": 2,
        "architecture": {TopK: "topk", ReLU: "relu"}[kind],  # type: ignore[index]
        "arguments": made.arguments(),
        "site": {"layer": 4, "stream": "resid_post"},
        "target": {"layer": 4, "stream": "resid_post"},
        "checksum": hashlib.sha256((folder / "sae.safetensors").read_bytes()).hexdigest(),
        "training": {"model": {"id": "org/model"}},
    }
    (folder / "sae.json").write_text(json.dumps(record))
    return folder


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Checkpoints


@pytest.mark.parametrize(
    ("kind", "format", "files"),
    [
        (TopK, "sae_lens", ["cfg.json", "sae_weights.safetensors"]),
        (TopK, "dictionary_learning", ["ae.pt", "config.json"]),
        (TopK, "sparsify", ["cfg.json", "sae.safetensors"]),
        (ReLU, "sae_lens", ["cfg.json", "sae_weights.safetensors"]),
        (ReLU, "dictionary_learning", ["ae.pt", "config.json"]),
    ],
)
def test_an_exported_checkpoint_is_the_same_function_when_it_is_read(
    saebench: Run, tmp_path: Path, kind: type[Dictionary], format: str, files: list[str]
):
    given, out = checkpoint(tmp_path / "given", kind), tmp_path / "deep" / "out"
    ended = saebench("export", given, out, "--format", format)
    assert (ended.code, ended.err) == (0, "")
    assert left(out) == files and left(out.parent) == ["out"]
    assert all(f"wrote {out / name}" in ended.out for name in files)
    told = Told(site=Site("resid_post", 4))
    read = open_checkpoint(str(out), format, told, Limits(allow_pickle=True), None, Path())
    theirs, ours = read.members[0].load(), sae(kind)
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(theirs.encode(x), ours.encode(x), rtol=1e-5, atol=1e-5)
    assert read.members[0].model in ("org/model", None)


def test_weights_that_sae_lens_keeps_as_they_are_come_back_bit_by_bit(
    saebench: Run, tmp_path: Path
):
    given, out = checkpoint(tmp_path / "given"), tmp_path / "out"
    assert saebench("export", given, out, "--format", "sae_lens").code == 0
    before = load_file(given / "sae.safetensors")
    after = load_file(out / "sae_weights.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


class Wrong(Export):
    """Writes what `change` makes of the SAE."""

    change: Any

    def write(self, sae: Dictionary, origin: Origin, folder: Path) -> None:
        SAELens().write(type(self).change(sae), origin, folder)


def scaled_decoder(given: Dictionary) -> Dictionary:
    given.W_dec.data *= 1 + 1e-3
    return given


def moved_bias(given: Dictionary) -> Dictionary:
    given.get_parameter("b_enc").data += 0.1
    return given


def fewer_active(given: Dictionary) -> Dictionary:
    fewer = TopK(D, N, k=K - 1)
    fewer.load_state_dict(given.state_dict())
    return fewer


def broken(given: Dictionary) -> Dictionary:
    raise OSError("no space")


@pytest.mark.parametrize("change", [scaled_decoder, moved_bias, fewer_active, broken])
def test_another_function_than_the_checkpoint_is_not_handed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any
):
    wrong = type("WrongHere", (Wrong,), {"change": staticmethod(lambda s: change(_copy(s)))})
    get = exchange.registry.get
    monkeypatch.setattr(
        exchange.registry, "get", lambda kind, name: wrong if kind == "exports" else get(kind, name)
    )
    given = checkpoint(tmp_path / "given")
    opened = open_checkpoint(str(given), "native", Told(), Limits(), None, Path())
    with pytest.raises((exchange.UserError, OSError), match="read back|no space"):
        exchange.export(opened, Told(), "sae_lens", tmp_path / "out")
    assert left(tmp_path) == ["given"]


def _copy(given: Dictionary) -> Dictionary:
    copied = TopK(D, N, k=K)
    copied.load_state_dict(given.state_dict())
    return copied


@pytest.mark.parametrize("there", ["file", "full"])
def test_export_never_writes_over_what_is_there(saebench: Run, tmp_path: Path, there: str):
    given, out = checkpoint(tmp_path / "given"), tmp_path / "out"
    if there == "full":
        out.mkdir()
    kept = out / "kept" if there == "full" else out
    kept.write_text("mine")
    ended = saebench("export", given, out, "--format", "sae_lens")
    assert ended.code == 2 and "is there already" in ended.err
    assert kept.read_text() == "mine" and left(tmp_path) == ["given", "out"]


def test_an_empty_folder_may_be_exported_into(saebench: Run, tmp_path: Path):
    (tmp_path / "out").mkdir()
    given = checkpoint(tmp_path / "given")
    assert saebench("export", given, tmp_path / "out", "--format", "sae_lens").code == 0
    assert "cfg.json" in left(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--format", "onnx"],
            "--format is 'onnx'; expected one of dictionary_learning, ",
        ),
        (["--format", "sae_lens", "--mode", "native"], "--mode and --sae are about results"),
        (["--format", "sae_lens", "--site", "9.resid_post"], "was trained at 4.resid_post"),
        (["--format", "sparsify"], "sparsify has TopK"),
        (["--format", "sae_bench_json"], "--mode is not given; expected one of sb-0125"),
        (["--format", "sae_bench_json", "--mode", "sb"], "--mode is 'sb'; expected one of sb-0125"),
        (["--format", "sae_bench_json", "--site", "4.resid_post"], "are about checkpoints"),
        (["--format", "sae_bench_json", "--mode", "native"], "no results of a suite here"),
    ],
)
def test_export_says_what_it_cannot_do_and_writes_nothing(
    saebench: Run, tmp_path: Path, options: list[str], message: str
):
    given = checkpoint(tmp_path / "given", ReLU)
    ended = saebench("export", given, tmp_path / "out", *options)
    assert ended.code == 2 and message in ended.err
    assert left(tmp_path) == ["given"]


# Results


def test_results_go_out_as_files_and_come_back_as_rows(saebench: Run, tmp_path: Path):
    folder, out, back = board(tmp_path / "r"), tmp_path / "out", tmp_path / "back"
    ended = saebench("export", folder, out, "--format", "sae_bench_json", "--mode", "sb-0.6")
    path = out / "core" / "toy_sae_eval_results.json"
    assert (ended.code, ended.out) == (0, f"wrote {path}\n")
    ended = saebench("import", path, back)
    assert ended.code == 0 and "1 file read, 1 of them new" in ended.out
    assert "1 file read, 0 of them new" in saebench("import", path, back).out
    shown = saebench("report", back, "--sort", "loss_recovered")
    assert shown.code == 0 and "toy_sae" in shown.out and "(imported)" in shown.out


def test_import_refuses_the_folder_of_a_suite(saebench: Run, tmp_path: Path):
    path = write_result(tmp_path / "files", published())
    ended = saebench("import", path, board(tmp_path / "r"))
    assert ended.code == 2 and "never mixed" in ended.err


# The reference


def _tool() -> Any:
    spec = importlib.util.spec_from_file_location("made", ROOT / "tools/reference_results.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _table() -> list[dict[str, str]]:
    with (REFERENCE / "loss_recovered.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_reference_table_has_every_sae_of_the_published_suite_once():
    rows = _table()
    assert len(rows) == 252 == len({tuple(row.values())[:6] for row in rows})
    places = Counter((row["model"], row["width"], row["variant"]) for row in rows)
    assert len(places) == 2 * 3 * 7 and set(places.values()) == {6}


def test_the_reference_table_has_the_means_that_its_source_gives():
    """Of the widest SAEs on Gemma, over six sparsities, as the source rounds them."""
    given = {
        "gated": 0.9939,
        "batch_topk": 0.9908,
        "p_anneal": 0.9906,
        "jumprelu": 0.9901,
        "topk": 0.9899,
        "matryoshka": 0.9896,
        "standard": 0.9884,
    }
    wide = [row for row in _table() if (row["model"], row["width"]) == ("gemma-2-2b", "65536")]
    for variant, mean in given.items():
        found = [float(row["loss_recovered"]) for row in wide if row["variant"] == variant]
        assert abs(np.mean(found) - mean) <= 0.00006


def test_the_reference_results_are_those_of_the_table():
    scores = results.read(REFERENCE).scores.pivot(index="sae", columns="metric", values="value")
    table = {
        f"{r['model']}-w{r['width']}-{r['variant']}-t{r['trainer']}": (
            float(r["l0"]),
            float(r["loss_recovered"]),
        )
        for r in _table()
    }
    found = {str(row.Index): (row.l0, row.loss_recovered) for row in scores.itertuples()}
    assert found == table


def test_the_tool_makes_the_reference_results_anew_as_they_are(tmp_path: Path):
    from saebench import peer_json

    rows = _tool().read(REFERENCE / "loss_recovered.csv")
    peer_json.add(rows, tmp_path / "reference")
    kept = {p.relative_to(REFERENCE): p for p in REFERENCE.rglob("*.json")}
    made = {p.relative_to(tmp_path / "reference") for p in tmp_path.rglob("*.json")}
    assert made == kept.keys() and len(kept) == 253
    for name, path in kept.items():
        assert (tmp_path / "reference" / name).read_bytes() == path.read_bytes()


def test_the_known_figure_has_a_line_of_six_for_each_of_seven_variants(
    saebench: Run, tmp_path: Path
):
    one = ("--site", "gemma-2-2b 12.resid_post", "--width", "16384", "--out", tmp_path / "f.pdf")
    assert saebench("plot", REFERENCE, *one).code == 0
    assert (tmp_path / "f.pdf").read_bytes().startswith(b"%PDF")


def test_many_lines_of_several_widths_get_a_panel_for_each_width():
    figure = Pareto(x="l0", y="loss_recovered").draw(results.read(REFERENCE))
    titles = [panel.get_title() for panel in figure.axes]
    assert titles == [
        f"{site},\nwidth {width}"
        for site in ("gemma-2-2b 12.resid_post", "pythia-160m-deduped 8.resid_post")
        for width in ("4,096", "16,384", "65,536")
    ]
    for panel in figure.axes:
        places = [len(container.lines[0].get_xdata()) for container in panel.containers]
        assert len(places) == 42
        assert len({line.get_color() for line in panel.lines}) == 7
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 7


def test_a_figure_of_a_place_that_is_not_there_names_those_that_are(saebench: Run, tmp_path: Path):
    ended = saebench("plot", REFERENCE, "--width", "3", "--out", tmp_path / "f.pdf")
    assert ended.code == 2 and "gemma-2-2b 12.resid_post with width 16384" in ended.err
    assert not (tmp_path / "f.pdf").exists()
