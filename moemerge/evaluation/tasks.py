"""Accuracy of an encoder-decoder on text-to-text tasks: exact match of the greedy answer."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moemerge.errors import InvalidRecipe
from moemerge.models import EncoderDecoder

_BATCH = 32


@dataclass(frozen=True, slots=True)
class TaskRow:
    """One question and its answer."""

    input: str
    target: str


def read_task(path: Path, limit: int | None = None) -> list[TaskRow]:
    """Rows of a JSON-lines file with `input` and `target`.

    Raises:
        InvalidRecipe: A line that is no such object.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            value = json.loads(line)
            rows.append(TaskRow(value["input"], value["target"]))
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidRecipe(f"{path}, line {number}: expected an object with input and target") from error
    return rows[:limit]


def exact_match(
    model: EncoderDecoder,
    rows: Sequence[TaskRow],
    encode: Callable[[str], list[int]],
    decode: Callable[[list[int]], str],
    stop_ids: frozenset[int],
    max_tokens: int = 8,
) -> float:
    """Share of rows whose greedy answer equals the target, white space at the ends aside."""
    right = 0
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        answers = _answer_batch(model, [encode(row.input) for row in batch], stop_ids, max_tokens)
        right += sum(decode(a).strip() == row.target.strip() for a, row in zip(answers, batch, strict=True))
    return right / len(rows)


def _answer_batch(
    model: EncoderDecoder, prompts: list[list[int]], stop_ids: frozenset[int], max_tokens: int
) -> list[list[int]]:
    # Right padding: it takes expert capacity after the row's own tokens, never before.
    longest = max(len(prompt) for prompt in prompts)
    padding = model.config.pad_token_id
    token_ids_BS = torch.tensor([prompt + [padding] * (longest - len(prompt)) for prompt in prompts])
    mask_BS = torch.tensor([[i < len(prompt) for i in range(longest)] for prompt in prompts])
    encoded_BSD = model.encode(token_ids_BS, mask_BS)
    cache = model.new_cache(len(prompts))
    token_ids = [model.config.start_token_id] * len(prompts)
    answers: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    for _ in range(max_tokens):
        logits_BTV = model.decode(
            torch.tensor([[t] for t in token_ids]), cache, encoded_BSD, mask_BS, last_only=True
        )
        token_ids = logits_BTV[:, -1].argmax(dim=-1).tolist()
        for row, token_id in enumerate(token_ids):
            running[row] &= token_id not in stop_ids
            if running[row]:
                answers[row].append(token_id)
        if not any(running):
            break
    return answers
