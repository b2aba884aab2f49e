"""Conversations as tokens, so that the next turn continues exactly what the model has read and said.

Two things make a second turn miss the prefix cache. The template may open an answer with something that is gone when
the answer is history (a thinking mark); so the end of the last message is marked as a checkpoint. And text encoded anew
need not give the tokens that the model chose when it wrote that text; so those are remembered, and used wherever a
conversation begins with the same text and goes on with a special token.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hybridlm.errors import HybridLMError

if TYPE_CHECKING:
    from hybridlm.engine.engine import Engine

__all__ = ["Said", "chat_prompt", "common_prefix", "turn_end"]

_MOST_REMEMBERED = 64


class Said:
    """Texts that the model has written, with all before them, and the tokens that they consist of."""

    def __init__(self) -> None:
        self._texts: OrderedDict[str, list[int]] = OrderedDict()
        self._lock = threading.Lock()

    def remember(self, text: str, tokens: list[int]) -> None:
        with self._lock:
            self._texts[text] = tokens
            self._texts.move_to_end(text)
            while len(self._texts) > _MOST_REMEMBERED:
                self._texts.popitem(last=False)

    def encode(self, tokenizer: Any, text: str) -> list[int]:
        """Token ids of a rendered conversation."""
        with self._lock:
            begun = max((t for t in self._texts if text.startswith(t)), key=len, default=None)
            tokens = self._texts[begun] if begun is not None else []
        if begun is not None:
            rest: list[int] = tokenizer.encode(text[len(begun):])
            if rest and rest[0] in tokenizer.special_ids:
                return tokens + rest
        whole: list[int] = tokenizer.encode(text)
        return whole


def chat_prompt(engine: Engine, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None,
                names: Mapping[str, Any]) -> tuple[str, list[int], int]:
    """The rendered text of a conversation, its tokens, and how many of them the opening of an answer does not touch."""
    def render(**more: Any) -> str:
        text: str = engine.chat_template.render(messages, tools=tools, **names, **more)
        return text

    text = render()
    tokens = engine.said.encode(engine.tokenizer, text)
    end = engine.said.encode(engine.tokenizer, render(add_generation_prompt=False))
    return text, tokens, common_prefix(tokens, end)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts share at their beginning."""
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


def turn_end(engine: Engine) -> str:
    """What the template writes after an answer, if that is one special token: a text that ends answers."""
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "\ue000"}]
    try:
        after: str = engine.chat_template.render(talk, add_generation_prompt=False).rpartition("\ue000")[2].strip()
    except HybridLMError:
        return ""
    return after if engine.tokenizer.token_to_id(after) in engine.tokenizer.special_ids else ""
