"""`Answer`: an `Ask` in the making. It prepares the prompt, queues it, and gives the output in parts."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

from hybridlm.engine.chat import chat_prompt
from hybridlm.engine.sampler import Sampler
from hybridlm.engine.scheduler import Stream, TimedOut
from hybridlm.engine.writer import Piece, Writer
from hybridlm.errors import HybridLMError
from hybridlm.server.ask import Ask
from hybridlm.server.constraint import tools_grammar
from hybridlm.server.errors import ApiError
from hybridlm.server.models import Loaded
from hybridlm.server.tools import THINK, THOUGHT, Splitter, with_tools

__all__ = ["Answer", "Part", "Usage", "arguments_of", "count_tokens"]


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an output: kind "text" or "reasoning" with a str, "calls" with a list of `Call`."""

    kind: str
    value: Any
    pieces: tuple[Piece, ...] = ()  # whose text this is, as far as it can be told


@dataclass(frozen=True, slots=True)
class Usage:
    """Counted when the output is over; times in seconds."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    queue_seconds: float
    prompt_seconds: float
    completion_seconds: float
    context: int

    def timings(self) -> dict[str, Any]:
        """As llama-server names them, plus the queue's and the context's."""
        read, wrote = self.prompt_tokens - self.cached_tokens, max(0, self.completion_tokens - 1)
        return {"cache_n": self.cached_tokens, "prompt_n": read, "prompt_ms": 1e3 * self.prompt_seconds,
                "prompt_per_second": read / self.prompt_seconds if self.prompt_seconds else 0.0,
                "predicted_n": self.completion_tokens, "predicted_ms": 1e3 * self.completion_seconds,
                "predicted_per_second": wrote / self.completion_seconds if self.completion_seconds else 0.0,
                "queue_ms": 1e3 * self.queue_seconds, "context": self.context}


class Answer:
    """Make one with `begin`; iterate over it once; `close` it in any case."""

    def __init__(self, loaded: Loaded, ask: Ask, stream: Stream, splitter: Splitter) -> None:
        self.loaded, self.ask, self.stream = loaded, ask, stream
        self.finish = ""  # at the end: "stop", "length" or "calls"
        self.stopped_by: str | None = None  # the stop string, where that ended it
        self._splitter = splitter
        self._reasoning = 0

    @classmethod
    async def begin(cls, loaded: Loaded, ask: Ask) -> Answer:
        """Prepare and queue. Raises `HybridLMError` for what cannot be met, `QueueFull` when too many wait."""
        writer, splitter = await asyncio.to_thread(_prepare, loaded, ask)
        limit = loaded.settings.request_seconds
        seconds = min(ask.seconds or limit, limit) if limit else ask.seconds
        return cls(loaded, ask, loaded.scheduler.submit(writer, seconds=seconds), splitter)

    def close(self) -> None:
        if self.stream.ended is None:
            self.stream.cancel()

    async def _pieces(self) -> AsyncIterator[Piece]:
        try:
            async for piece in self.stream:
                yield piece
        except TimedOut as error:
            if self.ask.seconds is None:
                raise
            raise ApiError(408, str(error), param="timeout") from None  # by the client's own wish

    async def __aiter__(self) -> AsyncIterator[Part]:
        pieces: list[Piece] = []
        called = False
        async for piece in self._pieces():
            if piece.token is not None and piece.finish != "eos":
                pieces.append(piece)
            parts = list(self._splitter.push(piece.text)) if piece.text else []
            if piece.finish:
                parts += self._splitter.finish()
                called = called or any(kind == "calls" for kind, _ in parts)
                self.finish = "calls" if called else "length" if piece.finish in ("length", "time") else "stop"
                if piece.finish == "stop":
                    self.stopped_by = self._stop_string()
            for kind, value in parts:
                called = called or kind == "calls"
                if kind == "reasoning":
                    self._reasoning += len(pieces)
                yield Part(kind, value, tuple(pieces))
                pieces = []

    @property
    def usage(self) -> Usage:
        s, now = self.stream, time.monotonic()
        begun = s.begun or s.ended or now
        first = s.first or s.ended or now
        w = s.writer
        return Usage(len(w.prompt), w.reused_tokens, len(w.tokens), self._reasoning, begun - s.submitted,
                     first - begun, (s.ended or now) - first, self.loaded.engine.context)

    def _stop_string(self) -> str | None:
        """Which of several it was: the one that the tokens spell behind the text."""
        written = self.loaded.engine.tokenizer.decode(self.stream.writer.tokens)[len(self.stream.writer.text):]
        return next((s for s in self.ask.stop if written.startswith(s)), None)


def _prepare(loaded: Loaded, ask: Ask) -> tuple[Writer, Splitter]:
    """The prompt's tokens and all that comes with them; runs in a thread."""
    engine = loaded.engine
    tools = ask.tools if ask.tool_choice != "none" else []
    if ask.tool_choice.startswith("=") and not any(t["name"] == ask.tool_choice[1:] for t in tools):
        raise HybridLMError(f"tool_choice: there is no tool {ask.tool_choice[1:]!r}")
    if ask.tool_choice == "required" and not tools:
        raise HybridLMError("tool_choice: needs tools")
    text: str | None = None
    marks: tuple[int, ...] = ()
    thinking = False
    if ask.messages is not None:
        text, tokens, end = _conversation(loaded, ask, tools)
        marks, thinking = (end,), text.rstrip().endswith(THINK)
    elif isinstance(ask.prompt, str):
        tokens = engine.encode(ask.prompt)
    else:
        tokens = engine.encode(list(ask.prompt or ()))
    after = THOUGHT if thinking else ""
    constraint = None
    if tools and (ask.tool_choice == "required" or ask.tool_choice.startswith("=")):
        if ask.constraint:
            raise HybridLMError("tool_choice: a forced call and a response format exclude each other")
        name = ask.tool_choice[1:] if ask.tool_choice.startswith("=") else None
        constraint = loaded.grammar.matcher("lark", tools_grammar(loaded.grammar, tools, name), after=after)
    elif ask.constraint:
        constraint = loaded.grammar.matcher(*ask.constraint, after=after)
    limits = [n for n in (ask.max_tokens, loaded.settings.max_tokens) if n is not None]
    ends = loaded.ends if ask.messages is not None else engine.eos
    writer = Writer(engine, tokens, Sampler(**ask.sampling), max_tokens=min(limits, default=None), stop=ask.stop,
                    eos=() if ask.ignore_eos else ends, checkpoints=marks, prompt_text=text, constraint=constraint,
                    logprobs=ask.logprobs)
    return writer, Splitter(thinking, bool(tools)) if ask.messages is not None else _Whole()


