"""Checkpoints on the Hugging Face hub: look before downloading, then download only what is needed.

The only module that talks to a network. A commit is resolved once and everything after is pinned to
it. Files that were fetched completely are never fetched again; an interrupted file starts anew.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub import errors as hub_errors
from huggingface_hub.hf_api import RepoFile
from tqdm.auto import tqdm

from moemerge.checkpoint.headers import StoredTensor, parse_header
from moemerge.checkpoint.repository import LocalFolder
from moemerge.checkpoint.weights import INDEX, find_weight_files
from moemerge.errors import (
    DamagedInput,
    MoemergeError,
    NetworkFailure,
    NotAuthorised,
    NotEnoughRoom,
    NotFound,
)
from moemerge.progress import Progress, Silent
from moemerge.refs import HubRef

SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "README.md",
)
_LICENCE_STEMS = ("license", "licence", "copying", "notice", "use_policy")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileToPull:
    """One file of a download: name, size in bytes, whether the cache has it."""

    name: str
    size: int
    cached: bool


class HubRepository:
    """A hub repository at one commit, read by small requests."""

    def __init__(self, ref: HubRef) -> None:
        self._api = HfApi(endpoint=_endpoint())
        self.ref = ref
        with _translated(str(ref)):
            info = self._api.model_info(ref.repository, revision=ref.revision)
            if info.sha is None:
                raise NetworkFailure(f"{ref}: the hub named no commit")
            self.commit = info.sha
            tree = self._api.list_repo_tree(ref.repository, revision=self.commit)
            self._files = {item.path: item.size for item in tree if isinstance(item, RepoFile)}

    @property
    def label(self) -> str:
        """Repository and short commit."""
        return f"{self.ref.repository}@{self.commit[:8]}"

    def files(self) -> dict[str, int]:
        """Sizes of the files at the top level."""
        return self._files

    def read_bytes(self, name: str) -> bytes:
        """A small file, through the cache."""
        with _translated(f"{self.label}/{name}"):
            path = hf_hub_download(
                self.ref.repository, name, revision=self.commit, endpoint=_endpoint(), tqdm_class=_Quiet
            )
        return Path(path).read_bytes()

    def header(self, name: str) -> dict[str, StoredTensor]:
        """Tensors of a remote safetensors file, by range request."""
        where = f"{self.label}/{name}"
        with _translated(where):
            try:
                metadata = self._api.parse_safetensors_file_metadata(
                    self.ref.repository, name, revision=self.commit
                )
            except (hub_errors.SafetensorsParsingError, hub_errors.NotASafetensorsRepoError) as error:
                raise DamagedInput(f"{where}: not a readable safetensors header ({error})") from error
        tensors = metadata.tensors.items()
        entries = {
            key: {"dtype": t.dtype, "shape": t.shape, "data_offsets": list(t.data_offsets)}
            for key, t in tensors
        }
        data_bytes = max((t.data_offsets[1] for _, t in tensors), default=0)
        # The length of the header is not told; the local check after the download has it.
        start = self._files[name] - data_bytes
        if start < 8:
            raise DamagedInput(f"{where}: {self._files[name]} bytes, its header describes {data_bytes}")
        raw = json.dumps(entries).encode()
        return parse_header(
            raw, data_start=start, file_size=self._files[name], path=Path(name), is_local=False
        )


def files_to_pull(repository: HubRepository) -> list[FileToPull]:
    """Weights, configuration, tokenizer, templates and licence, and which of them are cached."""
    present = repository.files()
    wanted = [*find_weight_files(repository), *(name for name in (INDEX, *SIDE_FILES) if name in present)]
    wanted += [name for name in present if name.lower().startswith(_LICENCE_STEMS)]
    wanted += [name for name in present if name.endswith(".jinja")]
    pulls = []
    for name in dict.fromkeys(wanted):
        with _translated(f"{repository.label}/{name}"):
            info: Any = hf_hub_download(
                repository.ref.repository,
                name,
                revision=repository.commit,
                endpoint=_endpoint(),
                dry_run=True,
            )
        pulls.append(FileToPull(name=name, size=present.get(name, 0), cached=info.is_cached))
    return pulls


def pull(repository: HubRepository, progress: Progress | None = None) -> LocalFolder:
    """Download what a merge needs of the repository into the hub cache.

    Raises:
        NotEnoughRoom: The disk of the cache cannot hold what is missing; nothing was fetched.
        NotAuthorised, NotFound, NetworkFailure: As the hub answers; finished files stay.
    """
    files = files_to_pull(repository)
    missing = sum(file.size for file in files if not file.cached)
    check_disk(Path(constants.HF_HUB_CACHE), missing, f"pulling {repository.label}")
    report = progress or Silent()
    report.start(f"pull {repository.label}", missing)
    with _translated(repository.label):
        folder = snapshot_download(
            repository.ref.repository,
            revision=repository.commit,
            endpoint=_endpoint(),
            allow_patterns=[file.name for file in files],
            tqdm_class=_reporting(report),
            max_workers=4,
        )
    _remember_reference(repository)
    return LocalFolder(Path(folder), repository.label)


def find_cached(ref: HubRef) -> LocalFolder:
    """The repository as the cache has it, without any request.

    Raises:
        NetworkFailure: Not cached, or not completely.
    """
    try:
        folder = snapshot_download(
            ref.repository,
            revision=ref.revision,
            local_files_only=True,
            allow_patterns=["config.json", INDEX, "model*.safetensors"],
        )
    except (hub_errors.LocalEntryNotFoundError, OSError, ValueError) as error:
        raise NetworkFailure(
            f"{ref}: offline, and not completely in the cache {constants.HF_HUB_CACHE}. "
            f"Run `moemerge pull {ref}` while online"
        ) from error
    commit = Path(folder).name
    return LocalFolder(Path(folder), f"{ref.repository}@{commit[:8]}")


def check_disk(folder: Path, needed: int, purpose: str) -> None:
    """Raise `NotEnoughRoom` unless the disk that holds `folder` has `needed` free bytes."""
    existing = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise NotEnoughRoom(
            f"{purpose} needs {needed / 1e9:.2f} GB in {folder}, {free / 1e9:.2f} GB are free. "
            f"Free some space or choose another disk"
        )


def _remember_reference(repository: HubRepository) -> None:
    """Let `find_cached` resolve the branch name later, as a download by branch would have done."""
    revision = repository.ref.revision or constants.DEFAULT_REVISION
    owner, name = repository.ref.repository.split("/")
    refs = Path(constants.HF_HUB_CACHE) / f"models--{owner}--{name}" / "refs"
    if revision != repository.commit and "/" not in revision:
        refs.mkdir(parents=True, exist_ok=True)
        (refs / revision).write_text(repository.commit, encoding="utf-8")


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


class _Quiet(tqdm):  # type: ignore[type-arg]
    """A progress bar that shows nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})


