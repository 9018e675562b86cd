"""How good our baselines are beside dictionary_learning's own trainers, on the same activations.

    python benchmarks/quality.py --model FOLDER --text FILES --work FOLDER [--peers]

Both learn from the same batches in the same order (`trainer.Stream`), at the same width, at an L0 near 8, 16 and 32,
with three seeds, and are scored together, by our evals, in one suite. Both choose their learning rate from the same
list, for each L0 by the explained variance there with the first seed. Those of the peer's trainers that have no knob
for L0 are trained at a grid of penalties.

difference  ours less the peer's at the L0 that ours has: the peer's numbers are interpolated in ln L0 between its two
            nearest runs. Sums are averaged over seeds; the interval is paired, over the documents of the evaluation
            text (`stats.paired_difference`). "worse" is a difference whose interval lies below zero.

What is finished is kept in the work folder, and a stopped run goes on from there. `--peers` needs
dictionary-learning beside saebench.
"""

import argparse
import itertools
import math
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from _common import PACKAGES, command, machine, publish, table, versions

from saebench import registry, results, runner, stats, suite
from saebench.results import Results, Units

VARIANTS = (
    "relu",
    "relu_april",
    "gated",
    "p_anneal",
    "topk",
    "batch_topk",
    "matryoshka",
    "jumprelu",
)
PENALTIES = {
    "relu": (0.05, 0.08, 0.13, 0.2, 0.3),
    "relu_april": (0.03, 0.05, 0.08, 0.13, 0.2),
    "gated": (0.08, 0.12, 0.18, 0.28, 0.42),
    "p_anneal": (0.025, 0.04, 0.06, 0.085, 0.125),
}
"""Of the peer's trainers. Those of dictionary_learning_demo (0.006 to 0.08, for models of 512 dimensions and more)
leave an L0 of 50 and more at 64 dimensions; these hold the L0s wanted here."""
L0S = (8, 16, 32)
LRS = (3e-4, 1e-3, 3e-3)
METRICS = ("explained_variance", "loss_recovered")
REACH = 0.1
"""How far, in L0, the peer's runs may lie from ours where none of them lies beyond."""


Rates = dict[str, dict[int, float]]
"""The learning rate of a variant at each L0."""
Peers = dict[str, dict[int, dict[float, list[str]]]]
"""By variant and wanted L0, at the learning rate chosen for it: names of the peer's SAEs by knob, one for each seed."""


class Point(NamedTuple):
    """Runs that differ in nothing but their seed: mean L0, and sums of each metric averaged over them."""

    l0: float
    columns: dict[str, stats.Column]


def main() -> None:
    asked = _arguments().parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    lrs = _swept(asked)
    entries = [_ours(v, l0, asked, lrs[v][l0]) for v in asked.variants for l0 in L0S]
    theirs: Peers = {}
    if asked.peers:
        theirs = _trained_peers(asked)
        entries += [_given(asked, name) for name in _names(theirs)]
    found = _run(asked, "quality", entries)
    rows = [row for variant in asked.variants for row in _rows(found, variant, asked, theirs)]
    content = {
        "command": command(),
        "machine": machine(),
        "versions": versions((*PACKAGES, "dictionary-learning")),
        "learning rates": {"ours": lrs, "peer": _lrs_of(theirs)},
        "rows": rows,
    }
    publish(
        asked.out, "quality", "Quality of the baselines", content, table(list(map(_shown, rows)))
    )


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or Hub id of a language model")
    parser.add_argument("--text", required=True, help="path or pattern of .jsonl or .txt files")
    parser.add_argument("--work", type=Path, required=True, help="what is finished is kept here")
    parser.add_argument("--layer", type=int, default=2, help="SAEs read resid_post of this layer")
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--eval-tokens", type=int, default=60_000)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument(
        "--passes",
        type=int,
        default=13,
        help="over the training text, at the most",
    )
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lrs", type=float, nargs="+", default=list(LRS))
    parser.add_argument("--jobs", type=int, default=2, help="peers that train at the same time")
    parser.add_argument("--peers", action="store_true", help="also dictionary_learning's trainers")
    known = [name for name in VARIANTS if name in registry.names("variants")]
    parser.add_argument("--variants", nargs="+", choices=known, default=known)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser


