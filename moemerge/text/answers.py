"""Answers as text: one request from its submission to its last word."""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moemerge.errors import ServingError
from moemerge.runner.engine import Engine
from moemerge.runner.request import FinishReason, Output, Request
from moemerge.runner.sampling import Sampling
from moemerge.text.limits import longest_answer
from moemerge.text.reasoning import Parts, ReasoningText, Stage
from moemerge.text.streaming import StreamingText
from moemerge.text.variants import VariantText


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a variant answered.

    Attributes:
        text: In a conversation without what the variant thought before.
        reasoning: That.
        token_ids: Tokens of both, of tags and of a stop string too, without the stop token.
        finish_reason: `stop`, `length`, or `cancelled`.
        seconds: Time of generation, the prompt included.
    """

    variant: str
    text: str
    reasoning: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    finish_reason: FinishReason
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "variant": self.variant,
            "text": self.text,
            "reasoning": self.reasoning,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.num_prompt_tokens,
            "seconds": self.seconds,
        }


class RunningAnswer:
    """An answer while the outputs of its request come: their text, and whether it has ended.

    When it ends by a stop string, the engine does not know: cancel the request.

    Attributes:
        request: What was asked.
        token_ids: The tokens so far, those of a stop string too.
        finish_reason: Why it has ended; None while it goes on.
        is_cut: It ended by a stop string.
        error: What went wrong, with the reason `error`.
    """

    def __init__(self, request: Request, text: VariantText, stop: Sequence[str] = ()) -> None:
        self.request = request
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.is_cut = False
        self.error: str | None = None
        self._pieces: list[str] = []
        self._stream = StreamingText(
            text.tokenizer,
            text.context_of_answer(request.prompt_ids),
            stop=stop,
            min_tokens=request.min_tokens,
        )

    @property
    def has_ended(self) -> bool:
        """Nothing more comes, whatever the engine still says."""
        return self.finish_reason is not None

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._pieces)

    def add(self, output: Output) -> str:
        """The text that an output of the engine makes certain."""
        if self.has_ended:
            return ""
        self.token_ids += output.token_ids
        piece = self._stream.add(output.token_ids)
        if output.finish is not None:
            piece += self._stream.finish()
            self.finish_reason, self.error = output.finish, output.error
        if self._stream.stopped_by is not None:
            self.finish_reason, self.is_cut = FinishReason.STOP, True
        self._pieces.append(piece)
        return piece

    def fail(self, error: str) -> None:
        """The request cannot be answered."""
        self.finish_reason, self.error = FinishReason.ERROR, error


def answer(
    engine: Engine,
    text: VariantText,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    chat: bool = False,
    write: Callable[[str], None] = lambda piece: None,
    think: Callable[[str], None] = lambda piece: None,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> Answer:
    """Let a variant answer; nothing else may be under way in the engine.

    Args:
        engine: Serves the variant.
        text: The variant's.
        prompt_ids: What it continues.
        max_tokens: Longest answer, as far as the context leaves room.
        sampling: How tokens are chosen; greedy by default.
        stop: Strings that end the answer.
        chat: Whether the prompt is a conversation, in which a variant may think before it answers.
        write: Gets the text piece by piece.
        think: Gets what the variant thinks, before.
        is_cancelled: Asked after every step; true ends the answer.

    Raises:
        ContextExceeded: The prompt leaves no room for an answer.
        InvalidRecipe, NotFound: The engine refuses the request.
        ServingError: The answer failed.
    """
    longest = longest_answer(
        text,
        len(prompt_ids),
        asked=None,
        default=max_tokens,
        limits=engine.limits_of(text.name),
        prompt_field="the prompt",
    )
    request = Request(
        request_id=uuid.uuid4().hex,
        variant=text.name,
        prompt_ids=tuple(prompt_ids),
        max_tokens=longest,
        sampling=sampling or Sampling(),
        stop_ids=text.stop_ids,
    )
    running = RunningAnswer(request, text, stop)
    parts = text.reasoning(prompt_ids) if chat else ReasoningText(Stage.ANSWERING)
    told = [Parts("", "")]

    def tell(part: Parts) -> None:
        told.append(part)
        if part.reasoning:
            think(part.reasoning)
        write(part.content)

    begin = time.perf_counter()
    engine.submit(request)
    try:
        while running.finish_reason is None:
            for output in engine.step():
                if output.request_id == request.request_id:
                    tell(parts.add(running.add(output)))
            if is_cancelled():
                engine.cancel(request.request_id)
    finally:
        engine.cancel(request.request_id)
    if running.error is not None:
        raise ServingError(f"{text.where}: {running.error}")
    tell(parts.finish())
    return Answer(
        variant=text.name,
        text="".join(part.content for part in told),
        reasoning="".join(part.reasoning for part in told),
        token_ids=tuple(running.token_ids),
        num_prompt_tokens=len(prompt_ids),
        finish_reason=running.finish_reason,
        seconds=time.perf_counter() - begin,
    )
