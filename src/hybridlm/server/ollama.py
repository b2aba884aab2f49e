"""Ollama's API: generate, chat, tags, show, ps, version. Lines of JSON; durations in nanoseconds."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from hybridlm import __version__
from hybridlm.server import serve
from hybridlm.server.answer import Answer, Part
from hybridlm.server.ask import Ask
from hybridlm.server.errors import ApiError, error_body
from hybridlm.server.models import Loaded, Model
from hybridlm.server.wire import Json, dump, read_json

__all__ = ["chat", "generate", "ps", "show", "tags", "version"]


class Options(BaseModel):
    num_predict: int | None = Field(None, ge=-2)
    temperature: float | None = Field(0.8, ge=0, le=100)
    top_k: int | None = Field(40, ge=0, le=2**31)
    top_p: float | None = Field(0.9, gt=0, le=1)
    min_p: float | None = Field(0.0, ge=0, le=1)
    repeat_penalty: float | None = Field(1.0, ge=0.01, le=100)
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2)
    presence_penalty: float | None = Field(0.0, ge=-2, le=2)
    seed: int | None = None
    stop: str | list[str] | None = None


class Common(BaseModel):
    model: str = Field(max_length=300)
    stream: bool | None = True
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: Options | None = None
    keep_alive: str | float | None = Field(None, description="Seconds, or a text such as 5m; below 0 is for ever.")
    think: bool | str | None = None


class GenerateRequest(Common):
    """POST /api/generate"""

    prompt: str = ""
    system: str | None = None
    raw: bool | None = False


class CalledFunction(BaseModel):
    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class ToolCall(BaseModel):
    function: CalledFunction


class Message(BaseModel):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = ""
    thinking: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_name: str | None = None


class Function(BaseModel):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    type: Literal["function"] | None = "function"
    function: Function


class ChatRequest(Common):
    """POST /api/chat"""

    messages: list[Message] = Field(default_factory=list)
    tools: list[Tool] | None = Field(None, max_length=128)


class ShowRequest(BaseModel):
    """POST /api/show"""

    model: str | None = Field(None, max_length=300)
    name: str | None = Field(None, max_length=300)


# -- in ----------------------------------------------------------------------------------------------------------


def _ask(r: Common) -> Ask:
    o = r.options or Options.model_validate({})
    sampling: dict[str, Any] = {
        "temperature": 0.8 if o.temperature is None else o.temperature, "top_k": 40 if o.top_k is None else o.top_k,
        "top_p": 0.9 if o.top_p is None else o.top_p, "min_p": o.min_p or 0.0,
        "repetition_penalty": o.repeat_penalty or 1.0, "frequency_penalty": o.frequency_penalty or 0.0,
        "presence_penalty": o.presence_penalty or 0.0, "seed": None if o.seed is None else abs(o.seed)}
    stop = (o.stop,) if isinstance(o.stop, str) else tuple(o.stop or ())
    if len(stop) > 16 or not all(stop):
        raise ApiError(400, "options.stop: at most 16 texts, none of them empty")
    ask = Ask(model=r.model, sampling=sampling, stop=stop)
    ask.max_tokens = o.num_predict if o.num_predict is not None and o.num_predict >= 0 else None
    if r.format == "json":
        ask.constraint = ("json", None)
    elif isinstance(r.format, dict):
        ask.constraint = ("json_schema", r.format)
    if r.think is not None:
        ask.template = {"enable_thinking": bool(r.think)}
    return ask


def _seconds(value: str | float) -> float:
    """A keep_alive: seconds, or Go's notation of a duration."""
    units = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
    text = str(value).strip()
    for unit in ("ms", "s", "m", "h", ""):
        if text.endswith(unit):
            try:
                seconds = float(text.removesuffix(unit) if unit else text) * units.get(unit, 1.0)
            except ValueError:
                continue
            if not math.isnan(seconds):
                return math.inf if seconds < 0 else seconds
    raise ApiError(400, f"keep_alive: {text[:50]!r} is no duration; give seconds, or for instance 5m")


async def _keep(request: Request, r: Common) -> None:
    """Note how long the client wants the model to stay open afterwards."""
    if r.keep_alive is None:
        return
    seconds = _seconds(r.keep_alive)
    async with request.app.state.models.use(r.model) as loaded:
        loaded.keep_seconds = seconds


async def generate(request: Request) -> Response:
    """POST /api/generate"""
    r = await read_json(request, GenerateRequest)
    ask = _ask(r)
    await _keep(request, r)
    async with request.app.state.models.use(r.model) as loaded:
        if not r.prompt:
            return Json({"model": loaded.name, "created_at": _now(), "response": "", "done": True,
                         "done_reason": "unload" if r.keep_alive in (0, "0") else "load"})
        if loaded.can_chat and not r.raw:
            ask.messages = [{"role": "system", "content": r.system}] if r.system else []
            ask.messages.append({"role": "user", "content": r.prompt})
        else:
            ask.prompt = (r.system + "\n\n" if r.system else "") + r.prompt
        return await _respond(request, r, ask, lambda part: {"response": "", **(
            {"response": part.value} if part.kind == "text" else {"thinking": part.value})})


