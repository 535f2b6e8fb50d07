"""A variant's calibration in spans of layers: each leaves a file of hidden states, where the next begins.

A span is a unit of work: done again, it counts anew and leaves the same bytes. Which spans are done is told
by the file that is there.

Shapes: T tokens, D model width.
"""

import math
import uuid
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from moemerge.calibration.folder import layer_file
from moemerge.calibration.passes import DTYPES, CalibrationOptions, calibrate_layers, labels_of, layers_bytes
from moemerge.calibration.statistics import LayerStatistics, layer_of_tensors, layer_tensors
from moemerge.calibration.texts import Passage
from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.tensors import map_tensors
from moemerge.checkpoint.writer import memory_tensor, write_tensors
from moemerge.errors import DamagedInput
from moemerge.models import build_model
from moemerge.progress import Progress

SPAN_BYTES = 8 * 2**30
"""Of weights in a span, about: far more than hidden states take, and minutes of work."""


def cut_spans(checkpoint: Checkpoint) -> list[range]:
    """The layers of each span. An encoder-decoder is a single one: its decoder looks at its encoder."""
    if checkpoint.family.arithmetic == "encoder_decoder":
        return [range(int(checkpoint.settings["num_decoder_layers"] or 0))]
    num_layers = int(checkpoint.settings["num_layers"] or 0)
    each = layers_bytes(checkpoint, range(num_layers)) / num_layers
    num_spans = math.ceil(num_layers / max(1, SPAN_BYTES // each))
    bounds = [number * num_layers // num_spans for number in range(num_spans + 1)]
    return [range(first, last) for first, last in pairwise(bounds)]


def is_done(place: Path, layers: range) -> bool:
    """Whether a span has been calibrated in a variant's folder."""
    return any(_layer_before(path) >= layers.stop for path in place.glob("hidden-*"))


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
    if is_done(place, layers):
        # By a node that was lost before it could tell.
        return
    seen: set[int] = set()

    def keep(layer_index: int, layer: LayerStatistics) -> None:
        path = place / layer_file(layer_index)
        if layer_index in seen:
            before = layer_of_tensors(map_tensors(path), options.reservoir)
            before.add(layer)
            layer = before
        seen.add(layer_index)
        tensors = [memory_tensor(key, tensor) for key, tensor in layer_tensors(layer).items()]
        write_tensors(path, tensors, {"format": "pt"})

    before_TD = None
    if layers.start:
        before_TD = hidden_behind(checkpoint, passages, layers.start, place, options)
    begun = place / f"{_hidden_file(layers.stop)}.{uuid.uuid4().hex}"
    shape, dtype = _shape(checkpoint, passages), DTYPES[options.dtype]
    after_TD = torch.from_file(str(begun), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
    calibrate_layers(
        checkpoint, passages, layers, keep, options, after_TD, before_TD, progress, f"calibrating {title}"
    )
    del after_TD
    begun.replace(place / _hidden_file(layers.stop))
    (place / _hidden_file(layers.start)).unlink(missing_ok=True)


def hidden_behind(
    checkpoint: Checkpoint, passages: Sequence[Passage], layer: int, place: Path, options: CalibrationOptions
) -> Tensor:
    """What a span has left that ends before a layer, [T, D], mapped.

    Raises:
        DamagedInput: The file is not there or not whole.
    """
    path, shape, dtype = place / _hidden_file(layer), _shape(checkpoint, passages), DTYPES[options.dtype]
    size = path.stat().st_size if path.is_file() else 0
    if size != hidden_bytes(checkpoint, passages, options):
        raise DamagedInput(f"{path}: not the hidden states that an interrupted run left. Remove {place}")
    return torch.from_file(str(path), shared=False, size=math.prod(shape), dtype=dtype).view(shape)


def hidden_bytes(checkpoint: Checkpoint, passages: Sequence[Passage], options: CalibrationOptions) -> int:
    """Of the file that a span leaves."""
    return math.prod(_shape(checkpoint, passages)) * DTYPES[options.dtype].itemsize


def remove_hidden(place: Path) -> None:
    """Remove what spans have left; nothing begins with it any more."""
    for path in place.glob("hidden-*"):
        path.unlink()


def _shape(checkpoint: Checkpoint, passages: Sequence[Passage]) -> tuple[int, int]:
    model = build_model(checkpoint.family.arithmetic, checkpoint.settings)
    return sum(map(len, labels_of(model, passages))), int(checkpoint.settings["hidden_size"] or 0)


def _hidden_file(layer: int) -> str:
    return f"hidden-{layer:05d}"


def _layer_before(path: Path) -> int:
    """The layer that a file's hidden states go into; -1 for one that is not whole."""
    number = path.name.removeprefix("hidden-")
    return int(number) if number.isdecimal() else -1
