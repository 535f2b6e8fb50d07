"""Family descriptions: what an architecture's config keys and tensor names mean.

A family is one JSON file beside this module. Only this module, those files and `models/` know
model types; an `if model_type ==` anywhere else means that the description lacks a field.
"""

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cache
from importlib import resources
from typing import Any, Literal

from pydantic import Field, model_validator

from moemerge.checkpoint.expert_layout import Described, ExpertRule, ExpertTensor
from moemerge.errors import Finding, UnsupportedCheckpoint

Setting = int | float | str | bool | None
Settings = dict[str, Setting]


class SettingRule(Described):
    """Where one setting stands in `config.json` and how it may differ between variants.

    Attributes:
        keys: Aliases, dots for nesting; where two are present they must agree.
        kind: Of the value in `config.json`; the setting of a list is its JSON text.
        default: Value of the reference implementation's class when no key is present.
        optional: Whether there may be none; where there is a default, null says so.
        default_from: Setting to copy, or numerator and denominator settings.
        default_if: By name of a truth value read before: the default where that is true.
        from_names: Without a key, so many experts as tensor names count.
        allowed: Values, or entries of lists, that moemerge computes; a mapping also renames values, true and
            false by these names.
        may_be_zero: Whether a number 0 means something.
        variants: `equal` must agree between variants, `warn` and `free` may differ.
    """

    keys: list[str]
    kind: Literal["integer", "number", "string", "boolean", "integers", "numbers", "strings"]
    symbol: str | None = None
    default: Setting = None
    default_from: list[str] | None = None
    default_if: dict[str, Setting] | None = None
    from_names: bool = False
    optional: bool = False
    may_be_zero: bool = False
    allowed: list[Setting] | dict[str, str] | None = None
    variants: Literal["equal", "warn", "free"] = "equal"

    @property
    def value_kind(self) -> str:
        """Kind of the setting itself: what a mapping gives, and the text of a list, are strings."""
        return "string" if isinstance(self.allowed, dict) or self.is_list else self.kind

    @property
    def is_list(self) -> bool:
        """Whether `config.json` holds a list."""
        return self.kind in ("integers", "numbers", "strings")


class RoutedRule(Described):
    """Which layers of a stack have experts.

    Attributes:
        rule: `all`; `step`, those whose index modulo a step is 1; `every`, the last of every so many;
            `from`, those from an index on.
        step: Setting that holds the step.
        count: Setting that holds a number of layers, where no step is written.
        first: Setting that holds the index of the first.
        but: Setting that lists layers without experts all the same.
    """

    rule: Literal["all", "step", "every", "from"]
    step: str | None = None
    count: str | None = None
    first: str | None = None
    but: str | None = None


class Stack(Described):
    """A run of layers; its constants fill placeholders of tensor names."""

    name: str
    layers: str
    routed: RoutedRule
    constants: dict[str, str] = Field(default_factory=dict)


class TensorPattern(Described):
    """One role; the first of `names` is the one that `export` writes.

    With `when` it is there only if that setting is true.
    """

    role: str
    shape: list[str]
    names: list[str]
    layers: Literal["all", "routed", "dense"] = "all"
    stack: str | None = None
    when: str | None = None
    tied_to: str | None = None


class RoutedLayer(Described):
    """A layer with experts.

    Attributes:
        index: Position counted through all stacks.
        stack: Name of its stack.
        block: Position within the stack.
    """

    index: int
    stack: str
    block: int


