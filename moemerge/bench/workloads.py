"""Traces: which request arrives when, for which variant, how long. The same options give the same trace.

Arrivals are drawn at a rate of one per second and then scaled, so that a trace looks the same at every
load. Gaps are scaled to the mean they should have, so that a short trace offers the load it says.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moemerge.errors import InvalidRecipe, NotFound

ZIPF_EXPONENT = 1.0
BURST_CV = 4.0
"""Coefficient of variation of the gaps of `bursty`; 1 would be Poisson."""
_LENGTH_SPREAD = 0.7
# Token ids below are often special ones: padding, start and end.
_FIRST_TOKEN = 8

_Generator = np.random.Generator
_Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A request of a trace.

    Attributes:
        at_s: Seconds after the start of the trace.
        variant: Who is asked.
        prompt_ids: Token ids of the prompt.
        output_tokens: Length of the answer; end tokens do not count.
    """

    at_s: float
    variant: str
    prompt_ids: tuple[int, ...]
    output_tokens: int


Trace = tuple[Arrival, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadOptions:
    """What decides a trace, but for its rate.

    Attributes:
        workload: Name of an entry of `WORKLOADS`, or a trace file.
        variants: Names, most popular first where they differ.
        num_requests: Length of the trace; of a file the first so many, None for all.
        prompt_tokens: Length of the prompts, or the median length.
        output_tokens: Length of the answers, or the median length.
        vocab_size: Smallest vocabulary among the variants.
        max_tokens: Longest prompt and answer together, where the family has a limit.
        seed: Of everything that is drawn.
    """

    workload: str
    variants: tuple[str, ...]
    num_requests: int | None
    prompt_tokens: int
    output_tokens: int
    vocab_size: int
    max_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.variants:
            raise InvalidRecipe("a workload needs at least one variant")
        for name in ("prompt_tokens", "output_tokens"):
            if getattr(self, name) < 1:
                raise InvalidRecipe(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.num_requests is not None and self.num_requests < 1:
            raise InvalidRecipe(f"requests is {self.num_requests}, expected at least 1")


@dataclass(frozen=True, slots=True)
class Workload:
    """Laws of a workload.

    Attributes:
        meaning: One line.
        gaps: Gaps between N arrivals, mean 1; None when all arrive at once.
        choose: Number of the variant of each of N requests, among so many.
        varies: Whether lengths are log-normal around the median rather than all the same.
    """

    meaning: str
    gaps: Callable[[_Generator, int], _Numbers] | None
    choose: Callable[[_Generator, int, int], NDArray[np.int64]]
    varies: bool = False


def draw_trace(options: WorkloadOptions, rate_per_s: float | None) -> Trace:
    """A trace that offers `rate_per_s` requests per second on average; None for the times of a trace file.

    Raises:
        InvalidRecipe: No such workload, or prompts and answers that no context holds.
        NotFound: No such trace file.
    """
    if options.workload not in WORKLOADS:
        trace = read_trace(Path(options.workload), options)
        return trace if rate_per_s is None else scale_trace(trace, rate_per_s)
    workload = WORKLOADS[options.workload]
    arrivals, popularity, lengths, prompts = np.random.default_rng(options.seed).spawn(4)
    num = options.num_requests or 1
    gaps = np.zeros(num) if workload.gaps is None else workload.gaps(arrivals, num)
    if gaps[1:].sum() > 0:
        gaps = gaps / gaps[1:].mean()
    times = (np.cumsum(gaps) - gaps[0]) / (rate_per_s or 1.0)
    chosen = workload.choose(popularity, num, len(options.variants))
    prompt_lengths = _lengths(lengths, num, options.prompt_tokens, 4, 8, varies=workload.varies)
    output_lengths = _lengths(lengths, num, options.output_tokens, 2, 4, varies=workload.varies)
    _check_lengths(int((prompt_lengths + output_lengths).max()), options)
    return tuple(
        Arrival(
            at_s=float(at_s),
            variant=options.variants[int(variant)],
            prompt_ids=_prompt(prompts, int(prompt), options.vocab_size),
            output_tokens=int(output),
        )
        for at_s, variant, prompt, output in zip(times, chosen, prompt_lengths, output_lengths, strict=True)
    )


def read_trace(path: Path, options: WorkloadOptions) -> Trace:
    """A recorded trace: JSON lines with `time_s`, `variant`, `prompt_tokens` and `output_tokens`.

    A variant is a name or a number; numbers, and names that the bundle does not have, stand for its variants
    in turn. Prompts are drawn.

    Raises:
        NotFound: Neither a workload nor a file.
        InvalidRecipe: A line without these keys, or lengths that no context holds.
    """
    if not path.is_file():
        raise NotFound(f"workload {str(path)!r} is no trace file and none of {', '.join(WORKLOADS)}")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    records = [_record(path, number, line) for number, line in enumerate(lines[: options.num_requests], 1)]
    if not records:
        raise InvalidRecipe(f"{path}: holds no requests")
    records.sort(key=lambda record: record[0])
    seen = list(dict.fromkeys(variant for _, variant, _, _ in records))
    names = {
        name: name if name in options.variants else options.variants[number % len(options.variants)]
        for number, name in enumerate(seen)
    }
    _check_lengths(max(prompt + output for _, _, prompt, output in records), options)
    generator = np.random.default_rng(options.seed)
    return tuple(
        Arrival(
            at_s=at_s - records[0][0],
            variant=names[variant],
            prompt_ids=_prompt(generator, prompt, options.vocab_size),
            output_tokens=output,
        )
        for at_s, variant, prompt, output in records
    )


def scale_trace(trace: Trace, rate_per_s: float) -> Trace:
    """The same requests at another rate; a trace without duration stays as it is."""
    span = trace[-1].at_s
    factor = (len(trace) - 1) / (rate_per_s * span) if span > 0 else 1.0
    return tuple(replace(arrival, at_s=arrival.at_s * factor) for arrival in trace)


def all_at_once(trace: Trace) -> Trace:
    """The same requests, all there at the start."""
    return tuple(replace(arrival, at_s=0.0) for arrival in trace)


def all_to(trace: Trace, variant: str) -> Trace:
    """The same requests, all for one variant."""
    return tuple(replace(arrival, variant=variant) for arrival in trace)


def shorten(trace: Trace, num_requests: int, output_tokens: int) -> Trace:
    """The first requests with shorter answers."""
    return tuple(
        replace(arrival, output_tokens=min(output_tokens, arrival.output_tokens))
        for arrival in trace[:num_requests]
    )


def _exponential(generator: _Generator, num: int) -> _Numbers:
    return generator.exponential(size=num)


def _gamma(generator: _Generator, num: int) -> _Numbers:
    shape = BURST_CV**-2
    return generator.gamma(shape, 1 / shape, size=num)


def _even(generator: _Generator, num: int) -> _Numbers:
    return np.ones(num)


def _uniform(generator: _Generator, num: int, num_variants: int) -> NDArray[np.int64]:
    return generator.integers(num_variants, size=num)


def _zipf(generator: _Generator, num: int, num_variants: int) -> NDArray[np.int64]:
    return generator.choice(num_variants, size=num, p=zipf_shares(num_variants))


def _in_turn(generator: _Generator, num: int, num_variants: int) -> NDArray[np.int64]:
    return np.arange(num) % num_variants


def zipf_shares(num_variants: int) -> _Numbers:
    """Share of requests of each variant: proportional to 1 / rank."""
    weights = np.arange(1, num_variants + 1) ** -ZIPF_EXPONENT
    shares: _Numbers = weights / weights.sum()
    return shares


WORKLOADS = {
    "poisson": Workload("Poisson arrivals, variants equally popular, equal lengths", _exponential, _uniform),
    "zipf": Workload(
        "Poisson arrivals, Zipf popularity, log-normal lengths", _exponential, _zipf, varies=True
    ),
    "bursty": Workload(
        f"gamma gaps with a coefficient of variation of {BURST_CV:g}, Zipf popularity, log-normal lengths",
        _gamma,
        _zipf,
        varies=True,
    ),
    "alternating": Workload("even gaps, variants strictly in turn, equal lengths", _even, _in_turn),
    "burst": Workload("everything at once, variants in turn, equal lengths", None, _in_turn),
}


def _lengths(
    generator: _Generator, num: int, median: int, least: int, most: int, *, varies: bool
) -> NDArray[np.int64]:
    """Lengths around a median, from `median / least` to `median * most` when they vary."""
    if not varies:
        return np.full(num, median)
    drawn = median * np.exp(_LENGTH_SPREAD * generator.standard_normal(num))
    lengths: NDArray[np.int64] = np.clip(drawn.round(), max(1, median // least), median * most).astype(int)
    return lengths


def _prompt(generator: _Generator, length: int, vocab_size: int) -> tuple[int, ...]:
    first = min(_FIRST_TOKEN, vocab_size - 1)
    return tuple(int(token_id) for token_id in generator.integers(first, vocab_size, size=length))


def _check_lengths(longest: int, options: WorkloadOptions) -> None:
    if options.max_tokens is not None and longest > options.max_tokens:
        raise InvalidRecipe(
            f"the longest prompt and answer have {longest} tokens, the context has {options.max_tokens}; "
            f"give a smaller --prompt-tokens or --output-tokens"
        )


def _record(path: Path, number: int, line: str) -> tuple[float, str, int, int]:
    try:
        record = json.loads(line)
        at_s, variant = float(record["time_s"]), str(record["variant"])
        prompt, output = int(record["prompt_tokens"]), int(record["output_tokens"])
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidRecipe(
            f"{path}, line {number}: expected time_s, variant, prompt_tokens and output_tokens "
            f"({type(error).__name__}: {error})"
        ) from error
    if not (0 <= at_s < math.inf and prompt >= 1 and output >= 1):
        raise InvalidRecipe(f"{path}, line {number}: time, prompt or output length is too small")
    return at_s, variant, prompt, output


def check_names(names: Sequence[str], known: Sequence[str], what: str) -> None:
    """Refuse names that are not known.

    Raises:
        InvalidRecipe: With those that are.
    """
    for name in names:
        if name not in known:
            raise InvalidRecipe(f"{what} {name!r} is unknown; there are {', '.join(known)}")
