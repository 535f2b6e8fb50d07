"""The place where something new will appear: checked early, and honest when it cannot be written."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moemerge.errors import InvalidRecipe, NotEnoughRoom

_REFUSALS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM,
    errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG,
}  # fmt: skip


def check_target(target: Path) -> None:
    """Make sure, before any time is spent, that `target` is free and can be created.

    Raises:
        InvalidRecipe: It exists already.
        NotEnoughRoom: It cannot be created there.
    """
    with writing(target):
        if target.is_symlink() or target.exists():
            raise InvalidRecipe(f"{target} exists already; remove it or choose another output")
    check_writable(target)


def check_writable(target: Path) -> None:
    """Make sure that the file `target`, which may exist, can be written.

    Raises:
        NotEnoughRoom: It is a folder, or the folder that would hold it cannot be written.
    """
    with writing(target):
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        folder = next(parent for parent in target.absolute().parents if parent.exists())
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{folder} is not a folder")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, f"no permission to write in {folder}")


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn what the system says when it refuses to write into an error that names `target`.

    Raises:
        NotEnoughRoom: The disk is full or read-only, or the place cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        raise NotEnoughRoom(
            f"{target}: cannot be written ({error.strerror}). Free some space or choose another output"
        ) from error


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its place at the end, and disappears if that is not reached.

    Raises:
        InvalidRecipe, NotEnoughRoom: As `check_target` and `writing`.
    """
    check_target(target)
    staging = target.with_name(f".{target.name}.staging")
    with writing(target):
        if staging.exists():
            shutil.rmtree(staging)
        staging.mkdir(parents=True)
        try:
            yield staging
            staging.replace(target)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
