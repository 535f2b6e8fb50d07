"""One folder in another's place, so that at no moment there is neither or half of one."""

import ctypes
import errno
import os
import shutil
from pathlib import Path

from moemerge.bundle.target import mark_work_folder

_HERE = -100
_EXCHANGE = 2


def replace_folder(new: Path, target: Path) -> None:
    """Give `new` the name of `target`, a folder that exists beside it and disappears.

    Who has the old files open or mapped keeps them. Where the system cannot exchange two names (Linux can,
    on most file systems), the old folder is called `.NAME.old` for a moment; `recover_folder` puts it back
    if the process ends within that moment.
    """
    if _exchange(new, target):
        mark_work_folder(new)
        shutil.rmtree(new)
        return
    old = _aside(target)
    shutil.rmtree(old, ignore_errors=True)
    target.replace(old)
    new.replace(target)
    shutil.rmtree(old)


def recover_folder(target: Path) -> None:
    """Put back what an interrupted `replace_folder` has left aside."""
    if not target.exists() and _aside(target).is_dir():
        _aside(target).replace(target)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _exchange(first: Path, second: Path) -> bool:
    """Whether both have changed their names at once."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    paths = [os.fsencode(path.absolute()) for path in (first, second)]
    if rename(_HERE, paths[0], _HERE, paths[1], _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))
