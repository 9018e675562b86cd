"""The two figures of an audit: a metric against training tokens, and a metric against ground truth.

Progress has a line for each family of SAEs through the snapshots of its training, the mean over the seeds that have
some, in a band from the lowest seed to the highest (of one seed: its interval). Controls, which are finished from the
start, are dashed grey lines. Truth has a point for each trained SAE, at its F1 against the known features and at its
metric; SAEs of a higher asked-for L0 are larger and darker, oracles are stars, empty ones where they are degraded. What
lies far outside the range of the SAEs stands with its value at the edge. Each figure comes of one metric, or of many
with a panel for each.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from saebench.errors import NothingToShow
from saebench.reliability.cards import Card
from saebench.reliability.rows import tidy
from saebench.reliability.truth import Correlation
from saebench.reports import _table, pareto
from saebench.reports._table import Key
from saebench.reports.pareto import Pareto

_FORMATS = ("pdf", "png")
_COLUMN, _PAGE = 3.4, 6.9  # inches: one column of a two-column paper, and both
_WIDE_HEIGHT, _PANEL_HEIGHT, _SMALL_HEIGHT = 2.6, 1.9, 1.3
_LEGEND_ROW = 0.155
_NOTE = 0.2  # inches of a legend's title and of the space around it
_POINTS_PER_LETTER, _POINTS_PER_HANDLE = 3.7, 34.0
_MOST_COLUMNS, _MOST_TICKS = 4, 5
_NEAR = 0.3  # a control this share of the SAEs' range beyond it still gets a place on the axis
_STRIP = 0.12  # height of the row for what is off the scale, as a share of the axes
_LABEL_POINTS = 7.6  # height of a line of labels beside a panel
_AROUND_POINTS = 36.0  # height of what a figure has above and below its one panel
_INK = 0.8  # of a colour in letters, which are thinner than lines
_TICK_POINTS = 21.0  # width of a label of an axis of tokens, with the space beside it
_SHADES = (0.45, 1.0)  # of the lowest and the highest L0: from the family's colour towards white
_SIZES = (2.4, 3.8)  # points, of the lowest and the highest L0
_GREY = "#6E6E6E"
_STAR = "#111111"
_CONTROLS: dict[
    str, Any
] = {  # those that every metric must tell from trained SAEs, and their dashes
    "oracle": (0, (6, 1.5, 1.2, 1.5)),
    "frozen_decoder": (0, (1.2, 1.4)),
    "random": (0, (4, 2)),
    "permuted_decoder": (0, (9, 2.5)),
}
_TRUTH = ("ground_truth", "f1")
"""Eval and metric that the others are read against."""
_OF_TRUTH = ("f1", "mcc")
"""What is shown of that eval, which has a metric for everything that can be known."""
_SAME = 1.01  # numbers of tokens that differ by less are the same time
_MOST_PANELS = 24


class _Looks(NamedTuple):
    """What is the same in all panels of a figure."""

    series: dict[str, Any]
    """Colour, marker and dashes of each family, by its label, as in the Pareto plots."""
    controls: dict[str, Any]
    """Dashes of each control."""
    l0s: list[float]
    """All that are asked for, ascending."""
    small: float
    """How large lines and marks are: 1 where one metric has the whole figure."""


class _Scale(NamedTuple):
    """A vertical axis: the range of the SAEs, and of controls that are near."""

    axis: Any
    low: float
    high: float
    """Along the axis."""

    def below(self, values: "pd.Series[float]") -> "pd.Series[bool]":
        return pd.Series(self.axis.at(values) < self.low, index=values.index)

    def above(self, values: "pd.Series[float]") -> "pd.Series[bool]":
        return pd.Series(self.axis.at(values) > self.high, index=values.index)


def draw(measured: pd.DataFrame, card: Card, folder: Path) -> list[Path]:
    """Both figures of all metrics that have a better direction; one that nothing was measured for is left out.

    Progress is that of SAEs of the L0 at which most families have snapshots.
    """
    measured = tidy(measured)
    shown = [
        one
        for one in card.metrics
        if one.best is not None and (one.eval != _TRUTH[0] or one.metric in _OF_TRUTH)
    ]
    keys = [Key(one.metric, one.eval, one.params) for one in shown]
    correlations = {
        key: one.truth.f1 for key, one in zip(keys, shown, strict=True) if one.truth.f1 is not None
    }
    snapshots = measured[(measured["what"] == "snapshot") & (measured["kind"] == "trained")]
    l0s = sorted(snapshots["l0"].dropna().unique())
    families = {float(l0): snapshots.loc[snapshots["l0"] == l0, "family"].nunique() for l0 in l0s}
    paths: list[Path] = []
    if families:
        paths += progress_all(measured, keys, max(families, key=families.__getitem__), folder)
    if (measured["eval"] == _TRUTH[0]).any():
        others = [key for key in keys if (key.eval_name, key.metric) != _TRUTH]
        paths += truth_all(measured, others, correlations, folder)
    return paths


def progress(measured: pd.DataFrame, metric_key: Key, folder: Path) -> list[Path]:
    """One metric, with a panel for each asked-for L0."""
    return _save(draw_progress(measured, metric_key), folder, f"progress_{metric_key.metric}")


def progress_all(
    measured: pd.DataFrame, metric_keys: Sequence[Key], l0: float, folder: Path
) -> list[Path]:
    """Many metrics, of the SAEs that were asked for this L0: `audit_progress`, and `audit_progress_2` ... where they
    are too many for a page."""
    shown = [key for key in metric_keys if (_course(measured, key)["l0"] == l0).any()]
    if not shown:
        raise NothingToShow(f"no SAE of L0 {l0:g} has a metric at several times of its training")
    paths = []
    for page, keys in _pages(shown):
        paths += _save(draw_progress_all(measured, keys, l0), folder, f"progress{page}")
    return paths


def truth(
    measured: pd.DataFrame, metric_key: Key, correlation: Correlation | None, folder: Path
) -> list[Path]:
    """One metric; `correlation` is that with F1, None where there is none to tell."""
    figure = draw_truth(measured, metric_key, correlation)
    return _save(figure, folder, f"truth_{metric_key.metric}")


def truth_all(
    measured: pd.DataFrame,
    metric_keys: Sequence[Key],
    correlations: Mapping[Key, Correlation],
    folder: Path,
) -> list[Path]:
    """Many metrics, each with its correlation where it has one: `audit_truth`, and further pages as above."""
    shown = [key for key in metric_keys if len(_against_truth(measured, key))]
    if not shown:
        raise NothingToShow("no trained SAE has both a metric and a ground truth")
    paths = []
    for page, keys in _pages(shown):
        figure = draw_truth_all(measured, keys, correlations)
        paths += _save(figure, folder, f"truth{page}")
    return paths


def _pages(keys: Sequence[Key]) -> list[tuple[str, Sequence[Key]]]:
    """What the file of each page is called by, and what is on it."""
    starts = range(0, len(keys), _MOST_PANELS)
    return [(f"_{n}" if n > 1 else "", keys[i : i + _MOST_PANELS]) for n, i in enumerate(starts, 1)]


def _save(figure: Figure, folder: Path, name: str) -> list[Path]:
    paths = [folder / f"audit_{name}.{ending}" for ending in _FORMATS]
    for path in paths:
        Pareto().save(figure, path)
    return paths


# Progress


def draw_progress(measured: pd.DataFrame, metric_key: Key) -> Figure:
    points = _course(measured, metric_key)
    if points.empty:
        raise NothingToShow(f"no SAE has {metric_key.metric} at several times of its training")
    controls = _standards(_of_key(measured, metric_key))
    looks = _looks(points, controls, 1.0)
    scale = _scale(points, controls)
    far = controls[scale.below(controls["value"]) | scale.above(controls["value"])]
    n_near = controls.drop(far.index)["label"].nunique()
    beside = len(looks.l0s) == 1 and _room(len(looks.series) + n_near)
    with pareto._styled():
        n_rows = 0 if beside else _legend_rows([*looks.series, *looks.controls], len(looks.l0s))
        height = _WIDE_HEIGHT if len(looks.l0s) == 1 else _PANEL_HEIGHT
        figure, panels = _panels(len(looks.l0s), height, n_rows, 3)
        for i, (panel, l0) in enumerate(zip(panels, looks.l0s, strict=True)):
            title = f"L0 {l0:g}" if len(panels) > 1 else ""
            drawn = _Panel(points[points["l0"] == l0], _asked(controls, l0), title)
            _draw_progress(panel, drawn, scale, looks)
            if i % 3 == 0:
                panel.set_ylabel(_label(measured, metric_key, points))
        _across(panels, 3, "training tokens")
        if beside:
            _label_ends(panels[0], looks)
            panels[0].set_title(_bands(points), fontsize=6.5, color=_GREY)
        else:
            handles = [*_family_handles(looks), *_control_handles(looks, controls)]
            _legend(figure, handles, _bands(points))
    return figure


def draw_progress_all(measured: pd.DataFrame, metric_keys: Sequence[Key], l0: float) -> Figure:
    """Of metrics that all have snapshots at this L0."""
    courses = [_course(measured, key) for key in metric_keys]
    courses = [points[points["l0"] == l0] for points in courses]
    controls = [_asked(_standards(_of_key(measured, key)), l0) for key in metric_keys]
    together, standards = pd.concat(courses), pd.concat(controls)
    looks = _looks(together, standards, 0.8)
    columns = _columns(len(metric_keys))
    with pareto._styled():
        n_rows = _legend_rows([*looks.series, *looks.controls], columns)
        figure, panels = _panels(len(metric_keys), _SMALL_HEIGHT, n_rows, columns)
        for panel, key, points, near in zip(panels, metric_keys, courses, controls, strict=True):
            drawn = _Panel(points, near, _label(measured, key, points))
            _draw_progress(panel, drawn, _scale(drawn.points, drawn.controls), looks)
        _across(panels, columns, "training tokens")
        handles = [*_family_handles(looks), *_control_handles(looks, standards)]
        _legend(figure, handles, f"asked-for L0 {l0:g}; {_bands(together)}")
    return figure


class _Panel(NamedTuple):
    points: pd.DataFrame
    controls: pd.DataFrame
    title: str


def _draw_progress(panel: Axes, drawn: _Panel, scale: _Scale, looks: _Looks) -> None:
    points = drawn.points
    near = _scale_up(panel, scale, drawn.controls)
    panel.set_xscale("log")
    tokens = sorted(points["tokens"].unique())
    panel.set_xlim(tokens[0] / 1.1, tokens[-1] * 1.1)
    panel.set_title(drawn.title)
    for label, style in looks.series.items():
        line = points[points["label"] == label].sort_values("tokens")
        if line.empty:
            continue
        x, y = line["tokens"].to_numpy(), line["value"].to_numpy()
        band = (line["low"].to_numpy(), line["high"].to_numpy())
        panel.fill_between(x, *band, color=style.colour, alpha=0.1, linewidth=0, zorder=1.5)
        panel.plot(x, y, label=label, zorder=2, **_line(style, looks.small))
    for name, value in near.groupby("label", sort=False)["value"].mean().items():
        label, dashes = str(name), looks.controls[str(name)]
        panel.axhline(value, label=label, zorder=1, **_dashed(dashes, looks.small))
    _token_ticks(panel, tokens)


def _dashed(dashes: Any, small: float) -> dict[str, Any]:
    return {"color": _GREY, "linewidth": 0.9 * small, "linestyle": dashes}


def _line(style: Any, small: float) -> dict[str, Any]:
    return {
        "color": style.colour,
        "linestyle": style.dashes,
        "linewidth": 1.0 * small,
        "marker": style.marker,
        "markersize": 0.65 * small * pareto._SIZES.get(style.marker, 4.4),
        "markeredgecolor": "white",
        "markeredgewidth": 0.3,
    }


def _course(measured: pd.DataFrame, key: Key) -> pd.DataFrame:
    """One row for each family, L0 and number of tokens: its value, low and high over the seeds, and how many."""
    rows = _of_key(measured, key)
    rows = rows[(rows["kind"] == "trained") & rows["what"].isin(["base", "snapshot"])]
    rows = rows.dropna(subset=["tokens", "l0"])
    rows = rows.assign(label=_labels(rows))
    one = ["label", "l0", "seed"]
    last = rows[rows["what"] == "snapshot"].groupby(one)["tokens"].max().rename("last")
    rows = rows.join(last, on=one)
    # The finished SAE ends the course of one that has snapshots, unless that is the last of them.
    ends = (rows["what"] == "base") & (rows["tokens"] > _SAME * rows["last"])
    rows = rows[ends | (rows["what"] == "snapshot")].drop_duplicates([*one, "tokens"])
    where = ["label", "family", "l0", "tokens"]
    seeds = rows.groupby(where, sort=False)
    found = seeds.agg(
        value=("value", "mean"), low=("value", "min"), high=("value", "max"), n=("value", "size")
    )
    alone = seeds[["low", "high"]].first()
    for end in ("low", "high"):
        found[end] = found[end].where(found["n"] > 1, alone[end].fillna(found["value"]))
    found = found.reset_index()
    times = found.groupby(["label", "l0"])["tokens"].transform("size")
    return found[times > 1].assign(best=rows["best"].iloc[0] if len(rows) else None)


def _bands(points: pd.DataFrame) -> str:
    most = int(points["n"].max())
    if most == 1:
        return "bands: 95 % intervals"
    return f"mean over {most} seeds; bands: lowest to highest seed"


def _token_ticks(panel: Axes, tokens: Sequence[float]) -> None:
    """At the snapshots, from the last one back, as far as there is room for their labels."""
    figure = panel.get_figure(root=True)
    assert figure is not None, "a panel is one of a figure"
    columns = panel.get_gridspec().ncols  # type: ignore[union-attr]
    width = 72 * figure.get_size_inches()[0] / columns * 0.72
    per_point = math.log(tokens[-1] / tokens[0]) / width
    chosen: list[float] = []
    for n in reversed(tokens):
        if not chosen or math.log(chosen[-1] / n) >= _TICK_POINTS * per_point:
            chosen.append(n)
    chosen.reverse()
    panel.xaxis.set_ticks(chosen, [_count(n) for n in chosen])
    panel.xaxis.set_minor_locator(NullLocator())


def _count(n: float) -> str:
    """1,500,000 -> 1.5M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.3g}"


