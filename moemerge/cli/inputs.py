"""From `NAME=REF...` arguments to opened variants."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from moemerge.checkpoint.sizes import parse_size
from moemerge.checkpoint.variants import VariantSet, open_variants
from moemerge.cli.command import print_findings
from moemerge.errors import InvalidRecipe
from moemerge.execution import Executor
from moemerge.progress import Progress
from moemerge.refs import parse_named_sources, parse_source

if TYPE_CHECKING:
    from moemerge.consolidation.measured import Statistics
    from moemerge.consolidation.task import EvidenceOptions


def open_sources(
    sources: list[str],
    base: str | None,
    progress: Progress,
    *,
    offline: bool,
    allow_pickle: bool,
    download: bool = True,
    quiet: bool = False,
) -> VariantSet:
    """Open what the arguments name and tell notes and warnings.

    Raises:
        InvalidRecipe: No source, or malformed ones.
        MoemergeError: As `open_variants`.
    """
    if not sources:
        raise InvalidRecipe("no variants given; write NAME=REF, for example code=org/model or code=./folder")
    variants = open_variants(
        parse_named_sources(sources),
        parse_source(base) if base else None,
        offline=offline,
        allow_pickle=allow_pickle,
        download=download,
        progress=progress,
    )
    if not quiet:
        print_findings(variants.findings)
    return variants


@contextmanager
def open_statistics(
    variants: VariantSet,
    evidence: "EvidenceOptions",
    policy: str | None,
    *,
    beside: Path | None,
    max_ram: int | None,
    progress: Progress,
    executor: Executor | None = None,
    quiet: bool = False,
) -> Iterator["Statistics | None"]:
    """What costs are measured on: a calibration, one that is made now, or nothing that was given.

    Args:
        variants: Local checkpoints.
        evidence: What was given.
        policy: What decides, when that is known.
        beside: What is to be written; the calibration of an interrupted run is kept beside it. None to keep
            nothing.
        max_ram: Bytes of memory to stay within.
        progress: Told of bytes.
        executor: Does the work; this process by default.
        quiet: Whether findings are not told.

    Raises:
        InvalidRecipe: Evidence that the policy does not use, or that lacks a variant.
        IncompatibleInputs: It was made with other weights.
        NotFound, UnsupportedCheckpoint, DamagedInput: It cannot be read.
    """
    from moemerge.calibration.calibrating import calibrate
    from moemerge.calibration.folder import open_calibration
    from moemerge.calibration.passes import CalibrationOptions
    from moemerge.calibration.texts import parse_texts
    from moemerge.consolidation.measured import TextStatistics
    from moemerge.consolidation.planning import MEASURED

    if not evidence.is_given:
        yield None
        return
    if policy not in (None, MEASURED):
        raise InvalidRecipe(
            f"--text and --calibration go with --policy {MEASURED}; {policy} looks at weights alone"
        )
    names = tuple(variants.variants)
    if evidence.calibration is not None:
        opened = open_calibration(evidence.calibration)
        opened.check(variants)
        yield TextStatistics(opened, names)
        return
    with _calibration_folder(beside) as folder:
        options = CalibrationOptions(num_tokens=evidence.tokens, dtype=evidence.dtype, max_ram=max_ram)
        done = calibrate(variants, parse_texts(evidence.texts), folder, options, progress, executor)
        if not quiet:
            print_findings(done.findings)
        yield TextStatistics(done.calibration, names)


@contextmanager
def _calibration_folder(beside: Path | None) -> Iterator[Path]:
    """A folder that disappears; an interrupted run leaves it beside what it was to write."""
    if beside is None:
        with tempfile.TemporaryDirectory(prefix="moemerge-") as folder:
            yield Path(folder) / "calibration"
        return
    place = beside.absolute().with_name(f".{beside.name}.calibration")
    yield place
    shutil.rmtree(place, ignore_errors=True)
    place.with_name(f"{place.name}.lock").unlink(missing_ok=True)


def parse_max_ram(text: str | None) -> int | None:
    """Bytes of `--max-ram`.

    Raises:
        InvalidRecipe: Not a size, or nothing.
    """
    if text is None:
        return None
    limit = parse_size(text)
    if limit <= 0:
        raise InvalidRecipe(f"--max-ram {text} leaves no memory to work with")
    return limit


def read_prompt(text: str) -> str:
    """The prompt, from standard input when it is `-`.

    Raises:
        InvalidRecipe: Not UTF-8.
    """
    try:
        prompt = sys.stdin.buffer.read().decode("utf-8") if text == "-" else text
        prompt.encode("utf-8")
    except UnicodeError as error:
        raise InvalidRecipe(f"the prompt is not valid UTF-8 ({error})") from error
    return prompt
