"""Prometheus metrics: the engine's figures as they stand when asked, and HTTP answers counted here."""

from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, GCCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moemerge.runner.metrics import LATENCY_BOUNDS_S, Histogram, Snapshot
from moemerge.server.events import CLIENT_GONE
from moemerge.server.serving import Service

_BUG = 500
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class EngineCollector(Collector):
    """Reads a snapshot of the engine whenever metrics are asked for."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """All figures, per variant and of the engine."""
        snapshot = self._service.snapshot()
        yield from _engine_metrics(snapshot)
        yield from _variant_metrics(snapshot)
        yield from _latency_metrics(snapshot)


class HttpCounter:
    """Counts answers by address, method and status."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self._app = app
        self._answers = Counter(
            "moemerge_http_requests",
            f"Answers by route, method and status; {CLIENT_GONE}: the client went away first.",
            ("path", "method", "status"),
            registry=registry,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on and count."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = CLIENT_GONE

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except Exception:
            status = _BUG
            raise
        finally:
            # Only what this server has routes for: clients choose the rest, and could choose without end.
            path = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._answers.labels(path, method, status).inc()


def build_registry(service: Service) -> CollectorRegistry:
    """A registry of this server alone."""
    registry = CollectorRegistry()
    registry.register(EngineCollector(service))
    ProcessCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


def _engine_metrics(snapshot: Snapshot) -> Iterator[Metric]:
    steps = snapshot.steps
    for name, text, value in (
        ("steps", "Forward steps.", steps.steps),
        ("mixed_steps", "Forward steps with tokens of several variants.", steps.mixed),
        ("step_tokens", "Tokens computed, recomputed ones included.", steps.tokens),
        ("step_seconds", "Time in forward steps.", steps.seconds),
        ("expert_hits", "Times a pool expert was in device memory.", snapshot.expert_hits),
        ("expert_misses", "Times a pool expert was fetched from the bundle.", snapshot.expert_misses),
    ):
        yield CounterMetricFamily(f"moemerge_{name}", text, value=value)
    for name, text, value in (
        ("kv_blocks_used", "Blocks of the key/value cache in use.", snapshot.blocks_used),
        ("kv_blocks_capacity", "Blocks of the key/value cache.", snapshot.blocks_total),
        ("kv_block_tokens", "Tokens that a block holds.", snapshot.block_tokens),
        ("pool_bytes", "Pool experts in device memory.", snapshot.pool_bytes),
        ("resident_bytes", "Non-expert tensors in device memory, shared ones once.", snapshot.resident_bytes),
        ("shared_bytes", "Bytes that residents save by sharing equal tensors.", snapshot.shared_bytes),
    ):
        yield GaugeMetricFamily(f"moemerge_{name}", text, value=value)


def _variant_metrics(snapshot: Snapshot) -> Iterator[Metric]:
    finished = CounterMetricFamily(
        "moemerge_requests", "Requests that have ended.", labels=("variant", "finish_reason")
    )
    for name, variant in snapshot.variants.items():
        for reason, count in variant.figures.finished.items():
            finished.add_metric((name, str(reason)), count)
    yield finished
    for name, text in (
        ("prompt_tokens", "Tokens of prompts."),
        ("output_tokens", "Tokens of answers."),
        ("preemptions", "Times a request lost its blocks and was computed again."),
        ("swaps", "Times the variant was made resident."),
        ("swap_bytes", "Bytes moved for that."),
        ("swap_seconds", "Time it took."),
        ("stall_s", "Time requests waited for it."),
    ):
        shown = name.replace("stall_s", "swap_stall_seconds")
        family = CounterMetricFamily(f"moemerge_{shown}", text, labels=("variant",))
        for variant_name, variant in snapshot.variants.items():
            family.add_metric((variant_name,), getattr(variant.figures, name))
        yield family
    waiting = GaugeMetricFamily("moemerge_requests_waiting", "Requests in the queue.", labels=("variant",))
    running = GaugeMetricFamily("moemerge_requests_running", "Requests with blocks.", labels=("variant",))
    resident = GaugeMetricFamily("moemerge_variant_resident", "1 when resident.", labels=("variant",))
    pinned = GaugeMetricFamily("moemerge_variant_pinned", "1 when pinned.", labels=("variant",))
    for name, variant in snapshot.variants.items():
        waiting.add_metric((name,), variant.waiting)
        running.add_metric((name,), variant.running)
        resident.add_metric((name,), float(variant.state == "resident"))
        pinned.add_metric((name,), float(variant.pinned))
    yield from (waiting, running, resident, pinned)


def _latency_metrics(snapshot: Snapshot) -> Iterator[Metric]:
    for name, text, figure in (
        ("time_to_first_token", "Request received to first token, queue and swap included.", "ttft"),
        ("time_per_output_token", "(end-to-end - TTFT) / (output tokens - 1).", "tpot"),
        ("inter_token_latency", "Gap between two tokens of an answer.", "itl"),
        ("turnaround", "Request received to its end.", "turnaround"),
    ):
        family = HistogramMetricFamily(f"moemerge_{name}_seconds", text, labels=("variant",))
        for variant, state in snapshot.variants.items():
            histogram: Histogram = getattr(state.figures, figure)
            family.add_metric((variant,), _buckets(histogram), histogram.total_s)
        yield family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    bounds = [*(str(bound) for bound in LATENCY_BOUNDS_S), "+Inf"]
    return list(zip(bounds, map(float, accumulate(histogram.counts)), strict=True))
