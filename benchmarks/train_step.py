"""Seconds of one training step of every variant, as a multiple of the encoder product that no step can avoid.

    python benchmarks/train_step.py [--peers] [--growth] [--device cuda]

A step is everything that training does with a batch: loss, gradients, clipping, the optimiser, projections and the
bookkeeping. It is timed in turn with one product of the same shape, on the same threads. Each variant is in a process
of its own, so that its peak of memory is its own, and in a state with the wanted L0: where no k sets it, biases or
thresholds do.

`--peers` times dictionary_learning and SAELens beside it, where they are installed, through their public trainers.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import (
    PEER_PACKAGES,
    Row,
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
from torch import Tensor

TARGETS = {  # times the encoder product, d 512, width 8,192, batch 2,048, L0 32, float32, 2 CPU cores
    "topk": 2.5,
    "batch_topk": 3.0,
    "matryoshka": 3.0,
    "relu": 3.5,
    "relu_april": 3.5,
    "jumprelu": 3.5,
    "p_anneal": 3.5,
    "gated": 5.0,
}
ALONE = ("end_to_end", "rescaled", "transcoder", "skip_transcoder")
"""Variants that need a language model, a parent or a second site, and cost what those cost."""
GROWTH = 4
STEPS = 10**6


def main() -> None:
    options = _options()
    if options.one is not None:
        owner, name = options.one.split(":")
        growth = owner == "growth"
        found = _measure_growth(name, options) if growth else _measure(owner, name, options)
        Path(options.answer).write_text(json.dumps(found), encoding="utf-8")
        return
    rows = [_in_own_process(which, options) for which in _wanted(options)]
    text = table([_shown(row) for row in rows])
    grown: list[Row] = []
    if options.growth:
        ours = [row["variant"] for row in rows if row["of"] == "saebench"]
        grown = [_in_own_process(f"growth:{name}", options) for name in ours]
        text += f"\n\nTime of a step at {GROWTH} times the width, as a multiple:\n\n{table(grown)}"
    content = {
        "command": command(),
        "machine": machine() | ({"gpu": torch.cuda.get_device_name()} if _on_gpu(options) else {}),
        "versions": versions(("torch", "saebench", *PEER_PACKAGES)),
        "shape": {n: getattr(options, n) for n in ("d", "width", "batch", "l0", "device")},
        "rows": rows,
        "growth": grown,
    }
    shape = f"d {options.d}, width {options.width:,}, batch {options.batch:,}, L0 {options.l0}"
    publish(
        options.out, options.name, f"One training step: {shape}, {options.device}", content, text
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--d", type=int, default=512)
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--l0", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--peers", action="store_true", help="time dictionary_learning and SAELens too"
    )
    parser.add_argument(
        "--growth", action="store_true", help=f"and steps at {GROWTH} times the width"
    )
    parser.add_argument("--only", help="one variant of ours")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", default="train_step", help="of the files that are written")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--answer", help=argparse.SUPPRESS)
    return parser.parse_args()


def _wanted(options: argparse.Namespace) -> list[str]:
    from saebench import registry

    ours = [name for name in registry.names("variants") if name not in ALONE]
    chosen = [f"saebench:{name}" for name in ours if options.only in (None, name)]
    if options.peers:
        chosen += [f"dictionary_learning:{name}" for name in _DICTIONARY_LEARNING]
        chosen += [f"sae_lens:{name}" for name in _SAE_LENS]
    return chosen


def _in_own_process(which: str, options: argparse.Namespace) -> Row:
    print(f"timing {which}", file=sys.stderr)
    options.out.mkdir(parents=True, exist_ok=True)
    answer = options.out / ".answer.json"
    shared = ("d", "width", "batch", "l0", "rounds", "device")
    given = {name: getattr(options, name) for name in shared} | {"one": which, "answer": answer}
    arguments = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    row: Row = in_process(sys.executable, Path(__file__), *arguments, answer=answer)
    answer.unlink()
    print(f"  {row.get('ratio', row.get('growth')):.2f} times", file=sys.stderr)
    return row


def _shown(row: Row) -> Row:
    return {
        "of": row["of"],
        "variant": row["variant"],
        "L0": row["l0"],
        "ms per step": 1000 * row["seconds"],
        "ms per encoder product": 1000 * row["product"],
        "ratio": row["ratio"],
        "target": TARGETS.get(row["variant"]) if row["of"] == "saebench" else None,
        "tokens per s": row["tokens_per_s"],
        "peak memory, GiB": row["peak_bytes"] / 2**30,
    }


def _measure(owner: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    x = _batch(options)
    make = {"saebench": _ours, "dictionary_learning": _dictionary_learning, "sae_lens": _sae_lens}
    step, l0 = make[owner](name, x, options)
    works = {"step": _waiting(step, options), "product": _waiting(_product(x, options), options)}
    seconds = in_turn(works, options.rounds, warmup=3)
    whole, floor = typical(seconds["step"]), typical(seconds["product"])
    return {
        "of": owner,
        "variant": name,
        "l0": l0(),
        "seconds": whole,
        "product": floor,
        "ratio": whole / floor,
        "tokens_per_s": options.batch / whole,
        "peak_bytes": torch.cuda.max_memory_allocated() if _on_gpu(options) else peak_memory(),
    }


def _measure_growth(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Both widths in turn, so that both meet the same machine."""
    x = _batch(options)
    wide = argparse.Namespace(**vars(options) | {"width": GROWTH * options.width})
    works = {
        "narrow": _ours(name, x, options)[0],
        "wide": _ours(name, x, wide)[0],
        "narrow product": _product(x, options),
        "wide product": _product(x, wide),
    }
    waiting = {which: _waiting(work, options) for which, work in works.items()}
    seconds = in_turn(waiting, options.rounds, warmup=3)
    middle = {which: typical(rounds) for which, rounds in seconds.items()}
    return {
        "variant": name,
        f"ms at {options.width:,}": 1000 * middle["narrow"],
        f"ms at {wide.width:,}": 1000 * middle["wide"],
        "growth": middle["wide"] / middle["narrow"],
        "growth of the product": middle["wide product"] / middle["narrow product"],
    }


