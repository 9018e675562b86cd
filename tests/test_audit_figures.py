"""The two figures of an audit: what is drawn is what was measured, and every mark has its name."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from saebench.errors import NothingToShow
from saebench.reliability.cards import Card, card_of
from saebench.reliability.rows import COLUMNS
from saebench.reliability.truth import Correlation
from saebench.reports import _audit_figures as figures
from saebench.reports._table import Key
from saebench.reports.pareto import Pareto

FAMILIES = ("relu", "topk", "batch_topk", "jumprelu")
L0S, SEEDS, TOKENS = (8.0, 32.0), (0, 1, 2), (10_000, 100_000, 1_000_000)
EXPLAINED, MSE, L0 = (
    Key(name, eval_name, "{}")
    for name, eval_name in (
        ("explained_variance", "reconstruction"),
        ("mse", "reconstruction"),
        ("l0", "sparsity"),
    )
)
F1, MCC = Key("f1", "ground_truth", "{}"), Key("mcc", "ground_truth", "{}")
KEYS = (EXPLAINED, MSE, L0, F1, MCC)
BEST = {"explained_variance": "max", "mse": "min", "l0": "", "f1": "max", "mcc": "max"}
CONTROLS = {"random": -3.0, "frozen_decoder": 0.42, "oracle": 0.99}


def value(family: str, l0: float, seed: int, tokens: float, metric: str) -> float:
    """Different for each, and rising with the tokens."""
    quality = 0.4 + 0.05 * FAMILIES.index(family) + 0.03 * seed + 0.001 * l0
    quality += 0.05 * np.log10(tokens / 10_000)
    return float({"mse": 2 - quality, "l0": l0 + seed}.get(metric, quality))


def row(**about: Any) -> dict[str, Any]:
    plain = {"width": 64.0, "site": "0.resid_post", "setting": "", "version": 1, "params": "{}"}
    plain |= {"best": BEST[about["metric"]], "degraded": "", "amount": 0.0}
    return plain | {"low": about["value"] - 0.01, "high": about["value"] + 0.02} | about


def measured(seeds: tuple[int, ...] = SEEDS, l0s: tuple[float, ...] = L0S) -> pd.DataFrame:
    """Snapshots of every SAE, all SAEs finished, and controls."""
    rows = []
    for key in KEYS:
        metric: dict[str, Any] = {"metric": key.metric, "eval": key.eval_name}
        for family in FAMILIES:
            for l0 in l0s:
                for seed in seeds:
                    name = f"{family}-{l0:g}-{seed}"
                    one: dict[str, Any] = {"family": family, "l0": l0, "seed": float(seed)}
                    one |= {"kind": "trained"} | metric
                    for tokens in TOKENS:
                        found = value(family, l0, seed, tokens, key.metric)
                        at = {"sae": f"{name}-at-{tokens}", "tokens": float(tokens)}
                        rows.append(row(what="snapshot", value=found, **at, **one))
                    found = value(family, l0, seed, TOKENS[-1], key.metric)
                    rows.append(row(what="base", sae=name, tokens=999_424.0, value=found, **one))
        for name, level in CONTROLS.items():
            kind = "reference" if name == "oracle" else "control"
            more: dict[str, Any] = {"sae": name, "family": name, "kind": kind, "tokens": 999_424.0}
            more |= {"l0": np.nan, "seed": np.nan} | metric
            rows.append(row(what="base", value=level, **more))
        spoilt = {"sae": "oracle-mixed25", "family": "oracle", "kind": "reference"} | metric
        spoilt |= {"l0": np.nan, "seed": np.nan, "tokens": 999_424.0}
        rows.append(row(what="base", value=0.7, **spoilt | {"degraded": "mixed", "amount": 0.25}))
        other = {"family": "relu", "l0": 8.0, "seed": 0.0, "kind": "trained", "tokens": 999_424.0}
        again = other | {"sae": "relu-8-0", "setting": "0"} | metric
        rows.append(row(what="redraw", value=17.0, **again))
    return pd.DataFrame(rows)


def lines(panel: Axes) -> dict[str, tuple[list[float], list[float]]]:
    """Data of what has a name in the legend."""
    return {
        str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata()))
        for line in panel.lines
        if not str(line.get_label()).startswith("_")
    }


def visible(figure: Figure) -> list[Axes]:
    return [panel for panel in figure.axes if panel.get_visible()]


def texts(panel: Axes) -> list[str]:
    return [text.get_text() for text in panel.texts]


def legend(figure: Figure) -> list[str]:
    (found,) = figure.legends
    return [text.get_text() for text in found.get_texts()]


# Progress


def test_a_line_is_the_mean_over_seeds_and_its_band_reaches_over_all_of_them():
    panels = visible(figures.draw_progress(measured(), EXPLAINED))
    assert [panel.get_title() for panel in panels] == ["L0 8", "L0 32"]
    for panel, l0 in zip(panels, L0S, strict=True):
        drawn = lines(panel)
        for family in FAMILIES:
            x, y = drawn[family]
            seeds = [[value(family, l0, s, t, "explained_variance") for s in SEEDS] for t in TOKENS]
            assert x == list(TOKENS)
            np.testing.assert_allclose(y, np.mean(seeds, 1))
        assert len(panel.collections) == len(FAMILIES)
        corners = panel.collections[0].get_paths()[0].vertices
        relu = [[value("relu", l0, s, t, "explained_variance") for s in SEEDS] for t in TOKENS]
        for tokens, of_seeds in zip(TOKENS, relu, strict=True):
            here = corners[corners[:, 0] == tokens][:, 1]
            np.testing.assert_allclose((here.min(), here.max()), (min(of_seeds), max(of_seeds)))


def test_the_band_of_one_seed_is_its_interval():
    panel = visible(figures.draw_progress(measured((0,)), EXPLAINED))[0]
    corners = panel.collections[0].get_paths()[0].vertices
    last = corners[corners[:, 0] == TOKENS[-1]][:, 1]
    middle = value("relu", 8.0, 0, TOKENS[-1], "explained_variance")
    np.testing.assert_allclose((last.min(), last.max()), (middle - 0.01, middle + 0.02))


def test_finished_seeds_without_snapshots_do_not_move_the_end_of_a_line():
    """As an audit measures: snapshots of one seed, all seeds finished."""
    rows = measured()
    rows = rows[(rows["what"] != "snapshot") | (rows["seed"] == 1)]
    _, y = lines(visible(figures.draw_progress(rows, EXPLAINED))[0])["relu"]
    np.testing.assert_allclose(y, [value("relu", 8.0, 1, t, "explained_variance") for t in TOKENS])


def test_the_finished_sae_ends_a_line_whose_snapshots_end_before():
    rows = measured()
    rows = rows[(rows["what"] != "snapshot") | (rows["tokens"] < TOKENS[-1])]
    x, y = lines(visible(figures.draw_progress(rows, EXPLAINED))[0])["relu"]
    assert x == [*TOKENS[:-1], 999_424]
    ends = [value("relu", 8.0, s, TOKENS[-1], "explained_variance") for s in SEEDS]
    assert y[-1] == pytest.approx(np.mean(ends))


def test_controls_are_dashed_grey_lines_and_far_ones_stand_at_the_edge_with_their_values():
    figure = figures.draw_progress(measured(), EXPLAINED)
    for panel in visible(figure):
        low, high = panel.get_ylim()
        drawn = {str(line.get_label()): line for line in panel.lines}
        assert drawn["frozen_decoder"].get_ydata()[0] == CONTROLS["frozen_decoder"]
        assert drawn["frozen_decoder"].get_linestyle() == "--"
        assert drawn["frozen_decoder"].get_color() == figures._GREY
        assert low > CONTROLS["random"] and high < CONTROLS["oracle"]
        assert texts(panel) == ["random \N{MINUS SIGN}3 ↓", "oracle 0.99 ↑"]


def test_a_control_of_one_l0_is_drawn_at_that_l0_alone():
    rows = measured()
    rows.loc[rows["family"] == "frozen_decoder", "l0"] = 32.0
    first, second = visible(figures.draw_progress(rows, EXPLAINED))
    assert "frozen_decoder" not in lines(first) and "frozen_decoder" in lines(second)


def test_panels_of_one_metric_share_their_scale_and_tick_the_snapshots():
    panels = visible(figures.draw_progress(measured(), EXPLAINED))
    assert len({panel.get_ylim() for panel in panels}) == 1
    assert {panel.get_xscale() for panel in panels} == {"log"}
    ticks = [label.get_text() for label in panels[0].get_xticklabels()]
    assert ticks == ["10k", "100k", "1M"]


def test_one_panel_names_its_lines_at_their_ends_in_their_order_without_overlap():
    rows = measured(l0s=(8.0,))
    figure = figures.draw_progress(rows, EXPLAINED)
    (panel,) = visible(figure)
    assert figure.legends == []
    named = {t.get_text(): t.get_position()[1] for t in panel.texts if t.get_position()[0] > 1}
    assert named.keys() == {*FAMILIES, "frozen_decoder"}
    order = [
        name for name, _ in sorted(lines(panel).items(), key=lambda item: float(item[1][1][-1]))
    ]
    assert sorted(named, key=named.__getitem__) == order
    figure.draw_without_rendering()
    boxes = sorted((t.get_window_extent() for t in panel.texts), key=lambda box: box.y0)
    beside = [box for box in boxes if box.x0 > panel.get_window_extent().x1]
    assert len(beside) == len(named)
    assert all(a.y1 <= b.y0 + 1 for a, b in zip(beside, beside[1:], strict=False))
    assert max(box.x1 for box in beside) <= figure.bbox.x1


def test_more_lines_than_have_room_beside_the_panel_are_in_a_legend():
    rows = measured(l0s=(8.0,))
    many = [rows]
    for i in range(30):
        copy = rows[rows["family"] == "relu"].assign(family=f"relu{i}")
        many.append(copy.assign(sae=copy["sae"] + str(i)))
    figure = figures.draw_progress(pd.concat(many), EXPLAINED)
    assert len([name for name in legend(figure) if name.startswith("relu")]) == 31


def test_the_legend_names_every_family_and_control_once():
    figure = figures.draw_progress(measured(), EXPLAINED)
    controls = ["oracle (reference)", "frozen_decoder (control)", "random (control)"]
    assert legend(figure) == [*FAMILIES, *controls]
    (found,) = figure.legends
    assert found.get_title().get_text() == "mean over 3 seeds; bands: lowest to highest seed"
    figure.draw_without_rendering()
    below = min(panel.get_tightbbox().y0 for panel in visible(figure))
    assert found.get_window_extent().y1 <= below + 1


def test_a_metric_that_spreads_over_decades_has_a_logarithmic_axis_with_ticks():
    rows = measured(l0s=(8.0,))
    trained = rows["kind"] == "trained"
    for name in ("value", "low", "high"):
        rows.loc[trained, name] = 10 ** (6 * (1 - rows.loc[trained, "value"]))
    (panel,) = visible(figures.draw_progress(rows, EXPLAINED))
    assert panel.get_yscale() == "log"
    ticks = [t for t in panel.get_yticks() if panel.get_ylim()[0] < t < panel.get_ylim()[1]]
    assert 2 <= len(ticks) <= 5


def test_widths_and_sites_are_lines_of_their_own():
    rows = measured(l0s=(8.0,))
    both = pd.concat([rows, rows.assign(width=128.0, sae=rows["sae"] + "-wide")])
    (panel,) = visible(figures.draw_progress(both, EXPLAINED))
    assert {f"{family}, width {w}" for family in FAMILIES for w in (64, 128)} <= lines(panel).keys()


def test_all_metrics_have_a_panel_each_of_the_l0_that_was_chosen():
    figure = figures.draw_progress_all(measured(), [EXPLAINED, MSE, L0], 32.0)
    panels = visible(figure)
    titles = ["explained variance ↑", "MSE ↓", "L0"]
    assert [panel.get_title() for panel in panels] == titles
    for panel, metric in zip(panels, ("explained_variance", "mse", "l0"), strict=True):
        _, y = lines(panel)["topk"]
        seeds = [[value("topk", 32.0, s, t, metric) for s in SEEDS] for t in TOKENS]
        np.testing.assert_allclose(y, np.mean(seeds, 1))
    (found,) = figure.legends
    assert found.get_title().get_text().startswith("asked-for L0 32; mean over 3 seeds")


def test_metrics_that_are_measured_in_several_ways_say_which():
    rows = measured()
    other = rows[rows["metric"] == "mse"].assign(params='{"k": 5}')
    figure = figures.draw_progress_all(pd.concat([rows, other]), [MSE], 32.0)
    assert visible(figure)[0].get_title() == "MSE ({}) ↓"


def test_older_versions_of_an_eval_are_not_drawn():
    rows = measured()
    old = rows.assign(version=0, value=rows["value"] + 5)
    before, after = (
        lines(visible(figures.draw_progress(drawn, EXPLAINED))[0])
        for drawn in (rows, pd.concat([old, rows]))
    )
    assert before == after


# Truth


def test_every_trained_sae_is_a_point_at_its_f1_and_its_value():
    panel = visible(figures.draw_truth(measured(), MSE, None))[0]
    for family in FAMILIES:
        drawn = [line for line in panel.lines if line.get_label() == family]
        assert len(drawn) == len(L0S)
        found = {tuple(point) for line in drawn for point in line.get_xydata()}
        end = TOKENS[-1]
        assert found == {
            (value(family, l0, s, end, "f1"), value(family, l0, s, end, "mse"))
            for l0 in L0S
            for s in SEEDS
        }
        sizes = {float(line.get_xydata()[0, 1]): line.get_markersize() for line in drawn}
        assert len(set(sizes.values())) == len(L0S)  # the L0s are told apart


def test_the_oracle_is_a_star_and_a_degraded_one_an_empty_star_named_by_its_damage():
    figure = figures.draw_truth(measured(), MCC, Correlation(0.87, -0.004, 0.9))
    (panel,) = visible(figure)
    stars = {str(line.get_label()): line for line in panel.lines if line.get_marker() == "*"}
    assert stars["oracle, degraded"].get_xydata().tolist() == [[0.7, 0.7]]
    assert stars["oracle, degraded"].get_color() == "white"
    assert "mixed 25 %" in texts(panel) and "oracle 0.99 ↑" in texts(panel)
    assert panel.get_title() == "Spearman's ρ = 0.87 [0.00, 0.90]"
    assert panel.get_xlabel() == "ground-truth F1 (better →)"
    assert panel.get_ylabel() == "MCC ↑"
    l0s = ["L0 8", "L0 32"]
    assert legend(figure) == [*FAMILIES, *l0s, "oracle", "oracle, degraded"]


def test_controls_that_are_no_oracle_are_no_points():
    panel = visible(figures.draw_truth(measured(), EXPLAINED, None))[0]
    assert not {"random", "frozen_decoder"} & lines(panel).keys()
    assert panel.get_title() == ""


def test_every_metric_has_its_correlation_above_its_panel():
    told = {MSE: Correlation(-0.5, -0.7, -0.2)}
    figure = figures.draw_truth_all(measured(), [EXPLAINED, MSE], told)
    minus = "\N{MINUS SIGN}"
    assert [panel.get_title() for panel in visible(figure)] == [
        "explained variance ↑",
        f"MSE ↓\nρ = {minus}0.50 [{minus}0.70, {minus}0.20]",
    ]


# Files


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_every_figure_is_a_pdf_and_a_png_that_are_the_same_when_drawn_again(tmp_path):
    rows = measured((0,), (8.0,))

    def draw() -> list[Path]:
        paths = figures.progress(rows, EXPLAINED, tmp_path)
        return paths + figures.truth(rows, EXPLAINED, Correlation(0.5, 0.1, 0.8), tmp_path)

    paths = draw()
    assert names(paths) == [
        f"audit_{what}_explained_variance.{ending}"
        for what in ("progress", "truth")
        for ending in ("pdf", "png")
    ]
    assert {path.name for path in tmp_path.iterdir()} == set(names(paths))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}
    assert draw() == paths
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in paths} == before
    starts = [content[:4] for content, _ in before.values()]
    assert starts == [b"%PDF", b"\x89PNG"] * 2
    assert b"CreationDate" not in paths[0].read_bytes()


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """Figures that are handed over to be written, by their names; writing them takes the most time."""
    found: dict[str, Figure] = {}

    def save(self: Pareto, figure: Figure, path: Path) -> bool:
        found[path.name] = figure
        return True

    monkeypatch.setattr(Pareto, "save", save)
    return found


def test_more_metrics_than_a_page_holds_go_on_the_next(tmp_path, monkeypatch, saved):
    monkeypatch.setattr(figures, "_MOST_PANELS", 2)
    paths = figures.progress_all(measured(), [EXPLAINED, MSE, L0], 8.0, tmp_path)
    assert names(paths) == [
        f"audit_progress{page}.{e}" for page in ("", "_2") for e in ("pdf", "png")
    ]
    assert [len(visible(saved[name])) for name in names(paths)] == [2, 2, 1, 1]


def as_audited(rows: pd.DataFrame) -> pd.DataFrame:
    """With every column that an audit has."""
    empty: dict[type, Any] = {str: "", bool: True, float: 1.0, int: 1}
    more = {name: empty[kind] for name, kind in COLUMNS.items() if name not in rows}
    return rows.assign(**more)


@pytest.fixture(scope="module")
def card() -> Card:
    return card_of("toy", as_audited(measured((0,))), None)


def titles(figure: Figure) -> list[str]:
    return [panel.get_title().partition("\n")[0] for panel in visible(figure)]


def test_an_audit_draws_what_it_can_of_metrics_with_a_direction(tmp_path, card, saved):
    rows = as_audited(measured())
    both = [f"audit_{name}.{e}" for name in ("progress", "truth") for e in ("pdf", "png")]
    assert names(figures.draw(rows, card, tmp_path)) == both
    shown = ["explained variance ↑", "MSE ↓", "F1 ↑", "MCC ↑"]
    assert titles(saved["audit_progress.pdf"]) == shown
    assert titles(saved["audit_truth.pdf"]) == ["explained variance ↑", "MSE ↓", "MCC ↑"]
    blind = rows[rows["eval"] != "ground_truth"]
    assert names(figures.draw(blind, card, tmp_path)) == both[:2]
    assert figures.draw(blind[blind["what"] != "snapshot"], card, tmp_path) == []


def test_an_audit_shows_the_l0_that_most_families_have_snapshots_of(tmp_path, card, saved):
    rows = as_audited(measured())
    few = (rows["what"] == "snapshot") & (rows["l0"] == 8.0) & (rows["family"] != "relu")
    figures.draw(rows[~few], card, tmp_path)
    (found,) = saved["audit_progress.pdf"].legends
    assert found.get_title().get_text().startswith("asked-for L0 32;")


@pytest.mark.parametrize("what", ["progress", "truth"])
def test_what_nobody_measured_cannot_be_drawn(tmp_path, what):
    key = Key("loss_recovered", "fidelity", "{}")
    draw = {
        "progress": lambda: figures.progress(measured(), key, tmp_path),
        "truth": lambda: figures.truth(measured(), key, None, tmp_path),
    }[what]
    with pytest.raises(NothingToShow, match="no (trained )?SAE has (both )?loss_recovered"):
        draw()
    with pytest.raises(NothingToShow):
        if what == "progress":
            figures.progress_all(measured(), [EXPLAINED], 64.0, tmp_path)
        else:
            figures.truth_all(measured(), [key], {}, tmp_path)


# Small parts


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([0.2, 0.8], [0.2, 0.8]),
        ([0.5, 0.5], [0.45, 0.55]),
        ([0.52, 0.48], [0.55, 0.45]),
        ([0.5, 0.5, 0.9], [0.45, 0.55, 0.9]),
        ([0.0, 0.0], [0.0, 0.1]),
        ([1.0, 1.0], [0.9, 1.0]),
        ([], []),
    ],
)
def test_labels_stand_apart_as_near_to_their_lines_as_they_can(places, expected):
    np.testing.assert_allclose(figures._apart(places, 0.1), expected)


def test_labels_far_more_crowded_than_that_still_stand_apart_and_inside():
    places = np.random.default_rng(0).uniform(0.4, 0.6, 8)
    found = np.array(figures._apart(places.tolist(), 0.12))
    assert found.min() >= 0 and found.max() <= 1 + 1e-12
    assert np.diff(np.sort(found)).min() >= 0.12 - 1e-12
    assert list(np.argsort(found)) == list(np.argsort(places))


@pytest.mark.parametrize(
    ("n", "text"), [(500.0, "500"), (3e4, "30k"), (1.5e6, "1.5M"), (2e9, "2G")]
)
def test_tokens_are_counted_in_thousands_and_millions(n, text):
    assert figures._count(n) == text


def test_an_axis_of_nine_powers_of_ten_has_ticks_on_some_of_them():
    axis = figures.pareto._Axis("", None, True)
    ticks = figures._ticks(axis, -9.0, -0.3)
    assert 2 <= len(ticks) <= figures._MOST_TICKS
    powers = np.log10(ticks)
    np.testing.assert_allclose(powers, powers.round())
    assert powers.min() >= -9 and powers.max() <= -0.3
