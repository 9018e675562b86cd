"""Two SAEs, and two families of them: what is refused, what is said, and the numbers against a hand calculation."""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.interpolate
import scipy.stats

from saebench.errors import UserError
from saebench.reports import _compare, _families
from saebench.reports._families import Place
from tests.boards import SITE, control, noisy, row, trained, write
from tests.conftest import Run

ANYWHERE = Place(None, None)


def pair(folder: Path, gap: float = 0.05, **spec: object) -> Path:
    """a is better than b by `gap`, with a standard deviation of 0.02 over 100 sequences that both find hard."""
    hard = noisy(0.8, 0.1, 0)
    better, noise = noisy(gap, 0.02, 1), noisy(0.0, 0.3, 2)
    saes = {
        "a": (trained("a"), [row("ev", hard + better), row("l0", 8 + noise, best=None)]),
        "b": (trained("b"), [row("ev", hard), row("l0", 8 - noise, best=None)]),
        "c": (control("c"), [row("mse", hard, best="min")]),
    }
    write(folder, saes, **spec)
    return folder


def compared(folder: Path, *metrics: str) -> _compare.Compared:
    return _compare.compare("a", "b", [folder], metrics)


# Two SAEs


def test_a_difference_is_that_of_the_pairs(tmp_path):
    (found,) = compared(pair(tmp_path), "ev").rows
    t = scipy.stats.t.ppf(0.975, 99)
    assert (found.a, found.b) == pytest.approx((0.85, 0.8))
    assert found.difference is not None
    assert found.difference.value == pytest.approx(0.05)
    # Unpaired, the standard error would be 0.1 * sqrt(2 / 100) = 0.014.
    assert found.difference.low == pytest.approx(0.05 - t * 0.002, abs=0.0006)
    power = scipy.stats.t.ppf(0.8, 99)
    assert found.difference.detectable == pytest.approx((t + power) * 0.002)
    gaps = noisy(0.05, 0.02, 1)
    assert found.counts == ((gaps > 0).sum(), 0, (gaps < 0).sum())


def test_the_verdict_says_who_is_better_and_by_how_much(tmp_path):
    whole = compared(pair(tmp_path))
    assert whole.summary == (
        "a is better than b on 1 of 1 metric with a better direction and worse on 0; on 0 they cannot be told apart."
    )
    verdicts = {found.label: found.verdict for found in whole.rows}
    assert verdicts["ev"].startswith("a is better by 0.0500 (95 % interval 0.04")
    assert verdicts["L0"].startswith("cannot be told apart (A - B is ")
    text = _compare.text(whole)
    assert text.startswith(f"A: a\nB: b\n\n{whole.summary}\n")
    assert f"ev: {verdicts['ev']}." in text
    assert "Units: 100 sequences." in text


def test_the_other_way_round_the_same_sae_is_better(tmp_path):
    swapped = _compare.compare("b", "a", [pair(tmp_path)], ["ev"])
    assert "worse on 1" in swapped.summary
    assert swapped.rows[0].verdict.startswith("a is better by 0.0500 (95 % interval 0.04")


def test_a_metric_to_be_small_is_better_where_it_is_smaller(tmp_path):
    low, high = noisy(1.0, 0.1, 0), noisy(2.0, 0.1, 1)
    saes = {n: (trained(n), [row("mse", v, best="min")]) for n, v in (("a", low), ("b", high))}
    write(tmp_path, saes)
    (found,) = compared(tmp_path).rows
    assert found.verdict.startswith("a is better by 1.00")
    assert found.counts == (100, 0, 0)


def test_what_cannot_be_told_apart_names_what_could_have_been_seen(tmp_path):
    (found,) = compared(pair(tmp_path, gap=0.001), "ev").rows
    t, power = scipy.stats.t.ppf([0.975, 0.8], 99)
    unseen = f"differences below {(t + power) * 0.002:.2g} could not have been seen"
    assert found.verdict.startswith("cannot be told apart (A - B is 0.001")
    assert found.verdict.endswith(unseen)
    assert found.p > 0.05


