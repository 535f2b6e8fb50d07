"""One self-contained page: no request to anywhere, and readable without scripts."""

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment

from moemerge import __version__
from moemerge.bundle.target import check_writable, writing
from moemerge.report.charts import Grid, Lines, grid_plotly, lines_plotly, short
from moemerge.report.colours import scale
from moemerge.report.contents import Matrix, Report
from moemerge.report.drawings import draw_grid, draw_lines
from moemerge.report.findings import findings
from moemerge.report.heat import average_blocks, by_slot
from moemerge.report.numbers import RELATIVE, farthest_siblings, most_apart
from moemerge.report.pictures import MOST_EXACT, pack, png
from moemerge.report.reading import open_report
from moemerge.report.section import Section
from moemerge.report.sections import sections
from moemerge.report.words import evidence, headline, title

_PICTURED = 128
"""Pixels of a layer's static picture; larger matrices are averaged."""
_MOST_ROWS = 400
_SCRIPTS = ("start.js", "viewer.js", "charts.js")
_PLOTLY = "package_data/plotly.min.js"


def write_report(path: Path, html: Path, calibration: Path | None = None) -> None:
    """Write the page of a bundle, similarity folder or plan, in place of one that may be there.

    Raises:
        MoemergeError: As `open_report`.
        NotEnoughRoom: The page cannot be written.
    """
    write_page(open_report(path, calibration), html)


def write_page(report: Report, html: Path) -> None:
    """Write the page of what was opened.

    Raises:
        NotEnoughRoom: It cannot be written.
    """
    # Imports torch, which nothing else here needs.
    from moemerge.checkpoint.writer import write_text

    check_writable(html)
    text = render(report)
    with writing(html):
        write_text(html, text)


def render(report: Report) -> str:
    """The page."""
    shown = sections(report)
    siblings = _siblings(report)
    style, script, plotly = _resource("page.css"), "".join(map(_resource, _SCRIPTS)), _plotly()
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = _number
    return environment.from_string(_resource("page.html")).render(
        anchors={"layer": "Layers"} | {section.name: section.title for section in shown},
        chosen=report.layers.index(most_apart(report)),
        data=_json(_data(report, shown, siblings)),
        evidence=evidence(report),
        findings=findings(report),
        headline=headline(report),
        layers=_pictures(report, siblings.get(RELATIVE, 0.0)),
        meanings=report.similarity.meanings if report.similarity else {},
        most_rows=_MOST_ROWS,
        name=report.name,
        pictured=_pictured(report),
        plotly=plotly,
        policy=_policy([script, plotly]),
        script=script,
        sections=[_drawn(section) for section in shown],
        storage=report.storage is not None,
        style=style,
        title=title(report),
        top=siblings.get(RELATIVE, 0.0),
        variants=report.variants,
        version=__version__,
    )


def _data(report: Report, shown: Sequence[Section], siblings: dict[str, float]) -> dict[str, Any]:
    charts = {chart.name: _for_plotly(chart) for section in shown for chart in section.charts}
    return {"charts": charts, "scale": scale(), "viewer": _viewer(report, siblings)}


def _viewer(report: Report, siblings: dict[str, float]) -> dict[str, Any] | None:
    """Every layer's matrices, as `page.js` unpacks them; of many experts one distance alone."""
    similarity = report.similarity
    if similarity is None:
        return None
    count = len(similarity.variants) * similarity.num_slots
    names = [name for name in siblings if name == RELATIVE or count <= MOST_EXACT]
    names.sort(key=lambda name: name != RELATIVE)
    layers = []
    for index in report.layers:
        distances = similarity.load(index).distances
        maps = {name: pack(distances[name]) for name in names}
        layers.append({"index": index, "maps": maps, "pool": _pool_of(report, index)})
    return {
        "names": [f"{name}:{slot}" for name in similarity.variants for slot in range(similarity.num_slots)],
        "slots": similarity.num_slots,
        "distances": names,
        "siblings": {name: short(siblings[name]) for name in names},
        "layers": layers,
    }


def _pool_of(report: Report, index: int) -> list[int] | None:
    """The pool expert of every expert of a layer, in the order of matrices."""
    if report.storage is None:
        return None
    layer = next(layer for layer in report.storage.layers if layer.index == index)
    owner = {member: number for number, members in enumerate(layer.pool) for member in members}
    return [owner[name, slot] for name in report.variants for slot in range(report.num_slots)]


def _siblings(report: Report) -> dict[str, float]:
    """By distance, the largest within slots; of all experts where there is but one variant."""
    similarity = report.similarity
    if similarity is None:
        return {}
    count = len(similarity.variants)
    found: dict[str, float] = {}
    for index in report.layers:
        for name, matrix in similarity.load(index).distances.items():
            found[name] = max(found.get(name, 0.0), farthest_siblings(matrix, count))
    return found


def _pictures(report: Report, top: float) -> list[dict[str, Any]]:
    similarity = report.similarity
    if similarity is None:
        return []
    summaries = {layer.index: layer for layer in similarity.layers}
    order = by_slot(len(similarity.variants), similarity.num_slots)
    return [
        {
            "index": index,
            "picture": png(_small(similarity.load(index).distances[RELATIVE], order), top),
            "median": summaries[index].same_slot_median,
            "most": summaries[index].same_slot_max,
        }
        for index in report.layers
    ]


def _small(matrix: Matrix, order: Sequence[int]) -> Matrix:
    return average_blocks(matrix[np.ix_(order, order)], _PICTURED)[0]


def _pictured(report: Report) -> str:
    count = len(report.variants) * report.num_slots
    factor = -(-count // _PICTURED)
    return f"Relative L2{f'; {factor} x {factor} experts averaged into one dot' if factor > 1 else ''}"


def _drawn(section: Section) -> dict[str, Any]:
    charts = [
        {
            "name": chart.name,
            "title": chart.title,
            "drawn": draw_lines(chart) if isinstance(chart, Lines) else draw_grid(chart),
        }
        for chart in section.charts
    ]
    return {
        "name": section.name,
        "title": section.title,
        "about": section.about,
        "charts": charts,
        "tables": section.tables,
    }


def _for_plotly(chart: Lines | Grid) -> dict[str, Any]:
    return lines_plotly(chart) if isinstance(chart, Lines) else grid_plotly(chart)


def _json(value: object) -> str:
    """JSON that may stand in a script element: nothing in it can end one."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _policy(scripts: Sequence[str]) -> str:
    """What a browser may do with the page: run these scripts, and fetch nothing."""
    sums = [
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts if script
    ]
    allowed = " ".join(f"'sha256-{one}'" for one in sums)
    rules = (
        "default-src 'none'",
        "img-src data: blob:",
        "style-src 'unsafe-inline'",
        f"script-src {allowed}",
    )
    return "; ".join((*rules, "base-uri 'none'"))


def _number(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _resource(name: str) -> str:
    return (files("moemerge.report") / "page" / name).read_text(encoding="utf-8")


def has_plotly() -> bool:
    """Whether pages can have hover and zoom."""
    return find_spec("plotly") is not None


def _plotly() -> str:
    """Plotly's script; empty without the extra `report`."""
    found = find_spec("plotly")
    if found is None or found.origin is None:
        return ""
    return (Path(found.origin).parent / _PLOTLY).read_text(encoding="utf-8")
