"""Choosing the next token from logits. Pure numpy, float64.

The steps, in this order, each with its neutral value:

    logit_bias (none)         added to the logits of given tokens
    repetition_penalty r (1)  logits of tokens seen so far (prompt and output): l / r where l > 0, else l * r
                              (CTRL, arXiv 1909.05858)
    frequency_penalty f (0)   l - f * (how often the output has the token), as OpenAI's API defines it
    presence_penalty p (0)    l - p where the output has the token at all
    allowed (all)             only these tokens, whatever else
    temperature t (1)         p = softmax(l / t); t = 0 is greedy: the largest logit, of equals the smallest id
    top_k k (0)               only the k most probable tokens
    top_p p (1)               of these, renormalised, the fewest most probable ones that together reach p
    min_p m (0)               of these, only tokens with at least m times the probability of the most probable one

Among equal probabilities the smaller id counts as more probable. What remains is renormalised and one uniform number
is drawn, so a seed fixes the output.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from hybridlm.errors import HybridLMError

__all__ = ["Sampler", "log_softmax"]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """log(softmax) over the last axis in float64: x - max - log(sum(exp(x - max)))."""
    x = np.asarray(logits, dtype=np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))


@dataclass(frozen=True, slots=True)
class _Settings:
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, needs: str) -> None:
            if not ok:
                raise HybridLMError(f"{name}: must be {needs}, not {getattr(self, name)!r}")

        check(_finite(self.temperature) and self.temperature >= 0, "temperature", "0 (greedy) or a positive number")
        check(isinstance(self.top_k, int) and self.top_k >= 0, "top_k", "0 (off) or a positive whole number")
        check(_finite(self.top_p) and 0 < self.top_p <= 1, "top_p", "above 0 and at most 1 (off)")
        check(_finite(self.min_p) and 0 <= self.min_p <= 1, "min_p", "from 0 (off) to 1")
        check(_finite(self.repetition_penalty) and self.repetition_penalty > 0, "repetition_penalty",
              "a positive number (1 is off)")
        for name in ("frequency_penalty", "presence_penalty"):
            check(_finite(getattr(self, name)), name, "a number (0 is off)")


class Sampler:
    """A choice rule with its own random stream. Raises `HybridLMError` for settings that make no sense."""

    def __init__(self, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
                 repetition_penalty: float = 1.0, seed: int | None = None, *, frequency_penalty: float = 0.0,
                 presence_penalty: float = 0.0, logit_bias: Mapping[int, float] | None = None) -> None:
        self.settings = _Settings(temperature, top_k, top_p, min_p, repetition_penalty, frequency_penalty,
                                  presence_penalty)
        if seed is not None and (not isinstance(seed, int) or seed < 0):
            raise HybridLMError(f"seed: must be a whole number from 0 up, not {seed!r}")
        bias = dict(logit_bias or {})
        if not all(isinstance(t, int) and t >= 0 and _finite(v) for t, v in bias.items()):
            raise HybridLMError("logit_bias: must give token ids numbers")
        self._bias_ids, self._bias = np.array(list(bias), dtype=np.int64), np.array(list(bias.values()), np.float64)
        self._plain = not bias and repetition_penalty == 1 and not frequency_penalty and not presence_penalty
        self.rng = np.random.default_rng(seed)

    def sample(self, logits: np.ndarray, seen: Iterable[int] = (), *, written: Iterable[int] = (),
               allowed: np.ndarray | None = None) -> int:
        """One token id from logits [vocab].

        Args:
            seen: the tokens so far, for the repetition penalty.
            written: those of the output alone, for the frequency and presence penalties.
            allowed: bool [vocab], the tokens to choose from.
        """
        if self.settings.temperature == 0:
            if self._plain and allowed is None:
                return _largest(logits)
            return int(np.argmax(self._penalised(logits, seen, written, allowed)))
        ids, p = self._candidates(logits, seen, written, allowed)
        total = np.cumsum(p)
        return int(ids[min(np.searchsorted(total, self.rng.random() * total[-1], side="right"), len(ids) - 1)])

    def probabilities(self, logits: np.ndarray, seen: Iterable[int] = (), *, written: Iterable[int] = (),
                      allowed: np.ndarray | None = None) -> np.ndarray:
        """The distribution that `sample` draws from, float64 [vocab]."""
        out = np.zeros(len(logits))
        if self.settings.temperature == 0:
            out[int(np.argmax(self._penalised(logits, seen, written, allowed)))] = 1.0
            return out
        ids, p = self._candidates(logits, seen, written, allowed)
        out[ids] = p / p.sum()
        return out

    def _penalised(self, logits: np.ndarray, seen: Iterable[int], written: Iterable[int],
                   allowed: np.ndarray | None) -> np.ndarray:
        _largest(logits)
        x, s = np.array(logits, dtype=np.float64), self.settings
        if len(self._bias_ids):
            known = self._bias_ids < len(x)
            x[self._bias_ids[known]] += self._bias[known]
        if s.repetition_penalty != 1:
            ids = np.unique(np.fromiter(seen, dtype=np.int64))
            values = x[ids]
            x[ids] = np.where(values > 0, values / s.repetition_penalty, values * s.repetition_penalty)
        if s.frequency_penalty or s.presence_penalty:
            ids, counts = np.unique(np.fromiter(written, dtype=np.int64), return_counts=True)
            x[ids] -= s.frequency_penalty * counts + s.presence_penalty
        if allowed is not None:
            if not allowed.any():
                raise HybridLMError("constraint: allows no token here; it cannot be met")
            x[~allowed] = -np.inf
        return x

    def _candidates(self, logits: np.ndarray, seen: Iterable[int], written: Iterable[int],
                    allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Ids that may be drawn, most probable first where a cut needed the order, and their weights."""
        s = self.settings
        x = self._penalised(logits, seen, written, allowed)
        x -= x.max()
        x /= max(s.temperature, 1e-30)
        ids = np.flatnonzero(x > -745.0)  # below, exp is zero in float64
        if 0 < s.top_k < len(ids):
            # All that tie with the k-th largest stay until the stable sort has settled which ids are smaller.
            kth = np.partition(x[ids], len(ids) - s.top_k)[len(ids) - s.top_k]
            ids = ids[x[ids] >= kth]
            ids = ids[np.argsort(-x[ids], kind="stable")][:s.top_k]
        p = np.exp(x[ids])
        p /= p.sum()
        if s.top_p < 1:
            # Tokens below (1 - top_p) / n together weigh less than 1 - top_p: none is needed, none must be sorted.
            keep = p >= min((1 - s.top_p) / len(ids) * (1 - 1e-9), p.max())
            ids, p = ids[keep], p[keep]
            order = np.argsort(-p, kind="stable")
            ids, p = ids[order], p[order]
            count = int(np.searchsorted(np.cumsum(p), s.top_p * (1 - 1e-12))) + 1
            ids, p = ids[:count], p[:count]
        if s.min_p > 0:
            keep = p >= s.min_p * p.max()
            ids, p = ids[keep], p[keep]
        return ids, p


def _finite(value: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _largest(logits: np.ndarray) -> int:
    """The index of the largest of a vector, of equals the first, checked to be a number."""
    if np.ndim(logits) != 1 or not np.size(logits):
        raise HybridLMError(f"logits: expected one vector, not shape {np.shape(logits)}")
    best = int(np.argmax(logits))
    if not math.isfinite(logits[best]):  # also NaN, which argmax finds first
        raise HybridLMError("logits: not finite; the model file is damaged or its numbers overflow")
    return best
