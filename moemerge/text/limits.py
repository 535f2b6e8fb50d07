"""What a request may ask of its variant: one rule in the same words, whichever way the request came."""

import json
from collections.abc import Iterable, Sequence

from moemerge.errors import InvalidRecipe
from moemerge.runner.intake import VariantLimits
from moemerge.text.variants import VariantText

MAX_LOGPROBS = 20
"""Likeliest tokens that may be named with each token."""
_LONGEST_VALUE = 60


class InvalidRequest(InvalidRecipe):
    """A request that cannot be answered as it is.

    Attributes:
        field: At fault, by the name that the sender gave it.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field} {problem}")
        self.field = field


class ContextExceeded(InvalidRequest):
    """The context does not hold the prompt and the answer that is asked for."""


def check_prompt(field: str, prompt_ids: Sequence[object], text: VariantText) -> None:
    """A prompt has tokens, and they are the variant's.

    Raises:
        InvalidRequest: It has none, or others.
    """
    if not prompt_ids:
        raise InvalidRequest(field, "has no tokens, expected at least one")
    check_ids(field, prompt_ids, text)


def check_ids(field: str, token_ids: Iterable[object], text: VariantText) -> None:
    """All are token ids of the variant.

    Raises:
        InvalidRequest: One is not.
    """
    size = text.vocab_size
    for wrong in (i for i in token_ids if type(i) is not int or not 0 <= i < size):
        raise InvalidRequest(field, f"holds {show_value(wrong)}, expected token ids from 0 to {size - 1}")


def longest_answer(
    text: VariantText,
    num_prompt_tokens: int,
    *,
    asked: int | None,
    default: int | None,
    limits: VariantLimits | None = None,
    prompt_field: str = "prompt",
    asked_field: str = "max_tokens",
) -> int:
    """Tokens that an answer may have: what is asked for must fit, a default is cut to what fits.

    Args:
        text: The variant's.
        num_prompt_tokens: Tokens of the prompt.
        asked: Longest answer as the sender wants it; None for the default.
        default: Longest answer otherwise; None for all that the context leaves.
        limits: Of an engine, where that is known; the variant's own context if not given.
        prompt_field: What the sender calls the prompt.
        asked_field: What the sender calls the longest answer.

    Raises:
        ContextExceeded: The prompt leaves no room for an answer, or not for that one.
    """
    context = limits.context_tokens if limits else text.context_tokens
    room = (limits or text).room(num_prompt_tokens)
    if room == 0:
        raise ContextExceeded(
            prompt_field,
            f"has {num_prompt_tokens} tokens, which leave no room for an answer in a context of {context}",
        )
    if asked is None:
        return min(bound for bound in (room, default) if bound is not None)
    if room is not None and asked > room:
        raise ContextExceeded(
            asked_field,
            f"is {asked}, expected at most {room}: the context holds {context} tokens, the prompt has "
            f"{num_prompt_tokens}",
        )
    return asked


def check_min_tokens(min_tokens: int, max_tokens: int) -> None:
    """The shortest answer is not longer than the longest.

    Raises:
        InvalidRequest: It is.
    """
    if min_tokens > max_tokens:
        raise InvalidRequest("min_tokens", f"is {min_tokens}, expected at most max_tokens, {max_tokens}")


def require_whole(field: str, value: object, least: int, most: int | None = None) -> int:
    """A whole number within bounds.

    Raises:
        InvalidRequest: Something else.
    """
    if type(value) is not int:
        raise InvalidRequest(field, f"is {show_value(value)}, expected a whole number")
    if value < least:
        raise InvalidRequest(field, f"is {value}, expected at least {least}")
    if most is not None and value > most:
        raise InvalidRequest(field, f"is {value}, expected at most {most}")
    return value


def show_value(value: object) -> str:
    """A value of JSON, short enough for a message."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= _LONGEST_VALUE else shown[:_LONGEST_VALUE] + "..."
