"""Speculative decoding: guess what comes next, check many guesses in one pass.

Reading eight tokens costs a memory-bound machine little more than reading one, because the weights are read once.
Guesses come from the text itself (`Lookup`: where the last few tokens have occurred before, what followed then is
guessed to follow now; prompt lookup, Saxena 2023) or from a smaller model (`Draft`). One pass reads the chosen token
and the guesses and says what follows each; the sampler then chooses token after token as it would without guesses, and
the first choice that differs from its guess ends the round. The state takes back what was guessed wrong.

Choosing with the same sampler from the same logits keeps the distribution exactly, whatever the guesses are: a right
one changes nothing but the time. The same seed even gives the same text, as far as a pass over several rows and one
over a single row round alike. A draft model samples with the random numbers that the sampler will draw next, so that
the two agree about as often as their distributions do.

How many guesses are worth checking follows from how many were right lately: the number k that makes
(1 + p + ... + p^k) / cost(k) largest, where p is the recent rate and cost(k) what a pass with k guesses costs next to
a plain one. Where even one guess does not pay, none is made, except for a probe now and then.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Protocol

from hybridlm.engine.sampler import Sampler
from hybridlm.errors import HybridLMError

if TYPE_CHECKING:
    from hybridlm.engine.engine import Engine
    from hybridlm.engine.session import Session
    from hybridlm.engine.state import State

__all__ = ["Draft", "Guesser", "Lookup", "Pace", "speculate"]

MOST_GUESSES = 7  # with the chosen token a pass of 8 rows


class Guesser(Protocol):
    """Guesses what continues a growing text."""

    tokens: list[int]

    def extend(self, tokens: Sequence[int]) -> None:
        """The text has grown by these."""

    def ready(self) -> bool:
        """Whether there is anything to guess."""

    def guess(self, most: int) -> list[int]:
        """Up to `most` tokens that may come next."""


class Lookup:
    """Where each run of a few tokens was last seen in a growing text, and what followed."""

    def __init__(self, lengths: Sequence[int] = (5, 3)) -> None:
        """`lengths` of the runs to remember, the most telling first."""
        self.lengths = tuple(lengths)
        self.tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # run -> index of what followed it last

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            end = len(self.tokens)
            for n in self.lengths:
                if end >= n:
                    self._after[tuple(self.tokens[end - n:])] = end
            self.tokens.append(int(token))

    def ready(self) -> bool:
        return bool(self.guess(1))

    def guess(self, most: int) -> list[int]:
        """Up to `most` tokens that may come next. A text that repeats itself is guessed to go on repeating."""
        for n in self.lengths:
            start = self._after.get(tuple(self.tokens[-n:])) if len(self.tokens) >= n else None
            if start is not None:
                period = len(self.tokens) - start
                return [self.tokens[start + i % period] for i in range(most)]
        return []


class Draft:
    """Guesses of a smaller model with the same vocabulary, which reads along."""

    def __init__(self, engine: Engine, target: Engine, sampler: Sampler) -> None:
        """`sampler` is the one that chooses; copies of it, with its random numbers to come, make the guesses."""
        if engine.config.vocab_size != target.config.vocab_size:
            raise HybridLMError(f"draft: has a vocabulary of {engine.config.vocab_size} tokens, {target.name} of "
                                f"{target.config.vocab_size}; guesses need the same tokenizer")
        self.tokens: list[int] = []
        self.pace = Pace(Pace.ROW_COST + engine.decode_bytes_per_token() / target.decode_bytes_per_token())
        self._session, self._sampler = engine.session(), sampler
        self._before: State | None = None  # the guesses: recurrent states cannot be shortened

    def extend(self, tokens: Sequence[int]) -> None:
        self.tokens.extend(int(t) for t in tokens)

    def ready(self) -> bool:
        return True

    def guess(self, most: int) -> list[int]:
        session, sampler = self._session, copy.deepcopy(self._sampler)
        if session.tokens != self.tokens[:session.position]:  # some guess was wrong
            assert self._before is not None
            session.restore(self._before)
        most = min(most, session.engine.context - len(self.tokens))
        if most <= 0:
            return []
        session.feed(self.tokens[session.position:])
        self._before = session.snapshot()
        guesses: list[int] = []
        while True:
            guesses.append(sampler.sample(session.logits(), chain(self.tokens, guesses)))
            if len(guesses) == most:
                return guesses
            session.feed(guesses[-1:])


class Pace:
    """How many guesses are worth a pass."""

    START, WEIGHT, DRIFT = 0.7, 0.08, 0.004
    ROW_COST = 0.13

    def __init__(self, row_cost: float = ROW_COST, start_cost: float = 0.03, undo_cost: float = 0.02) -> None:
        """What a pass costs beyond a plain one, as shares of it: for each guess, for being a trial, and for taking
        guesses back. (As measured on two cores with models of 190M to 1B in 4 bits.)"""
        self.row_cost, self.start_cost, self.undo_cost = row_cost, start_cost, undo_cost
        self.rate = self.START  # of guesses that were right, lately

    def guesses(self, most: int = MOST_GUESSES) -> int:
        """The best number, 0 where none pays."""
        best, count, gain, chance = 1.0, 0, 1.0, 1.0
        for k in range(1, most + 1):
            chance *= self.rate
            gain += chance
            worth = gain / (1 + self.start_cost + k * self.row_cost + (1 - chance) * self.undo_cost)
            if worth > best:
                best, count = worth, k
        return count

    def note(self, right: int, checked: int) -> None:
        """After a pass: so many guesses were right before the first wrong one, so many were checked."""
        for i in range(min(right + 1, checked)):
            self.rate += self.WEIGHT * ((i < right) - self.rate)

    def skip(self) -> None:
        """A guess was at hand but none was made: forget slowly how bad they were, so that one is tried again."""
        self.rate += self.DRIFT * (self.START - self.rate)


def speculate(session: Session, sampler: Sampler, prompt: Sequence[int], eos: frozenset[int] = frozenset(),
              most: int | None = None, pace: Pace | None = None, draft: Engine | None = None) -> Iterator[int]:
    """The tokens that plain decoding would choose, one by one, without end unless `most` says so.

    `session` has read `prompt`. Guesses come from the text, or from `draft`, a smaller model with the same vocabulary.
    When a token comes out, the session has read all before it, and none after it.
    """
    engine = session.engine
    guesser: Lookup | Draft = Lookup() if draft is None else Draft(draft, session.engine, sampler)
    pace = pace or (guesser.pace if isinstance(guesser, Draft) else Pace())
    guesser.extend(prompt)
    token, made = sampler.sample(session.logits(), guesser.tokens), 0
    while True:
        yield token
        made += 1
        guesser.extend([token])
        room = engine.context - session.position - 1
        if most is not None:
            room = min(room, most - made - 1)
        guesses: list[int] = []
        if room > 0 and token not in eos and guesser.ready():
            if count := pace.guesses(min(MOST_GUESSES, room)):
                guesses = guesser.guess(count)
            else:
                pace.skip()
        if not guesses:
            session.feed([token])
            token = sampler.sample(session.logits(), guesser.tokens)
            continue
        rows = engine.step([(session, [token, *guesses])], every=True, trial=True)
        chosen: list[int] = []
        for i in range(len(guesses) + 1):
            chosen.append(sampler.sample(rows[i], chain(guesser.tokens, chosen)))
            if i == len(guesses) or chosen[i] != guesses[i] or chosen[i] in eos:
                break
        pace.note(sum(a == b for a, b in zip(chosen, guesses, strict=False)), len(guesses))
        read = 0  # of the guesses
        try:
            for token in chosen[:-1]:
                yield token
                read, made = read + 1, made + 1
                guesser.extend([token])
        finally:  # also when the caller has seen enough
            session.take_back(len(guesses) - read)
        token = chosen[-1]
