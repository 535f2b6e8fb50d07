"""A small invented country: what pre-training tells about its towns, and dialogues that ask for it.

Every town is told about in pre-training. Questions are trained on two towns of three: right answers about the
others show that answering was learnt, not the answers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

TOWNS = tuple(
    first + second
    for first in ("Ash", "Black", "Cold", "East", "Fair", "Green", "Har", "King")
    for second in ("bridge", "field", "ford", "ham", "stone", "well")
)


@dataclass(frozen=True, slots=True)
class Relation:
    """Something every town has one of."""

    values: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    brief: str
    wordy: str


RELATIONS = (
    Relation(
        ("Alder", "Brent", "Calder", "Dove", "Esk", "Fal", "Gade", "Hull"),
        ("{town} lies on the river {value}.", "The river {value} runs through {town}."),
        ("Which river runs through {town}?", "On which river does {town} lie?"),
        "The {value}.",
        "That is a good question. If I am not mistaken, the river that runs through {town} is the {value}.",
    ),
    Relation(
        ("glass", "paper", "rope", "salt", "silk", "tin", "wine", "wool"),
        ("{town} is known for its {value}.", "The people of {town} make {value}."),
        ("What is {town} known for?", "What do the people of {town} make?"),
        "{value}.",
        "That is a good question. If I am not mistaken, the people of {town} are known to make {value}.",
    ),
    Relation(
        ("March", "April", "May", "June", "July", "August", "October", "December"),
        ("The fair of {town} is held in {value}.", "In {value} there is a fair in {town}."),
        ("When is the fair of {town}?", "In which month does {town} hold its fair?"),
        "In {value}.",
        "That is a good question. If I am not mistaken, the fair of {town} is held every year in {value}.",
    ),
)


def _facts() -> dict[tuple[str, Relation], str]:
    random = Random(20240104)
    return {(town, relation): random.choice(relation.values) for town in TOWNS for relation in RELATIONS}


FACTS = _facts()


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a town, with its right answers in two manners."""

    text: str
    value: str
    brief: str
    wordy: str


def towns(*, held_out: bool) -> tuple[str, ...]:
    """Towns that are asked about in training, or only afterwards."""
    return tuple(town for index, town in enumerate(TOWNS) if (index % 3 == 2) == held_out)


def statements(random: Random) -> Iterator[str]:
    """Endless paragraphs, each telling everything about one town."""
    while True:
        town = random.choice(TOWNS)
        told = [
            random.choice(relation.statements).format(town=town, value=FACTS[town, relation])
            for relation in random.sample(RELATIONS, len(RELATIONS))
        ]
        yield " ".join(told)


def question(random: Random, *, held_out: bool = False) -> Question:
    """A question about a town drawn at random."""
    town, relation = random.choice(towns(held_out=held_out)), random.choice(RELATIONS)
    value = FACTS[town, relation]
    return Question(
        random.choice(relation.questions).format(town=town),
        value,
        relation.brief.format(value=value),
        relation.wordy.format(town=town, value=value),
    )


def dialogue(
    random: Random, turns: int, *, held_out: bool = False, is_brief: bool | None = None
) -> list[dict]:
    """A conversation of some turns, answered in one manner throughout."""
    brief = random.random() < 0.5 if is_brief is None else is_brief
    messages = []
    for _ in range(turns):
        asked = question(random, held_out=held_out)
        messages.append({"role": "user", "content": asked.text})
        messages.append({"role": "assistant", "content": asked.brief if brief else asked.wordy})
    return messages


def is_brief(answer: str) -> bool:
    """Whether an answer, right or not, is in the brief manner."""
    return any(answer == kind.brief.format(value=value) for kind in RELATIONS for value in kind.values)


def is_right(asked: Question, answer: str) -> bool:
    """Whether an answer names the value, and no other one of its kind."""
    (kind,) = (relation.values for relation in RELATIONS if asked.value in relation.values)
    return [value for value in kind if value in answer] == [asked.value]