def _batch(options: argparse.Namespace) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(options.batch, options.d, generator=generator) / math.sqrt(options.d)
    return x.to(options.device)


def _product(x: Tensor, options: argparse.Namespace) -> Callable[[], object]:
    """The encoder's."""
    weight = torch.randn(options.width, options.d, device=options.device)
    bias = torch.zeros(options.width, device=options.device)
    return lambda: torch.addmm(bias, x, weight.T)


def _on_gpu(options: argparse.Namespace) -> bool:
    return str(options.device).startswith("cuda")


def _waiting(work: Callable[[], object], options: argparse.Namespace) -> Callable[[], object]:
    """The same, done when it returns."""
    if not _on_gpu(options):
        return work

    def waiting() -> None:
        work()
        torch.cuda.synchronize()

    return waiting


Case = tuple[Callable[[], object], Callable[[], float | None]]
"""One step, and the L0 that it works at (None where the peer's cost does not depend on it)."""


def _ours(name: str, x: Tensor, options: argparse.Namespace) -> Case:
    from saebench import suite, trainer
    from saebench.variants._training import Lesson, Task

    recipe = suite.recipe(name, {"lr": 1e-12})  # all the work, and the state stays
    task = Task(
        d_in=options.d,
        d_out=options.d,
        width=options.width,
        l0=options.l0,
        tokens=STEPS * options.batch,
        generator=torch.Generator().manual_seed(0),
        transcodes=False,
        skip=False,
        parent=None,
    )
    training = recipe.start(task).to(options.device)
    _set_l0(training, x, options.l0)
    optimizer = trainer.optimizer_of(training, recipe)
    generator = torch.Generator(options.device).manual_seed(0)
    steps = iter(range(STEPS))

    def step() -> None:
        # The first batch is at the start, where running means begin; the others are in mid-training.
        progress = 0.0 if next(steps) == 0 else 0.5
        lesson = Lesson(x, x, progress, generator, None)
        trainer.learn(training, optimizer, recipe, lesson, 1 / STEPS)

    def l0() -> float:
        with torch.no_grad():
            active: int = training.export().encode_sparse(x).values.numel()
        return active / len(x)

    return step, l0


