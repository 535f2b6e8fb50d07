"""Tables of what was measured: distances, deltas, routers, routing. Pure."""

from itertools import combinations
from statistics import fmean, median

from moemerge.report.contents import Report
from moemerge.report.numbers import (
    RELATIVE,
    delta_shares,
    overlap,
    part_distances,
    same_slot,
    shares_of,
    slots_in_use,
)
from moemerge.report.tables import Cell, Choice, View


def sharing(report: Report, choice: Choice) -> View | None:
    """What each variant would lose if all shared in every slot."""
    if not report.sharing:
        return None
    wanted = choice.variants(report)
    rows: list[list[Cell]] = [
        [index, *(report.sharing.get(index, {}).get(name) for name in wanted)]
        for index in choice.layers(report)
    ]
    return View(
        title="Lost by sharing",
        columns=["layer", *wanted],
        rows=rows,
        note="Of the energy of the layer's output, as measured, if all share one expert in every slot.",
    )


def parts(report: Report, choice: Choice) -> View | None:
    """Which part of an expert differs most."""
    if report.similarity is None:
        return None
    found = {
        index: part_distances(report.similarity.load(index), len(report.similarity.variants))
        for index in choice.layers(report)
    }
    names = list(dict.fromkeys(part for by_part in found.values() for part in by_part))
    if not names:
        return None
    return View(
        title="Distance by part",
        columns=["layer", *names],
        rows=[[index, *(by_part.get(name) for name in names)] for index, by_part in found.items()],
        note="Median over slots and pairs of variants, relative to the part's norm.",
    )


def pairs(report: Report, choice: Choice) -> View | None:
    """How far variants are from each other, over all layers."""
    similarity = report.similarity
    if similarity is None or len(similarity.variants) < 2:
        return None
    names = list(combinations(similarity.variants, 2))
    found = [
        same_slot(similarity.load(index).distances[RELATIVE], len(similarity.variants))
        for index in choice.layers(report)
    ]
    rows: list[list[Cell]] = [
        [
            a,
            b,
            median([float(v) for layer in found for v in layer[n]]),
            max(float(layer[n].max()) for layer in found),
        ]
        for n, (a, b) in enumerate(names)
        if choice.variant in (None, a, b)
    ]
    return View(
        title="Pairs of variants",
        columns=["variant", "other", "median", "worst"],
        rows=rows,
        note="Relative L2 within slots.",
    )


def deltas(report: Report, choice: Choice) -> View | None:
    """How far fine-tuning moved each variant's experts."""
    similarity = report.similarity
    if similarity is None or not similarity.has_base:
        return None
    wanted = choice.variants(report)
    rows: list[list[Cell]] = []
    for index in choice.layers(report):
        shares = delta_shares(similarity.load(index), len(similarity.variants))
        if shares is not None:
            by_name = dict(zip(similarity.variants, shares, strict=True))
            rows.append([index, *(float(by_name[name].mean()) for name in wanted)])
    return View(
        title="Norm of deltas",
        columns=["layer", *wanted],
        rows=rows,
        note="What fine-tuning changed, over the expert's norm; mean over slots.",
    )


def routers(report: Report, choice: Choice) -> View | None:
    """Whether shared experts stand under routers that agree."""
    similarity = report.similarity
    if similarity is None:
        return None
    rows: list[list[Cell]] = []
    for index in choice.layers(report):
        distance = similarity.load(index).router_l2
        if distance is None:
            continue
        for a, b in combinations(range(len(similarity.variants)), 2):
            first, second = similarity.variants[a], similarity.variants[b]
            if choice.variant in (None, first, second):
                row = distance[a, b]
                rows.append([index, first, second, float(row.mean()), float(row.max()), int(row.argmax())])
    columns = ["layer", "variant", "other", "mean", "worst", "worst slot"]
    note = "Relative L2 between the routers' rows."
    return View(title="Routers", columns=columns, rows=rows, note=note) if rows else None


def routing(report: Report, choice: Choice) -> View | None:
    """Which slots a variant's own text uses, and how much that is what others use."""
    if report.routing is None:
        return None
    rows: list[list[Cell]] = []
    for index in choice.layers(report):
        found = {name: shares_of(report.routing, index, name) for name in report.variants}
        known = {name: shares for name, shares in found.items() if shares is not None}
        for name in choice.variants(report):
            if name not in known:
                continue
            shares = known[name]
            others = [overlap(shares, other) for other_name, other in known.items() if other_name != name]
            mean = fmean(others) if others else None
            top = int(shares.argmax())
            rows.append([index, name, top, float(shares[top]), slots_in_use(shares), mean])
    columns = ["layer", "variant", "busiest slot", "its share", "slots in use", "overlap with others"]
    note = "Shares of routed tokens. Overlap: 1 when variants use slots alike, 0 when no slot serves both."
    return View(title="Routing", columns=columns, rows=rows, note=note)
