"""Carries out what residency decides: sets variants aside, loads others beside the computing."""

import logging
from collections.abc import Callable, Mapping

from moemerge.errors import InvalidRecipe
from moemerge.runner.forward import Forward
from moemerge.runner.loader import Loader
from moemerge.runner.residency import Residency
from moemerge.runner.scheduler import Demand
from moemerge.runner.weights import Swap, WeightStore

_LOG = logging.getLogger(__name__)
_LONGEST_WAIT_S = 3600.0


class Residents:
    """The variants in device memory, used by the engine's thread only."""

    def __init__(
        self, residency: Residency, store: WeightStore, forward: Forward, on_swap: Callable[[Swap], None]
    ) -> None:
        self.residency = residency
        self.store = store
        self._forward = forward
        self._on_swap = on_swap
        self._loader = Loader(store.device)

    @property
    def is_loading(self) -> bool:
        """A variant is on its way."""
        return self._loader.current is not None

    def advance(self, demand: Mapping[str, Demand], now_s: float) -> str | None:
        """Receive what has arrived, decide, and begin what is to be done.

        Returns:
            A draining variant whose running sequences are to be preempted now, if any.
        """
        self.receive(now_s)
        moves = self.residency.plan(demand, now_s)
        for variant in moves.evict:
            self._evict(variant)
        if moves.load is not None:
            self._begin(moves.load)
        return moves.empty

    def receive(self, now_s: float, timeout_s: float = 0.0) -> Swap | None:
        """Install the variant on its way if its copies are made, waiting for them at most `timeout_s`."""
        transfer = self._loader.current
        if transfer is None:
            return None
        try:
            swap = self._loader.poll(timeout_s)
        except Exception:
            self.residency.failed(transfer.variant)
            self.store.release(transfer.variant)
            raise
        if swap is None:
            return None
        self.store.finish(transfer)
        self.residency.loaded(swap.variant, now_s)
        self._forward.install(swap.variant, self.store.weights(swap.variant))
        self._on_swap(swap)
        _LOG.debug("%s is resident: %d bytes in %.4f s", swap.variant, swap.moved_bytes, swap.seconds)
        return swap

    def ensure(self, variant: str, now_s: float) -> Swap:
        """Make a variant resident now, at the cost of idle ones.

        Raises:
            InvalidRecipe: There is no room because others are busy or pinned.
        """
        while self.is_loading:
            self.receive(now_s, _LONGEST_WAIT_S)
        if variant in self.residency.residents:
            kept = self.store.set_bytes([variant])
            return Swap(variant=variant, moved_bytes=0, kept_bytes=kept, seconds=0.0)
        # Nobody has waited longer than somebody who has waited for ever.
        moves = self.residency.plan({variant: Demand(waiting=1, waiting_since_s=float("-inf"))}, now_s)
        for idle in moves.evict:
            self._evict(idle)
        if moves.load != variant:
            raise InvalidRecipe(f"there is no room for variant {variant} beside those that are pinned")
        self._begin(variant)
        swap = self.receive(now_s, _LONGEST_WAIT_S)
        assert swap is not None
        return swap

    def remove(self, variant: str, now_s: float) -> None:
        """Forget a variant that nobody uses any more."""
        while self.residency.loading == variant:
            self.receive(now_s, _LONGEST_WAIT_S)
        if variant in self.residency.residents:
            self._evict(variant)
        self.residency.pinned.discard(variant)
        self.store.forget(variant)

    def close(self) -> None:
        """End the loader's thread."""
        self._loader.close()

    def _begin(self, variant: str) -> None:
        self.residency.begin_loading(variant)
        self._loader.start(self.store.prepare(variant))

    def _evict(self, variant: str) -> None:
        self.residency.evicted(variant)
        self._forward.uninstall(variant)
        self.store.release(variant)
