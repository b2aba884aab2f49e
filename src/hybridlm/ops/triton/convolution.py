"""The short causal convolution with SiLU over several groups of channels, read from one tensor, without padding copies.

x [B, T, C] holds the groups side by side (q | k | v of a layer, as one projection leaves them); each comes out as a
tensor of its own, so that what follows reads and writes it whole, and the gradient goes back into one tensor. A tile
is a stretch of time by a block of channels; its shifted neighbours come out of the cache. Backward computes the values
before SiLU again, so nothing but x is kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["short_convolution"]

TIME, CHANNELS = 32, 64  # of a tile of forward
BACK_TIME, BACK_CHANNELS = 16, 64  # of backward, which holds more
TILES = 16  # of time to a program of backward, which sums the weights' gradient over them


@triton.jit
def _input(x_ptr, state_ptr, doc_ptr, t, channel, back, doc, T, C: tl.constexpr, x_stride, state_stride,
           W: tl.constexpr, STATE: tl.constexpr, DOCS: tl.constexpr):
    """x at t - back, or what counts as that: the state before the start, zero from another document."""
    at = t - back
    seen = (at >= 0) & (at < T)
    if DOCS:
        seen &= tl.load(doc_ptr + at, seen, other=0) == doc
    x = tl.load(x_ptr + at[:, None].to(tl.int64) * x_stride + channel[None, :],
                seen[:, None] & (channel < C)[None, :], other=0.0).to(tl.float32)
    if STATE:
        before = (at < 0) & (at > -W)
        x += tl.load(state_ptr + (at + W - 1)[:, None].to(tl.int64) * state_stride + channel[None, :],
                     before[:, None] & (channel < C)[None, :], other=0.0).to(tl.float32)
    return x


@triton.jit
def convolution_forward_kernel(x_ptr, weight_ptr, state_ptr, doc_ptr, y_ptr, T, x_batch, x_stride, state_batch,
                               state_stride, C: tl.constexpr, W: tl.constexpr, TIME: tl.constexpr,
                               CHANNELS: tl.constexpr, STATE: tl.constexpr, DOCS: tl.constexpr):
    batch = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * TIME + tl.arange(0, TIME)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    x_ptr += batch * x_batch
    state_ptr += batch * state_batch
    doc_ptr += batch * T
    doc = t
    if DOCS:
        doc = tl.load(doc_ptr + t, t < T, other=0)
    y = tl.zeros([TIME, CHANNELS], tl.float32)
    for back in tl.static_range(W):
        tap = tl.load(weight_ptr + channel * W + W - 1 - back, channel < C, other=0.0).to(tl.float32)
        y += tap[None, :] * _input(x_ptr, state_ptr, doc_ptr, t, channel, back, doc, T, C, x_stride, state_stride, W,
                                   STATE, DOCS)
    y *= tl.sigmoid(y)
    at = (batch * T + t)[:, None] * C + channel[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), (t < T)[:, None] & (channel < C)[None, :])


@triton.jit
def convolution_backward_kernel(dy_ptr, x_ptr, weight_ptr, state_ptr, doc_ptr, dx_ptr, dw_ptr, T, x_batch, x_stride,
                                dx_stride, state_batch, state_stride, C: tl.constexpr, W: tl.constexpr,
                                TIME: tl.constexpr, CHANNELS: tl.constexpr, TILES: tl.constexpr,
                                SUMS: tl.constexpr, STATE: tl.constexpr, DOCS: tl.constexpr):
    batch = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    real = (channel < C)[None, :]
    x_ptr += batch * x_batch
    state_ptr += batch * state_batch
    doc_ptr += batch * T
    taps = tl.arange(0, SUMS)[:, None]
    dw = tl.zeros([SUMS, CHANNELS], tl.float32)  # d w[W - 1 - back] = sum over t of x[t - back] d y[t]
    for tile in range(TILES):
        t = (tl.program_id(0) * TILES + tile) * TIME + tl.arange(0, TIME)
        doc = t
        if DOCS:
            doc = tl.load(doc_ptr + t, t < T, other=0)
        dx = tl.zeros([TIME, CHANNELS], tl.float32)
        for ahead in tl.static_range(W):  # the outputs at t .. t + W - 1 saw this input
            later = t + ahead
            reached = later < T
            later_doc = later
            if DOCS:
                later_doc = tl.load(doc_ptr + later, reached, other=0)
            y = tl.zeros([TIME, CHANNELS], tl.float32)
            for back in tl.static_range(W):
                tap = tl.load(weight_ptr + channel * W + W - 1 - back, channel < C, other=0.0).to(tl.float32)
                y += tap[None, :] * _input(x_ptr, state_ptr, doc_ptr, later, channel, back, later_doc, T, C, x_stride,
                                           state_stride, W, STATE, DOCS)
            open_ = tl.sigmoid(y)
            dy = tl.load(dy_ptr + (batch * T + later)[:, None] * C + channel[None, :], reached[:, None] & real,
                         other=0.0).to(tl.float32)
            dy *= open_ * (1 + y * (1 - open_))
            if ahead == 0:
                for back in tl.static_range(W):
                    x = _input(x_ptr, state_ptr, doc_ptr, t, channel, back, doc, T, C, x_stride, state_stride, W,
                               STATE, DOCS)
                    dw += tl.where(taps == W - 1 - back, tl.sum(x * dy, 0)[None, :], 0.0)
            if DOCS:
                dy = tl.where((later_doc == doc)[:, None], dy, 0.0)
            tap = tl.load(weight_ptr + channel * W + W - 1 - ahead, channel < C, other=0.0).to(tl.float32)
            dx += tap[None, :] * dy
        tl.store(dx_ptr + (batch * T + t)[:, None] * dx_stride + channel[None, :], dx.to(dx_ptr.dtype.element_ty),
                 (t < T)[:, None] & real)
    part = batch * tl.num_programs(0) + tl.program_id(0)
    tl.store(dw_ptr + (part * C + channel[None, :]) * W + taps, dw, (taps < W) & real)


def _forward(x: Tensor, weight: Tensor, state: Tensor | None, documents: Tensor | None) -> Tensor:
    batch, time, channels = x.shape
    y = torch.empty(batch, time, channels, dtype=x.dtype, device=x.device)
    before = x if state is None else state
    if y.numel():
        grid = (triton.cdiv(time, TIME), triton.cdiv(channels, CHANNELS), batch)
        convolution_forward_kernel[grid](
            x, weight.contiguous(), before, x if documents is None else documents, y, time, x.stride(0), x.stride(1),
            before.stride(0), before.stride(1), C=channels, W=weight.shape[1], TIME=TIME, CHANNELS=CHANNELS,
            STATE=state is not None, DOCS=documents is not None, num_warps=4)
    return y


def _backward(dy: Tensor, x: Tensor, weight: Tensor, state: Tensor | None, documents: Tensor | None,
              dx: Tensor) -> Tensor:
    """Fills dx [B, T, C], a part of a wider tensor, and returns d weight."""
    batch, time, channels = x.shape
    before = x if state is None else state
    grid = (triton.cdiv(time, BACK_TIME * TILES), triton.cdiv(channels, BACK_CHANNELS), batch)
    dw = torch.empty(grid[0] * batch, *weight.shape, dtype=torch.float32, device=x.device)
    if dy.numel():
        convolution_backward_kernel[grid](
            dy.contiguous(), x, weight.contiguous(), before, x if documents is None else documents, dx, dw, time,
            x.stride(0), x.stride(1), dx.stride(1), before.stride(0), before.stride(1), C=channels,
            W=weight.shape[1], TIME=BACK_TIME, CHANNELS=BACK_CHANNELS, TILES=TILES,
            SUMS=triton.next_power_of_2(weight.shape[1]), STATE=state is not None, DOCS=documents is not None,
            num_warps=4)
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
