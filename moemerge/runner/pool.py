"""The pool experts in device memory: all of them, or as many as fit and the rest on demand.

Coded pool experts stay coded. Layers are `PoolLayer`s for the models. What a pool expert computes does not
depend on which of the two holds it, but for the rounding of another product kernel. Not counted as memory of
the pool is that of the one expert that is unpacked at a time.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from moemerge.bundle.coded import StoredCodes, StoredMatrix
from moemerge.bundle.reader import Bundle, PoolParts
from moemerge.checkpoint.headers import StoredTensor
from moemerge.checkpoint.tensors import TORCH_DTYPES, require_mapped
from moemerge.errors import DamagedBundle, NotEnoughRoom
from moemerge.models import Activation, PlainPoolLayer, PoolLayer
from moemerge.models.experts import Scratch
from moemerge.models.packed import Coded, Matrix, PackedMatrix
from moemerge.models.products import arrange, arranged_bytes, can_pack, pack
from moemerge.runner.rows import EffectiveRows, effective_layer, needs_effective

Parts = dict[str, Tensor]
HeldParts = dict[str, Tensor | Coded]


class ExpertPool:
    """All pool experts of a bundle in device memory.

    Plain matrices that read the same input are one product, `gate_up`. On a CPU in bf16 they lie in the
    blocked layout of its matrix kernels, which reads 1.5 to 1.8 times faster for few rows than the plain one;
    codes lie as its products of few bits take them, where it has some.
    """

    def __init__(
        self, bundle: Bundle, dtype: torch.dtype, device: torch.device, *, is_packed: bool = True
    ) -> None:
        self.is_packed = is_packed and can_pack(dtype, device)
        self.rows = EffectiveRows(bundle)
        self.nbytes = pool_bytes(bundle, dtype, device, is_packed=is_packed)
        self._dtype, self._device, self._rearranges = dtype, device, is_packed
        activation, scratch = activation_of(bundle), _scratch_of(bundle, dtype, device)
        self.layers: dict[int, PoolLayer] = {}
        for layer in bundle.manifest.layers:
            stored, rows = bundle.map_pool(layer.index), self.rows.layers[layer.index]
            if scratch is None or not needs_effective(bundle, layer):
                plain = [self._load_plain(_all_plain(parts)) for parts in stored]
                self.layers[layer.index] = PlainPoolLayer(plain, activation)
                continue
            held = [
                self._load(parts, is_base=number in rows.residual_bases)
                for number, parts in enumerate(stored)
            ]
            self.layers[layer.index] = effective_layer(layer, rows, held.__getitem__, scratch, activation)

    hits = 0
    misses = 0

    def verify_integrity(self) -> None:
        """Nothing moves, so there is nothing that could have gone wrong."""

    def _load(self, stored: dict[str, Matrix], *, is_base: bool) -> HeldParts:
        if any(isinstance(matrix, PackedMatrix) for matrix in stored.values()):
            coded = _all_coded(stored)
            if not is_base:
                coded = _fused_codes(coded)
            return {part: self._load_coded(matrix, is_base=is_base) for part, matrix in coded.items()}
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
        return {part: pack(tensor) for part, tensor in _fused(stored).items()}

    def _load_coded(self, matrix: PackedMatrix, *, is_base: bool) -> Coded:
        codes, scales = (t.to(device=self._device, copy=True) for t in (matrix.codes, matrix.scales))
        held = PackedMatrix(codes, scales, matrix.bits, matrix.group)
        return arrange(held, self._dtype, in_place=is_base or not self._rearranges)


@dataclass(frozen=True, slots=True)
class _CachedLayer:
    """A layer whose experts, all plain, come through the cache."""

    cache: "CachedExpertPool"
    index: int
    activation: Activation

    def output(self, pool_index: int, hidden_TD: Tensor) -> Tensor:
        """See `PoolLayer.output`."""
        parts = {
            part: matrix
            for part, matrix in self.cache.expert(self.index, pool_index).items()
            if isinstance(matrix, Tensor)
        }
        return PlainPoolLayer([parts], self.activation).output(0, hidden_TD)


@dataclass(frozen=True, slots=True)
class _Held:
    """A pool expert in the arena: its memory by name of tensor, and what it makes."""

    memory: Parts
    parts: HeldParts

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.memory.values())


class CachedExpertPool:
    """As many pool experts as fit in an arena of fixed size; the rest is fetched when it is asked for.

    Every layer has a share of the arena by its bytes. The layer that is furthest over its share gives up the
    expert it has used least recently. Over all layers together that would be the one that is asked for next,
    because tokens go through the layers in a circle: nothing would ever be found.
    """

    def __init__(self, bundle: Bundle, dtype: torch.dtype, device: torch.device, *, arena_bytes: int) -> None:
        self.hits = 0
        self.misses = 0
        self.rows = EffectiveRows(bundle)
        self._bundle = bundle
        self._dtype, self._device = dtype, device
        self._stored = {layer.index: bundle.map_pool(layer.index) for layer in bundle.manifest.layers}
        self._sources = {layer.index: bundle.pool(layer.index) for layer in bundle.manifest.layers}
        sizes = {index: self._sizes(index) for index in self._sources}
        largest = max(max(of_layer) for of_layer in sizes.values())
        self.num_places = arena_bytes // largest
        if self.num_places < 1:
            raise NotEnoughRoom(
                f"{arena_bytes} bytes are left for pool experts, one takes {largest}. Give more device "
                f"memory, or fewer residents or less memory for the key/value cache"
            )
        self._arena_bytes = arena_bytes
        self._layer_bytes = {index: sum(of_layer) for index, of_layer in sizes.items()}
        self._used: dict[int, int] = defaultdict(int)
        self._held: OrderedDict[tuple[int, int], _Held] = OrderedDict()
        self.layers = self._build_layers(bundle)

    @property
    def nbytes(self) -> int:
        """Bytes of the arena that are in use."""
        return sum(held.nbytes for held in self._held.values())

    def expert(self, layer_index: int, pool_index: int) -> HeldParts:
        """Parts of a pool expert, fetched if it is not there; valid until the next call.

        Raises:
            DamagedInput: The bundle's file has become shorter.
        """
        key = (layer_index, pool_index)
        if key in self._held:
            self.hits += 1
            self._held.move_to_end(key)
        else:
            self.misses += 1
            stored = self._mapped(layer_index, pool_index)
            forms = self._forms(layer_index, pool_index)
            memory = self._take(layer_index, forms)
            self._held[key] = self._fill(memory, stored)
            self._used[layer_index] += self._held[key].nbytes
        return self._held[key].parts

    def verify_integrity(self) -> None:
        """Prove that what is held is the bundle's, in no more bytes than there are.

        Raises:
            DamagedInput: It is not.
        """
        assert self.nbytes <= self._arena_bytes
        assert self.nbytes == sum(self._used.values())
        for (layer_index, pool_index), held in self._held.items():
            stored = self._mapped(layer_index, pool_index)
            for part, matrix in held.parts.items():
                if not _has_values_of(matrix, stored[part]):
                    raise DamagedBundle(f"pool expert {pool_index} of layer {layer_index}: {part} differs")

    def _build_layers(self, bundle: Bundle) -> dict[int, PoolLayer]:
        activation, scratch = activation_of(bundle), _scratch_of(bundle, self._dtype, self._device)
        layers: dict[int, PoolLayer] = {}
        for layer in bundle.manifest.layers:
            if scratch is None or not needs_effective(bundle, layer):
                layers[layer.index] = _CachedLayer(self, layer.index, activation)
            else:
                rows, source = self.rows.layers[layer.index], partial(self.expert, layer.index)
                layers[layer.index] = effective_layer(layer, rows, source, scratch, activation)
        return layers

    def _sizes(self, layer_index: int) -> list[int]:
        """Bytes that each pool expert of a layer takes in the arena."""
        rows = self.rows.layers[layer_index]
        return [
            sum(plain_bytes(matrix, self._dtype, number in rows.residual_bases) for matrix in parts.values())
            for number, parts in enumerate(self._sources[layer_index])
        ]

    def _forms(self, layer_index: int, pool_index: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of the tensors that a pool expert takes in memory, by name."""
        is_base = pool_index in self.rows.layers[layer_index].residual_bases
        forms: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for part, matrix in self._sources[layer_index][pool_index].items():
            if isinstance(matrix, StoredTensor):
                forms[part] = (TORCH_DTYPES[matrix.dtype] if is_base else self._dtype, matrix.shape)
            else:
                for suffix, place in matrix.places.items():
                    forms[f"{part}.{suffix}"] = (TORCH_DTYPES[place.dtype], place.shape)
        return forms

    def _mapped(self, layer_index: int, pool_index: int) -> dict[str, Matrix]:
        for matrix in self._sources[layer_index][pool_index].values():
            for place in [matrix] if isinstance(matrix, StoredTensor) else matrix.places.values():
                require_mapped(place)
        return self._stored[layer_index][pool_index]

    def _take(self, layer_index: int, forms: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> Parts:
        """Memory for a pool expert, of those that make room if it has the same form."""
        nbytes = sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in forms.values())
        found: Parts | None = None
        while sum(self._used.values()) + nbytes > self._arena_bytes:
            memory = self._give_up(layer_index, nbytes)
            if {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in memory.items()} == forms:
                found = memory
        return found or {
            name: torch.empty(shape, dtype=dtype, device=self._device)
            for name, (dtype, shape) in forms.items()
        }

    def _give_up(self, layer_index: int, nbytes: int) -> Parts:
        """Set an expert aside for one of so many bytes in a layer; gives back its memory."""
        total = sum(self._layer_bytes.values())

        def excess(index: int) -> int:
            used = self._used[index] + (nbytes if index == layer_index else 0)
            return used * total - self._layer_bytes[index] * self._arena_bytes

        holders = {index for index, _ in self._held}
        victim = max(holders, key=lambda index: (excess(index), index == layer_index, -index))
        key = next(key for key in self._held if key[0] == victim)
        held = self._held.pop(key)
        self._used[victim] -= held.nbytes
        return held.memory

    def _fill(self, memory: Parts, stored: Mapping[str, Matrix]) -> _Held:
        parts: HeldParts = {}
        for part, matrix in stored.items():
            if isinstance(matrix, Tensor):
                memory[part].copy_(matrix)
                parts[part] = memory[part]
                continue
            codes, scales = memory[f"{part}.codes"], memory[f"{part}.scales"]
            codes.copy_(matrix.codes)
            scales.copy_(matrix.scales)
            held = PackedMatrix(codes, scales, matrix.bits, matrix.group)
            parts[part] = arrange(held, self._dtype, in_place=True)
        return _Held(memory, parts)


