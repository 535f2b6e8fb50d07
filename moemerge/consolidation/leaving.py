"""A variant leaves a bundle, and with it what only it used; what the others compute with stays as it is."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moemerge import __version__
from moemerge.bundle.layout import joining_file, side_file, variant_file
from moemerge.bundle.manifest import SCHEMA, Change, Features, Manifest, PoolLayer, VariantEntry
from moemerge.bundle.reader import Bundle, residual_files
from moemerge.bundle.writer import copy_tensors, write_pool
from moemerge.checkpoint.headers import StoredTensor
from moemerge.checkpoint.tensors import TensorReader
from moemerge.consolidation.encoding import to_write
from moemerge.consolidation.rewriting import Origin, Rewriting, open_rewriting, required_features
from moemerge.errors import InvalidRecipe
from moemerge.progress import Progress, Silent


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """What became of a bundle that a variant has left.

    Attributes:
        folder: The changed bundle.
        manifest: What was written.
        freed_bytes: Of pool experts and residuals.
    """

    folder: Path
    manifest: Manifest
    freed_bytes: int


def remove_variant(
    origin: Origin, name: str, *, restart: bool = False, progress: Progress | None = None
) -> Left:
    """Take a variant out of a bundle.

    Args:
        origin: The bundle, and where the changed one appears.
        name: Of the variant.
        restart: Discard the work of an interrupted run.
        progress: Told of bytes.

    Raises:
        NotFound: There is no such variant; the message lists those that are there.
        InvalidRecipe: It is the only one.
        NotEnoughRoom: Disk.
        DamagedBundle: A file of the bundle was changed since it was written.
        Busy: Another process writes the target, or has changed the bundle.
    """
    bundle = origin.bundle
    bundle.variant(name)
    if len(bundle.manifest.variants) == 1:
        raise InvalidRecipe(
            f"{bundle.folder}: {name} is its only variant. Remove the folder if it is not needed"
        )
    before = hashlib.sha256(json.dumps(sorted(origin.sums.items())).encode()).hexdigest()
    task = json.dumps(["remove", __version__, SCHEMA, before, name])
    leaving = _Leaving(origin, name, progress or Silent())
    origin.check_room(leaving.rewritten_bytes())
    with open_rewriting(origin, task, restart=restart) as rewriting, TensorReader() as reader:
        return leaving.run(rewriting, reader)


@dataclass(frozen=True, slots=True)
class _Leaving:
    """The steps of one removal."""

    origin: Origin
    name: str
    report: Progress

    @property
    def _bundle(self) -> Bundle:
        return self.origin.bundle

    @property
    def _staying(self) -> dict[str, VariantEntry]:
        return {name: entry for name, entry in self._bundle.manifest.variants.items() if name != self.name}

    def rewritten_bytes(self) -> int:
        """Bytes of the files that lose or take something and keep the rest."""
        layers = [layer for layer in self._bundle.manifest.layers if self._has_unused(layer)]
        _, contents = self._tensor_places()
        changed = [tensor for file in self._changed(contents) for tensor in contents[file].values()]
        return sum(map(self._pool_bytes, layers)) + sum(tensor.nbytes for tensor in changed)

    def run(self, rewriting: Rewriting, reader: TensorReader) -> Left:
        """Write what changes, keep the rest."""
        before = self._bundle.manifest
        self.report.start("bundle", self.rewritten_bytes())
        rewriting.keep(self.origin.sums)
        for file in [*residual_files(self.name, self._bundle.variant(self.name)), joining_file(self.name)]:
            rewriting.kept.pop(file, None)
        for layer in before.layers:
            if self._has_unused(layer):
                rewriting.kept.pop(layer.file)
                rewriting.step(f"pool {layer.index}", partial(self._write_pool, rewriting, layer))
        tensors = self._write_tensors(rewriting, reader)
        files = self._move_side_files(rewriting)
        rewriting.place_kept()
        entries = {
            name: entry.model_copy(
                update={
                    "tensors": tensors[name],
                    "files": files[name],
                    "maps": {layer.index: self._map(layer, entry) for layer in before.layers},
                }
            )
            for name, entry in self._staying.items()
        }
        manifest = rewriting.finish(self._manifest(entries))
        stored = manifest.pool_bytes + manifest.residual_bytes
        freed = before.pool_bytes + before.residual_bytes - stored
        return Left(folder=self.origin.target, manifest=manifest, freed_bytes=freed)

    def _used(self, layer: PoolLayer) -> list[int]:
        """Pool experts that somebody maps to who stays, ascending."""
        return sorted({index for entry in self._staying.values() for index in entry.maps[layer.index]})

    def _has_unused(self, layer: PoolLayer) -> bool:
        return len(self._used(layer)) < layer.num_experts

    def _map(self, layer: PoolLayer, entry: VariantEntry) -> list[int]:
        places = {old: new for new, old in enumerate(self._used(layer))}
        return [places[index] for index in entry.maps[layer.index]]

    def _pool_bytes(self, layer: PoolLayer) -> int:
        """Of the pool experts that stay."""
        pool = self._bundle.pool(layer.index)
        return sum(matrix.nbytes for index in self._used(layer) for matrix in pool[index].values())

    def _write_pool(self, rewriting: Rewriting, layer: PoolLayer) -> tuple[dict[str, str], dict[str, Any]]:
        self.origin.require_intact([layer.file])
        pool = self._bundle.map_pool(layer.index)
        experts = [to_write(pool[index]) for index in self._used(layer)]
        return write_pool(rewriting.staging.folder, layer.index, experts, self.report.advance), {}

    def _tensor_places(self) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, StoredTensor]]]:
        """File of every tensor by variant that stays and exported name; and what every file is to hold.

        Tensors in the leaving variant's own file go to the first of those who refer to them.
        """
        own, moved = variant_file(self.name), dict[str, str]()
        places: dict[str, dict[str, str]] = {}
        contents: dict[str, dict[str, StoredTensor]] = {}
        for name, entry in self._staying.items():
            places[name] = {}
            for key, file in entry.tensors.items():
                place = moved.setdefault(key, variant_file(name)) if file == own else file
                places[name][key] = place
                contents.setdefault(place, {})[key] = self._bundle.stored(file, key)
        return places, contents

    def _changed(self, contents: Mapping[str, Mapping[str, StoredTensor]]) -> list[str]:
        """Files of tensors that do not hold yet what they are to hold."""
        return [
            file
            for file, tensors in contents.items()
            if file not in self.origin.sums or tensors.keys() != self._bundle.stored_names(file)
        ]

    def _write_tensors(self, rewriting: Rewriting, reader: TensorReader) -> dict[str, dict[str, str]]:
        places, contents = self._tensor_places()
        files = {file for entry in self._bundle.manifest.variants.values() for file in entry.tensors.values()}
        for file in files - contents.keys():
            rewriting.kept.pop(file, None)
        for file in self._changed(contents):
            rewriting.kept.pop(file, None)
            rewriting.step(file, partial(self._write_file, rewriting, file, contents[file], reader))
        return places

    def _write_file(
        self, rewriting: Rewriting, file: str, tensors: dict[str, StoredTensor], reader: TensorReader
    ) -> tuple[dict[str, str], dict[str, Any]]:
        folder = self._bundle.folder
        self.origin.require_intact(tensor.path.relative_to(folder).as_posix() for tensor in tensors.values())
        return copy_tensors(rewriting.staging.folder, file, tensors, reader, self.report.advance), {}

    def _move_side_files(self, rewriting: Rewriting) -> dict[str, dict[str, str]]:
        """Bundle path by variant that stays and original name; shared files go to the first who has them."""
        own = set(self._bundle.variant(self.name).files.values())
        home = side_file(self.name, "")
        moved: dict[str, str] = {}
        places: dict[str, dict[str, str]] = {}
        for name, entry in self._staying.items():
            places[name] = {}
            for original, place in entry.files.items():
                if place.startswith(home):
                    place = moved.setdefault(place, side_file(name, original))
                places[name][original] = place
        needed = {place for files in places.values() for place in files.values()}
        for place in own:
            if place in moved or place not in needed:
                rewriting.kept.pop(place, None)
        rewriting.kept |= {new: old for old, new in moved.items()}
        return places

    def _manifest(self, entries: dict[str, VariantEntry]) -> Manifest:
        before = self._bundle.manifest
        layers = [self._shrink(layer) for layer in before.layers]
        change = Change(action="remove", variant=self.name, moemerge=__version__)
        return before.model_copy(
            update={
                "features": Features(
                    required=required_features(before, layers, entries.values()),
                    optional=before.features.optional,
                ),
                "pool_bytes": sum(map(self._pool_bytes, before.layers)),
                "residual_bytes": before.residual_bytes - self._bundle.residual_bytes(self.name),
                "layers": layers,
                "variants": entries,
                "provenance": before.provenance.model_copy(
                    update={"changes": [*before.provenance.changes, change]}
                ),
            }
        )

    def _shrink(self, layer: PoolLayer) -> PoolLayer:
        """The layer's entry in the manifest, without pool experts that nobody maps to."""
        codes = [layer.code(index) for index in self._used(layer)]
        computed = any(codes) or any(layer.index in e.residual_layers for e in self._staying.values())
        return layer.model_copy(
            update={
                "num_experts": len(codes),
                "codes": codes if any(codes) else [],
                "dtype": layer.dtype if computed else None,
            }
        )
