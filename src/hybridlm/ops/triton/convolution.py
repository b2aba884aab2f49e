"""The short causal convolution with SiLU over several groups of channels, read from one tensor, without padding copies.

x [B, T, C] holds the groups side by side (q | k | v of a layer, as one projection leaves them); each comes out as a
tensor of its own, so that what follows reads and writes it whole, and the gradient goes back into one tensor. A
program walks through a span of time with the last rows of its channels in registers, so each value is read once;
backward computes the values before SiLU again, so nothing but x is kept. Filters are up to four wide. Programs that run
at the same time stand side by side along the channels, so that memory is read a whole row at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["short_convolution"]

CHANNELS = 128  # of a program, one warp


@triton.jit
def _load(ptr, r, stride, first, last, T, real):
    """Row r of a span that begins at `first`, before `last` and T."""
    return tl.load(ptr + r * stride, real & (r < last) & (first + r < T), other=0.0).to(tl.float32)


@triton.jit
def _taps(weight_ptr, real, W: tl.constexpr):
    """The weights of a channel, the oldest first; those that a narrower filter lacks are zero."""
    w3 = tl.load(weight_ptr + W - 1, real, other=0.0).to(tl.float32)
    w2 = tl.load(weight_ptr + W - 2, real & (W > 1), other=0.0).to(tl.float32)
    w1 = tl.load(weight_ptr + W - 3, real & (W > 2), other=0.0).to(tl.float32)
    w0 = tl.load(weight_ptr + W - 4, real & (W > 3), other=0.0).to(tl.float32)
    return w0, w1, w2, w3


@triton.jit
def _before(x_ptr, state_ptr, x_stride, state_stride, first, real, W: tl.constexpr, STATE: tl.constexpr):
    """The three inputs before a span, the newest first."""
    inside = real & (first > 0)
    x1 = tl.load(x_ptr - x_stride, inside, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr - 2 * x_stride, inside, other=0.0).to(tl.float32)
    x3 = tl.load(x_ptr - 3 * x_stride, inside, other=0.0).to(tl.float32)
    if STATE:
        start = real & (first == 0)
        x1 += tl.load(state_ptr + (W - 2) * state_stride, start & (W > 1), other=0.0).to(tl.float32)
        x2 += tl.load(state_ptr + (W - 3) * state_stride, start & (W > 2), other=0.0).to(tl.float32)
        x3 += tl.load(state_ptr + (W - 4) * state_stride, start & (W > 3), other=0.0).to(tl.float32)
    return x1, x2, x3


@triton.jit
def _documents(doc_ptr, first):
    """The documents of the three tokens before a span, the newest first."""
    d1 = tl.load(doc_ptr - 1, first > 0, other=0).to(tl.int32)
    d2 = tl.load(doc_ptr - 2, first > 0, other=0).to(tl.int32)
    d3 = tl.load(doc_ptr - 3, first > 0, other=0).to(tl.int32)
    return d1, d2, d3


@triton.jit
def _filtered(x, x1, x2, x3, d0, d1, d2, d3, w0, w1, w2, w3, DOCS: tl.constexpr):
    """The convolution at one time; what another document holds counts as zero."""
    if DOCS:
        x1 = tl.where(d1 == d0, x1, 0.0)
        x2 = tl.where(d2 == d0, x2, 0.0)
        x3 = tl.where(d3 == d0, x3, 0.0)
    return w3 * x + w2 * x1 + w1 * x2 + w0 * x3, x1, x2, x3


@triton.jit
def convolution_forward_kernel(x_ptr, weight_ptr, state_ptr, doc_ptr, y_ptr, T, SPAN, x_batch, x_stride, state_batch,
                               state_stride, C: tl.constexpr, W: tl.constexpr, CHANNELS: tl.constexpr,
                               STATE: tl.constexpr, DOCS: tl.constexpr):
    batch = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * SPAN
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    real = channel < C
    x_ptr += batch * x_batch + first.to(tl.int64) * x_stride + channel
    y_ptr += (batch * T + first) * C + channel
    doc_ptr += batch * T + first
    w0, w1, w2, w3 = _taps(weight_ptr + channel * W, real, W)
    x1, x2, x3 = _before(x_ptr, state_ptr + batch * state_batch + channel, x_stride, state_stride, first, real, W,
                         STATE)
    d0 = 0
    d1 = 0
    d2 = 0
    d3 = 0
    if DOCS:
        d1, d2, d3 = _documents(doc_ptr, first)
    for r in range(0, SPAN, 8):  # the loads of eight rows are under way together
        xa = _load(x_ptr, r, x_stride, first, SPAN, T, real)
        xb = _load(x_ptr, r + 1, x_stride, first, SPAN, T, real)
        xc = _load(x_ptr, r + 2, x_stride, first, SPAN, T, real)
        xd = _load(x_ptr, r + 3, x_stride, first, SPAN, T, real)
        xe = _load(x_ptr, r + 4, x_stride, first, SPAN, T, real)
        xf = _load(x_ptr, r + 5, x_stride, first, SPAN, T, real)
        xg = _load(x_ptr, r + 6, x_stride, first, SPAN, T, real)
        xh = _load(x_ptr, r + 7, x_stride, first, SPAN, T, real)
        for i in tl.static_range(8):
            x = xa if i == 0 else (xb if i == 1 else (xc if i == 2 else (xd if i == 3 else (
                xe if i == 4 else (xf if i == 5 else (xg if i == 6 else xh))))))
            if DOCS:
                d0 = tl.load(doc_ptr + r + i, first + r + i < T, other=0).to(tl.int32)
            y, _, _, _ = _filtered(x, x1, x2, x3, d0, d1, d2, d3, w0, w1, w2, w3, DOCS)
            y *= tl.sigmoid(y)
            tl.store(y_ptr + (r + i) * C, y.to(y_ptr.dtype.element_ty), real & (first + r + i < T))
            x3 = x2
            x2 = x1
            x1 = x
            if DOCS:
                d3 = d2
                d2 = d1
                d1 = d0


@triton.jit
def _row(x, dy, r, SPAN, x1, x2, x3, s1, s2, s3, d0, d1, d2, d3, w0, w1, w2, w3, g0, g1, g2, g3, DOCS: tl.constexpr):
    """One step through time: the slope before SiLU at r, d x at r - 3, and the sums of the weights' gradient."""
    y, x1, x2, x3 = _filtered(x, x1, x2, x3, d0, d1, d2, d3, w0, w1, w2, w3, DOCS)
    open_ = tl.sigmoid(y)
    s = dy * open_ * (1 + y * (1 - open_))
    if DOCS:
        dx = w3 * s3 + w2 * tl.where(d2 == d3, s2, 0.0) + w1 * tl.where(d1 == d3, s1, 0.0) \
            + w0 * tl.where(d0 == d3, s, 0.0)
    else:
        dx = w3 * s3 + w2 * s2 + w1 * s1 + w0 * s
    own = tl.where(r < SPAN, s, 0.0)  # what lies behind the span is the next program's to sum
    return s, dx, g0 + own * x3, g1 + own * x2, g2 + own * x1, g3 + own * x


