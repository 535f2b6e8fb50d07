"""`/health`, `/ready` and `/metrics`: for those who watch the server."""

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client.exposition import choose_encoder

from moemerge.server.errors import ApiError, Kind
from moemerge.server.responses import Status
from moemerge.server.serving import ServingOf

_DEAD = Kind(503, "server_error", "engine_stopped")
_NOT_READY = Kind(503, "server_error", "stopping")

health = APIRouter(tags=["health"])


@health.head("/health", include_in_schema=False)
@health.get("/health")
async def show_health(serving: ServingOf) -> Status:
    """Whether the engine's thread lives."""
    if not serving.service.is_alive:
        raise ApiError(_DEAD, "the engine has stopped")
    return Status(status="ok")


@health.head("/ready", include_in_schema=False)
@health.get("/ready")
async def show_ready(serving: ServingOf) -> Status:
    """Whether requests are taken; not while the server drains."""
    if not serving.service.is_ready:
        raise ApiError(_NOT_READY, "the server is stopping and takes no more requests", retry_after_s=5)
    return Status(status="ready")


@health.head("/metrics", include_in_schema=False)
@health.get("/metrics", response_class=Response)
def show_metrics(request: Request) -> Response:
    """Prometheus metrics, as text or, on demand, as OpenMetrics."""
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(request.app.state.registry), headers={"Content-Type": content_type})
