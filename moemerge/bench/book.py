"""What is seen of the requests of a trace while a system answers them."""

import time

from moemerge.bench.metrics import Record
from moemerge.bench.workloads import Trace
from moemerge.runner.engine import Engine
from moemerge.runner.request import FinishReason, Output, Request


class Book:
    """What is seen of every request of a trace."""

    def __init__(self, trace: Trace, start_s: float) -> None:
        self._trace, self._start_s = trace, start_s
        self._tokens: list[list[int]] = [[] for _ in trace]
        self._times: list[list[float]] = [[] for _ in trace]
        self._waits = [0.0] * len(trace)
        self._ended_s: float | None = None

    def request(self, index: int) -> Request:
        """An arrival as the engine takes it: greedy, end tokens do not count."""
        arrival = self._trace[index]
        return Request(
            request_id=str(index),
            variant=arrival.variant,
            prompt_ids=arrival.prompt_ids,
            max_tokens=arrival.output_tokens,
            ignore_stop=True,
            arrival_s=self._start_s + arrival.at_s,
        )

    def enter(self, outputs: list[Output]) -> None:
        """Note what a step brought, now."""
        now = time.perf_counter() - self._start_s
        for output in outputs:
            if output.finish is FinishReason.ERROR:
                raise RuntimeError(f"request {output.request_id}: {output.error}")
            index = int(output.request_id)
            self._tokens[index] += output.token_ids
            self._times[index] += [now] * len(output.token_ids)
            if output.timing:
                self._waits[index] = output.timing.swap_wait_s

    def add(self, index: int, token_id: int, now: float) -> None:
        """Note one token that was there at `now`, by `time.perf_counter()`."""
        self._tokens[index].append(token_id)
        self._times[index].append(now - self._start_s)

    def is_finished(self, index: int) -> bool:
        """Whether the answer is complete."""
        return len(self._tokens[index]) == self._trace[index].output_tokens

    def end(self) -> None:
        """The run is broken off now."""
        self._ended_s = time.perf_counter() - self._start_s

    def break_off(self, engine: Engine) -> None:
        """The run is broken off now, and the engine made ready for another one."""
        self.end()
        for index in range(len(self._trace)):
            if not self.is_finished(index):
                engine.cancel(str(index))
        while engine.has_work:
            engine.step()

    def records(self) -> list[Record]:
        """One per request, in the order of the trace.

        Raises:
            RuntimeError: A request got another number of tokens than it asked for.
        """
        for index, arrival in enumerate(self._trace):
            found = len(self._tokens[index])
            if found > arrival.output_tokens or (self._ended_s is None and found < arrival.output_tokens):
                raise RuntimeError(f"request {index}: {found} tokens, expected {arrival.output_tokens}")
        return [
            Record(
                variant=arrival.variant,
                arrival_s=arrival.at_s,
                token_ids=tuple(self._tokens[index]),
                token_times_s=tuple(self._times[index]),
                wanted_tokens=arrival.output_tokens,
                # A request that would have come after the end was not kept waiting.
                ended_s=None if self._ended_s is None else max(self._ended_s, arrival.at_s),
                swap_wait_s=self._waits[index],
            )
            for index, arrival in enumerate(self._trace)
        ]
