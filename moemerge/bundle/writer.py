"""Write the files of a bundle, each as a function from tensors to one file and its hash."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from moemerge.bundle.coded import tensors_of
from moemerge.bundle.layout import (
    POOL_METADATA,
    pool_file,
    pool_tensor,
    residual_file,
    residual_tensor,
)
from moemerge.bundle.manifest import CHECKSUMS
from moemerge.checkpoint.headers import StoredTensor
from moemerge.checkpoint.tensors import TensorReader
from moemerge.checkpoint.writer import (
    TensorToWrite,
    ignore,
    memory_tensor,
    replacing,
    stored_tensor,
    write_tensors,
    write_text,
)
from moemerge.models.packed import PackedMatrix, Residual


def write_pool(
    folder: Path,
    layer_index: int,
    experts: Iterable[Mapping[str, TensorToWrite | PackedMatrix]],
    advance: Callable[[int], None] = ignore,
) -> dict[str, str]:
    """Write a layer's pool.

    Args:
        folder: The bundle, or its staging folder.
        layer_index: Counted through all stacks.
        experts: Parts by name, in pool order; matrices of one expert are all plain or all coded alike.
        advance: Told of the bytes written.

    Returns:
        SHA-256 of the written file by its path in the bundle.
    """
    tensors = []
    for number, parts in enumerate(experts):
        for part, matrix in parts.items():
            stem = pool_tensor(number, part)
            if isinstance(matrix, PackedMatrix):
                tensors += _coded(stem, matrix)
            else:
                tensors.append(
                    TensorToWrite(name=stem, dtype=matrix.dtype, shape=matrix.shape, chunks=matrix.chunks)
                )
    name = pool_file(layer_index)
    return {name: write_tensors(folder / name, tensors, POOL_METADATA, advance)}


def write_residuals(
    folder: Path,
    variant: str,
    layer_index: int,
    slots: Sequence[Mapping[str, Residual] | None],
    advance: Callable[[int], None] = ignore,
) -> dict[str, str]:
    """Write a variant's residuals in a layer.

    Args:
        folder: The bundle, or its staging folder.
        variant: Its name.
        layer_index: Counted through all stacks.
        slots: For each slot the parts by name, or None where it has no residual.
        advance: Told of the bytes written.

    Returns:
        SHA-256 of the written file by its path in the bundle; nothing, and no file, when no slot has one.
    """
    tensors = [
        tensor
        for slot, parts in enumerate(slots)
        for part, matrix in (parts or {}).items()
        for tensor in _coded(residual_tensor(slot, part), matrix)
    ]
    if not tensors:
        return {}
    name = residual_file(variant, layer_index)
    return {name: write_tensors(folder / name, tensors, POOL_METADATA, advance)}


def _coded(stem: str, matrix: Residual) -> list[TensorToWrite]:
    """The tensors of a coded matrix, scales and factors in bf16."""
    found = []
    for suffix, tensor in tensors_of(matrix).items():
        assert tensor.dtype in (torch.uint8, torch.bfloat16), f"{stem}.{suffix} is {tensor.dtype}"
        assert tensor.dtype == torch.uint8 or tensor.isfinite().all(), f"{stem}.{suffix} is not finite"
        found.append(memory_tensor(f"{stem}.{suffix}", tensor))
    return found


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