async def chat(request: Request) -> Response:
    """POST /api/chat"""
    r = await read_json(request, ChatRequest)
    ask = _ask(r)
    await _keep(request, r)
    if not r.messages:
        async with request.app.state.models.use(r.model) as loaded:
            return Json({"model": loaded.name, "created_at": _now(), "message": {"role": "assistant", "content": ""},
                         "done": True, "done_reason": "unload" if r.keep_alive in (0, "0") else "load"})
    ask.messages = [_message(m) for m in r.messages]
    ask.tools = [t.function.model_dump(exclude_none=True) for t in r.tools or ()]
    return await _respond(request, r, ask, lambda part: {"message": _delta(part)})


def _message(m: Message) -> dict[str, Any]:
    out: dict[str, Any] = {"role": m.role, "content": m.content or ""}
    if m.tool_calls:
        out["tool_calls"] = [{"id": "", "type": "function", "function": c.function.model_dump()}
                             for c in m.tool_calls]
    if m.tool_name:
        out["name"] = m.tool_name
    return out


# -- out ---------------------------------------------------------------------------------------------------------


def _delta(part: Part) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    if part.kind == "calls":
        message["tool_calls"] = [{"function": {"name": c.name, "arguments": c.arguments}} for c in part.value]
    else:
        message["content" if part.kind == "text" else "thinking"] = part.value
    return message


async def _respond(request: Request, r: Common, ask: Ask, written: Callable[[Part], dict[str, Any]]) -> Response:
    if r.stream is not False:
        return await serve.stream(request, [ask], "application/x-ndjson", lambda a: _lines(a[0], written), _failed)

    def whole(loaded: Loaded, done: list[serve.Collected]) -> dict[str, Any]:
        c = done[0]
        out = {**_head(c.answer), **written(Part("text", c.text())), **_end(c.answer)}
        inner = out.get("message", out)
        if thoughts := c.text("reasoning"):
            inner["thinking"] = thoughts
        if c.calls:
            inner["tool_calls"] = _delta(Part("calls", c.calls))["tool_calls"]
        return out

    return await serve.whole(request, [ask], whole)


async def _lines(answer: Answer, written: Callable[[Part], dict[str, Any]]) -> AsyncIterator[bytes]:
    async for part in answer:
        yield dump({**_head(answer), **written(part), "done": False}) + b"\n"
    yield dump({**_head(answer), **written(Part("text", "")), **_end(answer)}) + b"\n"


def _head(answer: Answer) -> dict[str, Any]:
    return {"model": answer.loaded.name, "created_at": _now()}


def _end(answer: Answer) -> dict[str, Any]:
    u = answer.usage
    return {"done": True, "done_reason": "length" if answer.finish == "length" else "stop",
            "total_duration": int(1e9 * (u.queue_seconds + u.prompt_seconds + u.completion_seconds)),
            "load_duration": 0, "prompt_eval_count": u.prompt_tokens, "prompt_eval_cached": u.cached_tokens,
            "prompt_eval_duration": int(1e9 * u.prompt_seconds), "eval_count": u.completion_tokens,
            "eval_duration": int(1e9 * u.completion_seconds)}


def _failed(error: ApiError) -> bytes:
    return dump(error_body("/api/chat", error)) + b"\n"


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


# -- models ------------------------------------------------------------------------------------------------------


def _details(loaded: Loaded | None) -> dict[str, Any]:
    config = loaded.engine.config if loaded else None
    parameters = f"{config.num_parameters() / 1e9:.2f}B" if config else ""
    return {"parent_model": "", "format": "gguf", "family": "olmo-hybrid", "families": ["olmo-hybrid"],
            "parameter_size": parameters, "quantization_level": ""}


def _entry(model: Model) -> dict[str, Any]:
    stamp = datetime.fromtimestamp(model.modified, UTC).isoformat().replace("+00:00", "Z")
    size = model.loaded.engine.model_bytes if model.loaded else model.nbytes
    return {"name": model.name, "model": model.name, "modified_at": stamp, "size": size, "digest": "",
            "details": _details(model.loaded)}


async def tags(request: Request) -> Response:
    """GET /api/tags"""
    return Json({"models": [_entry(m) for m in request.app.state.models.all.values()]})


async def ps(request: Request) -> Response:
    """GET /api/ps"""
    models = request.app.state.models
    entries = []
    for m in models.all.values():
        if m.loaded is not None:
            left = min(1e9, models.until(m, m.loaded) - time.monotonic())
            expires = (datetime.now(UTC) + timedelta(seconds=left)).isoformat().replace("+00:00", "Z")
            entries.append({**_entry(m), "expires_at": expires, "size_vram": 0,
                            "context_length": m.loaded.engine.context})
    return Json({"models": entries})


async def show(request: Request) -> Response:
    """POST /api/show"""
    r = await read_json(request, ShowRequest)
    async with request.app.state.models.use(r.model or r.name) as loaded:
        engine = loaded.engine
        template = engine.chat_template.source if loaded.can_chat else ""
        return Json({"modelfile": "", "parameters": "", "template": template, "details": _details(loaded),
                     "model_info": {"general.architecture": "olmo-hybrid",
                                    "general.parameter_count": engine.config.num_parameters(),
                                    "olmo-hybrid.context_length": engine.context},
                     "capabilities": ["completion", *(["tools"] if loaded.can_chat else [])]})


async def version(request: Request) -> Response:
    """GET /api/version"""
    return Json({"version": __version__})
