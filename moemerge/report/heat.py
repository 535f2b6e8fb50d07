"""A matrix as text: half blocks in colour, shades without colour, plain characters without either. Pure."""

from collections.abc import Sequence
from enum import StrEnum
from statistics import fmean

import numpy as np

from moemerge.report.colours import shade
from moemerge.report.contents import Matrix

_SHADES = " ░▒▓█"
_CHARACTERS = " .:-=+*#%@"
_BARS = "▁▂▃▄▅▆▇█"
_DIGITS = "0123456789"


class Form(StrEnum):
    """What a terminal can show."""

    COLOUR = "colour"
    SHADES = "shades"
    ASCII = "ascii"


def by_slot(num_variants: int, num_slots: int) -> list[int]:
    """Rows of (variant, slot) in the order (slot, variant): siblings become blocks along the diagonal."""
    return [variant * num_slots + slot for slot in range(num_slots) for variant in range(num_variants)]


def average_blocks(matrix: Matrix, most: int) -> tuple[Matrix, int]:
    """The matrix in at most so many rows, and how many rows and columns became one by their mean."""
    size = matrix.shape[0]
    factor = -(-size // most)
    if factor == 1:
        return matrix, 1
    starts = np.arange(0, size, factor)
    sums = np.add.reduceat(np.add.reduceat(matrix, starts, axis=0), starts, axis=1)
    lengths = np.diff(np.append(starts, size))
    averaged: Matrix = sums / np.outer(lengths, lengths)
    return averaged, factor


def draw(matrix: Matrix, form: Form, width: int, top: float) -> tuple[list[str], int]:
    """Lines at most `width` wide, from 0 to `top` and beyond, and the factor of averaging.

    Colour shows two rows in a line; the others repeat a character to keep cells about square.
    """
    in_colour = form is Form.COLOUR
    cells, factor = average_blocks(matrix, max(1, width if in_colour else width // 2))
    scaled = np.minimum(cells / (top or 1.0), 1.0)
    if in_colour:
        return [_coloured(scaled[row : row + 2]) for row in range(0, len(scaled), 2)], factor
    ramp = _SHADES if form is Form.SHADES else _CHARACTERS
    return [_plain(row, ramp) for row in scaled], factor


def strip(values: Sequence[float | None], form: Form, width: int) -> tuple[str, int]:
    """One character a layer, from 0 to the largest value, and how many layers became one by their mean."""
    factor = max(1, -(-len(values) // max(1, width)))
    parts = [
        [value for value in values[start : start + factor] if value is not None]
        for start in range(0, len(values), factor)
    ]
    means = [fmean(part) if part else None for part in parts]
    top = max((mean for mean in means if mean is not None), default=0.0) or 1.0
    ramp = _DIGITS if form is Form.ASCII else _BARS
    cells = [" " if m is None else ramp[min(len(ramp) - 1, int(m / top * len(ramp)))] for m in means]
    return "".join(cells), factor


def legend(top: float, form: Form) -> str:
    """What the ends of the scale mean."""
    most = f"{top:.3g} and more"
    if form is Form.COLOUR:
        ramp = "".join(f"\x1b[38;2;{_rgb(step / 15)}m█" for step in range(16)) + "\x1b[0m"
        return f"0 {ramp} {most}"
    ramp = _SHADES if form is Form.SHADES else _CHARACTERS
    return f"0 [{ramp}] {most}"


def _coloured(rows: Matrix) -> str:
    upper, lower = rows[0], rows[1] if len(rows) > 1 else None
    cells = []
    for column, value in enumerate(upper):
        below = f"\x1b[48;2;{_rgb(float(lower[column]))}m" if lower is not None else ""
        cells.append(f"\x1b[38;2;{_rgb(float(value))}m{below}▀")
    return "".join(cells) + "\x1b[0m"


def _plain(row: Sequence[float] | Matrix, ramp: str) -> str:
    return "".join(ramp[min(len(ramp) - 1, int(value * len(ramp)))] * 2 for value in row).rstrip()


def _rgb(value: float) -> str:
    return ";".join(map(str, shade(value)))
