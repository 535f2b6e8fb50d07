"""Measuring layer by layer: each is a unit of work that writes a file, and a step that is then final.

Whoever wants to know reads the files: an interrupted run and one on other machines come to the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from moemerge.bundle.target import building
from moemerge.bundle.writer import write_bytes
from moemerge.checkpoint.tensors import TensorReader
from moemerge.checkpoint.variants import VariantSet
from moemerge.checkpoint.writer import write_text
from moemerge.consolidation.evidence import Evidence, LayerRecord, slot_memory
from moemerge.consolidation.measure import Measurer, measurement_bytes, measurement_memory
from moemerge.consolidation.measured import Statistics, ladder_for
from moemerge.consolidation.similarity_files import (
    INDEX,
    dump_index,
    layer_file,
    load_layer_similarity,
    similarity_index,
    write_layer_similarity,
)
from moemerge.execution import Executor, Local, Work
from moemerge.progress import Progress, Silent
from moemerge.similarity.matrices import LayerSimilarity


class Steps(Protocol):
    """Where files are written, and which are final; those of `staging.Staging` outlive their run."""

    @property
    def folder(self) -> Path:
        """What paths of files are relative to."""
        ...

    def finished(self, step: str) -> dict[str, Any] | None:
        """What `finish` was told of a step."""
        ...

    def finish(self, step: str, files: dict[str, str], result: dict[str, Any] | None = None) -> None:
        """Make a step final; `files` has SHA-256 by path."""
        ...


class Unjournalled:
    """Steps that no other run continues."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._steps: dict[str, dict[str, Any]] = {}

    def finished(self, step: str) -> dict[str, Any] | None:
        """See `Steps.finished`."""
        return self._steps.get(step)

    def finish(self, step: str, files: dict[str, str], result: dict[str, Any] | None = None) -> None:
        """See `Steps.finish`."""
        self._steps[step] = result or {}


@contextmanager
def passing_steps(beside: Path | None = None) -> Iterator[Unjournalled]:
    """Steps in a folder that disappears.

    Args:
        beside: A file or folder beside which it is made, so that other machines see it; anywhere by default.
    """
    prefix = f".{beside.name}." if beside else None
    with TemporaryDirectory(prefix=prefix, dir=beside.absolute().parent if beside else None) as folder:
        yield Unjournalled(Path(folder))


