"""Bundles with coded pool experts and residuals, made of a plain one by rounding to the nearest code.

    write_coded(bundle, tmp_path / "x.moe", pool=[bits(4, 32), None], residuals=[None, low_rank(3)])

The pool has an expert per slot, the first variant's, and one more. Every variant maps its slots to those of
the same number, but the last slot of the last variant to expert 0 and the first slot of the second variant to
the one more. Codes are handed out in turn, over layers and experts or over layers, variants and slots.
"""

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from moemerge.bundle.manifest import (
    CHECKSUMS,
    MANIFEST,
    CodeSpec,
    Features,
    Manifest,
    PoolLayer,
    VariantEntry,
    dump_manifest,
)
from moemerge.bundle.reader import Bundle, open_bundle
from moemerge.bundle.writer import write_checksums, write_pool, write_residuals
from moemerge.checkpoint.digest import hash_file
from moemerge.checkpoint.writer import memory_tensor
from moemerge.models.packed import LowRank, Matrix, PackedMatrix, Residual, pack_codes

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
Codes = Sequence[CodeSpec | None]


def bits(number: int, group: int | None = None) -> CodeSpec:
    return CodeSpec(kind="bits", bits=number, group=group)


def low_rank(rank: int) -> CodeSpec:
    return CodeSpec(kind="low_rank", bits=16, rank=rank)


def random_matrix(num_rows: int, num_columns: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(seed))


def quantise(matrix: Tensor, number: int, group: int | None = None) -> PackedMatrix:
    """The nearest codes, the largest entry of a group at the end of the scale."""
    num_columns = matrix.shape[1]
    group = min(group or num_columns, num_columns)
    half = 2 ** (number - 1)
    groups = matrix.float().split(group, dim=1)
    scales = [(piece.abs().amax(dim=1, keepdim=True) / (half - 0.5)).bfloat16() for piece in groups]
    codes = [
        (piece / scale.float().clamp_min(1e-30)).floor().add(half).clamp(0, 2 * half - 1)
        for piece, scale in zip(groups, scales, strict=True)
    ]
    packed = pack_codes(torch.cat(codes, dim=1).to(torch.uint8), number)
    return PackedMatrix(packed, torch.cat(scales, dim=1), number, group)


def code(matrix: Tensor, spec: CodeSpec) -> Residual:
    """The matrix as a code of that kind."""
    if spec.rank is None:
        return quantise(matrix, spec.bits, spec.group)
    left, sizes, right = torch.linalg.svd(matrix.float(), full_matrices=False)
    return LowRank(
        (left * sizes)[:, : spec.rank].bfloat16().contiguous(), right[: spec.rank].bfloat16().contiguous()
    )


def write_coded(source: Bundle, target: Path, *, pool: Codes, residuals: Codes) -> Bundle:
    """A bundle at `target` with these codes, all else from `source`, an exact plain bundle."""
    shutil.copytree(source.folder, target)
    shutil.rmtree(target / "pool")
    names = list(source.manifest.variants)
    pool_codes, residual_codes = itertools.cycle(pool), itertools.cycle(residuals)
    layers, specs = [], {name: {} for name in names}
    pool_bytes = residual_bytes = 0
    for layer in source.manifest.layers:
        own = source.map_pool(layer.index)
        experts = [own[index] for index in source.variant(names[0]).maps[layer.index]]
        experts.append(own[source.variant(names[1]).maps[layer.index][0]])
        codes = [next(pool_codes) for _ in experts]
        stored = [_coded(parts, spec) for parts, spec in zip(experts, codes, strict=True)]
        write_pool(target, layer.index, [_to_write(parts) for parts in stored])
        pool_bytes += sum(matrix.nbytes for parts in stored for matrix in parts.values())
        dtype = experts[0]["gate" if "gate" in experts[0] else "wi"].dtype
        layers.append(
            PoolLayer(
                **layer.model_dump(include={"index", "stack", "block", "file"}),
                num_experts=len(experts),
                codes=codes if any(codes) else [],
                dtype=DTYPE_NAMES[dtype],
            )
        )
        for name in names:
            slots = []
            for slot, index in enumerate(coded_map(source, name)):
                spec = next(residual_codes)
                specs[name].setdefault(layer.index, []).append(spec)
                mine = own[source.variant(name).maps[layer.index][slot]]
                slots.append(
                    {
                        part: code(t.float() - dense(stored[index][part]), spec)
                        for part, t in mine.items()
                        if t.dim() == 2
                    }
                    if spec
                    else None
                )
            write_residuals(target, name, layer.index, slots)
            residual_bytes += sum(m.nbytes for parts in slots if parts for m in parts.values())
    manifest = source.manifest
    variants = {
        name: VariantEntry(
            **entry.model_dump(exclude={"maps", "residuals"}),
            maps={layer.index: coded_map(source, name) for layer in layers},
            residuals={index: codes for index, codes in specs[name].items() if any(codes)},
        )
        for name, entry in manifest.variants.items()
    }
    features = ["quantised-pool"] * any(pool) + ["residuals"] * any(residuals)
    text = dump_manifest(
        Manifest(
            **manifest.model_dump(
                by_alias=True,
                exclude={"features", "layers", "variants", "pool_bytes", "residual_bytes", "provenance"},
            ),
            features=Features(required=features),
            layers=layers,
            variants=variants,
            pool_bytes=pool_bytes,
            residual_bytes=residual_bytes,
            provenance=manifest.provenance,
        )
    )
    (target / MANIFEST).write_text(text)
    sign(target)
    return open_bundle(target)


def sign(folder: Path) -> None:
    """Write the hashes of the files that are there."""
    (folder / CHECKSUMS).unlink(missing_ok=True)
    files = [path for path in folder.rglob("*") if path.is_file()]
    write_checksums(folder, {path.relative_to(folder).as_posix(): hash_file(path) for path in files})


def coded_map(source: Bundle, name: str) -> list[int]:
    """The expert map of a variant, the same in every layer."""
    names, slots = list(source.manifest.variants), list(range(source.manifest.num_slots))
    if name == names[1]:
        slots[0] = len(slots)
    if name == names[-1]:
        slots[-1] = 0
    return slots


def dense(matrix: Matrix | Residual) -> Tensor:
    return matrix.float() if isinstance(matrix, Tensor) else matrix.dense()


def _coded(parts: dict[str, Matrix], spec: CodeSpec | None) -> dict[str, Matrix]:
    """Matrices as that code, biases in float32; all as they are without one."""
    if spec is None:
        return {part: tensor.clone() for part, tensor in parts.items()}
    return {part: code(t, spec) if t.dim() == 2 else t.float() for part, t in parts.items()}


def _to_write(parts: dict[str, Matrix]) -> dict[str, object]:
    return {
        part: memory_tensor(part, matrix) if isinstance(matrix, Tensor) else matrix
        for part, matrix in parts.items()
    }
