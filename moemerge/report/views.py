"""Tables that a report consists of, by name: the same in a terminal, JSON, CSV and the page. Pure."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, median

from moemerge.report.contents import Report, StoredLayer
from moemerge.report.numbers import (
    chosen_point,
    delta_shares,
    overlap,
    part_distances,
    placed,
    same_slot,
    shares_of,
    slots_in_use,
)

Cell = str | int | float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What of a view is wanted: one layer, one variant, so many of the worst."""

    layer: int | None = None
    variant: str | None = None
    top: int = 10

    def layers(self, report: Report) -> Sequence[int]:
        """The chosen one, or all."""
        return report.layers if self.layer is None else (self.layer,)

    def variants(self, report: Report) -> Sequence[str]:
        """The chosen one, or all."""
        return report.variants if self.variant is None else (self.variant,)


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A table.

    Attributes:
        note: What its numbers are, in a sentence.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""

    def records(self) -> list[dict[str, Cell]]:
        """Rows by column, for machines."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


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
        columns += [f"sharing, {name}" for name in report.variants]
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
            row += [report.sharing.get(index, {}).get(name) for name in report.variants]
        if stored:
            row += [len(stored[index].pool), *_mean_and_worst(stored[index])]
        rows.append(row)
    note = "Distances: relative L2 between variants, over the experts' norms."
    if report.sharing:
        note += " Sharing: how much of the energy of the layer's output is lost if all share in every slot."
    return View(title="Layers", columns=columns, rows=rows, note=note)


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


def clusters(report: Report, choice: Choice) -> View | None:
    """Pool experts, whom they stand for, and how they are made and kept."""
    if report.storage is None:
        return None
    wanted, rows = set(choice.layers(report)), list[list[Cell]]()
    for layer in report.storage.layers:
        for number, members in enumerate(layer.pool):
            if layer.index not in wanted or (choice.variant and choice.variant not in dict(members)):
                continue
            errors = [layer.errors[name][slot] for name, slot in members if name in layer.errors]
            rows.append(
                [
                    layer.index,
                    number,
                    " ".join(f"{name}:{slot}" for name, slot in members),
                    layer.operators[number] if layer.operators else None,
                    layer.codes[number] or "plain",
                    max(errors) if errors else None,
                ]
            )
    columns = ["layer", "pool expert", "members", "made by", "kept as", "worst error"]
    return View(title="Clusters", columns=columns, rows=rows, note="Members: variant and slot.")


def rungs(report: Report, choice: Choice) -> View | None:
    """How many slots of each variant are kept in which way."""
    if report.storage is None:
        return None
    wanted, wanted_layers = choice.variants(report), set(choice.layers(report))
    counts: dict[str, Counter[str]] = {name: Counter() for name in wanted}
    bits: dict[str, float | None] = {}
    for expert in placed(report.storage):
        if expert.variant in counts and expert.layer in wanted_layers:
            counts[expert.variant][str(expert.rung)] += 1
            bits[str(expert.rung)] = expert.rung.bits
    names = sorted(bits, key=lambda name: (-(bits[name] or 0.0), name))
    return View(
        title="Slots by how they are kept",
        columns=["kept as", "bits per weight", *wanted],
        rows=[[name, bits[name], *(counts[variant][name] for variant in wanted)] for name in names],
        note="Bits: of the slot's residual, and its share of the pool expert, scales included.",
    )


def worst(report: Report, choice: Choice) -> View | None:
    """The slots that what is kept fits least."""
    if report.storage is None:
        return None
    wanted, wanted_layers = set(choice.variants(report)), set(choice.layers(report))
    found = [
        expert
        for expert in placed(report.storage)
        if expert.error is not None and expert.variant in wanted and expert.layer in wanted_layers
    ]
    if not found:
        return None
    found.sort(key=lambda expert: -(expert.error or 0.0))
    rows: list[list[Cell]] = [
        [
            expert.layer,
            expert.variant,
            expert.slot,
            expert.error,
            str(expert.rung),
            " ".join(f"{name}:{slot}" for name, slot in expert.shares_with) or None,
        ]
        for expert in found[: choice.top]
    ]
    columns = ["layer", "variant", "slot", "error", "kept as", "shares with"]
    note = "Error: distance to what stands for the expert, over its norm."
    return View(title="Worst slots", columns=columns, rows=rows, note=note)


def budget(report: Report, choice: Choice) -> View | None:
    """What other budgets would lose; the last line is what was chosen."""
    storage = report.storage
    if report.curve is None or storage is None:
        return None
    wanted = choice.variants(report)
    points = [(num_bytes, loss, "") for num_bytes, loss in report.curve.points]
    chosen = chosen_point(report)
    if chosen:
        points.append((*chosen, "chosen"))
    rows: list[list[Cell]] = [
        [num_bytes, num_bytes / storage.variant_bytes, *(loss.get(name) for name in wanted), mark or None]
        for num_bytes, loss, mark in sorted(points, key=lambda point: point[0])
    ]
    return View(
        title="Error against bytes",
        columns=["bytes", "ratio", *wanted, "mark"],
        rows=rows,
        note=f"Predicted {report.curve.unit}. Ratio: over the expert bytes of one variant.",
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


def pairs(report: Report, choice: Choice) -> View | None:
    """How far variants are from each other, over all layers."""
    similarity = report.similarity
    if similarity is None or len(similarity.variants) < 2:
        return None
    names = list(combinations(similarity.variants, 2))
    found = [
        same_slot(similarity.load(index).distances["relative_l2"], len(similarity.variants))
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


VIEWS: dict[str, Callable[[Report, Choice], View | None]] = {
    "layers": layers,
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