def _swept(asked: argparse.Namespace) -> Rates:
    """Of those that are not above the L0 they were asked for, which would explain more for that alone."""
    wanted = {"width": asked.width, "l0": list(L0S), "seed": asked.seeds[0], "lr": asked.lrs}
    scores = _run(asked, "quality-sweep", [{"variant": v} | wanted for v in asked.variants]).scores
    explained = scores[scores["metric"] == "explained_variance"].set_index("sae")["value"]
    measured = scores[scores["metric"] == "l0"].set_index("sae")["value"]
    best: Rates = {variant: {} for variant in asked.variants}
    for variant, l0 in itertools.product(asked.variants, L0S):
        stem = f"{variant}-w{asked.width}-l{l0}-s{asked.seeds[0]}-lr"
        sparse = [lr for lr in asked.lrs if measured[f"{stem}{lr:g}"] <= l0 * (1 + REACH)]
        best[variant][l0] = max(sparse or asked.lrs, key=lambda lr: explained[f"{stem}{lr:g}"])  # noqa: B023
    return best


def _ours(variant: str, l0: int, asked: argparse.Namespace, lr: float) -> dict[str, Any]:
    return {"variant": variant, "lr": lr, "width": asked.width, "l0": l0, "seed": asked.seeds}


def _given(asked: argparse.Namespace, name: str) -> dict[str, Any]:
    place = (asked.work / "peers" / name).resolve()
    return {"checkpoint": str(place), "format": "native", "name": name}


def _definition(asked: argparse.Namespace, name: str, saes: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": name,
        "model": {"id": asked.model},
        "sites": [{"layer": asked.layer, "stream": "resid_post"}],
        "text": {
            "files": asked.text,
            "context": asked.context,
            "train_tokens": asked.tokens,
            "eval_tokens": asked.eval_tokens,
            "eval_share": 0.2,
            "train_passes": asked.passes,
        },
        "training": {"batch_tokens": asked.batch, "buffer_tokens": 64 * asked.batch},
        "saes": saes,
        "evals": ["sparsity", "reconstruction", "fidelity"],
    }


def _file(asked: argparse.Namespace, name: str, saes: list[dict[str, Any]]) -> Path:
    file: Path = asked.work / f"{name}.yaml"
    file.write_text(yaml.safe_dump(_definition(asked, name, saes)), encoding="utf-8")
    return file


def _options(asked: argparse.Namespace) -> runner.Options:
    work = asked.work
    return runner.Options(
        work / "results", work / "checkpoints", work / "cache", "cpu", None, False
    )


def _run(asked: argparse.Namespace, name: str, saes: list[dict[str, Any]]) -> Results:
    """A suite through the public pipeline: trains and scores what is missing."""
    file = _file(asked, name, saes)
    failed = runner.run(suite.load(file), file, _options(asked))
    assert failed == 0, f"{failed} runs of the suite {name} failed"
    return results.read(asked.work / "results" / name)


