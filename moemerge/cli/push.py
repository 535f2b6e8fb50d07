"""`moemerge push`."""

from pathlib import Path
from typing import Annotated

import typer

from moemerge.cli.command import JsonOption, QuietOption, hint, print_json
from moemerge.cli.progress import show_progress


def push(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A bundle, or a checkpoint of moemerge export.")
    ],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="Repository, org/name[@branch].")],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private if it is created.")
    ] = False,
    message: Annotated[str, typer.Option("--message", "-m", metavar="TEXT", help="Of the commit.")] = (
        "Upload with moemerge"
    ),
    replace: Annotated[
        bool, typer.Option("--replace", help="Remove what else is in the repository, in the same commit.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show files and sizes, send nothing.")] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Upload a bundle or checkpoint to the hub, as one commit.

    The folder is proven whole first, and only files that belong to it are sent. What was uploaded is kept
    by the hub: run the same command again after an interruption.

    Example: moemerge push duo.moe my-name/duo --private --dry-run
    """
    from moemerge.bundle.pushing import files_to_push
    from moemerge.checkpoint.hub_upload import look_at_target, upload
    from moemerge.checkpoint.sizes import format_size
    from moemerge.cli.tables import print_table
    from moemerge.refs import parse_repository

    ref = parse_repository(repository)
    with show_progress(quiet=quiet) as progress:
        files = files_to_push(folder, progress)
        target = look_at_target(ref, files)
        commit = None
        if not dry_run:
            commit = upload(target, files, progress, message=message, private=private, replace=replace)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    if as_json:
        data = {
            "repository": ref.repository,
            "branch": target.branch,
            "exists": target.exists,
            "commit": commit,
            "files": [{"name": name, "size": size} for name, size in sizes.items()],
            "bytes": sum(sizes.values()),
            "stale": list(target.stale),
        }
        print_json("push", data)
        return
    total = f"{len(sizes)} files, {format_size(sum(sizes.values()))}"
    if commit:
        typer.echo(f"Pushed: {ref.repository}@{commit}, {total}")
        return
    print_table("Files", ["file", "size"], [[name, format_size(size)] for name, size in sizes.items()])
    place = "exists" if target.exists else f"would be created{', private' if private else ''}"
    typer.echo(f"{total}; {ref.repository} {place}, branch {target.branch}")
    if target.stale and not quiet:
        hint(f"warning: {len(target.stale)} other files are there; --replace removes them")
