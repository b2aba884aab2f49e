"""Greedy continuations of many prompts, side by side: for evaluations, where all prompts are there from the start.

Prompts are read one after the other (a long one fills its passes by itself), then all write a token at a time together,
so that each pass reads the weights once for all. A prompt that is done leaves the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hybridlm.engine.session import Session
from hybridlm.engine.writer import HeldText
from hybridlm.errors import HybridLMError
from hybridlm.text.stream import StreamDecoder

if TYPE_CHECKING:
    from hybridlm.engine.engine import Engine

__all__ = ["generate_until"]

_SIDE_BY_SIDE = 16
_BYTES = 1 << 30  # of the states of prompts side by side


def generate_until(engine: Engine, prompts: Sequence[Sequence[int]], max_tokens: int, stop: Sequence[str],
                   prefix: int) -> list[str]:
    """The text that each prompt is continued with, up to a stop string, the end of text or `max_tokens`."""
    for prompt in prompts:
        if len(prompt) + max_tokens > engine.context + 1:
            raise HybridLMError(f"context: {len(prompt)} tokens and {max_tokens} new ones do not fit in "
                                f"{engine.context}; open the model with a larger context or shorten the prompt")
    start = shared_state(engine, prompts[0][:prefix]) if prefix and prompts else None
    texts: list[str] = []
    batch: list[Session] = []
    for prompt in prompts:
        session = engine.session() if start is None else Session(engine, start.clone())
        engine.feed([(session, prompt[session.position:])])
        batch.append(session)
        if len(batch) == _SIDE_BY_SIDE or sum(s.state.nbytes for s in batch) > _BYTES:
            texts += _write(engine, batch, max_tokens, stop)
            batch = []
    return texts + _write(engine, batch, max_tokens, stop)


def shared_state(engine: Engine, tokens: Sequence[int]) -> Any:
    """The state after these tokens, of the prefix cache where that has it. Clone it before use.

    Read from the first token on, never from a shorter checkpoint: how a text is cut into passes shows in the last bits.
    """
    found = engine.cache.find(tokens)
    if found is not None and found.position == len(tokens):
        return found
    session = engine.session()
    engine.feed([(session, tokens)])
    engine.cache.put(session.state)
    return session.state


def _write(engine: Engine, sessions: list[Session], max_tokens: int, stop: Sequence[str]) -> list[str]:
    lines = [_Line(engine, stop) for _ in sessions]
    for count in range(1, max_tokens + 1):
        alive = [(session, line) for session, line in zip(sessions, lines, strict=True) if not line.done]
        if not alive:
            break
        tokens = engine.next_logits([session for session, _ in alive]).argmax(axis=-1)
        for (_, line), token in zip(alive, tokens, strict=True):
            line.push(int(token))
        more = [(session, [int(token)]) for (session, line), token in zip(alive, tokens, strict=True)
                if not line.done]
        if more and count < max_tokens:
            engine.feed(more)
    return [line.finish() for line in lines]


class _Line:
    """One text being written."""

    def __init__(self, engine: Engine, stop: Sequence[str]) -> None:
        self.eos, self.text = engine.eos, ""
        self.done = self._stopped = False  # by whatever; by a stop string
        self._decoder, self._held = StreamDecoder(engine.tokenizer), HeldText(stop)

    def push(self, token: int) -> None:
        if token in self.eos:
            self.done = True
            return
        text, self._stopped = self._held.push(self._decoder.push(token))
        self.text += text
        self.done = self._stopped

    def finish(self) -> str:
        """The text, with what was held back unless a stop string ended it."""
        if not self._stopped:
            text, stopped = self._held.push(self._decoder.finish())
            self.text += text if stopped else text + self._held.rest()
        return self.text

