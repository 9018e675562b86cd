"""What fidelity costs: one metric against another, one line per variant through its frontier.

A frontier holds the SAEs of a variant that no other SAE of it beats on both metrics; those that are
beaten are drawn faint. Bars are 95 % intervals; several seeds of one recipe are one point at their
mean, whose bars reach over the intervals of all of them. Controls and references are grey: a dotted
line where one has no sparsity to choose, a marker where it was asked for one. What lies far outside
the range of the SAEs stands with its value in a strip at the edge, instead of squashing the plot.
Each site is a panel; where one would have too many lines, each site and width is.
"""

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, final

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator
from matplotlib.transforms import blended_transform_factory

from saebench import stats
from saebench.errors import NothingToShow, UserError
from saebench.progress import printable
from saebench.reports import _table
from saebench.results import Results, write_bytes_whole

_COLUMN, _PAGE = 3.4, 6.9  # inches: one column of a two-column paper, and both
_PANEL_HEIGHT = 2.4
_LEGEND_ROW = 0.16
_POINTS_PER_LETTER, _POINTS_PER_HANDLE = 4.0, 36
_MOST_LEGEND_COLUMNS = 5
_LOG_ABOVE = 20.0  # spread of a positive metric from which on its axis is logarithmic
_NEAR = 0.6  # a control this share of the SAEs' range beyond it still gets a place on the axis
_PAD = 0.06  # free space at the ends of an axis, as a share of it
_STANDARDS = ("control", "reference")  # kinds that SAEs are read against
_LINES = ("trained", "imported")  # kinds of which a variant is one line
_IMPORTED = "imported: scored by another tool, without intervals"
_TINY = 0.02  # a horizontal interval below this share of the axis is hidden by its marker anyway
_MOST_TICKS = 7
_MOST_VALUES = 6  # printed in one row of the strip
_MOST_NAMED_CHECKPOINTS = 6  # above this the legend names their formats only
_MOST_SERIES = 12  # in one panel; above this each width gets panels of its own
_MOST_COLUMNS = 3
_STRIP = 0.075  # height of one row of the strip at the edge, as a share of the axes

# Okabe and Ito's colours without yellow, which is too light for lines. Cycles of 7, 10 and 4, so
# that no two of many variants share all three.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
_MARKERS = ("o", "s", "^", "D", "v", "*", "h", "<", ">", "p")
_SIZES = {
    "*": 8.0,
    "^": 5.2,
    "v": 5.2,
    "<": 5.2,
    ">": 5.2,
    "h": 5.2,
    "p": 5.2,
}  # as large to the eye
_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.3)), (0, (1.2, 1.2)), (0, (5, 1.3, 1.2, 1.3)))
_CONTROL_MARKERS = ("x", "+", "1", "2", "3", "4")
_FILLS: tuple[Literal["full", "none", "left"], ...] = ("full", "none", "left")
_GREY = "#6E6E6E"

_STYLE: Any = {
    "font.size": 7.5,
    "font.family": "DejaVu Sans",
    "axes.labelsize": 7.5,
    "axes.titlesize": 7.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 7,
    "lines.linewidth": 1.1,
    "pdf.fonttype": 42,
    "svg.fonttype": "path",
    "svg.hashsalt": "saebench",
    "savefig.dpi": 300,
    "axes.unicode_minus": True,
}
# No date, no version: the same results give the same bytes.
_METADATA: dict[str, dict[str, None]] = {
    "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
    "svg": {"Date": None, "Creator": None},
    "png": {"Software": None},
}


_Best = Literal["min", "max"] | None


class _Axis(NamedTuple):
    label: str
    best: _Best
    log: bool

    def at(self, values: Any) -> Any:
        """Where values lie along the axis; below everything where a logarithm has no place."""
        if not self.log:
            return np.asarray(values, dtype=np.float64)
        values = np.asarray(values, dtype=np.float64)
        return np.log10(values, out=np.full_like(values, -np.inf), where=values > 0)

    def back(self, place: float) -> float:
        return float(10.0**place) if self.log else place