# Labels beside the ends of lines


def _room(n: int) -> bool:
    """Whether so many labels find room above one another beside a panel."""
    return n * _LABEL_POINTS <= 72 * _WIDE_HEIGHT - _AROUND_POINTS


def _label_ends(panel: Axes, looks: _Looks) -> None:
    named = [line for line in panel.lines if line.get_label() in {*looks.series, *looks.controls}]
    gap = _LABEL_POINTS / (72 * _WIDE_HEIGHT - _AROUND_POINTS)
    ends = [_share(panel, float(np.asarray(line.get_ydata())[-1])) for line in named]
    last = max(float(np.asarray(line.get_xdata())[-1]) for line in named)
    low, high = (math.log(end) for end in panel.get_xlim())
    at = (math.log(last) - low) / (high - low)
    for line, end, place in zip(named, ends, _apart(ends, gap), strict=True):
        start = 1.0 if line.get_label() in looks.controls else at
        panel.plot(
            [start, 1.04],
            [end, place],
            transform=panel.transAxes,
            color=line.get_color(),
            linewidth=0.5,
            clip_on=False,
        )
        panel.text(
            1.05,
            place,
            str(line.get_label()),
            transform=panel.transAxes,
            color=tuple(_INK * part for part in to_rgb(line.get_color())),
            fontsize=6.5,
            va="center",
        )


