"""`moemerge init`."""

from pathlib import Path
from typing import Annotated

import typer

from moemerge.cli.command import JsonOption, QuietOption, hint, print_json
from moemerge.errors import InvalidRecipe


def init(
    references: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME=]REF...", help="Checkpoints to consolidate.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Recipe to write.")] = Path(
        "recipe.yaml"
    ),
    base: Annotated[str | None, typer.Option("--base", metavar="REF", help="Their common ancestor.")] = None,
    from_mergekit: Annotated[
        Path | None,
        typer.Option("--from-mergekit", metavar="FILE", help="Take checkpoints and base from this file."),
    ] = None,
    budget: Annotated[
        str, typer.Option("--budget", metavar="B", help="What the experts may take.")
    ] = "1.25x",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a recipe with comments from a list of checkpoints, or from a mergekit configuration.

    Names of variants come from the references unless given. Nothing is downloaded.

    Example: moemerge init code=examples/families/mini/code examples/families/mini/sums -o my-recipe.yaml
    """
    from moemerge.bundle.target import check_target, writing
    from moemerge.checkpoint.writer import write_text
    from moemerge.consolidation.mergekit import read_mergekit
    from moemerge.consolidation.recipe import read_recipe
    from moemerge.consolidation.starting import draft_recipe

    check_target(out)
    notes: list[str] = []
    named = list(references or ())
    if from_mergekit:
        if named:
            raise InvalidRecipe("give checkpoints or --from-mergekit, not both")
        found = read_mergekit(from_mergekit)
        named, base = found.sources, base or found.base
        if found.left_out:
            notes.append(f"Left out of {from_mergekit.name}: {', '.join(sorted(found.left_out))}.")
    text = draft_recipe(named, base, budget, out, notes)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, text)
    task = read_recipe(out)
    if as_json:
        print_json("init", {"recipe": str(out), "variants": task.sources, "base": task.base, "notes": notes})
        return
    typer.echo(f"Recipe: {out}, {len(task.sources)} variants")
    if not quiet:
        for note in notes:
            hint(f"note: {note} moemerge decides otherwise what to average.")
        hint(f"Look it over, then: moemerge merge --recipe {out} -o out.moe")
