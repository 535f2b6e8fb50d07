"""Answers to text-to-text tasks."""

from collections.abc import Sequence

from moemerge.errors import UnsupportedCheckpoint
from moemerge.models import EncoderDecoder, GrowingCache, StandAlone, build_batch


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
