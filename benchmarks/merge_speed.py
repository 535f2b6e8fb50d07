"""Time and memory of `merge` and `similarity` beside plain copying and reading of the same files.

python benchmarks/merge_speed.py FOLDER [--rounds 5] [--max-ram 1GiB]

FOLDER holds checkpoints, for example three of `benchmarks/generate.py mix-L`. Each round runs, in
turn: reading all files once through a reused buffer, loading them with the safetensors library,
similarity, copying the files and writing as many bytes as the bundle has, and the merge. Ratios are taken
within a round; medians are printed.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from safetensors import safe_open

from moemerge.checkpoint.variants import open_variants
from moemerge.consolidation.layers import measure_layers
from moemerge.refs import FolderRef


def timed(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def read_once(files: list[Path]) -> None:
    buffer = bytearray(8 * 2**20)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def load_with_safetensors(files: list[Path]) -> None:
    """Every tensor copied into memory of its own, one at a time; in a process of its own.

    A program started from here would otherwise inherit the peak memory of the mapped files.
    """
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                file.get_tensor(name).clone()


def time_load(files: list[Path]) -> float:
    return timed(lambda: load_with_safetensors(files))


def copy_and_write(files: list[Path], folder: Path, output_bytes: int) -> None:
    block = os.urandom(2**20) * 8
    for index, path in enumerate(files):
        shutil.copyfile(path, folder / f"copy-{index}")
    with (folder / "output").open("wb") as file:
        for start in range(0, output_bytes, len(block)):
            file.write(block[: output_bytes - start])
        file.flush()
        os.fsync(file.fileno())


def run_moemerge(*arguments: str) -> tuple[float, int]:
    """Wall time in seconds and peak resident bytes of one run of the program."""
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "moemerge", *arguments, "--quiet", "--json"], stdout=-1)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(output.decode())
    return time.perf_counter() - begin, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-ram", default="1GiB")
    arguments = parser.parse_args()
    folders = sorted(path for path in arguments.folder.iterdir() if (path / "config.json").is_file())
    files = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
    sources = [f"v{index}={folder}" for index, folder in enumerate(folders)]
    total = sum(file.stat().st_size for file in files)

    variants = open_variants({path.name: FolderRef(path) for path in folders})
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        scratch = Path(name)
        for _ in range(arguments.rounds + 1):
            shutil.rmtree(scratch)
            scratch.mkdir()
            read_once(files)  # what was copied in the round before may have pushed them out of memory
            row = {"read": timed(lambda: read_once(files))}
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                row["load"] = pool.apply(time_load, (files,))
            row["similarity"] = timed(lambda: measure_layers(variants))
            row["similarity command"], row["similarity peak"] = run_moemerge(
                "similarity", *sources, "-o", f"{scratch}/sim", "--max-ram", arguments.max_ram
            )
            bundle = scratch / "bundle.moe"
            row["merge"], row["merge peak"] = run_moemerge(
                "merge",
                *sources,
                "-o",
                str(bundle),
                "--budget",
                "1x",
                "--policy",
                "cluster",
                "--max-ram",
                arguments.max_ram,
            )
            written = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
            shutil.rmtree(bundle)
            row["copy"] = timed(lambda n=written: copy_and_write(files, scratch, n))  # type: ignore[misc]
            rows.append(row)
    rows = rows[1:]  # the first round warms everything else

    def median(value: Callable[[dict[str, float]], float]) -> float:
        return statistics.median(value(row) for row in rows)

    result = {
        "hardware": f"{platform.processor() or platform.machine()}, {psutil.cpu_count()} CPUs, "
        f"{psutil.virtual_memory().total / 1e9:.0f} GB, torch {torch.__version__}",
        "input_bytes": total,
        "rounds": len(rows),
        "load_average": os.getloadavg()[0],
        **{
            f"{key}_s": round(median(lambda row, k=key: row[k]), 3)
            for key in ("read", "load", "similarity", "similarity command", "copy", "merge")
        },  # type: ignore[misc]
        "similarity / read": round(median(lambda row: row["similarity"] / row["read"]), 2),
        "similarity / load": round(median(lambda row: row["similarity"] / row["load"]), 2),
        "merge / copy": round(median(lambda row: row["merge"] / row["copy"]), 2),
        "similarity_peak_MiB": round(max(row["similarity peak"] for row in rows) / 2**20),
        "merge_peak_MiB": round(max(row["merge peak"] for row in rows) / 2**20),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
