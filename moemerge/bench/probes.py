"""Measurements that look inside one engine, made in its own process.

Each is a function from an engine to plain figures; `claims` compares them with bars.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moemerge.bench.bandwidth import copy_bandwidth, read_bandwidth
from moemerge.bench.probes_decode import decode, resident_switch
from moemerge.bench.probes_plain import map_overhead
from moemerge.runner.engine import Engine
from moemerge.runner.request import Request


def token_gaps(
    engine: Engine, texts: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]]
) -> list[list[float]]:
    """For each token of each answer how much less its logit is than the largest at its place.

    Args:
        engine: Of a decoder-only family.
        texts: Variant, prompt and answer.
    """
    requests = [
        Request(
            request_id=str(number),
            variant=variant,
            prompt_ids=prompt + answer,
            max_tokens=1,
            ignore_stop=True,
            num_prompt_logprobs=1,
        )
        for number, (variant, prompt, answer) in enumerate(texts)
    ]
    gaps: list[list[float]] = [[] for _ in texts]
    for output in engine.run(requests):
        if output.prompt_logprobs is None:
            continue
        number = int(output.request_id)
        chosen = output.prompt_logprobs[len(texts[number][1]) :]
        gaps[number] = [entry.top[0][1] - entry.logprob for entry in chosen if entry is not None]
    return gaps


def cold_swap(engine: Engine, variants: Sequence[str], repeats: int) -> dict[str, list[float]]:
    """Cold swaps of an engine with one resident, and plain copies of as many bytes between them.

    Returns:
        `seconds` from asking until the variant is resident, `copy_seconds` of the copying within, `bytes`
        moved, and `bandwidth`, bytes per second of plain copies.
    """
    found: dict[str, list[float]] = {"seconds": [], "copy_seconds": [], "bytes": [], "bandwidth": []}
    for variant in variants:
        engine.ensure_resident(variant)
    for number in range(repeats):
        begin = time.perf_counter()
        swap = engine.ensure_resident(variants[number % len(variants)])
        found["seconds"].append(time.perf_counter() - begin)
        found["copy_seconds"].append(swap.seconds)
        found["bytes"].append(swap.moved_bytes)
        found["bandwidth"].append(copy_bandwidth(swap.moved_bytes, "cpu", str(engine.device), repeats=3))
    return found


def memory_read(engine: Engine, repeats: int) -> float:
    """Bytes per second at which the device's memory is read."""
    return read_bandwidth(str(engine.device), repeats=repeats)


PROBES: Mapping[str, Callable[..., Any]] = {
    "token_gaps": token_gaps,
    "resident_switch": resident_switch,
    "cold_swap": cold_swap,
    "decode": decode,
    "map_overhead": map_overhead,
    "memory_read": memory_read,
}
