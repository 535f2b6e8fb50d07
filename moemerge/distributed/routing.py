"""Which replica answers a request: one that has the variant resident, unless others have far less to do.

The choice is a plain function; `VariantRouter` asks it wherever Ray Serve routes a request.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from moemerge.runner.metrics import Snapshot
from moemerge.runner.request import Request

SWAP_TOKENS = 1024
"""Queued tokens that a swap counts as, until one was measured."""
SWAPS = 2
"""A swap counts twice: who is displaced comes back. Less moves variants too often, more lets queues grow
(`docs/scale.md`)."""
Key = TypeVar("Key")


@dataclass(slots=True)
class Load:
    """What is known of a replica.

    Attributes:
        rows: Variants that fit into its memory.
        residents: Variants that are there or on their way, the one used last at the end.
        queued: Tokens by request, that were sent and have not been answered.
        told: Tokens that the replica itself said were queued, those from elsewhere included.
        swap_tokens: Queued tokens that are waited for rather than to make a variant resident.
    """

    rows: int = 1
    residents: OrderedDict[str, None] = field(default_factory=OrderedDict)
    queued: dict[str, int] = field(default_factory=dict)
    told: int = 0
    swap_tokens: int = SWAP_TOKENS

    @property
    def tokens(self) -> int:
        """Queued tokens."""
        return max(self.told, sum(self.queued.values()))

    def use(self, variant: str) -> None:
        """A request to a variant is sent: it will be resident, in the place of that used least recently."""
        self.residents[variant] = None
        self.residents.move_to_end(variant)
        while len(self.residents) > self.rows:
            self.residents.popitem(last=False)


def rank(variant: str, loads: Mapping[Key, Load]) -> list[Key]:
    """Replicas, the best first: by queued tokens, where a swap counts as so many; then by free rows.

    Popular variants queue, spill and so become resident in more places; others stay where they are.
    """

    def cost(key: Key) -> tuple[int, int]:
        load = loads[key]
        return load.tokens + (0 if variant in load.residents else load.swap_tokens), len(load.residents)

    return sorted(loads, key=cost)


def swap_tokens_of(snapshot: Snapshot, step_tokens: int) -> int:
    """What a swap counts as, from how long swaps took and how fast tokens were computed.

    Args:
        snapshot: Of an engine.
        step_tokens: That it computes in a step; a queue that one step takes is not worth a swap.
    """
    swaps = sum(variant.figures.swaps for variant in snapshot.variants.values())
    seconds = sum(variant.figures.swap_seconds for variant in snapshot.variants.values())
    if not swaps or not snapshot.steps.tokens:
        return max(SWAP_TOKENS, step_tokens)
    measured = SWAPS * seconds / swaps * snapshot.steps.tokens / snapshot.steps.seconds
    return max(round(measured), step_tokens)


def tokens_of(request: Request) -> int:
    """What a request counts: its prompt and the longest answer."""
    return len(request.prompt_ids) + request.max_tokens


class VariantRouter(RequestRouter):
    """Routes by `rank`; the variant is the request's own."""

    def initialize_state(self, **kwargs: Any) -> None:
        """See `RequestRouter`."""
        self._loads: dict[ReplicaID, Load] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """See `RequestRouter`; every rank is one replica."""
        self._note(candidate_replicas)
        request = _request_of(pending_request)
        if request is None:
            return [list(candidate_replicas)]
        by_id = {replica.replica_id: replica for replica in candidate_replicas}
        order = rank(request.variant, {key: self._loads[key] for key in by_id})
        return [[by_id[key]] for key in order]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """See `RequestRouter`."""
        request = _request_of(pending_request)
        if request is not None and replica_id in self._loads:
            load = self._loads[replica_id]
            load.use(request.variant)
            load.queued[pending_request.metadata.internal_request_id] = tokens_of(request)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """See `RequestRouter`."""
        if replica_id in self._loads:
            self._loads[replica_id].queued.pop(internal_request_id, None)

    def _note(self, replicas: Sequence[RunningReplica]) -> None:
        """Take in what replicas said of themselves; forget those that are gone."""
        known = {replica.replica_id for replica in self.curr_replicas.values()}
        self._loads = {key: load for key, load in self._loads.items() if key in known}
        for replica in replicas:
            load = self._loads.setdefault(replica.replica_id, Load())
            stats = replica.routing_stats
            if stats:
                load.rows, load.told = stats["rows"], stats["queued_tokens"]
                load.swap_tokens = stats["swap_tokens"]
                for variant in stats["residents"]:
                    if len(load.residents) < load.rows:
                        load.residents.setdefault(variant)


def _request_of(pending: PendingRequest | None) -> Request | None:
    found = pending.args[0] if pending is not None and pending.args else None
    return found if isinstance(found, Request) else None
