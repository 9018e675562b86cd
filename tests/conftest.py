"""Shared fixtures: a tiny language model with its text on disk, suites of it, and the command line."""

import copy
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from threadpoolctl import threadpool_limits
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from saebench import cli
from tests.models import byte_tokenizer

VARIANTS = ("relu", "gated", "topk", "batch_topk", "jumprelu")
EVALS = ["sparsity", "reconstruction", "fidelity", "shrinkage", "geometry"]


class World(NamedTuple):
    """What suites of the tests are about."""

    model: Path
    text: Path


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


class Place(NamedTuple):
    """A folder to run suites in."""

    folder: Path

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def results(self, name: str = "tiny") -> Path:
        return self.folder / "results" / name

    def arguments(self, suite: Path) -> list[str]:
        folders = ("results", "checkpoints", "cache")
        options = [part for name in folders for part in (f"--{name}", str(self.folder / name))]
        return ["run", str(suite), "--device", "cpu", *options]

    def files(self, *below: str) -> dict[str, tuple[bytes, int]]:
        """Content and time of every file, for comparisons."""
        found = [p for part in below for p in (self.folder / part).rglob("*") if p.is_file()]
        return {
            str(p.relative_to(self.folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in found
        }

    def weights(self) -> dict[str, bytes]:
        """Of every trained SAE, by its folder."""
        return {p.parent.name: p.read_bytes() for p in self.checkpoints.glob("*/sae.safetensors")}

    def scores(self, name: str = "tiny") -> dict[str, tuple[Any, Any]]:
        """Identity and scores of every run, by its file; provenance differs from run to run."""
        runs = {p.name: json.loads(p.read_text()) for p in self.results(name).glob("runs/*.json")}
        return {file: (run["spec"], run["scores"]) for file, run in runs.items()}


Run = Callable[..., Ended]
WriteSuite = Callable[..., Path]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Sums in one order, so that weights can be compared bit by bit, here and in processes that tests start; processes
    that do not fight for cores; and no bars among messages.
    """
    transformers_logging.disable_progress_bar()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, threadpool_limits(1):
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=259,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=3,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=64,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=2,
            )
        )
        for parameter in model.parameters():
            parameter.data = 0.3 * torch.randn_like(parameter) + (0.7 if parameter.ndim == 1 else 0)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), size=rng.integers(2, 6))) for _ in range(50)]
    texts = [" ".join(rng.choice(words, size=40)) for _ in range(200)]
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    _learn_letters(model, tokenizer("".join(texts), return_tensors="pt")["input_ids"][0])
    model.save_pretrained(folder / "model")
    return World(folder / "model", text)


def _learn_letters(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    """Until ablating a stream costs something."""
    rows = ids[: len(ids) // 32 * 32].view(-1, 32)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(60):
        batch = rows[torch.arange(16) + 16 * step % (len(rows) - 16)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def definition(world: World) -> dict[str, Any]:
    """A small suite that is valid; tests change what they are about."""
    topk = {"variant": "topk", "width": 32, "l0": 4, "lr": 0.01}
    return whole_definition(world) | {
        "saes": [topk],
        "controls": ["identity"],
        "reports": ["leaderboard"],
    }


@pytest.fixture
def write_suite(definition: dict[str, Any], tmp_path: Path) -> WriteSuite:
    """Writes the suite to a file, with other values for some of its keys."""

    def write(file: str = "suite.yaml", **changes: Any) -> Path:
        path = tmp_path / file
        changed = copy.deepcopy(definition) | changes
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(changed, sort_keys=False), encoding="utf-8")
        return path

    return write


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def saebench(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """The command, in this process."""

    def command(*arguments: str | Path) -> Ended:
        monkeypatch.setattr(sys, "argv", ["saebench", *map(str, arguments)])
        capfd.readouterr()
        code = cli.main()
        return Ended(code, *capfd.readouterr())

    return command


@pytest.fixture
def run(saebench: Run, place: Place) -> Run:
    """`saebench run` of a suite, in the folder of the test or in another place."""

    def command(suite: Path, *options: str, at: Place = place) -> Ended:
        return saebench(*at.arguments(suite), *options)

    return command


def whole_definition(world: World) -> dict[str, Any]:
    """Every variant, control and core eval, with reports of each kind."""
    return {
        "name": "tiny",
        "model": {"id": str(world.model)},
        "sites": [{"layer": 1, "stream": "resid_post"}],
        "text": {
            "files": str(world.text),
            "context": 32,
            "train_tokens": 3200,
            "eval_tokens": 600,
        },
        "training": {"batch_tokens": 64, "buffer_tokens": 1024},
        "saes": [{"variant": v, "width": 32, "l0": 4, "lr": 0.01} for v in VARIANTS],
        "controls": ["identity", "pca", "random", "permuted_decoder"],
        "evals": list(EVALS),
        "reports": ["leaderboard", {"pareto": {"x": "l0", "y": "loss_recovered"}}],
    }


class Finished(NamedTuple):
    """A suite that has been run, for tests that change nothing of it."""

    place: Place
    suite: Path
    plain: Path
    """The same suite without plots, which take the most time."""
    code: int


@pytest.fixture(scope="session")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The whole suite, run undisturbed."""
    place = Place(tmp_path_factory.mktemp("finished"))
    suite, plain = place.folder / "suite.yaml", place.folder / "plain.yaml"
    whole = whole_definition(world)
    suite.write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")
    without = whole | {"reports": ["leaderboard"]}
    plain.write_text(yaml.safe_dump(without, sort_keys=False), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["saebench", *place.arguments(suite)])
        return Finished(place, suite, plain, cli.main())
