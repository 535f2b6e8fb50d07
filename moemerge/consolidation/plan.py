"""The consolidation plan: every decision, before any tensor is written. Deterministic and readable."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moemerge.bundle.manifest import RelativeError, VariantName
from moemerge.bundle.target import check_writable, writing
from moemerge.checkpoint.writer import write_text
from moemerge.errors import InvalidRecipe, NotFound

Member = tuple[str, int]


class _Plan(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PlannedExpert(_Plan):
    """One pool expert.

    Attributes:
        members: (variant, slot) of every expert it stands for.
        operator: `copy` takes `source` unchanged, `mean` averages `sources`.
        sources: The experts it is made from; one for `copy`. Equal experts appear once for each
            member in a mean, so that every member counts the same.
    """

    members: list[Member] = Field(min_length=1)
    operator: Literal["copy", "mean"]
    sources: list[Member] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> "PlannedExpert":
        if self.operator == "copy" and len(self.sources) != 1:
            raise ValueError("a copy has one source")
        if not set(self.sources) <= set(self.members):
            raise ValueError("a pool expert is made from its own members")
        return self


class PlannedLayer(_Plan):
    """The pool of one layer.

    Attributes:
        index: Counted through all stacks.
        pool: Pool experts in stored order.
        errors: Per variant and slot, distance to the pool expert over the expert's norm.
    """

    index: int = Field(ge=0)
    pool: list[PlannedExpert] = Field(min_length=1)
    errors: dict[str, list[RelativeError]]

    def expert_map(self, variant: str) -> list[int]:
        """Pool index for each slot of a variant."""
        slots = {
            slot: index for index, e in enumerate(self.pool) for name, slot in e.members if name == variant
        }
        return [slots[slot] for slot in range(len(slots))]


class PlannedVariant(_Plan):
    """What the plan was made for.

    Attributes:
        source: Reference as given, or repository and commit.
        fingerprint: See `checkpoint.fingerprint`.
    """

    source: str
    fingerprint: str


class ConsolidationPlan(_Plan):
    """All decisions of one consolidation.

    Attributes:
        variant_bytes: Expert bytes of the largest variant, the unit of ratios.
        pool_bytes: Expert bytes that will be stored.
        allowed_bytes: What the budget allows; None for `exact`.
    """

    schema_: Literal["moemerge/plan@1"] = Field(alias="schema")
    family: str
    budget: str
    policy: str
    within: bool
    num_slots: int = Field(gt=0)
    variants: dict[VariantName, PlannedVariant] = Field(min_length=1)
    base: PlannedVariant | None
    variant_bytes: int = Field(gt=0)
    pool_bytes: int = Field(gt=0)
    allowed_bytes: int | None
    layers: list[PlannedLayer] = Field(min_length=1)

    @property
    def bytes_ratio(self) -> float:
        """Pool bytes over the expert bytes of one variant."""
        return self.pool_bytes / self.variant_bytes

    def layer(self, index: int) -> PlannedLayer:
        """The layer with that index through all stacks."""
        return next(layer for layer in self.layers if layer.index == index)

    @model_validator(mode="after")
    def _every_slot_once(self) -> "ConsolidationPlan":
        if self.allowed_bytes is not None and self.pool_bytes > self.allowed_bytes:
            raise ValueError(f"pool_bytes {self.pool_bytes} exceed allowed_bytes {self.allowed_bytes}")
        for layer in self.layers:
            members = sorted(member for expert in layer.pool for member in expert.members)
            # Lengths first: a hostile number of slots is not counted through.
            if len(members) != len(self.variants) * self.num_slots or members != sorted(
                (name, slot) for name in self.variants for slot in range(self.num_slots)
            ):
                raise ValueError(f"layer {layer.index}: each slot of each variant must have one pool expert")
            if layer.errors.keys() != self.variants.keys() or any(
                len(errors) != self.num_slots for errors in layer.errors.values()
            ):
                raise ValueError(f"layer {layer.index}: each slot of each variant must have one error")
        return self


def dump_plan(plan: ConsolidationPlan) -> str:
    """The plan as JSON, the same text for the same plan."""
    return plan.model_dump_json(indent=1, by_alias=True) + "\n"


def check_plan_target(path: Path) -> None:
    """Make sure that a plan can be written, and that it would replace nothing but a plan.

    Raises:
        InvalidRecipe: There is a file that is no plan.
        NotEnoughRoom: It cannot be written.
    """
    check_writable(path)
    if path.is_file() and path.stat().st_size:
        try:
            read_plan(path)
        except InvalidRecipe as error:
            raise InvalidRecipe(
                f"{path} exists and is no plan; remove it or choose another output"
            ) from error


def write_plan(plan: ConsolidationPlan, path: Path) -> None:
    """Write the plan as JSON, in place of one that may be there.

    Raises:
        NotEnoughRoom: It cannot be written.
    """
    with writing(path):
        write_text(path, dump_plan(plan))


def read_plan(path: Path) -> ConsolidationPlan:
    """A plan from a file.

    Raises:
        NotFound: No such file.
        InvalidRecipe: Not a plan, or of another schema version.
    """
    try:
        return ConsolidationPlan.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise NotFound(f"{path}: no such plan") from error
    except OSError as error:
        raise InvalidRecipe(f"{path}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'plan'}: {problem['msg']}"
            for problem in error.errors()[:3]
        )
        raise InvalidRecipe(
            f"{path}: not a consolidation plan ({problems}). Make it with `moemerge plan`"
        ) from error
