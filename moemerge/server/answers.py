"""One answer while it grows: an engine request's outputs in, pieces of text and log-probabilities out."""

from collections.abc import Sequence
from dataclasses import dataclass

from moemerge.runner.request import FinishReason, Output
from moemerge.runner.sampling import TokenLogprob
from moemerge.server import responses
from moemerge.server.logprobs import LogprobQueue, PlacedLogprob, place_prompt
from moemerge.text.streaming import StreamingText
from moemerge.text.variants import VariantText


@dataclass(frozen=True, slots=True)
class Prompt:
    """What an answer continues.

    Attributes:
        echo: Its text, when the answer is to begin with it.
    """

    token_ids: tuple[int, ...]
    echo: str | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """What an output added to an answer."""

    index: int
    text: str
    logprobs: list[PlacedLogprob]
    finish_reason: responses.FinishReason | None

    @property
    def is_empty(self) -> bool:
        """There is nothing to tell."""
        return not (self.text or self.logprobs or self.finish_reason)


def join_pieces(pieces: Sequence[Piece]) -> Piece:
    """All pieces of one answer as one."""
    return Piece(
        pieces[0].index,
        "".join(piece.text for piece in pieces),
        [placed for piece in pieces for placed in piece.logprobs],
        pieces[-1].finish_reason,
    )


class Answer:
    """One answer; `add` gets its outputs in order.

    Attributes:
        num_tokens: Tokens so far, with those of a stop string.
        has_ended: Nothing more comes, whatever the engine still says.
    """

    def __init__(
        self,
        index: int,
        prompt: Prompt,
        text: VariantText,
        *,
        stop: Sequence[str],
        min_tokens: int,
        is_empty: bool,
    ) -> None:
        """Begin.

        Args:
            index: Place among the answers of the HTTP request.
            prompt: What it continues.
            text: The variant's.
            stop: Strings that end it.
            min_tokens: Tokens in whose text they do not count.
            is_empty: Only the prompt was asked for; the token that the engine computes is dropped.
        """
        self.index = index
        self.num_tokens = 0
        self.has_ended = False
        context = text.context_of_answer(prompt.token_ids)
        self._prompt = prompt
        self._tokenizer = text.tokenizer
        self._stream = StreamingText(text.tokenizer, context, stop=stop, min_tokens=min_tokens)
        self._length = len(prompt.echo or "")
        self._logprobs = LogprobQueue(text.tokenizer, context, self._length)
        self._has_begun = False
        self._is_empty = is_empty

    def add(self, output: Output) -> Piece:
        """What an output makes certain."""
        text, placed = self._begin(output.prompt_logprobs)
        if self._is_empty:
            self.has_ended = True
            return Piece(self.index, text, placed, "length")
        self.num_tokens += len(output.token_ids)
        self._logprobs.add(output.logprobs)
        fresh = self._stream.add(output.token_ids)
        if output.finish is not None:
            fresh += self._stream.finish()
        self._length += len(fresh)
        is_cut = self._stream.stopped_by is not None
        self.has_ended = is_cut or output.finish is not None
        is_whole = self.has_ended and not is_cut
        placed += self._logprobs.take_all() if is_whole else self._logprobs.take(self._length)
        reason = self._reason(output, is_cut=is_cut) if self.has_ended else None
        return Piece(self.index, text + fresh, placed, reason)

    def _begin(self, logprobs: Sequence[TokenLogprob | None] | None) -> tuple[str, list[PlacedLogprob]]:
        """What comes first when the answer begins with the prompt."""
        echo = self._prompt.echo
        if self._has_begun or echo is None:
            return "", []
        self._has_begun = True
        placed = place_prompt(self._tokenizer, self._prompt.token_ids, logprobs, echo) if logprobs else []
        return echo, placed

    def _reason(self, output: Output, *, is_cut: bool) -> responses.FinishReason:
        return "stop" if is_cut or output.finish is FinishReason.STOP else "length"
