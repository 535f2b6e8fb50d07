"""What the numbers come to, in words, each with the numbers behind it. Pure."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from moemerge.checkpoint.sizes import format_size
from moemerge.report.contents import Report
from moemerge.report.numbers import chosen_point, overlap, part_distances, placed, shares_of

_CORRESPOND = 0.8
"""Slots of siblings are surely the same when their distance is below so much of that to other slots."""
_IDLE = 0.001


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A finding.

    Attributes:
        text: A sentence or two.
        numbers: What it rests on, by name.
        section: Of the page that shows more.
    """

    text: str
    numbers: Mapping[str, float]
    section: str


def findings(report: Report) -> list[Told]:
    """Everything worth telling, the decisive first."""
    found: list[Told] = []
    for find in _FINDERS:
        found += find(report)
    return found


def _bytes(report: Report) -> Iterator[Told]:
    storage = report.storage
    if storage is None:
        return
    separate = len(storage.variants) * storage.variant_bytes
    share = storage.residual_bytes / storage.stored_bytes if storage.stored_bytes else 0.0
    verb = "will take" if report.kind == "plan" else "take"
    yield Told(
        text=f"Experts {verb} {format_size(storage.stored_bytes)} instead of {format_size(separate)}: "
        f"{storage.ratio:.2f} x those of one variant, for {len(storage.variants)}. "
        f"Residuals are {share:.0%} of that.",
        numbers={"bytes": storage.stored_bytes, "separate": separate, "ratio": storage.ratio},
        section="kept",
    )


def _quality(report: Report) -> Iterator[Told]:
    kept = {n: d["gain_recovered"] for n, d in report.quality.items() if "gain_recovered" in d}
    if kept:
        worst = min(kept, key=lambda name: kept[name])
        yield Told(
            text=f"Of what fine-tuning gained, {fmean(kept.values()):.1%} is kept on average; {worst} keeps "
            f"least, {kept[worst]:.1%}.",
            numbers=kept,
            section="quality",
        )


def _sharing(report: Report) -> Iterator[Told]:
    worst = {index: max(lost.values()) for index, lost in report.sharing.items() if lost}
    if len(worst) < 2:
        return
    least, most = (one(worst, key=lambda index: worst[index]) for one in (min, max))
    yield Told(
        text=f"Layer {least} shares best: one expert for all variants in every slot would lose "
        f"{worst[least]:.2%} of its output's energy for the worst variant. Layer {most} would lose "
        f"{worst[most]:.2%}.",
        numbers={f"layer {least}": worst[least], f"layer {most}": worst[most]},
        section="depth",
    )


def _depth(report: Report) -> Iterator[Told]:
    layers = report.similarity.layers if report.similarity else ()
    known = {layer.index: layer.same_slot_median for layer in layers if layer.same_slot_median is not None}
    if len(known) < 2:
        return
    near, far = (one(known, key=lambda index: known[index] or 0.0) for one in (min, max))
    yield Told(
        text=f"By weights, siblings are closest in layer {near} ({known[near]:.3f} of their norm) and "
        f"farthest in layer {far} ({known[far]:.3f}).",
        numbers={f"layer {near}": known[near], f"layer {far}": known[far]},
        section="depth",
    )


def _slots(report: Report) -> Iterator[Told]:
    layers = report.similarity.layers if report.similarity else ()
    both = [
        (layer.same_slot_median, layer.other_slot_median)
        for layer in layers
        if layer.same_slot_median is not None and layer.other_slot_median is not None
    ]
    if not both:
        return
    same, other = (fmean(values) for values in zip(*both, strict=True))
    corresponds = same < _CORRESPOND * other
    text = (
        f"Slots correspond: experts of one slot are {same:.2f} apart, those of different slots {other:.2f}."
        if corresponds
        else f"Slots hardly correspond: experts of one slot are {same:.2f} apart, those of different slots "
        f"{other:.2f}. Are these fine-tunes of one model?"
    )
    yield Told(text=text, numbers={"same slot": same, "other slots": other}, section="layer")


