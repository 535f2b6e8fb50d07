"""Bodies that clients send, field by field. What is not listed here is refused by name.

Fields that OpenAI has and this server has not may be sent with the value that changes nothing.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

from moemerge.text.limits import MAX_LOGPROBS

LARGEST_TOKEN_ID = 2**31 - 1
_NO_TOOLS: tuple[Any, ...] = (None, [])

TemplateVariables = Annotated[
    dict[Annotated[str, Field(max_length=64)], Any] | None,
    Field(max_length=64, description="Variables of the variant's chat template, such as enable_thinking."),
]
ModelName = Annotated[str, Field(min_length=1, max_length=256, description="Name of the variant.")]
TokenId = Annotated[int, Field(ge=0, le=LARGEST_TOKEN_ID)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
_TokenIdKey = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]
_Bias = Annotated[float, Field(ge=-100, le=100)]
_StopText = Annotated[str, Field(min_length=1, max_length=1000)]

_KINDS_OF_LIST: Mapping[type, str] = {str: "<texts>", int: "<ids>", list: "<lists of ids>"}
_KINDS_OF_TEXTS: Mapping[type, str] = {str: "<text>", list: "<list>"}


def _kind_of_prompt(value: Any) -> str | None:
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list) or not value:
        return None
    return _KINDS_OF_LIST.get(type(value[0]))


def _kind_of_texts(value: Any) -> str | None:
    return _KINDS_OF_TEXTS.get(type(value))


Prompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[str], Field(min_length=1, fail_fast=True), Tag("<texts>")]
    | Annotated[TokenIds, Tag("<ids>")]
    | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True), Tag("<lists of ids>")],
    Discriminator(
        _kind_of_prompt,
        custom_error_type="prompt_type",
        custom_error_message="expected a string, several strings, token ids, or several lists of token ids",
    ),
]
Stop = Annotated[
    Annotated[_StopText, Tag("<text>")]
    | Annotated[list[_StopText], Field(max_length=16, fail_fast=True), Tag("<list>")],
    Discriminator(
        _kind_of_texts, custom_error_type="stop_type", custom_error_message="expected a string or several"
    ),
]


class Body(BaseModel):
    """A body: known fields of their exact types and nothing else."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    # OpenAI's fields that this server lacks, each with the values that ask for nothing.
    harmless: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_harmless(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for name, values in cls.harmless.items():
            if name in value and not any(value[name] is v or value[name] == v for v in values):
                message = "{field} is not supported by this server"
                raise PydanticCustomError("unsupported_field", message, {"field": name})
        return {name: item for name, item in value.items() if name not in cls.harmless}


class StreamOptions(Body):
    """What a stream has besides the answer."""

    harmless = {"include_obfuscation": (None, False)}

    include_usage: bool = Field(False, description="A last chunk with the number of tokens.")


class GenerationBody(Body):
    """What completions and chats have in common."""

    model: ModelName
    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the likeliest token.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=LARGEST_TOKEN_ID, description="0 or -1 for all tokens.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[_TokenIdKey, _Bias] | None = Field(
        None, max_length=1024, description="Token ids and what is added to their logits."
    )
    seed: int | None = Field(None, ge=0, le=2**63 - 1, description="Answer k of several gets seed + k.")
    n: int | None = Field(None, ge=1, le=1024, description="Answers per prompt.")
    stop: Stop | None = Field(None, description="Strings that end the answer and are cut from it.")
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True)] | None = Field(None, max_length=256)
    min_tokens: int | None = Field(None, ge=0, le=LARGEST_TOKEN_ID)
    ignore_eos: bool | None = Field(None, description="Go on to the last token allowed.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Accepted and ignored.")

    @model_validator(mode="after")
    def _check_stream_options(self) -> "GenerationBody":
        if self.stream_options is not None and not self.stream:
            message = "{field} goes only with stream"
            raise PydanticCustomError("unsupported_field", message, {"field": "stream_options"})
        return self


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    harmless = {"suffix": (None, ""), "best_of": (None, 1)}

    prompt: Prompt
    max_tokens: int | None = Field(None, ge=0, le=LARGEST_TOKEN_ID, description="16 when not given.")
    echo: bool | None = Field(None, description="The prompt is part of the answer.")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="Likeliest tokens to name.")

    @model_validator(mode="before")
    @classmethod
    def _drop_best_of(cls, value: Any) -> Any:
        """As many candidates as answers is no choice."""
        if isinstance(value, dict) and "best_of" in value and value["best_of"] == value.get("n"):
            return {name: item for name, item in value.items() if name != "best_of"}
        return value


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[TextPart], Field(min_length=1, fail_fast=True), Tag("<list>")],
    Discriminator(
        _kind_of_texts,
        custom_error_type="content_type",
        custom_error_message="expected a string or parts of type text",
    ),
]


class Message(Body):
    """One message of a chat."""

    harmless = dict.fromkeys(("tool_calls", "function_call", "refusal", "annotations", "audio"), _NO_TOOLS)

    role: Literal["system", "developer", "user", "assistant", "bot"]
    content: Content
    reasoning_content: str | None = Field(None, description="What an assistant thought, for templates.")
    name: str | None = None

    @field_validator("role")
    @classmethod
    def _call_bots_assistants(cls, role: str) -> str:
        """Templates may have other words; all know this one."""
        return "assistant" if role == "bot" else role

    @property
    def text(self) -> str:
        """The parts as one."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    harmless = {
        "tools": _NO_TOOLS,
        "tool_choice": (None, "none", "auto"),
        "functions": _NO_TOOLS,
        "function_call": (None, "none", "auto"),
        "parallel_tool_calls": (None, True, False),
        "response_format": (None, {"type": "text"}),
        "modalities": (None, ["text"]),
        "service_tier": (None, "auto", "default"),
        "store": (None, False),
        "metadata": (None, {}),
        **dict.fromkeys(
            ("audio", "prediction", "reasoning_effort", "verbosity", "web_search_options"),
            (None,),
        ),
        **dict.fromkeys(("prompt_cache_key", "safety_identifier"), (None, "")),
    }

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_tokens: int | None = Field(
        None, ge=1, le=LARGEST_TOKEN_ID, description="What the context leaves, if not given."
    )
    max_completion_tokens: int | None = Field(None, ge=1, le=LARGEST_TOKEN_ID, description="The newer name.")
    chat_template_kwargs: TemplateVariables = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _check_pairs(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            message = "{field} goes only with logprobs"
            raise PydanticCustomError("unsupported_field", message, {"field": "top_logprobs"})
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            message = "{field} differs from max_tokens; send one of them"
            raise PydanticCustomError("unsupported_field", message, {"field": "max_completion_tokens"})
        return self


class TokenizeBody(Body):
    """`POST /tokenize`: a prompt, or the messages of a chat."""

    model: ModelName | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=4096)
    add_special_tokens: bool | None = Field(None, description="If not given, true for a prompt only.")
    add_generation_prompt: bool = Field(True, description="Of a chat.")
    chat_template_kwargs: TemplateVariables = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check_one_of(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            message = "either {field} or messages is needed, not both"
            raise PydanticCustomError("unsupported_field", message, {"field": "prompt"})
        if self.chat_template_kwargs and self.messages is None:
            message = "{field} goes only with messages"
            raise PydanticCustomError("unsupported_field", message, {"field": "chat_template_kwargs"})
        return self


class DetokenizeBody(Body):
    """`POST /detokenize`."""

    model: ModelName | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
