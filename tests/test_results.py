import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from saebench import results
from saebench.errors import UserError
from saebench.results import Entry, ScoreRow

DEFINITION = {
    "model": {"id": "org/model", "revision": "0123456789abcdef", "dtype": "float32"},
    "text": {"dataset": "org/text", "config": None, "split": "train", "context": 64},
}
ENTRY = Entry("trained", "topk", 1024, 16, 0, "2.resid_post")


def spec(sae="topk-16", eval_name="core", version=1, **params):
    return {
        "sae": {"name": sae, "checksum": "abc"},
        "site": "2.resid_post",
        "model": DEFINITION["model"],
        "text": {"fingerprint": "def"},
        "eval": {"name": eval_name, "version": version, "params": params},
    }


def row(metric="l0", num=(1.0, 2.0, 4.0), den=(1.0, 1.0, 2.0), **changes):
    made = ScoreRow(
        metric,
        None,
        "sequence",
        "ratio",
        "doc",
        np.array(num),
        np.array(den),
        10,
        None,
        None,
        None,
        None,
    )
    return made._replace(**changes)


def manifest(folder: Path, *paths: Path, saes=None):
    saes = saes or {"topk-16": ENTRY}
    runs = [f"runs/{path.name}" for path in paths]
    return results.write_manifest(folder, "toy", DEFINITION, saes, runs)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "toy"


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# Writing


def test_a_score_comes_back_as_it_was_written(folder):
    rows = [row(reference=0.5), row("cosine", num=np.arange(50.0), den=np.ones(50), best="max")]
    path = results.write(folder, spec(k=5, a="x"), rows, [], {"seconds": 1})
    manifest(folder, path)
    read = results.read(folder)
    first, second = read.scores.to_dict("records")
    assert first["value"] == 1.75
    assert (first["sae"], first["variant"], first["width"], first["target_l0"]) == (
        "topk-16",
        "topk",
        1024,
        16.0,
    )
    assert (first["params"], first["n"], first["n_units"], first["reference"]) == (
        "a=x, k=5",
        10,
        3,
        0.5,
    )
    assert first["ci_low"] < 1.75 < first["ci_high"]
    assert second["best"] == "max" and second["ci_low"] < 24.5 < second["ci_high"]
    assert read.model == "org/model@01234567, float32"
    assert read.text == "org/text train, sequences of 64 tokens"
    assert read.stale == read.missing == []


def test_what_has_no_interval_reference_or_direction_is_null_in_the_file(folder):
    path = results.write(folder, spec(), [row(num=[3.0], den=[2.0])], [], {})
    (score,) = json.loads(path.read_text())["scores"]
    assert score == {
        "metric": "l0",
        "best": None,
        "unit": "sequence",
        "statistic": "ratio",
        "value": 1.5,
        "ci_low": None,
        "ci_high": None,
        "n": 10,
        "n_units": 1,
        "reference": None,
        "ends": None,
        "doc": "doc",
    }


def test_the_file_name_says_sae_eval_and_hash(folder):
    path = results.write(folder, spec(), [row()], [], {})
    assert path.name == f"topk-16--core--{results.key(spec())}.json"
    assert path == results.run_file(folder, spec())
    assert files(folder) == {f"runs/{path.name}", f"runs/{path.stem}.units.parquet"}


def test_the_order_of_a_spec_does_not_change_its_hash_and_its_content_does():
    assert results.key({"a": 1, "b": {"c": 2, "d": 3}}) == results.key(
        {"b": {"d": 3, "c": 2}, "a": 1}
    )
    assert results.key(spec(k=1)) != results.key(spec(k=2))


def test_the_hash_is_that_of_sha256sum():
    # printf '{"a":1,"b":[2]}' | sha256sum
    done = subprocess.run(
        ["sha256sum"], input=b'{"a":1,"b":[2]}', capture_output=True, check=True
    ).stdout.decode()
    assert results.key({"b": [2], "a": 1}) == done[:12]


@pytest.mark.parametrize(
    "name", ["../up", "a/b", "", ".hidden", "a b", "-x", "a\n", "é", "x" * 101]
)
def test_a_name_that_could_leave_the_folder_is_refused(folder, name):
    with pytest.raises(UserError, match="cannot name an SAE"):
        results.write(folder, spec(sae=name), [row()], [], {})
    assert not folder.exists()


