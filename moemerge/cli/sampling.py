"""Options of sampling that several commands have; None stands for the command's default."""

from typing import Annotated, Any

import typer

TemperatureOption = Annotated[
    float | None, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")
]
TopKOption = Annotated[
    int | None, typer.Option("--top-k", min=0, help="Sample from the k likeliest tokens; 0 for all.")
]
TopPOption = Annotated[
    float | None,
    typer.Option("--top-p", max=1.0, help="Sample from the likeliest tokens that reach this probability."),
]
MinPOption = Annotated[
    float | None,
    typer.Option(
        "--min-p", min=0.0, max=1.0, help="Sample from tokens at least this fraction of the likeliest."
    ),
]
RepetitionOption = Annotated[
    float | None, typer.Option("--repetition-penalty", help="Above 1 discourages repeating; 1 is off.")
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Of sampling.")]
StopOption = Annotated[
    list[str] | None, typer.Option("--stop", metavar="TEXT", help="Ends an answer; give it several times.")
]


def given(**values: Any) -> dict[str, Any]:
    """Options that were given, or have a default."""
    return {name: value for name, value in values.items() if value is not None}
