"""Parts of the page about what was measured: distances, deltas, routers, routing. Pure."""

from collections.abc import Mapping
from itertools import combinations

import numpy as np

from moemerge.report.charts import Grid, Lines
from moemerge.report.contents import Matrix, Report
from moemerge.report.numbers import RELATIVE, delta_shares, joins, part_distances, same_slot, shares_of
from moemerge.report.section import Section, by_layer, over_experts, tables


def depth(report: Report) -> Section:
    """How far siblings are from each other, and what sharing would do."""
    charts: list[Lines | Grid] = []
    similarity = report.similarity
    if similarity:
        charts.append(
            Lines(
                name="apart",
                title="Distance by depth",
                x_title="layer",
                y_title="relative L2",
                x=[layer.index for layer in similarity.layers],
                series={
                    "same slot, median": [layer.same_slot_median for layer in similarity.layers],
                    "same slot, worst": [layer.same_slot_max for layer in similarity.layers],
                },
                is_whole=True,
            )
        )
    if report.sharing:
        charts.append(
            by_layer(report, "sharing", "Lost when all share", "share of output energy", report.sharing)
        )
    if similarity and len(similarity.variants) > 1:
        pairs = {index: _pairs(report, index) for index in report.layers}
        values = np.array([np.median(found, axis=0) for found in pairs.values()])
        charts.append(
            Grid(
                name="slots",
                title="Distance by layer and slot, median over pairs of variants",
                x_title="slot",
                y_title="layer",
                rows=[str(index) for index in pairs],
                columns=[str(slot) for slot in range(report.num_slots)],
                values=values,
                unit="relative L2",
                top=float(values.max()),
            )
        )
        charts.append(_cut(report, pairs))
    return Section(
        name="depth",
        title="Where variants are alike",
        about="How far the variants' experts of one slot are from each other, layer by layer, and what would "
        "be lost if they shared.",
        charts=charts,
        tables=tables(report, "layers", "sharing", "pairs"),
    )


def parts(report: Report) -> Section:
    """Which matrices differ, and how far fine-tuning moved each variant."""
    charts: list[Lines | Grid] = []
    similarity = report.similarity
    if similarity:
        by_part: dict[int, Mapping[str, float]] = {}
        moved: dict[int, Mapping[str, float]] = {}
        for index in report.layers:
            layer = similarity.load(index)
            by_part[index] = part_distances(layer, len(similarity.variants))
            shares = delta_shares(layer, len(similarity.variants))
            if shares is not None:
                means = shares.mean(axis=1)
                moved[index] = {name: float(v) for name, v in zip(similarity.variants, means, strict=True)}
        if any(by_part.values()):
            charts.append(by_layer(report, "by-part", "Distance by part", "relative L2", by_part))
        if moved:
            charts.append(by_layer(report, "moved", "Norm of deltas", "share of the expert's norm", moved))
    return Section(
        name="parts",
        title="What differs",
        about="Which matrices of an expert differ, and how far fine-tuning moved each variant from the base.",
        charts=charts,
        tables=tables(report, "parts", "deltas"),
    )


def routing(report: Report) -> Section:
    """How far routers are apart, and where text goes."""
    charts: list[Lines | Grid] = []
    if report.routing:
        empty = np.full(report.num_slots, np.nan)
        rows = []
        for index in report.layers:
            found = [shares_of(report.routing, index, name) for name in report.variants]
            rows.append(np.concatenate([empty if one is None else one for one in found]))
        title = "Share of routed tokens of each slot, on each variant's own text"
        charts.append(over_experts(report, "shares", title, np.array(rows), "of tokens"))
    if report.similarity:
        names = list(combinations(report.similarity.variants, 2))
        apart: dict[int, Mapping[str, float]] = {}
        for index in report.layers:
            distance = report.similarity.load(index).router_l2
            if distance is not None:
                both = combinations(range(len(report.similarity.variants)), 2)
                means = [float(distance[a, b].mean()) for a, b in both]
                apart[index] = {f"{a} - {b}": mean for (a, b), mean in zip(names, means, strict=True)}
        if any(apart.values()):
            charts.append(by_layer(report, "routers", "Routers apart", "relative L2 of rows", apart))
    return Section(
        name="routing",
        title="Routers and routing",
        about="Experts may be shared under routers that differ; these say how much, and where text goes.",
        charts=charts,
        tables=tables(report, "routing", "routers"),
    )


def _cut(report: Report, pairs: Mapping[int, Matrix]) -> Lines:
    count = len(report.variants)
    heights = sorted(float(h) for found in pairs.values() for h in joins(found, count))
    total = len(pairs) * report.num_slots * count
    steps = np.unique(np.linspace(0, len(heights) - 1, min(len(heights), 200)).astype(int))
    x, y = (
        [0.0, *(heights[step] for step in steps)],
        [float(total), *(total - float(step) - 1 for step in steps)],
    )
    return Lines(
        name="cut",
        title="Pool experts needed, if experts of a slot closer than this were one",
        x_title="relative L2",
        y_title="pool experts",
        x=x,
        series={"pool experts": y},
    )


def _pairs(report: Report, index: int) -> Matrix:
    assert report.similarity is not None
    return same_slot(report.similarity.load(index).distances[RELATIVE], len(report.similarity.variants))
