"""Bundles: what is written, and every way in which one is refused."""

import hashlib
import io
import json
import stat
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saebench import bundle, results, submitted
from saebench.errors import UserError
from saebench.results import Entry, ScoreRow
from saebench.submitted import Submission
from tests import boards

CHECKSUM = "ab" * 32
ENTRY = Entry("checkpoint", "native", 64, None, None, boards.SITE)
DATE = (1980, 1, 1, 0, 0, 0)


def unpacked(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def repacked(members: Mapping[str, bytes], out: Path, relist: bool = True) -> Path:
    """A bundle with these members; with `relist` its list of files is that of them."""
    members = dict(members)
    if relist:
        manifest = json.loads(members["manifest.json"])
        manifest["files"] = {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in members.items()
            if name != "manifest.json"
        }
        members["manifest.json"] = json.dumps(manifest).encode()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name, DATE), data)
    return out


def folder_with(path: Path, rows: list[ScoreRow], name: str = "mine") -> Path:
    """Results with one submission of one run."""
    spec = {
        "sae": {"name": name, "checksum": CHECKSUM},
        "site": boards.SITE,
        "model": {"id": "m"},
        "text": {"fingerprint": "f", "context": 8, "sequences": 20},
        "eval": {"name": "core", "version": 1, "params": {}},
    }
    run = results.write(path, spec, rows, [], {"saebench": "0"})
    file = f"runs/{run.name}"
    definition = boards.DEFINITION | {"name": "toy"}
    results.write_manifest(path, "toy", definition, {name: ENTRY}, [file])
    told = Submission(ENTRY, CHECKSUM, "native", {"from": "local"}, {}, (file,))
    submitted.write(path, {name: told})
    return path


def plain_rows() -> list[ScoreRow]:
    tokens = np.full(20, 7.0)
    rng = np.random.default_rng(0)
    return [
        boards.row("l0", rng.integers(40, 60, 20), den=tokens, n=140, best=None),
        boards.row(
            "explained_variance", rng.uniform(0.7, 0.9, 20) * 3, den=np.full(20, 3.0), n=140
        ),
    ]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    out = tmp_path / "mine.zip"
    bundle.write(folder_with(tmp_path / "results", plain_rows()), "mine", out)
    return out


def problems(path: Path) -> str:
    return "\n".join(bundle.inspect(path).problems)


RUN = "runs/mine--core--"


def run_name(members: Mapping[str, bytes], ending: str = ".json") -> str:
    return next(name for name in members if name.startswith(RUN) and name.endswith(ending))


# Writing


def test_a_bundle_has_the_run_files_as_they_are(made: Path, tmp_path: Path):
    members = unpacked(made)
    runs = {f"runs/{p.name}": p.read_bytes() for p in (tmp_path / "results/runs").iterdir()}
    manifest = json.loads(members.pop("manifest.json"))
    assert members == runs
    assert manifest["suite"]["definition"]["model"] == {"id": "m"}
    for name, data in runs.items():
        listed = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        assert manifest["files"][name] == listed


def test_the_same_submission_gives_the_same_bytes(made: Path, tmp_path: Path):
    again = tmp_path / "again.zip"
    bundle.write(tmp_path / "results", "mine", again)
    assert again.read_bytes() == made.read_bytes()


def test_a_bundle_is_read_with_its_units(made: Path):
    found = bundle.read(made)
    (run,) = found.runs.values()
    assert (found.name, found.suite, found.checksum) == ("mine", "toy", CHECKSUM)
    assert len(run.units["l0"].num) == 20


def test_results_that_were_edited_are_not_bundled(tmp_path: Path):
    folder = folder_with(tmp_path / "results", plain_rows())
    (file,) = (folder / "runs").glob("*.json")
    run = json.loads(file.read_text())
    run["scores"][1]["value"] = 0.99
    file.write_text(json.dumps(run))
    with pytest.raises(UserError, match="its value is 0.99, and its units give"):
        bundle.write(folder, "mine", tmp_path / "out.zip")
    assert not (tmp_path / "out.zip").exists()


def test_what_was_never_submitted_has_no_bundle(tmp_path: Path):
    folder = folder_with(tmp_path / "results", plain_rows())
    with pytest.raises(UserError, match="no submission 'other'; there are: mine"):
        bundle.write(folder, "other", tmp_path / "out.zip")


