"""A request as a line of JSON: what it may hold, and the engine's request it stands for."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from moemerge.errors import InvalidRecipe
from moemerge.runner.request import Request
from moemerge.runner.sampling import Sampling
from moemerge.text.variants import BundleText, VariantText

_SAMPLING = tuple(field.name for field in fields(Sampling))
_PROMPTS = ("prompt", "messages", "prompt_ids")
_SETTINGS = ("max_tokens", "min_tokens", "stop", "ignore_stop", "logprobs", *_SAMPLING)
FIELDS = ("custom_id", "variant", *_PROMPTS, *_SETTINGS)
"""Everything a line may hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLine:
    """A checked line.

    Attributes:
        number: Of the line, from 1.
        custom_id: The user's name for it, if any.
        text: Of its variant.
        request: For the engine; its id is the number.
        stop: Strings that end the answer.
    """

    number: int
    custom_id: str | None
    text: VariantText
    request: Request
    stop: tuple[str, ...]


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
        raise InvalidRecipe(f"custom_id is {custom_id!r}, expected text")
    if not isinstance(variant, str):
        raise InvalidRecipe(f"variant is {variant!r}, expected {_list(texts.bundle.manifest.variants)}")
    text = texts.of(variant)
    prompt_ids = _prompt_ids(values, text)
    _check_vocabulary(prompt_ids, text)
    room = text.room(len(prompt_ids))
    if room == 0:
        raise InvalidRecipe(
            f"the prompt has {len(prompt_ids)} tokens, which leave no room for an answer in a context of "
            f"{text.context_tokens}"
        )
    return RequestLine(
        number=number,
        custom_id=custom_id,
        text=text,
        request=Request(
            request_id=str(number),
            variant=variant,
            prompt_ids=prompt_ids,
            max_tokens=values.get("max_tokens", 128),
            min_tokens=values.get("min_tokens", 0),
            stop_ids=text.stop_ids,
            ignore_stop=_flag("ignore_stop", values.get("ignore_stop", False)),
            num_logprobs=_whole("logprobs", values.get("logprobs")),
            sampling=_sampling(values),
        ),
        stop=_stop(values.get("stop")),
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


def _prompt_ids(values: Mapping[str, Any], text: VariantText) -> tuple[int, ...]:
    given = [name for name in _PROMPTS if values.get(name) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise InvalidRecipe(f"has {found} of {', '.join(_PROMPTS)}, expected one")
    value = values[given[0]]
    if given[0] == "prompt":
        if not isinstance(value, str):
            raise InvalidRecipe(f"prompt is {value!r}, expected text")
        return text.encode(value)
    if not isinstance(value, list):
        raise InvalidRecipe(f"{given[0]} is {value!r}, expected a list")
    return text.encode_chat(value) if given[0] == "messages" else tuple(value)


def _check_vocabulary(prompt_ids: Sequence[object], text: VariantText) -> None:
    size = text.vocab_size
    wrong = next((i for i in prompt_ids if type(i) is not int or not 0 <= i < size), None)
    if wrong is not None:
        raise InvalidRecipe(f"the prompt holds {wrong!r}, expected token ids from 0 to {size - 1}")


def _sampling(values: Mapping[str, Any]) -> Sampling:
    given = {name: values[name] for name in _SAMPLING if values.get(name) is not None}
    bias = given.get("logit_bias")
    if isinstance(bias, dict):
        # Keys of JSON objects are text.
        given["logit_bias"] = {int(k) if k.isdecimal() and len(k) < 20 else k: v for k, v in bias.items()}
    return Sampling(**given)


def _stop(value: object) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(strings, list | tuple) or not all(isinstance(s, str) and s for s in strings):
        raise InvalidRecipe(f"stop is {value!r}, expected text or a list of texts, none of them empty")
    return tuple(strings)


def _whole(name: str, value: object) -> int | None:
    if value is None or (type(value) is int and value >= 0):
        return value
    raise InvalidRecipe(f"{name} is {value!r}, expected a whole number of at least 0")


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise InvalidRecipe(f"{name} is {value!r}, expected true or false")
    return value


def _list(names: Mapping[str, object]) -> str:
    return "one of " + ", ".join(names)
