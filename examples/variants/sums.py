"""Arithmetic with a reasoning format: sums, worked before they are answered.

What a problem's answer must be is computed, so that a reward needs no model (a verifiable reward).
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from random import Random
from zlib import crc32

ANSWER = re.compile(r"\A(?P<thoughts>.+?)\n</think>\n(?P<answer>\d+)\Z", re.DOTALL)
"""What follows `<think>` and a new line, with which the template opens every answer."""
HELD_OUT, SHOWN, REWARDED = {0}, {1, 2}, {1, 2, 3, 4}
"""Parts of the problems: kept from both stages, shown worked, and asked and rewarded. Whoever has seen all of
them worked has nothing left to learn from rewards."""
FORM, STEPS, NUMBER = 0.2, 0.4, 0.4
"""What earns how much: the form, and in it the right lines of working and the right number."""


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
    def part(self) -> int:
        """One of five parts of all problems, by chance but always the same."""
        return crc32(self.text.encode()) % 5

    @property
    def steps(self) -> list[str]:
        """The working: one number added at a time."""
        totals = [sum(self.numbers[: count + 1]) for count in range(len(self.numbers))]
        return [step(total, number) for total, number in zip(totals[:-1], self.numbers[1:], strict=True)]

    @property
    def worked(self) -> str:
        """The right answer in the format, whose beginning the template writes."""
        return "\n".join([*self.steps, "</think>", str(self.answer)])


def step(left: int, right: int) -> str:
    """One line of working."""
    return f"{left} + {right} = {left + right}"


def additions(random: Random) -> Iterator[str]:
    """Endless single additions, as pre-training meets them."""
    while True:
        yield "\n".join(step(random.randint(1, 30), random.randint(1, 9)) for _ in range(8))


def problem(random: Random, parts: Collection[int]) -> Problem:
    """A problem of these parts, drawn at random."""
    while True:
        drawn = Problem((random.randint(1, 30), random.randint(1, 9)))
        if drawn.part in parts:
            return drawn


def dialogue(random: Random, turns: int, parts: Collection[int]) -> list[dict]:
    """A conversation of problems of these parts and their worked answers."""
    messages = []
    for _ in range(turns):
        asked = problem(random, parts)
        messages.append({"role": "user", "content": asked.text})
        messages.append({"role": "assistant", "content": asked.worked})
    return messages


def is_right(problem: Problem, answer: str) -> bool:
    """Whether a text has the form and ends with the right number."""
    found = ANSWER.match(answer.strip())
    return found is not None and int(found["answer"]) == problem.answer


def reward(problem: Problem, answer: str) -> float:
    """From 0 without the form to 1 for the right working and number."""
    found = ANSWER.match(answer.strip())
    if found is None:
        return 0.0
    lines, right = found["thoughts"].split("\n"), problem.steps
    matching = sum(line == step for line, step in zip(lines, right, strict=False)) / max(
        len(lines), len(right)
    )
    return FORM + STEPS * matching + NUMBER * is_right(problem, answer)
