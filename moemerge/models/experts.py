"""The expert product: tokens through the pool experts that their slots map to.

Holds the activations, the interfaces through which a model sees experts, and the product itself, once
plain and once fast. Knows nothing of routers, attention and of how a pool is stored.

Shapes: T tokens, D model width, F expert width, K slots per token, E slots, M expert maps; C pairs of a
token and a row that are computed, P rows: pool experts, alone or with a residual.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from moemerge.models.layouts import Arranged, Multiplied, Summed
from moemerge.models.packed import Coded, LowRank, fill_effective
from moemerge.models.routing import Route
from moemerge.models.weights import OneVariant, Weights


class Activation(StrEnum):
    """The closed list of feed-forward forms that a family description may name."""

    SILU_GATED = "silu_gated"
    SILU_GATED_DOWN_BIAS = "silu_gated_down_bias"
    CLAMPED_SWIGLU = "clamped_swiglu"
    RELU = "relu"


def silu_gated(weights: Weights, prefix: str, hidden_TD: Tensor) -> Tensor:
    """`down(silu(gate x) * (up x))`; `gate_up` [2F, D], gate above up, stands for both of them."""
    gate_TF, up_TF = _gate_and_up(weights, prefix, hidden_TD)
    return weights.linear(f"{prefix}down", functional.silu(gate_TF) * up_TF)


def silu_gated_down_bias(weights: Weights, prefix: str, hidden_TD: Tensor) -> Tensor:
    """`silu_gated` plus `down_bias` [D]: gates scale an expert's bias as all of its output."""
    return weights.add(f"{prefix}down_bias", silu_gated(weights, prefix, hidden_TD))


def clamped_swiglu(weights: Weights, prefix: str, hidden_TD: Tensor) -> Tensor:
    """`down(s(gate x) * (up x + 1))` with biases, `s(y) = y sigmoid(1.702 y)`; gates to 7, ups to within 7.

    Source: gpt-oss, `swiglu` of its published model code.
    """
    gate_TF, up_TF = _gate_and_up(weights, prefix, hidden_TD)
    gate_TF = weights.add(f"{prefix}gate_bias", gate_TF).clamp(max=7.0)
    up_TF = weights.add(f"{prefix}up_bias", up_TF).clamp(-7.0, 7.0)
    inner_TF = gate_TF * (1.702 * gate_TF).sigmoid() * (up_TF + 1)
    return weights.add(f"{prefix}down_bias", weights.linear(f"{prefix}down", inner_TF))


def _gate_and_up(weights: Weights, prefix: str, hidden_TD: Tensor) -> Sequence[Tensor]:
    if f"{prefix}gate_up" in weights:
        return weights.linear(f"{prefix}gate_up", hidden_TD).chunk(2, dim=-1)
    return weights.linear(f"{prefix}gate", hidden_TD), weights.linear(f"{prefix}up", hidden_TD)


def relu(weights: Weights, prefix: str, hidden_TD: Tensor) -> Tensor:
    """`wo(relu(wi x))`."""
    return weights.linear(f"{prefix}wo", functional.relu(weights.linear(f"{prefix}wi", hidden_TD)))


ACTIVATIONS: Mapping[Activation, Callable[[Weights, str, Tensor], Tensor]] = {
    Activation.SILU_GATED: silu_gated,
    Activation.SILU_GATED_DOWN_BIAS: silu_gated_down_bias,
    Activation.CLAMPED_SWIGLU: clamped_swiglu,
    Activation.RELU: relu,
}
"""Feed-forward networks [T, D] to [T, D] over weights whose roles begin with a prefix."""


class PoolLayer(Protocol):
    """The pool experts of one layer, and behind them what slots with a residual compute with."""

    def output(self, pool_index: int, hidden_TD: Tensor) -> Tensor:
        """Output [T, D] of one of them."""
        ...


class Experts(Protocol):
    """The experts that a model is given for one batch."""

    def product(self, layer_index: int, hidden_TD: Tensor, route: Route) -> Tensor:
        """Sum over each token's slots of gate times expert output, [T, D].

        Layers are counted through all stacks, encoder first; `route` holds slots among each token's
        variant's own E.
        """
        ...


@dataclass(frozen=True, slots=True)
class PlainPoolLayer:
    """A `PoolLayer` over tensors in memory: for each pool expert its parts by name, which may be packed."""

    experts: Sequence[Mapping[str, Tensor]]
    activation: Activation

    def output(self, pool_index: int, hidden_TD: Tensor) -> Tensor:
        """See `PoolLayer.output`."""
        return ACTIVATIONS[self.activation](OneVariant(self.experts[pool_index]), "", hidden_TD)


