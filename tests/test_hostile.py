"""Hostile checkpoints, suites and names: each is refused by the command with one message, and nothing runs or hangs."""

import hashlib
import json
import os
import pickle
import re
import struct
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from saebench import progress, strict
from saebench.errors import UserError
from saebench.loaders import _files
from saebench.loaders._files import Limits, Source
from saebench.loaders._loader import build
from saebench.reports.leaderboard import Leaderboard
from saebench.reports.pareto import Pareto
from tests import boards
from tests.conftest import Ended, Run, WriteSuite

SHAPES = {"W_enc": (3, 5), "b_enc": (5,), "W_dec": (5, 3), "b_dec": (3,)}
RECORD = {
    "format": 2,
    "architecture": "relu",
    "arguments": {"d_in": 3, "d_sae": 5},
    "site": {"stream": "resid_post", "layer": 2},
    "target": {"stream": "resid_post", "layer": 2},
}
Refuse = Callable[..., str]


def weights(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: torch.ones(shape) for name, shape in SHAPES.items()} | changes


def entry(shape: list[int], start: int, dtype: str = "F32") -> dict[str, Any]:
    n = 4 * int(np.prod(shape, dtype=object))
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + n]}


def header(**changes: Any) -> dict[str, Any]:
    """Of the weights of an SAE of 38 numbers, in order."""
    at, found = 0, {}
    for name, shape in SHAPES.items():
        found[name] = entry(list(shape), at)
        at += 4 * int(np.prod(shape))
    return found | changes


def safetensors(text: bytes, n_bytes: int = 152) -> bytes:
    return struct.pack("<Q", len(text)) + text + b"\0" * n_bytes


def written(folder: Path, content: bytes, record: dict[str, Any] = RECORD) -> Path:
    """A checkpoint of this project whose checksum is right."""
    folder.mkdir(exist_ok=True)
    (folder / "sae.safetensors").write_bytes(content)
    whole = record | {"checksum": hashlib.sha256(content).hexdigest()}
    (folder / "sae.json").write_text(json.dumps(whole))
    return folder


