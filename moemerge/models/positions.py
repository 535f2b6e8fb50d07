"""Relative position bias: buckets of distances. Values in, values out; knows nothing of caches and layers."""

import math

import torch
from torch import Tensor


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
