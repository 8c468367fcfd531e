"""Pictures of results: one look for all of them, readable by everyone, written as PNG.

Colours are Okabe and Ito's, which colour-blind readers tell apart; each also has its own marker. Needs matplotlib,
which is imported when a picture is drawn.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.merge.errors import DependencyError, OutputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""One per series, in this order."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""One per series, in this order."""

INK = "#333333"
QUIET = "#8C8C8C"
BAR = "#E3E6EA"
GRID = "#ECECEC"

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.dpi": 150,
}


@contextlib.contextmanager
def house_style() -> Iterator[type[Figure]]:
    """Give matplotlib's `Figure` class, in our style, without a window or any state that stays.

    Raises:
        DependencyError: matplotlib is missing.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise DependencyError(
            'pictures are drawn by matplotlib, which is missing; install it with pip install "graftwork[demo]"'
        ) from None
    with mpl.rc_context(_STYLE):
        yield Figure


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG beside its place, then rename it there; return the path.

    Raises:
        OutputError: It cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without the version of the program that drew it, equal pictures are equal files.
        figure.savefig(partial, format="png", metadata={"Software": None})
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OutputError(f'cannot write picture "{path}": {error.strerror or error}') from None
    return path


def bar_picture(
    rows: Mapping[str, Mapping[str, float]],
    path: Path,
    *,
    title: str,
    subtitle: str = "",
    groups: Mapping[str, str] | None = None,
) -> Path:
    """Draw one row per checkpoint: a dot per task, a bar and a figure for their mean; return the path.

    Args:
        rows: checkpoint → task → a share in [0, 1], drawn from top to bottom in this order. A task may be missing.
        path: Where the PNG goes.
        title: What the picture shows.
        subtitle: On what, in smaller letters.
        groups: The heading of each checkpoint's group; rows of one group have to be neighbours.
    """
    tasks = list(dict.fromkeys(task for values in rows.values() for task in values))
    if not rows or not tasks:
        raise ValueError("a picture needs at least one row with a value")
    places, headings, bottom = _places(list(rows), groups)
    with house_style() as new_figure:
        head = heading_inches(subtitle, rows=math.ceil(len(tasks) / 4) if len(tasks) > 1 else 0)
        figure = new_figure(figsize=(7.6, 0.25 * bottom + 0.6 + head), layout="constrained")
        axes = figure.add_subplot()
        for name, values in rows.items():
            mean = math.fsum(values.values()) / len(values) if values else math.nan
            axes.barh(places[name], mean, height=0.72, color=BAR, zorder=1)
            text = f"{100 * mean:.1f}" if math.isfinite(mean) else "–"
            axes.text(1.025, places[name], text, va="center", ha="left", transform=axes.get_yaxis_transform())
        for number, task in enumerate(tasks):
            # Equal values would hide each other: each task has its own height within a row.
            shift = 0.13 * (number - (len(tasks) - 1) / 2) if len(tasks) < 5 else 0
            held = [name for name, values in rows.items() if math.isfinite(values.get(task, math.nan))]
            axes.plot(
                [rows[name][task] for name in held],
                [places[name] + shift for name in held],
                linestyle="none",
                label=task,
                zorder=3,
                clip_on=False,
                **marker(number),
            )
        for heading, place in headings.items():
            axes.text(
                -0.012, place, heading, va="center", ha="right", transform=axes.get_yaxis_transform(), color=QUIET
            )
        axes.set_yticks(list(places.values()), list(places))
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(bottom - 0.4, -0.6)
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1], ["0", "20", "40", "60", "80", "100 %"])
        axes.grid(axis="x", color=GRID, zorder=0)
        axes.spines["left"].set_visible(False)
        if len(tasks) > 1:
            axes.text(1.025, -0.6, "mean", va="bottom", ha="left", color=QUIET, transform=axes.get_yaxis_transform())
        place_heading(figure, head, title, subtitle, axes.get_legend_handles_labels(), columns=4)
        return save(figure, path)


def depth_picture(
    changes: Mapping[str, float], path: Path, *, title: str, subtitle: str = "", label: str = "relative change"
) -> Path:
    """Draw how much each tensor changed against the depth of its layer, one line per kind of tensor; return the path.

    A layer's number is the first one in the tensor's name (`layers.3.up.weight` is a `up.weight` at depth 3). Tensors
    without one stand on the left. The six kinds that changed most have a colour, others are grey.

    Args:
        changes: Tensor → relative change, zero or more.
        path: Where the PNG goes.
        title: What the picture shows.
        subtitle: Of what, in smaller letters.
        label: What is measured, for the vertical axis.
    """
    inside, outside = _by_kind({name: change for name, change in changes.items() if math.isfinite(change)})
    positive = [change for change in changes.values() if math.isfinite(change) and change > 0]
    is_logarithmic = bool(positive) and max(positive) > 100 * min(positive)
    kinds = sorted(inside, key=lambda kind: (-max(inside[kind].values()), kind))
    depths = sorted({depth for points in inside.values() for depth in points})
    with house_style() as new_figure:
        figure = new_figure(figsize=(7.6, 4.8), layout="constrained")
        axes = figure.add_subplot()
        if is_logarithmic:
            axes.set_yscale("log")
        first = depths[0] if depths else 0
        # Where only a few layers are compared, the tensors outside stand nearer to them.
        left = first - max(1.0, 0.1 * (len(depths) - 1))
        for change in outside.values():
            if change > 0 or not is_logarithmic:
                axes.plot([left], [change], marker="_", markersize=13, markeredgewidth=2, color=INK, linestyle="none")
        _name_outside(axes, outside, left, is_logarithmic)
        for number, kind in reversed(list(enumerate(kinds))):
            points = sorted(inside[kind].items())
            shown = [(depth, change) for depth, change in points if change > 0 or not is_logarithmic]
            look = marker(number) if number < len(COLOURS) - 1 else {"marker": ".", "color": "#BBBBBB"}
            name = kind if number < len(COLOURS) - 1 else "other" if number == len(kinds) - 1 else "_nolegend_"
            axes.plot(
                [depth for depth, _ in shown],
                [change for _, change in shown],
                label=name,
                linewidth=1.4,
                zorder=3 if number < len(COLOURS) - 1 else 2,
                **look,
            )
        axes.yaxis.set_major_formatter(lambda change, _: f"{100 * change:g} %")
        axes.set_ylabel(label)
        axes.set_xlabel("layer")
        ticks = depths if len(depths) <= 16 else depths[:: math.ceil(len(depths) / 12)]
        axes.set_xticks([*([left] if outside else []), *ticks], [*(["none"] if outside else []), *map(str, ticks)])
        if not is_logarithmic:
            axes.set_ylim(bottom=0)
        axes.grid(axis="y", color=GRID, zorder=0)
        handles, labels = axes.get_legend_handles_labels()
        hidden = sum(change == 0 for change in changes.values()) if is_logarithmic else 0
        if hidden:
            subtitle += f"{'; ' if subtitle else ''}{hidden} unchanged tensor{'s' * (hidden > 1)} not shown"
        columns = 3 if max(map(len, labels), default=0) > 16 else 4
        head = heading_inches(subtitle, rows=math.ceil(len(labels) / columns))
        place_heading(figure, head, title, subtitle, (handles[::-1], labels[::-1]), columns=columns)
        return save(figure, path)


@dataclass(frozen=True, slots=True)
class Line:
    """One series of a panel.

    Args:
        label: Its name in the legend; lines of one label have one colour in all panels.
        points: (x, y), from left to right.
        single: Further points of the same series that stand for themselves, such as single runs behind their mean.
    """

    label: str
    points: Sequence[tuple[float, float]]
    single: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes.

    Args:
        lines: What is drawn.
        across: What x is.
        up: What y is.
        ticks: x → text; by default matplotlib's.
        is_share: Whether y is a share, to be written as percent.
        logarithmic: `x`, `y`, `xy` or nothing.
        at_zero: Whether y starts at zero.
    """

    lines: Sequence[Line]
    across: str
    up: str
    ticks: Mapping[float, str] = field(default_factory=dict)
    is_share: bool = False
    logarithmic: str = ""
    at_zero: bool = False


