"""What a request may hold, whatever its variant."""

import pytest

from moemerge.errors import InvalidRecipe
from moemerge.runner.request import Request


def request(**changes):
    return Request(**{"request_id": "a", "variant": "code", "prompt_ids": (1, 2), "max_tokens": 3, **changes})


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"prompt_ids": ()}, "the prompt is empty"),
        ({"prompt_ids": (1, -1)}, "the prompt holds -1, expected token ids of 0 or more"),
        ({"prompt_ids": (1, 2.0)}, "the prompt holds 2.0"),
        ({"prompt_ids": (True,)}, "the prompt holds True"),
        ({"prompt_ids": ("a",)}, "the prompt holds 'a'"),
        ({"stop_ids": frozenset({-3})}, "stop_ids holds -3"),
        ({"max_tokens": 0}, "max_tokens is 0, expected a whole number of at least 1"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"min_tokens": 4}, "min_tokens is 4, expected at most max_tokens, 3"),
        ({"num_logprobs": -1}, "num_logprobs is -1"),
        ({"num_prompt_logprobs": 1.0}, "num_prompt_logprobs is 1.0"),
    ],
)
def test_what_cannot_be_is_refused(changes, complaint):
    with pytest.raises(InvalidRecipe, match=complaint):
        request(**changes)


def test_what_is_at_the_edge_is_taken():
    made = request(prompt_ids=(0,), max_tokens=1, min_tokens=1, num_logprobs=0, num_prompt_logprobs=0)
    assert made.sampling.temperature == 0.0
