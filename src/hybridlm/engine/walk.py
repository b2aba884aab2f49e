"""The forward pass, spelled once over a small set of operations.

Every device runs this file: `cpu.py` gives the operations from native kernels, other engines from theirs, the tests
from float64 numpy. It holds the model's mathematics and nothing about memory or hardware.

Rows of several sequences go through together. A `Batch` is their token ids one after the other, with a `Segment` for
each sequence; what works row by row (projections, norms, MLP) sees all rows at once and reads each weight once, what
has a memory (Gated DeltaNet, attention) goes segment by segment into that sequence's state. Shapes: T rows in all,
D model width, everything [T, width] and float32 unless the operations say otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from hybridlm.config import Rope
from hybridlm.engine.weights import MLP, AttentionLayer, DeltaNetLayer, Weights

__all__ = ["Batch", "Ops", "Segment", "forward", "logits", "logprobs_of"]

Array = Any  # of the device: numpy on the CPU
Handle = Any  # a weight as the device's loader returned it


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows `first` to `last` (exclusive) of a batch continue the sequence that `state` remembers."""

    state: Any
    first: int
    last: int
    position: int  # of the first row in its sequence
    trial: Any = None  # keeps what it takes to go back, where the pass may be taken back


@dataclass(frozen=True, slots=True)
class Batch:
    """New tokens of one or more sequences, row after row."""

    ids: np.ndarray  # int32 [T]
    positions: np.ndarray  # int32 [T]
    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, parts: Sequence[tuple[Any, Sequence[int] | np.ndarray]], trial: bool = False) -> Batch:
        """From (state, new tokens) pairs; a state knows its `position`, and its `trial`, which is used on demand."""
        segments, row = [], 0
        for state, tokens in parts:
            segments.append(Segment(state, row, row + len(tokens), state.position, state.trial if trial else None))
            row += len(tokens)
        ids = np.concatenate([np.asarray(tokens, dtype=np.int32) for _, tokens in parts])
        positions = np.concatenate([np.arange(s.position, s.position + s.last - s.first, dtype=np.int32)
                                    for s in segments])
        return cls(ids, positions, tuple(segments))


class Ops(Protocol):
    """What a device must be able to do. Results may live in buffers that the same call of the next layer reuses."""

    slab: int | None  # rows of a pass at most; None for what suits a processor

    def state(self) -> Any:
        """The state before the first token."""

    def run(self, layers: Callable[[], Array]) -> Array:
        """The result of `layers()`, the pass that has begun; or of a recording of it, played back."""

    def stack(self, rows: Sequence[Array]) -> Array:
        """Rows one above the other, copied."""

    def begin(self, batch: Batch) -> None:
        """Once before each pass: make room in the states, prepare rotary tables."""

    def embed(self, table: Handle, batch: Batch) -> Array:
        """Rows of the input table, [T, D], in memory that `add` may overwrite."""

    def norm(self, x: Array, weight: Handle, eps: float) -> Array:
        """RMSNorm over the last axis: weight * x * rsqrt(mean(x^2) + eps)."""

    def linear(self, x: Array, *weights: Handle) -> tuple[Array, ...]:
        """x W^T for each weight; together, because they share their input."""

    def swiglu(self, gate: Array, up: Array) -> Array:
        """SiLU(gate) * up."""

    def add(self, x: Array, y: Array) -> Array:
        """x + y; may overwrite x."""

    def rope(self, x: Array, rope: Rope, batch: Batch) -> Array:
        """Rotate each head's halves by position * frequency; may overwrite x."""

    def gdn(self, layer: int, w: DeltaNetLayer, q: Array, k: Array, v: Array, a: Array, b: Array, gate: Array,
            batch: Batch) -> Array:
        """Gated DeltaNet between its projections, updating the layer's convolution and recurrent state:
        convolution and SiLU, l2norm, gates, the delta rule, per-head RMSNorm times SiLU(gate). [T, Hv * V].

        A segment with a trial is computed token by token, after `trial.keep(slot, state, q, k, v, a, b)`."""

    def replay(self, weights: Weights, state: Any, rows: dict[int, tuple[Array, ...]], count: int) -> None:
        """Move the convolution and recurrent states of all layers over the first `count` of the rows a trial kept."""

    def attention(self, layer: int, q: Array, k: Array, v: Array, window: int | None, batch: Batch) -> Array:
        """Store k and v, then causal softmax attention over what is stored, scale head_dim^-0.5. [T, D]."""

    def head(self, x: Array, weight: Handle) -> Array:
        """x W^T as a fresh array in main memory that the caller owns."""

    def logprobs(self, x: Array, weight: Handle, targets: np.ndarray) -> np.ndarray:
        """Float32 [n]: the log-probability of a target after each row, from the head's logits."""


