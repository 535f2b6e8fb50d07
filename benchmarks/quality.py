"""Quality per byte: every method at equal bytes on the small trained families, two to four variants of each.

python benchmarks/quality.py FAMILIES -o DIR [--family mixtral --variants 4] [--images docs/images]

FAMILIES holds `mixtral/`, `switch/` with `tasks/`, and `text/`. Calibrates on train, reports on test:
perplexity of the one, exact match of the other. Results are kept in DIR; what is there is not measured again.
"""

import argparse
import sys
from pathlib import Path

import torch

from moemerge.calibration.calibrating import calibrate
from moemerge.calibration.passes import CalibrationOptions
from moemerge.checkpoint.variants import VariantSet, open_variants
from moemerge.consolidation.measured import TextStatistics
from moemerge.evaluation.comparison import ComparisonTask, compare
from moemerge.evaluation.curves import draw_curves
from moemerge.evaluation.evaluating import owner_of
from moemerge.evaluation.methods import METHODS
from moemerge.evaluation.results import Comparison, Row
from moemerge.evaluation.samples import SampleSize, load_samples
from moemerge.evaluation.selection import parse_budgets, parse_methods
from moemerge.refs import FolderRef

FAMILIES = {
    "mixtral": (("code", "dictionary", "scripture", "sums"), "text/{name}.{split}.txt"),
    "switch": (("acceptable", "domain", "follows", "testament"), "switch/tasks/{name}.{split}.jsonl"),
}
BUDGETS = {4: "0.4x,0.6x,0.8x,1x,1.25x", 3: "0.4x,0.6x,0.8x,1x", 2: "0.4x,0.6x,1x"}
TOKENS = 32768
WINDOWS, ROWS = 96, 400


def run(
    families: Path, family: str, count: int, methods: list[str], out: Path, size: SampleSize
) -> Comparison:
    """Compare methods on the first so many variants of a family."""
    names, place = FAMILIES[family]
    variants = open_variants(
        {name: FolderRef(families / family / name) for name in names}, FolderRef(families / family / "base")
    )

    def texts(split: str) -> dict[str, Path]:
        return {name: families / place.format(name=name, split=split) for name in names}

    done = calibrate(
        variants, texts("train"), out / f"{family}-calibration", CalibrationOptions(num_tokens=TOKENS)
    )
    chosen = VariantSet(
        variants={name: variants.variants[name] for name in names[:count]}, base=variants.base, findings=()
    )
    owners = {name: owner_of(checkpoint) for name, checkpoint in chosen.variants.items()}
    paths = texts("test")
    task = ComparisonTask(
        variants=chosen,
        samples=load_samples(owners, {name: paths[name] for name in owners}, size),
        statistics=TextStatistics(done.calibration, names[:count]),
        budgets=parse_budgets(BUDGETS[count]),
        methods=methods,
        folder=out / f"{family}-{count}",
    )
    return compare(task, say=lambda text: print(f"{family}, {count} variants: {text}", file=sys.stderr))


def print_markdown(found: Comparison) -> None:
    """The table as documentation shows it."""
    columns = [
        "method",
        "budget",
        "bytes ratio",
        f"{found.unit} kept",
        "worst",
        "minus ours, 95 %",
        *found.names,
    ]
    print(f"| {' | '.join(columns)} |\n| {' | '.join('---' for _ in columns)} |")
    for row in found.rows():
        print(f"| {' | '.join(_cells(row, found))} |", flush=True)


def _cells(row: Row, found: Comparison) -> list[str]:
    if row.kept is None or row.worst is None or row.bytes_ratio is None or row.scores is None:
        return [row.method, row.budget, "does not fit", *[""] * (3 + len(found.names))]
    difference = ""
    if row.difference is not None and row.difference_interval is not None:
        low, high = row.difference_interval
        difference = (
            f"{row.difference:+.4f} ({low:+.4f} to {high:+.4f}){' **better**' if row.is_better else ''}"
        )
    scores = [f"{row.scores[name]:.3f}" for name in found.names]
    ratio, kept, worst = f"{row.bytes_ratio:.3f}", f"{row.kept:.4f}", f"{row.worst:.4f}"
    return [row.method, row.budget, ratio, kept, worst, difference, *scores]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", type=Path)
    parser.add_argument("--out", "-o", type=Path, required=True)
    parser.add_argument("--family", choices=FAMILIES, action="append")
    parser.add_argument("--variants", type=int, choices=BUDGETS, action="append")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--images", type=Path, help="folder for quality-<family>.png, of four variants")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--windows", type=int, default=WINDOWS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size = SampleSize(windows=arguments.windows, rows=ROWS)
    for family in arguments.family or FAMILIES:
        for count in arguments.variants or BUDGETS:
            methods = parse_methods(arguments.methods)
            found = run(arguments.families, family, count, methods, arguments.out, size)
            print(f"\n{family}, {count} variants\n")
            print_markdown(found)
            if arguments.images and count == max(BUDGETS):
                draw_curves(
                    found, arguments.images / f"quality-{family}.png", f"{family}, {count} fine-tunes"
                )


if __name__ == "__main__":
    main()
