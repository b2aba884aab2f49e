"""`Session`: one sequence being read and continued, a handle on its `State`.

    session = engine.session()
    logits = session.prefill(prompt)            # [vocab], what comes next
    logits = session.step(token)
    mark = session.snapshot()                   # 56 MB at 7B, however long the text: full KV pages are shared
    session.restore(mark)                       # any number of times
    session.save("talk.state"); session.load("talk.state")

Sessions of one engine may be used from several threads, each by one thread at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridlm.atomic import atomic_write
from hybridlm.engine.state import State
from hybridlm.errors import FormatError, HybridLMError

if TYPE_CHECKING:
    from hybridlm.engine.engine import Engine

__all__ = ["Session"]


class Session:
    """Made by `Engine.session()`."""

    __slots__ = ("engine", "state")

    def __init__(self, engine: Engine, state: Any) -> None:
        self.engine = engine
        self.state = state

    @property
    def tokens(self) -> list[int]:
        """What it has read."""
        return list(self.state.tokens)

    @property
    def position(self) -> int:
        """How many tokens it has read."""
        return int(self.state.position)

    def prefill(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Read tokens; float32 logits [vocab] of what follows the last one."""
        return self.engine.step([(self, tokens)])[0]

    def step(self, token: int) -> np.ndarray:
        """Read one token; float32 logits [vocab] of what follows it."""
        return self.engine.step([(self, (token,))])[0]

    def feed(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Read tokens without asking what follows."""
        self.engine.feed([(self, tokens)])

    def logits(self) -> np.ndarray:
        """Float32 logits [vocab] of what follows the last token read, also right after `restore` or `load`."""
        return self.engine.next_logits([self])[0]

    def take_back(self, count: int) -> None:
        """Forget the last `count` tokens of the last step, which must have been a trial (see `Engine.step`)."""
        self.engine.take_back(self, count)

    def snapshot(self) -> State:
        """A copy of the state to return to, or to continue in other sessions."""
        self._check()
        return self.state.clone()

    def restore(self, snapshot: State) -> None:
        """Go on from a snapshot (which stays as it is) of this session or another one of the same model."""
        if snapshot.layout != self.engine.layout:
            raise HybridLMError("snapshot: belongs to another model or another kv_type; read the text again")
        if not snapshot.valid:
            raise HybridLMError("snapshot: taken of an interrupted pass; read the text again")
        self.state = snapshot.clone()

    def save(self, path: str | Path) -> None:
        """Write the state to a file, whole or not at all."""
        self._check()
        with atomic_write(path) as file:
            self.state.write(file)

    def load(self, path: str | Path) -> None:
        """Go on from a saved state. Raises `FormatError`, changing nothing, when it is damaged or another model's."""
        path = Path(path)
        try:
            with path.open("rb") as file:
                state = State.read(file, path.stat().st_size, str(path), self.engine.layout, like=self.state)
        except OSError as error:
            reason = f"cannot be read ({error.strerror}); give a file that Session.save wrote"
            raise FormatError(f"{path}: {reason}") from None
        if any(t >= self.engine.config.vocab_size for t in state.tokens):
            raise FormatError(f"{path}: holds tokens that this model does not have; read the text again")
        self.state = state

    def _check(self) -> None:
        if not self.state.valid:
            raise HybridLMError("session: a pass was interrupted, so its memory cannot be used; restore a snapshot or "
                                "start a new session")

    def __repr__(self) -> str:
        return f"Session(position={self.position})"