class _Point(NamedTuple):
    label: str
    x: float
    x_low: float
    x_high: float
    y: float
    y_low: float
    y_high: float


class _Series(NamedTuple):
    colour: str
    marker: str
    dashes: Any
    fill: Literal["full", "none", "left"]


class _Place(NamedTuple):
    """What one panel shows."""

    site: str
    width: int | None
    """None where it shows all widths."""

    def of(self, points: pd.DataFrame) -> pd.DataFrame:
        here = points["site"] == self.site
        if self.width is not None:  # what has no width is shown at each
            here &= (points["width"] == self.width) | points["width"].isna()
        return points[here.fillna(False).astype(bool)]

    def __str__(self) -> str:
        return self.site if self.width is None else f"{self.site},\nwidth {self.width:,}"


class _Plot(NamedTuple):
    points: pd.DataFrame
    """One row per SAE: what it is, its label in the legend, x, x_low, x_high, y, y_low, y_high."""
    x: _Axis
    y: _Axis
    series: dict[str, _Series]
    controls: dict[str, str]
    """Marker by label, of the controls that have a place along the x axis."""
    places: list[_Place]
    """A panel each."""
    note: str | None
    """Above the legend; None where there is nothing to say."""


@final
@dataclass(frozen=True)
class Pareto:
    x: str = "l0"
    y: str = "explained_variance"
    formats: tuple[str, ...] = ("pdf", "svg", "png")

    makes: ClassVar[tuple[str, ...]] = ("pdf", "svg", "png")

    @property
    def needs(self) -> tuple[str, ...]:
        """Metrics without which it cannot be made."""
        return (self.x, self.y)

    def __post_init__(self) -> None:
        unknown = [name for name in self.formats if name not in self.makes]
        if unknown:
            raise UserError(
                f"pareto: no format {unknown[0]!r}; expected some of {', '.join(self.makes)}."
            )

    def __call__(self, results: Results, folder: Path) -> list[Path]:
        paths = self.files(folder)
        figure = self.draw(results)
        for path in paths:
            self.save(figure, path)
        return paths

    def files(self, folder: Path) -> list[Path]:
        """What a call writes."""
        name = re.sub(r"[^A-Za-z0-9]+", "_", f"pareto_{self.x}_{self.y}").strip("_")
        return [folder / f"{name}.{ending}" for ending in self.formats]

    def draw(self, results: Results) -> Figure:
        plot = _plot(results, self.x, self.y)
        places = plot.places
        n_columns = _columns(places)
        n_rows = math.ceil(len(places) / n_columns)
        width = _COLUMN if n_columns == 1 else _PAGE
        legend_columns, legend_rows = _legend_shape(plot, width)
        height = _PANEL_HEIGHT * n_rows + _LEGEND_ROW * (legend_rows + bool(plot.note)) + 0.15
        with _styled():
            layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02)
            figure = Figure(figsize=(width, height), layout=layout)
            panels = list(figure.subplots(n_rows, n_columns, squeeze=False).ravel())
            for i, (panel, place) in enumerate(zip(panels, places, strict=False)):
                _panel(panel, plot, place.of(plot.points))
                if len(places) > 1:
                    panel.set_title(str(place))
                # The label is about two panels wide where there are three.
                if i + n_columns >= len(places) and (n_columns < 3 or i % 3 == 1):
                    panel.set_xlabel(plot.x.label)
                if i % n_columns == 0:
                    panel.set_ylabel(plot.y.label)
            for panel in panels[len(places) :]:
                panel.set_visible(False)
            _legend(figure, plot, legend_columns)
        return figure

    def save(self, figure: Figure, path: Path) -> bool:
        """Whether the file changed. The ending of `path` is the format."""
        ending = path.suffix.lstrip(".").lower()
        if ending not in self.makes:
            raise UserError(
                f"{path}: no format {ending!r}; name a file that ends with one of "
                f"{', '.join(f'.{name}' for name in self.makes)}."
            )
        data = io.BytesIO()
        with _styled():
            figure.savefig(data, format=ending, metadata=_METADATA[ending])
        return write_bytes_whole(path, data.getvalue())


