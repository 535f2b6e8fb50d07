"""Where a command's work is done: `--engine` and `--address`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Annotated

import typer

from moemerge.errors import InvalidRecipe, NotFound
from moemerge.execution import Executor, Local

if TYPE_CHECKING:
    from moemerge.distributed.cluster import Cluster

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
def open_executor(engine: str, address: str | None, max_ram: int | None) -> Iterator[Executor]:
    """What `--engine` names, connected; a local one stays within that many bytes of memory.

    Raises:
        InvalidRecipe: There is no such engine.
        NotFound, ClusterFailure, IncompatibleInputs: As `open_cluster`.
    """
    if engine == LOCAL:
        yield Local(max_ram)
        return
    if engine != RAY:
        raise InvalidRecipe(f"--engine {engine!r}, expected {LOCAL} or {RAY}")
    with open_cluster(address) as cluster:
        from moemerge.distributed.executor import OnCluster

        yield OnCluster(cluster)


@contextmanager
def open_cluster(address: str | None) -> Iterator["Cluster"]:
    """The Ray cluster at an address, connected.

    Raises:
        NotFound: Ray is not installed.
        ClusterFailure, IncompatibleInputs: As `Cluster`.
    """
    try:
        from moemerge.distributed.cluster import AUTO, Cluster
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise NotFound(
            "ray is not installed, which clusters need. Run pip install 'moemerge[ray,serve]' (from a clone: "
            "pip install -e '.[ray,serve]')"
        ) from error
    # Ray tells of lost nodes where results belong.
    with redirect_stdout(sys.stderr), Cluster(address or AUTO) as cluster:
        yield cluster
