"""One bundle, one active variant: swapping moves what differs and nothing else."""

import pytest
import torch

from moemerge.bundle.reader import open_bundle
from moemerge.checkpoint.variants import open_variants
from moemerge.consolidation.pipeline import merge
from moemerge.consolidation.recipe import options_of
from moemerge.errors import DamagedBundle, InvalidRecipe, NotFound
from moemerge.refs import FolderRef
from moemerge.runner.engine import Engine
from moemerge.runner.sampling import Sampling
from tests.factories import flip_byte, read_canonical, write_checkpoint

NAMES = ("small", "middle", "large", "twin")
VOCABULARIES = {"small": 64, "middle": 66, "large": 96, "twin": 64}


def only_routers(name: str) -> bool:
    return name.startswith("experts.") or name.endswith("router")


@pytest.fixture(scope="module", params=["mixtral", "switch_transformers"])
def folder(request, tmp_path_factory):
    """Variants with vocabularies of three lengths; `twin` differs from `small` in experts and routers."""
    folder = tmp_path_factory.mktemp("engine")
    write_checkpoint(folder / "base", request.param)
    for seed, name in enumerate(NAMES[:3], start=1):
        write_checkpoint(folder / name, base=folder / "base", noise=0.2, seed=seed, vocab=VOCABULARIES[name])
    write_checkpoint(folder / "twin", base=folder / "small", noise=0.2, seed=9, only=only_routers)
    variants = open_variants({name: FolderRef(folder / name) for name in NAMES})
    merge(variants, folder / "x.moe", options_of("2x", None, within=False))
    return folder


@pytest.fixture(params=["auto", "float32"])
def engine(folder, request):
    return Engine(open_bundle(folder / "x.moe"), dtype=request.param)


def held(engine):
    """A copy of every non-expert tensor in memory."""
    return {role: tensor.clone() for role, tensor in engine._weights.items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[role], other[role]) for role in one)


def answer(engine, prompt=(5, 6, 7), **options):
    options = {"max_tokens": 6, "sampling": Sampling(), **options}
    return list(engine.generate(list(prompt), **options))


@pytest.mark.parametrize("other", NAMES[1:])
def test_swapping_there_and_back_restores_every_byte(other, engine):
    engine.switch("small")
    weights, tokens = held(engine), answer(engine)
    engine.switch(other)
    assert not same(held(engine), weights)
    engine.verify_integrity()
    engine.switch("small")
    assert same(held(engine), weights)
    assert answer(engine) == tokens
    engine.verify_integrity()


def test_any_order_of_swaps_ends_with_the_weights_of_a_fresh_engine(folder):
    engine = Engine(open_bundle(folder / "x.moe"))
    for name in ("large", "small", "twin", "middle", "twin", "large", "small", "middle"):
        engine.switch(name)
        fresh = Engine(open_bundle(folder / "x.moe"))
        fresh.switch(name)
        assert same(held(engine), held(fresh))
        assert answer(engine) == answer(fresh)


def test_weights_are_those_of_the_source(folder):
    engine = Engine(open_bundle(folder / "x.moe"))
    for name in NAMES:
        engine.switch(name)
        source = read_canonical(folder / name)
        assert same(held(engine), {r: t for r, t in source.items() if not r.startswith("experts.")})


def test_swap_to_active_variant_moves_nothing(engine):
    first = engine.switch("small")
    assert (first.kept_bytes, first.variant) == (0, "small")
    again = engine.switch("small")
    assert (again.moved_bytes, again.kept_bytes) == (0, first.moved_bytes)


def test_tensors_stored_once_for_both_are_not_moved(engine):
    total = engine.switch("small").moved_bytes
    before = dict(engine._weights)
    swap = engine.switch("twin")
    shared = {role for role in before if not role.endswith("router")}
    assert all(engine._weights[role] is before[role] for role in shared)
    tensors = engine.bundle.tensors("twin")
    assert swap.moved_bytes == sum(tensors[role].nbytes for role in tensors.keys() - shared)
    assert 0 < swap.moved_bytes < total
    assert swap.moved_bytes + swap.kept_bytes == total


def test_moved_bytes_are_those_of_the_tensors_that_differ(engine):
    engine.switch("small")
    for name in ("large", "middle", "small"):
        swap = engine.switch(name)
        assert swap.moved_bytes + swap.kept_bytes == sum(
            t.nbytes for t in engine.bundle.tensors(name).values()
        )


def test_vocabulary_follows_the_variant(engine):
    for name in NAMES:
        engine.switch(name)
        size = VOCABULARIES[name]
        assert engine.model.config.vocab_size == size
        answer(engine, [size - 1])
        with pytest.raises(InvalidRecipe, match=f"outside 0 to {size - 1}"):
            answer(engine, [size])


