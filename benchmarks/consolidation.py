"""Calibrating, planning and merging generated variants in one go: time of every phase, and peak memory.

python benchmarks/consolidation.py FOLDER [--shape mix-L] [--variants 3] [--tokens 65536] [--max-ram 8GiB]
    [--dtype bfloat16]

Generates what FOLDER lacks: variants that stand a tenth of their norm from each other, and a text of random
words for each. Then runs `moemerge calibrate` and `moemerge merge --budget 1x` with `--verbose`, and prints
what they logged.
"""

import argparse
import os
import re
import resource
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
    parser.add_argument("--dtype", default="bfloat16", help="of calibration")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    shape = find_shape(arguments.shape)
    pairs = [
        write_inputs(arguments.folder, shape, number, arguments.tokens)
        for number in range(arguments.variants)
    ]
    out, calibration = arguments.folder / "out.moe", arguments.folder / "calibration"
    for made in (out, calibration):
        shutil.rmtree(made, ignore_errors=True)
    sources, words = [source for source, _ in pairs], [w for _, text in pairs for w in ("--text", text)]
    limit = ["--max-ram", arguments.max_ram]
    options = ["--tokens", str(arguments.tokens), "--dtype", arguments.dtype]
    begin = time.perf_counter()
    usages = [
        _run("calibrate", *sources, *words, *options, *limit, "-o", str(calibration)),
        _run("merge", *sources, "--calibration", str(calibration), "--budget", "1x", *limit, "-o", str(out)),
    ]
    processor_s = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    print(f"{time.perf_counter() - begin:8.1f} s  in all, {processor_s:.1f} s of processor")
    peak = max(usage.ru_maxrss for usage in usages) * 1024
    print(f"peak memory {format_size(peak)}, --max-ram {arguments.max_ram}")
    print(f"load average at the end {os.getloadavg()[0]:.1f}")


def _run(*arguments: str) -> resource.struct_rusage:
    """A command, the time of whose phases is printed."""
    command = [sys.executable, "-m", "moemerge", "--verbose", *arguments]
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log, output = _read(process)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(log)
    for line in log.splitlines():
        if found := PHASE.search(line):
            print(f"{float(found[2]):8.1f} s  {found[1].rpartition('info: ')[2]}")
    print(f"{time.perf_counter() - begin:8.1f} s  {arguments[0]}\n{output}", flush=True)
    return usage


def _read(process: subprocess.Popen[str]) -> tuple[str, str]:
    """All of both streams; the output is small and comes at the end."""
    assert process.stderr is not None
    assert process.stdout is not None
    return process.stderr.read(), process.stdout.read()


if __name__ == "__main__":
    main()
