"""Results of lm-evaluation-harness, brought by the user: read, checked, and put side by side.

Source: the `results` section of the files that `lm_eval --output_path` of version 0.4 writes.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moemerge.errors import InvalidRecipe, NotFound

Metrics = Mapping[tuple[str, str], float]
"""Values by task and metric, the filter's name included where it is not `none`."""

_MOST_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRow:
    """One metric of one task.

    Attributes:
        base, original, bundle: Of each, where it was given.
        kept: `(base - bundle) / (base - original)`, the share of what fine-tuning changed; None unless all
            three are there and fine-tuning changed something.
    """

    variant: str
    task: str
    metric: str
    base: float | None
    original: float | None
    bundle: float | None

    @property
    def kept(self) -> float | None:
        """See the class."""
        if self.base is None or self.original is None or self.bundle is None or self.base == self.original:
            return None
        return (self.base - self.bundle) / (self.base - self.original)


def read_results(path: Path) -> Metrics:
    """Metrics of every task, without standard errors.

    Raises:
        NotFound: No such file.
        InvalidRecipe: Not such a file, or one without a metric.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise InvalidRecipe(f"{path}: larger than results of lm-evaluation-harness are")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise NotFound(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InvalidRecipe(f"{path}: not JSON ({error})") from error
    results = value.get("results") if isinstance(value, dict) else None
    if not isinstance(results, dict):
        raise InvalidRecipe(
            f"{path}: no `results` section. Give the results_*.json that lm_eval --output_path writes"
        )
    metrics: dict[tuple[str, str], float] = {}
    for task, values in results.items():
        if not isinstance(values, dict):
            raise InvalidRecipe(f"{path}: results of task {task!r} are {type(values).__name__}, not metrics")
        for key, number in values.items():
            name, _, filtered = str(key).partition(",")
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            if name.endswith("_stderr") or not is_number or not math.isfinite(number):
                continue
            if name in ("sample_len", "sample_count"):
                continue
            metric = name if filtered in ("", "none") else f"{name} ({filtered})"
            metrics[str(task), metric] = float(number)
    if not metrics:
        raise InvalidRecipe(f"{path}: no task with a metric in it")
    return metrics


_ORIGINAL, _BASE = "original:", "base"


def parse_lm_eval(texts: Sequence[str], variants: Sequence[str]) -> list[TaskRow]:
    """Rows of every variant from `NAME=FILE`, `original:NAME=FILE` and `base=FILE`.

    Raises:
        InvalidRecipe: Malformed, of no variant, given twice, or as `read_results` and `table`.
        NotFound: As `read_results`.
    """
    found: dict[str, Metrics] = {}
    for text in texts:
        whose, equals, file = text.partition("=")
        name = whose.removeprefix(_ORIGINAL)
        if not equals or not file or (name not in variants and whose != _BASE):
            raise InvalidRecipe(
                f"--lm-eval {text}: write NAME=FILE, original:NAME=FILE or base=FILE, for variants "
                f"{', '.join(variants)}"
            )
        if whose in found:
            raise InvalidRecipe(f"--lm-eval: {whose} has two files; give one")
        found[whose] = read_results(Path(file).expanduser())
    base = None if _BASE in variants else found.get(_BASE)
    return [
        row
        for name in variants
        if name in found or _ORIGINAL + name in found
        for row in table(name, found.get(name), found.get(_ORIGINAL + name), base)
    ]


def table(
    variant: str, bundle: Metrics | None, original: Metrics | None, base: Metrics | None
) -> list[TaskRow]:
    """One variant's metrics side by side.

    Raises:
        InvalidRecipe: A task is in one of the files and missing in another.
    """
    given = {
        name: metrics
        for name, metrics in (("the variant", bundle), ("its original", original), ("the base", base))
        if metrics is not None
    }
    everything = sorted({key for metrics in given.values() for key in metrics})
    for task, metric in everything:
        lacking = [name for name, metrics in given.items() if (task, metric) not in metrics]
        if lacking:
            having = next(name for name, metrics in given.items() if (task, metric) in metrics)
            raise InvalidRecipe(
                f"variant {variant}: lm-eval results of {having} have {metric} of task {task}, those of "
                f"{' and '.join(lacking)} do not. Run the same tasks on all of them"
            )
    return [
        TaskRow(
            variant=variant,
            task=task,
            metric=metric,
            base=base[task, metric] if base is not None else None,
            original=original[task, metric] if original is not None else None,
            bundle=bundle[task, metric] if bundle is not None else None,
        )
        for task, metric in everything
    ]
