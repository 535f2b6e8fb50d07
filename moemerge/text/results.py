"""The file that results of requests go to: never another file than its own, and continued where it ended."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moemerge.errors import InvalidRecipe, NotEnoughRoom


def check_target(target: Path, source: Path) -> None:
    """Whether results can go there, before anything is loaded.

    Raises:
        InvalidRecipe: It is the file of requests, a folder or a device.
        NotEnoughRoom: Nothing can be written there.
    """
    try:
        if target.exists() and not target.is_file():
            raise InvalidRecipe(f"{target}: is not a regular file; results cannot be continued there")
        if target.exists() and target.samefile(source):
            raise InvalidRecipe(f"{target}: requests and results cannot be the same file")
        _try_to_write(target)
    except OSError as error:
        raise NotEnoughRoom(
            f"{target}: cannot be written ({error.strerror}). Choose another output"
        ) from error


def keep_whole_results(target: Path, digests: Iterator[tuple[int, str]], source: Path) -> int:
    """Count the results that are there, and cut one that was not written to its end.

    Args:
        target: The file of results.
        digests: Number and digest of every line that is asked.
        source: The file of requests, for messages.

    Raises:
        InvalidRecipe: One is not that of its line.
    """
    if not target.exists():
        return 0
    count = 0
    with target.open("r+b") as file:
        end = 0
        for raw in file:
            number, digest = next(digests, (None, None))
            if _is_torn(raw, number):
                break
            result = _read_result(raw)
            if number is None or (number, digest) != (result.get("line"), result.get("digest")):
                raise InvalidRecipe(
                    f"{target}, line {count + 1}: is not a result of {source} with this bundle and "
                    f"these settings. Choose another output, or delete this one"
                )
            count, end = count + 1, end + len(raw)
        file.truncate(end)
    return count


def _try_to_write(target: Path) -> None:
    """Permissions do not tell all: some places refuse even those who may do everything."""
    if target.exists():
        target.open("ab").close()
        return
    folder = next(parent for parent in target.absolute().parents if parent.exists())
    tempfile.TemporaryFile(dir=folder).close()


def _is_torn(raw: bytes, number: int | None) -> bool:
    """Whether this is how our result of that line begins, and no more; anything else is not ours to cut."""
    if number is None or raw.endswith(b"\n"):
        return False
    begin = f'{{"line": {number},'.encode()
    return raw.startswith(begin) or begin.startswith(raw)


def _read_result(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
