"""The pool experts in device memory: all of them, or as many as fit and the rest on demand.

Coded pool experts stay coded. Layers are `PoolLayer`s for the models. What a pool expert computes does not
depend on which of the two holds it, but for the rounding of another product kernel. Not counted as memory of
the pool is that of the one expert that is unpacked at a time.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from moemerge.bundle.coded import StoredCodes, StoredLowRank, StoredResidual
from moemerge.bundle.manifest import PoolLayer as StoredLayer
from moemerge.bundle.reader import Bundle, PoolParts
from moemerge.checkpoint.headers import StoredTensor
from moemerge.models import PlainPoolLayer, PoolLayer
from moemerge.models.arranging import Form, Room, arrange, arranged_bytes
from moemerge.models.packed import Coded, Matrix, PackedMatrix
from moemerge.models.products import can_pack, pack
from moemerge.progress import Progress, Silent
from moemerge.runner.cached_pool import CachedExpertPool, plain_bytes
from moemerge.runner.rows import (
    EffectiveRows,
    activation_of,
    effective_layer,
    needs_effective,
    scratch_of,
)

Parts = dict[str, Tensor]
HeldParts = dict[str, Tensor | Coded]


class ExpertPool:
    """All pool experts of a bundle in device memory.

    Plain matrices that read the same input are one product, `gate_up`. On a CPU in bf16 they lie in the
    blocked layout of its matrix kernels, which reads 1.5 to 1.8 times faster for few rows than the plain one;
    codes lie as its products of few bits take them, where it has some.
    """

    def __init__(
        self,
        bundle: Bundle,
        dtype: torch.dtype,
        device: torch.device,
        *,
        is_packed: bool = True,
        room: Room = Room.SOME,
        progress: Progress | None = None,
    ) -> None:
        """Load it.

        Args:
            bundle: Whose.
            dtype: Of plain experts in memory.
            device: Where that is.
            is_packed: Whether plain matrices may take the packed layout.
            room: What coded ones may take.
            progress: Told of bytes.
        """
        self.is_packed = is_packed and can_pack(dtype, device)
        self.rows = EffectiveRows(bundle)
        self.nbytes = pool_bytes(bundle, dtype, device, room)
        self._dtype, self._device, self._room = dtype, device, room
        self._activation, self._scratch = activation_of(bundle), scratch_of(bundle, dtype, device)
        sizes = {layer.index: (bundle.folder / layer.file).stat().st_size for layer in bundle.manifest.layers}
        report = progress or Silent()
        report.start("loading the pool", sum(sizes.values()))
        self.layers: dict[int, PoolLayer] = {}
        for layer in bundle.manifest.layers:
            self.layers[layer.index] = self._load_layer(bundle, layer)
            report.advance(sizes[layer.index])

    hits = 0
    misses = 0

    def verify_integrity(self) -> None:
        """Nothing moves, so there is nothing that could have gone wrong."""

    def _load_layer(self, bundle: Bundle, layer: StoredLayer) -> PoolLayer:
        stored, rows = bundle.map_pool(layer.index), self.rows.layers[layer.index]
        if self._scratch is None or not needs_effective(bundle, layer):
            plain = [self._load_plain(_all_plain(parts)) for parts in stored]
            return PlainPoolLayer(plain, self._activation)
        held = [
            self._load(parts, is_base=number in rows.residual_bases) for number, parts in enumerate(stored)
        ]
        adds_outputs = self._room == Room.FOUR_BITS
        return effective_layer(
            layer, rows, held.__getitem__, self._scratch, self._activation, adds_outputs=adds_outputs
        )

    def _load(self, stored: dict[str, Matrix], *, is_base: bool) -> HeldParts:
        if any(isinstance(matrix, PackedMatrix) for matrix in stored.values()):
            coded = _all_coded(stored)
            if not is_base:
                coded = _fused_codes(coded)
            held: HeldParts = {
                part: self._load_coded(matrix, is_base=is_base) for part, matrix in coded.items()
            }
            return held | self._load_plain(_all_plain(stored))
        plain = _all_plain(stored)
        if is_base:
            return {part: tensor.to(device=self._device, copy=True) for part, tensor in plain.items()}
        return dict(self._load_plain(plain))

    def _load_plain(self, stored: Parts) -> Parts:
        if not self.is_packed:
            # Never the mapped file itself: it may change, and its pages come and go.
            return {
                part: t.to(device=self._device, dtype=self._dtype, copy=True) for part, t in stored.items()
            }
        return {
            part: pack(tensor) if tensor.dim() == 2 else tensor.to(self._dtype, copy=True)
            for part, tensor in _fused(stored).items()
        }

    def _load_coded(self, matrix: PackedMatrix, *, is_base: bool) -> Coded:
        codes, scales = (t.to(device=self._device, copy=True) for t in (matrix.codes, matrix.scales))
        held = PackedMatrix(codes, scales, matrix.bits, matrix.group)
        return arrange(held, self._dtype, self._room, by_rows=is_base)


def load_pool(
    bundle: Bundle,
    dtype: torch.dtype,
    device: torch.device,
    *,
    memory_bytes: int | None,
    is_packed: bool = True,
    room: Room = Room.SOME,
    progress: Progress | None = None,
) -> ExpertPool | CachedExpertPool:
    """The pool, all of it when it fits into `memory_bytes`.

    Raises:
        NotEnoughRoom: Not even one pool expert fits.
    """
    if memory_bytes is None or pool_bytes(bundle, dtype, device, room) <= memory_bytes:
        return ExpertPool(bundle, dtype, device, is_packed=is_packed, room=room, progress=progress)
    return CachedExpertPool(bundle, dtype, device, arena_bytes=memory_bytes)


def pool_bytes(
    bundle: Bundle, dtype: torch.dtype, device: torch.device | None = None, room: Room = Room.SOME
) -> int:
    """Bytes of all pool experts when plain ones are held in that dtype, on that device (a CPU)."""
    device, rows = device or torch.device("cpu"), EffectiveRows(bundle)
    total = 0
    for layer in bundle.manifest.layers:
        for number, parts in enumerate(bundle.pool(layer.index)):
            is_base = number in rows.layers[layer.index].residual_bases
            if layer.code(number) is None:
                total += sum(plain_bytes(matrix, dtype, is_base) for matrix in parts.values())
            else:
                total += _coded_bytes(parts, dtype, device, room, is_base=is_base)
    return total


def residual_bytes(
    bundle: Bundle, variants: Collection[str], dtype: torch.dtype, device: torch.device, room: Room
) -> int:
    """Bytes of all residuals of these variants with so much room."""

    def taken(matrix: StoredResidual) -> int:
        if isinstance(matrix, StoredLowRank):
            return matrix.nbytes
        form = Form(matrix.bits, matrix.group, matrix.shape, dtype, device, by_rows=True)
        return arranged_bytes(form, room)

    return sum(
        taken(matrix)
        for variant in variants
        for index in bundle.variant(variant).residual_layers
        for parts in bundle.residuals(variant, index)
        for matrix in (parts or {}).values()
    )


def _coded_bytes(
    parts: PoolParts, dtype: torch.dtype, device: torch.device, room: Room, *, is_base: bool
) -> int:
    """Bytes of a coded expert in the layout that its product takes, and of its biases."""
    biases = [place for place in parts.values() if isinstance(place, StoredTensor)]
    codes = {part: matrix for part, matrix in parts.items() if isinstance(matrix, StoredCodes)}
    forms = {
        part: Form(matrix.bits, matrix.group, matrix.shape, dtype, device, is_base)
        for part, matrix in codes.items()
    }
    if "gate" in forms and not is_base:
        gate, up = forms.pop("gate"), forms.pop("up")
        forms["gate_up"] = gate._replace(shape=(gate.shape[0] + up.shape[0], gate.shape[1]))
    matrices = sum(arranged_bytes(form, room) for form in forms.values())
    return matrices + sum(place.num_elements * dtype.itemsize for place in biases)


def _all_plain(parts: Mapping[str, Matrix]) -> Parts:
    return {part: matrix for part, matrix in parts.items() if isinstance(matrix, Tensor)}


def _all_coded(parts: Mapping[str, Matrix]) -> dict[str, PackedMatrix]:
    return {part: matrix for part, matrix in parts.items() if isinstance(matrix, PackedMatrix)}


def _fused_codes(parts: dict[str, PackedMatrix]) -> dict[str, PackedMatrix]:
    if "gate" not in parts:
        return parts
    gate, up = parts["gate"], parts["up"]
    codes, scales = torch.cat((gate.codes, up.codes)), torch.cat((gate.scales, up.scales))
    rest = {part: matrix for part, matrix in parts.items() if part not in ("gate", "up")}
    return {"gate_up": PackedMatrix(codes, scales, gate.bits, gate.group), **rest}


def _fused(parts: Mapping[str, Tensor]) -> Parts:
    if "gate" not in parts:
        return dict(parts)
    rest = {part: tensor for part, tensor in parts.items() if part not in ("gate", "up")}
    return {"gate_up": torch.cat((parts["gate"], parts["up"])), **rest}
