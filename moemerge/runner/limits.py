"""What the scheduler keeps to."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from moemerge.errors import InvalidRecipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a step and a wait may take.

    Attributes:
        max_batch: Sequences that run at once.
        max_step_tokens: Tokens that a step computes; the first encoder input of a step may go beyond.
        max_wait_s: Time without an admission after which a variant's first request goes before all others.
        quantum_s: Time that `grouped` stays with a variant while others wait.
        shares: Of the service, by variant; 1 for those not named.
    """

    max_batch: int = 64
    max_step_tokens: int = 512
    max_wait_s: float = 30.0
    quantum_s: float = 0.5
    shares: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise InvalidRecipe(f"max batch is {self.max_batch}, expected at least 1")
        if self.max_step_tokens < self.max_batch:
            raise InvalidRecipe(
                f"max step tokens is {self.max_step_tokens}, expected at least max batch, {self.max_batch}, "
                f"so that every running sequence gets its next token"
            )
        for name, value in (("max wait", self.max_wait_s), ("quantum", self.quantum_s)):
            if not 0 <= value < float("inf"):
                raise InvalidRecipe(f"{name} is {value} seconds, expected 0 or more")
        for variant, share in self.shares.items():
            if not 0 < share < float("inf"):
                raise InvalidRecipe(f"share of {variant} is {share}, expected more than 0")
