"""Seconds and memory that scoring one more SAE takes, beside the floor and the standard suite's core eval.

    python benchmarks/score.py --model FOLDER --text FILES [--peers --peer-python PYTHON] [--wide]

24 SAEs (widths 512 and 4,096; ReLU, gated, TopK and JumpReLU, of random directions, at an L0 of 16 to 32) are scored
with all core evals through the public pipeline, results written and all.

shared  what all SAEs share: opening model and text, one pass for the activations, three for the references
each    seconds of all the rest, by the number of SAEs
floor   one encoder product x W_enc over all tokens, and one forward pass of the language model resumed at the site;
        measured in turn with the scoring

Every case runs in a process of its own, so that its peak of memory is its own.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from _common import (
    PACKAGES,
    PEER_PACKAGES,
    command,
    in_process,
    in_turn,
    machine,
    peak_memory,
    publish,
    table,
    typical,
    versions,
)
from jaxtyping import Float
from torch import Tensor

from saebench import runner, suite, trainer
from saebench.controls._control import Material, Planned
from saebench.controls.random import Random
from saebench.saes._dictionary import Dictionary
from saebench.saes.gated import Gated
from saebench.saes.jumprelu import JumpReLU
from saebench.saes.relu import ReLU
from saebench.saes.topk import TopK
from saebench.subject import LanguageModel
from saebench.trainer import TrainRun
from saebench.types import Site

WIDTHS = (512, 4096)
L0S = (16, 24, 32)
WIDE = 2**20
EVALS = ["sparsity", "reconstruction", "fidelity", "shrinkage", "geometry"]
MOST_TIMES_FLOOR = 3.0
MOST_OF_PEER = 0.1
MOST_WIDE_BYTES = 4e9


class Case(NamedTuple):
    """SAEs that are scored together, by the folders of their checkpoints."""

    name: str
    width: int
    saes: list[str]
    tokens: int


class Measured(NamedTuple):
    """Of one case."""

    opening: float
    activations: float
    references: float
    score: list[float]
    floor: list[float]
    tokens: int
    peak_bytes: int


def main() -> None:
    asked = _arguments().parse_args()
    if asked.case is not None:
        measured = _measure(asked, Case(*json.loads(asked.case)))
        asked.answer.write_text(json.dumps(measured._asdict()), encoding="utf-8")
    elif asked.make is not None:
        asked.answer.write_text(json.dumps(_make(asked, *json.loads(asked.make))), encoding="utf-8")
    else:
        _all_cases(asked)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or Hub id of a language model")
    parser.add_argument("--text", required=True, help="path or pattern of .jsonl or .txt files")
    parser.add_argument("--layer", type=int, default=2, help="SAEs read resid_post of this layer")
    parser.add_argument("--tokens", type=int, default=123_000)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--wide", action="store_true", help=f"also an SAE {WIDE:,} latents wide")
    parser.add_argument("--wide-tokens", type=int, default=16_000)
    parser.add_argument("--peers", action="store_true", help="also the standard suite's core eval")
    parser.add_argument("--peer-python", default=sys.executable, help="Python that has the peers")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--make", help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    return parser


def _all_cases(asked: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = [_run_case(asked, case, folder) for case in _cases(asked, folder)]
        peers = _run_peers(asked, folder) if asked.peers else {}
    rows = [_row(case, measured, peers.get(str(case.width))) for case, measured in found]
    content = {
        "command": command(),
        "machine": machine(),
        "versions": versions(PACKAGES) | peers.get("versions", {}),
        "cases": {case.name: measured._asdict() for case, measured in found},
        "peers": peers,
        "rows": rows,
    }
    publish(asked.out, "score", "Scoring speed", content, f"{table(rows)}\n\n{_verdicts(rows)}")


def _cases(asked: argparse.Namespace, folder: str) -> Iterator[Case]:
    for width in asked.widths:
        names = _child(asked, folder, "--make", json.dumps([folder, width, len(L0S)]))
        few = names[: len(names) // len(L0S)]
        yield Case(f"{len(few)} of {width:,}", width, few, asked.tokens)
        yield Case(f"{len(names)} of {width:,}", width, names, asked.tokens)
    if asked.wide:
        names = _child(asked, folder, "--make", json.dumps([folder, WIDE, 0]))
        yield Case(f"1 of {WIDE:,}", WIDE, names, asked.wide_tokens)


def _run_case(asked: argparse.Namespace, case: Case, folder: str) -> tuple[Case, Measured]:
    measured = Measured(**_child(asked, folder, "--case", json.dumps(case)))
    print(f"{case.name}: {measured}", file=sys.stderr, flush=True)
    return case, measured


def _child(asked: argparse.Namespace, folder: str, *what: str) -> Any:
    """This very script, in a process of its own."""
    answer = Path(folder) / "answer.json"
    same = ["model", "text", "layer", "tokens", "context", "rounds"]
    options = [part for name in same for part in (f"--{name}", str(getattr(asked, name)))]
    arguments = (*options, *what, "--answer", str(answer))
    return in_process(sys.executable, Path(__file__), *arguments, answer=answer)


def _run_peers(asked: argparse.Namespace, folder: str) -> Any:
    """The peer's seconds per SAE of each width, on the same weights, model and text."""
    answer = Path(folder) / "peers.json"
    options = {
        "model": asked.model,
        "text": asked.text,
        "layer": asked.layer,
        "context": asked.context,
        "sequences": asked.tokens // asked.context,
        "saes": {width: [str(Path(folder) / f"jumprelu-w{width}-l24")] for width in asked.widths},
        "packages": PEER_PACKAGES,
    }
    script = Path(__file__).parent / "_peer_score.py"
    return in_process(asked.peer_python, script, json.dumps(options), str(answer), answer=answer)


