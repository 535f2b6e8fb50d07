"""Token ids in, text out as it becomes certain, up to the first stop string."""

from collections.abc import Iterable, Sequence

from moemerge.checkpoint.tokenizer import StreamingDecoder, VariantTokenizer
from moemerge.errors import InvalidRecipe


class StreamingText:
    """The text of one answer, piece by piece.

    Text that may be the beginning of a stop string is held back until it is known not to be one. A stop
    string counts wherever the borders of tokens fall: the first to be complete ends the answer, of several
    complete at once the longest, and the text is cut in front of it.

    Attributes:
        stopped_by: The stop string that ended the answer; None while there is none. Nothing more comes then.
    """

    def __init__(
        self,
        tokenizer: VariantTokenizer,
        prompt_ids: Sequence[int] = (),
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> None:
        """Start an answer.

        Args:
            tokenizer: The variant's.
            prompt_ids: What the answer continues, so that its first word keeps its space; empty for an
                encoder-decoder.
            stop: Strings that end the answer.
            include_stop: Give out the stop string too.
            min_tokens: Stop strings do not count in the text of the first tokens.
            skip_special_tokens: Whether special tokens have no text.
        """
        if "" in stop:
            raise InvalidRecipe("a stop string is empty")
        self.stopped_by: str | None = None
        self._decoder = StreamingDecoder(tokenizer, prompt_ids, skip_special_tokens=skip_special_tokens)
        self._stop = sorted(stop, key=len, reverse=True)
        self._include_stop = include_stop
        self._unchecked_tokens = min_tokens
        self._held = ""

    def add(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens make certain."""
        return "".join([self._add(token_id) for token_id in token_ids])

    def finish(self) -> str:
        """The rest of an answer that ended without a stop string."""
        piece = self._release(self._decoder.finish())
        if self.stopped_by is None:
            piece, self._held = piece + self._held, ""
        return piece

    def _add(self, token_id: int) -> str:
        if self.stopped_by is not None:
            return ""
        text = self._decoder.add(token_id)
        if self._unchecked_tokens:
            self._unchecked_tokens -= 1
            return text
        return self._release(text)

    def _release(self, text: str) -> str:
        """What of the held and the new text is certainly before a stop string."""
        if self.stopped_by is not None:
            return ""
        held, self._held = self._held + text, ""
        if found := self._first_stop(held):
            begin, self.stopped_by = found
            return held[: begin + len(self.stopped_by)] if self._include_stop else held[:begin]
        keep = self._length_of_beginning(held)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def _first_stop(self, text: str) -> tuple[int, str] | None:
        """Where the first stop string to be complete begins, and which it is."""
        found = [
            (begin + len(stop), -len(stop), stop) for stop in self._stop if (begin := text.find(stop)) >= 0
        ]
        if not found:
            return None
        end, _, stop = min(found)
        return end - len(stop), stop

    def _length_of_beginning(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = min(len(text), len(self._stop[0]) - 1) if self._stop else 0
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
