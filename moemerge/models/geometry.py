"""What a key/value cache holds of a model for each token."""

from typing import NamedTuple

import torch

from moemerge.models.decoder import Decoder
from moemerge.models.encoder_decoder import EncoderDecoder


class CacheGeometry(NamedTuple):
    """What one block holds; of each head a key of `head_size` and a value, of that size too by default."""

    num_layers: int
    num_kv_heads: int
    head_size: int
    block_tokens: int
    own_value_size: int | None = None

    @property
    def value_size(self) -> int:
        """Width of a value."""
        return self.own_value_size or self.head_size

    def block_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of a block, keys and values of all layers."""
        entries = self.num_kv_heads * (self.head_size + self.value_size)
        return self.num_layers * self.block_tokens * entries * dtype.itemsize


def cache_geometry(model: Decoder | EncoderDecoder, block_tokens: int) -> CacheGeometry:
    """What a block of the key/value cache holds for this model."""
    if isinstance(model, Decoder):
        decoder = model.config
        if decoder.latent_size is not None:
            key_size = decoder.latent_size + decoder.head_size
            return CacheGeometry(decoder.num_layers, 1, key_size, block_tokens, decoder.latent_size)
        return CacheGeometry(decoder.num_layers, decoder.num_kv_heads, decoder.head_size, block_tokens)
    config = model.config
    return CacheGeometry(config.num_decoder_layers, config.num_heads, config.head_size, block_tokens)
