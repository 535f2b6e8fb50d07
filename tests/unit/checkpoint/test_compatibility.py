"""Variants of one consolidation: what must agree, what may differ, and that all reasons come at once."""

import pytest

from moemerge.checkpoint.tensors import TensorReader
from moemerge.checkpoint.variants import open_variants
from moemerge.errors import IncompatibleInputs, NotFound, UnsupportedCheckpoint
from moemerge.refs import FolderRef
from tests.factories import edit_json, write_checkpoint, write_siblings


def open_all(*folders, base=None):
    sources = {f"v{number}": FolderRef(folder) for number, folder in enumerate(folders)}
    return open_variants(sources, FolderRef(base) if base else None)


def refusal(*folders, base=None, kind=IncompatibleInputs):
    with pytest.raises(kind) as caught:
        open_all(*folders, base=base)
    return caught.value


@pytest.mark.parametrize("family", ["mixtral", "switch_transformers"])
def test_siblings_open_in_the_order_given(tmp_path, family):
    base, tunes = write_siblings(tmp_path, family, names=("b", "a", "c"))
    opened = open_variants({name: FolderRef(path) for name, path in tunes.items()}, FolderRef(base))
    assert list(opened.variants) == ["b", "a", "c"]
    assert opened.first.label == str(tunes["b"])
    assert opened.base is not None
    assert opened.base.label == str(base)
    assert opened.findings == ()


def test_variant_may_be_called_base(tmp_path):
    base, tunes = write_siblings(tmp_path, names=("code",))
    opened = open_variants({"base": FolderRef(base), "code": FolderRef(tunes["code"])}, FolderRef(base))
    assert list(opened.variants) == ["base", "code"]
    assert opened.base is not None


@pytest.mark.parametrize(
    ("setting", "value"),
    [("hidden_size", 64), ("expert_size", 40), ("num_layers", 3), ("num_heads", 8), ("num_kv_heads", 4),
     ("head_size", 16), ("num_experts", 3), ("norm_eps", 1e-6)],
)  # fmt: skip
def test_settings_that_must_agree_are_named_with_both_values(tmp_path, setting, value):
    first = write_checkpoint(tmp_path / "a")
    other = write_checkpoint(tmp_path / "b", settings={setting: value})
    message = str(refusal(first, other))
    assert f"variant v1: {setting} is {value}, expected" in message
    assert "as in v0. Only variants of one base can share experts" in message


@pytest.mark.parametrize(
    ("setting", "value"),
    [("expert_capacity", 32), ("position_buckets", 16), ("position_max_distance", 64)],
)
def test_settings_of_switch_that_must_agree(tmp_path, setting, value):
    first = write_checkpoint(tmp_path / "a", "switch_transformers")
    other = write_checkpoint(tmp_path / "b", "switch_transformers", settings={setting: value})
    assert f"{setting} is {value}" in str(refusal(first, other))


def test_sparse_layers_must_agree_however_they_are_written(tmp_path):
    keys = {"encoder_sparse_step": None, "decoder_sparse_step": None}
    first = write_checkpoint(tmp_path / "a", "switch_transformers")
    unwritten = write_checkpoint(tmp_path / "b", "switch_transformers", config=keys)
    assert list(open_all(first, unwritten).variants) == ["v0", "v1"]
    settings = {"encoder_sparse_step": 1, "num_sparse_encoder_layers": 4}
    other = write_checkpoint(tmp_path / "c", "switch_transformers", settings=settings)
    assert "encoder_sparse_step is 1" in str(refusal(first, other))


def test_families_must_agree(tmp_path):
    first = write_checkpoint(tmp_path / "a")
    other = write_checkpoint(tmp_path / "b", "switch_transformers")
    assert "variant v1: family is switch_transformers, expected mixtral as in v0" in str(
        refusal(first, other)
    )


def test_base_must_fit_as_well(tmp_path):
    first = write_checkpoint(tmp_path / "a")
    other = write_checkpoint(tmp_path / "b", settings={"expert_size": 40})
    assert "variant (base): expert_size is 40" in str(refusal(first, base=other))


