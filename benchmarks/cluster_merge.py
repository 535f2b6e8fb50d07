"""A merge on a Ray cluster of several nodes on this machine beside the local engine, on the same cores.

python benchmarks/cluster_merge.py FOLDER [--nodes 3] [--rounds 3] [--budget 1x] [--policy P]

FOLDER holds checkpoints, for example three of `benchmarks/generate.py mix-M`. In each round the program runs
twice, with `--engine local` and with `--engine ray`; wall times hold everything from start to end. The
bytes must be equal. Nodes have one processor each.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from ray.cluster_utils import Cluster

NODE_BYTES = 4 * 2**30
STORE_BYTES = 80 * 2**20


def start_cluster(num_nodes: int) -> Cluster:
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(num_nodes):
        cluster.add_node(num_cpus=1, memory=NODE_BYTES, object_store_memory=STORE_BYTES)
    return cluster


def time_merge(words: list[str], target: Path) -> tuple[float, str]:
    """Wall time in seconds, and a hash of the bundle, which is removed."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "moemerge", "merge", *words, "-o", str(target), "--quiet"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - begin
    digest = hashlib.sha256()
    for path in sorted(target.rglob("*")):
        if path.is_file():
            digest.update(path.relative_to(target).as_posix().encode() + path.read_bytes())
    shutil.rmtree(target)
    return seconds, digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", default="1x")
    parser.add_argument("--policy")
    arguments = parser.parse_args()
    folders = sorted(path for path in arguments.folder.iterdir() if (path / "config.json").is_file())
    words = [f"v{index}={folder}" for index, folder in enumerate(folders)] + ["--budget", arguments.budget]
    words += ["--policy", arguments.policy] if arguments.policy else []
    cluster = start_cluster(arguments.nodes)
    on_ray = ["--engine", "ray", "--address", cluster.address]
    rows, loads = [], []
    try:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            for number in range(arguments.rounds + 1):
                local, here = time_merge(words, Path(name) / "bundle.moe")
                ray, there = time_merge([*words, *on_ray], Path(name) / "bundle.moe")
                assert here == there, "the bundles differ"
                if number:  # the first round warms the page cache
                    rows.append((local, ray))
                    loads.append(os.getloadavg()[0])
    finally:
        cluster.shutdown()
    local, ray = (statistics.median(column) for column in zip(*rows, strict=True))
    overheads = [ray / local - 1 for local, ray in rows]
    result = {
        "hardware": f"{platform.processor() or platform.machine()}, {psutil.cpu_count()} CPUs, "
        f"{psutil.virtual_memory().total / 1e9:.0f} GB, torch {torch.__version__}",
        "nodes": arguments.nodes,
        "rounds": len(rows),
        "load_average": round(statistics.median(loads), 1),
        "local_s": round(local, 2),
        "ray_s": round(ray, 2),
        "overhead": round(statistics.median(overheads), 3),
        "overheads": [round(overhead, 3) for overhead in overheads],
        "bytes": "equal",
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