@contextmanager
def _styled() -> Iterator[None]:
    with mpl.rc_context():
        # A user's own matplotlibrc must not change what a suite's plots look like.
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


# What is drawn


def _plot(results: Results, x: str, y: str) -> _Plot:
    scores = _table.newest(results.scores)
    across, up = (_table.of_key(scores, _table.one_key(scores, name)) for name in (x, y))
    points = _seeds_together(_points(across, up))
    places = _places(points)
    if places[0].width is not None:
        points["label"] = _labels(points, with_width=False)
    is_sae = ~points["kind"].isin(_STANDARDS)
    if not is_sae.any():
        raise NothingToShow(
            f"{results.folder}: no SAE has both {x!r} and {y!r}, so there is nothing to plot. "
            "Finish the run, or name metrics that the suite's evals measure."
        )
    saes = points[is_sae]
    controls = points[~is_sae & points["target_l0"].notna()]
    return _Plot(
        points=points,
        x=_x_axis(x, across, saes["x"]),
        y=_y_axis(y, up, saes["y"]),
        series=_series(saes, by_width=places[0].width is None),
        controls={
            str(label): _CONTROL_MARKERS[i % len(_CONTROL_MARKERS)]
            for i, label in enumerate(dict.fromkeys(controls["label"]))
        },
        places=places,
        note=_IMPORTED if (saes["kind"] == "imported").any() else None,
    )


def _columns(places: Sequence[_Place]) -> int:
    """A row for each site, where all have the same few widths."""
    widths = {
        site: [p.width for p in places if p.site == site] for site in {p.site for p in places}
    }
    first = widths[places[0].site]
    if all(found == first for found in widths.values()) and 1 < len(first) <= _MOST_COLUMNS:
        return len(first)
    return min(len(places), 2)


def _places(points: pd.DataFrame) -> list[_Place]:
    """In order: one for each site, or for each site and width where that has too many lines."""
    sites = sorted(set(points["site"]), key=_table.natural)
    lines = points[points["kind"].isin(_LINES)]
    widths = sorted(set(lines["width"].dropna()))
    if len(widths) < 2 or lines.groupby("site")["label"].nunique().max() <= _MOST_SERIES:
        return [_Place(site, None) for site in sites]
    found = lines[["site", "width"]].drop_duplicates()
    pairs = set(zip(found["site"], found["width"], strict=True))
    return [_Place(site, int(w)) for site in sites for w in widths if (site, w) in pairs]


def _points(across: pd.DataFrame, up: pd.DataFrame) -> pd.DataFrame:
    both = across.index[across.index.isin(up.index)]
    points = across.loc[both, ["kind", "variant", "width", "target_l0", "site", "seed"]].copy()
    for axis, rows in (("x", across), ("y", up)):
        value = rows.loc[both, "value"]
        points[axis] = value
        # Without an interval the bar has no length.
        points[f"{axis}_low"] = rows.loc[both, "ci_low"].fillna(value)
        points[f"{axis}_high"] = rows.loc[both, "ci_high"].fillna(value)
    several = points.loc[points["kind"].isin(_LINES), "width"].dropna().nunique() > 1
    points["label"] = _labels(points, with_width=several)
    return _first_of_its_kind(points)


def _first_of_its_kind(points: pd.DataFrame) -> pd.DataFrame:
    """Of references of one name that have no sparsity of their own, the first: the others are spoilt copies of it."""
    alike = points[(points["kind"] == "reference") & points["target_l0"].isna()]
    again = alike.duplicated(["variant", "width", "site"])
    return points.drop(index=alike.index[again])


