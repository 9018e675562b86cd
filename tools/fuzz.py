"""Malformed checkpoints and suite files, made from valid ones, each opened as a stranger's would be.

    python tools/fuzz.py --cases 20000 --seed 1
    python tools/fuzz.py --seed 1 --only 17        # one case again, with what was done to the files
    python tools/fuzz.py --cases 50000 --atheris   # bytes guided by coverage instead (pip install atheris)

Every case is either refused with a `UserError` or accepted, with finite weights of shapes that fit together. Anything
else is a finding: another exception, more than 5 seconds, more than 1 GB beyond what the process starts with, a file
left behind, a crash. Cases run in worker processes with that memory and no more. The seeds are the fixtures of
tests/test_loaders.py, a native checkpoint, and the suites; a case depends on --seed and its number alone.
"""

import argparse
import hashlib
import importlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
SECONDS = 5.0
EXTRA_MEMORY = 1_000_000_000
CHUNK = 500
SILENCE = 60.0
Files = dict[str, bytes]


class Seed(NamedTuple):
    """A valid checkpoint, or a valid suite."""

    name: str
    files: Files
    told: Any
    """What the user says of it; None for a suite."""

    @property
    def format(self) -> str:
        return self.name.partition("/")[0]


class Case(NamedTuple):
    seed: Seed
    files: dict[str, bytes | str]
    """A text instead of bytes is what to make in place of a file: a link, a pipe or a folder."""
    format: str | None
    """What the user says it is."""
    done: list[str]


class Outcome(NamedTuple):
    number: int
    kind: str
    outcome: str
    seconds: float
    said: str


# Seeds


def seeds() -> list[Seed]:
    sys.path.insert(0, str(ROOT))
    fixtures = importlib.import_module("tests.test_loaders")
    loader = importlib.import_module("saebench.loaders._loader")
    found = []
    for name, write in fixtures.FIXTURES.items():
        with tempfile.TemporaryDirectory() as folder:
            if name in fixtures.CASES:
                case = fixtures.CASES[name](Path(folder))
                path, told = case.path, case.told
            else:
                path, told = write(Path(folder)), loader.Told(site=fixtures.RESID)
            found.append(Seed(name, _read(path), told))
    found.append(Seed("native/jumprelu", _native(), loader.Told()))
    with tempfile.TemporaryDirectory() as folder:
        importlib.import_module("tests.test_loader_sae_lens").write(Path(folder))
        found.append(Seed("sae_lens/version 6", _read(Path(folder)), loader.Told()))
    for path in sorted((ROOT / "suites").glob("*.yaml")):
        if path.name != "learning_rates.yaml":
            found.append(Seed(f"suite {path.stem}", {path.name: path.read_bytes()}, None))
    return found


def _read(path: Path) -> Files:
    if path.is_file():
        return {path.name: path.read_bytes()}
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in files}


def _native() -> Files:
    import torch
    from safetensors.torch import save

    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (5, 9), "b_enc": (9,), "W_dec": (9, 5), "b_dec": (5,), "threshold": (9,)}
    content = save({n: torch.randn(s, generator=generator) for n, s in shapes.items()})
    site = {"stream": "resid_post", "layer": 2}
    record = {
        "format": 2,
        "architecture": "jumprelu",
        "arguments": {"d_in": 5, "d_sae": 9, "d_out": 5, "skip": False},
        "site": site,
        "target": site,
        "checksum": hashlib.sha256(content).hexdigest(),
        "training": {"model": {"id": "builtin:pylm"}},
    }
    return {"sae.json": json.dumps(record).encode(), "sae.safetensors": content}


# What is done to them

