"""Random checkpoints of a shape and the bundle of them, kept in a folder and reused.

A base, and variants whose non-expert tensors are the base's plus noise. With `expert_distance` 0 all
variants have the same experts, as any bundle of one pool expert per slot has: the bundle then takes the
expert bytes of one variant, and the checkpoints are the models that it serves, bit for bit.
"""

import json
import os
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moemerge.bench.shapes import Shape
from moemerge.bundle.target import building
from moemerge.checkpoint.disk import check_disk
from moemerge.checkpoint.family import evaluate_shape
from moemerge.checkpoint.fingerprint import fingerprint
from moemerge.checkpoint.tensors import TensorReader, bytes_of
from moemerge.checkpoint.variants import VariantSet, open_variants
from moemerge.checkpoint.weights import INDEX
from moemerge.checkpoint.writer import TensorToWrite, write_tensors, write_text
from moemerge.consolidation.pipeline import merge
from moemerge.consolidation.plan import ConsolidationPlan, PlannedExpert, PlannedLayer, PlannedVariant
from moemerge.progress import Progress, Silent
from moemerge.refs import FolderRef

# Counts changes of what is drawn: a folder of an older version is not reused.
_VERSION = 1
_EXPERTS = "model-00001-of-00002.safetensors"
_OTHERS = "model-00002-of-00002.safetensors"
_NOISE = 0.1
_NORM_SPREAD = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """What was generated.

    Attributes:
        bundle: Of all variants, with one pool expert per slot.
        checkpoints: Folder of each variant's stand-alone model.
    """

    bundle: Path
    checkpoints: dict[str, Path]


def generate(
    shape: Shape, num_variants: int, work: Path, *, seed: int = 0, progress: Progress | None = None
) -> Generated:
    """The bundle and checkpoints of a shape, made unless `work` has them.

    Args:
        shape: What to generate.
        num_variants: How many variants.
        work: Folder of everything generated; each piece is complete or not there.
        seed: Of the weights.
        progress: Told of bytes.

    Raises:
        NotEnoughRoom: The disk is too small.
        Busy: Another process generates the same.
    """
    folder = work / f"{shape.name}-v{_VERSION}-{seed}"
    names = [f"variant-{number}" for number in range(num_variants)]
    bundle = folder / f"{num_variants}-variants.moe"
    checkpoints = {name: folder / name for name in names}
    missing = [name for name in names if not checkpoints[name].is_dir()]
    _check_room(shape, folder, len(missing), is_first=len(missing) == num_variants, bundle=bundle)
    for number, name in enumerate(names):
        if name in missing:
            experts_of = checkpoints[names[0]] if number else None
            write_variant(shape, checkpoints[name], seed, number, experts_of=experts_of, progress=progress)
    if not bundle.is_dir():
        variants = open_variants({name: FolderRef(path) for name, path in checkpoints.items()})
        merge(variants, bundle, _plan_shared(variants), progress=progress)
    return Generated(bundle=bundle, checkpoints=checkpoints)


def write_variant(
    shape: Shape,
    target: Path,
    seed: int,
    number: int,
    *,
    experts_of: Path | None = None,
    distance: float = _NOISE,
    expert_distance: float = 0.0,
    progress: Progress | None = None,
) -> None:
    """A checkpoint whose weights are a common random base plus noise.

    Args:
        shape: Of the model.
        target: Folder to create.
        seed: Of the base.
        number: Of the variant; the noise depends on it.
        experts_of: A checkpoint with the same experts, whose file is used again.
        distance: Norm of the noise of non-expert tensors over the norm of the base.
        expert_distance: The same for experts.
        progress: Told of bytes.
    """
    report = progress or Silent()
    others = list(_other_tensors(shape, seed, number, distance))
    experts = list(_expert_tensors(shape, seed, number, expert_distance))
    report.start(f"generate {target.name}", _total(others) + (0 if experts_of else _total(experts)))
    with building(target) as folder:
        if experts_of:
            _link(experts_of / _EXPERTS, folder / _EXPERTS)
        else:
            write_tensors(folder / _EXPERTS, experts, {"format": "pt"}, report.advance)
        write_tensors(folder / _OTHERS, others, {"format": "pt"}, report.advance)
        places = {tensor.name: _EXPERTS for tensor in experts} | {t.name: _OTHERS for t in others}
        index = {"metadata": {"total_size": _total(others) + _total(experts)}, "weight_map": places}
        write_text(folder / INDEX, json.dumps(index, indent=1))
        write_text(folder / "config.json", json.dumps(shape.config, indent=2))


