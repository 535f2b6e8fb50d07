"""From logits to tokens, and from tokens to outputs and figures."""

import time
from collections import defaultdict
from collections.abc import Iterable

from moemerge.runner.forward import VariantLogits, Wanted
from moemerge.runner.metrics import VariantFigures
from moemerge.runner.request import FinishReason, Output, Timing
from moemerge.runner.sampling import Chosen, choose_tokens, prompt_logprobs
from moemerge.runner.scheduler import Scheduler
from moemerge.runner.sequence import Sequence
from moemerge.runner.transfer import Swap


class Answers:
    """The answers under way, by request, and what is to be told about them."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.sequences: dict[str, Sequence] = {}
        self.figures: defaultdict[str, VariantFigures] = defaultdict(VariantFigures)
        self._scheduler = scheduler
        self._untold: list[Output] = []

    @property
    def has_untold(self) -> bool:
        """There are outputs that nobody has taken yet."""
        return bool(self._untold)

    def take_untold(self) -> list[Output]:
        """Outputs since the last call."""
        untold, self._untold = self._untold, []
        return untold

    def begin(self, sequence: Sequence) -> None:
        """A request has come in."""
        self.sequences[sequence.request.request_id] = sequence
        figures = self.figures[sequence.variant]
        figures.submitted += 1
        figures.prompt_tokens += len(sequence.request.prompt_ids)
        self._scheduler.submit(sequence)

    def choose(self, results: Iterable[VariantLogits]) -> None:
        """Choose the next token of every sequence that has nothing pending any more."""
        for result in results:
            for wanted in result.wanted:
                _note_prompt(wanted, result)
            due = [wanted for wanted in result.wanted if wanted.sequence.num_pending == 0]
            if not due:
                continue
            rows = [wanted.stop - 1 for wanted in due]
            is_all = len(rows) == len(result.logits_WV)
            chosen = choose_tokens(
                result.logits_WV if is_all else result.logits_WV[rows],
                [wanted.sequence.sampler for wanted in due],
                [wanted.sequence.request.num_logprobs for wanted in due],
            )
            now_s = time.perf_counter()
            for wanted, choice in zip(due, chosen, strict=True):
                self._accept(wanted.sequence, choice, now_s)

    def end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        *,
        last: Chosen | None = None,
        error: str | None = None,
    ) -> None:
        """A request has come to its end; its blocks are free."""
        now_s = time.perf_counter()
        self._scheduler.remove(sequence)
        del self.sequences[sequence.request.request_id]
        figures = self.figures[sequence.variant]
        figures.finished[reason.value] += 1
        figures.turnaround.add(now_s - sequence.arrival_s)
        if sequence.num_answered > 1 and sequence.first_token_s is not None:
            figures.tpot.add((now_s - sequence.first_token_s) / (sequence.num_answered - 1))
        timing = Timing(
            arrival_s=sequence.arrival_s,
            admitted_s=sequence.admitted_s,
            first_token_s=sequence.first_token_s,
            finished_s=now_s,
            swap_wait_s=sequence.stall_s,
        )
        self._tell(sequence, last, finish=reason, error=error, timing=timing)

    def end_all(self, reason: FinishReason, error: str, *, variant: str | None = None) -> None:
        """All requests have come to their end, or all of one variant."""
        for sequence in list(self.sequences.values()):
            if variant in (None, sequence.variant):
                self.end(sequence, reason, error=error)

    def note_preempted(self, sequences: Iterable[Sequence]) -> None:
        """Running sequences have lost their blocks."""
        for sequence in sequences:
            self.figures[sequence.variant].preemptions += 1

    def note_swap(self, swap: Swap, absent_since_s: float) -> None:
        """A variant is resident; those who waited for it have waited since it was absent, or they came."""
        figures = self.figures[swap.variant]
        figures.swaps += 1
        figures.swap_bytes += swap.moved_bytes
        figures.swap_seconds += swap.seconds
        now_s = time.perf_counter()
        for sequence in self._scheduler.sequences():
            if sequence.variant == swap.variant:
                waited_s = now_s - max(sequence.queued_s, absent_since_s)
                sequence.stall_s += waited_s
                figures.stall_s += waited_s

    def _accept(self, sequence: Sequence, choice: Chosen, now_s: float) -> None:
        request, figures = sequence.request, self.figures[sequence.variant]
        if choice.error is not None:
            self.end(sequence, FinishReason.ERROR, error=choice.error)
            return
        if sequence.first_token_s is None or sequence.last_token_s is None:
            sequence.first_token_s = now_s
            figures.ttft.add(now_s - sequence.arrival_s)
        else:
            figures.itl.add(now_s - sequence.last_token_s)
        sequence.last_token_s = now_s
        if choice.token_id in request.stop_ids and not request.ignore_stop:
            self.end(sequence, FinishReason.STOP)
            return
        sequence.tokens.append(choice.token_id)
        sequence.sampler.accept(choice.token_id)
        figures.output_tokens += 1
        if sequence.num_left == 0:
            self.end(sequence, FinishReason.LENGTH, last=choice)
        else:
            self._tell(sequence, choice)

    def _tell(
        self,
        sequence: Sequence,
        choice: Chosen | None,
        *,
        finish: FinishReason | None = None,
        error: str | None = None,
        timing: Timing | None = None,
    ) -> None:
        prompt = sequence.prompt_logprobs if (sequence.num_answered <= 1 and choice) or finish else None
        self._untold.append(
            Output(
                request_id=sequence.request.request_id,
                token_ids=() if choice is None else (choice.token_id,),
                logprobs=() if choice is None or choice.logprob is None else (choice.logprob,),
                prompt_logprobs=tuple(prompt) if prompt else None,
                finish=finish,
                error=error,
                timing=timing,
            )
        )
        if prompt:
            sequence.prompt_logprobs = []


def _note_prompt(wanted: Wanted, result: VariantLogits) -> None:
    """Keep the log-probabilities of the prompt's tokens that this step's tokens foretell."""
    sequence = wanted.sequence
    num = sequence.request.num_prompt_logprobs
    if num is None or sequence.num_answered:
        return
    known = sequence.prompt_logprobs
    first = sequence.num_computed - (wanted.stop - wanted.start)
    if first == 0:
        known[:] = [None]  # nothing foretells the first token
    following = sequence.tokens[first + 1 : sequence.num_computed + 1]
    rows = result.logits_WV[wanted.start : wanted.start + len(following)]
    known.extend(prompt_logprobs(rows, following, num))
