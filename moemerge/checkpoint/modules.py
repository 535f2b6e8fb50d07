"""Modules of a model by the names that the reference library gives them, whatever the layout on disk.

Pure: a family's description and settings in, names out.
"""

from dataclasses import dataclass

from moemerge.checkpoint.checkpoint import Checkpoint, expert_name
from moemerge.checkpoint.expert_layout import ExpertTensor
from moemerge.checkpoint.family import RoutedLayer


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A tensor of all experts of a layer.

    Attributes:
        parameter: Its name.
        layer: Whose experts it holds.
        parts: Which outputs are those of each part.
        shape: Outputs and inputs of one expert, whatever their order on disk.
    """

    parameter: str
    layer: RoutedLayer
    parts: dict[str, slice]
    shape: tuple[int, int]


def name_modules(base: Checkpoint) -> tuple[dict[str, str], set[str]]:
    """Canonical tensor name by module, and the tensors whose rows the vocabulary counts.

    Tensors that are not a module's `weight`, such as biases, stand under their full name.
    """
    family, settings = base.family, base.settings
    modules, resizable = dict[str, str](), set[str]()
    for role, names, pattern in family.expected_tensors(settings):
        modules |= {name.removesuffix(".weight"): role for name in names}
        if pattern.shape[0] == family.settings["vocab_size"].symbol:
            resizable.add(role)
    for layout in family.experts.layouts:
        for tensor in (tensor for tensor in layout.tensors if tensor.is_canonical):
            (part,) = tensor.holds
            for layer in family.routed_layers(settings):
                for slot in range(base.num_experts):
                    name = family.expert_tensor_name(tensor, layer, slot).removesuffix(".weight")
                    modules[name] = expert_name(layer.index, slot, part)
    if prefix := family.optional_prefix:
        modules |= {name.removeprefix(prefix): place for name, place in modules.items()}
        modules |= {f"{prefix}{name.removeprefix(prefix)}": place for name, place in modules.items()}
    return modules, resizable


def name_stacks(base: Checkpoint) -> dict[str, list[Stack]]:
    """Tensors that hold the experts of a layer stacked, by the module whose parameters they are."""
    family, stacks = base.family, dict[str, list[Stack]]()
    for layout in family.experts.layouts:
        for tensor in (tensor for tensor in layout.tensors if tensor.axes[0] == "expert"):
            sizes = family.part_shape(tensor.holds[0], base.settings)
            if len(sizes) != 2:
                continue  # biases have no factors
            parts, shape = outputs_of_parts(tensor, sizes[0]), (len(tensor.holds) * sizes[0], sizes[1])
            for layer in family.routed_layers(base.settings):
                name = family.expert_tensor_name(tensor, layer)
                stack = Stack(parameter=name, layer=layer, parts=parts, shape=shape)
                stacks.setdefault(name.rpartition(".")[0], []).append(stack)
    return stacks


def outputs_of_parts(tensor: ExpertTensor, rows: int) -> dict[str, slice]:
    """The outputs of each part: those of one part after those of another, or in turn."""
    count = len(tensor.holds)
    if count == 1:
        return {tensor.holds[0]: slice(None)}
    if tensor.order.index("part") < tensor.order.index("row"):
        return {part: slice(n * rows, (n + 1) * rows) for n, part in enumerate(tensor.holds)}
    return {part: slice(n, None, count) for n, part in enumerate(tensor.holds)}
