"""From what a user names to what is measured: the bundle or checkpoint, texts, originals and base.

Everything is opened and checked before anything is measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moemerge.bundle.reader import is_bundle, open_bundle
from moemerge.calibration.calibrating import calibrate
from moemerge.calibration.folder import open_calibration
from moemerge.calibration.passes import CalibrationOptions
from moemerge.calibration.texts import parse_texts
from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.variants import VariantSet, open_variants
from moemerge.consolidation.budget import Budget, parse_budget
from moemerge.consolidation.measured import TextStatistics
from moemerge.errors import Finding, IncompatibleInputs, InvalidRecipe
from moemerge.evaluation.comparison import ComparisonTask
from moemerge.evaluation.evaluating import Subject, owner_in, owner_of
from moemerge.evaluation.methods import METHODS
from moemerge.evaluation.samples import Sample, SampleSize, TextOwner, load_samples
from moemerge.execution import Executor
from moemerge.progress import Progress
from moemerge.refs import SourceRef, parse_named_sources, parse_source


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What is measured, on what, and beside what.

    Attributes:
        subject: A bundle, or a checkpoint that stands for every name.
        samples: By variant.
        originals: By variant.
        base: Their common ancestor.
        findings: Warnings and notes.
    """

    subject: Subject
    samples: Mapping[str, Sample]
    originals: Mapping[str, Checkpoint]
    base: Checkpoint | None
    findings: tuple[Finding, ...]


def open_evaluation(
    subject: str,
    texts: Sequence[str],
    *,
    originals: Sequence[str],
    base: str | None,
    variants: Sequence[str] | None,
    size: SampleSize,
    offline: bool,
    progress: Progress,
) -> Selection:
    """Open everything.

    Args:
        subject: A bundle's folder, or a checkpoint's reference.
        texts: `NAME=FILE` of every variant to be measured.
        originals: `NAME=REF`.
        base: A reference.
        variants: Names to measure; None for those with a text.
        size: How much of the texts.
        offline: Use the hub's cache alone.
        progress: Told of bytes.

    Raises:
        InvalidRecipe, NotFound: With every problem of the texts, or names that do not fit.
        IncompatibleInputs: A checkpoint of another family.
        MoemergeError: As `open_bundle` and `open_variants`.
    """
    paths = parse_texts(texts)
    opened = _open_subject(subject, offline=offline, progress=progress)
    names, findings = _choose(opened, list(paths), variants)
    named = parse_named_sources(list(originals))
    if unknown := [name for name in named if name not in names]:
        raise InvalidRecipe(f"--original for {', '.join(unknown)}, which is not measured: {', '.join(names)}")
    owners = {name: _owner(opened, name) for name in names}
    chosen = {name: path for name, path in paths.items() if name in names or variants is None}
    samples = load_samples(owners, chosen, size)
    checkpoints = {name: _open(ref, offline, progress, opened) for name, ref in named.items()}
    return Selection(
        subject=opened,
        samples=samples,
        originals=checkpoints,
        base=_open(parse_source(base), offline, progress, opened) if base else None,
        findings=findings,
    )


def _open_subject(subject: str, *, offline: bool, progress: Progress) -> Subject:
    folder = Path(subject).expanduser()
    if is_bundle(folder):
        return open_bundle(folder)
    return _open(parse_source(subject), offline, progress, None)


def _open(ref: SourceRef, offline: bool, progress: Progress, subject: Subject | None) -> Checkpoint:
    opened = open_variants({"it": ref}, offline=offline, progress=progress).first
    if subject is not None and opened.family.name != subject.family.name:
        raise IncompatibleInputs(
            f"{opened.label} is a {opened.family.title}, what is measured a {subject.family.title}"
        )
    return opened


def _choose(
    subject: Subject, given: list[str], wanted: Sequence[str] | None
) -> tuple[list[str], tuple[Finding, ...]]:
    """Names to measure, in the bundle's order, and notes on those left out."""
    known = given if isinstance(subject, Checkpoint) else list(subject.manifest.variants)
    if unknown := [name for name in (*given, *(wanted or ())) if name not in known]:
        raise InvalidRecipe(f"no variant {unknown[0]!r}; there are {', '.join(known)}")
    chosen = [name for name in known if name in (wanted if wanted is not None else given)]
    left_out = [name for name in known if name not in chosen] if wanted is None else []
    findings = [
        Finding(
            level="note",
            code="NOT_MEASURED",
            where=f"variant {name}",
            found="no text, so it is not measured",
            fix=f"Give --text {name}=FILE",
        )
        for name in left_out
    ]
    return chosen, tuple(findings)