def _reporting(progress: Progress) -> type[_Quiet]:
    """A bar class that passes bytes on; of several bars over the same bytes the fullest counts."""
    counts: dict[int, float] = {}
    told = 0

    class Reporting(_Quiet):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._in_bytes = kwargs.get("unit") == "B"

        def update(self, n: float | None = 1) -> None:
            nonlocal told
            if not self._in_bytes:
                return
            counts[id(self)] = counts.get(id(self), 0) + (n or 0)
            fullest = int(max(counts.values()))
            if fullest > told:
                progress.advance(fullest - told)
                told = fullest

    return Reporting


@contextmanager
def _translated(where: str) -> Iterator[None]:
    """Turn what the hub client raises into this package's errors."""
    try:
        yield
    except MoemergeError:
        raise
    except hub_errors.GatedRepoError as error:
        raise NotAuthorised(
            f"{where}: gated. Request access on its page and log in with `hf auth login`"
        ) from error
    except hub_errors.RepositoryNotFoundError as error:
        raise NotFound(
            f"{where}: no such repository, or it is private and your token cannot see it. "
            f"Check the spelling, or log in with `hf auth login`"
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise NotFound(f"{where}: the repository has no such revision") from error
    except hub_errors.LocalEntryNotFoundError as error:
        raise NetworkFailure(
            f"{where}: the hub did not answer and the file is not cached ({error})"
        ) from error
    except hub_errors.EntryNotFoundError as error:
        raise NotFound(f"{where}: no such file in the repository") from error
    except hub_errors.OfflineModeIsEnabled as error:
        raise NetworkFailure(f"{where}: offline mode is on and the file is not cached") from error
    except hub_errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise NotAuthorised(
                f"{where}: the hub refused access ({status}). Log in with `hf auth login`"
            ) from error
        raise NetworkFailure(f"{where}: the hub answered {status or 'nothing'}; try again later") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise NotEnoughRoom(f"{where}: the disk is full; finished files are kept") from error
        raise NetworkFailure(f"{where}: {error}; finished files are kept, run again to continue") from error
    except httpx.HTTPError as error:
        raise NetworkFailure(
            f"{where}: the connection failed ({type(error).__name__}: {error}); "
            f"finished files are kept, run again to continue"
        ) from error
