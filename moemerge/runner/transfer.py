"""Tensors on their way into device memory, and what bringing them there took.

Knows nothing of variants beyond their names, and of who uses a tensor for how long.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moemerge.bundle.coded import StoredResidual
from moemerge.checkpoint.headers import StoredTensor
from moemerge.checkpoint.tensors import require_mapped
from moemerge.models.arranging import Room, arrange
from moemerge.models.packed import Coded, LowRank, Residual
from moemerge.models.products import pack

Copy = tuple[StoredTensor, Tensor, Tensor]
"""A place in the bundle's files, its mapped bytes, and memory for them."""
ToArrange = tuple[StoredResidual, Residual]
"""A residual's places in the bundle's files, and the same mapped."""


@dataclass(eq=False, slots=True)
class Piece:
    """A tensor of the bundle: where it is stored, and in device memory while somebody uses it.

    Attributes:
        place: In the bundle's files.
        dtype: In device memory.
        stored_bytes: In the bundle.
        tensor: In device memory; None while nobody uses it, or while it is being packed.
        users: Variants.
    """

    place: StoredTensor
    dtype: torch.dtype
    stored_bytes: int
    tensor: Tensor | None = None
    users: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """What making a variant resident took.

    Attributes:
        variant: Resident now.
        moved_bytes: Bytes copied, in the bundle's dtype.
        kept_bytes: Bytes of its non-expert tensors that were there already.
        seconds: Wall time of copying.
    """

    variant: str
    moved_bytes: int
    kept_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Transfer:
    """Copies to be made for a variant: source in the mapped bundle, target in device memory.

    What is in `packs` gets memory of its own when it is packed, and `residuals` when they are arranged for
    products with hidden states of that dtype.
    """

    variant: str
    copies: tuple[Copy, ...]
    packs: tuple[tuple[Piece, Tensor], ...]
    moved_bytes: int
    kept_bytes: int
    dtype: torch.dtype = torch.bfloat16
    residuals: Mapping[tuple[int, int], Mapping[str, ToArrange]] = field(default_factory=dict)
    packed: dict[Piece, Tensor] = field(default_factory=dict)
    arranged: dict[tuple[int, int], dict[str, Coded]] = field(default_factory=dict)

    def carry_out(self, *, is_alone: bool = False) -> Swap:
        """Copy everything; may run on another thread.

        Args:
            is_alone: Nothing computes meanwhile, so that copies may take all processors.

        Raises:
            DamagedInput: A file of the bundle has become shorter.
        """
        begin = time.perf_counter()
        for place, source, target in self.copies:
            require_mapped(place)
            if is_alone:
                target.copy_(source)
            else:
                _copy_beside(source, target)
        for piece, source in self.packs:
            require_mapped(piece.place)
            self.packed[piece] = pack(source)
        for key, parts in self.residuals.items():
            self.arranged[key] = {part: self._arrange(*residual) for part, residual in parts.items()}
        return Swap(
            variant=self.variant,
            moved_bytes=self.moved_bytes,
            kept_bytes=self.kept_bytes,
            seconds=time.perf_counter() - begin,
        )

    def _arrange(self, stored: StoredResidual, mapped: Residual) -> Coded:
        """With memory of its own: what is mapped is neither written over nor kept."""
        for place in stored.places.values():
            require_mapped(place)
        if isinstance(mapped, LowRank):
            return LowRank(mapped.left.clone(), mapped.right.clone())
        copied = replace(mapped, codes=mapped.codes.clone(), scales=mapped.scales.clone())
        return arrange(copied, self.dtype, Room.FOUR_BITS, by_rows=True)


def _copy_beside(source: Tensor, target: Tensor) -> None:
    """Copy while others compute."""
    is_plain = target.device.type == "cpu" and source.dtype == target.dtype and source.dim()
    if is_plain:
        # One thread and no lock of the interpreter.
        target.view(torch.uint8).numpy()[...] = source.view(torch.uint8).numpy()
    else:
        target.copy_(source, non_blocking=False)
