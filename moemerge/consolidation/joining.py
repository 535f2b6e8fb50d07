"""A variant joins a bundle: without the other variants' sources, and without touching what is there for them.

Pool experts keep their places, and new ones come behind them; residuals, maps and non-expert tensors of
the others stay as they are, byte for byte. Every step writes whole files and is final once journalled.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moemerge import __version__
from moemerge.bundle.layout import joining_file, variant_file
from moemerge.bundle.manifest import SCHEMA, Change, Features, Manifest, VariantEntry
from moemerge.bundle.reader import Bundle
from moemerge.bundle.writer import copy_tensors, write_bytes
from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.compatibility import compare_with
from moemerge.checkpoint.fingerprint import fingerprint
from moemerge.checkpoint.headers import StoredTensor
from moemerge.checkpoint.side_files import find_licence
from moemerge.checkpoint.tensors import TensorReader
from moemerge.checkpoint.variants import VariantSet
from moemerge.consolidation.budget import EXACT, Budget, parse_budget
from moemerge.consolidation.evidence import Evidence
from moemerge.consolidation.finishing import write_side_files
from moemerge.consolidation.joined_layer import JoinedLayer, write_joined_layer
from moemerge.consolidation.measured import NoiseStatistics, Statistics, ladder_for
from moemerge.consolidation.newcomer import (
    JoiningPlan,
    LayerRecord,
    Terms,
    measure_layer,
    plan_joining,
)
from moemerge.consolidation.rewriting import Origin, Rewriting, open_rewriting, required_features
from moemerge.consolidation.staging import WORK
from moemerge.errors import Finding, InvalidRecipe
from moemerge.progress import Progress, Silent


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """What became of a variant that joined.

    Attributes:
        folder: The changed bundle.
        plan: What was decided.
        manifest: What was written.
        resumed_layers: Layers that an earlier, interrupted run had finished.
    """

    folder: Path
    plan: JoiningPlan
    manifest: Manifest
    resumed_layers: int


def parse_addition(text: str) -> Budget:
    """A budget for what a newcomer adds: as `parse_budget`, with or without a plus before it."""
    return parse_budget(text.strip().removeprefix("+"))


def default_addition(manifest: Manifest) -> Budget:
    """As much as a variant has in the bundle on average, and everything where everything is kept."""
    if manifest.provenance.budget == EXACT.text:
        return EXACT
    share = (manifest.pool_bytes + manifest.residual_bytes) // len(manifest.variants)
    return Budget(f"{share / manifest.variant_bytes:.4g}x", limit=share)


def check_newcomer(bundle: Bundle, variants: Mapping[str, Checkpoint]) -> list[Finding]:
    """What differs between the first of these and the bundle's variants; see `open_variants`."""
    name, checkpoint = next(iter(variants.items()))
    first, entry = next(iter(bundle.manifest.variants.items()))
    return compare_with(name, checkpoint, first, bundle.family, entry.settings)


def require_new(bundle: Bundle, name: str) -> None:
    """Make sure that a bundle has no variant of that name.

    Raises:
        InvalidRecipe: It has, or one that differs only by case.
    """
    for there in bundle.manifest.variants:
        if there.lower() == name.lower():
            raise InvalidRecipe(
                f"{bundle.folder}: holds a variant {there} already. Choose another name, or remove that one "
                f"with `moemerge remove {bundle.folder} {there}`"
            )


