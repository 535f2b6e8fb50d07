"""Open all variants of a consolidation together, from folders or the hub."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.compatibility import compare_variants
from moemerge.checkpoint.conversions import default_cache
from moemerge.checkpoint.source import Source, find_source
from moemerge.checkpoint.tensors import TensorReader
from moemerge.checkpoint.ties import resolve_ties
from moemerge.errors import Finding, MoemergeError, raise_findings
from moemerge.progress import Progress
from moemerge.refs import AdaptedRef, HubRef, SourceRef

if TYPE_CHECKING:
    from moemerge.checkpoint.hub import HubRepository

# Not a possible variant name, so that a variant may be called base.
_BASE = "(base)"
Check = Callable[[Mapping[str, Checkpoint]], Sequence[Finding]]


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantSet:
    """Checkpoints that can be consolidated, in the order given.

    Attributes:
        variants: By name.
        base: Their common ancestor, when it was given.
        findings: Warnings and notes of all of them.
    """

    variants: dict[str, Checkpoint]
    base: Checkpoint | None
    findings: tuple[Finding, ...]

    @property
    def first(self) -> Checkpoint:
        """The variant whose geometry stands for all."""
        return next(iter(self.variants.values()))

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """All of them, the base last."""
        return (*self.variants.values(), *((self.base,) if self.base else ()))

    @property
    def files(self) -> frozenset[Path]:
        """Files with their tensors."""
        return frozenset().union(*(checkpoint.files for checkpoint in self.checkpoints))

    def at_layer(self, layer_index: int) -> "VariantSet":
        """See `Checkpoint.at_layer`."""
        return replace(
            self,
            variants={name: checkpoint.at_layer(layer_index) for name, checkpoint in self.variants.items()},
            base=self.base.at_layer(layer_index) if self.base else None,
        )


def open_variants(
    sources: dict[str, SourceRef],
    base: SourceRef | None = None,
    *,
    offline: bool = False,
    download: bool = True,
    allow_pickle: bool = False,
    cache: Path | None = None,
    check: Check | None = None,
    progress: Progress | None = None,
) -> VariantSet:
    """Look at every source, refuse with all findings, and only then download weights.

    Args:
        sources: References by variant name.
        base: Reference of the common ancestor.
        offline: Use the hub cache only.
        download: False to stop after the checks; then weights may not be readable, and no adapter is applied.
        allow_pickle: Convert checkpoints that have pickles only, without running what is in them.
        cache: Where conversions and applied adapters are kept; `default_cache()` unless given.
        check: Gives further findings about the variants, which are told with the others.
        progress: Told of downloads.

    Raises:
        IncompatibleInputs: With every finding of every source.
        MoemergeError: When one source fails for another reason, that reason, with all findings.
    """
    refs = {**sources, **({_BASE: base} if base else {})}
    found, opened = _look_at_all(refs, offline=offline, allow_pickle=allow_pickle)
    if opened:
        _check_together(opened, check)
    if download:
        _check_room(found.values())
    kept = cache or default_cache()
    for name in [name for name in found if name not in opened]:
        found[name] = found[name].convert(kept, progress, download=download)
    checkpoints = {name: opened.get(name) or source.open() for name, source in found.items()}
    if len(checkpoints) > len(opened):
        _check_together(checkpoints, check)
    if download:
        for name, source in found.items():
            if not checkpoints[name].is_local:
                checkpoints[name] = source.pull(progress).apply(kept, progress)
    if all(checkpoint.is_local for checkpoint in checkpoints.values()):
        with TensorReader() as reader:
            checkpoints = {name: resolve_ties(c, reader) for name, c in checkpoints.items()}
    notes = [*_check_together(checkpoints, check), *(f for c in checkpoints.values() for f in c.findings)]
    base_checkpoint = checkpoints.pop(_BASE, None)
    return VariantSet(variants=checkpoints, base=base_checkpoint, findings=tuple(notes))


def open_readable(
    ref: SourceRef,
    *,
    offline: bool = False,
    download: bool = False,
    allow_pickle: bool = False,
    find_base: bool = True,
    progress: Progress | None = None,
) -> Source:
    """What a reference names; pickles converted if allowed, weights downloaded if asked.

    Raises:
        MoemergeError: As `find_source`, `Source.convert` and `hub.pull`.
    """
    source = find_source(ref, offline=offline, allow_pickle=allow_pickle, find_base=find_base)
    if source.needs_conversion:
        source = source.convert(default_cache(), progress, download=download)
    if source.is_local or not download:
        return source
    # A checkpoint that cannot be read is not worth a download.
    source.open()
    _check_room([source])
    return source.pull(progress)


def look_at_repositories(
    refs: Sequence[Sequence[HubRef]], *, allow_pickle: bool = False
) -> "list[HubRepository]":
    """Hub repositories, each checked by its configuration and headers; nothing is downloaded.

    Args:
        refs: Each of a checkpoint, of an adapter, whose base is added, or of a base and an adapter.
        allow_pickle: As `open_variants`.

    Raises:
        MoemergeError: With the findings of every repository that cannot be read.
    """
    parsed: list[SourceRef] = [ref[0] if len(ref) == 1 else AdaptedRef(*ref) for ref in refs]
    named = {str(ref): ref for ref in parsed}
    sources, _ = _look_at_all(named, offline=False, allow_pickle=allow_pickle)
    found = {repository.origin: repository for source in sources.values() for repository in source.remote()}
    return list(found.values())


def _look_at_all(
    refs: dict[str, SourceRef], *, offline: bool, allow_pickle: bool
) -> tuple[dict[str, Source], dict[str, Checkpoint]]:
    """Every source, and its checkpoint unless pickles must be fetched and converted for that."""
    sources: dict[str, Source] = {}
    checkpoints: dict[str, Checkpoint] = {}
    failures: list[tuple[str, MoemergeError]] = []
    for name, ref in refs.items():
        try:
            sources[name] = find_source(ref, offline=offline, allow_pickle=allow_pickle)
            if (checkpoint := sources[name].look()) is not None:
                checkpoints[name] = checkpoint
        except MoemergeError as error:
            failures.append((name, error))
    if failures:
        raise _combine(failures)
    return sources, checkpoints


def _check_room(sources: Iterable[Source]) -> None:
    remote = [(repository, source) for source in sources for repository in source.remote()]
    if remote:
        from moemerge.checkpoint import hub

        allow_pickle = any(source.allow_pickle for _, source in remote)
        hub.check_room([repository for repository, _ in remote], allow_pickle=allow_pickle)


def _combine(failures: list[tuple[str, MoemergeError]]) -> MoemergeError:
    """One error of the first failure's kind that tells of all."""
    findings = [
        finding
        for name, error in failures
        for finding in error.findings
        or [Finding(level="error", code="UNREADABLE", where=name, found=str(error))]
    ]
    message = "\n".join(f"variant {name}: {error}" for name, error in failures)
    first = failures[0][1]
    combined = type(first)(message, findings)
    combined.__cause__ = first
    return combined


def _check_together(checkpoints: dict[str, Checkpoint], check: Check | None) -> list[Finding]:
    findings = compare_variants(checkpoints)
    if check is not None:
        findings += check(checkpoints)
    raise_findings(findings, "these checkpoints cannot be consolidated together")
    return findings
