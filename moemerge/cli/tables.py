"""Tables on standard output: rich in a terminal, aligned text elsewhere."""

import sys
from collections.abc import Sequence

import typer


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under headings, if there are any; columns of numbers alone are aligned right."""
    cells = [[_text(value) for value in row] for row in rows]
    if sys.stdout.isatty():
        _print_rich(title, columns, cells)
        return
    widths = [max(len(row[i]) for row in [list(columns), *cells]) for i in range(len(columns))]
    right = [all(_is_number(row[i]) for row in cells) for i in range(len(columns))]
    typer.echo(title)
    for row in [list(columns), *cells] if any(columns) else cells:
        line = "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        )
        typer.echo(f"  {line.rstrip()}")


def _print_rich(title: str, columns: Sequence[str], cells: list[list[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.show_header = any(columns)
    for index, column in enumerate(columns):
        numbers = all(_is_number(row[index]) for row in cells)
        table.add_column(column, justify="right" if numbers else "left")
    for row in cells:
        table.add_row(*row)
    Console().print(table)


def _text(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_number(text: str) -> bool:
    return (bool(text) and (text[0].isdigit() or text[0] in "-+.")) or text in ("", "-")
