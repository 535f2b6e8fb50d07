"""A discrete-event simulation of routing: swaps and waiting by number of variants, devices and rows.

python benchmarks/routing_simulation.py [--swap-s 0.5] [--tokens-per-s 1000] [--load 0.7]

The router is the deployment's own (`moemerge.distributed.routing`). A device computes one request after the
other at so many tokens a second; a variant that is not resident is swapped in first, in the place of that
used least recently. Arrivals are Poisson, popularity is Zipf of exponent 1. Rates are arguments.
"""

import argparse
import json
import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moemerge.bench.workloads import zipf_shares
from moemerge.distributed.routing import SWAPS, Load, rank

PROMPT_TOKENS = 4
STEP_TOKENS = 512


@dataclass(frozen=True)
class Trace:
    """Requests: when they arrive, for whom, and how long their answers are."""

    arrivals_s: Sequence[float]
    variants: Sequence[str]
    num_tokens: int


@dataclass(frozen=True)
class Simulated:
    """What came of a trace."""

    swaps: int
    mean_wait_s: float
    p99_wait_s: float


def draw_trace(
    names: Sequence[str], num_requests: int, rate: float, num_tokens: int, generator: np.random.Generator
) -> Trace:
    arrivals = np.cumsum(generator.exponential(1 / rate, num_requests))
    chosen = generator.choice(len(names), size=num_requests, p=zipf_shares(len(names)))
    return Trace(arrivals.tolist(), [names[i] for i in chosen], num_tokens)


def simulate(
    trace: Trace,
    num_devices: int,
    rows: int,
    *,
    is_aware: bool,
    swap_s: float = 0.01,
    tokens_per_s: float = 1000.0,
    swaps_counted: float = SWAPS,
    step_tokens: int = STEP_TOKENS,
) -> Simulated:
    """Carry a trace out; waits last from arrival to the begin of computing, swaps included."""
    swap_tokens = max(step_tokens, round(swaps_counted * swap_s * tokens_per_s))
    loads = {device: Load(rows=rows, swap_tokens=swap_tokens) for device in range(num_devices)}
    memory: list[OrderedDict[str, None]] = [OrderedDict() for _ in range(num_devices)]
    free_s = [0.0] * num_devices
    ends: list[list[tuple[float, str]]] = [[] for _ in range(num_devices)]
    draws = random.Random(0)  # noqa: S311 (a simulation)
    waits, swaps = [], 0
    for number, (now_s, variant) in enumerate(zip(trace.arrivals_s, trace.variants, strict=True)):
        for device, finished in enumerate(ends):
            while finished and finished[0][0] <= now_s:
                loads[device].queued.pop(finished.pop(0)[1])
        device = rank(variant, loads)[0] if is_aware else draws.randrange(num_devices)
        tokens = PROMPT_TOKENS + trace.num_tokens
        loads[device].use(variant)
        loads[device].queued[str(number)] = tokens
        begin_s = max(now_s, free_s[device])
        if variant not in memory[device]:
            swaps += 1
            begin_s += swap_s
            memory[device][variant] = None
            if len(memory[device]) > rows:
                memory[device].popitem(last=False)
        memory[device].move_to_end(variant)
        waits.append(begin_s - now_s)
        free_s[device] = begin_s + tokens / tokens_per_s
        ends[device].append((free_s[device], str(number)))
    return Simulated(swaps, float(np.mean(waits)), float(np.quantile(waits, 0.99)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--swap-s", type=float, default=0.5)
    parser.add_argument("--tokens-per-s", type=float, default=1000.0)
    parser.add_argument("--load", type=float, default=0.7, help="of all devices, swaps not counted")
    parser.add_argument("--tokens", type=int, default=200, help="of an answer")
    parser.add_argument("--requests", type=int, default=20000)
    arguments = parser.parse_args()
    for num_variants in (4, 64, 1000):
        for num_devices in (1, 2, 10, 100):
            for rows in (2, 8):
                rate = (
                    arguments.load * num_devices * arguments.tokens_per_s / (PROMPT_TOKENS + arguments.tokens)
                )
                names = [f"v{index}" for index in range(num_variants)]
                trace = draw_trace(
                    names, arguments.requests, rate, arguments.tokens, np.random.default_rng(0)
                )
                row: dict[str, object] = {"variants": num_variants, "devices": num_devices, "rows": rows}
                for title, is_aware in (("aware", True), ("random", False)):
                    found = simulate(
                        trace,
                        num_devices,
                        rows,
                        is_aware=is_aware,
                        swap_s=arguments.swap_s,
                        tokens_per_s=arguments.tokens_per_s,
                    )
                    row[f"{title}_swaps_per_100"] = round(100 * found.swaps / arguments.requests, 1)
                    row[f"{title}_mean_wait_s"] = round(found.mean_wait_s, 2)
                    row[f"{title}_p99_wait_s"] = round(found.p99_wait_s, 2)
                print(json.dumps(row))


if __name__ == "__main__":
    main()
