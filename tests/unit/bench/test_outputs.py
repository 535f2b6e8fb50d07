from dataclasses import replace

import pytest

from moemerge.bench import outputs
from moemerge.bench.metrics import Record
from moemerge.bench.outputs import check_float32, equal_shares, off_shares
from moemerge.bench.systems import System
from moemerge.bench.workloads import WorkloadOptions, draw_trace
from moemerge.errors import QualityGateFailed


def quiet(text):
    pass


@pytest.fixture
def trace(subject):
    options = WorkloadOptions(
        workload="burst",
        variants=subject.variants,
        num_requests=3,
        prompt_tokens=5,
        output_tokens=12,
        vocab_size=subject.vocab_size,
    )
    return draw_trace(options, None)


def test_systems_are_compared_in_float32(subject, placement, trace):
    assert check_float32(("single", "fcfs"), subject, placement, trace, quiet) == ("alone", 3)


def test_a_system_with_another_token_is_refused(subject, placement, trace, monkeypatch):
    answers = outputs._answers

    def answer_wrongly(name, *arguments):
        found = answers(name, *arguments)
        if name == "mixed":
            variant, prompt, answer = found[1]
            found[1] = (variant, prompt, (*answer[:-1], answer[-1] + 1))
        return found

    monkeypatch.setattr(outputs, "_answers", answer_wrongly)
    with pytest.raises(QualityGateFailed, match="mixed, variant-1: token 7 of an answer"):
        check_float32(("mixed",), subject, placement, trace, quiet)


def test_right_tokens_in_bf16_are_told_from_those_of_another_variant(subject, placement, trace):
    with System("mixed", subject, replace(placement, dtype="bfloat16")) as system:
        outcome = system.run(trace, 60.0)
    right = [
        (arrival.variant, arrival.prompt_ids, record.token_ids)
        for arrival, record in zip(trace, outcome.records, strict=True)
    ]
    assert off_shares({"mixed": right}, subject, placement, quiet)["mixed"] <= outputs.MOST_OFF
    wrong = [
        (subject.variants[0] if v != subject.variants[0] else subject.variants[1], p, t) for v, p, t in right
    ]
    with pytest.raises(QualityGateFailed, match="does not compute what it should"):
        off_shares({"mixed": wrong}, subject, placement, quiet)


def test_equal_answers_are_counted():
    def asked(answer, prompt=(1,)):
        record = Record(
            variant="a", arrival_s=0.0, token_ids=answer, token_times_s=(1.0,) * len(answer), wanted_tokens=2
        )
        return ("a", prompt, answer), record

    shares = equal_shares(
        {
            "single": [asked((1, 2))],
            "mixed": [asked((1, 2)), asked((1, 3))],
            "fcfs": [asked((5, 6), prompt=(2,))],
            "unfinished": [asked((1,))],
        }
    )
    assert shares == {"single": 1.0, "mixed": 0.5, "fcfs": 1.0}