def forward(weights: Weights, ops: Ops, batch: Batch) -> Array:
    """All layers over the rows of a batch: the final norm's output [T, D]; the states then hold these tokens.

    The caller advances the states' positions. Apply `logits` to the rows that need it.
    """
    ops.begin(batch)
    return ops.run(lambda: _layers(weights, ops, batch))


def _layers(weights: Weights, ops: Ops, batch: Batch) -> Array:
    config = weights.config
    x = ops.embed(weights.embed, batch)
    for i, layer in enumerate(weights.layers):
        if isinstance(layer, DeltaNetLayer):
            x = _gdn_block(ops, i, layer, x, batch, config.rms_norm_eps)
        else:
            x = _attention_block(ops, i, layer, x, batch, config.rms_norm_eps, config.rope_of(i), config.window_of(i))
    return ops.norm(x, weights.norm, config.rms_norm_eps)


def logits(weights: Weights, ops: Ops, hidden: Array) -> Array:
    """[n, vocab] of n rows of `forward`'s result; the head is the input table where they are tied."""
    return ops.head(hidden, weights.head)


def logprobs_of(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Float32 [n]: log-softmax of logits [n, vocab], which it overwrites, at the targets."""
    logits -= logits.max(axis=-1, keepdims=True)
    chosen = np.take_along_axis(logits, targets[:, None].astype(np.int64), axis=-1)[:, 0]
    np.exp(logits, out=logits)
    return (chosen - np.log(logits.sum(axis=-1, dtype=np.float64))).astype(np.float32)


def _gdn_block(ops: Ops, i: int, w: DeltaNetLayer, x: Array, batch: Batch, eps: float) -> Array:
    """Pre-norm: x + GDN(norm(x)), then x + MLP(norm(x))."""
    u = ops.norm(x, w.attn_norm, eps)
    q, k, v, a, b, gate = ops.linear(u, w.q, w.k, w.v, w.a, w.b, w.gate)
    o = ops.gdn(i, w, q, k, v, a, b, gate, batch)
    x = ops.add(x, *ops.linear(o, w.out))
    return ops.add(x, _mlp(ops, w.mlp, ops.norm(x, w.ffn_norm, eps)))


def _attention_block(ops: Ops, i: int, w: AttentionLayer, x: Array, batch: Batch, eps: float, rope: Rope | None,
                     window: int | None) -> Array:
    """Post-norm: x + norm(attention(x)), then x + norm(MLP(x)). Queries and keys are normed over their full width."""
    q, k, v = ops.linear(x, w.q, w.k, w.v)
    q, k = ops.norm(q, w.q_norm, eps), ops.norm(k, w.k_norm, eps)
    if rope is not None:
        q, k = ops.rope(q, rope, batch), ops.rope(k, rope, batch)
    (o,) = ops.linear(ops.attention(i, q, k, v, window, batch), w.out)
    x = ops.add(x, ops.norm(o, w.attn_norm, eps))
    return ops.add(x, ops.norm(_mlp(ops, w.mlp, x), w.ffn_norm, eps))


def _mlp(ops: Ops, w: MLP, x: Array) -> Array:
    (y,) = ops.linear(ops.swiglu(*ops.linear(x, w.gate, w.up)), w.down)
    return y
