"""Charts as values, and as plotly takes them; `drawings` draws them for readers without scripts. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moemerge.report.colours import DASHES, LINES
from moemerge.report.contents import Matrix

_MARKS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down")
_FEW = 12
"""Layers that are each named."""
_MOST_MARKS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """Values over a common axis, one line a name.

    Attributes:
        x: Rising.
        series: By name, a value for each of `x`.
        stands_out: Points by name of a line, for example what was chosen.
        is_log: Whether values are drawn by their logarithm; those that are zero are left out then.
        is_whole: Whether there is nothing between whole numbers of `x`.
    """

    name: str
    title: str
    x_title: str
    y_title: str
    x: Sequence[float]
    series: Mapping[str, Sequence[float | None]]
    stands_out: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    is_log: bool = False
    is_whole: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A value for each of rows and columns, as colour; NaN where there is none.

    Attributes:
        unit: What values are.
        notes: For each cell a number into `words`, said beside the value; empty for none.
        top: Value of the brightest colour.
        groups: Names of equal stretches of columns, with lines between.
    """

    name: str
    title: str
    x_title: str
    y_title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Matrix
    unit: str
    top: float
    notes: Sequence[Sequence[int]] = ()
    words: Sequence[str] = ()
    groups: Sequence[str] = ()


def lines_plotly(chart: Lines) -> dict[str, Any]:
    """The chart for plotly, in plain values."""
    traces: list[dict[str, Any]] = []
    for number, (name, line) in enumerate(chart.series.items()):
        colour = LINES[number % len(LINES)]
        style = {"color": colour, "dash": DASHES[number % len(DASHES)][0], "width": 2}
        mode = "lines+markers" if len(chart.x) <= _MOST_MARKS else "lines"
        marker = {"symbol": _MARKS[number % len(_MARKS)], "size": 6, "color": colour}
        shown = [short(v) if is_shown(v, chart) else None for v in line]
        x = [short(value) for value in chart.x]
        traces.append({"x": x, "y": shown, "name": name, "mode": mode, "line": style, "marker": marker})
    for number, name in enumerate(chart.series):
        if name in chart.stands_out:
            x_value, y_value = chart.stands_out[name]
            marker = {
                "symbol": "circle",
                "size": 14,
                "color": LINES[number % len(LINES)],
                "line": {"width": 2},
            }
            traces.append(
                {
                    "x": [short(x_value)],
                    "y": [short(y_value)],
                    "name": f"{name}, chosen",
                    "mode": "markers",
                    "marker": marker,
                    "showlegend": False,
                }
            )
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": chart.x_title}},
        "yaxis": {"title": {"text": chart.y_title}, "type": "log" if chart.is_log else "linear"},
    }
    if not chart.is_log:
        layout["yaxis"]["rangemode"] = "tozero"
    else:
        layout["yaxis"]["exponentformat"] = "power"
    if chart.is_whole and len(chart.x) <= _FEW:
        layout["xaxis"]["dtick"] = 1
    return {"kind": "lines", "data": traces, "layout": layout}


def grid_plotly(grid: Grid) -> dict[str, Any]:
    """The grid for plotly, in plain values."""
    values = [[None if math.isnan(v) else short(v) for v in row] for row in grid.values.tolist()]
    return {
        "kind": "grid",
        "rows": list(grid.rows),
        "columns": list(grid.columns),
        "values": values,
        "unit": grid.unit,
        "top": short(grid.top),
        "notes": [list(row) for row in grid.notes],
        "words": list(grid.words),
        "groups": len(grid.groups),
        "x_title": grid.x_title,
        "y_title": grid.y_title,
    }


def short(value: float | None) -> float | None:
    """Five digits, which are as many as anybody reads."""
    return None if value is None else float(f"{value:.5g}")


def is_shown(value: float | None, chart: Lines) -> bool:
    """Whether there is a value, and a logarithm of it where one is needed."""
    return value is not None and (value > 0 or not chart.is_log)