ODD: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3.5,
        -0.0,
        2**31,
        2**32,
        2**53,
        2**63 - 1,
        2**63,
        2**64,
        10**19,
    ),
    *(
        1e308,
        -1e308,
        1e-320,
        "",
        " ",
        "x",
        "../x",
        "/etc/passwd",
        "a\nb",
        "\x1b[2J",
        "\x00",
        "é",
        "NaN",
    ),
    *(
        [],
        {},
        [[]],
        [0],
        [1, 2],
        {"a": 1},
        "float32",
        "F8_E4M3",
        "BOOL",
        "C64",
        "relu",
        "topk",
        1024,
        4096,
    ),
    *([2**40, 2**40], [2**62, 4], [0, 2**62], [1, -1], [True, 5], ["5"], [5.0, 9], "x" * 5000),
]
RAW = [
    *(
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "-1e999",
        "9" * 5000,
        "9" * 25,
        "0x" + "f" * 5000,
        "1e-999999",
    ),
    *(
        "[" * 50_000,
        "{" * 50_000,
        '{"a":' * 20_000,
        "[1,",
        "]",
        "}",
        ",",
        ":",
        '"',
        "'",
        "\\",
        '"\\ud800"',
    ),
    *(
        "\ufeff",
        "\x00",
        "\x1b]0;x\x07",
        "\u202e",
        "&a [*a]",
        "*a",
        "<<: *a",
        "!!python/object/apply:os.system [id]",
    ),
    *(
        "!!binary aGk=",
        "!!set {a, b}",
        "!!timestamp 2001-99-99",
        "2001-01-01",
        "1:2:3",
        "0o777",
        "? [a]",
        "- " * 5000,
    ),
    *(
        "|\n",
        ">\n",
        "%YAML 9.9\n",
        "---\n",
        "...\n",
        "\t",
        "null",
        "~",
        ".nan",
        ".inf",
        "{? {a: b} : c}",
        "true",
    ),
]
BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


def mutate(rng: random.Random, all_seeds: list[Seed], number: int) -> Case:
    # Suites are a third of all cases, whatever their share of the seeds.
    of_suites = [seed for seed in all_seeds if seed.told is None]
    others = [seed for seed in all_seeds if seed.told is not None]
    seed = rng.choice(of_suites if number % 3 == 0 else others)
    files: dict[str, bytes | str] = dict(seed.files)
    done: list[str] = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if seed.told is not None and rng.random() < 0.1:
            done.append(_on_folder(rng, files, rng.choice(others)))
            continue
        name = rng.choice(sorted(files))
        content = files[name]
        if isinstance(content, bytes):
            mutation = rng.choice(_mutations(name))
            try:
                files[name] = mutation(rng, content)
            except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError):
                files[name] = _bytes(
                    rng, content
                )  # what an earlier mutation left has no such parts
            done.append(f"{mutation.__name__.strip('_')} {name}")
    if "sae.json" in files and rng.random() < 0.7:
        _put_checksum(files)
    return Case(seed, files, seed.format if rng.random() < 0.6 else None, done)


def _mutations(name: str) -> list[Callable[[random.Random, bytes], bytes]]:
    if name.endswith(".safetensors"):
        return [_bytes, _st_length, _st_tree, _st_tree, _st_tree, _st_text, _st_values]
    if name.endswith(".json"):
        return [_bytes, _json_tree, _json_tree, _text, _twice_a_key]
    if name.endswith((".yaml", ".yml")):
        return [_bytes, _yaml_tree, _yaml_tree, _text, _text, _lines, _bomb]
    if name.endswith(".npz"):
        return [_bytes, _zip_bytes, _zip_member, _npy_header, _npy_header, _npy_values]
    return [_bytes, _zip_bytes, _zip_member, _pickle_bytes, _pickle_bytes, _pickle_odd]


def _bytes(rng: random.Random, content: bytes) -> bytes:
    at = rng.randrange(len(content) + 1)
    n = rng.choice([1, 1, 2, 4, 8, 100])
    some = rng.choice([rng.randbytes(n), b"\0" * n, b"\xff" * n, content[at : at + n]])
    return rng.choice(
        [
            content[:at],
            content[:at] + some + content[at + n :],
            content[:at] + some + content[at:],
            content[:at] + content[at + n :],
            content + some,
            b"",
            content * 2,
        ]
    )


def _text(rng: random.Random, content: bytes) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + rng.choice(RAW).encode("utf-8", "surrogatepass") + content[at:]


def _lines(rng: random.Random, content: bytes) -> bytes:
    lines = content.split(b"\n")
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    change = rng.randrange(4)
    if change == 0:
        lines[i], lines[j] = lines[j], lines[i]
    elif change == 1:
        lines.insert(i, lines[j])
    elif change == 2:
        del lines[i]
    else:
        lines[i] = b" " * rng.randrange(6) + lines[i].lstrip()
    return b"\n".join(lines)


