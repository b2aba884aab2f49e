"""Kernels of the chunked gated delta rule, forward: `prepare_kernel`, parallel over chunks, then `scan_kernel`.

The mathematics is that of `hybridlm.ops.chunked`; what differs is what reaches memory. In a chunk of C = 64 tokens,
with k and q of unit length, G the running sum of log decays, D_ij = exp(G_i - G_j) and s = K^-1/2:

    T  = (I + L)^-1,  L_ij = beta_i D_ij k_i.k_j  for i > j        prepare: one program per chunk and value head
    P  = s D_ij q_i.k_j  for i >= j
    x  = beta (v - exp(G) k S)                                     scan: one program per sequence, head and slab of V
    w  = T x                                                       (what the chunk writes)
    o  = s exp(G) q S + P w
    S' = exp(G_C) S + (exp(G_C - G) k)^T w

The scan holds S transposed, [slab, K], in float32 registers: all five products then have S, x or w as the left
operand, which the tensor cores take from the registers where the product before left it, and only q, k, v, T, P come
through shared memory. K is cut into two powers of two (96 = 64 + 32), so that nothing is padded. Lengths of q and k
enter as factors per token (`factors`), so q and k themselves are never rewritten.

Tokens are flattened to [B T]. Chunks are numbered through all sequences; `offsets` [N + 1] (with VARLEN) holds each
sequence's first, `bounds` [N + 1] its first token. Without VARLEN both follow from the length.
"""

from __future__ import annotations

import triton
import triton.language as tl

FLOOR = tl.constexpr(-110.0)  # exp of it is 0 in float32: a log decay of -inf, a reset, cannot make inf - inf


@triton.jit
def find(offsets, index, count):
    """The n with offsets[n] <= index < offsets[n + 1]; empty sequences are passed over."""
    low = 0
    high = count
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(offsets + middle) <= index:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def matmul(a, b, PRECISION: tl.constexpr):
    """a @ b for float32 with entries of order 1; "fp16" is as precise as tf32, and faster."""
    if PRECISION == "ieee":
        return tl.dot(a, b, input_precision="ieee")
    return tl.dot(a.to(tl.float16), b.to(tl.float16))


