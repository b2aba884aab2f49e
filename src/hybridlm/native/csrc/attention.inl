// Softmax attention over keys and values that lie in blocks of [kv head, token, d] in float32, float16 or Q8_0.
//
// A task is a kv head, a tile of queries (with all query heads that share the kv head) and a span of keys. It walks
// its keys in tiles of KEYS, keeping a running maximum and sum. Up to four rows of queries read keys and values as they
// are stored, straight into registers: decoding runs at the speed of memory. More rows convert a tile once and multiply
// matrices, with the queries transposed once so that scores lie [key, row] and softmax runs down the columns. Where a
// span is not all keys, the task leaves maximum, sum and weighted values for `attention_merge`.

static constexpr int KEYS = 64, FEW = 4;

struct AttentionRoom {
    int64_t dp, rows;  // padded
    bool few;
    float *q, *o, *p, *keys, *values, *top, *sum, *fade;
    size_t floats;
};

static AttentionRoom attention_room(const AttentionCall& c, int64_t tokens, float* base) {
    AttentionRoom r;
    const int64_t rows = tokens * (c.H / c.Hkv);
    r.few = rows <= FEW;
    r.dp = round_up(c.d, L);
    r.rows = rows <= 2 ? rows : r.few ? int64_t(FEW) : round_up(rows, L);
    size_t at = 0;
    auto take = [&](int64_t n) {
        float* p = base + at;
        at += size_t(round_up(n, 16));
        return p;
    };
    r.q = take(r.rows * r.dp);
    r.o = take(r.rows * r.dp);
    r.p = take(r.rows * KEYS);
    r.keys = take(r.few ? 0 : KEYS * r.dp);
    r.values = take(r.few ? 0 : KEYS * r.dp);
    r.top = take(r.rows);
    r.sum = take(r.rows);
    r.fade = take(r.rows);
    r.floats = at;
    return r;
}

static size_t attention_scratch(const AttentionCall& c) {  // a tile's, and the last one's, which may be of FEW rows
    const int64_t tokens = least(c.tile, c.T), rest = c.T % tokens ? c.T % tokens : tokens;
    const size_t a = attention_room(c, tokens, nullptr).floats, b = attention_room(c, rest, nullptr).floats;
    return (a > b ? a : b) * 4;
}

HLM_INLINE float exp1(float x) {
    float e[L];
    store(e, exp(set1(x)));
    return e[0];
}

// Scores [n] of a row become weights: p <- e^(p - top), with top and sum and what was summed so far brought along.
static void soften_row(float* p, int64_t n, float* o, int64_t dp, float& top, float& sum) {
    const int64_t padded = round_up(n, L);
    for (int64_t j = n; j < padded; j++) p[j] = -INFINITY;
    V m = load(p);
    for (int64_t j = L; j < padded; j += L) m = max(m, load(p + j));
    const float high = hmax(m), now = high > top ? high : top;
    if (now == -INFINITY) {  // nothing to see here, nor before
        for (int64_t j = 0; j < padded; j++) p[j] = 0;
        return;
    }
    V total = zero();
    for (int64_t j = 0; j < padded; j += L) {
        const V e = exp(sub(load(p + j), set1(now)));
        store(p + j, e);
        total = add(total, e);
    }
    if (now != top) {
        const float fade = exp1(top - now);
        sum *= fade;
        for (int64_t i = 0; i < dp; i += L) store(o + i, mul(load(o + i), set1(fade)));
        top = now;
    }
    sum += hsum(total);
}

// The same for scores [n, rows], a row of queries in each column; `fade` says by how much o is to shrink. A column that
// has seen nothing yet keeps a top so low that its weights, all 0, are not differences of infinities.
static void soften_columns(float* p, int64_t n, int64_t rows, float* top, float* sum, float* fade) {
    for (int64_t i = 0; i < rows; i += L) {
        const V before = load(top + i);
        V now = before;
        for (int64_t j = 0; j < n; j++) now = max(now, load(p + j * rows + i));
        V total = zero();
        for (int64_t j = 0; j < n; j++) {
            const V e = exp(sub(load(p + j * rows + i), now));
            store(p + j * rows + i, e);
            total = add(total, e);
        }
        const V f = exp(sub(before, now));
        store(fade + i, f);
        store(sum + i, fma(load(sum + i), f, total));
        store(top + i, now);
    }
}

