"""A Ray cluster that this process is connected to, and the nodes of it that can do work."""

import logging
import os
import platform
import signal
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType
from typing import TypeVar

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moemerge import __version__
from moemerge.errors import ClusterFailure, Finding, IncompatibleInputs, InvalidRecipe, raise_findings

AUTO = "auto"
_ANSWER_S = 5.0
_PROBE_S = 60.0
# The first bytes of an HTTP/2 connection, and an empty frame of settings.
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
_SETTINGS = 4
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Node:
    """A node that is alive.

    Attributes:
        node_id: Ray's.
        name: For messages: host, address and the beginning of the id.
        cpus: That it offers.
        memory_bytes: That it offers.
    """

    node_id: str
    name: str
    cpus: float
    memory_bytes: int


class Cluster(AbstractContextManager["Cluster"]):
    """Connected from the first to the last line of a `with`.

    Args:
        address: HOST:PORT, or `auto` for the cluster that this machine is a node of.

    Raises:
        ClusterFailure: There is no cluster.
        IncompatibleInputs: A node runs another moemerge, torch, Python or Ray.
        InvalidRecipe: Not an address.
    """

    def __init__(self, address: str = AUTO) -> None:
        self.address = address
        if address != AUTO:
            _require_answer(address)
        _connect(address)
        try:
            self.driver_id: str = ray.get_runtime_context().get_node_id()
            self._require_versions()
        except BaseException:
            ray.shutdown()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ray.shutdown()

    def nodes(self) -> list[Node]:
        """Nodes that are alive and offer processors."""
        return [
            Node(
                found["NodeID"],
                f"{found['NodeManagerHostname']} ({found['NodeManagerAddress']}, {found['NodeID'][:8]})",
                found["Resources"].get("CPU", 0.0),
                int(found["Resources"].get("memory", 0)),
            )
            for found in ray.nodes()  # type: ignore[no-untyped-call]  # not annotated
            if found["Alive"] and found["Resources"].get("CPU")
        ]

    def ask(self, question: Callable[..., Answer], *arguments: object) -> dict[Node, Answer]:
        """What a function gives on each node; nodes that are lost meanwhile have no say.

        Raises:
            ClusterFailure: No node offers processors.
        """
        nodes = self.nodes()
        if not nodes:
            raise ClusterFailure(f"the Ray cluster at {self.address} has no node with processors")
        remote = ray.remote(num_cpus=0, max_retries=0)(question)
        asked = {
            node: remote.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)
            ).remote(*arguments)
            for node in nodes
        }
        answers: dict[Node, Answer] = {}
        for node, reference in asked.items():
            try:
                answers[node] = ray.get(reference, timeout=_PROBE_S)
            except RayError as error:
                if node in self.nodes():
                    raise ClusterFailure(f"node {node.name} cannot be asked ({error})") from error
        return answers

    def _require_versions(self) -> None:
        """Refuse nodes that would compute something else, or nothing."""

        # A function in a function is sent as it is, also to nodes that have no moemerge.
        def versions() -> dict[str, str]:
            found = {"Python": platform.python_version()}
            for package in ("moemerge", "torch", "ray"):
                try:
                    found[package] = version(package)
                except PackageNotFoundError:
                    found[package] = "none"
            try:
                from moemerge import __version__ as imported

                found["moemerge"] = imported
            except ImportError:
                found["moemerge"] = "none"
            return found

        own = versions() | {"moemerge": __version__}
        findings = [
            Finding(
                level="error",
                code="OTHER_VERSION",
                where=f"node {node.name}",
                found=f"{name} {found}",
                expected=f"{own[name]}, as here",
                fix="Install the same on every node",
            )
            for node, answer in self.ask(versions).items()
            for name, found in answer.items()
            if found != own[name]
        ]
        raise_findings(findings, f"nodes of the Ray cluster at {self.address} cannot do this work")


def _connect(address: str) -> None:
    """Have Ray connect, without letting it take over signals and output."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        ray.init(
            address=address,
            namespace="moemerge",
            log_to_driver=False,
            logging_level=logging.ERROR,
            ignore_reinit_error=False,
        )
    except ConnectionError as error:
        raise _no_cluster(address) from error
    except RuntimeError as error:
        if "ersion mismatch" not in str(error):
            raise
        raise IncompatibleInputs(
            f"the Ray cluster at {address} runs another Ray or Python than this process. Install the same on "
            f"every node. {error}"
        ) from error
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)


def _require_answer(address: str) -> None:
    """Make sure that something speaks Ray's protocol there; Ray itself would try for minutes, then exit.

    Raises:
        InvalidRecipe: Not HOST:PORT.
        ClusterFailure: Nothing answers, or something else.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise InvalidRecipe(f"--address {address!r}, expected HOST:PORT of a Ray cluster, or {AUTO}")
    # Where Ray will connect to: it takes this machine's name for the address that other machines know.
    reached = _own_address() if host in _LOOPBACK else host.strip("[]")
    try:
        with socket.create_connection((reached, int(port)), timeout=_ANSWER_S) as connection:
            connection.sendall(_GREETING)
            head = connection.recv(9, socket.MSG_WAITALL)
    except (OSError, OverflowError) as error:
        raise _no_cluster(address) from error
    # gRPC answers with settings of its own: length in three bytes, kind, flags, stream.
    if len(head) < 9 or struct.unpack(">3sBBI", head)[1] != _SETTINGS:
        raise _no_cluster(address)


def _own_address() -> str:
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]  # not annotated


def _no_cluster(address: str) -> ClusterFailure:
    where = "on this machine" if address == AUTO else f"at {address}"
    return ClusterFailure(
        f"there is no Ray cluster {where}. Start one with `ray start --head`, let other machines join it "
        f"with `ray start --address`, and give --address HOST:PORT"
    )