def _share(panel: Axes, y: float) -> float:
    """How far up the axis a value is."""
    low, high = panel.get_ylim()
    if panel.get_yscale() == "log":
        low, high, y = (math.log(part) for part in (low, high, y))
    return (y - low) / (high - low)


def _apart(places: Sequence[float], gap: float) -> list[float]:
    """As near to these as can be in their order and `gap` apart, inside 0 to 1.

    Neighbours that are too near become a block around their mean, as in isotonic regression.
    """
    order = sorted(range(len(places)), key=lambda i: places[i])
    blocks: list[tuple[float, int]] = []  # the lowest place of each, and how many there are
    for i in order:
        blocks.append((places[i], 1))
        while len(blocks) > 1 and blocks[-1][0] < blocks[-2][0] + blocks[-2][1] * gap:
            (above, m), (below, n) = blocks.pop(), blocks.pop()
            blocks.append(((below * n + (above - n * gap) * m) / (n + m), n + m))
    sorted_ = [start + k * gap for start, n in blocks for k in range(n)]
    for k in range(len(sorted_)):  # from the bottom up, and from the top down
        sorted_[k] = max(sorted_[k], k * gap)
    for k in range(len(sorted_)):
        sorted_[-1 - k] = min(sorted_[-1 - k], 1 - k * gap)
    found = dict(zip(order, sorted_, strict=True))
    return [found[i] for i in range(len(places))]


