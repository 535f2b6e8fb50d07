"""Charts as still pictures: lines as SVG that takes its colours of text and paper from the page. Pure."""

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape

import numpy as np

from moemerge.report.charts import Grid, Lines, is_shown
from moemerge.report.colours import DASHES, LINES
from moemerge.report.pictures import png

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _BOTTOM, _TOP = 720, 300, 64, 12, 44, 10
_TICKS = 5
Place = Callable[[float], float]


def draw_lines(chart: Lines) -> str:
    """Lines as SVG with a legend; empty where there is nothing to draw."""
    values = [v for line in chart.series.values() for v in line if v is not None and is_shown(v, chart)]
    values += [y for _, y in chart.stands_out.values() if is_shown(y, chart)]
    if not values:
        return ""
    xs = [*chart.x, *(x for x, _ in chart.stands_out.values())]
    low, high = _range(values, is_log=chart.is_log)
    to_x = _axis(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT, is_log=False)
    to_y = _axis(low, high, _HEIGHT - _BOTTOM, _TOP, is_log=chart.is_log)
    pieces = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(chart.title)}" class="chart">',
        *_y_axis(chart, _ticks(low, high, is_log=chart.is_log), to_y),
        *_x_axis(chart, _ticks(min(xs), max(xs), least=1.0 if chart.is_whole else 0.0), to_x),
        *(_line(chart, number, to_x, to_y) for number in range(len(chart.series))),
        "</svg>",
    ]
    return "".join(pieces) + _legend(list(chart.series))


def draw_grid(grid: Grid) -> str:
    """The grid as a picture with its scale."""
    columns = f"{escape(grid.columns[0])} to {escape(grid.columns[-1])}" if grid.columns else ""
    groups = f" ({', '.join(map(escape, grid.groups))})" if grid.groups else ""
    return (
        f'<img class="grid" alt="{escape(grid.title)}" src="{png(grid.values, grid.top)}">'
        f"<p class=scale>Down: {escape(grid.y_title)}, {escape(grid.rows[0])} to {escape(grid.rows[-1])}. "
        f"Across: {escape(grid.x_title)}, {columns}{groups}. <span>0</span>"
        f"<span class=ramp></span><span>{grid.top:.3g} {escape(grid.unit)}</span></p>"
    )


def _y_axis(chart: Lines, ticks: Sequence[float], to_y: Place) -> Iterator[str]:
    for tick in ticks:
        y = to_y(tick)
        yield f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.3g}</text>'
    turned = f"translate(14 {(_TOP + _HEIGHT - _BOTTOM) / 2}) rotate(-90)"
    yield f'<text transform="{turned}" text-anchor="middle">{escape(chart.y_title)}</text>'


def _x_axis(chart: Lines, ticks: Sequence[float], to_x: Place) -> Iterator[str]:
    for tick in ticks:
        y = _HEIGHT - _BOTTOM + 16
        yield f'<text x="{to_x(tick):.1f}" y="{y}" text-anchor="middle">{tick:.3g}</text>'
    yield f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(chart.x_title)}</text>'


def _line(chart: Lines, number: int, to_x: Place, to_y: Place) -> str:
    """A line, and what stands out of it."""
    name = list(chart.series)[number]
    points = " ".join(
        f"{to_x(x):.1f},{to_y(y):.1f}"
        for x, y in zip(chart.x, chart.series[name], strict=True)
        if y is not None and is_shown(y, chart)
    )
    drawn = (
        f'<polyline points="{points}" fill="none" {_stroke(number)}><title>{escape(name)}</title></polyline>'
    )
    if name in chart.stands_out and is_shown(chart.stands_out[name][1], chart):
        x, y = chart.stands_out[name]
        drawn += f'<circle cx="{to_x(x):.1f}" cy="{to_y(y):.1f}" r="6" fill="{LINES[number % len(LINES)]}"/>'
    return drawn


def _stroke(number: int) -> str:
    dash = DASHES[number % len(DASHES)][1]
    return f'stroke="{LINES[number % len(LINES)]}" stroke-width="2" stroke-dasharray="{dash}"'


def _legend(names: Sequence[str]) -> str:
    items = "".join(
        f'<li><svg viewBox="0 0 32 8" aria-hidden="true"><path d="M0 4h32" {_stroke(number)}/></svg>'
        f"{escape(name)}</li>"
        for number, name in enumerate(names)
    )
    return f"<ul class=legend>{items}</ul>"


def _range(values: Sequence[float], *, is_log: bool) -> tuple[float, float]:
    low, high = (min(values) if is_log else min(0.0, *values)), max(values)
    return (low, high) if high > low else (low, low + (abs(low) or 1.0))


def _axis(low: float, high: float, start: float, end: float, *, is_log: bool) -> Place:
    bend = math.log10 if is_log else float
    span = bend(high) - bend(low) or 1.0
    return lambda value: start + (bend(value) - bend(low)) / span * (end - start)


def _ticks(low: float, high: float, *, is_log: bool = False, least: float = 0.0) -> list[float]:
    if is_log:
        powers = [
            10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        ]
        return powers if len(powers) > 1 else [low, high]
    if high <= low:
        return [low]
    rough = max((high - low) / _TICKS, least)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step) * step
    return [float(tick) for tick in np.arange(first, high + step * 1e-6, step)]
