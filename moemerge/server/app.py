"""The application: every route, behind the gate for keys, with one shape for errors."""

from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from moemerge import __version__
from moemerge.server.chat import chat
from moemerge.server.completions import completions
from moemerge.server.handlers import install_handlers
from moemerge.server.health import health
from moemerge.server.keys import OPEN_PATHS, KeyGate
from moemerge.server.metrics import HttpCounter, build_registry
from moemerge.server.models import changes, models, variants
from moemerge.server.page import render_page
from moemerge.server.responses import Error
from moemerge.server.serving import Serving
from moemerge.server.tokens import tokens


def build_app(serving: Serving) -> FastAPI:
    """An application over a service that has been started."""
    options = serving.options
    app = FastAPI(
        title="moemerge",
        version=__version__,
        description=f"Variants of {serving.bundle.folder.name} behind OpenAI's API.",
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        servers=[{"url": options.root_path}] if options.root_path else None,
        redirect_slashes=False,
        responses={"4XX": {"model": Error}, "5XX": {"model": Error}},
    )
    app.state.serving = serving
    app.state.registry = build_registry(serving.service)
    for router in (completions, chat, tokens, models, variants, changes, health):
        app.include_router(router)
    install_handlers(app)
    if options.docs:
        _add_description(app, with_keys=bool(options.api_keys))
    app.add_middleware(KeyGate, keys=options.api_keys)
    app.add_middleware(HttpCounter, registry=app.state.registry)
    return app


def _add_description(app: FastAPI, *, with_keys: bool) -> None:
    description = _describe(app, with_keys=with_keys)

    @app.get("/openapi.json", include_in_schema=False)
    async def show_description() -> dict[str, Any]:
        return description

    @app.get("/docs", include_in_schema=False)
    async def show_page() -> HTMLResponse:
        return HTMLResponse(render_page(description))


def _describe(app: FastAPI, *, with_keys: bool) -> dict[str, Any]:
    """OpenAPI of the routes; the framework would announce 422 where this server answers 400."""
    description = app.openapi()
    for path, methods in description["paths"].items():
        for operation in methods.values():
            operation["responses"].pop("422", None)
            if with_keys and path not in OPEN_PATHS:
                operation["security"] = [{"key": []}]
    schemas = description["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    if with_keys:
        description["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return description
