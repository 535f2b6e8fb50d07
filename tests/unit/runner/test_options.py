"""What an engine may be told, and how it divides memory."""

import pytest
import torch

from moemerge.bundle.reader import open_bundle
from moemerge.errors import InvalidRecipe, NotEnoughRoom, NotFound
from moemerge.runner.options import EngineOptions, choose_dtype, parse_resident
from moemerge.runner.pool import pool_bytes
from moemerge.runner.scheduler import Policy
from moemerge.runner.weights import WeightStore
from tests.bundles import NAMES, open_engine, write_bundle

CPU = torch.device("cpu")
BLOCK_BYTES = 2 * 2 * 16 * 2 * 8 * 4
"""Keys and values, layers, tokens, key/value heads, head width, bytes of a float32."""


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"block_tokens": 0}, "block tokens is 0, expected at least 1"),
        ({"device_memory": 0}, "device memory is 0 bytes"),
        ({"cache_memory": -5}, "cache memory is -5 bytes"),
        ({"policy": "lifo"}, "policy 'lifo' is unknown; there are mixed, grouped, fcfs"),
        ({"max_batch": 0}, "max batch is 0, expected at least 1"),
        ({"max_wait_s": -1.0}, "max wait is -1.0 seconds"),
        ({"max_wait_s": float("nan")}, "max wait is nan"),
        ({"quantum_s": float("inf")}, "quantum is inf"),
        ({"shares": {"plain": 0.0}}, "share of plain is 0.0"),
        ({"shares": {"plain": float("nan")}}, "share of plain is nan"),
        ({"patience_s": -0.1}, "patience_s is -0.1"),
        ({"min_hold_s": float("nan")}, "min_hold_s is nan"),
        ({"drain_s": -1.0}, "drain_s is -1.0"),
    ],
)
def test_a_value_that_cannot_be_is_refused_when_options_are_made(options, complaint):
    with pytest.raises(InvalidRecipe, match=complaint):
        EngineOptions(**options)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"dtype": "int4"}, "dtype 'int4' is unknown; there are auto, float32"),
        ({"device": "toaster"}, "device 'toaster' is unknown; there are cpu and cuda"),
        ({"device": "meta"}, "device 'meta'"),
        ({"device": ""}, "device ''"),
        ({"device": "cuda:77"}, "device 'cuda:77': there are"),
        ({"resident": "0"}, "resident is 0, expected at least 1"),
        ({"resident": "-1"}, "resident is '-1', expected all, a number of variants, or a size"),
        ({"resident": "many"}, "resident is 'many'"),
        ({"resident": "10B"}, "resident is 10B, which leaves no room for variant plain"),
        ({"resident": "1", "pinned": ("large",)}, "no room for variant plain beside large, pinned"),
        (
            {"resident": "2", "pinned": ("large", "odd")},
            "no room for variant plain beside large, odd, pinned",
        ),
    ],
)
def test_what_does_not_go_with_the_bundle_or_the_machine_is_refused(options, complaint, mixtral_bundle):
    with pytest.raises(InvalidRecipe, match=complaint):
        open_engine(mixtral_bundle, **options)


@pytest.mark.parametrize("option", ["variants", "pinned", "shares"])
def test_variants_that_the_bundle_has_not_are_not_found(option, mixtral_bundle):
    value = {"huge": 2.0} if option == "shares" else ("huge",)
    with pytest.raises(NotFound, match="no variant 'huge'; it holds plain, large"):
        open_engine(mixtral_bundle, **{option: value})


@pytest.mark.parametrize("resident", ["all", "2", "1MiB"])
def test_only_variants_that_are_served_can_be_pinned(resident, mixtral_bundle):
    with pytest.raises(NotFound, match="no variant 'odd' is served; there are plain, large"):
        open_engine(mixtral_bundle, variants=("plain", "large"), pinned=("odd",), resident=resident)


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


def test_policies_have_a_patience_of_their_own_that_may_be_replaced():
    fcfs, mixed = EngineOptions(policy="fcfs"), EngineOptions(policy="mixed")
    assert fcfs.chosen_policy() is Policy.FCFS
    assert fcfs.patience().patience_s == 0
    assert fcfs.patience().drain_s == float("inf"), "in order of arrival nobody is interrupted"
    assert 0 < mixed.patience().patience_s < mixed.patience().drain_s < float("inf")
    assert EngineOptions(policy="fcfs", drain_s=2.0).patience().drain_s == 2.0


@pytest.mark.parametrize(
    ("stored", "chosen"),
    [
        ("BF16", torch.bfloat16),
        ("F32", torch.float32),
        ("F16", torch.float32),  # slow and narrow on a CPU
        ("F64", torch.float32),
    ],
)
def test_computes_as_stored_where_that_is_sensible(stored, chosen, tmp_path):
    bundle = open_bundle(write_bundle(tmp_path, dtype=stored))
    assert choose_dtype(bundle, "auto", CPU) == chosen
    assert choose_dtype(bundle, "float16", CPU) == torch.float16
