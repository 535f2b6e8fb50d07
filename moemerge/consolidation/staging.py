"""Work in progress: a folder beside the target, a journal of what is finished, and a lock.

A step's outcome is final when its line is in the journal; a killed run continues after the last
whole line whose files are as it says. The target appears by one rename.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moemerge.bundle.replacing import replace_folder
from moemerge.bundle.target import check_target, locked, make_work_folder, staging_folder, writing
from moemerge.checkpoint.digest import hash_file
from moemerge.errors import DamagedInput, IncompatibleInputs, InvalidRecipe

logger = logging.getLogger(__name__)
WORK = "work/"
"""Files of this folder are needed on the way and are not part of the bundle."""
_JOURNAL = "journal.jsonl"


class Staging:
    """The staging folder of one target, held by one process."""

    def __init__(self, folder: Path, task: str) -> None:
        self.folder = folder
        self._journal = folder / _JOURNAL
        self._steps = self._read_journal(task)

    def finished(self, step: str) -> dict[str, Any] | None:
        """What `finish` was told of a step, if its files are still as they were then."""
        record = self._steps.get(step)
        if record is None:
            return None
        for name, digest in record["files"].items():
            path = self.folder / name
            if not path.is_file() or hash_file(path) != digest:
                return None
        result: dict[str, Any] = record["result"]
        return result

    def finish(self, step: str, files: dict[str, str], result: dict[str, Any] | None = None) -> None:
        """Make a step final.

        Args:
            step: Its name.
            files: SHA-256 by path relative to the staging folder.
            result: Whatever a continued run needs.
        """
        outcome = {"files": files, "result": result or {}}
        self._append({"step": step, **outcome})
        self._steps[step] = outcome
        logger.debug("%s: %s is done", self.folder, step)

    def finished_bytes(self) -> int:
        """Bytes of the files of finished steps."""
        paths = [self.folder / name for name in self.files()]
        return sum(path.stat().st_size for path in paths if path.is_file())

    def files(self) -> dict[str, str]:
        """SHA-256 of every file of finished steps."""
        return {name: digest for record in self._steps.values() for name, digest in record["files"].items()}

    def publish(self, target: Path, keep: set[str], *, replaces: bool = False) -> None:
        """Drop everything but `keep` (paths relative to the folder) and rename to the target.

        Args:
            target: Where it appears.
            keep: What is to be there.
            replaces: Whether a folder is there, which disappears.
        """
        for path in sorted(self.folder.rglob("*"), reverse=True):
            if path.is_dir():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.relative_to(self.folder).as_posix() not in keep:
                path.unlink()
        if replaces:
            replace_folder(self.folder, target)
        else:
            self.folder.replace(target)

    def _read_journal(self, task: str) -> dict[str, dict[str, Any]]:
        lines = self._whole_lines()
        try:
            records = [json.loads(line) for line in lines]
            if records and records[0] == {"task": task}:
                return {r["step"]: {"files": r["files"], "result": r["result"]} for r in records[1:]}
        except (ValueError, KeyError, TypeError):
            pass
        # Another task, or a journal that was cut within its first line: nothing to continue.
        if lines:
            logger.warning("%s: unfinished work of another command is discarded", self.folder)
        make_work_folder(self.folder)
        self._append({"task": task})
        return {}

    def _whole_lines(self) -> list[bytes]:
        """The journal's lines; one that a killed run left unfinished is cut off the file."""
        if not self._journal.exists():
            return []
        text = self._journal.read_bytes()
        end = text.rfind(b"\n") + 1
        if end < len(text):
            os.truncate(self._journal, end)
        return text[:end].splitlines()

    def _append(self, record: dict[str, Any]) -> None:
        line = json.dumps(record, sort_keys=True).encode() + b"\n"
        with self._journal.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def is_published(name: str) -> bool:
    """Whether a file of the staging folder becomes part of the bundle."""
    return not name.startswith(WORK)


@contextmanager
def open_staging(
    target: Path, task: str, *, restart: bool = False, replaces: bool = False
) -> Iterator[Staging]:
    """The staging folder beside `target`, locked.

    Args:
        target: What will appear.
        task: Identifies the work; a folder left by other work is discarded.
        restart: Discard what is there.
        replaces: Whether the target exists and will be replaced.

    Raises:
        Busy: Another process works on the same target.
        InvalidRecipe: The target has come into being meanwhile.
        NotEnoughRoom: The disk cannot be written.
    """
    folder = staging_folder(target)
    with writing(target), locked(target):
        if not replaces:
            check_target(target)
        if restart:
            make_work_folder(folder)
        try:
            yield Staging(folder, task)
        except (InvalidRecipe, IncompatibleInputs, DamagedInput):
            # The same command would fail again, and another one starts anew.
            shutil.rmtree(folder, ignore_errors=True)
            raise
