"""Who of those that wait goes first: fairness between variants.

Token counters as in VTC (Sheng et al., OSDI 2024): the waiting variant with the least service for its share
goes first, and one that comes back starts no lower than the least busy. A variant that waits and got nothing
in for `max_wait_s` goes before all others.
"""

from collections.abc import Collection, Iterable, Mapping

from moemerge.runner.sequence import Sequence

OUTPUT_COST = 2.0
"""Service that an answer's token counts for; a prompt's token counts 1 (the ratio of the VTC paper)."""


class Fairness:
    """What each variant was served over its share, and when it last got a sequence in."""

    def __init__(self, shares: Mapping[str, float], max_wait_s: float) -> None:
        self._shares = shares
        self._max_wait_s = max_wait_s
        self._served: dict[str, float] = {}
        self._admitted_s: dict[str, float] = {}

    def arrived(self, variant: str, active: Collection[str]) -> None:
        """A sequence arrived; a variant that was not active does not collect what it left unused."""
        served = self._served.get(variant, 0.0)
        if variant not in active:
            served = max(served, min((self._served[name] for name in active), default=0.0))
        self._served[variant] = served

    def admitted(self, variant: str, now_s: float) -> None:
        """The variant got a sequence in."""
        self._admitted_s[variant] = now_s

    def computed(self, variant: str, *, num_prompt: int, num_answer: int) -> None:
        """So many tokens of prompts and answers were computed for the variant."""
        self._served[variant] += (num_prompt + OUTPUT_COST * num_answer) / self._shares.get(variant, 1.0)

    def served(self, variant: str) -> float:
        """Service over share; comparable between variants that have work."""
        return self._served[variant]

    def first(self, heads: Iterable[Sequence], active: Collection[str], now_s: float) -> Sequence | None:
        """The next to be let in: who has waited too long, those before all whose variant has nothing running.

        Args:
            heads: First sequences of their variants.
            active: Variants that have sequences running.
            now_s: Time of the decision.
        """
        heads = list(heads)
        overdue = [head for head in heads if self.is_overdue(head, now_s)]
        if overdue:
            return min(overdue, key=lambda s: (s.variant in active, self._left_out_since_s(s), s.number))
        return min(heads, key=lambda s: (self._served[s.variant], s.number), default=None)

    def is_overdue(self, head: Sequence, now_s: float) -> bool:
        """Whether the first of a variant's sequences has waited too long."""
        return now_s - self._left_out_since_s(head) >= self._max_wait_s

    def _left_out_since_s(self, head: Sequence) -> float:
        """Since when its variant waits and gets nothing in; waiting behind one's own kind does not count."""
        return max(head.queued_s, self._admitted_s.get(head.variant, head.queued_s))
