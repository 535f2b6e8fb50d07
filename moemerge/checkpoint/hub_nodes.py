"""Files of the hub cache by their paths: what a node of a cluster lacks, it fetches when it needs it.

Works where all nodes keep their caches under one path (`HF_HOME`).
"""

from pathlib import Path

from huggingface_hub import hf_hub_download

from moemerge.checkpoint.hub import cache_folder, endpoint
from moemerge.checkpoint.hub_errors import translated
from moemerge.errors import NotFound

_SNAPSHOTS = "snapshots"


def is_hub_path(path: Path) -> bool:
    """Whether a path is that of a file of the hub in the cache, be it there or not."""
    try:
        folder, snapshots, *rest = path.relative_to(cache_folder()).parts
    except ValueError:
        return False
    return folder.startswith("models--") and snapshots == _SNAPSHOTS and len(rest) > 1


def fetch_path(path: Path) -> None:
    """Download the file that belongs at a path of the cache.

    Raises:
        NotFound: Not a path of the cache.
        NotAuthorised, NetworkFailure: As the hub answers.
    """
    if not is_hub_path(path):
        raise NotFound(f"{path}: not there any more")
    folder, _, commit, *name = path.relative_to(cache_folder()).parts
    repository = "/".join(folder.removeprefix("models--").split("--"))
    with translated(f"{repository}@{commit[:8]}/{'/'.join(name)}"):
        hf_hub_download(repository, "/".join(name), revision=commit, endpoint=endpoint())
