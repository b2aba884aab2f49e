"""OpenAI's API: chat completions, completions, models."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from hybridlm.server import serve
from hybridlm.server.answer import Answer, Part, arguments_of
from hybridlm.server.ask import Ask
from hybridlm.server.errors import ApiError, error_body
from hybridlm.server.models import Loaded, Model
from hybridlm.server.openai_types import ChatRequest, Common, CompletionRequest, Message
from hybridlm.server.wire import Json, dump, read_json

__all__ = ["chat", "completions", "model", "models"]

_FINISH = {"stop": "stop", "length": "length", "calls": "tool_calls"}


# -- in ----------------------------------------------------------------------------------------------------------


def _ask(r: Common) -> Ask:
    """What both kinds of request say alike; nulls mean the default."""
    try:
        bias = {int(k): float(v) for k, v in (r.logit_bias or {}).items()}
    except ValueError:
        raise ApiError(400, "logit_bias: its keys are token ids", param="logit_bias") from None
    or_ = lambda value, default: default if value is None else value  # noqa: E731
    sampling = {"temperature": or_(r.temperature, 1.0), "top_p": or_(r.top_p, 1.0), "top_k": max(0, r.top_k or 0),
                "min_p": r.min_p or 0.0, "repetition_penalty": or_(r.repetition_penalty, 1.0),
                "frequency_penalty": r.frequency_penalty or 0.0, "presence_penalty": r.presence_penalty or 0.0,
                "seed": None if r.seed is None else abs(r.seed), "logit_bias": bias}
    stop = (r.stop,) if isinstance(r.stop, str) else tuple(r.stop or ())
    if len(stop) > 16 or not all(stop):
        raise ApiError(400, "stop: at most 16 texts, none of them empty", param="stop")
    return Ask(model=r.model, max_tokens=r.max_tokens, stop=stop, ignore_eos=bool(r.ignore_eos), sampling=sampling,
               constraint=_constraint(r), seconds=r.timeout)


def _constraint(r: Common) -> tuple[str, Any] | None:
    for kind, value in (("json_schema", r.guided_json), ("regex", r.guided_regex), ("choice", r.guided_choice),
                        ("lark", r.guided_grammar)):
        if value is not None:
            return kind, value
    f = r.response_format
    if f is None or f.type == "text":
        return None
    if f.type == "json_object":
        return "json", None
    if f.type == "json_schema":
        schema = f.json_schema.schema_ if f.json_schema else None
        return ("json", None) if schema is None else ("json_schema", schema)
    value = {"regex": f.regex, "grammar": f.grammar, "choice": f.choice}[f.type]
    if value is None:
        raise ApiError(400, f"response_format: type {f.type} needs {f.type!r} beside it", param="response_format")
    return {"grammar": "lark"}.get(f.type, f.type), value


def _message(m: Message) -> dict[str, Any]:
    content = m.content if isinstance(m.content, str | None) else "".join(part.text for part in m.content)
    role = {"developer": "system", "function": "tool"}.get(m.role, m.role)
    out: dict[str, Any] = {"role": role, "content": content or ""}
    if m.reasoning_content:
        out["reasoning_content"] = m.reasoning_content
    if m.tool_calls:
        calls = []
        for call in m.tool_calls:
            arguments: Any = call.function.arguments
            if isinstance(arguments, str):
                try:
                    arguments = json.loads(arguments or "{}")
                except (ValueError, RecursionError):
                    arguments = None
            if not isinstance(arguments, dict):
                raise ApiError(400, "messages: a tool call's arguments are not a JSON object", param="messages")
            calls.append({"id": call.id, "type": "function",
                          "function": {"name": call.function.name, "arguments": arguments}})
        out["tool_calls"] = calls
    if m.tool_call_id:
        out["tool_call_id"] = m.tool_call_id
    if m.name:
        out["name"] = m.name
    return out


def _copies(ask: Ask, n: int) -> list[Ask]:
    """The same request n times, with seeds of their own."""
    from dataclasses import replace

    seed = ask.sampling["seed"]
    return [replace(ask, sampling={**ask.sampling, "seed": None if seed is None else seed + i}) for i in range(n)]


# -- chat ----------------------------------------------------------------------------------------------------------


async def chat(request: Request) -> Response:
    """POST /v1/chat/completions"""
    r = await read_json(request, ChatRequest)
    ask = _ask(r)
    ask.messages = [_message(m) for m in r.messages]
    ask.max_tokens = r.max_completion_tokens if r.max_completion_tokens is not None else r.max_tokens
    ask.tools = [t.function.model_dump(exclude_none=True, exclude={"strict"}) for t in r.tools or ()]
    choice = r.tool_choice or "auto"
    ask.tool_choice = choice if isinstance(choice, str) else "=" + choice.function.name
    ask.template = _template_names(r.chat_template_kwargs)
    ask.continue_last = bool(r.continue_final_message)
    if r.logprobs:
        ask.logprobs = r.top_logprobs or 0
    asks = _copies(ask, r.n or 1)
    head = {"id": "chatcmpl-" + secrets.token_hex(12), "created": int(time.time())}
    if r.stream:
        usage = bool(r.stream_options and r.stream_options.include_usage)
        return await serve.stream(request, asks, "text/event-stream", lambda a: _chat_chunks(a, head, usage), _failed,
                                  b": reading the prompt\n\n")
    return await serve.whole(request, asks, lambda loaded, done: {
        **head, "object": "chat.completion", "model": loaded.name, "system_fingerprint": None,
        "choices": [_chat_choice(i, c) for i, c in enumerate(done)], **_usage([c.answer for c in done])})


def _template_names(names: dict[str, Any] | None) -> dict[str, Any]:
    taken = {"messages", "tools", "add_generation_prompt", "documents"} & set(names or {})
    if taken:
        raise ApiError(400, f"chat_template_kwargs: {', '.join(taken)} cannot be set here")
    return dict(names or {})


def _chat_choice(i: int, c: serve.Collected) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": c.text() or (None if c.calls else "")}
    if thoughts := c.text("reasoning"):
        message["reasoning_content"] = thoughts
    if c.calls:
        message["tool_calls"] = [_call(j, call, {}) for j, call in enumerate(c.calls)]
    logprobs = None
    if c.answer.ask.logprobs is not None:
        logprobs = {"content": [t for part in c.parts for t in _chat_logprobs(c.answer, part)], "refusal": None}
    return {"index": i, "message": message, "logprobs": logprobs, "finish_reason": _FINISH[c.answer.finish]}


def _call(index: int, call: Any, more: dict[str, Any]) -> dict[str, Any]:
    return {**more, "id": "call_" + secrets.token_hex(12), "type": "function",
            "function": {"name": call.name, "arguments": arguments_of(call)}}


async def _chat_chunks(answers: list[Answer], head: dict[str, Any], usage: bool) -> AsyncIterator[bytes]:
    base = {**head, "object": "chat.completion.chunk", "model": answers[0].loaded.name, "system_fingerprint": None}
    calls = [0] * len(answers)

    def chunk(i: int, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None,
              more: dict[str, Any] | None = None) -> bytes:
        choice = {"index": i, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return b"data: " + dump({**base, "choices": [choice], **(more or {})}) + b"\n\n"

    for i in range(len(answers)):
        yield chunk(i, {"role": "assistant", "content": ""})
    async for i, part in serve.merged(answers):
        if part is None:
            yield chunk(i, {}, _FINISH[answers[i].finish], more={"timings": answers[i].usage.timings()})
            continue
        if part.kind == "calls":
            delta: dict[str, Any] = {"tool_calls": [_call(j, call, {"index": calls[i] + j})
                                                    for j, call in enumerate(part.value)]}
            calls[i] += len(part.value)
        else:
            delta = {"content" if part.kind == "text" else "reasoning_content": part.value}
        asked = answers[i].ask.logprobs is not None
        yield chunk(i, delta, logprobs={"content": _chat_logprobs(answers[i], part), "refusal": None} if asked
                    else None)
    if usage:
        yield b"data: " + dump({**base, "choices": [], **_usage(answers)}) + b"\n\n"
    yield b"data: [DONE]\n\n"


def _chat_logprobs(answer: Answer, part: Part) -> list[dict[str, Any]]:
    tokenizer = answer.loaded.engine.tokenizer

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.decode([token])
        data = tokenizer.token_bytes(token) if tokenizer.is_byte_level else text.encode()
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(data)}

    return [{**entry(p.token, p.logprob), "top_logprobs": [entry(t, x) for t, x in p.top]}
            for p in part.pieces if p.token is not None and p.logprob is not None]


# -- completions -----------------------------------------------------------------------------------------------------


async def completions(request: Request) -> Response:
    """POST /v1/completions"""
    r = await read_json(request, CompletionRequest)
    if r.suffix:
        raise ApiError(400, "suffix: this kind of model does not fill in the middle", param="suffix")
    prompts: list[Any] = [r.prompt] if isinstance(r.prompt, str) or (r.prompt and isinstance(r.prompt[0], int)) \
        else list(r.prompt) or [""]
    if len(prompts) * (r.n or 1) > 64:
        raise ApiError(400, "prompt: at most 64 outputs in one request", param="prompt")
    asks = []
    for prompt in prompts:
        ask = _ask(r)
        ask.prompt, ask.logprobs = prompt, r.logprobs
        asks += _copies(ask, r.n or 1)
    head = {"id": "cmpl-" + secrets.token_hex(12), "object": "text_completion", "created": int(time.time())}
    if r.stream:
        usage = bool(r.stream_options and r.stream_options.include_usage)
        return await serve.stream(request, asks, "text/event-stream", lambda a: _text_chunks(a, head, usage, r),
                                  _failed, b": reading the prompt\n\n")
    return await serve.whole(request, asks, lambda loaded, done: {
        **head, "model": loaded.name, "choices": [_text_choice(i, c, r) for i, c in enumerate(done)],
        **_usage([c.answer for c in done])})


def _prompt_text(answer: Answer) -> str:
    prompt = answer.ask.prompt
    return prompt if isinstance(prompt, str) else answer.loaded.engine.tokenizer.decode(list(prompt or ()))


def _text_choice(i: int, c: serve.Collected, r: CompletionRequest) -> dict[str, Any]:
    text = (_prompt_text(c.answer) if r.echo else "") + c.text()
    logprobs = None if r.logprobs is None else _text_logprobs(c.answer, c.parts, len(text) - len(c.text()))
    return {"index": i, "text": text, "logprobs": logprobs, "finish_reason": _FINISH[c.answer.finish]}


def _text_logprobs(answer: Answer, parts: list[Part], offset: int) -> dict[str, Any]:
    decode = answer.loaded.engine.tokenizer.decode
    pieces = [p for part in parts for p in part.pieces if p.token is not None and p.logprob is not None]
    tokens = [decode([p.token]) for p in pieces]
    offsets, at = [], offset
    for token in tokens:
        offsets.append(at)
        at += len(token)
    return {"tokens": tokens, "token_logprobs": [p.logprob for p in pieces],
            "top_logprobs": [{decode([t]): x for t, x in p.top} for p in pieces], "text_offset": offsets}


async def _text_chunks(answers: list[Answer], head: dict[str, Any], usage: bool,
                       r: CompletionRequest) -> AsyncIterator[bytes]:
    base = {**head, "model": answers[0].loaded.name}
    offsets = [0] * len(answers)

    def chunk(i: int, text: str, finish: str | None = None, logprobs: Any = None, **more: Any) -> bytes:
        choice = {"index": i, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return b"data: " + dump({**base, "choices": [choice], **more}) + b"\n\n"

    if r.echo:
        for i, answer in enumerate(answers):
            offsets[i] = len(_prompt_text(answer))
            yield chunk(i, _prompt_text(answer))
    async for i, part in serve.merged(answers):
        if part is None:
            yield chunk(i, "", _FINISH[answers[i].finish], timings=answers[i].usage.timings())
            continue
        yield chunk(i, part.value, logprobs=None if r.logprobs is None else
                    _text_logprobs(answers[i], [part], offsets[i]))
        offsets[i] += len(part.value)
    if usage:
        yield b"data: " + dump({**base, "choices": [], **_usage(answers)}) + b"\n\n"
    yield b"data: [DONE]\n\n"


# -- both --------------------------------------------------------------------------------------------------------


def _usage(answers: list[Answer]) -> dict[str, Any]:
    all_ = [answer.usage for answer in answers]
    prompt, completion = sum(u.prompt_tokens for u in all_), sum(u.completion_tokens for u in all_)
    return {"usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
                      "prompt_tokens_details": {"cached_tokens": sum(u.cached_tokens for u in all_)},
                      "completion_tokens_details": {"reasoning_tokens": sum(u.reasoning_tokens for u in all_)}},
            "timings": all_[0].timings()}


def _failed(error: ApiError) -> bytes:
    return b"data: " + dump(error_body("/v1/chat/completions", error)) + b"\n\n"


def _card(model: Model, loaded: Loaded | None) -> dict[str, Any]:
    """A model as /v1/models lists it; what is known only of an open one is null otherwise."""
    card: dict[str, Any] = {"id": model.name, "object": "model", "created": int(model.modified), "owned_by": "hybridlm",
                            "loaded": loaded is not None, "context_length": None, "chat": None, "parameters": None}
    if loaded is not None:
        engine = loaded.engine
        card |= {"context_length": engine.context, "chat": loaded.can_chat,
                 "parameters": engine.config.num_parameters()}
    return card


async def models(request: Request) -> Response:
    """GET /v1/models"""
    all_ = request.app.state.models.all.values()
    return Json({"object": "list", "data": [_card(m, m.loaded) for m in all_]})


async def model(request: Request) -> Response:
    """GET /v1/models/NAME"""
    found = request.app.state.models.find(request.path_params["name"])
    return Json(_card(found, found.loaded))
