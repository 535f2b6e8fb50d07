"""Plans and manifests as a report's values: what is kept of every expert."""

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

from moemerge.bundle.manifest import CodeSpec, Manifest, map_bytes
from moemerge.errors import DamagedInput
from moemerge.report.contents import PLAIN_BITS, Rung, Storage, StoredLayer
from moemerge.report.files import Plan, PlannedLayer

Pool = Sequence[Sequence[tuple[str, int]]]
Shapes = Mapping[str, Sequence[int]]


def storage_of_plan(plan: Plan, path: Path) -> Storage:
    """What a plan will keep.

    Raises:
        DamagedInput: A slot has no pool expert, or several.
    """
    variants = tuple(plan.variants)
    layers = []
    for layer in sorted(plan.layers, key=lambda layer: layer.index):
        _check_members(layer, variants, plan.num_slots, path)
        pool = [[(name, slot) for name, slot in expert.members] for expert in layer.pool]
        codes = [expert.code for expert in layer.pool]
        layers.append(
            StoredLayer(
                index=layer.index,
                pool=pool,
                operators=[expert.operator for expert in layer.pool],
                codes=_shown(codes),
                rungs=rungs_of(pool, codes, layer.residuals, variants, plan.num_slots),
                errors={n: e for n, e in layer.errors.items() if len(e) == plan.num_slots},
            )
        )
    stored = plan.pool_bytes + plan.residual_bytes
    maps = map_bytes(len(variants), len(layers), plan.num_slots)
    return Storage(
        layers=layers,
        variants=variants,
        num_slots=plan.num_slots,
        variant_bytes=plan.variant_bytes,
        pool_bytes=plan.pool_bytes,
        residual_bytes=plan.residual_bytes,
        ratio=(stored + maps) / plan.variant_bytes,
        budget=plan.budget,
        policy=plan.policy,
        evidence=plan.evidence,
        predicted=plan.predicted_damage,
    )


def storage_of_bundle(manifest: Manifest, plan: Plan | None) -> Storage:
    """What a bundle keeps; the plan it was made from adds operators and evidence."""
    variants = tuple(manifest.variants)
    planned = {layer.index: layer for layer in plan.layers} if plan else {}
    layers = []
    for layer in sorted(manifest.layers, key=lambda layer: layer.index):
        pool: list[list[tuple[str, int]]] = [[] for _ in range(layer.num_experts)]
        for name, entry in manifest.variants.items():
            for slot, place in enumerate(entry.maps[layer.index]):
                pool[place].append((name, slot))
        codes = layer.codes or [None] * layer.num_experts
        residuals = {
            n: e.residuals[layer.index] for n, e in manifest.variants.items() if layer.index in e.residuals
        }
        layers.append(
            StoredLayer(
                index=layer.index,
                pool=pool,
                operators=_operators(planned.get(layer.index), pool),
                codes=_shown(codes),
                rungs=rungs_of(pool, codes, residuals, variants, manifest.num_slots, manifest.parts),
                errors={name: entry.errors[layer.index] for name, entry in manifest.variants.items()},
            )
        )
    damage = {name: entry.damage or {} for name, entry in manifest.variants.items()}
    return Storage(
        layers=layers,
        variants=variants,
        num_slots=manifest.num_slots,
        variant_bytes=manifest.variant_bytes,
        pool_bytes=manifest.pool_bytes,
        residual_bytes=manifest.residual_bytes,
        ratio=manifest.bytes_ratio,
        budget=manifest.provenance.budget,
        policy=manifest.provenance.policy,
        evidence=plan.evidence if plan else None,
        predicted={name: one["predicted"] for name, one in damage.items() if "predicted" in one},
    )


def rungs_of(
    pool: Pool,
    codes: Sequence[CodeSpec | None],
    residuals: Mapping[str, Sequence[CodeSpec | None]],
    variants: Sequence[str],
    num_slots: int,
    shapes: Shapes | None = None,
) -> dict[str, list[Rung]]:
    """How every expert of a layer is kept, by variant and slot."""
    found: dict[tuple[str, int], Rung] = {}
    for members, code in zip(pool, codes, strict=True):
        for name, slot in members:
            of_slots = residuals.get(name, ())
            residual = of_slots[slot] if slot < len(of_slots) else None
            own, added = bits_of(code, shapes), bits_of(residual, shapes) if residual else 0.0
            found[name, slot] = Rung(
                members=len(members),
                pool=str(code) if code else None,
                residual=str(residual) if residual else None,
                bits=None if own is None or added is None else own / len(members) + added,
            )
    return {name: [found[name, slot] for slot in range(num_slots)] for name in variants}


def bits_of(code: CodeSpec | None, shapes: Shapes | None) -> float | None:
    """Bits a weight takes, scales included; of thin factors None where shapes are not known."""
    if code is None:
        return float(PLAIN_BITS)
    matrices = [(shape[0], shape[1]) for shape in (shapes or {}).values() if len(shape) == 2]
    if matrices:
        return 8 * sum(code.part_bytes(*shape) for shape in matrices) / sum(map(prod, matrices))
    if code.rank is not None:
        return None
    return code.bits + (16 / code.group if code.group else 0.0)


def _operators(layer: PlannedLayer | None, pool: Pool) -> list[str]:
    """By pool expert; none where variants joined or left after the plan was made."""
    if layer is None or [sorted(e.members) for e in layer.pool] != [sorted(members) for members in pool]:
        return []
    return [expert.operator for expert in layer.pool]


def _shown(codes: Sequence[CodeSpec | None]) -> list[str | None]:
    return [str(code) if code else None for code in codes]


def _check_members(layer: PlannedLayer, variants: Sequence[str], num_slots: int, path: Path) -> None:
    members = [member for expert in layer.pool for member in expert.members]
    # Lengths first: a hostile number of slots is not counted through.
    whole = len(members) == len(variants) * num_slots and set(members) == {
        (name, slot) for name in variants for slot in range(num_slots)
    }
    if not whole or any(len(codes) != num_slots for codes in layer.residuals.values()):
        raise DamagedInput(
            f"{path}: layer {layer.index}: {len(members)} members, expected each of {num_slots} slots of "
            f"{len(variants)} variants once"
        )
