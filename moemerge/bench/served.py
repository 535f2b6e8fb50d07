"""Kinds of systems that a worker can serve."""

from collections.abc import Callable, Mapping

from moemerge.bench.served_engine import ServedEngine, ServedFullSwap
from moemerge.bench.served_transformers import ServedTransformers
from moemerge.bench.worker import Served, WorkerSpec

KINDS: Mapping[str, Callable[[WorkerSpec], Served]] = {
    "engine": ServedEngine,
    "full-swap": ServedFullSwap,
    "transformers": ServedTransformers,
}
