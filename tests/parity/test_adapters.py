"""Base and adapter are what peft merges them to, in every form that peft writes."""

import pytest
import torch
from safetensors.torch import load_file

from moemerge.checkpoint.tensors import TensorReader
from moemerge.checkpoint.variants import open_variants
from moemerge.refs import AdaptedRef, FolderRef
from tests.adapters import merge_with_peft, train_adapter, write_adapter
from tests.factories import edit_json, read_canonical, write_checkpoint

ATTENTION = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
STACKED = {
    "target_modules": ["q_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
}
MIXTRAL = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 8},
        "alpha_pattern": {"v_proj": 3, r".*\.1\.self_attn\.q_proj": 5},
    },
    "rslora and patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "dora of an embedding": {"use_dora": True, "target_modules": ["embed_tokens", "lm_head"]},
    "replaced": {"modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    "stacked": STACKED,
    "one of two stacked": {"target_parameters": ["mlp.experts.down_proj"]},
    "separate, as peft converts it": {"target_modules": ["w1", "w2", "w3", "gate"]},
}
SWITCH = {
    "attention": {"target_modules": ["q", "v"]},
    "experts": {"target_modules": ["wi", "wo"], "use_rslora": True},
    "router and embedding": {"target_modules": ["classifier", "shared"]},
    "replaced": {"target_modules": ["k"], "modules_to_save": ["classifier", "layer_norm"]},
}
OTHERS = {
    "one expert per layer": ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    "stacked, with norms of heads": ("qwen3_moe", STACKED),
    "separate, with a shared expert": (
        "qwen2_moe",
        {"target_modules": ["shared_expert.gate_proj", "experts.gate_proj", "experts.up_proj"]},
    ),
    "stacked under another name": ("granitemoe", {**STACKED, "target_modules": ["o_proj"]}),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("mixtral") / "base", dtype="F32")


@pytest.fixture(scope="module")
def switch(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("switch") / "base", "switch_transformers", dtype="F32")


@pytest.mark.parametrize("form", MIXTRAL)
def test_mixtral(form, mixtral, tmp_path):
    adapter = train_adapter(mixtral, tmp_path / "adapter", **{**ATTENTION, **MIXTRAL[form]})
    assert_merged_alike(mixtral, adapter, tmp_path / "merged")


@pytest.mark.parametrize("form", SWITCH)
def test_switch(form, switch, tmp_path):
    adapter = train_adapter(switch, tmp_path / "adapter", r=4, lora_alpha=6, **SWITCH[form])
    assert_merged_alike(switch, adapter, tmp_path / "merged")


