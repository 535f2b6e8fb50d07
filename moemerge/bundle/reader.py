"""Open a bundle: its manifest, and every tensor by role as a place in a file."""

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch

from moemerge.bundle.coded import (
    StoredMatrix,
    StoredResidual,
    assemble,
    find_codes,
    find_residual,
    plain_parts,
)
from moemerge.bundle.layout import pool_tensor, residual_file, residual_tensor
from moemerge.bundle.manifest import Manifest, PoolLayer, VariantEntry, read_manifest
from moemerge.checkpoint.family import Family, Setting, SettingRule, evaluate_shape, find_family
from moemerge.checkpoint.headers import StoredTensor, read_header
from moemerge.checkpoint.settings import is_list_text
from moemerge.checkpoint.tensors import TORCH_DTYPES, map_tensors, torch_dtype
from moemerge.errors import DamagedBundle, NotFound
from moemerge.models.packed import Matrix, Residual

PoolParts = dict[str, StoredMatrix]
"""Places of a pool expert's parts by name."""
ResidualParts = dict[str, StoredResidual]
"""Places of a residual's parts by name."""


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk.

    Attributes:
        folder: Where it is.
        manifest: Its checked index.
        family: Description of its architecture.
    """

    folder: Path
    manifest: Manifest
    family: Family

    def variant(self, name: str) -> VariantEntry:
        """A variant's entry.

        Raises:
            NotFound: The bundle has no such variant; the message lists those it has.
        """
        if name not in self.manifest.variants:
            raise NotFound(
                f"{self.folder}: no variant {name!r}; it holds {', '.join(self.manifest.variants)}"
            )
        return self.manifest.variants[name]

    def layer(self, index: int) -> PoolLayer:
        """The pool of the layer with that index through all stacks."""
        return next(layer for layer in self.manifest.layers if layer.index == index)

    def pool(self, index: int) -> list[PoolParts]:
        """Places of the parts of every pool expert of a layer.

        Raises:
            DamagedBundle: The file does not hold what the manifest says.
        """
        layer = self.layer(index)
        stored = set(self._headers[layer.file])
        pool = [self._pool_expert(layer, number, stored) for number in range(layer.num_experts)]
        self._refuse_unknown(stored, layer.file)
        return pool

    def residuals(self, variant: str, index: int) -> list[ResidualParts | None]:
        """Places of the residuals of every slot of a variant in a layer; None for a slot without one.

        Raises:
            DamagedBundle: The file does not hold what the manifest says.
        """
        entry = self.variant(variant)
        if index not in entry.residual_layers:
            return [None] * self.manifest.num_slots
        file = residual_file(variant, index)
        stored = set(self._headers[file])
        found: list[ResidualParts | None] = []
        for slot, spec in enumerate(entry.residuals[index]):
            if spec is None:
                found.append(None)
                continue
            parts: ResidualParts = {}
            for part, shape in self.manifest.matrices.items():
                find = partial(self._claim, stored, file, residual_tensor(slot, part))
                parts[part] = find_residual(spec, shape, find)
            found.append(parts)
        self._refuse_unknown(stored, file)
        return found

    def residual_bytes(self, variant: str) -> int:
        """Bytes of all residuals of a variant."""
        layers = [self.residuals(variant, index) for index in self.variant(variant).residual_layers]
        return sum(matrix.nbytes for slots in layers for parts in slots if parts for matrix in parts.values())

    def tensors(self, variant: str) -> dict[str, StoredTensor]:
        """Places of a variant's non-expert tensors by role.

        Raises:
            DamagedBundle: A tensor is missing, not where the manifest says, of another shape than the
                settings give, or not part of the family.
        """
        entry = self.variant(variant)
        symbols = self.family.symbols(entry.settings)
        unknown = set(entry.tensors)
        found = {}
        for role, (name, *_), pattern in self.family.expected_tensors(entry.settings):
            if name not in unknown and pattern.tied_to and entry.settings["tied_head"]:
                continue
            if name not in unknown:
                raise DamagedBundle(f"{self.folder}: variant {variant}: {name} is missing")
            unknown.discard(name)
            file = entry.tensors[name]
            found[role] = self._find(self._headers[file], file, name)
            self._check_shape(found[role], evaluate_shape(pattern.shape, symbols))
        if unknown:
            raise DamagedBundle(
                f"{self.folder}: variant {variant}: {min(unknown)} is not part of {self.family.title}"
            )
        return found

    def side_file(self, variant: str, name: str) -> Path | None:
        """Place of a variant's tokenizer, config or template file, if it has one.

        Raises:
            DamagedBundle: It should be there and is not.
        """
        if name not in self.variant(variant).files:
            return None
        path = self.folder / self.variant(variant).files[name]
        if not path.is_file():
            raise DamagedBundle(f"{path}: is missing. Copy or build the bundle again")
        return path

    def map_pool(self, index: int) -> list[dict[str, Matrix]]:
        """Parts of every pool expert of a layer, as views of the mapped file."""
        tensors = map_tensors(self.folder / self.layer(index).file)
        return [
            {part: assemble(matrix, lambda place: tensors[place.name]) for part, matrix in parts.items()}
            for parts in self.pool(index)
        ]

    def map_residuals(self, variant: str, index: int) -> list[dict[str, Residual] | None]:
        """Residuals of every slot of a variant in a layer, as views of the mapped file."""
        stored = self.residuals(variant, index)
        if not any(stored):
            return [None] * len(stored)
        tensors = map_tensors(self.folder / residual_file(variant, index))
        return [
            {part: matrix.assemble(lambda place: tensors[place.name]) for part, matrix in parts.items()}
            if parts
            else None
            for parts in stored
        ]

    def stored(self, file: str, name: str) -> StoredTensor:
        """A tensor of one of the bundle's files.

        Raises:
            DamagedBundle: The file does not hold it.
        """
        return self._find(self._headers[file], file, name)

    def stored_names(self, file: str) -> set[str]:
        """Names of all tensors in one of the bundle's files."""
        return set(self._headers[file])

    @property
    def weight_files(self) -> list[str]:
        """Every file that holds tensors, in order."""
        files = {layer.file for layer in self.manifest.layers}
        for name, variant in self.manifest.variants.items():
            files |= {*variant.tensors.values(), *residual_files(name, variant)}
        return sorted(files)

    @cached_property
    def _headers(self) -> dict[str, dict[str, StoredTensor]]:
        return {file: read_header(self.folder / file) for file in self.weight_files}

    def _find(self, stored: dict[str, StoredTensor], file: str, name: str) -> StoredTensor:
        if name not in stored:
            raise DamagedBundle(f"{self.folder / file}: no tensor {name}, which the manifest places there")
        return stored[name]

    def _pool_expert(self, layer: PoolLayer, number: int, unclaimed: set[str]) -> PoolParts:
        """Places of a pool expert's parts; takes their names out of `unclaimed`."""
        spec = layer.code(number)
        parts: PoolParts = {}
        matrices = self.manifest.matrices
        for part, shape in self.manifest.parts.items():
            name = pool_tensor(number, part)
            if spec is None or part not in matrices:
                parts[part] = plain = self._find(self._headers[layer.file], layer.file, name)
                self._check_shape(plain, tuple(shape))
                unclaimed.discard(name)
            else:
                find = partial(self._claim, unclaimed, layer.file, name)
                parts[part] = find_codes(spec, matrices[part], find)
        return parts

    def _claim(
        self, unclaimed: set[str], file: str, stem: str, suffix: str, dtype: str, shape: tuple[int, ...]
    ) -> StoredTensor:
        """The tensor of a coded matrix; takes its name out of `unclaimed`."""
        tensor = self._find(self._headers[file], file, f"{stem}.{suffix}")
        self._check_shape(tensor, shape)
        if tensor.dtype != dtype:
            raise DamagedBundle(f"{tensor.path}: {tensor.name} is {tensor.dtype}, expected {dtype}")
        unclaimed.discard(tensor.name)
        return tensor

    def _refuse_unknown(self, unclaimed: set[str], file: str) -> None:
        if unclaimed:
            raise DamagedBundle(
                f"{self.folder / file}: holds tensors that the manifest does not know; first {min(unclaimed)}"
            )

    def _check_shape(self, tensor: StoredTensor, expected: tuple[int, ...]) -> None:
        if tensor.shape != expected:
            raise DamagedBundle(
                f"{tensor.path}: {tensor.name} has shape {list(tensor.shape)}, expected {list(expected)}"
            )