def _identical(report: Report) -> Iterator[Told]:
    if report.similarity is None:
        return
    distinct = sum(layer.distinct for layer in report.similarity.layers)
    total = len(report.similarity.layers) * report.num_slots * len(report.similarity.variants)
    if distinct < total:
        yield Told(
            text=f"{total - distinct} of {total} experts are bytewise equal to another: free to share.",
            numbers={"distinct": distinct, "experts": total},
            section="depth",
        )


def _parts(report: Report) -> Iterator[Told]:
    if report.similarity is None:
        return
    count = len(report.similarity.variants)
    by_layer = [part_distances(report.similarity.load(index), count) for index in report.layers]
    names = by_layer[0].keys() if by_layer else ()
    means = {name: fmean(found[name] for found in by_layer if name in found) for name in names}
    if len(set(means.values())) > 1:
        least, most = (one(means, key=lambda name: means[name]) for one in (min, max))
        yield Told(
            text=f"Of the parts, {most} differs most ({means[most]:.3f} of its norm) and {least} least "
            f"({means[least]:.3f}).",
            numbers=means,
            section="parts",
        )


def _routers(report: Report) -> Iterator[Told]:
    if report.similarity is None:
        return
    apart = {}
    for index in report.layers:
        distance = report.similarity.load(index).router_l2
        if distance is not None:
            apart[index] = float(distance.max())
    if not apart:
        return
    most = max(apart, key=lambda index: apart[index])
    yield Told(
        text=f"Routers differ most in layer {most}, where a slot's rows are {apart[most]:.2f} of their norm "
        f"apart; unrelated ones stand at 1.41.",
        numbers={f"layer {most}": apart[most]},
        section="routing",
    )


def _routing(report: Report) -> Iterator[Told]:
    if report.routing is None:
        return
    overlaps: dict[int, float] = {}
    idle = 0
    for index in report.layers:
        found = [shares_of(report.routing, index, name) for name in report.variants]
        shares = [one for one in found if one is not None]
        idle += sum(int((one < _IDLE).sum()) for one in shares)
        both = [overlap(a, b) for number, a in enumerate(shares) for b in shares[:number]]
        if both:
            overlaps[index] = fmean(both)
    if overlaps:
        least = min(overlaps, key=lambda index: overlaps[index])
        yield Told(
            text=f"On their own texts variants have {fmean(overlaps.values()):.0%} of their routing in "
            f"common; least in layer {least}, {overlaps[least]:.0%}.",
            numbers={"mean": fmean(overlaps.values()), f"layer {least}": overlaps[least]},
            section="routing",
        )
    if idle:
        yield Told(
            text=f"Slots that got less than {_IDLE:.1%} of a variant's tokens: {idle}. What was measured of "
            f"them rests on little text.",
            numbers={"slots": idle},
            section="routing",
        )


def _worst(report: Report) -> Iterator[Told]:
    errors = [expert for expert in placed(report.storage) if expert.error] if report.storage else []
    if not errors:
        return
    worst = max(errors, key=lambda expert: expert.error or 0.0)
    yield Told(
        text=f"The slot fitted least is {worst.slot} of layer {worst.layer} of {worst.variant}: what stands "
        f"for it ({worst.rung}) is {worst.error:.3f} of its norm away.",
        numbers={"error": worst.error or 0.0},
        section="worst",
    )


def _budget(report: Report) -> Iterator[Told]:
    chosen = chosen_point(report)
    if report.curve is None or chosen is None or not any(chosen[1].values()):
        return
    now = max(chosen[1].values())
    halves: Sequence[tuple[int, float]] = [
        (size, max(loss.values())) for size, loss in report.curve.points if loss and size <= chosen[0] / 2
    ]
    if not halves:
        return
    size, loss = halves[-1]
    yield Told(
        text=f"{format_size(size)} of experts, about half of what was chosen, would lose {loss / now:.3g} "
        f"times as much of the worst variant, as predicted.",
        numbers={"chosen": now, "half": loss},
        section="budget",
    )


_FINDERS: Sequence[Callable[[Report], Iterator[Told]]] = (
    _bytes, _quality, _sharing, _depth, _slots, _identical, _parts, _budget, _worst, _routers, _routing,
)  # fmt: skip
