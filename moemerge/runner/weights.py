"""Non-expert tensors in device memory: each once, counted by the variants that use it.

Tensors that the bundle stores once for several variants are one tensor here too and never moved for
the second of them. Memory of a variant that is set aside serves the one that takes its place, where shapes
agree, since fresh memory costs several times the copy (page faults). Where nothing will ever be set aside,
matrices may take the packed layout instead, which costs more to fill and less to multiply with. A variant's
residuals come and go with it, as they are stored.
"""

import time
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moemerge.bundle.reader import Bundle, ResidualParts
from moemerge.checkpoint.headers import StoredTensor
from moemerge.checkpoint.tensors import TORCH_DTYPES, map_tensors, require_mapped
from moemerge.errors import DamagedBundle
from moemerge.models.products import can_pack, pack
from moemerge.models.weights import is_only_multiplied
from moemerge.runner.rows import VariantResiduals


@dataclass(frozen=True, slots=True)
class Placement:
    """A variant's tensors as places in the bundle's files.

    Attributes:
        tensors: Non-expert tensors by role.
        residuals: Parts by name, by layer index and slot.
        coded: The tensors of all residuals, which keep their stored dtype.
        places: All of them, each once.
    """

    tensors: Mapping[str, StoredTensor]
    residuals: Mapping[tuple[int, int], ResidualParts]
    coded: tuple[StoredTensor, ...]
    places: tuple[StoredTensor, ...]


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

    What is in `packs` gets memory of its own when it is packed.
    """

    variant: str
    copies: tuple[tuple[StoredTensor, Tensor, Tensor], ...]
    packs: tuple[tuple[StoredTensor, Tensor], ...]
    kept_bytes: int
    packed: dict[StoredTensor, Tensor] = field(default_factory=dict)

    @property
    def moved_bytes(self) -> int:
        """Bytes to be read, in the bundle's dtype."""
        return sum(place.nbytes for place, *_ in (*self.copies, *self.packs))

    def carry_out(self, *, is_alone: bool = False) -> Swap:
        """Copy everything, in the order of the layers; may run on another thread.

        Args:
            is_alone: Nothing computes meanwhile, so that copies may take all processors.

        Raises:
            DamagedInput: A file of the bundle has become shorter.
        """
        begin = time.perf_counter()
        for place, source, target in self.copies:
            require_mapped(place)
            _copy(source, target, is_alone=is_alone)
        for place, source in self.packs:
            require_mapped(place)
            self.packed[place] = pack(source)
        return Swap(
            variant=self.variant,
            moved_bytes=self.moved_bytes,
            kept_bytes=self.kept_bytes,
            seconds=time.perf_counter() - begin,
        )