def load_pool(
    bundle: Bundle,
    dtype: torch.dtype,
    device: torch.device,
    *,
    memory_bytes: int | None,
    is_packed: bool = True,
) -> ExpertPool | CachedExpertPool:
    """The pool, all of it when it fits into `memory_bytes`.

    Raises:
        NotEnoughRoom: Not even one pool expert fits.
    """
    if memory_bytes is None or pool_bytes(bundle, dtype, device, is_packed=is_packed) <= memory_bytes:
        return ExpertPool(bundle, dtype, device, is_packed=is_packed)
    return CachedExpertPool(bundle, dtype, device, arena_bytes=memory_bytes)


def pool_bytes(
    bundle: Bundle, dtype: torch.dtype, device: torch.device | None = None, *, is_packed: bool = True
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
                total += _coded_bytes(
                    parts, dtype, device, is_base=is_base, in_place=is_base or not is_packed
                )
    return total


def activation_of(bundle: Bundle) -> Activation:
    """Form of the experts; the same in every variant, whose settings must agree on it."""
    first = next(iter(bundle.manifest.variants.values()))
    return Activation(str(first.settings["activation"]))


def _scratch_of(bundle: Bundle, dtype: torch.dtype, device: torch.device) -> Scratch | None:
    """Memory to unpack experts in, if there are any to unpack."""
    if not any(needs_effective(bundle, layer) for layer in bundle.manifest.layers):
        return None
    shapes = {part: (rows, columns) for part, (rows, columns) in bundle.manifest.parts.items()}
    return Scratch(shapes, dtype, device)


def plain_bytes(matrix: StoredMatrix, dtype: torch.dtype, is_base: bool) -> int:
    """Bytes of a part in memory: plain ones in the dtype of computing, unless something is added to them."""
    if isinstance(matrix, StoredTensor) and not is_base:
        return matrix.num_elements * dtype.itemsize
    return matrix.nbytes


def _coded_bytes(
    parts: PoolParts, dtype: torch.dtype, device: torch.device, *, is_base: bool, in_place: bool
) -> int:
    """Bytes of a coded expert in the layout that its product takes."""
    codes = {part: matrix for part, matrix in parts.items() if isinstance(matrix, StoredCodes)}
    forms = {part: (matrix.bits, matrix.group, matrix.shape) for part, matrix in codes.items()}
    if "gate" in forms and not is_base:
        (bits, group, (num_gate, width)), (_, _, (num_up, _)) = forms.pop("gate"), forms.pop("up")
        forms["gate_up"] = (bits, group, (num_gate + num_up, width))
    return sum(arranged_bytes(*form, dtype, device, in_place=in_place) for form in forms.values())


def _has_values_of(held: Tensor | Coded, stored: Matrix) -> bool:
    if isinstance(held, Tensor):
        return isinstance(stored, Tensor) and torch.equal(stored.to(held.dtype), held.cpu())
    return not isinstance(stored, Tensor) and torch.equal(stored.dense(), held.dense().cpu())


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
