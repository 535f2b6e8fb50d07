"""Calibrating variants: each is run on its own text, and what that tells goes into a folder.

Every variant is a unit of work, on one machine or on several; `folder` knows what is there already.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moemerge import __version__
from moemerge.bundle.target import locked, writing
from moemerge.calibration.folder import (
    Calibration,
    VariantCalibration,
    building_variants,
    is_calibrated,
    layer_file,
    open_index,
    put_variant,
)
from moemerge.calibration.passages import PASSAGES, Passages, spread, write_passages
from moemerge.calibration.passes import (
    CalibrationOptions,
    calibrate_variant,
    mean_nll,
    measure_nll,
    pass_memory,
)
from moemerge.calibration.sensitivity import Response, measure_sensitivity
from moemerge.calibration.statistics import (
    LayerStatistics,
    layer_bytes,
    layer_of_tensors,
    layer_tensors,
)
from moemerge.calibration.texts import Passage, Text, load_texts
from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.disk import check_disk
from moemerge.checkpoint.fingerprint import fingerprint
from moemerge.checkpoint.tensors import TensorReader, map_tensors
from moemerge.checkpoint.variants import VariantSet
from moemerge.checkpoint.writer import memory_tensor, write_tensors
from moemerge.errors import Finding
from moemerge.execution import Executor, Local, Work
from moemerge.progress import Progress, Silent

# What a base is compared on, and what layers are disturbed on, spread over the text.
_COMPARED_TOKENS, _DISTURBED_TOKENS = 8192, 2048
_DIGITS = 4
"""Of what damage costs: more than so little text tells, and seldom others with another number of threads."""


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What `calibrate` has done.

    Attributes:
        calibration: The folder, opened.
        reused: Variants that were there already, from the same weights, text and settings.
        findings: Warnings.
    """

    calibration: Calibration
    reused: tuple[str, ...]
    findings: tuple[Finding, ...]


