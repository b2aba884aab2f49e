"""Windows that say the same thing over and over: machine output, padding, broken pages. Nothing is learnt from them.

The rule is OLMo's: a phrase of at most 13 tokens that stands 32 times in a row makes the whole window worthless.
"""

from __future__ import annotations

import numpy as np

__all__ = ["repeats"]


def repeats(tokens: np.ndarray, times: int, longest: int = 13) -> bool:
    """Whether a phrase of 1 to `longest` tokens stands `times` (2 or more) times in a row in `tokens` [n].

    A phrase of p tokens repeated so often is a run of p * (times - 1) places that equal the place p further on. Each
    such run holds a multiple of its length, so only those places are looked at, and their surroundings if they match.
    """
    size = len(tokens)
    for period in range(1, longest + 1):
        run = period * (times - 1)
        places = np.arange(run - 1, size - period, run)
        for place in places[tokens[places] == tokens[places + period]].tolist():
            low, high = max(0, place - run + 1), min(size - period, place + run)
            differ = np.flatnonzero(tokens[low:high] != tokens[low + period:high + period])
            edges = np.concatenate([[-1], differ, [high - low]])
            if (np.diff(edges) - 1).max() >= run:
                return True
    return False
