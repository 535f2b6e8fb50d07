"""Files to the hub: look first, upload group by group, and make one commit of everything at the end.

The hub keeps what was uploaded completely, so that an interrupted upload continues there when it is
run again, and nobody sees half of it before the commit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub import errors as hub_errors
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but exported lazily
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from moemerge.checkpoint.hub import endpoint
from moemerge.checkpoint.hub_errors import translated
from moemerge.errors import Finding, InvalidRecipe, NetworkFailure, NotAuthorised
from moemerge.progress import Progress
from moemerge.refs import HubRef

_GROUP_BYTES = 256 * 2**20
_KEPT_BY_THE_HUB = ".gitattributes"


@dataclass(frozen=True, slots=True, kw_only=True)
class PushTarget:
    """A repository before anything is uploaded.

    Attributes:
        ref: Its name, and the branch if one was given.
        exists: Whether it is there.
        commit: What the branch points to, or the main branch where there is no such branch yet.
        stale: Files there that are not among those to upload.
    """

    ref: HubRef
    exists: bool
    commit: str | None = None
    stale: tuple[str, ...] = ()

    @property
    def branch(self) -> str:
        """Where the commit goes."""
        return self.ref.revision or constants.DEFAULT_REVISION


def look_at_target(ref: HubRef, files: dict[str, Path]) -> PushTarget:
    """The repository as it is; nothing is created or sent.

    Raises:
        NetworkFailure: No answer, or offline.
        NotAuthorised, NotFound: As the hub answers.
    """
    if constants.HF_HUB_OFFLINE:
        raise NetworkFailure(f"{ref}: offline (HF_HUB_OFFLINE), and an upload needs the hub")
    api = HfApi(endpoint=endpoint())
    with translated(str(ref)):
        try:
            info = api.model_info(ref.repository, revision=ref.revision)
        except hub_errors.RevisionNotFoundError:
            info = api.model_info(ref.repository)
        except hub_errors.RepositoryNotFoundError:
            return PushTarget(ref=ref, exists=False)
        tree = api.list_repo_tree(ref.repository, revision=info.sha, recursive=True)
        there = [item.path for item in tree if isinstance(item, RepoFile)]
    stale = tuple(name for name in there if name not in files and name != _KEPT_BY_THE_HUB)
    return PushTarget(ref=ref, exists=True, commit=info.sha, stale=stale)


def upload(
    target: PushTarget,
    files: dict[str, Path],
    progress: Progress,
    *,
    message: str,
    private: bool = False,
    replace: bool = False,
) -> str:
    """Upload files and commit them together.

    Args:
        target: From `look_at_target`.
        files: By their path in the repository.
        progress: Told of the bytes that the hub has.
        message: Of the commit.
        private: Whether a repository that is created is private.
        replace: Remove what else is in the repository, in the same commit.

    Returns:
        The commit.

    Raises:
        InvalidRecipe: The repository has other files, or the hub refuses a file.
        NotAuthorised: No token, or one that may not write there.
        NetworkFailure: The connection failed; what was uploaded is kept.
    """
    _refuse_stale(target, replace=replace)
    if get_token() is None:
        raise NotAuthorised(
            f"{target.ref}: no token to write with. Log in with `hf auth login`, or set HF_TOKEN"
        )
    api, repository = HfApi(endpoint=endpoint()), target.ref.repository
    with _uploading(str(target.ref)):
        if not target.exists:
            api.create_repo(repository, private=private, exist_ok=True)
        if target.branch != constants.DEFAULT_REVISION:
            api.create_branch(repository, branch=target.branch, exist_ok=True)
        additions = [CommitOperationAdd(name, path) for name, path in sorted(files.items())]
        progress.start(f"push {repository}", sum(path.stat().st_size for path in files.values()))
        for group in _groups(additions):
            api.preupload_lfs_files(repository, group, revision=target.branch, free_memory=False)
            progress.advance(sum(addition.upload_info.size for addition in group))
        removals = [CommitOperationDelete(name) for name in target.stale]
        done = api.create_commit(
            repository,
            [*additions, *removals],
            commit_message=message,
            revision=target.branch,
            parent_commit=target.commit,
        )
    return str(done.oid)


def _refuse_stale(target: PushTarget, *, replace: bool) -> None:
    if not target.stale or replace:
        return
    count = len(target.stale)
    more = f" and {count - 1} more" if count > 1 else ""
    message = (
        f"{target.ref}: has {target.stale[0]}{more}, which would be left beside the new files. "
        f"Choose another repository or branch, or pass --replace to remove them in the same commit"
    )
    findings = [
        Finding(level="error", code="FILE_STALE", where=str(target.ref), found=name, fix="Pass --replace")
        for name in target.stale
    ]
    raise InvalidRecipe(message, findings)


def _groups(additions: list[CommitOperationAdd]) -> Iterator[list[CommitOperationAdd]]:
    """In order, so many bytes at a time or one larger file."""
    group: list[CommitOperationAdd] = []
    for addition in additions:
        if group and sum(a.upload_info.size for a in [*group, addition]) > _GROUP_BYTES:
            yield group
            group = []
        group.append(addition)
    if group:
        yield group


@contextmanager
def _uploading(where: str) -> Iterator[None]:
    """The client without its own progress bars, and its errors in this package's."""
    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with translated(where), _unwrapped(where):
            yield
    finally:
        if not were_disabled:
            enable_progress_bars()


@contextmanager
def _unwrapped(where: str) -> Iterator[None]:
    try:
        yield
    except hub_errors.HFValidationError:
        raise
    except RuntimeError as error:  # how the client tells of one file that failed
        if isinstance(error.__cause__, Exception):
            raise error.__cause__ from error
        raise
    except ValueError as error:
        raise InvalidRecipe(f"{where}: the hub refused what was sent. {error}") from error
