"""Pool experts in memory: all, packed or not, or as many as fit; what they compute is the same."""

import shutil

import pytest
import torch
from torch.nn import functional

from moemerge.bundle.reader import open_bundle
from moemerge.errors import DamagedBundle, DamagedInput, NotEnoughRoom
from moemerge.models.products import can_pack
from moemerge.runner.cached_pool import CachedExpertPool
from moemerge.runner.pool import ExpertPool, load_pool, pool_bytes
from tests.factories import flip_byte, truncate

CPU = torch.device("cpu")
BF16_TOLERANCE = {"atol": 2e-2, "rtol": 2e-2}
"""Two products in bf16 that round in another order; outputs are near one."""


def expert_bytes(bundle, dtype=torch.float32):
    return pool_bytes(bundle, dtype) // sum(layer.num_experts for layer in bundle.manifest.layers)


def cached_pool(bundle, places, dtype=torch.float32):
    return CachedExpertPool(bundle, dtype, CPU, arena_bytes=places * expert_bytes(bundle, dtype))


def hidden(num_tokens, dtype=torch.float32):
    return torch.randn(num_tokens, 32, generator=torch.Generator().manual_seed(num_tokens)).to(dtype)


def every_expert(bundle):
    return [(layer.index, number) for layer in bundle.manifest.layers for number in range(layer.num_experts)]


def reference_output(bundle, layer_index, number, hidden_TD):
    parts = {part: tensor.float() for part, tensor in bundle.map_pool(layer_index)[number].items()}
    x = hidden_TD.float()
    if "wi" in parts:
        return functional.relu(x @ parts["wi"].T) @ parts["wo"].T
    return (functional.silu(x @ parts["gate"].T) * (x @ parts["up"].T)) @ parts["down"].T


@pytest.mark.parametrize("num_tokens", [1, 7])
def test_outputs_are_those_of_the_stored_experts(num_tokens, bundle):
    pools = [ExpertPool(bundle, torch.float32, CPU), cached_pool(bundle, 2)]
    x = hidden(num_tokens)
    for layer_index, number in every_expert(bundle):
        expected = reference_output(bundle, layer_index, number, x)
        for pool in pools:
            torch.testing.assert_close(
                pool.layers[layer_index].output(number, x), expected, atol=1e-5, rtol=1e-5
            )
        one, other = (pool.layers[layer_index].output(number, x) for pool in pools)
        assert torch.equal(one, other), "cached or not, the same product"


