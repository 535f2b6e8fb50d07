"""The completeness ledger of a checkpoint: each tensor has one role, each role has its tensor.

Pure: names and shapes in, places and findings out.
"""

import difflib
from dataclasses import dataclass, field

from moemerge.checkpoint.expert_layout import ExpertLayout, ExpertTensor
from moemerge.checkpoint.family import Family, RoutedLayer, Settings, evaluate_shape
from moemerge.checkpoint.headers import StoredTensor
from moemerge.errors import Finding

_SHOWN = 3


@dataclass(slots=True)
class MatchedTensors:
    """What `match_tensors` found; `unplaced` shrinks to nothing when all is well."""

    unplaced: dict[str, StoredTensor]
    where: str
    layout: str = ""
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    experts: dict[tuple[int, int], dict[str, StoredTensor]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def error(self, code: str, found: str, expected: str = "", fix: str = "") -> None:
        """Note something that makes the checkpoint unusable."""
        self.findings.append(
            Finding(level="error", code=code, where=self.where, found=found, expected=expected, fix=fix)
        )

    def set_aside(self, names: list[str]) -> None:
        """Forget tensors that an error already speaks of, so that they are not called unknown as well."""
        for name in names:
            self.unplaced.pop(name, None)

    def take(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        """Place a tensor, checking its shape."""
        tensor = self.unplaced.pop(name)
        if tensor.shape != shape:
            self.error("SHAPE_DIFFERS", f"{name} has shape {list(tensor.shape)}", str(list(shape)))
        return tensor


def match_tensors(
    stored: dict[str, StoredTensor], family: Family, settings: Settings, where: str
) -> MatchedTensors:
    """Give every stored tensor its place.

    Args:
        stored: All tensors of the checkpoint by name.
        family: Description to match against.
        settings: Complete settings of the checkpoint.
        where: How findings name the checkpoint.

    Returns:
        Places, and an error finding for everything unknown, missing, ambiguous or of another shape.
    """
    family = family.as_named_in(stored)
    matched = MatchedTensors(unplaced=dict(stored), where=where)
    known = _place_roles(matched, family, settings)
    known += _place_experts(matched, family, settings)
    _drop_copies(matched, family, settings)
    if matched.unplaced:
        names = list(matched.unplaced)
        shown = "; ".join(f"{name}{nearest(name, known)}" for name in names[:_SHOWN])
        rest = f"; and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        matched.error(
            "TENSOR_UNKNOWN",
            f"{len(names)} tensors are not part of family {family.name}: {shown}{rest}",
            fix="A tensor that is not understood would be lost; nothing is skipped quietly",
        )
    return matched


def _place_roles(matched: MatchedTensors, family: Family, settings: Settings) -> list[str]:
    symbols = family.symbols(settings)
    known: list[str] = []
    missing: list[str] = []
    is_untied = False
    for role, names, pattern in family.expected_tensors(settings):
        known += names
        present = [name for name in names if name in matched.unplaced]
        if len(present) > 1:
            matched.error("TENSOR_AMBIGUOUS", f"{role} is there under two names: {', '.join(present)}")
        if present:
            matched.tensors[role] = matched.take(present[0], evaluate_shape(pattern.shape, symbols))
        elif not (pattern.tied_to and settings["tied_head"]):
            missing.append(names[0])
            is_untied = is_untied or pattern.tied_to is not None
    if missing:
        hint = " (untied head: tie_word_embeddings is false)" if is_untied else ""
        matched.error(
            "TENSOR_MISSING",
            f"{len(missing)} expected tensors are missing; first {missing[0]}{hint}",
            fix="Is the download complete, and does config.json belong to these weights?",
        )
    return known


def _place_experts(matched: MatchedTensors, family: Family, settings: Settings) -> list[str]:
    layers = family.routed_layers(settings)
    num_experts = int(settings["num_experts"] or 0)
    if not layers or not num_experts:
        matched.error("NO_EXPERTS", f"{len(layers)} routed layers with {num_experts} experts each")
        return []
    names = {
        layout.name: _expert_names(family, layout, layers, num_experts) for layout in family.experts.layouts
    }
    counts = {
        layout: sum(name in matched.unplaced for name in expected) for layout, expected in names.items()
    }
    used = [layout for layout, count in counts.items() if count]
    if len(used) != 1:
        found = "in two layouts at once" if used else "in no known layout"
        matched.error(
            "EXPERT_LAYOUT",
            f"experts are stored {found}",
            "one of " + ", ".join(names),
            fix="Is the download complete, and does config.json belong to these weights?",
        )
        known = [name for expected in names.values() for name in expected]
        matched.set_aside(known)
        return known
    matched.layout = used[0]
    expected = names[matched.layout]
    if missing := [name for name in expected if name not in matched.unplaced]:
        matched.error(
            "EXPERT_MISSING",
            f"{len(expected) - len(missing)} of {len(expected)} expert tensors; first missing {missing[0]}",
            fix="Is the download complete? Layers with fewer experts than others are not supported",
        )
        matched.set_aside(expected)
        return expected
    layout = next(layout for layout in family.experts.layouts if layout.name == matched.layout)
    for layer in layers:
        for tensor in layout.tensors:
            _place_expert_tensor(matched, family, settings, layer, tensor)
    return expected


def _expert_names(
    family: Family, layout: ExpertLayout, layers: list[RoutedLayer], num_experts: int
) -> list[str]:
    return [
        family.expert_tensor_name(tensor, layer, slot)
        for layer in layers
        for tensor in layout.tensors
        for slot in (range(1) if tensor.is_stacked else range(num_experts))
    ]


def _place_expert_tensor(
    matched: MatchedTensors, family: Family, settings: Settings, layer: RoutedLayer, tensor: ExpertTensor
) -> None:
    num_experts = int(settings["num_experts"] or 0)
    part_shape = family.part_shape(tensor.holds[0], settings)
    shape = tensor.shape(part_shape, num_experts)
    for first in range(1 if tensor.is_stacked else num_experts):
        stored = matched.take(family.expert_tensor_name(tensor, layer, first), shape)
        if stored.shape == shape:
            for slot, part, place in tensor.places(stored, part_shape, num_experts):
                matched.experts.setdefault((layer.index, first + slot), {})[part] = place


def _drop_copies(matched: MatchedTensors, family: Family, settings: Settings) -> None:
    for name, role in family.tied_copies.items():
        # When the original is missing, its copy is not what is wrong, and TENSOR_MISSING says so.
        if name in matched.unplaced:
            original = matched.tensors.get(role, matched.unplaced[name])
            matched.take(name, original.shape)
            matched.dropped[name] = f"copy of {role}"
    for template, reason in family.dropped_tensors.items():
        for _, block, _ in family.stack_layers(settings):
            name = template.replace("{layer}", str(block))
            if name in matched.unplaced:
                matched.unplaced.pop(name)
                matched.dropped[name] = reason


def nearest(name: str, known: list[str]) -> str:
    """The known name that is most like one that is not known, for messages; empty when none is."""
    close = difflib.get_close_matches(name, known[:2000], n=1, cutoff=0.6)
    return f" (nearest known: {close[0]})" if close else ""
