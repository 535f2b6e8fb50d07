"""A variant's calibration in spans of layers: each leaves a file of hidden states, where the next begins.

A span is a unit of work: done again, or twice at once, it leaves the same bytes. How far a variant has come
is told by the files that are there.

Shapes: T tokens, D model width.
"""

import math
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from moemerge.calibration.folder import layer_file
from moemerge.calibration.passes import (
    DTYPES,
    CalibrationOptions,
    Rows,
    calibrate_layers,
    labels_of,
    layers_bytes,
)
from moemerge.calibration.statistics import LayerStatistics, layer_of_tensors, layer_tensors
from moemerge.calibration.texts import Passage
from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.headers import StoredTensor, read_header
from moemerge.checkpoint.tensors import DTYPE_NAMES, TensorReader, bytes_of, map_tensors
from moemerge.checkpoint.writer import TensorToWrite, memory_tensor, write_tensors
from moemerge.errors import DamagedInput
from moemerge.models import build_model
from moemerge.progress import Progress

SPAN_BYTES = 8 * 2**30
"""Of weights in a span, about: far more than hidden states take, and minutes of work."""
_NAME = "hidden"


def next_span(
    checkpoint: Checkpoint, passages: Sequence[Passage], place: Path, options: CalibrationOptions
) -> range | None:
    """The layers that a variant's folder waits for; None when it has all.

    An encoder-decoder is a single span: its decoder looks at its encoder.
    """
    num_layers, shape = _num_layers(checkpoint), _shape(checkpoint, passages)
    there = [layer for layer in range(1, num_layers + 1) if _find(place, layer, shape, options) is not None]
    start = max(there, default=0)
    if start == num_layers:
        return None
    if checkpoint.family.arithmetic == "encoder_decoder":
        return range(num_layers)
    each = layers_bytes(checkpoint, range(num_layers)) / num_layers
    num_spans = math.ceil(num_layers / max(1, SPAN_BYTES // each))
    return range(start, min(num_layers, start + math.ceil(num_layers / num_spans)))


def calibrate_span(
    checkpoint: Checkpoint,
    passages: Sequence[Passage],
    layers: range,
    place: Path,
    options: CalibrationOptions,
    title: str,
    progress: Progress,
) -> None:
    """Write the statistics of a span's layers into a variant's folder, and the hidden states behind them.

    Raises:
        NotEnoughRoom, DamagedInput: As `calibrate_layers`.
    """
    # Its own: a node that was given up for lost may still be writing the same.
    own = place / f"span-{uuid.uuid4().hex}"
    own.mkdir()

    def keep(layer_index: int, layer: LayerStatistics) -> None:
        path = own / layer_file(layer_index)
        if path.exists():
            before = layer_of_tensors(map_tensors(path), options.reservoir)
            before.add(layer)
            layer = before
        tensors = [memory_tensor(key, tensor) for key, tensor in layer_tensors(layer).items()]
        write_tensors(path, tensors, {"format": "pt"})

    try:
        with TensorReader() as reader:
            before = None
            if layers.start:
                before = _rows(checkpoint, passages, layers.start, place, options, reader)

            def chunks() -> Iterator[memoryview]:
                name = f"calibrating {title}"
                for hidden_TD in calibrate_layers(
                    checkpoint, passages, layers, keep, options, before, progress, name
                ):
                    yield bytes_of(hidden_TD.contiguous())

            dtype, shape = DTYPE_NAMES[DTYPES[options.dtype]], _shape(checkpoint, passages)
            hidden = TensorToWrite(name=_NAME, dtype=dtype, shape=shape, chunks=chunks)
            write_tensors(own / _NAME, [hidden])
        for path in own.glob("layer-*"):
            path.replace(place / path.name)
        (own / _NAME).replace(place / _hidden_file(layers.stop))
    finally:
        shutil.rmtree(own, ignore_errors=True)


def hidden_at_end(
    checkpoint: Checkpoint,
    passages: Sequence[Passage],
    place: Path,
    options: CalibrationOptions,
    reader: TensorReader,
) -> Rows:
    """What the last span has left."""
    return _rows(checkpoint, passages, _num_layers(checkpoint), place, options, reader)


def hidden_bytes(checkpoint: Checkpoint, passages: Sequence[Passage], options: CalibrationOptions) -> int:
    """Of the file that a span leaves."""
    return math.prod(_shape(checkpoint, passages)) * DTYPES[options.dtype].itemsize


def drop_hidden(place: Path, before: int) -> None:
    """Remove what spans have left that end before an earlier layer; nothing begins there any more."""
    for layer in range(before):
        (place / _hidden_file(layer)).unlink(missing_ok=True)


def _rows(
    checkpoint: Checkpoint,
    passages: Sequence[Passage],
    layer: int,
    place: Path,
    options: CalibrationOptions,
    reader: TensorReader,
) -> Rows:
    shape = _shape(checkpoint, passages)
    stored = _find(place, layer, shape, options)
    if stored is None:
        raise DamagedInput(f"{place / _hidden_file(layer)}: not the hidden states that a span has left")
    width = shape[1]
    return lambda rows: reader.read(
        stored.view(_NAME, rows.start * width, (rows.stop - rows.start, width), (width, 1))
    )


def _find(
    place: Path, layer: int, shape: tuple[int, int], options: CalibrationOptions
) -> StoredTensor | None:
    """Hidden states before a layer, if such are there."""
    path = place / _hidden_file(layer)
    try:
        stored = read_header(path).get(_NAME) if path.is_file() else None
    except DamagedInput:
        return None
    if stored is None or (stored.shape, stored.dtype) != (shape, DTYPE_NAMES[DTYPES[options.dtype]]):
        return None
    return stored


def _num_layers(checkpoint: Checkpoint) -> int:
    is_decoder = checkpoint.family.arithmetic != "encoder_decoder"
    return int(checkpoint.settings["num_layers" if is_decoder else "num_decoder_layers"] or 0)


def _shape(checkpoint: Checkpoint, passages: Sequence[Passage]) -> tuple[int, int]:
    model = build_model(checkpoint.family.arithmetic, checkpoint.settings)
    return sum(map(len, labels_of(model, passages))), int(checkpoint.settings["hidden_size"] or 0)


def _hidden_file(layer: int) -> str:
    return f"hidden-{layer:05d}.safetensors"
