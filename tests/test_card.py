"""The card in words, and its badges in every table."""

import csv
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from saebench import results, runner
from saebench.errors import UserError
from saebench.reliability import files
from saebench.reliability.cards import Card, card_of
from saebench.reliability.files import as_json
from saebench.reliability.rows import COLUMNS
from saebench.reliability.verdicts import Verdicts, strongest, verdicts_of
from saebench.reports import _card
from saebench.reports.leaderboard import Leaderboard
from saebench.results import Results
from saebench.suite import Plugin, Suite
from tests.boards import control, noisy, row, trained, write

NAN = float("nan")


def measured(sae: str, metric: str, value: float, **fields: Any) -> dict[str, Any]:
    plain: dict[str, Any] = dict.fromkeys(COLUMNS, NAN)
    plain |= {"sae": sae, "kind": "trained", "family": "topk", "width": 64, "l0": 8.0, "seed": 0}
    plain |= {"site": "2.resid_post", "what": "base", "setting": "", "eval": "core", "version": 1}
    plain |= {"params": "{}", "metric": metric, "best": "max", "ends": True, "value": value}
    return plain | {"degraded": "", "share": 1.0} | fields


RANDOM = {"kind": "control", "family": "random", "seed": NAN}
FACTS = ("f1", "mcc")


