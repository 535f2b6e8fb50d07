"""Bodies that ask for nothing special are accepted, whatever harmless fields they carry."""

import pytest

from moemerge.server.requests import ChatBody, CompletionBody, Message

MESSAGES = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize("prompt", ["text", ["a", "b"], [1, 2], [[1], [2, 3]], "", ["", "a"]])
def test_every_form_of_prompt_is_kept_as_it_is(prompt):
    assert CompletionBody(model="m", prompt=prompt).prompt == prompt


def test_as_many_candidates_as_answers_is_no_choice():
    assert CompletionBody.model_validate({"model": "m", "prompt": "a", "n": 3, "best_of": 3}).n == 3


def test_harmless_values_of_fields_that_are_lacking_are_dropped():
    body = {
        "model": "m", "messages": MESSAGES, "tools": [], "tool_choice": "none", "store": False,
        "response_format": {"type": "text"}, "modalities": ["text"], "metadata": None, "service_tier": "auto",
    }  # fmt: skip
    assert ChatBody.model_validate(body) == ChatBody.model_validate({"model": "m", "messages": MESSAGES})


def test_answers_may_be_sent_back_as_they_came():
    answer = {"role": "assistant", "content": "hi", "refusal": None, "tool_calls": None, "annotations": []}
    assert Message.model_validate(answer).model_dump(exclude_unset=True) == {
        "role": "assistant",
        "content": "hi",
    }


def test_parts_reach_the_template_as_parts():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert Message.model_validate({"role": "user", "content": parts}).model_dump(exclude_unset=True) == {
        "role": "user",
        "content": parts,
    }