def _trained_peers(asked: argparse.Namespace) -> Peers:
    from _dictionary_learning import Pupil

    first = asked.seeds[0]
    sweep = [
        Pupil(variant, knob, lr, first)
        for variant in asked.variants
        for knob in PENALTIES.get(variant, L0S)
        for lr in asked.lrs
    ]
    _teach(asked, sweep)
    names = [pupil.name for pupil in sweep]
    read = _run(asked, "quality-peers-sweep", [_given(asked, name) for name in names])
    chosen: dict[str, dict[int, dict[float, list[Pupil]]]] = {}
    for variant in asked.variants:
        tried = [pupil for pupil in sweep if pupil.variant == variant]
        best = {l0: _best_lr(read, tried, l0) for l0 in L0S}
        chosen[variant] = {
            l0: {
                knob: [Pupil(variant, knob, lr, seed) for seed in asked.seeds]
                for knob in PENALTIES.get(variant, L0S)
            }
            for l0, lr in best.items()
        }
    _teach(
        asked, [p for at in chosen.values() for k in at.values() for ps in k.values() for p in ps]
    )
    return {
        variant: {
            l0: {knob: [pupil.name for pupil in pupils] for knob, pupils in knobs.items()}
            for l0, knobs in at.items()
        }
        for variant, at in chosen.items()
    }


def _names(theirs: Peers) -> list[str]:
    """None is there twice."""
    at_each = [names for at in theirs.values() for knobs in at.values() for names in knobs.values()]
    return list(dict.fromkeys(itertools.chain.from_iterable(at_each)))


def _best_lr(read: Results, pupils: Sequence[Any], l0: int) -> float:
    """That of the highest explained variance at this L0, between the runs of one learning rate."""
    found = {}
    for lr in sorted({pupil.lr for pupil in pupils}):
        points = [_point(read, [pupil.name]) for pupil in pupils if pupil.lr == lr]
        at = _between(points, l0, reach=math.inf)
        assert at is not None, "any distance is within reach"
        found[lr] = stats.value(*at["explained_variance"])
    best: float = max(found, key=lambda lr: found[lr])
    return best


def _teach(asked: argparse.Namespace, pupils: Sequence[Any]) -> None:
    """Trains what is missing, some at a time, each in one thread."""
    from _dictionary_learning import train

    folder = asked.work / "peers"
    missing = [p for p in dict.fromkeys(pupils) if not (folder / p.name / "sae.json").exists()]
    if not missing:
        return
    lessons = _lessons(asked)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(asked.jobs, spawn, torch.set_num_threads, (1,)) as pool:
        jobs = [pool.submit(train, pupil, lessons, folder) for pupil in missing]
        for number, job in enumerate(jobs, 1):
            job.result()
            if number % 10 == 0 or number == len(jobs):
                print(f"{number} of {len(jobs)} peers are trained", flush=True)


def _lessons(asked: argparse.Namespace) -> Any:
    """Raw activations of all steps, on disk, as our own trainer is given them."""
    from _dictionary_learning import Lessons

    stand_in = {"variant": "topk", "width": 16, "l0": 4}
    file = _file(asked, "quality-stream", [stand_in])
    bench = runner.Workbench(suite.load(file), file, _options(asked))
    (site,) = bench.suite.sites
    mean, scale = bench.stream.statistics()[site]
    path = asked.work / "activations.npy"
    if not path.exists():
        shape = (bench.stream.steps * asked.batch, len(mean))
        half = path.with_suffix(".part.npy")
        kept = np.lib.format.open_memmap(half, mode="w+", dtype=np.float32, shape=shape)
        for step, batch in enumerate(bench.stream.batches(0)):
            raw = batch[site] * scale + mean
            kept[step * asked.batch : (step + 1) * asked.batch] = raw.cpu().numpy()
        kept.flush()
        half.rename(path)
    # E|x|^2 = E|x - mean|^2 + |mean|^2, of the first block of the stream
    factor = math.hypot(scale, float(torch.linalg.vector_norm(mean)))
    return Lessons(path, asked.batch, factor, site, asked.width)


def _point(read: Results, names: Sequence[str]) -> Point:
    l0 = read.scores[read.scores["metric"] == "l0"].set_index("sae")["value"]
    columns = {}
    for metric in METRICS:
        units = results.on_common_units(results.units(read, metric, saes=list(names)))
        columns[metric] = _mean(list(units.values()))
    return Point(float(np.mean([l0[name] for name in names])), columns)