@pytest.fixture
def refuse(saebench: Run, tmp_path: Path) -> Iterator[Refuse]:
    """What `saebench check` says of a path, which it refuses quickly and without leaving anything."""

    def command(path: Path, *options: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        began = time.process_time()
        ended: Ended = saebench("check", path, *options)
        assert time.process_time() - began < 5
        assert (ended.code, ended.out) == (2, "")
        assert ended.err.startswith("saebench: ") and "Traceback" not in ended.err
        assert all(c.isprintable() or c in "\n" for c in ended.err)
        assert sorted(tmp_path.rglob("*")) == before
        return ended.err

    return command


def test_the_checkpoint_that_the_others_change_is_accepted(saebench: Run, tmp_path: Path):
    assert saebench("check", written(tmp_path / "sae", save(weights()))).code == 0
    by_hand = safetensors(json.dumps(header()).encode())
    assert saebench("check", written(tmp_path / "sae", by_hand)).code == 0


# Safetensors


def changed(text: str, old: str, new: str) -> bytes:
    assert old in text
    return text.replace(old, new).encode()


TEXT = json.dumps(header())
HEADERS = {
    "duplicate key": (changed(TEXT, '"b_dec"', '"b_enc"'), "there twice"),
    "duplicate key below": (
        changed(TEXT, '"shape": [5]', '"shape": [5], "shape": [5]'),
        "there twice",
    ),
    "overlap": (json.dumps(header(b_enc=entry([5], 40))).encode(), "overlap"),
    "hole": (json.dumps(header(b_dec=entry([3], 144))).encode(), "gap"),
    "beyond the end": (json.dumps(header(b_dec=entry([300], 140))).encode(), "speaks of"),
    "negative": (changed(TEXT, "[3, 5]", "[-3, -5]"), "shape or offsets that are none"),
    "float": (changed(TEXT, "[3, 5]", "[3.0, 5]"), "shape or offsets that are none"),
    "bool": (changed(TEXT, '"shape": [5]', '"shape": [5, true]'), "shape or offsets that are none"),
    "overflow": (changed(TEXT, "[3, 5]", f"[{2**62}, {2**62}]"), "other bytes"),
    "too large an integer": (changed(TEXT, "[3, 5]", "[3, 99999999999999999999999]"), "too large"),
    "many digits": (changed(TEXT, "[3, 5]", f"[3, {'9' * 100_000}]"), "too large"),
    "many dimensions": (
        changed(TEXT, "[3, 5]", "[3, 5, 1, 1, 1]"),
        "shape or offsets that are none",
    ),
    "F8": (changed(TEXT, '"F32", "shape": [3, 5]', '"F8_E4M3", "shape": [3, 5]'), "F8_E4M3"),
    "dtype of a list": (
        changed(TEXT, '"F32", "shape": [3, 5]', '["F32"], "shape": [3, 5]'),
        "expected one of",
    ),
    "other keys": (changed(TEXT, '"shape": [3, 5]', '"shape": [3, 5], "code": 1'), "nothing else"),
    "a list": (b"[]", "expected a header that names"),
    "nested": (b'{"a":' * 100_000, "cannot be read"),
    "not UTF-8": (b'{"\xff": 1}', "cannot be read"),
    "NaN": (changed(TEXT, "[3, 5]", "[3, NaN]"), "not a number"),
    "half a character": (changed(TEXT, '"b_dec"', '"\\ud800"'), "half a character"),
    "metadata": (changed(TEXT, '{"W_enc"', '{"__metadata__": {"a": [1]}, "W_enc"'), "__metadata__"),
    "many tensors": (
        json.dumps({str(i): entry([0], 0) for i in range(9000)}).encode(),
        "at most 1,024",
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_is_not_one_is_refused(refuse: Refuse, tmp_path: Path, name: str):
    text, expected = HEADERS[name]
    assert expected in refuse(written(tmp_path / "sae", safetensors(text)))


@pytest.mark.parametrize("length", [0, 1, 2**20 + 1, 2**31, 2**63, 2**64 - 1])
def test_a_header_length_is_not_believed(refuse: Refuse, tmp_path: Path, length: int):
    content = struct.pack("<Q", length) + save(weights())[8:]
    assert "not a safetensors file" in refuse(written(tmp_path / "sae", content))


@pytest.mark.parametrize(
    "content", [b"", b"\2", b"\2\0\0\0\0\0\0\0{", save(weights())[:-1], save(weights()) + b"\0"]
)
def test_a_file_of_another_length_than_its_header_says_is_refused(
    refuse: Refuse, tmp_path: Path, content: bytes
):
    refuse(written(tmp_path / "sae", content))


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_weights_that_are_not_finite_are_refused(refuse: Refuse, tmp_path: Path, odd: float):
    W_dec = torch.ones(5, 3, dtype=torch.float64)
    W_dec[2, 1] = odd  # 1e300 is none in float32
    assert "W_dec has values that are not finite" in refuse(
        written(tmp_path / "sae", save(weights(W_dec=W_dec)))
    )


def test_shapes_that_the_configuration_claims_are_never_allocated(refuse: Refuse, tmp_path: Path):
    record = RECORD | {"arguments": {"d_in": 2**17, "d_sae": 2**22}}
    assert "do not fit together" in refuse(written(tmp_path / "sae", save(weights()), record))


@pytest.mark.parametrize(
    "arguments",
    [
        {"d_in": 2**40, "d_sae": 5},
        {"d_in": True, "d_sae": 5},
        {"d_in": 3.0, "d_sae": 5},
        {"d_in": -3, "d_sae": 5},
        {"d_in": 3},
        {"d_in": 3, "d_sae": 5, "code": "import os"},
        {"d_in": 3, "d_sae": 5, "d_out": [3]},
    ],
)
def test_arguments_that_are_none_are_refused(
    refuse: Refuse, tmp_path: Path, arguments: dict[str, Any]
):
    refuse(written(tmp_path / "sae", save(weights()), RECORD | {"arguments": arguments}))


def test_an_architecture_that_takes_for_ever_is_refused():
    with pytest.raises(UserError, match="iterations is 1000000000"):
        build("fista", {"d_in": 3, "d_sae": 5, "iterations": 10**9}, {}, "here")


def test_what_is_read_is_what_was_checked(tmp_path: Path):
    """A file that is put in place of the checked one is checked anew."""
    folder = written(tmp_path / "sae", save(weights()))
    source = Source(folder, Limits())
    assert source.shapes("sae.safetensors")["W_enc"] == (3, 5)
    (folder / "sae.safetensors").write_bytes(safetensors(HEADERS["overlap"][0]))
    with pytest.raises(UserError, match="overlap"):
        source.tensors("sae.safetensors")
    (folder / "sae.safetensors").unlink()
    (folder / "sae.safetensors").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="cannot be read"):
        source.tensors("sae.safetensors")


# Configurations


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
CONFIGURATIONS = {
    "NaN": '{"a": NaN}',
    "infinite": '{"a": 1e999}',
    "digits": '{"a": ' + "9" * 100_000 + "}",
    "some digits": '{"a": ' + "9" * 30 + "}",
    "deep": "[" * 100_000,
    "rather deep": '{"a": ' + "[" * 50 + "]" * 50 + "}",
    "twice": '{"a": 1, "a": 2}',
    "twice below": '{"a": [{"b": 1, "b": 2}]}',
    "many keys, the last one twice": "{"
    + ",".join(f'"{i}":1' for i in [*range(80_000), 79_999])
    + "}",
    "surrogate": '{"a": "\\ud800"}',
    "list": "[1]",
    "long": '{"a": "' + "x" * 2_000_000 + '"}',
    "empty": "",
    "not UTF-8": b'{"a": "\xff"}',
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_json_that_is_none_is_refused(refuse: Refuse, tmp_path: Path, name: str):
    folder = written(tmp_path / "sae", save(weights()))
    text = CONFIGURATIONS[name]
    (folder / "sae.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refuse(folder)


YAML = {
    "billion laughs": (BOMB, "alias"),
    "flow": ("a: " + "[" * 60_000, "too deep"),
    "flow without end": ("a: " + "[[]," * 15_000, "cannot be read|values|deep"),
    "block": ("- " * 20_000, "deep"),
    "python": ("a: !!python/object/apply:os.system [id]", "tag"),
    "binary": ("a: !!binary aGk=", "tag"),
    "set": ("a: !!set {b, c}", "tag"),
    "twice": ("a: 1\na: 2", "there twice"),
    "twice below": ("a: {b: 1, b: 2}", "there twice"),
    "key of a list": ("? [a]\n: 1", "a key is no text"),
    "merge of an alias": ("a: &a {b: 1}\nc:\n  <<: *a", "alias"),
    "not a number": ("a: .nan", "not a number"),
    "infinite": ("a: 1.0e+400", "not a number"),
    "hexadecimal": ("a: 0x" + "f" * 1000, "too large"),
    "digits": ("a: " + "9" * 6000, "too large"),
    "surrogate": ('a: "\\ud800"', "half a character"),
    "number as a key": ("1: 2", "expected named values"),
    "long": ("a: " + "x" * 70_000, "more than 65,536 bytes"),
}


@pytest.mark.parametrize("name", YAML)
def test_yaml_that_is_none_is_refused(tmp_path: Path, name: str):
    text, expected = YAML[name]
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=expected):
        Source(tmp_path, Limits()).yaml("config.yaml")


def test_a_date_in_yaml_is_text(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("a: 2001-99-99\nb: [1, 2.5, true, null]")
    found = Source(tmp_path, Limits()).yaml("config.yaml")
    assert found == {"a": "2001-99-99", "b": [1, 2.5, True, None]}


def test_a_config_yaml_of_a_billion_values_is_refused(refuse: Refuse, tmp_path: Path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "config.yaml").write_text("model_kind: transcoder_set\n" + BOMB)
    (folder / "layer_0.safetensors").write_bytes(save(weights()))
    refuse(folder)


@pytest.mark.parametrize(
    "text", [BOMB + "name: *a11", "name: &a [*a]", "[" * 100_000, "a: 0x" + "f" * 9000]
)
def test_a_hostile_suite_is_refused(refuse: Refuse, tmp_path: Path, text: str):
    (tmp_path / "suite.yaml").write_text(text)
    refuse(tmp_path / "suite.yaml")


def test_a_suite_whose_sweeps_multiply_is_refused(refuse: Refuse, write_suite: WriteSuite):
    many = list(range(1, 200))
    entry = {"variant": "topk", "width": many, "l0": many, "lr": [n / 1e6 for n in many]}
    assert "SAEs" in refuse(write_suite(saes=[entry]))


def test_a_suite_of_many_characters_is_refused(refuse: Refuse, tmp_path: Path):
    (tmp_path / "suite.yaml").write_text("name: x\n" + "# nothing\n" * 100_000)
    assert "more than 262,144 characters" in refuse(tmp_path / "suite.yaml")


# Archives


class Call:
    """Unpickled, it calls."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.called = (function, arguments)

    def __reduce__(self) -> Any:
        return self.called


def archive(path: Path, members: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", how) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def repacked(path: Path, name: str, data: bytes, how: int = zipfile.ZIP_STORED) -> Path:
    """What torch.save wrote, with another content of one member."""
    with zipfile.ZipFile(path) as file:
        members = {m.filename: file.read(m) for m in file.infolist()}
    found = next(member for member in members if member.endswith(name))
    return archive(path, members | {found: data}, how)


@pytest.fixture
def pt(tmp_path: Path) -> Path:
    torch.save(weights(), tmp_path / "ae.pt")
    return tmp_path / "ae.pt"


def unpickled(path: Path) -> dict[str, Any]:
    return Source(path, Limits(allow_pickle=True)).pickled(path.name)


def test_weights_are_unpickled_where_the_user_allows_it(pt: Path):
    torch.testing.assert_close(unpickled(pt), weights())


def test_nothing_is_unpickled_unless_the_user_allows_it(refuse: Refuse, pt: Path):
    with pytest.raises(UserError, match="--allow-pickle-weights"):
        Source(pt, Limits()).pickled("ae.pt")
    refuse(pt)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_pickle_that_calls_is_refused_and_calls_nothing(refuse: Refuse, pt: Path, protocol: int):
    mark = pt.parent / "called"
    bomb = pickle.dumps({"W_enc": Call(os.system, f"touch {mark}")}, protocol=protocol)
    repacked(pt, "data.pkl", bomb)
    refuse(pt, "--allow-pickle-weights")
    refuse(pt, "--allow-pickle-weights", "--format", "openai")
    with pytest.raises(UserError, match="cannot be read as weights alone"):
        unpickled(pt)
    pt.write_bytes(bomb)  # as pickle.dump writes it
    with pytest.raises(UserError, match="is no archive"):
        unpickled(pt)
    assert not mark.exists()


def nested(n: int) -> Any:
    found: Any = []
    for _ in range(n):
        found = [found, found]
    return found


@pytest.mark.parametrize(
    "content",
    [
        {"a": nested(40)},
        {"a": 10**4000},
        {"a": float("nan")},
        {1: 2},
        [1, 2],
        {str(i): i for i in range(300_000)},
        {"a": Call(bytearray, 2**40)},
        {"a": Call(eval, "1")},
    ],
    ids=lambda content: str(type(content).__name__),
)
def test_what_a_pickle_blows_up_is_refused(pt: Path, content: Any):
    repacked(pt, "data.pkl", pickle.dumps(content, protocol=2))
    with pytest.raises(UserError):
        unpickled(pt)


def test_a_view_that_repeats_its_storage_is_refused(tmp_path: Path):
    torch.save({"W_enc": torch.ones(1).expand(2**17, 2**22)}, tmp_path / "ae.pt")
    with pytest.raises(UserError, match="larger than what is in the file"):
        unpickled(tmp_path / "ae.pt")


def test_storages_that_are_given_out_many_times_are_refused(tmp_path: Path):
    whole = torch.ones(1000)
    torch.save({str(i): whole for i in range(200)}, tmp_path / "ae.pt")
    with pytest.raises(UserError, match="larger than what is in the file"):
        unpickled(tmp_path / "ae.pt")


def test_a_storage_that_is_shorter_than_the_pickle_says_is_refused(pt: Path):
    repacked(pt, "data/0", b"\0" * 4)
    with pytest.raises(UserError, match="cannot be read as weights alone"):
        unpickled(pt)


@pytest.mark.parametrize(
    "odd",
    [torch.ones(3, 3).to_sparse(), torch.ones(3, device="meta")],
    ids=["sparse", "meta"],
)
def test_a_tensor_that_is_no_plain_array_is_refused(tmp_path: Path, odd: torch.Tensor):
    torch.save({"W_enc": odd}, tmp_path / "ae.pt")
    with pytest.raises(UserError):
        unpickled(tmp_path / "ae.pt")


def test_an_old_or_a_packed_file_is_not_unpickled(pt: Path):
    torch.save(weights(), pt, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="is no archive"):
        unpickled(pt)
    torch.save(weights(), pt)
    repacked(pt, "data/0", b"\0" * 60, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="is packed"):
        unpickled(pt)


@pytest.mark.parametrize(
    ("version", "safe"), [("2.9.1", False), ("2.5.0+cu1", False), ("2.10.0", True), ("3.0", True)]
)
def test_nothing_is_unpickled_by_an_old_pytorch(
    pt: Path, monkeypatch: pytest.MonkeyPatch, version: str, safe: bool
):
    monkeypatch.setattr(torch, "__version__", version)
    if safe:
        unpickled(pt)
    else:
        with pytest.raises(UserError, match="2.10 or later"):
            unpickled(pt)


def test_weights_only_is_never_given_up(pt: Path, monkeypatch: pytest.MonkeyPatch):
    """The one call is strict, and a failure is no reason for another."""
    calls = []

    def load(file: Any, **options: Any) -> Any:
        calls.append(options)
        raise pickle.UnpicklingError(
            "Weights only load failed. Re-running torch.load with weights_only=False ..."
        )

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(UserError):
        unpickled(pt)
    assert [options["weights_only"] for options in calls] == [True]


def npy(header: str, data: bytes = b"", version: bytes = b"\1\0") -> bytes:
    text = header.encode() + b"\n"
    length = struct.pack("<H" if version == b"\1\0" else "<I", len(text))
    return b"\x93NUMPY" + version + length + text + data


def described(descr: str = "<f4", shape: str = "(2,)", fortran: str = "False") -> str:
    return f"{{'descr': {descr!r}, 'fortran_order': {fortran}, 'shape': {shape}}}"


ARRAYS = {
    "object": npy(described("|O"), pickle.dumps([1, 2])),
    "huge": npy(described(shape=f"({2**62}, 8)"), b"\0" * 8),
    "overflow": npy(described(shape=f"({2**32}, {2**32})"), b""),
    "negative": npy(described(shape="(-1, -2)"), b"\0" * 8),
    "bool": npy(described(shape="(True, 2)"), b"\0" * 8),
    "short": npy(described(), b"\0" * 7),
    "long": npy(described(), b"\0" * 9),
    "big-endian": npy(described(">f4"), b"\0" * 8),
    "complex": npy(described("<c8"), b"\0" * 16),
    "text": npy(described("<U1"), b"\0" * 8),
    "records": npy(described().replace("'<f4'", "[('a', '<f4')]"), b"\0" * 8),
    "code": npy("__import__('os').system('id')"),
    "brackets": npy("[" * 900),
    "long header": npy(described() + " " * 5000, b"\0" * 8, b"\2\0"),
    "version 3": npy(described(), b"\0" * 8, b"\3\0"),
    "dimensions": npy(described(shape="(1, 1, 1, 1, 2)"), b"\0" * 8),
    "no header": b"\x93NUMPY",
    "nothing": b"",
    "pickle": pickle.dumps([1]),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_that_is_none_is_refused(tmp_path: Path, name: str):
    path = archive(tmp_path / "params.npz", {"W_enc.npy": ARRAYS[name]})
    with pytest.raises(UserError, match=r"W_enc\.npy is no array of plain numbers"):
        Source(path, Limits()).arrays("params.npz")


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64"])
def test_arrays_are_read_as_numpy_reads_them(tmp_path: Path, order: Any, dtype: str):
    given = {
        "a": np.asarray(np.arange(24).reshape(2, 3, 4), dtype, order=order),
        "one": np.asarray(3, dtype),
        "none": np.zeros((0, 4), dtype),
    }
    for write in (np.savez, np.savez_compressed):
        write(tmp_path / "x.npz", **given)
        found = Source(tmp_path, Limits()).arrays("x.npz")
        with np.load(tmp_path / "x.npz") as expected:
            assert set(found) == set(expected.files)
            for name, value in found.items():
                np.testing.assert_array_equal(value.numpy(), expected[name], strict=True)


def test_a_zip_bomb_is_refused(refuse: Refuse, tmp_path: Path):
    zeros = npy(described(shape="(5000000,)"), b"\0" * 20_000_000)
    path = archive(tmp_path / "params.npz", {"W_enc.npy": zeros}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 200_000
    refuse(path)
    with pytest.raises(UserError, match="times its size"):
        Source(path, Limits()).arrays("params.npz")


def test_parts_of_odd_names_and_many_parts_are_refused(tmp_path: Path):
    path = tmp_path / "params.npz"
    for name in ("../W_enc.npy", "/W_enc.npy", "a\x1b.npy", "W_enc"):
        archive(path, {name: npy(described(), b"\0" * 8)})
        with pytest.raises(UserError):
            Source(path, Limits()).arrays("params.npz")
    archive(path, {f"{i}.npy": b"" for i in range(1100)})
    with pytest.raises(UserError, match="at most 1,040 parts"):
        Source(path, Limits()).arrays("params.npz")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a.npy", ARRAYS["short"])
            file.writestr("a.npy", ARRAYS["short"])
    with pytest.raises(UserError, match="two parts of one name"):
        Source(path, Limits()).arrays("params.npz")


# Folders


def test_links_pipes_and_devices_are_refused(refuse: Refuse, tmp_path: Path):
    folder = written(tmp_path / "sae", save(weights()))
    (folder / "x.json").symlink_to("/etc/passwd")
    assert "is a link" in refuse(folder)
    (folder / "x.json").unlink()
    (folder / "x").symlink_to("/etc", target_is_directory=True)
    assert "is a link" in refuse(folder)
    (folder / "x").unlink()
    os.mkfifo(folder / "x.json")
    assert "no plain file" in refuse(folder)
    assert "no plain file" in refuse(folder / "x.json")
    assert "no plain file" in refuse(Path("/dev/zero"))


def test_the_path_that_the_user_gives_may_be_a_link(saebench: Run, tmp_path: Path):
    folder = written(tmp_path / "sae", save(weights()))
    (tmp_path / "link").symlink_to(folder)
    assert saebench("check", tmp_path / "link").code == 0
    np.savez(tmp_path / "blob", a=np.ones(2))
    (tmp_path / "params.npz").symlink_to(tmp_path / "blob.npz")
    assert set(Source(tmp_path / "params.npz", Limits()).arrays("params.npz")) == {"a"}


def test_hidden_files_are_passed_over(saebench: Run, tmp_path: Path):
    folder = written(tmp_path / "sae", save(weights()))
    (folder / ".git").mkdir()
    (folder / ".git" / "x").symlink_to("/etc/passwd")
    assert saebench("check", folder).code == 0
    assert Source(folder, Limits()).names == ["sae.json", "sae.safetensors"]


@pytest.mark.parametrize(
    "name", ["a\nb.json", "\x1b[2J.json", "a\\b.json", "\u202ea.json", "a\udcff.json"]
)
def test_a_name_that_no_checkpoint_has_is_refused_and_shown_escaped(
    refuse: Refuse, tmp_path: Path, name: str
):
    folder = written(tmp_path / "sae", save(weights()))
    (folder / name).write_text("{}")
    assert "rename it" in refuse(folder)


def test_names_that_differ_in_case_alone_are_refused(refuse: Refuse, tmp_path: Path):
    folder = written(tmp_path / "sae", save(weights()))
    (folder / "SAE.json").write_text("{}")
    assert "differ in case" in refuse(folder)


def test_many_files_and_deep_folders_are_refused(
    refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = written(tmp_path / "sae", save(weights()))
    (folder / Path(*["d"] * 30)).mkdir(parents=True)
    assert "deep" in refuse(folder)
    monkeypatch.setattr(_files, "_MOST_FILES", 10)
    assert "more than 10 files" in refuse(folder)


def test_a_folder_named_like_a_file_is_no_file(refuse: Refuse, tmp_path: Path):
    folder = written(tmp_path / "sae", save(weights()))
    (folder / "sae.json").unlink()
    (folder / "sae.json").mkdir()
    refuse(folder)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", ".", "a\\b", "a\x00b"])
def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path, name: str):
    source = Source(written(tmp_path / "sae", save(weights())), Limits())
    for read in (source.json, source.tensors, source.arrays, source.within):
        with pytest.raises(UserError, match="leads out of"):
            read(name)


def test_what_is_larger_than_allowed_is_refused(refuse: Refuse, tmp_path: Path):
    folder = written(tmp_path / "sae", save(weights()))
    with (folder / "sae.safetensors").open("ab") as file:
        file.truncate(3 * 1024**3)  # a hole
    assert "--max-size allows 1.00" in refuse(folder, "--max-size", "1")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_one_message(refuse: Refuse, tmp_path: Path):
    folder = written(tmp_path / "sae", save(weights()))
    (folder / "sae.json").chmod(0)
    assert "Permission denied" in refuse(folder)


@pytest.mark.parametrize("path", ["x" * 5000, "nowhere", "nowhere/\x1b[2J"])
def test_a_path_that_cannot_be_is_one_message(refuse: Refuse, path: str):
    refuse(Path(path))


# What reaches a terminal, a page, a paper


def test_codes_of_a_terminal_are_shown_and_not_sent():
    shown = progress.printable("a\x1b]0;title\x07\r\x9b2J\u202e\u2028\udcffé ±\t\n|")
    assert shown == "a\\x1b]0;title\\x07\\r\\x9b2J\\u202e\\u2028\\udcffé ±\t\n|"


def test_names_that_files_give_reach_the_terminal_escaped(saebench: Run, tmp_path: Path):
    record = RECORD | {"training": {"model": {"id": "m\x1b[2J\u202e"}}}
    ended = saebench("check", written(tmp_path / "sae", save(weights()), record))
    assert ended.code == 0
    assert "m\\x1b[2J\\u202e" in ended.out and "\x1b" not in ended.out


HOSTILE = {
    "script": "<script>alert(1)</script>",
    "link": "[x](javascript:alert(1))",
    "image": "![x](https://example.org/x.png)",
    "cell": "a | b",
    "code": "`a`",
    "maths": "$\\frac{",
    "struck": "~~a~~",
    "macro": "\\input{/etc/passwd}",
    "row": "[1em] & \\\\ % #",
    "codes": "\x1b[2J\x07\u202e",
}


@pytest.fixture(params=HOSTILE)
def board(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Any]:
    """Results that somebody else's files give, with such a name as that of an SAE and of a variant."""
    name = HOSTILE[request.param]
    saes = {
        f"sae{i}": (
            boards.trained(name, l0=4.0 * 2**i),
            [
                boards.row("explained_variance", boards.noisy(0.5 + 0.1 * i, 0.1, i)),
                boards.row("l0", boards.noisy(4.0 * 2**i, 0.1, i + 9), best=None),
            ],
        )
        for i in range(3)
    }
    found = boards.write(tmp_path, saes)
    return name, found


def test_hostile_names_are_text_in_every_table(board: tuple[str, Any], tmp_path: Path):
    name, found = board
    Leaderboard()(found, tmp_path)
    markdown = (tmp_path / "leaderboard.md").read_text()
    latex = (tmp_path / "leaderboard.tex").read_text()
    for text in (markdown, latex, Leaderboard().text(found)):
        assert all(c.isprintable() or c in "\n\u2009\u00a0" for c in text)
    for markup in ("<script", "![x", "| a | b |", "`a`", " ~~a", " $\\"):
        assert markup not in markdown
    assert not re.search(r"(?<!\\)\]\(", markdown)
    assert "\\input" not in latex
    assert not any(line.startswith(("[", "*")) for line in latex.splitlines())


def test_hostile_names_are_text_in_every_figure(board: tuple[str, Any], tmp_path: Path):
    name, found = board
    figure = Pareto(x="l0", y="explained_variance")
    figure.save(figure.draw(found), tmp_path / "figure.svg")
    drawn = (tmp_path / "figure.svg").read_text()
    assert "<script" not in drawn and "javascript:" not in drawn.replace(
        "(javascript:alert(1))", ""
    )


def test_a_message_quotes_no_more_than_a_line_can_hold(refuse: Refuse, tmp_path: Path):
    record = RECORD | {"architecture": "x" * 500_000}
    assert len(refuse(written(tmp_path / "sae", save(weights()), record))) < 10_000


def test_strict_json_reads_what_json_reads():
    plain = {"a": [1, -2.5, True, None, "é\n"], "b": {"c": [[]]}}
    assert strict.loads(json.dumps(plain)) == plain
    strict.check_depth(plain, "here")


def test_every_call_that_could_unpickle_is_strict():
    """CVE-2026-31253 was four calls that somebody forgot."""
    package = Path(_files.__file__).parents[1]
    calls = re.compile(r"\b(torch\.load|np\.load|pickle\.loads?|joblib\.load)\((.*?)\)", re.DOTALL)
    found = [
        (call, arguments)
        for path in package.rglob("*.py")
        for call, arguments in calls.findall(path.read_text(encoding="utf-8"))
    ]
    assert {call for call, _ in found} == {"torch.load", "np.load"}
    strict = {"torch.load": "weights_only=True", "np.load": "allow_pickle=False"}
    assert all(strict[call] in arguments for call, arguments in found)
