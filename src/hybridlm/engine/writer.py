"""`Writer`: one output in the making, whoever makes the passes.

It knows what of the prompt is to be read next and where to stop for checkpoints, chooses tokens, turns them into text,
and decides when it is over. `Generation` drives one of these from the caller's thread, the scheduler many of them from
its own. Text that may be the beginning of a stop string is held back until that is decided, so what was shown is never
taken back.

Long prompts are read in slices. Kernels divide their work by how many rows a slice has and where it begins, so slices
end at multiples of `step`, at checkpoints and at the prompt's end and nowhere else: how a prompt is cut, and with it
every bit of the result, depends on the prompt alone and not on what else runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hybridlm.engine.passes import SLAB
from hybridlm.engine.sampler import Sampler, log_softmax
from hybridlm.errors import HybridLMError

if TYPE_CHECKING:
    from hybridlm.engine.engine import Engine
    from hybridlm.engine.session import Session

__all__ = ["LEAST_GAP", "Constraint", "HeldText", "Piece", "Writer"]

LEAST_GAP = 16  # a checkpoint that saves fewer tokens than this over the one before it is not worth its memory


class Constraint(Protocol):
    """What an output may consist of, asked before and told after each token."""

    def allowed(self) -> np.ndarray | None:
        """Bool [vocab], the tokens that may come next; None where all may."""

    def push(self, token: int) -> bool:
        """A token was chosen; whether the output is now complete and must end."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One generated token and the text that it made certain."""

    token: int | None  # None only where nothing was generated (max_tokens=0)
    text: str  # "" while a character is unfinished or a stop string may be beginning
    finish: str | None = None  # in the last piece: "eos", "stop" (a stop string), "length" or "time" (a deadline)
    logprob: float | None = None  # of the token under the model's own distribution, where asked for
    top: tuple[tuple[int, float], ...] = ()  # the most probable tokens and their log-probabilities, where asked for


