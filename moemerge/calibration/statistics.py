"""What is kept of the tokens that met an expert: sums, and a uniform sample of the tokens themselves.

Everything can be added, so that passes over parts of a text give what one pass over all of it gives.

Shapes: T tokens, D model width, S tokens of the sample, E slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from moemerge.models.products import matmul

SAMPLE_DTYPE = torch.bfloat16


@dataclass(slots=True, kw_only=True)
class SlotStatistics:
    """Of the tokens that a variant routed to one slot of one layer; x is the expert's input, E(x) its output.

    Attributes:
        count: Tokens routed here.
        gate_sum: Sum of gates g.
        gate_square_sum: Sum of g^2.
        saliency_sum: Sum of g |E(x)|; over `count` it is the saliency of REAP (arXiv:2510.13999).
        output_square_sum: Sum of g^2 |E(x)|^2.
        output_max: Largest absolute entry of any E(x).
        moment_DD: Float32, sum of g^2 x x^T.
        inputs_SD: BF16, inputs of tokens drawn uniformly from those routed here. They stand in the order
            of their random keys, so that any leading part is a uniform sample, too.
        gates_S: Float32, the gates of those tokens.
        keys_S: Float64, their random keys, ascending.
        reservoir: Most tokens that the sample holds.
    """

    count: int
    gate_sum: float
    gate_square_sum: float
    saliency_sum: float
    output_square_sum: float
    output_max: float
    moment_DD: Tensor
    inputs_SD: Tensor
    gates_S: Tensor
    keys_S: Tensor
    reservoir: int

    @classmethod
    def empty(cls, width: int, reservoir: int) -> Self:
        """Of no tokens."""
        return cls(
            count=0,
            gate_sum=0.0,
            gate_square_sum=0.0,
            saliency_sum=0.0,
            output_square_sum=0.0,
            output_max=0.0,
            moment_DD=torch.zeros(width, width),
            inputs_SD=torch.zeros(0, width, dtype=SAMPLE_DTYPE),
            gates_S=torch.zeros(0),
            keys_S=torch.zeros(0, dtype=torch.float64),
            reservoir=reservoir,
        )

    @property
    def saliency(self) -> float:
        """Mean of g |E(x)| over the tokens routed here; 0 when there are none."""
        return self.saliency_sum / self.count if self.count else 0.0

    def add_tokens(self, inputs_TD: Tensor, gates_T: Tensor, keys_T: Tensor, outputs_TD: Tensor) -> None:
        """Count tokens routed here.

        Args:
            inputs_TD: What the expert was given.
            gates_T: Float32.
            keys_T: Float64, random, different for every token of a text.
            outputs_TD: What it answered, float32, not yet times the gate.
        """
        gates, norms = gates_T.double(), outputs_TD.norm(dim=1).double()
        self.count += len(gates_T)
        self.gate_sum += float(gates.sum())
        self.gate_square_sum += float(gates.square().sum())
        self.saliency_sum += float((gates * norms).sum())
        self.output_square_sum += float((gates * norms).square().sum())
        self.output_max = max(self.output_max, float(outputs_TD.abs().max()))
        gated_TD = inputs_TD.float() * gates_T.unsqueeze(1)
        self.moment_DD += matmul(gated_TD.T, gated_TD)
        self._sample(inputs_TD, gates_T, keys_T)

    def add(self, other: "SlotStatistics") -> None:
        """Count what `other` has counted, too."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.output_max = max(self.output_max, other.output_max)
        self.moment_DD += other.moment_DD
        self._sample(other.inputs_SD, other.gates_S, other.keys_S)

    def _sample(self, inputs_TD: Tensor, gates_T: Tensor, keys_T: Tensor) -> None:
        """Keep the tokens with the smallest keys among those kept and the new ones."""
        if len(self.keys_S) == self.reservoir:
            wins = keys_T < (self.keys_S[-1] if self.reservoir else 0.0)
            inputs_TD, gates_T, keys_T = inputs_TD[wins], gates_T[wins], keys_T[wins]
        keys = torch.cat((self.keys_S, keys_T))
        kept = keys.argsort(stable=True)[: self.reservoir]
        self.inputs_SD = torch.cat((self.inputs_SD, inputs_TD.to(SAMPLE_DTYPE)))[kept]
        self.gates_S = torch.cat((self.gates_S, gates_T))[kept]
        self.keys_S = keys[kept]


