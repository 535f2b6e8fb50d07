"""Checkpoints of true size without data: headers as they would be, and behind them a hole in the file.

    folder = write_skeleton(tmp_path / "big", config, dtype="F32")

Takes kilobytes on disk and milliseconds, whatever the size; enough for all that works from headers.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moemerge.checkpoint.family import Family, Settings, evaluate_shape, load_families
from moemerge.checkpoint.headers import DTYPE_BYTES
from moemerge.checkpoint.settings import read_settings
from tests.factories import write_json

SHARD_BYTES = 10 * 10**9


def write_skeleton(
    folder: Path, family: str, config: Mapping[str, Any], *, dtype: str = "BF16", prefixed: bool = True
) -> Path:
    """Write `config.json` and the headers of every tensor that it asks for, in shards with an index.

    Args:
        folder: Where to.
        family: Name of the description.
        config: As published.
        dtype: Of all tensors.
        prefixed: Whether names have the prefix that their family may leave out.
    """
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    description = load_families()[family]
    settings, findings = read_settings(dict(config), description, "config.json")
    assert not [finding for finding in findings if finding.level == "error"], findings
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in _tensors(description, settings):
        nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
        if shards[-1] and filled + nbytes > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name if prefixed else name.removeprefix(description.optional_prefix)] = shape
        filled += nbytes
    weight_map = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        total += _write_hole(folder / file, shard, dtype)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
    return folder


def _tensors(family: Family, settings: Settings) -> Iterator[tuple[str, tuple[int, ...]]]:
    symbols = family.symbols(settings)
    for _, (name, *_), pattern in family.expected_tensors(settings):
        if not (pattern.tied_to and settings["tied_head"]):
            yield name, evaluate_shape(pattern.shape, symbols)
    num_experts = int(settings["num_experts"] or 0)
    for layer in family.routed_layers(settings):
        for tensor in family.experts.layouts[0].tensors:
            shape = tensor.shape(family.part_shape(tensor.holds[0], settings), num_experts)
            for slot in range(1 if tensor.is_stacked or "{expert}" not in tensor.name else num_experts):
                yield family.expert_tensor_name(tensor, layer, slot), shape


def _write_hole(path: Path, tensors: Mapping[str, tuple[int, ...]], dtype: str) -> int:
    """A safetensors file that has no bytes behind its header; returns how many it says it has."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end
