"""Where a command's work is done: `--engine` and `--address`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Annotated

import typer

from moemerge.errors import InvalidRecipe
from moemerge.execution import Executor, Local

LOCAL, RAY = "local", "ray"

ExecutorOption = Annotated[
    str, typer.Option("--engine", help="local, or ray for the nodes of a cluster.", envvar="MOEMERGE_ENGINE")
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="HOST:PORT",
        help="Of the Ray cluster; by default that which this machine is a node of.",
        envvar="RAY_ADDRESS",
    ),
]


@contextmanager
def open_executor(engine: str, address: str | None) -> Iterator[Executor]:
    """What `--engine` names, connected.

    Raises:
        InvalidRecipe: There is no such engine, or it is not installed.
        ClusterFailure, IncompatibleInputs: As `Cluster`.
    """
    if engine == LOCAL:
        yield Local()
        return
    if engine != RAY:
        raise InvalidRecipe(f"--engine {engine!r}, expected {LOCAL} or {RAY}")
    try:
        from moemerge.distributed.cluster import AUTO, Cluster
        from moemerge.distributed.executor import OnCluster
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise InvalidRecipe(
            "ray is not installed, which --engine ray needs. Run pip install 'moemerge[ray]'"
        ) from error
    # Ray tells of lost nodes where results belong.
    with redirect_stdout(sys.stderr), Cluster(address or AUTO) as cluster:
        yield OnCluster(cluster)