def test_p_values_are_adjusted_over_the_metrics_shown(tmp_path):
    """p = 0.03 on its own says that they differ; as the smallest of three it does not."""
    hard = noisy(0.8, 0.1, 0)
    close, none = noisy(0.0044, 0.02, 1), noisy(0.0, 0.02, 2)  # t = 2.2 with 99 degrees of freedom
    saes = {
        "a": (
            trained("a"),
            [row(m, hard + gap) for m, gap in zip("xyz", (close, none, none), strict=True)],
        ),
        "b": (trained("b"), [row(m, hard) for m in "xyz"]),
    }
    write(tmp_path, saes)
    (alone,) = compared(tmp_path, "x").rows
    first, *_ = compared(tmp_path).rows
    assert alone.p == pytest.approx(2 * scipy.stats.t.sf(2.2, 99), rel=0.5)
    assert first.p == pytest.approx(3 * alone.p)
    assert "a is better" in alone.verdict and "cannot be told apart" in first.verdict
    assert first.difference is not None and first.difference.low > 0
    assert f", but p is {first.p:.3g} when adjusted); differences below" in first.verdict
    whole = compared(tmp_path)
    assert not any("when adjusted" in other.verdict for other in whole.rows[1:])
    assert "95 % interval, which is not adjusted" in _compare.text(whole)


def test_five_pairs_are_said_to_be_too_few(tmp_path):
    saes = {
        "a": (trained("a"), [row("auc", [0.9, 0.91, 0.92, 0.93, 0.94], unit="dataset")]),
        "b": (trained("b"), [row("auc", [0.5, 0.52, 0.51, 0.53, 0.5], unit="dataset")]),
    }
    write(tmp_path, saes)
    (found,) = compared(tmp_path).rows
    assert found.p == 0.0625  # 2 of the 2^5 patterns of signs
    assert found.verdict.endswith("5 datasets are too few to tell any difference")
    assert found.counts == (5, 0, 0)


def test_datasets_of_one_source_are_counted_each_and_resampled_together(tmp_path):
    sources = [f"source{i // 2}" for i in range(24)]
    names = [f"set{i}" for i in range(24)]
    values = noisy(0.7, 0.1, 0, 24)
    saes = {
        n: (trained(n), [row("auc", v, unit="dataset", ids=names, clusters=sources)])
        for n, v in (("a", values + noisy(0.05, 0.01, 1, 24)), ("b", values))
    }
    write(tmp_path, saes)
    whole = compared(tmp_path)
    (found,) = whole.rows
    assert (found.n_units, found.n_sources) == (24, 12)
    assert found.counts is not None and sum(found.counts) == 24
    assert "24 datasets from 12 sources, which are resampled" in _compare.text(whole)


def test_only_units_that_both_have_are_compared(tmp_path):
    saes = {
        "a": (trained("a"), [row("auc", [0.9, 0.8, 0.1], unit="dataset", ids=["x", "y", "z"])]),
        "b": (trained("b"), [row("auc", [0.4, 0.5], unit="dataset", ids=["y", "x"])]),
    }
    write(tmp_path, saes)
    (found,) = compared(tmp_path).rows
    assert (found.a, found.b) == pytest.approx((0.85, 0.45))
    assert found.counts == (2, 0, 0)


def test_latents_are_no_pairs(tmp_path):
    mine, others = noisy(0.3, 0.1, 0, 200), noisy(0.5, 0.2, 1, 50)
    saes = {
        n: (trained(n), [row("cosine", v, best="min", unit="latent")])
        for n, v in (("a", mine), ("b", others))
    }
    write(tmp_path, saes)
    (found,) = compared(tmp_path).rows
    assert found.counts is None
    assert found.difference is not None
    half = scipy.stats.t.ppf(0.975, 49) * np.sqrt(0.1**2 / 200 + 0.2**2 / 50)
    assert found.difference.high == pytest.approx(-0.2 + half)
    assert found.verdict.startswith("a is better by 0.20")