def calibrate(
    variants: VariantSet,
    paths: Mapping[str, Path],
    folder: Path,
    options: CalibrationOptions | None = None,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> Calibrated:
    """Run every variant on its own text and keep the statistics in `folder`, beside those it holds already.

    Args:
        variants: Local checkpoints; a base, if there is one, tells whether a text suits its variant.
        paths: Text by variant.
        folder: Created when it is not there.
        options: How to.
        progress: Told of the bytes of weights whose work is done.
        executor: Does the work, a variant at a time; this process by default.

    Raises:
        InvalidRecipe, NotFound: As `load_texts`, or the folder holds something else.
        IncompatibleInputs: The folder holds statistics of another geometry.
        NotEnoughRoom: Memory or disk does not suffice.
        Busy: Another process writes the same folder.
    """
    options = options or CalibrationOptions()
    texts = load_texts(variants.variants, paths, options.num_tokens, options.window)
    findings: dict[str, list[Finding]] = {}
    with writing(folder), locked(folder):
        index = open_index(folder, variants.first)
        entries = {name: _describe(c, texts[name], options) for name, c in variants.variants.items()}
        missing = [name for name, entry in entries.items() if not is_calibrated(folder, name, entry, index)]
        needed = sum(_folder_bytes(variants.variants[name], options) for name in missing)
        check_disk(folder, needed, f"calibrating {', '.join(missing)}")
        with building_variants(folder, missing) as places:
            works = [_work(variants, name, texts[name].passages, places[name], options) for name in missing]
            for number, measured in (executor or Local()).map(works, progress or Silent()):
                name = missing[number]
                entry = entries[name].model_copy(update=measured)
                index = put_variant(folder, name, places[name], entry, index)
                findings[name] = _judge(name, entry, texts[name])
    reused = tuple(name for name in entries if name not in missing)
    told = tuple(finding for name in missing for finding in findings[name])
    return Calibrated(Calibration(folder, index), reused, told)


def _describe(checkpoint: Checkpoint, text: Text, options: CalibrationOptions) -> VariantCalibration:
    """The entry of a variant, but for what is measured."""
    with TensorReader() as reader:
        weights = fingerprint(checkpoint, reader)
    return VariantCalibration(
        fingerprint=weights,
        text_sha256=text.sha256,
        num_tokens=text.num_tokens,
        num_passages=len(text.passages),
        num_held_out=len(Passages.divide(text.passages).held_out),
        max_tokens=options.num_tokens,
        window=options.window,
        reservoir=options.reservoir,
        seed=options.seed,
        dtype=options.dtype,
        nll=0.0,
        moemerge=__version__,
    )


def _work(
    variants: VariantSet, name: str, passages: Sequence[Passage], place: Path, options: CalibrationOptions
) -> Work[dict[str, object]]:
    """The calibration of a variant as a unit of work; its result are the fields that are measured."""
    checkpoint, divided = variants.variants[name], Passages.divide(passages)
    # The runs on what is held out have a few lanes, on an eighth of the tokens.
    return Work(
        title=f"calibrating {name}",
        run=partial(_calibrate, name, checkpoint, variants.base, divided, place, options),
        reads=checkpoint.files | (variants.base.files if variants.base else frozenset()),
        folder=place,
        memory_bytes=pass_memory(checkpoint, passages, options),
    )


def _calibrate(
    name: str,
    checkpoint: Checkpoint,
    base: Checkpoint | None,
    passages: Passages,
    place: Path,
    options: CalibrationOptions,
    progress: Progress,
) -> dict[str, object]:
    nll = _write_layers(checkpoint, passages.counted, place, options, progress, name)
    write_passages(passages, place / PASSAGES)
    measured = _measure(name, checkpoint, base, passages, options, progress)
    return {"nll": mean_nll(nll, passages.counted), **measured}


def _write_layers(
    checkpoint: Checkpoint,
    passages: Sequence[Passage],
    place: Path,
    options: CalibrationOptions,
    progress: Progress | None,
    name: str,
) -> list[float]:
    """Statistics of every layer into `place`; those of several passes are added there."""

    def keep(layer_index: int, layer: LayerStatistics) -> None:
        path = place / layer_file(layer_index)
        if path.exists():
            before = layer_of_tensors(map_tensors(path), options.reservoir)
            before.add(layer)
            layer = before
        tensors = [memory_tensor(key, tensor) for key, tensor in layer_tensors(layer).items()]
        write_tensors(path, tensors, {"format": "pt"})

    return calibrate_variant(checkpoint, passages, keep, options, progress, f"calibrating {name}")


def _folder_bytes(checkpoint: Checkpoint, options: CalibrationOptions) -> int:
    """What a variant's files take, and one of them a second time while it is written anew."""
    width = int(checkpoint.settings["hidden_size"] or 0)
    each = layer_bytes(checkpoint.num_experts, width, options.reservoir)
    return (len(checkpoint.routed_layers) + 1) * each


def _measure(
    name: str,
    checkpoint: Checkpoint,
    base: Checkpoint | None,
    passages: Passages,
    options: CalibrationOptions,
    progress: Progress | None,
) -> dict[str, object]:
    """What damage costs in every layer, and what fine-tuning gained where there is a base; by field."""
    # A text too short to hold anything out is better than none.
    every = passages.held_out or passages.counted
    disturbed = spread(every, _DISTURBED_TOKENS)
    found = measure_sensitivity(checkpoint, disturbed, options, progress, f"disturbing {name}")
    measured: dict[str, object] = {
        "sensitivity": {index: _rounded(value) for index, value in found.by_layer.items()},
        "response": Response(*map(_rounded, found.response)),
    }
    if base is not None:
        chosen = spread(every, _COMPARED_TOKENS)
        measured["base_nll_excess"] = _compare(name, checkpoint, base, chosen, options, progress)
    return measured


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _compare(
    name: str,
    checkpoint: Checkpoint,
    base: Checkpoint,
    passages: Sequence[Passage],
    options: CalibrationOptions,
    progress: Progress | None,
) -> float | None:
    """Mean log-likelihood of the base minus the variant's; None when the base does not know the tokens."""
    vocab_size = int(base.settings["vocab_size"] or 0)
    if any(max((*passage.token_ids, *passage.target_ids)) >= vocab_size for passage in passages):
        return None
    of_base = measure_nll(base, passages, options, progress, f"base on {name}'s text")
    own = measure_nll(checkpoint, passages, options, progress, f"{name} on its text")
    return mean_nll(of_base, passages) - mean_nll(own, passages)


def _judge(name: str, entry: VariantCalibration, text: Text) -> list[Finding]:
    if entry.base_nll_excess is None or entry.base_nll_excess >= 0:
        return []
    return [
        Finding(
            level="warning",
            code="TEXT_OF_ANOTHER_KIND",
            where=f"variant {name}, {text.path}",
            found=f"the base predicts it better, by {-entry.base_nll_excess:.3f} nats a token",
            expected="text of the kind and language that the variant was tuned on",
        )
    ]
