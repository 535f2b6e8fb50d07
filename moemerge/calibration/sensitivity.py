"""What damage in a layer costs a variant, in nats: its experts are disturbed a little, one layer at a time.

Every layer is disturbed in a lane of its own, beside the variant as it is, in one pass over the same
passages.

Shapes: T tokens, D model width.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moemerge.calibration.lanes import Lane, measure_lanes
from moemerge.calibration.passes import DTYPES, CalibrationOptions
from moemerge.calibration.streaming import CheckpointSource, StreamedExperts
from moemerge.calibration.texts import Passage
from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.headers import StoredTensor
from moemerge.checkpoint.tensors import TensorReader
from moemerge.models import Route, build_model
from moemerge.progress import Progress, Silent

_DISTURBANCE = 0.1
"""Of every matrix, over the root mean square of its entries: about what four bits or a sibling do to it."""


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What was measured of a variant.

    Attributes:
        nll: Of the variant as it is, in nats per predicted token.
        by_layer: By layer index, nats of divergence per unit of damage; damage is the square of what is added
            to a layer's output over the square of the output.
    """

    nll: float
    by_layer: Mapping[int, float]


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
    with TensorReader() as reader:
        source = CheckpointSource(checkpoint, reader, DTYPES[options.dtype], report.advance)
        experts = _DisturbedExperts(source, indices, options.seed)
        lanes = [Lane(source, experts)] * (1 + len(indices))
        own, *disturbed = measure_lanes(passages, lanes, options)
    by_layer = {
        index: loss.kl / experts.damage(index) if experts.damage(index) > 0 else 0.0
        for index, loss in zip(indices, disturbed, strict=True)
    }
    return Sensitivity(own.nll, by_layer)


class _DisturbedExperts:
    """`Experts` of lanes: the first as it is, in each of the others one layer disturbed."""

    def __init__(self, source: CheckpointSource, indices: Sequence[int], seed: int) -> None:
        activation = build_model(
            source.checkpoint.family.arithmetic, source.checkpoint.settings
        ).config.activation
        self._own = StreamedExperts(source, activation, {}, 0, None)
        self._other = StreamedExperts(_DisturbedSource(source, seed), activation, {}, 0, None)
        self._lane_of = {index: number for number, index in enumerate(indices, start=1)}
        self._squares: dict[int, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))

    def damage(self, layer_index: int) -> float:
        """What disturbing a layer did to its output."""
        added, output = self._squares[layer_index].tolist()
        return added / output if output else 0.0

    def product(self, layer_index: int, hidden_TD: Tensor, route: Route) -> Tensor:
        """See `Experts.product`."""
        output_TD = self._own.product(layer_index, hidden_TD, route)
        each = len(hidden_TD) // (1 + len(self._lane_of))
        rows = slice(self._lane_of[layer_index] * each, (self._lane_of[layer_index] + 1) * each)
        own_TD = output_TD[rows].double()
        disturbed_TD = self._other.product(
            layer_index, hidden_TD[rows], Route(route.slots_TK[rows], route.gates_TK[rows])
        )
        squares = [(disturbed_TD - own_TD).square().sum(), own_TD.square().sum()]
        self._squares[layer_index] += torch.stack(squares)
        output_TD[rows] = disturbed_TD
        return output_TD


class _DisturbedSource:
    """`Source` whose experts are a little off, always in the same way."""

    def __init__(self, source: CheckpointSource, seed: int) -> None:
        self.checkpoint = source.checkpoint
        self.dtype = source.dtype
        self._source = source
        self._seed = seed

    def stored(self, role: str) -> Tensor:
        """See `Source.stored`."""
        return self._source.stored(role)

    def expert(self, layer_index: int, slot: int) -> dict[str, Tensor]:
        """See `Source.expert`."""
        place = layer_index * self.checkpoint.num_experts + slot
        generator = torch.Generator().manual_seed(self._seed + place)
        return {
            part: matrix
            + torch.randn(matrix.shape, generator=generator).to(matrix.dtype)
            * (_DISTURBANCE * matrix.float().square().mean().sqrt())
            for part, matrix in self._source.expert(layer_index, slot).items()
        }

    def done(self, tensors: Mapping[str, StoredTensor]) -> None:
        """See `Source.done`; told by the undisturbed experts."""