class Scratch:
    """One expert in the dtype of computing, written over by the next; `gate` and `up` are one product.

    Attributes:
        tensors: By role, as activations ask for them.
        targets: By part, the same memory.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.targets: dict[str, Tensor] = {}
        self.tensors: dict[str, Tensor] = {}
        shapes = dict(shapes)
        if "gate" in shapes:
            (num_gate, width), (num_up, _) = shapes.pop("gate"), shapes.pop("up")
            both = torch.empty(num_gate + num_up, width, dtype=dtype, device=device)
            self.tensors["gate_up"] = self.targets["gate_up"] = both
            self.targets |= {"gate": both[:num_gate], "up": both[num_gate:]}
        for part, shape in shapes.items():
            self.tensors[part] = self.targets[part] = torch.empty(shape, dtype=dtype, device=device)


@dataclass(frozen=True, slots=True)
class EffectiveLayer:
    """A `PoolLayer` whose rows are effective experts: the pool experts, then those with a residual.

    Attributes:
        pool: From a pool index to the parts of that expert, plain or coded; `gate_up` may stand for two of
            them where no residual is added.
        bases: Pool expert of each row; the first rows are the pool experts themselves, in their order.
        num_experts: Pool experts.
        residuals: Matrices by row; of each row behind the pool experts, while somebody may ask for it.
        dtype: That effective experts are rounded to.
        scratch: Where experts are computed that cannot be multiplied as they are; may serve many layers.
        activation: Form of the experts.
        adds_outputs: Where pool expert and residual both have a product for the rows there are, outputs are
            added instead of entries.
    """

    pool: Callable[[int], Mapping[str, Tensor | Coded]]
    bases: Sequence[int]
    num_experts: int
    residuals: Mapping[int, Mapping[str, Coded]]
    dtype: torch.dtype
    scratch: Scratch
    activation: Activation
    adds_outputs: bool = False

    def output(self, pool_index: int, hidden_TD: Tensor) -> Tensor:
        """See `PoolLayer.output`."""
        parts = self.pool(self.bases[pool_index])
        residual = self.residuals[pool_index] if pool_index >= self.num_experts else {}
        multiplied = None
        if self.adds_outputs or not residual:
            multiplied = _multiplied(parts, residual, hidden_TD)
        if multiplied is None:
            for part, matrix in parts.items():
                fill_effective(self.scratch.targets[part], matrix, residual.get(part), self.dtype)
            multiplied = self.scratch.tensors
        return ACTIVATIONS[self.activation](OneVariant(multiplied), "", hidden_TD)


def _multiplied(
    parts: Mapping[str, Tensor | Coded], residual: Mapping[str, Coded], hidden_TD: Tensor
) -> Mapping[str, Tensor | Multiplied] | None:
    """The parts with what is added to them, if all have a product that pays for so many rows."""
    chosen: dict[str, Tensor | Multiplied] = {}
    for part, matrix in parts.items():
        added = residual.get(part)
        if not isinstance(matrix, Tensor | Arranged):
            return None
        if added is None:
            chosen[part] = matrix
        elif isinstance(added, Arranged | LowRank) and not _is_in_other_dtype(matrix, hidden_TD):
            chosen[part] = Summed(matrix, added)
        else:
            return None
    fits = all(isinstance(one, Tensor) or len(hidden_TD) <= one.max_rows for one in chosen.values())
    return chosen if fits else None


def _is_in_other_dtype(matrix: Tensor | Arranged, hidden_TD: Tensor) -> bool:
    return isinstance(matrix, Tensor) and matrix.dtype != hidden_TD.dtype


@dataclass(frozen=True, slots=True)
class MappedExperts:
    """`Experts` over pools that all variants of a batch share.

    Attributes:
        layers: Pool by layer index.
        maps: Expert maps by layer index, int64 [M, E], one row per variant; entries are those of `layers`.
        owner: Row of the maps of the whole batch, or of each token, int64 [T].
    """

    layers: Mapping[int, PoolLayer]
    maps: Mapping[int, Tensor]
    owner: Tensor | int = 0

    def product(self, layer_index: int, hidden_TD: Tensor, route: Route) -> Tensor:
        """See `Experts.product`."""
        maps_ME, owner = self.maps[layer_index], self.owner
        if isinstance(owner, int):
            rows_TK = maps_ME[owner][route.slots_TK]
        else:
            rows_TK = maps_ME[owner.unsqueeze(1), route.slots_TK]
        return expert_product(hidden_TD, rows_TK, route.gates_TK, self.layers[layer_index])


def own_experts(
    parts_by_layer: Mapping[int, Mapping[str, Sequence[Tensor]]], activation: Activation
) -> MappedExperts:
    """Experts of a stand-alone checkpoint, each slot with its own.

    Args:
        parts_by_layer: Layer index to part name to one tensor per slot.
        activation: Form of the experts.
    """
    layers: dict[int, PoolLayer] = {}
    maps = {}
    for layer_index, parts in parts_by_layer.items():
        experts = [dict(zip(parts, tensors, strict=True)) for tensors in zip(*parts.values(), strict=True)]
        layers[layer_index] = PlainPoolLayer(experts, activation)
        device = next(iter(experts[0].values())).device
        maps[layer_index] = torch.arange(len(experts), device=device).unsqueeze(0)
    return MappedExperts(layers, maps)


def expert_product(hidden_TD: Tensor, rows_TK: Tensor, gates_TK: Tensor, layer: PoolLayer) -> Tensor:
    """Sum over the choices of gate times expert output, each pool expert computed once per token.

    Gates of choices that meet in one pool expert add: `(p1 + p2) * P(x)`. Outputs are summed in float32 in
    the order of pool experts, for a token alone as in a batch, and cast once.

    Args:
        hidden_TD: Normed hidden states, in the dtype of the experts.
        rows_TK: Pool expert of each choice, int64.
        gates_TK: Float32; a choice with gate zero is not computed.
        layer: The pool experts.

    Returns:
        [T, D] in the dtype of `hidden_TD`; zero for a token whose gates are all zero.
    """
    num_tokens = hidden_TD.shape[0]
    if num_tokens == 1:
        rows = rows_TK[0].tolist()
        if len(set(rows)) == len(rows):
            return _product_of_one(hidden_TD, rows, gates_TK, layer)
    num_rows = int(rows_TK.max()) + 1
    gates_PT = gates_TK.new_zeros(num_rows, num_tokens).scatter_add_(0, rows_TK.T, gates_TK.T)
    row_C, token_C = gates_PT.nonzero(as_tuple=True)
    counts = row_C.bincount(minlength=num_rows).tolist()
    gate_C1 = gates_PT[row_C, token_C].unsqueeze(1)
    output_TD = torch.zeros_like(hidden_TD, dtype=torch.float32)
    pieces = zip(torch.split(token_C, counts), torch.split(gate_C1, counts), strict=True)
    for row, (tokens, gates) in enumerate(pieces):
        if counts[row]:
            one_output = layer.output(row, hidden_TD[tokens])
            output_TD.index_add_(0, tokens, one_output * gates)
    return output_TD.to(hidden_TD.dtype)


def _product_of_one(hidden_1D: Tensor, rows: list[int], gates_1K: Tensor, layer: PoolLayer) -> Tensor:
    """The product for one token whose choices are different pool experts: sorting it only costs."""
    output_1D = torch.zeros_like(hidden_1D, dtype=torch.float32)
    gates = gates_1K[0].tolist()
    for row, choice in sorted((row, choice) for choice, row in enumerate(rows)):
        if gates[choice] != 0.0:
            output_1D += layer.output(row, hidden_1D) * gates_1K[:, choice : choice + 1]
    return output_1D.to(hidden_1D.dtype)


def expert_product_plain(hidden_TD: Tensor, rows_TK: Tensor, gates_TK: Tensor, layer: PoolLayer) -> Tensor:
    """Specification of `expert_product`: one token and one pool expert at a time."""
    output_TD = torch.zeros_like(hidden_TD, dtype=torch.float32)
    for token in range(len(hidden_TD)):
        gate_of_row: dict[int, float] = {}
        for row, gate in zip(rows_TK[token].tolist(), gates_TK[token].tolist(), strict=True):
            gate_of_row[row] = gate_of_row.get(row, 0.0) + gate
        for row, gate in sorted(gate_of_row.items()):
            if gate != 0.0:
                output_TD[token] += gate * layer.output(row, hidden_TD[token : token + 1])[0].float()
    return output_TD.to(hidden_TD.dtype)