def line_picture(panels: Sequence[Panel], path: Path, *, title: str, subtitle: str = "") -> Path:
    """Draw panels of lines side by side under one legend; return the path. Values that are not finite are left out."""
    labels = list(dict.fromkeys(line.label for panel in panels for line in panel.lines))
    if not labels:
        raise ValueError("a picture needs at least one line")
    columns = 3 if max(map(len, labels)) > 16 else 4
    with house_style() as new_figure:
        head = heading_inches(subtitle, rows=math.ceil(len(labels) / columns) if len(labels) > 1 else 0)
        width = 6.2 if len(panels) == 1 else 4.4 * len(panels)
        figure = new_figure(figsize=(width, 3.1 + head), layout="constrained")
        handles: dict[str, Any] = {}
        grid = figure.subplots(1, len(panels), squeeze=False)
        for axes, panel in zip(grid[0], panels, strict=True):
            for line in panel.lines:
                handles.setdefault(line.label, _draw_line(axes, line, labels.index(line.label)))
            _finish_panel(axes, panel)
        place_heading(figure, head, title, subtitle, ([handles[label] for label in labels], labels), columns=columns)
        return save(figure, path)


def _draw_line(axes: Axes, line: Line, number: int) -> Any:
    look = marker(number)
    single = [(x, y) for x, y in line.single if math.isfinite(y)]
    if single:
        axes.plot(
            [x for x, _ in single], [y for _, y in single], linestyle="none", marker=look["marker"], markersize=3.5,
            color=look["color"], alpha=0.35, markeredgewidth=0, clip_on=False, zorder=2,
        )  # fmt: skip
    points = [(x, y if math.isfinite(y) else math.nan) for x, y in line.points]
    # On a curve of many points the markers only tell it from others, each at its own places.
    every = max(1, math.ceil(len(points) / 6))
    (drawn,) = axes.plot(
        [x for x, _ in points], [y for _, y in points], linewidth=1.6, clip_on=False, zorder=3,
        markevery=(number % every, every), **look,
    )  # fmt: skip
    return drawn


