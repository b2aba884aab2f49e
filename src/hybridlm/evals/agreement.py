"""Agreement: how far two ways of computing the same model's logits lie apart, and whether that is within a budget.

A `Path` is one way: a format, a kernel, a device, a way of batching. Two of them read the same tokens; of every
position we take the Kullback-Leibler divergence KL(reference || other) of the next token's distribution, in nats, and
whether both would choose the same token. Rows arrive in blocks and are dropped once counted, so memory does not grow
with the length of a text: 16k tokens of a 100k vocabulary are 6.6 GB of logits, of which two blocks exist at a time.

Three figures tell rounding from a defect. The maximum finds the one position that is wrong where the mean hides it.
Top-1 agreement counts only positions where the reference prefers its token by more than `MARGIN`, for a tie may fall
either way in a correct program. Growth by octaves of position shows an error that a recurrent state carries along and
piles up: rounding stays level, a wrong state does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from hybridlm.errors import DataError

__all__ = ["MARGIN", "Agreement", "Budget", "Octave", "Path", "compare", "divergences"]

MARGIN = 0.1  # nats between the reference's first and second choice, above which the choice must be the same
_CELLS = 1 << 21  # of one block of float64 work: 16 MB a buffer

Rows = Iterator[np.ndarray]


@dataclass(frozen=True, slots=True)
class Path:
    """A way to compute logits.

    `rows(tokens)`, tokens int32 [T], yields float32 blocks [n, vocab] of any n, T rows in all: row t is what follows
    tokens[0..t]. A block may be a view that the next one overwrites.
    """

    name: str
    rows: Callable[[np.ndarray], Rows]


@dataclass(frozen=True, slots=True)
class Budget:
    """What a pair may differ by; nats per token, and shares of positions."""

    mean_kl: float
    max_kl: float
    top1: float = 1.0  # least agreement where the reference's margin exceeds MARGIN
    growth: float = 8.0  # most that the last octave's mean may be of that before it, once it is half of mean_kl


@dataclass(slots=True)
class Octave:
    """Sums over the positions `first` to `last` (exclusive), a power of two and its double."""

    first: int
    last: int
    rows: int = 0
    kl: float = 0.0
    max_kl: float = 0.0
    same: int = 0

    @property
    def mean_kl(self) -> float:
        return self.kl / self.rows if self.rows else 0.0


@dataclass(slots=True)
class Agreement:
    """The result of `compare`."""

    reference: str
    other: str
    budget: Budget
    rows: int = 0
    kl: float = 0.0
    max_kl: float = 0.0
    worst: tuple[int, int] = (0, 0)  # text and position of the largest divergence
    same: int = 0  # positions with the same first choice
    clear: int = 0  # positions where the reference's margin exceeds MARGIN
    clear_same: int = 0
    not_finite: int = 0  # positions where either had a NaN or an infinity
    octaves: list[Octave] = field(default_factory=list)

    @property
    def mean_kl(self) -> float:
        return self.kl / self.rows

    @property
    def top1(self) -> float:
        return self.same / self.rows

    @property
    def top1_clear(self) -> float:
        """Of the positions with a clear first choice; 1 where there is none."""
        return self.clear_same / self.clear if self.clear else 1.0

    @property
    def growth(self) -> float:
        """Mean divergence in the last octave over that of all before it; 1 where there is none."""
        full = [o for o in self.octaves if o.rows]
        rows = sum(o.rows for o in full[:-1])
        before = sum(o.kl for o in full[:-1]) / rows if rows else 0.0
        return full[-1].mean_kl / before if before else 1.0

    @property
    def broken(self) -> list[str]:
        """What exceeds the budget, in words; empty when all is well."""
        b, found = self.budget, []
        if self.not_finite:
            found.append(f"{self.not_finite} positions with NaN or infinite logits")
        if not self.mean_kl <= b.mean_kl:
            found.append(f"mean KL {self.mean_kl:.2e} above {b.mean_kl:.0e}")
        if not self.max_kl <= b.max_kl:
            found.append(f"max KL {self.max_kl:.2e} above {b.max_kl:.0e} (text {self.worst[0]}, position "
                         f"{self.worst[1]})")
        if self.top1_clear < b.top1:
            found.append(f"top-1 agreement {self.top1_clear:.4%} below {b.top1:.2%} where the margin exceeds "
                         f"{MARGIN} nat")
        if self.growth > b.growth and self.octaves[-1].mean_kl > b.mean_kl / 2:
            found.append(f"the last octave diverges {self.growth:.1f} times as much as those before it, more than "
                         f"{b.growth:.1f}")
        return found

    @property
    def passed(self) -> bool:
        return not self.broken

    def to_dict(self) -> dict[str, Any]:
        """For JSON: no infinities."""
        budget = {k: v for k, v in asdict(self.budget).items() if math.isfinite(v)}
        octaves = [{"first": o.first, "last": o.last, "positions": o.rows, "mean_kl": _finite(o.mean_kl),
                    "max_kl": _finite(o.max_kl), "top1": o.same / o.rows} for o in self.octaves if o.rows]
        return {"reference": self.reference, "other": self.other, "positions": self.rows,
                "mean_kl": _finite(self.mean_kl), "max_kl": _finite(self.max_kl), "worst_text": self.worst[0],
                "worst_position": self.worst[1], "top1": self.top1, "top1_clear": self.top1_clear,
                "clear_positions": self.clear, "not_finite": self.not_finite, "growth": _finite(self.growth),
                "octaves": octaves, "budget": budget, "passed": self.passed, "broken": self.broken}


def compare(reference: Path, other: Path, texts: Sequence[np.ndarray], budget: Budget, *,
            progress: Callable[[int], None] | None = None) -> Agreement:
    """Read all texts (int [T] each) both ways. `progress` is called with the number of positions compared so far.

    Raises `DataError` where there is nothing to compare or a path gives another number of rows than tokens.
    """
    found = Agreement(reference.name, other.name, budget)
    for number, text in enumerate(texts):
        tokens = np.asarray(text, np.int32)
        at = 0
        for a, b in _side_by_side(reference.rows(tokens), other.rows(tokens)):
            if a.shape != b.shape:
                raise DataError(f"{reference.name} and {other.name}: vocabularies of {a.shape[1]} and {b.shape[1]} "
                                "tokens do not compare")
            _count(found, number, at, a, b)
            at += len(a)
            if progress:
                progress(found.rows)
        if at != len(tokens):
            raise DataError(f"{reference.name} and {other.name}: gave {at} rows in common for {len(tokens)} tokens")
    if not found.rows:
        raise DataError("no tokens to compare on; give text that is not empty")
    return found


def divergences(reference: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of logits [n, vocab] each: KL(reference || other) float64 [n], infinite where a logit is not finite, and the
    reference's margin in nats [n] between its first and second choice."""
    a, b = reference.astype(np.float64), other.astype(np.float64)
    good = np.isfinite(a).all(axis=1) & np.isfinite(b).all(axis=1)
    a[~good], b[~good] = 0, 0
    for x in (a, b):
        x -= x.max(axis=1, keepdims=True)
        x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    kl = np.einsum("nv,nv->n", np.exp(a), a - b)
    kl = np.maximum(kl, 0.0)  # of equal rows the sum is a rounding error, of either sign
    top = np.partition(a, -2, axis=1)[:, -2:] if a.shape[1] > 1 else np.concatenate([a - np.inf, a], axis=1)
    kl[~good] = np.inf
    return kl, top[:, 1] - top[:, 0]


