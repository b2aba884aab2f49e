"""SiLU(gate) * up, forward and backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridlm.ops.triton.rows import as_rows

__all__ = ["swiglu", "swiglu_of"]

ROWS, COLUMNS = 4, 1024  # of a tile


@triton.jit
def swiglu_forward_kernel(gate_ptr, up_ptr, y_ptr, rows, gate_stride, up_stride, F: tl.constexpr, ROWS: tl.constexpr,
                          COLUMNS: tl.constexpr):
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < F)
    gate = tl.load(gate_ptr + row * gate_stride + column, inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * F + column, (gate * tl.sigmoid(gate) * up).to(y_ptr.dtype.element_ty), inside)


@triton.jit
def swiglu_backward_kernel(dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, rows, gate_stride, up_stride, dgate_stride,
                           dup_stride, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < F)
    dy = tl.load(dy_ptr + row * F + column, inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + column, inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, inside, other=0.0).to(tl.float32)
    open_ = tl.sigmoid(gate)
    tl.store(dup_ptr + row * dup_stride + column, (dy * gate * open_).to(dup_ptr.dtype.element_ty), inside)
    dgate = dy * up * open_ * (1 + gate * (1 - open_))
    tl.store(dgate_ptr + row * dgate_stride + column, dgate.to(dgate_ptr.dtype.element_ty), inside)


def _grid(rows: int, width: int) -> tuple[int, int]:
    return triton.cdiv(width, COLUMNS), triton.cdiv(rows, ROWS)


def swiglu_of(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up of two tensors of one shape, computed in float32 and rounded once. No gradient."""
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gates, ups, width = as_rows(gate), as_rows(up), gate.shape[-1]
    if y.numel():
        swiglu_forward_kernel[_grid(len(gates), width)](gates, ups, y, len(gates), gates.stride(0), ups.stride(0),
                                                        F=width, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=8)
    return y


@torch.library.custom_op("hybridlm::swiglu", mutates_args=())
def swiglu(gate_up: Tensor) -> Tensor:
    """SiLU(gate) * up, [..., F] of [..., 2 F] that holds gate and up side by side."""
    return swiglu_of(*gate_up.chunk(2, -1))


@torch.library.custom_op("hybridlm::swiglu_backward", mutates_args=())
def swiglu_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    slope, flat = as_rows(dy.contiguous()), as_rows(gate_up)
    d = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    width, stride, d_stride = slope.shape[1], flat.stride(0), d.shape[-1]
    if dy.numel():
        swiglu_backward_kernel[_grid(len(slope), width)](
            slope, flat, flat[:, width:], d, d.view(-1, d_stride)[:, width:], len(slope), stride, stride, d_stride,
            d_stride, F=width, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=8)
    return d


@swiglu.register_fake
def _(gate_up):
    return torch.empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2, dtype=gate_up.dtype, device=gate_up.device)


@swiglu_backward.register_fake
def _(dy, gate_up):
    return torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx, dy: Tensor):
    return swiglu_backward(dy, *ctx.saved_tensors)


swiglu.register_autograd(_gradient, setup_context=_save)