@pytest.mark.parametrize("num_tokens", [1, 16])
def test_bf16_outputs_agree_however_the_experts_are_held(num_tokens, half_bundle):
    x = hidden(num_tokens, torch.bfloat16)
    packed, plain, cached = (
        ExpertPool(half_bundle, torch.bfloat16, CPU),
        ExpertPool(half_bundle, torch.bfloat16, CPU, is_packed=False),
        cached_pool(half_bundle, 2, torch.bfloat16),
    )
    assert packed.is_packed == can_pack(torch.bfloat16, CPU)
    assert not plain.is_packed
    for layer_index, number in every_expert(half_bundle):
        expected = reference_output(half_bundle, layer_index, number, x)
        for pool in (packed, plain, cached):
            output = pool.layers[layer_index].output(number, x)
            assert output.dtype == torch.bfloat16
            torch.testing.assert_close(output.float(), expected, **BF16_TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_pool_takes_the_bytes_it_says(dtype, half_bundle):
    pool = ExpertPool(half_bundle, dtype, CPU)
    values = sum(
        tensor.numel() for i, _ in {(i, 0) for i, _ in every_expert(half_bundle)}
        for parts in half_bundle.map_pool(i) for tensor in parts.values()
    )  # fmt: skip
    assert pool.nbytes == pool_bytes(half_bundle, dtype) == values * dtype.itemsize


def ask(pool, *numbers):
    """Hits and misses of asking for experts; 12 is expert 2 of layer 1."""
    before = pool.hits, pool.misses
    for number in numbers:
        pool.layers[number // 10].output(number % 10, hidden(1))
    return pool.hits - before[0], pool.misses - before[1]


def test_the_least_recently_used_expert_of_a_layer_makes_room(mixtral_bundle):
    pool = cached_pool(mixtral_bundle, 4)  # two for each of two layers
    assert ask(pool, 0, 1, 10, 11) == (0, 4)
    assert ask(pool, 10, 11, 1, 0) == (4, 0)
    assert ask(pool, 2) == (0, 1)  # takes the place of 1
    assert ask(pool, 0, 2, 10, 11) == (4, 0)
    assert ask(pool, 1) == (0, 1)  # takes the place of 0
    assert ask(pool, 1, 2) == (2, 0)
    assert ask(pool, 0) == (0, 1)
    pool.verify_integrity()


def test_a_layer_lends_what_it_has_no_use_for(mixtral_bundle):
    pool = cached_pool(mixtral_bundle, 4)
    assert ask(pool, 0, 1, 2, 3) == (0, 4)
    assert ask(pool, 3, 2, 1, 0) == (4, 0)
    assert ask(pool, 10, 11) == (0, 2)  # its own share, of those that were used longest ago
    assert ask(pool, 0, 1, 10, 11) == (4, 0)
    assert ask(pool, 2) == (0, 1)  # takes the place of its own layer's 0
    assert ask(pool, 1, 2, 10, 11) == (4, 0)


def test_layers_in_a_circle_find_their_experts_in_an_arena_smaller_than_the_pool(mixtral_bundle):
    """The order of decoding: every layer once, then from the first again; some experts more often."""
    numbers, shares = every_expert(mixtral_bundle), []
    width = mixtral_bundle.manifest.layers[0].num_experts
    generator = torch.Generator().manual_seed(0)
    wanted = (torch.rand(400, generator=generator) ** 2 * width).long().tolist()
    for places in (len(numbers) // 2, len(numbers) * 3 // 4):
        pool = cached_pool(mixtral_bundle, places)
        for number in wanted:
            for layer in mixtral_bundle.manifest.layers:
                pool.expert(layer.index, number)
        pool.verify_integrity()
        shares.append(pool.hits / (pool.hits + pool.misses))
    assert shares[0] > 0.5, "half of the experts are there, and the more popular half more often"
    assert shares[1] > shares[0]


def test_the_same_expert_of_every_layer_in_a_circle_is_found_every_time(mixtral_bundle):
    layers = [layer.index for layer in mixtral_bundle.manifest.layers]
    pool = cached_pool(mixtral_bundle, len(layers))
    for _ in range(10):
        for index in layers:
            pool.expert(index, 3)
    assert (pool.hits, pool.misses) == (9 * len(layers), len(layers))


def test_the_arena_never_holds_more_than_it_may(mixtral_bundle):
    for places in (1, 2, 5):
        pool = cached_pool(mixtral_bundle, places)
        assert pool.num_places == places
        for layer_index, number in every_expert(mixtral_bundle) * 2:
            pool.layers[layer_index].output(number, hidden(2))
            assert pool.nbytes <= places * expert_bytes(mixtral_bundle)
        assert pool.nbytes == places * expert_bytes(mixtral_bundle)
        assert pool.hits + pool.misses == 2 * len(every_expert(mixtral_bundle))


def test_what_fits_is_held_and_what_does_not_is_fetched(mixtral_bundle):
    whole = pool_bytes(mixtral_bundle, torch.float32)

    def load(memory_bytes):
        return load_pool(mixtral_bundle, torch.float32, CPU, memory_bytes=memory_bytes)

    assert isinstance(load(None), ExpertPool)
    assert isinstance(load(whole), ExpertPool)
    assert isinstance(load(whole - 1), CachedExpertPool)
    assert load(whole - 1).num_places == len(every_expert(mixtral_bundle)) - 1
    with pytest.raises(NotEnoughRoom, match="left for pool experts, one takes"):
        load(expert_bytes(mixtral_bundle) - 1)


def test_integrity_check_finds_a_changed_expert(mixtral_bundle):
    pool = cached_pool(mixtral_bundle, 2)
    pool.layers[0].output(1, hidden(1))
    pool.verify_integrity()
    next(iter(pool._held.values())).memory["up"][3, 3] += 1
    with pytest.raises(DamagedBundle, match="pool expert 1 of layer 0: up differs"):
        pool.verify_integrity()


@pytest.fixture
def copied(mixtral_bundle, tmp_path):
    """A bundle whose files may be damaged."""
    return open_bundle(shutil.copytree(mixtral_bundle.folder, tmp_path / "x.moe"))


def test_integrity_check_finds_a_bundle_that_changed_underneath(copied):
    pool = cached_pool(copied, 2)
    file = copied.manifest.layers[-1].file
    last = copied.manifest.layers[-1].num_experts - 1
    pool.layers[copied.manifest.layers[-1].index].output(last, hidden(1))
    flip_byte(copied.folder / file, -3)
    with pytest.raises(DamagedBundle, match=f"pool expert {last}"):
        pool.verify_integrity()


def test_a_pool_file_that_became_shorter_is_an_error_and_not_the_end_of_the_process(copied):
    whole, cached = ExpertPool(copied, torch.float32, CPU), cached_pool(copied, 2)
    cached.layers[0].output(0, hidden(1))
    expected = whole.layers[0].output(0, hidden(1))
    for layer in copied.manifest.layers:
        truncate(copied.folder / layer.file, 0)
    with pytest.raises(DamagedInput, match="pool"):
        cached.layers[1].output(1, hidden(1))
    assert torch.equal(cached.layers[0].output(0, hidden(1)), expected)
    assert torch.equal(whole.layers[0].output(0, hidden(1)), expected)


def test_loading_tells_every_byte_of_the_pool(bundle):
    told = []

    class Told:
        def start(self, title, total_bytes):
            told.append(total_bytes)

        def advance(self, num_bytes):
            told.append(num_bytes)

    ExpertPool(bundle, torch.float32, CPU, progress=Told())
    files = {bundle.folder / layer.file for layer in bundle.manifest.layers}
    assert told[0] == sum(told[1:]) == sum(path.stat().st_size for path in files)