def _count(found: Agreement, text: int, at: int, a: np.ndarray, b: np.ndarray) -> None:
    step = max(1, _CELLS // a.shape[1])
    for i in range(0, len(a), step):
        x, y = a[i:i + step], b[i:i + step]
        kl, margin = divergences(x, y)
        same = x.argmax(axis=1) == y.argmax(axis=1)
        finite, clear = np.isfinite(kl), margin > MARGIN
        found.not_finite += int((~finite).sum())
        found.rows += len(kl)
        found.kl += float(kl.sum())
        found.same += int(same.sum())
        found.clear += int(clear.sum())
        found.clear_same += int((same & clear).sum())
        worst = int(kl.argmax())
        if kl[worst] > found.max_kl:
            found.max_kl, found.worst = float(kl[worst]), (text, at + i + worst)
        positions = np.arange(at + i, at + i + len(kl))
        octaves = np.frexp(positions)[1]  # 0: 0; 1: 1; 2, 3: 2; 4 to 7: 3
        for k in np.unique(octaves):
            mine = octaves == k
            octave = _octave(found.octaves, int(k))
            octave.rows += int(mine.sum())
            octave.kl += float(kl[mine].sum())
            octave.max_kl = max(octave.max_kl, float(kl[mine].max()))
            octave.same += int(same[mine].sum())


def _octave(octaves: list[Octave], k: int) -> Octave:
    """The octave of positions 2^(k-1) to 2^k; the first 32 positions are one."""
    k = max(0, k - 5)
    while len(octaves) <= k:
        n = len(octaves)
        octaves.append(Octave(0 if n == 0 else 1 << (n + 4), 1 << (n + 5)))
    return octaves[k]


def _side_by_side(first: Iterable[np.ndarray], second: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The rows of two streams of blocks, in blocks of equal length, until either ends."""
    a_blocks, b_blocks = iter(first), iter(second)
    a: np.ndarray | None = None
    b: np.ndarray | None = None
    while True:
        a = next(a_blocks, None) if a is None or not len(a) else a
        b = next(b_blocks, None) if b is None or not len(b) else b
        if a is None or b is None:
            return
        n = min(len(a), len(b))
        if n:
            yield a[:n], b[:n]
        a, b = a[n:], b[n:]


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None
