"""What a merge and its bundle will take, as headers tell: before anything is downloaded, read or written."""

from dataclasses import dataclass
from pathlib import Path

import psutil

from moemerge.checkpoint.disk import free_bytes
from moemerge.checkpoint.variants import VariantSet
from moemerge.consolidation.fitting import beside_experts
from moemerge.consolidation.measure import least_memory
from moemerge.consolidation.plan import ConsolidationPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a bundle takes at most: equal tensors of several variants are stored once.

    Attributes:
        budget: As a user writes it.
        bundle_bytes: On disk.
        serving_bytes: In memory, with every variant resident and a cache of keys and values.
    """

    budget: str
    bundle_bytes: int
    serving_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What there is for a merge, and what it takes on the way, in bytes.

    Attributes:
        download_bytes: Weights that are not here yet.
        merge_memory: The least that comparing experts takes.
        free_memory: Now.
        free_disk: Of the working directory's disk.
    """

    download_bytes: int
    merge_memory: int
    free_memory: int
    free_disk: int


def estimate(variants: VariantSet, plan: ConsolidationPlan | None = None) -> list[Estimate]:
    """What the plan's bundle takes; without a plan, one of one variant's bytes, and one that keeps all."""
    models = variants.variants.values()
    one, every = max(m.expert_bytes for m in models), sum(m.expert_bytes for m in models)
    sizes = {plan.budget: plan.stored_bytes} if plan else {"1x": one, "exact": every}
    others = sum(model.other_bytes for model in models)
    beside = beside_experts(variants)
    return [
        Estimate(budget=budget, bundle_bytes=size + others, serving_bytes=size + beside)
        for budget, size in sizes.items()
    ]


def resources(variants: VariantSet) -> Resources:
    """What there is, and what a merge takes on the way."""
    remote = [model for model in variants.checkpoints if not model.is_local]
    return Resources(
        download_bytes=sum(model.expert_bytes + model.other_bytes for model in remote),
        merge_memory=least_memory(variants),
        free_memory=psutil.virtual_memory().available,
        free_disk=free_bytes(Path.cwd()),
    )