def _mean(units: Sequence[Units]) -> stats.Column:
    """Of SAEs with the same denominators: the variance of the text, or what zero ablation costs."""
    columns = [results.column(one, "ratio") for one in units]
    return stats.Column(
        np.mean([c.num for c in columns], axis=0), np.mean([c.den for c in columns], axis=0)
    )


def _between(
    points: Sequence[Point], l0: float, reach: float = REACH
) -> dict[str, stats.Column] | None:
    """Numbers at this L0, in a line over ln L0 between the two points about it; None where none are near."""
    ordered = sorted((p for p in points if p.l0 > 0), key=lambda p: p.l0)
    if not ordered:
        return None
    low = [p for p in ordered if p.l0 <= l0]
    high = [p for p in ordered if p.l0 > l0]
    if not low or not high:
        end = ordered[0] if not low else ordered[-1]
        return end.columns if abs(math.log(end.l0 / l0)) <= math.log1p(reach) else None
    a, b = low[-1], high[0]
    w = math.log(l0 / a.l0) / math.log(b.l0 / a.l0)
    return {metric: _mixed(a.columns[metric], b.columns[metric], w) for metric in METRICS}


def _mixed(a: stats.Column, b: stats.Column, w: float) -> stats.Column:
    return stats.Column((1 - w) * a.num + w * b.num, (1 - w) * a.den + w * b.den)


def _rows(
    read: Results, variant: str, asked: argparse.Namespace, theirs: Peers
) -> list[dict[str, Any]]:
    rows = []
    for wanted in L0S:
        names = [f"{variant}-w{asked.width}-l{wanted}-s{seed}" for seed in asked.seeds]
        ours = _point(read, names)
        knobs = theirs[variant][wanted] if variant in theirs else {}
        beside = _between([_point(read, names) for names in knobs.values()], ours.l0)
        for metric in METRICS:
            peer = None if beside is None else beside[metric]
            row = {"variant": variant, "wanted L0": wanted, "L0": ours.l0, "metric": metric}
            rows.append(row | _compared(ours.columns[metric], peer))
    return rows


def _compared(ours: stats.Column, peer: stats.Column | None) -> dict[str, Any]:
    interval = stats.interval(*ours)
    row: dict[str, Any] = {"ours": stats.value(*ours), "ours interval": interval}
    if peer is None:
        return row | {"peer": None, "difference": None, "interval": None, "verdict": "no peer"}
    found = stats.paired_difference(*ours[:2], *peer[:2], "ratio")
    assert found is not None, "the evaluation text has many sequences"
    verdict = "worse" if found.high < 0 else "better" if found.low > 0 else "equal"
    peers = {"peer": stats.value(*peer), "difference": found.value}
    return row | peers | {"interval": (found.low, found.high), "verdict": verdict}


def _lrs_of(theirs: Peers) -> dict[str, dict[int, str]]:
    """The chosen learning rates, which the names hold."""
    first = {
        variant: {l0: next(iter(knobs.values()))[0] for l0, knobs in at.items()}
        for variant, at in theirs.items()
    }
    return {
        variant: {l0: name.rsplit("-lr", 1)[1].split("-s")[0] for l0, name in at.items()}
        for variant, at in first.items()
    }


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row as it is printed."""

    def both(ends: Any) -> str:
        return "" if ends is None else f"[{ends[0]:.4f}, {ends[1]:.4f}]"

    def number(name: str, form: str) -> str:
        return "" if row[name] is None else format(row[name], form)

    return {
        "variant": row["variant"],
        "L0": number("L0", ".2f"),
        "metric": row["metric"].replace("_", " "),
        "ours": f"{number('ours', '.4f')} {both(row['ours interval'])}",
        "peer": number("peer", ".4f"),
        "difference": f"{number('difference', '+.4f')} {both(row['interval'])}",
        "verdict": row["verdict"],
    }


if __name__ == "__main__":
    main()
