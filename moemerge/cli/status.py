"""`moemerge status`."""

from typing import Annotated

import typer

from moemerge.cli.command import JsonOption, print_json
from moemerge.cli.executors import AddressOption, open_cluster


def status(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME...]", help="Served bundles; all by default.")
    ] = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Tell how the replicas of deployed bundles stand: residents, queues, requests.

    Example: moemerge status --address 10.0.0.1:6379
    """
    from moemerge.cli.tables import print_table

    with open_cluster(address):
        from moemerge.distributed import deployment

        deployment.quiet_logs()
        found = {name: deployment.states_of(name) for name in names or deployment.served_names()}
    rows = [
        {
            "bundle": name,
            "replica": state.replica_id,
            "node": state.node_id[:8],
            "resident": state.residents,
            "running": sum(variant.running for variant in state.snapshot.variants.values()),
            "waiting": sum(variant.waiting for variant in state.snapshot.variants.values()),
            "queued_tokens": state.queued_tokens,
            "swaps": sum(variant.figures.swaps for variant in state.snapshot.variants.values()),
        }
        for name, states in found.items()
        for state in states
    ]
    if as_json:
        print_json("status", {"replicas": rows})
        return
    if not rows:
        typer.echo("Nothing is deployed.")
        return
    columns = list(rows[0])
    shown = [[", ".join(v) if isinstance(v, list) else v for v in row.values()] for row in rows]
    print_table("Replicas", [column.replace("_", " ") for column in columns], shown)
