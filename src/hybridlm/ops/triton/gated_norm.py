"""RMSNorm over each head times SiLU of a gate: the output norm of Gated DeltaNet, forward and backward in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridlm.ops.triton.rows import as_rows, partials

__all__ = ["gated_rms_norm"]

ELEMENTS = 2048  # of a program's tile, unless one row is longer


@triton.jit
def gated_norm_forward_kernel(x_ptr, gate_ptr, weight_ptr, y_ptr, rows, x_stride, gate_stride, eps,
                              D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < D)
    x = tl.load(x_ptr + row * x_stride + column, inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + column, inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, column < D, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
    y = x * scale * weight * gate * tl.sigmoid(gate)
    tl.store(y_ptr + row * D + column, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def gated_norm_backward_kernel(dy_ptr, x_ptr, gate_ptr, weight_ptr, dx_ptr, dgate_ptr, dw_ptr, rows, dy_stride,
                               x_stride, gate_stride, eps,
                               D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + column, column < D, other=0.0).to(tl.float32)
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        inside = (row < rows) & (column < D)
        x = tl.load(x_ptr + row * x_stride + column, inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + row * gate_stride + column, inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_stride + column, inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        normed = x * scale
        open_ = tl.sigmoid(gate)
        dgate = dy * normed * weight * open_ * (1 + gate * (1 - open_))
        tl.store(dgate_ptr + row * D + column, dgate.to(dgate_ptr.dtype.element_ty), inside)
        dy *= gate * open_
        dw += dy * normed
        dy *= weight
        dx = scale * (dy - normed * (tl.sum(dy * normed, 1) / D)[:, None])
        tl.store(dx_ptr + row * D + column, dx.to(dx_ptr.dtype.element_ty), inside)
    tl.store(dw_ptr + tl.program_id(0) * D + column, tl.sum(dw, 0)[None, :], column < D)


def _tile(width: int) -> tuple[int, int, int]:
    block = triton.next_power_of_2(width)
    rows = max(1, ELEMENTS // block)
    return rows, block, max(4, min(16, rows * block // 512))


@torch.library.custom_op("hybridlm::gated_rms_norm", mutates_args=())
def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """rms_norm(x) * SiLU(gate) over the last axis, the norm before the gate; x and gate [..., V], weight [V]."""
    flat, gates, width = as_rows(x), as_rows(gate), x.shape[-1]
    y = _like(x)
    rows, block, warps = _tile(width)
    if len(flat):
        gated_norm_forward_kernel[(triton.cdiv(len(flat), rows),)](
            flat, gates, weight, y, len(flat), flat.stride(0), gates.stride(0), eps, D=width, ROWS=rows, BLOCK=block,
            num_warps=warps)
    return y


@torch.library.custom_op("hybridlm::gated_rms_norm_backward", mutates_args=())
def gated_rms_norm_backward(dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor,
                            eps: float) -> tuple[Tensor, Tensor, Tensor]:
    slope, flat, gates, width = as_rows(dy), as_rows(x), as_rows(gate), x.shape[-1]
    dx, dgate = _like(x), _like(gate)
    rows, block, warps = _tile(width)
    programs = min(partials(x.device, rows * block), max(1, triton.cdiv(len(flat), rows)))
    dw = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    gated_norm_backward_kernel[(programs,)](
        slope, flat, gates, weight, dx, dgate, dw, len(flat), slope.stride(0), flat.stride(0), gates.stride(0), eps,
        D=width, ROWS=rows, BLOCK=block, num_warps=warps)
    return dx, dgate, dw.sum(0).to(weight.dtype)


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


gated_rms_norm.register_fake(lambda x, gate, weight, eps: _like(x))
gated_rms_norm_backward.register_fake(lambda dy, x, gate, weight, eps: (_like(x), _like(gate), _like(weight)))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, dy: Tensor):
    return *gated_rms_norm_backward(dy, *ctx.saved_tensors, ctx.eps), None


gated_rms_norm.register_autograd(_gradient, setup_context=_save)
