"""Accuracy on text-to-text tasks: exact match of the answer."""

from collections.abc import Callable, Sequence

from moemerge.calibration.texts import TaskRow
from moemerge.errors import UnsupportedCheckpoint
from moemerge.models import EncoderDecoder, GrowingCache, StandAlone, build_batch

Answer = Callable[[list[list[int]]], list[list[int]]]
"""From prompts to answers, both as token ids; an answer ends before its stop id."""

_BATCH = 32


def exact_match(
    answer: Answer,
    rows: Sequence[TaskRow],
    encode: Callable[[str], list[int]],
    decode: Callable[[list[int]], str],
) -> float:
    """Share of rows whose answer equals the target, white space at the ends aside."""
    right = 0
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        answers = answer([encode(row.input) for row in batch])
        right += sum(decode(a).strip() == row.target.strip() for a, row in zip(answers, batch, strict=True))
    return right / len(rows)


def greedy_answers(
    variant: StandAlone, prompts: Sequence[Sequence[int]], stop_ids: frozenset[int], max_tokens: int = 8
) -> list[list[int]]:
    """Answers of an encoder-decoder to prompts of any lengths, all at once, without their stop ids.

    Raises:
        UnsupportedCheckpoint: The family is decoder-only.
    """
    model, weights, experts = variant.model, variant.weights, variant.experts
    if not isinstance(model, EncoderDecoder):
        raise UnsupportedCheckpoint("tasks from text to text need an encoder-decoder family")
    batch = build_batch(prompts)
    encoded_TD = model.encode(batch, weights, experts)
    cache, cross = GrowingCache(), GrowingCache()
    for layer in range(model.config.num_decoder_layers):
        cross.of(batch.spans).write(layer, *model.cross_keys_and_values(layer, encoded_TD, weights))
    lengths = [len(prompt) for prompt in prompts]
    token_ids = [model.config.start_token_id] * len(prompts)
    answers: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    for past in range(max_tokens):
        batch = build_batch([[token_id] for token_id in token_ids], [past] * len(prompts))
        keys = cache.of(batch.spans)
        hidden_TD = model.decode(batch, weights, experts, keys, cross.of(batch.spans), lengths)
        token_ids = model.logits(hidden_TD, weights).argmax(dim=-1).tolist()
        for row, token_id in enumerate(token_ids):
            running[row] &= token_id not in stop_ids
            if running[row]:
                answers[row].append(token_id)
        if not any(running):
            break
    return answers