def test_the_same_run_gives_the_same_bytes(tmp_path):
    rng = np.random.default_rng(0)
    rows = [row(m, rng.normal(size=300), np.ones(300)) for m in ("a", "b")]
    paths = [results.write(tmp_path / side, spec(), rows, [], {"x": 1}) for side in "pq"]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    units = [results.units_file(path).read_bytes() for path in paths]
    assert units[0] == units[1]


def test_writing_the_same_again_touches_nothing(folder):
    path = results.write(folder, spec(), [row()], [], {})
    manifest(folder, path)
    before = {name: (folder / name).stat().st_mtime_ns for name in files(folder)}
    results.write(folder, spec(), [row()], [], {})
    assert not manifest(folder, path)
    assert before == {name: (folder / name).stat().st_mtime_ns for name in files(folder)}


def test_whole_files_say_whether_they_changed(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    assert results.write_text_whole(path, "ü")
    assert not results.write_text_whole(path, "ü")
    assert results.write_bytes_whole(path, b"other")
    assert path.read_bytes() == b"other"


@pytest.mark.parametrize(
    "bad",
    [
        {"num": np.array([1.0, np.nan, 1.0])},
        {"den": np.array([1.0, np.inf, 1.0])},
        {"den": np.zeros(3)},
        {"reference": float("nan")},
        {"ids": ("a", "a", "b")},
    ],
)
def test_a_score_that_is_no_number_is_an_error_that_names_the_metric(folder, bad):
    with pytest.raises(ValueError, match="l0"):
        results.write(folder, spec(), [row(**bad)], [], {})
    assert not folder.exists()


def test_a_metric_given_twice_is_an_error(folder):
    with pytest.raises(ValueError, match="once"):
        results.write(folder, spec(), [row(), row()], [], {})


@pytest.mark.parametrize("nth", [1, 2])
def test_a_full_disk_leaves_nothing_behind_and_says_how_much_is_needed(folder, monkeypatch, nth):
    """The first file written is the units, the second the scores; each is synced, then its folder."""
    calls = 0
    real = os.fsync

    def fsync(descriptor):
        nonlocal calls
        calls += 1
        if calls == 2 * nth - 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match=r"disk is full.* needed, .* free") as raised:
        results.write(folder, spec(), [row()], [], {})
    assert "topk-16--core" in str(raised.value)
    assert files(folder) == set()


def test_a_json_that_exists_has_its_units(folder, monkeypatch):
    order = []
    real = results.write_bytes_whole
    monkeypatch.setattr(
        results,
        "write_bytes_whole",
        lambda path, data: order.append(path.suffix) or real(path, data),
    )
    results.write(folder, spec(), [row()], [], {})
    assert order == [".parquet", ".json"]


# Reading


def test_a_skip_keeps_its_reason(folder):
    path = results.write_skip(folder, spec(eval_name="geometry"), "it has no decoder", {})
    manifest(folder, path)
    read = results.read(folder)
    assert read.scores.empty
    (skip,) = read.skips.to_dict("records")
    assert (skip["sae"], skip["eval"], skip["reason"]) == (
        "topk-16",
        "geometry",
        "it has no decoder",
    )


def test_an_earlier_state_is_kept_and_not_shown_and_a_missing_run_is_named(folder):
    old = results.write(folder, spec(k=1), [row()], [], {})
    new = results.write(folder, spec(k=2), [row()], [], {})
    planned = results.run_file(folder, spec(k=3))
    manifest(folder, new, planned)
    read = results.read(folder)
    assert list(read.scores["params"]) == ["k=2"]
    assert read.stale == [f"runs/{old.name}"]
    assert read.missing == [f"runs/{planned.name}"]


def test_a_folder_without_a_manifest_says_what_to_run(tmp_path):
    with pytest.raises(UserError, match="saebench run"):
        results.read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"spec": {}, "provenance": {}}', "\x00", '{"spec": 1}']
)
def test_a_broken_run_file_is_named(folder, text):
    path = results.write(folder, spec(), [row()], [], {})
    manifest(folder, path)
    path.write_text(text)
    with pytest.raises(UserError, match=path.name):
        results.read(folder)


@pytest.mark.parametrize("text", ["{", "{}", '{"suite": "a", "definition": {}, "saes": {}}'])
def test_a_broken_manifest_is_named(folder, text):
    folder.mkdir()
    (folder / "suite.json").write_text(text)
    with pytest.raises(UserError, match=r"suite\.json"):
        results.read(folder)


