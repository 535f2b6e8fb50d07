"""References: what names a checkpoint, and which variant names are possible."""

from pathlib import Path

import pytest

from moemerge.errors import InvalidRecipe
from moemerge.refs import (
    AdaptedRef,
    ExpertRef,
    FolderRef,
    HubRef,
    VariantRef,
    check_variant_name,
    parse_model,
    parse_named_sources,
    parse_repositories,
    parse_source,
)


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubRef("org/name")),
        ("org/name@v1.0", HubRef("org/name", "v1.0")),
        ("org/name@refs/pr/3", HubRef("org/name", "refs/pr/3")),
        ("hf://org/name@main", HubRef("org/name", "main")),
        ("./org/name", FolderRef(Path("org/name"))),
        ("/data/model", FolderRef(Path("/data/model"))),
        ("../model", FolderRef(Path("../model"))),
    ],
)
def test_form_decides_between_hub_and_folder(text, expected):
    assert parse_source(text) == expected


def test_home_is_expanded():
    assert parse_source("~/model") == FolderRef(Path.home() / "model")


def test_plain_word_is_a_folder_if_it_exists(tmp_path):
    (tmp_path / "model").mkdir()
    assert parse_source("model") == FolderRef(Path("model"))
    with pytest.raises(InvalidRecipe, match="'absent' is neither an existing folder nor of the form"):
        parse_source("absent")


def test_folder_that_looks_like_a_repository_is_ambiguous(tmp_path):
    (tmp_path / "org" / "name").mkdir(parents=True)
    with pytest.raises(InvalidRecipe, match=r"write \./org/name for the folder or hf://org/name"):
        parse_source("org/name")
    assert parse_source("./org/name") == FolderRef(Path("org/name"))
    assert parse_source("hf://org/name") == HubRef("org/name")


@pytest.mark.parametrize("text", ["", "  ", "org/name@", "hf://name", "org/name@a b", "hf://org/name@"])
def test_impossible_reference_is_refused(text):
    with pytest.raises(InvalidRecipe):
        parse_source(text)


def test_reference_prints_as_it_is_written():
    assert str(parse_source("org/name@v1")) == "org/name@v1"
    assert str(parse_source("org/name")) == "org/name"
    assert str(ExpertRef("code", 3, 7)) == "code:3.7"


def test_named_sources_keep_their_order():
    sources = parse_named_sources(["b=org/b", "a=./a"])
    assert list(sources.items()) == [("b", HubRef("org/b")), ("a", FolderRef(Path("a")))]


def test_named_source_may_contain_an_equals_sign():
    assert parse_named_sources(["a=./x=y"]) == {"a": FolderRef(Path("x=y"))}


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["org/name"], "write NAME=org/name"),
        (["=org/name"], "variant name '' cannot be used"),
        (["a=org/x", "A=org/y"], "variant name 'A' is given twice"),
        (["a/b=org/x"], "variant name 'a/b' cannot be used"),
    ],
)
def test_unusable_names_are_refused(texts, words):
    with pytest.raises(InvalidRecipe, match=words):
        parse_named_sources(texts)


@pytest.mark.parametrize("name", ["con", "NUL", "lpt1", ".", "..", "-a", "a.b", "a" * 65, "é", "a\n"])
def test_names_that_cannot_be_a_folder_everywhere_are_refused(name):
    with pytest.raises(InvalidRecipe, match="cannot be used"):
        check_variant_name(name)


@pytest.mark.parametrize("name", ["code", "Code-2", "base", "0", "a_b", "a" * 64])
def test_ordinary_names_are_accepted(name):
    check_variant_name(name, taken={"other"})


def test_variant_of_a_bundle_is_told_from_other_references(tmp_path):
    assert parse_model("duo.moe:code") == VariantRef(Path("duo.moe"), "code")
    assert parse_model("./a/duo.moe:code") == VariantRef(Path("a/duo.moe"), "code")
    assert parse_model("~/duo.moe:code") == VariantRef(Path.home() / "duo.moe", "code")
    assert parse_model("hf://org/name") == HubRef("org/name")
    assert parse_model("org/name@v1") == HubRef("org/name", "v1")
    assert parse_model("C:\\models\\base") == FolderRef(Path("C:\\models\\base"))
    (tmp_path / "odd:name").mkdir()
    assert parse_model("odd:name") == FolderRef(Path("odd:name"))


@pytest.mark.parametrize(
    ("text", "base", "adapter"),
    [
        ("org/base+org/lora", HubRef("org/base"), HubRef("org/lora")),
        ("org/base@v1+hf://org/lora@v2", HubRef("org/base", "v1"), HubRef("org/lora", "v2")),
        ("./base+org/lora", FolderRef(Path("base")), HubRef("org/lora")),
        ("org/base+~/lora", HubRef("org/base"), FolderRef(Path.home() / "lora")),
        ("/a/base+/a/lora", FolderRef(Path("/a/base")), FolderRef(Path("/a/lora"))),
    ],
)
def test_base_and_adapter(text, base, adapter):
    assert parse_source(text) == AdaptedRef(base, adapter)
    assert parse_model(text) == AdaptedRef(base, adapter)


def test_folder_may_have_a_plus_in_its_name(tmp_path):
    (tmp_path / "c++").mkdir()
    assert parse_source("./c++") == FolderRef(Path("c++"))
    assert parse_source("./c+++org/lora") == AdaptedRef(FolderRef(Path("c++")), HubRef("org/lora"))
    with pytest.raises(InvalidRecipe, match="several plus signs"):
        parse_source("./d+++org/lora")


@pytest.mark.parametrize("text", ["+org/lora", "org/base+", "+"])
def test_half_that_is_missing_is_told(text):
    with pytest.raises(InvalidRecipe, match=r"lacks a half of BASE\+ADAPTER"):
        parse_source(text)


def test_repositories_of_a_pull():
    assert parse_repositories("org/base@v1+org/lora") == [HubRef("org/base", "v1"), HubRef("org/lora")]
    assert parse_repositories("org/base") == [HubRef("org/base")]
    with pytest.raises(InvalidRecipe, match="not of the form"):
        parse_repositories("org/base+./lora")
