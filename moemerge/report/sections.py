"""What stands on the page, in order: charts, grids and tables with a heading each. Pure."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from moemerge.report.charts import Grid, Lines
from moemerge.report.contents import Matrix, Report
from moemerge.report.numbers import (
    RELATIVE,
    chosen_point,
    delta_shares,
    joins,
    part_distances,
    same_slot,
    shares_of,
)
from moemerge.report.tables import Choice, View
from moemerge.report.views import VIEWS

_WORST = 25
_NOISE = 1e-9
"""Of the largest loss: what is less is what rounding left of nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the page.

    Attributes:
        name: Its anchor.
        about: What one looks at, in a sentence or two.
    """

    name: str
    title: str
    about: str
    charts: Sequence[Lines | Grid] = ()
    tables: Sequence[View] = field(default_factory=tuple)


def sections(report: Report) -> list[Section]:
    """All that there is something in."""
    found = [build(report) for build in _BUILDERS]
    return [section for section in found if section.charts or section.tables]


def _depth(report: Report) -> Section:
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
            _by_layer(report, "sharing", "Lost when all share", "share of output energy", report.sharing)
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
        tables=_tables(report, "layers", "sharing", "pairs"),
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


def _parts(report: Report) -> Section:
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
            charts.append(_by_layer(report, "by-part", "Distance by part", "relative L2", by_part))
        if moved:
            charts.append(_by_layer(report, "moved", "Norm of deltas", "share of the expert's norm", moved))
    return Section(
        name="parts",
        title="What differs",
        about="Which matrices of an expert differ, and how far fine-tuning moved each variant from the base.",
        charts=charts,
        tables=_tables(report, "parts", "deltas"),
    )


def _kept(report: Report) -> Section:
    charts: list[Lines | Grid] = []
    storage = report.storage
    if storage:
        words = list(
            dict.fromkeys(str(r) for layer in storage.layers for of in layer.rungs.values() for r in of)
        )
        place = {word: number for number, word in enumerate(words)}
        rungs = [[r for name in storage.variants for r in layer.rungs[name]] for layer in storage.layers]
        bits = np.array([[np.nan if r.bits is None else r.bits for r in row] for row in rungs])
        notes = [[place[str(r)] for r in row] for row in rungs]
        charts.append(
            _over_experts(
                report, "ladder", "Bits kept for a weight of each expert", bits, "bits", notes, words
            )
        )
        if all(layer.errors for layer in storage.layers):
            errors = np.array(
                [[e for n in storage.variants for e in layer.errors[n]] for layer in storage.layers]
            )
            title = "From each expert to what stands for it, over its norm"
            charts.append(_over_experts(report, "errors", title, errors, "error", notes, words))
        charts.append(_cluster_map(report))
    return Section(
        name="kept",
        title="How experts are kept",
        about="The rung of each layer, slot and variant: own or shared, in which code, with which residual.",
        charts=charts,
        tables=_tables(report, "rungs", "clusters"),
    )


def _cluster_map(report: Report) -> Grid:
    storage = report.storage
    assert storage is not None
    words: dict[str, int] = {}
    values, notes = [], []
    for layer in storage.layers:
        owner = {member: number for number, members in enumerate(layer.pool) for member in members}
        row, said = [], []
        for slot in range(storage.num_slots):
            groups: dict[int, list[str]] = {}
            for name in storage.variants:
                groups.setdefault(owner[name, slot], []).append(name)
            row.append(float(len(groups)))
            said.append(
                words.setdefault(" | ".join("+".join(names) for names in groups.values()), len(words))
            )
        values.append(row)
        notes.append(said)
    return Grid(
        name="clusters-map",
        title="Pool experts that stand for the variants' experts of a slot: 1 where all share",
        x_title="slot",
        y_title="layer",
        rows=[str(layer.index) for layer in storage.layers],
        columns=[str(slot) for slot in range(storage.num_slots)],
        values=np.array(values),
        unit="pool experts",
        top=float(len(storage.variants)),
        notes=notes,
        words=list(words),
    )


def _budget(report: Report) -> Section:
    charts: list[Lines | Grid] = []
    if report.curve and report.storage and report.curve.points:
        unit = report.storage.variant_bytes
        chosen = chosen_point(report)
        points = report.curve.points
        noise = _NOISE * max((value for _, loss in points for value in loss.values()), default=0.0)
        charts.append(
            Lines(
                name="curve",
                title="Error against bytes",
                x_title="bytes, x the experts of one variant",
                y_title="predicted damage",
                x=[size / unit for size, _ in points],
                series={
                    name: [_known(loss.get(name), noise) for _, loss in points] for name in report.variants
                },
                stands_out={name: (chosen[0] / unit, v) for name, v in chosen[1].items()} if chosen else {},
                is_log=True,
            )
        )
    return Section(
        name="budget",
        title="Error against bytes",
        about="What every budget would lose, as predicted; the large dots are what was chosen.",
        charts=charts,
        tables=_tables(report, "budget"),
    )


def _known(value: float | None, noise: float) -> float | None:
    return None if value is None or value <= noise else value


def _routing(report: Report) -> Section:
    charts: list[Lines | Grid] = []
    if report.routing:
        empty = np.full(report.num_slots, np.nan)
        rows = []
        for index in report.layers:
            found = [shares_of(report.routing, index, name) for name in report.variants]
            rows.append(np.concatenate([empty if one is None else one for one in found]))
        title = "Share of routed tokens of each slot, on each variant's own text"
        charts.append(_over_experts(report, "shares", title, np.array(rows), "of tokens"))
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
            charts.append(_by_layer(report, "routers", "Routers apart", "relative L2 of rows", apart))
    return Section(
        name="routing",
        title="Routers and routing",
        about="Experts may be shared under routers that differ; these say how much, and where text goes.",
        charts=charts,
        tables=_tables(report, "routing", "routers"),
    )


def _quality(report: Report) -> Section:
    return Section(
        name="quality",
        title="Variants and their quality",
        about="Where each variant came from, how it is kept, and what is known of its losses.",
        tables=_tables(report, "variants"),
    )


def _worst(report: Report) -> Section:
    return Section(
        name="worst",
        title="Worst slots",
        about="The slots that what is kept fits least.",
        tables=_tables(report, "worst"),
    )


def _pairs(report: Report, index: int) -> Matrix:
    assert report.similarity is not None
    return same_slot(report.similarity.load(index).distances[RELATIVE], len(report.similarity.variants))


def _by_layer(
    report: Report, name: str, title: str, y_title: str, values: Mapping[int, Mapping[str, float]]
) -> Lines:
    names = dict.fromkeys(key for of_layer in values.values() for key in of_layer)
    series = {key: [values.get(index, {}).get(key) for index in report.layers] for key in names}
    return Lines(
        name=name,
        title=title,
        x_title="layer",
        y_title=y_title,
        x=list(report.layers),
        series=series,
        is_whole=True,
    )


def _over_experts(
    report: Report,
    name: str,
    title: str,
    values: Matrix,
    unit: str,
    notes: Sequence[Sequence[int]] = (),
    words: Sequence[str] = (),
) -> Grid:
    known = values[~np.isnan(values)]
    return Grid(
        name=name,
        title=title,
        x_title="variant and slot",
        y_title="layer",
        rows=[str(index) for index in report.layers],
        columns=[f"{variant}:{slot}" for variant in report.variants for slot in range(report.num_slots)],
        values=values,
        unit=unit,
        top=float(known.max()) if known.size else 1.0,
        notes=notes,
        words=words,
        groups=report.variants,
    )


def _tables(report: Report, *names: str) -> list[View]:
    found: Iterator[View | None] = (VIEWS[name](report, Choice(top=_WORST)) for name in names)
    return [view for view in found if view is not None and view.rows]


_BUILDERS: Sequence[Callable[[Report], Section]] = (
    _depth, _parts, _kept, _budget, _routing, _quality, _worst,
)  # fmt: skip
