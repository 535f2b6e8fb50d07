"""How an engine divides device memory, and that it keeps to it."""

import pytest
import torch

from moemerge.errors import NotEnoughRoom
from moemerge.runner.options import parse_resident
from moemerge.runner.pool import pool_bytes
from moemerge.runner.weights import WeightStore
from tests.bundles import NAMES, open_engine

CPU = torch.device("cpu")
BLOCK_BYTES = 2 * 2 * 16 * 2 * 8 * 4
"""Keys and values, layers, tokens, key/value heads, head width, bytes of a float32."""


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"cache_memory": 2**60}, "the key/value cache is to take .* more memory than is free"),
        ({"cache_memory": 1}, "the key/value cache has 1 B, one block of 16 tokens takes"),
        ({"device_memory": 1}, "does not hold the resident variants .* and the key/value cache"),
        ({"device_memory": 120_000, "cache_memory": 16384}, "left for pool experts, one takes"),
    ],
)
def test_memory_that_does_not_hold_it_is_refused(options, complaint, mixtral_bundle):
    residents = WeightStore(mixtral_bundle, NAMES, torch.float32, CPU).set_bytes(NAMES)
    if options.get("device_memory", 0) > 1:
        options = {**options, "device_memory": residents + options["cache_memory"] + 100}
    with pytest.raises(NotEnoughRoom, match=complaint):
        open_engine(mixtral_bundle, **options)


@pytest.mark.parametrize("resident", ["1", "2", "all", "60kB"])
@pytest.mark.parametrize("experts", [1, 5, 1000])
def test_device_memory_is_kept_whatever_it_is_divided_into(resident, experts, mixtral_bundle):
    expert_bytes = pool_bytes(mixtral_bundle, torch.float32) // 32
    store = WeightStore(mixtral_bundle, NAMES, torch.float32, CPU)
    limit = parse_resident(resident)
    memory = limit.most_bytes(NAMES, store) + 2**16 + experts * expert_bytes
    engine = open_engine(
        mixtral_bundle, resident=resident, device_memory=memory, cache_memory=2**16, min_hold_s=0.0
    )
    for name in NAMES:
        list(engine.generate(name, [5, 6, 7], max_tokens=5))
        state = engine.snapshot()
        cache_bytes = state.blocks_total * BLOCK_BYTES
        assert cache_bytes <= 2**16
        assert state.pool_bytes + state.resident_bytes + cache_bytes <= memory
        assert state.resident_bytes <= limit.most_bytes(NAMES, store)
    assert (state.expert_misses == 0) == (experts == 1000)
    engine.verify_integrity()
    engine.close()


def test_the_cache_holds_all_sequences_in_full_length_unless_memory_is_short(mixtral_bundle):
    engine = open_engine(mixtral_bundle, max_batch=3)
    assert engine.snapshot().blocks_total == 3 * 128 // 16
    engine.close()
    short = open_engine(mixtral_bundle, max_batch=3, cache_memory=10_000)
    assert short.snapshot().blocks_total == 10_000 // BLOCK_BYTES
    assert short.limits_of("plain").context_tokens == 2 * 16, "no longer than the cache"
    short.close()


def test_residents_are_counted_or_weighed(mixtral_bundle):
    store = WeightStore(mixtral_bundle, NAMES, torch.float32, CPU)
    plain, both = store.set_bytes(["plain"]), store.set_bytes(["plain", "twin"])
    assert plain < both < 2 * plain, "they share tensors"
    for text, fits in (("all", True), ("2", True), ("1", False), (f"{both}B", True), (f"{both - 1}B", False)):
        assert parse_resident(text).fits(["plain", "twin"], store) == fits
    assert parse_resident("1").most_bytes(NAMES, store) == store.set_bytes(["large"])
    assert parse_resident("4").most_bytes(NAMES, store) == store.set_bytes(NAMES)
    assert parse_resident("50kB").most_bytes(NAMES, store) == 50_000
