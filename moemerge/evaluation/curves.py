"""What is kept against bytes, a line per method, from a comparison. matplotlib is needed here alone."""

from pathlib import Path

from moemerge.errors import InvalidRecipe
from moemerge.evaluation.methods import OURS
from moemerge.evaluation.results import GAIN, Comparison, Row

FORMATS = (".png", ".svg", ".pdf")
_LOWEST = -0.25
_MARKERS = "osv^D<>pP*Xh"


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


def draw_curves(comparison: Comparison, path: Path, title: str) -> None:
    """Draw the mean over variants with its interval, and the worst variant, over the bytes really used."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib.figure import Figure

    unit = "gain of fine-tuning" if comparison.unit == GAIN else "originals' accuracy"
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (method, rows) in enumerate(_lines(comparison).items()):
        ratios = [row.bytes_ratio or 0.0 for row in rows]
        style = {
            "marker": _MARKERS[number % len(_MARKERS)],
            "markersize": 4,
            "linewidth": 2.5 if method == OURS else 1.0,
            "zorder": 3 if method == OURS else 2,
        }
        mean = [row.kept or 0.0 for row in rows]
        ends = [row.interval or (row.kept or 0.0,) * 2 for row in rows]
        below = [max(0.0, value - low) for value, (low, _) in zip(mean, ends, strict=True)]
        above = [max(0.0, high - value) for value, (_, high) in zip(mean, ends, strict=True)]
        left.errorbar(ratios, mean, yerr=[below, above], capsize=2, elinewidth=0.8, label=method, **style)
        right.plot(ratios, [row.worst or 0.0 for row in rows], label=method, **style)
    lowest = min((row.worst for row in comparison.rows() if row.worst is not None), default=0.0)
    for axes, name in ((left, "mean over variants"), (right, "worst variant")):
        axes.set_xlabel("expert bytes over those of one variant")
        axes.set_title(name, fontsize="medium")
        axes.set_ylim(max(_LOWEST, lowest - 0.05), 1.05)
        axes.axhline(1.0, color="black", linewidth=0.5)
        axes.grid(alpha=0.3)
    left.set_ylabel(f"share of the {unit} kept")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def _lines(comparison: Comparison) -> dict[str, list[Row]]:
    """Measured rows by method, by bytes rising; without base and originals."""
    lines: dict[str, list[Row]] = {}
    for row in comparison.rows()[2:]:
        if row.bytes_ratio is not None and row.by_variant:
            lines.setdefault(row.method, []).append(row)
    return {method: sorted(rows, key=lambda row: row.bytes_ratio or 0.0) for method, rows in lines.items()}
