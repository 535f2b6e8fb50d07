"""Work on a checkpoint that is worth keeping: done once, in a cache of the user, complete or not there."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from moemerge.checkpoint.disk import check_disk


def default_cache() -> Path:
    """Where conversions are kept: `$XDG_CACHE_HOME/moemerge`, by default in `~/.cache`."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "moemerge"


def convert_once(
    cache: Path, key: str, convert: Callable[[Path], None], *, needed: int, purpose: str
) -> Path:
    """The folder `key` of a cache, made by `convert` unless it is there already.

    Args:
        cache: Folder of conversions, which is made.
        key: Names one; whatever its content depends on.
        convert: Writes into the empty folder that it is given.
        needed: Bytes that it writes.
        purpose: What for, in messages.

    Raises:
        NotEnoughRoom: The disk of `cache` is too small; nothing was written.
    """
    target, staging = cache / key, cache / f"{key}.tmp"
    # The lock is beside the cache's entries because a conversion is renamed as a whole.
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{key}.lock"):
        if target.exists():
            return target
        check_disk(cache, needed, purpose)
        if staging.exists():
            shutil.rmtree(staging)  # of a run that was killed; the lock is ours
        staging.mkdir()
        try:
            convert(staging)
            staging.rename(target)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    return target
