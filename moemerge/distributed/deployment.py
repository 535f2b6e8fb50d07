"""Bundles served by a cluster: for each an application of Ray Serve, replicas behind a front door.

The application has the bundle's name. Deployed again, its replicas are replaced while the others answer.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import (
    AutoscalingConfig,
    AutoscalingContext,
    AutoscalingPolicy,
    HTTPOptions,
    RequestRouterConfig,
)
from ray.serve.exceptions import RayServeException

from moemerge.bundle.manifest import CHECKSUMS, MANIFEST
from moemerge.bundle.reader import open_bundle
from moemerge.checkpoint.digest import hash_file
from moemerge.distributed.cluster import Cluster
from moemerge.distributed.replica import QUEUED_TOKENS, Replica, ReplicaState
from moemerge.distributed.routing import VariantRouter
from moemerge.distributed.service import ReplicaService
from moemerge.errors import ClusterFailure, Finding, InvalidRecipe, NotFound, list_findings
from moemerge.runner.options import EngineOptions
from moemerge.server.app import build_app
from moemerge.server.options import ServerOptions
from moemerge.server.serving import ServedVariant, Serving
from moemerge.text.variants import VariantText

TOKENS_PER_REPLICA = 16384
"""Queued tokens beyond which another replica is started."""
GROW_AFTER_S, SHRINK_AFTER_S = 10.0, 300.0
"""How long there must be more to do, or less, before a replica is started or ended."""
# Longer than replicas take between telling, which is ten seconds.
_LOOK_BACK_S = 15.0
_REPLICA, _FRONT = "replica", "front"
_STATS_EVERY_S = 0.5
_DRAIN_S = 60.0
# A front door computes little, and every replica schedules by itself.
_MANY = 100_000
_ANSWER_S = 10.0
_POLL_S = 0.2
RouterClass = type[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployOptions:
    """How a bundle is served.

    Attributes:
        min_replicas, max_replicas: Bounds of their number; between them it follows queued tokens.
        engine: Of every replica.
        threads: Of torch, and processors that are reserved, for each replica.
        max_queue: Requests that may wait; further ones are refused.
        api_keys: One of them is asked for, when there are any.
        router: Decides who answers; see `routing`.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    engine: EngineOptions = field(default_factory=EngineOptions)
    threads: int = 1
    max_queue: int = 1024
    api_keys: tuple[str, ...] = ()
    router: RouterClass = VariantRouter

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise InvalidRecipe(
                f"--replicas {self.min_replicas}-{self.max_replicas}: expected MIN-MAX with 1 <= MIN <= MAX"
            )


@serve.ingress()
class FrontDoor:
    """The application of `serve`, in front of replicas.

    Args:
        replicas: Handle of their deployment.
        folder: The bundle, on a path that this node sees.
        version: See `Replica`.
        max_batch: Requests that all replicas together may compute at once.
        max_queue: Requests that may wait.
        api_keys: One of them is asked for, when there are any.
    """

    async def __init__(  # type: ignore[misc]  # Ray Serve waits for it
        self,
        replicas: Any,
        folder: str,
        version: str,
        max_batch: int,
        max_queue: int,
        api_keys: tuple[str, ...],
    ) -> None:
        self._bundle = open_bundle(Path(folder))
        self._options = ServerOptions(api_keys=api_keys, docs=False)
        self._service = ReplicaService(replicas, max_batch, max_queue)
        await self._service.begin()

    def __serve_build_asgi_app__(self) -> FastAPI:
        serving = Serving(bundle=self._bundle, service=self._service, options=self._options)
        for name in self._service.variants:
            serving.variant(name).require_readable()
        return build_app(serving)


def name_of(folder: Path) -> str:
    """What a bundle is called where several are served."""
    return folder.absolute().name.removesuffix(".moe")


def start_serving(host: str, port: int) -> None:
    """Listen on every node that has replicas or a front door; nothing changes where that is done already."""
    serve.start(http_options=HTTPOptions(host=host, port=port))