def test_vocabularies_of_different_lengths_go_together(tmp_path):
    base = write_checkpoint(tmp_path / "base")
    folders = [
        write_checkpoint(tmp_path / str(vocab), base=base, vocab=vocab, noise=0.1) for vocab in (64, 66, 96)
    ]
    opened = open_all(*folders, base=base)
    assert [variant.tensors["embedding"].shape[0] for variant in opened.variants.values()] == [64, 66, 96]
    assert [variant.tensors["head"].shape[0] for variant in opened.variants.values()] == [64, 66, 96]
    assert all(finding.level == "note" and "vocab_size" in finding.found for finding in opened.findings)
    assert len(opened.findings) == 2
    with TensorReader() as reader:
        first, *others = (reader.read(v.tensors["embedding"]) for v in opened.variants.values())
    assert all(other.shape[1] == first.shape[1] for other in others)


@pytest.mark.parametrize(
    ("setting", "value", "level"),
    [("rope_theta", 5e5, "note"), ("max_positions", 512, "note"), ("sliding_window", 16, "note"),
     ("num_experts_per_token", 1, "warning")],
)  # fmt: skip
def test_settings_that_may_differ_are_told(tmp_path, setting, value, level):
    first = write_checkpoint(tmp_path / "a")
    other = write_checkpoint(tmp_path / "b", settings={setting: value})
    (finding,) = open_all(first, other).findings
    assert (finding.level, finding.where) == (level, "variant v1")
    assert f"{setting} is {value}" in finding.found


def test_stored_dtypes_may_differ_and_are_told(tmp_path):
    first = write_checkpoint(tmp_path / "a")
    other = write_checkpoint(tmp_path / "b", dtype="F16")
    (finding,) = open_all(first, other).findings
    assert finding.found == "stored dtype is F16"
    assert finding.expected == "v0 has BF16"


def test_layouts_and_generations_of_config_go_together(tmp_path):
    first = write_checkpoint(tmp_path / "a", generation="4", shard_bytes=20_000)
    other = write_checkpoint(tmp_path / "b", seed=1, layout="stacked")
    opened = open_all(first, other)
    assert opened.findings == ()
    assert opened.variants["v0"].experts.keys() == opened.variants["v1"].experts.keys()


def test_same_checkpoint_twice_is_told(tmp_path):
    folder = write_checkpoint(tmp_path / "a")
    (finding,) = open_all(folder, folder).findings
    assert finding.code == "SAME_SOURCE"
    assert finding.where == "v0, v1"


def test_every_difference_is_reported_together(tmp_path):
    first = write_checkpoint(tmp_path / "a")
    second = write_checkpoint(tmp_path / "b", settings={"expert_size": 40, "norm_eps": 1e-6})
    third = write_checkpoint(tmp_path / "c", settings={"num_experts": 3})
    error = refusal(first, second, third)
    found = [finding.found for finding in error.findings if finding.level == "error"]
    assert found == ["expert_size is 40", "norm_eps is 1e-06", "num_experts is 3"]
    assert all(words in str(error) for words in [*found, "3 problems", "variant v1", "variant v2"])


def test_findings_of_several_unreadable_variants_come_together(tmp_path):
    good = write_checkpoint(tmp_path / "good")
    unknown = write_checkpoint(tmp_path / "unknown")
    edit_json(unknown / "config.json", model_type="llama_of_yore")
    broken = write_checkpoint(tmp_path / "broken")
    edit_json(broken / "config.json", hidden_act="gelu", num_experts=9)
    error = refusal(unknown, good, broken, tmp_path / "absent", kind=UnsupportedCheckpoint)
    for words in (
        "variant v0: ", "'llama_of_yore' is not supported", "variant v2: ", "hidden_act = 'gelu'", "disagree",
        "variant v3: ", "absent: no such folder",
    ):  # fmt: skip
        assert words in str(error)
    assert "variant v1" not in str(error)
    assert [f.code for f in error.findings] == [
        "FAMILY_UNKNOWN", "CONFIG_CONTRADICTS", "CONFIG_UNSUPPORTED", "UNREADABLE",
    ]  # fmt: skip


def test_kind_of_the_first_failure_decides_the_exit_code(tmp_path):
    unknown = write_checkpoint(tmp_path / "unknown")
    edit_json(unknown / "config.json", model_type="llama_of_yore")
    assert refusal(tmp_path / "absent", unknown, kind=NotFound).exit_code == 5
    assert refusal(unknown, tmp_path / "absent").exit_code == 4
