"""Files to passages, and what is said of files that will not do."""

import hashlib
import json

import pytest

from moemerge.calibration.texts import load_text, load_texts, parse_texts
from moemerge.checkpoint.checkpoint import open_checkpoint
from moemerge.checkpoint.repository import LocalFolder
from moemerge.errors import InvalidRecipe, NotFound
from tests.factories import write_checkpoint, write_tokenizer


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return open_checkpoint(LocalFolder(write_checkpoint(tmp_path_factory.mktemp("decoder"))))


@pytest.fixture(scope="module")
def answerer(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("answerer"), "switch_transformers")
    return open_checkpoint(LocalFolder(folder))


def write_rows(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_text_is_cut_into_windows_of_the_context(decoder, tmp_path):
    path = tmp_path / "code.txt"
    path.write_text("a word. " * 100)
    text = load_text(decoder, path, 500)
    assert [len(passage.token_ids) for passage in text.passages] == [128, 128, 128]
    assert text.num_tokens == 384
    assert [len(passage.token_ids) for passage in load_text(decoder, path, 100, 40).passages] == [40, 40]
    assert text.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_rows_become_questions_with_answers_that_end(answerer, tmp_path):
    rows = [{"input": "a longer one", "target": "yes"}, {"input": "short", "target": "no"}]
    text = load_text(answerer, write_rows(tmp_path / "rows.jsonl", rows), 100)
    assert [len(passage.token_ids) for passage in text.passages] == [6, 13]
    assert all(passage.target_ids[-1] == 1 for passage in text.passages)


def test_rows_end_where_the_tokens_do(answerer, tmp_path):
    rows = [{"input": "short", "target": "no"}] * 10
    assert len(load_text(answerer, write_rows(tmp_path / "rows.jsonl", rows), 30).passages) == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b" \n \n", "empty"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"too short", "fewer than one window of 128"),
    ],
)
def test_text_that_will_not_do_is_refused(decoder, tmp_path, content, words):
    path = tmp_path / "code.txt"
    path.write_bytes(content)
    with pytest.raises(InvalidRecipe, match=words):
        load_text(decoder, path, 500)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "empty"),
        ("no json\n", "line 1: expected an object"),
        ('{"input": "a"}\n', "line 1: expected an object"),
        ('{"input": "a", "target": "b"}\n{"input": 3, "target": "b"}\n', "line 2: input and target must be"),
        ('{"input": "a", "target": "' + "b" * 200 + '"}\n', "no row"),
    ],
)
def test_rows_that_will_not_do_are_refused(answerer, tmp_path, content, words):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(InvalidRecipe, match=words):
        load_text(answerer, path, 100)


def test_text_of_the_wrong_kind_is_refused(decoder, answerer, tmp_path):
    rows, text = write_rows(tmp_path / "a.jsonl", [{"input": "a", "target": "b"}]), tmp_path / "a.txt"
    text.write_text("a " * 200)
    with pytest.raises(InvalidRecipe, match="Mixtral needs running text"):
        load_text(decoder, rows, 500)
    with pytest.raises(InvalidRecipe, match="needs rows of input and target"):
        load_text(answerer, text, 500)
    with pytest.raises(InvalidRecipe, match="expected running text"):
        load_text(decoder, tmp_path / "a.pdf", 500)
    with pytest.raises(NotFound, match="no such text"):
        load_text(decoder, tmp_path / "b.txt", 500)
    with pytest.raises(InvalidRecipe, match="less than one window"):
        load_text(decoder, text, 100)


def test_every_problem_is_told_at_once(decoder, tmp_path):
    paths = {"code": tmp_path / "none.txt", "sums": tmp_path / "sums.txt"}
    with pytest.raises(InvalidRecipe) as caught:
        load_texts({"code": decoder, "law": decoder}, paths, 500)
    message = str(caught.value)
    assert "no text for law" in message
    assert "text for sums" in message
    assert "variant code" in message


def test_tokenizer_of_another_model_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "small", vocab=32)
    write_tokenizer(folder / "tokenizer.json", ["<unk>", "<s>", "</s>"], 64)
    path = tmp_path / "code.txt"
    path.write_text("zyx " * 100)
    with pytest.raises(InvalidRecipe, match="the model has 32"):
        load_text(open_checkpoint(LocalFolder(folder)), path, 500)


def test_arguments_name_files_by_variant(tmp_path):
    assert parse_texts([f"code={tmp_path}/a=b.txt"]) == {"code": tmp_path / "a=b.txt"}
    for wrong in (["code"], ["=a.txt"], ["code="], ["code=a", "code=b"]):
        with pytest.raises(InvalidRecipe):
            parse_texts(wrong)
