"""`moemerge pull`."""

from typing import Annotated

import typer

from moemerge.cli.command import AllowPickleOption, JsonOption, OfflineOption, QuietOption, print_json
from moemerge.cli.progress import show_progress


def pull(
    refs: Annotated[
        list[str], typer.Argument(metavar="REF...", help="Repositories, org/name[@revision] or BASE+ADAPTER.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show files and sizes, fetch nothing.")] = False,
    offline: OfflineOption = False,
    allow_pickle: AllowPickleOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Download checkpoints: only the files a merge needs, pinned to a commit.

    All repositories are looked at first, by their configuration and headers; nothing is fetched if one
    cannot be read. With an adapter comes the base that it names.

    Example: moemerge pull org/moe-code org/moe-law@v2 --dry-run
    """
    from moemerge.checkpoint import hub
    from moemerge.checkpoint.disk import free_bytes
    from moemerge.checkpoint.sizes import format_size
    from moemerge.checkpoint.variants import look_at_repositories
    from moemerge.cli.tables import print_table
    from moemerge.refs import parse_repositories

    halves = [parse_repositories(ref) for ref in refs]
    if offline:
        folders = {str(half): hub.find_cached(half).path for pair in halves for half in pair}
        if as_json:
            print_json("pull", {"folders": {name: str(path) for name, path in folders.items()}})
        else:
            print_table("Cached", ["repository", "folder"], list(folders.items()))
        return
    repositories = look_at_repositories(halves, allow_pickle=allow_pickle)
    files = {r.label: hub.files_to_pull(r, allow_pickle=allow_pickle) for r in repositories}
    to_fetch = sum(file.size for pulls in files.values() for file in pulls if not file.cached)
    free = free_bytes(hub.cache_folder())
    paths: dict[str, str] = {}
    if not dry_run:
        hub.check_room(repositories, allow_pickle=allow_pickle)
        with show_progress(quiet=quiet) as progress:
            for repository in repositories:
                folder = hub.pull(repository, progress, allow_pickle=allow_pickle)
                paths[repository.label] = str(folder.path)
    if as_json:
        listed = {
            label: [{"name": f.name, "size": f.size, "cached": f.cached} for f in pulls]
            for label, pulls in files.items()
        }
        data = {"files": listed, "to_fetch_bytes": to_fetch, "free_bytes": free, "folders": paths}
        print_json("pull", data)
        return
    if not dry_run:
        print_table("Pulled", ["repository", "folder"], list(paths.items()))
        return
    rows = [
        [label, file.name, format_size(file.size), "cached" if file.cached else "to fetch"]
        for label, pulls in files.items()
        for file in pulls
    ]
    print_table("Files", ["repository", "file", "size", ""], rows)
    typer.echo(f"{format_size(to_fetch)} to fetch, {format_size(free)} free in {hub.cache_folder()}")
