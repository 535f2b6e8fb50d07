"""`moemerge chat`."""

import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moemerge.cli.answers import AnswerPrinter
from moemerge.cli.command import JsonOption, QuietOption, hint, print_json
from moemerge.cli.completion import complete_variant
from moemerge.cli.engine import (
    DeviceOption,
    DtypeOption,
    ResidentOption,
    check_resident,
    load_engine,
    open_with_files,
)
from moemerge.cli.sampling import (
    MinPOption,
    RepetitionOption,
    SeedOption,
    StopOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    given,
)
from moemerge.errors import InvalidRecipe, MoemergeError
from moemerge.runner.pages import use_huge_pages

if TYPE_CHECKING:
    from moemerge.text.answers import Answer
    from moemerge.text.conversation import Conversation

_HELP = "/variant NAME lets another variant answer, /reset forgets all turns, /quit or ctrl-D leaves"
_ANEW = "/reset begins anew"


def chat(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle to talk to.")],
    variant: Annotated[
        str | None,
        typer.Option(
            "--variant",
            "-v",
            metavar="NAME",
            help="Who answers first; the bundle's first variant.",
            autocompletion=complete_variant,
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="System message in front of all turns.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer.")] = 512,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repetition_penalty: RepetitionOption = None,
    seed: SeedOption = None,
    stop: StopOption = None,
    resident: ResidentOption = "all",
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Talk to the variants of a bundle, each through its own chat template.

    Every line of standard input is a turn; /variant NAME switches, /reset begins anew, /quit leaves. Ctrl-C
    stops an answer, twice the program. Without sampling options the variant's own recommendation counts.
    What a variant thinks before it answers goes to standard error.

    Example: moemerge chat duo.moe -v sums
    """
    use_huge_pages()
    from moemerge.runner.options import EngineOptions
    from moemerge.text.conversation import Conversation
    from moemerge.text.variants import BundleText

    wanted = given(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    options = EngineOptions(dtype=dtype, device=device, resident=check_resident(resident), max_batch=1)
    texts = BundleText(open_with_files(bundle))
    text = texts.of(variant or next(iter(texts.bundle.manifest.variants)))
    text.require_chat_template()
    with closing(load_engine(texts.bundle, options, quiet=quiet or as_json)) as engine:
        conversation = Conversation(engine=engine, texts=texts, text=text, system=system)
        talk = _Talk(conversation, wanted, max_tokens, tuple(stop or ()), quiet=quiet, as_json=as_json)
        talk.begin()
        for line in _lines(talk):
            if not talk.take(line):
                break
    if as_json:
        print_json("chat", {"turns": talk.turns})


class _Talk:
    """Lines in, answers out."""

    def __init__(
        self,
        conversation: "Conversation",
        wanted: dict[str, Any],
        max_tokens: int,
        stop: tuple[str, ...],
        *,
        quiet: bool,
        as_json: bool,
    ) -> None:
        self.turns: list[dict[str, Any]] = []
        self.is_interactive = sys.stdin.isatty()
        self._printer = AnswerPrinter(quiet=quiet, as_json=as_json)
        self._conversation = conversation
        self._wanted = wanted
        self._max_tokens = max_tokens
        self._stop = stop
        self._quiet = quiet
        self._as_json = as_json

    @property
    def prompt(self) -> str:
        """In front of what is typed."""
        return f"{self._conversation.text.name}> " if self.is_interactive else ""

    def begin(self) -> None:
        """Say who answers."""
        if self.is_interactive and not self._quiet:
            hint(f"{self._conversation.text.name} answers. {_HELP}")

    def take(self, line: str) -> bool:
        """Answer a line or follow a command; false to leave."""
        if not line.strip():
            return True
        try:
            if line.startswith("/"):
                return self._follow(line[1:].split())
            self._answer(line)
        except MoemergeError as error:
            if not self.is_interactive:
                raise
            hint(f"error: {error}")
        return True

    def _follow(self, words: list[str]) -> bool:
        match words:
            case ["quit"]:
                return False
            case ["reset"]:
                self._conversation.reset()
            case ["variant", name]:
                self._conversation.choose(name)
            case ["help"]:
                hint(_HELP)
            case _:
                raise InvalidRecipe(f"/{' '.join(words)} is no command. {_HELP}")
        return True

    def _answer(self, line: str) -> None:
        found = self._say(line)
        self._printer.write("\n")
        self.turns.append({"prompt": line, **found.as_dict()})
        if self._is_at_its_end(found) and not self._quiet and not self._as_json:
            hint(f"The context is full; {_ANEW}.")

    def _say(self, line: str) -> "Answer":
        from moemerge.text.limits import ContextExceeded

        sampling = replace(self._conversation.text.recommended(), **self._wanted)
        try:
            with _stopped_by_interrupt() as interrupt:
                return self._conversation.say(
                    line,
                    max_tokens=self._max_tokens,
                    sampling=sampling,
                    stop=self._stop,
                    write=self._printer.write,
                    think=self._printer.think,
                    is_cancelled=lambda: interrupt.is_set,
                )
        except ContextExceeded as error:
            # Without turns there is nothing to forget: the line alone is too long.
            if not self._conversation.messages:
                raise
            raise InvalidRecipe(f"{error}. {_ANEW}") from error

    def _is_at_its_end(self, answer: "Answer") -> bool:
        """The context, not `--max-tokens`, ended an answer."""
        return answer.finish_reason == "length" and len(answer.token_ids) < self._max_tokens


class _Interrupt:
    """Whether ctrl-C was pressed."""

    is_set = False

    def note(self, number: int, frame: object) -> None:
        """The first time it is only noted, so that no step is torn; the second time it counts."""
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True


@contextmanager
def _stopped_by_interrupt() -> Iterator[_Interrupt]:
    interrupt = _Interrupt()
    before = signal.signal(signal.SIGINT, interrupt.note)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


def _lines(talk: _Talk) -> Iterator[str]:
    """What is typed or piped in, until it ends."""
    if not talk.is_interactive:
        yield from _piped_lines()
        return
    import readline  # noqa: F401 - makes `input` editable

    warned = False
    while True:
        try:
            line = input(talk.prompt)
        except EOFError:
            hint("")
            return
        except KeyboardInterrupt:
            if warned:
                raise
            warned = True
            hint("\nctrl-C again or /quit leaves")
            continue
        except UnicodeDecodeError as error:
            hint(f"error: the line is not UTF-8 (byte {error.start})")
            continue
        warned = False
        yield line


def _piped_lines() -> Iterator[str]:
    for number, raw in enumerate(sys.stdin.buffer, start=1):
        try:
            yield raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InvalidRecipe(
                f"standard input, line {number}: is not UTF-8 (byte {error.start})"
            ) from error