def residual_files(variant: str, entry: VariantEntry) -> list[str]:
    """Files of a variant's residuals."""
    return [residual_file(variant, index) for index in entry.residual_layers]


def effective_dtype(layer: PoolLayer) -> torch.dtype:
    """The dtype that effective experts of a layer are rounded to."""
    assert layer.dtype is not None, "only layers with codes or residuals have effective experts"
    return TORCH_DTYPES[layer.dtype]


def expert_dtypes(bundle: Bundle, index: int) -> set[torch.dtype]:
    """Dtypes of a layer's experts as slots compute with them.

    Raises:
        UnsupportedCheckpoint: A dtype that moemerge does not compute with.
    """
    layer = bundle.layer(index)
    experts = [plain_parts(parts) or {} for parts in bundle.pool(index)]
    plain = {torch_dtype(place) for parts in experts for place in parts.values()}
    return plain | {effective_dtype(layer)} if layer.dtype else plain


def open_bundle(folder: Path) -> Bundle:
    """Read and check the manifest of a bundle.

    Raises:
        NotFound, UnsupportedCheckpoint, DamagedBundle: As `read_manifest`.
        DamagedBundle: Settings that its family cannot have, or that do not fit the pool.
    """
    manifest = read_manifest(folder)
    bundle = Bundle(folder, manifest, find_family(manifest.family, str(folder)))
    for name in manifest.variants:
        _check_settings(bundle, name)
        _check_geometry(bundle, name)
    return bundle


