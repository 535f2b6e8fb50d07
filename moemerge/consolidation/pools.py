"""Write a layer's pool and residuals as a plan says: from checkpoints to files of the bundle."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from moemerge.bundle.writer import write_pool, write_residuals
from moemerge.checkpoint.headers import DTYPE_BYTES, StoredTensor
from moemerge.checkpoint.tensors import TensorReader, bytes_of, torch_dtype
from moemerge.checkpoint.variants import VariantSet
from moemerge.checkpoint.writer import TensorToWrite, stored_tensor
from moemerge.consolidation.encoding import encode_expert, to_write
from moemerge.consolidation.evidence import Evidence, Ref, layer_memory
from moemerge.consolidation.measured import Statistics
from moemerge.consolidation.operators import OPERATORS, Cluster, Member
from moemerge.consolidation.plan import PlannedExpert, PlannedLayer
from moemerge.errors import DamagedInput
from moemerge.execution import Work
from moemerge.models.packed import PackedMatrix, Residual
from moemerge.progress import Progress

Errors = dict[str, list[float]]
# The interpreter with torch, and the buffer of a copy.
_COPYING_BYTES = 400 * 2**20


@dataclass(frozen=True, slots=True)
class WrittenLayer:
    """What was written of a layer.

    Attributes:
        files: SHA-256 by path in the bundle.
        errors: By variant and slot, distance of the effective expert over the expert's norm; empty where
            the plan has them.
    """

    files: dict[str, str]
    errors: Errors


def layer_work(
    folder: Path, variants: VariantSet, statistics: Statistics, layer: PlannedLayer
) -> Work[WrittenLayer]:
    """`write_layer` as a unit of work."""
    own = variants.at_layer(layer.index)
    is_merged = any(expert.operator != "copy" for expert in layer.pool)
    return Work(
        title=f"pool of layer {layer.index}",
        run=partial(_write, folder.absolute(), own, statistics.at_layer(layer.index), layer),
        reads=own.files | statistics.files(layer.index),
        folder=folder.absolute(),
        memory_bytes=layer_memory(own) + statistics.layer_bytes
        if is_merged or layer.has_codes
        else _COPYING_BYTES,
        is_parallel=True,
    )


def _write(
    folder: Path, variants: VariantSet, statistics: Statistics, layer: PlannedLayer, progress: Progress
) -> WrittenLayer:
    with TensorReader() as reader:
        evidence = Evidence(variants=variants, statistics=statistics, reader=reader)
        return write_layer(folder, evidence, layer, progress.advance)


def write_layer(
    folder: Path, evidence: Evidence, layer: PlannedLayer, advance: Callable[[int], None]
) -> WrittenLayer:
    """Write a layer's files.

    What is coded is made first and held; plain pool experts are made when their bytes are written.

    Raises:
        DamagedInput: NaN or infinity in an expert, or values that overflow its dtype.
    """
    experts: list[Mapping[str, TensorToWrite | PackedMatrix]] = []
    residuals: dict[Ref, Mapping[str, Residual]] = {}
    found: dict[Ref, float] = {}
    for planned in layer.pool:
        is_plain = planned.code is None and not any(map(layer.residual, planned.members))
        if is_plain and planned.operator == "copy":
            experts.append(_copied(evidence, layer.index, planned))
            found |= dict.fromkeys(planned.members, 0.0)
        elif is_plain and layer.errors:
            experts.append(_merged(evidence, layer.index, planned))
        else:
            encoded = encode_expert(evidence, layer, planned)
            experts.append(to_write(encoded.parts))
            residuals |= encoded.residuals
            found |= encoded.errors
    files = write_pool(folder, layer.index, experts, advance)
    for name, codes in layer.residuals.items():
        slots = [residuals.get((name, slot)) for slot in range(len(codes))]
        files |= write_residuals(folder, name, layer.index, slots, advance)
    return WrittenLayer(files, layer.errors or _by_variant(found))


def _copied(evidence: Evidence, layer_index: int, planned: PlannedExpert) -> dict[str, TensorToWrite]:
    (source,) = planned.sources
    stored = evidence.stored(layer_index, source)
    return {part: stored_tensor(part, tensor, evidence.reader) for part, tensor in stored.items()}


def _merged(evidence: Evidence, layer_index: int, planned: PlannedExpert) -> dict[str, TensorToWrite]:
    """Made of weights alone, part by part, each in the widest dtype of its sources."""
    sources = [evidence.stored(layer_index, ref) for ref in planned.sources]

    def make(part: str, widest: StoredTensor) -> Iterator[memoryview]:
        members = [evidence.without_inputs({part: source[part]}) for source in sources]
        merged = OPERATORS[planned.operator].make(Cluster(members))[part]
        values = merged.to(torch_dtype(widest))
        if not values.isfinite().all():
            raise _not_finite(members, [source[part] for source in sources], values.dtype)
        yield bytes_of(values)

    found = {}
    for part in sources[0]:
        widest = max((source[part] for source in sources), key=lambda tensor: DTYPE_BYTES[tensor.dtype])
        found[part] = TensorToWrite(
            name=part, dtype=widest.dtype, shape=widest.shape, chunks=partial(make, part, widest)
        )
    return found


def _not_finite(members: list[Member], sources: list[StoredTensor], dtype: torch.dtype) -> DamagedInput:
    for member, source in zip(members, sources, strict=True):
        if not all(matrix.isfinite().all() for matrix in member.parts.values()):
            return DamagedInput(f"{source.path}: tensor {source.name} contains NaN or infinity")
    return DamagedInput(
        f"{sources[0].path}: tensor {sources[0].name} has values that overflow {dtype} when they are merged"
    )


def _by_variant(found: Mapping[Ref, float]) -> Errors:
    errors: Errors = {}
    for (name, _), error in sorted(found.items()):
        errors.setdefault(name, []).append(float(f"{error:.6g}"))
    return errors
