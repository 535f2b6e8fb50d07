"""Calibrating variants: each is run on its own text, and what that tells goes into a folder.

A span of a variant's layers is a unit of work, on one machine or on several, and so is what is measured at
the end; `folder` knows what is there already.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

from moemerge import __version__
from moemerge.bundle.target import locked, writing
from moemerge.calibration.folder import (
    Calibration,
    VariantCalibration,
    building_place,
    is_calibrated,
    open_index,
    put_variant,
)
from moemerge.calibration.passages import PASSAGES, Passages, spread, write_passages
from moemerge.calibration.passes import (
    CalibrationOptions,
    mean_nll,
    measure_nll,
    pass_memory,
    passage_nll,
)
from moemerge.calibration.sensitivity import Response, measure_sensitivity
from moemerge.calibration.spans import (
    calibrate_span,
    drop_hidden,
    hidden_at_end,
    hidden_bytes,
    next_span,
)
from moemerge.calibration.statistics import layer_bytes
from moemerge.calibration.texts import Passage, Text, load_texts
from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.disk import check_disk
from moemerge.checkpoint.fingerprint import file_stamps, fingerprint
from moemerge.checkpoint.tensors import TensorReader
from moemerge.checkpoint.variants import VariantSet
from moemerge.errors import DamagedInput, Finding, IncompatibleInputs, InvalidRecipe
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
        executor: Does the work, a span of a variant's layers at a time; this process by default.

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
        units = []
        for name in missing:
            checkpoint, passages = variants.variants[name], Passages.divide(texts[name].passages)
            place = building_place(folder, name, _task_of(entries[name], checkpoint, variants.base, passages))
            units.append(_Unit(name, checkpoint, variants.base, passages, place, options))
        check_disk(folder, sum(unit.missing_bytes() for unit in units), f"calibrating {', '.join(missing)}")
        try:
            _run_spans(units, executor or Local(), progress or Silent())
            works = [unit.last_work() for unit in units]
            for number, measured in (executor or Local()).map(works, progress or Silent()):
                name = missing[number]
                entry = entries[name].model_copy(update=measured)
                index = put_variant(folder, name, units[number].place, entry, index)
                findings[name] = _judge(name, entry, texts[name])
        except (InvalidRecipe, IncompatibleInputs, DamagedInput):
            # The same command would fail again.
            for unit in units:
                shutil.rmtree(unit.place, ignore_errors=True)
            raise
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


@dataclass(frozen=True, slots=True)
class _Unit:
    """A variant that is being calibrated.

    Attributes:
        name: Its name.
        checkpoint: It, local.
        base: What it was tuned from, if that is known.
        passages: Its text.
        place: Folder in which it is built.
        options: How to.
    """

    name: str
    checkpoint: Checkpoint
    base: Checkpoint | None
    passages: Passages
    place: Path
    options: CalibrationOptions

    def next_span(self) -> range | None:
        """The layers that come next."""
        return next_span(self.checkpoint, self.passages.counted, self.place, self.options)

    def missing_bytes(self) -> int:
        """Of disk, that what is still to be written takes at most."""
        needed = _folder_bytes(self.checkpoint, self.passages.counted, self.options)
        there = sum(path.stat().st_size for path in self.place.glob("layer-*"))
        return max(0, needed - there)

    def span_work(self, layers: range) -> Work[None]:
        """`calibrate_span` as a unit of work."""
        title = f"{self.name}, layers {layers.start} to {layers.stop - 1}"
        arguments = (self.checkpoint, self.passages.counted, layers, self.place, self.options, title)
        return Work(
            title=f"calibrating {title}",
            run=partial(calibrate_span, *arguments),
            reads=self.checkpoint.files,
            folder=self.place,
            memory_bytes=pass_memory(self.checkpoint, self.passages.counted, self.options),
        )

    def last_work(self) -> Work[dict[str, object]]:
        """What is left when all spans are done; its result are the fields that are measured."""
        # The runs on what is held out have a few lanes, on an eighth of the tokens.
        return Work(
            title=f"disturbing {self.name}",
            run=self._finish,
            reads=self.checkpoint.files | (self.base.files if self.base else frozenset()),
            folder=self.place,
            memory_bytes=pass_memory(self.checkpoint, self.passages.counted, self.options),
        )

    def _finish(self, progress: Progress) -> dict[str, object]:
        counted = self.passages.counted
        with TensorReader() as reader:
            hidden = hidden_at_end(self.checkpoint, counted, self.place, self.options, reader)
            nll = mean_nll(passage_nll(self.checkpoint, counted, hidden, self.options), counted)
        measured = _measure(self.name, self.checkpoint, self.base, self.passages, self.options, progress)
        write_passages(self.passages, self.place / PASSAGES)
        return {"nll": nll, **measured}


def _run_spans(units: Sequence[_Unit], executor: Executor, progress: Progress) -> None:
    """The layers of all variants, a span of each at a time."""
    while begun := [(unit, layers) for unit in units if (layers := unit.next_span()) is not None]:
        works = [unit.span_work(layers) for unit, layers in begun]
        for number, _ in executor.map(works, progress):
            unit, layers = begun[number]
            drop_hidden(unit.place, before=layers.stop)


def _task_of(
    entry: VariantCalibration, checkpoint: Checkpoint, base: Checkpoint | None, passages: Passages
) -> str:
    """Identifies the work in the folder where it is done: the same continues, other work begins anew."""
    stamps = [file_stamps(one) for one in (checkpoint, base) if one is not None]
    tokens = sha256(repr(passages).encode()).hexdigest()
    return json.dumps([__version__, entry.identity, checkpoint.config, stamps, tokens], sort_keys=True)


def _folder_bytes(checkpoint: Checkpoint, passages: Sequence[Passage], options: CalibrationOptions) -> int:
    """What a variant's files take, one of them a second time while it is written anew, and hidden states."""
    width = int(checkpoint.settings["hidden_size"] or 0)
    each = layer_bytes(checkpoint.num_experts, width, options.reservoir)
    return (len(checkpoint.routed_layers) + 1) * each + 2 * hidden_bytes(checkpoint, passages, options)


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
