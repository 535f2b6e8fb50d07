"""Steps of an engine, timed from outside: requests that differ in nothing but variant and number."""

import time
from collections.abc import Sequence

from moemerge.runner.engine import Engine
from moemerge.runner.request import Request

PROMPT = (11, 12, 13, 14)


def decode(engine: Engine, variant: str, batch: int, tokens: int) -> float:
    """Seconds per step of decoding with so many sequences of one variant, their prompts not counted."""
    for number in range(batch):
        prompt = tuple(token_id + number for token_id in PROMPT)
        engine.submit(_request(f"decode-{number}", variant, prompt, tokens + 1))
    engine.step()
    begin, steps = time.perf_counter(), 0
    while engine.has_work:
        engine.step()
        steps += 1
    return (time.perf_counter() - begin) / max(1, steps)


def resident_switch(engine: Engine, variants: Sequence[str], pairs: int) -> dict[str, list[float]]:
    """Seconds of steps of one token that follow a step of the other variant, and of the same one.

    Steps go A A B B A A B B, so each pair computes the same with and without a switch before it, one right
    after the other. Every step is a whole request of one token, so that nothing but the variant differs.

    Returns:
        `switched` and `same`, one value per pair.
    """
    times: dict[str, list[float]] = {"switched": [], "same": []}
    for number in range(-1, pairs):
        variant = variants[number % 2]
        pair = [_timed_step(engine, variant) for _ in range(2)]
        if number >= 0:
            times["switched"].append(pair[0])
            times["same"].append(pair[1])
    return times


def _timed_step(engine: Engine, variant: str) -> float:
    engine.submit(_request("step", variant, PROMPT[:1], 1))
    begin = time.perf_counter()
    engine.step()
    seconds = time.perf_counter() - begin
    assert not engine.has_work
    return seconds


def _request(request_id: str, variant: str, prompt: tuple[int, ...], tokens: int) -> Request:
    return Request(
        request_id=request_id, variant=variant, prompt_ids=prompt, max_tokens=tokens, ignore_stop=True
    )
