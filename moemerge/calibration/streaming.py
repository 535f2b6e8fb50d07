"""A model whose weights are read from its files whenever a pass asks for them, and not kept.

A pass asks for every tensor once, layer by layer, so memory holds one matrix or expert at a time. On the
way the experts' tokens are counted. Knows nothing of texts and of where statistics go.

Shapes: T tokens, D model width, K slots per token, C tokens routed to a slot.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from moemerge.calibration.statistics import LayerStatistics
from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.headers import StoredTensor
from moemerge.checkpoint.tensors import TensorReader
from moemerge.errors import DamagedInput
from moemerge.models import (
    Activation,
    Batch,
    EncoderDecoder,
    Group,
    GrowingCache,
    PlainPoolLayer,
    Route,
    Weights,
    multiply,
)
from moemerge.models.cache import GrowingKeys
from moemerge.models.norm import rms_norm
from moemerge.models.weights import Apply

EXPERT_ROWS = 2048
"""Tokens that go through an expert at once: more take memory and no less time."""

KeepLayer = Callable[[int, LayerStatistics], None]
"""Told a layer index, through all stacks, and what was counted there."""


class Source(Protocol):
    """Where a variant's tensors come from, its own or what stands for them."""

    @property
    def checkpoint(self) -> Checkpoint:
        """Whose geometry and roles these are."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states and matrices while computing."""
        ...

    def stored(self, role: str) -> Tensor:
        """A non-expert tensor in its stored dtype."""
        ...

    def expert(self, layer_index: int, slot: int) -> dict[str, Tensor]:
        """An expert's parts by name, in the dtype of the computation."""
        ...

    def done(self, tensors: Mapping[str, StoredTensor]) -> None:
        """Told when the work with these tensors of the checkpoint is done."""
        ...


class CheckpointSource:
    """`Source` of a checkpoint's own tensors.

    Args:
        checkpoint: Local.
        reader: Holds its files open.
        dtype: Of hidden states and matrices while computing.
        advance: Told of the bytes whose work is done.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        reader: TensorReader,
        dtype: torch.dtype = torch.float32,
        advance: Callable[[int], None] = lambda num_bytes: None,
    ) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.advance = advance
        self._reader = reader

    def stored(self, role: str) -> Tensor:
        """See `Source.stored`."""
        return self._reader.read(self.checkpoint.tensors[role])

    def expert(self, layer_index: int, slot: int) -> dict[str, Tensor]:
        """See `Source.expert`."""
        parts = self.checkpoint.experts[layer_index, slot]
        return {part: self._reader.read(tensor).to(self.dtype) for part, tensor in parts.items()}

    def done(self, tensors: Mapping[str, StoredTensor]) -> None:
        """See `Source.done`."""
        self.advance(sum(tensor.nbytes for tensor in tensors.values()))


class StreamedWeights:
    """`Weights` of a batch of one variant, read when they are asked for."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __contains__(self, role: str) -> bool:
        return role in self._source.checkpoint.tensors

    def linear(self, role: str, hidden_TD: Tensor) -> Tensor:
        """See `Weights.linear`."""
        product = multiply(hidden_TD, self._source.stored(role))
        self._done(role)
        return product

    def add(self, role: str, hidden_TD: Tensor) -> Tensor:
        """See `Weights.add`."""
        self._done(role)
        return hidden_TD + self._source.stored(role).to(hidden_TD.dtype)

    def norm(self, role: str, hidden_TD: Tensor, eps: float) -> Tensor:
        """See `Weights.norm`."""
        self._done(role)
        return rms_norm(hidden_TD, self._source.stored(role).to(hidden_TD.dtype), eps)

    def layer_norm(self, role: str, hidden_TD: Tensor, eps: float) -> Tensor:
        """See `Weights.layer_norm`."""
        standard_TD = functional.layer_norm(hidden_TD, hidden_TD.shape[-1:], eps=eps)
        scaled_TD = self.apply(role, standard_TD, torch.mul)
        return self.add(f"{role}.bias", scaled_TD) if f"{role}.bias" in self else scaled_TD

    def apply(self, role: str, tokens: Tensor, function: Apply) -> Tensor:
        """See `Weights.apply`."""
        self._done(role)
        return function(tokens, self._source.stored(role).to(tokens.dtype))

    def embed(self, role: str, ids: Tensor) -> Tensor:
        """See `Weights.embed`."""
        self._done(role)
        return functional.embedding(ids, self._source.stored(role)).to(self._source.dtype)

    def _done(self, role: str) -> None:
        self._source.done({role: self._source.checkpoint.tensors[role]})


