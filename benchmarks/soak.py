"""A served bundle under hundreds of streams that hang up, for as long as one likes; every answer is checked.

python benchmarks/soak.py --minutes 10
python benchmarks/soak.py --minutes 60 --streams 500 --policy grouped --family FOLDER

FAMILY holds one checkpoint folder per variant; all are merged at 1x into a temporary folder. Each answer is
computed alone first, in float32. Then every stream asks one variant after the other, some hang up in the
middle, the cache is too small for all that run, two variants are resident at a time, and the last one is
removed for a while. Prints a markdown table; exits with 1 when an answer differed, a request was not told its
end, blocks were lost or a variant waited longer than the bound.
"""

import argparse
import queue
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from moemerge.bench.machine import describe_machine
from moemerge.bundle.reader import Bundle, open_bundle
from moemerge.checkpoint.variants import open_variants
from moemerge.consolidation.pipeline import merge
from moemerge.consolidation.task import options_of
from moemerge.errors import MoemergeError, NotFound
from moemerge.models.geometry import cache_geometry
from moemerge.refs import FolderRef
from moemerge.runner.engine import Engine
from moemerge.runner.forward import model_of
from moemerge.runner.options import EngineOptions
from moemerge.runner.request import FinishReason, Output, Request
from moemerge.runner.service import EngineService

MINI = Path(__file__).parents[1] / "examples" / "families" / "mini"
PROMPT_TOKENS = (1, 100)
ANSWER_TOKENS = 32
MARGIN = 1e-3
"""Prompts whose answer has two tokens closer than this (in log-probability) are not asked."""
CANCELLED_SHARE = 0.25
REMOVED_DURING = (0.4, 0.6)
"""The part of the run in which the last variant is not served."""
NUM_CHECKS = 10
"""Times that the engine proves its integrity during the run."""
LAST_ANSWERS_S = 60.0
"""Time for the last answers, after the streams ask no more."""
SLACK_S = 5.0
"""For steps and loads, of a machine that may be busy."""


