"""Open a bundle: its manifest, and every tensor by role as a place in a file."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from moemerge.bundle.layout import pool_tensor
from moemerge.bundle.manifest import Manifest, PoolLayer, VariantEntry, read_manifest
from moemerge.checkpoint.checkpoint import Parts
from moemerge.checkpoint.family import Family, find_family
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
                if tensor.shape != tuple(self.manifest.parts[part]):
                    raise DamagedBundle(
                        f"{self.folder / layer.file}: {tensor.name} has shape {list(tensor.shape)}, "
                        f"expected {self.manifest.parts[part]}"
                    )
        if len(stored) != layer.num_experts * len(self.manifest.parts):
            raise DamagedBundle(f"{self.folder / layer.file}: holds tensors that the manifest does not know")
        return pool

    def tensors(self, variant: str) -> dict[str, StoredTensor]:
        """Places of a variant's non-expert tensors by role.

        Raises:
            DamagedBundle: A tensor is not where the manifest says, or its family does not know it.
        """
        entry = self.variant(variant)
        roles = {name: role for role, name in self.family.role_names(entry.settings).items()}
        found = {}
        for name, file in entry.tensors.items():
            if name not in roles:
                raise DamagedBundle(
                    f"{self.folder}: variant {variant}: {name} is not part of {self.family.title}"
                )
            found[roles[name]] = self._find(self._headers[file], file, name)
        return found

    def side_file(self, variant: str, name: str) -> Path | None:
        """Place of a variant's tokenizer, config or template file, if it has one."""
        path = self.variant(variant).files.get(name)
        return self.folder / path if path else None

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


def open_bundle(folder: Path) -> Bundle:
    """Read and check the manifest of a bundle.

    Raises:
        NotFound, UnsupportedCheckpoint, DamagedBundle: As `read_manifest`.
    """
    manifest = read_manifest(folder)
    return Bundle(folder, manifest, find_family(manifest.family, str(folder)))


def is_bundle(folder: Path) -> bool:
    """Whether a folder looks like a bundle."""
    return (folder / "moemerge.json").is_file()