@pytest.mark.parametrize("form", OTHERS)
def test_other_families(form, tmp_path):
    family, config = OTHERS[form]
    base = write_checkpoint(tmp_path / "base", family, dtype="F32")
    adapter = train_adapter(base, tmp_path / "adapter", **{**ATTENTION, **config})
    assert_merged_alike(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize("layout", ["per_expert", "stacked"])
@pytest.mark.parametrize("form", ["per_expert", "stacked"])
def test_form_of_the_adapter_need_not_be_that_of_the_base(layout, form, tmp_path):
    base = write_checkpoint(tmp_path / "base", dtype="F32", layout=layout)
    adapter = tmp_path / "adapter"
    if form == "stacked":
        train_adapter(base, adapter, **{**ATTENTION, **STACKED})
    else:
        write_adapter(adapter, separate_factors(), target_modules=["w1", "w2", "w3", "gate"])
    assert_merged_alike(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize("config", [{"modules_to_save": ["lm_head", "embed_tokens"]},
                                    {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}])  # fmt: skip
def test_larger_vocabulary(config, mixtral, tmp_path):
    adapter = train_adapter(mixtral, tmp_path / "adapter", vocab=72, **{**ATTENTION, **config})
    assert_merged_alike(mixtral, adapter, tmp_path / "merged", vocab=72)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_rounded_once_to_the_stored_dtype(dtype, tmp_path):
    """peft rounds the product as well, so that both may differ by a step of the dtype."""
    base = write_checkpoint(tmp_path / "base", dtype=dtype)
    adapter = train_adapter(base, tmp_path / "adapter", **{**ATTENTION, **STACKED})
    expected = read_canonical(merge_with_peft(base, adapter, tmp_path / "merged"))
    wide = write_checkpoint(tmp_path / "wide", base=base, dtype="F32")
    exact = apply(wide, adapter)
    step = torch.finfo(expected["embedding"].dtype).eps
    for name, tensor in apply(base, adapter).items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, exact[name].to(tensor.dtype)), name
        torch.testing.assert_close(tensor.float(), expected[name].float(), rtol=2 * step, atol=4 * step)


def test_orientation_of_earlier_peft(mixtral, tmp_path):
    """Before 0.19.1 the third dimension of stacked experts was the output; the delta is the same."""
    now = train_adapter(mixtral, tmp_path / "now", **{**ATTENTION, **STACKED, "target_modules": None})
    tensors = load_file(now / "adapter_model.safetensors")
    swapped = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    for name in [n for n in swapped if ".experts." in n and "lora_A" in n]:
        a, b = swapped[name], swapped[name.replace("lora_A", "lora_B")]
        experts, rank = 4, a.shape[0] // 4
        # A' holds what B held, expert by expert, and B' what A held, with the experts fastest.
        swapped[name] = b.view(-1, rank, experts).permute(2, 1, 0).reshape(experts * rank, -1)
        swapped[name.replace("lora_A", "lora_B")] = a.view(experts, rank, -1).permute(2, 1, 0).flatten(1)
    before = write_adapter(tmp_path / "before", swapped, lora_alpha=16, peft_version="0.18.1")
    expected = apply(mixtral, now)
    for name, tensor in apply(mixtral, before).items():
        torch.testing.assert_close(tensor, expected[name], msg=name)


def test_version_decides_where_experts_are_square(tmp_path):
    """With D = 2 F both orientations of gate and up have one shape."""
    base = write_checkpoint(tmp_path / "base", dtype="F32", settings={"expert_size": 16})
    adapter = train_adapter(base, tmp_path / "adapter", **{**ATTENTION, **STACKED})
    assert_merged_alike(base, adapter, tmp_path / "merged")
    now = apply(base, adapter)
    edit_json(adapter / "adapter_config.json", peft_version="0.19.0")
    assert not torch.equal(apply(base, adapter)["experts.0.0.gate"], now["experts.0.0.gate"])
    assert torch.equal(apply(base, adapter)["experts.0.0.down"], now["experts.0.0.down"])


def separate_factors():
    """Factors of every expert and router, named as models of transformers 4 have them."""
    shapes = {"w1": (48, 32), "w2": (32, 48), "w3": (48, 32)}
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for layer in range(2):
        place = f"model.layers.{layer}.block_sparse_moe"
        modules = {f"{place}.experts.{e}.{name}": shape for e in range(4) for name, shape in shapes.items()}
        for module, (rows, columns) in {**modules, f"{place}.gate": (4, 32)}.items():
            factors[f"{module}.lora_A.weight"] = torch.randn(4, columns, generator=generator) / 8
            factors[f"{module}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) / 8
    return factors


def apply(base, adapter):
    """Every tensor of base and adapter by canonical name."""
    adapted = open_variants({"a": AdaptedRef(FolderRef(base), FolderRef(adapter))}).first
    with TensorReader() as reader:
        return {name: reader.read(tensor) for name, tensor in adapted.by_name().items()}


def assert_merged_alike(base, adapter, folder, *, vocab=None):
    expected = read_canonical(merge_with_peft(base, adapter, folder, vocab=vocab))
    original, found = read_canonical(base), apply(base, adapter)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6, msg=name)
    changed = {name for name in original if not torch.equal(expected[name], original[name])}
    assert changed
    assert changed == {name for name in original if not torch.equal(found[name], original[name])}
