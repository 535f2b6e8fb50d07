"""`moemerge diff`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from moemerge.cli.command import AllowPickleOption, JsonOption, OfflineOption, QuietOption, print_json
from moemerge.cli.progress import show_progress
from moemerge.errors import InvalidRecipe

if TYPE_CHECKING:
    from moemerge.bundle.diff import ModelDifference
    from moemerge.bundle.opened import OpenedModel


def diff(
    first: Annotated[
        str, typer.Argument(metavar="A", help="Checkpoint, bundle or variant of one, BUNDLE:VARIANT.")
    ],
    second: Annotated[str, typer.Argument(metavar="B", help="What it is compared with, of the same kind.")],
    numeric: Annotated[
        bool, typer.Option("--numeric", help="Measure how far tensors are apart; reads every byte.")
    ] = False,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch weights of repositories, to compare their values.")
    ] = False,
    top: Annotated[int, typer.Option("--top", metavar="N", min=0, help="How many tensors are listed.")] = 10,
    offline: OfflineOption = False,
    allow_pickle: AllowPickleOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Tell what differs between two checkpoints, variants or bundles, worst first.

    Compares what the models compute with, whatever the layout, sharding or code. Of two bundles the
    variants of the same name are compared. Values of a repository are compared when it is downloaded.

    Example: moemerge diff examples/families/mini/base examples/families/mini/code --numeric --top 3
    """
    from moemerge.bundle.diff import diff_models
    from moemerge.bundle.opened import open_models
    from moemerge.refs import parse_model

    options = {"offline": offline, "download": download, "allow_pickle": allow_pickle}
    with show_progress(quiet=quiet) as progress:
        ours = open_models(parse_model(first), progress=progress, **options)
        theirs = open_models(parse_model(second), progress=progress, **options)
        pairs = _pair(first, ours, second, theirs)
        found = {name: diff_models(*pair, progress, numeric=numeric) for name, pair in pairs.items()}
    lone = {
        "only_in_a": sorted(ours.keys() - theirs.keys()),
        "only_in_b": sorted(theirs.keys() - ours.keys()),
    }
    if as_json:
        models = {name: _as_data(difference) for name, difference in found.items()}
        is_equal = all(d.is_equal for d in found.values()) and not any(lone.values())
        data = {"a": first, "b": second, "equal": is_equal, "numeric": numeric, **lone, "models": models}
        print_json("diff", data)
        return
    for side, names in (("A", lone["only_in_a"]), ("B", lone["only_in_b"])):
        if names:
            typer.echo(f"Variants only in {side}: {', '.join(names)}")
    for name, difference in found.items():
        typer.echo(f"A {first}\nB {second}" if not name else f"Variant {name}")
        _print_difference(difference, top, numeric=numeric)


def _pair(
    first: str, ours: "dict[str, OpenedModel]", second: str, theirs: "dict[str, OpenedModel]"
) -> "dict[str, tuple[OpenedModel, OpenedModel]]":
    """Which models are compared: two by themselves, or variants of two bundles by name.

    Raises:
        InvalidRecipe: A bundle and a model, or two bundles without a common name.
    """
    for text, models, other in ((first, ours, theirs), (second, theirs, ours)):
        if "" not in models and "" in other:
            raise InvalidRecipe(
                f"{text} is a bundle of {', '.join(models)}; say which one, for example "
                f"{text}:{next(iter(models))}"
            )
    common = [name for name in ours if name in theirs]
    if not common:
        raise InvalidRecipe(
            f"{first} holds {', '.join(ours)}, {second} holds {', '.join(theirs)}: no variant of the same "
            f"name. Write BUNDLE:VARIANT for both"
        )
    return {name: (ours[name], theirs[name]) for name in common}


def _as_data(difference: "ModelDifference") -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "settings": {name: list(pair) for name, pair in difference.settings.items()},
        "files": difference.files,
        "num_tensors": len(difference.tensors),
        "num_changed": len(difference.changed),
        "groups": [asdict(group) for group in difference.groups()],
        "tensors": [asdict(tensor) for tensor in difference.changed],
    }


def _print_difference(difference: "ModelDifference", top: int, *, numeric: bool) -> None:
    from moemerge.cli.tables import print_table

    if difference.is_equal:
        typer.echo(f"equal: {len(difference.tensors)} tensors, settings and files")
        return
    typer.echo(f"{len(difference.changed)} of {len(difference.tensors)} tensors differ")
    if difference.settings:
        rows = [[name, *map(str, pair)] for name, pair in difference.settings.items()]
        print_table("Settings", ["setting", "A", "B"], rows)
    if difference.files:
        print_table("Files", ["file", ""], [[name, str(what)] for name, what in difference.files.items()])
    columns = ["role", "tensors", "changed", *(["mean", "worst"] if numeric else [])]
    rows = [[getattr(group, column) for column in columns] for group in difference.groups()]
    print_table("By role", columns, rows)
    shown = difference.changed[:top]
    if shown:
        extra = ["relative", "largest"] if numeric else []
        rows = [
            [t.name, str(t.status), t.before or "-", t.after or "-", *(getattr(t, name) for name in extra)]
            for t in shown
        ]
        title = f"Worst {len(shown)}" if numeric else f"First {len(shown)}"
        print_table(title, ["tensor", "", "A", "B", *extra], rows)