def test_what_is_the_same_for_both_is_left_out_and_named(tmp_path):
    same = noisy(2.0, 0.1, 5)
    saes = {
        n: (trained(n), [row("ev", v), row("ce_loss_clean", same, best=None)])
        for n, v in (("a", noisy(0.8, 0.1, 0)), ("b", noisy(0.7, 0.1, 1)))
    }
    write(tmp_path, saes)
    whole = compared(tmp_path)
    assert [found.label for found in whole.rows] == ["ev"]
    assert "The same for both, and not about them: CE loss clean." in whole.notes


def test_saes_of_other_sparsities_are_compared_with_a_warning(tmp_path):
    rows = {
        n: [row("ev", noisy(0.8, 0.1, 0)), row("l0", noisy(l0, 0.1, 1), best=None)]
        for n, l0 in (("a", 8), ("b", 16))
    }
    write(tmp_path, {n: (trained(n), rows[n]) for n in "ab"})
    (note,) = compared(tmp_path).notes
    assert note.startswith("They are not equally sparse (L0 8 and 16)")


def test_the_rows_have_every_number(tmp_path):
    whole = compared(pair(tmp_path))
    first, second = csv.DictReader(_compare.as_csv(whole).splitlines())
    assert (first["metric"], second["metric"]) == ("ev", "l0")
    assert (first["a"], first["b"], first["wins"], second["wins"]) == (
        "a",
        "b",
        str(whole.rows[0].counts[0]),
        "",
    )
    assert float(first["difference"]) == pytest.approx(0.05)
    assert float(first["p_holm"]) == whole.rows[0].p
    assert first["verdict"] == whole.rows[0].verdict


# Refused


def test_an_unknown_sae_is_told_the_nearest(tmp_path):
    with pytest.raises(UserError, match="has no scores of 'bb'; did you mean b"):
        _compare.compare("a", "bb", [pair(tmp_path)], [])


def test_an_sae_is_not_compared_with_itself(tmp_path):
    with pytest.raises(UserError, match="compared with itself"):
        _compare.compare("a", "a", [pair(tmp_path)], [])
    again = tmp_path / ".." / tmp_path.name
    with pytest.raises(UserError, match="compared with itself"):
        _compare.compare("a", "a", [tmp_path, again], [])


def test_saes_without_a_metric_in_common_are_refused(tmp_path):
    with pytest.raises(UserError, match="have no metric in common"):
        _compare.compare("a", "c", [pair(tmp_path)], [])
    with pytest.raises(UserError, match="c has no metric 'ev'"):
        _compare.compare("a", "c", [pair(tmp_path)], ["ev"])


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"text": {"fingerprint": "g"}}, "core: another text fingerprint, f against g"),
        ({"site": "1.resid_post"}, "core: another site, 2.resid_post against 1.resid_post"),
        ({"model": {"id": "n"}}, "core: another model id, m against n"),
        (
            {"eval": {"name": "core", "version": 2, "params": {}}},
            "core: another eval version, 1 against 2",
        ),
        (
            {"eval": {"name": "core", "version": 1, "params": {"split": 1}}},
            "core: other parameters, none against split=1",
        ),
    ],
)
def test_what_was_asked_otherwise_is_refused_with_what_differs(tmp_path, spec, reason):
    folders = [pair(tmp_path / "one"), pair(tmp_path / "two", **spec)]
    with pytest.raises(UserError, match=reason) as refused:
        _compare.compare("a", "b", folders, [])
    assert "were not asked the same" in str(refused.value)


def test_saes_of_two_folders_are_compared_where_they_were_asked_the_same(tmp_path):
    folders = [pair(tmp_path / "one"), pair(tmp_path / "two")]
    here, there = (_compare.compare("a", "b", f, ["ev"]) for f in (folders[:1], folders))
    assert here.rows == there.rows
    same = _compare.compare("a", "a", folders, ["ev"]).rows[0]
    assert same.verdict == "the same in every sequence"


