"""Arithmetic with a reasoning format: running sums of three or four small numbers, worked step by step.

What a problem's answer must be is computed, so that a reward needs no model (a verifiable reward).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from zlib import crc32

ANSWER = re.compile(r"\A(?P<thoughts>.+?)\n</think>\n(?P<answer>\d+)\Z", re.DOTALL)
"""What follows `<think>` and a new line, with which the template opens every answer."""
FORMAT_REWARD = 0.2
"""For the form alone; the right number adds the rest of 1."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A sum of several numbers."""

    numbers: tuple[int, ...]

    @property
    def text(self) -> str:
        """How it is asked."""
        return f"{' + '.join(map(str, self.numbers))} = ?"

    @property
    def answer(self) -> int:
        """The right number."""
        return sum(self.numbers)

    @property
    def is_held_out(self) -> bool:
        """One of five is kept from all training."""
        return crc32(self.text.encode()) % 5 == 0

    @property
    def worked(self) -> str:
        """The right answer in the format, one number added at a time; the template opens the thinking."""
        totals = [sum(self.numbers[: count + 1]) for count in range(len(self.numbers))]
        lines = [step(total, number) for total, number in zip(totals[:-1], self.numbers[1:], strict=True)]
        return "{}\n</think>\n{}".format("\n".join(lines), self.answer)


def step(left: int, right: int) -> str:
    """One line of working."""
    return f"{left} + {right} = {left + right}"


def steps(random: Random) -> Iterator[str]:
    """Endless single additions, as pre-training meets them."""
    while True:
        yield "\n".join(step(random.randint(1, 30), random.randint(1, 9)) for _ in range(8))


def problem(random: Random, *, held_out: bool = False) -> Problem:
    """A problem drawn at random."""
    while True:
        drawn = Problem(tuple(random.randint(1, 9) for _ in range(random.choice((3, 4)))))
        if drawn.is_held_out == held_out:
            return drawn


def dialogue(random: Random, turns: int, *, held_out: bool = False) -> list[dict]:
    """A conversation of problems and their worked answers."""
    messages = []
    for _ in range(turns):
        asked = problem(random, held_out=held_out)
        messages.append({"role": "user", "content": asked.text})
        messages.append({"role": "assistant", "content": asked.worked})
    return messages


def is_right(asked: int, answer: str) -> bool:
    """Whether a text has the form and ends with the right number."""
    found = ANSWER.match(answer.strip())
    return found is not None and int(found["answer"]) == asked


def reward(asked: int, answer: str) -> float:
    """A little for the form, the rest of 1 for the right number in it."""
    if not ANSWER.match(answer.strip()):
        return 0.0
    return 1.0 if is_right(asked, answer) else FORMAT_REWARD
