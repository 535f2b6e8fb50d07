"""Parts of the page about what is kept: rungs, budgets, variants, the worst slots. Pure."""

import numpy as np

from moemerge.report.charts import Grid, Lines
from moemerge.report.contents import Report
from moemerge.report.numbers import chosen_point
from moemerge.report.section import Section, over_experts, tables

_NOISE = 1e-9
"""Of the largest loss: what is less is what rounding left of nothing."""


def kept(report: Report) -> Section:
    """The rung of each expert."""
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
            over_experts(
                report, "ladder", "Bits kept for a weight of each expert", bits, "bits", notes, words
            )
        )
        if all(layer.errors for layer in storage.layers):
            errors = np.array(
                [[e for n in storage.variants for e in layer.errors[n]] for layer in storage.layers]
            )
            title = "From each expert to what stands for it, over its norm"
            charts.append(over_experts(report, "errors", title, errors, "error", notes, words))
        charts.append(_cluster_map(report))
    return Section(
        name="kept",
        title="How experts are kept",
        about="The rung of each layer, slot and variant: own or shared, in which code, with which residual.",
        charts=charts,
        tables=tables(report, "rungs", "clusters"),
    )


def budget(report: Report) -> Section:
    """What every budget would lose."""
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
        tables=tables(report, "budget"),
    )


def quality(report: Report) -> Section:
    """The variants."""
    return Section(
        name="quality",
        title="Variants and their quality",
        about="Where each variant came from, how it is kept, and what is known of its losses.",
        tables=tables(report, "variants"),
    )


def worst(report: Report) -> Section:
    """The slots fitted least."""
    return Section(
        name="worst",
        title="Worst slots",
        about="The slots that what is kept fits least.",
        tables=tables(report, "worst"),
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


def _known(value: float | None, noise: float) -> float | None:
    return None if value is None or value <= noise else value
