"""What is refused about an adapter, each with where, what and what to do; and what becomes of its files."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file

from moemerge.checkpoint.conversions import default_cache
from moemerge.checkpoint.expert_layout import ExpertTensor
from moemerge.checkpoint.modules import outputs_of_parts
from moemerge.checkpoint.repository import LocalFolder
from moemerge.checkpoint.tensors import TensorReader
from moemerge.checkpoint.variants import open_variants
from moemerge.errors import DamagedInput, IncompatibleInputs, MoemergeError, NotEnoughRoom
from moemerge.refs import AdaptedRef, FolderRef
from tests.adapters import write_adapter
from tests.factories import edit_header, edit_json, read_canonical, write_checkpoint, write_json

QUERY = "model.layers.0.self_attn.q_proj"
EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture
def base(tmp_path):
    return write_checkpoint(tmp_path / "base")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "moemerge" / "adapters"


def factors(module=QUERY, rows=32, columns=32, rank=4):
    return {
        f"{module}.lora_A.weight": torch.full((rank, columns), 0.5),
        f"{module}.lora_B.weight": torch.full((rows, rank), 0.25),
    }


def adapted(base, adapter, **options):
    return open_variants({"a": AdaptedRef(FolderRef(base), FolderRef(adapter))}, **options)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "IA3"}, "adapter_config.json: peft_type is 'IA3', expected 'LORA'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"bias": "all"}, "bias is 'all'; trained biases of the base are not applied"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is [[0, 2]]"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices is [3]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'; this way to begin changes the base"),
        ({"use_of_tomorrow": 1}, "use_of_tomorrow is 1; what it changes is not known here"),
        ({"r": 0}, "r is 0: input should be greater than or equal to 1"),
        ({"r": "many"}, "r is 'many'"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"rank_pattern": {"(": 4}}, "a key of rank_pattern or alpha_pattern is no pattern"),
        ({"alpha_pattern": {"(?i)q": 4}}, "a key of rank_pattern or alpha_pattern is no pattern"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj is 0"),
        ({"r": 8}, "1 tensor of another rank than r and rank_pattern"),
        ({"rank_pattern": {"q_proj": 2}}, f"{QUERY}.lora_A.weight [4, 32], configured 2"),
        ({"use_dora": True}, f"{QUERY} has no lora_magnitude_vector"),
    ],
)
def test_configurations(base, tmp_path, config, words):
    adapter = write_adapter(tmp_path / "adapter", factors(), **config)
    if config.get("lora_alpha"):
        path = adapter / "adapter_config.json"
        path.write_text(path.read_text().replace("Infinity", "1e999"))
    with pytest.raises(MoemergeError) as error:
        adapted(base, adapter)
    assert words in str(error.value)
    assert error.value.exit_code in (4, 8)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "no tensors: nothing would change"),
        (factors("model.layers.7.self_attn.q_proj"), "layers.7.self_attn.q_proj.lora_A.weight"),
        (factors("model.layers.0.self_attn.q_prj"), "nearest known: model.layers.0.self_attn.q_proj"),
        ({f"{QUERY}.lora_C.weight": torch.ones(4, 4)}, "1 tensor without a module"),
        ({f"{QUERY}.bias": torch.ones(32)}, "1 tensor without a module"),
        (factors(rows=64), f"{QUERY}.lora_B.weight [64, 4], expected [32, 4]"),
        (factors(columns=64), f"{QUERY}.lora_A.weight [4, 64], expected [4, 32]"),
        (factors("model.norm"), "model.norm is no matrix but [32]"),
        ({f"{QUERY}.lora_A.weight": torch.ones(4, 32)}, "1 module without some tensors"),
        ({**factors(), f"{QUERY}.lora_magnitude_vector": torch.ones(32)}, "has a lora_magnitude_vector"),
        ({"lm_head.weight": torch.ones(72, 32)}, "embedding has 64, head has 72"),
        ({"lm_head.weight": torch.ones(64, 16)}, "lm_head.weight [64, 16], expected [64, 32]"),
        ({"model.norm.weight": torch.ones(16)}, "model.norm.weight [16], expected [32]"),
        (factors(EXPERTS, rows=40, columns=40, rank=16), "[96, 32] for model.layers.0.mlp.experts.gate_up"),
        (
            factors(EXPERTS, rows=96, columns=32, rank=12),
            "lora_A.weight [12, 32], configured 4 for 4 experts",
        ),
        (
            {**factors(EXPERTS, 96, 32, 16), **factors(f"{EXPERTS}.base_layer", 96, 32, 16)},
            "8 modules that tensors of two names change: model.layers.0.mlp.experts.gate_up_proj",
        ),
        (
            {**factors("model.layers.0.mlp.gate", 4), **factors("model.layers.0.block_sparse_moe.gate", 4)},
            "1 module that tensors of two names change",
        ),
    ],
)
def test_tensors(base, tmp_path, tensors, words):
    adapter = write_adapter(tmp_path / "adapter", tensors)
    with pytest.raises(IncompatibleInputs) as error:
        adapted(base, adapter)
    assert words in str(error.value)
    assert str(adapter) in str(error.value)


def test_stacked_experts_of_unknown_orientation(tmp_path):
    base = write_checkpoint(tmp_path / "base", settings={"expert_size": 32})
    adapter = write_adapter(tmp_path / "adapter", factors(EXPERTS, 32, 32, 16))
    with pytest.raises(IncompatibleInputs, match=r"down_proj or model\.\S+down_proj transposed"):
        adapted(base, adapter)
    edit_json(adapter / "adapter_config.json", peft_version="0.19.1")
    assert adapted(base, adapter).first.is_local


def test_head_that_is_tied(tmp_path):
    base = write_checkpoint(tmp_path / "base", tied=True)
    adapter = write_adapter(tmp_path / "adapter", {"lm_head.weight": torch.ones(64, 32)})
    with pytest.raises(IncompatibleInputs, match="tied to another"):
        adapted(base, adapter)
    adapter = write_adapter(tmp_path / "other", {"model.embed_tokens.weight": torch.ones(64, 32)})
    assert "the head is tied" in str(adapted(base, adapter).findings[0])


def test_everything_wrong_is_told_at_once(base, tmp_path):
    tensors = {**factors(rows=64), **factors("model.nowhere"), "lm_head.weight": torch.ones(72, 32)}
    with pytest.raises(IncompatibleInputs) as error:
        adapted(base, write_adapter(tmp_path / "adapter", tensors))
    codes = {finding.code for finding in error.value.findings}
    assert codes == {"ADAPTER_KEYS", "ADAPTER_SHAPE", "ADAPTER_VOCABULARY"}


def test_values_too_large_for_the_dtype(tmp_path, cache):
    base = write_checkpoint(tmp_path / "base", dtype="F16")
    adapter = write_adapter(tmp_path / "adapter", factors(), lora_alpha=10**7)
    with pytest.raises(DamagedInput, match=r"decoder\.0\.attention\.query|q_proj.*too large for F16"):
        adapted(base, adapter)
    assert not any(path.is_dir() for path in cache.iterdir())


def test_integer_factors(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", {name: t.int() for name, t in factors().items()})
    with pytest.raises(MoemergeError, match="is stored as I32, expected F64"):
        adapted(base, adapter)


def test_damaged_file(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", factors())
    edit_header(adapter / "adapter_model.safetensors", lambda header: header.popitem())
    with pytest.raises(DamagedInput, match=r"adapter_model\.safetensors"):
        adapted(base, adapter)


def test_adapter_without_weights(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", factors())
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(MoemergeError, match=r"an adapter without adapter_model\.safetensors"):
        adapted(base, adapter)


def test_pickle_is_converted_when_that_is_allowed(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", factors(), base_model_name_or_path=str(base))
    expected = values(adapted(base, adapter))
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(MoemergeError, match=r"pickles \(adapter_model\.bin\).*--allow-pickle"):
        adapted(base, adapter)
    found = values(open_variants({"a": FolderRef(adapter)}, allow_pickle=True))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_pickle_that_asks_for_code_is_refused(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", factors())
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps({"x": print}, protocol=2))
    with pytest.raises(MoemergeError, match="the pickle asks to run print; nothing of it was run"):
        adapted(base, adapter, allow_pickle=True)


def test_halves_in_the_wrong_order(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", factors())
    with pytest.raises(MoemergeError, match=r"this is an adapter of org/base.*Write BASE\+"):
        adapted(adapter, base)
    with pytest.raises(MoemergeError, match=r"not an adapter: no adapter_config\.json"):
        adapted(base, base)


class TestBaseLeftOut:
    def test_folder_that_it_names(self, base, tmp_path):
        adapter = write_adapter(tmp_path / "adapter", factors(), base_model_name_or_path=str(base))
        found = open_variants({"a": FolderRef(adapter)}).first
        assert found.label == f"{base}+{adapter}"
        assert found.repository.origin == "local:base+local:adapter"

    @pytest.mark.parametrize(
        ("named", "words"),
        [
            (None, "names no base"),
            ("", "names no base"),
            ("/nowhere/at/all", "a folder of the machine that it was trained on"),
            ("nowhere", "neither an existing folder"),
            ("./a+./b", "a folder of the machine"),
        ],
    )
    def test_what_cannot_be_found(self, tmp_path, named, words):
        adapter = write_adapter(tmp_path / "adapter", factors(), base_model_name_or_path=named)
        with pytest.raises(MoemergeError) as error:
            open_variants({"a": FolderRef(adapter)})
        assert words in str(error.value)
        assert f"Give the base: BASE+{adapter}" in str(error.value)


class TestFiles:
    def test_tokenizer_and_template_of_the_adapter_win(self, base, tmp_path):
        adapter = write_adapter(tmp_path / "adapter", factors())
        tokenizer = json.loads((base / "tokenizer.json").read_text())
        write_json(adapter / "tokenizer.json", tokenizer | {"version": "2.0"})
        write_json(adapter / "tokenizer_config.json", {"chat_template": "mine"})
        files = adapted(base, adapter).first.repository
        assert isinstance(files, LocalFolder)
        assert json.loads(files.read_bytes("tokenizer.json"))["version"] == "2.0"
        assert "chat_template.jinja" not in files.files()
        assert files.read_bytes("config.json") == (base / "config.json").read_bytes()

    def test_parts_of_a_tokenizer_do_not(self, base, tmp_path):
        adapter = write_adapter(tmp_path / "adapter", factors())
        write_json(adapter / "tokenizer_config.json", {})
        (adapter / "chat_template.jinja").write_text("mine")
        files = adapted(base, adapter).first.repository
        assert files.read_bytes("tokenizer_config.json") == (base / "tokenizer_config.json").read_bytes()
        assert files.read_bytes("chat_template.jinja") == b"mine"

    def test_licences_of_both_are_kept(self, base, tmp_path):
        adapter = write_adapter(tmp_path / "adapter", factors())
        (base / "LICENSE").write_text("base's")
        (adapter / "LICENSE").write_text("adapter's")
        (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
        (adapter / "README.md").write_text("---\nlicense: mit\n---\n")
        files = adapted(base, adapter).first.repository
        assert files.read_bytes("LICENSE") == b"base's"
        assert files.read_bytes("LICENSE.adapter") == b"adapter's"
        assert b"license: other" in files.read_bytes("README.md")

    def test_longer_vocabulary_is_in_the_configuration(self, base, tmp_path):
        longer = {"lm_head.weight": torch.ones(72, 32), "model.embed_tokens.weight": torch.ones(72, 32)}
        found = adapted(base, write_adapter(tmp_path / "adapter", longer)).first
        assert found.settings["vocab_size"] == 72
        assert json.loads(found.repository.read_bytes("config.json"))["vocab_size"] == 72


class TestCache:
    def test_only_what_changes_is_written(self, base, tmp_path, cache):
        found = adapted(base, write_adapter(tmp_path / "adapter", factors())).first
        moved = {name for name, tensor in found.by_name().items() if tensor.path.parent != base}
        assert moved == {"decoder.0.attention.query"}
        (place,) = [path for path in cache.iterdir() if path.is_dir()]
        assert found.tensors["decoder.0.attention.query"].path == place / "changed.safetensors"

    def test_applied_once(self, base, tmp_path, cache):
        adapter = write_adapter(tmp_path / "adapter", factors())
        adapted(base, adapter)
        (place,) = [path for path in cache.iterdir() if path.is_dir()]
        before = (place / "changed.safetensors").stat().st_mtime_ns
        adapted(base, adapter)
        assert (place / "changed.safetensors").stat().st_mtime_ns == before
        edit_json(adapter / "adapter_config.json", lora_alpha=16)
        adapted(base, adapter)
        assert len([path for path in cache.iterdir() if path.is_dir()]) == 2

    def test_nothing_is_applied_where_headers_are_enough(self, base, tmp_path, cache):
        adapter = write_adapter(tmp_path / "adapter", factors())
        assert not adapted(base, adapter, download=False).first.is_local
        assert not cache.exists()

    def test_full_disk_is_found_before_writing(self, base, tmp_path, cache, monkeypatch):
        monkeypatch.setattr("moemerge.checkpoint.disk.free_bytes", lambda folder: 0)
        with pytest.raises(NotEnoughRoom, match="applying"):
            adapted(base, write_adapter(tmp_path / "adapter", factors()))

    def test_cut_into_rows_as_into_one_piece(self, base, tmp_path, monkeypatch):
        adapter = write_adapter(tmp_path / "adapter", {**factors(), **factors(EXPERTS, 96, 32, 16)})
        expected = values(adapted(base, adapter))
        monkeypatch.setattr("moemerge.checkpoint.adapter_change.COPY_BYTES", 300)
        found = values(adapted(base, adapter, cache=tmp_path / "pieces"))
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], msg=name)
        assert not torch.equal(found["experts.0.2.up"], read_canonical(base)["experts.0.2.up"])


def values(variants):
    with TensorReader() as reader:
        return {name: reader.read(tensor) for name, tensor in variants.first.by_name().items()}


def test_default_cache_is_that_of_the_user(tmp_path):
    assert default_cache() == tmp_path / "xdg" / "moemerge"


class TestNames:
    """An adapter names modules as its trainer did, a checkpoint tensors as its publisher did."""

    @pytest.mark.parametrize("prefix", ["transformer.", ""])
    def test_prefix_may_be_there_or_not(self, tmp_path, prefix):
        base = write_checkpoint(tmp_path / "base", "telechat")
        module = f"{prefix}h.1.mlp.down_proj"
        adapter = write_adapter(tmp_path / "adapter", factors(module, rows=32, columns=48))
        original, found = read_canonical(base), values(adapted(base, adapter))
        assert {name for name in found if not torch.equal(found[name], original[name])} == {
            "experts.1.0.down"
        }
        # Every entry of s B A is 8 / 4 * 4 * 0.25 * 0.5.
        expected = (original["experts.1.0.down"].float() + 1).to(torch.bfloat16)
        assert torch.equal(found["experts.1.0.down"], expected)

    def test_bias_of_a_replaced_module(self, tmp_path):
        base = write_checkpoint(tmp_path / "base", "telechat")
        dense = "transformer.h.0.self_attention.dense"
        replaced = {f"{dense}.weight": torch.ones(32, 32), f"{dense}.bias": torch.ones(32)}
        found = values(adapted(base, write_adapter(tmp_path / "adapter", replaced)))
        assert found["decoder.0.attention.output.bias"].eq(1).all()
        assert found["decoder.0.attention.output"].eq(1).all()

    def test_outputs_of_parts_may_take_turns(self):
        """As models have it whose gate and up are interleaved."""
        blocks = ExpertTensor(name="x", holds=["gate", "up"], axes=["expert", "part*row", "column"])
        turns = ExpertTensor(name="x", holds=["gate", "up"], axes=["expert", "column", "row*part"])
        rows = list(range(6))
        assert {part: rows[place] for part, place in outputs_of_parts(blocks, 3).items()} == {
            "gate": [0, 1, 2],
            "up": [3, 4, 5],
        }
        assert {part: rows[place] for part, place in outputs_of_parts(turns, 3).items()} == {
            "gate": [0, 2, 4],
            "up": [1, 3, 5],
        }
