"""One request on its way through the engine: its tokens, its blocks and where it stands."""

from dataclasses import dataclass, field
from enum import StrEnum

from moemerge.runner.blocks import BlockTable
from moemerge.runner.request import Request
from moemerge.runner.sampling import Sampler, TokenLogprob


class State(StrEnum):
    """Where a sequence stands."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True, kw_only=True)
class Sequence:
    """A request's tokens and what has been computed of them.

    Attributes:
        number: Order of arrival in this engine.
        source_ids: What an encoder reads; empty in a decoder-only model.
        tokens: What the decoder reads: the prompt or the start token, then the answer so far.
        num_prompt: How many of `tokens` are not part of the answer.
        num_computed: How many of `tokens` have keys and values in `table`.
        is_encoded: The encoder's keys and values are in `cross_table`.
        queued_s: When it began to wait for its turn, anew after a preemption.
        admitted_s: When it was first taken into a batch; `running_since_s`: when it was last.
        stall_s: Time it has waited for its variant to become resident.
    """

    number: int
    request: Request
    arrival_s: float
    source_ids: tuple[int, ...]
    tokens: list[int]
    num_prompt: int
    table: BlockTable
    cross_table: BlockTable
    sampler: Sampler
    queued_s: float
    state: State = State.WAITING
    num_computed: int = 0
    is_encoded: bool = False
    admitted_s: float | None = None
    running_since_s: float = 0.0
    first_token_s: float | None = None
    last_token_s: float | None = None
    stall_s: float = 0.0
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)

    @property
    def variant(self) -> str:
        """The variant that answers."""
        return self.request.variant

    @property
    def num_answered(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_left(self) -> int:
        """Tokens of the answer that may still come."""
        return self.request.max_tokens - self.num_answered

    @property
    def num_pending(self) -> int:
        """Tokens to compute before the next one can be chosen."""
        return len(self.tokens) - self.num_computed

    @property
    def num_to_encode(self) -> int:
        """Tokens that the encoder must still read, all in one step."""
        return 0 if self.is_encoded else len(self.source_ids)

    @property
    def has_gained(self) -> bool:
        """It has a token more than when it was admitted, so that stopping it now does not undo all of it."""
        return self.last_token_s is not None and self.last_token_s >= self.running_since_s

    @property
    def is_prefilling(self) -> bool:
        """More than the last token is to be computed."""
        return self.num_pending > 1 or self.num_to_encode > 0

    @property
    def tables(self) -> tuple[BlockTable, BlockTable]:
        """Both tables."""
        return self.table, self.cross_table

    def forget(self) -> None:
        """Nothing of it is computed any more; its blocks have been taken back."""
        self.num_computed = 0
        self.is_encoded = not self.source_ids
        self.prompt_logprobs.clear()
        self.state = State.WAITING