def _seeds_together(points: pd.DataFrame) -> pd.DataFrame:
    """One row for each recipe, named by its first seed."""
    trained = points["kind"] == "trained"
    recipe = ["label", "width", "target_l0", "site"]
    if not points[trained].duplicated(recipe).any():
        return points
    sums = {
        "x": "mean",
        "y": "mean",
        "x_low": "min",
        "y_low": "min",
        "x_high": "max",
        "y_high": "max",
    }
    met = points[trained].groupby(recipe, sort=False, dropna=False)[list(sums)].agg(sums)
    first = points[trained].drop_duplicates(recipe).copy()
    first[list(sums)] = met.to_numpy()
    return pd.concat([first, points[~trained]])


def _labels(points: pd.DataFrame, with_width: bool) -> list[str]:
    """What is one line, or one kind of mark, has one label."""
    by_name = (points["kind"] == "checkpoint").sum() <= _MOST_NAMED_CHECKPOINTS
    widths = ["" if pd.isna(w) else f", width {int(w):,}" for w in points["width"]]
    labels = []
    for row, wide in zip(points.itertuples(), widths, strict=True):
        kind = str(row.kind)
        if kind in _STANDARDS:
            labels.append(f"{row.variant} ({kind})")
        elif kind == "checkpoint":
            name = str(row.Index if by_name else row.variant)
            labels.append(f"{name} (checkpoint)")
        elif with_width:
            labels.append(f"{row.variant}{wide}")
        else:
            labels.append(str(row.variant))
    return [printable(label) for label in labels]


def _listed(points: pd.DataFrame) -> list[_Point]:
    columns = [points[name].tolist() for name in _Point._fields]
    return [_Point(*values) for values in zip(*columns, strict=True)]


def _series(saes: pd.DataFrame, by_width: bool) -> dict[str, _Series]:
    """Colour, marker and dashes say which variant, the fill of the marker which width if `by_width`."""
    # In the order of the suite, checkpoints after what the suite trained.
    ordered = saes.sort_values("kind", key=lambda kind: ~kind.isin(_LINES), kind="stable")
    looks = [r.variant if r.kind in _LINES else r.label for r in ordered.itertuples()]
    variants = list(dict.fromkeys(looks))
    widths = sorted(set(saes.loc[saes["kind"].isin(_LINES), "width"].dropna())) if by_width else []
    series = {}
    for row, look in zip(ordered.itertuples(), looks, strict=True):
        i = variants.index(look)
        place = widths.index(row.width) if row.kind in _LINES and row.width in widths else 0
        series[str(row.label)] = _Series(
            _COLOURS[i % len(_COLOURS)],
            _MARKERS[i % len(_MARKERS)],
            # Checkpoints come from anywhere: nothing says that they lie on one line.
            _DASHES[i % len(_DASHES)] if row.kind in _LINES else "none",
            _FILLS[place % len(_FILLS)],
        )
    return series


def _x_axis(name: str, rows: pd.DataFrame, values: "pd.Series[float]") -> _Axis:
    if name == "l0":
        # Sparser is better for its own sake here, though no metric to be ranked by.
        return _Axis("L0, active latents per token (← sparser)", "min", bool((values > 0).any()))
    best = _direction(rows)
    hint = {"min": " (← better)", "max": " (better →)", None: ""}[best]
    return _Axis(_table.words(name) + hint, best, _spreads(values))


def _y_axis(name: str, rows: pd.DataFrame, values: "pd.Series[float]") -> _Axis:
    best = _direction(rows)
    # Turned with the label, these arrows point down and up.
    hint = {"min": " (← better)", "max": " (better →)", None: ""}[best]
    return _Axis(_table.words(name) + hint, best, _spreads(values))


def _direction(rows: pd.DataFrame) -> _Best:
    best = rows["best"].iloc[0]
    return best if best in ("min", "max") else None


def _spreads(values: "pd.Series[float]") -> bool:
    return bool(values.min() > 0 and values.max() > _LOG_ABOVE * values.min())


# One panel


