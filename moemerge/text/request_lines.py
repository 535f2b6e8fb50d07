"""A request as a line of JSON: what it may hold, and the engine's request it stands for."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NoReturn

from moemerge.errors import InvalidRecipe
from moemerge.runner.intake import VariantLimits
from moemerge.runner.request import Request
from moemerge.runner.sampling import Sampling
from moemerge.text.limits import (
    MAX_LOGPROBS,
    check_ids,
    check_min_tokens,
    check_prompt,
    longest_answer,
    require_whole,
    show_value,
)
from moemerge.text.templates import CHAT_TEMPLATE_KWARGS
from moemerge.text.variants import BundleText, VariantText

_SAMPLING = tuple(field.name for field in fields(Sampling))
_PROMPTS = ("prompt", "messages", "prompt_ids")
_SETTINGS = ("max_tokens", "min_tokens", "stop", "ignore_stop", "logprobs", *_SAMPLING)
FIELDS = ("custom_id", "variant", *_PROMPTS, CHAT_TEMPLATE_KWARGS, *_SETTINGS)
"""Everything a line may hold."""
_DEFAULT_TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLine:
    """A checked line.

    Attributes:
        number: Of the line, from 1.
        custom_id: The user's name for it, if any.
        text: Of its variant.
        request: For the engine; its id is the number.
        is_default_length: The line does not say how long the answer may be: what does not fit is cut.
        stop: Strings that end the answer.
        is_chat: The prompt is a conversation, in which a variant may think before it answers.
    """

    number: int
    custom_id: str | None
    text: VariantText
    request: Request
    is_default_length: bool
    stop: tuple[str, ...]
    is_chat: bool

    def request_within(self, limits: VariantLimits) -> Request:
        """The request for an engine that may have less room than the variant's context."""
        if not self.is_default_length:
            return self.request
        room = limits.room(len(self.request.prompt_ids))
        return replace(self.request, max_tokens=min(self.request.max_tokens, max(1, room)))


def parse_line(raw: bytes, number: int, texts: BundleText, defaults: Mapping[str, Any]) -> RequestLine:
    """Check a line.

    Args:
        raw: The line.
        number: Its number, from 1.
        texts: Of the bundle.
        defaults: Fields of lines that do not have them. The seed of a line without one is the default plus
            its number, so that equal lines are sampled differently, and the same in each run.

    Raises:
        InvalidRecipe, NotFound: It is not a request that the bundle can answer.
    """
    given = _load(raw)
    unknown = sorted(given.keys() - set(FIELDS))
    if unknown:
        raise InvalidRecipe(f"unknown field {unknown[0]!r}; there are {', '.join(FIELDS)}")
    values = {**defaults, **given}
    if "seed" not in given and defaults.get("seed") is not None:
        values["seed"] = (defaults["seed"] + number) % 2**63
    custom_id, variant = values.get("custom_id"), values.get("variant")
    if custom_id is not None and not isinstance(custom_id, str):
        raise InvalidRecipe(f"custom_id is {show_value(custom_id)}, expected a string")
    if not isinstance(variant, str):
        found = "missing" if variant is None else show_value(variant)
        raise InvalidRecipe(f"variant is {found}, expected {_list(texts.bundle.manifest.variants)}")
    text = texts.of(variant)
    prompt_field, prompt_ids = _prompt(values, text)
    check_prompt(prompt_field, prompt_ids, text)
    asked = _whole("max_tokens", given.get("max_tokens"), least=1)
    max_tokens = longest_answer(
        text,
        len(prompt_ids),
        asked=asked,
        default=defaults.get("max_tokens", _DEFAULT_TOKENS),
        prompt_field=prompt_field,
    )
    min_tokens = _whole("min_tokens", values.get("min_tokens")) or 0
    check_min_tokens(min_tokens, max_tokens)
    return RequestLine(
        number=number,
        custom_id=custom_id,
        text=text,
        request=Request(
            request_id=str(number),
            variant=variant,
            prompt_ids=prompt_ids,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            stop_ids=text.stop_ids,
            ignore_stop=_flag("ignore_stop", values.get("ignore_stop", False)),
            num_logprobs=_whole("logprobs", values.get("logprobs"), most=MAX_LOGPROBS),
            sampling=_sampling(values, text),
        ),
        is_default_length=asked is None,
        stop=_stop(values.get("stop")),
        is_chat=prompt_field == "messages",
    )


def _load(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise InvalidRecipe(f"is not UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise InvalidRecipe(f"is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise InvalidRecipe("is not an object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _prompt(values: Mapping[str, Any], text: VariantText) -> tuple[str, tuple[Any, ...]]:
    """The field with the prompt, and its token ids."""
    given = [name for name in _PROMPTS if values.get(name) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise InvalidRecipe(f"has {found} of {', '.join(_PROMPTS)}, expected one")
    (field,) = given
    value = values[field]
    variables = values.get(CHAT_TEMPLATE_KWARGS)
    if variables is not None and (field != "messages" or not isinstance(variables, dict)):
        raise InvalidRecipe(
            f"{CHAT_TEMPLATE_KWARGS} is {show_value(variables)}, expected an object beside messages"
        )
    if field == "prompt":
        if not isinstance(value, str):
            raise InvalidRecipe(f"prompt is {show_value(value)}, expected a string")
        return field, text.encode(value)
    if not isinstance(value, list):
        raise InvalidRecipe(f"{field} is {show_value(value)}, expected a list")
    if field == "messages":
        return field, text.encode_chat(value, variables=variables)
    return field, tuple(value)


def _sampling(values: Mapping[str, Any], text: VariantText) -> Sampling:
    given = {name: values[name] for name in _SAMPLING if values.get(name) is not None}
    bias = given.get("logit_bias")
    if isinstance(bias, dict):
        # Keys of JSON objects are text.
        given["logit_bias"] = {int(k) if k.isdecimal() and len(k) < 20 else k: v for k, v in bias.items()}
    sampling = Sampling(**given)
    check_ids("logit_bias", sampling.logit_bias, text)
    return sampling


def _stop(value: object) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(strings, list | tuple) or not all(isinstance(s, str) and s for s in strings):
        raise InvalidRecipe(f"stop is {value!r}, expected text or a list of texts, none of them empty")
    return tuple(strings)


def _whole(name: str, value: object, least: int = 0, most: int | None = None) -> int | None:
    return None if value is None else require_whole(name, value, least, most)


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise InvalidRecipe(f"{name} is {show_value(value)}, expected true or false")
    return value


def _list(names: Mapping[str, object]) -> str:
    return "one of " + ", ".join(names)
