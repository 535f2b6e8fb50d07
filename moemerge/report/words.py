"""What a report says first: what its numbers are evidence of, and the few numbers that matter. Pure."""

from statistics import fmean

from moemerge.checkpoint.sizes import format_size
from moemerge.report.contents import Report
from moemerge.report.numbers import placed


def evidence(report: Report) -> list[str]:
    """Which signals were computed, on what, and which were not; a sentence each."""
    return [*_of_weights(report), *_of_decisions(report), *_of_quality(report), *report.notes]


def headline(report: Report) -> list[tuple[str, str]]:
    """The few numbers that matter, each with what it is."""
    layers, slots, count = len(report.layers), report.num_slots, len(report.variants)
    found = [("variants", str(count)), ("layers x slots", f"{layers} x {slots}")]
    storage, similarity = report.storage, report.similarity
    if storage:
        found += [
            ("experts", f"{storage.num_experts} -> {storage.num_pool_experts} pool experts"),
            (
                "expert bytes",
                f"{format_size(count * storage.variant_bytes)} -> {format_size(storage.stored_bytes)}",
            ),
            ("bytes ratio", f"{storage.ratio:.3f} x one variant"),
        ]
        errors = [expert.error for expert in placed(storage) if expert.error is not None]
        if errors:
            exact = sum(error == 0 for error in errors) / len(errors)
            found += [
                ("exact slots", f"{exact:.0%}"),
                ("error, mean and worst", f"{fmean(errors):.3f}, {max(errors):.3f}"),
            ]
    kept = [damage["gain_recovered"] for damage in report.quality.values() if "gain_recovered" in damage]
    if kept:
        found.append(("gain recovered, mean and worst", f"{fmean(kept):.3f}, {min(kept):.3f}"))
    if similarity:
        medians = [
            layer.same_slot_median for layer in similarity.layers if layer.same_slot_median is not None
        ]
        others = [
            layer.other_slot_median for layer in similarity.layers if layer.other_slot_median is not None
        ]
        if medians:
            found.append(("same slot apart", f"{fmean(medians):.3f}"))
        if others:
            found.append(("other slots apart", f"{fmean(others):.3f}"))
    return found


def title(report: Report) -> str:
    """What was opened, in a line."""
    kinds = {"bundle": "bundle", "plan": "consolidation plan", "similarity": "similarity"}
    return f"{report.name}: {kinds[report.kind]} of {report.family}, {', '.join(report.variants)}"


def _of_weights(report: Report) -> list[str]:
    if report.similarity is None:
        return ["Distances between weights are not here."]
    names = ", ".join(report.similarity.meanings)
    found = [
        f"Weights of all experts were compared exactly, every expert with every other of its layer: {names}."
    ]
    found += [f"Not computed: {name} ({why})." for name, why in report.similarity.not_computed.items()]
    found.append("Similar weights do not prove equal behaviour.")
    return found


def _of_decisions(report: Report) -> list[str]:
    decided = report.storage.evidence if report.storage else None
    found = []
    if decided == "weights":
        found.append("Decided by distances between weights; no text was looked at.")
    elif decided == "noise":
        found.append("Decided by outputs on noise, since no calibration text was given.")
    elif decided:
        tokens = report.routing.tokens if report.routing else {}
        told = ", ".join(f"{name} {count}" for name, count in tokens.items())
        found.append(
            f"Decided by outputs on each variant's own calibration text{told and f' (tokens: {told})'}."
        )
    elif report.storage:
        found.append("What decided is not kept.")
    if report.routing is None:
        found.append("Routing on text was not measured.")
    return found


def _of_quality(report: Report) -> list[str]:
    if not report.storage:
        return []
    measured = [name for name in report.variants if "measured" in report.quality.get(name, {})]
    if measured:
        return [f"Loss of likelihood was measured on text held back from calibration: {', '.join(measured)}."]
    if report.storage.predicted:
        return [
            "Losses are predictions; the quality of what was written was not measured. See moemerge eval."
        ]
    return ["Quality on text was not measured. See moemerge eval."]
