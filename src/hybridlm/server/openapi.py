"""The OpenAPI document, from the pydantic models that check the requests."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from hybridlm import __version__
from hybridlm.server import anthropic, ollama
from hybridlm.server.openai_types import ChatRequest, CompletionRequest

__all__ = ["document"]

_POSTS: dict[str, tuple[type[BaseModel], str, str | None]] = {  # path: request, meaning, type of the streamed answer
    "/v1/chat/completions": (ChatRequest, "OpenAI: answer a conversation.", "text/event-stream"),
    "/v1/completions": (CompletionRequest, "OpenAI: continue a text.", "text/event-stream"),
    "/v1/messages": (anthropic.MessagesRequest, "Anthropic: answer a conversation.", "text/event-stream"),
    "/v1/messages/count_tokens": (anthropic.CountRequest, "Anthropic: count a prompt's tokens.", None),
    "/api/chat": (ollama.ChatRequest, "Ollama: answer a conversation.", "application/x-ndjson"),
    "/api/generate": (ollama.GenerateRequest, "Ollama: continue a text or answer a prompt.", "application/x-ndjson"),
    "/api/show": (ollama.ShowRequest, "Ollama: what is known of a model.", None),
}
_GETS = {
    "/v1/models": "OpenAI: the models.", "/v1/models/{name}": "OpenAI: one model.", "/api/tags": "Ollama: the models.",
    "/api/ps": "Ollama: the open models.", "/api/version": "Ollama: the version.", "/health": "The process is alive.",
    "/ready": "Models are open and requests are taken.",
}


@cache
def document() -> dict[str, Any]:
    """OpenAPI 3.1."""
    models = list(dict.fromkeys(model for model, _, _ in _POSTS.values()))
    names, schemas = models_json_schema([(m, "validation") for m in models],
                                        ref_template="#/components/schemas/{model}")
    paths: dict[str, Any] = {}
    for path, (model, meaning, streamed) in _POSTS.items():
        content = {"application/json": {"schema": {"type": "object"}}}
        if streamed:
            content[streamed] = {"schema": {}}
        paths[path] = {"post": {
            "summary": meaning, "requestBody": {"required": True, "content": {"application/json": {
                "schema": names[model, "validation"]}}},
            "responses": {"200": {"description": "The answer.", "content": content}, **_errors()}}}
    for path, meaning in _GETS.items():
        operation: dict[str, Any] = {"summary": meaning, "responses": {
            "200": {"description": "The answer.", "content": {"application/json": {"schema": {"type": "object"}}}},
            **_errors()}}
        if "{name}" in path:
            operation["parameters"] = [{"name": "name", "in": "path", "required": True,
                                        "schema": {"type": "string", "minLength": 1}}]
        paths[path] = {"get": operation}
    paths["/metrics"] = {"get": {"summary": "Figures for Prometheus.", "responses": {
        "200": {"description": "Text format 0.0.4.", "content": {"text/plain": {"schema": {"type": "string"}}}},
        **_errors()}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "hybridlm", "version": __version__,
                 "description": "OpenAI's, Ollama's and Anthropic's APIs over hybrid language models."},
        "paths": paths,
        "components": {"schemas": schemas.get("$defs", {}),
                       "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}},
    }


def _errors() -> dict[str, Any]:
    body = {"application/json": {"schema": {"type": "object"}}}
    return {"4XX": {"description": "Told in the API's own form: what is wrong and what to do.", "content": body},
            "503": {"description": "Shutting down, or no memory for the model now; see Retry-After.", "content": body}}
