"""Options that say how much is stored and what costs are measured on; shared by `plan` and `merge`."""

from pathlib import Path
from typing import Annotated

import typer

BudgetOption = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="B",
        help="exact, a multiple of one variant's expert bytes (0.6x, 1x), or a size (40GiB).",
    ),
]
QualityOption = Annotated[
    float | None,
    typer.Option(
        "--quality",
        metavar="SHARE",
        help="What variants keep on average of what they gained on the base, such as 0.99; without --budget "
        "in as few bytes as that takes.",
    ),
]
FloorOption = Annotated[
    float | None,
    typer.Option("--floor", metavar="SHARE", help="The same, but kept by every variant."),
]
FitOption = Annotated[
    str | None,
    typer.Option(
        "--fit",
        metavar="SIZE",
        help="Whatever a device of that memory has left beside all variants and their keys and values.",
    ),
]
FitBatchOption = Annotated[
    int | None, typer.Option("--fit-batch", metavar="N", help="Sequences at once, for --fit (16).")
]
FitTokensOption = Annotated[
    int | None, typer.Option("--fit-tokens", metavar="N", help="Tokens of each, for --fit (4096).")
]
PolicyOption = Annotated[
    str | None,
    typer.Option("--policy", help="measured (default); or by weights alone: cluster, medoid, mean, pick."),
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option("--calibration", metavar="DIR", help="Measure costs on what moemerge calibrate kept."),
]
EvidenceTextOption = Annotated[
    list[str] | None,
    typer.Option("--text", metavar="NAME=FILE", help="Calibrate each variant on its own text on the way."),
]
TokensOption = Annotated[
    int | None,
    typer.Option("--tokens", metavar="N", min=1, help="Most tokens of each --text to use (65536)."),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="D",
        help="Of the computation on --text: float32, or bfloat16 where that is fast (float32).",
    ),
]
WithinOption = Annotated[
    bool, typer.Option("--within", help="Let experts of one variant share, too (policy cluster).")
]
