"""Non-expert tensors in memory: each once, moved only when it is not there."""

import shutil
import weakref

import pytest
import torch
from safetensors.torch import save_file

from moemerge.bundle.reader import open_bundle
from moemerge.checkpoint.headers import read_header
from moemerge.checkpoint.tensors import map_tensors
from moemerge.errors import DamagedBundle, DamagedInput, MoemergeError
from moemerge.models.products import can_pack
from moemerge.runner.transfer import Transfer
from moemerge.runner.weights import WeightStore
from tests.bundles import NAMES
from tests.factories import flip_byte, read_canonical, truncate

CPU = torch.device("cpu")


def store_of(bundle, dtype=torch.float32, **options):
    return WeightStore(bundle, NAMES, dtype, CPU, **options)


def load(store, variant, instead_of=()):
    transfer = store.prepare(variant, instead_of)
    swap = transfer.carry_out()
    store.finish(transfer)
    return swap


def copies(store, variant):
    return {role: tensor.clone() for role, tensor in store.weights(variant).items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[role], other[role]) for role in one)


def test_weights_are_those_of_the_source(bundle):
    store = store_of(bundle)
    for name in NAMES:
        load(store, name)
        source = read_canonical(bundle.folder.parent / name)
        expected = {role: tensor for role, tensor in source.items() if not role.startswith("experts.")}
        assert same(store.weights(name), expected)
    store.verify_integrity(NAMES)


@pytest.mark.parametrize("other", NAMES[1:])
def test_swapping_there_and_back_restores_every_byte(other, bundle):
    store = store_of(bundle)
    load(store, "plain")
    before = copies(store, "plain")
    load(store, other, instead_of=["plain"])
    store.verify_integrity([other])
    load(store, "plain", instead_of=[other])
    assert same(store.weights("plain"), before)
    store.verify_integrity(["plain"])


def test_any_order_of_swaps_ends_with_the_weights_of_a_fresh_store(bundle):
    store, last = store_of(bundle), []
    for name in ("large", "plain", "twin", "odd", "twin", "large", "plain", "odd"):
        load(store, name, instead_of=last)
        last = [name]
        fresh = store_of(bundle)
        load(fresh, name)
        assert same(store.weights(name), fresh.weights(name))
        assert store.resident_bytes == fresh.resident_bytes == store.set_bytes([name])


@pytest.mark.parametrize("is_alone", [False, True])
def test_copies_bring_every_byte_and_their_errors(is_alone, copied):
    store = store_of(copied)
    store.prepare("plain").carry_out(is_alone=is_alone)
    store.verify_integrity(["plain"])
    transfer = store.prepare("large")
    truncate(own_file(copied, "large"), -100)
    with pytest.raises(DamagedInput, match="large"):
        transfer.carry_out(is_alone=is_alone)


@pytest.mark.parametrize("is_alone", [False, True])
def test_a_tensor_of_one_number_is_copied_like_others(is_alone, tmp_path):
    save_file({"scale": torch.tensor(2.5), "row": torch.arange(3.0)}, tmp_path / "tensors.safetensors")
    places, sources = (
        read_header(tmp_path / "tensors.safetensors"),
        map_tensors(tmp_path / "tensors.safetensors"),
    )
    targets = {name: torch.zeros_like(source) for name, source in sources.items()}
    copies = tuple((places[name], sources[name], targets[name]) for name in sources)
    Transfer("plain", copies, (), 16, 0).carry_out(is_alone=is_alone)
    assert same(targets, sources)


@pytest.mark.parametrize("instead_of", [[], ["plain"]], ids=["beside", "instead"])
def test_tensors_stored_once_for_both_are_not_moved(instead_of, bundle):
    store = store_of(bundle)
    total = load(store, "plain").moved_bytes
    before = store.weights("plain")
    swap = load(store, "twin", instead_of)
    own = {role for role in before if role.endswith("router")}
    after = store.weights("twin")
    assert all(after[role] is before[role] for role in before.keys() - own)
    assert swap.moved_bytes == sum(bundle.tensors("twin")[role].nbytes for role in own)
    assert 0 < swap.moved_bytes < total
    assert swap.moved_bytes + swap.kept_bytes == total == store.stored_bytes("twin")


def test_shared_tensors_count_once_and_stay_until_the_last_one_goes(bundle):
    store = store_of(bundle)
    load(store, "plain")
    load(store, "twin")
    assert store.resident_bytes == store.set_bytes(["plain", "twin"])
    assert store.resident_bytes + store.shared_bytes == 2 * store.set_bytes(["plain"])
    store.release("plain")
    assert store.shared_bytes == 0
    store.verify_integrity(["twin"])
    store.release("twin")
    assert store.resident_bytes == 0
    store.verify_integrity([])


