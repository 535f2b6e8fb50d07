"""What a written bundle costs each variant, on passages that no decision was made from; and repair.

Runs when the pools of a plan are in the staging folder. Every variant is a step of the journal.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from moemerge.bundle.reader import Bundle
from moemerge.calibration.lanes import Loss
from moemerge.calibration.passages import Passages
from moemerge.calibration.passes import DEFAULT_DTYPE, CalibrationOptions, pass_memory
from moemerge.calibration.texts import Passage
from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.headers import StoredTensor, read_header
from moemerge.checkpoint.writer import memory_tensor, write_tensors
from moemerge.consolidation.healing import heal_variant
from moemerge.consolidation.prefix import measure_bundle
from moemerge.consolidation.repair import repair_variant
from moemerge.consolidation.staging import WORK, Staging
from moemerge.errors import InvalidRecipe
from moemerge.execution import Work
from moemerge.progress import Progress

_DIGITS = 6
# The variant as it was, with shared experts, and repaired.
_LANES = 3
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
    """What was measured and kept, be it by an interrupted run."""
    found = staging.finished(_step(number, variant))
    if found is None:
        return None
    path = staging.folder / _repaired_file(number, variant)
    return Quality(damage=found["damage"], tensors=read_header(path) if found["repaired"] else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredQuality:
    """What is to be journalled of one variant.

    Attributes:
        files: SHA-256 of the file of repaired tensors by path, when there is one.
        damage: See `Quality`.
    """

    files: dict[str, str]
    damage: dict[str, float]


def keep_quality(staging: Staging, number: int, variant: str, measured: MeasuredQuality) -> None:
    """Make what was measured final."""
    result = {"damage": measured.damage, "repaired": bool(measured.files)}
    staging.finish(_step(number, variant), measured.files, result)


def quality_work(
    folder: Path,
    number: int,
    variant: str,
    checkpoint: Checkpoint,
    bundle: Bundle,
    passages: Passages,
    gained: float | None,
    asked: RepairOptions,
    options: CalibrationOptions,
) -> Work[MeasuredQuality]:
    """`measure_quality` as a unit of work."""
    run = partial(
        measure_quality,
        folder.absolute(),
        number,
        variant,
        checkpoint,
        replace(bundle, folder=folder.absolute()),
        passages.counted,
        passages.held_out,
        gained,
        asked,
        options,
    )
    every = [*passages.counted, *passages.held_out]
    return Work(
        title=f"quality of {variant}",
        run=run,
        reads=checkpoint.files,
        folder=folder.absolute(),
        memory_bytes=pass_memory(checkpoint, every, options, copies=_LANES),
    )


def measure_quality(
    folder: Path,
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
) -> MeasuredQuality:
    """Repair a variant when that is asked for, and measure what it loses with and without.

    Args:
        folder: Where repaired tensors are written; that of the staging.
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
    files = {}
    if changed:
        name = _repaired_file(number, variant)
        files = {name: _write(folder / name, changed)}
    return MeasuredQuality(files=files, damage=_damage(losses[: 3 if changed else 2], gained))


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
        # Steps are small: they would be lost in fewer digits.
        exact = replace(options, dtype=DEFAULT_DTYPE)
        tensors = heal_variant(checkpoint, bundle, variant, passages, asked.heal, tensors, exact, progress)
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
