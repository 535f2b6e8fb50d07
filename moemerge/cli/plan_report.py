"""What `moemerge plan` and `moemerge merge` print of checkpoints, plans and estimates."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from moemerge.checkpoint.variants import VariantSet
    from moemerge.consolidation.estimates import Estimate
    from moemerge.consolidation.plan import ConsolidationPlan


def print_checkpoints(variants: "VariantSet") -> None:
    """What fits together, as headers tell; differences that matter are findings."""
    from moemerge.checkpoint.sizes import format_size
    from moemerge.cli.tables import print_table

    first = variants.first
    rows = [
        [
            name,
            checkpoint.label,
            checkpoint.layout,
            "+".join(checkpoint.dtype_bytes()),
            checkpoint.settings["vocab_size"],
            format_size(checkpoint.expert_bytes),
            format_size(checkpoint.other_bytes),
        ]
        for name, checkpoint in variants.variants.items()
    ]
    print_table(
        f"{len(rows)} variants fit together: {first.family.title}, {len(first.routed_layers)} routed layers "
        f"of {first.num_experts} experts",
        ["variant", "source", "layout", "dtype", "vocabulary", "experts", "all else"],
        rows,
    )


def print_estimates(variants: "VariantSet", estimates: "Sequence[Estimate]") -> None:
    """What disk and memory it will take, and what there is."""
    from moemerge.checkpoint.sizes import format_size
    from moemerge.cli.tables import print_table
    from moemerge.consolidation.estimates import resources
    from moemerge.consolidation.fitting import BATCH, TOKENS

    rows = [
        [each.budget, format_size(each.bundle_bytes), format_size(each.serving_bytes)] for each in estimates
    ]
    print_table("At most", ["budget", "bundle on disk", "memory when served"], rows)
    found = resources(variants)
    download = f"; {format_size(found.download_bytes)} to download" if found.download_bytes else ""
    typer.echo(f"Served: all variants resident, {BATCH} sequences of {TOKENS} tokens.")
    typer.echo(
        f"Merging takes {format_size(found.merge_memory)} of memory or more. Free: memory "
        f"{format_size(found.free_memory)}, disk {format_size(found.free_disk)}{download}."
    )


def print_plan(plan: "ConsolidationPlan") -> None:
    """Headline and a line per variant."""
    import statistics

    from moemerge.checkpoint.sizes import format_size
    from moemerge.cli.tables import print_table

    slots = len(plan.layers) * plan.num_slots
    experts = sum(len(layer.pool) for layer in plan.layers)
    typer.echo(
        f"{slots * len(plan.variants)} experts of {len(plan.variants)} variants -> {experts} pool experts, "
        f"{format_size(plan.stored_bytes)} ({plan.bytes_ratio:.3f} x one variant; budget {plan.budget}, "
        f"policy {plan.policy})"
    )
    if plan.predicted_damage:
        _print_rungs(plan)
        return
    rows = []
    for name in plan.variants:
        errors = [error for layer in plan.layers for error in layer.errors[name]]
        exact = sum(error == 0 for error in errors)
        rows.append([name, f"{exact} of {slots}", statistics.fmean(errors), max(errors)])
    columns = ["variant", "exact slots", "mean distance", "worst distance"]
    print_table("Distance to the pool expert, over the expert's norm", columns, rows)


def _print_rungs(plan: "ConsolidationPlan") -> None:
    """How many experts of each variant stand on which rung, and what the plan expects to lose."""
    from collections import Counter

    from moemerge.cli.tables import print_table

    rungs: dict[str, Counter[str]] = {name: Counter() for name in plan.variants}
    for layer in plan.layers:
        for expert in layer.pool:
            for name, slot in expert.members:
                residual = layer.residual((name, slot))
                own = "own" if len(expert.members) == 1 else "shared"
                code = f"{expert.code.bits}-bit" if expert.code else "exact" if own == "own" else "plain"
                added = f" + {residual}" if residual else ""
                rungs[name][f"{own} {code}{added}"] += 1
    total = sum(rungs.values(), Counter())
    slots = sum(total.values())
    rows = [
        [rung, f"{total[rung] / slots:.0%}", *(counts[rung] for counts in rungs.values())]
        for rung in sorted(total)
    ]
    print_table("Slots of each variant by how they are stored", ["stored", "share", *rungs], rows)
    losses = ", ".join(f"{name} {loss:.3g}" for name, loss in plan.predicted_damage.items())
    typer.echo(f"Predicted loss, {loss_unit(plan.evidence)}: {losses}")


def loss_unit(evidence: str) -> str:
    """What predicted losses are in."""
    from moemerge.consolidation.measured import NOISE

    if evidence == NOISE:
        return "as damage summed over layers, on noise, for there is no text"
    return "in nats per token of its text"
