"""Log-probabilities in OpenAI's two forms, and which of them belong to text that was given out."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from moemerge.checkpoint.tokenizer import StreamingDecoder, VariantTokenizer
from moemerge.runner.sampling import TokenLogprob
from moemerge.server.responses import ChatLogprob, ChatLogprobs, CompletionLogprobs, TopLogprob

_BROKEN = "\N{REPLACEMENT CHARACTER}"


class PlacedLogprob(NamedTuple):
    """A token's log-probability, None for a prompt's first; and where in the text the token begins."""

    token_id: int
    logprob: TokenLogprob | None
    offset: int


class LogprobQueue:
    """Holds tokens back until their text is out: a stop string may still cut them off."""

    def __init__(self, tokenizer: VariantTokenizer, prompt_ids: Sequence[int], offset: int) -> None:
        self._decoder = StreamingDecoder(tokenizer, prompt_ids)
        self._offset = offset
        self._held: list[PlacedLogprob] = []

    def add(self, logprobs: Iterable[TokenLogprob]) -> None:
        """Tokens of the answer, in order."""
        for logprob in logprobs:
            self._held.append(PlacedLogprob(logprob.token_id, logprob, self._offset))
            self._offset += len(self._decoder.add(logprob.token_id))

    def take(self, end: int) -> list[PlacedLogprob]:
        """Those that begin before place `end` of the text."""
        count = next((n for n, placed in enumerate(self._held) if placed.offset >= end), len(self._held))
        taken, self._held = self._held[:count], self._held[count:]
        return taken

    def take_all(self) -> list[PlacedLogprob]:
        """All that are left."""
        taken, self._held = self._held, []
        return taken


def place_prompt(
    tokenizer: VariantTokenizer,
    prompt_ids: Sequence[int],
    logprobs: Sequence[TokenLogprob | None],
    text: str,
) -> list[PlacedLogprob]:
    """A prompt's tokens with their places in its text.

    Special tokens take room where the text spells them, and none where the tokenizer added them by itself.
    """
    decoder = StreamingDecoder(tokenizer, skip_special_tokens=False)
    placed, offset = [], 0
    for token_id, logprob in zip(prompt_ids, logprobs, strict=True):
        placed.append(PlacedLogprob(token_id, logprob, offset))
        is_special = token_id in tokenizer.special_ids
        if not is_special or text.startswith(tokenizer.token_text(token_id), offset):
            offset += len(decoder.add(token_id))
    return placed


class TokenNames:
    """Tokens as clients see them, remembered: the same few are named again and again."""

    def __init__(self, tokenizer: VariantTokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}
        self._bytes: dict[int, list[int]] = {}

    def text(self, token_id: int) -> str:
        """A token's text; special ones by their name."""
        if token_id not in self._texts:
            self._texts[token_id] = self._tokenizer.token_text(token_id)
        return self._texts[token_id]

    def bytes(self, token_id: int) -> list[int]:
        """The bytes of that text, also of a part of a character."""
        if token_id not in self._bytes:
            self._bytes[token_id] = list(self._tokenizer.token_bytes(token_id))
        return self._bytes[token_id]

    def key(self, token_id: int) -> str:
        """The same as a key; OpenAI's form for parts of characters."""
        text = self.text(token_id)
        return (
            "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.bytes(token_id)) if _BROKEN in text else text
        )

    def for_completion(self, placed: Sequence[PlacedLogprob]) -> CompletionLogprobs:
        """As `/v1/completions` gives them: the chosen token is always among the likeliest."""
        return CompletionLogprobs(
            tokens=[self.key(item.token_id) for item in placed],
            token_logprobs=[None if item.logprob is None else item.logprob.logprob for item in placed],
            top_logprobs=[None if item.logprob is None else self._by_key(item.logprob) for item in placed],
            text_offset=[item.offset for item in placed],
        )

    def for_chat(self, placed: Sequence[PlacedLogprob]) -> ChatLogprobs:
        """As `/v1/chat/completions` gives them."""
        return ChatLogprobs(
            content=[
                ChatLogprob(
                    **self._entry(item.token_id, item.logprob.logprob),
                    top_logprobs=[TopLogprob(**self._entry(*likely)) for likely in item.logprob.top],
                )
                for item in placed
                if item.logprob is not None
            ]
        )

    def _by_key(self, logprob: TokenLogprob) -> dict[str, float]:
        keyed: dict[str, float] = {}
        for token_id, value in (*logprob.top, (logprob.token_id, logprob.logprob)):
            keyed.setdefault(self.key(token_id), value)
        return keyed

    def _entry(self, token_id: int, logprob: float) -> dict[str, object]:
        return {"token": self.text(token_id), "logprob": logprob, "bytes": self.bytes(token_id)}
