"""What every handler needs: the engine's service, the variants' texts, the options."""

import asyncio
import hashlib
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Protocol

from fastapi import Depends, Request

from moemerge.bundle.reader import Bundle
from moemerge.runner.intake import VariantLimits
from moemerge.runner.metrics import Snapshot
from moemerge.runner.request import Request as EngineRequest
from moemerge.runner.service import Listener
from moemerge.server.errors import ApiError, Kind, invalid
from moemerge.server.logprobs import TokenNames
from moemerge.server.options import ServerOptions
from moemerge.text.variants import VariantText

_OPENAI_TEMPERATURE = 1.0
_UNKNOWN_MODEL = Kind(404, "invalid_request_error", "model_not_found")


class Service(Protocol):
    """What answers requests: one engine, or replicas of it elsewhere. Contracts stand at `EngineService`."""

    @property
    def is_alive(self) -> bool:
        """It can answer at all."""
        ...

    @property
    def is_ready(self) -> bool:
        """Requests are taken."""
        ...

    @property
    def variants(self) -> Mapping[str, VariantLimits]:
        """Variants that are served, and what requests to them may hold."""
        ...

    def limits_of(self, variant: str) -> VariantLimits:
        """What a request to a variant may hold."""
        ...

    def submit(self, request: EngineRequest, listener: Listener) -> None:
        """Hand in a request."""
        ...

    def cancel(self, request_id: str) -> None:
        """End a request."""
        ...

    def add_variant(self, variant: str) -> None:
        """Serve a variant that is not served so far."""
        ...

    def remove_variant(self, variant: str) -> None:
        """Serve a variant no more."""
        ...

    def pin(self, variant: str) -> None:
        """Make a variant resident and keep it."""
        ...

    def unpin(self, variant: str) -> None:
        """Keep a variant no more than others."""
        ...

    def snapshot(self) -> Snapshot:
        """Figures of this moment, or nearly so."""
        ...


class ServedVariant:
    """The text side of a variant, with what is asked of it again and again."""

    def __init__(self, text: VariantText) -> None:
        """Read the variant's files; not for the event loop.

        Raises:
            NotFound, DamagedInput, InvalidRecipe: Files are missing, or cannot be what they should be.
        """
        self.text = text
        self.names = TokenNames(text.tokenizer)
        self.recommended = text.recommended(otherwise=_OPENAI_TEMPERATURE)

    def require_readable(self) -> None:
        """Read what is otherwise read when it is first needed.

        Raises:
            DamagedInput: The chat template is none.
        """
        _ = self.text.chat_template, self.text.stop_ids


@dataclass(frozen=True, kw_only=True)
class Serving:
    """One bundle that is served.

    Attributes:
        started_s: Unix time of the start; models are listed as created then.
        stopping: Set, on the event loop, when the server begins to stop.
    """

    bundle: Bundle
    service: Service
    options: ServerOptions = field(default_factory=ServerOptions)
    started_s: int = field(default_factory=lambda: int(time.time()))
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    _variants: dict[str, ServedVariant] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def require(self, model: str) -> str:
        """The name of a variant that is served.

        Raises:
            ApiError: It is not; the message lists those that are.
        """
        variants = self.service.variants
        if model not in variants:
            raise ApiError(
                _UNKNOWN_MODEL,
                f"no model {model[:100]!r}; there are {', '.join(variants) or 'none'}",
                param="model",
            )
        return model

    def require_tokenizer(self, model: str | None) -> "ServedVariant":
        """The variant of that name; without a name any, if all have one tokenizer. Not for the event loop.

        Raises:
            ApiError: It is not served, or there are several tokenizers to choose from.
            NotFound, DamagedInput, InvalidRecipe: As `ServedVariant`.
        """
        names = list(self.service.variants)
        if model is None and names and len({self._tokenizer_digest(name) for name in names}) == 1:
            return self.variant(names[0])
        if model is None:
            raise invalid("the variants' tokenizers differ; name one", "model")
        return self.variant(self.require(model))

    def variant(self, name: str) -> ServedVariant:
        """A variant's text side; reads files the first time, so not for the event loop.

        Raises:
            NotFound, DamagedInput, InvalidRecipe: As `ServedVariant`.
        """
        with self._lock:
            if name not in self._variants:
                self._variants[name] = ServedVariant(VariantText(self.bundle, name))
            return self._variants[name]

    def _tokenizer_digest(self, name: str) -> bytes:
        path = self.bundle.side_file(name, "tokenizer.json")
        return hashlib.sha256(path.read_bytes()).digest() if path else b""


def _serving_of(request: Request) -> Serving:
    serving: Serving = request.app.state.serving
    return serving


ServingOf = Annotated[Serving, Depends(_serving_of)]
