"""The passages of a calibrated variant on disk, as tokens: those that were counted and those held out.

What is held out is never counted, so that what a bundle costs can be measured on it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from moemerge.calibration.texts import Passage
from moemerge.checkpoint.tensors import map_tensors
from moemerge.checkpoint.writer import memory_tensor, write_tensors

PASSAGES = "passages.safetensors"
_ONE_IN = 8
_FIRST = 3
"""The first passage that is held out: a text of fewer has too little to spare."""


class Passages(NamedTuple):
    """A variant's text in its own tokens.

    Attributes:
        counted: What statistics and repair are made from.
        held_out: What is only measured on.
    """

    counted: list[Passage]
    held_out: list[Passage]

    @classmethod
    def divide(cls, passages: Sequence[Passage]) -> Self:
        """Hold out one passage in eight, spread over the text."""
        held_out = list(passages[_FIRST::_ONE_IN])
        return cls([p for number, p in enumerate(passages) if number % _ONE_IN != _FIRST], held_out)


def spread(passages: Sequence[Passage], num_tokens: int) -> list[Passage]:
    """Passages of at most so many tokens, spread evenly over these; at least one."""
    total = sum(passage.num_tokens for passage in passages)
    if total <= num_tokens:
        return list(passages)
    count = max(1, len(passages) * num_tokens // total)
    return [passages[number * len(passages) // count] for number in range(count)]


def write_passages(passages: Passages, path: Path) -> None:
    """Keep them in a file."""
    every = [*passages.counted, *passages.held_out]
    tensors = {
        "num_counted": torch.tensor([len(passages.counted)]),
        "token_ids": _joined([p.token_ids for p in every]),
        "token_counts": torch.tensor([len(p.token_ids) for p in every]),
        "target_ids": _joined([p.target_ids for p in every]),
        "target_counts": torch.tensor([len(p.target_ids) for p in every]),
    }
    write_tensors(path, [memory_tensor(name, tensor) for name, tensor in tensors.items()], {"format": "pt"})


def read_passages(path: Path) -> Passages:
    """What `write_passages` has kept.

    Raises:
        NotFound, DamagedInput: The file is missing or damaged.
        KeyError, ValueError: Tensors are missing or do not fit each other.
    """
    tensors = map_tensors(path)
    inputs = _cut(tensors["token_ids"], tensors["token_counts"])
    targets = _cut(tensors["target_ids"], tensors["target_counts"])
    every = [Passage(own, answer) for own, answer in zip(inputs, targets, strict=True)]
    (num_counted,) = tensors["num_counted"].tolist()
    return Passages(every[:num_counted], every[num_counted:])


def _joined(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([token for row in rows for token in row], dtype=torch.int64)


def _cut(tokens: Tensor, counts: Tensor) -> list[list[int]]:
    if int(counts.sum()) != len(tokens):
        raise ValueError("as many tokens as passages say")
    return [row.tolist() for row in torch.split(tokens, counts.tolist())]
