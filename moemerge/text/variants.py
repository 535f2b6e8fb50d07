"""What a variant needs to read and write text: tokenizer, chat template, limits, recommended settings."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from moemerge.bundle.reader import Bundle
from moemerge.checkpoint.tokenizer import VariantTokenizer, load_json, load_tokenizer
from moemerge.errors import InvalidRecipe, NotFound
from moemerge.runner.sampling import Sampling
from moemerge.text.reasoning import CLOSE, OPEN, ReasoningText, Stage
from moemerge.text.templates import ChatTemplate, Message, load_chat_template

_TAG_TOKENS = 16
"""Tokens at the end of a prompt that are looked at for an opening tag; it may be one for each character."""
_RECOMMENDED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class VariantText:
    """The text side of one variant; files are read when they are first needed.

    Attributes:
        name: The variant.
        where: How messages name it.
    """

    def __init__(self, bundle: Bundle, name: str) -> None:
        """Look a variant up.

        Raises:
            NotFound: The bundle has no such variant.
        """
        self.name = name
        self.where = f"{bundle.folder}, variant {name}"
        self._settings = bundle.variant(name).settings
        self._find = lambda file: bundle.side_file(name, file)
        self.is_encoder_decoder = bundle.family.arithmetic == "encoder_decoder"

    @cached_property
    def tokenizer(self) -> VariantTokenizer:
        """Its tokenizer.

        Raises:
            NotFound, DamagedInput: It has none, or a damaged one.
        """
        return load_tokenizer(self._find, self.where)

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """Its chat template, if it has one.

        Raises:
            DamagedInput: It is not one.
        """
        return load_chat_template(self._find, self.where)

    def require_chat_template(self) -> ChatTemplate:
        """The chat template, for a variant that must have one.

        Raises:
            NotFound: It has none.
            DamagedInput: It is not one.
        """
        if self.chat_template is None:
            raise NotFound(
                f"{self.where}: has no chat template. Ask it to continue a text, or put a "
                f"chat_template.jinja next to the weights and build the bundle again"
            )
        return self.chat_template

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end its answers: those of its configuration, and its tokenizer's end of text."""
        token = load_json(self._find, "tokenizer_config.json").get("eos_token")
        name = token.get("content") if isinstance(token, dict) else token
        token_id = self.tokenizer.id_of(name) if isinstance(name, str) else None
        return self.tokenizer.stop_token_ids | (frozenset() if token_id is None else {token_id})

    @property
    def vocab_size(self) -> int:
        """Token ids of prompts are below it."""
        return int(self._settings["vocab_size"] or 0)

    @property
    def context_tokens(self) -> int | None:
        """Most tokens of prompt and answer together; None where positions have no end."""
        value = self._settings.get("max_positions")
        return None if value is None else int(value)

    def room(self, num_prompt_tokens: int) -> int | None:
        """Tokens that the context leaves for the answer to a prompt; None where it has no end."""
        context = self.context_tokens
        if context is None:
            return None
        left = max(0, context - num_prompt_tokens)
        # An encoder-decoder reads the prompt apart: it and the answer have a context each.
        return context if self.is_encoder_decoder and left else left

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """A prompt's token ids.

        Raises:
            InvalidRecipe: The text is not valid Unicode.
        """
        return tuple(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return self.tokenizer.decode(token_ids)

    def render_chat(self, messages: Sequence[Message], **options: Any) -> str:
        """A conversation as the variant was tuned on it, up to where its answer begins.

        Args:
            messages: See `ChatTemplate.render`, also for `options`.

        Raises:
            NotFound: It has no chat template.
            InvalidRecipe: The template refuses the messages.
        """
        return self.require_chat_template().render(messages, **options)

    def encode_chat(self, messages: Sequence[Message], **options: Any) -> tuple[int, ...]:
        """The token ids of `render_chat`; templates write special tokens themselves."""
        return self.encode(self.render_chat(messages, **options), add_special_tokens=False)

    def reasoning(self, prompt_ids: Sequence[int]) -> ReasoningText:
        """What tells thinking and answer apart in what follows these tokens of a conversation.

        Variants think whose chat template knows the closing tag; of others all is the answer.
        """
        template = self.chat_template
        if template is None or not any(CLOSE in source for source in template.sources.values()):
            return ReasoningText(Stage.ANSWERING)
        end = self.tokenizer.decode(list(prompt_ids[-_TAG_TOKENS:]), skip_special_tokens=False)
        return ReasoningText(Stage.THINKING if end.rstrip().endswith(OPEN) else Stage.BEFORE)

    def context_of_answer(self, prompt_ids: Sequence[int]) -> Sequence[int]:
        """The tokens that the text of an answer follows on: an encoder-decoder's answer stands alone."""
        return () if self.is_encoder_decoder else prompt_ids

    def recommended(self, otherwise: float = 0.0) -> Sampling:
        """Sampling as the variant's `generation_config.json` recommends it.

        What truncates counts only where it asks to sample, a repetition penalty always.

        Args:
            otherwise: Temperature where it says neither to sample nor to be greedy.

        Raises:
            InvalidRecipe: Its values cannot be.
        """
        config = load_json(self._find, "generation_config.json")
        samples = config.get("do_sample")
        names = _RECOMMENDED if samples is True else ("repetition_penalty",)
        given: dict[str, Any] = {"temperature": 1.0 if samples else otherwise if samples is None else 0.0}
        given |= {name: config[name] for name in names if config.get(name) is not None}
        try:
            return Sampling(**given)
        except InvalidRecipe as error:
            raise InvalidRecipe(f"{self.where}: generation_config.json: {error}") from error


class BundleText:
    """The text side of a bundle's variants, each looked up once. For one thread at a time."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self._variants: dict[str, VariantText] = {}

    def of(self, name: str) -> VariantText:
        """A variant's.

        Raises:
            NotFound: The bundle has no such variant.
        """
        if name not in self._variants:
            self._variants[name] = VariantText(self.bundle, name)
        return self._variants[name]