def _check_room(shape: Shape, folder: Path, num_missing: int, *, is_first: bool, bundle: Path) -> None:
    experts = _total(list(_expert_tensors(shape, 0, 0, 0.0)))
    others = _total(list(_other_tensors(shape, 0, 0, 0.0)))
    needed = num_missing * others + (experts if is_first else 0)
    if not bundle.is_dir():
        needed += experts + num_missing * others
    if needed:
        check_disk(folder, needed, f"generating {shape.name}")


def _total(tensors: list[TensorToWrite]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _link(source: Path, target: Path) -> None:
    """Let a second name stand for the same file, or copy it where the disk has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _other_tensors(shape: Shape, seed: int, number: int, distance: float) -> Iterator[TensorToWrite]:
    family, settings = shape.family, shape.settings
    symbols = family.symbols(settings)
    for role, (name, *_), pattern in family.expected_tensors(settings):
        if pattern.tied_to and settings["tied_head"]:
            continue
        sizes = evaluate_shape(pattern.shape, symbols)
        yield _drawn(name, sizes, _scale(role, sizes, shape), seed, number, distance)


def _expert_tensors(shape: Shape, seed: int, number: int, distance: float) -> Iterator[TensorToWrite]:
    family, settings = shape.family, shape.settings
    for layer in family.routed_layers(settings):
        for slot in range(int(settings["num_experts"] or 0)):
            for tensor in family.experts.layouts[0].tensors:
                name = family.expert_tensor_name(tensor, layer, slot)
                sizes = family.part_shape(tensor.holds[0], settings)
                yield _drawn(name, sizes, sizes[-1] ** -0.5, seed, number, distance)


def _scale(role: str, sizes: tuple[int, ...], shape: Shape) -> float | None:
    """Standard deviation that keeps the size of what a matrix multiplies; None for a norm, which is near 1.

    Router scores then have a standard deviation of about 1, which spreads tokens over all experts.
    """
    if len(sizes) == 1:
        return None
    if role.endswith("attention.query") and shape.family.arithmetic == "encoder_decoder":
        # This architecture does not divide attention scores by the root of the head's size.
        return float((sizes[-1] * int(shape.settings["head_size"] or 1)) ** -0.5)
    return float(sizes[-1] ** -0.5)


def _drawn(
    name: str, sizes: tuple[int, ...], scale: float | None, seed: int, number: int, distance: float
) -> TensorToWrite:
    """A tensor of the base plus a variant's noise, drawn when it is written; depends on its name alone."""

    def chunks() -> Iterator[memoryview]:
        value = _normal(sizes, f"{seed}:{name}")
        if distance:
            value += distance * _normal(sizes, f"{seed}:{number}:{name}")
        value = 1 + _NORM_SPREAD * value if scale is None else value * scale
        yield bytes_of(value.to(torch.bfloat16))

    return TensorToWrite(name=name, dtype="BF16", shape=sizes, chunks=chunks)


def _normal(sizes: tuple[int, ...], key: str) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return torch.empty(sizes).normal_(generator=generator)


def _plan_shared(variants: VariantSet) -> ConsolidationPlan:
    """One pool expert per slot, the same for all variants. Nothing is measured: the experts are equal."""
    first, names = variants.first, list(variants.variants)
    slots = range(first.num_experts)
    with TensorReader() as reader:
        planned = {
            name: PlannedVariant(source=c.repository.origin, fingerprint=fingerprint(c, reader))
            for name, c in variants.variants.items()
        }
    pool = [
        PlannedExpert(members=[(name, slot) for name in names], operator="copy", sources=[(names[0], slot)])
        for slot in slots
    ]
    return ConsolidationPlan(
        schema="moemerge/plan@2",
        family=first.family.name,
        budget="1x",
        policy="generated",
        within=False,
        num_slots=first.num_experts,
        variants=planned,
        base=None,
        variant_bytes=first.expert_bytes,
        pool_bytes=first.expert_bytes,
        allowed_bytes=first.expert_bytes,
        layers=[
            PlannedLayer(index=layer.index, pool=pool, errors={name: [0.0] * len(slots) for name in names})
            for layer in first.routed_layers
        ],
    )
