"""Turn a variant of a bundle back into an ordinary checkpoint that other tools load."""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from moemerge.bundle.coded import StoredMatrix, StoredResidual, assemble, plain_parts
from moemerge.bundle.joined import JoinedTensor, expert_tensors
from moemerge.bundle.reader import Bundle
from moemerge.bundle.target import building, check_target
from moemerge.checkpoint.disk import check_disk
from moemerge.checkpoint.headers import DTYPE_BYTES, StoredTensor
from moemerge.checkpoint.tensors import TORCH_DTYPES, TensorReader, bytes_of
from moemerge.checkpoint.weights import INDEX, SINGLE
from moemerge.checkpoint.writer import TensorToWrite, stored_tensor, write_tensors, write_text
from moemerge.errors import DamagedBundle
from moemerge.models.packed import effective
from moemerge.progress import Progress, Silent

DEFAULT_SHARD_BYTES = 4 * 2**30


@dataclass(frozen=True, slots=True)
class EffectivePart:
    """A part of an effective expert that has to be computed.

    Attributes:
        pool: Place of the pool expert's part.
        residual: Place of what is added to it.
        dtype: Safetensors dtype of the sum.
    """

    pool: StoredMatrix
    residual: StoredResidual | None
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""
        return self.pool.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the sum."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    def compute(self, reader: TensorReader) -> Tensor:
        """The sum."""
        residual = self.residual.assemble(reader.read) if self.residual else None
        return effective(assemble(self.pool, reader.read), residual, TORCH_DTYPES[self.dtype])

    def to_write(self, name: str, reader: TensorReader) -> TensorToWrite:
        """The sum under that name, computed when it is written."""

        def chunks() -> Iterator[memoryview]:
            value = self.compute(reader)
            if not value.isfinite().all():
                raise DamagedBundle(f"{name}: what is stored for it gives NaN or infinity in {self.dtype}")
            yield bytes_of(value)

        return TensorToWrite(name=name, dtype=self.dtype, shape=self.shape, chunks=chunks)


Exported = StoredTensor | EffectivePart
Written = Exported | JoinedTensor


def export_variant(
    bundle: Bundle,
    variant: str,
    target: Path,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> list[Path]:
    """Write a variant in the first of its family's layouts, which transformers reads.

    Args:
        bundle: Where it is.
        variant: Its name.
        target: Folder to create.
        shard_bytes: Upper limit of a file, unless one tensor is larger.
        progress: Told of the bytes written.

    Returns:
        The files written.

    Raises:
        InvalidRecipe: The target exists.
        NotFound: No such variant.
        NotEnoughRoom: The target cannot be written.
        DamagedBundle: Something the manifest names is missing, or a sum is not finite.
    """
    check_target(target)
    tensors = exported_tensors(bundle, variant)
    sources = {name: bundle.side_file(variant, name) for name in bundle.variant(variant).files}
    total = sum(tensor.nbytes for tensor in tensors.values())
    check_disk(target.parent, total, f"writing {target}")
    report = progress or Silent()
    report.start(f"export {variant}", total)
    with building(target) as folder:
        _write_shards(folder, tensors, shard_bytes, report)
        for name, source in sources.items():
            if source:
                shutil.copyfile(source, folder / name)
    return sorted(path for path in target.iterdir())


def exported_tensors(bundle: Bundle, variant: str) -> dict[str, Written]:
    """All tensors of a variant by exported name, layer by layer; as places where they are stored as they are.

    Raises:
        DamagedBundle: Something the manifest names is missing.
    """
    family, entry = bundle.family, bundle.variant(variant)
    names = family.role_names(entry.settings)
    result: dict[str, Written] = {names[role]: tensor for role, tensor in bundle.tensors(variant).items()}
    return result | expert_tensors(
        family, entry.settings, lambda layer: effective_parts(bundle, variant, layer.index)
    )


def effective_parts(bundle: Bundle, variant: str, layer_index: int) -> list[dict[str, Exported]]:
    """The parts of every slot's effective expert; a plain pool expert without residual is one as it is."""
    pool, residuals = bundle.pool(layer_index), bundle.residuals(variant, layer_index)
    dtype = bundle.layer(layer_index).dtype
    slots: list[dict[str, Exported]] = []
    for index, residual in zip(bundle.variant(variant).maps[layer_index], residuals, strict=True):
        parts: dict[str, Exported] = {}
        plain = plain_parts(pool[index])
        if plain and residual is None:
            slots.append({**plain})
            continue
        assert dtype is not None, "the manifest names it where something is to be computed"
        for part, matrix in pool[index].items():
            parts[part] = EffectivePart(matrix, residual.get(part) if residual else None, dtype)
        slots.append(parts)
    return slots


def _write_shards(folder: Path, tensors: dict[str, Written], shard_bytes: int, report: Progress) -> None:
    shards: list[dict[str, Written]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    weight_map: dict[str, str] = {}
    with TensorReader() as reader:
        for number, shard in enumerate(shards, start=1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            writes = [
                stored_tensor(name, tensor, reader)
                if isinstance(tensor, StoredTensor)
                else tensor.to_write(name, reader)
                for name, tensor in shard.items()
            ]
            write_tensors(folder / file, writes, {"format": "pt"}, report.advance)
            weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