class WeightStore:
    """Non-expert tensors of the resident variants, and where those of the others are."""

    def __init__(
        self,
        bundle: Bundle,
        variants: Collection[str],
        dtype: torch.dtype,
        device: torch.device,
        *,
        is_packed: bool = False,
    ) -> None:
        self.is_packed = is_packed and can_pack(dtype, device)
        self.dtype = dtype
        self.device = device
        self._bundle = bundle
        self._placements: dict[str, Placement] = {}
        self._mapped: dict[str, dict[str, Tensor]] = {}
        self._held: dict[StoredTensor, Tensor] = {}
        self._users: dict[StoredTensor, set[str]] = defaultdict(set)
        self._coded: set[StoredTensor] = set()
        self._spare: dict[tuple[torch.dtype, torch.Size], list[Tensor]] = defaultdict(list)
        for variant in variants:
            self.add(variant)

    def add(self, variant: str) -> None:
        """Know a variant's tensors.

        Raises:
            NotFound, DamagedBundle: As `Bundle.tensors` and `Bundle.residuals`.
        """
        self._placements[variant] = placement = _placement_of(self._bundle, variant)
        self._coded |= set(placement.coded)

    def forget(self, variant: str) -> None:
        """Know a variant no more; it must not be held."""
        placement = self._placements.pop(variant)
        assert not any(variant in self._users.get(tensor, ()) for tensor in placement.places)
        self._spare.clear()

    @property
    def resident_bytes(self) -> int:
        """Bytes of tensors in use."""
        return sum(tensor.nbytes for tensor in self._held.values())

    @property
    def shared_bytes(self) -> int:
        """Bytes that residents would take more if each kept tensors of its own."""
        return sum((len(self._users[place]) - 1) * tensor.nbytes for place, tensor in self._held.items())

    def set_bytes(self, variants: Collection[str]) -> int:
        """Bytes that these variants take together in device memory."""
        distinct = {place for variant in variants for place in self._placements[variant].places}
        return sum(place.num_elements * self._dtype_of(place).itemsize for place in distinct)

    def stored_bytes(self, variant: str) -> int:
        """Bytes that a variant's tensors take in the bundle."""
        return sum(place.nbytes for place in self._placements[variant].places)

    def weights(self, variant: str) -> dict[str, Tensor]:
        """Non-expert tensors of a resident variant by role."""
        return {role: self._held[place] for role, place in self._placements[variant].tensors.items()}

    def residuals(self, variant: str) -> VariantResiduals:
        """Residuals of a resident variant."""
        return {
            key: {part: matrix.assemble(self._held.__getitem__) for part, matrix in parts.items()}
            for key, parts in self._placements[variant].residuals.items()
        }

    def prepare(self, variant: str, instead_of: Collection[str] = ()) -> Transfer:
        """Memory for a variant and the copies that fill it; nobody may use it before they are made.

        Args:
            variant: Not held yet.
            instead_of: Held variants to set aside for it, also when this fails; what they share with it stays
                where it is.

        Raises:
            RuntimeError: There is no memory.
            DamagedInput, NotFound: A file of the bundle cannot be mapped.
        """
        placement = self._placements[variant]
        places = placement.places
        missing = [place for place in places if place not in self._held]
        packs = self._to_be_packed(placement).intersection(missing)
        for place in places:
            self._users[place].add(variant)
        for held in instead_of:
            self.release(held)
        try:
            sources = {place: self._source(place) for place in missing}
            taken = {place: self._take(place) for place in missing if place not in packs}
        except Exception:
            self.release(variant)
            raise
        finally:
            self._spare.clear()
        self._held.update(taken)
        return Transfer(
            variant,
            tuple((place, sources[place], tensor) for place, tensor in taken.items()),
            tuple((place, sources[place]) for place in missing if place in packs),
            sum(place.nbytes for place in places) - sum(place.nbytes for place in missing),
        )

    def finish(self, transfer: Transfer) -> None:
        """The copies are made; the variant may be used."""
        self._held.update(transfer.packed)

    def release(self, variant: str) -> None:
        """Set a variant aside; memory that nobody else uses is for the one that comes next."""
        for place in self._placements[variant].places:
            self._users[place].discard(variant)
            if not self._users[place]:
                del self._users[place]
                tensor = self._held.pop(place, None)
                if tensor is not None and tensor.layout == torch.strided:
                    self._spare[tensor.dtype, tensor.shape].append(tensor)

    def verify_integrity(self, residents: Collection[str]) -> None:
        """Prove that what is held is what the residents need, with the bundle's values.

        Raises:
            DamagedInput: It is not, or the bundle changed underneath.
        """
        expected = {place for variant in residents for place in self._placements[variant].places}
        if expected != self._held.keys():
            raise DamagedBundle(f"tensors in memory are not those of {', '.join(sorted(residents))}")
        for place, tensor in self._held.items():
            require_mapped(place)
            held = tensor.cpu() if tensor.layout == torch.strided else tensor.to_dense()
            if not torch.equal(self._source(place).to(self._dtype_of(place)), held):
                raise DamagedBundle(f"{place.path}: {place.name} differs from what is in memory")

    def _to_be_packed(self, placement: Placement) -> set[StoredTensor]:
        """Matrices stored in the dtype of the engine that are used for nothing but products."""
        if not self.is_packed:
            return set()
        tensors = placement.tensors
        others = {place for role, place in tensors.items() if not is_only_multiplied(role)}
        return {place for place in tensors.values() if TORCH_DTYPES[place.dtype] == self.dtype} - others

    def _dtype_of(self, place: StoredTensor) -> torch.dtype:
        """The dtype of a tensor in memory."""
        return TORCH_DTYPES[place.dtype] if place in self._coded else self.dtype

    def _take(self, place: StoredTensor) -> Tensor:
        dtype, shape = self._dtype_of(place), torch.Size(place.shape)
        spare = self._spare[dtype, shape]
        return spare.pop() if spare else torch.empty(shape, dtype=dtype, device=self.device)

    def _source(self, place: StoredTensor) -> Tensor:
        file = str(place.path)
        if file not in self._mapped:
            self._mapped[file] = map_tensors(place.path)
        return self._mapped[file][place.name]


def _placement_of(bundle: Bundle, variant: str) -> Placement:
    tensors = bundle.tensors(variant)
    residuals = {
        (index, slot): parts
        for index in bundle.variant(variant).residual_layers
        for slot, parts in enumerate(bundle.residuals(variant, index))
        if parts
    }
    matrices = [matrix for parts in residuals.values() for matrix in parts.values()]
    coded = tuple(place for matrix in matrices for place in matrix.places.values())
    return Placement(tensors, residuals, coded, tuple(dict.fromkeys((*tensors.values(), *coded))))


def _copy(source: Tensor, target: Tensor, *, is_alone: bool) -> None:
    if not is_alone and target.device.type == "cpu" and source.dtype == target.dtype:
        # One thread and no lock of the interpreter, so that computing goes on beside it.
        target.view(torch.uint8).numpy()[...] = source.view(torch.uint8).numpy()
    else:
        target.copy_(source, non_blocking=False)