def rows() -> list[dict[str, Any]]:
    """Variance is right about everything, the density is above for random, and the norm moves with the unit."""
    found = [measured("random", "explained_variance", -1.0, **RANDOM)]
    found += [measured("random", "density", 9.0, **RANDOM)]
    for i in range(32):
        name, recipe = f"s{i}", {"family": f"f{i % 8}", "seed": i // 8}
        value = 0.5 + 0.02 * (i % 8) + 0.001 * (i // 8)
        found += [measured(name, "explained_variance", value, **recipe)]
        found += [measured(name, "density", value, **recipe)]
        found += [measured(name, fact, value, eval="ground_truth", **recipe) for fact in FACTS]
    for i in range(3):
        for draw in range(4):
            again = {"what": "redraw", "setting": str(draw), "family": f"f{i}", "share": 0.5}
            value = 0.5 + 0.02 * i + 0.004 * i * (draw % 2)
            found += [measured(f"s{i}", "explained_variance", value, **again)]
    found += [measured("s0", "norm", 1.0, best=None, ends=False)]
    found += [
        measured("s0", "norm", 10.0, best=None, ends=False, what="unit", setting="x10+3"),
        measured("s0", "explained_variance", 0.5, what="unit", setting="x10+3"),
        measured("s0", "explained_variance", 0.502, what="dtype", setting="bfloat16"),
        measured("s0", "explained_variance", NAN, what="cost", seconds=1.25, bytes=3 * 2.0**20),
    ]
    return found


@pytest.fixture(scope="module")
def card() -> Card:
    return card_of("toy", pd.DataFrame(rows()), None)


def grids(text: str) -> dict[str, dict[str, list[str]]]:
    """The tables of a Markdown file by the heading above, and their rows by the first cell."""
    found: dict[str, dict[str, list[str]]] = {}
    for section in text.split("\n## "):
        lines = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("|")]
        cells = [[cell.strip() for cell in line] for line in lines]
        found[section.splitlines()[0]] = {line[0]: line[1:] for line in cells}
    return found


def test_all_metrics_are_in_one_table(card):
    text = _card.markdown(card)
    first = grids(text)["# Reliability of the metrics of toy"]
    assert list(first) == [
        "metric",
        "-" * len("explained variance"),
        *("explained variance", "density", "F1", "MCC", "norm"),
    ]
    shown = dict(zip(first["metric"], first["explained variance"], strict=True))
    assert shown["badge"] == "✓" and shown["order"] == "32/32" and shown["unit"] == "same"
    # Draws of the three SAEs alternate by 0, 0.004 and 0.008, so their differences by 0.004, 0.004 and 0.008:
    # by Bessel's correction each varies by a third of the square, and 1.96 sqrt(3.2e-5 / 3) = 0.0064. They have half
    # the tokens, and a sqrt(2) of the noise.
    assert (shown["CV"], shown["smallest difference"]) == ("0.3 %", "0.0045")
    assert shown["F1"] == r"1.00 \[1.00, 1.00\]" and shown["cost"] == "1.2 s, 3 MiB"
    assert shown["moves most"] == "dtype 0.95" and shown["progress"] == "–"
    shown = dict(zip(first["metric"], first["density"], strict=True))
    assert (shown["badge"], shown["order"], shown["CV"]) == ("⚠", "0/32⚠", "–")
    assert dict(zip(first["metric"], first["norm"], strict=True))["unit"] == "depends"


def test_the_card_says_in_words_what_failed_what_is_missing_and_what_it_means(card):
    text = _card.markdown(card)
    assert (
        "- ⚠ density: fails the order test (random no worse than trained in 32 of 32 pairs)."
        in text
    )
    assert "- norm: depends on the unit of activations." in text
    assert "- progress of norm: the metric has no better direction." in text
    assert (
        "- training noise (training sd, recipe sd, seed share) of norm: no recipe was trained with "
        "two seeds." in text
    )
    for name in ("CV", "signal/noise", "seed", "order", "progress", "F1, MCC", "moves", "unit"):
        assert f"\n- {name}: " in text.split("## How the numbers are defined")[1]
    noise = grids(text)["Noise"]["explained variance"]
    assert noise[0] == "3, 4 at 50 % of the tokens"
    order = grids(text)["Order"]
    assert order["metric"] == ["trained &gt; random"] and order["density"] == ["0/32⚠"]
    assert "norm" not in order
    assert grids(text)["What moves them"]["metric"] == ["dtype bfloat16", "unit x10+3"]


def test_every_line_of_a_table_has_the_same_width(card):
    tables = [line for line in _card.markdown(card).splitlines() if line.startswith("|")]
    first = tables[: 2 + len(card.metrics)]
    assert len({len(line) for line in first}) == 1


def test_the_terminal_has_the_same_table(card):
    text = _card.text(card)
    (line,) = (line for line in text.splitlines() if line.startswith(" explained variance"))
    assert "✓" in line and "32/32" in line and "\x1b" not in text
    assert "⚠ density: fails the order test" in text


def test_a_card_of_hardly_anything_is_legible():
    found = card_of("toy", pd.DataFrame([measured("a", "m", 1.0)]), None)
    text = _card.markdown(found)
    assert "Warnings" not in text and "## Order" not in text and "## Truth" not in text
    assert "- cost of m: not measured." in text


def test_a_metric_that_is_measured_in_two_ways_is_named_by_them():
    twice = [measured("a", "m", 1.0, params=p) for p in ('{"k":1}', '{"k":2}')]
    text = _card.markdown(card_of("toy", pd.DataFrame(twice), None))
    assert 'm (core v1 {"k":1})' in text and 'm (core v1 {"k":2})' in text


# Badges


def board(folder: Path) -> Results:
    names = ("l0", "explained_variance", "density", "kl_divergence")
    return write(
        folder,
        {
            sae: (entry, [row(name, noisy(mean, 0.02, i + len(name))) for name in names])
            for i, (sae, entry, mean) in enumerate(
                [
                    ("topk", trained("topk"), 0.8),
                    ("relu", trained("relu"), 0.7),
                    ("random", control("random"), 0.1),
                ]
            )
        },
    )


FOOTNOTE = "density: fails the order test (random no worse than trained in 32 of 32 pairs) in the audit of toy."


def audited(folder: Path, card: Card) -> Results:
    board(folder)
    (folder / "audit.json").write_text(as_json(card), encoding="utf-8")
    return results.read(folder)


def leaderboard() -> Leaderboard:
    return Leaderboard(metrics=("l0", "explained_variance", "density"))


def test_badges_are_in_every_format(tmp_path, card):
    found = audited(tmp_path / "toy", card)
    leaderboard()(found, tmp_path)
    text = (tmp_path / "leaderboard.md").read_text()
    assert "| explained variance✓ ↑ |" in text and "| density⚠ ↑ |" in " ".join(text.split())
    assert f"- ⚠ {FOOTNOTE}" in text
    assert "- ✓: ranks SAEs, controls and known features in order in an audit" in text
    tex = (tmp_path / "leaderboard.tex").read_text()
    assert r"variance$^\surd$ $\uparrow$" in tex and r"density$^\triangle$ $\uparrow$" in tex
    assert rf"$^\triangle$ {FOOTNOTE}" in tex
    assert not any(mark in tex for mark in "✓⚠")
    with (tmp_path / "leaderboard.csv").open(encoding="utf-8") as file:
        badges = {line["metric"]: line["badge"] for line in csv.DictReader(file)}
    assert badges == {
        "l0": "",
        "explained_variance": "✓",
        "density": "⚠",
        "kl_divergence": "",
    }
    shown = leaderboard().text(found)
    assert "density⚠ ↑" in shown and f"⚠ {FOOTNOTE}" in shown


def test_a_warning_stands_under_every_table_that_has_its_mark(tmp_path, card):
    found = audited(tmp_path / "toy", card)
    Leaderboard(metrics=("explained_variance",))(found, tmp_path)
    above, below = (tmp_path / "leaderboard.md").read_text().split("## Trained against controls")
    assert "⚠" not in above and "density⚠" in below and f"- ⚠ {FOOTNOTE}" in below


def test_without_an_audit_no_table_has_a_badge(tmp_path, monkeypatch):
    empty = tmp_path / "shipped.json"
    empty.write_text(as_json(Verdicts(1, ())), encoding="utf-8")
    monkeypatch.setattr(files, "SHIPPED", empty)
    found = board(tmp_path / "toy")
    leaderboard()(found, tmp_path)
    for name in ("leaderboard.md", "leaderboard.tex", "leaderboard.csv"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert not any(mark in text for mark in ("✓", "⚠", "surd", "triangle"))


def test_what_the_package_ships_warns_where_nothing_was_audited(tmp_path, monkeypatch, card):
    shipped = tmp_path / "shipped.json"
    kept = strongest(verdicts_of(card))
    shipped.write_text(as_json(Verdicts(1, kept)), encoding="utf-8")
    monkeypatch.setattr(files, "SHIPPED", shipped)
    assert f"⚠ {FOOTNOTE}" in leaderboard().text(board(tmp_path / "other"))


def test_a_damaged_audit_is_an_error_that_names_it(tmp_path):
    board(tmp_path / "toy")
    (tmp_path / "toy" / "audit.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"toy/audit\.json cannot be read"):
        results.read(tmp_path / "toy")


def test_another_audit_makes_the_reports_anew_and_the_same_does_not(tmp_path, card):
    folder = tmp_path / "toy"
    board(folder)
    suite = Suite.model_construct(reports=[Plugin("leaderboard", leaderboard())])
    runner.write_reports(suite, folder)
    assert FOOTNOTE not in (folder / "leaderboard.md").read_text()
    (folder / "audit.json").write_text(as_json(card), encoding="utf-8")
    runner.write_reports(suite, folder)
    assert FOOTNOTE in (folder / "leaderboard.md").read_text()
    (folder / "leaderboard.md").write_text("mine")
    runner.write_reports(suite, folder)
    assert (folder / "leaderboard.md").read_text() == "mine"


def test_the_command_line_shows_badges(tmp_path, card, saebench):
    audited(tmp_path / "toy", card)
    ended = saebench("report", tmp_path / "toy")
    assert ended.code == 0 and "explained variance✓ ↑" in ended.out


def test_the_card_in_json_has_its_badges_for_other_readers(card):
    content = json.loads(as_json(card))
    badges = {m["metric"]: m["badge"] for m in content["metrics"]}
    assert badges == {"explained_variance": "✓", "density": "⚠", "f1": "", "mcc": "", "norm": ""}
