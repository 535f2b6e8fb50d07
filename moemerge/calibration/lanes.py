"""Several models of one geometry side by side in the same batch, each in a lane of its own.

Every weight is read once, and nothing has to be kept between the lanes to compare them. Knows nothing of
bundles and plans.

Shapes: T tokens of a lane, D model width, Vo vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from moemerge.calibration.passes import (
    LOGIT_ENTRIES,
    NO_LABEL,
    CalibrationOptions,
    cut_passes,
    hidden_states,
    labels_of,
    num_predicted,
    pass_tokens,
)
from moemerge.calibration.streaming import Source, StreamedExperts, StreamedWeights
from moemerge.calibration.texts import Passage
from moemerge.models import (
    Decoder,
    EncoderDecoder,
    Experts,
    OneVariant,
    Route,
    Weights,
    build_model,
)
from moemerge.models.weights import HEAD_ROLES, Apply

Part = TypeVar("Part")


class Lane(NamedTuple):
    """One of the models computed side by side; what neighbours have in common is read once."""

    source: Source
    experts: Experts


def lane_of(source: Source) -> Lane:
    """A model whose experts are streamed from the source, too."""
    activation = build_model(
        source.checkpoint.family.arithmetic, source.checkpoint.settings
    ).config.activation
    return Lane(source, StreamedExperts(source, activation, {}, 0, None))


class LaneWeights:
    """`Weights` of lanes, each with as many tokens as the others; neighbours with the same share products."""

    def __init__(self, lanes: Sequence[Weights]) -> None:
        self._runs = _runs_of(lanes)

    def __contains__(self, role: str) -> bool:
        return role in self._runs[0].one

    def linear(self, role: str, hidden_TD: Tensor) -> Tensor:
        """See `Weights.linear`."""
        return self._by_run(hidden_TD, lambda weights, piece: weights.linear(role, piece))

    def add(self, role: str, hidden_TD: Tensor) -> Tensor:
        """See `Weights.add`."""
        return self._by_run(hidden_TD, lambda weights, piece: weights.add(role, piece))

    def norm(self, role: str, hidden_TD: Tensor, eps: float) -> Tensor:
        """See `Weights.norm`."""
        return self._by_run(hidden_TD, lambda weights, piece: weights.norm(role, piece, eps))

    def layer_norm(self, role: str, hidden_TD: Tensor, eps: float) -> Tensor:
        """See `Weights.layer_norm`."""
        return self._by_run(hidden_TD, lambda weights, piece: weights.layer_norm(role, piece, eps))

    def apply(self, role: str, tokens: Tensor, function: Apply) -> Tensor:
        """See `Weights.apply`."""
        return self._by_run(tokens, lambda weights, piece: weights.apply(role, piece, function))

    def embed(self, role: str, ids: Tensor) -> Tensor:
        """See `Weights.embed`."""
        return self._by_run(ids, lambda weights, piece: weights.embed(role, piece))

    def _by_run(self, tokens: Tensor, apply: Callable[[Weights, Tensor], Tensor]) -> Tensor:
        pieces = _cut(tokens, self._runs)
        return torch.cat([apply(run.one, piece) for run, piece in zip(self._runs, pieces, strict=True)])


class LaneExperts:
    """`Experts` of lanes, each with as many tokens as the others."""

    def __init__(self, lanes: Sequence[Experts]) -> None:
        self._runs = _runs_of(lanes)

    def product(self, layer_index: int, hidden_TD: Tensor, route: Route) -> Tensor:
        """See `Experts.product`."""
        pieces = [_cut(tensor, self._runs) for tensor in (hidden_TD, *route)]
        outputs = [
            run.one.product(layer_index, hidden, Route(slots, gates))
            for run, hidden, slots, gates in zip(self._runs, *pieces, strict=True)
        ]
        return torch.cat(outputs)


class _Run(NamedTuple, Generic[Part]):
    """Neighbouring lanes that have one thing in common."""

    one: Part
    num_lanes: int


def _runs_of(lanes: Sequence[Part]) -> list[_Run[Part]]:
    found = [list(run) for _, run in groupby(lanes, key=id)]
    return [_Run(run[0], len(run)) for run in found]


def _cut(tokens: Tensor, runs: Sequence[_Run[Part]]) -> Sequence[Tensor]:
    """The tokens of each run."""
    each = len(tokens) // sum(run.num_lanes for run in runs)
    return torch.split(tokens, [run.num_lanes * each for run in runs])


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
    of_source = {id(lane.source): StreamedWeights(lane.source) for lane in lanes}
    weights = LaneWeights([of_source[id(lane.source)] for lane in lanes])
    experts = LaneExperts([lane.experts for lane in lanes])
    hidden_TD = hidden_states(model, list(passages) * len(lanes), weights, experts)
    # In float32 whatever the layers were computed in: small divergences lie below the steps of bf16 logits.
    head_by_source = {id(lane.source): head_of(lane.source, torch.float32) for lane in lanes}
    heads = [head_by_source[id(lane.source)] for lane in lanes]
    label_T = torch.tensor([label for own in labels_of(model, passages) for label in own])
    rows = max(1, LOGIT_ENTRIES // (len(lanes) * heads[0].tensors["head"].shape[0]))
    sums = torch.zeros(len(lanes), 2, dtype=torch.float64)
    parts = zip(*(torch.split(hidden, rows) for hidden in hidden_TD.chunk(len(lanes))), strict=True)
    for hidden, label in zip(parts, torch.split(label_T, rows), strict=True):
        kept = label != NO_LABEL
        found = [
            log_probabilities(model, one[kept].float(), head) for one, head in zip(hidden, heads, strict=True)
        ]
        for number, own in enumerate(found):
            sums[number, 0] += functional.nll_loss(own, label[kept], reduction="sum").double()
            sums[number, 1] += divergence(found[0], own).sum() if number else 0.0
    return sums


def head_of(source: Source, dtype: torch.dtype) -> OneVariant:
    """Final norm and head, which may be the embedding, ready to be applied again and again."""
    tensors = source.checkpoint.tensors
    kept = {role: source.stored(role).to(dtype) for role in HEAD_ROLES if role in tensors}
    head = "head" if "head" in tensors else "embedding"
    return OneVariant({**kept, "head": source.stored(head).to(dtype)})


def log_probabilities(model: Decoder | EncoderDecoder, hidden_TD: Tensor, head: Weights) -> Tensor:
    """Of every token of the vocabulary, float32 [T, Vo]."""
    return functional.log_softmax(model.logits(hidden_TD, head).float(), dim=-1)


def divergence(own_TV: Tensor, other_TV: Tensor) -> Tensor:
    """KL(own || other) of log-probabilities, float64 [T]."""
    return functional.kl_div(other_TV, own_TV, reduction="none", log_target=True).double().sum(dim=-1)
