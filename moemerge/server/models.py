"""`/v1/models`: the variants, as OpenAI lists models; `/variants`: who is served, resident, pinned."""

from fastapi import APIRouter, Depends, Request

from moemerge.server.errors import ApiError, Kind
from moemerge.server.responses import Model, ModelList, VariantList, VariantStatus
from moemerge.server.serving import Serving, ServingOf

_FROM_PAGE = Kind(403, "permission_error", "cross_origin")


def _refuse_pages(request: Request) -> None:
    """These requests need no body, so that any web page could send them through a visitor's browser."""
    if "origin" in request.headers:
        raise ApiError(_FROM_PAGE, "variants are not changed from web pages (the request has an Origin)")


models = APIRouter(tags=["models"])
variants = APIRouter(prefix="/variants", tags=["variants"])
changes = APIRouter(prefix="/variants", tags=["variants"], dependencies=[Depends(_refuse_pages)])


@models.head("/v1/models", include_in_schema=False)
@models.get("/v1/models")
async def list_models(serving: ServingOf) -> ModelList:
    """The variants that are served."""
    return ModelList(object="list", data=[_model(serving, name) for name in serving.service.variants])


@models.get("/v1/models/{model}")
async def show_model(model: str, serving: ServingOf) -> Model:
    """One of them."""
    return _model(serving, serving.require(model))


@variants.get("")
async def list_variants(serving: ServingOf) -> VariantList:
    """Every variant of the bundle and where it stands."""
    names = serving.bundle.manifest.variants
    return VariantList(bundle=serving.bundle.folder.name, variants=[_status(serving, name) for name in names])


# In worker threads: the engine answers between two steps.


@changes.post("/{name}")
def add_variant(name: str, serving: ServingOf) -> VariantStatus:
    """Serve a variant of the bundle that is not served so far."""
    serving.service.add_variant(name)
    return _status(serving, name)


@changes.delete("/{name}")
def remove_variant(name: str, serving: ServingOf) -> VariantStatus:
    """Serve a variant no more; its requests end with an error, its memory is free."""
    serving.service.remove_variant(name)
    return _status(serving, name)


@changes.post("/{name}/pin")
def pin_variant(name: str, serving: ServingOf) -> VariantStatus:
    """Make a variant resident and keep it."""
    serving.service.pin(name)
    return _status(serving, name)


@changes.post("/{name}/unpin")
def unpin_variant(name: str, serving: ServingOf) -> VariantStatus:
    """Keep a variant no more than others."""
    serving.service.unpin(name)
    return _status(serving, name)


def _model(serving: Serving, name: str) -> Model:
    return Model(
        id=name,
        object="model",
        created=serving.started_s,
        owned_by="moemerge",
        root=serving.bundle.folder.name,
        max_model_len=serving.service.limits_of(name).context_tokens,
    )


def _status(serving: Serving, name: str) -> VariantStatus:
    state = serving.service.snapshot().variants.get(name)
    if state is None:
        return VariantStatus(name=name, served=False)
    return VariantStatus(
        name=name,
        served=True,
        state=state.state,
        pinned=state.pinned,
        waiting=state.waiting,
        running=state.running,
    )
