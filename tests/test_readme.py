"""What the README shows is what the committed results hold."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_leaderboard_is_that_of_the_committed_results():
    shown = README.split("<!-- quickstart -->")[1].split("<!-- /quickstart -->")[0]
    made = (ROOT / "results/quickstart/leaderboard.md").read_text(encoding="utf-8")
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert rows and set(rows) <= set(made.splitlines())


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_every_link_leads_somewhere(target):
    assert (ROOT / target).exists()


def test_ci_calls_the_test_command_of_the_readme():
    (command,) = (line for line in README.splitlines() if line.endswith("bin/tox"))
    assert command in (ROOT / ".ci/run").read_text()
