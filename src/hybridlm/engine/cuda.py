"""The walk's operations on a GPU: PyTorch tensors, Triton kernels, decoding steps recorded once and played back.

Two kinds of pass. A *step* gives each sequence one token: its layers are recorded as a CUDA graph for a few batch sizes
(`GRAPHS`), with everything that changes (token ids, positions, the addresses of states and page tables) in one small
tensor, so that a step costs the host one copy and one launch. Every other pass runs operation by operation: sequences
with one token in it through the same kernels, longer stretches through the chunked delta rule and fused attention.

What can be done in one kernel waits until it is known to: `norm` and `add` return promises that the next operation
redeems, so that a residual sum and the norm after it, or a norm and the sum after it, are one reading of the row.

Without a GPU the same file runs on PyTorch's CPU tensors with the plain forms of `ops`; so it is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm.config import HybridConfig, Rope
from hybridlm.engine.cuda_prefill import chunked_delta_rule, segment_attention, side_by_side
from hybridlm.engine.cuda_state import KV_DTYPES, CudaState
from hybridlm.engine.cuda_weights import Part
from hybridlm.engine.layout import PAGE, Layout
from hybridlm.engine.walk import Batch, Segment
from hybridlm.engine.weights import DeltaNetLayer, Weights
from hybridlm.ops import apply_rope, rms_norm, rope_tables, swiglu

__all__ = ["CUDA", "GRAPHS"]

GRAPHS = (1, 2, 4, 8, 16, 32, 64)  # rows of a recorded step; others take the next larger one
CHUNK = 64  # tokens that the delta rule takes together
FEW = 64  # rows up to which a product is bound by reading the weights
SLAB = 1 << 16  # rows of a pass at most


def plan(rows: int, cols: int, glu: bool = False) -> dict[str, Any]:
    """How to divide a skinny product with a weight [rows, cols]: by its shape alone, never by the batch. Measured on an
    H200; narrow weights are split along their columns until all processors load."""
    if glu:
        return {"block": (64, 128), "stages": 3, "split": 3 if cols >= 1024 else 1}
    if rows >= 16_384:
        return {"block": (64, 256), "stages": 4}
    if rows >= 8192:
        return {"block": (64, 128), "stages": 4, "split": 2 if cols >= 1024 else 1}
    return {"block": (64, 128), "stages": 4, "split": 1 if cols < 1024 else 3 if cols < 4096 else 4}


class Rows:
    """What a pass needs to know of its rows, int64 on the device, one line each: token ids, positions, addresses of
    recurrent states and convolutions (0 for a row of a longer stretch), then for each group of attention layers the
    addresses of the rows' page tables, twice: of all rows, and of the ones that are a step."""

    def __init__(self, data: Tensor, groups: int) -> None:
        self.data = data
        self.ids, self.positions, self.recurrent, self.conv = data[0], data[1], data[2], data[3]
        self.tables, self.step_tables = data[4:4 + groups], data[4 + groups:]


@dataclass(eq=False)
class Sum:
    """x + y, to be written over x; y may be a `Normed`."""

    x: Tensor
    y: Any
    done: bool = False


@dataclass(frozen=True, eq=False)
class Normed:
    """RMSNorm of x, and perhaps a rotation of it."""

    x: Tensor
    weight: Tensor
    eps: float
    rope: Rope | None = None


@dataclass(frozen=True, eq=False)
class Gated:
    """Either half of x W^T for W = gate above up, of which SiLU(gate) * up will be wanted."""

    x: Tensor
    weight: Tensor
    half: int  # rows of the gate