@triton.jit
def doubled(x, lower, row, column, size: tl.constexpr, PRECISION: tl.constexpr):
    """From inverses x of blocks of `size` to those of twice the size: [[a, 0], [b, d]]^-1 = [[a', 0], [-d' b a', d']].
    """
    lower_left = (row // (2 * size) == column // (2 * size)) & (row // size > column // size)
    return x - matmul(x, matmul(tl.where(lower_left, lower, 0.0), x, PRECISION), PRECISION)


@triton.jit
def unit_lower_inverse(lower, PRECISION: tl.constexpr):
    """(I + L)^-1 for strictly lower triangular L [64, 64] in float32, from blocks of 2 upwards.

    All entries of it are bounded by 2 in the delta rule (a product of contractions between two unit keys), so float16
    holds them well. With X the inverse of the blocks of 16 on the diagonal and Y = X (L outside of them), which is
    nilpotent of order 4, (I + L)^-1 = (I + Y)^-1 X = (I - Y)(I + Y^2) X.
    """
    block = tl.arange(0, 4)[:, None, None, None] == tl.arange(0, 4)[None, None, :, None]
    four = tl.reshape(lower, (4, 16, 4, 16))
    diagonal = tl.sum(tl.where(block, four, 0.0), 2)
    outside = tl.reshape(tl.where(block, 0.0, four), (64, 64))
    row, column = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    pair = (row // 2 == column // 2) & (row > column)
    x = tl.where(row == column, 1.0, tl.where(pair, -diagonal, 0.0))
    x = doubled(x, diagonal, row, column, 2, PRECISION)
    x = doubled(x, diagonal, row, column, 4, PRECISION)
    x = doubled(x, diagonal, row, column, 8, PRECISION)
    x = tl.reshape(tl.where(block, x[:, :, None, :], 0.0), (64, 64))
    y = matmul(x, outside, PRECISION)
    z = x + matmul(y, matmul(y, x, PRECISION), PRECISION)
    return z - matmul(y, z, PRECISION)


@triton.jit(do_not_specialize=["time", "sequences"])
def prepare_kernel(q, k, g, beta, bounds, offsets, inverse, rest_inverse, scores, factors, carry, time, sequences,
                   scale, H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, KA: tl.constexpr, KB: tl.constexpr,
                   NORM: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr):
    """T and P of one chunk and value head, and its factors per token: beta, beta exp(G) |k|^-1, s exp(G) |q|^-1 and
    exp(G_C - G) |k|^-1, then G, |k|^-1 and s |q|^-1; `carry` is exp(G_C)."""
    head = tl.program_id(0)
    chunk = tl.program_id(1)
    if VARLEN:
        if chunk >= tl.load(offsets + sequences):
            return
        n = find(offsets, chunk, sequences)
        first = tl.load(bounds + n)
        start = (chunk - tl.load(offsets + n)) * 64
        length = tl.load(bounds + n + 1) - first
    else:
        chunks = tl.cdiv(time, 64)
        first = (chunk // chunks) * time
        start = (chunk % chunks) * 64
        length = time
    r = tl.arange(0, 64)
    here = start + r < length
    token = (first + start + r).to(tl.int64)
    gates = token * H + head
    narrow = scores.dtype.element_ty

    ca = tl.arange(0, KA)
    at = (token * HK + head // (H // HK)) * K
    ka = tl.load(k + at[:, None] + ca[None, :], mask=here[:, None], other=0.0)
    qa = tl.load(q + at[:, None] + ca[None, :], mask=here[:, None], other=0.0)
    EXACT: tl.constexpr = "ieee" if narrow == tl.float32 else "tf32"
    gram = tl.dot(ka, tl.trans(ka), input_precision=EXACT)
    pairs = tl.dot(qa, tl.trans(ka), input_precision=EXACT)
    if NORM:
        squares = tl.dot(qa, tl.trans(qa), input_precision=EXACT)
    if KB > 0:
        cb = KA + tl.arange(0, KB)
        kb = tl.load(k + at[:, None] + cb[None, :], mask=here[:, None] & (cb < K)[None, :], other=0.0)
        qb = tl.load(q + at[:, None] + cb[None, :], mask=here[:, None] & (cb < K)[None, :], other=0.0)
        gram = tl.dot(kb, tl.trans(kb), gram, input_precision=EXACT)
        pairs = tl.dot(qb, tl.trans(kb), pairs, input_precision=EXACT)
        if NORM:
            squares = tl.dot(qb, tl.trans(qb), squares, input_precision=EXACT)
    if NORM:
        same = r[:, None] == r[None, :]
        lk = tl.rsqrt(tl.sum(tl.where(same, gram, 0.0), 1) + 1e-6)
        lq = tl.rsqrt(tl.sum(tl.where(same, squares, 0.0), 1) + 1e-6) * scale
    else:
        lk, lq = tl.full((64,), 1.0, tl.float32), tl.full((64,), 1.0, tl.float32) * scale

    decay = tl.cumsum(tl.maximum(tl.load(g + gates, mask=here, other=0.0), FLOOR), 0)
    total = tl.sum(tl.where(r == 63, decay, 0.0), 0)
    # At least 1e-15, which changes nothing but that the backward pass may divide by its square.
    b = tl.where(here, tl.maximum(tl.load(beta + gates, mask=here, other=0.0), 1e-15), 0.0)
    out = (chunk * H + head).to(tl.int64)
    tl.store(carry + out, tl.exp(total))
    into = tl.exp(decay)
    tl.store(factors + out * 448 + r, b)
    tl.store(factors + out * 448 + 64 + r, b * into * lk)
    tl.store(factors + out * 448 + 128 + r, into * lq)
    tl.store(factors + out * 448 + 192 + r, tl.exp(total - decay) * lk)
    tl.store(factors + out * 448 + 256 + r, decay)
    tl.store(factors + out * 448 + 320 + r, lk)
    tl.store(factors + out * 448 + 384 + r, lq)

    seen = r[:, None] >= r[None, :]
    d = tl.exp(tl.where(seen, decay[:, None] - decay[None, :], float("-inf"))) * lk[None, :]
    tile = out * 4096 + r[:, None] * 64 + r[None, :]
    tl.store(scores + tile, (pairs * d * lq[:, None]).to(narrow))
    lower = tl.where(r[:, None] > r[None, :], gram * d * (b * lk)[:, None], 0.0)
    t = unit_lower_inverse(lower, PRECISION)
    if narrow == tl.bfloat16:  # cut, not rounded: no conversion back, and the rest has as many bits
        high = (t.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    else:
        high = t.to(narrow).to(tl.float32)
    tl.store(inverse + tile, high.to(narrow))
    tl.store(rest_inverse + tile, (t - high).to(narrow))


@triton.jit(do_not_specialize=["time", "sequences"])
def scan_kernel(q, k, v, inverse, rest_inverse, scores, factors, carry, bounds, offsets, initial, o, states, writes,
                final, time, sequences, H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                KA: tl.constexpr, KB: tl.constexpr, BV: tl.constexpr, INITIAL: tl.constexpr, OUTPUT: tl.constexpr,
                STATES: tl.constexpr, VARLEN: tl.constexpr):
    """All chunks of one sequence, value head and slab of BV values, in order.

    OUTPUT: write o and the final state. STATES: write the state at the start of each chunk, [chunks, H, V, K], and w,
    shaped as v; both in v's type.
    """
    slab = tl.program_id(0)
    head = tl.program_id(1)
    n = tl.program_id(2)
    if VARLEN:
        first = tl.load(bounds + n)
        length = tl.load(bounds + n + 1) - first
        chunk = tl.load(offsets + n)
        chunks = tl.cdiv(length, 64)
    else:
        first = n * time
        length = time
        chunks = tl.cdiv(length, 64)
        chunk = n * chunks
    narrow = v.dtype.element_ty
    EXACT: tl.constexpr = "ieee" if narrow == tl.float32 else "tf32"
    r = tl.arange(0, 64)
    ca = tl.arange(0, KA)
    cb = KA + tl.arange(0, KB if KB > 0 else 16)
    cv = slab * BV + tl.arange(0, BV)
    inside = cv < V

    memory = (n * H + head).to(tl.int64) * (K * V)
    if INITIAL:
        sa = tl.load(initial + memory + ca[None, :] * V + cv[:, None], mask=inside[:, None], other=0.0)
        if KB > 0:
            sb = tl.load(initial + memory + cb[None, :] * V + cv[:, None], mask=inside[:, None] & (cb < K)[None, :],
                         other=0.0)
    else:
        sa = tl.zeros((BV, KA), tl.float32)
        if KB > 0:
            sb = tl.zeros((BV, KB), tl.float32)

    at = (r * (HK * K))[:, None]
    tile = r[:, None] * 64 + r[None, :]
    values = (r * (H * V))[None, :] + cv[:, None]
    for c in range(chunks):
        here = c * 64 + r < length
        token = (first + c * 64).to(tl.int64)
        kc = k + (token * HK + head // (H // HK)) * K
        qc = q + (token * HK + head // (H // HK)) * K
        vc = v + (token * H + head) * V
        index = ((chunk + c) * H + head).to(tl.int64)
        ka = tl.load(kc + at + ca[None, :], mask=here[:, None], other=0.0)
        t = tl.load(inverse + index * 4096 + tile)
        t_rest = tl.load(rest_inverse + index * 4096 + tile)
        x = tl.load(vc + values, mask=here[None, :] & inside[:, None], other=0.0)
        b = tl.load(factors + index * 448 + r)
        bk = tl.load(factors + index * 448 + 64 + r)
        rest = tl.load(factors + index * 448 + 192 + r)
        fade = tl.load(carry + index)

        na = sa.to(narrow)
        if STATES:
            base = states + index * (V * K)
            tl.store(base + cv[:, None] * K + ca[None, :], na, mask=inside[:, None])
        read = tl.dot(na, tl.trans(ka), input_precision=EXACT)
        if KB > 0:
            kb = tl.load(kc + at + cb[None, :], mask=here[:, None] & (cb < K)[None, :], other=0.0)
            nb = sb.to(narrow)
            if STATES:
                tl.store(base + cv[:, None] * K + cb[None, :], nb, mask=inside[:, None] & (cb < K)[None, :])
            read = tl.dot(nb, tl.trans(kb), read, input_precision=EXACT)
        x = x.to(tl.float32) * b[None, :] - read * bk[None, :]
        w = tl.dot(x.to(narrow), tl.trans(t), input_precision=EXACT)
        w = tl.dot(x.to(narrow), tl.trans(t_rest), w, input_precision=EXACT)
        if STATES:
            tl.store(writes + (token * H + head) * V + values, w.to(narrow), mask=here[None, :] & inside[:, None])
        nw = (w * rest[None, :]).to(narrow)
        sa = tl.dot(nw, ka, sa * fade, input_precision=EXACT)
        if KB > 0:
            sb = tl.dot(nw, kb, sb * fade, input_precision=EXACT)
        if OUTPUT:
            qa = tl.load(qc + at + ca[None, :], mask=here[:, None], other=0.0)
            p = tl.load(scores + index * 4096 + tile)
            y = tl.dot(na, tl.trans(qa), input_precision=EXACT)
            if KB > 0:
                qb = tl.load(qc + at + cb[None, :], mask=here[:, None] & (cb < K)[None, :], other=0.0)
                y = tl.dot(nb, tl.trans(qb), y, input_precision=EXACT)
            y *= tl.load(factors + index * 448 + 128 + r)[None, :]
            y = tl.dot(w.to(narrow), tl.trans(p), y, input_precision=EXACT)
            tl.store(o + (token * H + head) * V + values, y.to(narrow), mask=here[None, :] & inside[:, None])

    if OUTPUT:
        tl.store(final + memory + ca[None, :] * V + cv[:, None], sa, mask=inside[:, None])
        if KB > 0:
            tl.store(final + memory + cb[None, :] * V + cv[:, None], sb, mask=inside[:, None] & (cb < K)[None, :])
