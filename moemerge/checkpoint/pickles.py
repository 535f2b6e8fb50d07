"""Checkpoints that have only pickles: converted to safetensors once, without running what is in them.

A pickle is a program. torch's weights-only reader runs none of it and knows tensors and containers
alone; whatever else a file asks for is refused. Knows nothing of families.
"""

import json
import pickle
import re
import shutil
import warnings
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from moemerge.checkpoint.conversions import convert_once
from moemerge.checkpoint.repository import LocalFolder
from moemerge.checkpoint.side_files import find_side_files
from moemerge.checkpoint.tensors import TORCH_DTYPES
from moemerge.checkpoint.weights import (
    ADAPTER,
    ADAPTER_PICKLE,
    INDEX,
    PICKLE_INDEX,
    SINGLE,
    find_pickle_files,
    require_files,
)
from moemerge.checkpoint.writer import memory_tensor, write_tensors, write_text
from moemerge.errors import DamagedInput, UnsupportedCheckpoint
from moemerge.progress import Progress, Silent

_SAMPLE_BYTES = 64 * 1024


def convert_pickles(folder: LocalFolder, cache: Path, progress: Progress | None = None) -> LocalFolder:
    """The same checkpoint with safetensors files, converted unless `cache` has it already.

    Every tensor keeps its name, dtype and bytes; tied copies become tensors of their own, for
    `resolve_ties` to compare. One file is open at a time, mapped rather than read.

    Args:
        folder: Has `pytorch_model.bin`, an index of such files, or an adapter's `adapter_model.bin`.
        cache: Folder of conversions; each is complete or not there.
        progress: Told of bytes converted.

    Raises:
        UnsupportedCheckpoint: A file holds more than tensors by name; nothing of it was run.
        DamagedInput, MissingTensors: A file is damaged or missing.
        NotEnoughRoom: The disk of `cache` is too small.
    """
    names = find_pickle_files(folder)
    require_files(folder, names, PICKLE_INDEX)
    needed = sum(folder.files()[name] for name in names)
    write = partial(_write, folder, names, progress or Silent())
    place = convert_once(
        cache, _digest(folder, names), write, needed=needed, purpose=f"converting {folder.label}"
    )
    return LocalFolder(place, folder.label, folder.origin)


def load_pickle(path: Path) -> dict[str, Tensor]:
    """Tensors of a pickle by name, mapped from the file.

    Raises:
        UnsupportedCheckpoint: It asks for code, or holds anything but tensors by name.
        DamagedInput: It cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what matters is raised
            # Files of torch before 1.6 are no archives and cannot be mapped.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        asks = f"asks to run {wanted[1]}" if wanted else "is not a file of weights only"
        raise UnsupportedCheckpoint(
            f"{path}: refused: the pickle {asks}; nothing of it was run. Use a checkpoint with safetensors"
        ) from error
    except Exception as error:  # a reader of hostile bytes may fail in any way, and no way is a bug here
        raise DamagedInput(
            f"{path}: not a readable pickle ({_first_line(error)}). Download it again"
        ) from error
    return _require_tensors(path, content)


def _require_tensors(path: Path, content: Any) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not content:
        raise UnsupportedCheckpoint(f"{path}: holds a {type(content).__name__}, expected tensors by name")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UnsupportedCheckpoint(
                f"{path}: {name!r} is a {type(value).__name__}, expected a tensor. Is this a training state?"
            )
        if value.layout != torch.strided or value.dtype not in TORCH_DTYPES.values():
            raise UnsupportedCheckpoint(f"{path}: {name} is stored as {value.dtype}, {value.layout}")
    return {name: value.detach() for name, value in content.items()}


def _write(folder: LocalFolder, names: list[str], report: Progress, place: Path) -> None:
    _write_weights(folder, names, place, report)
    for name in find_side_files(folder):
        shutil.copyfile(folder.path / name, place / name)


def _write_weights(folder: LocalFolder, names: list[str], place: Path, report: Progress) -> None:
    sizes = folder.files()
    report.start(f"convert {folder.label}", sum(sizes[name] for name in names))
    weight_map: dict[str, str] = {}
    total = 0
    for number, name in enumerate(names, start=1):
        file_name = f"model-{number:05d}-of-{len(names):05d}.safetensors"
        if len(names) == 1:
            file_name = ADAPTER if name == ADAPTER_PICKLE else SINGLE
        tensors = load_pickle(folder.path / name)
        if repeated := tensors.keys() & weight_map.keys():
            raise DamagedInput(
                f"{folder.path / name}: {min(repeated)} is in another file as well; shards of two uploads?"
            )
        write_tensors(
            place / file_name,
            [memory_tensor(key, tensor) for key, tensor in tensors.items()],
            {"format": "pt"},
        )
        weight_map |= dict.fromkeys(tensors, file_name)
        total += sum(tensor.nbytes for tensor in tensors.values())
        report.advance(sizes[name])
    if len(names) > 1:
        write_text(place / INDEX, _index(weight_map, total))


def _index(weight_map: dict[str, str], total: int) -> str:
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def _digest(folder: LocalFolder, names: list[str]) -> str:
    """Of sizes, three stretches of each pickle, whose end holds the check sums, and small files whole."""
    hasher = blake3()
    sizes = folder.files()
    for name in names:
        hasher.update(f"{name} {sizes[name]}\n".encode())
        with (folder.path / name).open("rb") as file:
            for offset in (0, sizes[name] // 2, max(0, sizes[name] - _SAMPLE_BYTES)):
                file.seek(offset)
                hasher.update(file.read(_SAMPLE_BYTES))
    for name in find_side_files(folder):
        raw = folder.read_bytes(name)
        hasher.update(f"{name} {len(raw)}\n".encode() + raw)
    return hasher.hexdigest(16)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