def add_variant(
    origin: Origin,
    variants: VariantSet,
    budget: Budget | None = None,
    *,
    statistics: Statistics | None = None,
    restart: bool = False,
    progress: Progress | None = None,
) -> Joined:
    """Let a variant join a bundle.

    Args:
        origin: The bundle, and where the changed one appears.
        variants: The newcomer alone, local, checked with `check_newcomer`.
        budget: What its pool experts and residuals may add; `default_addition` unless given.
        statistics: Calibration of the newcomer; without it, noise stands for its inputs.
        restart: Discard the work of an interrupted run.
        progress: Told of bytes.

    Raises:
        InvalidRecipe: The bundle has the name already, or the budget cannot be met.
        NotEnoughRoom: Disk or memory.
        DamagedBundle: A file of the bundle was changed since it was written.
        DamagedInput: NaN or infinity in the newcomer, or a file that changed.
        Busy: Another process writes the target, or has changed the bundle.
    """
    (name,) = variants.variants
    require_new(origin.bundle, name)
    found = statistics or NoiseStatistics(variants)
    with TensorReader() as reader:
        joining = _Joining(
            origin=origin,
            name=name,
            checkpoint=variants.first,
            evidence=Evidence(variants=variants, statistics=found, reader=reader),
            budget=budget or default_addition(origin.bundle.manifest),
            report=progress or Silent(),
        )
        origin.check_room(variants.first.other_bytes)
        with open_rewriting(origin, joining.task(found.identity), restart=restart) as rewriting:
            return joining.run(rewriting, found.identity)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Joining:
    """The steps of one addition."""

    origin: Origin
    name: str
    checkpoint: Checkpoint
    evidence: Evidence
    budget: Budget
    report: Progress

    @property
    def _bundle(self) -> Bundle:
        return self.origin.bundle

    @property
    def _indices(self) -> list[int]:
        return [layer.index for layer in self._bundle.manifest.layers]

    def task(self, identity: str) -> str:
        """Identifies the work in the journal."""
        before = hashlib.sha256(json.dumps(sorted(self.origin.sums.items())).encode()).hexdigest()
        print_ = fingerprint(self.checkpoint, self.evidence.reader)
        origin = self.checkpoint.repository.origin
        words = ["add", __version__, SCHEMA, before, self.name, origin, print_, repr(self.budget), identity]
        return json.dumps(words)

    def run(self, rewriting: Rewriting, identity: str) -> Joined:
        """Measure, decide and write."""
        plan = plan_joining(self.name, self._measure(rewriting), identity, self._terms())
        self.origin.check_room(self._bytes_to_write(plan) - rewriting.staging.finished_bytes())
        layers, resumed = self._write_layers(rewriting, plan)
        tensors = self._write_tensors(rewriting)
        rewritten = {layer.file for layer in self._bundle.manifest.layers if layers[layer.index].codes}
        rewriting.keep(self.origin.sums.keys() - rewritten)
        rewriting.place_kept()
        folder = rewriting.staging.folder
        files, written = write_side_files(self.name, self.checkpoint, folder, dict(self.origin.sums))
        rewriting.written |= written
        text = plan.model_dump_json(indent=1) + "\n"
        rewriting.written |= write_bytes(folder, joining_file(self.name), text.encode())
        manifest = rewriting.finish(self._manifest(plan, layers, tensors, files))
        return Joined(folder=self.origin.target, plan=plan, manifest=manifest, resumed_layers=resumed)

    def _measure(self, rewriting: Rewriting) -> list[LayerRecord]:
        ladder, _ = ladder_for(self.evidence.variants)
        self.report.start("costs", self.checkpoint.expert_bytes)
        records = []
        for index in self._indices:
            place = f"{WORK}costs-layer-{index:05d}.json"
            if rewriting.staging.finished(f"costs {index}") is None:
                record = measure_layer(self.evidence, self._bundle, self.name, index, ladder)
                text = record.model_dump_json(indent=1) + "\n"
                written = write_bytes(rewriting.staging.folder, place, text.encode())
                rewriting.staging.finish(f"costs {index}", written)
            text_there = (rewriting.staging.folder / place).read_bytes()
            records.append(LayerRecord.model_validate_json(text_there))
            self.report.advance(self.checkpoint.expert_bytes // len(self._indices))
        return records

    def _terms(self) -> Terms:
        ladder, shapes = ladder_for(self.evidence.variants)
        unit = self._bundle.manifest.variant_bytes
        return Terms(
            budget=self.budget,
            allowed_bytes=self.budget.allowed_bytes(unit),
            variant_bytes=unit,
            ladder=ladder,
            shapes=shapes,
            plain_bytes=max(
                sum(tensor.nbytes for tensor in parts.values()) for parts in self.checkpoint.experts.values()
            ),
            weights={},
        )

    def _bytes_to_write(self, plan: JoiningPlan) -> int:
        """The addition, and the pools that it is appended to."""
        pools = [
            (self._bundle.folder / layer.file).stat().st_size
            for layer in self._bundle.manifest.layers
            if any(choice.stored is None for choice in plan.layers[layer.index])
        ]
        return plan.added_bytes + sum(pools) + self.checkpoint.other_bytes

    def _write_layers(self, rewriting: Rewriting, plan: JoiningPlan) -> tuple[dict[int, JoinedLayer], int]:
        self.report.start("pool", plan.added_bytes)
        layers, resumed = {}, 0
        for index, choices in plan.layers.items():
            resumed += rewriting.staging.finished(f"pool {index}") is not None
            if any(choice.stored is None for choice in choices):
                self.origin.require_intact([self._bundle.layer(index).file])

            def write(index: int = index) -> tuple[dict[str, str], dict[str, Any]]:
                return write_joined_layer(
                    rewriting.staging.folder,
                    self._bundle,
                    self.evidence,
                    self.name,
                    index,
                    plan.layers[index],
                    self.report.advance,
                )

            layers[index] = JoinedLayer.model_validate(rewriting.step(f"pool {index}", write))
        return layers, resumed

    def _write_tensors(self, rewriting: Rewriting) -> dict[str, str]:
        """Write non-expert tensors that no variant of the bundle has; the file of each by exported name."""
        names = self.checkpoint.family.role_names(self.checkpoint.settings)
        tensors = {names[role]: tensor for role, tensor in self.checkpoint.tensors.items()}
        places = {key: self._find_equal(key, tensor) for key, tensor in tensors.items()}
        own = {key: tensor for key, tensor in tensors.items() if places[key] is None}
        file = variant_file(self.name)
        if own:
            folder, reader = rewriting.staging.folder, self.evidence.reader
            write = partial(copy_tensors, folder, file, own, reader)
            rewriting.step(file, lambda: (write(), {}))
        return {key: place or file for key, place in places.items()}

    def _find_equal(self, key: str, tensor: StoredTensor) -> str | None:
        """The bundle's file that has a tensor of that name with the same bytes."""
        reader = self.evidence.reader
        for file in dict.fromkeys(
            entry.tensors[key] for entry in self._bundle.manifest.variants.values() if key in entry.tensors
        ):
            there = self._bundle.stored(file, key)
            if reader.sample_digest(there) == reader.sample_digest(tensor) and (
                reader.digest(there) == reader.digest(tensor)
            ):
                return file
        return None

    def _manifest(
        self,
        plan: JoiningPlan,
        layers: Mapping[int, JoinedLayer],
        tensors: dict[str, str],
        files: dict[str, str],
    ) -> Manifest:
        before = self._bundle.manifest
        entry = VariantEntry(
            source=self.checkpoint.repository.origin,
            fingerprint=fingerprint(self.checkpoint, self.evidence.reader),
            licence=find_licence(self.checkpoint.repository),
            settings=self.checkpoint.settings,
            tensors=tensors,
            files=files,
            maps={index: layer.expert_map for index, layer in layers.items()},
            errors={index: layer.errors for index, layer in layers.items()},
            residuals={index: layer.residuals for index, layer in layers.items() if any(layer.residuals)},
            damage={"predicted": plan.predicted_damage},
        )
        places = [layers[place.index].extend(place) for place in before.layers]
        variants = {**before.variants, self.name: entry}
        change = Change(
            action="add",
            variant=self.name,
            budget=plan.budget,
            evidence=plan.evidence,
            moemerge=__version__,
        )
        return before.model_copy(
            update={
                "features": Features(
                    required=required_features(before, places, variants.values()),
                    optional=before.features.optional,
                ),
                "variant_bytes": max(before.variant_bytes, self.checkpoint.expert_bytes),
                "pool_bytes": before.pool_bytes + sum(layer.pool_bytes for layer in layers.values()),
                "residual_bytes": before.residual_bytes
                + sum(layer.residual_bytes for layer in layers.values()),
                "layers": places,
                "variants": variants,
                "provenance": before.provenance.model_copy(
                    update={"changes": [*before.provenance.changes, change]}
                ),
            }
        )
