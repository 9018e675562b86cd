"""Where an SAE stands, in words, on results made by hand."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saebench import results
from saebench.errors import UserError
from saebench.reports._standing import standing
from saebench.results import Entry, ScoreRow
from tests import boards

N = 60
SHARED = boards.noisy(0.0, 0.1, 1, N)
"""What documents do to every SAE alike."""


def mine(width: int | None = 64, site: str = boards.SITE) -> Entry:
    return Entry("checkpoint", "native", width, None, None, site)


def rows(l0: float, explained: float, seed: int, recovered: float | None = None) -> list[ScoreRow]:
    """Metrics with exactly these means; SAEs differ by a noise of 0.002 a document."""
    found = [
        boards.row("l0", np.full(N, l0), best=None),
        boards.row("explained_variance", explained + SHARED + boards.noisy(0, 0.002, seed, N)),
    ]
    if recovered is not None:
        found.append(
            boards.row("loss_recovered", recovered + SHARED + boards.noisy(0, 0.002, seed + 50, N))
        )
    return found


def family(
    variant: str, level: float, seed: int, l0s: Sequence[float] = (8.0, 16.0, 32.0), **of: Any
) -> dict[str, tuple[Entry, list[ScoreRow]]]:
    """Explained variance is level + 0.1 ln(L0 / 16): a line over ln L0."""
    return {
        f"{variant}-l{l0:g}": (
            boards.trained(variant, l0, **of),
            rows(l0, level + 0.1 * np.log(l0 / 16), seed + i),
        )
        for i, l0 in enumerate(l0s)
    }


def control(variant: str, explained: float, seed: int) -> dict[str, tuple[Entry, list[ScoreRow]]]:
    return {
        f"{variant}-{l0:g}": (boards.control(variant, l0), rows(l0, explained, seed + i))
        for i, l0 in enumerate((8.0, 16.0, 32.0))
    }


def test_a_difference_from_a_frontier_is_said_with_its_interval_and_its_l0(tmp_path: Path):
    saes = family("topk", 0.7, 10) | {"mine": (mine(), rows(16.0, 0.712, 2))}
    boards.write(tmp_path, saes)
    text = standing(tmp_path, "mine")
    assert text.startswith("mine at 2.resid_post: 64 latents, L0 16.\n")
    # Of 60 pairs with a standard deviation of 0.002 times the root of 2, 1.96 standard errors are 0.0007.
    assert "explains 0.0120 [0.0114, 0.0127] more" in text
    assert "variance than the topk frontier at L0 = 16" in text
    assert "rank 1 of 2 (2.resid_post, width 64, asked-for L0 16)" in text


def test_the_frontier_is_read_between_the_saes_of_a_family(tmp_path: Path):
    # At L0 20 the line has 0.7 + 0.1 ln(20 / 16) = 0.7223; mine is 0.03 below.
    saes = family("topk", 0.7, 10) | {"mine": (mine(), rows(20.0, 0.6923, 2))}
    boards.write(tmp_path, saes)
    text = standing(tmp_path, "mine")
    assert "explains 0.030" in text
    assert "less variance than the topk frontier at L0 = 20" in text


def test_what_cannot_be_told_apart_is_said_to_be_tied(tmp_path: Path):
    saes = family("topk", 0.7, 10) | {"mine": (mine(), rows(16.0, 0.7001, 2))}
    boards.write(tmp_path, saes)
    text = standing(tmp_path, "mine")
    assert "cannot be told from the topk frontier at L0 = 16 (0.000" in text
    assert "explains" not in text
    assert "rank 1 to 2 of 2" in text


def test_families_ahead_and_behind_are_named_nearest_first(tmp_path: Path):
    saes = family("relu", 0.5, 10) | family("topk", 0.6, 20) | family("gated", 0.8, 30)
    boards.write(tmp_path, saes | {"mine": (mine(), rows(16.0, 0.7, 2))})
    text = standing(tmp_path, "mine")
    more = next(line for line in text.splitlines() if "more variance" in line)
    assert more.index("the topk frontier") < more.index("more than relu's")
    assert "less variance than the gated frontier" in text


def test_nothing_is_extrapolated(tmp_path: Path):
    saes = family("topk", 0.7, 10) | {"mine": (mine(), rows(50.0, 0.9, 2))}
    boards.write(tmp_path, saes)
    assert "not compared with topk, which has L0 8 to 32" in standing(tmp_path, "mine")


def test_beyond_the_ends_of_a_frontier_the_nearest_sae_within_ten_percent_is_taken(tmp_path: Path):
    saes = family("topk", 0.7, 10) | {"mine": (mine(), rows(34.0, 0.9, 2))}
    boards.write(tmp_path, saes)
    text = standing(tmp_path, "mine")
    # 0.9 - (0.7 + 0.1 ln 2) = 0.1307
    assert "explains 0.1307" in text
    assert "more variance than topk-l32 (L0 32)" in text


def test_saes_of_the_same_width_make_the_frontier_where_there_are_such(tmp_path: Path):
    saes = family("topk", 0.7, 10) | {
        f"wide-{name}": sae for name, sae in family("topk", 0.9, 20, width=128).items()
    }
    boards.write(tmp_path, saes | {"mine": (mine(width=128), rows(16.0, 0.912, 2))})
    text = standing(tmp_path, "mine")
    assert "explains 0.0120" in text
    assert "other widths" not in text


def test_other_widths_make_the_frontier_where_there_is_none_of_the_same_and_it_is_said(
    tmp_path: Path,
):
    saes = family("topk", 0.7, 10) | {"mine": (mine(width=256), rows(16.0, 0.712, 2))}
    boards.write(tmp_path, saes)
    text = standing(tmp_path, "mine")
    assert "explains 0.0120" in text
    assert "Of topk there are other widths alone" in text


def test_another_site_is_no_baseline(tmp_path: Path):
    saes = family("topk", 0.7, 10)
    boards.write(tmp_path, saes | {"mine": (mine(site="3.resid_post"), rows(16.0, 0.7, 2))})
    assert "no trained SAEs at this site" in standing(tmp_path, "mine")


def test_a_control_that_is_not_beaten_comes_first(tmp_path: Path):
    saes = family("topk", 0.7, 10) | control("random", 0.4, 20) | control("frozen", 0.65, 30)
    boards.write(tmp_path, saes | {"mine": (mine(), rows(16.0, 0.6, 2))})
    lines = standing(tmp_path, "mine").splitlines()
    assert lines[1].startswith("Warning: explained variance is not clearly better than that of")
    assert "frozen" in lines[1] and "random" not in lines[1]


def test_controls_that_are_beaten_are_not_spoken_of(tmp_path: Path):
    saes = family("topk", 0.7, 10) | control("random", 0.4, 20)
    boards.write(tmp_path, saes | {"mine": (mine(), rows(16.0, 0.7, 2))})
    assert "Warning" not in standing(tmp_path, "mine")


def test_families_of_a_metric_are_told_apart_holm_adjusted(tmp_path: Path):
    """A difference that is significant alone (p about 3 %) is none among eight."""
    alone = family("topk", 0.7, 10)
    many = alone
    for number in range(7):
        many = many | family(f"v{number}", 0.7, 100 + 10 * number)
    me = {"mine": (mine(), rows(16.0, 0.70085, 2))}
    boards.write(tmp_path / "alone", alone | me)
    boards.write(tmp_path / "many", many | me)
    assert "explains" in standing(tmp_path / "alone", "mine")
    assert "explains" not in standing(tmp_path / "many", "mine")


def test_each_metric_has_its_own_words(tmp_path: Path):
    saes = {
        f"topk-l{l0:g}": (
            boards.trained("topk", l0),
            [
                *rows(l0, 0.7, 10 + i, recovered=0.9),
                boards.row("probe_auc_k5", boards.noisy(0.8, 0.01, 70 + i, 12), unit="dataset"),
            ],
        )
        for i, l0 in enumerate((8.0, 16.0, 32.0))
    }
    better = boards.row("probe_auc_k5", boards.noisy(0.9, 0.01, 3, 12), unit="dataset")
    boards.write(tmp_path, saes | {"mine": (mine(), [*rows(16, 0.8, 2, recovered=0.95), better])})
    text = standing(tmp_path, "mine")
    assert "explains 0.1000" in text and "more variance than" in text
    assert "recovers 0.0500" in text and "more of the loss than the topk" in text
    assert "probes 0.100" in text and "better (AUC) than the topk" in text
    assert len(text.splitlines()) <= 20


def test_a_trained_sae_is_not_compared_with_its_own_family(tmp_path: Path):
    boards.write(tmp_path, family("topk", 0.7, 10) | family("relu", 0.6, 20))
    text = standing(tmp_path, "topk-l16")
    assert "the relu frontier" in text and "the topk frontier" not in text


def test_seeds_of_a_baseline_are_one_point_of_its_frontier(tmp_path: Path):
    saes = {
        f"topk-l{l0:g}-s{seed}": (
            boards.trained("topk", l0, seed=seed),
            rows(l0, 0.7 + 0.01 * seed, 10 + 3 * i + seed),
        )
        for i, l0 in enumerate((8.0, 16.0, 32.0))
        for seed in (0, 1)
    }
    boards.write(tmp_path, saes | {"mine": (mine(), rows(16.0, 0.755, 2))})
    # Their mean is 0.705.
    assert "explains 0.0500" in standing(tmp_path, "mine")


def test_an_unknown_name_is_refused_with_the_nearest(tmp_path: Path):
    boards.write(tmp_path, family("topk", 0.7, 10))
    with pytest.raises(UserError, match="did you mean topk-l16"):
        standing(tmp_path, "topk-l15")


def test_a_name_cannot_move_the_cursor(tmp_path: Path):
    site = "x\x1b[2J\u202e.output"
    entry = boards.trained("topk")._replace(site=site)
    boards.write(tmp_path, {"mine": (entry, rows(16.0, 0.7, 2))})
    text = standing(tmp_path, "mine")
    assert "\x1b" not in text and "\u202e" not in text
    assert "x\\x1b[2J\\u202e.output" in text


def test_units_that_are_gone_are_said_to_be_missing(tmp_path: Path):
    saes = family("topk", 0.7, 10) | {"mine": (mine(), rows(16.0, 0.8, 2))}
    found = boards.write(tmp_path, saes)
    for file in found.scores["file"].unique():
        results.units_file(tmp_path / file).unlink()
    assert "has no units to compare" in standing(tmp_path, "mine")


def test_a_standing_needs_no_torch(tmp_path: Path):
    boards.write(tmp_path, family("topk", 0.7, 10) | {"mine": (mine(), rows(16.0, 0.8, 2))})
    code = (
        "import sys; from pathlib import Path; from saebench.reports._standing import standing;"
        f"standing(Path({str(tmp_path)!r}), 'mine'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
