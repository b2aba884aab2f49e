"""`Ask`: what every API's request is translated to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Ask"]


@dataclass(slots=True)
class Ask:
    """One output that is wanted. Exactly one of `messages` and `prompt` is given."""

    model: str | None = None
    # {"role", "content", and of some "tool_calls": [{"id", "type", "function": {"name", "arguments": {...}}}], ...}
    messages: list[dict[str, Any]] | None = None
    prompt: str | list[int] | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)  # {"name", "description", "parameters"}
    tool_choice: str = "auto"  # "auto", "none", "required", or "=NAME"
    template: dict[str, Any] = field(default_factory=dict)  # names for the chat template
    continue_last: bool = False  # the last message is the beginning of the answer
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    sampling: dict[str, Any] = field(default_factory=dict)  # arguments of `Sampler`
    logprobs: int | None = None
    constraint: tuple[str, Any] | None = None  # kind and value, as `Grammar.matcher` takes them
    seconds: float | None = None
