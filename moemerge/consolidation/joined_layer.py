"""Write what a newcomer adds to a layer: pool experts behind those that are there, and residuals."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from moemerge.bundle.manifest import CodeSpec, PoolLayer
from moemerge.bundle.reader import Bundle
from moemerge.bundle.writer import write_pool, write_residuals
from moemerge.checkpoint.tensors import TORCH_DTYPES
from moemerge.checkpoint.writer import TensorToWrite, stored_tensor
from moemerge.consolidation.encoding import encode_against, load_member, to_write
from moemerge.consolidation.evidence import Evidence
from moemerge.consolidation.ladder import encode
from moemerge.consolidation.newcomer import SlotChoice
from moemerge.models.packed import Matrix, PackedMatrix, Residual

_DIGITS = 6


class JoinedLayer(BaseModel):
    """What was added to a layer.

    Attributes:
        codes: For each pool expert that was appended how it is coded, None where it is plain.
        expert_map: For each slot the pool expert.
        errors: For each slot, distance of the effective expert over the expert's norm.
        residuals: For each slot how its residual is coded, None where it has none.
        pool_bytes: Of the pool experts that were appended.
        residual_bytes: Of the residuals.
        dtype: Of the newcomer's experts.
    """

    model_config = ConfigDict(frozen=True)
    codes: list[CodeSpec | None]
    expert_map: list[int]
    errors: list[float]
    residuals: list[CodeSpec | None]
    pool_bytes: int
    residual_bytes: int
    dtype: str

    @property
    def nbytes(self) -> int:
        """What was added."""
        return self.pool_bytes + self.residual_bytes

    def extend(self, layer: PoolLayer) -> PoolLayer:
        """The layer's entry in the manifest, with what was added."""
        codes = [layer.code(index) for index in range(layer.num_experts)] + self.codes
        computed = any(codes) or any(self.residuals)
        return layer.model_copy(
            update={
                "num_experts": len(codes),
                "codes": codes if any(codes) else [],
                "dtype": layer.dtype or (self.dtype if computed else None),
            }
        )


def write_joined_layer(
    folder: Path,
    bundle: Bundle,
    evidence: Evidence,
    name: str,
    layer_index: int,
    choices: list[SlotChoice],
    advance: Callable[[int], None],
) -> tuple[dict[str, str], dict[str, Any]]:
    """Write the layer's pool, if it grows, and the newcomer's residuals in it.

    Args:
        folder: Of the new bundle.
        bundle: The old one.
        evidence: The newcomer and its statistics.
        name: Of the newcomer.
        layer_index: Counted through all stacks.
        choices: For each slot.
        advance: Told of the bytes written.

    Returns:
        SHA-256 of the written files by path, and a `JoinedLayer` as JSON.

    Raises:
        DamagedInput: NaN or infinity in an expert.
    """
    layer, pool = bundle.layer(layer_index), bundle.map_pool(layer_index)
    stored_dtype = next(iter(evidence.stored(layer_index, (name, 0)).values())).dtype
    dtype = TORCH_DTYPES[layer.dtype or stored_dtype]
    experts: list[Mapping[str, TensorToWrite | PackedMatrix]] = [to_write(parts) for parts in pool]
    residuals: list[Mapping[str, Residual] | None] = []
    found: dict[str, list[Any]] = {"codes": [], "expert_map": [], "errors": []}
    pool_bytes = 0
    for slot, choice in enumerate(choices):
        residual = None
        if choice.stored is not None:
            residual, error = _stand_in(evidence, name, layer_index, slot, pool[choice.stored], choice, dtype)
            found["expert_map"].append(choice.stored)
        else:
            parts, error = _own(evidence, name, layer_index, slot, choice.code, dtype)
            pool_bytes += sum(matrix.nbytes for matrix in parts.values())
            found["expert_map"].append(len(experts))
            found["codes"].append(choice.code)
            experts.append(parts)
        residuals.append(residual)
        found["errors"].append(float(f"{error:.{_DIGITS}g}"))
    files = write_pool(folder, layer_index, experts, advance) if found["codes"] else {}
    files |= write_residuals(folder, name, layer_index, residuals, advance)
    joined = JoinedLayer(
        **found,
        residuals=[choice.residual for choice in choices],
        pool_bytes=pool_bytes,
        residual_bytes=sum(matrix.nbytes for parts in residuals if parts for matrix in parts.values()),
        dtype=stored_dtype,
    )
    return files, joined.model_dump()


def _stand_in(
    evidence: Evidence,
    name: str,
    layer_index: int,
    slot: int,
    parts: Mapping[str, Matrix],
    choice: SlotChoice,
    dtype: torch.dtype,
) -> tuple[dict[str, Residual] | None, float]:
    """The residual to a pool expert that was there, if there is to be one, and the error that is left."""
    plain = [matrix.dtype for matrix in parts.values() if isinstance(matrix, torch.Tensor)]
    if choice.residual is None and len(plain) == len(parts):
        # Nothing is added up: the pool expert is computed with as it is.
        dtype = plain[0]
    return encode_against(load_member(evidence, layer_index, (name, slot)), parts, choice.residual, dtype)


def _own(
    evidence: Evidence, name: str, layer_index: int, slot: int, code: CodeSpec | None, dtype: torch.dtype
) -> tuple[Mapping[str, TensorToWrite | PackedMatrix], float]:
    """A pool expert of the newcomer's own, and its error."""
    if code is None:
        stored = evidence.stored(layer_index, (name, slot))
        return {part: stored_tensor(part, tensor, evidence.reader) for part, tensor in stored.items()}, 0.0
    member = load_member(evidence, layer_index, (name, slot))
    coded = encode(member.matrices, code, member.moments)
    return to_write(coded), encode_against(member, coded, None, dtype)[1]
