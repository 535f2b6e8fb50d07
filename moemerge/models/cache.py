"""Keys and values kept between passes, the obvious way: one tensor per layer and sequence.

Every write concatenates, so this is for tests and for single models; it is the specification of caches
that do better. Knows nothing of models, variants and memory limits.

Shapes: T new tokens, B sequences of a group, G key/value heads, S keys, h head width.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moemerge.models.batch import Span
from moemerge.models.groups import Group

KeysAndValues = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class GrowingCache:
    """Keys and values of any number of sequences; `of` makes them the `KeyValues` of a batch."""

    stored: dict[tuple[Hashable, int], KeysAndValues] = field(default_factory=dict)

    def of(self, spans: Sequence[Span], sequences: Sequence[Hashable] | None = None) -> "GrowingKeys":
        """For a batch with these spans, each of the sequence so named; by default their numbers."""
        return GrowingKeys(self.stored, spans, range(len(spans)) if sequences is None else sequences)


@dataclass(frozen=True, slots=True)
class GrowingKeys:
    """`KeyValues` of a batch; see `GrowingCache.of`."""

    stored: dict[tuple[Hashable, int], KeysAndValues]
    spans: Sequence[Span]
    sequences: Sequence[Hashable]
    granularity: int = 1

    def write(self, layer_index: int, key_TGh: Tensor, value_TGh: Tensor) -> None:
        """See `KeyValues.write`."""
        for span, sequence in zip(self.spans, self.sequences, strict=True):
            tokens = slice(span.start, span.start + span.length)
            new = key_TGh[tokens], value_TGh[tokens]
            if span.past:
                keys, values = self.stored[sequence, layer_index]
                assert len(keys) >= span.past, "a span continues behind what its sequence has"
                new = torch.cat((keys[: span.past], new[0])), torch.cat((values[: span.past], new[1]))
            self.stored[sequence, layer_index] = new

    def read(self, layer_index: int, group: Group) -> KeysAndValues:
        """See `KeyValues.read`."""
        stored = [self.stored[self.sequences[number], layer_index] for number in group.sequences]
        keys, values = zip(*stored, strict=True)
        return _pad(keys, group.num_keys), _pad(values, group.num_keys)


def _pad(tensors: Sequence[Tensor], num_keys: int) -> Tensor:
    """Tensors [S_b, G, h] as one, [B, G, S, h], zero behind the end of each."""
    padded = tensors[0].new_zeros(len(tensors), num_keys, *tensors[0].shape[1:])
    for row, tensor in zip(padded, tensors, strict=True):
        row[: len(tensor)] = tensor
    return padded.transpose(1, 2)
