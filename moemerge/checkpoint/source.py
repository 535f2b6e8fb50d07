"""Where a checkpoint comes from, on its way from a reference to tensors that can be read.

Looked at first, from headers; then converted, downloaded and given its adapter, as far as it needs that.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moemerge.checkpoint.adapted import Adapted, adapt
from moemerge.checkpoint.adapter import read_adapter, read_adapter_config
from moemerge.checkpoint.checkpoint import Checkpoint, open_checkpoint, read_config
from moemerge.checkpoint.pickles import convert_pickles
from moemerge.checkpoint.repository import LocalFolder, Repository
from moemerge.checkpoint.tensors import TensorReader
from moemerge.checkpoint.ties import resolve_ties
from moemerge.checkpoint.weights import PICKLE_INDEX, has_only_pickles, is_adapter
from moemerge.errors import InvalidRecipe, UnsupportedCheckpoint
from moemerge.progress import Progress
from moemerge.refs import AdaptedRef, FolderRef, HubRef, RepositoryRef, SourceRef, parse_source

if TYPE_CHECKING:
    from moemerge.checkpoint.hub import HubRepository


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The files of a checkpoint, and those of an adapter that is to be applied to it.

    Attributes:
        repository: Of the checkpoint itself; where there is an adapter, of its base.
        adapter: Of the adapter.
        allow_pickle: Whether pickles may be converted, without running what is in them.
    """

    repository: Repository
    adapter: Repository | None = None
    allow_pickle: bool = False

    @property
    def is_local(self) -> bool:
        """Whether nothing has to be downloaded."""
        return not self.remote()

    @property
    def needs_conversion(self) -> bool:
        """Whether tensors are known only after a conversion, which is allowed."""
        return self.allow_pickle and any(map(has_only_pickles, self._halves))

    def remote(self) -> "list[HubRepository]":
        """What is not downloaded."""
        if all(isinstance(half, LocalFolder) for half in self._halves):
            return []
        from moemerge.checkpoint.hub import HubRepository

        return [half for half in self._halves if isinstance(half, HubRepository)]

    def look(self) -> Checkpoint | None:
        """The checkpoint from headers; None where only its configuration, if that, can be checked so far."""
        if not self.needs_conversion:
            return self.open()
        # A lone pickle tells its tensors, which may be what tells the family, only when it is opened.
        if PICKLE_INDEX in self.repository.files():
            read_config(self.repository)
        return None

    def open(self) -> Checkpoint:
        """The checkpoint from headers; tensors that an adapter changes are not local."""
        base = open_checkpoint(self.repository)
        return self._adapt(base).checkpoint if self.adapter else base

    def convert(self, cache: Path, progress: Progress | None, *, download: bool) -> "Source":
        """The same with pickles converted.

        Raises:
            UnsupportedCheckpoint: They would have to be downloaded.
        """
        halves = list(self._halves)
        for number, half in enumerate(halves):
            if not has_only_pickles(half):
                continue
            if not isinstance(half, LocalFolder) and not download:
                raise UnsupportedCheckpoint(
                    f"{half.label}: weights are pickles, whose tensors are known only after a download. "
                    f"Run `moemerge pull` with --allow-pickle first"
                )
            halves[number] = convert_pickles(self._pull(half, progress), cache / "pickles", progress)
        return replace(self, repository=halves[0], adapter=halves[1] if self.adapter else None)

    def pull(self, progress: Progress | None) -> "Source":
        """The same with everything downloaded."""
        adapter = self._pull(self.adapter, progress) if self.adapter else None
        return replace(self, repository=self._pull(self.repository, progress), adapter=adapter)

    def apply(self, cache: Path, progress: Progress | None) -> Checkpoint:
        """The checkpoint with the adapter applied, if there is one; everything must be local."""
        base = open_checkpoint(self.repository)
        if self.adapter is None:
            return base
        with TensorReader() as reader:
            base = resolve_ties(base, reader)
        return self._adapt(base).apply(cache / "adapters", progress)

    @property
    def _halves(self) -> list[Repository]:
        return [self.repository, *([self.adapter] if self.adapter else [])]

    def _adapt(self, base: Checkpoint) -> Adapted:
        assert self.adapter is not None
        return adapt(base, read_adapter(self.adapter))

    def _pull(self, repository: Repository, progress: Progress | None) -> LocalFolder:
        if isinstance(repository, LocalFolder):
            return repository
        from moemerge.checkpoint import hub

        assert isinstance(repository, hub.HubRepository)
        return hub.pull(repository, progress, allow_pickle=self.allow_pickle)


def find_source(
    ref: SourceRef, *, offline: bool = False, allow_pickle: bool = False, find_base: bool = True
) -> Source:
    """The files that a reference names; nothing is downloaded.

    Args:
        ref: The reference.
        offline: Use the hub's cache alone.
        allow_pickle: See `Source`.
        find_base: Whether an adapter alone stands for its base with it, and not for itself.

    Raises:
        UnsupportedCheckpoint: An adapter whose base must be given.
        MoemergeError: As `open_repository`.
    """
    if isinstance(ref, AdaptedRef):
        base, adapter = (open_repository(half, offline=offline) for half in (ref.base, ref.adapter))
        return Source(repository=base, adapter=adapter, allow_pickle=allow_pickle)
    found = open_repository(ref, offline=offline)
    if not (find_base and is_adapter(found)):
        return Source(repository=found, allow_pickle=allow_pickle)
    base = open_repository(_base_of(found), offline=offline)
    return Source(repository=base, adapter=found, allow_pickle=allow_pickle)


def open_repository(ref: RepositoryRef, *, offline: bool = False) -> Repository:
    """The files that one half of a reference names."""
    if isinstance(ref, FolderRef):
        return LocalFolder(ref.path)
    # The hub client takes a noticeable time to import; folders do not need it.
    from moemerge.checkpoint import hub

    return hub.find_cached(ref) if offline else hub.HubRepository(ref)


def _base_of(adapter: Repository) -> RepositoryRef:
    """The base that an adapter names: a repository, or a folder if the adapter is in one itself.

    Raises:
        UnsupportedCheckpoint: It names none, or one that is not here.
    """
    config, _ = read_adapter_config(adapter)
    named = config.base_model_name_or_path
    fix = f"Give the base: BASE+{adapter.label}"
    if not named:
        raise UnsupportedCheckpoint(f"{adapter.label}: an adapter that names no base. {fix}")
    try:
        ref = parse_source(named)
        if isinstance(ref, HubRef) and ref.revision is None and config.revision:
            ref = parse_source(f"{ref}@{config.revision}")
    except InvalidRecipe as error:
        raise UnsupportedCheckpoint(f"{adapter.label}: an adapter of {named!r}: {error}. {fix}") from error
    if isinstance(ref, HubRef):
        return ref
    if isinstance(ref, FolderRef) and isinstance(adapter, LocalFolder) and ref.path.is_dir():
        return ref
    raise UnsupportedCheckpoint(
        f"{adapter.label}: an adapter of {named}, a folder of the machine that it was trained on. {fix}"
    )
