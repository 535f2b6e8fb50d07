"""Open a bundle: its manifest, and every tensor by role as a place in a file."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from moemerge.bundle.layout import pool_tensor
from moemerge.bundle.manifest import Manifest, PoolLayer, VariantEntry, read_manifest
from moemerge.checkpoint.checkpoint import Parts
from moemerge.checkpoint.family import Family, evaluate_shape, find_family
from moemerge.checkpoint.headers import StoredTensor, read_header
from moemerge.checkpoint.tensors import map_tensors
from moemerge.errors import DamagedBundle, NotFound


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

    def pool(self, index: int) -> list[Parts]:
        """Places of the parts of every pool expert of a layer.

        Raises:
            DamagedBundle: The file does not hold what the manifest says.
        """
        layer = self.layer(index)
        stored = self._headers[layer.file]
        pool = [
            {part: self._find(stored, layer.file, pool_tensor(number, part)) for part in self.manifest.parts}
            for number in range(layer.num_experts)
        ]
        for parts in pool:
            for part, tensor in parts.items():
                self._check_shape(tensor, tuple(self.manifest.parts[part]))
        if len(stored) != layer.num_experts * len(self.manifest.parts):
            raise DamagedBundle(f"{self.folder / layer.file}: holds tensors that the manifest does not know")
        return pool

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

    def map_pool(self, index: int) -> list[dict[str, Tensor]]:
        """Parts of every pool expert of a layer, as views of the mapped file."""
        tensors = map_tensors(self.folder / self.layer(index).file)
        self.pool(index)
        return [
            {part: tensors[pool_tensor(number, part)] for part in self.manifest.parts}
            for number in range(self.layer(index).num_experts)
        ]

    def stored_names(self, file: str) -> set[str]:
        """Names of all tensors in one of the bundle's files."""
        return set(self._headers[file])

    @cached_property
    def _headers(self) -> dict[str, dict[str, StoredTensor]]:
        files = {layer.file for layer in self.manifest.layers}
        files |= {file for variant in self.manifest.variants.values() for file in variant.tensors.values()}
        return {file: read_header(self.folder / file) for file in sorted(files)}

    def _find(self, stored: dict[str, StoredTensor], file: str, name: str) -> StoredTensor:
        if name not in stored:
            raise DamagedBundle(f"{self.folder / file}: no tensor {name}, which the manifest places there")
        return stored[name]

    def _check_shape(self, tensor: StoredTensor, expected: tuple[int, ...]) -> None:
        if tensor.shape != expected:
            raise DamagedBundle(
                f"{tensor.path}: {tensor.name} has shape {list(tensor.shape)}, expected {list(expected)}"
            )


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
        if not absent_on_purpose and (
            type(value) not in _KINDS[rule.kind] or (isinstance(value, int) and value < 0)
        ):
            raise DamagedBundle(
                f"{bundle.folder}: variant {variant}: setting {name} is {value!r}, expected a {rule.kind}"
            )


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
