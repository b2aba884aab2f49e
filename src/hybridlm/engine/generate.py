"""Generation: prompt in, pieces of text out, at the pace of whoever iterates.

It reads the prompt at its first step, from the longest checkpoint in the prefix cache on, keeps checkpoints on the
way, then gives one token at a time. What it reads and writes is decided by its `Writer`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from hybridlm.engine.sampler import Sampler
from hybridlm.engine.writer import Piece, Writer

if TYPE_CHECKING:
    from hybridlm.engine.engine import Engine
    from hybridlm.engine.session import Session

__all__ = ["Generation"]


class Generation:
    """Iterate over it for `Piece`s; its attributes tell what has happened so far."""

    def __init__(self, engine: Engine, prompt: list[int], sampler: Sampler, *, max_tokens: int | None = None,
                 stop: tuple[str, ...] = (), eos: tuple[int, ...] = (), checkpoints: Sequence[int] = (),
                 speculative: bool | Engine = False) -> None:
        self._writer = Writer(engine, prompt, sampler, max_tokens=max_tokens, stop=stop, eos=eos,
                              checkpoints=checkpoints)
        self.prefill_seconds = 0.0  # spent on what of the prompt was not reused
        self.decode_seconds = 0.0  # spent since
        self._speculative = speculative
        self._pieces = self._run()

    @property
    def prompt(self) -> list[int]:
        return self._writer.prompt

    @property
    def prompt_text(self) -> str | None:
        """The rendered text of a conversation, whose next turn will begin with it."""
        return self._writer.prompt_text

    @prompt_text.setter
    def prompt_text(self, text: str) -> None:
        self._writer.prompt_text = text

    @property
    def prompt_tokens(self) -> int:
        return len(self._writer.prompt)

    @property
    def reused_tokens(self) -> int:
        """Of the prompt, known when iteration has begun."""
        return self._writer.reused_tokens

    @property
    def tokens(self) -> list[int]:
        """Generated; the token that ended the text (eos) is left out."""
        return self._writer.tokens

    @property
    def text(self) -> str:
        """Of all pieces so far."""
        return self._writer.text

    @property
    def finish_reason(self) -> str | None:
        return self._writer.finish_reason

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
        session = self._writer.begin()
        try:
            yield from self._pieces_of(session)
        finally:
            self._writer.end()

    def _pieces_of(self, session: Session) -> Iterator[Piece]:
        writer, began = self._writer, time.perf_counter()
        while tokens := writer.slice():
            session.feed(tokens)
            writer.keep()
        if nothing := writer.nothing():
            self.prefill_seconds = time.perf_counter() - began
            yield nothing
            return
        for count, piece in enumerate(self._sample(session)):
            now = time.perf_counter()
            if count:
                self.decode_seconds += now - began
            else:
                self.prefill_seconds = now - began
            yield piece
            if piece.finish:
                return
            began = time.perf_counter()

    def _sample(self, session: Session) -> Iterator[Piece]:
        """Piece after piece; each token is read when the next one is asked for."""
        writer = self._writer
        if self._speculative:
            from hybridlm.engine.speculative import speculate

            draft = None if isinstance(self._speculative, bool) else self._speculative
            for token in speculate(session, writer.sampler, writer.prompt, writer.eos, writer.most, draft=draft):
                yield writer.take(token)
            return
        while True:
            piece = writer.write(session.logits())
            yield piece
            session.feed([piece.token])  # type: ignore[list-item]
