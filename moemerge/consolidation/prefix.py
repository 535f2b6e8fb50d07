"""A variant over passages as a bundle holds it, beside what it was: what was lost, in nats.

Knows nothing of plans.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from moemerge.bundle.coded import assemble, plain_parts
from moemerge.bundle.reader import Bundle, PoolParts, ResidualParts, effective_dtype
from moemerge.calibration.lanes import Lane, Loss, lane_of, measure_lanes
from moemerge.calibration.passes import DTYPES, CalibrationOptions
from moemerge.calibration.streaming import CheckpointSource, Source
from moemerge.calibration.texts import Passage
from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.headers import StoredTensor
from moemerge.checkpoint.tensors import TensorReader
from moemerge.models.packed import effective
from moemerge.progress import Progress, Silent


class BundleSource:
    """`Source` of a variant with the experts that a bundle has for it, and its own other tensors.

    Args:
        checkpoint: The variant as it was.
        bundle: Published, or being written with pools and residuals in place.
        variant: Its name there.
        reader: Holds files open.
        dtype: Of hidden states and matrices while computing.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        bundle: Bundle,
        variant: str,
        reader: TensorReader,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self._bundle = bundle
        self._variant = variant
        self._reader = reader
        self._places: dict[int, tuple[list[PoolParts], list[ResidualParts | None]]] = {}

    def stored(self, role: str) -> Tensor:
        """See `Source.stored`."""
        return self._reader.read(self.checkpoint.tensors[role])

    def expert(self, layer_index: int, slot: int) -> dict[str, Tensor]:
        """See `Source.expert`; rounded as the runner rounds."""
        layer = self._bundle.layer(layer_index)
        if layer_index not in self._places:
            residuals = self._bundle.residuals(self._variant, layer_index)
            self._places = {layer_index: (self._bundle.pool(layer_index), residuals)}
        pool, residuals = self._places[layer_index]
        parts = pool[self._bundle.variant(self._variant).maps[layer_index][slot]]
        added = residuals[slot]
        if added is None and (plain := plain_parts(parts)):
            return {part: self._reader.read(place).to(self.dtype) for part, place in plain.items()}
        found, dtype = {}, effective_dtype(layer)
        for part, place in parts.items():
            residual = added.get(part) if added else None
            coded = residual.assemble(self._reader.read) if residual else None
            found[part] = effective(assemble(place, self._reader.read), coded, dtype).to(self.dtype)
        return found

    def done(self, tensors: Mapping[str, StoredTensor]) -> None:
        """See `Source.done`; the lane of the original tells."""


class ChangedSource:
    """`Source` of another one, some of whose non-expert tensors are replaced.

    Args:
        source: The other.
        tensors: By role, in their stored dtype; may grow while they are used.
    """

    def __init__(self, source: Source, tensors: Mapping[str, Tensor]) -> None:
        self.checkpoint = source.checkpoint
        self.dtype = source.dtype
        self._source = source
        self._tensors = tensors

    def stored(self, role: str) -> Tensor:
        """See `Source.stored`."""
        return self._tensors[role] if role in self._tensors else self._source.stored(role)

    def expert(self, layer_index: int, slot: int) -> dict[str, Tensor]:
        """See `Source.expert`."""
        return self._source.expert(layer_index, slot)

    def done(self, tensors: Mapping[str, StoredTensor]) -> None:
        """See `Source.done`."""
        self._source.done(tensors)


def open_lanes(
    checkpoint: Checkpoint,
    bundle: Bundle,
    variant: str,
    reader: TensorReader,
    options: CalibrationOptions,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> tuple[Lane, Lane]:
    """The variant as it was, and as the bundle holds it."""
    dtype = DTYPES[options.dtype]
    own = CheckpointSource(checkpoint, reader, dtype, advance)
    return lane_of(own), lane_of(BundleSource(checkpoint, bundle, variant, reader, dtype))


def measure_bundle(
    checkpoint: Checkpoint,
    bundle: Bundle,
    variant: str,
    passages: Sequence[Passage],
    options: CalibrationOptions | None = None,
    changed: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> list[Loss]:
    """A variant as it was and as a bundle holds it, over the same passages.

    Args:
        checkpoint: The variant as it was, local.
        bundle: Published, or being written with pools and residuals in place.
        variant: Its name there.
        passages: In its own tokens.
        options: Memory and dtype.
        changed: Non-expert tensors by role, of which a third lane is to be measured.
        progress: Told of the bytes of weights whose work is done.

    Returns:
        Losses of the original, of the bundle, and of the bundle with changed tensors where there are any.

    Raises:
        NotEnoughRoom, DamagedInput: As `measure_lanes`.
    """
    options = options or CalibrationOptions()
    report = progress or Silent()
    report.start(f"measuring {variant}", checkpoint.expert_bytes + checkpoint.other_bytes)
    with TensorReader() as reader:
        own, shared = open_lanes(checkpoint, bundle, variant, reader, options, report.advance)
        lanes = [own, shared]
        if changed:
            lanes.append(Lane(ChangedSource(shared.source, changed), shared.experts))
        return measure_lanes(passages, lanes, options)
