"""How many bytes the experts of a bundle may take."""

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from moemerge.checkpoint.sizes import parse_size
from moemerge.errors import InvalidRecipe


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit for the pool: a multiple of one variant's expert bytes, bytes, or none.

    Attributes:
        text: As the user wrote it.
        ratio: Multiple of one variant's expert bytes, or None.
        limit: Bytes, or None. With neither there is no limit: `EXACT` or `LEAST`.
    """

    text: str
    ratio: Fraction | None = None
    limit: int | None = None

    @property
    def is_exact(self) -> bool:
        """Whether only equal experts share."""
        return self == EXACT

    def allowed_bytes(self, variant_bytes: int) -> int | None:
        """Bytes the pool may take, None for any number.

        Args:
            variant_bytes: Expert bytes of one variant.
        """
        if self.ratio is not None:
            return math.floor(self.ratio * variant_bytes)
        return self.limit


EXACT = Budget("exact")
LEAST = Budget("least")
"""As few bytes as will keep what is asked for."""


def parse_budget(text: str) -> Budget:
    """A budget from `exact`, `1.5x` or `40GiB`.

    Raises:
        InvalidRecipe: Neither form, or not positive.
    """
    stripped = text.strip()
    if stripped.lower() == "exact":
        return EXACT
    if match := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*[xX]", stripped):
        # Exact: 1.15 x 100 bytes are 115, which floating point makes 114.
        ratio = Fraction(match[1])
        if ratio <= 0:
            raise InvalidRecipe(f"budget {text!r} leaves no room for any expert; the least is usually 1x")
        return Budget(stripped, ratio=ratio)
    try:
        limit = parse_size(stripped)
    except InvalidRecipe as error:
        raise InvalidRecipe(
            f"budget {text!r} is neither exact, a multiple of one variant (1.5x), nor a size (40GiB)"
        ) from error
    if limit <= 0:
        raise InvalidRecipe(f"budget {text!r} leaves no room for any expert")
    return Budget(stripped, limit=limit)


def refuse_budget(
    budget: Budget, allowed: int, least: int, variant_bytes: int, *, can_share_more: bool
) -> InvalidRecipe:
    """The error for a budget below the least possible.

    Args:
        budget: What was asked for.
        allowed: Its bytes.
        least: Bytes of the smallest pool that the policy makes.
        variant_bytes: Expert bytes of one variant.
        can_share_more: Whether `--within` would make smaller pools possible.
    """
    ratio = Decimal(-(-100 * least // variant_bytes)) / 100
    within = ", or --within to let experts of one variant share" if can_share_more else ""
    return InvalidRecipe(
        f"budget {budget.text} is {allowed:,} bytes, the least possible here is {least:,} bytes "
        f"({least / variant_bytes:.4g}x of one variant's experts). Use --budget {ratio:f}x or more{within}"
    )
