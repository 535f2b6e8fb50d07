"""One table from our errors to HTTP, one shape, and the field at fault by its name."""

import pytest
from pydantic import TypeAdapter, ValidationError

from moemerge import errors
from moemerge.errors import DamagedBundle, MoemergeError, Overloaded, Stopping
from moemerge.server.errors import KINDS, describe, error_body, error_response, translate
from moemerge.server.requests import ChatBody, CompletionBody

MESSAGE = {"role": "user", "content": "x"}


def all_errors(ancestor=MoemergeError):
    """Those of `errors.py`; what other rooms derive from them counts as what it is derived from."""
    if ancestor.__module__ == errors.__name__:
        yield ancestor
    for child in ancestor.__subclasses__():
        yield from all_errors(child)


@pytest.mark.parametrize("kind", sorted(set(all_errors()), key=lambda kind: kind.__name__))
def test_every_error_has_a_status_and_the_one_shape(kind):
    error = Overloaded("full", retry_after_s=2.5, scope="server") if kind is Overloaded else kind("why")
    told = translate(error)
    assert 400 <= told.status_code < 600
    body = error_body(told)["error"]
    assert body.keys() == {"message", "type", "param", "code"}
    assert body["message"] == str(error)


def test_kinds_of_an_error_without_an_entry_are_its_ancestors():
    assert DamagedBundle not in KINDS
    assert translate(DamagedBundle("broken")).status_code == 500


def test_full_queues_say_when_to_come_again():
    of_variant = translate(Overloaded("full", retry_after_s=2.5, scope="variant"))
    of_server = translate(Overloaded("full", retry_after_s=0.1, scope="server"))
    assert (of_variant.status_code, of_variant.headers) == (429, {"Retry-After": "3"})
    assert (of_server.status_code, of_server.headers) == (503, {"Retry-After": "1"})
    assert "retry-after" in error_response(translate(Stopping("soon"))).headers


def test_long_messages_are_cut():
    assert len(error_body(translate(MoemergeError("x" * 10_000)))["error"]["message"]) < 2100


def finding(model, body):
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(model).validate_python(body)
    found = [{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()]
    return describe(found)


@pytest.mark.parametrize(
    ("model", "body", "param"),
    [
        (CompletionBody, {"model": "m", "prompt": "a", "flying-field": 1}, "flying-field"),
        (CompletionBody, {"model": "m", "prompt": ["a", 1]}, "prompt.1"),
        (CompletionBody, {"model": "m", "prompt": [[1], [2, "x"]]}, "prompt.1.1"),
        (CompletionBody, {"model": "m", "prompt": None}, "prompt"),
        (CompletionBody, {"model": "m", "prompt": "a", "stop": ["x", 1]}, "stop.1"),
        (CompletionBody, {"model": "m", "prompt": "a", "stop": 1}, "stop"),
        (CompletionBody, {"model": "m", "prompt": "a", "top_p": 0}, "top_p"),
        (CompletionBody, {"model": "m", "prompt": "a", "temperature": True}, "temperature"),
        (CompletionBody, {"model": "m", "prompt": "a", "stream": 1}, "stream"),
        (CompletionBody, {"model": "m", "prompt": "a", "best_of": 4}, "best_of"),
        (ChatBody, {"model": "m", "messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        (ChatBody, {"model": "m", "messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        (
            ChatBody,
            {"model": "m", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content.0.type",
        ),
        (
            ChatBody,
            {"model": "m", "messages": [{"role": "user", "content": "x", "wings": 2}]},
            "messages.0.wings",
        ),
        (ChatBody, {"model": "m", "messages": []}, "messages"),
        (ChatBody, {"model": "m", "messages": [MESSAGE], "tools": [1]}, "tools"),
        (ChatBody, 7, ""),
    ],
)
def test_the_field_at_fault_is_named(model, body, param):
    told = finding(model, body)
    assert told.status_code == 400
    assert (told.param or "") == param
    assert param in str(told.detail)


def test_many_findings_are_counted_and_long_lists_give_one():
    assert "(and 1 more)" in str(
        finding(CompletionBody, {"model": "m", "prompt": "a", "x": 1, "y": 2}).detail
    )
    assert "more)" not in str(finding(CompletionBody, {"model": "m", "prompt": [1] + ["x"] * 1000}).detail)
