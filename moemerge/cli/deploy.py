"""`moemerge deploy`."""

import re
from pathlib import Path
from typing import Annotated

import typer

from moemerge.cli.command import JsonOption, QuietOption, hint, print_json
from moemerge.cli.engine import DeviceOption, DtypeOption, ResidentOption, check_resident
from moemerge.cli.executors import AddressOption, open_cluster
from moemerge.errors import InvalidRecipe

_REPLICAS = re.compile(r"(\d+)(?:-(\d+))?")


def deploy(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="Bundles that every node sees.")],
    address: AddressOption = None,
    replicas: Annotated[
        str,
        typer.Option("--replicas", metavar="MIN-MAX", help="Of each bundle; their number follows the load."),
    ] = "1",
    resident: ResidentOption = "all",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    threads: Annotated[
        int, typer.Option("--threads", min=1, help="Processors that each replica has for itself.")
    ] = 1,
    max_batch: Annotated[
        int, typer.Option("--max-batch", min=1, help="Requests that run at once in each replica.")
    ] = 64,
    max_queue: Annotated[
        int, typer.Option("--max-queue", min=0, help="Requests that may wait; further ones get 503.")
    ] = 1024,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file", metavar="FILE", help="Ask for one of these keys, one per line, mode 600."
        ),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address that nodes listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port of the nodes.")] = 8000,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Serve bundles from the nodes of a Ray cluster, each under its name.

    The same interface as moemerge serve, at /NAME/v1. Requests go to a replica that has their variant in
    memory, or to one that has far less to do. A bundle that is deployed again replaces the one before.

    Example: moemerge deploy trio.moe --address 10.0.0.1:6379 --replicas 1-4
    """
    least, most = _parse_replicas(replicas)
    check_resident(resident)
    with open_cluster(address) as cluster:
        from moemerge.distributed import deployment
        from moemerge.runner.options import EngineOptions
        from moemerge.server.keys import read_keys

        options = deployment.DeployOptions(
            min_replicas=least,
            max_replicas=most,
            engine=EngineOptions(device=device, dtype=dtype, resident=resident, max_batch=max_batch),
            threads=threads,
            max_queue=max_queue,
            api_keys=read_keys(api_key_file) if api_key_file else (),
        )
        deployment.quiet_logs()
        deployment.start_serving(host, port)
        names = [deployment.deploy(cluster, bundle, options) for bundle in bundles]
    urls = {name: f"http://{host}:{port}/{name}/v1" for name in names}
    if as_json:
        print_json("deploy", {"bundles": urls})
        return
    for name, url in urls.items():
        typer.echo(f"{name}: {url}")
    if not quiet:
        hint("moemerge status tells how replicas stand.")


def _parse_replicas(text: str) -> tuple[int, int]:
    """Least and most.

    Raises:
        InvalidRecipe: Neither a number nor MIN-MAX.
    """
    found = _REPLICAS.fullmatch(text)
    if found is None:
        raise InvalidRecipe(f"--replicas {text!r}, expected a number, or MIN-MAX such as 1-4")
    least = int(found[1])
    return least, int(found[2] or least)
