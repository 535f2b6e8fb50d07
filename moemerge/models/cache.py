"""Keys and values of the tokens seen so far.

Each row's keys lie at their positions, one contiguous tensor per layer. Rows may have different
lengths: what lies behind a row's length is padding that later tokens overwrite. Knows nothing of
models, variants and memory limits.

Shapes: B rows, G key/value heads, T new tokens, S positions in use, h head width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

KeysAndValues = tuple[Tensor, Tensor]


class KeyValueCache:
    """Self-attention keys and values of a batch, growing in chunks.

    A forward pass calls `append` once per layer, then `advance` once. Until `advance` nothing is
    counted, so a pass that failed half-way can simply be repeated.
    """

    def __init__(self, num_layers: int, batch_size: int = 1, chunk_tokens: int = 256) -> None:
        self._layers: list[KeysAndValues | None] = [None] * num_layers
        self._lengths = [0] * batch_size
        self._chunk_tokens = chunk_tokens

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens held, per row."""
        return tuple(self._lengths)

    @property
    def length(self) -> int:
        """Tokens held by the longest row."""
        return max(self._lengths)

    @property
    def is_ragged(self) -> bool:
        """Rows differ in length."""
        return min(self._lengths) != max(self._lengths)

    def append(self, layer_index: int, key_BGTh: Tensor, value_BGTh: Tensor) -> KeysAndValues:
        """Write new keys and values behind each row's length.

        Returns:
            Views [B, G, S, h] of all keys and values, S = `length` + T. A shorter row's tail is finite
            and meaningless; hide it.
        """
        end = self.length + key_BGTh.shape[2]
        keys, values = self._reserve(layer_index, end, key_BGTh, value_BGTh)
        self._write(keys, key_BGTh)
        self._write(values, value_BGTh)
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, num_new: int | Sequence[int]) -> None:
        """Count tokens that all layers have appended, as many for each row or per row."""
        counts = [num_new] * len(self._lengths) if isinstance(num_new, int) else num_new
        self._lengths = [length + count for length, count in zip(self._lengths, counts, strict=True)]

    def _write(self, stored: Tensor, new_BGTh: Tensor) -> None:
        num_new = new_BGTh.shape[2]
        if not self.is_ragged:
            stored[:, :, self.length : self.length + num_new] = new_BGTh
            return
        for row, length in enumerate(self._lengths):
            stored[row, :, length : length + num_new] = new_BGTh[row]

    def _reserve(self, layer_index: int, end: int, key: Tensor, value: Tensor) -> KeysAndValues:
        stored = self._layers[layer_index]
        if stored is None:
            stored = self._enlarged(key[:, :, :0], end), self._enlarged(value[:, :, :0], end)
        elif stored[0].shape[2] < end:
            stored = self._enlarged(stored[0], end), self._enlarged(stored[1], end)
        self._layers[layer_index] = stored
        return stored

    def _enlarged(self, stored: Tensor, end: int) -> Tensor:
        """Copy with room for `end` tokens, and for half as many again as there was room for."""
        batch_size, num_heads, room, head_size = stored.shape
        wanted = max(end, room + room // 2)
        chunks = -(-wanted // self._chunk_tokens)
        # Zeros, because hidden positions still meet a weight of zero, and zero times NaN is NaN.
        larger = stored.new_zeros(batch_size, num_heads, chunks * self._chunk_tokens, head_size)
        larger[:, :, :room] = stored
        return larger


@dataclass(frozen=True, slots=True)
class DecodingCache:
    """What the decoder of an encoder-decoder keeps between steps.

    Attributes:
        past: Keys and values of the tokens decoded so far.
        cross: Per layer those of the encoder's output, filled at the first step and constant after.
    """

    past: KeyValueCache
    cross: dict[int, KeysAndValues] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens decoded so far, by the longest row."""
        return self.past.length

    def cross_or(self, layer_index: int, compute: Callable[[], KeysAndValues]) -> KeysAndValues:
        """Cross-attention keys and values of a layer, computed when asked for the first time."""
        if layer_index not in self.cross:
            self.cross[layer_index] = compute()
        return self.cross[layer_index]