def _finish_panel(axes: Axes, panel: Panel) -> None:
    if "x" in panel.logarithmic:
        axes.set_xscale("log", base=2)
    if "y" in panel.logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if panel.ticks:
        axes.set_xticks(list(panel.ticks), list(panel.ticks.values()))
        axes.minorticks_off()
    if panel.at_zero and "y" not in panel.logarithmic:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]) if axes.dataLim.y0 < 0 else 0.0)
    if panel.is_share:
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    axes.set_xlabel(panel.across)
    axes.set_ylabel(panel.up)
    axes.grid(axis="y", color=GRID, zorder=0)


# ---------------------------------------------------------------------------------------------------------------------


def marker(number: int) -> dict[str, Any]:
    """Return colour and marker of a series."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        # Another marker where colours begin again, so that no two of many series look the same.
        "marker": MARKERS[(number + number // len(COLOURS)) % len(MARKERS)],
        "markersize": 6,
        "markeredgecolor": "white",
        "markeredgewidth": 0.7,
    }


def _places(names: Sequence[str], groups: Mapping[str, str] | None) -> tuple[dict[str, float], dict[str, float], float]:
    """Return the height of each row and of each group's heading, and the height below the last."""
    places: dict[str, float] = {}
    headings: dict[str, float] = {}
    place = 0.0
    for name in names:
        heading = (groups or {}).get(name)
        if heading is not None and heading not in headings:
            place += 0.35 if headings else 0
            headings[heading] = place
            place += 1
        places[name] = place
        place += 1
    return places, headings, place


def heading_inches(subtitle: str, rows: int) -> float:
    """Return the height of title, subtitle and a legend of so many rows."""
    return 0.5 + (0.2 if subtitle else 0) + 0.21 * rows


def place_heading(
    figure: Figure, inches: float, title: str, subtitle: str, legend: tuple[list[Any], list[str]], *, columns: int
) -> None:
    """Put title, subtitle and legend above the picture, flush left."""
    height = figure.get_figheight()
    figure.text(0.012, 1 - 0.1 / height, title, va="top", fontsize=12.5, fontweight="bold")
    if subtitle:
        figure.text(0.012, 1 - 0.37 / height, subtitle, va="top", color=QUIET)
    handles, labels = legend
    if len(labels) > 1:
        figure.legend(
            handles,
            labels,
            loc="upper left",
            bbox_to_anchor=(0.004, 1 - (0.56 if subtitle else 0.36) / height),
            ncols=columns,
            handletextpad=0.4,
            columnspacing=1.6,
            borderaxespad=0,
        )
    engine: Any = figure.get_layout_engine()
    engine.set(rect=(0, 0, 1, 1 - inches / height))


def _by_kind(changes: Mapping[str, float]) -> tuple[dict[str, dict[int, float]], dict[str, float]]:
    """Return kind → layer → change, and the tensors that are in no layer."""
    inside: dict[str, dict[int, float]] = {}
    outside: dict[str, float] = {}
    for name, change in changes.items():
        match = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
        if match is None:
            outside[name] = change
        else:
            inside.setdefault(match[2], {})[int(match[1])] = change
    return inside, outside


def _name_outside(axes: Axes, outside: Mapping[str, float], left: float, is_logarithmic: bool) -> None:
    """Write the names of the tensors outside of layers beside their dots; of two that nearly touch, the larger's."""
    values = [change for change in outside.values() if change > 0 or not is_logarithmic]
    if not values:
        return
    scale = math.log if is_logarithmic else float
    reach = abs(scale(max(values)) - scale(min(values))) or 1.0
    last = math.inf
    for name, change in sorted(outside.items(), key=lambda item: -item[1]):
        if (change > 0 or not is_logarithmic) and last - scale(change) >= 0.06 * reach:
            axes.annotate(
                name,
                (left, change),
                xytext=(9, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
                color=QUIET,
                in_layout=False,
            )
            last = scale(change)