def _panel(panel: Axes, plot: _Plot, here: pd.DataFrame) -> None:
    shown = here[np.isfinite(plot.x.at(here["x"]))]
    saes = shown[~shown["kind"].isin(_STANDARDS)]
    controls = here[here["kind"].isin(_STANDARDS)]
    low, high = _span(plot.y, saes, ["y", "y_low", "y_high"])
    reach = _NEAR * (high - low)
    places = plot.y.at(controls["y"])
    below, above = places < low - reach, places > high + reach
    near = controls[~below & ~above]
    if len(near):
        low = min(low, float(plot.y.at(near["y"]).min()))
        high = max(high, float(plot.y.at(near["y"]).max()))
    _scale_x(panel, plot.x, _span(plot.x, saes, ["x", "x_low", "x_high"]))
    rows_below = list(dict.fromkeys(controls.loc[below, "label"]))
    rows_above = list(dict.fromkeys(controls.loc[above, "label"]))
    _scale_y(panel, plot.y, low, high, (len(rows_below), len(rows_above)))
    for label, style in plot.series.items():
        _draw_series(panel, plot, saes[saes["label"] == label], style)
    _draw_controls(panel, plot, near)
    for i, label in enumerate(reversed(rows_below)):
        _draw_strip(panel, plot, controls[below & (controls["label"] == label)], i, "↓")
    for i, label in enumerate(rows_above):
        _draw_strip(panel, plot, controls[above & (controls["label"] == label)], i, "↑")
    left_out = ~here.index.isin(shown.index) & ~here["kind"].isin(_STANDARDS)
    _draw_left_out(panel, here[left_out])


def _span(axis: _Axis, rows: pd.DataFrame, columns: list[str]) -> tuple[float, float]:
    """Along the axis, never empty."""
    places = axis.at(rows[columns].to_numpy())
    places = places[np.isfinite(places)]
    if len(places) == 0:
        return 0.0, 1.0
    low, high = float(places.min()), float(places.max())
    least = 0.1 if axis.log else 1e-3 * max(abs(low), abs(high), 1e-9)
    if high - low < least:
        low, high = low - least, high + least
    return low, high


def _scale_x(panel: Axes, axis: _Axis, span: tuple[float, float]) -> None:
    pad = _PAD * (span[1] - span[0])
    low, high = span[0] - pad, span[1] + pad
    panel.set_xscale("log" if axis.log else "linear")
    panel.set_xlim(axis.back(low), axis.back(high))
    _set_ticks(panel, "x", _ticks(axis, low, high))


def _scale_y(panel: Axes, axis: _Axis, low: float, high: float, strips: tuple[int, int]) -> None:
    """Leaves room for rows of off-scale controls below and above what is on the scale."""
    pad = _PAD * (high - low)
    low, high = low - pad, high + pad
    whole = (high - low) / (1 - _STRIP * sum(strips))
    panel.set_yscale("log" if axis.log else "linear")
    panel.set_ylim(
        axis.back(low - _STRIP * strips[0] * whole), axis.back(high + _STRIP * strips[1] * whole)
    )
    _set_ticks(panel, "y", _ticks(axis, low, high))
    for n_rows, edge in ((strips[0], _STRIP * strips[0]), (strips[1], 1 - _STRIP * strips[1])):
        if n_rows:
            style: dict[str, Any] = {"color": "#BBBBBB", "linewidth": 0.5}
            panel.plot([0, 1], [edge, edge], transform=panel.transAxes, **style)


def _ticks(axis: _Axis, low: float, high: float) -> list[float]:
    if not axis.log:
        return _round_numbers(low, high)
    exponents = range(math.floor(low / math.log10(2)), math.ceil(high / math.log10(2)) + 1)
    doubled = [2.0**e for e in exponents if low <= e * math.log10(2) <= high]
    if len(doubled) > _MOST_TICKS:
        decades = range(math.floor(low), math.ceil(high) + 1)
        candidates = [m * 10.0**d for d in decades for m in (1, 3)]
        return [t for t in candidates if low <= math.log10(t) <= high]
    if len(doubled) >= 2 and min(doubled) >= 1:
        return doubled
    return _round_numbers(10.0**low, 10.0**high)