def test_memory_of_the_one_set_aside_serves_the_one_in_its_place(mixtral_bundle):
    store = store_of(mixtral_bundle)
    load(store, "plain")
    before = {tensor.data_ptr() for tensor in store.weights("plain").values()}
    load(store, "odd", instead_of=["plain"])
    after = {role: tensor.data_ptr() for role, tensor in store.weights("odd").items()}
    assert {role for role, place in after.items() if place not in before} == {"embedding", "head"}


def test_memory_that_the_next_one_has_no_use_for_is_given_back(mixtral_bundle):
    store = store_of(mixtral_bundle)
    load(store, "large")
    table = weakref.ref(store.weights("large")["embedding"])
    load(store, "plain", instead_of=["large"])
    assert table() is None


def test_values_are_cast_once_when_the_engine_computes_in_another_dtype(half_bundle):
    store = store_of(half_bundle)
    swap = load(store, "large")
    source = read_canonical(half_bundle.folder.parent / "large")
    for role, tensor in store.weights("large").items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, source[role].float())
    assert swap.moved_bytes == store.stored_bytes("large") == store.resident_bytes // 2
    store.verify_integrity(["large"])


@pytest.mark.skipif(not can_pack(torch.bfloat16, CPU), reason="this CPU has no packed bf16 products")
def test_packed_matrices_hold_the_same_values(half_bundle):
    plain, packed = (
        store_of(half_bundle, torch.bfloat16),
        store_of(half_bundle, torch.bfloat16, is_packed=True),
    )
    for name in ("plain", "twin"):
        assert load(plain, name).moved_bytes == load(packed, name).moved_bytes
        ours, theirs = packed.weights(name), plain.weights(name)
        assert any(tensor.layout != torch.strided for tensor in ours.values())
        for role in theirs:
            dense = ours[role] if ours[role].layout == torch.strided else ours[role].to_dense()
            assert torch.equal(dense, theirs[role])
        packed.verify_integrity(["plain", "twin"][: 1 + (name == "twin")])
    assert packed.resident_bytes == plain.resident_bytes
    packed.release("plain")
    packed.verify_integrity(["twin"])


def test_integrity_check_finds_a_changed_and_a_left_over_tensor(mixtral_bundle):
    store = store_of(mixtral_bundle)
    load(store, "plain")
    tensor = store.weights("plain")["head"]
    before = tensor[3, 4].clone()
    tensor[3, 4] += 1
    with pytest.raises(DamagedBundle, match="differs from what is in memory"):
        store.verify_integrity(["plain"])
    tensor[3, 4] = before
    store.verify_integrity(["plain"])
    with pytest.raises(DamagedBundle, match="not those of"):
        store.verify_integrity([])
    with pytest.raises(DamagedBundle, match="not those of large, plain"):
        store.verify_integrity(["plain", "large"])


@pytest.fixture
def copied(mixtral_bundle, tmp_path):
    """A bundle whose files may be damaged."""
    return open_bundle(shutil.copytree(mixtral_bundle.folder, tmp_path / "x.moe"))


def own_file(bundle, variant):
    return bundle.folder / "variants" / variant / "tensors.safetensors"


def test_integrity_check_finds_a_bundle_that_changed_underneath(copied):
    store = store_of(copied)
    load(store, "large")
    flip_byte(own_file(copied, "large"), -3)
    with pytest.raises(DamagedBundle, match="large"):
        store.verify_integrity(["large"])


@pytest.mark.parametrize("is_mapped", [False, True])
def test_a_file_that_became_shorter_is_an_error_and_not_the_end_of_the_process(is_mapped, copied):
    store = store_of(copied)
    load(store, "plain")
    transfer = store.prepare("large") if is_mapped else None
    truncate(own_file(copied, "large"), -100)
    with pytest.raises(DamagedInput, match="large"):
        (transfer or store.prepare("large")).carry_out()
    if is_mapped:
        store.release("large")
    store.verify_integrity(["plain"])
    load(store, "odd", instead_of=["plain"])
    store.verify_integrity(["odd"])


def test_a_file_that_was_deleted_stays_for_those_who_mapped_it(copied):
    store = store_of(copied)
    transfer = store.prepare("large")
    own_file(copied, "large").unlink()
    transfer.carry_out()
    store.finish(transfer)
    store.verify_integrity(["large"])


def test_what_fails_to_begin_leaves_nothing_behind(copied):
    store = store_of(copied)
    load(store, "plain")
    own_file(copied, "large").unlink()
    with pytest.raises(MoemergeError):
        store.prepare("large", instead_of=["plain"])
    assert store.resident_bytes == 0, "the one it was to replace is set aside all the same"
    store.verify_integrity([])


def test_a_variant_is_forgotten_only_when_nobody_holds_it(mixtral_bundle):
    store = store_of(mixtral_bundle)
    load(store, "plain")
    with pytest.raises(AssertionError):
        store.forget("plain")
    store = store_of(mixtral_bundle)
    load(store, "plain")
    store.release("plain")
    store.forget("plain")
    store.add("plain")
    load(store, "plain")
    store.verify_integrity(["plain"])
