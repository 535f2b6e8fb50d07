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
    YARN = "yarn"
    LONGROPE = "longrope"
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
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_is_truncated: bool = True
    rope_table_factor: float | None = None
    rope_mscale: float | None = None
    rope_mscale_all: float | None = None
    rope_short_factors: tuple[float, ...] | None = None
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
    RotaryKind.YARN: ("rope_factor", "rope_original_positions"),
    RotaryKind.LONGROPE: ("rope_short_factors", "rope_table_factor"),
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


def yarn_frequencies(rotary: Rotary, head_size: int, device: torch.device) -> Tensor:
    """Waves that turn often within the original context kept, those that turn little divided by the factor.

    Source: YaRN, Peng et al. 2023 (arXiv:2309.00071), section 3.2.
    """
    plain = plain_frequencies(rotary, head_size, device)
    low, high = (
        _index_of_turns(rotary, turns, head_size) for turns in (rotary.rope_beta_fast, rotary.rope_beta_slow)
    )
    if rotary.rope_is_truncated:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_size - 1)
    index = torch.arange(head_size // 2, dtype=torch.float32, device=device)
    divided = ((index - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain * (1 - divided) + plain / rotary.number("rope_factor") * divided


def _index_of_turns(rotary: Rotary, turns: float, head_size: int) -> float:
    """Index of the frequency that turns so often within the original context."""
    length = rotary.number("rope_original_positions")
    return head_size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rotary.rope_theta))


def longrope_frequencies(rotary: Rotary, head_size: int, device: torch.device) -> Tensor:
    """Each frequency divided by a factor of its own: those for texts within the original context.

    Longer texts take other factors from their first token on, so that cached keys would be wrong.

    Source: LongRoPE, Ding et al. 2024 (arXiv:2402.13753).
    """
    assert rotary.rope_short_factors is not None
    factors = torch.tensor(rotary.rope_short_factors, dtype=torch.float32, device=device)
    return plain_frequencies(rotary, head_size, device) / factors


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
    RotaryKind.YARN: yarn_frequencies,
    RotaryKind.LONGROPE: longrope_frequencies,
    RotaryKind.TRAINED_LENGTH: trained_length_frequencies,
}
ROUNDED = {RotaryKind.TRAINED_LENGTH: torch.float16}
"""What the reference rounds its tables to, whatever it computes in."""


def table_factor(rotary: Rotary) -> float:
    """What cosines and sines are multiplied with, so that attention stays as sharp over longer texts."""
    if rotary.rope_table_factor is not None:
        return rotary.rope_table_factor
    if rotary.rope_type != RotaryKind.YARN:
        return 1.0
    if rotary.rope_mscale and rotary.rope_mscale_all:
        return _sharpening(rotary, rotary.rope_mscale) / _sharpening(rotary, rotary.rope_mscale_all)
    return _sharpening(rotary, 1.0)


def score_factor(rotary: Rotary) -> float:
    """What scores of latent attention are multiplied with for the same reason."""
    if rotary.rope_type != RotaryKind.YARN or not rotary.rope_mscale_all:
        return 1.0
    return _sharpening(rotary, rotary.rope_mscale_all) ** 2


def _sharpening(rotary: Rotary, mscale: float) -> float:
    return 0.1 * mscale * math.log(max(rotary.number("rope_factor"), 1.0)) + 1.0


def rotary_tables(positions_T: Tensor, head_size: int, rotary: Rotary, dtype: torch.dtype) -> RotaryTables:
    """Tables for these positions, computed in float32, rounded where the reference does, and cast."""
    frequencies = FREQUENCIES[rotary.rope_type](rotary, head_size, positions_T.device)
    angles, factor = positions_T.float()[:, None, None] * frequencies, table_factor(rotary)
    rounded = ROUNDED.get(rotary.rope_type, dtype)
    cosine, sine = angles.cos(), angles.sin()
    if factor != 1.0:
        cosine, sine = cosine * factor, sine * factor
    cosine, sine = cosine.to(rounded).to(dtype), sine.to(rounded).to(dtype)
    return RotaryTables(torch.cat((cosine, cosine), dim=-1), torch.cat((-sine, sine), dim=-1))


def rotate(heads_THh: Tensor, tables: RotaryTables) -> Tensor:
    """Rotary embedding in the half-split form: entry i of a head is paired with entry i + h/2."""
    swapped = heads_THh.roll(heads_THh.shape[-1] // 2, dims=-1)
    return heads_THh * tables.cosine + swapped * tables.sine


def pairs_apart(heads_THh: Tensor) -> Tensor:
    """Heads whose rotated pairs are neighbours, in the order that `rotate` takes; no score depends on it."""
    return heads_THh.view(*heads_THh.shape[:-1], -1, 2).transpose(-1, -2).flatten(-2)