def test_one_eval_of_two_versions_in_a_folder_is_refused(tmp_path):
    folder = pair(tmp_path)
    old = next(path for path in (folder / "runs").glob("b--*.json"))
    old.write_text(old.read_text().replace('"version": 1', '"version": 0'))
    with pytest.raises(UserError, match="another eval version, 1 against 0"):
        compared(folder)


def test_units_that_were_not_kept_are_asked_for(tmp_path):
    folder = pair(tmp_path)
    for path in (folder / "runs").glob("b--*.units.parquet"):
        path.unlink()
    with pytest.raises(UserError, match="the kept units of this run are gone"):
        compared(folder)


def test_units_that_are_damaged_are_named(tmp_path):
    folder = pair(tmp_path)
    for path in (folder / "runs").glob("b--*.units.parquet"):
        path.write_bytes(b"no parquet")
    with pytest.raises(UserError, match="these are no units of .*Delete it"):
        compared(folder)


def test_a_control_of_the_untrained_model_may_be_compared_in_its_folder(tmp_path):
    folder = pair(tmp_path)
    run = next(path for path in (folder / "runs").glob("b--*.json"))
    run.write_text(run.read_text().replace('"id": "m"', '"id": "m, untrained"'))
    found = compared(folder, "ev")
    assert found.rows[0].verdict.startswith("a is better")
    assert any(note.startswith("They are SAEs of two models") for note in found.notes)


# Families


L0S = (8.0, 16.0, 32.0)


def families(folder: Path, gaps: tuple[float, ...] = (0.05, 0.05, 0.05)) -> Path:
    """topk is better than relu by `gaps` at three sparsities, and both improve with L0."""
    hard = noisy(0.0, 0.1, 0)
    saes = {}
    for i, (l0, gap) in enumerate(zip(L0S, gaps, strict=True)):
        for variant, ahead in (("relu", 0.0), ("topk", gap)):
            value = 0.6 + 0.1 * i + ahead + hard + noisy(0.0, 0.01, len(saes))
            rows = [
                row("explained_variance", value, ends=(0.0, 1.0)),
                row("l0", noisy(l0, 0.1, i), best=None),
            ]
            saes[f"{variant}-{i}"] = (trained(variant, l0), rows)
    saes["random"] = (control("random"), [row("explained_variance", hard)])
    write(folder, saes)
    return folder


def test_families_are_compared_by_their_mean_over_ln_l0(tmp_path):
    found = _families.compare(
        ("topk", "relu"), families(tmp_path), ["explained_variance"], ANYWHERE
    )
    (only,) = found.rows
    x = np.log(L0S)
    areas = [
        scipy.interpolate.PchipInterpolator(x, y).integrate(x[0], x[-1]) / (x[-1] - x[0])
        for y in ((0.65, 0.75, 0.85), (0.6, 0.7, 0.8))
    ]
    comparison = only.comparison
    assert (comparison.low_l0, comparison.high_l0) == pytest.approx((8, 32))
    assert (comparison.a, comparison.b) == pytest.approx(areas)
    assert comparison.difference.value == pytest.approx(0.05)
    assert only.verdict.startswith("at equal L0 from 8 to 32, on average: topk is better by 0.05")
    assert only.verdict.endswith("; topk is better everywhere in that range")
    assert only.n_saes == (3, 3)
    # The staircase of (log10 8, 0.35), (log10 16, 0.25), (log10 32, 0.15) in the box of 3 decades.
    steps = np.diff([*np.log10(L0S), 3.0]) / 3
    assert only.volumes is not None
    assert only.volumes[0] == pytest.approx(float(steps @ [0.65, 0.75, 0.85]), rel=1e-6)


