"""Modules of a model by the names that the reference library gives them, whatever the layout on disk.

Pure: a family's description and settings in, names out.
"""

from dataclasses import dataclass

from moemerge.checkpoint.checkpoint import Checkpoint, expert_name
from moemerge.checkpoint.family import RoutedLayer


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A tensor of all experts of a layer: its name, parts in the order of rows, and shape of one expert."""

    parameter: str
    layer: RoutedLayer
    parts: dict[str, int]
    shape: tuple[int, int]


def name_modules(base: Checkpoint) -> tuple[dict[str, str], set[str]]:
    """Canonical tensor name by module, and the tensors whose rows the vocabulary counts."""
    family, settings = base.family, base.settings
    modules, resizable = dict[str, str](), set[str]()
    for role, names, pattern in family.expected_tensors(settings):
        modules |= {name.removesuffix(".weight"): role for name in names}
        if pattern.shape[0] == family.settings["vocab_size"].symbol:
            resizable.add(role)
    for layout in family.experts.layouts:
        for tensor in (t for t in layout.tensors if not t.is_stacked and len(t.holds) == 1):
            (part,) = tensor.holds
            for layer in family.routed_layers(settings):
                for slot in range(base.num_experts):
                    name = family.expert_tensor_name(tensor, layer, slot).removesuffix(".weight")
                    modules[name] = expert_name(layer.index, slot, part)
    return modules, resizable


def name_stacks(base: Checkpoint) -> dict[str, list[Stack]]:
    """Tensors that hold the experts of a layer stacked, by the module whose parameters they are."""
    family, stacks = base.family, dict[str, list[Stack]]()
    for layout in family.experts.layouts:
        for tensor in (t for t in layout.tensors if t.is_stacked):
            shapes = {part: family.part_shape(part, base.settings) for part in tensor.holds}
            if any(len(shape) != 2 for shape in shapes.values()):
                continue  # biases have no factors
            rows = {part: shape[0] for part, shape in shapes.items()}
            shape = (sum(rows.values()), next(iter(shapes.values()))[1])
            for layer in family.routed_layers(base.settings):
                name = family.expert_tensor_name(tensor, layer)
                stack = Stack(parameter=name, layer=layer, parts=rows, shape=shape)
                stacks.setdefault(name.rpartition(".")[0], []).append(stack)
    return stacks
