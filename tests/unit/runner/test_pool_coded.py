"""Coded pool experts in memory, whole or cached, and the residuals that come and go with their variants."""

import math
import shutil
from contextlib import closing
from dataclasses import fields, is_dataclass
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch.nn import functional

from moemerge.bundle.export import effective_parts
from moemerge.bundle.reader import open_bundle
from moemerge.checkpoint.headers import StoredTensor
from moemerge.checkpoint.tensors import TensorReader
from moemerge.checkpoint.variants import open_variants
from moemerge.consolidation.pipeline import merge
from moemerge.consolidation.task import options_of
from moemerge.errors import DamagedBundle, DamagedInput, NotEnoughRoom
from moemerge.models.arranging import Form, Room, can_arrange_int4
from moemerge.models.layouts import Int4Matrix, Int8Blocks, Int8Matrix
from moemerge.models.packed import PackedMatrix
from moemerge.refs import FolderRef
from moemerge.runner import transfer as transfer_module
from moemerge.runner.cached_pool import CachedExpertPool
from moemerge.runner.engine import Engine
from moemerge.runner.memory import choose_room
from moemerge.runner.options import EngineOptions, choose_dtype
from moemerge.runner.pool import ExpertPool, load_pool, pool_bytes
from moemerge.runner.pool import residual_bytes as residual_bytes_of
from moemerge.runner.request import Request
from moemerge.runner.rows import EffectiveRows
from moemerge.runner.swapping import LoadingFailed
from moemerge.runner.weights import WeightStore
from tests.bundles import NAMES, open_engine, run, write_bundle
from tests.coded import bits, low_rank, write_coded
from tests.factories import flip_byte, truncate, write_siblings
from tests.unit.runner.test_pool import hidden

CPU = torch.device("cpu")
BF16_TOLERANCE = {"atol": 3e-2, "rtol": 3e-2}
"""Coded products do not round their entries to bf16, effective experts do; outputs are near one."""
POOL = [bits(8), None, bits(4, 32), bits(3, 16)]
RESIDUALS = [None, bits(2, 16), low_rank(2)]


@pytest.fixture(scope="module")
def coded(mixtral_bundle, tmp_path_factory):
    """Float32, codes of every kind."""
    target = tmp_path_factory.mktemp("coded") / "x.moe"
    return write_coded(mixtral_bundle, target, pool=POOL, residuals=RESIDUALS)


@pytest.fixture(scope="module")
def biased_coded(tmp_path_factory):
    """Experts with biases, float32 and bf16."""
    found = {}
    for dtype in ("F32", "BF16"):
        folder = tmp_path_factory.mktemp(f"biased{dtype}")
        exact = open_bundle(write_bundle(folder, "telechat_moe", dtype=dtype))
        found[dtype] = write_coded(exact, folder / "coded.moe", pool=POOL, residuals=RESIDUALS)
    return found


@pytest.fixture(scope="module")
def half_coded(half_bundle, tmp_path_factory):
    """The same in bf16."""
    target = tmp_path_factory.mktemp("half") / "x.moe"
    return write_coded(half_bundle, target, pool=POOL, residuals=RESIDUALS)


def pools_of(bundle, dtype=torch.float32):
    """Whole and cached, with the residuals of all variants installed."""
    store = WeightStore(bundle, NAMES, dtype, CPU)
    whole, cached = ExpertPool(bundle, dtype, CPU), cached_pool(bundle, 2, dtype)
    for name in NAMES:
        transfer = store.prepare(name)
        transfer.carry_out()
        store.finish(transfer)
        for pool in (whole, cached):
            pool.rows.install(name, store.residuals(name))
    return whole, cached


def cached_pool(bundle, places, dtype=torch.float32):
    """An arena for so many of the largest experts."""
    plain = sum(map(math.prod, bundle.manifest.parts.values())) * dtype.itemsize
    return CachedExpertPool(bundle, dtype, CPU, arena_bytes=places * plain)