def _row(case: Case, measured: Measured, peer: float | None) -> dict[str, Any]:
    each = typical(measured.score) / len(case.saes)
    floor = typical(measured.floor)
    return {
        "SAEs": case.name,
        "tokens": measured.tokens,
        "shared, s": measured.opening + measured.activations + measured.references,
        "each, s": each,
        "floor, s": floor,
        "each / floor": each / floor,
        "peer's core eval, s": peer,
        "each / peer": None if peer is None else each / peer,
        "peak memory, MB": round(measured.peak_bytes / 1e6),
    }


def _verdicts(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        name, of_peer = row["SAEs"], row["each / peer"]
        if name != f"1 of {WIDE:,}":
            lines.append(
                _verdict(f"{name}: times the floor", row["each / floor"], MOST_TIMES_FLOOR)
            )
        if of_peer is not None:
            lines.append(_verdict(f"{name}: share of the peer's time", of_peer, MOST_OF_PEER))
        if name == f"1 of {WIDE:,}":
            gigabytes = row["peak memory, MB"] / 1e3
            lines.append(_verdict(f"{name}: peak in GB", gigabytes, MOST_WIDE_BYTES / 1e9))
    return "\n".join(lines)


def _verdict(what: str, value: float, most: float) -> str:
    return f"- {what}: {value:.3g}, at most {most:g} wanted: {'met' if value <= most else 'MISSED'}"


def _definition(
    asked: argparse.Namespace, tokens: int, saes: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "name": "score",
        "model": {"id": asked.model},
        "sites": [{"layer": asked.layer, "stream": "resid_post"}],
        "text": {
            "files": asked.text,
            "context": asked.context,
            "train_tokens": 32_768,
            "eval_tokens": tokens,
            "eval_share": 0.8,
            "train_passes": 100,
        },
        "training": {"batch_tokens": 2048, "buffer_tokens": 32_768},
        "saes": saes,
        "evals": EVALS,
    }


def _open(folder: Path, definition: dict[str, Any]) -> runner.Workbench:
    file = folder / "suite.yaml"
    file.write_text(yaml.safe_dump(definition), encoding="utf-8")
    options = runner.Options(folder, folder, folder / "cache", "cpu", None, False)
    return runner.Workbench(suite.load(file), file, options)


def _make(asked: argparse.Namespace, folder: str, width: int, n_l0s: int) -> list[str]:
    """Writes the checkpoints of one width: all architectures at the first L0s, or one of JumpReLU for 0."""
    with tempfile.TemporaryDirectory() as scratch:
        stand_in = {"variant": "relu", "width": 16, "l0": 4}
        bench = _open(Path(scratch), _definition(asked, asked.context, [stand_in]))
        site = bench.suite.sites[0]
        x = bench.stream.calibration(site, 16_384 if n_l0s else 128)
        (run,) = bench.train_runs()
    names = []
    for l0 in L0S[: max(1, n_l0s)]:
        for name, sae in _architectures(x, width, l0).items():
            if n_l0s or name == "jumprelu":
                names.append(_write(Path(folder) / f"{name}-w{width}-l{l0}", sae, run))
    return names


def _write(folder: Path, sae: Dictionary, run: TrainRun) -> str:
    trainer.write_checkpoint(folder, sae, run)
    return str(folder)


@torch.no_grad()
def _architectures(x: Float[Tensor, "n d"], width: int, l0: int) -> dict[str, Dictionary]:
    """One SAE of random directions in four architectures; ReLU's and gated's threshold is in the bias."""
    planned = Planned("", width, float(l0))
    jumprelu = Random(seed=l0).build(planned, Material(x, lambda _: JumpReLU(1, 1)))
    assert isinstance(jumprelu, JumpReLU), "the random control is a JumpReLU SAE"
    d_in = jumprelu.d_in
    relu, gated, topk = ReLU(d_in, width), Gated(d_in, width), TopK(d_in, width, k=l0)
    for sae in (relu, gated, topk):
        sae.W_enc.copy_(jumprelu.W_enc)
        sae.W_dec.copy_(jumprelu.W_dec)
        sae.b_dec.copy_(jumprelu.b_dec)
    relu.b_enc.copy_(jumprelu.b_enc - jumprelu.threshold)
    gated.b_gate.copy_(jumprelu.b_enc - jumprelu.threshold)
    gated.b_mag.copy_(jumprelu.b_enc)
    topk.b_enc.copy_(jumprelu.b_enc)
    return {"jumprelu": jumprelu, "relu": relu, "gated": gated, "topk": topk}


def _measure(asked: argparse.Namespace, case: Case) -> Measured:
    checkpoints = [
        {"checkpoint": sae, "format": "native", "name": Path(sae).name} for sae in case.saes
    ]
    with tempfile.TemporaryDirectory() as scratch:
        definition = _definition(asked, case.tokens, checkpoints)
        began = time.perf_counter()
        bench = _open(Path(scratch), definition)
        (site,) = bench.suite.sites
        opened = time.perf_counter()
        lm = _language_model(bench)
        tokens = lm.facts(site, site).n_tokens
        read = time.perf_counter()
        lm.references(site)
        ablated = time.perf_counter()
        rounds, warmup = (1, 0) if case.width == WIDE else (asked.rounds, 1)
        W_enc = _encoder(bench)
        seconds = in_turn(
            {"floor": lambda: _floor(bench, site, W_enc), "score": lambda: _score(bench)},
            rounds,
            warmup,
        )
    return Measured(
        opening=opened - began,
        activations=read - opened,
        references=ablated - read,
        tokens=tokens,
        peak_bytes=peak_memory(),
        **seconds,
    )


def _encoder(bench: runner.Workbench) -> Tensor:
    W_enc: Tensor = bench.candidates()[0].load().W_enc  # type: ignore[attr-defined]
    return W_enc


def _score(bench: runner.Workbench) -> None:
    """All SAEs under all evals, as `saebench run` does it; results go to a folder that is new every time."""
    with tempfile.TemporaryDirectory(dir=bench.options.results) as fresh:
        bench.folder = Path(fresh)
        failed = runner.score(bench, bench.eval_runs(bench.candidates()))
        assert failed == 0, f"{failed} runs failed, so the time says nothing"


@torch.no_grad()
def _floor(bench: runner.Workbench, site: Site, W_enc: Float[Tensor, "d d_sae"]) -> None:
    """What no eval of an SAE can do without."""
    lm = _language_model(bench)
    for batch in lm.evaluation(site):
        for chunk in batch.x.split(max(1, 2**22 // W_enc.shape[1])):
            torch.mm(chunk, W_enc)
        clean = batch._streams.clean
        lm._resumed(site, batch._rows, clean)


def _language_model(bench: runner.Workbench) -> LanguageModel:
    assert isinstance(bench.subject, LanguageModel), "the suite written here names one"
    return bench.subject


if __name__ == "__main__":
    main()