_SUMS = ("count", "gate_sum", "gate_square_sum", "saliency_sum", "output_square_sum")
SCALARS = (*_SUMS, "output_max")


@dataclass(slots=True, kw_only=True)
class LayerStatistics:
    """Of all tokens that one layer of a variant has seen.

    Attributes:
        slots: One per slot.
        num_tokens: Tokens that went through the layer.
        output_square_sum: Sum over tokens of |sum_k g_k E_k(x)|^2, the energy of the layer's output.
    """

    slots: list[SlotStatistics]
    num_tokens: int
    output_square_sum: float

    @classmethod
    def empty(cls, num_slots: int, width: int, reservoir: int) -> Self:
        """Of no tokens."""
        slots = [SlotStatistics.empty(width, reservoir) for _ in range(num_slots)]
        return cls(slots=slots, num_tokens=0, output_square_sum=0.0)

    def add(self, other: "LayerStatistics") -> None:
        """Count what `other` has counted, too."""
        self.num_tokens += other.num_tokens
        self.output_square_sum += other.output_square_sum
        for slot, more in zip(self.slots, other.slots, strict=True):
            slot.add(more)


def layer_bytes(num_slots: int, width: int, reservoir: int) -> int:
    """Of the statistics of one layer of a variant, when every sample is full."""
    return num_slots * (4 * width * width + reservoir * (2 * width + 12))


def layer_tensors(layer: LayerStatistics) -> dict[str, Tensor]:
    """Statistics as tensors by name; `layer_of_tensors` is the way back."""
    scalars = [[float(getattr(slot, name)) for name in SCALARS] for slot in layer.slots]
    tensors = {
        "layer": torch.tensor([float(layer.num_tokens), layer.output_square_sum], dtype=torch.float64),
        "slots": torch.tensor(scalars, dtype=torch.float64),
    }
    for number, slot in enumerate(layer.slots):
        tensors[f"s{number:05d}.moment"] = slot.moment_DD
        tensors[f"s{number:05d}.inputs"] = slot.inputs_SD
        tensors[f"s{number:05d}.gates"] = slot.gates_S
        tensors[f"s{number:05d}.keys"] = slot.keys_S
    return tensors


def layer_of_tensors(tensors: dict[str, Tensor], reservoir: int) -> LayerStatistics:
    """Statistics from the tensors that `layer_tensors` gave.

    Raises:
        KeyError, ValueError: Tensors are missing or do not fit each other.
    """
    num_tokens, output_square_sum = tensors["layer"].tolist()
    slots = [
        _slot(tensors, f"s{number:05d}", scalars, reservoir)
        for number, scalars in enumerate(tensors["slots"].tolist())
    ]
    return LayerStatistics(slots=slots, num_tokens=int(num_tokens), output_square_sum=output_square_sum)


def _slot(tensors: dict[str, Tensor], name: str, scalars: Sequence[float], reservoir: int) -> SlotStatistics:
    moment, inputs = tensors[f"{name}.moment"], tensors[f"{name}.inputs"]
    gates, keys = tensors[f"{name}.gates"], tensors[f"{name}.keys"]
    width = moment.shape[-1]
    if moment.shape != (width, width) or inputs.shape != (len(gates), width) or gates.shape != keys.shape:
        raise ValueError(f"tensors of {name} do not fit each other")
    values = dict(zip(SCALARS, scalars, strict=True))
    count = int(values.pop("count"))
    return SlotStatistics(
        count=count,
        **values,
        moment_DD=moment,
        inputs_SD=inputs,
        gates_S=gates,
        keys_S=keys,
        reservoir=reservoir,
    )