def _owner(subject: Subject, name: str) -> TextOwner:
    return owner_of(subject) if isinstance(subject, Checkpoint) else owner_in(subject, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonInputs:
    """What is compared, but for methods and budgets.

    Attributes:
        variants: Local checkpoints with their base.
        samples: By variant, what is measured on.
        statistics: Calibration of the variants.
        folder: For results.
        max_ram: Bytes of memory to stay within.
        findings: Warnings and notes.
    """

    variants: VariantSet
    samples: Mapping[str, Sample]
    statistics: TextStatistics
    folder: Path
    max_ram: int | None
    findings: tuple[Finding, ...]

    def task(
        self, *, budgets: Sequence[Budget], methods: Sequence[str], seed: int, num_draws: int
    ) -> ComparisonTask:
        """With the rest of it."""
        return ComparisonTask(
            variants=self.variants,
            samples=self.samples,
            statistics=self.statistics,
            budgets=budgets,
            methods=methods,
            folder=self.folder,
            seed=seed,
            num_draws=num_draws,
            max_ram=self.max_ram,
        )


def open_comparison(
    variants: VariantSet,
    texts: Sequence[str],
    *,
    calibration: Path | None,
    calibrate_texts: Sequence[str],
    tokens: int,
    window: int,
    windows: int,
    rows: int,
    folder: Path,
    max_ram: int | None,
    progress: Progress,
    executor: Executor | None = None,
) -> ComparisonInputs:
    """Load what is measured on, and open or make the calibration.

    Args:
        variants: Local checkpoints with their base.
        texts: `NAME=FILE` of every variant, to measure on.
        calibration: A folder; None to calibrate now.
        calibrate_texts: `NAME=FILE` of every variant, to calibrate on.
        tokens: Most tokens of each of these.
        window: Tokens of a window, of both kinds of text.
        windows: Most windows to measure on.
        rows: Most rows to measure on.
        folder: For results, and for the calibration that is made.
        max_ram: Bytes of memory to stay within.
        progress: Told of bytes.
        executor: Calibrates; this process by default.

    Raises:
        InvalidRecipe, NotFound: With every problem of the texts.
        IncompatibleInputs: The calibration is of other weights.
    """
    owners = {name: owner_of(checkpoint) for name, checkpoint in variants.variants.items()}
    size = SampleSize(windows=windows, window=window, rows=rows)
    paths = parse_texts(texts)
    samples = load_samples(owners, paths, size)
    findings: list[Finding] = []
    if calibration is not None:
        opened = open_calibration(calibration)
        opened.check(variants)
    else:
        own = parse_texts(calibrate_texts)
        options = CalibrationOptions(num_tokens=tokens, window=window, max_ram=max_ram)
        done = calibrate(variants, own, folder / "calibration", options, progress, executor)
        opened, findings = done.calibration, list(done.findings)
    for name, sample in samples.items():
        if opened.index.variants[name].text_sha256 == sample.sha256:
            findings.append(_same_text(name))
    return ComparisonInputs(
        variants=variants,
        samples=samples,
        statistics=TextStatistics(opened, tuple(variants.variants)),
        folder=folder,
        max_ram=max_ram,
        findings=tuple(findings),
    )


def parse_budgets(text: str) -> list[Budget]:
    """Budgets with commas between.

    Raises:
        InvalidRecipe: None, one twice, or one that is no limit.
    """
    budgets = [parse_budget(part) for part in text.split(",") if part.strip()]
    limits = [budget.text for budget in budgets]
    if not budgets or len(set(limits)) < len(limits):
        raise InvalidRecipe(f"--budget {text}: write different budgets with commas between, as 0.6x,1x")
    if "exact" in limits:
        raise InvalidRecipe("--budget exact keeps everything: nothing is left to compare")
    return budgets


def parse_methods(text: str) -> list[str]:
    """Methods with commas between; `all` for all of them.

    Raises:
        InvalidRecipe: None, or an unknown one.
    """
    names = list(METHODS) if text == "all" else [part.strip() for part in text.split(",") if part.strip()]
    if not names or not set(names) <= METHODS.keys():
        wrong = next((name for name in names if name not in METHODS), text)
        raise InvalidRecipe(f"no method {wrong!r}; there are {', '.join(METHODS)}")
    return list(dict.fromkeys(names))


def _same_text(name: str) -> Finding:
    return Finding(
        level="warning",
        code="MEASURED_ON_CALIBRATION",
        where=f"variant {name}",
        found="is measured on the file that it was calibrated on, which flatters what was chosen there",
        fix="Give other text of the same kind",
    )