# Truth


def draw_truth(measured: pd.DataFrame, metric_key: Key, correlation: Correlation | None) -> Figure:
    points = _against_truth(measured, metric_key)
    saes = points[points["kind"] == "trained"]
    if saes.empty:
        raise NothingToShow(f"no trained SAE has both {metric_key.metric} and a ground truth")
    looks = _looks(saes, saes.iloc[:0], 1.0)
    with pareto._styled():
        handles = _truth_handles(looks, points)
        n_rows = _legend_rows([str(handle.get_label()) for handle in handles], 1)
        figure, panels = _panels(1, _WIDE_HEIGHT, n_rows, 1)
        title = "" if correlation is None else f"Spearman's {_told(correlation)}"
        _draw_truth(panels[0], points, title, looks)
        _across(panels, 1, "ground-truth F1 (better →)")
        panels[0].set_ylabel(_label(measured, metric_key, points))
        _name_oracles(panels[0], points)
        _legend(figure, handles, None)
    return figure


def draw_truth_all(
    measured: pd.DataFrame, metric_keys: Sequence[Key], correlations: Mapping[Key, Correlation]
) -> Figure:
    """Of metrics that all have a ground truth beside them."""
    found = [_against_truth(measured, key) for key in metric_keys]
    together = pd.concat(found)
    saes = together[together["kind"] == "trained"]
    looks = _looks(saes, saes.iloc[:0], 0.8)
    columns = _columns(len(metric_keys))
    with pareto._styled():
        handles = _truth_handles(looks, together)
        n_rows = _legend_rows([str(handle.get_label()) for handle in handles], columns)
        figure, panels = _panels(len(metric_keys), _SMALL_HEIGHT + 0.15, n_rows, columns)
        for panel, key, points in zip(panels, metric_keys, found, strict=True):
            told = f"\n{_told(correlations[key])}" if key in correlations else ""
            _draw_truth(panel, points, _label(measured, key, points) + told, looks)
        _across(panels, columns, "ground-truth F1")
        note = "ρ: Spearman's rank correlation and its 95 % interval; where less is better, with the sign turned"
        _legend(figure, handles, note if correlations else None)
    return figure


