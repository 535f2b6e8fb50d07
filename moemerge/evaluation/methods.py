"""The methods that are compared: from variants and a budget to a plan that the pipeline carries out.

To add one: a function and an entry in `METHODS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from moemerge.checkpoint.tensors import TensorReader
from moemerge.checkpoint.variants import VariantSet, open_variants
from moemerge.consolidation.budget import Budget
from moemerge.consolidation.evidence import Evidence, slot_groups
from moemerge.consolidation.measured import Statistics, ladder_for
from moemerge.consolidation.plan import ConsolidationPlan, PlannedExpert, PlannedLayer
from moemerge.consolidation.planning import MEASURED, PlanOptions, plan_of_layers
from moemerge.consolidation.policies import POLICIES, Decision, Task
from moemerge.errors import InvalidRecipe
from moemerge.evaluation.averaging import SummedStatistics, write_average
from moemerge.evaluation.rungs import Pools, Rung, fill, measure_rungs, pool_rungs, sizes_of
from moemerge.refs import FolderRef
from moemerge.similarity.matrices import LayerSimilarity

OURS = "ours"
AVERAGE = "average"


@dataclass(frozen=True, slots=True, kw_only=True)
class Materials:
    """What methods plan from.

    Attributes:
        variants: Local checkpoints with their base.
        layers: Similarity of every routed layer.
        statistics: Calibration of the variants.
        reader: Open reader.
        folder: For checkpoints that a method makes.
        rungs: Those that were measured, by operator.
    """

    variants: VariantSet
    layers: list[LayerSimilarity]
    statistics: Statistics
    reader: TensorReader
    folder: Path
    rungs: dict[str, list[Rung]] = field(default_factory=dict)

    @property
    def evidence(self) -> Evidence:
        """What operators and codes are given."""
        return Evidence(variants=self.variants, statistics=self.statistics, reader=self.reader)

    @property
    def variant_bytes(self) -> int:
        """Expert bytes of the largest variant, the unit of ratios."""
        return max(variant.expert_bytes for variant in self.variants.variants.values())

    def residual_rungs(self, operator: str) -> list[Rung]:
        """Pairs of codes for a shared expert and residuals, measured once."""
        if operator not in self.rungs:
            self.rungs[operator] = measure_rungs(self.evidence, self.layers, operator)
        return self.rungs[operator]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What a method asks the pipeline to do.

    Attributes:
        variants: What is to be merged.
        decide: A plan, or options to make one from.
        statistics: Calibration of what is merged.
        serves: Name in the bundle by variant that is measured.
        repair: Whether variants' own tensors may be fitted to what is stored.
    """

    variants: VariantSet
    decide: ConsolidationPlan | PlanOptions
    statistics: Statistics
    serves: Mapping[str, str]
    repair: bool = False


Method = Callable[[Materials, Budget], Prepared]
"""Raises `InvalidRecipe` when the budget cannot be kept."""


def ours(materials: Materials, budget: Budget) -> Prepared:
    """The policy that decides by measured cost, and repair."""
    return replace(unrepaired(materials, budget), repair=True)


def unrepaired(materials: Materials, budget: Budget) -> Prepared:
    """The policy that decides by measured cost, without repair: what pools and residuals do alone."""
    return _prepared(materials, PlanOptions(budget=budget, policy=MEASURED))


def own_copies(materials: Materials, budget: Budget) -> Prepared:
    """Every variant's own experts in few bits, with the same codes: what is missing is sharing alone."""
    pools = {
        layer.layer: [
            PlannedExpert(members=refs, operator="copy", sources=refs[:1])
            for owners in slot_groups(layer)
            for refs in owners
        ]
        for layer in materials.layers
    }
    return _filled(materials, budget, pools, pool_rungs(ladder_for(materials.variants)[0]), "copies")


def shared_pool(policy: str, operator: str, materials: Materials, budget: Budget) -> Prepared:
    """A pool without residuals: as large as a policy makes it, and below one variant's bytes in few bits."""
    allowed = budget.allowed_bytes(materials.variant_bytes)
    is_plain = allowed is None or allowed >= materials.variant_bytes
    pools = _pools(materials, policy, operator, allowed if is_plain else 0)
    rungs = pool_rungs(ladder_for(materials.variants)[0])
    return _filled(materials, budget, pools, rungs[-1:] if is_plain else rungs, operator)


def with_residuals(policy: str, operator: str, materials: Materials, budget: Budget) -> Prepared:
    """One pool expert for every slot, and a residual for everyone, in the codes that do least damage."""
    pools = _pools(materials, policy, operator, 0)
    name = f"{operator}+residuals"
    return _filled(materials, budget, pools, materials.residual_rungs(operator), name)


