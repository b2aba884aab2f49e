"""RMSNorm forward and backward, alone or with the addition to the residual stream before it, in one pass over memory.

A program holds whole rows in registers, so nothing but x is kept for backward: the scale is computed again from it.
Backward sums the weight's gradient over the rows of a program in registers and over programs in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridlm.ops.triton.rows import as_rows, partials

__all__ = ["add_rms_norm", "rms_norm"]

ELEMENTS = 2048  # of a program's tile, unless one row is longer


@triton.jit
def rms_norm_forward_kernel(x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, rows, x_stride, residual_stride, eps,
                            D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < D)
    x = tl.load(x_ptr + row * x_stride + column, inside, other=0.0)
    if ADD:
        x = (x.to(tl.float32) + tl.load(residual_ptr + row * residual_stride + column, inside, other=0.0)).to(x.dtype)
        tl.store(sum_ptr + row * D + column, x, inside)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / D + eps)[:, None]
    weight = tl.load(weight_ptr + column, column < D, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * D + column, (wide * scale * weight).to(y_ptr.dtype.element_ty), inside)


@triton.jit
def rms_norm_backward_kernel(dy_ptr, x_ptr, weight_ptr, through_ptr, dx_ptr, dw_ptr, rows, x_stride, dy_stride, eps,
                             D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr):
    column = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + column, column < D, other=0.0).to(tl.float32)
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        inside = (row < rows) & (column < D)
        x = tl.load(x_ptr + row * x_stride + column, inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_stride + column, inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        normed = x * scale
        dw += dy * normed
        dy *= weight
        dx = scale * (dy - normed * (tl.sum(dy * normed, 1) / D)[:, None])
        if ADD:
            dx += tl.load(through_ptr + row * D + column, inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * D + column, dx.to(dx_ptr.dtype.element_ty), inside)
    tl.store(dw_ptr + tl.program_id(0) * D + column, tl.sum(dw, 0)[None, :], column < D)


def _tile(width: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, and warps."""
    block = triton.next_power_of_2(width)
    rows = max(1, ELEMENTS // block)
    return rows, block, max(4, min(16, rows * block // 512))


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    flat, width = as_rows(x), x.shape[-1]
    other = flat if residual is None else as_rows(residual)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = y if residual is None else torch.empty_like(y)
    rows, block, warps = _tile(width)
    if len(flat):
        rms_norm_forward_kernel[(triton.cdiv(len(flat), rows),)](
            flat, other, weight, y, total, len(flat), flat.stride(0), other.stride(0), eps, D=width, ROWS=rows,
            BLOCK=block, ADD=residual is not None, num_warps=warps)
    return y, total


def _backward(dy: Tensor, x: Tensor, weight: Tensor, through: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    flat, slope, width = as_rows(x), as_rows(dy), x.shape[-1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, block, warps = _tile(width)
    programs = min(partials(x.device, rows * block), max(1, triton.cdiv(len(flat), rows)))
    dw = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    rms_norm_backward_kernel[(programs,)](
        slope, flat, weight, dx if through is None else through.contiguous(), dx, dw, len(flat), flat.stride(0),
        slope.stride(0), eps, D=width, ROWS=rows, BLOCK=block, ADD=through is not None, num_warps=warps)
    return dx, dw.sum(0).to(weight.dtype)


# -- operators -------------------------------------------------------------------------------------------------------

@torch.library.custom_op("hybridlm::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis, in x's dtype; computed in float32."""
    return _forward(x, None, weight, eps)[0]


@torch.library.custom_op("hybridlm::rms_norm_backward", mutates_args=())
def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _backward(dy, x, weight, None, eps)


@torch.library.custom_op("hybridlm::add_rms_norm", mutates_args=())
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), the sum rounded to x's dtype before it is normed."""
    return _forward(x, residual, weight, eps)


@torch.library.custom_op("hybridlm::add_rms_norm_backward", mutates_args=())
def add_rms_norm_backward(dy: Tensor, through: Tensor, total: Tensor, weight: Tensor,
                          eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of the sum (`through` is what reaches it from elsewhere) and of the weight."""
    return _backward(dy, total, weight, through, eps)


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


rms_norm.register_fake(lambda x, weight, eps: _like(x))
rms_norm_backward.register_fake(lambda dy, x, weight, eps: (_like(x), _like(weight)))
add_rms_norm.register_fake(lambda x, residual, weight, eps: (_like(x), _like(x)))
add_rms_norm_backward.register_fake(lambda dy, through, total, weight, eps: (_like(total), _like(weight)))


def _save(ctx, inputs, output) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _save_sum(ctx, inputs, output) -> None:
    _, _, weight, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight)


def _rms_norm_gradient(ctx, dy: Tensor):
    return *rms_norm_backward(dy, *ctx.saved_tensors, ctx.eps), None


def _add_rms_norm_gradient(ctx, dy: Tensor, through: Tensor):
    dx, dw = add_rms_norm_backward(dy, through, *ctx.saved_tensors, ctx.eps)
    return dx, dx, dw, None


rms_norm.register_autograd(_rms_norm_gradient, setup_context=_save)
add_rms_norm.register_autograd(_add_rms_norm_gradient, setup_context=_save_sum)
