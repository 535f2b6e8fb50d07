"""The tables that a report consists of, by name: the same in a terminal, JSON, CSV and the page. Pure."""

from collections.abc import Callable
from statistics import fmean

from moemerge.report.contents import Report, StoredLayer
from moemerge.report.measured_tables import deltas, pairs, parts, routers, routing, sharing
from moemerge.report.numbers import placed
from moemerge.report.stored_tables import budget, clusters, rungs, worst
from moemerge.report.tables import Cell, Choice, View


def layers(report: Report, choice: Choice) -> View | None:
    """A line for each layer: how far apart, what sharing would lose, what is kept."""
    wanted = set(choice.layers(report))
    similarity, storage = report.similarity, report.storage
    summaries = {layer.index: layer for layer in similarity.layers} if similarity else {}
    stored = {layer.index: layer for layer in storage.layers} if storage else {}
    columns = ["layer"]
    if summaries:
        columns += ["same slot, median", "same slot, worst", "other slots, median", "distinct experts"]
    if report.sharing:
        columns += ["lost by sharing", "by"]
    if stored:
        columns += ["pool experts", "mean error", "worst error"]
    rows: list[list[Cell]] = []
    for index in (index for index in report.layers if index in wanted):
        row: list[Cell] = [index]
        if summaries:
            found = summaries.get(index)
            row += (
                [found.same_slot_median, found.same_slot_max, found.other_slot_median, found.distinct]
                if found
                else [None] * 4
            )
        if report.sharing:
            lost = report.sharing.get(index, {})
            most = max(lost, key=lambda name: lost[name], default=None)
            row += [lost[most], most] if most is not None else [None, None]
        if stored:
            row += [len(stored[index].pool), *_mean_and_worst(stored[index])]
        rows.append(row)
    note = "Distances: relative L2 between variants, over the experts' norms."
    if report.sharing:
        note += " Lost by sharing: of the energy of the layer's output, by the worst variant, if all share."
    return View(title="Layers", columns=columns, rows=rows, note=note)


def variants(report: Report, choice: Choice) -> View | None:
    """A line for each variant: where it came from, how it is kept, what it loses."""
    columns, rows = ["variant", "source", "licence"], list[list[Cell]]()
    measures = list(dict.fromkeys(key for damage in report.quality.values() for key in damage))
    if report.storage:
        columns += ["exact slots", "bits per weight", "mean error", "worst error"]
    if report.calibrated:
        columns += ["tokens", "nats per token", "gained by tuning"]
    columns += measures
    for name in choice.variants(report):
        row: list[Cell] = [name, report.sources[name] or None, report.licences.get(name)]
        if report.storage:
            own = [expert for expert in placed(report.storage) if expert.variant == name]
            errors = [expert.error for expert in own if expert.error is not None]
            bits = [expert.rung.bits for expert in own if expert.rung.bits is not None]
            exact = sum(error == 0 for error in errors)
            row += [exact if errors else None, fmean(bits) if bits else None]
            row += [fmean(errors), max(errors)] if errors else [None, None]
        if report.calibrated:
            one = report.calibrated.get(name)
            row += [one.tokens, one.nll, one.gained] if one else [None] * 3
        rows.append([*row, *(report.quality.get(name, {}).get(key) for key in measures)])
    note = "predicted, measured, kl and gain_recovered: see the bundle format." if measures else ""
    return View(title="Variants", columns=columns, rows=rows, note=note)


VIEWS: dict[str, Callable[[Report, Choice], View | None]] = {
    "layers": layers,
    "sharing": sharing,
    "parts": parts,
    "pairs": pairs,
    "deltas": deltas,
    "clusters": clusters,
    "rungs": rungs,
    "worst": worst,
    "budget": budget,
    "routers": routers,
    "routing": routing,
    "variants": variants,
}
"""By the name that `--view` takes."""

NEEDS = {
    "sharing": "a bundle merged with --policy measured",
    "clusters": "a plan or bundle",
    "rungs": "a plan or bundle",
    "worst": "a plan by distance, or a bundle",
    "budget": "a bundle merged with --policy measured",
    "routing": "a bundle merged with --calibration, or the option --calibration",
    "deltas": "distances measured with --base",
}
"""What a view shows that `VIEWS` gives None for; distances where it is not said."""


def _mean_and_worst(layer: StoredLayer) -> list[Cell]:
    errors = [error for of_slots in layer.errors.values() for error in of_slots]
    return [fmean(errors), max(errors)] if errors else [None, None]
