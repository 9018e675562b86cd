"""Whatever bytes are handed over are refused cleanly, or read as what fits together; tools/fuzz.py makes more."""

import importlib.util
import json
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saebench import strict
from saebench.errors import UserError
from saebench.loaders._files import Limits, Source

SECONDS = 60
"""Of the process, which a busy machine does not lengthen."""
FEW = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def _limited() -> Iterator[None]:
    """A hang is a failure."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    path = Path(__file__).parents[1] / "tools" / "fuzz.py"
    spec = importlib.util.spec_from_file_location("fuzz", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = module
    spec.loader.exec_module(module)
    return module


def read(folder: Path, name: str, content: bytes) -> dict[str, Any] | None:
    """None where it is refused."""
    (folder / name).write_bytes(content)
    source = Source(folder / name, Limits(max_bytes=2**24, allow_pickle=True))
    kinds = {"safetensors": source.tensors, "npz": source.arrays, "pt": source.pickled}
    try:
        return kinds.get(name.partition(".")[2], getattr(source, name.partition(".")[2], None))(
            name
        )
    except UserError:
        return None


@FEW
@given(
    st.sampled_from(["x.safetensors", "x.npz", "x.pt", "x.json", "x.yaml"]), st.binary(max_size=200)
)
def test_any_bytes_are_refused_or_read(tmp_path: Path, name: str, content: bytes):
    found = read(tmp_path, name, content)
    assert found is None or isinstance(found, dict)


@FEW
@given(
    st.lists(st.integers(-2, 2**65) | st.floats() | st.booleans() | st.none(), max_size=5),
    st.lists(st.integers(-2, 64), min_size=1, max_size=3),
    st.sampled_from(["F32", "F16", "BF16", "I64", "F8_E4M3", "BOOL", ""]),
    st.integers(0, 64),
)
def test_a_header_that_is_accepted_says_what_the_file_holds(
    tmp_path: Path, shape: list[Any], offsets: list[int], dtype: str, n_bytes: int
):
    header = json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(n_bytes)
    found = read(tmp_path, "x.safetensors", content)
    if found is not None:
        assert list(found["a"].shape) == shape
        assert found["a"].numel() * found["a"].element_size() == n_bytes


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3)
    ),
    max_leaves=10,
)


@FEW
@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), plain, max_size=4))
def test_every_plain_value_is_read_as_it_was_written(tmp_path: Path, value: dict[str, Any]):
    assert read(tmp_path, "x.json", json.dumps(value).encode()) == value


@FEW
@given(st.text(alphabet="{}[]:,&*a1\"'#|>-?!%@` \n\t.~<", max_size=60))
def test_yaml_is_refused_or_gives_what_json_could_say(text: str):
    try:
        value = strict.loads_yaml(text)
        strict.check_depth(value, "here")
    except (ValueError, UserError):
        return
    if value is not None:
        json.dumps(value, allow_nan=False)


@FEW
@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=8))
def test_a_changed_archive_is_refused_or_read(tmp_path: Path, at: int, some: bytes):
    for name in ("x.npz", "x.pt"):
        path = tmp_path / f"whole-{name}"
        if not path.exists() and name == "x.npz":
            np.savez(path, a=np.arange(6, dtype=np.float32))
        elif not path.exists():
            torch.save({"a": torch.arange(6.0)}, path)
        content = path.read_bytes()
        place = at % len(content)
        found = read(tmp_path, name, content[:place] + some + content[place + len(some) :])
        assert found is None or isinstance(found, dict)


def outcomes(fuzz: ModuleType, folder: Path, seed: int, numbers: range) -> list[str]:
    """Anything but a clean refusal or a sound SAE."""
    wrong = []
    known = fuzz.seeds()
    for number in numbers:
        case = fuzz.mutate(random.Random(f"{seed}:{number}"), known, number)
        place = folder / str(number)
        place.mkdir()
        outcome, said = fuzz.attempt(case, fuzz.write(case, place))
        if outcome.startswith("FINDING"):
            wrong.append(f"{number}: {outcome}: {said}")
    return wrong


@pytest.mark.slow
def test_some_cases_of_the_fuzzer_are_refused_or_sound(fuzz: ModuleType, tmp_path: Path):
    assert outcomes(fuzz, tmp_path, 7, range(120)) == []


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 3000, 300))
def test_many_cases_of_the_fuzzer_are_refused_or_sound(
    fuzz: ModuleType, tmp_path: Path, start: int
):
    assert outcomes(fuzz, tmp_path, 8, range(start, start + 300)) == []


def test_a_case_depends_on_its_seed_and_number_alone(fuzz: ModuleType):
    known = fuzz.seeds()
    first, second = (fuzz.mutate(random.Random("1:5"), known, 5) for _ in range(2))
    assert (first.files, first.done) == (second.files, second.done)
