"""What all APIs share of HTTP: reading a body that can be trusted, answers that stream, clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hybridlm.server.errors import ApiError, from_exception

__all__ = ["Gone", "Streamed", "dump", "parse", "read_json", "unless_gone"]

log = logging.getLogger("hybridlm.server")
T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

MAX_DEPTH = 200  # of nested JSON: more is no request that anybody means


class Gone(Exception):
    """The client has closed the connection."""


class Json(Response):
    """An object as JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dump(content)


def dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


async def read_body(request: Request, limit: int, seconds: float) -> bytes:
    """The whole body. `ApiError` 413 for one that is too large, 408 for one that comes too slowly."""
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limit:
        raise ApiError(413, f"body: larger than {limit} bytes")
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for block in request.stream():
                body += block
                if len(body) > limit:
                    raise ApiError(413, f"body: larger than {limit} bytes")
    except TimeoutError:
        raise ApiError(408, f"body: not complete after {seconds:g} s") from None
    except ClientDisconnect:
        raise Gone from None
    return bytes(body)


async def read_json(request: Request, model: type[M]) -> M:
    """The body as a request of an API. `ApiError` 400 tells what is wrong with it."""
    settings = request.app.state.settings
    body = await read_body(request, settings.body_bytes, settings.body_seconds)
    if len(body) < 20_000:
        return parse(body, model)
    return await asyncio.to_thread(parse, body, model)


def parse(body: bytes, model: type[M]) -> M:
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(400, f"body: not UTF-8 (byte {error.start})") from None
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair is no text
    except UnicodeEncodeError:
        raise ApiError(400, "body: a \\u escape is half of a character") from None
    except RecursionError:
        raise ApiError(400, "body: nested too deeply") from None
    except ValueError as error:
        raise ApiError(400, f"body: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ApiError(400, "body: must be a JSON object")
    if _too_deep(value):
        raise ApiError(400, "body: nested too deeply")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise ApiError(400, *_explained(error)) from None
    except RecursionError:
        raise ApiError(400, "body: nested too deeply") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:20]} is too large for a number")
    return value


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [v for x in level for v in (x.values() if isinstance(x, dict) else x) if isinstance(v, dict | list)]
        if not level:
            return False
    return True


def _explained(error: ValidationError) -> tuple[str]:
    """The first thing that is wrong, with its place."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(p) for p in first["loc"] if not str(p).startswith(("function-", "str", "list[")))[:200]
    return (f"{place or 'body'}: {first['msg'][:300]}",)


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is given up when the client goes away (`Gone`)."""
    task = asyncio.ensure_future(work)
    watch = asyncio.create_task(_gone(request.receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Streamed(Response):
    """A body that is sent as it comes, until it ends or the client goes away; then what it rests on is closed.

    What goes wrong once the head is out is written into the stream by `failed(error)`.
    """

    def __init__(self, blocks: AsyncIterator[bytes], open: contextlib.AsyncExitStack, media_type: str,
                 failed: Callable[[ApiError], bytes], send_seconds: float, alive: bytes = b"") -> None:
        super().__init__(None, 200, {"cache-control": "no-store", "x-accel-buffering": "no"}, media_type)
        del self.headers["content-length"]
        self._blocks, self._open, self._failed = blocks, open, failed
        self._seconds, self._alive = send_seconds, alive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._send(send))
        watch = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            watch.cancel()
            if not work.done():
                work.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await work
            await self._blocks.aclose()  # type: ignore[attr-defined]
            await self._open.aclose()

    async def _send(self, send: Send) -> None:
        async def put(block: bytes, more: bool = True) -> None:
            async with asyncio.timeout(self._seconds):  # a client that does not read holds nothing open
                await send({"type": "http.response.body", "body": block, "more_body": more})

        first = asyncio.ensure_future(anext(self._blocks, None))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            while self._alive and not (await asyncio.wait({first}, timeout=10))[0]:
                await put(self._alive)  # while a long prompt is read
            if (block := await first) is not None:
                await put(block)
                async for block in self._blocks:
                    await put(block)
        except TimeoutError:
            return
        except Exception as error:
            told = from_exception(error)
            if told.status == 500:
                log.exception("a bug, while streaming")
            await put(self._failed(told))
        finally:
            if not first.done():
                first.cancel()
                await asyncio.wait({first})
        await put(b"", False)
