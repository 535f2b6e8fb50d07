"""The engine: requests in, tokens out, one forward step at a time.

A step computes tokens of all variants that the scheduler lets in together: the pool is shared, the
non-expert tensors are each variant's own. An engine belongs to one thread; `EngineService` gives it one.
"""

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from moemerge.bundle.reader import Bundle
from moemerge.errors import Busy, InvalidRecipe, NotFound, ServingError, UnsupportedCheckpoint
from moemerge.models import Decoder, StandAlone
from moemerge.progress import Progress
from moemerge.runner.answers import Answers
from moemerge.runner.dispatch import Dispatcher
from moemerge.runner.forward import Forward
from moemerge.runner.intake import VariantLimits
from moemerge.runner.memory import DeviceMemory
from moemerge.runner.metrics import Snapshot, StepFigures, VariantState
from moemerge.runner.options import EngineOptions
from moemerge.runner.request import FinishReason, Output, Request
from moemerge.runner.sampling import Sampling
from moemerge.runner.scheduler import Scheduler
from moemerge.runner.swapping import LoadingFailed
from moemerge.runner.transfer import Swap
from moemerge.runner.variants import ServedVariants

_LOADING_WAIT_S = 0.002
_IDLE_WAIT_S = 0.001


class Engine:
    """Serves the variants of one bundle from one device."""

    def __init__(
        self, bundle: Bundle, options: EngineOptions | None = None, progress: Progress | None = None
    ) -> None:
        """Load the pool and the pinned variants.

        Args:
            bundle: What is run.
            options: How; the defaults otherwise.
            progress: Told of bytes of the pool while it is loaded.

        Raises:
            InvalidRecipe, NotFound: Options that cannot be, or name variants that the bundle has not.
            NotEnoughRoom: Device memory does not hold what the options ask for.
            UnsupportedCheckpoint: Settings that no model here implements.
        """
        self.bundle = bundle
        self.options = options = options or EngineOptions()
        names = options.variants or tuple(bundle.manifest.variants)
        for name in (*names, *options.pinned, *options.shares):
            bundle.variant(name)
        for name in options.pinned:
            if name not in names:
                raise NotFound(f"no variant {name!r} is served; there are {', '.join(names)}")
        self._memory = memory = DeviceMemory(bundle, options, names, progress)
        self.device, self.dtype = memory.device, memory.dtype
        self._forward = Forward(bundle, memory.pool, memory.cache, memory.device)
        self.scheduler = Scheduler(memory.blocks, options.limits(), options.chosen_policy())
        self._answers = Answers(self.scheduler)
        self._served = ServedVariants(bundle, options, memory, self._forward, self._answers.note_swap)
        self._dispatcher = Dispatcher(self.scheduler, self._served.swapper)
        self._steps = StepFigures()
        self._num_generated = itertools.count()
        for name in names:
            self._served.open(name)
        for name in options.pinned:
            self.ensure_resident(name)

    # Requests

    def submit(self, request: Request) -> None:
        """Put a request in its variant's queue.

        Raises:
            NotFound: The variant is not served.
            InvalidRecipe: Its id is in use, or as `check_request`, or its log-probabilities cannot be had.
        """
        if request.request_id in self._answers.sequences:
            raise InvalidRecipe(f"request id {request.request_id!r} is in use")
        sequence = self._served.intake.begin(request)
        self._served.residency.requested(request.variant, sequence.queued_s)
        self._answers.begin(sequence)

    def cancel(self, request_id: str) -> None:
        """End a request; its blocks are free at once. One that is not there any more is passed over."""
        sequence = self._answers.sequences.get(request_id)
        if sequence is not None:
            self._answers.end(sequence, FinishReason.CANCELLED)

    def fail_all(self, error: str) -> None:
        """End all requests with an error; for a step that did not come to its end."""
        self._answers.end_all(FinishReason.ERROR, error)

    @property
    def has_work(self) -> bool:
        """There is something to compute or to tell."""
        return self.scheduler.has_work or self._answers.has_untold

    def step(self) -> list[Output]:
        """Do one forward step, or wait a moment for a variant that is being loaded.

        Returns:
            What there is to tell, also about requests that were cancelled since the last step.
        """
        begin_s = time.perf_counter()
        self._move_variants(begin_s)
        plan = self._dispatcher.plan(begin_s)
        self._answers.note_preempted(plan.preempted)
        if plan.work:
            results = self._forward.compute(plan.work)
            self._dispatcher.computed(plan)
            self._answers.choose(results)
            self._steps.add(
                num_variants=len({work.sequence.variant for work in plan.work}),
                num_tokens=sum(work.num_tokens for work in plan.work),
                seconds=time.perf_counter() - begin_s,
            )
        elif self._served.swapper.is_loading:
            self._served.swapper.wait(_LOADING_WAIT_S)
        elif self.scheduler.has_work and not self._answers.has_untold:
            time.sleep(_IDLE_WAIT_S)  # whoever is resident may stay a moment longer
        return self._answers.take_untold()

    def run(self, requests: Iterable[Request]) -> Iterator[Output]:
        """Submit requests and step until nothing is left to do; gives all outputs, whoever asked."""
        for request in requests:
            self.submit(request)
        while self.has_work:
            yield from self.step()

    def generate(
        self,
        variant: str,
        prompt_ids: Iterable[int],
        *,
        max_tokens: int,
        sampling: Sampling | None = None,
        stop_ids: frozenset[int] = frozenset(),
    ) -> Iterator[int]:
        """Token ids of one answer as they are chosen, from an engine that has nothing else to do.

        Raises:
            NotFound, InvalidRecipe: As `submit`.
            Busy: The engine has other requests, whose outputs would get lost.
            ServingError: The answer cannot be finished.
        """
        if self.has_work:
            raise Busy("the engine has other requests; submit this one, and step")
        request = Request(
            request_id=f"generate-{next(self._num_generated)}",
            variant=variant,
            prompt_ids=tuple(prompt_ids),
            max_tokens=max_tokens,
            sampling=sampling or Sampling(),
            stop_ids=stop_ids,
        )
        try:
            for output in self.run([request]):
                yield from output.token_ids
                if output.finish is FinishReason.ERROR:
                    raise ServingError(f"variant {variant}: {output.error}")
        finally:
            self.cancel(request.request_id)
            self._answers.take_untold()

    def logits(self, variant: str, token_ids_BT: Tensor) -> Tensor:
        """Logits [B, T, Vo] of rows of a decoder-only variant, without the cache; for measuring.

        Raises:
            NotFound: The variant is not served.
            UnsupportedCheckpoint: It is an encoder-decoder.
        """
        self.limits_of(variant)
        if not isinstance(self._forward.model(variant), Decoder):
            raise UnsupportedCheckpoint("logits of a text are for decoder-only models")
        self.ensure_resident(variant)
        return self._forward.logits_alone(variant, token_ids_BT)

    def stand_alone(self, variant: str) -> StandAlone:
        """A variant as a model by itself, over the engine's pool; for measuring.

        It holds as long as the variant stays resident.

        Raises:
            NotFound: The variant is not served.
        """
        self.ensure_resident(variant)
        return self._forward.stand_alone(variant)

    # Variants

    @property
    def has_packed_residents(self) -> bool:
        """Whether non-expert matrices take the packed layout, too."""
        return self._memory.store.is_packed

    @property
    def variants(self) -> Mapping[str, VariantLimits]:
        """Variants that are served, and what requests to them may hold."""
        return dict(self._served.intake.limits)

    def limits_of(self, variant: str) -> VariantLimits:
        """What a request to a variant may hold.

        Raises:
            NotFound: The variant is not served.
        """
        return self._served.intake.limits_of(variant)

    def add_variant(self, variant: str) -> None:
        """Serve a variant of the bundle that was not served so far.

        Raises:
            NotFound: The bundle has no such variant.
            InvalidRecipe: It is served already, or does not fit beside the pinned ones.
            NotEnoughRoom: Residents may then take more than device memory was planned for.
        """
        self._served.add(variant)

    def remove_variant(self, variant: str) -> None:
        """Serve a variant no more: its requests end with an error, its memory is free.

        Raises:
            NotFound: It is not served.
        """
        self.limits_of(variant)
        self._answers.end_all(FinishReason.ERROR, f"variant {variant} was removed", variant=variant)
        self._served.remove(variant)

    def ensure_resident(self, variant: str) -> Swap:
        """Make a variant resident now, at the cost of idle ones, and say what that took.

        Raises:
            NotFound: It is not served.
            Busy: There is no room because others are busy or pinned.
            LoadingFailed: Its tensors cannot be had.
        """
        return self._served.ensure_resident(variant, self.scheduler.demand())

    def preload(self) -> None:
        """Make variants resident, in their order in the bundle, as long as all of them fit."""
        self._served.preload(self.scheduler.demand())

    def pin(self, variant: str) -> None:
        """Make a variant resident and keep it.

        Raises:
            NotFound, Busy, LoadingFailed: As `ensure_resident`.
            InvalidRecipe: No room would be left for the others.
        """
        self._served.pin(variant, self.scheduler.demand())

    def unpin(self, variant: str) -> None:
        """Keep a variant no more than others.

        Raises:
            NotFound: It is not served.
        """
        self._served.unpin(variant)

    # State

    def snapshot(self) -> Snapshot:
        """Figures of this moment."""
        residency, memory = self._served.residency, self._memory
        running = [sequence.variant for sequence in self.scheduler.running]
        return Snapshot(
            variants={
                name: VariantState(
                    figures=self._answers.figures[name].copy(),
                    state=residency.presence(name).value,
                    pinned=name in residency.pinned,
                    waiting=self.scheduler.waiting(name),
                    running=running.count(name),
                )
                for name in self._served.intake.limits
            },
            steps=self._steps.copy(),
            blocks_used=memory.blocks.num_used,
            blocks_total=memory.blocks.num_blocks,
            block_tokens=memory.blocks.block_tokens,
            pool_bytes=memory.pool.nbytes,
            resident_bytes=memory.store.resident_bytes,
            shared_bytes=memory.store.shared_bytes,
            expert_hits=memory.pool.hits,
            expert_misses=memory.pool.misses,
        )

    def verify_integrity(self) -> None:
        """Prove that blocks, sequences, residents and pool add up.

        Raises:
            DamagedBundle: Tensors in memory are not the bundle's.
            AssertionError: Blocks leaked or are held twice.
        """
        sequences = list(self.scheduler.sequences())
        assert {s.request.request_id for s in sequences} == self._answers.sequences.keys(), (
            "a request got lost"
        )
        self._memory.blocks.verify_integrity([table for s in sequences for table in s.tables])
        self._served.swapper.settle(time.perf_counter())
        self._memory.store.verify_integrity(self._served.residency.residents)
        self._memory.pool.verify_integrity()

    def close(self) -> None:
        """End the loader's thread."""
        self._served.swapper.close()

    def _move_variants(self, now_s: float) -> None:
        try:
            self._answers.note_preempted(self._dispatcher.move_variants(now_s))
        except LoadingFailed as failed:
            self._answers.end_all(FinishReason.ERROR, str(failed), variant=failed.variant)
