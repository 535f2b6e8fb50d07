"""A merge as a user asks for it: which variants, how much is stored, what costs are measured on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from moemerge.calibration.passes import DEFAULT_DTYPE, DEFAULT_TOKENS, check_dtype
from moemerge.consolidation.budget import LEAST, parse_budget
from moemerge.consolidation.fitting import Device
from moemerge.consolidation.gate import Gate
from moemerge.consolidation.plan import ConsolidationPlan
from moemerge.consolidation.planning import MEASURED, PlanOptions
from moemerge.consolidation.policies import CLUSTER
from moemerge.consolidation.quality import RepairOptions
from moemerge.errors import InvalidRecipe


@dataclass(frozen=True, slots=True, kw_only=True)
class EvidenceOptions:
    """Text or calibration, or neither.

    Attributes:
        texts: `NAME=FILE` of every variant.
        tokens: Most tokens of each text.
        dtype: Of the computation on text.
        calibration: Folder that `moemerge calibrate` has written.
    """

    texts: tuple[str, ...] = ()
    tokens: int = DEFAULT_TOKENS
    dtype: str = DEFAULT_DTYPE
    calibration: Path | None = None

    def __post_init__(self) -> None:
        if self.texts and self.calibration:
            raise InvalidRecipe("give text or a calibration, not both")
        check_dtype(self.dtype)

    @classmethod
    def of(
        cls,
        texts: Sequence[str] | None,
        tokens: int | None,
        dtype: str | None,
        calibration: Path | None,
    ) -> Self:
        """From options that may be missing.

        Raises:
            InvalidRecipe: They do not go together.
        """
        if tokens is not None and not texts:
            raise InvalidRecipe("tokens go with text")
        if dtype is not None and not texts:
            raise InvalidRecipe("a dtype goes with text; a calibration has its own")
        return cls(
            texts=tuple(texts or ()),
            tokens=tokens or DEFAULT_TOKENS,
            dtype=dtype or DEFAULT_DTYPE,
            calibration=calibration,
        )

    @property
    def is_given(self) -> bool:
        """Whether there is any."""
        return bool(self.texts) or self.calibration is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeTask:
    """What to merge and how to decide.

    Attributes:
        sources: `NAME=REF` of every variant.
        base: Reference of the common ancestor.
        decision: Options for a plan, or a plan.
        evidence: What costs are measured on.
        repair: What may be done to variants' own tensors.
        max_ram: Memory to stay within, as written.
    """

    sources: list[str]
    base: str | None
    decision: PlanOptions | ConsolidationPlan
    evidence: EvidenceOptions = field(default_factory=EvidenceOptions)
    repair: RepairOptions = field(default_factory=RepairOptions)
    max_ram: str | None = None

    def __post_init__(self) -> None:
        if self.repair.heal and not self.evidence.is_given:
            raise InvalidRecipe("--heal goes with --text or --calibration: it distils on text")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much is stored, as a user writes it; see `PlanOptions`."""

    budget: str | None = None
    fit: str | None = None
    fit_batch: int | None = None
    fit_tokens: int | None = None
    quality: float | None = None
    floor: float | None = None

    @property
    def is_given(self) -> bool:
        """Whether anything is said."""
        return any(value is not None for value in (self.budget, self.fit, self.quality, self.floor))

    def device(self) -> Device | None:
        """The device to fit on.

        Raises:
            InvalidRecipe: Not a size, or details without one.
        """
        details = {"batch": self.fit_batch, "tokens": self.fit_tokens}
        known = {name: value for name, value in details.items() if value is not None}
        if self.fit is None and known:
            raise InvalidRecipe("--fit-batch and --fit-tokens go with --fit")
        return None if self.fit is None else Device(text=self.fit, **known)


def options_of(budget: str | Limits, policy: str | None = None, *, within: bool = False) -> PlanOptions:
    """Plan options from what a user wrote; costs are measured unless a policy is named.

    Raises:
        InvalidRecipe: A value that cannot be right.
    """
    limits = Limits(budget=budget) if isinstance(budget, str) else budget
    parsed = LEAST if limits.budget is None else parse_budget(limits.budget)
    looks_at_weights = within or parsed.is_exact
    return PlanOptions(
        budget=parsed,
        policy=policy or (CLUSTER if looks_at_weights else MEASURED),
        within=within,
        gate=Gate(floor=limits.floor, mean=limits.quality),
        device=limits.device(),
    )
