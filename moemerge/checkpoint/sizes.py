"""Sizes as people write them, `4GiB` or `512MB`, and as they are printed."""

import re
from fractions import Fraction

from moemerge.errors import InvalidRecipe

_UNITS = {
    "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def parse_size(text: str) -> int:
    """Bytes that `text` means.

    Raises:
        InvalidRecipe: No number, or a unit that is missing or ambiguous.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    if not match or match[2].upper() not in _UNITS:
        raise InvalidRecipe(f"{text!r} is not a size; write a number with a unit, for example 4GiB or 512MB")
    return int(Fraction(match[1]) * _UNITS[match[2].upper()])


def format_size(num_bytes: float) -> str:
    """Bytes with a decimal unit, three digits."""
    size = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB" if size < 999.5 else f"{size:,.0f} TB"
