"""What a written bundle costs each variant, on passages that no decision was made from; and repair.

Runs when the pools of a plan are in the staging folder. Every variant is a step of the journal.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from moemerge.bundle.reader import Bundle
from moemerge.calibration.lanes import Loss
from moemerge.calibration.passes import CalibrationOptions
from moemerge.calibration.texts import Passage
from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.headers import StoredTensor, read_header
from moemerge.checkpoint.writer import memory_tensor, write_tensors
from moemerge.consolidation.healing import heal_variant
from moemerge.consolidation.prefix import measure_bundle
from moemerge.consolidation.repair import repair_variant
from moemerge.consolidation.staging import WORK, Staging
from moemerge.errors import InvalidRecipe
from moemerge.progress import Progress

_DIGITS = 6
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairOptions:
    """What may be done to a variant's own tensors once its experts are decided.

    Attributes:
        repair: Fit routers, norms and output projections to the experts, in closed form.
        heal: Steps of distillation of the same tensors, after that.
    """

    repair: bool = True
    heal: int = 0

    def __post_init__(self) -> None:
        if self.heal < 0:
            raise InvalidRecipe(f"--heal {self.heal}: a number of steps is not negative")

    @property
    def is_asked(self) -> bool:
        """Whether anything is to be done."""
        return self.repair or self.heal > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What was measured of one variant.

    Attributes:
        damage: By the names of `VariantEntry.damage`; empty when there was nothing to measure on.
        tensors: Places of repaired tensors by role.
    """

    damage: Mapping[str, float] = field(default_factory=dict)
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)


def recall_quality(staging: Staging, number: int, variant: str) -> Quality | None:
    """What `measure_quality` found before, in an interrupted run."""
    found = staging.finished(_step(number, variant))
    if found is None:
        return None
    path = staging.folder / _repaired_file(number, variant)
    return Quality(damage=found["damage"], tensors=read_header(path) if found["repaired"] else {})


def measure_quality(
    staging: Staging,
    number: int,
    variant: str,
    checkpoint: Checkpoint,
    bundle: Bundle,
    counted: Sequence[Passage],
    held_out: Sequence[Passage],
    gained: float | None,
    asked: RepairOptions,
    options: CalibrationOptions,
    progress: Progress,
) -> Quality:
    """Repair a variant when that is asked for, and measure what it loses with and without.

    Args:
        staging: Takes the step.
        number: Of the round.
        variant: Its name.
        checkpoint: It as it was.
        bundle: Its experts, being written.
        counted: Passages that repair fits to.
        held_out: Passages that are measured on.
        gained: Nats per token that fine-tuning gained on those held out, where that is known.
        asked: What may be done to its tensors.
        options: Memory and dtype.
        progress: Told of the bytes of weights whose work is done.
    """
    entry = bundle.variant(variant)
    is_exact = all(error == 0 for errors in entry.errors.values() for error in errors)
    changed: dict[str, Tensor] = {}
    if asked.is_asked and not is_exact:
        changed = _repair(variant, checkpoint, bundle, counted, asked, options, progress)
    losses = measure_bundle(checkpoint, bundle, variant, held_out, options, changed, progress)
    if changed and losses[2].nll >= losses[1].nll:
        logger.info("variant %s: repair does not help it on passages held out", variant)
        changed = {}
    files, tensors = {}, {}
    if changed:
        name = _repaired_file(number, variant)
        files = {name: _write(staging.folder / name, changed)}
        tensors = read_header(staging.folder / name)
    damage = _damage(losses[: 3 if changed else 2], gained)
    staging.finish(_step(number, variant), files, {"damage": damage, "repaired": bool(changed)})
    return Quality(damage=damage, tensors=tensors)


def _repair(
    variant: str,
    checkpoint: Checkpoint,
    bundle: Bundle,
    passages: Sequence[Passage],
    asked: RepairOptions,
    options: CalibrationOptions,
    progress: Progress,
) -> dict[str, Tensor]:
    """Tensors by role, in their stored dtype, that are to stand in place of the variant's own."""
    tensors: dict[str, Tensor] = {}
    if asked.repair:
        tensors = repair_variant(checkpoint, bundle, variant, passages, options, progress)
    if asked.heal:
        tensors = heal_variant(checkpoint, bundle, variant, passages, asked.heal, tensors, options, progress)
    return tensors


def _write(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors named by their roles; returns the SHA-256."""
    return write_tensors(path, [memory_tensor(role, tensor) for role, tensor in tensors.items()])


def _damage(losses: Sequence[Loss], gained: float | None) -> dict[str, float]:
    """The numbers of `VariantEntry.damage` that are measured; the last lane is what is written."""
    own, shared, last = losses[0], losses[1], losses[-1]
    damage = {"measured": last.nll - own.nll, "kl": last.kl}
    if gained:
        damage["gain_recovered"] = 1 - damage["measured"] / gained
    if last is not shared:
        damage["unrepaired"] = shared.nll - own.nll
    return {name: float(f"{value:.{_DIGITS}g}") for name, value in damage.items()}


def _step(number: int, variant: str) -> str:
    return f"quality {number} {variant}"


def _repaired_file(number: int, variant: str) -> str:
    return f"{WORK}repaired-{number}-{variant}.safetensors"