def _bomb(rng: random.Random, content: bytes) -> bytes:
    return content + b"\n" + BOMB.encode() + rng.choice([b"", b"saes: *a11\n", b"name: *a3\n"])


def _changed(rng: random.Random, tree: Any) -> Any:
    """A copy with one place of it replaced, dropped, renamed, added to, or put deep inside lists."""
    tree = json.loads(json.dumps(tree))
    places = list(_places(tree))
    if not places:
        return rng.choice(ODD)
    holder, key = rng.choice(places)
    change = rng.randrange(8)
    if change == 0:
        del holder[key]
    elif change == 1 and isinstance(holder, dict):
        holder[rng.choice(["x", "", "__class__", f"{key}_", str(key).upper(), "\x1b[31m"])] = (
            holder.pop(key)
        )
    elif change == 2:
        for _ in range(rng.choice([2, 30, 900])):
            holder[key] = [holder[key]]
    elif change == 3:
        other, name = rng.choice(places)
        holder[key] = json.loads(json.dumps(other.get(name) if isinstance(other, dict) else other))
    elif change == 4:
        holder[key] = rng.choice(["9" * 3000, rng.getrandbits(300), [0] * 20_000])
    elif isinstance(holder[key], int | float) and change == 5:
        holder[key] = holder[key] * rng.choice([2, -1, 1000, 1e300, 0]) + rng.choice(
            [0, 1, -1, 0.5]
        )
    else:
        holder[key] = rng.choice(ODD)
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    for key, value in items:
        yield tree, key
        yield from _places(value)


def _json_tree(rng: random.Random, content: bytes) -> bytes:
    try:
        tree = json.loads(content)
        return json.dumps(_changed(rng, tree)).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return _bytes(rng, content)


def _twice_a_key(rng: random.Random, content: bytes) -> bytes:
    places = [i for i, byte in enumerate(content) if byte == ord("{")]
    if not places:
        return _bytes(rng, content)
    at = rng.choice(places) + 1
    key = rng.choice([b'"d_in": 5, ', b'"a": 1, "a": 2, ', b'"architecture": "relu", '])
    return content[:at] + key + content[at:]


def _yaml_tree(rng: random.Random, content: bytes) -> bytes:
    import yaml

    if b"&" in content:  # a bomb would go off here
        return _text(rng, content)
    try:
        tree = _changed(rng, yaml.safe_load(content))
        return yaml.safe_dump(tree, sort_keys=False).encode("utf-8", "surrogatepass")
    except (ValueError, TypeError, RecursionError, yaml.YAMLError):
        return _bytes(rng, content)


def _st_parts(content: bytes) -> tuple[bytes, bytes]:
    length = int.from_bytes(content[:8], "little")
    return content[8 : 8 + length], content[8 + length :]