def reference_output(bundle, variant, layer_index, slot, hidden_TD):
    """What the slot's exported expert computes, in float32."""
    parts = {}
    with TensorReader() as reader:
        for part, tensor in effective_parts(bundle, variant, layer_index)[slot].items():
            if isinstance(tensor, StoredTensor):
                parts[part] = reader.read(tensor).float()
            else:
                chunks = b"".join(bytes(chunk) for chunk in tensor.to_write(part, reader).chunks())
                dtype = {"F32": torch.float32, "BF16": torch.bfloat16}[tensor.dtype]
                parts[part] = torch.frombuffer(bytearray(chunks), dtype=dtype).view(tensor.pool.shape).float()
    x = hidden_TD.float()
    output = (functional.silu(x @ parts["gate"].T) * (x @ parts["up"].T)) @ parts["down"].T
    return output + parts.get("down_bias", 0.0)


@pytest.mark.parametrize("num_tokens", [1, 7])
def test_slots_compute_with_their_exported_experts(num_tokens, coded):
    x = hidden(num_tokens)
    for pool in pools_of(coded):
        for layer in coded.manifest.layers:
            for number, name in enumerate(NAMES):
                for slot, row in enumerate(pool.rows.maps(layer.index)[number]):
                    output = pool.layers[layer.index].output(row, x)
                    expected = reference_output(coded, name, layer.index, slot, x)
                    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
        pool.verify_integrity()


@pytest.mark.parametrize("num_tokens", [1, 7])
def test_biases_are_those_of_the_exported_experts(num_tokens, biased_coded):
    for bundle, dtype in zip(biased_coded.values(), (torch.float32, torch.bfloat16), strict=True):
        tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else BF16_TOLERANCE
        x = hidden(num_tokens, dtype)
        whole, cached = pools_of(bundle, dtype)
        assert whole.nbytes == pool_bytes(bundle, dtype)
        for pool in (whole, cached):
            for number, name in enumerate(NAMES):
                for slot, row in enumerate(pool.rows.maps(0)[number]):
                    output = pool.layers[0].output(row, x).float()
                    expected = reference_output(bundle, name, 0, slot, x)
                    torch.testing.assert_close(output, expected, **tolerance)
            pool.verify_integrity()


@pytest.mark.parametrize("num_tokens", [1, 64])
def test_in_bf16_they_agree_within_rounding(num_tokens, half_coded):
    x = hidden(num_tokens, torch.bfloat16)
    for pool in pools_of(half_coded, torch.bfloat16):
        for layer in half_coded.manifest.layers:
            for number, name in enumerate(NAMES):
                for slot, row in enumerate(pool.rows.maps(layer.index)[number]):
                    output = pool.layers[layer.index].output(row, x)
                    assert output.dtype == torch.bfloat16
                    expected = reference_output(half_coded, name, layer.index, slot, x)
                    torch.testing.assert_close(output.float(), expected, **BF16_TOLERANCE)


def test_codes_stay_codes(half_coded):
    pool = ExpertPool(half_coded, torch.bfloat16, CPU)
    for layer in half_coded.manifest.layers:
        for number, spec in enumerate(half_coded.layer(layer.index).codes):
            held = pool.layers[layer.index].pool(number)
            kinds = {torch.Tensor} if spec is None else {PackedMatrix, Int4Matrix}
            if spec == bits(8):
                kinds = {Int8Matrix, Int8Blocks, PackedMatrix}
            assert {type(matrix) for matrix in held.values()} <= kinds


def test_the_whole_pool_takes_the_bytes_it_says(coded, half_coded):
    for bundle, dtype in ((coded, torch.float32), (half_coded, torch.bfloat16), (half_coded, torch.float32)):
        pool = ExpertPool(bundle, dtype, CPU)
        held = sum(
            matrix.nbytes
            for layer in bundle.manifest.layers
            for number in range(layer.num_experts)
            for matrix in pool.layers[layer.index].pool(number).values()
        )
        assert pool.nbytes == pool_bytes(bundle, dtype) == held