def test_a_bundle_that_is_refused_is_refused_with_all_reasons(made: Path, tmp_path: Path):
    members = unpacked(made)
    run = json.loads(members[run_name(members)])
    run["scores"][0]["value"] = 1.0
    run["scores"][1]["value"] = 2.0
    members[run_name(members)] = json.dumps(run).encode()
    path = repacked(members, tmp_path / "bad.zip", relist=False)
    with pytest.raises(UserError) as refused:
        bundle.read(path)
    for reason in (
        "its SHA-256 differs",
        "l0: its value is 1,",
        "explained_variance: its value is 2; none is outside",
        "explained_variance: its value is 2, and its units give",
    ):
        assert reason in str(refused.value)


# Taking one in


def suite_of_another(path: Path, fingerprint: str = "f", **changes: Any) -> Path:
    """Results of the same suite, with an SAE of its own."""
    saes = {"topk": (boards.trained("topk"), plain_rows())}
    boards.write(path, saes, text={"fingerprint": fingerprint, "context": 8, "sequences": 20})
    definition = boards.DEFINITION | {"name": "toy"} | changes
    runs = [f"runs/{p.name}" for p in (path / "runs").glob("*.json")]
    results.write_manifest(path, "toy", definition, {"topk": boards.trained("topk")}, runs)
    return path


def test_a_bundle_that_is_taken_in_stands_beside_the_saes_of_its_suite(made: Path, tmp_path: Path):
    folder = suite_of_another(tmp_path / "public")
    assert bundle.adopt(made, folder, replace=False) == "mine"
    scores = results.read(folder).scores
    own = results.read(tmp_path / "results").scores
    assert set(scores["sae"]) == {"topk", "mine"}
    values = scores[scores["sae"] == "mine"].set_index("metric")["value"]
    assert values.to_dict() == own.set_index("metric")["value"].to_dict()
    again = tmp_path / "again.zip"
    bundle.write(folder, "mine", again)
    assert unpacked(again).keys() == unpacked(made).keys()


def test_taking_in_the_same_bundle_twice_changes_nothing(made: Path, tmp_path: Path):
    folder = suite_of_another(tmp_path / "public")
    bundle.adopt(made, folder, replace=False)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    bundle.adopt(made, folder, replace=False)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_bundle_of_another_suite_text_or_with_a_taken_name_is_not_taken_in(
    made: Path, tmp_path: Path
):
    other = suite_of_another(tmp_path / "other", model={"id": "n"})
    with pytest.raises(UserError, match="another model"):
        bundle.adopt(made, other, replace=False)
    with pytest.raises(UserError, match="scored on another text"):
        other_text = suite_of_another(tmp_path / "text", fingerprint="g")
        bundle.adopt(made, other_text, replace=False)
    taken = suite_of_another(tmp_path / "taken")
    runs = results.runs(taken)
    definition = results.definition(taken)
    results.write_manifest(taken, "toy", definition, {"mine": boards.trained("topk")}, runs)
    with pytest.raises(UserError, match="of the suite's own"):
        bundle.adopt(made, taken, replace=False)
    assert not (taken / "submissions.json").exists()


def rescored(path: Path, more: float) -> Path:
    """A bundle of the same weights with other numbers of the first sequence."""
    rows = plain_rows()
    rows[1].num[0] += more
    out = path / "mine.zip"
    bundle.write(folder_with(path / "results", rows), "mine", out)
    return out


def test_other_numbers_of_what_was_adopted_are_refused_and_nothing_changes(
    made: Path, tmp_path: Path
):
    folder = suite_of_another(tmp_path / "public")
    bundle.adopt(made, folder, replace=False)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=r"another content of runs/mine--core.*--replace"):
        bundle.adopt(rescored(tmp_path / "again", 0.1), folder, replace=False)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_another_record_of_the_same_runs_is_refused(made: Path, tmp_path: Path):
    folder = suite_of_another(tmp_path / "public")
    bundle.adopt(made, folder, replace=False)
    members = unpacked(made)
    manifest = json.loads(members["manifest.json"])
    manifest["submission"]["entry"]["variant"] = "topk"
    members["manifest.json"] = json.dumps(manifest).encode()
    other = repacked(members, tmp_path / "other.zip")
    with pytest.raises(UserError, match="with another entry"):
        bundle.adopt(other, folder, replace=False)


