"""Keys and values in blocks against those of `GrowingCache`, its specification.

Shapes: G 2 key/value heads, h 3.
"""

import random
import sys

import psutil
import pytest
import torch

from moemerge.models.batch import Span
from moemerge.models.cache import GrowingCache
from moemerge.models.geometry import CacheGeometry
from moemerge.models.groups import Group
from moemerge.runner.blocks import BlockPool, BlockTable, Owner
from moemerge.runner.cache import BlockCache, BlockKeys

CPU = torch.device("cpu")
OWNER = Owner("bundle", "variant", 0)


def group_of(sequences, num_keys):
    """A group as attention plans it, as far as caches look at it."""
    return Group(slice(0, len(sequences)), tuple(sequences), 1, num_keys)


def round_up(number, multiple):
    return -(-number // multiple) * multiple


class Both:
    """The cache and its specification, told the same."""

    def __init__(self, block_tokens=4, num_blocks=40, num_layers=2, seed=0):
        geometry = CacheGeometry(num_layers, 2, 3, block_tokens)
        self.cache = BlockCache(geometry, num_blocks, torch.float32, CPU)
        self.blocks = BlockPool(num_blocks, block_tokens)
        self.plain = GrowingCache()
        self.tables: dict[int, BlockTable] = {}
        self.lengths: dict[int, int] = {}
        self.random = torch.Generator().manual_seed(seed)

    def write(self, new: dict[int, int]):
        """So many new tokens for each of these sequences, in one pass; both views of it."""
        spans, start = [], 0
        for name, count in new.items():
            self.tables.setdefault(name, BlockTable(OWNER))
            spans.append(Span(start, count, self.lengths.setdefault(name, 0)))
            self.lengths[name] += count
            self.blocks.grow(self.tables[name], self.lengths[name])
            start += count
        ours = BlockKeys(
            self.cache, [self.tables[n] for n in new], [s.past for s in spans], [s.length for s in spans]
        )
        theirs = self.plain.of(spans, list(new))
        for layer in range(len(self.cache.keys)):
            keys, values = torch.randn(2, start, 2, 3, generator=self.random)
            ours.write(layer, keys, values)
            theirs.write(layer, keys, values)
        return ours, theirs

    def drop(self, name: int):
        self.blocks.release(self.tables.pop(name))
        del self.lengths[name]

    def check(self, names: list[int], ours, theirs, sequences):
        """The same keys and values for some sequences of the pass; finite ones behind their ends."""
        lengths = [self.lengths[names[number]] for number in sequences]
        num_keys = round_up(max(lengths), ours.granularity)
        for layer in range(len(self.cache.keys)):
            found = ours.read(layer, group_of(sequences, num_keys))
            expected = theirs.read(layer, group_of(sequences, num_keys))
            for mine, plain in zip(found, expected, strict=True):
                assert mine.shape == plain.shape == (len(sequences), 2, num_keys, 3)
                assert mine.isfinite().all()
                for row, length in enumerate(lengths):
                    assert torch.equal(mine[row, :, :length], plain[row, :, :length])


@pytest.mark.parametrize("block_tokens", [1, 3, 16])
def test_random_passes_over_growing_and_ending_sequences(block_tokens):
    both, draw = Both(block_tokens, num_blocks=400 // block_tokens), random.Random(block_tokens)
    for _ in range(60):
        names = draw.sample(range(8), draw.randint(1, 4))
        new = {name: draw.choice([1, 1, 2, 7]) for name in names}
        ours, theirs = both.write(new)
        both.check(names, ours, theirs, list(range(len(names))))
        both.check(names, ours, theirs, [draw.randrange(len(names))])
        both.blocks.verify_integrity(list(both.tables.values()))
        for name in [name for name, length in both.lengths.items() if length > 25]:
            both.drop(name)


def test_blocks_in_a_row_are_read_where_they_are():
    both = Both()
    ours, theirs = both.write({0: 9, 1: 2})
    both.check([0, 1], ours, theirs, [0])
    assert ours.read(1, group_of([0], 12))[0].untyped_storage().data_ptr() == both.cache.keys.data_ptr()
    ours, theirs = both.write({0: 5})  # beyond the other's block
    both.check([0], ours, theirs, [0])
    assert ours.read(1, group_of([0], 16))[0].untyped_storage().data_ptr() != both.cache.keys.data_ptr()


def test_what_an_ended_sequence_left_is_never_read_as_not_a_number():
    """A weight of zero times NaN would be NaN."""
    both = Both(num_blocks=3)
    both.write({0: 12})
    both.cache.keys.fill_(torch.nan)
    both.cache.values.fill_(torch.inf)
    both.drop(0)
    both.plain.stored.clear()
    ours, theirs = both.write({1: 5, 2: 1})
    both.check([1, 2], ours, theirs, [0, 1])


def test_a_cross_cache_is_written_once_and_read_by_later_passes():
    both = Both()
    both.write({0: 6, 1: 3})
    later = BlockKeys(both.cache, [both.tables[0], both.tables[1]], [6, 3], [0, 0])
    plain = both.plain.of([Span(0, 0, 6), Span(0, 0, 3)])
    both.check([0, 1], later, plain, [0, 1])


def test_a_block_takes_the_bytes_it_says():
    geometry = CacheGeometry(num_layers=3, num_kv_heads=2, head_size=8, block_tokens=16)
    for dtype in (torch.float32, torch.bfloat16):
        cache = BlockCache(geometry, 5, dtype, CPU)
        assert cache.nbytes == 5 * geometry.block_bytes(dtype)


@pytest.mark.skipif(sys.platform != "linux", reason="others may count reserved pages")
def test_blocks_take_memory_when_they_are_first_written():
    geometry = CacheGeometry(num_layers=8, num_kv_heads=2, head_size=64, block_tokens=64)
    before = psutil.Process().memory_info().rss
    cache = BlockCache(geometry, 2000, torch.float32, CPU)
    assert psutil.Process().memory_info().rss - before < cache.nbytes / 10
