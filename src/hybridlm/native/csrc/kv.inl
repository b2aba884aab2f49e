// Rows of keys and values as they are stored, float32, float16 or Q8_0, and sums over them straight from there.

static constexpr int KV_F32 = 0, KV_F16 = 1, KV_Q8_0 = 8;

static int64_t kv_row_bytes(int type, int64_t d) {
    return type == KV_F32 ? 4 * d : type == KV_F16 ? 2 * d : (d + 31) / 32 * 34;
}

// Fetches the keys and values that come next, in four streams of `bytes` each while a tile of keys is worked on: a core
// gets more out of memory by several streams than by one.
struct KvAhead {
    const uint8_t* at[4];
    int64_t bytes = 0, done = 0;

    // Up to `share` of `whole`.
    void step(int64_t share, int64_t whole) {
        for (const int64_t until = bytes * share / whole; done < until; done += 64)
            for (int s = 0; s < 4; s++) prefetch2(at[s] + done);
    }
};

// L elements of a stored row from element i on, without the scale that a block of Q8_0 carries; `n` < L of them are
// there at the row's end, where Q8_0 is padded with zeros.
template <int TYPE>
HLM_INLINE V kv_load(const uint8_t* row, int64_t i) {
    if (TYPE == KV_F32) return load(reinterpret_cast<const float*>(row) + i);
    if (TYPE == KV_F16) return load_half(reinterpret_cast<const uint16_t*>(row) + i);
    return load_int8(reinterpret_cast<const int8_t*>(row + i / 32 * 34 + 2 + i % 32));
}

template <int TYPE>
HLM_INLINE V kv_load_part(const uint8_t* row, int64_t i, int n) {
    if (TYPE == KV_F32) return load_part(reinterpret_cast<const float*>(row) + i, n);
    if (TYPE == KV_F16) {
        uint16_t t[L] = {0};
        memcpy(t, row + 2 * i, size_t(n) * 2);
        return load_half(t);
    }
    return kv_load<TYPE>(row, i);
}

template <int TYPE>
HLM_INLINE V kv_scale(const uint8_t* row, int64_t i) {
    uint16_t half;
    memcpy(&half, row + i / 32 * 34, 2);
    return set1_half(half);
}

template <int TYPE>
static void kv_convert(const uint8_t* rows, int64_t row_bytes, int64_t n, int64_t d, float* to, int64_t stride) {
    for (int64_t j = 0; j < n; j++, rows += row_bytes, to += stride) {
        for (int64_t i = 0; i < d; i += L) {
            V y = i + L <= d ? kv_load<TYPE>(rows, i) : kv_load_part<TYPE>(rows, i, int(d - i));
            if (TYPE == KV_Q8_0) y = mul(y, kv_scale<TYPE>(rows, i));
            store(to + i, y);
        }
    }
}

// acc[r][g] = products of ROWS queries and COUNT keys, still to be summed over the lanes. Keys are read one after the
// other, a few at a time: many at once outrun the hardware's prefetching.
template <int TYPE, int ROWS, int COUNT>
HLM_INLINE void kv_products(const float* q, int64_t q_stride, const uint8_t* const* key, int64_t d,
                            V (&acc)[ROWS][COUNT]) {
    HLM_UNROLL
    for (int r = 0; r < ROWS; r++) {
        HLM_UNROLL
        for (int g = 0; g < COUNT; g++) acc[r][g] = zero();
    }
    int64_t i = 0;
    if (TYPE == KV_Q8_0) {  // whole blocks, padding included; queries are padded to vectors, not to blocks
        for (; i + 32 <= d; i += 32) {
            V scale[COUNT];
            HLM_UNROLL
            for (int g = 0; g < COUNT; g++) scale[g] = kv_scale<TYPE>(key[g], i);
            V part[ROWS][COUNT];
            HLM_UNROLL
            for (int e = 0; e < 32; e += L) {
                HLM_UNROLL
                for (int g = 0; g < COUNT; g++) {
                    const V y = kv_load<TYPE>(key[g], i + e);
                    HLM_UNROLL
                    for (int r = 0; r < ROWS; r++) {
                        const V x = load(q + r * q_stride + i + e);
                        part[r][g] = e == 0 ? mul(x, y) : fma(x, y, part[r][g]);
                    }
                }
            }
            HLM_UNROLL
            for (int g = 0; g < COUNT; g++) {
                HLM_UNROLL
                for (int r = 0; r < ROWS; r++) acc[r][g] = fma(scale[g], part[r][g], acc[r][g]);
            }
        }
    }
    for (; i < d; i += L) {
        HLM_UNROLL
        for (int g = 0; g < COUNT; g++) {
            V y = i + L <= d ? kv_load<TYPE>(key[g], i) : kv_load_part<TYPE>(key[g], i, int(d - i));
            if (TYPE == KV_Q8_0) y = mul(y, kv_scale<TYPE>(key[g], i));
            HLM_UNROLL
            for (int r = 0; r < ROWS; r++) acc[r][g] = fma(load(q + r * q_stride + i), y, acc[r][g]);
        }
    }
}