class Family(Described):
    """An architecture described once.

    Families that share a `model_type` have a `name` each, and `told_by`, a piece of tensor names that only
    that one has. Names that begin with `optional_prefix` may lack it in a checkpoint, all of them alike.
    `parity` is the largest difference of logits from those of the reference, in float32 on tiny random
    models, that the tests allow.
    """

    schema_: Literal["moemerge/family@1"] = Field(alias="schema")
    model_type: str
    name: str
    told_by: str = ""
    optional_prefix: str = ""
    title: str
    reference: str
    parity: float
    arithmetic: Literal["decoder", "encoder_decoder"]
    settings: dict[str, SettingRule]
    ignored_settings: dict[str, str]
    stacks: list[Stack]
    tensors: list[TensorPattern]
    experts: ExpertRule
    tied_copies: dict[str, str] = Field(default_factory=dict)
    dropped_tensors: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _is_named_by_its_model_type(cls, value: dict[str, Any]) -> dict[str, Any]:
        return {"name": value.get("model_type"), **value}

    def symbols(self, settings: Settings) -> dict[str, int]:
        """Values of the shape letters."""
        return {
            rule.symbol: int(value)
            for name, rule in self.settings.items()
            if rule.symbol and isinstance(value := settings[name], int)
        }

    def stack_layers(self, settings: Settings) -> Iterator[tuple[Stack, int, int]]:
        """Every layer as (stack, block within the stack, index through all stacks)."""
        index = 0
        for stack in self.stacks:
            for block in range(int(settings[stack.layers] or 0)):
                yield stack, block, index
                index += 1

    def is_routed(self, stack: Stack, block: int, settings: Settings) -> bool:
        """Whether the settings give that layer experts."""
        rule = stack.routed
        if rule.but and block in json.loads(str(settings[rule.but])):
            return False
        if rule.first:
            return block >= int(settings[rule.first] or 0)
        step = effective_step(stack, settings)
        if rule.rule == "every":
            return step > 0 and (block + 1) % step == 0
        return rule.rule == "all" or step == 1 or (step > 1 and block % step == 1)

    def routed_layers(self, settings: Settings) -> list[RoutedLayer]:
        """The layers with experts, in order."""
        return [
            RoutedLayer(index=index, stack=stack.name, block=block)
            for stack, block, index in self.stack_layers(settings)
            if self.is_routed(stack, block, settings)
        ]

    def expected_tensors(self, settings: Settings) -> Iterator[tuple[str, list[str], TensorPattern]]:
        """Every non-expert role with its possible names, exported one first, and its pattern."""
        layers = list(self.stack_layers(settings))
        for pattern in self.tensors:
            if pattern.when and not settings[pattern.when]:
                continue
            if "{layer}" in pattern.role:
                for stack, block, _ in layers:
                    if _applies(pattern, stack, routed=self.is_routed(stack, block, settings)):
                        fill = {"stack": stack.name, "layer": str(block), **stack.constants}
                        yield _fill(pattern.role, fill), [_fill(n, fill) for n in pattern.names], pattern
            elif "{stack}" in pattern.role:
                for stack in self.stacks:
                    fill = {"stack": stack.name, **stack.constants}
                    yield _fill(pattern.role, fill), [_fill(n, fill) for n in pattern.names], pattern
            else:
                yield pattern.role, pattern.names, pattern

    def expert_tensor_name(self, tensor: ExpertTensor, layer: RoutedLayer, slot: int | None = None) -> str:
        """Name of an expert tensor in one layer; `slot` is needed unless it is stacked."""
        constants = next(stack.constants for stack in self.stacks if stack.name == layer.stack)
        fill = {"stack": layer.stack, "layer": str(layer.block), "expert": str(slot), **constants}
        return _fill(tensor.name, fill)

    def part_shape(self, part: str, settings: Settings) -> tuple[int, ...]:
        """Shape of a part, from the settings."""
        return evaluate_shape(self.experts.parts[part], self.symbols(settings))

    def as_named_in(self, names: Collection[str]) -> "Family":
        """The same with the names that a checkpoint with these tensors has, with or without the prefix."""
        prefix = self.optional_prefix
        if not prefix or any(name.startswith(prefix) for name in names):
            return self
        tensors = [
            pattern.model_copy(update={"names": [name.removeprefix(prefix) for name in pattern.names]})
            for pattern in self.tensors
        ]
        return self.model_copy(update={"tensors": tensors, "experts": self.experts.without_prefix(prefix)})

    def count_experts(self, names: Iterable[str]) -> int | None:
        """Experts of a layer as tensor names count them; None where none does."""
        templates = [
            re.escape(tensor.name.removeprefix(self.optional_prefix))
            .replace(re.escape("{layer}"), r"\d+")
            .replace(re.escape("{expert}"), r"(\d{1,6})")
            for layout in self.experts.layouts
            for tensor in layout.tensors
            if "{expert}" in tensor.name
        ]
        pattern = re.compile(rf"(?:{re.escape(self.optional_prefix)})?(?:{'|'.join(templates)})")
        found = (pattern.fullmatch(name) for name in names) if templates else ()
        numbers = [int(group) for match in found if match for group in match.groups() if group]
        return max(numbers) + 1 if numbers else None

    def role_names(self, settings: Settings) -> dict[str, str]:
        """The exported tensor name of every role."""
        return {role: names[0] for role, names, _ in self.expected_tensors(settings)}


