"""What attention is told about positions: rotary tables and relative position bias.

Values in, values out; knows nothing of caches and layers.

Shapes: T tokens, h head width.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class RotaryTables(NamedTuple):
    """Cosines and sines, [T, 1, h]; the sines of the first half of a head are negative."""

    cosine: Tensor
    sine: Tensor


def rotary_tables(positions_T: Tensor, head_size: int, theta: float, dtype: torch.dtype) -> RotaryTables:
    """Tables for inverse frequencies `theta^(-2i/h)`, computed in float32 and cast once."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device=positions_T.device) / head_size
    angles = positions_T.float()[:, None, None] * (1.0 / theta**exponents)
    cosine, sine = angles.cos().to(dtype), angles.sin().to(dtype)
    return RotaryTables(torch.cat((cosine, cosine), dim=-1), torch.cat((-sine, sine), dim=-1))


def rotate(heads_THh: Tensor, tables: RotaryTables) -> Tensor:
    """Rotary embedding in the half-split form: entry i of a head is paired with entry i + h/2."""
    swapped = heads_THh.roll(heads_THh.shape[-1] // 2, dims=-1)
    return heads_THh * tables.cosine + swapped * tables.sine


def relative_buckets(distance: Tensor, num_buckets: int, max_distance: int, bidirectional: bool) -> Tensor:
    """Bucket of each distance, key position minus query position.

    Bidirectional: the upper half of the buckets is for keys after the query. Otherwise such keys, which
    a causal mask hides, share bucket 0. Of the buckets of one direction the first half are exact, the
    rest logarithmic up to `max_distance`.

    Returns:
        Int64, shape of `distance`, in [0, num_buckets).

    Source: T5, Raffel et al. 2020 (arXiv:1910.10683), section 2.1.
    """
    offset = torch.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        offset = (distance > 0) * num_buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    num_exact = num_buckets // 2
    log_share = (distance.clamp(min=1).float() / num_exact).log() / math.log(max_distance / num_exact)
    logarithmic = (num_exact + (log_share * (num_buckets - num_exact)).long()).clamp(max=num_buckets - 1)
    return offset + torch.where(distance < num_exact, distance, logarithmic)