def test_what_is_replaced_is_kept_as_history_each_time(made: Path, tmp_path: Path):
    folder = suite_of_another(tmp_path / "public")
    bundle.adopt(made, folder, replace=False)
    (run,) = submitted.read(folder)["mine"].runs
    versions = [(folder / run).read_bytes()]
    for more in (0.05, 0.1):
        again = rescored(tmp_path / f"again-{more}", more)
        bundle.adopt(again, folder, replace=True)
        versions.append((folder / run).read_bytes())
        assert versions[-1] == unpacked(again)[run]
    assert len(set(versions)) == 3
    place = folder / "history" / f"mine--{CHECKSUM[:12]}"
    kept = [place / run, place.with_name(place.name + "-2") / run]
    assert [p.read_bytes() for p in kept] == versions[:2]
    assert results.runs(folder).count(run) == 1


def test_other_weights_under_a_name_are_refused_or_replace_its_runs(made: Path, tmp_path: Path):
    folder = suite_of_another(tmp_path / "public")
    bundle.adopt(made, folder, replace=False)
    (old,) = submitted.read(folder)["mine"].runs
    members = unpacked(made)
    for name in [n for n in members if n != "manifest.json"]:
        data = members.pop(name)
        if name.endswith(".json"):
            run = json.loads(data)
            run["spec"]["sae"]["checksum"] = "cd" * 32
            new = f"runs/{results.run_file(Path(), run['spec']).name}"
            members[new] = json.dumps(run).encode()
            units = old.replace(".json", ".units.parquet")
            members[new.replace(".json", ".units.parquet")] = unpacked(made)[units]
    manifest = json.loads(members["manifest.json"])
    manifest["submission"] |= {"checksum": "cd" * 32, "runs": [new]}
    members["manifest.json"] = json.dumps(manifest).encode()
    other = repacked(members, tmp_path / "other.zip")
    with pytest.raises(UserError, match="of other weights"):
        bundle.adopt(other, folder, replace=False)
    bundle.adopt(other, folder, replace=True)
    assert submitted.read(folder)["mine"].checksum == "cd" * 32
    assert old not in results.runs(folder) and not (folder / old).exists()
    assert (folder / "history" / f"mine--{CHECKSUM[:12]}" / old).is_file()


# The archive


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/etc/passwd", "is an absolute name"),
        ("C:/runs/a.json", "is an absolute name"),
        ("../runs/a.json", "leads out of the bundle"),
        ("runs/../../a.json", "leads out of the bundle"),
        ("runs/..\\a.json", "leads out of the bundle"),
        ("weights.safetensors", "does not belong into a bundle"),
        ("runs/a.pkl", "does not belong into a bundle"),
        ("runs/sub/a.json", "does not belong into a bundle"),
        ("runs/", "is no file"),
    ],
)
def test_a_member_with_another_name_is_refused(made: Path, tmp_path: Path, name: str, reason: str):
    members = unpacked(made) | {name: b"{}"}
    assert reason in problems(repacked(members, tmp_path / "bad.zip", relist=False))


def test_a_link_is_refused(made: Path, tmp_path: Path):
    members = unpacked(made)
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name, DATE)
            kind = stat.S_IFLNK if name.endswith("core.json") or RUN in name else stat.S_IFREG
            info.external_attr = (kind | 0o644) << 16
            archive.writestr(info, data)
    assert "is a link" in problems(tmp_path / "bad.zip")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_is_there_twice_is_refused(made: Path, tmp_path: Path):
    members = unpacked(made)
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        for name, data in [
            *members.items(),
            ("manifest.json", b"{}"),
            (run_name(members).upper(), b"{}"),
        ]:
            archive.writestr(zipfile.ZipInfo(name, DATE), data)
    assert problems(tmp_path / "bad.zip").count("is there twice") == 2


