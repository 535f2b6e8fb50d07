"""Make a plan: have every layer measured, let a policy decide, check the budget."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.fingerprint import fingerprint
from moemerge.checkpoint.tensors import TensorReader
from moemerge.checkpoint.variants import VariantSet
from moemerge.consolidation.budget import LEAST, Budget, refuse_budget
from moemerge.consolidation.evidence import LayerRecord
from moemerge.consolidation.fitting import Device, budget_of
from moemerge.consolidation.gate import Gate, check_gate
from moemerge.consolidation.ladder import code_size, residual_size
from moemerge.consolidation.layers import measure_costs, measure_layers, passing_steps
from moemerge.consolidation.measured import (
    NoiseStatistics,
    Statistics,
    decide,
    ladder_for,
    prices_of,
)
from moemerge.consolidation.plan import ConsolidationPlan, PlannedExpert, PlannedLayer, PlannedVariant
from moemerge.consolidation.policies import (
    CLUSTER,
    POLICIES,
    Decision,
    Task,
    relative_errors,
)
from moemerge.errors import IncompatibleInputs, InvalidRecipe
from moemerge.execution import Executor, Local
from moemerge.progress import Progress
from moemerge.similarity.matrices import LayerSimilarity

MEASURED = "measured"
"""The policy that decides by measured cost, with codes and residuals."""
_DIGITS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What the user decides.

    Attributes:
        budget: Limit for the pool.
        policy: Name of an entry of `POLICIES`, or `measured`.
        within: Whether experts of one variant may share.
        gate: What is to be kept of what fine-tuning gained.
        device: What the budget is to leave room on, in place of one.
    """

    budget: Budget = LEAST
    policy: str = MEASURED
    within: bool = False
    gate: Gate = field(default_factory=Gate)
    device: Device | None = None

    def __post_init__(self) -> None:
        known = [*POLICIES, MEASURED]
        if self.policy not in known:
            raise InvalidRecipe(f"policy {self.policy!r} is unknown; there are {', '.join(known)}")
        if self.within and self.policy != CLUSTER:
            raise InvalidRecipe(f"--within goes with --policy {CLUSTER}; {self.policy} shares within a slot")
        if self.device is not None and self.budget != LEAST:
            raise InvalidRecipe("give --budget or --fit, not both")
        if self.budget == LEAST and self.device is None and self.gate.is_open:
            raise InvalidRecipe("give a limit (--budget, --fit) or what is to be kept (--quality, --floor)")
        if not self.gate.is_open and self.budget.is_exact:
            raise InvalidRecipe("--budget exact keeps everything; leave out --quality and --floor")
        if not self.gate.is_open and self.policy != MEASURED:
            raise InvalidRecipe(f"--quality and --floor go with --policy {MEASURED}, not {self.policy}")

    @property
    def is_measured(self) -> bool:
        """Whether costs are to be measured: not for a budget that keeps everything."""
        return self.policy == MEASURED and not self.budget.is_exact

    def for_variants(self, variants: VariantSet) -> "PlanOptions":
        """The same with a budget in bytes where a device decides it.

        Raises:
            InvalidRecipe: The device leaves nothing for experts.
        """
        if self.device is None:
            return self
        return replace(self, budget=budget_of(self.device, variants), device=None)


def build_plan(
    variants: VariantSet,
    layers: list[LayerSimilarity],
    options: PlanOptions,
    reader: TensorReader,
) -> ConsolidationPlan:
    """Decide the pool of every layer.

    Args:
        variants: Local checkpoints.
        layers: Similarity of every routed layer.
        options: Budget and policy.
        reader: Open reader, for fingerprints.

    Raises:
        InvalidRecipe: The budget is below the least possible.
    """
    variant_bytes = _variant_bytes(variants)
    allowed = options.budget.allowed_bytes(variant_bytes)
    task = Task(
        layers=layers,
        expert_bytes=_expert_bytes(variants.variants.values()),
        allowed_bytes=allowed,
        within=options.within,
    )
    decisions = POLICIES[CLUSTER if options.policy == MEASURED else options.policy](task)
    planned = [_plan_layer(layer, decided) for layer, decided in zip(layers, decisions, strict=True)]
    total = _stored_bytes(planned, variants)
    if allowed is not None and total > allowed:
        can_share_more = options.policy == CLUSTER and not options.within
        raise refuse_budget(options.budget, allowed, total, variant_bytes, can_share_more=can_share_more)
    return _plan_of(variants, options, reader, variant_bytes=variant_bytes, pool_bytes=total, layers=planned)


