"""The place where something new will appear: checked early, and honest when it cannot be written."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from moemerge.errors import Busy, InvalidRecipe, NotEnoughRoom

_MARK = ".moemerge-work"

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
        if target.exists() and not target.is_file():
            raise PermissionError(errno.EACCES, "it is not an ordinary file")
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
        advice = "Free some space or choose" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Choose"
        raise NotEnoughRoom(
            f"{target}: cannot be written ({error.strerror}). {advice} another output"
        ) from error


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its place at the end, and disappears if that is not reached.

    Raises:
        Busy: Another process builds the same target.
        InvalidRecipe, NotEnoughRoom: As `check_target` and `writing`.
    """
    with writing(target), locked(target):
        check_target(target)
        # Not the staging folder of a merge, whose work must survive.
        staging = target.with_name(f".{target.name}.building")
        make_work_folder(staging)
        try:
            yield staging
            (staging / _MARK).unlink()
            staging.replace(target)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold `target` for this process.

    Raises:
        Busy: Another process holds it.
    """
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise Busy(
            f"{target}: another moemerge is writing it; wait for it or choose another output"
        ) from error
    try:
        yield
    finally:
        # While it is held: a file that another process has locked meanwhile must not disappear.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def staging_folder(target: Path) -> Path:
    """Where the work of a merge is kept until it is complete."""
    return target.with_name(f".{target.name}.staging")


def make_work_folder(folder: Path) -> None:
    """An empty folder with our mark, in place of one that carries it.

    Raises:
        InvalidRecipe: There is a folder that moemerge did not make.
    """
    if folder.exists():
        if any(folder.iterdir()) and not (folder / _MARK).is_file():
            raise InvalidRecipe(f"{folder} is in the way and was not made by moemerge; move it elsewhere")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    mark_work_folder(folder)


def mark_work_folder(folder: Path) -> None:
    """Say that a folder is ours and may be removed."""
    (folder / _MARK).touch()
