"""Systems made of the engine: one engine that stays, or a whole engine loaded at each change of variant."""

import gc
import math
import time
from collections import deque
from dataclasses import replace
from typing import Any, Protocol

from moemerge.bench.book import Book
from moemerge.bench.metrics import Record
from moemerge.bench.worker import Counts, WorkerSpec
from moemerge.bench.workloads import Trace
from moemerge.bundle.reader import Bundle, open_bundle
from moemerge.models.geometry import cache_geometry
from moemerge.runner.engine import Engine
from moemerge.runner.forward import model_of
from moemerge.runner.options import EngineOptions, choose_device, choose_dtype
from moemerge.runner.request import Request

_WARM_TOKENS = 4


class EngineHolder(Protocol):
    """Who has an engine at hand, perhaps not always the same one."""

    @property
    def engine(self) -> Engine:
        """The engine of this moment."""
        ...

    def make_ready(self, variant: str) -> bool:
        """Whether a request for the variant can be submitted to the engine now."""
        ...


class ServedEngine:
    """One engine for the whole life of the worker."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.engine = open_engine(spec, spec.variants)
        warm_up(self.engine, spec.variants)

    def run(self, trace: Trace, start_s: float, limit_s: float) -> list[Record]:
        """See `Served.run`."""
        return run_trace(self, trace, start_s, limit_s)

    def make_ready(self, variant: str) -> bool:
        """See `EngineHolder.make_ready`."""
        return True

    def counts(self) -> Counts:
        """See `Served.counts`."""
        return counts_of(self.engine)

    def probe(self, name: str, arguments: dict[str, Any]) -> Any:
        """See `Served.probe`."""
        from moemerge.bench.probes import PROBES

        return PROBES[name](self.engine, **arguments)

    def close(self) -> None:
        """See `Served.close`."""
        self.engine.close()


class ServedFullSwap:
    """One engine of one variant at a time; another variant means loading all of another model.

    First come, first served: requests join the running batch as long as they are for the loaded variant,
    and the first one for another variant waits until that batch is through. Files are read through the page
    cache.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self._engine: Engine | None = None
        self._loaded: str | None = None
        self._done = Counts()
        # What is here now stays; looking for garbage after each model then takes no time.
        gc.collect()
        gc.freeze()
        for variant in spec.variants:
            self._load(variant)
            warm_up(self.engine, (variant,))

    def run(self, trace: Trace, start_s: float, limit_s: float) -> list[Record]:
        """See `Served.run`."""
        return run_trace(self, trace, start_s, limit_s)

    def make_ready(self, variant: str) -> bool:
        """See `EngineHolder.make_ready`; loads the variant when the running batch is through."""
        if variant != self._loaded:
            if self.engine.has_work:
                return False
            self._load(variant)
        return True

    @property
    def engine(self) -> Engine:
        """The engine of the loaded variant."""
        assert self._engine is not None
        return self._engine

    def counts(self) -> Counts:
        """See `Served.counts`; a swap is the load of a whole model."""
        return self._done.plus(Counts(steps=counts_of(self.engine).steps))

    def probe(self, name: str, arguments: dict[str, Any]) -> Any:
        """See `Served.probe`; this one has nothing to probe."""
        raise NotImplementedError(name)

    def close(self) -> None:
        """See `Served.close`."""
        if self._engine:
            self._engine.close()

    def _load(self, variant: str) -> None:
        begin = time.perf_counter()
        if self._engine:
            self._done = self._done.plus(Counts(steps=counts_of(self._engine).steps))
            self._engine.close()
            # Two models at once would be more memory than this system is meant to have.
            self._engine = None
            gc.collect()
        self._engine = open_engine(self.spec, (variant,))
        self._engine.ensure_resident(variant)
        self._loaded = variant
        snapshot = self._engine.snapshot()
        moved = Counts(
            swaps=1,
            swap_bytes=snapshot.pool_bytes + snapshot.resident_bytes,
            swap_s=time.perf_counter() - begin,
        )
        self._done = self._done.plus(moved)


def run_trace(holder: EngineHolder, trace: Trace, start_s: float, limit_s: float) -> list[Record]:
    """Submit requests in order, when they are due and the engine is ready for them; see `Served.run`."""
    book = Book(trace, start_s)
    waiting = deque(range(len(trace)))
    end_s = start_s + limit_s
    while waiting or holder.engine.has_work:
        now = time.perf_counter()
        if now >= end_s:
            book.break_off(holder.engine)
            break
        while waiting and start_s + trace[waiting[0]].at_s <= now:
            if not holder.make_ready(trace[waiting[0]].variant):
                break
            holder.engine.submit(book.request(waiting.popleft()))
        if holder.engine.has_work:
            book.enter(holder.engine.step())
        else:
            time.sleep(max(0.0, min(end_s, start_s + trace[waiting[0]].at_s) - time.perf_counter()))
    return book.records()


def open_engine(spec: WorkerSpec, variants: tuple[str, ...]) -> Engine:
    """An engine that serves some variants of the bundle."""
    bundle = open_bundle(spec.bundle)
    options = EngineOptions(device=spec.device, dtype=spec.dtype, variants=variants, **spec.options)
    if spec.room_tokens is not None:
        options = replace(options, cache_memory=_cache_bytes(bundle, options, spec.room_tokens))
    return Engine(bundle, options)


def _cache_bytes(bundle: Bundle, options: EngineOptions, room_tokens: int) -> int:
    """Bytes of a cache for full batches of such sequences, whose source and answer may be kept apart."""
    geometry = cache_geometry(model_of(bundle, next(iter(bundle.manifest.variants))), options.block_tokens)
    dtype = choose_dtype(bundle, options.dtype, choose_device(options.device))
    blocks = math.ceil(room_tokens / options.block_tokens) + 2
    return options.max_batch * blocks * geometry.block_bytes(dtype)


def warm_up(engine: Engine, variants: tuple[str, ...]) -> None:
    """Let every variant answer shortly: first uses of kernels and files are not measured."""
    requests = [
        Request(
            request_id=f"warm-{variant}",
            variant=variant,
            prompt_ids=tuple(range(1, 2 * _WARM_TOKENS)),
            max_tokens=_WARM_TOKENS,
            ignore_stop=True,
        )
        for variant in variants
    ]
    for _ in engine.run(requests):
        pass


def counts_of(engine: Engine) -> Counts:
    """What an engine has counted since it was made."""
    snapshot = engine.snapshot()
    figures = [state.figures for state in snapshot.variants.values()]
    return Counts(
        swaps=sum(one.swaps for one in figures),
        swap_bytes=sum(one.swap_bytes for one in figures),
        swap_s=sum(one.swap_seconds for one in figures),
        steps=snapshot.steps.steps,
        mixed_steps=snapshot.steps.mixed,
        expert_hits=snapshot.expert_hits,
        expert_misses=snapshot.expert_misses,
    )