def _round_numbers(low: float, high: float) -> list[float]:
    ticks = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(t) for t in ticks if low <= t <= high]


def _set_ticks(panel: Axes, which: Literal["x", "y"], ticks: list[float]) -> None:
    # As many decimals as the ticks have: a rounded tick label would lie.
    exact = (d for d in range(6) if all(math.isclose(round(t, d), t, abs_tol=1e-12) for t in ticks))
    decimals = next(exact, None)
    spread = len(ticks) > 1 and ticks[-1] > _LOG_ABOVE * ticks[0] > 0
    as_is = decimals is None or spread
    labels = [f"{t:,.8g}" if as_is else f"{t:,.{decimals}f}" for t in ticks]
    axis = panel.xaxis if which == "x" else panel.yaxis
    axis.set_ticks(ticks, [label.replace("-", "\N{MINUS SIGN}") for label in labels])
    axis.set_minor_locator(NullLocator())


def _draw_series(panel: Axes, plot: _Plot, rows: pd.DataFrame, style: _Series) -> None:
    if rows.empty:
        return
    best = _frontier(plot, rows)
    line = rows.iloc[best]
    panel.plot(line["x"], line["y"], color=style.colour, linestyle=style.dashes, zorder=2)
    low, high = plot.x.at(panel.get_xlim())
    for i, row in enumerate(_listed(rows)):
        alpha = 1.0 if i in best else 0.3
        wide = plot.x.at(row.x_high) - plot.x.at(row.x_low) > _TINY * (high - low)
        panel.errorbar(
            [row.x],
            [row.y],
            yerr=_arms(row.y, row.y_low, row.y_high),
            xerr=_arms(row.x, row.x_low, row.x_high) if wide else None,
            alpha=alpha,
            zorder=3,
            **_marked(style),
        )


def _frontier(plot: _Plot, rows: pd.DataFrame) -> list[int]:
    """Places in `rows`; all of them, along x, where a metric has no better direction."""
    if plot.x.best is None or plot.y.best is None:
        return [int(i) for i in np.argsort(rows["x"].to_numpy(), kind="stable")]
    x = rows["x"].to_numpy() * (1 if plot.x.best == "min" else -1)
    return [int(i) for i in stats.frontier(x, rows["y"].to_numpy(), plot.y.best)]


def _arms(value: float, low: float, high: float) -> list[list[float]]:
    return [[max(value - low, 0.0)], [max(high - value, 0.0)]]


def _marked(style: _Series) -> dict[str, Any]:
    return {
        "color": style.colour,
        "marker": style.marker,
        "markersize": _SIZES.get(style.marker, 4.4),
        "fillstyle": style.fill,
        # A white rim keeps markers apart that lie over one another.
        "markeredgecolor": "white" if style.fill == "full" else style.colour,
        "markeredgewidth": 0.4 if style.fill == "full" else 0.8,
        "markerfacecoloralt": "white",
        "linestyle": "none",
        "elinewidth": 0.7,
    }


def _draw_controls(panel: Axes, plot: _Plot, rows: pd.DataFrame) -> None:
    """Those that have a place on the scale."""
    across = blended_transform_factory(panel.transAxes, panel.transData)
    for row in _listed(rows):
        if row.label in plot.controls:
            panel.plot([row.x], [row.y], **_grey(plot.controls[row.label]))
            continue
        panel.axhline(row.y, color=_GREY, linewidth=0.8, linestyle=(0, (1, 1.5)), zorder=1)
        # On the left, where the SAEs are far from what they reach with more latents.
        name = row.label.removesuffix(" (control)")
        label: dict[str, Any] = {"color": _GREY, "fontsize": 6.5, "ha": "left"}
        down = plot.y.best == "min"
        panel.annotate(
            name,
            (0.01, row.y),
            xycoords=across,
            xytext=(0, 1.5 if down else -1.5),
            textcoords="offset points",
            va="bottom" if down else "top",
            **label,
        )


