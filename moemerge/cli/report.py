"""`moemerge report`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moemerge.cli.command import JsonOption, QuietOption, hint, print_json
from moemerge.cli.completion import complete_variant
from moemerge.errors import InvalidRecipe

if TYPE_CHECKING:
    from moemerge.report.contents import Matrix, Report
    from moemerge.report.heat import Form
    from moemerge.report.tables import Choice, View

_NAMES = (
    "layers, heat, sharing, parts, pairs, deltas, clusters, rungs, worst, budget, routers, routing, variants"
)


def report(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="SIM|PLAN|BUNDLE",
            help="Folder of moemerge similarity, plan.json, or bundle.",
            show_default=False,
        ),
    ],
    view: Annotated[str | None, typer.Option("--view", metavar="NAME", help=f"One of: {_NAMES}.")] = None,
    layer: Annotated[int | None, typer.Option("--layer", metavar="N", help="Only this layer.")] = None,
    variant: Annotated[
        str | None,
        typer.Option(
            "--variant", "-v", metavar="NAME", help="Only this variant.", autocompletion=complete_variant
        ),
    ] = None,
    top: Annotated[int, typer.Option("--top", metavar="N", min=1, help="How many of the worst slots.")] = 10,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", metavar="DIR", help="Add what moemerge calibrate kept."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write one self-contained page.")
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print the view as CSV.")] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show where variants are alike, what sharing costs, and what a bundle did about it.

    Without --view: what the numbers are evidence of, a line per layer, and a heat map of the layer whose
    experts differ most. Needs no weights, only reports.

    Example: moemerge report duo.moe --view worst --top 5
    """
    from moemerge.report.reading import open_report
    from moemerge.report.tables import Choice

    found = open_report(path, calibration)
    choice = Choice(layer=layer, variant=variant, top=top)
    _check(found, view, choice)
    if html:
        _write_page(found, html, quiet=quiet)
    if as_json:
        print_json("report", {**_data(found, view, choice), "html": str(html) if html else None})
    elif as_csv:
        _print_csv(found, view or "layers", choice)
    elif view == "heat":
        _print_heat(found, choice)
    elif view:
        _print_view(_table(found, view, choice))
    elif html:
        typer.echo(f"Page: {html}")
    else:
        _print_overview(found, choice)
        if not quiet:
            hint(f"More with --view: {_NAMES}; as a page with --html FILE.")


def _check(found: "Report", view: str | None, choice: "Choice") -> None:
    from moemerge.report.views import VIEWS

    if view not in (None, "heat", *VIEWS):
        raise InvalidRecipe(f"--view {view!r}: expected one of {_NAMES}")
    if choice.layer is not None and choice.layer not in found.layers:
        raise InvalidRecipe(
            f"--layer {choice.layer}: {found.name} has layers {found.layers[0]} to {found.layers[-1]}"
        )
    if choice.variant not in (None, *found.variants):
        raise InvalidRecipe(f"--variant {choice.variant!r}: {found.name} holds {', '.join(found.variants)}")


def _write_page(found: "Report", html: Path, *, quiet: bool) -> None:
    from moemerge.report.html import has_plotly, write_page

    write_page(found, html)
    if not has_plotly() and not quiet:
        hint('The page has no hover and zoom: these need plotly, pip install "moemerge[report]".')


def _table(found: "Report", view: str, choice: "Choice") -> "View":
    from moemerge.report.views import NEEDS, VIEWS

    table = VIEWS[view](found, choice)
    if table is None:
        needs = NEEDS.get(view, "distances: a folder of moemerge similarity, or a bundle")
        raise InvalidRecipe(f"--view {view}: {found.name} has nothing of it; it needs {needs}")
    return table