def _told(found: Correlation) -> str:
    low, high = (_signed(end) for end in (found.low, found.high))
    return f"ρ = {_signed(found.value)} [{low}, {high}]"


def _draw_truth(panel: Axes, points: pd.DataFrame, title: str, looks: _Looks) -> None:
    is_sae = points["kind"] == "trained"
    near = _scale_up(panel, _scale(points[is_sae], points[~is_sae]), points[~is_sae])
    axis = pareto._Axis("", None, False)
    pareto._scale_x(panel, axis, pareto._span(axis, points, ["truth"]))
    panel.set_title(title)
    # The larger marks below the smaller ones.
    for l0 in reversed(looks.l0s):
        for label, style in looks.series.items():
            mine = points[is_sae & (points["label"] == label) & (points["l0"] == l0)]
            if len(mine):
                look = _shaded(style, _rank(l0, looks.l0s), looks.small)
                panel.plot(mine["truth"], mine["value"], label=label, zorder=2, **look)
    whole = near["label"] == "oracle"
    for rows, label in ((near[~whole], "oracle, degraded"), (near[whole], "oracle")):
        if len(rows):
            look = _star(looks.small, empty=label != "oracle")
            panel.plot(rows["truth"], rows["value"], label=label, zorder=3, **look)


def _against_truth(measured: pd.DataFrame, key: Key) -> pd.DataFrame:
    """One row for each finished SAE and oracle with both: its `truth` and its value, low and high."""
    base = measured[measured["what"] == "base"]
    known = _table.newest(base)
    known = known[(known["eval"] == _TRUTH[0]) & (known["metric"] == _TRUTH[1])]
    f1 = known.dropna(subset=["value"]).drop_duplicates("sae").set_index("sae")["value"]
    rows = _of_key(base, key).drop_duplicates("sae")
    rows = rows.assign(truth=rows["sae"].map(f1)).dropna(subset=["truth"])
    oracles = rows[(rows["kind"] != "trained") & rows["family"].str.startswith("oracle")]
    trained = rows[(rows["kind"] == "trained") & rows["l0"].notna()]
    if trained.empty:
        return trained.assign(label=[])
    named = oracles.assign(label=_degraded(oracles))
    return pd.concat([trained.assign(label=_labels(trained)), named])


