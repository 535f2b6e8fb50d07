"""The engine: requests in, tokens out, one forward step at a time.

A step computes tokens of all variants that the scheduler lets in together: the pool is shared, the
non-expert tensors are each variant's own. An engine belongs to one thread; `EngineService` gives it one.
"""

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial

from torch import Tensor

from moemerge.bundle.reader import Bundle
from moemerge.errors import (
    Busy,
    InvalidRecipe,
    MoemergeError,
    NotEnoughRoom,
    NotFound,
    ServingError,
    UnsupportedCheckpoint,
)
from moemerge.models import Decoder
from moemerge.runner.answers import Answers
from moemerge.runner.blocks import BlockPool
from moemerge.runner.cache import BlockCache
from moemerge.runner.forward import Forward, cache_geometry, model_of
from moemerge.runner.intake import Intake, VariantLimits, max_positions
from moemerge.runner.metrics import Snapshot, StepFigures, VariantFigures, VariantState
from moemerge.runner.options import (
    EngineOptions,
    ResidentLimit,
    choose_device,
    choose_dtype,
    parse_resident,
    plan_memory,
)
from moemerge.runner.pool import load_pool
from moemerge.runner.request import FinishReason, Output, Request
from moemerge.runner.residency import Residency
from moemerge.runner.residents import LoadingFailed, Residents
from moemerge.runner.sampling import Sampling
from moemerge.runner.scheduler import Scheduler, Work
from moemerge.runner.weights import Swap, WeightStore

_LOADING_WAIT_S = 0.002
_IDLE_WAIT_S = 0.001


