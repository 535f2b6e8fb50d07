"""How many bytes a device leaves for experts, beside all else that a runner holds."""

from dataclasses import dataclass

from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.sizes import format_size, parse_size
from moemerge.checkpoint.tensors import torch_dtype
from moemerge.checkpoint.variants import VariantSet
from moemerge.consolidation.budget import Budget
from moemerge.errors import InvalidRecipe
from moemerge.models import build_model
from moemerge.models.geometry import cache_geometry

BATCH, TOKENS = 16, 4096
"""What a device is to serve when nothing else is said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device, and what it is to serve.

    Attributes:
        text: Its memory as the user wrote it.
        batch: Sequences at once.
        tokens: Of each of them, prompt and answer.
    """

    text: str
    batch: int = BATCH
    tokens: int = TOKENS

    def __post_init__(self) -> None:
        parse_size(self.text)
        if self.batch < 1 or self.tokens < 1:
            raise InvalidRecipe(
                f"--fit-batch {self.batch} and --fit-tokens {self.tokens}: at least one sequence of one token"
            )


def budget_of(device: Device, variants: VariantSet) -> Budget:
    """What is left for pools and residuals when every variant is resident and the cache is full.

    Tensors that several variants have in common are counted for each: repair may change them.

    Raises:
        InvalidRecipe: Nothing is left.
    """
    resident = _resident_bytes(variants)
    cache = _cache_bytes(variants, device.batch, device.tokens)
    left = parse_size(device.text) - resident - cache
    if left <= 0:
        raise InvalidRecipe(
            f"--fit {device.text} leaves nothing for experts: {len(variants.variants)} resident variants "
            f"take {format_size(resident)}, keys and values of {device.batch} sequences of {device.tokens} "
            f"tokens {format_size(cache)}. Use a larger device, or fewer or shorter sequences (--fit-batch, "
            f"--fit-tokens)"
        )
    return Budget(f"fit {device.text}", limit=left)


def beside_experts(variants: VariantSet) -> int:
    """Bytes of what a runner holds beside experts: every variant's other tensors, and the default's cache."""
    return _resident_bytes(variants) + _cache_bytes(variants, BATCH, TOKENS)


def _resident_bytes(variants: VariantSet) -> int:
    return sum(checkpoint.other_bytes for checkpoint in variants.variants.values())


def _cache_bytes(variants: VariantSet, batch: int, tokens: int) -> int:
    return batch * tokens * max(map(_token_bytes, variants.variants.values()))


def _token_bytes(checkpoint: Checkpoint) -> int:
    """Keys and values of a token, in the dtype of the model."""
    dtype = max(map(torch_dtype, checkpoint.tensors.values()), key=lambda one: one.itemsize)
    model = build_model(checkpoint.family.arithmetic, checkpoint.settings)
    return cache_geometry(model, 1).block_bytes(dtype)