class Answer(NamedTuple):
    """What a variant has to say to a prompt."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]


References = dict[str, list[Answer]]


def merge_family(folder: Path, target: Path) -> Bundle:
    """All checkpoints of a family in one bundle, `base` last."""
    names = {p.name for p in folder.iterdir() if (p / "config.json").is_file()}
    ordered = [*sorted(names - {"base"}), *sorted(names & {"base"})]
    merge(open_variants({n: FolderRef(folder / n) for n in ordered}), target, options_of("1x"))
    return open_bundle(target)


def answer_alone(bundle: Bundle, num_prompts: int, generator: random.Random) -> References:
    """Prompts of random tokens for each variant, and the answers that one request at a time gets."""
    engine = Engine(bundle, EngineOptions(dtype="float32"))
    references: References = {name: [] for name in bundle.manifest.variants}
    for name, answers in references.items():
        while len(answers) < num_prompts:
            length = generator.randint(*PROMPT_TOKENS)
            vocab = engine.limits_of(name).vocab_size
            request = Request(
                request_id="alone",
                variant=name,
                prompt_ids=tuple(generator.randrange(vocab) for _ in range(length)),
                max_tokens=ANSWER_TOKENS,
                num_logprobs=2,
            )
            told = [logprob for output in engine.run([request]) for logprob in output.logprobs]
            if all(t.top[0][1] - t.top[1][1] > MARGIN for t in told):
                answers.append(Answer(request.prompt_ids, tuple(t.token_id for t in told)))
    engine.close()
    return references


def options_for(bundle: Bundle, policy: str, batch: int, cache_share: float) -> EngineOptions:
    """Two residents that change often, and a cache for a share of what runs at once."""
    block_tokens = 16
    geometry = cache_geometry(model_of(bundle, next(iter(bundle.manifest.variants))), block_tokens)
    tokens = int(cache_share * batch * (sum(PROMPT_TOKENS) / 2 + ANSWER_TOKENS / 2))
    longest = PROMPT_TOKENS[1] + 2 * ANSWER_TOKENS
    return EngineOptions(
        dtype="float32",
        policy=policy,
        resident="2",
        cache_memory=max(tokens, longest) // block_tokens * geometry.block_bytes(torch.float32),
        block_tokens=block_tokens,
        max_batch=batch,
        max_step_tokens=128,
        max_wait_s=1.0,
        quantum_s=0.1,
        patience_s=0.1,
        min_hold_s=0.1,
        drain_s=0.3,
    )


def bound_on_wait_s(options: EngineOptions, num_variants: int) -> float:
    """Longest time in which a variant that has requests gets none of them in.

    The others may be moved in before it, each after a wait, a turn and a drain; then it waits for a place.
    """
    patience = options.patience()
    move_s = patience.patience_s + patience.min_hold_s + patience.drain_s + options.quantum_s
    return num_variants * move_s + options.max_wait_s + SLACK_S


@dataclass(slots=True)
class Stream:
    """A request on its way."""

    request: Request
    answer: Answer
    hangs_up_after: int | None
    token_ids: list[int] = field(default_factory=list)
    has_hung_up: bool = False


@dataclass(slots=True)
class Soak:
    """A run, driven by one thread; the engine's thread only puts outputs into a queue."""

    service: EngineService
    references: References
    num_streams: int
    generator: random.Random
    removed: str
    open: dict[str, Stream] = field(default_factory=dict)
    outputs: "queue.SimpleQueue[Output]" = field(default_factory=queue.SimpleQueue)
    finishes: Counter[str] = field(default_factory=Counter)
    ttft_s: list[float] = field(default_factory=list)
    waits: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    tokens: int = 0
    num_asked: int = 0
    finished_after_return: int = 0
    violations: list[str] = field(default_factory=list)
    is_removed: bool = False
    has_returned: bool = False

    def run(self, seconds: float) -> float:
        """Keep all streams busy for so long, and wait for the last answers; says how long it took."""
        begin_s = time.perf_counter()
        events = [
            (REMOVED_DURING[0] * seconds, self.remove),
            (REMOVED_DURING[1] * seconds, self.bring_back),
            *((seconds * n / NUM_CHECKS, self.service.verify_integrity) for n in range(1, NUM_CHECKS)),
        ]
        events.sort(key=lambda event: event[0])
        while (elapsed_s := time.perf_counter() - begin_s) < seconds and self.service.is_ready:
            while events and events[0][0] <= elapsed_s:
                events.pop(0)[1]()
            while len(self.open) < self.num_streams:
                self.ask()
            self.hear(0.01)
        while self.open and time.perf_counter() - begin_s < seconds + LAST_ANSWERS_S:
            self.hear(0.01)
        return time.perf_counter() - begin_s

    def remove(self) -> None:
        """Serve a variant no more, in the middle of its requests."""
        self.is_removed = True
        self.service.remove_variant(self.removed)
        try:
            self.service.submit(
                Request(request_id="late", variant=self.removed, prompt_ids=(1,), max_tokens=1),
                self.outputs.put,
            )
            self.violations.append("a request to a variant that was removed was taken")
        except NotFound:
            pass

    def bring_back(self) -> None:
        """Serve it again."""
        self.hear(0.0)  # those that it ended have been told; what comes from now on has to be answered
        if any(stream.request.variant == self.removed for stream in self.open.values()):
            self.violations.append(f"requests to {self.removed} outlived its removal")
        self.service.add_variant(self.removed)
        self.is_removed, self.has_returned = False, True

    def ask(self) -> None:
        """Begin a stream."""
        served = [name for name in self.references if not (self.is_removed and name == self.removed)]
        variant = self.generator.choice(served)
        answer = self.generator.choice(self.references[variant])
        max_tokens = self.generator.randint(1, ANSWER_TOKENS)
        hangs_up = self.generator.random() < CANCELLED_SHARE
        self.num_asked += 1
        request = Request(
            request_id=f"request-{self.num_asked}",
            variant=variant,
            prompt_ids=answer.prompt_ids,
            max_tokens=max_tokens,
            arrival_s=time.perf_counter(),
        )
        stream = Stream(request, answer, self.generator.randrange(max_tokens) if hangs_up else None)
        self.open[request.request_id] = stream
        self.service.submit(request, self.outputs.put)
        self.hang_up_if_due(stream)

    def hang_up_if_due(self, stream: Stream) -> None:
        """Cancel a request whose answer is as long as the stream cares to listen."""
        after = stream.hangs_up_after
        if after is not None and not stream.has_hung_up and len(stream.token_ids) >= after:
            stream.has_hung_up = True
            self.service.cancel(stream.request.request_id)

    def hear(self, timeout_s: float) -> None:
        """Take what the engine says, wait a moment for it if need be."""
        try:
            self.take(self.outputs.get(timeout=timeout_s))
            while True:
                self.take(self.outputs.get_nowait())
        except queue.Empty:
            return

    def take(self, output: Output) -> None:
        """Count and check what the engine says of a request."""
        stream = self.open.get(output.request_id)
        if stream is None:
            self.violations.append(f"{output.request_id} was told something after its end")
            return
        stream.token_ids += output.token_ids
        self.tokens += len(output.token_ids)
        if output.finish is None:
            self.hang_up_if_due(stream)
            return
        del self.open[output.request_id]
        self.finishes[output.finish.value] += 1
        self.check(stream, output)
        timing = output.timing
        if timing is None:
            return
        admitted_s = timing.finished_s if timing.admitted_s is None else timing.admitted_s
        self.waits[stream.request.variant].append((timing.arrival_s, admitted_s))
        if timing.first_token_s is not None:
            self.ttft_s.append(timing.first_token_s - timing.arrival_s)

    def check(self, stream: Stream, output: Output) -> None:
        """The answer is the one computed alone, or its beginning when somebody broke it off."""
        request, found = stream.request, tuple(stream.token_ids)
        expected = stream.answer.token_ids[: request.max_tokens]
        name = f"{request.request_id} to {request.variant}"
        if output.finish is FinishReason.ERROR:
            if not (self.is_removed and request.variant == self.removed):
                self.violations.append(f"{name}: {output.error}")
        elif output.finish is FinishReason.CANCELLED:
            if not stream.has_hung_up:
                self.violations.append(f"{name} was cancelled by nobody")
        elif found != expected:
            self.violations.append(f"{name}: {list(found)}, expected {list(expected)}")
        elif request.variant == self.removed and self.has_returned:
            self.finished_after_return += 1
        if found != expected[: len(found)]:
            self.violations.append(f"{name}: {list(found)} is not how {list(expected)} begins")

    def longest_left_out_s(self, variant: str) -> float:
        """Longest time in which requests to a variant waited and none was admitted for the first time."""
        last_s, longest_s = float("-inf"), 0.0
        for arrival_s, admitted_s in sorted(self.waits[variant], key=lambda wait: wait[1]):
            longest_s = max(longest_s, admitted_s - max(arrival_s, last_s))
            last_s = admitted_s
        return longest_s

    def longest_wait_s(self, variant: str) -> float:
        """Longest time from arrival to admission, behind the variant's own requests too."""
        return max((admitted_s - arrival_s for arrival_s, admitted_s in self.waits[variant]), default=0.0)