def deploy(cluster: Cluster, folder: Path, options: DeployOptions) -> str:
    """Serve a bundle, or replace what is served under its name; returns that name.

    Returns when the first replicas take requests.

    Raises:
        NotFound: A node does not see the bundle.
        DamagedBundle, UnsupportedCheckpoint: It cannot be read, or a variant has no tokenizer.
        ClusterFailure: No replica came up.
    """
    folder = folder.absolute()
    bundle = open_bundle(folder)
    for variant in options.engine.variants or bundle.manifest.variants:
        ServedVariant(VariantText(bundle, variant)).require_readable()
    _require_visible(cluster, folder)
    # So many may come to one node, and each is to leave memory for the others.
    beside = min(options.max_replicas, max(int(node.cpus // options.threads) for node in cluster.nodes()))
    engine = replace(options.engine, memory_share=options.engine.memory_share / max(1, beside))
    options = replace(options, engine=engine)
    name = name_of(folder)
    try:
        serve.run(_application(folder, options), name=name, route_prefix=f"/{name}")
    except (RuntimeError, RayServeException) as error:
        raise ClusterFailure(f"{folder}: no replica came up. {error}") from error
    return name


def withdraw(names: Sequence[str]) -> None:
    """Serve bundles no more; running requests have time to end.

    Raises:
        NotFound: One of them is not served; then all go on.
        ClusterFailure: Some are still there when that time is over.
    """
    served = served_names()
    if unknown := [name for name in names if name not in served]:
        raise NotFound(f"no bundle {unknown[0]!r} is served here; there are: {', '.join(served) or 'none'}")
    for name in names:
        serve.delete(name, _blocking=False)
    deadline = time.monotonic() + _DRAIN_S + _ANSWER_S
    while left := [name for name in names if name in served_names()]:
        if time.monotonic() > deadline:
            raise ClusterFailure(f"{', '.join(left)}: takes no new requests, but still answers old ones")
        time.sleep(_POLL_S)


def states_of(name: str) -> list[ReplicaState]:
    """Every replica of a served bundle.

    Raises:
        NotFound: Nothing is served under that name.
    """
    try:
        handle = serve.get_deployment_handle(_REPLICA, name)
        found = handle.broadcast("state").results(timeout_s=_ANSWER_S, return_exceptions=True)
    except (RayError, RayServeException, TimeoutError) as error:
        raise NotFound(f"no bundle {name!r} is served here ({error})") from error
    return sorted((s for s in found if isinstance(s, ReplicaState)), key=lambda state: state.replica_id)


def served_names() -> list[str]:
    """Bundles that are served."""
    return sorted(serve.status().applications)


def scale(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """As many replicas as share the queued tokens; see `AutoscalingPolicy`."""
    queued = (context.aggregated_metrics or {}).get(QUEUED_TOKENS, {})
    return max(1, math.ceil(sum(queued.values()) / TOKENS_PER_REPLICA)), {}


def _application(folder: Path, options: DeployOptions) -> serve.Application:
    version = _version_of(folder)
    # Ray's types say less than its documentation.
    router_of: Any = RequestRouterConfig
    policy_of: Any = AutoscalingPolicy
    replicas: Any = serve.deployment(Replica)
    front: Any = serve.deployment(FrontDoor)
    router = router_of(request_router_class=options.router, request_routing_stats_period_s=_STATS_EVERY_S)
    is_cuda = options.engine.device.startswith("cuda")
    settings: dict[str, Any] = {
        "max_ongoing_requests": _MANY,
        "graceful_shutdown_timeout_s": _DRAIN_S,
        "ray_actor_options": {"num_cpus": options.threads, "num_gpus": int(is_cuda)},
        "request_router_config": router,
    }
    if options.min_replicas == options.max_replicas:
        settings["num_replicas"] = options.max_replicas
    else:
        settings["autoscaling_config"] = AutoscalingConfig(
            min_replicas=options.min_replicas,
            max_replicas=options.max_replicas,
            upscale_delay_s=GROW_AFTER_S,
            downscale_delay_s=SHRINK_AFTER_S,
            look_back_period_s=_LOOK_BACK_S,
            policy=policy_of(policy_function=scale),
        )
    replicas = replicas.options(name=_REPLICA, **settings)
    front = front.options(
        name=_FRONT,
        max_ongoing_requests=_MANY,
        graceful_shutdown_timeout_s=_DRAIN_S,
        ray_actor_options={"num_cpus": 0},
    )
    bound = replicas.bind(str(folder), version, options.engine, options.threads)
    max_batch = options.engine.max_batch * options.max_replicas
    application: serve.Application = front.bind(
        bound, str(folder), version, max_batch, options.max_queue, options.api_keys
    )
    return application


def _version_of(folder: Path) -> str:
    """Of the bundle's content, so that another one under the same path replaces it."""
    return hash_file(folder / (CHECKSUMS if (folder / CHECKSUMS).is_file() else MANIFEST))


def _require_visible(cluster: Cluster, folder: Path) -> None:
    manifest = folder / MANIFEST
    answers = cluster.ask(_size_of, manifest)
    findings = [
        Finding(
            level="error",
            code="NOT_VISIBLE",
            where=f"node {node.name}",
            found=f"bundle not visible: {folder}",
            fix="Put it on storage that every node has under this path",
        )
        for node, size in answers.items()
        if size != manifest.stat().st_size
    ]
    if findings:
        raise NotFound(list_findings(findings, f"{folder.name} cannot be deployed"), findings)


def _size_of(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def quiet_logs() -> None:
    """Keep Serve's own messages off the terminal."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