def build_measured_plan(
    variants: VariantSet,
    records: list[LayerRecord],
    options: PlanOptions,
    statistics: Statistics,
    reader: TensorReader,
    *,
    correction: Mapping[str, float] | None = None,
    emphasis: Mapping[str, float] | None = None,
) -> ConsolidationPlan:
    """Decide every layer by what was measured of it.

    Args:
        variants: Local checkpoints.
        records: What was measured, of every routed layer.
        options: Budget, and what is to be kept.
        statistics: What it was measured on.
        reader: Open reader, for fingerprints.
        correction, emphasis: See `spending.Prices`.

    Raises:
        InvalidRecipe: The budget is below the least possible.
    """
    variant_bytes = _variant_bytes(variants)
    allowed = options.budget.allowed_bytes(variant_bytes)
    prices = prices_of(variants, statistics, correction, emphasis)
    decided = decide(variants, records, allowed, prices, options.gate)
    # Costs count every plain expert as the widest; those of narrower variants take less.
    pool_bytes = _stored_bytes(decided.layers, variants)
    total = pool_bytes + decided.residual_bytes
    if allowed is not None and total > allowed:
        raise refuse_budget(options.budget, allowed, total, variant_bytes, can_share_more=False)
    return _plan_of(
        variants,
        options,
        reader,
        variant_bytes=variant_bytes,
        pool_bytes=pool_bytes,
        residual_bytes=decided.residual_bytes,
        predicted_damage={name: float(f"{loss:.{_DIGITS}g}") for name, loss in decided.predicted.items()},
        evidence=statistics.identity,
        layers=decided.layers,
    )


def plan_of_layers(
    variants: VariantSet,
    layers: list[PlannedLayer],
    budget: Budget,
    policy: str,
    evidence: str,
    reader: TensorReader,
) -> ConsolidationPlan:
    """A plan of what was decided elsewhere, with the bytes that it takes.

    Args:
        variants: Local checkpoints.
        layers: Decisions for every routed layer.
        budget: Limit that they keep.
        policy: What the plan calls their origin.
        evidence: What operators and codes will be given; see `ConsolidationPlan`.
        reader: Open reader, for fingerprints.

    Raises:
        InvalidRecipe: They take more bytes than the budget has.
    """
    variant_bytes = _variant_bytes(variants)
    pool_bytes, residual_bytes = _stored_bytes(layers, variants), _residual_bytes(layers, variants)
    allowed = budget.allowed_bytes(variant_bytes)
    if allowed is not None and pool_bytes + residual_bytes > allowed:
        least = pool_bytes + residual_bytes
        raise refuse_budget(budget, allowed, least, variant_bytes, can_share_more=False)
    return _plan_of(
        variants,
        PlanOptions(budget=budget),
        reader,
        variant_bytes=variant_bytes,
        pool_bytes=pool_bytes,
        residual_bytes=residual_bytes,
        evidence=evidence,
        layers=layers,
    ).model_copy(update={"policy": policy})


def plan_variants(
    variants: VariantSet,
    options: PlanOptions,
    progress: Progress | None = None,
    *,
    statistics: Statistics | None = None,
    max_ram: int | None = None,
    executor: Executor | None = None,
    beside: Path | None = None,
) -> ConsolidationPlan:
    """Measure local checkpoints and decide.

    Args:
        variants: Local checkpoints.
        options: Budget and policy.
        progress: Told of bytes.
        statistics: Calibration, for the policy that measures costs; noise by default.
        max_ram: Bytes of memory to stay within.
        executor: Does the work; this process by default.
        beside: Where files may lie on the way, as in `passing_steps`.

    Raises:
        InvalidRecipe, NotEnoughRoom, DamagedInput: As `build_plan` and `Measurer`.
    """
    options, found = options.for_variants(variants), statistics or NoiseStatistics(variants)
    executor = executor or Local(max_ram)
    check_gate(options.gate, found.gained)
    with TensorReader() as reader, passing_steps(beside) as steps:
        layers = measure_layers(variants, progress, steps=steps, max_ram=max_ram, executor=executor)
        if not options.is_measured:
            return build_plan(variants, layers, options, reader)
        records = measure_costs(layers, variants, found, progress, steps=steps, executor=executor)
        return build_measured_plan(variants, records, options, found, reader)