def test_families_that_cross_are_said_to(tmp_path):
    folder = families(tmp_path, (0.05, 0.0, -0.05))
    (only,) = _families.compare(("topk", "relu"), folder, ["explained_variance"], ANYWHERE).rows
    assert only.comparison.crossings == pytest.approx([16], rel=0.02)
    assert "the curves cross at L0 16" in only.verdict
    assert "everywhere" not in only.verdict


def test_seeds_of_one_sparsity_are_one_point(tmp_path):
    saes = {}
    for name, l0, value, seed in (
        ("relu", 8.0, 0.6, 0),
        ("relu", 16.0, 0.70, 0),
        ("relu", 16.0, 0.75, 1),
        ("relu", 32.0, 0.8, 0),
        ("topk", 8.0, 0.7, 0),
        ("topk", 32.0, 0.9, 0),
    ):
        rows = [
            row("explained_variance", noisy(value, 0.1, 0)),
            row("l0", noisy(l0, 0.1, 1), best=None),
        ]
        saes[f"{name}-{l0}-s{seed}"] = (trained(name, l0, seed), rows)
    write(tmp_path, saes)
    found = _families.compare(("topk", "relu"), tmp_path, ["explained_variance"], ANYWHERE)
    (only,) = found.rows
    x = np.log(L0S)
    curve = scipy.interpolate.PchipInterpolator(x, (0.6, 0.725, 0.8))
    assert only.n_saes == (2, 3)
    assert only.comparison.b == pytest.approx(curve.integrate(x[0], x[-1]) / (x[-1] - x[0]))
    assert only.volumes is None  # the metric names no worst and ideal value


def test_every_width_has_a_section_of_its_own(tmp_path):
    saes = {}
    for width in (64, 128):
        for variant in ("relu", "topk"):
            for i, l0 in enumerate(L0S):
                value = noisy(0.6 + 0.1 * i, 0.1, len(saes))
                rows = [row("explained_variance", value), row("l0", noisy(l0, 0.1, i), best=None)]
                saes[f"{variant}-{width}-{i}"] = (trained(variant, l0, width=width), rows)
    write(tmp_path, saes)
    both = _families.compare(("topk", "relu"), tmp_path, ["explained_variance"], ANYWHERE)
    assert [only.place for only in both.rows] == [Place(SITE, 64), Place(SITE, 128)]
    text = _families.text(both)
    assert f"\n{SITE}, width 64\n" in text and f"\n{SITE}, width 128\n" in text
    narrow = _families.compare(("topk", "relu"), tmp_path, ["explained_variance"], Place(None, 64))
    assert [only.place.width for only in narrow.rows] == [64]
    with pytest.raises(UserError, match="no SAEs of any site, width 96 to compare. Both have"):
        _families.compare(("topk", "relu"), tmp_path, ["explained_variance"], Place(None, 96))


@pytest.mark.parametrize(
    ("names", "metric", "message"),
    [
        (("topk", "relux"), "explained_variance", "did you mean relu"),
        (("topk", "random"), "explained_variance", "no SAEs of a variant 'random'"),
        (("topk", "topk"), "explained_variance", "compared with itself"),
        (("topk", "relu"), "l0", "l0 has no better direction"),
        (("topk", "relu"), "mse", "No SAE has a metric 'mse'"),
    ],
)
def test_families_that_cannot_be_compared_are_refused(tmp_path, names, metric, message):
    with pytest.raises(UserError, match=message):
        _families.compare(names, families(tmp_path), [metric], ANYWHERE)