def _conversation(loaded: Loaded, ask: Ask, tools: list[dict[str, Any]]) -> tuple[str, list[int], int]:
    engine = loaded.engine
    if not loaded.can_chat:
        raise HybridLMError(f"model: {loaded.name} has no chat template, so it was not taught to answer; use "
                            "/v1/completions, or start the server with --chat-template")
    template = engine.chat_template
    messages = list(ask.messages or ())
    begun = ""
    if ask.continue_last and messages and messages[-1]["role"] == "assistant":
        begun = messages.pop().get("content") or ""
    functions = [{"type": "function", "function": tool} for tool in tools]
    if "tools" not in template.source:
        messages, functions = with_tools(messages, tools, template.source), []
    text, tokens, end = chat_prompt(engine, messages, functions, ask.template)
    if begun:
        text += begun
        tokens = engine.said.encode(engine.tokenizer, text)
    return text, tokens, min(end, len(tokens))


class _Whole(Splitter):
    """Of a continued text nothing is split off."""

    def __init__(self) -> None:
        super().__init__(False, False)

    def push(self, text: str) -> Iterator[tuple[str, Any]]:
        yield "text", text

    def finish(self) -> Iterator[tuple[str, Any]]:
        return iter(())


def arguments_of(call: Any) -> str:
    """A call's arguments as JSON."""
    return json.dumps(call.arguments, ensure_ascii=False)


async def count_tokens(loaded: Loaded, ask: Ask) -> int:
    """Tokens of the prompt that a conversation would be."""
    tools = ask.tools if ask.tool_choice != "none" else []
    return len((await asyncio.to_thread(_conversation, loaded, ask, tools))[1])
