"""Results files of lm-evaluation-harness: what is read of them, and what is refused."""

import json

import pytest

from moemerge.errors import InvalidRecipe, NotFound
from moemerge.evaluation.lm_eval import TaskRow, parse_lm_eval, read_results

RESULTS = {
    "results": {
        "arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.01, "acc_norm,none": 0.55},
        "gsm8k": {
            "exact_match,strict-match": 0.2,
            "exact_match,flexible-extract": 0.3,
            "exact_match_stderr,strict-match": "N/A",
            "sample_len": 100,
        },
    },
    "versions": {"arc": 1},
}


def write(path, **accuracies):
    results = {task: {"acc,none": value} for task, value in accuracies.items()}
    path.write_text(json.dumps({"results": results}))
    return path


def test_metrics_of_every_task_without_standard_errors(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(RESULTS))
    assert read_results(path) == {
        ("arc", "acc"): 0.5,
        ("arc", "acc_norm"): 0.55,
        ("gsm8k", "exact_match (strict-match)"): 0.2,
        ("gsm8k", "exact_match (flexible-extract)"): 0.3,
    }


def test_share_kept_where_all_three_are_there(tmp_path):
    files = {
        "code": write(tmp_path / "a", arc=0.8),
        "original:code": write(tmp_path / "b", arc=0.9),
        "base": write(tmp_path / "c", arc=0.5),
    }
    texts = [f"{name}={path}" for name, path in files.items()]
    (row,) = parse_lm_eval(texts, ["code", "law"])
    assert row == TaskRow(variant="code", task="arc", metric="acc", base=0.5, original=0.9, bundle=0.8)
    assert row.kept == pytest.approx(0.75)
    (row,) = parse_lm_eval(texts[:2], ["code", "law"])
    assert row.kept is None


def test_nothing_is_kept_of_what_did_not_change(tmp_path):
    path = write(tmp_path / "a", arc=0.5)
    (row,) = parse_lm_eval([f"code={path}", f"original:code={path}", f"base={path}"], ["code"])
    assert row.kept is None


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("not json", "not JSON"),
        ("[1]", "no `results` section"),
        ('{"results": 3}', "no `results` section"),
        ('{"results": {"arc": 0.5}}', "'arc' are float"),
        ('{"results": {"arc": {"alias": "arc", "acc": NaN, "f1": true}}}', "no task with a metric"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_what_is_no_such_file_is_refused(content, told, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(InvalidRecipe, match=told):
        read_results(path)


def test_a_task_that_one_file_lacks_is_named(tmp_path):
    whole, part = write(tmp_path / "a", arc=0.8, boolq=0.7), write(tmp_path / "b", arc=0.9)
    with pytest.raises(InvalidRecipe, match="acc of task boolq, those of its original do not"):
        parse_lm_eval([f"code={whole}", f"original:code={part}"], ["code"])


def test_names_that_are_not_measured_and_missing_files_are_refused(tmp_path):
    path = write(tmp_path / "a", arc=0.8)
    for text in (f"art={path}", "code", "code=", f"original:art={path}"):
        with pytest.raises(InvalidRecipe, match="original:NAME=FILE"):
            parse_lm_eval([text], ["code"])
    with pytest.raises(InvalidRecipe, match="two files"):
        parse_lm_eval([f"code={path}", f"code={path}"], ["code"])
    with pytest.raises(NotFound, match="gone"):
        parse_lm_eval([f"code={tmp_path / 'gone'}"], ["code"])
