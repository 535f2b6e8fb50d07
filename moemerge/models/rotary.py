"""Rotary embedding: tables for positions, with the scalings of frequencies that configs name.

Values in, values out; knows nothing of caches and layers.

Shapes: T tokens, h head width.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

from moemerge.errors import UnsupportedCheckpoint


class RotaryKind(StrEnum):
    """The closed list of scalings that a family description may name."""

    DEFAULT = "default"
    LINEAR = "linear"
    LLAMA3 = "llama3"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotary:
    """What a config says about rotation; which of the optional numbers are needed depends on the kind."""

    rope_theta: float
    rope_type: RotaryKind = RotaryKind.DEFAULT
    rope_factor: float | None = None
    rope_low_frequency_factor: float | None = None
    rope_high_frequency_factor: float | None = None
    rope_original_positions: int | None = None

    def __post_init__(self) -> None:
        missing = [name for name in _NEEDED[self.rope_type] if getattr(self, name) is None]
        if missing:
            raise UnsupportedCheckpoint(
                f"model settings: rope_type {self.rope_type} needs {', '.join(missing)}"
            )

    def number(self, name: str) -> float:
        """One of the numbers that the kind needs."""
        value = getattr(self, name)
        assert value is not None
        return float(value)


_NEEDED = {
    RotaryKind.DEFAULT: (),
    RotaryKind.LINEAR: ("rope_factor",),
    RotaryKind.LLAMA3: (
        "rope_factor",
        "rope_low_frequency_factor",
        "rope_high_frequency_factor",
        "rope_original_positions",
    ),
}


class RotaryTables(NamedTuple):
    """Cosines and sines, [T, 1, h]; the sines of the first half of a head are negative."""

    cosine: Tensor
    sine: Tensor


def plain_frequencies(rotary: Rotary, head_size: int, device: torch.device) -> Tensor:
    """`theta^(-2i/h)`, float32 [h/2]."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device=device) / head_size
    return 1.0 / rotary.rope_theta**exponents


def linear_frequencies(rotary: Rotary, head_size: int, device: torch.device) -> Tensor:
    """Positions divided by the factor."""
    return plain_frequencies(rotary, head_size, device) / rotary.number("rope_factor")


def llama3_frequencies(rotary: Rotary, head_size: int, device: torch.device) -> Tensor:
    """Long waves divided by the factor, short ones kept, those between in between.

    Source: Llama 3.1, `apply_scaling` of its published model code.
    """
    plain = plain_frequencies(rotary, head_size, device)
    low, high = rotary.number("rope_low_frequency_factor"), rotary.number("rope_high_frequency_factor")
    turns = rotary.number("rope_original_positions") * plain / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * (kept + (1 - kept) / rotary.number("rope_factor"))


FREQUENCIES: Mapping[RotaryKind, Callable[[Rotary, int, torch.device], Tensor]] = {
    RotaryKind.DEFAULT: plain_frequencies,
    RotaryKind.LINEAR: linear_frequencies,
    RotaryKind.LLAMA3: llama3_frequencies,
}


def rotary_tables(positions_T: Tensor, head_size: int, rotary: Rotary, dtype: torch.dtype) -> RotaryTables:
    """Tables for these positions, computed in float32 and cast once."""
    frequencies = FREQUENCIES[rotary.rope_type](rotary, head_size, positions_T.device)
    angles = positions_T.float()[:, None, None] * frequencies
    cosine, sine = angles.cos().to(dtype), angles.sin().to(dtype)
    return RotaryTables(torch.cat((cosine, cosine), dim=-1), torch.cat((-sine, sine), dim=-1))


def rotate(heads_THh: Tensor, tables: RotaryTables) -> Tensor:
    """Rotary embedding in the half-split form: entry i of a head is paired with entry i + h/2."""
    swapped = heads_THh.roll(heads_THh.shape[-1] // 2, dims=-1)
    return heads_THh * tables.cosine + swapped * tables.sine
