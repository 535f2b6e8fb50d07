"""`moemerge run`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from moemerge.cli.command import JsonOption, QuietOption, hint, print_json


def run(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle to run.")],
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="Text to continue, or - for standard input.")
    ],
    variants: Annotated[
        list[str],
        typer.Option(
            "--variant", "-v", metavar="NAME", help="Variant that answers; give it several times to compare."
        ),
    ],
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer.")] = 128,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Of sampling.")] = 0,
    dtype: Annotated[
        str, typer.Option("--dtype", help="auto (as stored), float32, bfloat16 or float16.")
    ] = "auto",
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.", envvar="MOEMERGE_DEVICE")] = "cpu",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Answer a prompt with one or several variants of a bundle.

    The pool stays in memory; changing the variant exchanges only non-expert tensors that differ. Text
    streams to standard output; bytes moved and speed go to standard error.

    Example: moemerge run duo.moe -v code -v sums "Q: 17 + 25" --max-tokens 30
    """
    from moemerge.checkpoint.sizes import format_size
    from moemerge.cli.answers import Answer, answer_prompt, open_engine
    from moemerge.cli.inputs import read_prompt
    from moemerge.runner.sampling import Sampling

    sampling = Sampling(temperature=temperature, seed=seed)
    engine = open_engine(bundle, variants, dtype=dtype, device=device)
    text = read_prompt(prompt)
    answers: list[Answer] = []
    for name in variants:
        if len(variants) > 1 and not as_json:
            typer.echo(f"== {name}")

        def write(piece: str) -> None:
            if not as_json:
                sys.stdout.write(piece)
                sys.stdout.flush()

        answer = answer_prompt(engine, name, text, max_tokens=max_tokens, sampling=sampling, write=write)
        answers.append(answer)
        if not as_json:
            typer.echo()
        if not quiet and not as_json:
            swap = answer.swap
            rate = len(answer.token_ids) / answer.seconds if answer.seconds else 0.0
            hint(
                f"{name}: {format_size(swap.moved_bytes)} moved in {1000 * swap.seconds:.1f} ms, "
                f"{format_size(swap.kept_bytes)} kept; {len(answer.token_ids)} tokens, {rate:.1f} tokens/s"
            )
    if as_json:
        print_json("run", {"prompt": text, "answers": [answer.as_dict() for answer in answers]})
