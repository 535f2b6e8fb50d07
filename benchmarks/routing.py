"""Variant-aware routing beside random routing, on a real deployment: swaps and time to first token.

python benchmarks/routing.py BUNDLE [--replicas 2] [--resident 2] [--requests 200] [--rate 8] [--rounds 3]

Starts a Ray cluster on this machine and deploys the bundle with each router in turn. Requests arrive as a
Poisson process, their variants are drawn with Zipf popularity of exponent 1; every round has another seed,
the same for both. Swaps are counted from the first request on. The simulation of the same requests stands
beside them (`routing_simulation.py`).
"""

import argparse
import http.client
import json
import os
import random
import socket
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from cluster_merge import start_cluster
from ray import serve
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from routing_simulation import Trace, draw_trace, simulate

from moemerge.bundle.reader import open_bundle
from moemerge.distributed import deployment
from moemerge.distributed.cluster import Cluster
from moemerge.distributed.routing import VariantRouter
from moemerge.runner.options import EngineOptions

WARM_S = 3.0


class RandomRouter(RequestRouter):
    """Any replica."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """See `RequestRouter`."""
        return [[replica] for replica in random.sample(candidate_replicas, len(candidate_replicas))]


ROUTERS: dict[str, type[Any]] = {"variant-aware": VariantRouter, "random": RandomRouter}


def first_token_s(port: int, name: str, variant: str, num_tokens: int) -> float:
    """Seconds from sending a request to its first event."""
    body = json.dumps(
        {"model": variant, "prompt": "1 + 1 =", "max_tokens": num_tokens, "stream": True, "ignore_eos": True}
    )
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    begin = time.perf_counter()
    connection.request("POST", f"/{name}/v1/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    answer.readline()
    seconds = time.perf_counter() - begin
    answer.read()
    connection.close()
    return seconds


def swaps_of(name: str) -> int:
    return sum(
        state.figures.swaps
        for replica in deployment.states_of(name)
        for state in replica.snapshot.variants.values()
    )


def replay(port: int, name: str, trace: Trace) -> tuple[int, float]:
    """Swaps, and mean seconds to the first token."""
    before, found = swaps_of(name), []

    def send(variant: str) -> None:
        found.append(first_token_s(port, name, variant, trace.num_tokens))

    threads = []
    begin = time.perf_counter()
    for arrival_s, variant in zip(trace.arrivals_s, trace.variants, strict=True):
        time.sleep(max(0.0, begin + arrival_s - time.perf_counter()))
        threads.append(threading.Thread(target=send, args=(variant,)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return swaps_of(name) - before, statistics.fmean(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--resident", type=int, default=2)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rate", type=float, default=8.0, help="requests a second")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    names = list(open_bundle(arguments.bundle).manifest.variants)
    traces = [
        draw_trace(names, arguments.requests, arguments.rate, arguments.tokens, np.random.default_rng(seed))
        for seed in range(arguments.rounds)
    ]
    cluster = start_cluster(arguments.replicas)
    rows = []
    try:
        with Cluster(cluster.address) as connected, socket.socket() as free:
            deployment.quiet_logs()
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            free.close()
            deployment.start_serving("127.0.0.1", port)
            for router, kind in ROUTERS.items():
                options = deployment.DeployOptions(
                    min_replicas=arguments.replicas,
                    max_replicas=arguments.replicas,
                    engine=EngineOptions(resident=str(arguments.resident)),
                    router=kind,
                )
                name = deployment.deploy(connected, arguments.bundle, options)
                time.sleep(WARM_S)
                for number, trace in enumerate(traces):
                    swaps, ttft_s = replay(port, name, trace)
                    simulated = simulate(
                        trace, arguments.replicas, arguments.resident, is_aware=kind is VariantRouter
                    )
                    rows.append(
                        {
                            "router": router,
                            "round": number,
                            "swaps": swaps,
                            "mean_ttft_s": round(ttft_s, 4),
                            "simulated_swaps": simulated.swaps,
                            "load_average": round(os.getloadavg()[0], 1),
                        }
                    )
                    print(json.dumps(rows[-1]), flush=True)
                deployment.withdraw([name])
            serve.shutdown()
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
