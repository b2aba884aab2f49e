"""The walk's operations in float64 numpy, written as the formulas stand: what every device is checked against.

States are the engine's own (`State`), so recurrent states and keys are rounded to their stored type between passes, but
not within one: one pass over a whole text is the float64 truth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hybridlm.config import HybridConfig, Rope
from hybridlm.engine.layout import PAGE, Layout
from hybridlm.engine.state import State
from hybridlm.engine.walk import Batch, Segment, logprobs_of
from hybridlm.engine.weights import DeltaNetLayer, Loader, Weights

Array = np.ndarray
DTYPES = {"f32": np.float32, "f16": np.float16}


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def softplus(x: Array) -> Array:
    return np.logaddexp(0, x)


def rms(x: Array, eps: float) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


class ReferenceOps:
    """`walk.Ops`; weights are float64 arrays as `loader` gives them."""

    def __init__(self, config: HybridConfig, layout: Layout) -> None:
        self.config, self.layout = config, layout
        self.passes: list[int] = []  # rows of each pass
        self.fail_in: int | None = None  # calls until one raises, as an interruption would

    slab = None

    def state(self) -> State:
        return State(self.layout)

    def run(self, layers: Any) -> Array:
        return layers()

    def stack(self, rows: Sequence[Array]) -> Array:
        return np.stack(rows)

    def logprobs(self, x: Array, weight: Array, targets: Array) -> Array:
        return logprobs_of(self.head(x, weight), targets)

    def begin(self, batch: Batch) -> None:
        self.passes.append(len(batch.ids))
        for s in batch.segments:
            s.state.reserve(s.last - s.first)

    def embed(self, table: Array, batch: Batch) -> Array:
        return table[batch.ids]

    def norm(self, x: Array, weight: Array, eps: float) -> Array:
        return rms(x, eps) * weight

    def linear(self, x: Array, *weights: Array) -> tuple[Array, ...]:
        if self.fail_in is not None:
            self.fail_in -= 1
            if self.fail_in < 0:
                self.fail_in = None
                raise KeyboardInterrupt
        return tuple(x @ w.T for w in weights)

    def swiglu(self, gate: Array, up: Array) -> Array:
        return silu(gate) * up

    def add(self, x: Array, y: Array) -> Array:
        return x + y

    def rope(self, x: Array, rope: Rope, batch: Batch) -> Array:
        d = self.config.head_dim
        angle = batch.positions[:, None] * rope.inv_freq(d).astype(np.float64)
        cos, sin = (np.concatenate([f(angle)] * 2, -1)[:, None] * rope.scale for f in (np.cos, np.sin))
        heads = x.reshape(len(x), -1, d)
        turned = np.concatenate([-heads[..., d // 2:], heads[..., :d // 2]], -1)
        return (heads * cos + turned * sin).reshape(x.shape)

    def gdn(self, layer: int, w: DeltaNetLayer, q: Array, k: Array, v: Array, a: Array, b: Array, gate: Array,
            batch: Batch) -> Array:
        for s in batch.segments:
            if s.trial is not None:
                s.trial.keep(self.layout.slots[layer], s.state, *(x[s.first:s.last] for x in (q, k, v, a, b)))
        return np.concatenate([self._gdn(self.layout.slots[layer], w, s, q, k, v, a, b, gate) for s in batch.segments])

    def replay(self, weights: Weights, state: State, rows: dict[int, tuple[Array, ...]], count: int) -> None:
        for layer, slot in zip(weights.layers, self.layout.slots, strict=True):
            if isinstance(layer, DeltaNetLayer):
                q, k, v, a, b = rows[slot]
                self._gdn(slot, layer, Segment(state, 0, count, 0), q, k, v, a, b, v)

    def _gdn(self, slot: int, w: DeltaNetLayer, seg: Segment, *inputs: Array) -> Array:
        c = self.config
        q, k, v, a, b, gate = (x[seg.first:seg.last] for x in inputs)
        rows = len(q)
        # Convolution over the last inputs and the new ones, oldest first.
        inside = np.concatenate([seg.state.conv[slot].T.astype(np.float64), np.concatenate([q, k, v], 1)])
        taps = np.concatenate([w.conv_q, w.conv_k, w.conv_v])
        width = taps.shape[1]
        mixed = silu(np.stack([(inside[t:t + width] * taps.T).sum(0) for t in range(rows)]))
        seg.state.conv[slot] = inside[rows:].T
        keys = c.key_heads * c.key_dim
        q, k, v = mixed[:, :keys], mixed[:, keys:2 * keys], mixed[:, 2 * keys:]
        group = c.value_heads // c.key_heads
        q, k = (np.repeat(x.reshape(rows, c.key_heads, c.key_dim), group, axis=1) for x in (q, k))
        q, k = (x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
        v = v.reshape(rows, c.value_heads, c.value_dim)
        decay = np.exp(w.ssm_a * softplus(a + w.dt_bias))
        beta = (2 if c.linear_allow_neg_eigval else 1) / (1 + np.exp(-b))
        memory = seg.state.recurrent[slot].astype(np.float64)  # [Hv, K, V]
        out = np.empty_like(v)
        for t in range(rows):
            memory = memory * decay[t][:, None, None]
            read = np.einsum("hk,hkv->hv", k[t], memory)
            memory = memory + np.einsum("hk,hv->hkv", k[t], beta[t][:, None] * (v[t] - read))
            out[t] = np.einsum("hk,hkv->hv", q[t], memory) / math.sqrt(c.key_dim)
        seg.state.recurrent[slot] = memory
        gate = gate.reshape(out.shape)
        return (rms(out, c.gdn_norm_eps) * w.norm * silu(gate)).reshape(rows, -1)

    def attention(self, layer: int, q: Array, k: Array, v: Array, window: int | None, batch: Batch) -> Array:
        return np.concatenate([self._attention(layer, s, q[s.first:s.last], k[s.first:s.last], v[s.first:s.last],
                                               window) for s in batch.segments])

    def _attention(self, layer: int, seg: Segment, q: Array, k: Array, v: Array, window: int | None) -> Array:
        (heads, d), rows, start = self.layout.kv, len(q), seg.position
        pages = seg.state.groups[self.layout.layers[layer]]
        k, v = (x.reshape(rows, heads, d) for x in (k, v))
        past = self._stored(pages, self.layout.slots[layer], start)
        for t in range(rows):
            page = self._view(pages, (start + t) // PAGE)[self.layout.slots[layer]]
            page[0, :, (start + t) % PAGE], page[1, :, (start + t) % PAGE] = k[t], v[t]
        k, v = np.concatenate([past[0], k]), np.concatenate([past[1], v])
        group = self.config.num_attention_heads // heads
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
        scores = np.einsum("qhd,khd->hqk", q.reshape(rows, -1, d), k) / math.sqrt(d)
        at, to = np.arange(start, start + rows)[:, None], np.arange(start + rows)[None]
        seen = (to <= at) & (to > at - (window or start + rows))
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("hqk,khd->qhd", weights, v).reshape(q.shape)

    def _view(self, pages: Any, index: int) -> Array:
        """[layers, 2, Hkv, PAGE, d] of a page, in its stored type; zeros where it has been let go."""
        if pages.pages[index] is None:
            shape = self.layout.page_shape(pages.group)
            return np.zeros((*shape[:-1], self.layout.kv[1]))
        return pages.last(index).view(DTYPES[self.layout.kv_type])

    def _stored(self, pages: Any, slot: int, count: int) -> Array:
        """[2, count, Hkv, d] that earlier passes stored."""
        heads, d = self.layout.kv
        found = [self._view(pages, i)[slot].astype(np.float64).transpose(0, 2, 1, 3)
                 for i in range(-(-count // PAGE))]
        return np.concatenate([np.empty((2, 0, heads, d)), *found], axis=1)[:, :count]

    def head(self, x: Array, weight: Array) -> Array:
        return (x @ weight.T).astype(np.float32)


def array_loader(tensors: dict[str, Array]) -> Loader:
    """Weights for `ReferenceOps`."""

    def load(name: str, shape: Sequence[int], matrix: bool) -> Array:
        assert tensors[name].shape == tuple(shape), name
        return tensors[name].astype(np.float64)

    return load
