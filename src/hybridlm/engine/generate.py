"""Generation: prompt in, pieces of text out, with the prefix cache before and after.

A generation is an iterator. It reads the prompt at its first step, from the longest checkpoint in the prefix cache on;
keeps checkpoints on the way; then samples one token at a time. Text that may be the beginning of a stop string is held
back until that is decided, so what was shown is never taken back.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hybridlm.engine.sampler import Sampler
from hybridlm.errors import HybridLMError

if TYPE_CHECKING:
    from hybridlm.engine.engine import Engine
    from hybridlm.engine.session import Session

__all__ = ["Generation", "HeldText", "Piece"]

LEAST_GAP = 16  # a checkpoint that saves fewer tokens than this over the one before it is not worth its memory


@dataclass(frozen=True, slots=True)
class Piece:
    """One generated token and the text that it made certain."""

    token: int | None  # None only where nothing was generated (max_tokens=0)
    text: str  # "" while a character is unfinished or a stop string may be beginning
    finish: str | None = None  # in the last piece: "eos", "stop" (a stop string) or "length"


class Generation:
    """Iterate over it for `Piece`s; its attributes tell what has happened so far."""

    def __init__(self, engine: Engine, prompt: list[int], sampler: Sampler, *, max_tokens: int | None = None,
                 stop: tuple[str, ...] = (), eos: tuple[int, ...] = (), checkpoints: Sequence[int] = (),
                 speculative: bool | Engine = False) -> None:
        room = engine.context - len(prompt)
        if room < 0:
            raise HybridLMError(f"context: the prompt has {len(prompt)} tokens, the context only {engine.context}; "
                                "open the model with a larger context or shorten the prompt")
        if max_tokens is not None and (not isinstance(max_tokens, int) or max_tokens < 0):
            raise HybridLMError(f"max_tokens: must be a whole number from 0 up, not {max_tokens!r}")
        self.prompt = list(engine._ids(prompt).tolist())
        self.reused_tokens = 0  # of the prompt, known when iteration has begun
        self.tokens: list[int] = []  # generated, the token that ended the text (eos) left out
        self.text = ""  # of all pieces so far
        self.finish_reason: str | None = None
        self.prompt_text: str | None = None  # of a conversation, whose next turn will begin with it
        self.prefill_seconds = 0.0  # spent on the rest of the prompt
        self.decode_seconds = 0.0  # spent since
        self._engine, self._sampler = engine, sampler
        # The last token is chosen but not read, so one more than the room is possible; it is not used.
        self._most = room if max_tokens is None else min(max_tokens, room)
        self._eos = frozenset(eos)
        self._marks = checkpoints
        self._speculative = speculative
        self._held = HeldText(stop)
        self._decoder = _decoder(engine, bool(stop))
        self._pieces = self._run()

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt)

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens read, reused ones not counted, a second."""
        return (self.prompt_tokens - self.reused_tokens) / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens after the first a second (the first one comes with the prompt)."""
        return (len(self.tokens) - 1) / self.decode_seconds if self.decode_seconds and len(self.tokens) > 1 else 0.0

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    def close(self) -> None:
        """Stop here; the state so far goes into the prefix cache. Dropping the generation does the same."""
        self._pieces.close()  # type: ignore[attr-defined]

    def _run(self) -> Iterator[Piece]:
        session, self.reused_tokens = self._engine.resume(self.prompt)
        try:
            yield from self._pieces_of(session)
        finally:
            self._keep(session, LEAST_GAP, final=True)
            self._remember()

    def _pieces_of(self, session: Session) -> Iterator[Piece]:
        began = time.perf_counter()
        self._prefill(session)
        if not self._most:
            self.prefill_seconds = time.perf_counter() - began
            self.finish_reason = "length"
            yield Piece(None, "", "length")
            return
        began, last = time.perf_counter(), began
        self.prefill_seconds = began - last
        for count, token in enumerate(self._sample(session), 1):
            if count == 1:
                self.prefill_seconds += time.perf_counter() - began
            else:
                self.decode_seconds += time.perf_counter() - began
            piece = self._piece(token)
            if piece.finish is None and count == self._most:
                piece = Piece(token, piece.text + self._rest(), "length")
            self.text += piece.text
            self.finish_reason = piece.finish
            yield piece
            if piece.finish:
                return
            began = time.perf_counter()

    def _sample(self, session: Session) -> Iterator[int]:
        """Tokens one after the other; each is read when the next one is asked for."""
        if self._speculative:
            from hybridlm.engine.speculative import speculate

            draft = None if isinstance(self._speculative, bool) else self._speculative
            yield from speculate(session, self._sampler, self.prompt, self._eos, self._most, draft=draft)
            return
        seen = list(self.prompt)
        while True:
            token = self._sampler.sample(session.logits(), seen)
            seen.append(token)
            yield token
            session.feed([token])

    def _piece(self, token: int) -> Piece:
        if token in self._eos:
            return Piece(token, self._rest(), "eos")
        self.tokens.append(token)
        text, stopped = self._held.push(self._decoder.push(token) if self._decoder else "")
        return Piece(token, text, "stop" if stopped else None)

    def _rest(self) -> str:
        """What was held back, now that nothing follows. A stop string in it still ends the text."""
        text, stopped = self._held.push(self._decoder.finish() if self._decoder else "")
        return text if stopped else text + self._held.rest()

    # -- the prefix cache ----------------------------------------------------------------------------------------

    def _prefill(self, session: Session) -> None:
        """Read what of the prompt is not reused, stopping for checkpoints."""
        start, end, every = session.position, len(self.prompt), self._engine.checkpoint_every
        marks = {end, *range(every, end, every), *self._marks} if self._engine.cache.budget else {end}
        for mark in sorted(m for m in marks if start < m <= end):
            session.feed(self.prompt[session.position:mark])
            self._keep(session, 1 if mark in self._marks else LEAST_GAP)

    def _keep(self, session: Session, least: int, final: bool = False) -> None:
        """Put the session's state into the prefix cache, if it saves `least` tokens or more: its own if nothing will
        follow, else a copy."""
        cache, state = self._engine.cache, session.state
        if state.valid and cache.budget and state.position - cache.covered(state.tokens) >= least:
            cache.put(state if final else state.clone())


    def _remember(self) -> None:
        """Which tokens the conversation so far consists of, as its next turn will spell it."""
        if self.prompt_text is None:
            return
        tokens, decode = self.tokens, self._engine.tokenizer.decode
        for n in range(len(tokens), max(0, len(tokens) - 16), -1):  # the last ones may belong to a stop string
            if decode(tokens[:n]) == self.text:
                self._engine.said.remember(self.prompt_text + self.text, self.prompt + tokens[:n])
                return


class HeldText:
    """Finds stop strings in text that comes in pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise HybridLMError(f"stop: must be text that is not empty, not {stop!r}")
        self.stops = tuple(stops)
        self._text = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that is now certain to come before any stop string, and whether one has been found."""
        self._text += text
        found = [i for i in (self._text.find(stop) for stop in self.stops) if i >= 0]
        if found:
            before, self._text = self._text[:min(found)], ""
            return before, True
        hold = max((n for stop in self.stops for n in range(1, min(len(stop), len(self._text) + 1))
                    if self._text.endswith(stop[:n])), default=0)
        certain, self._text = self._text[:len(self._text) - hold], self._text[len(self._text) - hold:]
        return certain, False

    def rest(self) -> str:
        """What is held back, given up."""
        text, self._text = self._text, ""
        return text


def _decoder(engine: Engine, needed: bool) -> Any:
    """A fresh `StreamDecoder`, or None for a model without a tokenizer."""
    if not engine.has_tokenizer:
        if needed:
            raise HybridLMError("stop: this model has no tokenizer, so its output has no text to look for it in")
        return None
    from hybridlm.text.stream import StreamDecoder

    return StreamDecoder(engine.tokenizer)