template <int TYPE>
static void attend(const AttentionCall& c, int64_t kh, int64_t tile, int64_t span, void* scratch) {
    const int64_t G = c.H / c.Hkv, t0 = tile * c.tile, t1 = least(t0 + c.tile, c.T), rows = (t1 - t0) * G;
    const AttentionRoom r = attention_room(c, t1 - t0, static_cast<float*>(scratch));
    const int64_t dp = r.dp;
    const float scale = float(1.0 / sqrt(double(c.d)));
    memset(r.q, 0, size_t(r.rows * dp) * 4);
    memset(r.o, 0, size_t(r.rows * dp) * 4);
    for (int64_t i = 0; i < r.rows; i++) {
        r.top[i] = r.few ? -INFINITY : -3.0e38f;
        r.sum[i] = 0;
        if (i >= rows) continue;
        const float* from = c.q + ((t0 + i / G) * c.H + kh * G + i % G) * c.d;
        for (int64_t e = 0; e < c.d; e++) r.q[r.few ? i * dp + e : e * r.rows + i] = from[e] * scale;
    }
    const int64_t row_bytes = kv_row_bytes(TYPE, c.d);
    // Keys that any row of the tile sees, within the span.
    int64_t lo = c.window ? most(int64_t(0), c.start + t0 - c.window + 1) : 0, hi = c.start + t1;
    if (c.spans > 1) {
        lo = most(lo, c.first_key + span * c.span);
        hi = least(hi, c.first_key + (span + 1) * c.span);
    }
    for (int64_t at = lo; at < hi;) {
        const int64_t inside = at % c.block, n = least(int64_t(KEYS), least(c.block - inside, hi - at));
        const uint64_t* addresses = c.table + at / c.block * 2;
        const int64_t offset = (kh * c.block + inside) * row_bytes;
        const uint8_t* k = reinterpret_cast<const uint8_t*>(uintptr_t(addresses[0])) + offset;
        const uint8_t* v = reinterpret_cast<const uint8_t*>(uintptr_t(addresses[1])) + offset;
        KvAhead ahead;
        if (r.few && at + n < hi) {
            const int64_t next = (at + n) % c.block, rest = least(int64_t(KEYS), least(c.block - next, hi - at - n));
            const uint64_t* where = c.table + (at + n) / c.block * 2;
            ahead.bytes = rest * row_bytes / 2;
            for (int s = 0; s < 4; s++)
                ahead.at[s] = reinterpret_cast<const uint8_t*>(uintptr_t(where[s / 2])) +
                              (kh * c.block + next) * row_bytes + s % 2 * ahead.bytes;
        }
        // p[i * row + j * key]: the score of row i and key j.
        const int64_t row = r.few ? int64_t(KEYS) : 1, key = r.few ? 1 : r.rows;
        if (r.rows == 1) {
            kv_dots<TYPE, 1>(r.q, dp, k, row_bytes, n, c.d, r.p, KEYS, &ahead);
        } else if (r.rows == 2 && r.few) {
            kv_dots<TYPE, 2>(r.q, dp, k, row_bytes, n, c.d, r.p, KEYS, &ahead);
        } else if (r.few) {
            kv_dots<TYPE, 4>(r.q, dp, k, row_bytes, n, c.d, r.p, KEYS, &ahead);
        } else {
            kv_convert<TYPE>(k, row_bytes, n, c.d, r.keys, dp);
            gemm<FRESH>(r.keys, dp, 1, r.q, r.rows, n, r.rows, c.d, r.p, r.rows);
        }
        for (int64_t i = 0; i < rows; i++) {
            const int64_t self = c.start + t0 + i / G;
            for (int64_t j = most(int64_t(0), self + 1 - at); j < n; j++) r.p[i * row + j * key] = -INFINITY;
            if (c.window)
                for (int64_t j = 0; j < least(n, self - c.window + 1 - at); j++) r.p[i * row + j * key] = -INFINITY;
        }
        if (r.few) {
            for (int64_t i = 0; i < rows; i++)
                soften_row(r.p + i * KEYS, n, r.o + i * dp, dp, r.top[i], r.sum[i]);
            if (r.rows == 1) kv_weigh<TYPE, 1>(r.p, KEYS, v, row_bytes, n, c.d, r.o, dp, &ahead);
            else if (r.rows == 2) kv_weigh<TYPE, 2>(r.p, KEYS, v, row_bytes, n, c.d, r.o, dp, &ahead);
            else kv_weigh<TYPE, 4>(r.p, KEYS, v, row_bytes, n, c.d, r.o, dp, &ahead);
        } else {
            soften_columns(r.p, n, r.rows, r.top, r.sum, r.fade);
            for (int64_t i = 0; i < rows; i++) {
                if (r.fade[i] == 1) continue;
                for (int64_t e = 0; e < dp; e += L) store(r.o + i * dp + e, mul(load(r.o + i * dp + e), set1(r.fade[i])));
            }
            kv_convert<TYPE>(v, row_bytes, n, c.d, r.values, dp);
            gemm<ACCUMULATE>(r.p, 1, r.rows, r.values, dp, rows, dp, n, r.o, dp);
        }
        at += n;
    }
    for (int64_t i = 0; i < rows; i++) {
        const int64_t at = (t0 + i / G) * c.H + kh * G + i % G;
        const float* o = r.o + i * dp;
        if (c.spans > 1) {
            float* to = c.partial + (at * c.spans + span) * (c.d + 2);
            to[0] = r.sum[i] > 0 || r.sum[i] != r.sum[i] ? r.top[i] : -INFINITY;
            to[1] = r.sum[i];
            memcpy(to + 2, o, size_t(c.d) * 4);
        } else {
            float* to = c.out + at * c.d;
            for (int64_t e = 0; e < c.d; e++) to[e] = o[e] / r.sum[i];
        }
    }
}

