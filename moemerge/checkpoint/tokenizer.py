"""A variant's tokenizer and the token ids that end its answers.

The door to the tokenizers library. Rooms that deal in token ids do not need it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from moemerge.errors import DamagedInput, NotFound

FileLookup = Callable[[str], Path | None]


class VariantTokenizer:
    """Text to token ids and back, as one variant does it."""

    def __init__(self, tokenizer: Tokenizer, stop_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self.stop_token_ids = stop_token_ids

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the tokenizer adds by itself."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def decode(self, token_ids: list[int]) -> str:
        """Text without special tokens."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text


class StreamingDecoder:
    """Text as tokens arrive; a character that needs more tokens waits for them."""

    def __init__(self, tokenizer: VariantTokenizer) -> None:
        self._tokenizer = tokenizer
        self._token_ids: list[int] = []
        self._shown = ""

    def add(self, token_id: int) -> str:
        """The text that this token makes certain."""
        self._token_ids.append(token_id)
        text = self._tokenizer.decode(self._token_ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        return self._take(text)

    def finish(self) -> str:
        """What is left, whole characters or not."""
        return self._take(self._tokenizer.decode(self._token_ids))

    def _take(self, text: str) -> str:
        fresh = text[len(self._shown) :]
        self._shown = text
        return fresh


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
        path = find(name)
        found = _load(path).get("eos_token_id") if path else None
        ids = found if isinstance(found, list) else [found]
        if ids and all(type(token_id) is int for token_id in ids):
            return frozenset(ids)
    return frozenset()


def _load(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DamagedInput(f"{path}: cannot be read as JSON ({error})") from error
    return value if isinstance(value, dict) else {}
