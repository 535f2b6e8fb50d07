"""Turn a variant of a bundle back into an ordinary checkpoint that other tools load."""

import json
import shutil
from pathlib import Path

from moemerge.bundle.reader import Bundle
from moemerge.bundle.target import building, check_target
from moemerge.checkpoint.disk import check_disk
from moemerge.checkpoint.headers import StoredTensor
from moemerge.checkpoint.tensors import TensorReader
from moemerge.checkpoint.weights import INDEX, SINGLE
from moemerge.checkpoint.writer import stored_tensor, write_tensors, write_text
from moemerge.progress import Progress, Silent

DEFAULT_SHARD_BYTES = 4 * 2**30


def export_variant(
    bundle: Bundle,
    variant: str,
    target: Path,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> list[Path]:
    """Write a variant with one tensor per expert and part, under the names its family exports.

    Args:
        bundle: Where it is.
        variant: Its name.
        target: Folder to create.
        shard_bytes: Upper limit of a file, unless one tensor is larger.
        progress: Told of the bytes written.

    Returns:
        The files written.

    Raises:
        InvalidRecipe: The target exists.
        NotFound: No such variant.
        NotEnoughRoom: The target cannot be written.
        DamagedBundle: Something the manifest names is missing.
    """
    check_target(target)
    tensors = exported_tensors(bundle, variant)
    sources = {name: bundle.side_file(variant, name) for name in bundle.variant(variant).files}
    total = sum(tensor.nbytes for tensor in tensors.values())
    check_disk(target.parent, total, f"writing {target}")
    report = progress or Silent()
    report.start(f"export {variant}", total)
    with building(target) as folder:
        _write_shards(folder, tensors, shard_bytes, report)
        for name, source in sources.items():
            if source:
                shutil.copyfile(source, folder / name)
    return sorted(path for path in target.iterdir())


def exported_tensors(bundle: Bundle, variant: str) -> dict[str, StoredTensor]:
    """Places of all tensors of a variant by exported name, layer by layer."""
    family, entry = bundle.family, bundle.variant(variant)
    names = family.role_names(entry.settings)
    result = {names[role]: tensor for role, tensor in bundle.tensors(variant).items()}
    layout = family.experts.layouts[0]
    for layer in family.routed_layers(entry.settings):
        pool = bundle.pool(layer.index)
        for slot, index in enumerate(entry.maps[layer.index]):
            for tensor in layout.tensors:
                result[family.expert_tensor_name(tensor, layer, slot)] = pool[index][tensor.holds[0]]
    return result


def _write_shards(folder: Path, tensors: dict[str, StoredTensor], shard_bytes: int, report: Progress) -> None:
    shards: list[dict[str, StoredTensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    weight_map: dict[str, str] = {}
    with TensorReader() as reader:
        for number, shard in enumerate(shards, start=1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            writes = [stored_tensor(name, tensor, reader) for name, tensor in shard.items()]
            write_tensors(folder / file, writes, {"format": "pt"}, report.advance)
            weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