def test_integrity_check_finds_a_changed_and_a_left_over_tensor(engine):
    engine.verify_integrity()  # nothing is active yet
    engine.switch("small")
    engine.verify_integrity()
    tensor = next(iter(engine._weights.values()))
    before = tensor.view(-1)[3].clone()
    tensor.view(-1)[3] += 1
    with pytest.raises(DamagedBundle, match="differs from the bundle"):
        engine.verify_integrity()
    tensor.view(-1)[3] = before
    engine.verify_integrity()
    engine._weights["ghost"] = tensor
    with pytest.raises(DamagedBundle, match="left"):
        engine.verify_integrity()


def test_integrity_check_finds_a_bundle_that_changed_underneath(folder, tmp_path):
    import shutil

    copy = shutil.copytree(folder / "x.moe", tmp_path / "x.moe")
    engine = Engine(open_bundle(copy))
    engine.switch("large")
    flip_byte(copy / "variants" / "large" / "tensors.safetensors", -3)
    with pytest.raises(DamagedBundle, match="large"):
        engine.verify_integrity()


def test_failed_swap_leaves_no_variant_active_and_the_next_one_repairs_it(folder, tmp_path, monkeypatch):
    engine = Engine(open_bundle(folder / "x.moe"))
    engine.switch("small")
    tokens = answer(engine)
    monkeypatch.setattr("moemerge.runner.engine.TensorReader.read", fail_after(3))
    with pytest.raises(OSError, match="gone"):
        engine.switch("large")
    monkeypatch.undo()
    assert engine.active is None
    with pytest.raises(InvalidRecipe, match="no variant is active"):
        answer(engine)
    engine.switch("small")
    engine.verify_integrity()
    assert answer(engine) == tokens


def fail_after(count):
    from moemerge.checkpoint.tensors import TensorReader

    read, calls = TensorReader.read, iter(range(count))

    def failing(self, tensor):
        if next(calls, None) is None:
            raise OSError("the disk is gone")
        return read(self, tensor)

    return failing


def test_unknown_variant_is_refused_and_the_active_one_stays(engine):
    engine.switch("small")
    tokens = answer(engine)
    with pytest.raises(NotFound, match="small, middle, large, twin"):
        engine.switch("huge")
    assert engine.active == "small"
    assert answer(engine) == tokens


def test_stop_id_ends_the_answer_and_is_not_given(engine):
    engine.switch("small")
    tokens = answer(engine, max_tokens=20)
    stop = tokens[4]
    assert answer(engine, max_tokens=20, stop_ids=frozenset({stop})) == tokens[: tokens.index(stop)]
    assert answer(engine, stop_ids=frozenset({tokens[0]})) == []


def test_no_more_tokens_than_asked_for_and_no_step_for_nothing(engine, monkeypatch):
    engine.switch("small")
    steps = []
    model = engine.model
    name = "forward" if hasattr(model, "forward") else "decode"
    step = getattr(type(model), name)
    monkeypatch.setattr(type(model), name, lambda *a, **k: steps.append(1) or step(*a, **k))
    assert len(answer(engine, max_tokens=1)) == 1
    assert len(steps) == 1
    assert len(answer(engine, max_tokens=5)) == 5
    assert len(steps) == 6


def test_answers_end_where_the_context_ends(folder):
    engine = Engine(open_bundle(folder / "x.moe"))
    engine.switch("small")
    if engine.bundle.manifest.family != "mixtral":  # relative positions have no end
        assert len(answer(engine, [5] * 150, max_tokens=30)) == 30
        return
    assert len(answer(engine, [5] * 120, max_tokens=100)) == 8
    assert len(answer(engine, [5] * 127, max_tokens=100)) == 1
    with pytest.raises(InvalidRecipe, match="128 tokens, the context is 128"):
        answer(engine, [5] * 128)


@pytest.mark.parametrize("prompt", [[], [-1], [3, 10**9]])
def test_prompt_that_cannot_be_is_refused(prompt, engine):
    engine.switch("small")
    with pytest.raises(InvalidRecipe, match="the prompt"):
        answer(engine, prompt)


def test_answer_does_not_continue_with_the_weights_of_another_variant(engine):
    engine.switch("small")
    tokens = engine.generate([5, 6], max_tokens=5, sampling=Sampling())
    next(tokens)
    engine.switch("twin")
    with pytest.raises(RuntimeError, match="exchanged"):
        next(tokens)


def test_sampled_answers_repeat_with_their_seed(engine):
    engine.switch("small")
    one, again, other = (
        answer(engine, max_tokens=12, sampling=Sampling(temperature=1.5, seed=seed)) for seed in (1, 1, 2)
    )
    assert one == again != other


def test_two_engines_do_not_disturb_each_other(folder):
    one, other = (Engine(open_bundle(folder / "x.moe")) for _ in range(2))
    one.switch("small")
    tokens = answer(one)
    other.switch("large")
    answer(other)
    assert answer(one) == tokens
    one.verify_integrity()
    other.verify_integrity()


@pytest.mark.parametrize(
    "options", [{"dtype": "int4"}, {"device": "toaster"}, {"device": "meta"}, {"device": ""}]
)
def test_unknown_dtype_and_device_are_refused(options, folder):
    (name,) = options
    with pytest.raises(InvalidRecipe, match=name):
        Engine(open_bundle(folder / "x.moe"), **options)
