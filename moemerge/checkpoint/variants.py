"""Open all variants of a consolidation together, from folders or the hub."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moemerge.checkpoint.checkpoint import Checkpoint, open_checkpoint, read_config
from moemerge.checkpoint.compatibility import compare_variants
from moemerge.checkpoint.pickles import convert_pickles, default_cache
from moemerge.checkpoint.repository import LocalFolder, Repository
from moemerge.checkpoint.tensors import TensorReader
from moemerge.checkpoint.ties import resolve_ties
from moemerge.checkpoint.weights import has_only_pickles
from moemerge.errors import Finding, MoemergeError, UnsupportedCheckpoint, raise_findings
from moemerge.progress import Progress
from moemerge.refs import FolderRef, HubRef, SourceRef

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
    pickle_cache: Path | None = None,
    check: Check | None = None,
    progress: Progress | None = None,
) -> VariantSet:
    """Look at every source, refuse with all findings, and only then download weights.

    Args:
        sources: References by variant name.
        base: Reference of the common ancestor.
        offline: Use the hub cache only.
        download: False to stop after the checks; then weights may not be readable.
        allow_pickle: Convert checkpoints that have pickles only, without running what is in them.
        pickle_cache: Where conversions are kept; `pickles.default_cache()` unless given.
        check: Gives further findings about the variants, which are told with the others.
        progress: Told of downloads.

    Raises:
        IncompatibleInputs: With every finding of every source.
        MoemergeError: When one source fails for another reason, that reason, with all findings.
    """
    named = {**sources, **({_BASE: base} if base else {})}
    repositories, opened = _look_at_all(named, offline=offline, allow_pickle=allow_pickle)
    if opened:
        _check_together(opened, check)
    if download:
        _check_room(list(repositories.values()), allow_pickle=allow_pickle)
    checkpoints = {}
    for name, repository in repositories.items():
        if name not in opened:
            cache = pickle_cache or default_cache()
            repositories[name] = _convert(repository, cache, progress, download=download)
        checkpoints[name] = opened.get(name) or open_checkpoint(repositories[name])
    if len(checkpoints) > len(opened):
        _check_together(checkpoints, check)
    if download:
        for name, repository in repositories.items():
            if not checkpoints[name].is_local:
                checkpoints[name] = open_checkpoint(_pull(repository, progress))
    if all(checkpoint.is_local for checkpoint in checkpoints.values()):
        with TensorReader() as reader:
            checkpoints = {name: resolve_ties(c, reader) for name, c in checkpoints.items()}
    notes = [*_check_together(checkpoints, check), *(f for c in checkpoints.values() for f in c.findings)]
    base_checkpoint = checkpoints.pop(_BASE, None)
    return VariantSet(variants=checkpoints, base=base_checkpoint, findings=tuple(notes))


def open_source(ref: SourceRef, *, offline: bool = False) -> Repository:
    """The files that a reference names, without downloading weights."""
    if isinstance(ref, FolderRef):
        return LocalFolder(ref.path)
    # The hub client takes a noticeable time to import; folders do not need it.
    from moemerge.checkpoint import hub

    return hub.find_cached(ref) if offline else hub.HubRepository(ref)


def open_readable(
    ref: SourceRef,
    *,
    offline: bool = False,
    download: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Repository:
    """The files that a reference names; pickles converted if allowed, weights downloaded if asked.

    Raises:
        MoemergeError: As `convert_pickles` and `hub.pull`.
    """
    repository = open_source(ref, offline=offline)
    if allow_pickle and has_only_pickles(repository):
        return _convert(repository, default_cache(), progress, download=download)
    if isinstance(repository, LocalFolder) or not download:
        return repository
    # A checkpoint that cannot be read is not worth a download.
    open_checkpoint(repository)
    _check_room([repository], allow_pickle=allow_pickle)
    return _pull(repository, progress)


def look_at_repositories(refs: Sequence[HubRef], *, allow_pickle: bool = False) -> "list[HubRepository]":
    """Hub repositories, each checked by its configuration and headers; nothing is downloaded.

    Raises:
        MoemergeError: With the findings of every repository that cannot be read.
    """
    from moemerge.checkpoint.hub import HubRepository

    named: dict[str, SourceRef] = {str(ref): ref for ref in refs}
    repositories, _ = _look_at_all(named, offline=False, allow_pickle=allow_pickle)
    return [repository for repository in repositories.values() if isinstance(repository, HubRepository)]


def _look_at_all(
    sources: dict[str, SourceRef], *, offline: bool, allow_pickle: bool
) -> tuple[dict[str, Repository], dict[str, Checkpoint]]:
    """Every source, and its checkpoint unless pickles must be fetched and converted for that."""
    repositories: dict[str, Repository] = {}
    checkpoints: dict[str, Checkpoint] = {}
    failures: list[tuple[str, MoemergeError]] = []
    for name, ref in sources.items():
        try:
            repositories[name] = open_source(ref, offline=offline)
            if allow_pickle and has_only_pickles(repositories[name]):
                read_config(repositories[name])
            else:
                checkpoints[name] = open_checkpoint(repositories[name])
        except MoemergeError as error:
            failures.append((name, error))
    if failures:
        raise _combine(failures)
    return repositories, checkpoints


def _check_room(repositories: Sequence[Repository], *, allow_pickle: bool) -> None:
    remote = [repository for repository in repositories if not isinstance(repository, LocalFolder)]
    if remote:
        from moemerge.checkpoint import hub

        hub.check_room([r for r in remote if isinstance(r, hub.HubRepository)], allow_pickle=allow_pickle)


def _convert(
    repository: Repository, cache: Path, progress: Progress | None, *, download: bool
) -> LocalFolder:
    if isinstance(repository, LocalFolder):
        return convert_pickles(repository, cache, progress)
    if not download:
        raise UnsupportedCheckpoint(
            f"{repository.label}: weights are pickles, whose tensors are known only after a download. "
            f"Run `moemerge pull` with --allow-pickle first"
        )
    return convert_pickles(_pull(repository, progress, allow_pickle=True), cache, progress)


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


def _pull(repository: Repository, progress: Progress | None, *, allow_pickle: bool = False) -> LocalFolder:
    from moemerge.checkpoint import hub

    assert isinstance(repository, hub.HubRepository)
    return hub.pull(repository, progress, allow_pickle=allow_pickle)
