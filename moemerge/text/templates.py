"""Chat templates: messages to the text that a variant was tuned on, as transformers renders it.

Templates come with checkpoints from anywhere and run in `sandbox.BoundedSandbox`: one that reaches out, or
does not end, gives an error. Source of the conventions: transformers' `utils/chat_template_utils.py`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from moemerge.checkpoint.tokenizer import FileLookup, load_json
from moemerge.errors import DamagedInput, InvalidRecipe
from moemerge.text.sandbox import MAX_LENGTH, BoundedSandbox

_MAX_TEMPLATE_BYTES = 2**20
_OWN_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt")
_MAX_VARIABLES = 64
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
CHAT_TEMPLATE_KWARGS = "chat_template_kwargs"
"""What requests call a template's variables, as in vLLM."""
Message = Mapping[str, Any]


class ChatTemplate:
    """The chat templates of one variant. May be used by several threads at a time."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str], where: str) -> None:
        """Compile.

        Args:
            sources: Jinja source by name; `default`, and perhaps `tool_use`.
            special_tokens: `bos_token` and others, as the template's variables.
            where: How messages name the variant.

        Raises:
            DamagedInput: A template is not one.
        """
        self.sources = dict(sources)
        self._special_tokens = dict(special_tokens)
        self._where = where
        self._sandbox = _sandbox()
        try:
            self._templates = {
                name: self._sandbox.compile_template(source) for name, source in sources.items()
            }
        except (TemplateError, RecursionError, ValueError, OverflowError) as error:
            raise DamagedInput(f"{where}: the chat template cannot be compiled ({_reason(error)})") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: Each with `role` and mostly `content`: text, or a list of parts of type `text`.
            add_generation_prompt: End with what precedes an answer.
            tools: Descriptions of functions, for templates that know them.
            variables: More of the template's own, such as `enable_thinking`.

        Raises:
            InvalidRecipe: The template refuses the messages, fails on them, or exceeds its bounds; a variable
                is none that can be given.
        """
        plain = [_plain_message(message, number) for number, message in enumerate(messages)]
        if not plain:
            raise InvalidRecipe("messages is empty, expected at least one message")
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise InvalidRecipe(
                f"{self._where}: no default chat template; there are {', '.join(self._templates)}"
            )
        values = {
            **self._special_tokens,
            **_checked_variables(variables or {}),
            "messages": plain,
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            with self._sandbox.budget():
                return _join(self._templates[name].generate(values))
        except (TemplateError, ArithmeticError, LookupError, AttributeError, TypeError, ValueError) as error:
            raise InvalidRecipe(f"{self._where}: the chat template says: {_reason(error)}") from error
        except (RecursionError, MemoryError) as error:
            raise InvalidRecipe(f"{self._where}: the chat template does not end") from error


def load_chat_template(find: FileLookup, where: str) -> ChatTemplate | None:
    """The chat template of a variant, or None.

    A `.jinja` file wins over `chat_template.json` and the tokenizer's configuration.

    Raises:
        DamagedInput: There is something that cannot be one.
    """
    config = load_json(find, "tokenizer_config.json")
    stored = load_json(find, "chat_template.json").get("chat_template", config.get("chat_template"))
    path = find("chat_template.jinja")
    if path is not None:
        try:
            stored = path.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise DamagedInput(f"{path}: cannot be read as text ({error})") from error
    if stored is None:
        return None
    if isinstance(stored, str):
        sources = {"default": stored}
    else:
        try:
            sources = {str(entry["name"]): str(entry["template"]) for entry in stored}
        except (TypeError, KeyError) as error:
            raise DamagedInput(f"{where}: chat_template is neither text nor a list of named ones") from error
    if sum(map(len, sources.values())) > _MAX_TEMPLATE_BYTES:
        raise DamagedInput(f"{where}: the chat template is longer than {_MAX_TEMPLATE_BYTES} characters")
    return ChatTemplate(sources, _special_tokens(find, config), where)


def _special_tokens(find: FileLookup, config: Mapping[str, Any]) -> dict[str, str]:
    values = {**load_json(find, "special_tokens_map.json"), **config}
    found = {}
    for name in _SPECIAL_TOKENS:
        value = values.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found


def _plain_message(message: Message, number: int) -> dict[str, Any]:
    """Without keys that hold nothing, and with its text in one piece."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRecipe(f"messages[{number}] has no role, expected for example system, user or assistant")
    plain = {str(key): value for key, value in message.items() if value is not None}
    content = plain.get("content")
    if isinstance(content, list):
        plain["content"] = "\n".join(_part_text(part, number) for part in content)
    elif content is not None and not isinstance(content, str):
        raise InvalidRecipe(f"messages[{number}].content is {content!r}, expected text")
    return plain


def _checked_variables(variables: Mapping[str, Any]) -> Mapping[str, Any]:
    """Refuses those that the template is given anyway, or that are no names of its language."""
    if len(variables) > _MAX_VARIABLES:
        raise InvalidRecipe(
            f"{CHAT_TEMPLATE_KWARGS} has {len(variables)} entries, at most {_MAX_VARIABLES} are taken"
        )
    for name in variables:
        if name in _OWN_VARIABLES:
            raise InvalidRecipe(f"{CHAT_TEMPLATE_KWARGS} has {name}, which the template is given anyway")
        if not name.isidentifier() or name.startswith("_"):
            raise InvalidRecipe(
                f"{CHAT_TEMPLATE_KWARGS} has {name!r}, which is no name that a template can use"
            )
    return variables


def _part_text(part: object, number: int) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else part
    raise InvalidRecipe(f"messages[{number}].content has a part of type {kind!r}, expected only text")


def _join(pieces: Iterable[str]) -> str:
    text, length = [], 0
    for piece in pieces:
        length += len(piece)
        if length > MAX_LENGTH:
            raise SecurityError(f"its text is longer than {MAX_LENGTH} characters")
        text.append(piece)
    return "".join(text)


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__


class _Generation(Extension):
    """`{% generation %}`, which marks answers for training, is no more than its body."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _sandbox() -> BoundedSandbox:
    return BoundedSandbox(
        extensions=[_Generation, loopcontrols],
        filters={"tojson": _to_json},
        functions={"raise_exception": _raise_exception, "strftime_now": _strftime_now},
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, where jinja2's own filter escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