@triton.jit
def convolution_backward_kernel(dy_ptr, x_ptr, weight_ptr, state_ptr, doc_ptr, dx_ptr, dw_ptr, T, SPAN, x_batch,
                                x_stride, dx_batch, dx_stride, state_batch, state_stride, C: tl.constexpr,
                                W: tl.constexpr, CHANNELS: tl.constexpr, STATE: tl.constexpr, DOCS: tl.constexpr):
    batch = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * SPAN
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    real = channel < C
    x_ptr += batch * x_batch + first.to(tl.int64) * x_stride + channel
    dy_ptr += (batch * T + first) * C + channel
    dx_ptr += batch * dx_batch + first.to(tl.int64) * dx_stride + channel
    doc_ptr += batch * T + first
    w0, w1, w2, w3 = _taps(weight_ptr + channel * W, real, W)
    x1, x2, x3 = _before(x_ptr, state_ptr + batch * state_batch + channel, x_stride, state_stride, first, real, W,
                         STATE)
    d0 = 0
    d1 = 0
    d2 = 0
    d3 = 0
    if DOCS:
        d1, d2, d3 = _documents(doc_ptr, first)
    s1 = tl.zeros([CHANNELS], tl.float32)
    s2 = tl.zeros([CHANNELS], tl.float32)
    s3 = tl.zeros([CHANNELS], tl.float32)
    g0 = tl.zeros([CHANNELS], tl.float32)
    g1 = tl.zeros([CHANNELS], tl.float32)
    g2 = tl.zeros([CHANNELS], tl.float32)
    g3 = tl.zeros([CHANNELS], tl.float32)
    last = SPAN + 3
    for r in range(0, last, 4):  # the loads of four rows are under way together
        xa = _load(x_ptr, r, x_stride, first, last, T, real)
        xb = _load(x_ptr, r + 1, x_stride, first, last, T, real)
        xc = _load(x_ptr, r + 2, x_stride, first, last, T, real)
        xd = _load(x_ptr, r + 3, x_stride, first, last, T, real)
        ya = _load(dy_ptr, r, C, first, last, T, real)
        yb = _load(dy_ptr, r + 1, C, first, last, T, real)
        yc = _load(dy_ptr, r + 2, C, first, last, T, real)
        yd = _load(dy_ptr, r + 3, C, first, last, T, real)
        for i in tl.static_range(4):
            x = xa if i == 0 else (xb if i == 1 else (xc if i == 2 else xd))
            dy = ya if i == 0 else (yb if i == 1 else (yc if i == 2 else yd))
            if DOCS:
                d0 = tl.load(doc_ptr + r + i, first + r + i < T, other=0).to(tl.int32)
            s, dx, g0, g1, g2, g3 = _row(x, dy, r + i, SPAN, x1, x2, x3, s1, s2, s3, d0, d1, d2, d3, w0, w1, w2, w3,
                                         g0, g1, g2, g3, DOCS)
            at = r + i - 3
            tl.store(dx_ptr + at * dx_stride, dx.to(dx_ptr.dtype.element_ty),
                     real & (at >= 0) & (at < SPAN) & (first + at < T))
            x3 = x2
            x2 = x1
            x1 = x
            s3 = s2
            s2 = s1
            s1 = s
            if DOCS:
                d3 = d2
                d2 = d1
                d1 = d0
    dw_ptr += ((batch * tl.num_programs(1) + tl.program_id(1)) * C + channel) * W
    tl.store(dw_ptr + W - 1, g3, real)
    tl.store(dw_ptr + W - 2, g2, real & (W > 1))
    tl.store(dw_ptr + W - 3, g1, real & (W > 2))
    tl.store(dw_ptr + W - 4, g0, real & (W > 3))


