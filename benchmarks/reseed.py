"""Whether a score measured again lies where its interval says.

    python benchmarks/reseed.py SUITE --checkpoints FOLDER --work FOLDER [--parts 8] [--seeds 4]

The SAEs of a suite that was run already (`saebench run SUITE --checkpoints FOLDER`) are scored several times: by the
evals on the stream on so many parts of the evaluation text, which share no document; by evals with a text of their own
with so many seeds of their split. Measurements are compared two by two
(the first with the second, the third with the fourth ...), by `stats.independent_difference`.

inside    share of differences whose 95 % interval holds zero: about 95 % where intervals say what varies. SAEs of one
          pair look at the same two parts, so that their differences are alike and few pairs give a rough share
sd        of one measurement: standard deviation of the differences over sqrt(2), root mean square over SAEs
stated    standard error behind the intervals, root mean square. A probe's interval is over datasets, which all seeds
          share: it says what other datasets would give, and only `sd` what another split of these does
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _common import PACKAGES, command, machine, publish, table, versions

from saebench import results, runner, stats, suite
from saebench.suite import Plugin
from saebench.types import StreamEval, TextEval

METRICS = (
    "l0",
    "explained_variance",
    "loss_recovered",
    "ce_loss_increase",
    "kl_divergence",
    "shrinkage",
    "probe_auc_k1",
    "probe_auc_k5",
    "probe_auc_k20",
    "probe_auc_all",
    "probe_auc_gain_all",
)


def main() -> None:
    asked = _arguments().parse_args()
    pairs = [*_pairs(list(_parts(asked))), *_pairs(list(_seeds(asked)))]
    rows = [row for metric in METRICS if (row := _row(metric, pairs)) is not None]
    content = {
        "command": command(),
        "machine": machine(),
        "versions": versions(PACKAGES),
        "rows": rows,
    }
    publish(asked.out, f"reseed_{Path(asked.suite).stem}", "Measured again", content, table(rows))


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("suite", help="file of a suite that was run")
    parser.add_argument("--checkpoints", type=Path, required=True, help="of that run")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is measured")
    parser.add_argument("--parts", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser


def _open(asked: argparse.Namespace, evals: list[Plugin], name: str) -> runner.Workbench:
    """Without controls, which would have to be built again for every measurement."""
    path = Path(asked.suite)
    whole = suite.load(path)
    changes = {"name": name, "evals": evals, "controls": [], "reports": []}
    options = runner.Options(
        asked.work / "results", asked.checkpoints, asked.work / "cache", "cpu", None, False
    )
    return runner.Workbench(whole.model_copy(update=changes), path, options)


def _evals(asked: argparse.Namespace, kind: type) -> list[Plugin]:
    return [e for e in suite.load(Path(asked.suite)).evals if isinstance(e.value, kind)]


def _parts(asked: argparse.Namespace) -> Iterator[results.Results]:
    evals = _evals(asked, StreamEval)
    bench = _open(asked, evals, "parts")
    whole = bench.tokens
    numbers = np.unique(whole.documents)
    if len(numbers) < 2 * asked.parts:
        sys.exit(f"{len(numbers)} documents make no {asked.parts} parts: give fewer --parts")
    documents = np.array_split(numbers, asked.parts)
    for number, some in enumerate(documents):
        part = np.isin(whole.documents, some)
        bench.tokens = whole._replace(
            evaluation=whole.evaluation[part],
            documents=whole.documents[part],
            fingerprint_eval=f"part {number} of {whole.fingerprint_eval}",
        )
        bench.stage = bench._stage(bench.loaded)
        yield _scored(bench, f"part-{number}")


def _seeds(asked: argparse.Namespace) -> Iterator[results.Results]:
    evals = _evals(asked, TextEval)
    for seed in range(asked.seeds if evals else 0):
        reseeded = [Plugin(e.name, dataclasses.replace(e.value, seed=seed)) for e in evals]
        yield _scored(_open(asked, reseeded, "seeds"), f"seed-{seed}")


def _scored(bench: runner.Workbench, name: str) -> results.Results:
    bench.folder = bench.options.results / name
    print(f"measuring {name}", file=sys.stderr)
    runs = bench.eval_runs(bench.candidates())
    runner._write_manifest(bench, runs)
    failed = runner.score(bench, [r for r in runs if not results.done(bench.folder, r.spec)])
    assert failed == 0, f"{failed} runs failed, so the measurement says nothing"
    return results.read(bench.folder)


def _pairs(measured: list[results.Results]) -> list[tuple[results.Results, results.Results]]:
    return list(zip(measured[::2], measured[1::2], strict=False))


def _row(
    metric: str, pairs: list[tuple[results.Results, results.Results]]
) -> dict[str, Any] | None:
    """None where nobody measured it."""
    found = [
        difference
        for first, second in pairs
        if metric in set(first.scores["metric"])
        for difference in _differences(metric, first, second)
    ]
    if not found:
        return None
    values = np.array([d.value for d in found])
    stated = np.array([(d.high - d.low) / (2 * 1.96) for d in found])
    return {
        "metric": metric,
        "differences": len(found),
        "inside": f"{np.mean([d.low <= 0 <= d.high for d in found]):.1%}",
        "sd": float(np.sqrt(np.mean(values**2) / 2)),
        "stated": float(np.sqrt(np.mean(stated**2) / 2)),
    }


def _differences(
    metric: str, first: results.Results, second: results.Results
) -> list[stats.Difference]:
    a, b = (results.units(found, metric) for found in (first, second))
    differences = [
        stats.independent_difference(*(results.column(u, "ratio") for u in (a[sae], b[sae])))
        for sae in a
    ]
    return [difference for difference in differences if difference is not None]


if __name__ == "__main__":
    main()
