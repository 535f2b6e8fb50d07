"""The consolidation plan: every decision, before any tensor is written. Deterministic and readable."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from moemerge.bundle.manifest import CodeSpec, RelativeError, VariantName, map_bytes
from moemerge.bundle.target import check_writable, writing
from moemerge.checkpoint.writer import write_text
from moemerge.consolidation.operators import OPERATORS
from moemerge.errors import InvalidRecipe, NotFound, list_problems

Member = tuple[str, int]


def _check_operator(name: str) -> str:
    if name not in OPERATORS:
        raise ValueError(f"operator {name!r} is unknown; there are {', '.join(OPERATORS)}")
    return name


OperatorName = Annotated[str, AfterValidator(_check_operator)]


PLAN = "plan.json"
WEIGHTS = "weights"
"""Evidence of plans that look at distances between weights alone."""


class _Plan(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PlannedExpert(_Plan):
    """One pool expert.

    Attributes:
        members: (variant, slot) of every expert it stands for.
        operator: Name of an entry of `operators.OPERATORS`; `copy` takes its only source unchanged.
        sources: The experts it is made from; one for `copy`. Equal experts appear once for each
            member in a mean, so that every member counts the same.
        code: How it is stored; None for the dtype of its sources.
    """

    members: list[Member] = Field(min_length=1)
    operator: OperatorName
    sources: list[Member] = Field(min_length=1)
    code: CodeSpec | None = None

    @model_validator(mode="after")
    def _check(self) -> "PlannedExpert":
        if self.operator == "copy" and len(self.sources) != 1:
            raise ValueError("a copy has one source")
        if self.code is not None and self.code.kind != "bits":
            raise ValueError("a pool expert is stored in codes of bits, or plainly")
        if not set(self.sources) <= set(self.members):
            raise ValueError("a pool expert is made from its own members")
        return self


class PlannedLayer(_Plan):
    """The pool of one layer.

    Attributes:
        index: Counted through all stacks.
        pool: Pool experts in stored order.
        errors: Per variant and slot, distance to the pool expert over the expert's norm, before rounding;
            empty where operators and codes decide, whose result is measured while it is written.
        residuals: Per variant and slot, how what is missing of the expert is stored; no entry for variants
            without any.
    """

    index: int = Field(ge=0)
    pool: list[PlannedExpert] = Field(min_length=1)
    errors: dict[str, list[RelativeError]] = Field(default_factory=dict)
    residuals: dict[str, list[CodeSpec | None]] = Field(default_factory=dict)

    @property
    def has_codes(self) -> bool:
        """Whether anything in it is stored other than plainly."""
        return any(e.code for e in self.pool) or any(map(any, self.residuals.values()))

    def residual(self, member: Member) -> CodeSpec | None:
        """How a member's residual is stored, if it has one."""
        codes = self.residuals.get(member[0])
        return codes[member[1]] if codes else None

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
        pool_bytes: Bytes of pool experts that will be stored.
        residual_bytes: Bytes of residuals that will be stored.
        predicted_damage: By variant: what the plan expects to lose, in the unit of its evidence.
        evidence: What decided: `weights`, `noise`, or the calibration that was used.
        allowed_bytes: What the budget allows; None for `exact`.
    """

    schema_: Literal["moemerge/plan@2"] = Field(alias="schema")
    family: str
    budget: str
    policy: str
    within: bool
    num_slots: int = Field(gt=0)
    variants: dict[VariantName, PlannedVariant] = Field(min_length=1)
    base: PlannedVariant | None
    variant_bytes: int = Field(gt=0)
    pool_bytes: int = Field(gt=0)
    residual_bytes: int = Field(default=0, ge=0)
    allowed_bytes: int | None
    predicted_damage: dict[str, float] = Field(default_factory=dict)
    evidence: str = WEIGHTS
    layers: list[PlannedLayer] = Field(min_length=1)

    @property
    def bytes_ratio(self) -> float:
        """Expert bytes, pool, residuals and maps, over the expert bytes of one variant."""
        maps = map_bytes(len(self.variants), len(self.layers), self.num_slots)
        return (self.stored_bytes + maps) / self.variant_bytes

    @property
    def stored_bytes(self) -> int:
        """Bytes of pools and residuals, which the budget limits."""
        return self.pool_bytes + self.residual_bytes

    @property
    def has_codes(self) -> bool:
        """Whether anything is stored other than plainly."""
        return any(layer.has_codes for layer in self.layers)

    def layer(self, index: int) -> PlannedLayer:
        """The layer with that index through all stacks."""
        return next(layer for layer in self.layers if layer.index == index)

    @model_validator(mode="after")
    def _every_slot_once(self) -> "ConsolidationPlan":
        if self.allowed_bytes is not None and self.stored_bytes > self.allowed_bytes:
            raise ValueError(f"{self.stored_bytes} bytes exceed allowed_bytes {self.allowed_bytes}")
        for layer in self.layers:
            members = sorted(member for expert in layer.pool for member in expert.members)
            # Lengths first: a hostile number of slots is not counted through.
            if len(members) != len(self.variants) * self.num_slots or members != sorted(
                (name, slot) for name in self.variants for slot in range(self.num_slots)
            ):
                raise ValueError(f"layer {layer.index}: each slot of each variant must have one pool expert")
            has_errors = layer.errors or self.evidence == WEIGHTS
            if (has_errors and layer.errors.keys() != self.variants.keys()) or any(
                len(errors) != self.num_slots for errors in layer.errors.values()
            ):
                raise ValueError(f"layer {layer.index}: each slot of each variant must have one error")
            if not layer.residuals.keys() <= self.variants.keys() or any(
                len(codes) != self.num_slots for codes in layer.residuals.values()
            ):
                raise ValueError(f"layer {layer.index}: residuals must be said for each slot of a variant")
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
        raise InvalidRecipe(
            f"{path}: not a consolidation plan ({list_problems(error)}). Make it with `moemerge plan`"
        ) from error
