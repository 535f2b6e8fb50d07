"""Tables of what is kept: clusters, rungs, worst slots, budgets. Pure."""

from collections import Counter

from moemerge.report.contents import Report
from moemerge.report.numbers import chosen_point, placed
from moemerge.report.tables import Cell, Choice, View


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
