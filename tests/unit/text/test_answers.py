"""One answer as text, and conversations of several."""

import pytest

from moemerge.errors import NotFound
from moemerge.runner.request import Request
from moemerge.runner.sampling import Sampling
from moemerge.text.answers import RunningAnswer, answer
from moemerge.text.conversation import Conversation
from moemerge.text.limits import ContextExceeded
from moemerge.text.variants import BundleText
from tests.bundles import NAMES


@pytest.fixture
def texts(engine):
    return BundleText(engine.bundle)


def ask(engine, texts, variant="plain", prompt="a word", **options):
    text = texts.of(variant)
    return answer(engine, text, text.encode(prompt), **{"max_tokens": 12, **options})


@pytest.mark.parametrize("variant", NAMES)
def test_text_is_that_of_the_engines_tokens(variant, engine, texts):
    text = texts.of(variant)
    pieces = []
    found = ask(engine, texts, variant, write=pieces.append)
    tokens = list(engine.generate(variant, text.encode("a word"), max_tokens=12, stop_ids=text.stop_ids))
    assert list(found.token_ids) == tokens
    assert found.text == "".join(pieces) == text.decode(tokens)
    assert found.finish_reason == ("length" if len(tokens) == 12 else "stop")
    assert found.num_prompt_tokens == len(text.encode("a word"))
    assert not engine.has_work


def test_stop_string_cuts_the_text_and_ends_the_request(engine, texts):
    whole = ask(engine, texts, max_tokens=20)
    stop = whole.text[5:7]
    found = ask(engine, texts, max_tokens=20, stop=["never", stop])
    assert found.text == whole.text[: whole.text.index(stop)]
    assert found.finish_reason == "stop"
    assert len(found.token_ids) < len(whole.token_ids)
    engine.step()
    assert not engine.has_work
    engine.verify_integrity()


def test_running_answer_says_how_it_ended(engine, texts):
    text = texts.of("plain")
    whole = ask(engine, texts, max_tokens=8)

    def run(stop=(), max_tokens=8):
        request = Request(
            request_id="a", variant="plain", prompt_ids=text.encode("a word"), max_tokens=max_tokens
        )
        running = RunningAnswer(request, text, stop)
        pieces = [running.add(output) for output in engine.run([request])]
        assert running.text == "".join(pieces)
        assert running.has_ended
        return running

    ended, cut = run(), run(stop=[whole.text[3:5]])
    assert (ended.finish_reason, ended.is_cut, ended.text) == ("length", False, whole.text)
    assert (cut.finish_reason, cut.is_cut) == ("stop", True)
    # What the engine says after the end does not count.
    assert len(cut.token_ids) < len(ended.token_ids) == 8


def test_running_answer_that_fails_keeps_the_reason(engine, texts):
    request = Request(request_id="a", variant="plain", prompt_ids=(5,), max_tokens=1)
    running = RunningAnswer(request, texts.of("plain"))
    running.fail("no such luck")
    assert (running.finish_reason, running.error, running.text) == ("error", "no such luck", "")


def test_answer_can_be_stopped_between_steps(engine, texts):
    pieces = []
    found = ask(engine, texts, max_tokens=30, write=pieces.append, is_cancelled=lambda: len(pieces) > 3)
    assert found.finish_reason == "cancelled"
    assert found.text == "".join(pieces)
    assert 3 < len(found.token_ids) < 30
    engine.verify_integrity()


def test_engine_is_free_after_a_failure(engine, texts):
    def fail(piece):
        raise OSError("the pipe is closed")

    with pytest.raises(OSError, match="closed"):
        ask(engine, texts, write=fail)
    assert ask(engine, texts).text
    engine.verify_integrity()


def test_numbers_that_are_not_finite_are_told(engine, texts):
    from moemerge.errors import ServingError

    with pytest.raises(ServingError, match=r"variant plain: .*no token can be chosen"):
        ask(engine, texts, sampling=Sampling(repetition_penalty=5e-324))


def test_answer_as_json_has_all_of_it(engine, texts):
    found = ask(engine, texts, max_tokens=2).as_dict()
    assert found.keys() == {
        "variant", "text", "reasoning", "token_ids", "finish_reason", "prompt_tokens", "seconds"
    }  # fmt: skip


def say(conversation, content, **options):
    options = {"max_tokens": 4, "sampling": Sampling(), "write": lambda piece: None, **options}
    return conversation.say(content, **{"is_cancelled": lambda: False, **options})


@pytest.fixture
def conversation(decoder_engine):
    texts = BundleText(decoder_engine.bundle)
    return Conversation(engine=decoder_engine, texts=texts, text=texts.of("large"), system="be kind")


def test_turns_are_seen_by_whoever_answers_next(conversation):
    first = say(conversation, "hello")
    conversation.choose("odd")
    second = say(conversation, "and")
    rendered = conversation.text.render_chat(
        [{"role": "system", "content": "be kind"}, *conversation.messages[:3]]
    )
    assert "hello" in rendered
    assert first.text.strip() in rendered
    assert second.num_prompt_tokens == len(conversation.text.encode(rendered, add_special_tokens=False))
    assert [turn["role"] for turn in conversation.messages] == ["user", "assistant"] * 2


def test_reset_forgets_turns_and_keeps_the_system_message(conversation):
    before = say(conversation, "hello").num_prompt_tokens
    conversation.reset()
    assert say(conversation, "hello").num_prompt_tokens == before


def test_turn_that_does_not_fit_is_forgotten(conversation):
    with pytest.raises(ContextExceeded, match="context"):
        say(conversation, "word " * 40)
    assert conversation.messages == []
    assert say(conversation, "hello").text


def test_unknown_variant_is_refused_and_the_old_one_stays(conversation):
    with pytest.raises(NotFound, match="huge"):
        conversation.choose("huge")
    assert conversation.text.name == "large"