def effective_step(stack: Stack, settings: Settings) -> int:
    """Distance between routed layers, 0 for none; an explicit step wins over a count of sparse layers."""
    if stack.routed.step and isinstance(explicit := settings[stack.routed.step], int):
        return explicit
    count = int(settings[stack.routed.count] or 0) if stack.routed.count else 0
    return int(settings[stack.layers] or 0) // count if count > 0 else 0


def evaluate_shape(shape: list[str], symbols: dict[str, int]) -> tuple[int, ...]:
    """A symbolic shape such as `["H*h", "D"]` or `["c+r", "D"]` in numbers."""
    return tuple(sum(_product(term, symbols) for term in entry.split("+")) for entry in shape)


@cache
def load_families() -> dict[str, Family]:
    """Every described family by its name."""
    folder = resources.files("moemerge.checkpoint") / "families"
    families = {}
    for entry in sorted(folder.iterdir(), key=lambda item: item.name):
        if entry.name.endswith(".json"):
            family = Family.model_validate_json(entry.read_text(encoding="utf-8"))
            families[family.name] = family
    return families


def find_family(name: object, where: str) -> Family:
    """The family of that name.

    Raises:
        UnsupportedCheckpoint: No description for it; the message lists those there are.
    """
    families = load_families()
    if isinstance(name, str) and name in families:
        return families[name]
    raise _unknown("family", name, where, families)


def choose_family(model_type: object, names: Callable[[], Collection[str]], where: str) -> Family:
    """The family of a checkpoint.

    Args:
        model_type: Of its `config.json`.
        names: Of its tensors; asked for only where families share the `model_type`.
        where: How messages name it.

    Raises:
        UnsupportedCheckpoint: No description for it, or names that tell several families, or none.
    """
    candidates = [family for family in load_families().values() if family.model_type == model_type]
    if not candidates:
        raise _unknown("model_type", model_type, where, {f.model_type: f for f in load_families().values()})
    if len(candidates) == 1:
        return candidates[0]
    stored = names()
    told = [family for family in candidates if any(family.told_by in name for name in stored)]
    if len(told) == 1:
        return told[0]
    signs = ", ".join(f"{family.told_by} of {family.title}" for family in candidates)
    found = f"tensor names with {'several' if told else 'none'} of {signs}"
    raise UnsupportedCheckpoint(
        f"{where}: model_type {model_type!r} stands for several families; {found}, expected one",
        [Finding(level="error", code="FAMILY_UNCLEAR", where=where, found=found, expected="one of them")],
    )


def _unknown(what: str, found: object, where: str, known: Iterable[str]) -> UnsupportedCheckpoint:
    listed = ", ".join(known)
    return UnsupportedCheckpoint(
        f"{where}: {what} {found!r} is not supported; supported are {listed}",
        [Finding(level="error", code="FAMILY_UNKNOWN", where=where, found=repr(found), expected=listed)],
    )


def _applies(pattern: TensorPattern, stack: Stack, *, routed: bool) -> bool:
    in_stack = pattern.stack is None or pattern.stack == stack.name
    return in_stack and (pattern.layers == "all" or (pattern.layers == "routed") == routed)


def _product(term: str, symbols: dict[str, int]) -> int:
    return math.prod(int(factor) if factor.isdigit() else symbols[factor] for factor in term.split("*"))


def _fill(template: str, values: dict[str, str]) -> str:
    for key, value in values.items():
        template = template.replace("{" + key + "}", value)
    return template
