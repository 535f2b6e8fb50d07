"""A replica: one engine over one bundle, whose outputs are streamed to whoever sent the request."""

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray import serve

from moemerge.bundle.reader import open_bundle
from moemerge.distributed.routing import swap_tokens_of, tokens_of
from moemerge.errors import MoemergeError, ServingError
from moemerge.runner.engine import Engine
from moemerge.runner.intake import VariantLimits
from moemerge.runner.metrics import Snapshot
from moemerge.runner.options import EngineOptions
from moemerge.runner.pages import use_huge_pages
from moemerge.runner.request import FinishReason, Output, Request
from moemerge.runner.service import EngineService

QUEUED_TOKENS = "queued_tokens"
"""What autoscaling goes by."""
_RESIDENT = ("resident", "loading")
_UNBOUNDED = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaState:
    """A replica at one moment.

    Attributes:
        replica_id: Ray's name for it.
        node_id: Of the node that it runs on.
        pid: Of its process there.
        bundle: What it serves.
        snapshot: Of its engine.
        limits: Of the variants that it serves.
        queued_tokens: Prompts and answers that are still to be computed, answers at their longest.
    """

    replica_id: str
    node_id: str
    pid: int
    bundle: str
    snapshot: Snapshot
    limits: Mapping[str, VariantLimits]
    queued_tokens: int

    @property
    def residents(self) -> list[str]:
        """Variants in memory or on their way."""
        return [name for name, state in self.snapshot.variants.items() if state.state in _RESIDENT]


class Replica:
    """Deployed by `deployment`; queues are bounded by the front door.

    Args:
        folder: The bundle, on a path that this node sees.
        version: Changes when the bundle does, so that replicas are replaced.
        options: Of the engine.
        threads: Of torch.
    """

    def __init__(self, folder: str, version: str, options: EngineOptions, threads: int) -> None:
        use_huge_pages()
        torch.set_num_threads(threads)
        self._bundle = open_bundle(Path(folder))
        engine = Engine(self._bundle, options)
        engine.preload()
        self._service = EngineService(engine, max_queue=_UNBOUNDED)
        self._service.start()
        self._rows = max(1, len([s for s in engine.snapshot().variants.values() if s.state in _RESIDENT]))
        self._step_tokens = options.max_step_tokens
        self._left: dict[str, int] = {}

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """Outputs as they come; whoever stops reading cancels the request."""
        loop, outputs = asyncio.get_running_loop(), asyncio.Queue[Output]()
        self._left[request.request_id] = tokens_of(request)
        try:
            self._service.submit(request, lambda output: _hand_over(loop, outputs, output))
            while True:
                output = await outputs.get()
                self._left[request.request_id] -= len(output.token_ids)
                yield output
                if output.finish is not None:
                    return
        except MoemergeError as error:
            yield Output(request_id=request.request_id, finish=FinishReason.ERROR, error=str(error))
        finally:
            del self._left[request.request_id]
            self._service.cancel(request.request_id)

    def state(self) -> ReplicaState:
        """How it stands."""
        return ReplicaState(
            replica_id=serve.get_replica_context().replica_id.unique_id,
            node_id=ray.get_runtime_context().get_node_id(),
            pid=os.getpid(),
            bundle=self._bundle.folder.name,
            snapshot=self._service.snapshot(),
            limits=dict(self._service.variants),
            queued_tokens=sum(self._left.values()),
        )

    def change(self, action: str, variant: str) -> str | None:
        """Do what a front door was asked for; the message of an error.

        Args:
            action: A method of `EngineService` that takes a variant.
            variant: Its name.
        """
        try:
            getattr(self._service, action)(variant)
        except MoemergeError as error:
            return str(error)
        return None

    def record_routing_stats(self) -> dict[str, Any]:
        """What routers are told."""
        state = self.state()
        return {
            "rows": self._rows,
            "residents": state.residents,
            "queued_tokens": state.queued_tokens,
            "swap_tokens": swap_tokens_of(state.snapshot, self._step_tokens),
        }

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What decides on the number of replicas."""
        return {QUEUED_TOKENS: float(sum(self._left.values()))}

    def check_health(self) -> None:
        """Whether the engine's thread lives.

        Raises:
            ServingError: It does not; the replica is replaced.
        """
        if not self._service.is_alive:
            raise ServingError("the engine has stopped")


def _hand_over(loop: asyncio.AbstractEventLoop, outputs: "asyncio.Queue[Output]", output: Output) -> None:
    """From the engine's thread; a loop that has closed reads no more."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(outputs.put_nowait, output)