// scores[r][j] = q_r . k_j for ROWS rows and n keys: L sums at a time, one in each lane.
template <int TYPE, int ROWS>
static void kv_dots(const float* q, int64_t q_stride, const uint8_t* k, int64_t row_bytes, int64_t n, int64_t d,
                    float* scores, int64_t score_stride, KvAhead* ahead = nullptr) {
    constexpr int GROUP = L / ROWS > 0 ? L / ROWS : 1;
    constexpr int COUNT = ROWS == 1 ? (GROUP < 4 ? GROUP : 4) : GROUP < 2 ? GROUP : 2;
    for (int64_t j = 0; j < n; j += GROUP) {
        V all[ROWS * GROUP];
        HLM_UNROLL
        for (int g = 0; g < GROUP; g += COUNT) {
            if (ahead) ahead->step(j + g + COUNT, 2 * n);
            const uint8_t* key[COUNT];
            V acc[ROWS][COUNT];
            HLM_UNROLL
            for (int e = 0; e < COUNT; e++) key[e] = k + (j + g + e < n ? j + g + e : n - 1) * row_bytes;
            kv_products<TYPE, ROWS, COUNT>(q, q_stride, key, d, acc);
            HLM_UNROLL
            for (int r = 0; r < ROWS; r++) {
                HLM_UNROLL
                for (int e = 0; e < COUNT; e++) all[r * GROUP + g + e] = acc[r][e];
            }
        }
        const int got = int(least(int64_t(GROUP), n - j));
        float sum[ROWS * GROUP];
        if (ROWS * GROUP == L) {
            store(sum, sums(all));
        } else {
            for (int a = 0; a < ROWS * GROUP; a++) sum[a] = hsum(all[a]);
        }
        for (int r = 0; r < ROWS; r++)
            for (int g = 0; g < got; g++) scores[r * score_stride + j + g] = sum[r * GROUP + g];
    }
}

// o_r += sum_j p[r][j] v_j over n stored values, NR vectors of columns at a time.
template <int TYPE, int ROWS, int NR>
HLM_INLINE void kv_weigh_columns(const float* p, int64_t p_stride, const uint8_t* v, int64_t row_bytes, int64_t n,
                                 int64_t i, float* o, int64_t o_stride, KvAhead* ahead) {
    V acc[ROWS][NR];
    HLM_UNROLL
    for (int r = 0; r < ROWS; r++) {
        HLM_UNROLL
        for (int c = 0; c < NR; c++) acc[r][c] = load(o + r * o_stride + i + c * L);
    }
    for (int64_t j = 0; j < n; j++, v += row_bytes) {
        if (ahead && j % 4 == 0) ahead->step(n + j + 4, 2 * n);
        V w[ROWS];
        HLM_UNROLL
        for (int r = 0; r < ROWS; r++) w[r] = set1(p[r * p_stride + j]);
        HLM_UNROLL
        for (int c = 0; c < NR; c++) {
            if (TYPE == KV_Q8_0 && (c * L % 32 == 0)) {  // a new block, where i is the start of one
                HLM_UNROLL
                for (int r = 0; r < ROWS; r++) w[r] = mul(set1(p[r * p_stride + j]), kv_scale<TYPE>(v, i + c * L));
            }
            const V y = kv_load<TYPE>(v, i + c * L);
            HLM_UNROLL
            for (int r = 0; r < ROWS; r++) acc[r][c] = fma(w[r], y, acc[r][c]);
        }
    }
    HLM_UNROLL
    for (int r = 0; r < ROWS; r++) {
        HLM_UNROLL
        for (int c = 0; c < NR; c++) store(o + r * o_stride + i + c * L, acc[r][c]);
    }
}

template <int TYPE, int ROWS>
static void kv_weigh(const float* p, int64_t p_stride, const uint8_t* v, int64_t row_bytes, int64_t n, int64_t d,
                     float* o, int64_t o_stride, KvAhead* ahead) {
    constexpr int most_vectors = (REGISTERS == 32 ? 16 : 8) / ROWS, wanted = most_vectors > 8 ? 8 : most_vectors;
    // Of Q8_0 whole blocks, or else a vector at a time.
    constexpr int NR = TYPE == KV_Q8_0 && wanted * L % 32 != 0 ? (L < 32 ? 32 / L : 1) : wanted;
    int64_t i = 0;
    for (; i + NR * L <= d; i += NR * L)
        kv_weigh_columns<TYPE, ROWS, NR>(p, p_stride, v, row_bytes, n, i, o, o_stride, i == 0 ? ahead : nullptr);
    for (; i + L <= d; i += L) kv_weigh_columns<TYPE, ROWS, 1>(p, p_stride, v, row_bytes, n, i, o, o_stride, nullptr);
    if (i < d) {
        const int part = int(d - i);
        for (int64_t j = 0; j < n; j++) {
            V y = kv_load_part<TYPE>(v + j * row_bytes, i, part);
            if (TYPE == KV_Q8_0) y = mul(y, kv_scale<TYPE>(v + j * row_bytes, i));
            for (int r = 0; r < ROWS; r++)
                store(o + r * o_stride + i, fma(set1(p[r * p_stride + j]), y, load(o + r * o_stride + i)));
        }
    }
}
