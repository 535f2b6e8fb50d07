"""Rotary embedding: tables for positions, with the scalings of frequencies that configs name.

Values in, values out; knows nothing of caches and layers.

Shapes: T tokens, h head width.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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
    TRAINED_LENGTH = "trained_length"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotary:
    """What a config says about rotation; which of the optional numbers are needed depends on the kind."""

    rope_theta: float
    rope_type: RotaryKind = RotaryKind.DEFAULT
    rope_factor: float | None = None
    rope_low_frequency_factor: float | None = None
    rope_high_frequency_factor: float | None = None
    rope_original_positions: int | None = None
    rope_base_length: int | None = None
    rope_trained_length: int | None = None

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
    RotaryKind.TRAINED_LENGTH: ("rope_base_length", "rope_trained_length"),
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


def trained_length_frequencies(rotary: Rotary, head_size: int, device: torch.device) -> Tensor:
    """Those of a larger theta, which grows with how far training went beyond the length that theta is for.

    Source: NTK-aware scaling in powers of two, as in the model code that the TeleChat series publishes; valid
    up to the trained length, where its other factors are 1.
    """
    lengths = rotary.number("rope_trained_length") / rotary.number("rope_base_length")
    alpha = max(2 ** math.ceil(math.log2(lengths) + 1) - 1, 1)
    scaled = replace(rotary, rope_theta=rotary.rope_theta * alpha ** (head_size / (head_size - 2)))
    return plain_frequencies(scaled, head_size, device)


FREQUENCIES: Mapping[RotaryKind, Callable[[Rotary, int, torch.device], Tensor]] = {
    RotaryKind.DEFAULT: plain_frequencies,
    RotaryKind.LINEAR: linear_frequencies,
    RotaryKind.LLAMA3: llama3_frequencies,
    RotaryKind.TRAINED_LENGTH: trained_length_frequencies,
}
ROUNDED = {RotaryKind.TRAINED_LENGTH: torch.float16}
"""What the reference rounds its tables to, whatever it computes in."""


def rotary_tables(positions_T: Tensor, head_size: int, rotary: Rotary, dtype: torch.dtype) -> RotaryTables:
    """Tables for these positions, computed in float32, rounded where the reference does, and cast."""
    frequencies = FREQUENCIES[rotary.rope_type](rotary, head_size, positions_T.device)
    angles = positions_T.float()[:, None, None] * frequencies
    rounded = ROUNDED.get(rotary.rope_type, dtype)
    cosine, sine = angles.cos().to(rounded).to(dtype), angles.sin().to(rounded).to(dtype)
    return RotaryTables(torch.cat((cosine, cosine), dim=-1), torch.cat((-sine, sine), dim=-1))


def rotate(heads_THh: Tensor, tables: RotaryTables) -> Tensor:
    """Rotary embedding in the half-split form: entry i of a head is paired with entry i + h/2."""
    swapped = heads_THh.roll(heads_THh.shape[-1] // 2, dims=-1)
    return heads_THh * tables.cosine + swapped * tables.sine
