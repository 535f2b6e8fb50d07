"""`eval` and `compare` as a user runs them, on tiny siblings of both families."""

import json
import shutil

import pytest

from tests.e2e.program import call_program, tree
from tests.factories import CHARACTERS, write_checkpoint, write_siblings

LETTERS = CHARACTERS.replace("\n", "")
NAMES = ("code", "law")


def write_texts(folder):
    """A text of its own for each variant, and a second one to calibrate on."""
    for number, name in enumerate(NAMES):
        for split, shift in (("test", 3), ("train", 5)):
            letters = [LETTERS[(shift * i * i + 7 * number * i) % len(LETTERS)] for i in range(600)]
            (folder / f"{name}.{split}.txt").write_text("".join(letters))


def write_tasks(folder):
    for number, name in enumerate(NAMES):
        for split, shift in (("test", 3), ("train", 5)):
            rows = [
                {"input": LETTERS[i % 40 : i % 40 + 9], "target": LETTERS[(shift * i + number) % 30]}
                for i in range(12)
            ]
            (folder / f"{name}.{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def texts(split="test", ending="txt", option="--text"):
    return [word for name in NAMES for word in (option, f"{name}={name}.{split}.{ending}")]


SIZE = ("--windows", 4, "--window", 32)
SOURCES = ("code=./code", "law=./law")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Siblings, texts, and a bundle that holds them bit for bit."""
    folder = tmp_path_factory.mktemp("place")
    write_siblings(folder, names=NAMES)
    write_texts(folder)
    done = call_program("merge", *SOURCES, "-o", "exact.moe", "--budget", "exact", cwd=folder)
    assert done.code == 0, done.err
    return folder


def evaluate(place, *arguments):
    done = call_program("eval", *arguments, *SIZE, "--json", cwd=place)
    assert done.code == 0, done.err
    assert done.envelope["command"] == "eval"
    return done.envelope["data"]


GIVEN = (*SOURCES, "--base", "./base", *texts(), "--calibration", "x", "--budget")
ORIGINALS = ("--original", "code=./code", "--original", "law=./law")


def test_an_exact_bundle_is_its_originals(place):
    found = evaluate(place, "exact.moe", *texts(), *ORIGINALS, "--base", "./base")
    for one in found["variants"].values():
        assert one["kl"] == pytest.approx(0, abs=1e-6)
        assert one["agreement"] == 1.0
        assert set(one["routing"].values()) == {1.0}
        assert one["nll"] == pytest.approx(one["original_nll"], abs=1e-6)
        assert one["gain"] is None or one["gain"] == pytest.approx(1.0, abs=1e-4)
    assert found["routing_by_depth"] == {"0": 1.0, "1": 1.0}
    assert found["worst"] in NAMES


def test_a_checkpoint_in_place_of_a_bundle_is_measured_as_every_variant(place):
    found = evaluate(place, "./code", *texts(), *ORIGINALS)
    assert found["variants"]["code"]["agreement"] == 1.0
    assert found["variants"]["law"]["agreement"] < 1.0
    assert found["worst"] == "law"


def test_one_variant_alone_is_measured_and_the_other_is_mentioned(place):
    done = call_program("eval", "exact.moe", *texts()[:2], *SIZE, cwd=place)
    assert done.code == 0, done.err
    assert "law: no text" in done.err
    assert "code" in done.out
    chosen = evaluate(place, "exact.moe", *texts(), "--variant", "law")
    assert list(chosen["variants"]) == ["law"]


def test_an_original_with_other_weights_is_told(place):
    done = call_program(
        "eval", "exact.moe", *texts()[:2], *SIZE, "--original", "code=./law", "--json", cwd=place
    )
    assert done.code == 0, done.err
    codes = {finding["code"] for finding in done.envelope["findings"]}
    assert codes == {"NOT_MEASURED", "OTHER_ORIGINAL"}


def test_lm_eval_results_stand_beside(place, tmp_path):
    for name, accuracy in (("bundle", 0.6), ("original", 0.8), ("base", 0.4)):
        value = {"results": {"arc": {"acc,none": accuracy, "acc_stderr,none": 0.1}}}
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    given = [f"code={tmp_path}/bundle.json", f"original:code={tmp_path}/original.json"]
    options = [word for text in (*given, f"base={tmp_path}/base.json") for word in ("--lm-eval", text)]
    found = evaluate(place, "exact.moe", *texts(), *options)
    (row,) = found["lm_eval"]
    assert row["kept"] == pytest.approx(0.5)
    shown = call_program("eval", "exact.moe", *texts(), *SIZE, *options, cwd=place)
    assert "arc" in shown.out


def test_figures_are_written_where_asked(place, tmp_path):
    found = evaluate(place, "exact.moe", *texts(), "-o", tmp_path / "figures.json")
    assert json.loads((tmp_path / "figures.json").read_text()) == found


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("eval", "exact.moe", "--text", "art=code.test.txt"), 3, "no variant 'art'"),
        (("eval", "exact.moe", "--text", "code=gone.txt"), 5, "gone.txt"),
        (("eval", "exact.moe", "--text", "code"), 3, "NAME=FILE"),
        (("eval", "exact.moe", "--text", "code=code/config.json"), 3, "running text"),
        (("eval", "exact.moe", *texts(), "--variant", "art"), 3, "no variant 'art'"),
        (("eval", "exact.moe", *texts()[:2], "--variant", "law"), 3, "no text for law"),
        (("eval", "exact.moe", *texts(), "--original", "art=./code"), 3, "art"),
        (("eval", "exact.moe", *texts(), "--base", "./gone"), 5, "gone"),
        (("eval", "gone.moe", *texts()), 3, "gone.moe"),
        (("eval", "exact.moe", *texts(), "--dtype", "int4"), 3, "'int4'"),
        (("eval", "exact.moe", *texts(), "--lm-eval", "code=code.test.txt"), 3, "not JSON"),
        (("eval", "exact.moe", *texts(), "-o", "code"), 7, "code"),
        (("eval", "exact.moe"), 2, "--text"),
        (("compare", *SOURCES, "--base", "./base", *texts(), "--budget", "1x"), 3, "--calibrate-text"),
        (("compare", *GIVEN, "1x,,1x"), 3, "different budgets"),
        (("compare", *GIVEN, "exact"), 3, "nothing is left"),
        (("compare", *GIVEN, "1x"), 5, "x: no such calibration"),
        (("compare", *GIVEN, "1x", "--methods", "magic"), 3, "no method 'magic'; there are ours, unrepaired"),
        (("compare", *GIVEN, "1x", "--plot", "x.txt"), 3, ".png"),
        (("compare", *SOURCES, *texts(), "--budget", "1x", "--calibration", "x"), 2, "--base"),
    ],
    ids=lambda value: "_".join(map(str, value))[-60:] if isinstance(value, tuple) else None,
)
def test_bad_argument_is_named(arguments, code, told, place):
    before = tree(place)
    done = call_program(*arguments, cwd=place)
    assert done.code == code, done.err
    assert told in done.err
    assert tree(place) == before


def compare(place, out, *arguments):
    done = call_program(
        "compare", *SOURCES, "--base", "./base", *texts(), *texts("train", option="--calibrate-text"),
        "--tokens", 256, *SIZE, "--draws", 200, "-o", out, *arguments, cwd=place,
    )  # fmt: skip
    assert done.code == 0, done.err
    return done


def test_methods_are_compared_once_and_their_curves_drawn(place, tmp_path):
    options = ("--budget", "0.5x,1x", "--methods", "ours,copies,pick,average", "--json")
    out = tmp_path / "results"
    found = compare(place, out, *options, "--plot", tmp_path / "curves.svg").envelope["data"]
    rows = {(row["method"], row["budget"]): row for row in found["rows"]}
    assert len(rows) == 2 + 4 * 2
    assert rows["separate models", "-"]["kept"] in (None, pytest.approx(1.0))
    assert rows["ours", "1x"]["bytes_ratio"] <= 1.001
    assert (tmp_path / "curves.svg").stat().st_size > 1000
    assert not (out / "work").exists()
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    again = compare(place, out, *options)
    assert again.envelope["data"] == found
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.json")} == stamps


def test_what_is_missing_of_a_comparison_is_measured_and_what_is_damaged_again(place, tmp_path):
    out = tmp_path / "results"
    first = compare(place, out, "--budget", "1x", "--methods", "copies", "--json").envelope["data"]
    (out / "copies-1x.json").write_text("{")
    found = compare(place, out, "--budget", "1x,0.1x", "--methods", "copies", "--json").envelope["data"]
    assert found["rows"][:3] == first["rows"]
    assert "takes" in found["rows"][3]["cannot"]


def test_measuring_on_the_text_of_calibration_is_told(place, tmp_path):
    done = call_program(
        "compare", *SOURCES, "--base", "./base", *texts(), *texts(option="--calibrate-text"), "--tokens", 256,
        *SIZE, "--draws", 200, "-o", tmp_path / "r", "--budget", "1x", "--methods", "pick", cwd=place,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "flatters" in done.err
    assert "pick" in done.out


def test_tasks_of_an_encoder_decoder_are_evaluated_and_compared(tmp_path):
    base = write_checkpoint(tmp_path / "base", "switch_transformers")
    for number, name in enumerate(NAMES):
        write_checkpoint(tmp_path / name, base=base, noise=0.1, seed=number + 1)
    write_tasks(tmp_path)
    found = evaluate(tmp_path, "./code", *texts(ending="jsonl"), *ORIGINALS, "--base", "./base")
    assert found["variants"]["code"]["accuracy"] == found["variants"]["code"]["original_accuracy"]
    assert found["variants"]["code"]["agreement"] == 1.0
    done = call_program(
        "compare", *SOURCES, "--base", "./base", *texts(ending="jsonl"), "--tokens", 256, "--draws", 200,
        *texts("train", "jsonl", "--calibrate-text"), "-o", "r", "--budget", "1x", "--methods", "mean,copies",
        "--json", cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    rows = done.envelope["data"]["rows"]
    assert [row["method"] for row in rows] == ["base alone", "separate models", "mean", "copies"]
    assert all(set(row["scores"]) == set(NAMES) for row in rows)


def test_interrupted_comparison_continues_from_its_results(place, tmp_path, monkeypatch):
    out = tmp_path / "results"
    from moemerge.evaluation import comparison

    score_bundle, calls = comparison.score_bundle, []

    def stop_at_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score_bundle(*arguments)

    monkeypatch.setattr(comparison, "score_bundle", stop_at_second)
    arguments = (
        "compare", *SOURCES, "--base", "./base", *texts(), *texts("train", option="--calibrate-text"),
        "--tokens", 256, *SIZE, "--draws", 200, "-o", out, "--budget", "1x", "--methods", "pick,copies",
    )  # fmt: skip
    stopped = call_program(*arguments, cwd=place)
    assert stopped.code == 130
    assert "continue" in stopped.err
    assert {path.name for path in out.glob("*x.json")} == {"pick-1x.json"}
    assert call_program(*arguments, cwd=place).code == 0
    assert len(calls) == 3
    shutil.rmtree(out)
