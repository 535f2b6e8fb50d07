"""Whether a disk has room, asked before anything is written."""

import os
import shutil
from pathlib import Path

from moemerge.checkpoint.sizes import format_size
from moemerge.errors import NotEnoughRoom


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk that holds `folder`, which need not exist yet."""
    return shutil.disk_usage(_existing(folder)).free


def check_disk(folder: Path, needed: int, purpose: str) -> None:
    """Make sure that `folder`, which need not exist yet, can take `needed` bytes.

    Raises:
        NotEnoughRoom: Too little free space, or the place cannot be written.
    """
    existing = _existing(folder)
    free = free_bytes(folder)
    if needed > free:
        raise NotEnoughRoom(
            f"{purpose} needs {format_size(needed)} in {existing}, {format_size(free)} are free. "
            f"Free some space or choose another disk"
        )
    if not os.access(existing, os.W_OK):
        raise NotEnoughRoom(f"{existing}: cannot be written. Choose another place")


def _existing(folder: Path) -> Path:
    absolute = folder.absolute()
    return next(parent for parent in [absolute, *absolute.parents] if parent.exists())
