"""How many bytes the experts of a bundle may take."""

import math
import re
from dataclasses import dataclass

from moemerge.checkpoint.sizes import format_size, parse_size
from moemerge.errors import InvalidRecipe


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit for the pool: a multiple of one variant's expert bytes, bytes, or none (exact).

    Attributes:
        text: As the user wrote it.
        ratio: Multiple of one variant's expert bytes, or None.
        limit: Bytes, or None. With neither, only equal experts share.
    """

    text: str
    ratio: float | None = None
    limit: int | None = None

    @property
    def is_exact(self) -> bool:
        """Whether nothing may change, so that only equal experts are shared."""
        return self.ratio is None and self.limit is None

    def allowed_bytes(self, variant_bytes: int) -> int | None:
        """Bytes the pool may take, None for any number.

        Args:
            variant_bytes: Expert bytes of one variant.
        """
        if self.ratio is not None:
            return math.floor(self.ratio * variant_bytes)
        return self.limit


def parse_budget(text: str) -> Budget:
    """A budget from `exact`, `1.5x` or `40GiB`.

    Raises:
        InvalidRecipe: Neither form, or not positive.
    """
    stripped = text.strip()
    if stripped.lower() == "exact":
        return Budget("exact")
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*[xX]", stripped):
        if float(match[1]) <= 0:
            raise InvalidRecipe(f"budget {text!r} leaves no room for any expert; the least is usually 1x")
        return Budget(stripped, ratio=float(match[1]))
    try:
        limit = parse_size(stripped)
    except InvalidRecipe as error:
        raise InvalidRecipe(
            f"budget {text!r} is neither exact, a multiple of one variant (1.5x), nor a size (40GiB)"
        ) from error
    if limit <= 0:
        raise InvalidRecipe(f"budget {text!r} leaves no room for any expert")
    return Budget(stripped, limit=limit)


def refuse_budget(budget: Budget, allowed: int, least: int, variant_bytes: int) -> InvalidRecipe:
    """The error for a budget below the least possible."""
    ratio = math.ceil(100 * least / variant_bytes) / 100
    return InvalidRecipe(
        f"budget {budget.text} is {format_size(allowed)}, the least possible here is {format_size(least)} "
        f"({least / variant_bytes:.4g}x of one variant's experts). Use --budget {ratio:g}x or more, "
        f"or --within to let experts of one variant share"
    )
