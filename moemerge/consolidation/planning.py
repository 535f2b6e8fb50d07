"""Make a plan: measure every layer, let a policy decide, check the budget.

Owns the loop over layers; measured layers are given to a keeper as they come, so that a killed run
measures each layer once.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.fingerprint import fingerprint
from moemerge.checkpoint.tensors import TensorReader
from moemerge.checkpoint.variants import VariantSet
from moemerge.consolidation.budget import Budget, refuse_budget
from moemerge.consolidation.measure import Measurer, measurement_bytes
from moemerge.consolidation.plan import ConsolidationPlan, PlannedExpert, PlannedLayer, PlannedVariant
from moemerge.consolidation.policies import (
    DEFAULT_POLICY,
    POLICIES,
    Decision,
    Task,
    decided_bytes,
    relative_errors,
)
from moemerge.errors import InvalidRecipe
from moemerge.progress import Progress, Silent
from moemerge.similarity.matrices import LayerSimilarity

_DIGITS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What the user decides.

    Attributes:
        budget: Limit for the pool.
        policy: Name of an entry of `POLICIES`.
        within: Whether experts of one variant may share.
    """

    budget: Budget
    policy: str = DEFAULT_POLICY
    within: bool = False

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise InvalidRecipe(f"policy {self.policy!r} is unknown; there are {', '.join(POLICIES)}")
        if self.within and self.policy != DEFAULT_POLICY:
            raise InvalidRecipe(
                f"--within goes with --policy {DEFAULT_POLICY}; {self.policy} shares within a slot"
            )


def measure_layers(
    variants: VariantSet,
    progress: Progress | None = None,
    *,
    known: dict[int, LayerSimilarity] | None = None,
    keep: Callable[[LayerSimilarity], object] | None = None,
    max_ram: int | None = None,
) -> list[LayerSimilarity]:
    """Similarity of every routed layer.

    Args:
        variants: Local checkpoints.
        progress: Told of bytes.
        known: Layers that were measured before.
        keep: Called with each layer that is measured now.
        max_ram: Bytes of memory to stay within.
    """
    report = progress or Silent()
    indices = [layer.index for layer in variants.first.routed_layers]
    missing = [index for index in indices if index not in (known or {})]
    report.start("similarity", measurement_bytes(variants) * len(missing) // max(1, len(indices)))
    layers = dict(known or {})
    with Measurer(variants, max_ram, report) as measurer:
        for index in missing:
            layers[index] = measurer.measure(index)
            if keep:
                keep(layers[index])
    return [layers[index] for index in indices]


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
    variant_bytes = max(variant.expert_bytes for variant in variants.variants.values())
    allowed = options.budget.allowed_bytes(variant_bytes)
    task = Task(
        layers=layers,
        expert_bytes=_expert_bytes(variants.variants.values()),
        allowed_bytes=allowed,
        within=options.within,
    )
    decisions = POLICIES[options.policy](task)
    total = decided_bytes(task, decisions)
    if allowed is not None and total > allowed:
        raise refuse_budget(options.budget, allowed, total, variant_bytes)
    return ConsolidationPlan(
        schema="moemerge/plan@1",
        family=variants.first.family.model_type,
        budget=options.budget.text,
        policy=options.policy,
        within=options.within,
        num_slots=variants.first.num_experts,
        variants={name: _planned(variant, reader) for name, variant in variants.variants.items()},
        base=_planned(variants.base, reader) if variants.base else None,
        variant_bytes=variant_bytes,
        pool_bytes=total,
        allowed_bytes=allowed,
        layers=[_plan_layer(layer, decided) for layer, decided in zip(layers, decisions, strict=True)],
    )


def plan_variants(
    variants: VariantSet,
    options: PlanOptions,
    progress: Progress | None = None,
    *,
    max_ram: int | None = None,
) -> ConsolidationPlan:
    """Measure local checkpoints and decide.

    Raises:
        InvalidRecipe, NotEnoughRoom, DamagedInput: As `build_plan` and `Measurer`.
    """
    with TensorReader() as reader:
        layers = measure_layers(variants, progress, max_ram=max_ram)
        return build_plan(variants, layers, options, reader)


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
