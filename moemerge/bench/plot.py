"""Turnaround and TTFT against load, a line per system, from a report. matplotlib is needed here alone."""

from pathlib import Path

from moemerge.bench.report import Report
from moemerge.bench.tables import Summary, summarise
from moemerge.errors import InvalidRecipe

FORMATS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Make sure, before anything is measured, that a plot can be drawn.

    Raises:
        InvalidRecipe: matplotlib is missing, or the file has an unknown ending.
    """
    from importlib.util import find_spec

    if path.suffix not in FORMATS:
        raise InvalidRecipe(f"{path}: a plot ends with {', '.join(FORMATS)}")
    if find_spec("matplotlib") is None:
        raise InvalidRecipe("plots need matplotlib: pip install 'moemerge[bench]'")


def draw_plot(report: Report, path: Path) -> None:
    """Draw mean turnaround and mean TTFT with their intervals, over loads, or as bars for a single one."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, name in ((left, "turnaround"), (right, "ttft")):
        _draw(axes, report, name)
        axes.set_ylabel(f"mean {'TTFT' if name == 'ttft' else name} (s)")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize="small")
    figure.suptitle(
        f"{report.subject['name']}, {report.subject['variants']} variants, {report.workload['workload']}"
        f"{'' if report.is_valid else ' (not valid: the machine was busy)'}"
    )
    figure.savefig(path, dpi=150)


def _draw(axes: object, report: Report, name: str) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    loads = [load for load in report.loads if load is not None]
    for number, system in enumerate(report.systems):
        found = [summarise(report, system, load) for load in loads or (None,)]
        points = [
            (position, *_point(summary, name))
            for position, summary in zip(loads or [float(number)], found, strict=True)
            if summary.failure is None
        ]
        if not points:
            continue
        x, y, below, above = (list(values) for values in zip(*points, strict=True))
        axes.errorbar(x, y, yerr=[below, above], marker="o", capsize=3, label=system)
    if loads:
        axes.set_xlabel("load, share of the capacity of one model")
    else:
        axes.set_xticks(range(len(report.systems)), report.systems, rotation=30)


def _point(summary: Summary, name: str) -> tuple[float, float, float]:
    """Mean, and distances to the ends of its interval."""
    spread = summary.turnaround if name == "turnaround" else summary.ttft
    interval = summary.turnaround_interval if name == "turnaround" else summary.ttft_interval
    assert spread is not None
    assert interval is not None
    return spread.mean, max(0.0, spread.mean - interval[0]), max(0.0, interval[1] - spread.mean)
