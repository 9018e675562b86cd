"""Make saebench/reliability/shipped.json, what tables show of metrics that other suites audited, from
results/*/audit.json.

python tools/reliability.py
"""

from pathlib import Path

from saebench.reliability.cards import SCHEMA
from saebench.reliability.files import FILE, SHIPPED, as_json, read_card
from saebench.reliability.verdicts import Verdicts, strongest, verdicts_of

ROOT = Path(__file__).parent.parent


def made(results: Path) -> str:
    cards = [read_card(path) for path in sorted(results.glob(f"*/{FILE}"))]
    found = [verdict for card in cards for verdict in verdicts_of(card)]
    return as_json(Verdicts(SCHEMA, strongest(found)))


def main() -> None:
    target = ROOT / "saebench/reliability" / SHIPPED.name
    text = made(ROOT / "results")
    target.write_text(text, encoding="utf-8")
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