def test_what_fits_is_held_and_what_does_not_is_fetched(coded):
    whole = pool_bytes(coded, torch.float32)
    assert isinstance(load_pool(coded, torch.float32, CPU, memory_bytes=whole), ExpertPool)
    cached = load_pool(coded, torch.float32, CPU, memory_bytes=whole - 1)
    assert isinstance(cached, CachedExpertPool)
    with pytest.raises(NotEnoughRoom, match="left for pool experts, one takes"):
        load_pool(coded, torch.float32, CPU, memory_bytes=100)


@pytest.mark.parametrize("places", [1, 2, 5])
def test_the_arena_never_holds_more_bytes_than_it_may(places, coded):
    pool = cached_pool(coded, places)
    most, count = 0, 0
    for _ in range(2):
        for layer in coded.manifest.layers:
            for number in range(layer.num_experts):
                pool.expert(layer.index, number)
                most, count = max(most, pool.nbytes), max(count, len(pool._held))
                pool.verify_integrity()
    assert most <= places * 3 * 32 * 48 * 4
    assert count > places, "coded experts take less room"


def test_integrity_check_finds_a_changed_code(half_coded):
    pool = cached_pool(half_coded, 2, torch.bfloat16)
    pool.expert(0, 0)
    pool.verify_integrity()
    next(iter(pool._held.values())).memory["down.codes"][3, 3] ^= 1
    with pytest.raises(DamagedBundle, match="pool expert 0 of layer 0: down differs"):
        pool.verify_integrity()


def test_a_pool_file_that_became_shorter_is_an_error(coded, tmp_path):
    copied = open_bundle(shutil.copytree(coded.folder, tmp_path / "x.moe"))
    pool = cached_pool(copied, 2)
    truncate(copied.folder / copied.layer(0).file, 0)
    with pytest.raises(DamagedInput, match="pool"):
        pool.expert(0, 0)


def test_rows_are_pool_experts_and_behind_them_slots_with_a_residual(coded):
    rows = EffectiveRows(coded)
    for layer in coded.manifest.layers:
        of_layer = rows.layers[layer.index]
        assert of_layer.bases[: layer.num_experts] == tuple(range(layer.num_experts))
        behind = []
        for name, entry in coded.manifest.variants.items():
            for slot, row in enumerate(of_layer.maps[name]):
                assert of_layer.bases[row] == entry.maps[layer.index][slot]
                if entry.residual(layer.index, slot) is None:
                    assert row == entry.maps[layer.index][slot]
                else:
                    behind.append(row)
        assert behind == list(range(layer.num_experts, len(of_layer.bases)))


def store_of(bundle):
    return WeightStore(bundle, NAMES, torch.float32, CPU)


def load(store, variant, instead_of=()):
    transfer = store.prepare(variant, instead_of)
    swap = transfer.carry_out()
    store.finish(transfer)
    return swap


def residual_bytes(bundle, variant):
    layers = [bundle.residuals(variant, layer.index) for layer in bundle.manifest.layers]
    return sum(m.nbytes for slots in layers for parts in slots if parts for m in parts.values())


def test_residuals_move_with_their_variant_and_are_counted(coded, mixtral_bundle):
    store, plain = store_of(coded), store_of(mixtral_bundle)
    for name in NAMES:
        extra = residual_bytes(coded, name)
        assert extra > 0
        assert store.set_bytes([name]) == plain.set_bytes([name]) + extra
        assert store.stored_bytes(name) == plain.stored_bytes(name) + extra
    load(store, "plain")
    load(plain, "plain")
    swap = load(store, "twin")
    without = load(plain, "twin")
    assert swap.moved_bytes == without.moved_bytes + residual_bytes(coded, "twin")
    assert store.resident_bytes == store.set_bytes(["plain", "twin"])
    store.verify_integrity(["plain", "twin"])
    store.release("twin")
    assert store.resident_bytes == store.set_bytes(["plain"])


