"""Make saebench/reliability.json, what tables show of metrics that other suites audited, from results/*/audit.json.

python tools/reliability.py
"""

from pathlib import Path

from saebench import reliability
from saebench.reliability import SCHEMA, Verdicts

ROOT = Path(__file__).parent.parent


def made(results: Path) -> str:
    cards = [reliability.read(path) for path in sorted(results.glob(f"*/{reliability.FILE}"))]
    found = [verdict for card in cards for verdict in reliability.verdicts(card)]
    return reliability.as_json(Verdicts(SCHEMA, reliability.strongest(found)))


def main() -> None:
    target = ROOT / "saebench" / reliability.SHIPPED.name
    text = made(ROOT / "results")
    target.write_text(text, encoding="utf-8")
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