def average(materials: Materials, budget: Budget) -> Prepared:
    """The plain average of whole models in place of all of them; below one variant's bytes in few bits."""
    folder = materials.folder / "averaged"
    if not folder.exists():
        write_average(list(materials.variants.variants.values()), folder)
    averaged = open_variants({AVERAGE: FolderRef(folder)})
    names = tuple(materials.variants.variants)
    made = Materials(
        variants=averaged,
        layers=[],
        statistics=SummedStatistics(materials.statistics, names),
        reader=materials.reader,
        folder=materials.folder,
    )
    slots = range(averaged.first.num_experts)
    pools = {
        layer.index: [
            PlannedExpert(members=[(AVERAGE, slot)], operator="copy", sources=[(AVERAGE, slot)])
            for slot in slots
        ]
        for layer in averaged.first.routed_layers
    }
    rungs = pool_rungs(ladder_for(averaged)[0])
    return _filled(made, budget, pools, rungs, AVERAGE, dict.fromkeys(names, AVERAGE))


METHODS: dict[str, Method] = {
    OURS: ours,
    "unrepaired": unrepaired,
    "copies": own_copies,
    "base+residuals": partial(with_residuals, "mean", "base"),
    "mean+residuals": partial(with_residuals, "mean", "mean"),
    "pick+residuals": partial(with_residuals, "pick", "copy"),
    "pick": partial(shared_pool, "pick", "copy"),
    "medoid": partial(shared_pool, "medoid", "medoid"),
    "mean": partial(shared_pool, "mean", "mean"),
    "ties": partial(shared_pool, "mean", "ties"),
    "dare": partial(shared_pool, "mean", "dare"),
    "regmean": partial(shared_pool, "mean", "regmean"),
    AVERAGE: average,
}


def _pools(materials: Materials, policy: str, operator: str, allowed_bytes: int | None) -> Pools:
    """What a policy lets share, made by an operator of all members; with `copy` the policy says of whom."""
    plain_bytes = sizes_of(materials.evidence).plain_bytes
    task = Task(
        layers=materials.layers,
        expert_bytes=np.full(materials.layers[0].num_experts, plain_bytes, dtype=np.int64),
        allowed_bytes=allowed_bytes,
    )
    decided = POLICIES[policy](task)
    return {
        layer.layer: [_expert(layer, decision, operator) for decision in decisions]
        for layer, decisions in zip(materials.layers, decided, strict=True)
    }


def _expert(layer: LayerSimilarity, decision: Decision, operator: str) -> PlannedExpert:
    # Operators that take one member take the first.
    order = [decision.sources[0], *(member for member in decision.members if member != decision.sources[0])]
    members = [(ref.variant, ref.slot) for ref in map(layer.ref, order)]
    if operator == "copy" or len({int(layer.identity[member]) for member in order}) == 1:
        return PlannedExpert(members=members, operator="copy", sources=members[:1])
    return PlannedExpert(members=members, operator=operator, sources=members)


def _filled(
    materials: Materials,
    budget: Budget,
    pools: Pools,
    rungs: list[Rung],
    name: str,
    serves: Mapping[str, str] | None = None,
) -> Prepared:
    allowed = budget.allowed_bytes(materials.variant_bytes)
    if allowed is None:
        raise InvalidRecipe(f"budget {budget.text} is no limit that methods could be compared at")
    sizes = sizes_of(materials.evidence)
    try:
        layers = fill(pools, rungs, sizes, allowed)
    except InvalidRecipe as error:
        least = sum(sizes.of(rungs[0], len(expert.members)) for pool in pools.values() for expert in pool)
        ratio = least / materials.variant_bytes
        raise InvalidRecipe(f"does not fit: takes {ratio:.3f}x at least ({error})") from error
    return _prepared(materials, _plan(materials, layers, budget, name), serves)


def _plan(materials: Materials, layers: list[PlannedLayer], budget: Budget, name: str) -> ConsolidationPlan:
    identity = materials.statistics.identity
    return plan_of_layers(materials.variants, layers, budget, name, identity, materials.reader)


def _prepared(
    materials: Materials, decide: ConsolidationPlan | PlanOptions, serves: Mapping[str, str] | None = None
) -> Prepared:
    return Prepared(
        variants=materials.variants,
        decide=decide,
        statistics=materials.statistics,
        serves=serves or {name: name for name in materials.variants.variants},
    )
