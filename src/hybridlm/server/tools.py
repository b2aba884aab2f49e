"""Tool calls in Olmo's own format, and what else is folded into a model's text: thoughts.

Olmo is given functions as JSON between <functions> tags and calls them as Python, a call a line:

    <function_calls>
    get_weather(city="Paris", days=3)
    </function_calls>

`Splitter` takes an output apart as it streams: thoughts between <think> tags, text, calls. What claims to be calls and
is none stays text, so nothing a model wrote is lost.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["CLOSE", "OPEN", "THINK", "THOUGHT", "Call", "Splitter", "parse_calls", "with_tools", "written_calls"]

OPEN, CLOSE = "<function_calls>", "</function_calls>"
THINK, THOUGHT = "<think>", "</think>"
_KEY = re.compile(r"\s*([^\s=(),]+)\s*=\s*")
_NAME = re.compile(r"\s*([\w.\-]+)\s*\(")
_LITERALS = {"true": True, "false": False, "null": None}


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a tool."""

    name: str
    arguments: dict[str, Any]


def parse_calls(text: str) -> list[Call] | None:
    """The calls that a text consists of; None where it is something else, or none at all."""
    calls, at = [], 0
    try:
        while text[at:].strip():
            call, at = _call(text, at)
            calls.append(call)
            while at < len(text) and text[at] in " \t\r\n,;":
                at += 1
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return calls or None


def _call(text: str, at: int) -> tuple[Call, int]:
    name = _NAME.match(text, at)
    if not name:
        raise ValueError
    at = name.end()
    arguments: dict[str, Any] = {}
    while True:
        while at < len(text) and text[at] in " \t\r\n":
            at += 1
        if text[at:at + 1] == ")":
            return Call(name[1], arguments), at + 1
        if arguments:
            if text[at:at + 1] != ",":
                raise ValueError
            at += 1
            if text[at:].lstrip().startswith(")"):
                continue
        key = _KEY.match(text, at)
        if not key:
            raise ValueError
        arguments[key[1]], at = _value(text, key.end())


def _value(text: str, at: int) -> tuple[Any, int]:
    """A JSON value, or a Python literal, that ends before a comma or a bracket."""
    try:
        value, end = json.JSONDecoder(parse_constant=_none_such).raw_decode(text, at)
        json.dumps(value, allow_nan=False)  # 1e999 is no number
        if text[end:].lstrip()[:1] in (",", ")"):
            return value, end
    except ValueError:
        pass
    depth, quote, end = 0, "", at
    while end < len(text):
        c = text[end]
        if quote:
            if c == "\\":
                end += 1
            elif c == quote:
                quote = ""
        elif c in "'\"":
            quote = c
        elif c in "([{":
            depth += 1
        elif c in ")]}" or (c == "," and not depth):
            if not depth:
                break
            depth -= 1
        end += 1
    return _literal(ast.parse(text[at:end].strip(), mode="eval").body), end


def _none_such(name: str) -> Any:
    raise ValueError(name)


def _literal(node: ast.expr) -> Any:
    """The value of a Python literal in which JSON's true, false and null may stand."""
    if isinstance(node, ast.Name) and node.id in _LITERALS:
        return _LITERALS[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {str(_literal(k)) if k else "": _literal(v) for k, v in zip(node.keys, node.values, strict=True)}
    value = ast.literal_eval(node)
    json.dumps(value, allow_nan=False)  # what has no JSON is no argument
    return value


def written_calls(calls: Sequence[Mapping[str, Any]]) -> str:
    """Calls as the model would have written them; `arguments` are objects."""
    lines = (f"{c['name']}({', '.join(f'{k}={json.dumps(v, ensure_ascii=False)}' for k, v in c['arguments'].items())})"
             for c in calls)
    return OPEN + "\n".join(lines) + CLOSE


def with_tools(messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]], source: str) -> list[dict[str, Any]]:
    """Messages for a template (its `source`) that does not know tools: functions in the system message, calls in the
    text, results from the "environment". Of a template that does, they stay as they are."""
    if "tools" in source:
        return list(messages)
    out = []
    for message in messages:
        message = dict(message)
        calls = message.pop("tool_calls", None)
        if calls:
            message["content"] = (message.get("content") or "") + written_calls([c["function"] for c in calls])
        if message["role"] == "tool":
            message = {"role": "environment", "content": message.get("content") or ""}
        out.append(message)
    if tools:
        functions = ("You may call functions, one a line as name(argument=value), between " + OPEN + " and " + CLOSE
                     + ". <functions>" + json.dumps(tools, ensure_ascii=False) + "</functions>")
        if out and out[0]["role"] == "system":
            out[0] = {**out[0], "content": f"{out[0].get('content') or ''} {functions}"}
        else:
            out.insert(0, {"role": "system", "content": functions})
    return out


class Splitter:
    """Takes an output apart as it comes. Parts are ("reasoning" | "text", str) or ("calls", [Call, ...])."""

    def __init__(self, thinking: bool, tools: bool) -> None:
        """`thinking`: the prompt has opened the thoughts already. `tools`: calls are to be found."""
        self._state = "reasoning" if thinking else "start"
        self._tools = tools
        self._text = ""  # not yet decided

    def push(self, text: str) -> Iterator[tuple[str, Any]]:
        self._text += text
        while True:
            state, before = self._state, self._text
            yield from self._step()
            if (self._state, self._text) == (state, before):
                return

    def finish(self) -> Iterator[tuple[str, Any]]:
        """What was held back, now that nothing follows."""
        text, self._text = self._text, ""
        if self._state == "calls":
            yield from self._calls(text, "")
        elif text:
            yield ("reasoning" if self._state == "reasoning" else "text"), text

    def _step(self) -> Iterator[tuple[str, Any]]:
        if self._state == "start":
            begun = self._text.lstrip()
            if begun.startswith(THINK):
                self._state, self._text = "reasoning", begun[len(THINK):]
            elif begun and not THINK.startswith(begun):
                self._state = "text"
        elif self._state == "reasoning":
            yield from self._until(THOUGHT, "reasoning", "answer")
        elif self._state == "answer":  # blank lines after the thoughts belong to neither
            self._text = self._text.lstrip("\n")
            self._state = "text" if self._text else "answer"
        elif self._state == "text":
            if self._tools:
                yield from self._until(OPEN, "text", "calls")
            elif self._text:
                text, self._text = self._text, ""
                yield "text", text
        elif CLOSE in self._text:
            inside, _, self._text = self._text.partition(CLOSE)
            self._state = "answer"
            yield from self._calls(inside, CLOSE)

    def _until(self, mark: str, kind: str, then: str) -> Iterator[tuple[str, Any]]:
        """What comes before a mark, as far as it is certain."""
        before, found, after = self._text.partition(mark)
        if found:
            self._state, self._text = then, after
        else:
            hold = next((n for n in range(min(len(mark) - 1, len(before)), 0, -1) if before.endswith(mark[:n])), 0)
            before, self._text = before[:len(before) - hold], before[len(before) - hold:]
        if before:
            yield kind, before

    def _calls(self, inside: str, close: str) -> Iterator[tuple[str, Any]]:
        calls = parse_calls(inside)
        if calls:
            yield "calls", calls
        else:
            yield "text", OPEN + inside + close
