"""The program as a user runs it: in a process of its own, or (quicker) inside the test's."""

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# As `python -m moemerge`, but with a pause after every finished step of a merge.
SLOW = """
import time
from moemerge.consolidation.staging import Staging
finish = Staging.finish
def finish_and_wait(*args, **kwargs):
    finish(*args, **kwargs)
    time.sleep(0.2)
Staging.finish = finish_and_wait
from moemerge.cli import main
main()
"""


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def envelope(self) -> dict[str, Any]:
        """The one JSON object on standard output."""
        value = json.loads(self.out)
        assert value.keys() == {"schema", "command", "ok", "exit_code", "data", "findings"}
        assert value["exit_code"] == self.code
        assert value["ok"] == (self.code == 0)
        return value


def run_program(*arguments: object, cwd: Path | None = None, stdin: str = "") -> Outcome:
    """`python -m moemerge` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "moemerge", *map(str, arguments)],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def start_slow_program(*arguments: object) -> subprocess.Popen[str]:
    """The program with pauses between the steps of a merge."""
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def call_program(*arguments: object, cwd: Path | None = None, stdin: str | bytes = "") -> Outcome:
    """The same in this process; anything but a regular exit, a traceback for a user, fails the test."""
    from moemerge.cli import main

    out, err = io.StringIO(), io.StringIO()
    before = Path.cwd()
    if cwd:
        os.chdir(cwd)
    typed = stdin.encode() if isinstance(stdin, str) else stdin
    stdin_before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8")
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        return Outcome(code, out.getvalue(), err.getvalue())
    finally:
        os.chdir(before)
        sys.stdin = stdin_before
    raise AssertionError("the program returned without an exit")


def tree(folder: Path) -> dict[str, bytes]:
    """Every file's bytes by path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
