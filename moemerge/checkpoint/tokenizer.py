"""A variant's tokenizer and the token ids that end its answers.

The door to the tokenizers library. Rooms that deal in token ids do not need it.
"""

import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from moemerge.errors import DamagedInput, InvalidRecipe, NotFound

FileLookup = Callable[[str], Path | None]
_BROKEN = "\N{REPLACEMENT CHARACTER}"
# Of a character of four bytes that lacks the last one, decoders make one of these or three.
_LONGEST_BROKEN = 3
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_CONTEXT_TOKENS = 16
_WINDOW_TOKENS = 48


class VariantTokenizer:
    """Text to token ids and back, as one variant does it. May be used by several threads at a time."""

    def __init__(self, tokenizer: Tokenizer, stop_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self.stop_token_ids = stop_token_ids

    @cached_property
    def num_tokens(self) -> int:
        """Tokens that the tokenizer knows; a model may have more rows."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are no text."""
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids, by default with the special tokens that the tokenizer adds by itself.

        Raises:
            InvalidRecipe: The text holds half a surrogate pair, which no encoding has.
        """
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except (UnicodeError, TypeError) as error:
            raise InvalidRecipe(f"the text is not valid Unicode ({error})") from error
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text, by default without special tokens. Ids that the tokenizer does not know have no text."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def token(self, token_id: int) -> str | None:
        """A token as the vocabulary spells it, or None; for example `Ġthe`."""
        token: str | None = self._tokenizer.id_to_token(token_id)
        return token

    def id_of(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it, or None."""
        token_id: int | None = self._tokenizer.token_to_id(token)
        return token_id

    def token_text(self, token_id: int) -> str:
        """A token's text inside a sentence, special tokens included; broken characters are replaced."""
        if token_id in self.special_ids:
            return self.token(token_id) or ""
        before = self.decode(self.anchor, skip_special_tokens=False)
        text = self.decode([*self.anchor, token_id], skip_special_tokens=False)
        return text[len(before) :] if text.startswith(before) else self.decode([token_id])

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of `token_text`, also of tokens that are a part of a character."""
        text = self.token_text(token_id)
        token = self.token(token_id) or ""
        if _BROKEN not in text or _BROKEN in token:
            return text.encode()
        if self.is_byte(token_id):
            return bytes([int(token[3:5], 16)])
        return bytes(_BYTES.get(character, ord("?")) for character in token)

    def is_visible(self, token_id: int, *, skip_special_tokens: bool = True) -> bool:
        """Whether decoding looks at a token."""
        if skip_special_tokens and token_id in self.special_ids:
            return False
        return self.token(token_id) is not None

    def is_byte(self, token_id: int) -> bool:
        """Whether a token stands for one byte, as `<0xE2>` does."""
        return _BYTE.fullmatch(self.token(token_id) or "") is not None

    @cached_property
    def anchor(self) -> list[int]:
        """An ordinary word, since some decoders strip the space in front of the first one."""
        return self.encode("a", add_special_tokens=False)


def _byte_alphabet() -> dict[str, int]:
    """What the characters of byte-level vocabularies stand for.

    Source: `bytes_to_unicode` of GPT-2's encoder.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_alphabet()


class StreamingDecoder:
    """Text as tokens arrive; a character that needs more tokens waits for them.

    The pieces together are what decoding context and tokens at once adds to the context's text, unless
    single bytes (`<0xE2>`) make no character. Only a few tokens are decoded each time, however long the
    answer.
    """

    def __init__(
        self, tokenizer: VariantTokenizer, context: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        """Start after `context`, the tokens of a prompt, so that a first word keeps its space."""
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window = self._end_of(context)
        text = self._decode(self._window)
        self._shown = _certain(text)
        self._boundary = 0
        if self._shown == len(text):
            self._drop_until_boundary(text)

    def add(self, token_id: int) -> str:
        """The text that this token makes certain."""
        if not self._tokenizer.is_visible(token_id, skip_special_tokens=self._skip):
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        certain = _certain(text)
        fresh = text[self._shown : certain]
        self._shown = max(self._shown, certain)
        if certain == len(text):
            self._drop_until_boundary(text)
        elif len(self._window) > _WINDOW_TOKENS:
            self._drop_some(text)
        return fresh

    def finish(self) -> str:
        """What is left, whole characters or not."""
        text = self._decode(self._window)
        fresh = text[self._shown :]
        self._shown = len(text)
        return fresh

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip)

    def _end_of(self, context: Sequence[int]) -> list[int]:
        """As many last tokens as it takes for whole characters."""
        visible = (
            i for i in reversed(context) if self._tokenizer.is_visible(i, skip_special_tokens=self._skip)
        )
        tokens: list[int] = []
        for token_id in islice(visible, _CONTEXT_TOKENS):
            tokens.insert(0, token_id)
            text = self._decode(tokens)
            if text and _BROKEN not in text:
                break
        return tokens

    def _drop_until_boundary(self, text: str) -> None:
        """Forget what came before the last whole characters, once there is text to follow on."""
        fresh = self._window[self._boundary :]
        if text and fresh:
            # Decoders break all bytes in a row when the last ones make no character yet.
            kept = [] if self._tokenizer.is_byte(fresh[-1]) else fresh
            # A decoder that strips the first space has done so.
            self._window = kept if kept and self._decode(kept) else [*self._tokenizer.anchor, *kept]
            self._shown = len(self._decode(self._window))
        self._boundary = len(self._window)

    def _drop_some(self, text: str) -> None:
        """Split where both sides decode to what they are together, in a long run of broken characters."""
        for start in range(len(self._window) - 8, len(self._window)):
            left, right = self._decode(self._window[:start]), self._decode(self._window[start:])
            if right and left + right == text and len(left) <= self._shown:
                self._window, self._shown = self._window[start:], self._shown - len(left)
                self._boundary = 0
                return


def _certain(text: str) -> int:
    """Length of the part that further tokens do not change."""
    return max(len(text.rstrip(_BROKEN)), len(text) - _LONGEST_BROKEN)


def load_tokenizer(find: FileLookup, where: str) -> VariantTokenizer:
    """The tokenizer of a variant.

    Args:
        find: Gives the path of a side file by its original name, or None.
        where: How messages name the variant.

    Raises:
        NotFound: There is no `tokenizer.json`.
        DamagedInput: It cannot be read.
    """
    path = find("tokenizer.json")
    if path is None and find("tokenizer.model") is not None:
        raise NotFound(
            f"{where}: has a SentencePiece model (tokenizer.model) for a tokenizer class that would have to "
            f"be run, and no tokenizer.json. Convert it with tokenizers' SentencePieceUnigramTokenizer or "
            f"SentencePieceBPETokenizer, put tokenizer.json next to the weights and build the bundle again"
        )
    if path is None:
        raise NotFound(
            f"{where}: no tokenizer.json. Save the tokenizer with transformers' AutoTokenizer "
            f"(save_pretrained) next to the weights and build the bundle again"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise DamagedInput(f"{path}: not a readable tokenizer ({error})") from error
    # A prompt is never cut or padded behind the user's back.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return VariantTokenizer(tokenizer, stop_token_ids(find))


def stop_token_ids(find: FileLookup) -> frozenset[int]:
    """Ids that end an answer; the generation config wins over the config, either may be a list."""
    for name in ("generation_config.json", "config.json"):
        found = load_json(find, name).get("eos_token_id")
        ids = found if isinstance(found, list) else [found]
        if ids and all(type(token_id) is int for token_id in ids):
            return frozenset(ids)
    return frozenset()


def load_json(find: FileLookup, name: str) -> dict[str, Any]:
    """A side file's object, empty when there is no such file or something else is in it.

    Raises:
        DamagedInput: It is not JSON.
    """
    path = find(name)
    if path is None:
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedInput(f"{path}: cannot be read as JSON ({error})") from error
    return value if isinstance(value, dict) else {}
