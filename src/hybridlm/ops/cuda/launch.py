"""Launching the CUDA kernels of the chunked gated delta rule: the sizes they take, their parameters, one call each."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm.ops.cuda.nvrtc import Kernel, available, load
from hybridlm.ops.cuda.source import source

__all__ = ["Rows", "Split", "gradient", "new_records", "new_states", "new_tiles", "prepare", "scan", "split", "takes",
           "warpgroups"]

CHUNK = 64
_GROUP = CHUNK * 16 + 32  # as in tiles.cuh
_SHARED = 232448  # bytes a block may have on sm_90
_MULTIPROCESSORS = 132
_SQUARE = CHUNK // 8 * _GROUP
_SHORTEST = 24  # chunks of a segment
_FORGET = 2.0**-40  # far below what float32 keeps of a state beside what was written since


class _Scan(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in
                  ("records", "v", "bounds", "offsets", "initial", "final", "o", "tiles", "states", "starts",
                   "transitions", "kept")),
                *((name, ctypes.c_int) for name in ("heads", "value_dim", "time", "segments", "length")),
                ("forget", ctypes.c_float)]


class _Combine(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in ("starts", "transitions", "kept")),
                *((name, ctypes.c_int) for name in ("heads", "value_dim", "segments"))]


class _Prepare(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in ("q", "k", "g", "beta", "bounds", "offsets", "records")),
                *((name, ctypes.c_int) for name in ("heads", "key_heads", "time", "sequences", "normalise")),
                ("scale", ctypes.c_float)]


class _Gradient(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in
                  ("records", "v", "grad", "e", "w", "states", "dstates", "g", "bounds", "offsets", "dq", "dk", "dv",
                   "dg", "dbeta")),
                *((name, ctypes.c_int) for name in
                  ("heads", "value_dim", "time", "sequences", "chunks", "normalise")),
                ("scale", ctypes.c_float)]


@cache
def _runs_on(device: int) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0) and available()


def takes(q: Tensor, v: Tensor) -> bool:
    """Whether these kernels take such inputs: bfloat16 on a Hopper GPU, K a multiple of 16 up to 128, V of 64."""
    return v.dtype == torch.bfloat16 and q.shape[-1] % 16 == 0 and 16 <= q.shape[-1] <= 128 and v.shape[-1] % 64 == 0 \
        and _runs_on(v.device.index)


@cache
def warpgroups(tasks: int, key_dim: int, value_dim: int) -> int:
    """How many slabs of 64 values a block takes, for `tasks` pairs of row and head: few fill the chip, many share k.

    The time of a chunk in a block of 1, 2 or 3 warpgroups (measured on an H200, in microseconds) times the rounds.
    """
    slabs = value_dim // 64
    widths = [w for w in (3, 2, 1) if slabs % w == 0 and (w < 3 or key_dim <= 96)]
    return min(widths, key=lambda w: -(-tasks * (slabs // w) // _MULTIPROCESSORS) * (0.0, 2.7, 3.4, 3.8)[w])


class Rows(NamedTuple):
    """How a call's tokens are cut into chunks."""

    time: int  # tokens of each row, without bounds
    sequences: int
    chunks: int  # of all rows; with bounds an upper limit, since lengths stay on the device
    bounds: Tensor | None = None  # int32 [sequences + 1]: each row's first token
    offsets: Tensor | None = None  # and first chunk

    @classmethod
    def of(cls, v: Tensor, cu_seqlens: Tensor | None) -> Rows:
        """For v [B, T, H, V], and cu_seqlens int32 [N + 1] where B = 1 row holds N sequences."""
        batch, time = v.shape[:2]
        if cu_seqlens is None:
            return cls(time, batch, batch * -(-time // CHUNK))
        counts = (cu_seqlens.diff() + (CHUNK - 1)) // CHUNK
        offsets = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        sequences = cu_seqlens.shape[0] - 1
        return cls(time, sequences, -(-time // CHUNK) + sequences, cu_seqlens, offsets)


class Split(NamedTuple):
    """How long rows are cut into segments that run side by side (scan.cu)."""

    segments: int  # of a row
    length: int  # chunks of each but the last
    forget: float
    transitions: Tensor  # [rows, segments, H, K, K]: found by the forward scan, the reverse one uses them too
    kept: Tensor  # [rows, segments, H]


def split(rows: Rows, v: Tensor, key_dim: int, norm: bool) -> Split | None:
    """Segments so that rows and heads fill the chip once, where these alone don't; None where it would not pay.

    Packed rows stay whole. Without `norm` keys of any length may come, and nothing counts as forgotten.
    """
    heads = v.shape[2]
    chunks = rows.chunks // rows.sequences
    segments = min(_MULTIPROCESSORS // (rows.sequences * heads), chunks // _SHORTEST)
    if rows.bounds is not None or segments < 2:
        return None
    length = -(-chunks // segments)
    segments = -(-chunks // length)
    places = rows.sequences, segments, heads
    return Split(segments, length, _FORGET if norm else 0.0,
                 v.new_empty(*places, key_dim, key_dim, dtype=torch.float32), v.new_empty(places, dtype=torch.int32))


def _at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _record(key_dim: int) -> int:
    """Bytes of a record (tiles.cuh): k, T, factors, q, P."""
    return 2 * (key_dim // 8 * _GROUP + _SQUARE) + 1824


@cache
def _scan_kernel(key_dim: int, width: int, output: bool, reverse: bool, summary: bool, device: int) -> Kernel:
    stage = _record(key_dim) + CHUNK * (width * 128 + 16)
    stages = min(4, _SHARED // (stage + 16))
    text = source("stage.cuh", "reverse.cu" if reverse else "forward.cu", "scan.cu", K=key_dim, WARPGROUPS=width,
                  STAGES=stages, OUTPUT=int(output), REVERSE=int(reverse), SUMMARY=int(summary))
    return load(text, "scan", stages * (stage + 16))


@cache
def _combine_kernel(key_dim: int, reverse: bool, device: int) -> Kernel:
    return load(source("combine.cu", K=key_dim, REVERSE=int(reverse)), "combine", 4 * key_dim * (32 + key_dim + 1))


@cache
def _prepare_kernel(key_dim: int, device: int) -> Kernel:
    tiles = max(2 * key_dim // 8 * _GROUP, CHUNK * (68 + 64) * 4) + 2 * _SQUARE
    return load(source("prepare.cu", K=key_dim), "prepare", tiles + 1024)


@cache
def _gradient_kernel(key_dim: int, device: int) -> Kernel:
    keys = key_dim // 8 * _GROUP
    stage, task = 2 * (CHUNK * 144 + _SQUARE + keys), 2 * keys + 1824
    shared = 2 * stage + (1 if key_dim > 96 else 2) * task + 3 * _SQUARE + 6 * 256 + 64
    return load(source("gradient.cu", K=key_dim), "gradient", shared)


def new_records(chunks: int, q: Tensor, heads: int) -> Tensor:
    """Room for a record of each chunk and value head."""
    return q.new_empty(chunks, heads, _record(q.shape[-1]), dtype=torch.uint8)


def prepare(rows: Rows, q: Tensor, k: Tensor, g: Tensor, beta: Tensor, norm: bool) -> Tensor:
    """Each chunk and head's record [chunks, H, bytes], all that the scans need of it but v.

    `norm`: q and k count as if brought to unit length.
    """
    key_heads, key_dim = k.shape[-2:]
    heads = g.shape[-1]
    records = new_records(rows.chunks, q, heads)
    call = _Prepare(*map(_at, (q, k, g, beta, rows.bounds, rows.offsets, records)), heads, key_heads, rows.time,
                    rows.sequences, int(norm), key_dim**-0.5)
    _prepare_kernel(key_dim, q.device.index)(rows.chunks * heads, 128, call)
    return records


def new_tiles(rows: Rows, v: Tensor) -> Tensor:
    """Room for a bfloat16 value of each token, head and value column, in the kernels' tiles of 64 by 64."""
    heads, value_dim = v.shape[-2:]
    return v.new_empty(rows.chunks, heads, value_dim // 64, _SQUARE, dtype=torch.uint8)


def new_states(rows: Rows, v: Tensor, key_dim: int) -> Tensor:
    """Room for a bfloat16 state of each chunk and head, in tiles of 64 value columns."""
    heads, value_dim = v.shape[-2:]
    return v.new_empty(rows.chunks, heads, value_dim // 64, key_dim // 8 * _GROUP, dtype=torch.uint8)


def scan(rows: Rows, records: Tensor, v: Tensor, key_dim: int, *, o: Tensor | None = None, tiles: Tensor | None = None,
         initial: Tensor | None = None, final: Tensor | None = None, states: Tensor | None = None,
         reverse: bool = False, width: int | None = None, cuts: Split | None = None) -> None:
    """Carry the state through all chunks of each row: o gets the result, or `tiles` the writes.

    `reverse` is the backward pass: v is the gradient of o, `initial` that of the final state, `final` that of the
    initial one, `states` gets the gradient of the state at each chunk's end, and `tiles` that of T's right-hand side.
    `cuts`: in segments side by side; a reverse scan after the forward one with the same.
    """
    heads, value_dim = v.shape[-2:]
    segments, length, forget = (1, rows.chunks, 0.0) if cuts is None else cuts[:3]
    places = rows.sequences * heads * segments
    width = width or warpgroups(places, key_dim, value_dim)
    starts = None
    if cuts is not None:
        starts = v.new_empty(rows.sequences, segments, heads, key_dim, value_dim, dtype=torch.float32)
    call = _Scan(*map(_at, (records, v, rows.bounds, rows.offsets, initial, final, o, tiles, states, starts,
                            cuts and cuts.transitions, cuts and cuts.kept)), heads, value_dim, rows.time, segments,
                 length, forget)
    device, threads, wide = v.device.index, (width + 1) * 128, value_dim // (64 * width)
    if cuts is not None:
        slabs = wide if reverse else wide + -(-key_dim // (64 * width))
        blocks = rows.sequences * heads * (segments - 1) * slabs
        _scan_kernel(key_dim, width, False, reverse, True, device)(blocks, threads, call)
        if segments > 2:
            join = _Combine(*map(_at, (starts, cuts.transitions, cuts.kept)), heads, value_dim, segments)
            _combine_kernel(key_dim, reverse, device)(rows.sequences * heads * value_dim // 32, 256, join)
    _scan_kernel(key_dim, width, o is not None, reverse, False, device)(places * wide, threads, call)


def gradient(rows: Rows, records: Tensor, v: Tensor, do: Tensor, e: Tensor, writes: Tensor, states: Tensor,
             dstates: Tensor, g: Tensor, key_dim: int, norm: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq and dk per value head [B, T, H, K], dv, dg and dbeta, from what the two scans left."""
    heads, value_dim = v.shape[-2:]
    dq = v.new_empty(*v.shape[:-1], key_dim)
    out = dq, torch.empty_like(dq), torch.empty_like(v), torch.empty_like(g), torch.empty_like(g)
    call = _Gradient(*map(_at, (records, v, do, e, writes, states, dstates, g, rows.bounds, rows.offsets, *out)), heads,
                     value_dim, rows.time, rows.sequences, rows.chunks, int(norm), key_dim**-0.5)
    _gradient_kernel(key_dim, v.device.index)(min(rows.chunks * heads, _MULTIPROCESSORS), 384, call)
    return out
