"""Files of requests: order, mixed variants, bad lines, and going on after a kill at any byte."""

import json
from pathlib import Path

import pytest

from moemerge.errors import Busy, InvalidRecipe, NotEnoughRoom, NotFound
from moemerge.text.answers import answer
from moemerge.text.request_files import RequestFile, run_request_file
from moemerge.text.results import check_target
from moemerge.text.variants import BundleText
from tests.bundles import NAMES, open_engine

LINES = [
    {
        "custom_id": f"request {number}",
        "variant": NAMES[number % 4],
        "prompt": "a word " * (1 + number % 3),
        "max_tokens": 1 + (7 * number) % 12,
        **({"temperature": 0.8} if number % 5 == 0 else {}),
    }
    for number in range(14)
]
DEFAULTS = {"seed": 3}


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def open_file(engine, path, **options):
    requests = RequestFile(engine.bundle, path, **{"defaults": DEFAULTS, **options})
    requests.check()
    return requests


def run(engine, path, target, **options):
    return run_request_file(engine, open_file(engine, path), target, **options)


def read(target):
    return [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def source(tmp_path):
    return write_lines(tmp_path / "requests.jsonl", LINES)


def test_results_are_those_of_single_answers_in_the_order_of_the_lines(engine, source, tmp_path):
    counts = []
    report = run(engine, source, tmp_path / "out" / "results.jsonl", on_result=counts.append)
    results = read(tmp_path / "out" / "results.jsonl")
    assert [result["line"] for result in results] == counts == list(range(1, 15))
    texts = BundleText(engine.bundle)
    for line, result in zip(LINES, results, strict=True):
        assert (result["custom_id"], result["variant"]) == (line["custom_id"], line["variant"])
        assert result["usage"]["completion_tokens"] == len(result["token_ids"])
        if "temperature" in line:
            continue
        text = texts.of(line["variant"])
        alone = answer(engine, text, text.encode(line["prompt"]), max_tokens=line["max_tokens"])
        assert (result["text"], result["finish_reason"]) == (alone.text, alone.finish_reason)
        assert tuple(result["token_ids"]) == alone.token_ids
    assert report.num_tokens == sum(len(result["token_ids"]) for result in results)
    assert (report.num_lines, report.num_resumed, report.num_failed) == (14, 0, 0)
    assert not engine.has_work


def test_run_killed_at_any_byte_goes_on_to_the_same_file(engine, source, tmp_path):
    target = tmp_path / "results.jsonl"
    run(engine, source, target)
    whole = target.read_bytes()
    for cut in [0, 1, *range(7, len(whole), len(whole) // 9), len(whole) - 1, len(whole)]:
        target.write_bytes(whole[:cut])
        report = run(engine, source, target)
        assert target.read_bytes() == whole
        assert report.num_resumed == whole[:cut].count(b"\n")


def test_interrupted_run_leaves_whole_results_and_a_free_engine(engine, source, tmp_path):
    target = tmp_path / "results.jsonl"

    def stop(count):
        if count == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(engine, source, target, on_result=stop)
    assert 3 <= len(read(target)) <= 14
    engine.step()
    assert not engine.has_work
    engine.verify_integrity()
    report = run(engine, source, target)
    assert report.num_resumed >= 3
    assert [result["line"] for result in read(target)] == list(range(1, 15))


def test_lines_run_together_and_few_are_held(engine, tmp_path, monkeypatch):
    monkeypatch.setattr("moemerge.text.request_files._MAX_UNWRITTEN", 6)
    long_one = {**LINES[0], "max_tokens": 60, "ignore_stop": True, "temperature": 0.0}
    source = write_lines(tmp_path / "requests.jsonl", [long_one, *LINES])
    engine.preload()
    before = engine.snapshot().steps
    run(engine, source, tmp_path / "results.jsonl")
    steps = engine.snapshot().steps
    assert steps.mixed > before.mixed
    assert [result["line"] for result in read(tmp_path / "results.jsonl")] == list(range(1, 16))


def test_empty_lines_count_and_ask_nothing(engine, tmp_path):
    source = tmp_path / "requests.jsonl"
    source.write_text(f"\n{json.dumps(LINES[1])}\n\n  \n{json.dumps(LINES[2])}", encoding="utf-8")
    run(engine, source, tmp_path / "results.jsonl")
    assert [result["line"] for result in read(tmp_path / "results.jsonl")] == [2, 5]
    assert run(engine, source, tmp_path / "results.jsonl").num_resumed == 2


def test_stop_strings_and_logprobs_are_per_line(engine, tmp_path):
    plain = {"variant": "plain", "prompt": "a word", "max_tokens": 20}
    write_lines(tmp_path / "one.jsonl", [plain])
    run(engine, tmp_path / "one.jsonl", tmp_path / "one.out")
    text = read(tmp_path / "one.out")[0]["text"]
    write_lines(tmp_path / "two.jsonl", [{**plain, "stop": [text[3:5]]}, {**plain, "logprobs": 2}])
    run(engine, tmp_path / "two.jsonl", tmp_path / "two.out")
    cut, whole = read(tmp_path / "two.out")
    assert (cut["text"], cut["finish_reason"]) == (text[: text.index(text[3:5])], "stop")
    assert "logprobs" not in cut
    assert [one["token_id"] for one in whole["logprobs"]] == whole["token_ids"]
    assert all(len(one["top"]) == 2 and one["logprob"] <= 0 for one in whole["logprobs"])


def test_all_bad_lines_are_told_before_anything_is_answered(engine, tmp_path):
    bad = [{"variant": "huge", "prompt": "a"}, LINES[0], {"variant": "plain"}, *[{"x": 1}] * 30]
    requests = RequestFile(engine.bundle, write_lines(tmp_path / "requests.jsonl", bad))
    with pytest.raises(InvalidRecipe, match=r"32 lines are wrong") as caught:
        requests.check()
    assert len(caught.value.findings) == 32
    assert [finding.where.rpartition(" ")[2] for finding in caught.value.findings[:3]] == ["1", "3", "4"]
    assert "line 3: has none of" in str(caught.value)
    assert len(str(caught.value).splitlines()) < 30


def test_line_that_the_engine_refuses_has_an_error_and_the_rest_goes_on(served, tmp_path):
    lines = [LINES[1], {"variant": "plain", "prompt": "a" * 100, "max_tokens": 4}, LINES[2]]
    small = open_engine(served, dtype="float32", cache_memory=20_000 if "mixtral" in str(served) else 60_000)
    try:
        report = run(small, write_lines(tmp_path / "requests.jsonl", lines), tmp_path / "results.jsonl")
    finally:
        small.close()
    first, second, third = read(tmp_path / "results.jsonl")
    assert (report.num_failed, second["finish_reason"], second["text"]) == (1, "error", "")
    assert "100" in second["error"] or "101" in second["error"]
    assert "error" not in first
    assert third["text"]


def test_length_that_a_line_asks_for_is_never_cut_and_a_default_is(served, tmp_path):
    prompt = {"variant": "plain", "prompt": "a word"}
    lines = [{**prompt, "max_tokens": 100}, {**prompt, "ignore_stop": True}]
    small = open_engine(served, dtype="float32", cache_memory=20_000 if "mixtral" in str(served) else 60_000)
    room = small.limits_of("plain").room(len(BundleText(small.bundle).of("plain").encode("a word")))
    try:
        run(small, write_lines(tmp_path / "requests.jsonl", lines), tmp_path / "results.jsonl")
    finally:
        small.close()
    asked, default = read(tmp_path / "results.jsonl")
    assert f"max_tokens is 100, expected at most {room}" in asked["error"]
    assert (default["finish_reason"], len(default["token_ids"])) == ("length", room)


@pytest.mark.parametrize("change", ["input", "order", "defaults", "dtype", "more", "garbage", "text"])
def test_results_of_something_else_are_refused_and_kept(change, engine, source, tmp_path):
    target = tmp_path / "results.jsonl"
    run(engine, source, target)
    options = {}
    if change == "input":
        write_lines(source, [LINES[0], {**LINES[1], "max_tokens": 3}, *LINES[2:]])
    elif change == "order":
        lines = target.read_bytes().splitlines(keepends=True)
        target.write_bytes(b"".join([lines[1], lines[0], *lines[2:]]))
    elif change == "defaults":
        options["defaults"] = {"seed": 4}
    elif change == "dtype":
        options["dtype"] = "bfloat16"
    elif change == "more":
        write_lines(source, LINES[:-1])
    elif change == "garbage":
        lines = target.read_bytes().splitlines(keepends=True)
        target.write_bytes(b"".join([lines[0], b"{\n", *lines[2:]]))
    else:
        target.write_text("my diary\nsecond day\n")
    before = target.read_bytes()
    with pytest.raises(InvalidRecipe, match=r"results\.jsonl, line \d+: is not a result of"):
        run_request_file(engine, open_file(engine, source, **options), target)
    assert target.read_bytes() == before


def test_results_of_another_bundle_are_refused(engine, decoder_engine, source, tmp_path):
    target = tmp_path / "results.jsonl"
    run(engine, source, target)
    if decoder_engine.bundle.manifest.family != engine.bundle.manifest.family:
        with pytest.raises(InvalidRecipe, match="with this bundle"):
            run(decoder_engine, source, target)


def test_same_file_missing_file_and_busy_output_are_refused(engine, source, tmp_path):
    from moemerge.bundle.target import locked

    with pytest.raises(InvalidRecipe, match="cannot be the same file"):
        run(engine, source, source)
    with pytest.raises(NotFound, match="no such file"):
        RequestFile(engine.bundle, tmp_path / "missing.jsonl")
    with locked(tmp_path / "results.jsonl"), pytest.raises(Busy):
        run(engine, source, tmp_path / "results.jsonl")


@pytest.mark.parametrize(
    "content",
    [b"my notes\n", b"no newline at its end", b'{"mine": 1}', b'{"line": 1, "mine": true}\n', b"\0" * 20_000],
)
@pytest.mark.parametrize("lines", [LINES, []], ids=["requests", "nothing"])
def test_file_that_holds_no_results_is_never_cut(content, lines, engine, tmp_path):
    target = tmp_path / "precious.txt"
    target.write_bytes(content)
    with pytest.raises(InvalidRecipe, match="is not a result of"):
        run(engine, write_lines(tmp_path / "requests.jsonl", lines), target)
    assert target.read_bytes() == content


@pytest.mark.parametrize("target", [".", "/dev/null"])
def test_results_go_to_regular_files_only(target, engine, source):
    with pytest.raises(InvalidRecipe, match="not a regular file"):
        run(engine, source, Path(target))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"\xff\xfe\x00", "not UTF-8"),
        (b'{"temperature": NaN}', "NaN is not"),
        (b'{"logprobs": true}', "logprobs"),
    ],
)
def test_bad_lines_are_told_in_their_own_words(raw, message, engine, tmp_path):
    path = tmp_path / "requests.jsonl"
    known = b'{"variant": "%s", "prompt": "x", "logprobs": true}' % NAMES[0].encode()
    path.write_bytes((known if message == "logprobs" else raw) + b"\n")
    with pytest.raises(InvalidRecipe, match=rf"1 line is wrong\n.*(?<!num_){message}"):
        open_file(engine, path)


@pytest.mark.parametrize("place", ["/proc/x", "/proc/x/y", "file/x", "x" * 300])
def test_place_that_cannot_be_written_is_told_as_that(place, engine, source, tmp_path):
    if place.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("no /proc here")
    (tmp_path / "file").touch()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(NotEnoughRoom, match="cannot be written"):
        check_target(tmp_path / place, source)
    assert sorted(tmp_path.iterdir()) == before


def test_place_that_can_be_written_is_left_as_it_is(source, tmp_path):
    (tmp_path / "kept").write_text("text")
    before = sorted(tmp_path.iterdir())
    for name in ("kept", "new", "deep/er/new"):
        check_target(tmp_path / name, source)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "kept").read_text() == "text"
