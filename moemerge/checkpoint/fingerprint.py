"""Tells whether a checkpoint is, as far as samples show, the one a plan was made for."""

from blake3 import blake3

from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.tensors import TensorReader


def file_stamps(checkpoint: Checkpoint) -> list[tuple[str, int, int]]:
    """Name, size and time of change of its files: fingerprints are samples and may miss a change."""
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(checkpoint.files)]


def fingerprint(checkpoint: Checkpoint, reader: TensorReader) -> str:
    """BLAKE3 over dtype, shape and three stretches of 4 KiB of every tensor, by role.

    Training that touches all of a tensor changes it. A change of some rows elsewhere in a large tensor
    is not seen: it guards against a mix-up, not against an intention. Independent of sharding and layout.
    """
    hasher = blake3()
    for role, tensor in sorted(checkpoint.tensors.items()):
        hasher.update(f"{role} {reader.sample_digest(tensor)}\n".encode())
    for (layer, slot), parts in sorted(checkpoint.experts.items()):
        for part, tensor in sorted(parts.items()):
            hasher.update(f"{layer}.{slot}.{part} {reader.sample_digest(tensor)}\n".encode())
    return hasher.hexdigest(32)