def test_a_compressed_member_is_refused_before_it_is_unpacked(made: Path, tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.json", b" " * 10_000_000)
    found = problems(tmp_path / "bad.zip")
    assert "stand for 10,000,000); nothing is, in a bundle" in found


def test_members_that_share_bytes_are_refused(made: Path, tmp_path: Path):
    data = bytearray(made.read_bytes())
    end = struct.unpack("<4s4H2LH", data[-22:])
    directory = end[6]
    second = data.index(b"PK\x01\x02", directory + 4)
    struct.pack_into("<L", data, second + 42, 0)  # the second member begins where the first does
    (tmp_path / "bad.zip").write_bytes(data)
    assert "members overlap or leave gaps" in problems(tmp_path / "bad.zip")


@pytest.mark.parametrize("where", ["before", "after", "between"])
def test_bytes_beside_the_members_are_refused(made: Path, tmp_path: Path, where: str):
    data = made.read_bytes()
    directory = struct.unpack("<4s4H2LH", data[-22:])[6]
    if where == "before":
        data = b"#!/bin/sh\n" + data
    elif where == "after":
        data += b"more"
    else:
        tail = bytearray(data[directory:])
        struct.pack_into("<L", tail, len(tail) - 6, directory + 4)
        data = data[:directory] + b"more" + bytes(tail)
    (tmp_path / "bad.zip").write_bytes(data)
    assert problems(tmp_path / "bad.zip")


def test_more_members_than_a_bundle_has_are_refused(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        for number in range(1_001):
            archive.writestr(f"runs/{number}.json", "")
    assert "it has 1,001 members" in problems(tmp_path / "bad.zip")


def test_a_file_larger_than_any_bundle_is_not_read(tmp_path: Path):
    path = tmp_path / "bad.zip"
    with path.open("wb") as file:
        file.truncate(bundle.MOST_BYTES + 1)
    assert "a bundle has at most" in problems(path)


def test_a_changed_byte_is_found(made: Path, tmp_path: Path):
    data = bytearray(made.read_bytes())
    at = data.index(b"provenance")
    data[at] ^= 1
    (tmp_path / "bad.zip").write_bytes(data)
    assert "is damaged" in problems(tmp_path / "bad.zip")


def test_files_that_are_not_as_listed_are_refused(made: Path, tmp_path: Path):
    members = unpacked(made)
    manifest = json.loads(members["manifest.json"])
    units = run_name(members, ".parquet")
    manifest["files"][units]["bytes"] += 1
    manifest["files"]["runs/more.json"] = manifest["files"].pop(run_name(members))
    members["manifest.json"] = json.dumps(manifest).encode()
    found = problems(repacked(members, tmp_path / "bad.zip", relist=False))
    assert "runs/more.json is listed and not there" in found
    assert f"{run_name(members)} is there and not listed" in found
    assert "are listed" in found


# JSON


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"format": 1, "format": 1}', "'format' is there twice"),
        (b'{"format": NaN}', "NaN is not a number"),
        (b"[]", "it holds no JSON object"),
        (b"\xff", "it cannot be read"),
        (b"[" * 100_000, "it cannot be read"),
        (b'{"format": 2}', "format 2; this version of saebench reads 1"),
        (b'{"format": 1}', "it lacks files, name, saebench, submission, suite"),
    ],
)
def test_a_manifest_that_is_none_is_refused(made: Path, tmp_path: Path, text: bytes, reason: str):
    members = unpacked(made) | {"manifest.json": text}
    assert reason in problems(repacked(members, tmp_path / "bad.zip", relist=False))


Change = Callable[[dict[str, Any]], None]


def entry(field: str, value: Any) -> Change:
    return lambda manifest: manifest["submission"]["entry"].update({field: value})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.update(name="../x"), "cannot name an SAE"),
        (lambda m: m.update(more=1), "has more, which nobody knows"),
        (lambda m: m.update(name="\x1b[2Jx"), "\\x1b[2Jx cannot name an SAE"),
        (lambda m: m["suite"].update(definition=[]), "the definition of the suite is none"),
        (lambda m: m["suite"]["definition"].update(model={"id": "n"}), "not that of its suite"),
        (lambda m: m["submission"].update(checksum="cd" * 32), "its checksum is abab"),
        (lambda m: m["submission"].update(checksum="main"), "is not that of weights"),
        (lambda m: m["submission"].update(origin={"from": "ftp"}), "neither local nor the Hub"),
        (
            lambda m: m["submission"].update(origin={"from": "hub", "revision": "main"}),
            "expected a commit of 40 hexadecimal digits",
        ),
        (lambda m: m["submission"].update(runs=["runs/x.json"]), "and no run of the submission"),
        (lambda m: m["submission"]["runs"].append("runs/x.json"), "and not there"),
        (entry("kind", "trained"), "expected a checkpoint"),
        (entry("width", True), "its width is True"),
        (entry("width", 8), "units have values outside of 0 to 8"),
        (entry("site", "3.resid_post"), "its site is 2.resid_post"),
        (entry("seed", 1), "nobody asked a checkpoint"),
    ],
)
def test_a_manifest_that_says_something_else_is_refused(
    made: Path, tmp_path: Path, change: Change, reason: str
):
    members = unpacked(made)
    manifest = json.loads(members["manifest.json"])
    change(manifest)
    members["manifest.json"] = json.dumps(manifest).encode()
    assert reason in problems(repacked(members, tmp_path / "bad.zip"))