def _st_joined(header: bytes, rest: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + rest


def _st_length(rng: random.Random, content: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    odd = [0, 1, 2, length - 1, length + 1, 2**20, 2**20 + 1, 2**31, 2**63, 2**64 - 1, len(content)]
    return (rng.choice(odd) % 2**64).to_bytes(8, "little") + content[8:]


def _st_tree(rng: random.Random, content: bytes) -> bytes:
    header, rest = _st_parts(content)
    header = _json_tree(rng, header)
    if rng.random() < 0.2:
        rest = rest[: -rng.choice([1, 4, 40])] or rest + b"\0" * 4
    return _st_joined(header, rest)


def _st_text(rng: random.Random, content: bytes) -> bytes:
    header, rest = _st_parts(content)
    return _st_joined(rng.choice([_text, _twice_a_key, _bytes])(rng, header), rest)


def _st_values(rng: random.Random, content: bytes) -> bytes:
    header, rest = _st_parts(content)
    return _st_joined(header, _values(rng, rest))


def _values(rng: random.Random, rest: bytes) -> bytes:
    odd = [float("nan"), float("inf"), -float("inf"), 1e38, -1e38, 1e-45, 0.0]
    at = 4 * rng.randrange(max(1, len(rest) // 4))
    n = rng.choice([1, 1, 10, len(rest) // 4])
    some = struct.pack("<f", rng.choice(odd)) * n
    return (rest[:at] + some + rest[at + len(some) :])[: len(rest)]


def _members(content: bytes) -> dict[str, bytes] | None:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return {m.filename: archive.read(m) for m in archive.infolist()}
    except Exception:  # noqa: BLE001  (already damaged by an earlier mutation)
        return None


def _zipped(members: list[tuple[str, bytes]], how: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", how) as archive:
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, data in members:
            archive.writestr(name, data)
    return out.getvalue()


def _zip_bytes(rng: random.Random, content: bytes) -> bytes:
    """In the directory, at the end."""
    at = max(0, len(content) - rng.randrange(1, 400))
    some = rng.choice([rng.randbytes(4), b"\xff" * 4, b"\0" * 4, b"\xff" * 8])
    return content[:at] + some + content[at + len(some) :]


def _zip_member(rng: random.Random, content: bytes) -> bytes:
    members = _members(content)
    if not members:
        return _bytes(rng, content)
    found = list(members.items())
    i = rng.randrange(len(found))
    name, data = found[i]
    change = rng.randrange(7)
    if change == 0:
        del found[i]
    elif change == 1:
        found.append((name, data[::-1]))
    elif change == 2:
        found[i] = (
            rng.choice(["../x.npy", "/x.npy", "x", name.upper(), name * 9, "\x1b.npy"]),
            data,
        )
    elif change == 3:
        found[i] = (name, b"\0" * 50_000_000)
        return _zipped(found, zipfile.ZIP_DEFLATED)
    elif change == 4:
        found += [(f"{n}.npy", data[:64]) for n in range(1500)]
    elif change == 5:
        return _zipped(
            found, rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
        )
    else:
        found[i] = (name, _bytes(rng, data))
    return _zipped(found)


def _npy_header(rng: random.Random, content: bytes) -> bytes:
    members = _members(content)
    if not members:
        return _bytes(rng, content)
    name = rng.choice(sorted(members))
    data = members[name]
    shape = rng.choice(
        [
            "()",
            "(0,)",
            "(-1,)",
            f"({2**62}, 8)",
            f"({2**31}, {2**31})",
            "(5.0,)",
            "(True,)",
            "5",
            "(" * 500,
            "(1,)*9",
        ]
    )
    descr = rng.choice(
        [
            "<f4",
            "|O",
            ">f4",
            "<c8",
            "|S9",
            "<U9",
            "<M8[s]",
            "|V8",
            "<f2",
            "<i8",
            "f4,f4",
            "<f16",
            "",
            "é",
        ]
    )
    text = f"{{'descr': '{descr}', 'fortran_order': {rng.choice(['True', 'False', '1', 'x'])}, 'shape': {shape}, }}"
    text = rng.choice(
        [text, text[:-1], "0" * 60_000, "[" * 5_000, text + "#" * 2_000, "__import__('os')"]
    )
    header = text.encode()[:60_000] + b"\n"
    version = rng.choice([b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\x09\0"])
    length = struct.pack("<H" if version[0] == 1 else "<I", len(header))
    members[name] = b"\x93NUMPY" + version + length + header + data[128:]
    return _zipped(list(members.items()))


def _npy_values(rng: random.Random, content: bytes) -> bytes:
    members = _members(content)
    if not members:
        return _bytes(rng, content)
    name = rng.choice(sorted(members))
    members[name] = members[name][:128] + _values(rng, members[name][128:])
    return _zipped(list(members.items()))


def _pickle_bytes(rng: random.Random, content: bytes) -> bytes:
    members = _members(content)
    name = next((n for n in members or () if n.endswith("data.pkl")), None)
    if not members or name is None:
        return _bytes(rng, content)
    data = members[name]
    for _ in range(rng.choice([1, 1, 3, 10])):
        at = rng.randrange(len(data))
        opcode = rng.choice(
            b"().0123NQRSUVXabcdegijklopqrstu}]\x80\x81\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8d\x8e\x93\x94\x95"
        )
        some = rng.choice(
            [
                bytes([opcode]),
                rng.randbytes(1),
                struct.pack("<I", 2**31 - 1),
                b"K\xff",
                b"J\xff\xff\xff\x7f",
            ]
        )
        data = rng.choice(
            [
                data[:at] + some + data[at + len(some) :],
                data[:at] + some + data[at:],
                data[:at] + data[at + 1 :],
            ]
        )
        data = data or b"."
    members[name] = data
    return _zipped(list(members.items()))


class _Call:
    """Pickled as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.called = (function, arguments)

    def __reduce__(self) -> Any:
        return self.called


def _pickle_odd(rng: random.Random, content: bytes) -> bytes:
    members = _members(content)
    name = next((n for n in members or () if n.endswith("data.pkl")), None)
    if not members or name is None:
        return _bytes(rng, content)
    nested: Any = []
    for _ in range(40):
        nested = [nested, nested]
    endless: list[Any] = []
    endless.append(endless)
    odd = [
        _Call(os.system, "touch hacked"),
        _Call(eval, "1"),
        _Call(bytearray, 2**40),
        _Call(getattr, "x", "upper"),
        {"W_enc": nested},
        {"W_enc": endless},
        {1: 2},
        {"W_enc": 10**5000},
        {"a": float("nan")},
        [1, 2],
        None,
        "x" * 3_000_000,
        {str(i): i for i in range(50_000)},
    ]
    members[name] = pickle.dumps(rng.choice(odd), protocol=rng.choice([0, 2, 4, 5]))
    return _zipped(list(members.items()))


def _on_folder(rng: random.Random, files: dict[str, bytes | str], other: Seed) -> str:
    name = rng.choice(sorted(files))
    change = rng.choice(["drop", "rename", "link", "pipe", "folder", "add", "swap", "case", "many"])
    if change == "drop" and len(files) > 1:
        del files[name]
    elif change == "rename":
        files[rng.choice(["a\nb", "\x1b[2J.json", "x" * 200, "cfg.json", "ae.pt", "é.npz"])] = (
            files.pop(name)
        )
    elif change in ("link", "pipe", "folder"):
        files[name] = change
    elif change == "add":
        files |= other.files
    elif change == "swap":
        files[name] = rng.choice(list(other.files.values()))
    elif change == "case":
        files[name.swapcase()] = files[name]
    else:
        files |= {f"n{i}.json": b"{}" for i in range(300)}
    return f"{change} {name}"


def _put_checksum(files: dict[str, bytes | str]) -> None:
    """So that what is behind it is tried."""
    record, weights = files["sae.json"], files.get("sae.safetensors")
    if isinstance(record, bytes) and isinstance(weights, bytes):
        try:
            whole = json.loads(record)
            whole["checksum"] = hashlib.sha256(weights).hexdigest()
            files["sae.json"] = json.dumps(whole).encode()
        except (ValueError, TypeError, RecursionError):
            return


# One case


def write(case: Case, folder: Path) -> Path:
    """What to open."""
    for name, content in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content == "link":
            path.symlink_to("/etc/passwd")
        elif content == "pipe":
            os.mkfifo(path)
        elif content == "folder":
            path.mkdir()
        else:
            path.write_bytes(content if isinstance(content, bytes) else b"")
    single = len(case.files) == 1 and len(case.seed.files) == 1
    return folder / next(iter(case.files)) if single else folder


def attempt(case: Case, path: Path) -> tuple[str, str]:
    """Outcome and what was said."""
    from saebench.errors import UserError

    try:
        said = _suite(path) if case.seed.told is None else _checkpoint(path, case)
    except UserError as error:
        return "refused", str(error)
    except TimeoutError:
        return "FINDING slow", traceback.format_exc()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"FINDING {type(error).__name__}", traceback.format_exc()
    return ("accepted", "") if not said else ("FINDING inconsistent", said)


def _suite(path: Path) -> str:
    from saebench import suite

    loaded = suite.load(path)
    json.dumps(loaded.definition())
    return "" if len(loaded.trained()) + len(loaded.checkpoints()) > 0 else "a suite without SAEs"


def _checkpoint(path: Path, case: Case) -> str:
    import torch

    from saebench.checkpoints import open_checkpoint
    from saebench.loaders._files import Limits

    limits = Limits(max_bytes=2**30, allow_pickle=True)
    opened = open_checkpoint(str(path), case.format, case.seed.told, limits, None, Path("/"))
    for member in opened.members:
        sae = member.load()
        for name, value in sae.state_dict().items():
            if not bool(torch.isfinite(value).all()) or value.dtype != torch.float32:
                return f"{name} is not finite, or not float32"
        x = torch.zeros(2, sae.d_in)
        z = sae.encode(x)
        if z.shape != (2, sae.d_sae) or sae.decode(z).shape != (2, sae.d_out):
            return f"encodes to {tuple(z.shape)}"
    return ""


def _left(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


# Workers


def work(seed: int, numbers: list[int], verbose: bool) -> None:
    """One line of JSON for each case, before and after it."""
    import torch

    torch.set_num_threads(1)
    all_seeds = _valid(seeds())
    baseline = _memory("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (baseline + EXTRA_MEMORY, baseline + EXTRA_MEMORY))
    signal.signal(signal.SIGALRM, _late)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    n_open = _n_open()
    place = Path(tempfile.mkdtemp(prefix="fuzz-"))
    os.environ["TMPDIR"] = tempfile.tempdir = str(place / "tmp")
    for number in numbers:
        _tell(start=number)
        rng = random.Random(f"{seed}:{number}")
        case = mutate(rng, all_seeds, number)
        outcome = _timed(number, case, place)
        if _n_open() > n_open:
            outcome = outcome._replace(outcome="FINDING open file")
        if verbose:
            _tell(seed=case.seed.name, done=case.done)
        _tell(**outcome._asdict())
    _tell(peak=(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - rss) * 1024)
    shutil.rmtree(place)


def _valid(all_seeds: list[Seed]) -> list[Seed]:
    """Those that are accepted as they are. Every module that reading needs is there before memory is counted."""
    found = []
    for seed in all_seeds:
        with tempfile.TemporaryDirectory() as folder:
            case = Case(seed, dict(seed.files), None, [])
            outcome, said = attempt(case, write(case, Path(folder)))
        if outcome == "accepted":
            found.append(seed)
        else:
            _tell(invalid=seed.name, said=said)
    return found


def _timed(number: int, case: Case, place: Path) -> Outcome:
    folder = place / "case"
    shutil.rmtree(place / "tmp", ignore_errors=True)
    folder.mkdir()
    (place / "tmp").mkdir()
    path = write(case, folder)
    before, here = _left(place), set(Path.cwd().iterdir())
    began = time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        outcome, said = attempt(case, path)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds = time.perf_counter() - began
    if _left(place) != before or set(Path.cwd().iterdir()) != here:
        outcome, said = "FINDING file left behind", str(_left(place) - before)
    shutil.rmtree(folder)
    return Outcome(number, _kind(case), outcome, seconds, said)


def _kind(case: Case) -> str:
    if case.seed.told is None:
        return "suite"
    return "+".join(sorted({Path(name).suffix or "none" for name in case.seed.files}))


def _late(*_: Any) -> None:
    raise TimeoutError


def _memory(name: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _n_open() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def _tell(**record: Any) -> None:
    print(json.dumps(record), flush=True)


# Guided by coverage


READERS = ("safetensors", "json", "yaml", "npz", "pt", "suite.yaml")


def guided(n_cases: int, seed: int) -> None:
    """The first byte of a case says what reads the others. Ends the process, with a file and a traceback if it finds
    anything."""
    atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["saebench", "yaml", "zipfile", "numpy.lib"]):
        importlib.import_module("saebench.loaders._files")
        importlib.import_module("saebench.suite")
    place = Path(tempfile.mkdtemp(prefix="guided-"))
    corpus = place / "corpus"
    corpus.mkdir()
    for known in seeds():
        for name, content in known.files.items():
            suffix = "suite.yaml" if known.told is None else name.rpartition(".")[2]
            if suffix in READERS and len(content) < 8_000:
                kind = bytes([READERS.index(suffix)])
                (corpus / hashlib.sha256(content).hexdigest()).write_bytes(kind + content)

    def one(data: bytes) -> None:
        if data:
            read_one(place, READERS[data[0] % len(READERS)], data[1:])

    bounds = [f"-runs={n_cases}", f"-seed={seed}", "-max_len=8000", f"-timeout={SECONDS:.0f}"]
    atheris.Setup([sys.argv[0], *bounds, "-rss_limit_mb=2500", str(corpus)], one)
    atheris.Fuzz()


def read_one(place: Path, kind: str, content: bytes) -> None:
    """Raises whatever is not a refusal."""
    from saebench import suite
    from saebench.errors import UserError
    from saebench.loaders._files import Limits, Source

    path = place / f"x.{kind}"
    path.write_bytes(content)
    try:
        if kind == "suite.yaml":
            suite.load(path)
            return
        source = Source(path, Limits(max_bytes=2**24, allow_pickle=True))
        readers = {
            "safetensors": source.tensors,
            "json": source.json,
            "yaml": source.yaml,
            "npz": source.arrays,
            "pt": source.pickled,
        }
        readers[kind](path.name)
    except UserError:
        return


# The whole


def run_chunk(seed: int, numbers: list[int]) -> list[dict[str, Any]]:
    """What the workers said of these cases; after one that ended a worker, another goes on."""
    found: list[dict[str, Any]] = []
    while numbers:
        command = [sys.executable, __file__, "--seed", str(seed), "--worker", json.dumps(numbers)]
        limit = SILENCE + len(numbers) * SECONDS
        try:
            ended = subprocess.run(
                command, capture_output=True, text=True, timeout=limit, check=False
            )
            out, how = ended.stdout, f"ended with {ended.returncode}: {ended.stderr[-2000:]}"
        except subprocess.TimeoutExpired as error:
            out, how = (error.stdout or b"").decode(), "hangs"
        said = [json.loads(line) for line in out.splitlines() if line.endswith("}")]
        found += said
        if any("peak" in record for record in said):
            break
        started = [record["start"] for record in said if "start" in record]
        if not started:
            raise SystemExit(f"a worker never started: {how}")
        found.append(Outcome(started[-1], "?", "FINDING crash", 0.0, how)._asdict())
        print(f"case {started[-1]}: {how}", flush=True)
        numbers = numbers[numbers.index(started[-1]) + 1 :]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", type=int, help="the number of one case, to see it again")
    parser.add_argument("--atheris", action="store_true", help="guided by coverage")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.atheris:
        guided(options.cases, options.seed)
    if options.worker or options.only is not None:
        numbers = json.loads(options.worker) if options.worker else [options.only]
        work(options.seed, numbers, options.only is not None)
        return 0
    chunks = [
        list(range(at, min(at + CHUNK, options.cases))) for at in range(0, options.cases, CHUNK)
    ]
    said: list[dict[str, Any]] = []
    began = time.monotonic()
    with ThreadPoolExecutor(options.processes) as pool:
        for chunk in pool.map(lambda numbers: run_chunk(options.seed, numbers), chunks):
            said += chunk
            n = sum("outcome" in record for record in said)
            print(f"{n:,} of {options.cases:,} cases, {time.monotonic() - began:.0f} s", flush=True)
    return summarize(said, options.seed)


def summarize(said: list[dict[str, Any]], seed: int) -> int:
    outcomes = [Outcome(**record) for record in said if "outcome" in record]
    for name in sorted({record["invalid"] for record in said if "invalid" in record}):
        print(f"left out, being refused as it is: {name}")
    table = Counter((o.kind, o.outcome) for o in outcomes)
    print(f"seed {seed}: {len(outcomes):,} cases")
    for (kind, outcome), n in sorted(table.items()):
        print(f"{kind:32} {outcome:32} {n:8,}")
    slowest = max(outcomes, key=lambda o: o.seconds)
    peak = max((record["peak"] for record in said if "peak" in record), default=0)
    print(f"slowest: case {slowest.number} ({slowest.kind}), {slowest.seconds:.2f} s")
    print(f"peak memory: {peak / 1e6:,.0f} MB beyond the start of a worker")
    findings = [o for o in outcomes if o.outcome.startswith("FINDING")]
    for finding in findings[:40]:
        print(f"\ncase {finding.number}: {finding.outcome}\n{finding.said[-1500:]}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
