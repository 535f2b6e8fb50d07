"""Random checkpoints with true proportions and experts of their own, for benchmarks of merging.

python benchmarks/generate.py mix-L OUT --variants 3

`moemerge bench` generates what it needs by itself.
"""

import argparse
from pathlib import Path

from moemerge.bench.generated import write_variant
from moemerge.bench.shapes import SHAPES, find_shape


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=[shape.name for shape in SHAPES.values() if shape.is_listed])
    parser.add_argument("out", type=Path)
    parser.add_argument("--variants", type=int, default=3)
    parser.add_argument("--distance", type=float, default=0.1, help="of a variant from the base")
    arguments = parser.parse_args()
    shape, distance = find_shape(arguments.shape), arguments.distance
    for number in range(arguments.variants):
        target = arguments.out / f"variant-{number}"
        write_variant(shape, target, 0, number, distance=distance, expert_distance=distance)
        print(target)


if __name__ == "__main__":
    main()