def _data(found: "Report", view: str | None, choice: "Choice") -> dict[str, object]:
    from moemerge.report.numbers import most_apart
    from moemerge.report.views import VIEWS
    from moemerge.report.words import evidence, headline

    views: dict[str, object] = {}
    for name in VIEWS if view is None else [view]:
        if name == "heat":
            index = most_apart(found) if choice.layer is None else choice.layer
            views["heat"] = {"layer": index, "distances": _matrix(found, index).tolist()}
            continue
        table = _table(found, name, choice) if view else VIEWS[name](found, choice)
        views[name] = table.records() if table else None
    return {
        "kind": found.kind,
        "name": found.name,
        "family": found.family,
        "variants": list(found.variants),
        "num_slots": found.num_slots,
        "layers": list(found.layers),
        "evidence": evidence(found),
        "headline": dict(headline(found)),
        "views": views,
    }


def _print_csv(found: "Report", view: str, choice: "Choice") -> None:
    import csv
    import sys

    from moemerge.report.numbers import most_apart

    writer = csv.writer(sys.stdout, lineterminator="\n")
    if view == "heat":
        names = [f"{name}:{slot}" for name in found.variants for slot in range(found.num_slots)]
        matrix = _matrix(found, most_apart(found) if choice.layer is None else choice.layer)
        writer.writerow(["expert", *names])
        writer.writerows([name, *row] for name, row in zip(names, matrix.tolist(), strict=True))
        return
    table = _table(found, view, choice)
    writer.writerow(table.columns)
    writer.writerows(table.rows)


def _print_overview(found: "Report", choice: "Choice") -> None:
    from moemerge.report.words import evidence, headline, title

    typer.echo(title(found))
    for sentence in evidence(found):
        typer.echo(f"  {sentence}")
    facts = headline(found)
    width = max(len(name) for name, _ in facts)
    typer.echo()
    for name, value in facts:
        typer.echo(f"  {name:<{width}}  {value}")
    typer.echo()
    _print_strips(found)
    _print_view(_table(found, "layers", choice))
    if found.similarity:
        typer.echo()
        _print_heat(found, choice)


def _print_strips(found: "Report") -> None:
    import shutil

    from moemerge.report.heat import strip
    from moemerge.report.numbers import strips

    width = shutil.get_terminal_size().columns
    for name, values in strips(found).items():
        known = [value for value in values if value is not None]
        if not known:
            continue
        text, factor = strip(values, _form(), width - 40)
        averaged = f", {factor} layers averaged into one" if factor > 1 else ""
        typer.echo(f"  {name:<22}  {text}  0 to {max(known):.3g}{averaged}")
    typer.echo()


def _print_view(table: "View") -> None:
    from moemerge.cli.tables import print_table

    print_table(table.title, table.columns, table.rows)
    if table.note:
        typer.echo(table.note)


def _print_heat(found: "Report", choice: "Choice") -> None:
    import shutil

    from moemerge.report.heat import by_slot, draw, legend
    from moemerge.report.numbers import farthest_siblings, most_apart

    index = most_apart(found) if choice.layer is None else choice.layer
    matrix = _matrix(found, index)
    order = by_slot(len(found.variants), found.num_slots)
    form = _form()
    top = farthest_siblings(matrix, len(found.variants))
    lines, factor = draw(matrix[order][:, order], form, shutil.get_terminal_size().columns, top)
    typer.echo(
        f"Layer {index}, relative L2 between {len(matrix)} experts, slot by slot: {', '.join(found.variants)}"
    )
    for line in lines:
        typer.echo(line, color=True)
    averaged = f"; {factor} x {factor} experts averaged into one cell" if factor > 1 else ""
    typer.echo(f"{legend(top, form)}{averaged}", color=True)


def _matrix(found: "Report", layer: int) -> "Matrix":
    from moemerge.report.numbers import RELATIVE

    if found.similarity is None:
        raise InvalidRecipe(
            f"--view heat: {found.name} holds no distances; give a folder of moemerge similarity"
        )
    return found.similarity.load(layer).distances[RELATIVE]


def _form() -> "Form":
    import os
    import sys

    from moemerge.report.heat import Form

    if sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb":
        return Form.COLOUR
    encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower()
    return Form.SHADES if encoding.startswith("utf") else Form.ASCII
