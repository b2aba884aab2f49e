"""From a translated request to its answers: the part that is the same in every API."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from hybridlm.server.answer import Answer, Part
from hybridlm.server.ask import Ask
from hybridlm.server.errors import ApiError
from hybridlm.server.models import Loaded
from hybridlm.server.wire import Json, Streamed, unless_gone

__all__ = ["Collected", "collect", "merged", "stream", "whole"]


class Collected:
    """A whole answer."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.parts: list[Part] = []

    def text(self, kind: str = "text") -> str:
        return "".join(part.value for part in self.parts if part.kind == kind)

    @property
    def calls(self) -> list[Any]:
        return [call for part in self.parts if part.kind == "calls" for call in part.value]


@asynccontextmanager
async def _answers(request: Request, asks: Sequence[Ask]) -> AsyncIterator[list[Answer]]:
    """Answers in the making, with their model held open; cancelled when left early."""
    state = request.app.state
    async with state.models.use(asks[0].model) as loaded:
        made: list[Answer] = []
        try:
            for ask in asks:
                made.append(await Answer.begin(loaded, ask))
            request.scope["state"]["answers"] = made
            yield made
        finally:
            for answer in made:
                answer.close()
                state.metrics.observe(answer)


async def collect(answer: Answer) -> Collected:
    collected = Collected(answer)
    async for part in answer:
        collected.parts.append(part)
    return collected


async def whole(request: Request, asks: Sequence[Ask],
                written: Callable[[Loaded, list[Collected]], dict[str, Any]]) -> Response:
    """The answers in one piece, as `written` writes them."""

    async def run() -> dict[str, Any]:
        async with _answers(request, asks) as answers:
            done = await asyncio.gather(*map(collect, answers))
            return written(answers[0].loaded, list(done))

    return Json(await unless_gone(request, run()))


async def stream(request: Request, asks: Sequence[Ask], media_type: str,
                 blocks: Callable[[list[Answer]], AsyncIterator[bytes]], failed: Callable[[ApiError], bytes],
                 alive: bytes = b"") -> Response:
    """The answers as they come, as `blocks` writes them. What is wrong with the request is raised before."""
    async with contextlib.AsyncExitStack() as stack:
        answers = await unless_gone(request, _enter(stack, request, asks))
        return Streamed(blocks(answers), stack.pop_all(), media_type, failed, request.app.state.settings.send_seconds,
                        alive)


def _enter(stack: contextlib.AsyncExitStack, request: Request, asks: Sequence[Ask]) -> Awaitable[list[Answer]]:
    return stack.enter_async_context(_answers(request, asks))


async def merged(answers: Sequence[Answer]) -> AsyncIterator[tuple[int, Part | None]]:
    """Parts of several answers as they come, with the answer's index; None after the last part of each."""
    if len(answers) == 1:
        async for part in answers[0]:
            yield 0, part
        yield 0, None
        return
    queue: asyncio.Queue[tuple[int, Part | BaseException | None]] = asyncio.Queue()

    async def read(i: int, answer: Answer) -> None:
        try:
            async for part in answer:
                queue.put_nowait((i, part))
            queue.put_nowait((i, None))
        except Exception as error:
            queue.put_nowait((i, error))

    tasks = [asyncio.create_task(read(i, answer)) for i, answer in enumerate(answers)]
    try:
        left = len(answers)
        while left:
            i, item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            left -= item is None
            yield i, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