def _degraded(oracles: pd.DataFrame) -> list[str]:
    """oracle, or how it is degraded: mixed 25 %."""
    if "degraded" not in oracles:
        return [str(family) for family in oracles["family"]]
    columns = (oracles[name].tolist() for name in ("family", "degraded", "amount"))
    return [
        f"{how} {100 * amount:g} %" if how else family
        for family, how, amount in zip(*columns, strict=True)
    ]


def _shaded(style: Any, rank: float, small: float) -> dict[str, Any]:
    """`rank`: 0 for the lowest L0, 1 for the highest."""
    shade, size = (low + rank * (high - low) for low, high in (_SHADES, _SIZES))
    return {
        "color": tuple(shade * part + 1 - shade for part in to_rgb(style.colour)),
        "marker": style.marker,
        "markersize": small * size * pareto._SIZES.get(style.marker, 4.4) / 4.4,
        "markeredgecolor": "white",
        "markeredgewidth": 0.2,
        "linestyle": "none",
    }


def _star(small: float, empty: bool) -> dict[str, Any]:
    return {
        "color": "white" if empty else _STAR,
        "marker": "*",
        "markersize": (5.5 if empty else 7.0) * small,
        "markeredgecolor": _STAR if empty else "white",
        "markeredgewidth": 0.6 if empty else 0.4,
        "linestyle": "none",
    }


def _rank(l0: float, l0s: Sequence[float]) -> float:
    return l0s.index(l0) / (len(l0s) - 1) if len(l0s) > 1 else 1.0


def _name_oracles(panel: Axes, points: pd.DataFrame) -> None:
    """Beside their stars, towards the middle, and above one another."""
    middle = sum(panel.get_xlim()) / 2
    oracles = points[points["kind"] != "trained"]
    shares = [_share(panel, float(y)) for y in oracles["value"]]
    oracles = oracles.assign(up=shares)[[0 <= share <= 1 for share in shares]]
    gap = _LABEL_POINTS / (72 * _WIDE_HEIGHT - _AROUND_POINTS)
    for left in (True, False):
        side = oracles[(oracles["truth"] > middle) == left]
        places = _apart(side["up"].tolist(), gap)
        for x, place, name in zip(side["truth"], places, side["label"], strict=True):
            panel.annotate(
                str(name),
                (x, place),
                xycoords=panel.get_xaxis_transform(),
                xytext=(-5 if left else 5, 0),
                textcoords="offset points",
                ha="right" if left else "left",
                va="center",
                fontsize=6,
                color=_STAR,
            )


# What both share


def _of_key(measured: pd.DataFrame, key: Key) -> pd.DataFrame:
    """The values of one metric as measured in one way, of the newest version."""
    rows = _table.newest(measured)
    same = (
        (rows["metric"] == key.metric)
        & (rows["eval"] == key.eval_name)
        & (rows["params"] == key.params)
    )
    found: pd.DataFrame = rows[same & np.isfinite(rows["value"])]
    return found


def _standards(rows: pd.DataFrame) -> pd.DataFrame:
    """Finished controls, degraded oracles left out."""
    found = rows[(rows["what"] == "base") & rows["family"].isin(list(_CONTROLS))]
    if "degraded" in found:
        found = found[found["degraded"] == ""]
    return found.drop_duplicates("sae").assign(label=found["family"])


def _asked(controls: pd.DataFrame, l0: float) -> pd.DataFrame:
    """Those that were asked for this L0, or for none."""
    return controls[(controls["l0"] == l0) | controls["l0"].isna()]


