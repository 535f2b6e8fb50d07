"""What damage in a layer costs a variant, in nats: its experts are disturbed a little, one layer at a time.

Every layer is disturbed in a lane of its own, beside the variant as it is, in one pass over the same
passages; in two more lanes all of them are, much and little. A small disturbance costs more than its share:
it sends some tokens to other experts, and how many grows with its size, not with its square.

Shapes: T tokens, D model width.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moemerge.calibration.lanes import Lane, measure_lanes
from moemerge.calibration.passes import DTYPES, CalibrationOptions
from moemerge.calibration.streaming import CheckpointSource, StreamedExperts
from moemerge.calibration.texts import Passage
from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.headers import StoredTensor
from moemerge.checkpoint.tensors import TensorReader
from moemerge.models import Experts, Route, build_model
from moemerge.progress import Progress, Silent

_SIZE = 0.1
"""Of the disturbance of a matrix, over the root mean square of its entries: about what four bits do to it."""
_STARTS = 2**16
"""Places in the normal numbers at which those of a matrix may begin: to draw them for each takes longer than
to compute with them."""
_MUCH, _LITTLE = 1.0, 0.2
"""How much of what that does to an expert's output: all of it, and about what six bits do."""
_EXPONENTS = (0.4, 1.0)
"""A loss grows with the square root of damage when tokens change experts, with damage when they do not."""


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What was measured of a variant.

    Damage is the square of what is added to a layer's output over the square of the output.

    Attributes:
        by_layer: By layer index, nats of divergence per unit of damage, when that layer is much disturbed.
        response: What is lost of all layers together.
    """

    by_layer: Mapping[int, float]
    response: "Response"


class Response(NamedTuple):
    """Nats that are lost when all layers are damaged, as a power of the sum of damage by sensitivity."""

    scale: float = 1.0
    exponent: float = 1.0

    def nats(self, weighted_damage: float) -> float:
        """What is lost, of the sum over layers of damage times sensitivity."""
        return self.scale * weighted_damage**self.exponent if weighted_damage > 0 else 0.0


def measure_sensitivity(
    checkpoint: Checkpoint,
    passages: Sequence[Passage],
    options: CalibrationOptions,
    progress: Progress | None = None,
    title: str = "disturbing",
) -> Sensitivity:
    """Disturb every routed layer in turn.

    Args:
        checkpoint: Local.
        passages: In its own tokens; all layers times their tokens are computed.
        options: Memory, dtype, and the seed of the disturbance.
        progress: Told of the bytes of weights whose work is done.
        title: What progress calls it.

    Raises:
        NotEnoughRoom: Not even one passage fits into memory as often as there are layers.
        DamagedInput: A weight is not finite, or a file changed.
    """
    report = progress or Silent()
    report.start(title, checkpoint.expert_bytes + checkpoint.other_bytes)
    indices = [layer.index for layer in checkpoint.routed_layers]
    disturbed = [*((index, _MUCH) for index in indices), (None, _MUCH), (None, _LITTLE)]
    with TensorReader() as reader:
        source = CheckpointSource(checkpoint, reader, DTYPES[options.dtype], report.advance)
        experts = _DisturbedExperts(source, [_Lane(*one) for one in disturbed], options.seed)
        lanes = [Lane(source, experts)] * (1 + len(disturbed))
        _, *losses = measure_lanes(passages, lanes, options)
    damage = experts.damage()
    by_layer = {
        index: loss.kl / damage[number][index] if damage[number][index] > 0 else 0.0
        for number, (index, loss) in enumerate(zip(indices, losses, strict=False))
    }
    weighted = [
        sum(by_layer[index] * damage[number][index] for index in indices)
        for number in (len(indices), len(indices) + 1)
    ]
    return Sensitivity(by_layer, _response(weighted, [loss.kl for loss in losses[-2:]]))


def _response(weighted: Sequence[float], nats: Sequence[float]) -> Response:
    """The power law through two measurements, much and little disturbed."""
    if min(*weighted, *nats) <= 0 or weighted[0] == weighted[1]:
        return Response()
    least, most = _EXPONENTS
    slope = math.log(nats[0] / nats[1]) / math.log(weighted[0] / weighted[1])
    exponent = min(max(slope, least), most)
    return Response(nats[1] / weighted[1] ** exponent, exponent)


class _Lane(NamedTuple):
    """Which layer is disturbed, None for all, and with how much of the disturbance."""

    layer_index: int | None
    share: float


class _DisturbedExperts:
    """`Experts` of lanes: the first as it is, in each of the others something disturbed."""

    def __init__(self, source: CheckpointSource, lanes: Sequence[_Lane], seed: int) -> None:
        activation = build_model(
            source.checkpoint.family.arithmetic, source.checkpoint.settings
        ).config.activation
        self._own = StreamedExperts(source, activation, {}, 0, None)
        self._lanes = lanes
        self._disturbed = StreamedExperts(_DisturbedSource(source, seed), activation, {}, 0, None)
        self._first = source.checkpoint.routed_layers[0].index
        self._squares: list[dict[int, Tensor]] = [{} for _ in lanes]

    def damage(self) -> list[dict[int, float]]:
        """By lane and layer index, what disturbing it did to its output."""
        return [
            {index: float(added / output) if output else 0.0 for index, (added, output) in squares.items()}
            for squares in self._squares
        ]

    def product(self, layer_index: int, hidden_TD: Tensor, route: Route) -> Tensor:
        """See `Experts.product`."""
        lanes = range(1 + len(self._lanes))
        # Up to its own layer a lane is what the first one is: computed once for all of them.
        apart = [0, *(number for number in lanes[1:] if self._is_apart(number, layer_index))]
        own = _product(self._own, layer_index, apart, hidden_TD, route, len(lanes))
        outputs = [own[number if number in own else 0] for number in lanes]
        numbers = [n for n in lanes[1:] if self._lanes[n - 1].layer_index in (None, layer_index)]
        found = _product(self._disturbed, layer_index, numbers, hidden_TD, route, len(lanes))
        for number, disturbed_TD in found.items():
            own_TD = outputs[number]
            outputs[number] = torch.lerp(own_TD, disturbed_TD, self._lanes[number - 1].share)
            self._count(number - 1, layer_index, own_TD.double(), outputs[number])
        return torch.cat(outputs)

    def _is_apart(self, number: int, layer_index: int) -> bool:
        """Whether what was disturbed in a lane before this layer makes it another than the first."""
        disturbed = self._lanes[number - 1].layer_index
        return layer_index > (self._first if disturbed is None else disturbed)

    def _count(self, number: int, layer_index: int, own_TD: Tensor, disturbed_TD: Tensor) -> None:
        squares = torch.stack(
            [values_TD.square().sum(dim=1).sum() for values_TD in (disturbed_TD - own_TD, own_TD)]
        )
        before = self._squares[number].get(layer_index, torch.zeros(2, dtype=torch.float64))
        self._squares[number][layer_index] = before + squares


def _product(
    experts: Experts,
    layer_index: int,
    numbers: Sequence[int],
    hidden_TD: Tensor,
    route: Route,
    num_lanes: int,
) -> dict[int, Tensor]:
    """What experts answer to some of the lanes that stand one after the other in a batch, by lane."""
    parts = [torch.chunk(tensor, num_lanes) for tensor in (hidden_TD, *route)]
    inputs_TD, slots_TK, gates_TK = (torch.cat([part[number] for number in numbers]) for part in parts)
    output_TD = experts.product(layer_index, inputs_TD, Route(slots_TK, gates_TK))
    return dict(zip(numbers, torch.chunk(output_TD, len(numbers)), strict=True))


class _DisturbedSource:
    """`Source` whose experts are a little off, always in the same way.

    Every matrix takes a stretch of the same normal numbers, beginning elsewhere.
    """

    def __init__(self, source: CheckpointSource, seed: int) -> None:
        self.checkpoint = source.checkpoint
        self.dtype = source.dtype
        self._source = source
        parts = next(iter(source.checkpoint.experts.values())).values()
        generator = torch.Generator().manual_seed(seed)
        size = max(part.num_elements for part in parts) + _STARTS
        self._normal = torch.randn(size, generator=generator, dtype=source.dtype)
        self._rows = {place: row for row, place in enumerate(sorted(source.checkpoint.experts))}
        self._starts = torch.randint(_STARTS, (len(self._rows), len(parts)), generator=generator)

    def stored(self, role: str) -> Tensor:
        """See `Source.stored`."""
        return self._source.stored(role)

    def expert(self, layer_index: int, slot: int) -> dict[str, Tensor]:
        """See `Source.expert`."""
        row = self._rows[layer_index, slot]
        parts = self._source.expert(layer_index, slot)
        return {
            part: self._disturb(matrix, int(start))
            for (part, matrix), start in zip(parts.items(), self._starts[row], strict=True)
        }

    def _disturb(self, matrix: Tensor, start: int) -> Tensor:
        normal = self._normal[start : start + matrix.numel()].view(matrix.shape)
        norms_N = torch.linalg.vector_norm(matrix, dim=-1, dtype=torch.float32)
        mean_square = float(norms_N.square().sum()) / matrix.numel()
        return torch.add(matrix, normal, alpha=_SIZE * math.sqrt(mean_square))

    def done(self, tensors: Mapping[str, StoredTensor]) -> None:
        """See `Source.done`; told by the undisturbed experts."""
