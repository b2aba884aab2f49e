"""The walk's operations on the CPU: native kernels over numpy arrays, weights read where the model file is mapped.

Every result goes into a buffer that the same role takes again in the next layer; buffers grow to the largest pass seen
and then stay, so that a pass allocates next to nothing. Their roles keep apart what is alive at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hybridlm import native
from hybridlm.config import HybridConfig, Rope
from hybridlm.engine.layout import KV_TYPES, PAGE, Layout
from hybridlm.engine.state import State
from hybridlm.engine.walk import Batch, logprobs_of
from hybridlm.engine.weights import DeltaNetLayer, Loader, Weights
from hybridlm.errors import ConfigError, FormatError

__all__ = ["CPU", "file_loader"]

Array = np.ndarray
SHORT = 16  # tokens of a segment up to which its rows give the same numbers one by one


class CPU:
    """`walk.Ops` over `hybridlm.native`. One pass at a time: the buffers are shared."""

    def __init__(self, config: HybridConfig, layout: Layout, exact: bool = False) -> None:
        """`exact`: quantised weights meet float32 activations, slowly; what the 8-bit path is measured against."""
        self.config, self.layout, self.exact = config, layout, exact
        self._kv_type = KV_TYPES[layout.kv_type].id
        self._buffers: dict[tuple[str, int, int], Array] = {}
        ropes = {config.rope_of(i) for i, group in enumerate(layout.layers) if group >= 0}
        self._inv_freq = {rope: _inv_freq(rope, config.head_dim) for rope in ropes if rope}
        self._runs: list[tuple[int, int, bool]] = []  # of the rows of this pass: first, last, whether of long segments
        self._second = False  # which of two buffers the last norm filled: q's and k's are alive together

    slab: int | None = None

    def state(self) -> State:
        return State(self.layout)

    def run(self, layers: Callable[[], Array]) -> Array:
        return layers()

    def stack(self, rows: Sequence[Array]) -> Array:
        return np.stack(rows)

    def begin(self, batch: Batch) -> None:
        for s in batch.segments:
            s.state.reserve(s.last - s.first)
        # Rows of long segments may take another way through the matrices than rows of short ones. Which way a row takes
        # depends on its own segment alone, so what comes out does not depend on what else is in the batch.
        self._runs = []
        for s in batch.segments:
            prompt = s.trial is None and s.last - s.first > SHORT
            if self._runs and self._runs[-1][2] == prompt:
                self._runs[-1] = (self._runs[-1][0], s.last, prompt)
            else:
                self._runs.append((s.first, s.last, prompt))

    def embed(self, table: native.Matrix, batch: Batch) -> Array:
        out = self._buffer("embed", 0, len(batch.ids), table.cols)
        native.embed(table, batch.ids, out)
        return out

    def norm(self, x: Array, weight: Array, eps: float) -> Array:
        self._second = not self._second
        out = self._buffer("norm", self._second, *x.shape)
        native.rms_norm(x, weight, eps, out)
        return out

    def linear(self, x: Array, *weights: native.Matrix) -> tuple[Array, ...]:
        role = f"linear{len(weights)}"
        outs = [self._buffer(role, i, len(x), w.rows) for i, w in enumerate(weights)]
        for first, last, prompt in self._runs:
            native.linear(x[first:last], list(weights), [out[first:last] for out in outs], self.exact, prompt)
        return tuple(outs)

    def swiglu(self, gate: Array, up: Array) -> Array:
        out = self._buffer("swiglu", 0, *gate.shape)
        native.swiglu(gate, up, out)
        return out

    def add(self, x: Array, y: Array) -> Array:
        native.add(x, y)
        return x

    def rope(self, x: Array, rope: Rope, batch: Batch) -> Array:
        native.rope(x, batch.positions, self._inv_freq[rope], rope.scale)
        return x

    def gdn(self, layer: int, w: DeltaNetLayer, q: Array, k: Array, v: Array, a: Array, b: Array, gate: Array,
            batch: Batch) -> Array:
        slot, out = self.layout.slots[layer], self._buffer("gdn", 0, *v.shape)
        for s in batch.segments:
            inputs = [x[s.first:s.last] for x in (q, k, v, a, b)]
            if s.trial is not None:
                s.trial.keep(slot, s.state, *inputs)
            self._gdn(w, slot, s.state, inputs, gate[s.first:s.last], out[s.first:s.last], s.trial is None)
        return out

    def replay(self, weights: Weights, state: State, rows: dict[int, tuple[Array, ...]], count: int) -> None:
        for layer, slot in zip(weights.layers, self.layout.slots, strict=True):
            if isinstance(layer, DeltaNetLayer):
                inputs = [x[:count] for x in rows[slot]]
                out = self._buffer("gdn", 0, *inputs[2].shape)
                self._gdn(layer, slot, state, inputs, inputs[2], out, False)  # any gate: only the state matters

    def _gdn(self, w: DeltaNetLayer, slot: int, state: State, inputs: list[Array], gate: Array, out: Array,
             chunked: bool) -> None:
        c = self.config
        q, k, v, a, b = inputs
        native.gdn(q, k, v, a, b, gate, w.conv_q, w.conv_k, w.conv_v, w.ssm_a, w.dt_bias, w.norm, state.conv[slot],
                   state.recurrent[slot], c.gdn_norm_eps, c.linear_allow_neg_eigval, out, chunked)

    def attention(self, layer: int, q: Array, k: Array, v: Array, window: int | None, batch: Batch) -> Array:
        heads, width, kind = *self.layout.kv, self._kv_type
        group, slot = self.layout.layers[layer], self.layout.slots[layer]
        out = self._buffer("attention", 0, *q.shape)
        for s in batch.segments:
            rows, table = slice(s.first, s.last), s.state.groups[group].table(slot)
            native.store_kv(k[rows], table, 0, PAGE, kind, s.position, heads, width)
            native.store_kv(v[rows], table, 1, PAGE, kind, s.position, heads, width)
            native.attention(q[rows], table, PAGE, kind, s.position, heads, width,
                             self.layout.windows[group], out[rows])
        return out

    def head(self, x: Array, weight: native.Matrix) -> Array:
        out = np.empty((len(x), weight.rows), np.float32)
        native.linear(x, [weight], [out], self.exact)
        return out

    def logprobs(self, x: Array, weight: native.Matrix, targets: Array) -> Array:
        return logprobs_of(self.head(x, weight), targets)

    def _buffer(self, role: str, index: int, rows: int, width: int) -> Array:
        key = (role, index, width)
        buffer = self._buffers.get(key)
        if buffer is None or len(buffer) < rows:
            buffer = self._buffers[key] = np.empty((rows, width), np.float32)
        return buffer[:rows]


def _inv_freq(rope: Rope, head_dim: int) -> Array:
    try:
        return rope.inv_freq(head_dim)
    except (ArithmeticError, ValueError) as error:
        raise ConfigError(f"rope: has no frequencies ({error})") from None


def file_loader(file: Any, name: str) -> Loader:
    """Loads from an open `GGUFFile`: matrices as views of the mapped file, everything else as float32 arrays."""
    from hybridlm.formats.blocks import dequantize

    def load(tensor: str, shape: tuple[int, ...], matrix: bool) -> Any:
        found = file.tensors.get(tensor)
        if found is None:
            raise FormatError(f"{name}: tensor {tensor} is missing; convert the model again")
        if tuple(found.shape) != shape:
            raise FormatError(f"{name}: tensor {tensor} has shape {list(found.shape)} where the model's configuration "
                              f"needs {list(shape)}; convert the model again")
        data = file.data(tensor)
        if not matrix:
            return np.ascontiguousarray(dequantize(found.type, data, shape), dtype=np.float32)
        try:
            return native.Matrix(data, int(found.type), *shape)
        except ValueError as error:
            raise FormatError(f"{name}: tensor {tensor} cannot be used ({error}); convert the model again") from None

    return load
