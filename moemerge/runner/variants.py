"""The variants that are served: taken in, made resident, kept and let go. Contracts stand at `Engine`."""

import time
from collections.abc import Callable, Mapping

from moemerge.bundle.reader import Bundle
from moemerge.errors import InvalidRecipe, MoemergeError
from moemerge.runner.forward import Forward
from moemerge.runner.intake import Intake
from moemerge.runner.loader import Loader
from moemerge.runner.memory import DeviceMemory
from moemerge.runner.options import EngineOptions
from moemerge.runner.residency import Residency
from moemerge.runner.scheduler import Demand
from moemerge.runner.swapping import Swapper
from moemerge.runner.transfer import Swap


class ServedVariants:
    """Which variants take requests, and which of them are resident."""

    def __init__(
        self,
        bundle: Bundle,
        options: EngineOptions,
        memory: DeviceMemory,
        forward: Forward,
        on_swap: Callable[[Swap, float], None],
    ) -> None:
        self.intake = Intake(bundle, memory.blocks)
        self.residency = Residency(memory.fits, options.patience(), set(options.pinned))
        self.swapper = Swapper(self.residency, memory.store, forward, Loader(memory.device), on_swap)
        self._bundle = bundle
        self._memory = memory
        self._forward = forward

    def open(self, variant: str) -> None:
        """Take requests for a variant whose tensors the store knows."""
        self._forward.model(variant)
        self.intake.open(variant)

    def add(self, variant: str) -> None:
        """See `Engine.add_variant`."""
        self._bundle.variant(variant)
        if variant in self.intake.limits:
            raise InvalidRecipe(f"variant {variant} is served already")
        self._memory.store.add(variant)
        try:
            self._memory.check_fits([variant], self.residency.pinned)
            self._memory.check_planned(self.intake.limits, variant)
        except MoemergeError:
            self._memory.store.forget(variant)
            raise
        self.open(variant)

    def remove(self, variant: str) -> None:
        """See `Engine.remove_variant`; nobody uses the variant any more."""
        self.swapper.remove(variant, time.perf_counter())
        self.intake.close(variant)

    def ensure_resident(self, variant: str, demand: Mapping[str, Demand]) -> Swap:
        """See `Engine.ensure_resident`."""
        self.intake.limits_of(variant)
        return self.swapper.ensure(variant, demand, time.perf_counter())

    def preload(self, demand: Mapping[str, Demand]) -> None:
        """See `Engine.preload`."""
        for name in self.intake.limits:
            residents = self.residency.residents
            if name not in residents and self._memory.fits([*residents, name]):
                self.ensure_resident(name, demand)

    def pin(self, variant: str, demand: Mapping[str, Demand]) -> None:
        """See `Engine.pin`."""
        self.intake.limits_of(variant)
        self._memory.check_fits(self.intake.limits, {*self.residency.pinned, variant})
        self.ensure_resident(variant, demand)
        self.residency.pin(variant)

    def unpin(self, variant: str) -> None:
        """See `Engine.unpin`."""
        self.intake.limits_of(variant)
        self.residency.unpin(variant)
