"""A short proof that a checkpoint is the one a plan was made for."""

from blake3 import blake3

from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.tensors import TensorReader


def fingerprint(checkpoint: Checkpoint, reader: TensorReader) -> str:
    """BLAKE3 over dtype, shape and three stretches of 4 KiB of every tensor, by role.

    Any training step changes it; a change of a few bytes elsewhere in a large tensor may not, and is
    found by the hashes of the bundle instead. Independent of sharding and layout.
    """
    hasher = blake3()
    for role, tensor in sorted(checkpoint.tensors.items()):
        hasher.update(f"{role} {reader.sample_digest(tensor)}\n".encode())
    for (layer, slot), parts in sorted(checkpoint.experts.items()):
        for part, tensor in sorted(parts.items()):
            hasher.update(f"{layer}.{slot}.{part} {reader.sample_digest(tensor)}\n".encode())
    return hasher.hexdigest(32)
