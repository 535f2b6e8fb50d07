"""Carries out what residency decides: sets variants aside, loads others beside the computing."""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress

from moemerge.errors import Busy, ServingError
from moemerge.runner.forward import Forward
from moemerge.runner.loader import Loader
from moemerge.runner.residency import Residency
from moemerge.runner.scheduler import Demand
from moemerge.runner.transfer import Swap, Transfer
from moemerge.runner.weights import WeightStore

_LOG = logging.getLogger(__name__)


class LoadingFailed(ServingError):
    """A variant's tensors could not be brought into device memory.

    Attributes:
        variant: Which one.
    """

    def __init__(self, variant: str, reason: Exception) -> None:
        super().__init__(f"variant {variant} could not be loaded: {reason}")
        self.variant = variant


class Swapper:
    """Moves variants in and out of device memory, on the engine's thread only."""

    def __init__(
        self,
        residency: Residency,
        store: WeightStore,
        forward: Forward,
        loader: Loader,
        on_swap: Callable[[Swap, float], None],
    ) -> None:
        """Begin with what residency says.

        Args:
            residency: Decides.
            store: Holds the variants' tensors.
            forward: Computes with them.
            loader: Copies beside the computing.
            on_swap: Told of every swap, and since when the variant was absent.
        """
        self.residency = residency
        self._store = store
        self._forward = forward
        self._loader = loader
        self._on_swap = on_swap

    @property
    def is_loading(self) -> bool:
        """A variant is on its way."""
        return self._loader.current is not None

    def advance(self, demand: Mapping[str, Demand], now_s: float) -> str | None:
        """Receive what has arrived, decide, and begin what is to be done.

        Returns:
            A draining variant whose running sequences are to be preempted now, if any.

        Raises:
            LoadingFailed: The variant on its way, or the one that was to begin, cannot be had.
        """
        self.receive(now_s)
        moves = self.residency.plan(demand, now_s)
        if moves.load is not None:
            self._loader.start(self._prepare(moves.load, moves.evict, now_s))
        return moves.empty

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the copies for the variant on its way are made, at most so long."""
        self._loader.wait(timeout_s)

    def receive(self, now_s: float) -> Swap | None:
        """Install the variant on its way if its copies are made.

        Raises:
            LoadingFailed: They could not be made.
        """
        transfer = self._loader.current
        if transfer is None:
            return None
        with self._undone_on_failure(transfer.variant):
            swap = self._loader.poll()
        if swap is not None:
            self._install(transfer, swap, now_s)
        return swap

    def settle(self, now_s: float) -> None:
        """Wait for the variant on its way; one that cannot be had is asked for again by those who need it."""
        self.wait()
        with suppress(LoadingFailed):
            self.receive(now_s)

    def ensure(self, variant: str, demand: Mapping[str, Demand], now_s: float) -> Swap:
        """Make a variant resident now, at the cost of idle ones.

        Raises:
            Busy: There is no room because others are busy or pinned.
            LoadingFailed: Its tensors cannot be had.
        """
        self.settle(now_s)
        if variant in self.residency.residents:
            kept = self._store.stored_bytes(variant)
            return Swap(variant=variant, moved_bytes=0, kept_bytes=kept, seconds=0.0)
        evict = self.residency.find_room(variant, demand, now_s)
        if evict is None:
            raise Busy(f"there is no room for variant {variant} beside those busy or pinned; try again later")
        transfer = self._prepare(variant, evict, now_s)
        with self._undone_on_failure(variant):
            swap = transfer.carry_out(is_alone=True)
        self._install(transfer, swap, now_s)
        return swap

    def remove(self, variant: str, now_s: float) -> None:
        """Forget a variant that nobody uses any more."""
        if self.residency.loading == variant:
            self.settle(now_s)
        if variant in self.residency.residents:
            self._uninstall(variant, now_s)
            self._store.release(variant)
        self.residency.unpin(variant)
        self._store.forget(variant)

    def close(self) -> None:
        """End the loader's thread."""
        self._loader.close()

    def _prepare(self, variant: str, evict: Collection[str], now_s: float) -> Transfer:
        """Set some variants aside and find memory for another one in their place."""
        for idle in evict:
            self._uninstall(idle, now_s)
        try:
            transfer = self._store.prepare(variant, instead_of=evict)
        except Exception as error:  # out of memory, or a file of the bundle is gone
            raise LoadingFailed(variant, error) from error
        self.residency.begin_loading(variant)
        return transfer

    @contextmanager
    def _undone_on_failure(self, variant: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.residency.failed(variant)
            self._store.release(variant)
            raise LoadingFailed(variant, error) from error

    def _install(self, transfer: Transfer, swap: Swap, now_s: float) -> None:
        self._store.finish(transfer)
        self.residency.loaded(swap.variant, now_s)
        weights, residuals = self._store.weights(swap.variant), self._store.residuals(swap.variant)
        self._forward.install(swap.variant, weights, residuals)
        self._on_swap(swap, self.residency.absent_since_s(swap.variant))
        _LOG.debug("%s is resident: %d bytes in %.4f s", swap.variant, swap.moved_bytes, swap.seconds)

    def _uninstall(self, variant: str, now_s: float) -> None:
        self.residency.evicted(variant, now_s)
        self._forward.uninstall(variant)
