"""Copies that a checkpoint declares tied: kept only as one, after comparing bytes."""

from dataclasses import replace

from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.headers import StoredTensor
from moemerge.checkpoint.tensors import TensorReader
from moemerge.checkpoint.weights import read_weight_headers
from moemerge.errors import IncompatibleInputs


def resolve_ties(checkpoint: Checkpoint, reader: TensorReader) -> Checkpoint:
    """Drop a head that equals the embedding it is tied to, and prove that other copies are copies.

    Raises:
        IncompatibleInputs: A declared copy has other bytes.
    """
    tensors = dict(checkpoint.tensors)
    dropped = dict(checkpoint.dropped)
    if checkpoint.settings["tied_head"] and "head" in tensors:
        head = tensors.pop("head")
        _require_equal(checkpoint, reader, head, tensors["embedding"])
        dropped[head.name] = "copy of embedding"
    if checkpoint.family.tied_copies and dropped.keys() & checkpoint.family.tied_copies.keys():
        stored = read_weight_headers(checkpoint.repository)
        for name, role in checkpoint.family.tied_copies.items():
            if name in dropped:
                _require_equal(checkpoint, reader, stored[name], tensors[role])
    return replace(checkpoint, tensors=tensors, dropped=dropped)


def _require_equal(
    checkpoint: Checkpoint, reader: TensorReader, copy: StoredTensor, original: StoredTensor
) -> None:
    if copy.dtype == original.dtype and reader.digest(copy) == reader.digest(original):
        return
    raise IncompatibleInputs(
        f"{checkpoint.label}: {copy.name} is declared tied to {original.name} but differs from it. "
        f"transformers 4.57 would drop it, 5.23 would use it; set tie_word_embeddings in config.json to "
        f"false to keep both, or remove {copy.name} from the file"
    )
