"""`moemerge undeploy`."""

from typing import Annotated

import typer

from moemerge.cli.command import JsonOption, print_json
from moemerge.cli.executors import AddressOption, open_cluster


def undeploy(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="Served bundles, as status names them.")
    ],
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Serve deployed bundles no more; what is running has time to end.

    Example: moemerge undeploy trio --address 10.0.0.1:6379
    """
    with open_cluster(address):
        from moemerge.distributed import deployment

        deployment.quiet_logs()
        deployment.withdraw(names)
    if as_json:
        print_json("undeploy", {"bundles": names})
        return
    for name in names:
        typer.echo(f"{name}: no longer served")