def soak(bundle: Bundle, arguments: argparse.Namespace) -> int:
    """Run, print what happened, and give the number of violations."""
    generator = random.Random(arguments.seed)  # noqa: S311 (nothing secret)
    references = answer_alone(bundle, arguments.prompts, generator)
    options = options_for(bundle, arguments.policy, arguments.batch, arguments.cache_share)
    bound_s = bound_on_wait_s(options, len(references))
    service = EngineService(Engine(bundle, options), max_queue=arguments.streams)
    service.start()
    run = Soak(service, references, arguments.streams, generator, removed=list(references)[-1])
    try:
        seconds = run.run(60 * arguments.minutes)
        service.verify_integrity()
        snapshot = service.call(service.snapshot)
        states = snapshot.variants.values()
        if run.open:
            run.violations.append(f"{len(run.open)} requests were not told their end")
        if snapshot.blocks_used:
            run.violations.append(f"{snapshot.blocks_used} blocks are in use, nobody uses them")
        if not run.finished_after_return:
            run.violations.append(f"{run.removed} answered nothing after it was added again")
        for name in references:
            if run.longest_left_out_s(name) > bound_s:
                run.violations.append(
                    f"{name} was left out for {run.longest_left_out_s(name):.1f} s, bound {bound_s:.1f}"
                )
    except MoemergeError as error:
        print(f"the run broke off: {error}", file=sys.stderr)
        return 1
    finally:
        service.stop()
    machine = describe_machine(torch.get_num_threads(), "cpu")
    worst = {name: (run.longest_left_out_s(name), run.longest_wait_s(name)) for name in references}
    p50, p99 = np.percentile(run.ttft_s or [float("nan")], [50, 99])
    rows = {
        "hardware": f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads",
        "commit": machine["commit"],
        "workload": f"{arguments.streams} streams, {len(references)} variants, 2 resident, "
        f"policy {options.policy}, {snapshot.blocks_total} blocks of {snapshot.block_tokens} tokens",
        "seconds": f"{seconds:.1f}",
        "requests": f"{run.num_asked} ({', '.join(f'{n} {why}' for why, n in sorted(run.finishes.items()))})",
        "output tokens": run.tokens,
        "swaps": sum(state.figures.swaps for state in states),
        "preemptions": sum(state.figures.preemptions for state in states),
        "cancelled": run.finishes["cancelled"],
        f"longest time left out (bound {bound_s:.1f} s)": ", ".join(
            f"{name} {left_out_s:.2f} s" for name, (left_out_s, _) in worst.items()
        ),
        "longest wait, own queue included": ", ".join(
            f"{n} {wait_s:.2f} s" for n, (_, wait_s) in worst.items()
        ),
        "TTFT P50, P99": f"{p50:.2f} s, {p99:.2f} s",
        "output tokens/s": f"{run.tokens / seconds:.0f}",
        "violations": len(run.violations),
    }
    print("| | |\n| --- | --- |")
    for name, value in rows.items():
        print(f"| {name} | {value} |")
    for violation in run.violations[:20]:
        print(violation, file=sys.stderr)
    return len(run.violations)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--family", type=Path, default=MINI)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--policy", choices=["mixed", "grouped"], default="mixed")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--cache-share", type=float, default=0.4, help="of what a full batch would take")
    parser.add_argument("--prompts", type=int, default=8, help="per variant")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        bundle = merge_family(arguments.family, Path(temporary) / "soak.moe")
        sys.exit(1 if soak(bundle, arguments) else 0)


if __name__ == "__main__":
    main()