def _labels(rows: pd.DataFrame) -> list[str]:
    """The family, with what else sets its SAEs apart from others of it."""
    widths, sites = rows["width"].dropna().nunique() > 1, rows["site"].nunique() > 1
    return [
        str(row.family)
        + (f", width {int(row.width):,}" if widths and not pd.isna(row.width) else "")  # type: ignore[arg-type]
        + (f", {row.site}" if sites else "")
        for row in rows.itertuples()
    ]


def _looks(points: pd.DataFrame, controls: pd.DataFrame, small: float) -> _Looks:
    lines = points.drop_duplicates("label")
    # A width or a site is a line of its own here, with a look of its own.
    saes = lines.assign(kind="trained", variant=lines["label"], width=np.nan)
    names = set(controls["label"])
    return _Looks(
        pareto._series(saes, by_width=False),
        {name: dashes for name, dashes in _CONTROLS.items() if name in names},
        sorted(float(l0) for l0 in points["l0"].unique()),
        small,
    )


def _label(measured: pd.DataFrame, key: Key, points: pd.DataFrame) -> str:
    """The metric as the tables have it, and which way is better."""
    ways = measured.loc[measured["metric"] == key.metric, ["eval", "params"]].drop_duplicates()
    which = f" ({key.params or key.eval_name})" if len(ways) > 1 else ""
    arrow = {"max": " ↑", "min": " ↓"}.get(str(points["best"].iloc[0]), "")
    return _table.words(key.metric) + which + arrow


def _columns(n: int) -> int:
    """Of a page with this many panels, so that the last row has few gaps."""
    if n <= _MOST_COLUMNS:
        return min(n, 3) if n != _MOST_COLUMNS else 2
    return min((3, _MOST_COLUMNS), key=lambda c: (-n % c, -c)) if n > 6 else 3


def _panels(
    n: int, height: float, legend_rows: int, most_columns: int
) -> tuple[Figure, list[Axes]]:
    columns = min(n, most_columns)
    rows = math.ceil(n / columns)
    room = _LEGEND_ROW * legend_rows + (_NOTE if legend_rows else 0)
    layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03)
    figure = Figure(figsize=(_width(columns), height * rows + room), layout=layout)
    made = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for panel in made[n:]:
        panel.set_visible(False)
    return figure, made[:n]


def _width(columns: int) -> float:
    return _COLUMN if columns == 1 else _PAGE


def _across(panels: Sequence[Axes], columns: int, label: str) -> None:
    """Below the panels that have none below them."""
    for i, panel in enumerate(panels):
        if i + columns >= len(panels):
            panel.set_xlabel(label)


def _scale(saes: pd.DataFrame, controls: pd.DataFrame) -> _Scale:
    axis = pareto._Axis("", None, pareto._spreads(saes["value"]))
    low, high = pareto._span(axis, saes, ["value", "low", "high"])
    places = axis.at(controls["value"])
    reach = _NEAR * (high - low)
    near = places[(places >= low - reach) & (places <= high + reach)]
    return _Scale(axis, float(min([low, *near])), float(max([high, *near])))


def _scale_up(panel: Axes, scale: _Scale, controls: pd.DataFrame) -> pd.DataFrame:
    """Scales the vertical axis and gives back the controls that have a place on it.

    Those that have none are told with their values in a row at the edge.
    """
    axis, below, above = scale.axis, scale.below(controls["value"]), scale.above(controls["value"])
    pad = pareto._PAD * (scale.high - scale.low)
    low, high = scale.low - pad, scale.high + pad
    whole = (high - low) / (1 - _STRIP * (int(below.any()) + int(above.any())))
    panel.set_yscale("log" if axis.log else "linear")
    panel.set_ylim(
        axis.back(low - _STRIP * whole * bool(below.any())),
        axis.back(high + _STRIP * whole * bool(above.any())),
    )
    pareto._set_ticks(panel, "y", _ticks(axis, low, high))
    for outside, arrow, y, side in ((below, "↓", 0.01, "bottom"), (above, "↑", 0.99, "top")):
        if outside.any():
            style: dict[str, Any] = {"color": _GREY, "fontsize": 5.5, "ha": "center", "va": side}
            told = f"{_outside(controls[outside])} {arrow}"
            # A long one reaches out of the panel rather than make all panels narrower.
            panel.text(0.5, y, told, transform=panel.transAxes, in_layout=False, **style)
    return controls[~below & ~above]


