"""From `NAME=REF...` arguments to opened variants."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from moemerge.checkpoint.sizes import parse_size
from moemerge.checkpoint.variants import VariantSet, open_variants
from moemerge.cli.command import print_findings
from moemerge.errors import InvalidRecipe
from moemerge.progress import Progress
from moemerge.refs import parse_named_sources, parse_source

if TYPE_CHECKING:
    from moemerge.consolidation.measured import Statistics


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


def open_statistics(variants: VariantSet, calibration: str | None, policy: str | None) -> "Statistics | None":
    """What costs are measured on: a calibration, or nothing that was given.

    Raises:
        InvalidRecipe: A calibration that the policy does not use, or that lacks a variant.
        IncompatibleInputs: It was made with other weights.
        NotFound, UnsupportedCheckpoint, DamagedInput: It cannot be read.
    """
    from moemerge.calibration.folder import open_calibration
    from moemerge.consolidation.measured import TextStatistics
    from moemerge.consolidation.planning import MEASURED

    if calibration is None:
        return None
    if policy not in (None, MEASURED):
        raise InvalidRecipe(f"--calibration goes with --policy {MEASURED}; {policy} looks at weights alone")
    opened = open_calibration(Path(calibration))
    opened.check(variants)
    return TextStatistics(opened, tuple(variants.variants))


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
