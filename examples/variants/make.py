"""Make a family of variants, stage by stage, then consolidate and serve it with moemerge.

    python examples/variants/make.py -o family

Finished stages are kept: the same command goes on where it was stopped. Tables are printed, all figures go to
`figures.json`. Nothing is downloaded.
"""

import argparse
import os
import sys
import time
from pathlib import Path

try:
    import trl  # noqa: F401
except ImportError:
    sys.exit("error: the trainers are not installed; pip install -e '.[examples]'")

import report
import torch
from consolidate import consolidate
from sizes import FULL, QUICK
from stages import STAGES, make


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", "-o", type=Path, required=True, help="folder for checkpoints and figures")
    parser.add_argument("--quick", action="store_true", help="few steps of a smaller model, to see it run")
    parser.add_argument("--threads", type=int, default=2, help="of the processor (default: 2)")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    torch.set_num_threads(arguments.threads)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # for moemerge's commands
    size = QUICK if arguments.quick else FULL
    stages = [make(stage, out, size) for stage in STAGES]
    start_s = time.monotonic()
    family = consolidate(out, size)
    family["wall_s"] = time.monotonic() - start_s
    figures = {"machine": report.machine(arguments.threads), "stages": stages, "family": family}
    report.write(out / "figures.json", figures)
    print(report.tables(stages, family))


if __name__ == "__main__":
    main()
