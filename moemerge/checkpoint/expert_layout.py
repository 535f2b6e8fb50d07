"""How the experts of a layer lie on disk: which tensors hold which parts, and in which order of entries.

Pure: shapes and byte ranges, no bytes. Knows nothing of settings and of how tensors are named.
"""

import math
from collections.abc import Iterator
from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator

from moemerge.checkpoint.headers import StoredTensor

_PART_AXES = ("row", "column")


class Described(BaseModel):
    """A piece of a family description: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ExpertTensor(Described):
    """A tensor holding one or more parts of equal shape, of one expert or of all.

    Attributes:
        name: With `{expert}` if there is one tensor for each expert of a layer.
        holds: The parts, in order.
        axes: What each dimension counts: `expert`, `part`, and `row` and `column` of a part, or products
            of them, the slowest first. Without `expert` it is a tensor of one expert.
    """

    name: str
    holds: list[str]
    axes: list[str] = ["part*row", "column"]

    @model_validator(mode="after")
    def _tells_experts_apart_once(self) -> Self:
        if "{expert}" in self.name and self.is_stacked:
            raise ValueError(f"{self.name}: experts are told apart by name and by axis")
        if self.is_stacked and self.order[0] != "expert":
            raise ValueError(f"{self.name}: axes begin with expert")
        return self

    @property
    def order(self) -> list[str]:
        """What its entries are counted by, the slowest first."""
        return [factor for axis in self.axes for factor in axis.split("*")]

    @property
    def is_canonical(self) -> bool:
        """Whether it is one part of one expert, as all else takes it."""
        inner = [factor for factor in self.order if factor in _PART_AXES]
        return len(self.holds) == 1 and not self.is_stacked and inner == list(_PART_AXES[: len(inner)])

    @property
    def is_stacked(self) -> bool:
        """Whether the tensor holds all experts of a layer."""
        return "expert" in self.order

    def shape(self, part_shape: tuple[int, ...], num_experts: int) -> tuple[int, ...]:
        """Shape on disk of a tensor whose parts have this shape."""
        sizes = self._sizes(part_shape, num_experts)
        return tuple(math.prod(sizes[factor] for factor in axis.split("*")) for axis in self.axes)

    def places(
        self, stored: StoredTensor, part_shape: tuple[int, ...], num_experts: int
    ) -> Iterator[tuple[int, str, StoredTensor]]:
        """Slot, part and place of all that the tensor holds; slot 0 where it holds one expert."""
        if self.is_canonical:
            yield 0, self.holds[0], stored
            return
        sizes = self._sizes(part_shape, num_experts)
        strides = {
            factor: math.prod(sizes[later] for later in self.order[number + 1 :])
            for number, factor in enumerate(self.order)
        }
        inner = tuple(strides[axis] for axis in _PART_AXES[: len(part_shape)])
        for slot in range(num_experts if self.is_stacked else 1):
            for number, part in enumerate(self.holds):
                first = slot * strides.get("expert", 0) + number * strides.get("part", 0)
                name = f"{stored.name}[{slot}]" if self.is_stacked else stored.name
                name += f".{part}" if len(self.holds) > 1 else ""
                yield slot, part, stored.view(name, first, part_shape, inner)

    def _sizes(self, part_shape: tuple[int, ...], num_experts: int) -> dict[str, int]:
        inner = dict(zip(_PART_AXES, part_shape, strict=False))
        return {"expert": num_experts, "part": len(self.holds), **inner}


class ExpertLayout(Described):
    """One way in which the experts of a layer lie on disk."""

    name: str
    tensors: list[ExpertTensor]


class ExpertRule(Described):
    """Parts of an expert with their symbolic shapes, and the layouts; the first is exported."""

    parts: dict[str, list[str]]
    layouts: list[ExpertLayout]

    def without_prefix(self, prefix: str) -> Self:
        """The same with names that lack what they begin with."""
        layouts = [
            layout.model_copy(
                update={
                    "tensors": [
                        tensor.model_copy(update={"name": tensor.name.removeprefix(prefix)})
                        for tensor in layout.tensors
                    ]
                }
            )
            for layout in self.layouts
        ]
        return self.model_copy(update={"layouts": layouts})