def score(field: str, value: Any, at: int = 0) -> Change:
    return lambda run: run["scores"][at].update({field: value})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (score("value", 50.0), "l0: its value is 50, and its units give"),
        (score("ci_low", 0.5), "l0: its interval is 0.5 to"),
        (score("ci_high", None), "an interval has two ends or none"),
        (score("value", 1e400), "Infinity is not a number"),
        (score("value", "8"), "value is 8, which is no finite number"),
        (score("value", True), "value is True"),
        (score("n", -1), "n is -1; expected a whole number"),
        (score("n", 139), "l0: it is a mean over 139 tokens, and its units have 140"),
        (score("n_units", 19), "19 units are named, and 20 are there"),
        (score("statistic", "mean"), "direction or statistic are none"),
        (score("metric", "<script>"), "cannot name a metric"),
        (score("metric", "l1"), "it has units of l0, and no such score"),
        (score("metric", "l0", at=1), "it has a metric twice"),
        (score("ends", [0]), "ends are [0]"),
        (score("doc", "x" * 3_000), "unit or definition are no text"),
        (score("note", "x"), "a score has note, which nobody knows"),
        (lambda run: run["scores"].append(3), "a score is no JSON object"),
        (lambda run: run.update(omitted=[{"what": 1}]), "no list of what and reason"),
        (lambda run: run.pop("provenance"), "it lacks provenance"),
        (lambda run: run["spec"]["eval"]["params"].update(k=1), "its spec was changed"),
        (lambda run: run["spec"]["sae"].update(checksum="0"), "its spec was changed"),
        (lambda run: run["spec"].update(site=3), "its site is no text"),
    ],
)
def test_a_run_that_says_something_else_is_refused(
    made: Path, tmp_path: Path, change: Change, reason: str
):
    members = unpacked(made)
    run = json.loads(members[run_name(members)])
    change(run)
    text = json.dumps(run)
    members[run_name(members)] = text.encode()
    assert reason in problems(repacked(members, tmp_path / "bad.zip"))


def test_a_skipped_run_has_no_units(made: Path, tmp_path: Path):
    members = unpacked(made)
    run = json.loads(members[run_name(members)])
    skipped = {key: run[key] for key in ("spec", "provenance")} | {"skipped": "why not"}
    members[run_name(members)] = json.dumps(skipped).encode()
    assert "it was skipped, and has units" in problems(repacked(members, tmp_path / "bad.zip"))
    del members[run_name(members, ".parquet")]
    assert problems(repacked(members, tmp_path / "good.zip")) == ""


def test_units_that_are_gone_or_of_no_run_are_refused(made: Path, tmp_path: Path):
    members = unpacked(made)
    members["runs/other.units.parquet"] = members.pop(run_name(members, ".parquet"))
    found = problems(repacked(members, tmp_path / "bad.zip"))
    assert "its units are not there" in found
    assert "runs/other.units.parquet are units of no run" in found


def test_runs_of_two_models_texts_or_checksums_do_not_belong_together(tmp_path: Path):
    folder = folder_with(tmp_path / "results", plain_rows())
    (file,) = (folder / "runs").glob("*.json")
    spec = json.loads(file.read_text())["spec"]
    other = spec | {
        "model": {"id": "n"},
        "text": spec["text"] | {"fingerprint": "g"},
        "eval": spec["eval"] | {"name": "more"},
        "sae": {"name": "mine", "checksum": "cd" * 32},
    }
    more = results.write(folder, other, plain_rows()[:1], [], {})
    records = submitted.read(folder)
    runs = (*records["mine"].runs, f"runs/{more.name}")
    submitted.write(folder, {"mine": records["mine"]._replace(runs=runs)})
    with pytest.raises(UserError) as refused:
        bundle.write(folder, "mine", tmp_path / "out.zip")
    for reason in ("several models", "several evaluation texts", "its checksum is cdcd"):
        assert reason in str(refused.value)


