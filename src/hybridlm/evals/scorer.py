"""What an evaluation needs of a model, in numpy: `Engine` has it as it is, `TorchScorer` gives it to a `HybridLM`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

__all__ = ["Scorer"]


class Scorer(Protocol):
    """Log-probabilities of given texts, as token ids."""

    @property
    def context(self) -> int:
        """The most tokens that the model was made to read in one go."""
        ...

    def logprobs(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Float32 [T - 1]: the log-probability (natural) of each token but the first, given those before it."""
        ...

    def score(self, texts: Sequence[Sequence[int] | np.ndarray]) -> list[np.ndarray]:
        """`logprobs` of several texts, which a model may read side by side."""
        ...

    def continuations(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]],
                      prefix: int = 0) -> list[tuple[float, bool]]:
        """Of (context, continuation) pairs, both of at least one token: the continuation's log-probability, and whether
        it is what greedy decoding writes. The first `prefix` tokens are the same in all contexts (and fewer than any
        has); the model need read them only once, for later calls with the same ones too."""
        ...

    def generate_until(self, prompts: Sequence[Sequence[int]], max_tokens: int, stop: Sequence[str] = (),
                       prefix: int = 0) -> list[str]:
        """Greedy text after each prompt, without the stop string that ended it."""
        ...