class Writer:
    """Raises `HybridLMError` where the request cannot be met: a prompt longer than the context, odd options."""

    def __init__(self, engine: Engine, prompt: Sequence[int], sampler: Sampler, *, max_tokens: int | None = None,
                 stop: tuple[str, ...] = (), eos: Sequence[int] = (), checkpoints: Sequence[int] = (),
                 prompt_text: str | None = None, constraint: Constraint | None = None,
                 logprobs: int | None = None) -> None:
        """
        Args:
            max_tokens, stop, checkpoints: as for `Engine.generate`.
            eos: token ids that end the output.
            prompt_text: the rendered text of a conversation, whose next turn will begin with it.
            constraint: what the output may consist of.
            logprobs: log-probabilities wanted: None, or how many of the most probable tokens besides the chosen one.
        """
        room = engine.context - len(prompt)
        if room < 0:
            raise HybridLMError(f"context: the prompt has {len(prompt)} tokens, the context only {engine.context}; "
                                "open the model with a larger context or shorten the prompt")
        if max_tokens is not None and (not isinstance(max_tokens, int) or max_tokens < 0):
            raise HybridLMError(f"max_tokens: must be a whole number from 0 up, not {max_tokens!r}")
        self.engine, self.sampler, self.constraint = engine, sampler, constraint
        self.prompt: list[int] = engine._ids(prompt).tolist()
        self.prompt_text = prompt_text
        self.step = SLAB  # rows of a slice; a multiple of 64, as are all devices' chunks of the delta rule
        self.reused_tokens = 0  # of the prompt, known when it has begun
        self.tokens: list[int] = []  # generated, the token that ended the text (eos) left out
        self.text = ""  # of all pieces so far
        self.finish_reason: str | None = None
        self.eos = frozenset(eos)
        # The last token is chosen but not read, so one more than the room is possible; it is not used.
        self.most = room if max_tokens is None else min(max_tokens, room)
        self._checkpoints = frozenset(checkpoints)
        self._logprobs = logprobs
        self._seen = list(self.prompt)
        self._written = 0
        self._held = HeldText(stop)
        self._decoder = _decoder(engine, bool(stop))
        self._session: Session | None = None
        self._marks: list[int] = []

    # -- reading the prompt --------------------------------------------------------------------------------------

    def begin(self) -> Session:
        """Take up the sequence at the longest checkpoint in the prefix cache."""
        self._session, self.reused_tokens = self.engine.resume(self.prompt)
        end, every = len(self.prompt), self.engine.checkpoint_every
        marks = {end, *range(every, end, every), *self._checkpoints} if self.engine.cache.budget else {end}
        self._marks = sorted((m for m in marks if m <= end), reverse=True)
        return self._session

    @property
    def session(self) -> Session:
        assert self._session is not None, "begin() first"
        return self._session

    @property
    def begun(self) -> bool:
        return self._session is not None

    @property
    def unread(self) -> int:
        """Prompt tokens still to be read; before `begin`, as far as the cache can tell."""
        if self._session is None:
            return len(self.prompt) - self.engine.cache.covered(self.prompt)
        return max(0, len(self.prompt) - self._session.position)

    def slice(self) -> list[int]:
        """The prompt tokens to read next, `step` or fewer; none once all are read."""
        at = self.session.position
        while self._marks and self._marks[-1] <= at:
            self._marks.pop()
        if not self._marks:
            return []
        return self.prompt[at:min(self._marks[-1], at + self.step - at % self.step)]

    def keep(self) -> None:
        """After a slice: a checkpoint, if one belongs here."""
        at = self.session.position
        if self._marks and at == self._marks[-1]:
            self._store(1 if at in self._checkpoints else LEAST_GAP)

    # -- writing -------------------------------------------------------------------------------------------------

    def nothing(self) -> Piece | None:
        """The only piece of an output that may have no token."""
        if self.most:
            return None
        self.finish_reason = "length"
        return Piece(None, "", "length")

    def write(self, logits: np.ndarray) -> Piece:
        """Choose the next token from what follows the last one, float32 [vocab]."""
        allowed = self.constraint.allowed() if self.constraint is not None else None
        token = self.sampler.sample(logits, self._seen, written=self.tokens, allowed=allowed)
        self._seen.append(token)
        return self.take(token, logits)

    def take(self, token: int, logits: np.ndarray | None = None) -> Piece:
        """Go on with a token that was chosen elsewhere."""
        self._written += 1
        logprob: float | None = None
        top: tuple[tuple[int, float], ...] = ()
        if self._logprobs is not None and logits is not None:
            logprob, top = _logprobs(logits, token, self._logprobs)
        finish = None
        if token in self.eos:
            text, finish = self._rest(), "eos"
        else:
            self.tokens.append(token)
            text, stopped = self._held.push(self._decoder.push(token) if self._decoder else "")
            if stopped:
                finish = "stop"
            elif self.constraint is not None and self.constraint.push(token):
                text, finish = text + self._rest(), "eos"
            elif self._written >= self.most:
                text, finish = text + self._rest(), "length"
        self.text += text
        self.finish_reason = finish
        return Piece(token, text, finish, logprob, top)

    def cut(self, reason: str) -> Piece:
        """End the output here, between two tokens."""
        text = self._rest()
        self.text += text
        self.finish_reason = reason
        return Piece(None, text, reason)

    def end(self) -> None:
        """Nothing more will be read or written: the state goes into the prefix cache, the text into memory."""
        if self._session is not None:
            self._store(LEAST_GAP, final=True)
            self._session = None  # who looks at the output still need not hold its state
        self._remember()

    def _rest(self) -> str:
        """What was held back, now that nothing follows. A stop string in it still ends the text."""
        text, stopped = self._held.push(self._decoder.finish() if self._decoder else "")
        return text if stopped else text + self._held.rest()

    # -- the prefix cache ----------------------------------------------------------------------------------------

    def _store(self, least: int, final: bool = False) -> None:
        """Put the session's state into the prefix cache, if it saves `least` tokens or more: its own if nothing will
        follow, else a copy."""
        cache, state = self.engine.cache, self.session.state
        if state.valid and cache.budget and state.position - cache.covered(state.tokens) >= least:
            cache.put(state if final else state.clone())

    def _remember(self) -> None:
        """Which tokens the conversation so far consists of, as its next turn will spell it."""
        if self.prompt_text is None:
            return
        tokens, decode = self.tokens, self.engine.tokenizer.decode
        for n in range(len(tokens), max(0, len(tokens) - 16), -1):  # the last ones may belong to a stop string
            if decode(tokens[:n]) == self.text:
                self.engine.said.remember(self.prompt_text + self.text, self.prompt + tokens[:n])
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


def _logprobs(logits: np.ndarray, token: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    x = log_softmax(logits)
    best = np.argpartition(-x, count - 1)[:count] if 0 < count < len(x) else np.arange(len(x))[:count]
    best = best[np.argsort(-x[best], kind="stable")]
    return float(x[token]), tuple((int(i), float(x[i])) for i in best)


def _decoder(engine: Engine, needed: bool) -> Any:
    """A fresh `StreamDecoder`, or None for a model without a tokenizer."""
    if not engine.has_tokenizer:
        if needed:
            raise HybridLMError("stop: this model has no tokenizer, so its output has no text to look for it in")
        return None
    from hybridlm.text.stream import StreamDecoder

    return StreamDecoder(engine.tokenizer)