# Units


def parquet(**columns: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return bytes(sink.getvalue())


def own_columns(members: Mapping[str, bytes]) -> dict[str, list[Any]]:
    table = pq.read_table(pa.BufferReader(members[run_name(members, ".parquet")]))
    found: dict[str, list[Any]] = table.to_pydict()
    return found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c["num"].__setitem__(0, float("nan")), "some units are not finite"),
        (lambda c: c["num"].__setitem__(0, None), "some have no value"),
        (lambda c: c["num"].__setitem__(0, 7 * 64 + 1), "1 units have values outside of 0 to 64"),
        (lambda c: c["num"].__setitem__(0, 0.0), "and its units give"),
        (lambda c: c["num"].__setitem__(25, 3.1), "1 units have values outside of -inf to 1"),
        (lambda c: c["den"].__setitem__(25, -3.0), "unit 5 has a denominator below 0"),
        (lambda c: c["unit"].__setitem__(0, 1), "a unit is there twice"),
        (lambda c: c.update(more=c["num"]), "columns are"),
        (lambda c: c.update(num=[1] * 40), "num is not of 64-bit floating-point numbers"),
        (lambda c: c.update(unit=[0.5] * 40), "unit is neither"),
        (lambda c: c.update(metric=[1] * 40), "metric or cluster are not of texts"),
        (lambda c: c.update(cluster=["a", None] * 20), "some units have a cluster"),
        (lambda c: c.update(cluster=["a", "b"] * 20), "its interval is"),
        (lambda c: c.update(metric=["x" * 400] * 40), "more than 300 characters"),
    ],
)
def test_units_that_do_not_fit_their_scores_are_refused(
    made: Path, tmp_path: Path, change: Change, reason: str
):
    members = unpacked(made)
    columns = own_columns(members)
    change(columns)
    members[run_name(members, ".parquet")] = parquet(**columns)
    assert reason in problems(repacked(members, tmp_path / "bad.zip"))


def test_units_that_are_no_parquet_are_refused(made: Path, tmp_path: Path):
    members = unpacked(made)
    members[run_name(members, ".parquet")] = b"PAR1 and so on PAR1"
    assert "units: they cannot be read" in problems(repacked(members, tmp_path / "bad.zip"))


def test_few_bytes_that_stand_for_very_many_rows_are_not_read(made: Path, tmp_path: Path):
    members = unpacked(made)
    rows = 2**24 + 1
    sink = pa.BufferOutputStream()
    codes = pa.DictionaryArray.from_arrays(np.zeros(rows, dtype=np.int8), ["l0"])
    columns = {"metric": codes} | {name: np.zeros(rows) for name in ("num", "den")}
    columns = {"metric": codes, "unit": np.zeros(rows, np.int64)} | columns
    pq.write_table(pa.table(columns), sink, compression="zstd")
    data = bytes(sink.getvalue())
    assert len(data) < 2**20
    members[run_name(members, ".parquet")] = data
    assert "are too many" in problems(repacked(members, tmp_path / "bad.zip"))


# Anything


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=6)
)
def test_bytes_changed_anywhere_change_no_content_or_are_refused_without_an_error(
    made: Path, changes: list[tuple[int, int]]
):
    data = bytearray(made.read_bytes())
    for at, by in changes:
        data[at % len(data)] ^= by
    path = made.with_name("changed.zip")
    path.write_bytes(data)
    # Dates and versions in the headers of a zip file say nothing.
    assert bundle.inspect(path).problems or unpacked(path) == unpacked(made)


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.binary(max_size=400), at=st.integers(0, 10**6))
def test_units_of_any_bytes_are_refused_without_an_error(made: Path, data: bytes, at: int):
    members = unpacked(made)
    name = run_name(members, ".parquet")
    start = at % len(members[name])
    changed = members[name][:start] + data + members[name][start + len(data) :]
    if changed != members[name]:
        members[name] = changed
        bundle.inspect(repacked(members, made.with_name("changed.zip")))


def test_io_is_not_needed_to_say_what_is_no_zip(tmp_path: Path):
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w"):
        pass
    (tmp_path / "empty.zip").write_bytes(sink.getvalue())
    assert problems(tmp_path / "empty.zip") == "it has no manifest.json"
    with pytest.raises(UserError, match="there is no file"):
        bundle.inspect(tmp_path / "none.zip")
