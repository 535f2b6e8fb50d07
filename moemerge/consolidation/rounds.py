"""Rounds of a merge: write what a plan says, measure it, and plan again while a variant misses its floor.

Layers whose plan did not change are not written again. Everything is journalled: a killed run goes through
the same rounds without repeating their work.
"""

import logging
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Protocol

from moemerge.bundle.writer import write_bytes
from moemerge.calibration.passes import CalibrationOptions
from moemerge.checkpoint.disk import check_disk
from moemerge.checkpoint.variants import VariantSet
from moemerge.consolidation.finishing import draft_bundle
from moemerge.consolidation.gate import Gate
from moemerge.consolidation.measured import Statistics
from moemerge.consolidation.plan import ConsolidationPlan, PlannedLayer, dump_plan, read_plan
from moemerge.consolidation.pools import Errors, layer_work
from moemerge.consolidation.quality import Quality, RepairOptions, keep_quality, quality_work, recall_quality
from moemerge.consolidation.staging import WORK, Staging
from moemerge.errors import QualityGateFailed
from moemerge.execution import Executor
from moemerge.progress import Progress

MORE_ROUNDS = 2
"""Plans that are tried after the first one."""
_SLACK = 0.2
"""Of what may be lost: when it is not lost, fewer bytes are tried."""
_EVEN = 1.25
"""The worst variant may lose so much more than the mean."""
_PAST = 1.1
"""Power of corrections: a little past the aim."""
_CORRECTED = (0.1, 10.0)
"""A prediction is not corrected by more than this at once: what was measured is a sample, too."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lessons:
    """What the rounds so far have taught.

    Attributes:
        correction, emphasis: See `spending.Prices`.
        score: Of the round that emphasis was learnt from.
        is_less: Fewer bytes are tried than those of a round that was let through.
        why: There is to be another round, for the log.
    """

    correction: Mapping[str, float] = field(default_factory=dict)
    emphasis: Mapping[str, float] = field(default_factory=dict)
    score: float = math.inf
    is_less: bool = False
    why: str = ""


class MakePlan(Protocol):
    """Makes a plan."""

    def __call__(self, lessons: Lessons) -> ConsolidationPlan:
        """Told what came of the plans before."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """What the rounds ended with.

    Attributes:
        plan: The last one, which was carried out.
        errors: By layer index; see `pools.Errors`.
        qualities: By variant.
        resumed_layers: Layers that an earlier, interrupted run had finished.
    """

    plan: ConsolidationPlan
    errors: dict[int, Errors]
    qualities: dict[str, Quality]
    resumed_layers: int


@dataclass(slots=True, kw_only=True)
class Rounds:
    """Carries plans out.

    Attributes:
        variants: Local checkpoints.
        statistics: Of them, with passages to measure on.
        staging: Where files are written.
        target: What they will become.
        asked: What may be done to variants' own tensors.
        is_least: As few bytes are wanted as keep what is asked for.
        max_ram: Bytes of memory to stay within.
        report: Told of bytes.
        executor: Does the work.
    """

    variants: VariantSet
    statistics: Statistics
    staging: Staging
    target: Path
    asked: RepairOptions
    is_least: bool
    max_ram: int | None
    report: Progress
    executor: Executor
    _resumed: int = 0

    def run(self, make_plan: MakePlan, gate: Gate) -> Carried:
        """Plan, write and measure until the gate lets the result through.

        A first plan is made again, too, when variants turn out to lose very differently, and when the least
        bytes are wanted and far more is kept than was asked for.

        Raises:
            QualityGateFailed: The gate does not, after all rounds.
            MoemergeError: As `pipeline.merge`.
        """
        lessons = Lessons()
        plan: ConsolidationPlan | None = None
        for number in range(1 + MORE_ROUNDS):
            before, plan = plan, self._plan(number, partial(make_plan, lessons))
            is_last = number == MORE_ROUNDS or (before is not None and plan.layers == before.layers)
            qualities = self._recall(number)
            if not qualities or is_last or self._learn(number, gate, lessons, plan, qualities) is None:
                errors = self._write_pools(plan)
                qualities = self._measure(number, plan, errors)
            learnt = None if is_last else self._learn(number, gate, lessons, plan, qualities)
            if learnt is None:
                break
            logger.info("round %d: planned again, since %s", number + 1, learnt.why)
            lessons = learnt
        if missed := gate.missed(_kept(qualities)):
            raise QualityGateFailed(
                f"{self.target}: {'; '.join(missed)}, measured on text held out. Nothing was published. "
                f"Use a larger budget or a lower floor"
            )
        assert plan is not None
        return Carried(plan=plan, errors=errors, qualities=qualities, resumed_layers=self._resumed)

    def _learn(
        self,
        number: int,
        gate: Gate,
        lessons: Lessons,
        plan: ConsolidationPlan,
        qualities: Mapping[str, Quality],
    ) -> Lessons | None:
        """What another plan is to be told after this one came out so; None when it will do."""
        kept, lost = _kept(qualities), self._lost(qualities)
        missed = gate.missed(kept)
        if lessons.is_less:
            return Lessons(why="fewer bytes keep too little") if missed else None
        if lessons.emphasis:
            # The plan before was let through, which is why variants were weighed at all.
            if missed or _score(lost) > lessons.score:
                return Lessons(why="the plan before did better")
            return None
        if missed:
            correction = corrected(lessons.correction, plan.predicted_damage, qualities)
            return Lessons(correction=correction, why="; ".join(missed))
        if number == 0 and self.is_least and gate.has_slack(kept, _SLACK):
            correction = spared(plan.predicted_damage, qualities)
            if correction and statistics.fmean(correction.values()) < 1 - _SLACK:
                return Lessons(correction=correction, is_less=True, why="more is kept than was asked for")
        if number == 0 and lost and max(lost.values()) > _EVEN * statistics.fmean(lost.values()):
            return Lessons(emphasis=emphasised(lost), score=_score(lost), why="variants lost unevenly")
        return None

    def _lost(self, qualities: Mapping[str, Quality]) -> dict[str, float]:
        """By variant, its divergence, over what fine-tuning gained where that is known.

        What is lost on the text itself says less: of text that the variant was tuned on it is too much, and
        of little text mostly chance.
        """
        gained = self.statistics.gained
        return {
            name: quality.damage["kl"] / gained.get(name, 1.0)
            for name, quality in qualities.items()
            if "kl" in quality.damage
        }

    def _plan(self, number: int, make: Callable[[], ConsolidationPlan]) -> ConsolidationPlan:
        """The plan of a round; what is already written follows it, whatever would be decided now."""
        step, name = f"plan {number}", f"{WORK}plan-{number}.json"
        if self.staging.finished(step) is None:
            plan = make()
            self.staging.finish(step, write_bytes(self.staging.folder, name, dump_plan(plan).encode()))
        return read_plan(self.staging.folder / name)

    def _write_pools(self, plan: ConsolidationPlan) -> dict[int, Errors]:
        """Write the layers that are not there as planned; errors by layer index."""
        missing = _bytes_to_write(self.variants, plan) - self.staging.finished_bytes()
        check_disk(self.target.parent, missing, f"writing {self.target}")
        self.report.start("pool", plan.stored_bytes)
        errors: dict[int, Errors] = {}
        layers = []
        for layer in plan.layers:
            done = self.staging.finished(_pool_step(layer))
            if done is None or done["layer"] != _digest(layer):
                layers.append(layer)
            else:
                errors[layer.index] = done["errors"]
                self.report.advance(plan.stored_bytes // len(plan.layers))
        self._resumed = len(errors)
        works = [layer_work(self.staging.folder, self.variants, self.statistics, layer) for layer in layers]
        for number, written in self.executor.map(works, self.report):
            result = {"errors": written.errors, "layer": _digest(layers[number])}
            self.staging.finish(_pool_step(layers[number]), written.files, result)
            errors[layers[number].index] = written.errors
        return {layer.index: errors[layer.index] for layer in plan.layers}

    def _recall(self, number: int) -> dict[str, Quality]:
        """What an interrupted run found in a round that it finished; empty otherwise."""
        found = {name: recall_quality(self.staging, number, name) for name in self.variants.variants}
        known = {name: quality for name, quality in found.items() if quality is not None}
        return known if len(known) == len(found) else {}

    def _measure(self, number: int, plan: ConsolidationPlan, errors: dict[int, Errors]) -> dict[str, Quality]:
        bundle = draft_bundle(self.variants, plan, errors, self.staging.folder)
        gained = self.statistics.gained
        texts = {name: self.statistics.passages(name) for name in self.variants.variants}
        missing = {
            name: passages
            for name, passages in texts.items()
            if passages is not None
            and passages.held_out
            and recall_quality(self.staging, number, name) is None
        }
        works = [
            quality_work(
                self.staging.folder,
                number,
                name,
                self.variants.variants[name],
                bundle,
                passages,
                gained.get(name),
                self.asked,
                CalibrationOptions(dtype=self.statistics.dtype(name), max_ram=self.max_ram),
            )
            for name, passages in missing.items()
        ]
        for place, measured in self.executor.map(works, self.report):
            keep_quality(self.staging, number, list(missing)[place], measured)
        return {name: recall_quality(self.staging, number, name) or Quality() for name in texts}


def corrected(
    correction: Mapping[str, float], predicted: Mapping[str, float], qualities: Mapping[str, Quality]
) -> dict[str, float]:
    """By variant, what predictions are to be multiplied with after these came out as they did."""
    least, most = _CORRECTED
    found = dict(correction)
    for name, quality in qualities.items():
        if predicted.get(name, 0.0) > 0 and "measured" in quality.damage:
            ratio = max(quality.damage["measured"], quality.damage["kl"]) / predicted[name]
            found[name] = found.get(name, 1.0) * min(max(ratio**_PAST, least), most)
    return found


def spared(predicted: Mapping[str, float], qualities: Mapping[str, Quality]) -> dict[str, float]:
    """By variant, what predictions are to be multiplied with to be what gates measure; never more than 1."""
    least, _ = _CORRECTED
    return {
        name: min(max(qualities[name].damage.get("measured", loss) / loss, least), 1.0)
        for name, loss in predicted.items()
        if loss > 0
    }


def emphasised(lost: Mapping[str, float]) -> dict[str, float]:
    """By variant, what its damage is to count after variants lost this; about what evens them out.

    Of four small fine-tunes at 0.4x one lost three times as much as the others. Counted so, 2.9 times as much
    as they, it lost as much, and all together kept 0.85 of the gain instead of 0.83 (test text).
    """
    mean = statistics.fmean(lost.values())
    return {name: max(loss, 0.1 * mean) / mean for name, loss in lost.items()}


def _score(lost: Mapping[str, float]) -> float:
    """The lower the better: a sum that is a little worse is worth a better worst case, as in `spend`."""
    return statistics.fmean(lost.values()) + max(lost.values())


def _kept(qualities: Mapping[str, Quality]) -> dict[str, float]:
    """By variant, the share that it keeps of what fine-tuning gained, where that was measured."""
    return {
        name: quality.damage["gain_recovered"]
        for name, quality in qualities.items()
        if "gain_recovered" in quality.damage
    }


def _bytes_to_write(variants: VariantSet, plan: ConsolidationPlan) -> int:
    return plan.stored_bytes + sum(variant.other_bytes for variant in variants.variants.values())


def _pool_step(layer: PlannedLayer) -> str:
    return f"pool {layer.index}"


def _digest(layer: PlannedLayer) -> str:
    return sha256(layer.model_dump_json().encode()).hexdigest()
