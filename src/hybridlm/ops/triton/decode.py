"""One token of Gated DeltaNet for each row of a batch, in one kernel: convolution, SiLU, l2norm, gates, the delta rule,
and the per-head RMSNorm times SiLU(gate). And the residual sums and norms between the layers, fused.

A decoding step reads each recurrent state once and writes it once; that traffic is the floor, and everything else
happens in registers on the way. One program takes one value head of one row, its state [K, V] in tiles whose sides are
powers of two that add up to K and V exactly (96 is 64 + 32, 192 three times 64), so that no lane is idle. This form
runs anywhere; on Hopper `ops/cuda/decode.cu` does the same, faster.

Rows find their memory by address: `recurrent` and `conv` hold a pointer each, as int64 on the device, so a captured
graph serves any sequences. Address 0 marks a row that only fills up the batch. The convolution's past is a ring of W
inputs, the input of position p at p mod W: a token writes the one place that no program of this step reads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["add_norm", "gdn_decode"]


@triton.jit
def _conv(x, taps, taps_stride, ring, channel, offset, position, mask, store,
          CHANNELS: tl.constexpr, W: tl.constexpr):
    """SiLU of the convolution at `channel` (of x and taps), and the input into the ring at `offset + channel`."""
    new = tl.load(x + channel, mask=mask, other=0.0)
    y = new.to(tl.float32) * tl.load(taps + (W - 1) * taps_stride + channel, mask=mask, other=0.0)
    for back in tl.static_range(1, W):
        place = (position + W - back) % W
        old = tl.load(ring + place * CHANNELS + offset + channel, mask=mask, other=0.0).to(tl.float32)
        y += old * tl.load(taps + (W - 1 - back) * taps_stride + channel, mask=mask, other=0.0)
    tl.store(ring + (position % W) * CHANNELS + offset + channel, new, mask=mask & store)
    return y * tl.sigmoid(y)


@triton.jit(do_not_specialize=["layer"])
def _gdn_decode(q, k, v, a, b, gate, stride, taps_q, taps_k, taps_v, taps_stride, ssm_a, dt_bias, norm, recurrent, conv,
                positions, out, out_stride, layer, eps, scale, strength,
                HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr,
                K1: tl.constexpr, K2: tl.constexpr, BV: tl.constexpr, OVERLAP: tl.constexpr, DTYPE: tl.constexpr):
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    address = tl.load(recurrent + row)
    if address == 0:
        return
    position = tl.load(positions + row)
    state = tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16) + (layer * HV + head).to(tl.int64) * (K * V)
    ring = tl.multiple_of(tl.load(conv + row).to(tl.pointer_type(DTYPE)), 16)
    ring += layer.to(tl.int64) * W * (2 * HK * K + HV * V)

    rk1, rk2, rv = tl.arange(0, K1), K1 + tl.arange(0, K2), tl.arange(0, BV)
    NV: tl.constexpr = (V + BV - 1) // BV
    CHANNELS: tl.constexpr = 2 * HK * K + HV * V
    key_head = head // (HV // HK)
    first = head % (HV // HK) == 0  # of the value heads that share these keys
    c1, c2, in2 = key_head * K + rk1, key_head * K + rk2, rk2 < K
    q1 = _conv(q + row * stride, taps_q, taps_stride, ring, c1, 0, position, rk1 < K, first, CHANNELS, W)
    q2 = _conv(q + row * stride, taps_q, taps_stride, ring, c2, 0, position, in2, first, CHANNELS, W)
    k1 = _conv(k + row * stride, taps_k, taps_stride, ring, c1, HK * K, position, rk1 < K, first, CHANNELS, W)
    k2 = _conv(k + row * stride, taps_k, taps_stride, ring, c2, HK * K, position, in2, first, CHANNELS, W)
    q_norm = tl.rsqrt(tl.sum(q1 * q1, 0) + tl.sum(q2 * q2, 0) + 1e-6) * scale
    k_norm = tl.rsqrt(tl.sum(k1 * k1, 0) + tl.sum(k2 * k2, 0) + 1e-6)
    q1, q2, k1, k2 = q1 * q_norm, q2 * q_norm, k1 * k_norm, k2 * k_norm
    qk = tl.sum(q1 * k1, 0) + tl.sum(q2 * k2, 0)

    rise = tl.load(a + row * stride + head).to(tl.float32) + tl.load(dt_bias + head)
    e = tl.exp(-tl.abs(rise))
    # log(1 + e), exact also where e is small: rounding 1 + e is made good by the quotient.
    log1p = tl.where(1.0 + e == 1.0, e, tl.log(1.0 + e) * (e / tl.maximum(1.0 + e - 1.0, 1e-30)))
    softplus = tl.maximum(rise, 0.0) + log1p
    decay = tl.exp(tl.load(ssm_a + head) * softplus)
    beta = strength * tl.sigmoid(tl.load(b + row * stride + head).to(tl.float32))

    outs = ()
    squares = 0.0
    for i in tl.static_range(NV):
        c = i * BV + rv
        s1 = decay * tl.load(state + rk1[:, None] * V + c[None, :], mask=(c < V)[None, :], other=0.0)
        s2 = decay * tl.load(state + rk2[:, None] * V + c[None, :], mask=in2[:, None] & (c < V)[None, :], other=0.0)
        read = tl.sum(s1 * k1[:, None], 0) + tl.sum(s2 * k2[:, None], 0)
        seen = tl.sum(s1 * q1[:, None], 0) + tl.sum(s2 * q2[:, None], 0)
        value = _conv(v + row * stride, taps_v, taps_stride, ring, head * V + c, 2 * HK * K, position, c < V, True,
                      CHANNELS, W)
        delta = beta * (value - read)
        tl.store(state + rk1[:, None] * V + c[None, :], s1 + k1[:, None] * delta[None, :], mask=(c < V)[None, :])
        tl.store(state + rk2[:, None] * V + c[None, :], s2 + k2[:, None] * delta[None, :],
                 mask=in2[:, None] & (c < V)[None, :])
        o = tl.where(c < V, seen + qk * delta, 0.0)  # q of the updated state
        squares += tl.sum(o * o, 0)
        outs = outs + (o,)  # type: ignore[assignment]  # noqa: RUF005
    size = tl.rsqrt(squares / V + eps)
    for i in tl.static_range(NV):
        c = i * BV + rv
        g = tl.load(gate + row * stride + head * V + c, mask=c < V, other=0.0).to(tl.float32)
        y = outs[i] * size * tl.load(norm + c, mask=c < V, other=0.0) * g * tl.sigmoid(g)
        tl.store(out + row * out_stride + head * V + c, y.to(out.dtype.element_ty), mask=c < V)


def gdn_decode(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, gate: Tensor, taps: tuple[Tensor, Tensor, Tensor],
               ssm_a: Tensor, dt_bias: Tensor, norm: Tensor, recurrent: Tensor, conv: Tensor, positions: Tensor,
               out: Tensor, *, layer: int, heads: tuple[int, int], eps: float, strength: float,
               overlap: bool = False,
               num_warps: int = 4) -> None:
    """One step for B rows, in place.

    q, k [B, Hk K]; v, gate [B, Hv V]; a, b [B, Hv]: rows of one matrix, or with equal strides. taps: of the q, k and v
    convolutions, float32 [W, channels], the newest last, with one row stride. ssm_a (-exp(A_log)), dt_bias float32
    [Hv], norm float32 [V].
    recurrent, conv, positions: int64 [B] on the device: addresses of float32 [layers, Hv, K, V] and of [layers, W,
    channels] in q's dtype (0: skip this row), and each token's position. `layer` counts within those. `heads` is
    (Hk, Hv), `strength` the largest beta (2 with negative eigenvalues). out [B, Hv V], in any dtype.
    """
    rows = q.shape[0]
    key_heads, value_heads = heads
    K, V = q.shape[1] // key_heads, v.shape[1] // value_heads
    K1, K2 = pieces(K)
    BV = min(64, triton.next_power_of_2(V))
    strides = {x.stride(0) for x in (q, k, v, a, b, gate)} if rows > 1 else {q.stride(0)}
    assert len(strides) == 1, "q, k, v, a, b and gate must have one row stride"
    _gdn_decode[(value_heads, rows)](
        q, k, v, a, b, gate, q.stride(0), *taps, taps[0].stride(0), ssm_a, dt_bias, norm, recurrent, conv, positions,
        out, out.stride(0), layer, eps, K**-0.5, strength, HK=key_heads, HV=value_heads, K=K, V=V,
        W=taps[0].shape[0], K1=K1, K2=K2, BV=BV, OVERLAP=overlap, DTYPE=_TYPES[q.dtype], num_warps=num_warps,
        launch_pdl=overlap)


@triton.jit
def _add_norm(x, y, weight, inner, out, x_stride, y_stride, eps, inner_eps, D: tl.constexpr, BLOCK: tl.constexpr,
              SUM: tl.constexpr, INNER: tl.constexpr, NORM: tl.constexpr, OVERLAP: tl.constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask = c < D
    if OVERLAP:
        gdc_launch_dependents()
    if INNER:
        w_inner = tl.load(inner + c, mask=mask, other=0.0)
    if NORM:
        w = tl.load(weight + c, mask=mask, other=0.0)
    if OVERLAP:
        gdc_wait()
    s = tl.load(x + row * x_stride + c, mask=mask, other=0.0)
    if SUM:
        t = tl.load(y + row * y_stride + c, mask=mask, other=0.0)
        if INNER:
            t = t.to(tl.float32)
            t = t * tl.rsqrt(tl.sum(t * t, 0) / D + inner_eps) * w_inner
            s = (s.to(tl.float32) + t).to(s.dtype)
        else:
            s = (s.to(tl.float32) + t.to(tl.float32)).to(s.dtype)
        tl.store(x + row * x_stride + c, s, mask=mask)
    if NORM:
        s = s.to(tl.float32)
        z = s * tl.rsqrt(tl.sum(s * s, 0) / D + eps) * w
        tl.store(out + row * D + c, z.to(out.dtype.element_ty), mask=mask)


def add_norm(x: Tensor, y: Tensor | None, weight: Tensor | None, eps: float, inner: Tensor | None = None,
             inner_eps: float = 0.0, overlap: bool = False) -> Tensor | None:
    """x += y, or with `inner` x += RMSNorm(y; inner), for x, y [T, D]; then RMSNorm(x; weight), if there is one.

    Norms are taken of what x was rounded to, as without fusion. Weights float32 [D].
    """
    rows, D = x.shape
    out = None if weight is None else torch.empty(rows, D, dtype=x.dtype, device=x.device)
    y_stride = 0 if y is None else y.stride(0)
    _add_norm[(rows,)](x, y, weight, inner, out, x.stride(0), y_stride, eps, inner_eps, D=D,
                       BLOCK=triton.next_power_of_2(D), SUM=y is not None, INNER=inner is not None,
                       NORM=weight is not None, OVERLAP=overlap, num_warps=8 if D > 1024 else 4, launch_pdl=overlap)
    return out


def pieces(size: int) -> tuple[int, int]:
    """Two powers of two that add up to `size`, or a little more: 96 is 64 + 32, 128 is 64 + 64."""
    first = triton.next_power_of_2(size) // 2
    return max(first, 1), max(triton.next_power_of_2(size - first), 1)


_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
