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

    at = (r * (HK * K))[:, None]
    tile = r[:, None] * 64 + r[None, :]
    values = (r * (H * V))[None, :] + cv[:, None]
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
        p = tl.load(scores + index * 4096 + tile)
        d = tl.load(do + vc + values, mask=here[None, :] & inside[:, None], other=0.0)
        bk = tl.load(factors + index * 448 + 64 + r)
        into = tl.load(factors + index * 448 + 128 + r)
        rest = tl.load(factors + index * 448 + 192 + r)
        fade = tl.load(carry + index)

        na = sa.to(narrow)
        base = dstates + index * (V * K)
        tl.store(base + cv[:, None] * K + ca[None, :], na, mask=inside[:, None])
        dw = tl.dot(na, tl.trans(ka), input_precision=EXACT)
        if KB > 0:
            kb = tl.load(kc + at + cb[None, :], mask=here[:, None] & (cb < K)[None, :], other=0.0)
            qb = tl.load(qc + at + cb[None, :], mask=here[:, None] & (cb < K)[None, :], other=0.0)
            nb = sb.to(narrow)
            tl.store(base + cv[:, None] * K + cb[None, :], nb, mask=inside[:, None] & (cb < K)[None, :])
            dw = tl.dot(nb, tl.trans(kb), dw, input_precision=EXACT)
        dw = tl.dot(d, p, dw * rest[None, :], input_precision=EXACT)
        dx = tl.dot(dw.to(narrow), t, input_precision=EXACT)
        tl.store(e + vc + values, dx.to(narrow), mask=here[None, :] & inside[:, None])
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
    factor = factors + index * 448 + r
    b = tl.load(factor)

    # Everything that sums over V, in one pass.
    dqa = tl.zeros((64, KA), tl.float32)  # do S^T
    xa = tl.zeros((64, KA), tl.float32)  # e S^T
    ya = tl.zeros((64, KA), tl.float32)  # w dS'^T
    if KB > 0:
        dqb = tl.zeros((64, KB), tl.float32)
        xb = tl.zeros((64, KB), tl.float32)
        yb = tl.zeros((64, KB), tl.float32)
    dp = tl.zeros((64, 64), tl.float32)  # do w^T
    dpt = tl.zeros((64, 64), tl.float32)
    dl = tl.zeros((64, 64), tl.float32)  # e w^T
    dlt = tl.zeros((64, 64), tl.float32)
    ev = tl.zeros((64,), tl.float32)
    kept = tl.zeros((BV,), tl.float32)  # <S, dS'>
    memory = index * (V * K)
    for s in range(0, V, BV):
        cv = s + tl.arange(0, BV)
        inside = (cv < V)[:, None]
        both = rows & (cv < V)[None, :]
        d = tl.load(do + values + cv[None, :], mask=both, other=0.0)
        x = tl.load(e + values + cv[None, :], mask=both, other=0.0)
        y = tl.load(w + values + cv[None, :], mask=both, other=0.0)
        sa = tl.load(states + memory + cv[:, None] * K + ca[None, :], mask=inside, other=0.0)
        ta = tl.load(dstates + memory + cv[:, None] * K + ca[None, :], mask=inside, other=0.0)
        dqa = tl.dot(d, sa, dqa, input_precision=EXACT)
        xa = tl.dot(x, sa, xa, input_precision=EXACT)
        ya = tl.dot(y, ta, ya, input_precision=EXACT)
        kept += tl.sum(sa.to(tl.float32) * ta.to(tl.float32), 1)
        if KB > 0:
            sides = inside & (cb < K)[None, :]
            sb = tl.load(states + memory + cv[:, None] * K + cb[None, :], mask=sides, other=0.0)
            tb = tl.load(dstates + memory + cv[:, None] * K + cb[None, :], mask=sides, other=0.0)
            dqb = tl.dot(d, sb, dqb, input_precision=EXACT)
            xb = tl.dot(x, sb, xb, input_precision=EXACT)
            yb = tl.dot(y, tb, yb, input_precision=EXACT)
            kept += tl.sum(sb.to(tl.float32) * tb.to(tl.float32), 1)
        dp = tl.dot(d, tl.trans(y), dp, input_precision=EXACT)
        dpt = tl.dot(y, tl.trans(d), dpt, input_precision=EXACT)
        dl = tl.dot(x, tl.trans(y), dl, input_precision=EXACT)
        dlt = tl.dot(y, tl.trans(x), dlt, input_precision=EXACT)
        value = tl.load(v + values + cv[None, :], mask=both, other=0.0)
        ev += tl.sum(x.to(tl.float32) * value.to(tl.float32), 1)
        tl.store(dv + values + cv[None, :], (x.to(tl.float32) * b[:, None]).to(narrow), mask=both)

    ka = tl.load(k + at + ca[None, :], mask=rows, other=0.0)
    qa = tl.load(q + at + ca[None, :], mask=rows, other=0.0)
    if KB > 0:
        kb = tl.load(k + at + cb[None, :], mask=rows & (cb < K)[None, :], other=0.0)
        qb = tl.load(q + at + cb[None, :], mask=rows & (cb < K)[None, :], other=0.0)
    lk = tl.load(factor + 320)
    decay = tl.load(factor + 256)
    bk = tl.load(factor + 64)
    into = tl.load(factor + 128)
    rest = tl.load(factor + 192)
    lq = tl.load(factor + 384)
    along_q = tl.sum(dqa * qa.to(tl.float32), 1)
    read = tl.sum(xa * ka.to(tl.float32), 1)
    written = tl.sum(ya * ka.to(tl.float32), 1)
    dka = ya * rest[:, None] - xa * bk[:, None]
    dqa *= into[:, None]
    if KB > 0:
        along_q += tl.sum(dqb * qb.to(tl.float32), 1)
        read += tl.sum(xb * kb.to(tl.float32), 1)
        written += tl.sum(yb * kb.to(tl.float32), 1)
        dkb = yb * rest[:, None] - xb * bk[:, None]
        dqb *= into[:, None]
    along_q *= into
    written *= rest
    db = ev - tl.exp(decay) * lk * read
    read *= -bk
    along_k = read + written
    ddecay = along_q + read - written
    last = tl.sum(kept, 0) * tl.load(carry + index) + tl.sum(written, 0)

    # Through L.
    strict = r[:, None] > r[None, :]
    later = r[:, None] < r[None, :]  # strict, transposed
    gram = tl.dot(ka, tl.trans(ka), input_precision=EXACT)
    if KB > 0:
        gram = tl.dot(kb, tl.trans(kb), gram, input_precision=EXACT)
    dl *= tl.where(strict, tl.exp(tl.where(strict, decay[:, None] - decay[None, :], 0.0)), 0.0) \
        * lk[:, None] * -lk[None, :]
    db += tl.sum(dl * gram, 1)
    dl *= b[:, None]
    pairs = dl * gram
    over, under = tl.sum(pairs, 1), tl.sum(pairs, 0)
    along_k += over + under
    ddecay += over - under
    dlt *= tl.where(later, tl.exp(tl.where(later, decay[None, :] - decay[:, None], 0.0)), 0.0) \
        * lk[:, None] * (-b * lk)[None, :]
    sums = (dl + dlt).to(narrow)
    dka = tl.dot(sums, ka, dka, input_precision=EXACT)
    if KB > 0:
        dkb = tl.dot(sums, kb, dkb, input_precision=EXACT)

    # Through P.
    same = r[:, None] == r[None, :]
    pairs = tl.dot(qa, tl.trans(ka), input_precision=EXACT)
    if KB > 0:
        pairs = tl.dot(qb, tl.trans(kb), pairs, input_precision=EXACT)
    dp *= tl.where(strict | same, tl.exp(tl.where(strict, decay[:, None] - decay[None, :], 0.0)), 0.0) \
        * lq[:, None] * lk[None, :]
    dpt *= tl.where(later | same, tl.exp(tl.where(later, decay[None, :] - decay[:, None], 0.0)), 0.0) \
        * lk[:, None] * lq[None, :]
    pairs *= dp
    diagonal = tl.sum(tl.where(same, pairs, 0.0), 1)
    pairs = tl.where(strict, pairs, 0.0)
    over, under = tl.sum(pairs, 1), tl.sum(pairs, 0)
    along_q += over + diagonal
    along_k += under + diagonal
    ddecay += over - under
    rows_p, columns_p = dp.to(narrow), dpt.to(narrow)
    dqa = tl.dot(rows_p, ka, dqa, input_precision=EXACT)
    dka = tl.dot(columns_p, qa, dka, input_precision=EXACT)
    if KB > 0:
        dqb = tl.dot(rows_p, kb, dqb, input_precision=EXACT)
        dkb = tl.dot(columns_p, qb, dkb, input_precision=EXACT)

    ddecay = tl.where(r == 63, ddecay + last, ddecay)
    gate = token * H + head
    # A running sum from the right, which decays at the floor, and those of no token, do not feel.
    alive = tl.load(g + gate, mask=here, other=0.0) > FLOOR
    tl.store(dg + gate, tl.where(alive, tl.cumsum(ddecay, 0, reverse=True), 0.0), mask=here)
    tl.store(dbeta + gate, db, mask=here)

    # Through the norms: x / |x| takes from a gradient what lies along x.
    if NORM:
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