def _grid(x: Tensor) -> tuple[tuple[int, int, int], int]:
    """Programs, and the span of time of one: long where there is enough to do for all."""
    batch, time, channels = x.shape
    span = min(128, max(16, triton.next_power_of_2(batch * time * channels // (1 << 20))))
    return (triton.cdiv(channels, CHANNELS), triton.cdiv(time, span), batch), span


def _forward(x: Tensor, weight: Tensor, state: Tensor | None, documents: Tensor | None) -> Tensor:
    batch, time, channels = x.shape
    y = torch.empty(batch, time, channels, dtype=x.dtype, device=x.device)
    before = x if state is None else state
    if y.numel():
        grid, span = _grid(x)
        convolution_forward_kernel[grid](
            x, weight.contiguous(), before, x if documents is None else documents, y, time, span, x.stride(0),
            x.stride(1), before.stride(0), before.stride(1), C=channels, W=weight.shape[1], CHANNELS=CHANNELS,
            STATE=state is not None, DOCS=documents is not None, num_warps=1)
    return y


def _backward(dy: Tensor, x: Tensor, weight: Tensor, state: Tensor | None, documents: Tensor | None,
              dx: Tensor) -> Tensor:
    """Fills dx [B, T, C], a part of a wider tensor, and returns d weight."""
    batch, time, channels = x.shape
    before = x if state is None else state
    grid, span = _grid(x)
    dw = torch.empty(grid[1] * batch, *weight.shape, dtype=torch.float32, device=x.device)
    if dy.numel():
        convolution_backward_kernel[grid](
            dy.contiguous(), x, weight.contiguous(), before, x if documents is None else documents, dx, dw, time, span,
            x.stride(0), x.stride(1), dx.stride(0), dx.stride(1), before.stride(0), before.stride(1), C=channels,
            W=weight.shape[1], CHANNELS=CHANNELS, STATE=state is not None, DOCS=documents is not None, num_warps=1)
    return dw.sum(0).to(weight.dtype)


def _groups(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    x = x if x.stride(-1) == 1 else x.contiguous()
    return list(x.split([w.shape[0] for w in weights], dim=-1))


def _states(x: Tensor, weights: list[Tensor], state: Tensor | None, documents: Tensor | None) -> list[Tensor | None]:
    """The state of each group. Where documents are told apart nothing comes before the first, as in the reference."""
    if state is None or documents is not None:
        return [None] * len(weights)
    return list(_groups(state.to(x.dtype), weights))


@torch.library.custom_op("hybridlm::short_convolution", mutates_args=())
def short_convolution(x: Tensor, weights: list[Tensor], state: Tensor | None, documents: Tensor | None) -> list[Tensor]:
    """SiLU of each channel's causal convolution, a tensor [B, T, C_i] for each of `weights` [C_i, W].

    x [B, T, sum of C_i]; `state` [B, W - 1, sum of C_i] the inputs before x (None: zeros; it gets no gradient);
    `documents` [B, T] as in `hybridlm.ops.reference`.
    """
    documents = None if documents is None else documents.contiguous()
    return [_forward(part, weight, before, documents)
            for part, weight, before in zip(_groups(x, weights), weights, _states(x, weights, state, documents),
                                                strict=True)]


@torch.library.custom_op("hybridlm::short_convolution_backward", mutates_args=())
def short_convolution_backward(dys: list[Tensor], x: Tensor, weights: list[Tensor], state: Tensor | None,
                               documents: Tensor | None) -> list[Tensor]:
    """[d x, d weight of each group]."""
    documents = None if documents is None else documents.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dws = [_backward(dy, part, weight, before, documents, into) for dy, part, weight, before, into
           in zip(dys, _groups(x, weights), weights, _states(x, weights, state, documents), _groups(dx, weights),
                  strict=True)]
    return [dx, *dws]


@short_convolution.register_fake
def _(x, weights, state, documents):
    return [torch.empty(*x.shape[:2], w.shape[0], dtype=x.dtype, device=x.device) for w in weights]


@short_convolution_backward.register_fake
def _(dys, x, weights, state, documents):
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device), *(torch.empty_like(w) for w in weights)]


def _save(ctx, inputs, output) -> None:
    x, weights, state, documents = inputs
    ctx.save_for_backward(x, state, documents, *weights)


def _gradient(ctx, dys):
    x, state, documents, *weights = ctx.saved_tensors
    dx, *dws = short_convolution_backward(dys, x, weights, state, documents)
    return dx, dws, None, None


short_convolution.register_autograd(_gradient, setup_context=_save)
