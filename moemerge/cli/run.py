"""`moemerge run`."""

import time
from contextlib import closing
from dataclasses import asdict, replace
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
from moemerge.cli.progress import FIRST_SECONDS, PLAIN_SECONDS
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
from moemerge.errors import ServingError
from moemerge.runner.pages import use_huge_pages

if TYPE_CHECKING:
    from moemerge.runner.options import EngineOptions
    from moemerge.runner.transfer import Swap
    from moemerge.text.answers import Answer


def run(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle to run.")],
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="Text to continue, or - for standard input.")
    ] = None,
    variants: Annotated[
        list[str] | None,
        typer.Option(
            "--variant",
            "-v",
            metavar="NAME",
            help="Variant that answers; give it several times to compare.",
            autocompletion=complete_variant,
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--input", metavar="FILE", help="Requests instead of a prompt, a JSON object per line."),
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="Results of --input in its order; continued if there."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the variant's chat template.")] = False,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer.")] = 128,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repetition_penalty: RepetitionOption = None,
    seed: SeedOption = 0,
    stop: StopOption = None,
    resident: ResidentOption = "all",
    max_batch: Annotated[
        int, typer.Option("--max-batch", min=1, help="Requests that run at once, with --input.")
    ] = 64,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Answer a prompt with one or several variants of a bundle, or a file of requests.

    The pool stays in memory; changing the variant exchanges only non-expert tensors that differ. Text
    streams to standard output; bytes moved and speed go to standard error. Requests of a file run together,
    whatever their variants; sampling options are for lines that say nothing else.

    Example: moemerge run duo.moe -v code -v sums "Q: 17 + 25" --max-tokens 30
    """
    use_huge_pages()
    from moemerge.runner.options import EngineOptions

    sampling = given(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    options = EngineOptions(
        dtype=dtype, device=device, resident=check_resident(resident), max_batch=max_batch
    )
    if source is None and target is None:
        if prompt is None:
            raise typer.BadParameter("a prompt or --input is needed", param_hint="PROMPT")
        if not variants:
            raise typer.BadParameter("is needed with a prompt", param_hint="--variant")
        names = tuple(dict.fromkeys(variants))
        # One answer after the other: of what is not coded, nothing is prepared for many.
        options = replace(options, variants=names, max_batch=1, pack=False)
        settings = {"sampling": sampling, "max_tokens": max_tokens, "stop": tuple(stop or ())}
        _run_prompt(bundle, prompt, variants, settings, options, chat=chat, quiet=quiet, as_json=as_json)
        return
    if source is None or target is None or prompt is not None or chat or len(variants or ()) > 1:
        raise typer.BadParameter(
            "goes with --output, without a prompt and --chat, and with at most one --variant",
            param_hint="--input",
        )
    variant = variants[0] if variants else None
    defaults = {**sampling, **given(max_tokens=max_tokens, stop=stop, variant=variant)}
    _run_file(bundle, source, target, defaults, options, quiet=quiet, as_json=as_json)


def _run_prompt(
    folder: Path,
    prompt: str,
    variants: list[str],
    settings: dict[str, Any],
    options: "EngineOptions",
    *,
    chat: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    from moemerge.cli.inputs import read_prompt
    from moemerge.runner.sampling import Sampling
    from moemerge.text.answers import answer
    from moemerge.text.variants import BundleText

    sampling = Sampling(**settings.pop("sampling"))
    texts = BundleText(open_with_files(folder))
    text = read_prompt(prompt)
    messages = [{"role": "user", "content": text}]
    # Before the pool is loaded, so that what cannot be is known at once.
    prompts = [texts.of(v).encode_chat(messages) if chat else texts.of(v).encode(text) for v in variants]
    answers: list[dict[str, Any]] = []
    printer = AnswerPrinter(quiet=quiet, as_json=as_json)
    with closing(load_engine(texts.bundle, options, quiet=quiet or as_json)) as engine:
        for name, prompt_ids in zip(variants, prompts, strict=True):
            if len(variants) > 1:
                printer.write(f"== {name}\n")
            swap = engine.ensure_resident(name)
            found = answer(
                engine,
                texts.of(name),
                prompt_ids,
                sampling=sampling,
                chat=chat,
                write=printer.write,
                think=printer.think,
                **settings,
            )
            printer.write("\n")
            if not quiet and not as_json:
                _tell(swap, found)
            moved = {"moved_bytes": swap.moved_bytes, "kept_bytes": swap.kept_bytes}
            answers.append({**found.as_dict(), **moved, "swap_seconds": swap.seconds})
    if as_json:
        print_json("run", {"prompt": text, "answers": answers})


def _tell(swap: "Swap", answer: "Answer") -> None:
    from moemerge.checkpoint.sizes import format_size

    rate = len(answer.token_ids) / answer.seconds if answer.seconds else 0.0
    hint(
        f"{answer.variant}: {format_size(swap.moved_bytes)} moved in {1000 * swap.seconds:.1f} ms, "
        f"{format_size(swap.kept_bytes)} kept; {len(answer.token_ids)} tokens, {rate:.1f} tokens/s"
    )


def _run_file(
    folder: Path,
    source: Path,
    target: Path,
    defaults: dict[str, Any],
    options: "EngineOptions",
    *,
    quiet: bool,
    as_json: bool,
) -> None:
    from moemerge.text.request_files import RequestFile, run_request_file
    from moemerge.text.results import check_target

    bundle = open_with_files(folder)
    requests = RequestFile(bundle, source, defaults=defaults, dtype=options.dtype)
    check_target(target, source)
    num_lines = requests.check()
    told = _Counter(num_lines, quiet=quiet or as_json)
    begin = time.perf_counter()
    options = replace(options, variants=requests.variants or None)
    with closing(load_engine(bundle, options, quiet=quiet or as_json)) as engine:
        report = run_request_file(engine, requests, target, on_result=told.tell)
    seconds = time.perf_counter() - begin
    if report.num_failed:
        raise ServingError(
            f"{target}: {report.num_failed} of {num_lines} lines ended with an error, told there"
        )
    if as_json:
        print_json("run", {"output": str(target), **asdict(report), "seconds": seconds})
    else:
        typer.echo(f"Results: {target}")
    if not quiet and not as_json:
        rate = report.num_tokens / seconds if seconds else 0.0
        before = f", {report.num_resumed} of them before" if report.num_resumed else ""
        hint(f"{num_lines} lines{before}; {report.num_tokens} tokens, {rate:.1f} tokens/s")


class _Counter:
    """Says how far a file is, at the pace of progress in lines."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        self._total = total
        self._quiet = quiet
        self._begin = time.monotonic()
        self._next = self._begin + FIRST_SECONDS
        self._before: int | None = None

    def tell(self, count: int) -> None:
        """So many lines have results."""
        now = time.monotonic()
        # What results were there at the start says nothing about the rate.
        self._before = count - 1 if self._before is None else self._before
        if self._quiet or now < self._next:
            return
        self._next = now + PLAIN_SECONDS
        rate = (count - self._before) / (now - self._begin)
        hint(f"{count} of {self._total} lines, {rate:.1f}/s, {(self._total - count) / rate:.0f} s left")