_KINDS = {"integer": (int,), "number": (int, float), "string": (str,), "boolean": (bool,)}


def _check_settings(bundle: Bundle, variant: str) -> None:
    """Every setting of the family is there and of its kind."""
    settings = bundle.variant(variant).settings
    for name, rule in bundle.family.settings.items():
        value = settings.get(name)
        absent_on_purpose = value is None and name in settings and rule.optional
        if not absent_on_purpose and not _is_of_kind(value, rule):
            expected = f"the text of a list of {rule.kind}" if rule.is_list else f"a {rule.value_kind}"
            raise DamagedBundle(
                f"{bundle.folder}: variant {variant}: setting {name} is {value!r}, expected {expected}"
            )


def _is_of_kind(value: Setting, rule: SettingRule) -> bool:
    if rule.is_list:
        return is_list_text(value, rule.kind)
    return type(value) in _KINDS[rule.value_kind] and not (isinstance(value, int) and value < 0)


def _check_geometry(bundle: Bundle, variant: str) -> None:
    """The settings give the layers, slots and part shapes that the pool has."""
    manifest, family, entry = bundle.manifest, bundle.family, bundle.variant(variant)
    # Layers are enumerated below; each has a tensor, so that a hostile count ends here.
    layers = sum(int(entry.settings[stack.layers] or 0) for stack in family.stacks)
    fits = (
        layers <= len(entry.tensors)
        and entry.settings["num_experts"] == manifest.num_slots
        and int(entry.settings["num_experts_per_token"] or 0) <= manifest.num_slots
        and [(layer.index, layer.stack, layer.block) for layer in family.routed_layers(entry.settings)]
        == [(layer.index, layer.stack, layer.block) for layer in manifest.layers]
        and {part: list(family.part_shape(part, entry.settings)) for part in family.experts.parts}
        == manifest.parts
    )
    if not fits:
        raise DamagedBundle(
            f"{bundle.folder}: variant {variant}: its settings do not give the layers, slots and expert "
            f"shapes of the pool. Build the bundle again"
        )


def is_bundle(folder: Path) -> bool:
    """Whether a folder looks like a bundle."""
    return (folder / "moemerge.json").is_file()