@torch.no_grad()
def _set_l0(training: Any, x: Tensor, l0: int) -> None:
    """Where no k sets it: a bias or threshold for all latents above which so many are active."""
    if hasattr(training, "top") or hasattr(training, "k"):
        return
    pre = training.pre(x).flatten()
    level = float(pre.kthvalue(pre.numel() - l0 * len(x)).values)
    if hasattr(training, "threshold") and isinstance(training.threshold, torch.nn.Parameter):
        training.threshold.fill_(level)
    else:
        training.b_enc.sub_(level)
        if hasattr(training, "b_mag"):
            training.b_mag.sub_(level)


_DICTIONARY_LEARNING = {
    "relu": ("standard", "StandardTrainer"),
    "relu_april": ("standard", "StandardTrainerAprilUpdate"),
    "p_anneal": ("p_anneal", "PAnnealTrainer"),
    "gated": ("gdm", "GatedSAETrainer"),
    "topk": ("top_k", "TopKTrainer"),
    "batch_topk": ("batch_top_k", "BatchTopKTrainer"),
    "matryoshka": ("matryoshka_batch_top_k", "MatryoshkaBatchTopKTrainer"),
    "jumprelu": ("jumprelu", "JumpReluTrainer"),
}


def _dictionary_learning(name: str, x: Tensor, options: argparse.Namespace) -> Case:
    import importlib

    module, kind = _DICTIONARY_LEARNING[name]
    build = getattr(importlib.import_module(f"dictionary_learning.trainers.{module}"), kind)
    given: dict[str, Any] = {
        "steps": STEPS,
        "activation_dim": options.d,
        "dict_size": options.width,
    }
    given |= {"layer": 0, "lm_name": "none", "device": options.device}
    if name in ("topk", "batch_topk", "matryoshka"):
        given["k"] = options.l0
    if name == "matryoshka":
        given["group_fractions"] = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2 + 1 / 32]
    if name == "jumprelu":
        given["target_l0"] = options.l0
    trainer = build(**given)
    steps = iter(range(1, STEPS))
    return (lambda: trainer.update(next(steps), x)), lambda: given.get("k")


_SAE_LENS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "relu": ("standard_sae", "StandardTrainingSAE", {"l1_coefficient": 0.03}),
    "gated": ("gated_sae", "GatedTrainingSAE", {"l1_coefficient": 0.03}),
    "topk": ("topk_sae", "TopKTrainingSAE", {"k": None}),
    "batch_topk": ("batchtopk_sae", "BatchTopKTrainingSAE", {"k": None}),
    "jumprelu": ("jumprelu_sae", "JumpReLUTrainingSAE", {}),
}


def _sae_lens(name: str, x: Tensor, options: argparse.Namespace) -> Case:
    import importlib

    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    file, kind, extra = _SAE_LENS[name]
    module = importlib.import_module(f"sae_lens.saes.{file}")
    fields = {key: options.l0 if value is None else value for key, value in extra.items()}
    shape = {"d_in": options.d, "d_sae": options.width, "device": options.device}
    sae = getattr(module, kind)(getattr(module, f"{kind}Config")(**shape, **fields))
    config = SAETrainerConfig(
        total_training_samples=STEPS * options.batch,
        train_batch_size_samples=options.batch,
        device=options.device,
        lr=1e-12,
        lr_end=1e-13,
    )
    trainer = SAETrainer(config, sae, iter([]))
    return (lambda: trainer.step(x)), lambda: fields.get("k")


if __name__ == "__main__":
    main()
