"""Anthropic's API: messages, and counting their tokens."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from hybridlm.server import serve
from hybridlm.server.answer import Answer, arguments_of, count_tokens
from hybridlm.server.ask import Ask
from hybridlm.server.errors import ApiError, error_body
from hybridlm.server.models import Loaded
from hybridlm.server.wire import Json, dump, read_json

__all__ = ["count", "messages"]

_FINISH = {"stop": "end_turn", "length": "max_tokens", "calls": "tool_use"}


class TextBlock(BaseModel):
    type: Literal["text"]
    text: str


class ThinkingBlock(BaseModel):
    type: Literal["thinking", "redacted_thinking"]
    thinking: str = ""


class ToolUseBlock(BaseModel):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any] = Field(default_factory=dict)


class ToolResultBlock(BaseModel):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None


Block = Annotated[TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]


class Message(BaseModel):
    role: Literal["user", "assistant"]
    content: str | list[Block]


class Tool(BaseModel):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    input_schema: dict[str, Any]


class ToolChoice(BaseModel):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None


class Format(BaseModel):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(BaseModel):
    format: Format | None = None


class CountRequest(BaseModel):
    """POST /v1/messages/count_tokens"""

    model: str = Field(max_length=300)
    messages: list[Message] = Field(min_length=1)
    system: str | list[TextBlock] | None = None
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: ToolChoice | None = None


class MessagesRequest(CountRequest):
    """POST /v1/messages"""

    max_tokens: int = Field(ge=1)
    stop_sequences: list[str] | None = Field(None, max_length=16)
    stream: bool | None = False
    temperature: float | None = Field(1.0, ge=0, le=100)
    top_p: float | None = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(0, ge=0, le=2**31)
    output_config: OutputConfig | None = None


# -- in ----------------------------------------------------------------------------------------------------------


def _ask(r: CountRequest) -> Ask:
    ask = Ask(model=r.model)
    system = r.system if isinstance(r.system, str | None) else "".join(block.text for block in r.system)
    ask.messages = [{"role": "system", "content": system}] if system else []
    for message in r.messages:
        ask.messages += _message(message)
    ask.continue_last = ask.messages[-1]["role"] == "assistant" and "tool_calls" not in ask.messages[-1]
    ask.tools = [{"name": t.name, **({"description": t.description} if t.description else {}),
                  "parameters": t.input_schema} for t in r.tools or ()]
    choice = r.tool_choice
    if choice is not None:
        if choice.type == "tool" and not choice.name:
            raise ApiError(400, "tool_choice: type tool needs a name")
        ask.tool_choice = {"auto": "auto", "none": "none", "any": "required", "tool": f"={choice.name}"}[choice.type]
    return ask


def _message(m: Message) -> list[dict[str, Any]]:
    """One message as ours: results of tools are messages of their own, thoughts of earlier turns are left out."""
    if isinstance(m.content, str):
        return [{"role": m.role, "content": m.content}]
    out: list[dict[str, Any]] = []
    text, calls = "", []
    for block in m.content:
        if isinstance(block, TextBlock):
            text += block.text
        elif isinstance(block, ToolUseBlock):
            calls.append({"id": block.id, "type": "function",
                          "function": {"name": block.name, "arguments": block.input}})
        elif isinstance(block, ToolResultBlock):
            content = block.content if isinstance(block.content, str | None) else "".join(
                b.text for b in block.content)
            out.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": content or ""})
    if text or calls or not out:
        out.append({"role": m.role, "content": text, **({"tool_calls": calls} if calls else {})})
    return out


async def messages(request: Request) -> Response:
    """POST /v1/messages"""
    r = await read_json(request, MessagesRequest)
    ask = _ask(r)
    ask.max_tokens, ask.stop = r.max_tokens, tuple(r.stop_sequences or ())
    if not all(ask.stop):
        raise ApiError(400, "stop_sequences: none may be empty")
    ask.sampling = {"temperature": 1.0 if r.temperature is None else r.temperature,
                    "top_p": 1.0 if r.top_p is None else r.top_p, "top_k": r.top_k or 0}
    if r.output_config and r.output_config.format:
        ask.constraint = ("json_schema", r.output_config.format.schema_)
    id_ = "msg_" + secrets.token_hex(12)
    if r.stream:
        return await serve.stream(request, [ask], "text/event-stream", lambda a: _events(a[0], id_), _failed,
                                  b'event: ping\ndata: {"type":"ping"}\n\n')
    return await serve.whole(request, [ask], lambda loaded, done: _whole(loaded, done[0], id_))


async def count(request: Request) -> Response:
    """POST /v1/messages/count_tokens"""
    ask = _ask(await read_json(request, CountRequest))
    async with request.app.state.models.use(ask.model) as loaded:
        return Json({"input_tokens": await count_tokens(loaded, ask)})


# -- out ---------------------------------------------------------------------------------------------------------


def _usage(answer: Answer) -> dict[str, Any]:
    u = answer.usage
    return {"input_tokens": u.prompt_tokens - u.cached_tokens, "cache_read_input_tokens": u.cached_tokens,
            "cache_creation_input_tokens": 0, "output_tokens": u.completion_tokens}


def _reason(answer: Answer) -> dict[str, Any]:
    if answer.stopped_by is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": answer.stopped_by}
    return {"stop_reason": _FINISH[answer.finish], "stop_sequence": None}


def _whole(loaded: Loaded, c: serve.Collected, id_: str) -> dict[str, Any]:
    content: list[dict[str, Any]] = []
    for part in c.parts:
        if part.kind == "calls":
            content += [{"type": "tool_use", "id": "toolu_" + secrets.token_hex(12), "name": call.name,
                         "input": call.arguments} for call in part.value]
            continue
        kind, key = ("text", "text") if part.kind == "text" else ("thinking", "thinking")
        if content and content[-1]["type"] == kind:
            content[-1][key] += part.value
        else:
            content.append({"type": kind, key: part.value, **({"signature": ""} if kind == "thinking" else {})})
    return {"id": id_, "type": "message", "role": "assistant", "model": loaded.name, "content": content,
            **_reason(c.answer), "usage": _usage(c.answer)}


def _event(kind: str, **data: Any) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + dump({"type": kind, **data}) + b"\n\n"


async def _events(answer: Answer, id_: str) -> AsyncIterator[bytes]:
    index, open_kind = -1, ""
    begun = False

    def start() -> bytes:
        return _event("message_start", message={
            "id": id_, "type": "message", "role": "assistant", "model": answer.loaded.name, "content": [],
            "stop_reason": None, "stop_sequence": None, "usage": {**_usage(answer), "output_tokens": 0}})

    async for part in answer:
        if not begun:
            begun = True
            yield start()
        if open_kind and part.kind != open_kind:
            yield _event("content_block_stop", index=index)
            open_kind = ""
        if part.kind == "calls":
            for call in part.value:
                index += 1
                block = {"type": "tool_use", "id": "toolu_" + secrets.token_hex(12), "name": call.name, "input": {}}
                yield _event("content_block_start", index=index, content_block=block)
                delta = {"type": "input_json_delta", "partial_json": arguments_of(call)}
                yield _event("content_block_delta", index=index, delta=delta)
                yield _event("content_block_stop", index=index)
            continue
        name = "text" if part.kind == "text" else "thinking"
        if not open_kind:
            index, open_kind = index + 1, part.kind
            block = {"type": name, name: "", **({"signature": ""} if name == "thinking" else {})}
            yield _event("content_block_start", index=index, content_block=block)
        yield _event("content_block_delta", index=index, delta={"type": name + "_delta", name: part.value})
    if not begun:
        yield start()
    if open_kind:
        yield _event("content_block_stop", index=index)
    yield _event("message_delta", delta=_reason(answer), usage=_usage(answer))
    yield _event("message_stop")


def _failed(error: ApiError) -> bytes:
    return b"event: error\ndata: " + json.dumps(error_body("/v1/messages", error)).encode() + b"\n\n"