class CUDA:
    """`walk.Ops` over tensors of one device. One pass at a time, on the current stream."""

    def __init__(self, config: HybridConfig, layout: Layout, device: torch.device, dtype: torch.dtype, *,
                 kernels: bool | None = None, graphs: bool = True, invariant: bool = False) -> None:
        """`kernels`: Triton's, rather than PyTorch's forms; None: on a GPU. `graphs`: record steps. `invariant`: a
        sequence's numbers do not depend, in any bit, on what else is in its passes."""
        self.config, self.layout, self.device, self.dtype = config, layout, device, dtype
        self.kernels = device.type == "cuda" if kernels is None else kernels
        self.graphs, self.invariant = graphs and device.type == "cuda", invariant
        self.slab: int | None = self._rows_that_fit()
        self.kv_dtype = KV_DTYPES[layout.kv_type]
        self._groups = len(layout.windows)
        ropes = {config.rope_of(i) for i, group in enumerate(layout.layers) if group >= 0}
        self._inv_freq = {r: torch.from_numpy(r.inv_freq(config.head_dim)).to(device) for r in ropes if r}
        self._recorded: dict[int, tuple[Any, Rows, Tensor]] = {}
        self._pool: Any = None
        self._rows: Rows
        self._step: int | None = None  # rows of the recording that this pass can use
        self._singles: tuple[int, int] = (0, 0)  # the stretch of rows that has all steps
        self._longer: tuple[Segment, ...] = ()
        if self.kernels:
            from hybridlm.ops.triton import decode, gemv, paged_attention

            self._k: Any = (decode, gemv, paged_attention)
            self._workspace = gemv.Workspace(device)
            # Where the chip can, each kernel of a step starts while the one before it ends, and waits for its results.
            self._overlap = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
            self._gdn_decode: Any = decode.gdn_decode
            if device.type == "cuda":
                from hybridlm.ops.cuda import decode as native

                if native.supported(dtype, config.key_dim, config.value_dim, device):
                    self._gdn_decode = native.gdn_decode
            floats, ints = paged_attention.attention_room(FEW, config.num_attention_heads, config.kv_heads,
                                                          config.head_dim) if self._groups else (1, 1)
            self._parts = torch.empty(floats, dtype=torch.float32, device=device)
            self._counters = torch.zeros(ints, dtype=torch.int32, device=device)

    def _rows_that_fit(self) -> int:
        """Rows of a pass: what lives between its operations shall take a quarter of what the model leaves."""
        c = self.config
        mixer = 2 * c.conv_channels + 3 * c.value_heads * c.value_dim
        row = self.dtype.itemsize * (8 * c.hidden_size + max(3 * c.intermediate_size, mixer))
        return max(1024, min(SLAB, self.memory() // (4 * row) // PAGE * PAGE))

    def memory(self) -> int:
        """Bytes that states may take: what is free now, and what PyTorch holds without using it."""
        if self.device.type != "cuda":
            return 1 << 30
        held = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return int(torch.cuda.mem_get_info(self.device)[0]) + held

    # -- passes --------------------------------------------------------------------------------------------------

    def state(self) -> CudaState:
        return CudaState(self.layout, self.device, self.dtype)

    def begin(self, batch: Batch) -> None:
        for s in batch.segments:
            s.state.reserve(s.last - s.first)
            if s.trial is not None:
                s.trial.begin(s.state)
        steps = [s for s in batch.segments if s.last - s.first == 1 and s.trial is None]
        total, self._step = len(batch.ids), None
        if self.graphs and len(steps) == total <= GRAPHS[-1]:
            self._step = next(n for n in GRAPHS if n >= total)
        lines = np.zeros((4 + 2 * self._groups, self._step or total), np.int64)
        lines[0, :total], lines[1, :total] = batch.ids, batch.positions
        for s in batch.segments:
            if s.last - s.first == 1 and s.trial is None:
                lines[2:4, s.first] = s.state.recurrent.data_ptr(), s.state.conv.data_ptr()
            for g, group in enumerate(s.state.groups):
                lines[4 + g, s.first:s.last] = group.table.data_ptr()
                if s.last - s.first == 1:
                    lines[4 + self._groups + g, s.first] = group.table.data_ptr()
        ones = [s for s in batch.segments if s.last - s.first == 1]
        self._singles = (min((s.first for s in ones), default=0), max((s.last for s in ones), default=0))
        self._longer = tuple(s for s in batch.segments if s.last - s.first > 1)
        self._ones = (min((s.first for s in steps), default=0), max((s.last for s in steps), default=0))
        if self._step is not None:
            self._lines = torch.from_numpy(lines)
        else:
            self._rows = Rows(torch.from_numpy(lines).to(self.device), self._groups)

    def run(self, layers: Callable[[], Any]) -> Tensor:
        if self._step is None:
            with torch.no_grad():
                return self._value(layers())
        if self._step not in self._recorded:
            self._recorded[self._step] = self._record(layers, self._step)
        graph, rows, hidden = self._recorded[self._step]
        rows.data.copy_(self._lines)
        graph.replay()
        return hidden

    @torch.no_grad()
    def _record(self, layers: Callable[[], Any], rows: int) -> tuple[Any, Rows, Tensor]:
        """Record a step of so many rows. With all addresses 0 nothing is read or written but the rows themselves."""
        self._rows = Rows(torch.zeros(4 + 2 * self._groups, rows, dtype=torch.int64, device=self.device), self._groups)
        ones, self._ones = self._ones, (0, rows)
        singles, self._singles = self._singles, (0, rows)
        self._value(layers())  # compiles and loads the kernels
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            hidden = self._value(layers())
        self._pool = graph.pool()
        self._ones, self._singles = ones, singles
        return graph, self._rows, hidden

    # -- row by row ----------------------------------------------------------------------------------------------

    def embed(self, table: Part, batch: Batch) -> Tensor:
        return F.embedding(self._rows.ids, table.data)

    def norm(self, x: Any, weight: Tensor, eps: float) -> Any:
        if isinstance(x, Sum) and not x.done:
            return self._add_norm(x, weight, eps)
        return Normed(self._value(x), weight, eps)

    def add(self, x: Any, y: Any) -> Sum:
        return Sum(self._value(x), y if isinstance(y, Normed) else self._value(y))

    def linear(self, x: Any, *weights: Part) -> tuple[Any, ...]:
        x = self._value(x)
        data = weights[0].data
        assert all(w.data is data for w in weights), "matrices with one input lie in one"
        if len(weights) == 2 and self._skinny(x):
            return Gated(x, data, weights[0].last), Gated(x, data, weights[0].last)
        y = self._product(x, data)
        return tuple(y[:, w.first:w.last] for w in weights)

    def swiglu(self, gate: Any, up: Any) -> Tensor:
        if isinstance(gate, Gated):
            return self._k[1].skinny_linear(gate.x, gate.weight, self._workspace, glu=gate.half,
                                                overlap=self._overlap, **plan(gate.half, gate.x.shape[1], True))
        return swiglu(side_by_side(gate, up))

    def rope(self, x: Normed, rope: Rope, batch: Batch) -> Normed:
        return Normed(x.x, x.weight, x.eps, rope)

    def stack(self, rows: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(rows))

    def head(self, x: Tensor, weight: Part) -> np.ndarray:
        logits = self._logits(x, weight)
        out = torch.empty(logits.shape, dtype=torch.float32, pin_memory=self.device.type == "cuda")
        return np.asarray(out.copy_(logits).numpy())

    def logprobs(self, x: Tensor, weight: Part, targets: np.ndarray) -> np.ndarray:
        at = torch.from_numpy(targets.astype(np.int64)).to(self.device)[:, None]
        return np.asarray(self._logits(x, weight).log_softmax(-1).gather(1, at)[:, 0].cpu().numpy())

    def _logits(self, x: Tensor, weight: Part) -> Tensor:
        """Float32 [n, vocab]."""
        if self._skinny(x):
            out = torch.empty(len(x), weight.last, dtype=torch.float32, device=self.device)
            return self._k[1].skinny_linear(x, weight.data, self._workspace, out=out,
                                            **plan(weight.last, x.shape[1]))
        return F.linear(x, weight.data).float()

    def _skinny(self, x: Tensor) -> bool:
        return self.kernels and (self.invariant or len(x) <= FEW)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        if not self._skinny(x):
            return F.linear(x, weight)
        return self._k[1].skinny_linear(x, weight, self._workspace, overlap=self._overlap, **plan(*weight.shape))

    def _value(self, x: Any) -> Tensor:
        """Redeem a promise."""
        if isinstance(x, Sum):
            if not x.done:
                self._add_norm(x, None, 0.0)
            return x.x
        if isinstance(x, Normed):
            if not self.kernels:
                return rms_norm(x.x, x.weight, x.eps)
            return self._k[0].add_norm(x.x, None, x.weight, x.eps, overlap=self._overlap)
        return x

    def _add_norm(self, s: Sum, weight: Tensor | None, eps: float) -> Tensor | None:
        """Do the sum; with a weight also the norm of it, which is returned."""
        s.done = True
        inner = s.y if isinstance(s.y, Normed) else None
        y = inner.x if inner else s.y
        if self.kernels:
            before = (inner.weight, inner.eps) if inner else (None, 0.0)
            return self._k[0].add_norm(s.x, y, weight, eps, *before, self._overlap)
        s.x = s.x + self._value(s.y)
        return None if weight is None else rms_norm(s.x, weight, eps)

    # -- with a memory -------------------------------------------------------------------------------------------

    def gdn(self, layer: int, w: DeltaNetLayer, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, gate: Tensor,
            batch: Batch) -> Tensor:
        slot, out = self.layout.slots[layer], torch.empty_like(v, memory_format=torch.contiguous_format)
        inputs = (q, k, v, a, b, gate)
        first, last = self._ones
        if self.kernels and first < last:
            self._delta_step(slot, w, inputs, out, first, last)
        for s in batch.segments if self._step is None else ():
            rows = tuple(x[s.first:s.last] for x in inputs)
            if s.trial is not None:
                s.trial.keep(slot, *rows[:5])
                self._delta_steps(slot, w, s.state, rows, out[s.first:s.last], s.trial.addresses, s.position)
            elif s.last - s.first > 1 or not self.kernels:
                self._delta_chunks(slot, w, s.state, rows, out[s.first:s.last], s.position)
        return out

    def replay(self, weights: Weights, state: CudaState, rows: dict[int, tuple[Tensor, ...]], count: int) -> None:
        addresses = torch.tensor([state.recurrent.data_ptr(), state.conv.data_ptr()], device=self.device)
        for layer, slot in zip(weights.layers, self.layout.slots, strict=True):
            if isinstance(layer, DeltaNetLayer):
                q, k, v, a, b = (x[:count] for x in rows[slot])
                self._delta_steps(slot, layer, state, (q, k, v, a, b, v), torch.empty_like(v), addresses,
                                  state.position)

    def _delta_step(self, slot: int, w: DeltaNetLayer, inputs: tuple[Tensor, ...], out: Tensor, first: int, last: int,
                    ) -> None:
        """One token for each of the rows from first to last; rows that are no step have the address 0."""
        rows = slice(first, last)
        at = self._rows
        self._decode(slot, w, tuple(x[rows] for x in inputs), at.recurrent[rows], at.conv[rows], at.positions[rows],
                     out[rows], self._overlap)

    def _delta_steps(self, slot: int, w: DeltaNetLayer, state: CudaState, inputs: tuple[Tensor, ...], out: Tensor,
                     addresses: Tensor, position: int) -> None:
        """Token after token of one sequence. Without overlap: each reads what the one before it has just written."""
        positions = torch.arange(position, position + len(out), device=self.device)
        for t in range(len(out)):
            row = tuple(x[t:t + 1] for x in inputs)
            if self.kernels:
                self._decode(slot, w, row, addresses[:1], addresses[1:], positions[t:t + 1], out[t:t + 1], False)
            else:
                out[t:t + 1] = chunked_delta_rule(self.config, w, state, slot, row, position + t, False)

    def _decode(self, slot: int, w: DeltaNetLayer, inputs: tuple[Tensor, ...], recurrent: Tensor, conv: Tensor,
                positions: Tensor, out: Tensor, overlap: bool) -> None:
        c = self.config
        self._gdn_decode(*inputs, (w.conv_q.taps, w.conv_k.taps, w.conv_v.taps), w.ssm_a, w.dt_bias, w.norm,
                         recurrent, conv, positions, out, layer=slot, heads=(c.key_heads, c.value_heads),
                         eps=c.gdn_norm_eps, strength=2.0 if c.linear_allow_neg_eigval else 1.0, overlap=overlap)

    def _delta_chunks(self, slot: int, w: DeltaNetLayer, state: CudaState, inputs: tuple[Tensor, ...], out: Tensor,
                      position: int) -> None:
        """A longer stretch of one sequence. Chunks end at multiples of 64 tokens of the whole sequence, so that
        reading a text in parts, cut there, gives the same sums."""
        first = 0
        for last in (min(-position % CHUNK, len(out)), len(out)):
            if last > first:
                rows = tuple(x[first:last] for x in inputs)
                out[first:last] = chunked_delta_rule(self.config, w, state, slot, rows, position + first,
                                                     self.kernels)
                first = last

    def attention(self, layer: int, q: Normed, k: Normed, v: Tensor, window: int | None, batch: Batch) -> Tensor:
        group, slot, (heads, width) = self.layout.layers[layer], self.layout.slots[layer], self.layout.kv
        out = torch.empty(q.x.shape, dtype=self.dtype, device=self.device)
        seen = self.layout.windows[group]
        if self.kernels:
            attend, queries, at = self._k[2], torch.empty_like(out), self._rows
            freq = self._inv_freq[q.rope] if q.rope else None
            attend.store_qkv(q.x, k.x, v, q.weight, k.weight, freq, at.tables[group], at.positions, queries, layer=slot,
                             width=width, eps=q.eps, rope_scale=q.rope.scale if q.rope else 1.0, dtype=self.kv_dtype,
                             overlap=self._overlap)
            first, last = self._singles
            for a in range(first, last, FEW):
                rows = slice(a, min(a + FEW, last))
                attend.decode_attention(queries[rows], at.step_tables[group][rows], at.positions[rows], out[rows],
                                        self._parts, self._counters, layer=slot, kv_heads=heads, width=width,
                                        window=seen, dtype=self.kv_dtype, overlap=self._overlap)
            q_rows: Tensor = queries
        else:
            q_rows, keys = self._rotated(q), self._rotated(k)
            for s in batch.segments:
                self._store(s, group, slot, keys[s.first:s.last], v[s.first:s.last])
        for s in (self._longer if self.kernels else batch.segments) if self._step is None else ():
            pages = s.state.groups[group]
            out[s.first:s.last] = segment_attention(q_rows[s.first:s.last], pages, slot, s.position, seen,
                                                    self.kernels).to(self.dtype)
        return out

    # -- without kernels -----------------------------------------------------------------------------------------

    def _rotated(self, x: Normed) -> Tensor:
        """[T, heads * d] normed and rotated."""
        y = rms_norm(x.x, x.weight, x.eps)
        if x.rope is None:
            return y
        cos, sin = rope_tables(self._inv_freq[x.rope], self._rows.positions, x.rope.scale)
        return apply_rope(y.view(1, len(y), -1, self.config.head_dim), cos[None], sin[None]).view_as(y)

    def _store(self, s: Segment, group: int, slot: int, k: Tensor, v: Tensor) -> None:
        """Keys and values of a segment's rows into its pages."""
        heads, width = self.layout.kv
        for page in range(s.position // PAGE, -(-(s.position + len(k)) // PAGE)):
            a, b = max(page * PAGE, s.position), min((page + 1) * PAGE, s.position + len(k))
            place = s.state.groups[group].pages[page][slot]
            for i, x in enumerate((k, v)):
                rows = x[a - s.position:b - s.position].reshape(b - a, heads, width)
                place[i, :, a % PAGE:a % PAGE + b - a] = rows.transpose(0, 1).to(place.dtype)