def test_residuals_are_held_as_they_are_stored_whatever_order_they_came_in(half_coded):
    store, last = store_of(half_coded), []
    for name in ("plain", "large", "twin", "plain", "odd", "large"):
        load(store, name, last)
        last = [name]
        store.verify_integrity(last)
        held = store.residuals(name)
        for layer in half_coded.manifest.layers:
            for slot, parts in enumerate(half_coded.map_residuals(name, layer.index)):
                for part, matrix in (parts or {}).items():
                    ours = held[layer.index, slot][part]
                    assert type(ours) is type(matrix)
                    assert ours.nbytes == matrix.nbytes
                    assert torch.equal(ours.dense(), matrix.dense())


def test_a_changed_residual_in_memory_is_found(coded):
    store = store_of(coded)
    load(store, "plain")
    next(iter(next(iter(store.residuals("plain").values())).values())).codes[0, 0] ^= 1
    with pytest.raises(DamagedBundle, match="residuals/plain"):
        store.verify_integrity(["plain"])


def test_a_residual_file_that_changed_underneath_is_found(coded, tmp_path):
    copied = open_bundle(shutil.copytree(coded.folder, tmp_path / "x.moe"))
    store = store_of(copied)
    load(store, "odd")
    flip_byte(copied.folder / "residuals" / "odd" / "layer-00000.safetensors", -3)
    with pytest.raises(DamagedBundle, match="residuals/odd"):
        store.verify_integrity(["odd"])


def test_rows_of_a_variant_that_is_set_aside_are_gone(coded):
    rows, store = EffectiveRows(coded), store_of(coded)
    for name in ("plain", "twin"):
        load(store, name)
        rows.install(name, store.residuals(name))
    rows.uninstall("plain")
    for layer in rows.layers.values():
        own = {row for row in layer.maps["twin"] if row >= layer.num_experts}
        assert layer.residuals.keys() == own
    rows.uninstall("twin")
    assert not any(layer.residuals for layer in rows.layers.values())


@pytest.mark.parametrize("options", [{}, {"resident": "1", "min_hold_s": 0.0}, {"memory": 0.4}])
def test_an_engine_answers_the_same_whoever_is_resident_and_however_the_pool_is_held(options, coded):
    requests = [
        Request(request_id=f"{name}{n}", variant=name, prompt_ids=(5, 9 + n, 33), max_tokens=8)
        for n in range(2)
        for name in NAMES
    ]
    share = options.pop("memory", None)
    if share:
        store = WeightStore(coded, NAMES, torch.float32, CPU)
        pool = int(share * pool_bytes(coded, torch.float32))
        options = {"device_memory": store.set_bytes(NAMES) + 2**17 + pool, "cache_memory": 2**17}
    engine, usual = open_engine(coded, **options), open_engine(coded)
    ours, theirs = run(engine, *requests), run(usual, *requests)
    assert [answer.tokens for answer in ours] == [answer.tokens for answer in theirs]
    assert (engine.snapshot().expert_misses > 0) == bool(share)
    engine.verify_integrity()
    for one in (engine, usual):
        one.close()


@pytest.fixture(scope="module")
def wide_coded(tmp_path_factory):
    """Matrices large enough for the blocks of four-bit products."""
    folder = tmp_path_factory.mktemp("wide")
    _, tunes = write_siblings(folder, settings={"hidden_size": 64, "expert_size": 128})
    variants = open_variants({name: FolderRef(path) for name, path in tunes.items()})
    merge(variants, folder / "plain.moe", options_of("exact", None, within=False))
    source = open_bundle(folder / "plain.moe")
    return write_coded(source, folder / "x.moe", pool=[bits(4, 32)], residuals=[None, None, bits(2, 32)])


FOUR_BITS = Form(4, 32, (64, 64), torch.bfloat16, CPU, by_rows=False)


