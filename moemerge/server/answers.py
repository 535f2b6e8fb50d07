"""One answer as it is sent: text, and log-probabilities in their places, piece by piece."""

from collections.abc import Sequence
from dataclasses import dataclass

from moemerge.runner.request import FinishReason, Output
from moemerge.runner.sampling import TokenLogprob
from moemerge.server import responses
from moemerge.server.logprobs import LogprobQueue, PlacedLogprob, place_prompt
from moemerge.text.answers import RunningAnswer
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


class PlacedAnswer:
    """A growing answer in the pieces that clients get; `add` gets its outputs in order.

    Attributes:
        has_ended: Nothing more comes, whatever the engine still says.
    """

    def __init__(
        self, index: int, prompt: Prompt, running: RunningAnswer, text: VariantText, *, is_empty: bool
    ) -> None:
        """Begin.

        Args:
            index: Place among the answers of the HTTP request.
            prompt: What it continues.
            running: The answer itself.
            text: The variant's.
            is_empty: Only the prompt was asked for; the token that the engine computes is dropped.
        """
        self.index = index
        self.has_ended = False
        self._prompt = prompt
        self._running = running
        self._tokenizer = text.tokenizer
        self._length = len(prompt.echo or "")
        context = text.context_of_answer(prompt.token_ids)
        self._logprobs = LogprobQueue(text.tokenizer, context, self._length)
        self._has_begun = False
        self._is_empty = is_empty

    @property
    def num_tokens(self) -> int:
        """Tokens so far, with those of a stop string."""
        return len(self._running.token_ids)

    def add(self, output: Output) -> Piece:
        """What an output makes certain."""
        text, placed = self._begin(output.prompt_logprobs)
        if self._is_empty:
            self.has_ended = True
            return Piece(self.index, text, placed, "length")
        self._logprobs.add(output.logprobs)
        fresh = self._running.add(output)
        self._length += len(fresh)
        self.has_ended = self._running.has_ended
        is_whole = self.has_ended and not self._running.is_cut
        placed += self._logprobs.take_all() if is_whole else self._logprobs.take(self._length)
        return Piece(self.index, text + fresh, placed, self._finish_reason())

    def _begin(self, logprobs: Sequence[TokenLogprob | None] | None) -> tuple[str, list[PlacedLogprob]]:
        """What comes first when the answer begins with the prompt."""
        echo = self._prompt.echo
        if self._has_begun or echo is None:
            return "", []
        self._has_begun = True
        placed = place_prompt(self._tokenizer, self._prompt.token_ids, logprobs, echo) if logprobs else []
        return echo, placed

    def _finish_reason(self) -> responses.FinishReason | None:
        if not self.has_ended:
            return None
        return "stop" if self._running.finish_reason is FinishReason.STOP else "length"
