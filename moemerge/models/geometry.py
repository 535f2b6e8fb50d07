"""What a key/value cache holds of a model for each token."""

from typing import NamedTuple

import torch

from moemerge.models.decoder import Decoder
from moemerge.models.encoder_decoder import EncoderDecoder


class CacheGeometry(NamedTuple):
    """What one block holds."""

    num_layers: int
    num_kv_heads: int
    head_size: int
    block_tokens: int

    def block_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of a block, keys and values of all layers."""
        return 2 * self.num_layers * self.block_tokens * self.num_kv_heads * self.head_size * dtype.itemsize


def cache_geometry(model: Decoder | EncoderDecoder, block_tokens: int) -> CacheGeometry:
    """What a block of the key/value cache holds for this model."""
    if isinstance(model, Decoder):
        decoder = model.config
        return CacheGeometry(decoder.num_layers, decoder.num_kv_heads, decoder.head_size, block_tokens)
    config = model.config
    return CacheGeometry(config.num_decoder_layers, config.num_heads, config.head_size, block_tokens)