@pytest.mark.skipif(not can_arrange_int4(FOUR_BITS), reason="no int4 product")
@pytest.mark.parametrize("num_tokens", [1, 100])
def test_four_bits_are_arranged_where_shapes_allow_and_counted_as_such(num_tokens, wide_coded):
    bundle, store = wide_coded, WeightStore(wide_coded, ["code"], torch.bfloat16, CPU)
    load(store, "code")
    pool = ExpertPool(bundle, torch.bfloat16, CPU)
    pool.rows.install("code", store.residuals("code"))
    held = [m for layer in pool.layers.values() for n in range(5) for m in layer.pool(n).values()]
    assert {type(matrix) for matrix in held} == {Int4Matrix, PackedMatrix}, "as some are to be added to"
    assert sum(matrix.nbytes for matrix in held) == pool.nbytes
    x = torch.randn(num_tokens, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    for layer in bundle.manifest.layers:
        for slot, row in enumerate(pool.rows.maps(layer.index)[0]):
            expected = reference_output(bundle, "code", layer.index, slot, x)
            output = pool.layers[layer.index].output(row, x).float()
            torch.testing.assert_close(output, expected, **BF16_TOLERANCE)


@pytest.fixture(scope="module")
def all_coded(tmp_path_factory):
    """Pool experts and residuals of every code, large enough for products of four bits."""
    folder = tmp_path_factory.mktemp("every")
    _, tunes = write_siblings(folder, settings={"hidden_size": 64, "expert_size": 128})
    variants = open_variants({name: FolderRef(path) for name, path in tunes.items()})
    merge(variants, folder / "plain.moe", options_of("exact", None, within=False))
    pool = [bits(3, 32), bits(4, 64), bits(5, 64), bits(6, 32), bits(8), None]
    residuals = [bits(1, 32), bits(2, 64), None, bits(3, 32), bits(4, 64), low_rank(2), bits(8), bits(5, 32)]
    source = open_bundle(folder / "plain.moe")
    return write_coded(source, folder / "x.moe", pool=pool, residuals=residuals)


@pytest.mark.parametrize("num_tokens", [1, 20, 100])
def test_outputs_are_added_where_there_is_room_and_are_those_of_the_exported_experts(num_tokens, all_coded):
    bundle, names = all_coded, list(all_coded.manifest.variants)
    store = WeightStore(bundle, names, torch.bfloat16, CPU, room=Room.FOUR_BITS)
    pool = ExpertPool(bundle, torch.bfloat16, CPU, room=Room.FOUR_BITS)
    held = [m for layer in pool.layers.values() for n in range(5) for m in layer.pool(n).values()]
    assert sum(matrix.nbytes for matrix in held) == pool.nbytes
    for name in names:
        load(store, name)
        pool.rows.install(name, store.residuals(name))
    x = torch.randn(num_tokens, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    unpacked = 0
    for layer in bundle.manifest.layers:
        for number, name in enumerate(names):
            for slot, row in enumerate(pool.rows.maps(layer.index)[number]):
                expected = reference_output(bundle, name, layer.index, slot, x)
                for target in pool._scratch.targets.values():
                    target.fill_(math.nan)
                output = pool.layers[layer.index].output(row, x).float()
                torch.testing.assert_close(output, expected, **BF16_TOLERANCE)
                unpacked += not pool._scratch.targets["down"].isnan().all()
    if can_arrange_int4(FOUR_BITS):
        assert (unpacked > 0) == (num_tokens == 100)
    store.verify_integrity(names)


def test_arranged_residuals_come_and_go_with_their_variant(all_coded):
    names = list(all_coded.manifest.variants)
    store = WeightStore(all_coded, names, torch.bfloat16, CPU, room=Room.FOUR_BITS)
    plain = WeightStore(all_coded, names, torch.bfloat16, CPU)
    for one in (store, plain):
        load(one, names[0])
    stored = residual_bytes(all_coded, names[0])
    residuals = store.residuals(names[0])
    taken = sum(matrix.nbytes for parts in residuals.values() for matrix in parts.values())
    assert store.resident_bytes - taken == plain.resident_bytes - stored
    mapped = [(t.data_ptr(), t.data_ptr() + t.nbytes) for f in store._mapped.values() for t in f.values()]
    for parts in residuals.values():
        for matrix in parts.values():
            for tensor in tensors_of(matrix):
                assert not any(begin <= tensor.data_ptr() < end for begin, end in mapped), "files may change"
    store.verify_integrity([names[0]])
    load(store, names[1], [names[0]])
    store.verify_integrity([names[1]])
    load(store, names[0], [names[1]])
    store.verify_integrity([names[0]])
    assert residual_bytes_of(all_coded, names, torch.bfloat16, CPU, Room.FOUR_BITS) == sum(
        matrix.nbytes
        for name in names
        for parts in fresh(all_coded, name).values()
        for matrix in parts.values()
    )


def tensors_of(matrix):
    """All tensors of a coded matrix."""
    values = [getattr(matrix, field.name) for field in fields(matrix)]
    return [
        tensor
        for value in values
        for tensor in (
            [value] if isinstance(value, torch.Tensor) else tensors_of(value) if is_dataclass(value) else []
        )
    ]


def test_a_residual_file_that_became_shorter_is_an_error_and_nothing_is_held(all_coded, tmp_path):
    copied = open_bundle(shutil.copytree(all_coded.folder, tmp_path / "x.moe"))
    names = list(copied.manifest.variants)
    store = WeightStore(copied, names, torch.bfloat16, CPU, room=Room.FOUR_BITS)
    transfer = store.prepare(names[0])
    file = next(
        p.path
        for parts in copied.residuals(names[0], 0)
        if parts
        for m in parts.values()
        for p in m.places.values()
    )
    truncate(file, -100)
    with pytest.raises(DamagedInput, match=file.name):
        transfer.carry_out()
    store.release(names[0])
    assert store.resident_bytes == 0


def test_variants_leave_and_come_back_with_the_same_answers(all_coded):
    names = list(all_coded.manifest.variants)
    requests = [
        Request(
            request_id=f"{name}{n}", variant=name, prompt_ids=(5 + n, 9, 11), max_tokens=6, ignore_stop=True
        )
        for n in range(3)
        for name in names
    ]
    with closing(Engine(all_coded, EngineOptions(dtype="bfloat16"))) as engine:
        before = answers_of(engine, requests)
        engine.remove_variant(names[0])
        assert answers_of(engine, [r for r in requests if r.variant != names[0]]).items() <= before.items()
        engine.add_variant(names[0])
        assert answers_of(engine, requests) == before
        engine.verify_integrity()


def answers_of(engine, requests):
    found = {request.request_id: () for request in requests}
    for output in engine.run(requests):
        assert output.error is None
        found[output.request_id] += tuple(output.token_ids)
    return found


def test_what_cannot_be_arranged_is_told_and_can_be_loaded_later(all_coded, monkeypatch):
    names = list(all_coded.manifest.variants)
    with closing(Engine(all_coded, EngineOptions(dtype="bfloat16", variants=tuple(names[:2])))) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(transfer_module, "arrange", fail)
            with pytest.raises(LoadingFailed, match="no memory"):
                engine.ensure_resident(names[0])
        engine.ensure_resident(names[0])
        engine.verify_integrity()


def fail(*args, **options):
    raise RuntimeError("no memory")


def fresh(bundle, name):
    store = WeightStore(bundle, [name], torch.bfloat16, CPU, room=Room.FOUR_BITS)
    load(store, name)
    return store.residuals(name)


@pytest.mark.parametrize(
    ("options", "room"),
    [
        ({}, Room.FOUR_BITS),
        ({"resident": "1"}, Room.SOME),
        ({"device_memory": 2**30}, Room.SOME),
        ({"memory_share": 1e-9}, Room.SOME),
        ({"pack": False}, Room.FOUR_BITS),
        ({"dtype": "float32"}, Room.SOME),
    ],
)
def test_room_is_there_when_everything_stays_and_no_limit_is_set(options, room, all_coded):
    if not can_arrange_int4(FOUR_BITS):
        pytest.skip("no int4 product")
    asked = EngineOptions(**{"dtype": "bfloat16", **options})
    dtype = choose_dtype(all_coded, asked.dtype, CPU)
    assert choose_room(asked, all_coded, list(all_coded.manifest.variants), dtype, CPU) == room


def test_there_is_no_room_when_little_memory_is_free(all_coded, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    names, asked = list(all_coded.manifest.variants), EngineOptions(dtype="bfloat16")
    assert choose_room(asked, all_coded, names, torch.bfloat16, CPU) == Room.SOME
