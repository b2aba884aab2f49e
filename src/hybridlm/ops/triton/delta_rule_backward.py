"""Kernels of the chunked gated delta rule, backward. The letters are those of `delta_rule_forward`.

Nothing of the forward pass is kept but its inputs: `prepare_kernel` and `scan_kernel` run again and leave each
chunk's starting state S and its writes w. Then, with dS' the gradient of the state at a chunk's end:

    reverse_scan_kernel    dw = P^T do + exp(G_C - G) k dS',  e = T^T dw,  dv = beta e
                           dS = exp(G_C) dS' + s exp(G) q^T do - (beta exp(G) k)^T e        chunk after chunk, backwards
    gradient_kernel        all else from S, dS', w, dv and do, all chunks at once:
                           dP = do w^T                 dL = -e w^T             dbeta = e.w / beta
                           dq = s exp(G) do S^T + (dP D s) k
                           dk = -beta exp(G) e S^T + exp(G_C - G) w dS'^T + (dP D s)^T q + (N + N^T) k, N = dL beta D
                           dG from each place where it stands in an exponent; dg is its running sum from the right

Each sum has one program and one order, so results are the same from run to run. Two 64 x 64 results are needed as they
are and transposed: they go through memory, because Triton 3.6 transposes an accumulator wrongly on Hopper.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridlm.ops.triton.delta_rule_forward import FLOOR, find


@triton.jit(do_not_specialize=["time", "sequences"])
def reverse_scan_kernel(q, k, do, inverse, rest_inverse, scores, factors, carry, bounds, offsets, dfinal, dv, dstates,
                        dinitial, time, sequences, H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr,
                        V: tl.constexpr, KA: tl.constexpr, KB: tl.constexpr, BV: tl.constexpr, INITIAL: tl.constexpr,
                        VARLEN: tl.constexpr):
    """dv, and dS' at the end of each chunk, [chunks, H, V, K] in dv's type; INITIAL: also the initial state's."""
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
    narrow = do.dtype.element_ty
    EXACT: tl.constexpr = "ieee" if narrow == tl.float32 else "tf32"
    r = tl.arange(0, 64)
    ca = tl.arange(0, KA)
    cb = KA + tl.arange(0, KB if KB > 0 else 16)
    cv = slab * BV + tl.arange(0, BV)
    inside = cv < V

    memory = (n * H + head).to(tl.int64) * K * V
    sa = tl.load(dfinal + memory + ca[None, :] * V + cv[:, None], mask=inside[:, None], other=0.0)
    if KB > 0:
        sb = tl.load(dfinal + memory + cb[None, :] * V + cv[:, None], mask=inside[:, None] & (cb < K)[None, :],
                     other=0.0)

    at = (r * (HK * K))[:, None]
    tile = r[:, None] * 64 + r[None, :]
    values = (r * (H * V))[None, :] + cv[:, None]
    # do is fetched one chunk ahead into registers: shared memory for it would leave room for one program only.
    last = (chunks - 1) * 64
    d = tl.load(do + ((first + last).to(tl.int64) * H + head) * V + values,
                mask=(last + r < length)[None, :] & inside[:, None] & (last >= 0), other=0.0)
    for i in range(chunks):
        c = chunks - 1 - i
        here = c * 64 + r < length
        token = (first + c * 64).to(tl.int64)
        kc = k + (token * HK + head // (H // HK)) * K
        qc = q + (token * HK + head // (H // HK)) * K
        index = ((chunk + c) * H + head).to(tl.int64)
        vc = (token * H + head) * V
        ka = tl.load(kc + at + ca[None, :], mask=here[:, None], other=0.0)
        qa = tl.load(qc + at + ca[None, :], mask=here[:, None], other=0.0)
        t = tl.load(inverse + index * 4096 + tile)
        t_rest = tl.load(rest_inverse + index * 4096 + tile)
        p = tl.load(scores + index * 4096 + tile)
        b = tl.load(factors + index * 448 + r)
        bk = tl.load(factors + index * 448 + 64 + r)
        into = tl.load(factors + index * 448 + 128 + r)
        rest = tl.load(factors + index * 448 + 192 + r)
        fade = tl.load(carry + index)

        na = sa.to(narrow)
        dw = tl.dot(na, tl.trans(ka), input_precision=EXACT)
        if KB > 0:
            kb = tl.load(kc + at + cb[None, :], mask=here[:, None] & (cb < K)[None, :], other=0.0)
            qb = tl.load(qc + at + cb[None, :], mask=here[:, None] & (cb < K)[None, :], other=0.0)
            nb = sb.to(narrow)
            dw = tl.dot(nb, tl.trans(kb), dw, input_precision=EXACT)
        dw = tl.dot(d, p, dw * rest[None, :], input_precision=EXACT)
        base = dstates + index * (V * K)
        tl.store(base + cv[:, None] * K + ca[None, :], na, mask=inside[:, None])
        if KB > 0:
            tl.store(base + cv[:, None] * K + cb[None, :], nb, mask=inside[:, None] & (cb < K)[None, :])
        dx = tl.dot(dw.to(narrow), t, input_precision=EXACT)
        dx = tl.dot(dw.to(narrow), t_rest, dx, input_precision=EXACT)
        tl.store(dv + vc + values, (dx * b[None, :]).to(narrow), mask=here[None, :] & inside[:, None])
        dq = (d.to(tl.float32) * into[None, :]).to(narrow)
        d = tl.load(do + vc - 64 * H * V + values, mask=inside[:, None] & (c > 0), other=0.0)
        dk = (dx * -bk[None, :]).to(narrow)
        sa = tl.dot(dq, qa, sa * fade, input_precision=EXACT)
        sa = tl.dot(dk, ka, sa, input_precision=EXACT)
        if KB > 0:
            sb = tl.dot(dq, qb, sb * fade, input_precision=EXACT)
            sb = tl.dot(dk, kb, sb, input_precision=EXACT)

    if INITIAL:
        tl.store(dinitial + memory + ca[None, :] * V + cv[:, None], sa, mask=inside[:, None])
        if KB > 0:
            tl.store(dinitial + memory + cb[None, :] * V + cv[:, None], sb, mask=inside[:, None] & (cb < K)[None, :])


@triton.jit(do_not_specialize=["time", "sequences", "width"])
def gradient_kernel(q, k, g, do, dv, w, states, dstates, factors, carry, first_scratch, second_scratch, bounds,
                    offsets, dq, dk, dg, dbeta, time, sequences, width, scale, H: tl.constexpr, HK: tl.constexpr,
                    K: tl.constexpr, V: tl.constexpr, KA: tl.constexpr, KB: tl.constexpr, BV: tl.constexpr,
                    NORM: tl.constexpr, VARLEN: tl.constexpr):
    """The gradients of q, k, g and beta for one chunk and value head; dq and dk are per value head, [B T, H, K].

    The scratches [chunks, H, 64, 64] take (dP D s) and N, to be read back transposed. `width` is V, not known to the
    compiler: unrolled, the loops over it would not fit in the registers.
    """
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
    narrow = do.dtype.element_ty
    EXACT: tl.constexpr = "ieee" if narrow == tl.float32 else "tf32"
    r = tl.arange(0, 64)
    here = start + r < length
    rows = here[:, None]
    token = (first + start).to(tl.int64)
    index = (chunk * H + head).to(tl.int64)
    q += (token * HK + head // (H // HK)) * K
    k += (token * HK + head // (H // HK)) * K
    do += (token * H + head) * V
    dv += (token * H + head) * V
    w += (token * H + head) * V
    states += index * (V * K)
    dstates += index * (V * K)
    factor = factors + index * 448 + r
    b = tl.load(factor)
    into = tl.load(factor + 128)
    rest = tl.load(factor + 192)
    decay = tl.load(factor + 256)
    lk = tl.load(factor + 320)
    lq = tl.load(factor + 384)
    fade = tl.load(carry + index)
    alive = tl.load(g + token * H + head + r * H, mask=here, other=0.0) > FLOOR
    ca = tl.arange(0, KA)
    cb = KA + tl.arange(0, KB if KB > 0 else 16)
    sides = rows & (cb < K)[None, :]
    at = (r * (HK * K))[:, None]
    values = (r * (H * V))[:, None]

    # Through L and P. A token's write is beta (v - what was there), so that dbeta is dv.w / beta^2.
    dl = tl.zeros((64, 64), tl.float32)
    dp = tl.zeros((64, 64), tl.float32)
    for s in range(0, width, BV):
        cv = s + tl.arange(0, BV)
        both = rows & (cv < V)[None, :]
        y = tl.load(w + values + cv[None, :], mask=both, other=0.0)
        x = tl.load(dv + values + cv[None, :], mask=both, other=0.0)
        dl = tl.dot(x, tl.trans(y), dl, input_precision=EXACT)
        d = tl.load(do + values + cv[None, :], mask=both, other=0.0)
        dp = tl.dot(d, tl.trans(y), dp, input_precision=EXACT)
    ka = tl.load(k + at + ca[None, :], mask=rows, other=0.0)
    gram = tl.dot(ka, tl.trans(ka), input_precision=EXACT)
    if KB > 0:
        kb = tl.load(k + at + cb[None, :], mask=sides, other=0.0)
        gram = tl.dot(kb, tl.trans(kb), gram, input_precision=EXACT)
    strict = r[:, None] > r[None, :]
    same = r[:, None] == r[None, :]
    tile = index * 4096 + r[:, None] * 64 + r[None, :]
    d_ij = tl.exp(tl.where(strict, decay[:, None] - decay[None, :], 0.0)) * lk[None, :]
    db = tl.sum(tl.where(same, dl, 0.0), 1) / tl.where(here, b * b, 1.0)
    dl = tl.where(strict, dl * d_ij * -lk[:, None], 0.0)
    tl.store(second_scratch + tile, dl.to(narrow))
    gram *= dl
    over, under = tl.sum(gram, 1), tl.sum(gram, 0)
    along_k = over + under
    ddecay = over - under
    qa = tl.load(q + at + ca[None, :], mask=rows, other=0.0)
    pairs = tl.dot(qa, tl.trans(ka), input_precision=EXACT)
    if KB > 0:
        qb = tl.load(q + at + cb[None, :], mask=sides, other=0.0)
        pairs = tl.dot(qb, tl.trans(kb), pairs, input_precision=EXACT)
    dp = tl.where(strict | same, dp * d_ij * lq[:, None], 0.0)
    tl.store(first_scratch + tile, dp.to(narrow))
    pairs *= dp
    diagonal = tl.sum(tl.where(same, pairs, 0.0), 1)
    pairs = tl.where(strict, pairs, 0.0)
    over, under = tl.sum(pairs, 1), tl.sum(pairs, 0)
    along_q = over + diagonal
    along_k += under + diagonal
    ddecay += over - under
    tl.debug_barrier()

    # Through the state at the end: w dS'^T, and S itself, which fades.
    dka = tl.zeros((64, KA), tl.float32)
    if KB > 0:
        dkb = tl.zeros((64, KB), tl.float32)
    kept = tl.zeros((BV,), tl.float32)
    for s in range(0, width, BV):
        cv = s + tl.arange(0, BV)
        inside = (cv < V)[:, None]
        x = tl.load(w + values + cv[None, :], mask=rows & (cv < V)[None, :], other=0.0)
        ta = tl.load(dstates + cv[:, None] * K + ca[None, :], mask=inside, other=0.0)
        sa = tl.load(states + cv[:, None] * K + ca[None, :], mask=inside, other=0.0)
        dka = tl.dot(x, ta, dka, input_precision=EXACT)
        kept += tl.sum(sa.to(tl.float32) * ta.to(tl.float32), 1)
        if KB > 0:
            tb = tl.load(dstates + cv[:, None] * K + cb[None, :], mask=inside & (cb < K)[None, :], other=0.0)
            sb = tl.load(states + cv[:, None] * K + cb[None, :], mask=inside & (cb < K)[None, :], other=0.0)
            dkb = tl.dot(x, tb, dkb, input_precision=EXACT)
            kept += tl.sum(sb.to(tl.float32) * tb.to(tl.float32), 1)

    # Through the state at the start: do S^T and dv S^T.
    dqa = tl.zeros((64, KA), tl.float32)
    xa = tl.zeros((64, KA), tl.float32)
    if KB > 0:
        dqb = tl.zeros((64, KB), tl.float32)
        xb = tl.zeros((64, KB), tl.float32)
    for s in range(0, width, BV):
        cv = s + tl.arange(0, BV)
        inside = (cv < V)[:, None]
        both = rows & (cv < V)[None, :]
        d = tl.load(do + values + cv[None, :], mask=both, other=0.0)
        x = tl.load(dv + values + cv[None, :], mask=both, other=0.0)
        sa = tl.load(states + cv[:, None] * K + ca[None, :], mask=inside, other=0.0)
        dqa = tl.dot(d, sa, dqa, input_precision=EXACT)
        xa = tl.dot(x, sa, xa, input_precision=EXACT)
        if KB > 0:
            sb = tl.load(states + cv[:, None] * K + cb[None, :], mask=inside & (cb < K)[None, :], other=0.0)
            dqb = tl.dot(d, sb, dqb, input_precision=EXACT)
            xb = tl.dot(x, sb, xb, input_precision=EXACT)

    # Sums along each token's own q and k: what its exponents get, and what the norms take away.
    reach = -tl.exp(decay) * lk
    ka = tl.load(k + at + ca[None, :], mask=rows, other=0.0)
    qa = tl.load(q + at + ca[None, :], mask=rows, other=0.0)
    # (The product with 1 brings a tile to where the accumulators are.)
    one = tl.where(same, 1.0, 0.0).to(narrow)
    wide = tl.dot(one, ka, input_precision=EXACT)
    written = tl.sum(dka * wide, 1)
    read = tl.sum(xa * wide, 1)
    seen = tl.sum(dqa * tl.dot(one, qa, input_precision=EXACT), 1)
    dka = dka * rest[:, None] + xa * reach[:, None]
    dqa *= into[:, None]
    if KB > 0:
        kb = tl.load(k + at + cb[None, :], mask=sides, other=0.0)
        qb = tl.load(q + at + cb[None, :], mask=sides, other=0.0)
        wide_b = tl.dot(one, kb, input_precision=EXACT)
        written += tl.sum(dkb * wide_b, 1)
        read += tl.sum(xb * wide_b, 1)
        seen += tl.sum(dqb * tl.dot(one, qb, input_precision=EXACT), 1)
        dkb = dkb * rest[:, None] + xb * reach[:, None]
        dqb *= into[:, None]
    written *= rest
    read *= reach
    seen *= into
    along_q += seen
    along_k += read + written
    ddecay += seen + read - written
    last = tl.sum(kept, 0) * fade + tl.sum(written, 0)

    dp_n = tl.load(first_scratch + tile)
    dqa = tl.dot(dp_n, ka, dqa, input_precision=EXACT)
    dka = tl.dot(tl.trans(dp_n), qa, dka, input_precision=EXACT)
    dl_n = tl.load(second_scratch + tile)
    dka = tl.dot(dl_n, ka, dka, input_precision=EXACT)
    dka = tl.dot(tl.trans(dl_n), ka, dka, input_precision=EXACT)
    if KB > 0:
        dqb = tl.dot(dp_n, kb, dqb, input_precision=EXACT)
        dkb = tl.dot(tl.trans(dp_n), qb, dkb, input_precision=EXACT)
        dkb = tl.dot(dl_n, kb, dkb, input_precision=EXACT)
        dkb = tl.dot(tl.trans(dl_n), kb, dkb, input_precision=EXACT)

    ddecay = tl.where(r == 63, ddecay + last, ddecay)
    gate = token * H + head + r * H
    # A running sum from the right, which decays at the floor do not feel.
    tl.store(dg + gate, tl.where(alive, tl.cumsum(ddecay, 0, reverse=True), 0.0), mask=here)
    tl.store(dbeta + gate, db, mask=here)

    # Through the norms: x / |x| takes from a gradient what lies along x.
    if NORM:
        lq /= scale
        dqa -= tl.dot(one, qa, input_precision=EXACT) * (lq * lq * along_q)[:, None]
        dka -= tl.dot(one, ka, input_precision=EXACT) * (lk * lk * along_k)[:, None]
        if KB > 0:
            dqb -= tl.dot(one, qb, input_precision=EXACT) * (lq * lq * along_q)[:, None]
            dkb -= tl.dot(one, kb, input_precision=EXACT) * (lk * lk * along_k)[:, None]
    out = (token * H + head) * K + (r * (H * K))[:, None]
    tl.store(dq + out + ca[None, :], dqa.to(narrow), mask=rows)
    tl.store(dk + out + ca[None, :], dka.to(narrow), mask=rows)
    if KB > 0:
        tl.store(dq + out + cb[None, :], dqb.to(narrow), mask=sides)
        tl.store(dk + out + cb[None, :], dkb.to(narrow), mask=sides)
