"""Thinking and answer told apart in a text as it grows.

Variants that think first put it between two tags in front of the answer. Most templates open the thinking
themselves, so that an answer has the closing tag alone. Knows nothing of tokens and of who answers.
"""

from enum import Enum, auto
from typing import NamedTuple

OPEN, CLOSE = "<think>", "</think>"


class Parts(NamedTuple):
    """What a piece of text adds to either."""

    reasoning: str
    content: str


class Stage(Enum):
    """Where a text stands."""

    BEFORE = auto()
    THINKING = auto()
    ANSWERING = auto()


class ReasoningText:
    """The two parts of one text, piece by piece, without tags and the space around them.

    Text that may be the beginning of a tag, or space in front of one, is held back until it is known not to
    be. A text that never closes its thinking is all thinking.
    """

    def __init__(self, stage: Stage) -> None:
        """Begin where the prompt ends.

        Args:
            stage: `THINKING` when the prompt has opened it, `BEFORE` when the text may begin with it,
                `ANSWERING` when nothing is to be told apart.
        """
        self._stage = stage
        self._held = ""
        self._skips_space = stage is Stage.THINKING

    def add(self, text: str) -> Parts:
        """What a piece makes certain."""
        self._held += text
        if self._stage is Stage.BEFORE and not self._decide():
            return Parts("", "")
        reasoning = self._think() if self._stage is Stage.THINKING else ""
        content = ""
        if self._stage is Stage.ANSWERING:
            content, self._held = self._without_space(self._held), ""
        return Parts(reasoning, content)

    def finish(self) -> Parts:
        """The rest of a text that has ended."""
        rest, self._held = self._held, ""
        if self._stage is Stage.THINKING:
            return Parts(self._without_space(rest).rstrip(), "")
        return Parts("", rest)

    def split(self, text: str) -> Parts:
        """A whole text."""
        first, last = self.add(text), self.finish()
        return Parts(first.reasoning + last.reasoning, first.content + last.content)

    def _decide(self) -> bool:
        """Whether it is known now if the text begins with thinking."""
        begin = self._held.lstrip()
        if begin.startswith(OPEN):
            self._stage, self._held, self._skips_space = Stage.THINKING, begin[len(OPEN) :], True
        elif OPEN.startswith(begin):
            return False
        else:
            self._stage = Stage.ANSWERING
        return True

    def _think(self) -> str:
        place = self._held.find(CLOSE)
        if place >= 0:
            reasoning = self._without_space(self._held[:place].rstrip())
            self._stage, self._held, self._skips_space = (
                Stage.ANSWERING,
                self._held[place + len(CLOSE) :],
                True,
            )
            return reasoning
        certain = len(self._held[: len(self._held) - _length_of_beginning(self._held)].rstrip())
        reasoning, self._held = self._held[:certain], self._held[certain:]
        return self._without_space(reasoning)

    def _without_space(self, text: str) -> str:
        if self._skips_space:
            text = text.lstrip()
            self._skips_space = not text
        return text


def _length_of_beginning(text: str) -> int:
    """Length of the longest end of a text with which the closing tag begins."""
    longest = min(len(text), len(CLOSE) - 1)
    return next((length for length in range(longest, 0, -1) if CLOSE.startswith(text[-length:])), 0)
