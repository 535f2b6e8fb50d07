"""Non-expert tensors in device memory: each once, counted by the variants that use it.

Tensors that the bundle stores once for several variants are one tensor here too and never moved for
the second of them. Memory of a variant that is set aside serves the one that takes its place, where shapes
agree, since fresh memory costs several times the copy (page faults). Where nothing will ever be set aside,
matrices may take the packed layout instead, which costs more to fill and less to multiply with. A variant's
residuals come and go with it, as they are stored, or arranged for products of their own.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moemerge.bundle.reader import Bundle, ResidualParts
from moemerge.checkpoint.headers import StoredTensor
from moemerge.checkpoint.tensors import TORCH_DTYPES, map_tensors, require_mapped
from moemerge.errors import DamagedBundle
from moemerge.models.arranging import Room
from moemerge.models.packed import Residual
from moemerge.models.products import can_pack
from moemerge.models.weights import is_only_multiplied
from moemerge.runner.rows import VariantResiduals
from moemerge.runner.transfer import Piece, ToArrange, Transfer


@dataclass(frozen=True, slots=True)
class Placement:
    """A variant's tensors.

    Attributes:
        tensors: Non-expert tensors by role.
        residuals: Parts by name, by layer index and slot.
        pieces: All tensors, those of residuals too, each once.
        stored_bytes: Of all of them, in the bundle.
    """

    tensors: Mapping[str, Piece]
    residuals: Mapping[tuple[int, int], ResidualParts]
    pieces: tuple[Piece, ...]
    stored_bytes: int


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
        room: Room = Room.NONE,
    ) -> None:
        """Know some variants' tensors.

        Args:
            bundle: Theirs.
            variants: Names.
            dtype: Of non-expert tensors in memory.
            device: Where that is.
            is_packed: Whether matrices may take the packed layout.
            room: What residuals may take for products of their own.

        Raises:
            NotFound, DamagedBundle: As `add`.
        """
        self.is_packed = is_packed and can_pack(dtype, device)
        self._room = room
        self.dtype = dtype
        self.device = device
        self._bundle = bundle
        self._placements: dict[str, Placement] = {}
        self._pieces: dict[StoredTensor, Piece] = {}
        self._mapped: dict[str, dict[str, Tensor]] = {}
        self._arranged: dict[str, VariantResiduals] = {}
        self._spare: dict[tuple[torch.dtype, torch.Size], list[Tensor]] = defaultdict(list)
        for variant in variants:
            self.add(variant)

    def add(self, variant: str) -> None:
        """Know a variant's tensors.

        Raises:
            NotFound, DamagedBundle: As `Bundle.tensors` and `Bundle.residuals`.
        """
        residuals = _residuals_of(self._bundle, variant)
        stored = self._bundle.tensors(variant)
        tensors = {role: self._piece(place, self.dtype) for role, place in stored.items()}
        matrices = [matrix for parts in residuals.values() for matrix in parts.values()]
        coded = [place for matrix in matrices for place in matrix.places.values()]
        pieces = list(tensors.values())
        if not self._arranges:
            pieces += [self._piece(place, TORCH_DTYPES[place.dtype]) for place in coded]
        unique = tuple(dict.fromkeys(pieces))
        stored_bytes = sum(piece.stored_bytes for piece in unique)
        if self._arranges:
            stored_bytes += sum(place.nbytes for place in coded)
        self._placements[variant] = Placement(tensors, residuals, unique, stored_bytes)

    def forget(self, variant: str) -> None:
        """Know a variant no more; it must not be held."""
        placement = self._placements.pop(variant)
        assert not any(variant in piece.users for piece in placement.pieces)
        known = (piece for other in self._placements.values() for piece in other.pieces)
        self._pieces = {piece.place: piece for piece in known}
        self._spare.clear()

    @property
    def resident_bytes(self) -> int:
        """Bytes of tensors in use."""
        arranged = [parts for residuals in self._arranged.values() for parts in residuals.values()]
        held = sum(tensor.nbytes for _, tensor in self._held())
        return held + sum(matrix.nbytes for parts in arranged for matrix in parts.values())

    @property
    def shared_bytes(self) -> int:
        """Bytes that residents would take more if each kept tensors of its own."""
        return sum((len(piece.users) - 1) * tensor.nbytes for piece, tensor in self._held())

    def set_bytes(self, variants: Collection[str]) -> int:
        """Bytes that these variants take together in device memory."""
        pieces = {piece for variant in variants for piece in self._placements[variant].pieces}
        return sum(piece.place.num_elements * piece.dtype.itemsize for piece in pieces)

    def stored_bytes(self, variant: str) -> int:
        """Bytes that a variant's tensors take in the bundle."""
        return self._placements[variant].stored_bytes

    def weights(self, variant: str) -> dict[str, Tensor]:
        """Non-expert tensors of a resident variant by role."""
        return {role: _in_memory(piece) for role, piece in self._placements[variant].tensors.items()}

    def residuals(self, variant: str) -> VariantResiduals:
        """Residuals of a resident variant."""
        if self._arranges:
            return self._arranged[variant]
        return self._assembled(variant, lambda place: _in_memory(self._pieces[place]))

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
        missing = [piece for piece in placement.pieces if not piece.users]
        packs = self._to_be_packed(placement).intersection(missing)
        for piece in placement.pieces:
            piece.users.add(variant)
        for held in instead_of:
            self.release(held)
        try:
            sources = [self._source(piece.place) for piece in missing]
            residuals = self._to_be_arranged(variant)
            for piece in missing:
                if piece not in packs:
                    piece.tensor = self._take(piece)
        except Exception:
            self.release(variant)
            raise
        finally:
            self._spare.clear()
        kept_bytes = sum(piece.stored_bytes for piece in placement.pieces if piece not in missing)
        pairs = list(zip(missing, sources, strict=True))
        return Transfer(
            variant,
            tuple((p.place, source, p.tensor) for p, source in pairs if p.tensor is not None),
            tuple((piece, source) for piece, source in pairs if piece in packs),
            placement.stored_bytes - kept_bytes,
            kept_bytes,
            dtype=self.dtype,
            residuals=residuals,
        )

    def finish(self, transfer: Transfer) -> None:
        """The copies are made; the variant may be used."""
        for piece, tensor in transfer.packed.items():
            piece.tensor = tensor
        if self._arranges:
            self._arranged[transfer.variant] = transfer.arranged

    def release(self, variant: str) -> None:
        """Set a variant aside; memory that nobody else uses is for the one that comes next."""
        self._arranged.pop(variant, None)
        for piece in self._placements[variant].pieces:
            piece.users.discard(variant)
            if not piece.users:
                tensor, piece.tensor = piece.tensor, None
                if tensor is not None and tensor.layout == torch.strided:
                    self._spare[tensor.dtype, tensor.shape].append(tensor)

    def verify_integrity(self, residents: Collection[str]) -> None:
        """Prove that what is held is what the residents need, with the bundle's values.

        Raises:
            DamagedInput: It is not, or the bundle changed underneath.
        """
        expected = {piece for variant in residents for piece in self._placements[variant].pieces}
        held = dict(self._held())
        if expected != held.keys():
            raise DamagedBundle(f"tensors in memory are not those of {', '.join(sorted(residents))}")
        for piece, tensor in held.items():
            require_mapped(piece.place)
            dense = tensor.cpu() if tensor.layout == torch.strided else tensor.to_dense()
            if not torch.equal(self._source(piece.place).to(piece.dtype), dense):
                raise DamagedBundle(f"{piece.place.path}: {piece.place.name} differs from what is in memory")
        for variant, residuals in self._arranged.items():
            self._verify_arranged(variant, residuals)

    def _held(self) -> Iterator[tuple[Piece, Tensor]]:
        return ((piece, piece.tensor) for piece in self._pieces.values() if piece.tensor is not None)

    @property
    def _arranges(self) -> bool:
        """Whether residuals are arranged from the bundle's files, where they stay; else they are pieces."""
        return self._room == Room.FOUR_BITS

    def _to_be_arranged(self, variant: str) -> dict[tuple[int, int], dict[str, ToArrange]]:
        if not self._arranges:
            return {}
        mapped = self._assembled(variant, self._source)
        return {
            key: {part: (stored, mapped[key][part]) for part, stored in parts.items()}
            for key, parts in self._placements[variant].residuals.items()
        }

    def _verify_arranged(self, variant: str, residuals: VariantResiduals) -> None:
        for (layer_index, slot), parts in self._to_be_arranged(variant).items():
            for part, (stored, mapped) in parts.items():
                for place in stored.places.values():
                    require_mapped(place)
                if not torch.equal(residuals[layer_index, slot][part].dense(), mapped.dense()):
                    where = f"variant {variant}, layer {layer_index}, slot {slot}"
                    raise DamagedBundle(f"{where}: {part} differs from what is in memory")

    def _assembled(
        self, variant: str, read: Callable[[StoredTensor], Tensor]
    ) -> dict[tuple[int, int], dict[str, Residual]]:
        """A variant's residuals as they are stored."""
        return {
            key: {part: matrix.assemble(read) for part, matrix in parts.items()}
            for key, parts in self._placements[variant].residuals.items()
        }

    def _piece(self, place: StoredTensor, dtype: torch.dtype) -> Piece:
        return self._pieces.setdefault(place, Piece(place, dtype, place.nbytes))

    def _to_be_packed(self, placement: Placement) -> set[Piece]:
        """Matrices stored in the dtype of the engine that are used for nothing but products."""
        if not self.is_packed:
            return set()
        tensors = placement.tensors
        others = {piece for role, piece in tensors.items() if not is_only_multiplied(role)}
        return {piece for piece in tensors.values() if TORCH_DTYPES[piece.place.dtype] == self.dtype} - others

    def _take(self, piece: Piece) -> Tensor:
        shape = torch.Size(piece.place.shape)
        spare = self._spare[piece.dtype, shape]
        return spare.pop() if spare else torch.empty(shape, dtype=piece.dtype, device=self.device)

    def _source(self, place: StoredTensor) -> Tensor:
        file = str(place.path)
        if file not in self._mapped:
            self._mapped[file] = map_tensors(place.path)
        return self._mapped[file][place.name]


def _residuals_of(bundle: Bundle, variant: str) -> dict[tuple[int, int], ResidualParts]:
    return {
        (index, slot): parts
        for index in bundle.variant(variant).residual_layers
        for slot, parts in enumerate(bundle.residuals(variant, index))
        if parts
    }


def _in_memory(piece: Piece) -> Tensor:
    assert piece.tensor is not None, f"{piece.place.name} is not in memory"
    return piece.tensor
