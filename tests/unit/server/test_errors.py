"""One table from our errors to HTTP, one shape."""

import pytest

from moemerge import errors
from moemerge.errors import DamagedBundle, MoemergeError, Overloaded, Stopping
from moemerge.server.errors import KINDS, error_body, error_response, translate
from moemerge.text.limits import ContextExceeded, InvalidRequest


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
    assert body["message"].startswith(str(error))


def test_kinds_of_an_error_without_an_entry_are_its_ancestors():
    assert DamagedBundle not in KINDS
    assert translate(DamagedBundle("broken")).status_code == 500


def test_full_queues_say_when_to_come_again_and_what_would_help():
    of_variant = translate(Overloaded("full", retry_after_s=2.5, scope="variant"))
    of_server = translate(Overloaded("full", retry_after_s=0.1, scope="server"))
    assert (of_variant.status_code, of_variant.headers) == (429, {"Retry-After": "3"})
    assert (of_server.status_code, of_server.headers) == (503, {"Retry-After": "1"})
    assert "Try again in 3 s; a server with a larger --max-queue-per-variant" in of_variant.detail
    assert "Try again in 1 s; a server with a larger --max-queue lets" in of_server.detail


def test_server_that_stops_says_when_to_come_again():
    told = translate(Stopping("soon"))
    assert told.detail == "soon. Try again in 5 s"
    assert error_response(told).headers["retry-after"] == "5"


@pytest.mark.parametrize(
    ("kind", "code"), [(InvalidRequest, "invalid_value"), (ContextExceeded, "context_length_exceeded")]
)
def test_requests_that_cannot_be_answered_name_the_field(kind, code):
    error = error_body(translate(kind("prompt", "is odd")))["error"]
    assert (error["message"], error["param"], error["code"]) == ("prompt is odd", "prompt", code)


def test_long_messages_are_cut():
    assert len(error_body(translate(MoemergeError("x" * 10_000)))["error"]["message"]) < 2100
