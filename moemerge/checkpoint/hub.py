"""Checkpoints on the Hugging Face hub: look before downloading, then download only what is needed.

Only this module and `hub_upload` talk to a network. A commit is resolved once and everything after is
pinned to it. Files that were fetched completely are never fetched again; an interrupted file starts anew.
"""

import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    HfApi,
    constants,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub import errors as hub_errors
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but exported lazily
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
)
from tqdm.auto import tqdm

from moemerge.checkpoint.disk import check_disk
from moemerge.checkpoint.headers import StoredTensor, parse_header, parse_header_length
from moemerge.checkpoint.hub_errors import translated
from moemerge.checkpoint.repository import LocalFolder
from moemerge.checkpoint.side_files import find_side_files
from moemerge.checkpoint.weights import (
    ADAPTER,
    INDEX,
    PICKLE_INDEX,
    SINGLE,
    find_pickle_files,
    find_weight_files,
    has_only_pickles,
    is_adapter,
    require_files,
)
from moemerge.errors import InvalidRecipe, NetworkFailure
from moemerge.progress import Progress, Silent
from moemerge.refs import HubRef

logger = logging.getLogger(__name__)
_PARALLEL_FILES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class FileToPull:
    """One file of a download: name, size in bytes, whether the cache has it."""

    name: str
    size: int
    cached: bool


class HubRepository:
    """A hub repository at one commit, read by small requests."""

    def __init__(self, ref: HubRef) -> None:
        self.ref = ref
        api = HfApi(endpoint=endpoint())
        with translated(str(ref)):
            timeout = constants.HF_HUB_ETAG_TIMEOUT
            info = api.model_info(ref.repository, revision=ref.revision, timeout=timeout)
            if info.sha is None:
                raise NetworkFailure(f"{ref}: the hub named no commit")
            self.commit = info.sha
            tree = api.list_repo_tree(ref.repository, revision=self.commit)
            self._items = {item.path: item for item in tree if isinstance(item, RepoFile)}

    @property
    def label(self) -> str:
        """Repository and short commit."""
        return f"{self.ref.repository}@{self.commit[:8]}"

    @property
    def origin(self) -> str:
        """Repository and full commit."""
        return f"{self.ref.repository}@{self.commit}"

    def files(self) -> dict[str, int]:
        """Sizes of the files at the top level."""
        return {name: item.size for name, item in self._items.items()}

    def read_bytes(self, name: str) -> bytes:
        """A small file, through the cache."""
        return self.fetch(name).read_bytes()

    def fetch(self, name: str, tqdm_class: "type[tqdm[Any]] | None" = None) -> Path:
        """Any file, as a path in the cache; downloaded if it is not there."""
        with translated(f"{self.label}/{name}"):
            return Path(
                hf_hub_download(
                    self.ref.repository,
                    name,
                    revision=self.commit,
                    endpoint=endpoint(),
                    tqdm_class=tqdm_class or _Quiet,
                )
            )

    def header(self, name: str) -> dict[str, StoredTensor]:
        """Tensors of a remote safetensors file, by range requests that end with the header."""
        path = Path(f"{self.label}/{name}")
        size = self._items[name].size
        length = parse_header_length(self._read_range(name, 0, min(8, size)), file_size=size, path=path)
        raw = self._read_range(name, 8, length)
        return parse_header(raw, data_start=8 + length, file_size=size, path=path, is_local=False)

    def is_cached(self, name: str) -> bool:
        """Whether the cache has this very file, be it for another commit."""
        repository = self.ref.repository
        if isinstance(try_to_load_from_cache(repository, name, revision=self.commit), str):
            return True
        item = self._items[name]
        blob = item.lfs.sha256 if item.lfs else item.blob_id
        return (_cache_folder(repository) / "blobs" / blob).exists()

    def _read_range(self, name: str, start: int, count: int) -> bytes:
        url = hf_hub_url(self.ref.repository, name, revision=self.commit, endpoint=endpoint())
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{start + count - 1}"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        received = bytearray()
        # Streamed, so that a server that ignores the range does not send the whole file.
        with (
            translated(f"{self.label}/{name}"),
            http_stream_backoff("GET", url, headers=headers, timeout=timeout) as response,
        ):
            hf_raise_for_status(response)
            skip = start if response.status_code == 200 else 0
            for chunk in response.iter_bytes():
                received += chunk
                if len(received) >= skip + count:
                    break
        if len(received) < skip + count:
            raise NetworkFailure(f"{self.label}/{name}: the hub sent {len(received)} of {count} bytes")
        return bytes(received[skip : skip + count])


def files_to_pull(repository: HubRepository, *, allow_pickle: bool = False) -> list[FileToPull]:
    """Weights, configuration, tokenizer, templates and licence, and which of them are cached.

    Raises:
        UnsupportedCheckpoint, DamagedInput: As `find_weight_files` and `find_pickle_files`.
        MissingTensors: An index names files that the repository does not have.
    """
    present = repository.files()
    from_pickles = allow_pickle and has_only_pickles(repository)
    wanted = find_pickle_files(repository) if from_pickles else find_weight_files(repository)
    index = PICKLE_INDEX if from_pickles else INDEX
    require_files(repository, wanted, index)
    wanted += [index] if index in present else []
    wanted += find_side_files(repository)
    return [
        FileToPull(name=name, size=present[name], cached=repository.is_cached(name))
        for name in dict.fromkeys(wanted)
    ]


