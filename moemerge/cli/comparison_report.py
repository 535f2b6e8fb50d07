"""How a comparison looks in a terminal."""

import typer

from moemerge.cli.tables import print_table
from moemerge.evaluation.results import GAIN, Comparison, Row


def print_comparison(found: Comparison) -> None:
    """A line per method and budget, then what could not be measured and what beats ours."""
    rows = found.rows()
    unit = "gain of fine-tuning" if found.unit == GAIN else "originals' accuracy"
    scores = "perplexity" if found.unit == GAIN else "accuracy"
    columns = ["method", "budget", "ratio", "kept", "95 %", "worst", "minus ours", "95 %", *found.names]
    table = [_cells(row, found.names) for row in rows if row.cannot is None]
    print_table(f"Share of the {unit} kept, mean and worst variant; {scores} of each", columns, table)
    for row in rows:
        if row.cannot is not None:
            typer.echo(f"  {row.method} at {row.budget}: {row.cannot}")
    better = [row for row in rows if row.is_better]
    for row in better:
        typer.echo(
            f"  {row.method} at {row.budget} is better than ours by {row.difference:.4f}, beyond chance"
        )


def _cells(row: Row, names: object) -> list[object]:
    assert isinstance(names, list)
    scores = row.scores or {}
    return [
        row.method,
        row.budget,
        f"{row.bytes_ratio:.3f}" if row.bytes_ratio is not None else None,
        f"{row.kept:.4f}" if row.kept is not None else None,
        f"{row.interval.low:.4f} to {row.interval.high:.4f}" if row.interval else None,
        f"{row.worst:.4f}" if row.worst is not None else None,
        f"{row.difference:+.4f}" if row.difference is not None else None,
        f"{row.difference_interval.low:+.4f} to {row.difference_interval.high:+.4f}"
        if row.difference_interval
        else None,
        *(f"{scores[name]:.3f}" for name in names if name in scores),
    ]
