"""The ways an engine can read the same tokens, as `Path`s for `agreement.compare`.

All take an `Engine` of any device; nothing here knows one. Each must give what reading the whole text in one go gives,
up to rounding: it is what chat, serving and the prefix cache rely on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from hybridlm.evals.agreement import Agreement, Budget, Path, Rows

__all__ = ["BF16", "EIGHT_BIT", "EXACT", "Pair", "among_others", "device_pairs", "in_pieces", "pairs_of",
           "saved_and_loaded", "token_by_token", "whole"]

# Measured on the 22M model: float32 kernels agree to 4e-13 on average and 6e-12 at worst. Activations rounded to 8 bits
# amplify the last bit of what goes into the rounding, so that every two paths differ by it: 5e-4 and 3e-3.
EXACT = Budget(mean_kl=1e-7, max_kl=1e-5)
EIGHT_BIT = Budget(mean_kl=5e-3, max_kl=5e-2, top1=0.98)

# What rounding weights' products to bfloat16 may cost a model in PyTorch's own operations.
BF16 = Budget(mean_kl=1e-2, max_kl=1.0, top1=0.98)
FAST = 1.1  # times that, measured, is what a fast path may cost

# Reference, other, what they may differ by; the last may be known only when it is their turn.
Pair = tuple[Path, Path, "Budget | Callable[[], Budget]"]

_SLAB = 256  # tokens whose logits exist at a time


def whole(engine: Any, name: str = "in one go") -> Path:
    """In slabs, with the chunked form of the delta rule: how a prompt is read."""
    def rows(tokens: np.ndarray) -> Rows:
        session = engine.session()
        for at in range(0, len(tokens), _SLAB):
            yield engine.step([(session, tokens[at:at + _SLAB])], every=True)

    return Path(name, rows)


def token_by_token(engine: Any, name: str = "token by token") -> Path:
    """With the recurrent form: how text is generated."""
    def rows(tokens: np.ndarray) -> Rows:
        session = engine.session()
        for token in tokens:
            yield engine.step([(session, [token])])

    return Path(name, rows)


def in_pieces(engine: Any, name: str = "in odd pieces", seed: int = 0) -> Path:
    """In pieces of 1 to 97 tokens, each going on from a copy of the state: how the prefix cache is used."""
    def rows(tokens: np.ndarray) -> Rows:
        session = engine.session()
        for piece in _pieces(tokens, 97, seed):
            yield engine.step([(session, piece)], every=True)
            session.restore(session.snapshot())

    return Path(name, rows)


def among_others(engine: Any, name: str = "beside three others", seed: int = 0) -> Path:
    """In passes shared with three other sequences of other lengths: how a server reads."""
    def rows(tokens: np.ndarray) -> Rows:
        rng = np.random.default_rng(seed)
        mine = engine.session()
        others: list[Any] = [engine.session() for _ in range(3)]
        for piece in _pieces(tokens, 61, seed):
            for i, other in enumerate(others):
                if other.position + 40 > engine.context:
                    others[i] = engine.session()
            batch = [(other, np.asarray(rng.choice(tokens, int(rng.integers(1, 40))))) for other in others]
            batch.insert(1, (mine, piece))
            before = len(batch[0][1])
            yield engine.step(batch, every=True)[before:before + len(piece)]

    return Path(name, rows)


def saved_and_loaded(engine: Any, name: str = "saved and loaded") -> Path:
    """The state turned into bytes and back between pieces: how a conversation outlives its process."""
    def rows(tokens: np.ndarray) -> Rows:
        session = engine.session()
        for piece in _pieces(tokens, 211, 1):
            yield engine.step([(session, piece)], every=True)
            session.restore(session.state.loaded(session.snapshot().to_bytes()))

    return Path(name, rows)


def pairs_of(engine: Any, budget: Budget, label: str = "") -> list[Pair]:
    """Every way to read with one engine, against reading in one go."""
    ways = (token_by_token(engine), in_pieces(engine), among_others(engine), saved_and_loaded(engine))
    return [(whole(engine, f"{label}in one go"), Path(label + way.name, way.rows), budget) for way in ways]


def device_pairs(exact: Any, plain: Any, fast: Any, invariant: Any, budget: Budget, results: list[Agreement]
                 ) -> list[Pair]:
    """A GPU engine's ways to read, each against float32.

    exact: in float32; plain: bfloat16 by PyTorch's own operations; fast: as it is used, `invariant` so as well. The
    first two pairs say what bfloat16 costs, read in one go and token by token, and must keep to `budget`; each fast
    path may cost `FAST` times that. `results` receives what has been compared, in order.
    """
    reference = whole(exact, "float32")
    floor = [(reference, whole(plain, "bf16, PyTorch, in one go"), budget),
             (reference, token_by_token(plain, "bf16, PyTorch, token by token"), budget)]

    def within(base: int) -> Callable[[], Budget]:
        def measured() -> Budget:
            r = results[base]
            # Of thousands of positions the worst one is chance; the mean is not.
            return Budget(FAST * r.mean_kl + EXACT.mean_kl, 4 * r.max_kl + EXACT.max_kl, min(budget.top1, r.top1_clear))
        return measured

    ways = ((0, whole(fast, "kernels, in one go")), (1, token_by_token(fast, "kernels, recorded steps")),
            (0, in_pieces(fast, "kernels, in odd pieces")), (0, among_others(fast, "kernels, beside three others")),
            (0, saved_and_loaded(fast, "kernels, saved and loaded")),
            (0, whole(invariant, "batch-invariant, in one go")),
            (1, token_by_token(invariant, "batch-invariant, recorded")))
    return [*floor, *((reference, way, within(base)) for base, way in ways)]


def _pieces(tokens: np.ndarray, most: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    at = 0
    while at < len(tokens):
        length = int(rng.integers(1, most + 1))
        yield tokens[at:at + length]
        at += length