def check_plan(plan: ConsolidationPlan, variants: VariantSet, reader: TensorReader) -> None:
    """Make sure that a plan was made for these checkpoints and says of them what is so.

    Raises:
        InvalidRecipe: It is for variants of other names, or its bytes do not add up.
        IncompatibleInputs: It is for checkpoints of another geometry or with other weights.
    """
    if list(plan.variants) != list(variants.variants):
        raise InvalidRecipe(
            f"the plan is for variants {', '.join(plan.variants)}, given are {', '.join(variants.variants)}"
        )
    first = variants.first
    indices = [layer.index for layer in first.routed_layers]
    found = (plan.family, plan.num_slots, [layer.index for layer in plan.layers])
    if found != (first.family.name, first.num_experts, indices):
        raise IncompatibleInputs(
            "the plan is for checkpoints of another family, with other layers or another number of experts"
        )
    for name, planned in plan.variants.items():
        if fingerprint(variants.variants[name], reader) != planned.fingerprint:
            raise IncompatibleInputs(
                f"variant {name}: {variants.variants[name].label} has other weights than the plan was made "
                f"for ({planned.source}). Make a new plan with `moemerge plan`"
            )
    sizes = (
        _stored_bytes(plan.layers, variants),
        _residual_bytes(plan.layers, variants),
        _variant_bytes(variants),
    )
    if sizes != (plan.pool_bytes, plan.residual_bytes, plan.variant_bytes):
        raise InvalidRecipe(
            f"the plan says pool_bytes {plan.pool_bytes}, residual_bytes {plan.residual_bytes} and "
            f"variant_bytes {plan.variant_bytes}, its pools and these checkpoints have {sizes[0]}, "
            f"{sizes[1]} and {sizes[2]}. Make a new plan with `moemerge plan`"
        )


def _stored_bytes(layers: list[PlannedLayer], variants: VariantSet) -> int:
    """Bytes of all pool experts; each part is as wide as the widest it is made from."""
    _, shapes = ladder_for(variants)
    total = 0
    for layer in layers:
        for planned in layer.pool:
            sources = [variants.variants[name].experts[layer.index, slot] for name, slot in planned.sources]
            plain = sum(max(source[part].nbytes for source in sources) for part in sources[0])
            total += code_size(planned.code, shapes, plain)
    return total


def _residual_bytes(layers: list[PlannedLayer], variants: VariantSet) -> int:
    _, shapes = ladder_for(variants)
    specs = [code for layer in layers for codes in layer.residuals.values() for code in codes]
    return sum(residual_size(code, shapes) for code in specs)


def _variant_bytes(variants: VariantSet) -> int:
    return max(variant.expert_bytes for variant in variants.variants.values())


def _plan_of(
    variants: VariantSet, options: PlanOptions, reader: TensorReader, *, variant_bytes: int, **decided: Any
) -> ConsolidationPlan:
    """A plan for these variants, with fields of `ConsolidationPlan` that were decided."""
    return ConsolidationPlan(
        schema="moemerge/plan@2",
        family=variants.first.family.name,
        budget=options.budget.text,
        policy=options.policy,
        within=options.within,
        num_slots=variants.first.num_experts,
        variants={name: _planned(variant, reader) for name, variant in variants.variants.items()},
        base=_planned(variants.base, reader) if variants.base else None,
        variant_bytes=variant_bytes,
        allowed_bytes=options.budget.allowed_bytes(variant_bytes),
        **decided,
    )


def _planned(checkpoint: Checkpoint, reader: TensorReader) -> PlannedVariant:
    return PlannedVariant(source=checkpoint.repository.origin, fingerprint=fingerprint(checkpoint, reader))


def _plan_layer(layer: LayerSimilarity, decisions: list[Decision]) -> PlannedLayer:
    errors = relative_errors(layer, decisions).reshape(len(layer.variants), layer.num_slots)
    return PlannedLayer(
        index=layer.layer,
        pool=[
            PlannedExpert(
                members=[_member(layer, index) for index in decision.members],
                operator="copy" if len(decision.sources) == 1 else "mean",
                sources=[_member(layer, index) for index in decision.sources],
            )
            for decision in decisions
        ],
        errors={
            name: [float(f"{error:.{_DIGITS}g}") for error in row]
            for name, row in zip(layer.variants, errors, strict=True)
        },
    )


def _member(layer: LayerSimilarity, index: int) -> tuple[str, int]:
    ref = layer.ref(index)
    return ref.variant, ref.slot


def _expert_bytes(variants: Iterable[Checkpoint]) -> NDArray[np.int64]:
    """[N] bytes of an expert; the same in every layer of a variant, or the largest of them."""
    sizes = [
        max(
            sum(part.nbytes for part in variant.experts[layer.index, slot].values())
            for layer in variant.routed_layers
        )
        for variant in variants
        for slot in range(variant.num_experts)
    ]
    return np.array(sizes, dtype=np.int64)