def _outside(controls: pd.DataFrame) -> str:
    """Names with values: of degraded oracles, and of what there are several of, the smallest and the largest."""
    names = controls["label"].where(controls["label"].isin(list(_CONTROLS)), "degraded")
    found = []
    for name in names.unique():
        values = controls.loc[names == name, "value"]
        ends = dict.fromkeys(f"{end:.3g}" for end in (values.min(), values.max()))
        found.append(f"{name} {' to '.join(ends)}".replace("-", "\N{MINUS SIGN}"))
    return ", ".join(found)


def _ticks(axis: Any, low: float, high: float) -> list[float]:
    """Round numbers; of a logarithmic axis the densest of some kinds that is not too dense."""
    if axis.log:
        decades = range(math.floor(low), math.ceil(high) + 1)
        for steps in ((1, 2, 5), (1, 3), (1,)):
            found = [m * 10.0**d for d in decades for m in steps]
            found = [tick for tick in found if low <= math.log10(tick) <= high]
            if 2 <= len(found) <= _MOST_TICKS:
                return found
        if len(found) > _MOST_TICKS:  # so many powers of ten that some have to do
            return found[:: math.ceil(len(found) / _MOST_TICKS)]
        low, high = axis.back(low), axis.back(high)
    found = []
    for n in range(_MOST_TICKS, 2 * _MOST_TICKS):  # many are asked for where few are found
        candidates = MaxNLocator(n, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        found = [float(tick) for tick in candidates if low <= tick <= high]
        if len(found) >= 3:
            break
    return found


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "\N{MINUS SIGN}")  # no negative zero


# The legend


def _family_handles(looks: _Looks) -> list[Line2D]:
    return [
        Line2D([], [], label=label, **_line(style, looks.small))
        for label, style in looks.series.items()
    ]


def _control_handles(looks: _Looks, controls: pd.DataFrame) -> list[Line2D]:
    kinds = dict(zip(controls["label"], controls["kind"], strict=True))
    return [
        Line2D([], [], label=f"{name} ({kinds[name]})", **_dashed(dashes, looks.small))
        for name, dashes in looks.controls.items()
    ]


def _truth_handles(looks: _Looks, points: pd.DataFrame) -> list[Line2D]:
    handles = [
        Line2D([], [], label=label, **_shaded(style, 1.0, 1.0))
        for label, style in looks.series.items()
    ]
    if len(looks.l0s) > 1:
        dot = pareto._Series("#444444", "o", "none", "full")
        handles += [
            Line2D([], [], label=f"L0 {l0:g}", **_shaded(dot, _rank(l0, looks.l0s), looks.small))
            for l0 in looks.l0s
        ]
    whole = points.loc[points["kind"] != "trained", "label"] == "oracle"
    for label, there in (("oracle", whole.any()), ("oracle, degraded", (~whole).any())):
        if there:
            look = _star(looks.small, empty=label != "oracle")
            handles.append(Line2D([], [], label=label, **look))
    return handles


def _legend_columns(labels: Sequence[str], width: float) -> int:
    for columns in range(len(labels), 1, -1):
        parts = np.array_split(np.array(labels, dtype=object), columns)  # as matplotlib does it
        longest = [max(map(len, part)) for part in parts]
        if sum(_POINTS_PER_HANDLE + _POINTS_PER_LETTER * n for n in longest) <= 72 * width:
            return columns
    return 1


def _legend_rows(labels: Sequence[str], panel_columns: int) -> int:
    return math.ceil(len(labels) / _legend_columns(labels, _width(panel_columns)))


def _legend(figure: Figure, handles: Sequence[Line2D], note: str | None) -> None:
    labels = [str(handle.get_label()) for handle in handles]
    figure.legend(
        handles=list(handles),
        loc="outside lower center",
        ncols=_legend_columns(labels, figure.get_size_inches()[0]),
        frameon=False,
        handlelength=2.4,
        columnspacing=1.2,
        labelspacing=0.25,
        borderpad=0.5,
        title=note,
        title_fontsize=6.5,
    )