class StreamedExperts:
    """`Experts` of a batch of one variant: every slot is read once a pass, computed on its tokens, counted.

    Args:
        source: Where experts come from.
        activation: Their form.
        keys: By stack, a random key for every token of the batch; see `SlotStatistics.keys_S`.
        reservoir: Tokens to keep a sample of, per slot.
        keep: Takes a layer's statistics; None when nothing is to be counted.
    """

    def __init__(
        self,
        source: Source,
        activation: Activation,
        keys: Mapping[str, Tensor],
        reservoir: int,
        keep: KeepLayer | None,
    ) -> None:
        self._source = source
        self._activation = activation
        self._keys = {
            layer.index: keys[layer.stack]
            for layer in source.checkpoint.routed_layers
            if keep is not None and layer.stack in keys
        }
        self._reservoir = reservoir
        self._keep = keep

    def product(self, layer_index: int, hidden_TD: Tensor, route: Route) -> Tensor:
        """See `Experts.product`.

        Raises:
            DamagedInput: The layer's output is not finite.
        """
        num_slots = self._source.checkpoint.num_experts
        width = hidden_TD.shape[1] if self._keep else 0
        counted = LayerStatistics.empty(num_slots, width, self._reservoir)
        output_TD = torch.zeros_like(hidden_TD, dtype=torch.float32)
        for slot in range(num_slots):
            chosen_TK = (route.slots_TK == slot) & (route.gates_TK != 0)
            token_C, choice_C = chosen_TK.nonzero(as_tuple=True)
            if len(token_C):
                expert = PlainPoolLayer([self._source.expert(layer_index, slot)], self._activation)
                gates_C = route.gates_TK[token_C, choice_C]
                pieces = torch.split(token_C, EXPERT_ROWS), torch.split(gates_C, EXPERT_ROWS)
                for tokens, gates in zip(*pieces, strict=True):
                    inputs = hidden_TD[tokens]
                    outputs = expert.output(0, inputs).float()
                    output_TD.index_add_(0, tokens, outputs * gates.unsqueeze(1))
                    if self._keep is not None:
                        keys = self._keys[layer_index][tokens]
                        counted.slots[slot].add_tokens(inputs, gates, keys, outputs)
            self._source.done(self._source.checkpoint.experts[layer_index, slot])
        counted.num_tokens = len(hidden_TD)
        # Summed by numpy, in the same order with any number of threads.
        counted.output_square_sum = float(output_TD.norm(dim=1).double().square().numpy().sum())
        self._require_finite(layer_index, counted.output_square_sum)
        if self._keep is not None:
            self._keep(layer_index, counted)
        return output_TD.to(hidden_TD.dtype)

    def _require_finite(self, layer_index: int, energy: float) -> None:
        if energy < float("inf"):
            return
        raise DamagedInput(
            f"{self._source.checkpoint.label}: the experts of layer {layer_index} give NaN or infinity; "
            f"a tensor up to there is damaged"
        )


class StreamedCross:
    """`KeyValues` of the encoder's output for cross-attention, made when a decoder layer asks for its own."""

    granularity = 1

    def __init__(self, model: EncoderDecoder, encoded_TD: Tensor, batch: Batch, weights: Weights) -> None:
        self._model = model
        self._encoded_TD = encoded_TD
        self._batch = batch
        self._weights = weights
        self._layer: int | None = None
        self._keys: GrowingKeys | None = None

    def write(self, layer_index: int, key_TGh: Tensor, value_TGh: Tensor) -> None:
        """Never asked for: cross-attention only reads."""
        raise AssertionError("cross-attention writes nothing")

    def read(self, layer_index: int, group: Group) -> tuple[Tensor, Tensor]:
        """See `KeyValues.read`."""
        if self._keys is None or layer_index != self._layer:
            self._keys = GrowingCache().of(self._batch.spans)
            made = self._model.cross_keys_and_values(layer_index, self._encoded_TD, self._weights)
            self._keys.write(layer_index, *made)
            self._layer = layer_index
        return self._keys.read(layer_index, group)
