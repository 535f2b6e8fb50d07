"""Make a layer's pool experts and residuals as a plan says, from the experts of all variants.

Pure but for reading experts; one slot at a time is in memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moemerge.bundle.manifest import CodeSpec
from moemerge.checkpoint.writer import TensorToWrite, memory_tensor
from moemerge.consolidation.codes.moments import add_part_moments
from moemerge.consolidation.evidence import Evidence, Ref, inputs_of
from moemerge.consolidation.ladder import encode, encode_residual
from moemerge.consolidation.operators import OPERATORS, Cluster, Member
from moemerge.consolidation.plan import PlannedExpert, PlannedLayer
from moemerge.models.packed import Matrix, PackedMatrix, Residual, effective

Parts = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class EncodedExpert:
    """A pool expert and what is added to it.

    Attributes:
        parts: Matrices as they will be stored.
        residuals: By member, where it has one.
        errors: By member: distance of its effective expert over its norm.
    """

    parts: Mapping[str, Matrix]
    residuals: Mapping[Ref, Mapping[str, Residual]]
    errors: Mapping[Ref, float]


def encode_expert(evidence: Evidence, layer: PlannedLayer, planned: PlannedExpert) -> EncodedExpert:
    """Carry out one entry of a plan's pool."""
    members = {ref: load_member(evidence, layer.index, ref) for ref in planned.members}
    different = _different(members)
    merged = OPERATORS[planned.operator].make(
        Cluster([members[ref] for ref in different], evidence.base_parts(layer.index, planned.members[0][1]))
    )
    dtype = _widest([members[ref].parts for ref in different])
    parts: dict[str, Matrix]
    if planned.code is None:
        parts = {part: matrix.to(dtype) for part, matrix in merged.items()}
    else:
        moments = add_part_moments([members[ref].moments for ref in different])
        parts = encode(merged, planned.code, moments)
    residuals: dict[Ref, Mapping[str, Residual]] = {}
    errors = {}
    for ref, member in members.items():
        residual, errors[ref] = encode_against(member, parts, layer.residual(ref), dtype)
        if residual is not None:
            residuals[ref] = residual
    return EncodedExpert(parts, residuals, errors)


def encode_against(
    member: Member, parts: Mapping[str, Matrix], code: CodeSpec | None, dtype: torch.dtype
) -> tuple[dict[str, Residual] | None, float]:
    """What is missing of an expert where a pool expert stands for it.

    Args:
        member: The expert.
        parts: The pool expert as stored.
        code: Of the residual, if there is to be one.
        dtype: Of the effective expert.

    Returns:
        The residual, and the distance of the effective expert over the norm of the expert.
    """
    residual = None
    if code is not None:
        stored = {part: effective(matrix, None, torch.float32) for part, matrix in parts.items()}
        missing = {part: member.matrices[part] - stored[part] for part in stored}
        residual = encode_residual(missing, code, member.moments)
    return residual, _error(member, parts, residual, dtype)


def to_write(parts: Mapping[str, Matrix]) -> dict[str, TensorToWrite | PackedMatrix]:
    """Parts as a writer takes them."""
    return {
        part: memory_tensor(part, matrix) if isinstance(matrix, Tensor) else matrix
        for part, matrix in parts.items()
    }


def load_member(evidence: Evidence, layer_index: int, ref: Ref) -> Member:
    """An expert with all of its inputs."""
    statistics = evidence.statistics.layer(ref[0], layer_index)
    slot = inputs_of(statistics, ref[1])
    member = evidence.member(evidence.parts(layer_index, ref), [slot], slice(None))
    return replace(member, weight=slot.count / (statistics.output_square_sum or 1.0))


def _different(members: Mapping[Ref, Member]) -> list[Ref]:
    """One of each kind of bytewise equal experts."""
    found: list[Ref] = []
    for ref, member in members.items():
        if not any(_equal(member.parts, members[other].parts) for other in found):
            found.append(ref)
    return found


def _equal(parts: Parts, others: Parts) -> bool:
    return all(torch.equal(matrix, others[part]) for part, matrix in parts.items())


def _error(
    member: Member, parts: Mapping[str, Matrix], residual: Mapping[str, Residual] | None, dtype: torch.dtype
) -> float:
    squared = norm = 0.0
    for part, matrix in parts.items():
        own = member.matrices[part]
        stands = effective(matrix, residual.get(part) if residual else None, dtype).float()
        squared += float((stands - own).square().sum(dim=-1).sum())
        norm += float(own.square().sum(dim=-1).sum())
    return (squared / norm) ** 0.5 if norm else 0.0


def _widest(experts: Sequence[Parts]) -> torch.dtype:
    found = [matrix.dtype for parts in experts for matrix in parts.values()]
    return max(found, key=lambda dtype: dtype.itemsize)
