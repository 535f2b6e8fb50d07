"""How many requests may be unfinished, and when a caller who is turned away may try again."""

import math
from collections import Counter, deque

from moemerge.errors import InvalidRecipe, Overloaded

_RATE_WINDOW = 64


class Backlog:
    """Unfinished requests by variant, and the pace at which they end; not safe between threads."""

    def __init__(self, max_batch: int, max_queue: int, max_queue_per_variant: int | None) -> None:
        """Begin without requests.

        Args:
            max_batch: Requests that can run at once.
            max_queue: Unfinished requests beyond those.
            max_queue_per_variant: The same for one variant; None for no bound of its own.

        Raises:
            InvalidRecipe: A bound is negative.
        """
        if max_queue < 0 or (max_queue_per_variant is not None and max_queue_per_variant < 0):
            raise InvalidRecipe("a queue's bound is negative, expected 0 or more")
        self._most = max_batch + max_queue
        self._most_of_variant = None if max_queue_per_variant is None else max_batch + max_queue_per_variant
        self._unfinished: Counter[str] = Counter()
        self._finished_s: deque[float] = deque(maxlen=_RATE_WINDOW)

    def begin(self, variant: str) -> None:
        """A request was taken."""
        self._unfinished[variant] += 1

    def end(self, variant: str, now_s: float) -> None:
        """A request has ended."""
        self._unfinished[variant] -= 1
        self._finished_s.append(now_s)

    def check_room(self, variant: str) -> None:
        """Make sure that one more request may be taken.

        Raises:
            Overloaded: Too many are unfinished, of this variant or in all.
        """
        of_variant, in_all = self._unfinished[variant], self._unfinished.total()
        if self._most_of_variant is not None and of_variant >= self._most_of_variant:
            raise Overloaded(
                f"{of_variant} requests to variant {variant} are unfinished, the most allowed",
                retry_after_s=self._retry_after_s(of_variant),
                scope="variant",
            )
        if in_all >= self._most:
            raise Overloaded(
                f"{in_all} requests are unfinished, the most allowed",
                retry_after_s=self._retry_after_s(in_all),
                scope="server",
            )

    def _retry_after_s(self, num_unfinished: int) -> int:
        """Whole seconds in which a tenth of the unfinished requests ends, by the pace of the last ones."""
        finished = self._finished_s
        if len(finished) < 2:
            return 1
        rate = (len(finished) - 1) / max(finished[-1] - finished[0], 1e-3)
        return min(60, max(1, math.ceil(num_unfinished / 10 / rate)))
