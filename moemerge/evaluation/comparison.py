"""Every method at equal bytes, each as a bundle that the ordinary pipeline writes and the engine serves.

Owns the folder of results: a method at a budget that was measured there with the same inputs is not
measured again.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moemerge import __version__
from moemerge.bundle.manifest import Manifest
from moemerge.bundle.reader import is_bundle, open_bundle
from moemerge.bundle.target import writing
from moemerge.bundle.verify import verify_bundle
from moemerge.checkpoint.fingerprint import fingerprint
from moemerge.checkpoint.tensors import TensorReader
from moemerge.checkpoint.variants import VariantSet
from moemerge.consolidation.budget import Budget
from moemerge.consolidation.layers import Unjournalled, measure_layers
from moemerge.consolidation.measured import Statistics
from moemerge.consolidation.pipeline import merge
from moemerge.consolidation.quality import RepairOptions
from moemerge.errors import IncompatibleInputs, InvalidRecipe
from moemerge.evaluation.loading import load_model
from moemerge.evaluation.methods import METHODS, Materials, Prepared
from moemerge.evaluation.reading import Scores, score
from moemerge.evaluation.results import (
    Comparison,
    Measured,
    Outcome,
    measured_of,
    read_measured,
    write_measured,
)
from moemerge.evaluation.samples import Sample
from moemerge.execution import Executor
from moemerge.progress import Progress, Silent
from moemerge.runner.engine import Engine
from moemerge.runner.options import EngineOptions

BASE, ORIGINALS = "base alone", "separate models"
NO_BUDGET = "-"
_WORK = "work"

Samples = Mapping[str, Sample]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonTask:
    """What is compared on what.

    Attributes:
        variants: Local checkpoints with their base.
        samples: What every variant is measured on.
        statistics: Calibration of the variants, from other text.
        budgets: Limits for pools and residuals.
        methods: Names of entries of `METHODS`.
        folder: For results; created.
        seed: Of the bootstrap.
        num_draws: Of the bootstrap.
        max_ram: Bytes of memory to stay within while merging.
    """

    variants: VariantSet
    samples: Samples
    statistics: Statistics
    budgets: Sequence[Budget]
    methods: Sequence[str]
    folder: Path
    seed: int = 0
    num_draws: int = 2000
    max_ram: int | None = None


def compare(
    task: ComparisonTask,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
    executor: Executor | None = None,
) -> Comparison:
    """Measure every method at every budget, but for what the folder has already.

    Args:
        task: See there.
        progress: Told of bytes.
        say: Told what comes next.
        executor: Measures and writes layers; this process by default, which always serves and scores.

    Raises:
        NotEnoughRoom: Disk or memory.
    """
    report = progress or Silent()
    places = [(method, budget) for method in task.methods for budget in task.budgets]
    with TensorReader() as reader, writing(task.folder):
        identity = identity_of(task, reader)
        known = _Results(task.folder, identity)
        base = known.get(BASE, NO_BUDGET, lambda: _measure_base(task, report))
        originals = known.get(ORIGINALS, NO_BUDGET, lambda: _measure_originals(task, report))
        missing = [(method, budget) for method, budget in places if not known.find(method, budget.text)]
        if missing:
            work = task.folder / _WORK / identity[:16]
            materials = gather(task, work, reader, report, executor)
            for number, (method, budget) in enumerate(missing, start=1):
                say(f"{method} at {budget.text} ({number} of {len(missing)})")
                known.get(
                    method, budget.text, partial(_measure, task, materials, method, budget, report, executor)
                )
            shutil.rmtree(task.folder / _WORK)
        found = [known.find(method, budget.text) for method, budget in places]
    return Comparison(
        names=list(task.samples),
        base=base,
        originals=originals,
        measured=[measured for measured in found if measured is not None],
        seed=task.seed,
        num_draws=task.num_draws,
    )


def gather(
    task: ComparisonTask,
    folder: Path,
    reader: TensorReader,
    progress: Progress,
    executor: Executor | None = None,
) -> Materials:
    """What methods plan from."""
    folder.mkdir(parents=True, exist_ok=True)
    steps = Unjournalled(folder)
    return Materials(
        variants=task.variants,
        layers=measure_layers(task.variants, progress, steps=steps, max_ram=task.max_ram, executor=executor),
        statistics=task.statistics,
        reader=reader,
        folder=folder,
    )


def build_bundle(
    materials: Materials,
    method: str,
    budget: Budget,
    target: Path,
    *,
    max_ram: int | None = None,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> tuple[Prepared, Manifest]:
    """Have a method plan, and carry its plan out.

    Raises:
        InvalidRecipe: The budget cannot be kept.
        IncompatibleInputs: The variants are not for this method.
    """
    prepared = METHODS[method](materials, budget)
    if is_bundle(target):
        shutil.rmtree(target)
    merged = merge(
        prepared.variants,
        target,
        prepared.decide,
        statistics=prepared.statistics,
        repair=RepairOptions(repair=prepared.repair),
        max_ram=max_ram,
        progress=progress,
        executor=executor,
    )
    verify_bundle(target)
    return prepared, merged.manifest


def score_bundle(
    folder: Path, serves: Mapping[str, str], samples: Samples, progress: Progress | None = None
) -> dict[str, Scores]:
    """What a served bundle scores on every variant's sample.

    Args:
        folder: The bundle.
        serves: Name in the bundle by name of the sample.
        samples: By variant.
        progress: Told of bytes of token ids.
    """
    report = progress or Silent()
    report.start("measuring", sum(sample.num_bytes for sample in samples.values()))
    with closing(Engine(open_bundle(folder), EngineOptions(dtype="float32", max_batch=1))) as engine:
        return {
            name: score(engine.stand_alone(serves[name]), sample, report.advance)
            for name, sample in samples.items()
        }


def identity_of(task: ComparisonTask, reader: TensorReader) -> str:
    """A hash of what decides the scores, but for method and budget."""
    base = task.variants.base
    assert base is not None
    prints = {name: fingerprint(c, reader) for name, c in task.variants.variants.items()}
    samples = {
        name: [sample.sha256, [list(map(list, passage)) for passage in sample.passages]]
        for name, sample in task.samples.items()
    }
    described = [__version__, prints, fingerprint(base, reader), samples, task.statistics.identity]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


class _Results:
    """The folder of results."""

    def __init__(self, folder: Path, identity: str) -> None:
        self._folder = folder
        self._identity = identity

    def find(self, method: str, budget: str) -> Measured | None:
        """What was measured before with the same inputs."""
        found = read_measured(self._path(method, budget), self._identity)
        return found if found and (found.method, found.budget) == (method, budget) else None

    def get(self, method: str, budget: str, measure: Callable[[], Outcome]) -> Measured:
        """What was measured before, or is measured now and kept."""
        if (found := self.find(method, budget)) is not None:
            return found
        begin = time.perf_counter()
        outcome = measure()
        measured = measured_of(
            outcome,
            method=method,
            budget=budget,
            identity=self._identity,
            seconds=time.perf_counter() - begin,
        )
        write_measured(measured, self._path(method, budget))
        return measured

    def _path(self, method: str, budget: str) -> Path:
        return self._folder / f"{method} {budget}.json".replace(" ", "-")


def _measure(
    task: ComparisonTask,
    materials: Materials,
    method: str,
    budget: Budget,
    report: Progress,
    executor: Executor | None,
) -> Outcome:
    target = materials.folder / f"{method}-{budget.text}.moe"
    try:
        prepared, manifest = build_bundle(
            materials, method, budget, target, max_ram=task.max_ram, progress=report, executor=executor
        )
    except (InvalidRecipe, IncompatibleInputs) as error:
        return Outcome(cannot=str(error))
    scores = score_bundle(target, prepared.serves, task.samples, report)
    shutil.rmtree(target)
    return Outcome(scores=scores, bytes_ratio=manifest.bytes_ratio)


def _measure_base(task: ComparisonTask, report: Progress) -> Outcome:
    assert task.variants.base is not None
    report.start("measuring the base", _sample_bytes(task))
    model = load_model(task.variants.base)
    scores = {name: score(model, sample, report.advance) for name, sample in task.samples.items()}
    return Outcome(scores=scores, bytes_ratio=1.0)


def _measure_originals(task: ComparisonTask, report: Progress) -> Outcome:
    report.start("measuring the originals", _sample_bytes(task))
    scores = {
        name: score(load_model(task.variants.variants[name]), sample, report.advance)
        for name, sample in task.samples.items()
    }
    return Outcome(scores=scores, bytes_ratio=float(len(task.samples)))


def _sample_bytes(task: ComparisonTask) -> int:
    return sum(sample.num_bytes for sample in task.samples.values())