static void attention(const AttentionCall& c, int64_t kh, int64_t tile, int64_t span, void* scratch) {
    if (c.kv_type == KV_F32) attend<KV_F32>(c, kh, tile, span, scratch);
    else if (c.kv_type == KV_F16) attend<KV_F16>(c, kh, tile, span, scratch);
    else attend<KV_Q8_0>(c, kh, tile, span, scratch);
}

static void attention_merge(const AttentionCall& c, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        const float* parts = c.partial + row * c.spans * (c.d + 2);
        float top = -INFINITY;
        for (int64_t s = 0; s < c.spans; s++) top = parts[s * (c.d + 2)] > top ? parts[s * (c.d + 2)] : top;
        float* out = c.out + row * c.d;
        memset(out, 0, size_t(c.d) * 4);
        float sum = 0;
        for (int64_t s = 0; s < c.spans; s++) {
            const float* part = parts + s * (c.d + 2);
            if (part[0] == -INFINITY) continue;
            const float w = exp1(part[0] - top);
            sum += w * part[1];
            for (int64_t e = 0; e < c.d; e++) out[e] += w * part[2 + e];
        }
        for (int64_t e = 0; e < c.d; e++) out[e] /= sum;
    }
}

// Rows of x into the blocks. Half precision saturates; a Q8_0 block is rounded against the scale as stored.
static void store_kv(const StoreCall& c, int64_t first, int64_t last) {
    const int64_t row_bytes = kv_row_bytes(c.kv_type, c.d);
    const V top = set1(65504.0f), bottom = set1(-65504.0f);
    for (int64_t t = first; t < last; t++) {
        const int64_t at = c.start + t, inside = at % c.block;
        uint8_t* block = reinterpret_cast<uint8_t*>(uintptr_t(c.table[at / c.block * 2 + c.which]));
        for (int64_t h = 0; h < c.Hkv; h++) {
            const float* x = c.x + (t * c.Hkv + h) * c.d;
            uint8_t* to = block + (h * c.block + inside) * row_bytes;
            if (c.kv_type == KV_F32) {
                memcpy(to, x, size_t(c.d) * 4);
            } else if (c.kv_type == KV_F16) {
                int64_t i = 0;
                for (; i + L <= c.d; i += L)
                    store_half(reinterpret_cast<uint16_t*>(to) + i, min(top, max(bottom, load(x + i))));
                if (i < c.d) {
                    uint16_t t16[L];
                    store_half(t16, min(top, max(bottom, load_part(x + i, int(c.d - i)))));
                    memcpy(to + 2 * i, t16, size_t(c.d - i) * 2);
                }
            } else {
                for (int64_t i = 0; i < c.d; i += 32, to += 34) {
                    float block32[32] = {0};
                    memcpy(block32, x + i, size_t(least(int64_t(32), c.d - i)) * 4);
                    V m = zero();
                    for (int e = 0; e < 32; e += L) {
                        const V y = load(block32 + e);
                        m = max(m, max(y, sub(zero(), y)));
                    }
                    float wide = hmax(m) / 127.0f;
                    if (wide > 65504.0f) wide = 65504.0f;
                    const uint16_t half = float_to_half(wide);
                    const float d = half_to_float(half);
                    const V inverse = set1(d > 0 ? 1.0f / d : 0.0f);
                    memcpy(to, &half, 2);
                    for (int e = 0; e < 32; e += L) {
                        const V y = round(mul(load(block32 + e), inverse));
                        store_int8(reinterpret_cast<int8_t*>(to + 2 + e), min(set1(127.0f), max(set1(-127.0f), y)));
                    }
                }
            }
        }
    }
}