def _grey(marker: str) -> dict[str, Any]:
    return {
        "color": _GREY,
        "marker": marker,
        "linestyle": "none",
        "markersize": 4.5,
        "markeredgewidth": 0.9,
        "zorder": 1.5,
    }


def _draw_strip(panel: Axes, plot: _Plot, rows: pd.DataFrame, i: int, arrow: str) -> None:
    """One row of off-scale controls: each at its x, with its value."""
    height = (i + 0.5) * _STRIP if arrow == "↓" else 1 - (i + 0.5) * _STRIP
    at_x = blended_transform_factory(panel.transData, panel.transAxes)
    text: dict[str, Any] = {"color": _GREY, "fontsize": 6, "va": "center_baseline"}
    low, high = panel.get_xlim()
    inside = rows[(rows["x"] >= low) & (rows["x"] <= high)].sort_values("x")
    label = str(rows["label"].iloc[0])
    if label not in plot.controls or inside.empty:
        values = " to ".join(dict.fromkeys(map(_short, (rows["y"].min(), rows["y"].max()))))
        name = label.removesuffix(" (control)")
        panel.text(0.01, height, f"{name} {values}{arrow}", transform=panel.transAxes, **text)
        return
    for j, row in enumerate(_listed(inside)):
        panel.plot([row.x], [height], transform=at_x, **_grey(plot.controls[label]))
        if len(inside) > _MOST_VALUES and 0 < j < len(inside) - 1:
            continue
        # Into the panel at its right edge, so that nothing is cut off.
        left = plot.x.at(row.x) > (plot.x.at(low) + 2 * plot.x.at(high)) / 3
        panel.annotate(
            f"{_short(row.y)}{arrow}",
            (row.x, height),
            xycoords=at_x,
            xytext=(-4 if left else 4, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            **text,
        )


def _short(value: float) -> str:
    text = f"{value:.2f}" if 0.01 <= abs(value) < 1000 else f"{value:.2g}"
    return text.replace("-", "\N{MINUS SIGN}")


def _draw_left_out(panel: Axes, rows: pd.DataFrame) -> None:
    """An SAE without active latents has no place on a logarithmic axis."""
    if len(rows):
        names = ", ".join(map(str, rows.index))
        text = f"not shown (no active latents): {names}"
        panel.text(0.99, 0.99, text, transform=panel.transAxes, ha="right", va="top", fontsize=6)


# The legend


def _legend_shape(plot: _Plot, width: float) -> tuple[int, int]:
    """Columns and rows."""
    labels = [*plot.series, *plot.controls]
    for columns in range(min(len(labels), _MOST_LEGEND_COLUMNS), 1, -1):
        parts = np.array_split(np.array(labels, dtype=object), columns)  # as matplotlib does it
        longest = [max(map(len, part)) for part in parts]
        needed = sum(_POINTS_PER_HANDLE + _POINTS_PER_LETTER * n for n in longest)
        if needed <= 72 * width:
            return columns, math.ceil(len(labels) / columns)
    return 1, len(labels)


def _legend(figure: Figure, plot: _Plot, columns: int) -> None:
    handles = [_handle(plot, label, style) for label, style in plot.series.items()]
    handles += [Line2D([], [], label=label, **_grey(m)) for label, m in plot.controls.items()]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        handlelength=2.8,
        columnspacing=1.2,
        labelspacing=0.25,
        borderpad=0.6,
        title=plot.note,
        title_fontsize=6.5,
    )


def _handle(plot: _Plot, label: str, style: _Series) -> Line2D:
    look = {key: part for key, part in _marked(style).items() if key != "elinewidth"}
    here = plot.points[plot.points["label"] == label]
    if any(len(place.of(here)) > 1 for place in plot.places):
        look["linestyle"] = style.dashes
    return Line2D([], [], label=label, **look)
