"""What the benchmarks share: clocks, peaks, tables, and the record of where a number was measured.

A number is measured in a process of its own where its peak of memory counts, and in turn with its floor, so that
both meet the same machine.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

PACKAGES = ("torch", "transformers", "numpy", "scipy", "saebench")
PEER_PACKAGES = ("dictionary-learning", "sae-lens", "sae-bench", "transformer-lens")


def in_turn(
    works: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of every piece of work, one of each in every round; warm-up rounds are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(warmup + rounds):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def typical(seconds: Sequence[float]) -> float:
    """The median: a round that something disturbed does not count."""
    return statistics.median(seconds)


def peak_memory() -> int:
    """The most bytes that this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB, macOS in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_process(python: str, script: Path, *arguments: str, answer: Path) -> Any:
    """What a script writes as JSON to `answer`, run in a process of its own; errors show as they are."""
    answer.unlink(missing_ok=True)
    subprocess.run([python, str(script), *arguments], check=True, stdout=sys.stderr)
    return json.loads(answer.read_text(encoding="utf-8"))


def machine() -> dict[str, Any]:
    """The processor, and how many of its cores this process may use."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": os.environ.get("OMP_NUM_THREADS", "as many as cores"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def versions(names: Sequence[str]) -> dict[str, str]:
    """Of the packages that are installed here."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def command() -> str:
    """What was typed, without the paths of this machine."""
    words = [Path(word).name if os.sep in word else word for word in sys.argv[1:]]
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def table(rows: Sequence[Row]) -> str:
    """A Markdown table with the keys of the first row as its columns."""
    columns = list(rows[0])
    cells = [columns, *([_cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def publish(folder: Path, name: str, title: str, content: Mapping[str, Any], text: str) -> None:
    """Prints the text, and writes it and the content to `folder/name.md` and `.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    where = content["machine"]
    place = f"{where['processor']}, {where['cores']} cores, threads: {where['threads']}"
    packages = ", ".join(f"{key} {value}" for key, value in content["versions"].items())
    whole = f"# {title}\n\n{text}\n\n- {place}\n- {packages}\n- `{content['command']}`\n"
    (folder / f"{name}.md").write_text(whole, encoding="utf-8")
    plain = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    (folder / f"{name}.json").write_text(plain, encoding="utf-8")
    print(whole)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
