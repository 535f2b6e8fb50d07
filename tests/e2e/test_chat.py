"""`moemerge chat`: lines piped in, and a terminal with its keys."""

import contextlib
import os
import pty
import subprocess
import sys
import time

import pytest

from tests.e2e.program import call_program, run_program


def test_every_line_is_a_turn_and_answers_come_out(mini_bundle):
    lines = "Q: 17 + 25\n\n/variant scripture\nAnd he said\n/quit\nnever said\n"
    done = run_program("chat", mini_bundle, "-v", "sums", "--max-tokens", "6", stdin=lines)
    assert done.code == 0, done.err
    turns = call_program("chat", mini_bundle, "-v", "sums", "--max-tokens", "6", "--json", stdin=lines)
    told = turns.envelope["data"]["turns"]
    assert done.out == "".join(f"{turn['text']}\n" for turn in told)
    assert [turn["variant"] for turn in told] == ["sums", "scripture"]
    assert told[1]["prompt_tokens"] > told[0]["prompt_tokens"] + 6


def test_reset_forgets_and_system_message_counts(mini_bundle):
    ask = ("chat", mini_bundle, "-v", "code", "--max-tokens", "4", "--json")
    turns = call_program(*ask, stdin="for\n/reset\nfor\nfor\n").envelope["data"]["turns"]
    first, again, longer = (turn["prompt_tokens"] for turn in turns)
    assert first == again < longer
    guided = call_program(*ask, "--system", "be brief", stdin="for\n").envelope["data"]["turns"]
    assert guided[0]["prompt_tokens"] > first


@pytest.mark.parametrize(
    ("lines", "code", "named"),
    [
        ("/variant latin\n", 5, "latin"),
        ("/bogus\n", 3, "/bogus is no command"),
        ("word " * 600, 3, "context"),
    ],
)
def test_what_cannot_be_ends_a_conversation_without_terminal(lines, code, named, mini_bundle):
    done = call_program("chat", mini_bundle, "-v", "code", stdin=lines)
    assert done.code == code
    assert named in done.err


def test_end_of_the_context_says_what_to_do(mini_bundle):
    ask = ("chat", mini_bundle, "-v", "code", "--max-tokens", "600")
    done = call_program(*ask, stdin="for\nfor\n")
    assert done.code == 3
    cut, refused = done.err.splitlines()
    assert cut == "The context is full; /reset begins anew."
    assert refused.endswith("leave no room for an answer in a context of 512. /reset begins anew")
    assert call_program(*ask, "-q", stdin="for\n/reset\nfor\n").code == 0
    assert call_program(*ask[:-1], "2", stdin="for\n").err == ""
    # A line that is too long by itself would be so after a reset, too.
    assert "/reset" not in call_program(*ask, stdin="word " * 600).err


def test_line_that_is_not_utf8_is_named(mini_bundle):
    done = call_program("chat", mini_bundle, "-v", "code", "--max-tokens", "2", stdin=b"for\r\n\xff\xfe\n")
    assert done.code == 3
    assert "standard input, line 2: is not UTF-8 (byte 0)" in done.err
    assert done.out


def test_variant_without_template_is_refused_before_anything_is_loaded(tmp_path):
    from tests.bundles import write_bundle

    folder = write_bundle(tmp_path, "switch_transformers")
    done = call_program("chat", folder)
    assert done.code == 5
    assert "variant plain: has no chat template" in done.err


class Terminal:
    """The program with a terminal in front of it."""

    def __init__(self, *arguments):
        self._keys, side = pty.openpty()
        environment = {**os.environ, "TERM": "dumb"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moemerge", "chat", *map(str, arguments)],
            stdin=side,
            stdout=side,
            stderr=side,
            env=environment,
            start_new_session=True,
            preexec_fn=make_controlling,
        )
        os.close(side)
        self.seen = ""

    def type(self, keys):
        os.write(self._keys, keys.encode())

    def wait_for(self, text, *, after=0, seconds=60):
        """Read until a text has appeared; how much had been seen by then."""
        os.set_blocking(self._keys, False)
        deadline = time.monotonic() + seconds
        while text not in self.seen[after:]:
            assert time.monotonic() < deadline, f"no {text!r} in {self.seen!r}"
            with contextlib.suppress(BlockingIOError, OSError):
                self.seen += os.read(self._keys, 65536).decode(errors="replace")
            time.sleep(0.01)
        return len(self.seen)

    def end(self):
        code = self._process.wait(timeout=60)
        os.close(self._keys)
        return code


def make_controlling():
    """Ctrl-C comes from a terminal that the process controls."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal(mini_bundle):
    terminal = Terminal(mini_bundle, "-v", "code", "--max-tokens", "480", "--stop", "never this")
    terminal.wait_for("code> ")
    return terminal


def test_terminal_shows_who_answers_and_errors_do_not_end_it(terminal):
    assert "code answers. /variant NAME" in terminal.seen
    terminal.type("/variant latin\n")
    seen = terminal.wait_for("error: no variant 'latin'")
    terminal.type("/variant sums\n")
    terminal.wait_for("sums> ", after=seen)
    terminal.type("\x04")
    assert terminal.end() == 0


def test_interrupt_stops_the_answer_and_twice_the_program(terminal):
    terminal.type("for\n")
    seen = terminal.wait_for("\n", after=len(terminal.seen) + 5)
    terminal.type("\x03")
    seen = terminal.wait_for("code> ", after=seen)
    terminal.type("\x03")
    terminal.wait_for("ctrl-C again or /quit leaves", after=seen)
    terminal.type("\x03")
    assert terminal.end() == 130