def test_a_manifest_does_not_lead_out_of_its_folder(folder):
    manifest(folder)
    content = json.loads((folder / "suite.json").read_text())
    content["runs"] = ["runs/../../secret.json"]
    (folder / "suite.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="secret"):
        results.read(folder)


def test_a_run_of_an_unknown_sae_is_an_error(folder):
    path = results.write(folder, spec(sae="stranger"), [row()], [], {})
    manifest(folder, path)
    with pytest.raises(UserError, match="stranger"):
        results.read(folder)


def test_the_same_score_twice_is_an_error_and_another_version_is_not(folder):
    first = results.write(folder, spec(), [row()], [], {})
    newer = results.write(folder, spec(version=2), [row()], [], {})
    manifest(folder, first, newer)
    assert len(results.read(folder).scores) == 2
    again = results.write(folder, spec() | {"seed": 1}, [row()], [], {})
    manifest(folder, first, again)
    with pytest.raises(UserError, match="twice"):
        results.read(folder)


def test_an_empty_suite_has_an_empty_table_with_all_columns(folder):
    manifest(folder)
    read = results.read(folder)
    assert read.scores.empty
    assert {"sae", "value", "ci_low", "file"} <= set(read.scores.columns)


# Units


def test_units_come_back_as_they_were_written(folder):
    rows = [row(), row("cosine", num=np.arange(3.0), den=np.ones(3))]
    manifest(folder, results.write(folder, spec(), rows, [], {}))
    found = results.units(results.read(folder), "cosine")["topk-16"]
    np.testing.assert_array_equal(found.ids, [0, 1, 2])
    np.testing.assert_array_equal(found.num, [0, 1, 2])
    np.testing.assert_array_equal(found.den, [1, 1, 1])


def test_units_with_names_are_aligned_by_name(folder):
    a = results.write(folder, spec("a"), [row(ids=("x", "y", "z"))], [], {})
    b = results.write(folder, spec("b"), [row(ids=("z", "x", "w"))], [], {})
    manifest(folder, a, b, saes={"a": ENTRY, "b": ENTRY})
    found = results.on_common_units(results.units(results.read(folder), "l0"))
    assert list(found["a"].ids) == list(found["b"].ids) == ["x", "z"]
    np.testing.assert_array_equal(found["a"].num, [1, 4])
    np.testing.assert_array_equal(found["b"].num, [2, 1])


def test_units_of_a_metric_measured_in_several_ways_need_a_choice(folder):
    paths = [results.write(folder, spec(k=k), [row(num=[k, k, k])], [], {}) for k in (1, 5)]
    manifest(folder, *paths)
    read = results.read(folder)
    with pytest.raises(UserError, match=r"k=1.*k=5"):
        results.units(read, "l0")
    assert results.units(read, "l0", params="k=5")["topk-16"].num[0] == 5
    with pytest.raises(UserError, match="there are: l0"):
        results.units(read, "l1")


def test_units_that_are_gone_are_named(folder):
    path = results.write(folder, spec(), [row()], [], {})
    manifest(folder, path)
    results.units_file(path).unlink()
    with pytest.raises(UserError, match="run the suite again"):
        results.units(results.read(folder), "l0")


# Two runs at once


def test_a_second_run_of_the_same_suite_is_refused(folder):
    with results.lock(folder), pytest.raises(UserError, match="another run"), results.lock(folder):
        pass
    with results.lock(folder):
        pass


def test_the_lock_dies_with_its_process_and_its_half_written_files_are_cleared(folder):
    code = (
        "import sys, time; from pathlib import Path; from saebench import results\n"
        "with results.lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another run"), results.lock(folder):
            pass
        holder.kill()
    (folder / "runs").mkdir()
    (folder / "runs" / ".x.json.1.partial").write_text("half")
    with results.lock(folder):
        assert list((folder / "runs").iterdir()) == []


# Weight


@pytest.mark.parametrize("module", ["results", "reports", "reports.leaderboard", "reports.pareto"])
def test_importing_does_not_import_torch(module):
    code = f"import sys, saebench.{module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_million_latents_are_written_and_read_in_a_few_seconds(folder):
    x = np.random.default_rng(0).gamma(2, 1, 1_000_000)
    rows = [row(m, x, np.ones_like(x), unit="latent", statistic="median") for m in ("a", "b")]
    start = time.process_time()
    manifest(folder, results.write(folder, spec(), rows, [], {}))
    found = results.units(results.read(folder), "b")["topk-16"]
    assert time.process_time() - start < 5
    np.testing.assert_array_equal(found.num, x)
