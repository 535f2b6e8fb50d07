"""A variant over passages as a bundle holds it, beside what it was: what was lost, in nats.

Several models of one geometry are computed side by side in the same batch, each in a lane of its own, so that
every weight is read once and nothing has to be kept between them. Knows nothing of plans.

Shapes: T tokens of a lane, D model width, Vo vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from moemerge.bundle.coded import assemble, plain_parts
from moemerge.bundle.reader import Bundle, PoolParts, ResidualParts, effective_dtype
from moemerge.calibration.passes import (
    DTYPES,
    LOGIT_ENTRIES,
    NO_LABEL,
    CalibrationOptions,
    cut_passes,
    hidden_states,
    labels_of,
    num_predicted,
    pass_tokens,
)
from moemerge.calibration.streaming import CheckpointSource, Source, StreamedExperts, StreamedWeights
from moemerge.calibration.texts import Passage
from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.headers import StoredTensor
from moemerge.checkpoint.tensors import TensorReader
from moemerge.models import (
    Decoder,
    EncoderDecoder,
    Experts,
    OneVariant,
    Route,
    Weights,
    build_model,
)
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


class Lane(NamedTuple):
    """One of the models computed side by side; neighbours that have the very same experts share reading."""

    source: Source
    experts: Experts


def lane_of(source: Source) -> Lane:
    """A model whose experts are streamed from the source, too."""
    activation = build_model(
        source.checkpoint.family.arithmetic, source.checkpoint.settings
    ).config.activation
    return Lane(source, StreamedExperts(source, activation, {}, 0, None))


class LaneWeights:
    """`Weights` of lanes, each with as many tokens as the others, one lane after the other."""

    def __init__(self, lanes: Sequence[Weights]) -> None:
        self._lanes = lanes

    def __contains__(self, role: str) -> bool:
        return role in self._lanes[0]

    def linear(self, role: str, hidden_TD: Tensor) -> Tensor:
        """See `Weights.linear`."""
        return self._by_lane(hidden_TD, lambda weights, piece: weights.linear(role, piece))

    def add(self, role: str, hidden_TD: Tensor) -> Tensor:
        """See `Weights.add`."""
        return self._by_lane(hidden_TD, lambda weights, piece: weights.add(role, piece))

    def norm(self, role: str, hidden_TD: Tensor, eps: float) -> Tensor:
        """See `Weights.norm`."""
        return self._by_lane(hidden_TD, lambda weights, piece: weights.norm(role, piece, eps))

    def embed(self, role: str, ids: Tensor) -> Tensor:
        """See `Weights.embed`."""
        return self._by_lane(ids, lambda weights, piece: weights.embed(role, piece))

    def _by_lane(self, tokens: Tensor, apply: Callable[[Weights, Tensor], Tensor]) -> Tensor:
        pieces = tokens.chunk(len(self._lanes))
        return torch.cat([apply(lane, piece) for lane, piece in zip(self._lanes, pieces, strict=True)])


class LaneExperts:
    """`Experts` of lanes, each with as many tokens as the others."""

    def __init__(self, lanes: Sequence[Experts]) -> None:
        self._runs = [list(run) for _, run in groupby(lanes, key=id)]
        self._num_lanes = len(lanes)

    def product(self, layer_index: int, hidden_TD: Tensor, route: Route) -> Tensor:
        """See `Experts.product`."""
        counts = [len(run) * len(hidden_TD) // self._num_lanes for run in self._runs]
        pieces = [torch.split(tensor, counts) for tensor in (hidden_TD, *route)]
        outputs = [
            run[0].product(layer_index, hidden, Route(slots, gates))
            for run, hidden, slots, gates in zip(self._runs, *pieces, strict=True)
        ]
        return torch.cat(outputs)


@dataclass(frozen=True, slots=True)
class Loss:
    """What a lane makes of passages, in nats per predicted token.

    Attributes:
        nll: Negative log-likelihood.
        kl: Divergence of its predictions from those of the first lane.
    """

    nll: float
    kl: float


def measure_lanes(
    passages: Sequence[Passage],
    lanes: Sequence[Lane],
    options: CalibrationOptions,
) -> list[Loss]:
    """Run lanes over passages; the first is what the others are compared with.

    Raises:
        NotEnoughRoom: Not even one passage fits into memory.
        DamagedInput: A weight is not finite, or a file changed.
    """
    checkpoint = lanes[0].source.checkpoint
    limit = pass_tokens(checkpoint, passages, options, copies=len(lanes))
    sums = torch.zeros(len(lanes), 2, dtype=torch.float64)
    for first, last in cut_passes(passages, limit):
        sums += _pass_sums(passages[first:last], lanes)
    num_tokens = max(1, sum(map(num_predicted, passages)))
    return [Loss(nll / num_tokens, kl / num_tokens) for nll, kl in sums.tolist()]


@torch.no_grad()
def _pass_sums(passages: Sequence[Passage], lanes: Sequence[Lane]) -> Tensor:
    """Negative log-likelihood and divergence of each lane, summed over predicted tokens; [lanes, 2]."""
    checkpoint = lanes[0].source.checkpoint
    model = build_model(checkpoint.family.arithmetic, checkpoint.settings)
    weights = LaneWeights([StreamedWeights(lane.source) for lane in lanes])
    experts = LaneExperts([lane.experts for lane in lanes])
    hidden_TD = hidden_states(model, list(passages) * len(lanes), weights, experts)
    heads = [head_of(lane.source, hidden_TD.dtype) for lane in lanes]
    label_T = torch.tensor([label for own in labels_of(model, passages) for label in own])
    rows = max(1, LOGIT_ENTRIES // (2 * heads[0].tensors["head"].shape[0]))
    sums = torch.zeros(len(lanes), 2, dtype=torch.float64)
    parts = zip(*(torch.split(hidden, rows) for hidden in hidden_TD.chunk(len(lanes))), strict=True)
    for hidden, label in zip(parts, torch.split(label_T, rows), strict=True):
        kept = label != NO_LABEL
        found = [log_probabilities(model, one[kept], head) for one, head in zip(hidden, heads, strict=True)]
        for number, own in enumerate(found):
            sums[number, 0] += functional.nll_loss(own, label[kept], reduction="sum").double()
            sums[number, 1] += divergence(found[0], own).sum() if number else 0.0
    return sums


def head_of(source: Source, dtype: torch.dtype) -> OneVariant:
    """Final norm and head, which may be the embedding, ready to be applied again and again."""
    head = "head" if "head" in source.checkpoint.tensors else "embedding"
    norm = "decoder.final_norm"
    return OneVariant({norm: source.stored(norm).to(dtype), "head": source.stored(head).to(dtype)})


def log_probabilities(model: Decoder | EncoderDecoder, hidden_TD: Tensor, head: Weights) -> Tensor:
    """Of every token of the vocabulary, float32 [T, Vo]."""
    return functional.log_softmax(model.logits(hidden_TD, head).float(), dim=-1)


def divergence(own_TV: Tensor, other_TV: Tensor) -> Tensor:
    """KL(own || other) of log-probabilities, float64 [T]."""
    return functional.kl_div(other_TV, own_TV, reduction="none", log_target=True).double().sum(dim=-1)


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
