"""`moemerge calibrate` as a user runs it, on the shipped family and on rows of input and target."""

import json
from pathlib import Path

import pytest

from tests.e2e.program import call_program, run_program, tree
from tests.factories import write_siblings

MINI = Path(__file__).parents[2] / "examples" / "families" / "mini"


def arguments(out, *names, tokens=2048):
    sources = [f"{name}={MINI / name}" for name in names]
    texts = [word for name in names for word in ("--text", f"{name}={MINI / 'text' / name}.txt")]
    return ["calibrate", *sources, *texts, "-o", out, "--tokens", tokens]


def test_shipped_family_is_calibrated_variant_by_variant(tmp_path):
    out = tmp_path / "calibration"
    first = run_program(*arguments(out, "code"), "--base", MINI / "base")
    assert first.code == 0, first.err
    assert f"Calibration: {out}" in first.out
    assert "warning" not in first.err
    before = tree(out / "code")
    both = call_program(*arguments(out, "code", "sums"), "--json")
    assert both.code == 0, both.err
    data = both.envelope["data"]
    assert data["reused"] == ["code"]
    assert tree(out / "code") == before
    assert data["variants"]["code"]["base_nll_excess"] > 0
    assert all(entry["num_tokens"] == 2048 for entry in data["variants"].values())
    assert not list(out.glob(".*"))


def test_text_of_another_variant_is_told_when_a_base_is_given(tmp_path):
    text = MINI / "text" / "scripture.txt"
    done = call_program(
        "calibrate", f"code={MINI / 'code'}", "--text", f"code={text}", "-o", tmp_path / "out",
        "--tokens", 2048, "--base", MINI / "base", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert [finding["code"] for finding in done.envelope["findings"]] == ["TEXT_OF_ANOTHER_KIND"]


def test_memory_limit_gives_the_same_statistics(tmp_path):
    plenty = call_program(*arguments(tmp_path / "plenty", "code"), "--json")
    tight = call_program(*arguments(tmp_path / "tight", "code"), "--max-ram", "520MiB", "--json")
    assert tight.code == plenty.code == 0, tight.err
    one, other = (done.envelope["data"]["variants"]["code"]["nll"] for done in (plenty, tight))
    assert one == pytest.approx(other, rel=1e-5)
    refused = call_program(*arguments(tmp_path / "none", "code"), "--max-ram", "1MiB")
    assert refused.code == 7
    assert "--max-ram" in refused.err


def test_rows_calibrate_an_encoder_decoder(tmp_path):
    write_siblings(tmp_path, "switch_transformers")
    rows = [{"input": f"is {n} even", "target": "yes" if n % 2 == 0 else "no"} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = call_program(
        "calibrate", "code=./code", "law=./law", "--text", "code=rows.jsonl", "--text", "law=rows.jsonl",
        "-o", "out", cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert {path.name for path in (tmp_path / "out" / "law").iterdir()} == {
        "passages.safetensors",
        *(f"layer-{index:05d}.safetensors" for index in (1, 3, 5, 7)),
    }


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ([], 2, "--text"),
        (["--text", "code"], 3, "NAME=FILE"),
        (["--text", "code=none.txt"], 5, "no such text file"),
        (["--text", "sums=none.txt"], 3, "no text for code"),
        (["--text", "code=empty.txt"], 3, "empty"),
        (["--text", "code=latin.txt"], 3, "not UTF-8"),
        (["--text", "code=short.txt"], 3, "fewer than one window"),
        (["--text", "code=rows.jsonl"], 3, "needs running text"),
    ],
)
def test_bad_texts_end_before_any_work(tmp_path, text, code, words):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("déjà vu".encode("latin-1") * 500)
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "rows.jsonl").write_text('{"input": "a", "target": "b"}\n')
    done = call_program("calibrate", f"code={MINI / 'code'}", *text, "-o", "out", cwd=tmp_path)
    assert done.code == code
    assert words in done.err
    assert not (tmp_path / "out").exists()
