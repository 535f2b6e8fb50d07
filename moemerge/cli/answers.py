"""An answer on its way to the terminal, and what was thought before it."""

import sys

import typer

from moemerge.cli.command import hint


class AnswerPrinter:
    """Answers go to standard output, thinking to standard error, dimmed on a terminal."""

    def __init__(self, *, quiet: bool, as_json: bool) -> None:
        self._shows_thinking = not quiet and not as_json
        self._shows_answers = not as_json
        self._is_thinking = False

    def think(self, piece: str) -> None:
        """A piece of what a variant thinks before it answers."""
        if self._shows_thinking:
            self._is_thinking = True
            sys.stderr.write(typer.style(piece, dim=True) if sys.stderr.isatty() else piece)
            sys.stderr.flush()

    def write(self, piece: str) -> None:
        """A piece of an answer."""
        if self._is_thinking and piece:
            self._is_thinking = False
            hint("\n")
        if self._shows_answers:
            sys.stdout.write(piece)
            sys.stdout.flush()
