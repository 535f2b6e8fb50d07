"""Write the files of a bundle, each as a function from tensors to one file and its hash."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from moemerge.bundle.layout import POOL_METADATA, pool_file, pool_tensor
from moemerge.bundle.manifest import CHECKSUMS
from moemerge.checkpoint.headers import StoredTensor
from moemerge.checkpoint.tensors import TensorReader
from moemerge.checkpoint.writer import (
    TensorToWrite,
    ignore,
    replacing,
    stored_tensor,
    write_tensors,
    write_text,
)


def write_pool(
    folder: Path,
    layer_index: int,
    experts: Iterable[dict[str, TensorToWrite]],
    advance: Callable[[int], None] = ignore,
) -> dict[str, str]:
    """Write a layer's pool.

    Args:
        folder: The bundle, or its staging folder.
        layer_index: Counted through all stacks.
        experts: Parts by name, in pool order.
        advance: Told of the bytes written.

    Returns:
        SHA-256 of the written file by its path in the bundle.
    """
    tensors = [
        TensorToWrite(name=pool_tensor(number, part), dtype=t.dtype, shape=t.shape, chunks=t.chunks)
        for number, parts in enumerate(experts)
        for part, t in parts.items()
    ]
    name = pool_file(layer_index)
    return {name: write_tensors(folder / name, tensors, POOL_METADATA, advance)}


def copy_tensors(
    folder: Path,
    name: str,
    tensors: dict[str, StoredTensor],
    reader: TensorReader,
    advance: Callable[[int], None] = ignore,
) -> dict[str, str]:
    """Write a file of stored tensors under new names; returns its SHA-256 by path in the bundle."""
    writes = [stored_tensor(new_name, tensor, reader) for new_name, tensor in tensors.items()]
    return {name: write_tensors(folder / name, writes, POOL_METADATA, advance)}


def write_bytes(folder: Path, name: str, content: bytes) -> dict[str, str]:
    """Write a small file; returns its SHA-256 by path in the bundle."""
    with replacing(folder / name) as file:
        file.write(content)
    return {name: hashlib.sha256(content).hexdigest()}


def write_checksums(folder: Path, digests: dict[str, str]) -> None:
    """Write `SHA256SUMS` in the form that `sha256sum --check` reads."""
    write_text(folder / CHECKSUMS, format_checksums(digests))


def format_checksums(digests: dict[str, str]) -> str:
    """The text of `SHA256SUMS`: one line a file, sorted by path."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


def group_equal(
    tensors: dict[str, dict[str, StoredTensor]], reader: TensorReader
) -> tuple[list[dict[str, StoredTensor]], dict[str, dict[str, int | None]]]:
    """Find non-expert tensors that several variants have with equal bytes.

    Args:
        tensors: By variant, then by exported name.
        reader: Open reader.

    Returns:
        Shared tensors by name, in as many dictionaries as one name has groups, and for each variant
        and name the position of its dictionary, or None where the tensor is the variant's own.
    """
    shared: list[dict[str, StoredTensor]] = []
    places: dict[str, dict[str, int | None]] = {variant: {} for variant in tensors}
    names = dict.fromkeys(name for own in tensors.values() for name in own)
    for name in names:
        number = 0
        for members in _equal_groups({v: own[name] for v, own in tensors.items() if name in own}, reader):
            if len(members) > 1:
                if number == len(shared):
                    shared.append({})
                shared[number][name] = tensors[members[0]][name]
            for variant in members:
                places[variant][name] = number if len(members) > 1 else None
            number += len(members) > 1
    return shared, places


def _equal_groups(tensors: dict[str, StoredTensor], reader: TensorReader) -> Sequence[list[str]]:
    """Variants by equal content; only what agrees in short samples is read whole."""
    by_sample: dict[str, list[str]] = {}
    for variant, tensor in tensors.items():
        by_sample.setdefault(reader.sample_digest(tensor), []).append(variant)
    groups: dict[tuple[str, str], list[str]] = {}
    for sample, variants in by_sample.items():
        for variant in variants:
            # The sample stands for dtype and shape, which the digest of the bytes does not tell.
            key = (sample, reader.digest(tensors[variant]) if len(variants) > 1 else "")
            groups.setdefault(key, []).append(variant)
    return list(groups.values())