class Engine:
    """Serves the variants of one bundle from one device."""

    def __init__(self, bundle: Bundle, options: EngineOptions | None = None) -> None:
        """Load the pool and the pinned variants.

        Raises:
            InvalidRecipe, NotFound: Options that cannot be, or name variants that the bundle has not.
            NotEnoughRoom: Device memory does not hold what the options ask for.
            UnsupportedCheckpoint: Settings that no model here implements.
        """
        self.bundle = bundle
        self.options = options = options or EngineOptions()
        self.device = choose_device(options.device)
        self.dtype = choose_dtype(bundle, options.dtype, self.device)
        names = options.variants or tuple(bundle.manifest.variants)
        for name in (*names, *options.pinned, *options.shares):
            bundle.variant(name)
        for name in options.pinned:
            if name not in names:
                raise NotFound(f"no variant {name!r} is served; there are {', '.join(names)}")
        self._resident_limit = parse_resident(options.resident)
        # Packing pays for tensors that stay, not for those that make room for others.
        stays = options.pack and self._resident_limit == ResidentLimit()
        self._store = WeightStore(bundle, names, self.dtype, self.device, is_packed=stays)
        self._check_residency(names, set(options.pinned))

        geometry = cache_geometry(model_of(bundle, names[0]), options.block_tokens)
        longest = max((c for c in (max_positions(bundle, n) for n in names) if c), default=None)
        self._memory = memory = plan_memory(
            options, bundle, self._store, geometry,
            resident=self._resident_limit, variants=names, context_tokens=longest,
        )  # fmt: skip
        self._blocks = BlockPool(memory.num_blocks, options.block_tokens)
        self._pool = load_pool(
            bundle, self.dtype, self.device, memory_bytes=memory.pool_bytes, is_packed=options.pack
        )
        cache = BlockCache(geometry, memory.num_blocks, self.dtype, self.device)
        self._forward = Forward(bundle, self._pool, cache, self.device)
        self.scheduler = Scheduler(self._blocks, options.limits(), options.chosen_policy())
        self._residents = Residents(
            Residency(
                partial(self._resident_limit.fits, store=self._store),
                options.patience(),
                set(options.pinned),
            ),
            self._store,
            self._forward,
            self._note_swap,
        )
        self._answers = Answers(self.scheduler)
        self._steps = StepFigures()
        self._intake = Intake(bundle, self._blocks)
        self._num_generated = itertools.count()
        for name in names:
            self._open(name)
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
        sequence = self._intake.begin(request)
        self._residents.residency.requested(request.variant, sequence.queued_s)
        self._answers.begin(sequence)

    def cancel(self, request_id: str) -> None:
        """End a request; its blocks are free at once. One that is not there any more is passed over."""
        sequence = self._answers.sequences.get(request_id)
        if sequence is not None:
            self._answers.end(sequence, FinishReason.CANCELLED)

    def fail_all(self, error: str) -> None:
        """End all requests with an error; for a step that did not come to its end."""
        for sequence in list(self._answers.sequences.values()):
            self._answers.end(sequence, FinishReason.ERROR, error=error)

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
        residency = self._residents.residency
        plan = self.scheduler.plan(begin_s, residency.residents, residency.open_to)
        for sequence in plan.preempted:
            self._answers.figures[sequence.variant].preemptions += 1
        if plan.work:
            results = self._forward.compute(plan.work)
            self.scheduler.computed(plan)
            residency.computed({item.sequence.variant for item in plan.work})
            self._answers.choose(results)
            self._note_step(plan.work, time.perf_counter() - begin_s)
        elif self._residents.is_loading:
            self._residents.wait(_LOADING_WAIT_S)
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

    # Variants

    @property
    def has_packed_residents(self) -> bool:
        """Whether non-expert matrices take the packed layout, too."""
        return self._store.is_packed

    @property
    def variants(self) -> Mapping[str, VariantLimits]:
        """Variants that are served, and what requests to them may hold."""
        return dict(self._intake.limits)

    def limits_of(self, variant: str) -> VariantLimits:
        """What a request to a variant may hold.

        Raises:
            NotFound: The variant is not served.
        """
        return self._intake.limits_of(variant)

    def add_variant(self, variant: str) -> None:
        """Serve a variant of the bundle that was not served so far.

        Raises:
            NotFound: The bundle has no such variant.
            InvalidRecipe: It is served already, or does not fit beside the pinned ones.
            NotEnoughRoom: Residents may then take more than device memory was planned for.
        """
        self.bundle.variant(variant)
        if variant in self._intake.limits:
            raise InvalidRecipe(f"variant {variant} is served already")
        self._store.add(variant)
        try:
            self._check_residency([variant], self._residents.residency.pinned)
            self._check_memory(variant)
        except MoemergeError:
            self._store.forget(variant)
            raise
        self._open(variant)

    def remove_variant(self, variant: str) -> None:
        """Serve a variant no more: its requests end with an error, its memory is free.

        Raises:
            NotFound: It is not served.
        """
        self.limits_of(variant)
        self._end_all_of(variant, f"variant {variant} was removed")
        self._residents.remove(variant, time.perf_counter())
        self._intake.close(variant)

    def ensure_resident(self, variant: str) -> Swap:
        """Make a variant resident now, at the cost of idle ones, and say what that took.

        Raises:
            NotFound: It is not served.
            Busy: There is no room because others are busy or pinned.
            LoadingFailed: Its tensors cannot be had.
        """
        self.limits_of(variant)
        return self._residents.ensure(variant, self.scheduler.demand(), time.perf_counter())

    def preload(self) -> None:
        """Make variants resident, in their order in the bundle, as long as all of them fit."""
        for name in self._intake.limits:
            residents = self._residents.residency.residents
            if name not in residents and self._resident_limit.fits([*residents, name], self._store):
                self.ensure_resident(name)

    def pin(self, variant: str) -> None:
        """Make a variant resident and keep it.

        Raises:
            NotFound, Busy, LoadingFailed: As `ensure_resident`.
            InvalidRecipe: No room would be left for the others.
        """
        self.limits_of(variant)
        residency = self._residents.residency
        self._check_residency(self._intake.limits, {*residency.pinned, variant})
        self.ensure_resident(variant)
        residency.pin(variant)

    def unpin(self, variant: str) -> None:
        """Keep a variant no more than others.

        Raises:
            NotFound: It is not served.
        """
        self.limits_of(variant)
        self._residents.residency.unpin(variant)

    # State

    def snapshot(self) -> Snapshot:
        """Figures of this moment."""
        residency = self._residents.residency
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
                for name in self._intake.limits
            },
            steps=StepFigures(self._steps.steps, self._steps.mixed, self._steps.tokens, self._steps.seconds),
            blocks_used=self._blocks.num_used,
            blocks_total=self._blocks.num_blocks,
            block_tokens=self._blocks.block_tokens,
            pool_bytes=self._pool.nbytes,
            resident_bytes=self._store.resident_bytes,
            shared_bytes=self._store.shared_bytes,
            expert_hits=self._pool.hits,
            expert_misses=self._pool.misses,
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
        self._blocks.verify_integrity([table for s in sequences for table in s.tables])
        self._residents.settle(time.perf_counter())
        self._store.verify_integrity(self._residents.residency.residents)
        self._pool.verify_integrity()

    def close(self) -> None:
        """End the loader's thread."""
        self._residents.close()

    # Within

    def _open(self, variant: str) -> None:
        self._forward.model(variant)
        self._answers.figures.setdefault(variant, VariantFigures())
        self._intake.open(variant)

    def _check_residency(self, variants: Iterable[str], pinned: set[str]) -> None:
        """Every variant finds room beside the pinned ones."""
        for name in variants:
            if not self._resident_limit.fits({*pinned, name}, self._store):
                others = f" beside {', '.join(sorted(pinned - {name}))}, pinned" if pinned - {name} else ""
                raise InvalidRecipe(
                    f"resident is {self.options.resident}, which leaves no room for variant {name}{others}"
                )

    def _check_memory(self, variant: str) -> None:
        planned = self._memory.resident_bytes
        names = [*self._intake.limits, variant]
        needed = self._resident_limit.most_bytes(names, self._store)
        if planned is not None and needed > planned:
            raise NotEnoughRoom(
                f"with variant {variant} residents may take {needed} bytes of device memory, {planned} are "
                f"planned. Limit how many are resident, or start with it"
            )

    def _move_variants(self, now_s: float) -> None:
        try:
            emptied = self._residents.advance(self.scheduler.demand(), now_s)
        except LoadingFailed as failed:
            self._end_all_of(failed.variant, str(failed))
            return
        if emptied is not None:
            self._answers.figures[emptied].preemptions += len(self.scheduler.empty(emptied, now_s))

    def _end_all_of(self, variant: str, error: str) -> None:
        for sequence in [s for s in self._answers.sequences.values() if s.variant == variant]:
            self._answers.end(sequence, FinishReason.ERROR, error=error)

    def _note_swap(self, swap: Swap) -> None:
        figures = self._answers.figures[swap.variant]
        figures.swaps += 1
        figures.swap_bytes += swap.moved_bytes
        figures.swap_seconds += swap.seconds
        now_s = time.perf_counter()
        absent_since_s = self._residents.residency.absent_since_s(swap.variant)
        for sequence in self.scheduler.sequences():
            if sequence.variant == swap.variant:
                waited_s = now_s - max(sequence.queued_s, absent_since_s)
                sequence.stall_s += waited_s
                figures.stall_s += waited_s

    def _note_step(self, work: Iterable[Work], seconds: float) -> None:
        steps = self._steps
        steps.steps += 1
        steps.mixed += len({item.sequence.variant for item in work}) > 1
        steps.tokens += sum(item.num_tokens for item in work)
        steps.seconds += seconds
