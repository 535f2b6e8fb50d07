"""Commands that a page shows: run as written, and what they print compared with what stands there.

`python -m tests.documented docs/tutorial.md` runs a page and writes what was printed into it.

A block counts when a comment stands above it: `<!-- run -->` for output that is the same everywhere,
`<!-- run: numbers -->` where numbers depend on the machine, `<!-- run: varies -->` for generated text,
`<!-- run: silent -->` where output is not shown. All blocks of a page share a folder and follow each other.
A server that a block starts is there until the page ends. What a block of Python prints stands in a block of
text below it.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(
    r"<!-- run(?:: (?P<mode>\w+))? -->\n```(?P<language>\w+)\n(?P<text>.*?)```"
    r"(?:\n\n```text\n(?P<printed>.*?)```)?",
    re.DOTALL,
)
_PROGRESS = re.compile(r"^.*(: [\d.]+ \w+ (of .* left|in [\d.]+ s)|it/s\])\n", re.MULTILINE)
_MACHINE = re.compile(r"\b(?:chat)?cmpl-\w+|-?\d+(?:\.\d+)?(?:e-?\d+)?|[┌└├│─]+")
_PORT = "8642"


@dataclass(frozen=True)
class Step:
    """One command of a page, or one program in Python."""

    language: str
    mode: str
    command: str
    shown: str

    def agrees(self, printed: str) -> bool:
        """Whether the page shows what was printed."""
        if self.mode in ("varies", "silent"):
            return True
        if self.mode == "numbers":
            return _MACHINE.sub("#", printed).split() == _MACHINE.sub("#", self.shown).split()
        return printed.strip() == self.shown.strip()


def steps_of(page: str) -> list[Step]:
    """Everything that runs on a page, in order."""
    return [step for block in _BLOCK.finditer(page) for step in _steps_of_block(block)]


def _steps_of_block(block: re.Match[str]) -> list[Step]:
    mode, language = block["mode"] or "", block["language"]
    if language == "python":
        return [Step(language, mode, block["text"], block["printed"] or "")]
    parts = re.split(r"^\$ ", block["text"], flags=re.MULTILINE)[1:]
    return [Step(language, mode, *_split(part)) for part in parts]


def _split(part: str) -> tuple[str, str]:
    """A command, which may go on behind a backslash, and what is shown below it."""
    lines = part.splitlines(keepends=True)
    length = next(number for number, line in enumerate(lines, 1) if not line.endswith("\\\n"))
    return "".join(lines[:length]), "".join(lines[length:])


class Workplace:
    """A folder with what documented commands need of a clone, and the server that they started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._server: subprocess.Popen[str] | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = str(free.getsockname()[1])
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
        shutil.copytree(ROOT / "examples", folder / "examples")

    def run(self, step: Step) -> str:
        """What a step prints."""
        command = step.command.replace(_PORT, self._port)
        if command.startswith("moemerge serve"):
            return self._serve(f"{command.strip()} --port {self._port}").replace(self._port, _PORT)
        if step.language == "python":
            (self.folder / "snippet.py").write_text(command, encoding="utf-8")
            command = "python snippet.py"
        return self.bash(command).replace(self._port, _PORT)

    def bash(self, command: str) -> str:
        """What a command line, which must succeed, prints on both streams, but for progress."""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        return _PROGRESS.sub("", done.stdout)

    def _serve(self, command: str) -> str:
        self._server = subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=self.folder,
            env=self._environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._server.stderr
        return self._server.stderr.readline()

    def close(self) -> None:
        """Stop the server, if one was started."""
        if self._server:
            self._server.terminate()
            self._server.communicate(timeout=60)


def _ended(text: str) -> str:
    """The text with an end of its last line."""
    return text if text.endswith("\n") or not text else f"{text}\n"


def record(page: Path) -> None:
    """Run a page and write what was printed into it."""
    with tempfile.TemporaryDirectory() as folder:
        workplace = Workplace(Path(folder))

        def renew(block: re.Match[str]) -> str:
            steps = _steps_of_block(block)
            if block["language"] == "python":
                told = f"```text\n{workplace.run(steps[0])}"
                return block[0].replace(f"```text\n{block['printed']}", told)
            printed = [_ended(workplace.run(step)) for step in steps]
            if block["mode"] == "silent":
                return block[0]
            text = "".join(f"$ {step.command}{out}" for step, out in zip(steps, printed, strict=True))
            return block[0].replace(block["text"], text)

        try:
            text = _BLOCK.sub(renew, page.read_text(encoding="utf-8"))
        finally:
            workplace.close()
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        record(Path(name))
