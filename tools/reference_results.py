"""Make results/reference, the loss recovered and L0 of the published SAEs of sae_bench, from one table.

    python tools/reference_results.py

The table is results/reference/loss_recovered.csv; where it is from says results/reference/README.md.
"""

import csv
import hashlib
from pathlib import Path

from saebench import peer_json
from saebench.peer_json import Foreign
from saebench.results import Entry, Imported

FOLDER = Path(__file__).parent.parent / "results" / "reference"
SOURCE = (
    "github.com/meowmaryexe/SAEBench-Reliability, June-July 2026: an independent reproduction of the core eval of "
    "sae_bench on the SAEs that it published in January 2025, each loss recovered within 0.0045 of the published value"
)
TEXT, CONTEXT = "Skylion007/openwebtext", 128
TOKENS = {"loss_recovered": 3_200 * CONTEXT, "l0": 32_000 * CONTEXT}
THEIRS = {"loss_recovered": "ce_loss_score", "l0": "l0"}


def read(table: Path) -> list[Foreign]:
    with table.open(newline="", encoding="utf-8") as file:
        return [_row(row) for row in csv.DictReader(file)]


def _row(row: dict[str, str]) -> Foreign:
    model, width = row["model"], int(row["width"])
    site = f"{model} {row['layer']}.{row['stream']}"
    written = ",".join(row.values())
    return Foreign(
        name=f"{model}-w{width}-{row['variant']}-t{row['trainer']}",
        entry=Entry("imported", row["variant"], width, None, None, site),
        model=model,
        text=TEXT,
        context=CONTEXT,
        source=hashlib.sha256(written.encode()).hexdigest(),
        eval_name="sae_bench.core",
        version=1,
        told=[
            _told("loss_recovered", "max", float(row["loss_recovered"])),
            _told("l0", None, float(row["l0"])),
        ],
        omitted=[],
        provenance={"imported": {"table": "loss_recovered.csv", "source": SOURCE}},
    )


def _told(metric: str, best: peer_json.Best, value: float) -> Imported:
    doc = f"{THEIRS[metric]} of sae_bench's core"
    return Imported(metric, best, "sequence", doc, value, TOKENS[metric])


def main() -> None:
    new = peer_json.add(read(FOLDER / "loss_recovered.csv"), FOLDER)
    print(f"{len(new)} new runs in {FOLDER}")


if __name__ == "__main__":
    main()
