"""Keys and values of all running sequences, in blocks.

One tensor for keys and one for values serve all layers and variants; a sequence's blocks are scattered
over them as its `BlockTable` says. Knows nothing of requests and models.

Shapes: L layers, N blocks, P tokens per block, G key/value heads, h head width; B sequences, S keys.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moemerge.models import Group
from moemerge.models.geometry import CacheGeometry
from moemerge.runner.blocks import BlockTable


class BlockCache:
    """The memory of the key/value cache."""

    def __init__(
        self, geometry: CacheGeometry, num_blocks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        tokens = geometry.block_tokens
        shape = (geometry.num_layers, num_blocks, tokens, geometry.num_kv_heads)
        # A block is cleared before its first token is written: on a CPU pages are only taken by then.
        self.keys = torch.empty((*shape, geometry.head_size), dtype=dtype, device=device)
        self.values = torch.empty((*shape, geometry.value_size), dtype=dtype, device=device)
        self.block_tokens = tokens

    def clear(self, blocks: list[int]) -> None:
        """Forget what blocks held: hidden values still meet a weight of zero, and zero times NaN is NaN."""
        if blocks:
            chosen = torch.tensor(blocks, device=self.keys.device)
            self.keys.index_fill_(1, chosen, 0)
            self.values.index_fill_(1, chosen, 0)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes


class BlockKeys:
    """`KeyValues` of one forward pass: where the new tokens go and what each sequence has."""

    def __init__(
        self, cache: BlockCache, tables: Sequence[BlockTable], starts: Sequence[int], lengths: Sequence[int]
    ) -> None:
        self.granularity = cache.block_tokens
        self._cache = cache
        self._tables = tables
        device = cache.keys.device
        cache.clear(
            [
                table.blocks[token // cache.block_tokens]
                for table, start, length in zip(tables, starts, lengths, strict=True)
                for token in range(start, start + length)
                if token % cache.block_tokens == 0
            ]
        )
        places = [
            table.blocks[token // cache.block_tokens] * cache.block_tokens + token % cache.block_tokens
            for table, start, length in zip(tables, starts, lengths, strict=True)
            for token in range(start, start + length)
        ]
        self._places_T = torch.tensor(places, device=device)
        self._group_blocks: dict[tuple[int, ...], Tensor | slice] = {}

    def write(self, layer_index: int, key_TGh: Tensor, value_TGh: Tensor) -> None:
        """Store the keys and values of the batch's new tokens."""
        self._cache.keys[layer_index].flatten(0, 1).index_copy_(0, self._places_T, key_TGh)
        self._cache.values[layer_index].flatten(0, 1).index_copy_(0, self._places_T, value_TGh)

    def read(self, layer_index: int, group: Group) -> tuple[Tensor, Tensor]:
        """Keys and values [B, G, S, h] of the group's sequences, in whole blocks."""
        blocks = self._blocks_of(group)
        return (
            self._gather(self._cache.keys[layer_index], blocks, len(group.sequences)),
            self._gather(self._cache.values[layer_index], blocks, len(group.sequences)),
        )

    def _gather(self, stored_NPGh: Tensor, blocks: Tensor | slice, num_sequences: int) -> Tensor:
        chosen = stored_NPGh[blocks] if isinstance(blocks, slice) else stored_NPGh.index_select(0, blocks)
        return chosen.view(num_sequences, -1, *chosen.shape[2:]).transpose(1, 2)

    def _blocks_of(self, group: Group) -> Tensor | slice:
        """Blocks that lie in a row, as those of a sequence that runs alone do, are read where they are."""
        known = self._group_blocks.get(group.sequences)
        if known is None:
            count = group.num_keys // self.granularity
            # Behind a sequence's blocks stands its last one again, which the mask hides; never another's,
            # whose numbers need not be finite.
            tables = [self._tables[number].blocks for number in group.sequences]
            numbers = [block for blocks in tables for block in (blocks + blocks[-1:] * count)[:count]]
            if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
                known = slice(numbers[0], numbers[0] + len(numbers))
            else:
                known = torch.tensor(numbers, device=self._cache.keys.device)
            self._group_blocks[group.sequences] = known
        return known
