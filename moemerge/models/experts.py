"""The expert product: tokens through the pool experts that their slots map to.

Holds the activations, the interface through which a model sees experts, and the product itself, once
plain and once fast. Knows nothing of routers, attention and of how a pool is stored.

Shapes: T tokens, D model width, F expert width, K slots per token, E slots; C chosen (token, pool
expert) pairs that are computed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from moemerge.models.routing import Route

PartLookup = Callable[[str], Tensor]


class Activation(StrEnum):
    """The closed list of feed-forward forms that a family description may name."""

    SILU_GATED = "silu_gated"
    RELU = "relu"


class ExpertLayer(Protocol):
    """The experts of one layer as one variant sees them."""

    @property
    def slot_to_pool(self) -> Tensor:
        """Expert map, int64 [E], on the device of the hidden states."""
        ...

    def part(self, name: str, pool_index: int) -> Tensor:
        """One matrix of a pool expert: `gate`, `up`, `wi` [F, D], `down`, `wo` [D, F]."""
        ...


class ExpertSource(Protocol):
    """Where a model gets its experts from, asked anew at every forward pass."""

    def layer(self, layer_index: int) -> ExpertLayer:
        """Experts of a layer, counted through all stacks, encoder first."""
        ...


@dataclass(frozen=True, slots=True)
class PlainExpertLayer:
    """An `ExpertLayer` over tensors in memory; `parts` holds one tensor per pool expert."""

    slot_to_pool: Tensor
    parts: Mapping[str, Sequence[Tensor]]

    def part(self, name: str, pool_index: int) -> Tensor:
        """See `ExpertLayer.part`."""
        return self.parts[name][pool_index]


@dataclass(frozen=True, slots=True)
class PlainExperts:
    """An `ExpertSource` over layers in memory."""

    layers: Mapping[int, ExpertLayer]

    def layer(self, layer_index: int) -> ExpertLayer:
        """See `ExpertSource.layer`."""
        return self.layers[layer_index]


def own_experts(parts_by_layer: Mapping[int, Mapping[str, Sequence[Tensor]]]) -> PlainExperts:
    """Experts of a stand-alone checkpoint, each slot with its own.

    Args:
        parts_by_layer: Layer index to part name to one tensor per slot.
    """
    return PlainExperts({index: _own_layer(parts) for index, parts in parts_by_layer.items()})


def _own_layer(parts: Mapping[str, Sequence[Tensor]]) -> PlainExpertLayer:
    tensors = next(iter(parts.values()))
    return PlainExpertLayer(torch.arange(len(tensors), device=tensors[0].device), parts)


def silu_gated(hidden_TD: Tensor, part: PartLookup) -> Tensor:
    """`down(silu(gate x) * (up x))`."""
    inner_TF = functional.silu(functional.linear(hidden_TD, part("gate")))
    return functional.linear(inner_TF * functional.linear(hidden_TD, part("up")), part("down"))


def relu(hidden_TD: Tensor, part: PartLookup) -> Tensor:
    """`wo(relu(wi x))`."""
    return functional.linear(functional.relu(functional.linear(hidden_TD, part("wi"))), part("wo"))


ACTIVATIONS: Mapping[Activation, Callable[[Tensor, PartLookup], Tensor]] = {
    Activation.SILU_GATED: silu_gated,
    Activation.RELU: relu,
}


def expert_product(hidden_TD: Tensor, route: Route, layer: ExpertLayer, activation: Activation) -> Tensor:
    """Sum over the chosen slots of gate times expert output, each pool expert computed once per token.

    Gates of slots that map to one pool expert add: `(p1 + p2) * P(x)`. Outputs are summed in float32 and
    cast once.

    Args:
        hidden_TD: Normed hidden states, in the dtype of the experts.
        route: Slots among the variant's own E and their gates; gate zero is not computed.
        layer: The variant's experts in this layer.
        activation: Form of the experts.

    Returns:
        [T, D] in the dtype of `hidden_TD`; zero for a token whose gates are all zero.
    """
    if len(hidden_TD) == 1:
        return expert_product_plain(hidden_TD, route, layer, activation)  # sorting one token only costs
    pool_TK = layer.slot_to_pool[route.slots_TK]
    gates_TK = add_shared_gates(pool_TK, route.gates_TK)
    token_C, choice_C = gates_TK.nonzero(as_tuple=True)
    pool_C, order_C = pool_TK[token_C, choice_C].sort(stable=True)
    token_C = token_C[order_C]
    gate_C1 = gates_TK[token_C, choice_C[order_C]].unsqueeze(-1)
    pool_indices, counts = torch.unique_consecutive(pool_C, return_counts=True)

    output_TD = torch.zeros_like(hidden_TD, dtype=torch.float32)
    start = 0
    for pool_index, count in zip(pool_indices.tolist(), counts.tolist(), strict=True):
        rows = slice(start, start + count)
        one_output = expert_output(hidden_TD[token_C[rows]], layer, pool_index, activation)
        output_TD.index_add_(0, token_C[rows], one_output * gate_C1[rows])
        start += count
    return output_TD.to(hidden_TD.dtype)


def add_shared_gates(pool_TK: Tensor, gates_TK: Tensor) -> Tensor:
    """Gates with those of one token and one pool expert added into the first of them.

    Returns:
        [T, K]; zero wherever an earlier choice of the same token has the same pool expert.
    """
    num_chosen = pool_TK.shape[1]
    if num_chosen == 1:
        return gates_TK
    same_TKK = pool_TK.unsqueeze(2) == pool_TK.unsqueeze(1)
    is_repeat_TK = same_TKK.tril(diagonal=-1).any(dim=2)
    summed_TK = (same_TKK * gates_TK.unsqueeze(1)).sum(dim=2)
    return summed_TK.masked_fill(is_repeat_TK, 0.0)


def expert_output(hidden_TD: Tensor, layer: ExpertLayer, pool_index: int, activation: Activation) -> Tensor:
    """Output of one pool expert, [T, D]."""
    return ACTIVATIONS[activation](hidden_TD, lambda name: layer.part(name, pool_index))


def expert_product_plain(
    hidden_TD: Tensor, route: Route, layer: ExpertLayer, activation: Activation
) -> Tensor:
    """Specification of `expert_product`: one token and one pool expert at a time."""
    output_TD = torch.zeros_like(hidden_TD, dtype=torch.float32)
    for token in range(len(hidden_TD)):
        gate_of_pool: dict[int, float] = {}
        for slot, gate in zip(route.slots_TK[token].tolist(), route.gates_TK[token].tolist(), strict=True):
            pool_index = int(layer.slot_to_pool[slot])
            gate_of_pool[pool_index] = gate_of_pool.get(pool_index, 0.0) + gate
        for pool_index, gate in gate_of_pool.items():
            if gate != 0.0:
                one_token_1D = hidden_TD[token : token + 1]
                one_output = expert_output(one_token_1D, layer, pool_index, activation)
                output_TD[token] += gate * one_output[0].float()
    return output_TD.to(hidden_TD.dtype)
