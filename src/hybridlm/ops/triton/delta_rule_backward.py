"""Kernels of the chunked gated delta rule, backward. The letters are those of `delta_rule_forward`.

Nothing of the forward pass is kept but its inputs: `prepare_kernel` and `scan_kernel` run again and leave each
chunk's starting state S and its writes w. Then, with dS' the gradient of the state at a chunk's end:

    reverse_scan_kernel    dw = P^T do + exp(G_C - G) k dS',  e = T^T dw
                           dS = exp(G_C) dS' + s exp(G) q^T do - (beta exp(G) k)^T e        chunk after chunk, backwards
    gradient_kernel        dv = beta e, and all else from S, dS', w, e and do, all chunks at once:
                           dP = do w^T                 dL = -e w^T
                           dq = s exp(G) do S^T + (dP D s) k
                           dk = -beta exp(G) e S^T + exp(G_C - G) w dS'^T + (dP D s)^T q + (N + N^T) k, N = dL beta D
                           dG from each place where it stands in an exponent; dg is its running sum from the right

Each sum has one program and one order, so results are the same from run to run. Products with the transposed of a
64 x 64 result (dP^T, dL^T) are computed again in transposed form: Triton 3.6 transposes an accumulator wrongly on
Hopper, and the tensor cores have the time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridlm.ops.triton.delta_rule_forward import find


@triton.jit
def reverse_scan_kernel(q, k, do, inverse, scores, factors, carry, bounds, offsets, dfinal, e, dstates, dinitial,
                        time, sequences, H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                        KA: tl.constexpr, KB: tl.constexpr, BV: tl.constexpr, INITIAL: tl.constexpr,
                        VARLEN: tl.constexpr):
    """e, and dS' at the end of each chunk [chunks, H, V, K] in e's type; INITIAL: also the initial state's gradient."""
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

    for i in range(chunks):
        c = chunks - 1 - i
        here = c * 64 + r < length
        token = (first + c * 64 + r).to(tl.int64)
        at = ((token * HK + head // (H // HK)) * K)[:, None]
        index = ((chunk + c) * H + head).to(tl.int64)
        tile = index * 4096 + r[:, None] * 64 + r[None, :]
        values = (token * H + head) * V
        ka = tl.load(k + at + ca[None, :], mask=here[:, None], other=0.0)
        qa = tl.load(q + at + ca[None, :], mask=here[:, None], other=0.0)
        t = tl.load(inverse + tile)
        p = tl.load(scores + tile)
        d = tl.load(do + values[None, :] + cv[:, None], mask=here[None, :] & inside[:, None], other=0.0)
        bk = tl.load(factors + index * 448 + 64 + r)
        into = tl.load(factors + index * 448 + 128 + r)
        rest = tl.load(factors + index * 448 + 192 + r)
        fade = tl.load(carry + index)

        na = sa.to(narrow)
        base = dstates + index * (V * K)
        tl.store(base + cv[:, None] * K + ca[None, :], na, mask=inside[:, None])
        dw = tl.dot(na, tl.trans(ka), input_precision=EXACT)
        if KB > 0:
            kb = tl.load(k + at + cb[None, :], mask=here[:, None] & (cb < K)[None, :], other=0.0)
            qb = tl.load(q + at + cb[None, :], mask=here[:, None] & (cb < K)[None, :], other=0.0)
            nb = sb.to(narrow)
            tl.store(base + cv[:, None] * K + cb[None, :], nb, mask=inside[:, None] & (cb < K)[None, :])
            dw = tl.dot(nb, tl.trans(kb), dw, input_precision=EXACT)
        dw = tl.dot(d, p, dw * rest[None, :], input_precision=EXACT)
        dx = tl.dot(dw.to(narrow), t, input_precision=EXACT)
        tl.store(e + values[None, :] + cv[:, None], dx.to(narrow), mask=here[None, :] & inside[:, None])
        dq = (d.to(tl.float32) * into[None, :]).to(narrow)
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


@triton.jit
def gradient_kernel(q, k, v, g, do, e, w, states, dstates, factors, carry, bounds, offsets, dq, dk, dv, dg, dbeta,
                    time, sequences, scale, H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                    KA: tl.constexpr, KB: tl.constexpr, BV: tl.constexpr, NORM: tl.constexpr, VARLEN: tl.constexpr,
                    FLOOR: tl.constexpr):
    """All gradients of one chunk and value head; dq and dk are per value head, [B T, H, K]."""
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
    token = (first + start + r).to(tl.int64)
    at = ((token * HK + head // (H // HK)) * K)[:, None]
    values = ((token * H + head) * V)[:, None]
    index = (chunk * H + head).to(tl.int64)
    ca = tl.arange(0, KA)
    cb = KA + tl.arange(0, KB if KB > 0 else 16)
    ka = tl.load(k + at + ca[None, :], mask=rows, other=0.0)
    qa = tl.load(q + at + ca[None, :], mask=rows, other=0.0)
    if KB > 0:
        kb = tl.load(k + at + cb[None, :], mask=rows & (cb < K)[None, :], other=0.0)
        qb = tl.load(q + at + cb[None, :], mask=rows & (cb < K)[None, :], other=0.0)
    factor = factors + index * 448 + r
    b = tl.load(factor)

    # Through the state at the start: do S^T and e S^T, and what e meets in v.
    dqa = tl.zeros((64, KA), tl.float32)
    dka = tl.zeros((64, KA), tl.float32)
    if KB > 0:
        dqb = tl.zeros((64, KB), tl.float32)
        dkb = tl.zeros((64, KB), tl.float32)
    ev = tl.zeros((64,), tl.float32)
    memory = index * (V * K)
    for s in range(0, V, BV):
        cv = s + tl.arange(0, BV)
        both = rows & (cv < V)[None, :]
        d = tl.load(do + values + cv[None, :], mask=both, other=0.0)
        x = tl.load(e + values + cv[None, :], mask=both, other=0.0)
        sa = tl.load(states + memory + cv[:, None] * K + ca[None, :], mask=(cv < V)[:, None], other=0.0)
        dqa = tl.dot(d, sa, dqa, input_precision=EXACT)
        dka = tl.dot(x, sa, dka, input_precision=EXACT)
        if KB > 0:
            sb = tl.load(states + memory + cv[:, None] * K + cb[None, :], mask=(cv < V)[:, None] & (cb < K)[None, :],
                         other=0.0)
            dqb = tl.dot(d, sb, dqb, input_precision=EXACT)
            dkb = tl.dot(x, sb, dkb, input_precision=EXACT)
        y = tl.load(v + values + cv[None, :], mask=both, other=0.0)
        ev += tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)
        tl.store(dv + values + cv[None, :], (x.to(tl.float32) * b[:, None]).to(narrow), mask=both)

    lk = tl.load(factor + 320)
    decay = tl.load(factor + 256)
    bk = tl.load(factor + 64)
    into = tl.load(factor + 128)
    rest = tl.load(factor + 192)
    dq_q = tl.sum(dqa * qa.to(tl.float32), 1)
    dk_k = tl.sum(dka * ka.to(tl.float32), 1)
    if KB > 0:
        dq_q += tl.sum(dqb * qb.to(tl.float32), 1)
        dk_k += tl.sum(dkb * kb.to(tl.float32), 1)
        dqb *= into[:, None]
        dkb *= -bk[:, None]
    dqa *= into[:, None]
    dka *= -bk[:, None]
    db = ev - tl.exp(decay) * lk * dk_k
    dk_k *= -bk
    ddecay = dq_q * into + dk_k

    # Through the state at the end: w dS'^T, and the decay of S itself.
    kept = 0.0
    for s in range(0, V, BV):
        cv = s + tl.arange(0, BV)
        x = tl.load(w + values + cv[None, :], mask=rows & (cv < V)[None, :], other=0.0)
        x = (x.to(tl.float32) * rest[:, None]).to(narrow)
        sa = tl.load(dstates + memory + cv[:, None] * K + ca[None, :], mask=(cv < V)[:, None], other=0.0)
        ta = tl.load(states + memory + cv[:, None] * K + ca[None, :], mask=(cv < V)[:, None], other=0.0)
        dka = tl.dot(x, sa, dka, input_precision=EXACT)
        kept += tl.sum(tl.sum(sa.to(tl.float32) * ta.to(tl.float32), 1), 0)
        if KB > 0:
            sides = (cv < V)[:, None] & (cb < K)[None, :]
            sb = tl.load(dstates + memory + cv[:, None] * K + cb[None, :], mask=sides, other=0.0)
            tb = tl.load(states + memory + cv[:, None] * K + cb[None, :], mask=sides, other=0.0)
            dkb = tl.dot(x, sb, dkb, input_precision=EXACT)
            kept += tl.sum(tl.sum(sb.to(tl.float32) * tb.to(tl.float32), 1), 0)
    written = tl.sum(dka * ka.to(tl.float32), 1)
    if KB > 0:
        written += tl.sum(dkb * kb.to(tl.float32), 1)
    written -= dk_k
    ddecay -= written
    last = kept * tl.load(carry + index) + tl.sum(written, 0)

    # Through P, and through L.
    lq = tl.load(factor + 384)
    seen = r[:, None] >= r[None, :]
    strict = r[:, None] > r[None, :]
    tees = r[:, None] < r[None, :]  # strict, transposed
    d_ij = tl.exp(tl.where(seen, decay[:, None] - decay[None, :], 0.0))
    d_ji = tl.exp(tl.where(seen, 0.0, decay[None, :] - decay[:, None]))
    dp = tl.zeros((64, 64), tl.float32)
    dpt = tl.zeros((64, 64), tl.float32)
    for s in range(0, V, BV):
        cv = s + tl.arange(0, BV)
        both = rows & (cv < V)[None, :]
        d = tl.load(do + values + cv[None, :], mask=both, other=0.0)
        x = tl.load(w + values + cv[None, :], mask=both, other=0.0)
        dp = tl.dot(d, tl.trans(x), dp, input_precision=EXACT)
        dpt = tl.dot(x, tl.trans(d), dpt, input_precision=EXACT)
    dp = tl.where(seen, dp * d_ij * lq[:, None] * lk[None, :], 0.0)
    dpt = tl.where(tees | (r[:, None] == r[None, :]), dpt * d_ji * lk[:, None] * lq[None, :], 0.0).to(narrow)
    pairs = tl.dot(qa, tl.trans(ka), input_precision=EXACT)
    if KB > 0:
        pairs = tl.dot(qb, tl.trans(kb), pairs, input_precision=EXACT)
    pairs = tl.where(strict, pairs * dp, 0.0)
    ndp = dp.to(narrow)
    dqa = tl.dot(ndp, ka, dqa, input_precision=EXACT)
    dka = tl.dot(dpt, qa, dka, input_precision=EXACT)
    if KB > 0:
        dqb = tl.dot(ndp, kb, dqb, input_precision=EXACT)
        dkb = tl.dot(dpt, qb, dkb, input_precision=EXACT)

    m = tl.zeros((64, 64), tl.float32)
    mt = tl.zeros((64, 64), tl.float32)
    for s in range(0, V, BV):
        cv = s + tl.arange(0, BV)
        both = rows & (cv < V)[None, :]
        d = tl.load(e + values + cv[None, :], mask=both, other=0.0)
        x = tl.load(w + values + cv[None, :], mask=both, other=0.0)
        m = tl.dot(d, tl.trans(x), m, input_precision=EXACT)
        mt = tl.dot(x, tl.trans(d), mt, input_precision=EXACT)
    gram = tl.dot(ka, tl.trans(ka), input_precision=EXACT)
    if KB > 0:
        gram = tl.dot(kb, tl.trans(kb), gram, input_precision=EXACT)
    m = tl.where(strict, m * d_ij * -lk[:, None] * lk[None, :], 0.0)
    db += tl.sum(m * gram, 1)
    m *= b[:, None]
    pairs += m * gram
    m += tl.where(tees, mt * d_ji * -(b * lk)[None, :] * lk[:, None], 0.0)
    nm = m.to(narrow)
    dka = tl.dot(nm, ka, dka, input_precision=EXACT)
    if KB > 0:
        dkb = tl.dot(nm, kb, dkb, input_precision=EXACT)

    ddecay += tl.sum(pairs, 1) - tl.sum(pairs, 0)
    ddecay = tl.where(r == 63, ddecay + last, ddecay)
    gate = token * H + head
    # The running sum from the right, that a clamped or missing decay does not feel.
    right = tl.cumsum(ddecay, 0, reverse=True)
    alive = tl.load(g + gate, mask=here, other=0.0) > FLOOR
    tl.store(dg + gate, tl.where(alive, right, 0.0), mask=here)
    tl.store(dbeta + gate, db, mask=here)

    # Through the norms.
    if NORM:
        along_q = tl.sum(dqa * qa.to(tl.float32), 1)
        along_k = tl.sum(dka * ka.to(tl.float32), 1)
        if KB > 0:
            along_q += tl.sum(dqb * qb.to(tl.float32), 1)
            along_k += tl.sum(dkb * kb.to(tl.float32), 1)
        lq /= scale
        dqa -= qa.to(tl.float32) * (lq * lq * along_q)[:, None]
        dka -= ka.to(tl.float32) * (lk * lk * along_k)[:, None]
        if KB > 0:
            dqb -= qb.to(tl.float32) * (lq * lq * along_q)[:, None]
            dkb -= kb.to(tl.float32) * (lk * lk * along_k)[:, None]
    out = ((token * H + head) * K)[:, None]
    tl.store(dq + out + ca[None, :], dqa.to(narrow), mask=rows)
    tl.store(dk + out + ca[None, :], dka.to(narrow), mask=rows)
    if KB > 0:
        tl.store(dq + out + cb[None, :], dqb.to(narrow), mask=rows & (cb < K)[None, :])
        tl.store(dk + out + cb[None, :], dkb.to(narrow), mask=rows & (cb < K)[None, :])
