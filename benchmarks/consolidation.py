"""Calibrating, planning and merging generated variants in one go: time of every phase, and peak memory.

python benchmarks/consolidation.py FOLDER [--shape mix-L] [--variants 3] [--tokens 65536] [--max-ram 8GiB]

Generates what FOLDER lacks: variants that stand a tenth of their norm from each other, and a text of random
words for each. Then runs `moemerge merge --budget 1x --text ... --verbose` and prints what it logged.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from moemerge.bench.generated import write_variant
from moemerge.bench.shapes import Shape, find_shape
from moemerge.checkpoint.sizes import format_size

PHASE = re.compile(r"(\S.*): ([0-9.]+) s$")


def write_inputs(folder: Path, shape: Shape, number: int, num_tokens: int) -> tuple[str, str]:
    """A variant with tokenizer and text, unless they are there; arguments of `merge`."""
    place, text = folder / f"{shape.name}-{number}", folder / f"{shape.name}-{number}.txt"
    vocab_size = int(shape.settings["vocab_size"] or 0)
    if not place.is_dir():
        write_variant(shape, place, 0, number, distance=0.1, expert_distance=0.1)
        tokenizer = Tokenizer(models.WordLevel({f"w{word}": word for word in range(vocab_size)}, "w0"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
        tokenizer.save(str(place / "tokenizer.json"))
    words = np.random.default_rng(number).integers(vocab_size, size=num_tokens)
    text.write_text(" ".join(f"w{word}" for word in words))
    return f"v{number}={place}", f"v{number}={text}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", default="mix-L", help="a decoder that moemerge bench knows")
    parser.add_argument("--variants", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--max-ram", default="8GiB")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    shape = find_shape(arguments.shape)
    pairs = [
        write_inputs(arguments.folder, shape, number, arguments.tokens)
        for number in range(arguments.variants)
    ]
    out = arguments.folder / "out.moe"
    shutil.rmtree(out, ignore_errors=True)
    words = [word for _, text in pairs for word in ("--text", text)]
    command = [
        sys.executable, "-m", "moemerge", "--verbose", "merge", *(source for source, _ in pairs), *words,
        "--tokens", str(arguments.tokens), "--budget", "1x", "--max-ram", arguments.max_ram, "-o", str(out),
        "--restart",
    ]  # fmt: skip
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log, output = _read(process)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(log)
    for line in log.splitlines():
        if found := PHASE.search(line):
            print(f"{float(found[2]):8.1f} s  {found[1].rpartition('info: ')[2]}")
    print(
        f"{time.perf_counter() - begin:8.1f} s  in all, {usage.ru_utime + usage.ru_stime:.1f} s of processor"
    )
    print(f"peak memory {format_size(usage.ru_maxrss * 1024)}, --max-ram {arguments.max_ram}")
    print(f"load average at the end {os.getloadavg()[0]:.1f}")
    print(output)


def _read(process: subprocess.Popen[str]) -> tuple[str, str]:
    """All of both streams; the output is small and comes at the end."""
    assert process.stderr is not None
    assert process.stdout is not None
    return process.stderr.read(), process.stdout.read()


if __name__ == "__main__":
    main()
