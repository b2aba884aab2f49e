"""The application: routes, errors, beginning and end."""

from __future__ import annotations

import asyncio
import contextlib
import mimetypes
from collections.abc import AsyncIterator
from functools import cache
from importlib.resources import files
from typing import Any

from starlette.datastructures import State
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, Router

from hybridlm.errors import HybridLMError
from hybridlm.server import anthropic, ollama, openai
from hybridlm.server.errors import ApiError
from hybridlm.server.guard import Guard
from hybridlm.server.metrics import Metrics
from hybridlm.server.models import Model, Models
from hybridlm.server.openapi import document
from hybridlm.server.settings import Settings
from hybridlm.server.wire import Json

__all__ = ["create_app"]

# The page uses nothing from elsewhere and says so: a text that a model wrote cannot load or send anything.
_PAGE_POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
                "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
_PAGE = {"": "index.html", "app.js": "app.js", "chats.js": "chats.js", "markdown.js": "markdown.js",
         "style.css": "style.css", "icon.svg": "icon.svg"}


def create_app(models: list[Model], settings: Settings | None = None) -> Guard:
    """The server for some models as an ASGI application."""
    settings = settings or Settings()
    served, metrics = Models(models, settings), Metrics()

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        try:
            await served.preload()
        except HybridLMError as error:
            guard.state.failed = error
            raise
        tending = asyncio.create_task(served.tend())
        try:
            yield
        finally:
            tending.cancel()
            await served.close()

    router = Router(lifespan=lifespan, redirect_slashes=False, routes=[
        Route("/v1/chat/completions", openai.chat, methods=["POST"]),
        Route("/v1/completions", openai.completions, methods=["POST"]),
        Route("/v1/models", openai.models),
        Route("/v1/models/{name:path}", openai.model),
        Route("/v1/messages", anthropic.messages, methods=["POST"]),
        Route("/v1/messages/count_tokens", anthropic.count, methods=["POST"]),
        Route("/api/chat", ollama.chat, methods=["POST"]),
        Route("/api/generate", ollama.generate, methods=["POST"]),
        Route("/api/tags", ollama.tags),
        Route("/api/ps", ollama.ps),
        Route("/api/show", ollama.show, methods=["POST"]),
        Route("/api/version", ollama.version),
        Route("/openapi.json", _document),
        Route("/metrics", _metrics),
        Route("/health", _health),
        Route("/ready", _ready),
        Route("/", _page),
        Route("/page/{file}", _page),
    ])
    guard = Guard(router, State({"models": served, "settings": settings, "metrics": metrics, "failed": None}))
    return guard


async def _health(request: Request) -> Response:
    return Json({"status": "ok"})


async def _ready(request: Request) -> Response:
    if not request.app.state.models.ready:
        raise ApiError(503, "not ready: models are being opened or closed", retry_after=1)
    return Json({"status": "ready"})


async def _metrics(request: Request) -> Response:
    return PlainTextResponse(request.app.state.metrics.text(request.app.state.models),
                             media_type="text/plain; version=0.0.4")


async def _document(request: Request) -> Response:
    return Json(document())


async def _page(request: Request) -> Response:
    name = _PAGE.get(request.path_params.get("file", ""))
    if name is None:
        raise ApiError(404, "not found")
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    return Response(_asset(name), media_type=kind, headers={"content-security-policy": _PAGE_POLICY,
                                                            "referrer-policy": "no-referrer",
                                                            "cache-control": "no-cache"})


@cache
def _asset(name: str) -> bytes:
    return (files("hybridlm.server") / "page" / name).read_bytes()