def test_a_family_of_one_sparsity_and_families_without_a_range_in_common_are_refused(tmp_path):
    rows = {
        l0: [row("explained_variance", noisy(0.5, 0.1, 0)), row("l0", noisy(l0, 0.1, 1), best=None)]
        for l0 in (8.0, 16.0, 32.0, 64.0)
    }
    few = {"relu-8": (trained("relu", 8.0), rows[8.0])}
    few |= {f"topk-{l0}": (trained("topk", l0), rows[l0]) for l0 in (8.0, 16.0)}
    write(tmp_path / "few", few)
    with pytest.raises(UserError, match="relu has explained_variance at fewer than two sparsities"):
        _families.compare(("relu", "topk"), tmp_path / "few", ["explained_variance"], ANYWHERE)
    apart = {f"relu-{l0}": (trained("relu", l0), rows[l0]) for l0 in (32.0, 64.0)}
    write(tmp_path / "apart", few | apart)
    del few["relu-8"]
    write(tmp_path / "apart", few | apart)
    with pytest.raises(UserError, match="no range of L0 in common"):
        _families.compare(("relu", "topk"), tmp_path / "apart", ["explained_variance"], ANYWHERE)


def test_the_rows_of_families_have_every_number(tmp_path):
    found = _families.compare(
        ("topk", "relu"), families(tmp_path), ["explained_variance"], ANYWHERE
    )
    (line,) = csv.DictReader(_families.as_csv(found).splitlines())
    assert (line["a"], line["b"], line["width"], line["dominates"]) == ("topk", "relu", "64", "a")
    assert float(line["difference"]) == found.rows[0].comparison.difference.value
    assert float(line["hypervolume_a"]) == found.rows[0].volumes[0]


# The command


def test_compare_prints_a_verdict_and_writes_the_rows(saebench: Run, tmp_path: Path):
    folder, out = pair(tmp_path / "toy"), tmp_path / "rows.csv"
    ended = saebench("compare", "a", "b", "--results", folder, "--metric", "ev", "--out", out)
    assert (ended.code, ended.err) == (0, "")
    assert "ev: a is better by 0.0500" in ended.out
    assert ended.out.endswith(f"wrote {out}\n")
    assert len(out.read_text().splitlines()) == 2


def test_compare_takes_families_by_name(saebench: Run, tmp_path: Path):
    folder, out = families(tmp_path / "toy"), tmp_path / "rows.csv"
    arguments = ["compare", "--families", "topk", "relu", "--results", folder]
    ended = saebench(*arguments, "--width", "64", "--site", SITE, "--out", out)
    assert (ended.code, ended.err) == (0, "")
    assert "topk is better everywhere in that range" in ended.out
    assert len(out.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a"], "compare takes the names of two SAEs"),
        (["a", "b", "c"], "compare takes the names of two SAEs"),
        ([], "got neither"),
        (["a", "b", "--families", "topk", "relu"], "got a b --families topk relu"),
        (["a", "b", "--out", "rows.txt"], "expected a file whose name ends in .csv"),
        (["a", "b", "--width", "64"], "--width and --site choose among the SAEs of --families"),
        (["a", "x"], "has no scores of 'x'"),
    ],
)
def test_a_comparison_of_nothing_is_refused(saebench: Run, tmp_path: Path, arguments, message):
    ended = saebench("compare", *arguments, "--results", pair(tmp_path / "toy"))
    assert (ended.code, ended.out) == (2, "")
    assert message in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("module", ["_compare", "_families"])
def test_comparisons_do_without_torch_and_plots(module):
    code = f"import sys, saebench.reports.{module}; print({{'torch', 'matplotlib'}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_families_of_two_folders_are_refused(saebench: Run, tmp_path: Path):
    folder = families(tmp_path / "toy")
    shutil.copytree(folder, tmp_path / "again")
    arguments = ["--results", folder, "--results", tmp_path / "again"]
    ended = saebench("compare", "--families", "topk", "relu", *arguments)
    assert ended.code == 2
    assert "--families compares within one folder" in ended.err


def test_rows_that_cannot_be_written_are_one_message(saebench: Run, tmp_path: Path):
    (tmp_path / "file").write_text("")
    ended = saebench(
        "compare",
        "a",
        "b",
        "--results",
        pair(tmp_path / "toy"),
        "--out",
        tmp_path / "file" / "x.csv",
    )
    assert ended.code == 2 and "x.csv cannot be written" in ended.err
    assert "Traceback" not in ended.err