def measure_layers(
    variants: VariantSet,
    progress: Progress | None = None,
    *,
    steps: Steps | None = None,
    subfolder: str = "",
    max_ram: int | None = None,
    executor: Executor | None = None,
) -> list[LayerSimilarity]:
    """Similarity of every routed layer.

    Args:
        variants: Local checkpoints.
        progress: Told of bytes.
        steps: Take a step for each layer; those that are final are not measured again.
        subfolder: Of their folder, for the files.
        max_ram: Bytes of memory to stay within, for each unit of work.
        executor: Does the work; this process by default.

    Raises:
        NotEnoughRoom, DamagedInput: As `Measurer`.
    """
    if steps is None:
        with passing_steps() as passing:
            return measure_layers(variants, progress, steps=passing, max_ram=max_ram, executor=executor)
    report = progress or Silent()
    indices = [layer.index for layer in variants.first.routed_layers]
    missing = [index for index in indices if steps.finished(f"similarity {index}") is None]
    report.start("similarity", measurement_bytes(variants) * len(missing) // max(1, len(indices)))
    works = [_similarity_work(variants, index, steps.folder, subfolder, max_ram) for index in missing]
    for number, files in (executor or Local()).map(works, report):
        steps.finish(f"similarity {missing[number]}", files)
    names = tuple(variants.variants)
    return [load_layer_similarity(steps.folder / subfolder, index, names) for index in indices]


def measure_costs(
    layers: list[LayerSimilarity],
    variants: VariantSet,
    statistics: Statistics,
    progress: Progress | None = None,
    *,
    steps: Steps,
    subfolder: str = "",
    executor: Executor | None = None,
) -> list[LayerRecord]:
    """What sharing and codes cost in every layer.

    Args:
        layers: Similarity of every routed layer, as `measure_layers` has left it in the same place.
        variants: Local checkpoints.
        statistics: Of their layers.
        progress: Told of bytes.
        steps: Take a step for each layer; those that are final are not measured again.
        subfolder: Of their folder, for the files.
        executor: Does the work; this process by default.
    """
    report = progress or Silent()
    missing = [layer.layer for layer in layers if steps.finished(f"costs {layer.layer}") is None]
    total = sum(variant.expert_bytes for variant in variants.variants.values())
    report.start("costs", total * len(missing) // max(1, len(layers)))
    works = [_cost_work(variants, statistics, index, steps.folder, subfolder) for index in missing]
    for number, files in (executor or Local()).map(works, report):
        steps.finish(f"costs {missing[number]}", files)
    paths = [steps.folder / subfolder / costs_file(layer.layer) for layer in layers]
    return [LayerRecord.model_validate_json(path.read_bytes()) for path in paths]


def write_similarity(
    variants: VariantSet,
    folder: Path,
    progress: Progress | None = None,
    *,
    max_ram: int | None = None,
    executor: Executor | None = None,
) -> dict[str, Any]:
    """Measure local checkpoints and write matrices and index; returns the index.

    Raises:
        InvalidRecipe: The folder exists.
        NotEnoughRoom, DamagedInput: As `Measurer`, or the folder cannot be written.
    """
    with building(folder) as place:
        steps = Unjournalled(place)
        layers = measure_layers(variants, progress, steps=steps, max_ram=max_ram, executor=executor)
        index = similarity_index(layers, variants)
        write_text(place / INDEX, dump_index(index))
    return index


def costs_file(layer_index: int) -> str:
    """File of what was measured of a layer's costs."""
    return f"costs-layer-{layer_index:05d}.json"


def _similarity_work(
    variants: VariantSet, index: int, folder: Path, subfolder: str, max_ram: int | None
) -> Work[dict[str, str]]:
    own = variants.at_layer(index)
    return Work(
        title=f"similarity of layer {index}",
        run=partial(_write_similarity, own, index, folder.absolute(), subfolder, max_ram),
        reads=own.files,
        folder=folder.absolute(),
        memory_bytes=measurement_memory(variants, max_ram),
    )


def _write_similarity(
    variants: VariantSet, index: int, folder: Path, subfolder: str, max_ram: int | None, progress: Progress
) -> dict[str, str]:
    """Measure a layer; returns SHA-256 by path relative to `folder`."""
    with Measurer(variants, max_ram, progress) as measurer:
        return write_layer_similarity(folder, subfolder, measurer.measure(index))


def _cost_work(
    variants: VariantSet, statistics: Statistics, index: int, folder: Path, subfolder: str
) -> Work[dict[str, str]]:
    own = variants.at_layer(index)
    return Work(
        title=f"costs of layer {index}",
        run=partial(_write_costs, own, statistics.at_layer(index), index, folder.absolute(), subfolder),
        reads=own.files | statistics.files(index) | {folder.absolute() / subfolder / layer_file(index)},
        folder=folder.absolute(),
        memory_bytes=slot_memory(own) + statistics.layer_bytes,
        is_parallel=True,
    )


def _write_costs(
    variants: VariantSet,
    statistics: Statistics,
    index: int,
    folder: Path,
    subfolder: str,
    progress: Progress,
) -> dict[str, str]:
    """Measure what a layer's similarity leaves open; returns SHA-256 by path relative to `folder`."""
    similarity = load_layer_similarity(folder / subfolder, index, tuple(variants.variants))
    ladder, _ = ladder_for(variants)
    with TensorReader() as reader:
        evidence = Evidence(variants=variants, statistics=statistics, reader=reader)
        record = evidence.measure(similarity, ladder, progress.advance)
    name = "/".join(filter(None, (subfolder, costs_file(index))))
    return write_bytes(folder, name, (record.model_dump_json(indent=1) + "\n").encode())