def pull(
    repository: HubRepository, progress: Progress | None = None, *, allow_pickle: bool = False
) -> LocalFolder:
    """Download what a merge needs of the repository into the hub cache.

    Raises:
        NotEnoughRoom: The disk of the cache cannot hold what is missing; nothing was fetched.
        NotAuthorised, NotFound, NetworkFailure: As the hub answers; finished files stay.
    """
    files = files_to_pull(repository, allow_pickle=allow_pickle)
    missing = sum(file.size for file in files if not file.cached)
    check_disk(cache_folder(), missing, f"pulling {repository.label}")
    logger.debug("%s: %d files, %d bytes of them to fetch", repository.label, len(files), missing)
    report = progress or Silent()
    report.start(f"pull {repository.label}", missing)
    folder = _fetch_all(repository, files, report)
    _remember_reference(repository)
    return LocalFolder(folder, repository.label, repository.origin)


def check_room(repositories: Sequence[HubRepository], *, allow_pickle: bool = False) -> None:
    """Make sure that the cache's disk can take what is missing of all repositories together.

    Raises:
        NotEnoughRoom: It cannot; nothing was fetched.
    """
    missing = sum(
        file.size
        for repository in repositories
        for file in files_to_pull(repository, allow_pickle=allow_pickle)
        if not file.cached
    )
    # A pickle stays in the cache beside its conversion.
    factor = 2 if allow_pickle else 1
    check_disk(cache_folder(), factor * missing, f"pulling {', '.join(r.label for r in repositories)}")


def cache_folder() -> Path:
    """Where the hub client keeps what it downloaded."""
    return Path(constants.HF_HUB_CACHE)


def find_cached(ref: HubRef) -> LocalFolder:
    """The repository as the cache has it, without any request.

    Raises:
        NetworkFailure: Not cached, or not completely.
    """
    hint = f"Run `moemerge pull {ref}` while online"
    try:
        path = snapshot_download(
            ref.repository, revision=ref.revision, local_files_only=True, allow_patterns=["config.json"]
        )
    except hub_errors.HFValidationError as error:
        raise InvalidRecipe(f"{ref}: not a possible repository name. {error}") from error
    except (hub_errors.LocalEntryNotFoundError, OSError) as error:
        raise NetworkFailure(
            f"{ref}: offline, and not in the cache {constants.HF_HUB_CACHE}. {hint}"
        ) from error
    folder = LocalFolder(
        Path(path), f"{ref.repository}@{Path(path).name[:8]}", f"{ref.repository}@{Path(path).name}"
    )
    if missing := _missing_weights(folder):
        raise NetworkFailure(
            f"{ref}: offline, and not completely in the cache {constants.HF_HUB_CACHE}: "
            f"{missing[0]} is missing{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}. {hint}"
        )
    return folder


def _missing_weights(folder: LocalFolder) -> list[str]:
    present = folder.files()
    if has_only_pickles(folder):
        return [name for name in find_pickle_files(folder) if name not in present]
    if is_adapter(folder):
        return [] if ADAPTER in present else [ADAPTER]
    if INDEX not in present and SINGLE not in present:
        return [SINGLE]
    return [name for name in find_weight_files(folder) if name not in present]


def _fetch_all(repository: HubRepository, files: list[FileToPull], report: Progress) -> Path:
    """Download several files at a time; after a failure those that have begun are finished.

    Returns:
        The folder of the commit in the cache.
    """
    meter = _Meter(report)
    with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
        futures = [pool.submit(_fetch_one, repository, file, meter) for file in files]
        try:
            paths = [future.result() for future in as_completed(futures)]
        except BaseException as error:
            # Finishing a large file may take long: worth it for the next run, not for Ctrl-C.
            meter.stopped = not isinstance(error, Exception)
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return paths[0].parent


def _fetch_one(repository: HubRepository, file: FileToPull, meter: "_Meter") -> Path:
    bars = meter.bars_of(file)
    path = repository.fetch(file.name, bars)
    # Another process may have fetched it meanwhile.
    meter.reached(file, file.size)
    return path


def _remember_reference(repository: HubRepository) -> None:
    """Let `find_cached` resolve the branch name later, as a download by branch would have done."""
    revision = repository.ref.revision or constants.DEFAULT_REVISION
    if revision == repository.commit or ".." in revision.split("/"):
        return
    target = _cache_folder(repository.ref.repository) / "refs" / revision
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    beside.write_text(repository.commit, encoding="utf-8")
    beside.replace(target)


def _cache_folder(repository: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / "--".join(["models", *repository.split("/")])


def endpoint() -> str | None:
    """Address of the hub; None for the client's default."""
    return os.environ.get("HF_ENDPOINT") or None


class _Quiet(tqdm):  # type: ignore[type-arg]
    """A progress bar that shows nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})


class _Stopped(Exception):
    """Ends a download that nobody waits for any more."""


class _Meter:
    """Adds up the bytes of files that are fetched at the same time."""

    def __init__(self, report: Progress) -> None:
        self.stopped = False
        self._report = report
        self._told: dict[str, int] = {}
        self._lock = threading.Lock()

    def bars_of(self, file: FileToPull) -> type[_Quiet]:
        """The class of bars that the hub client is to count this file's bytes with."""
        meter = self

        class Bar(_Quiet):
            done = 0.0

            def update(self, n: float | None = 1) -> None:
                self.done += n or 0
                meter.reached(file, int(self.done))

        return Bar

    def reached(self, file: FileToPull, done: int) -> None:
        """So many bytes of the file are there; of several bars over one file the fullest counts."""
        if self.stopped:
            raise _Stopped
        with self._lock:
            told = self._told.get(file.name, 0)
            more = min(done, file.size) - told
            if file.cached or more <= 0:
                return
            self._told[file.name] = told + more
            self._report.advance(more)
