// The forward scan of the chunked gated delta rule: the state stays in registers from the first chunk to the last.
//
// A block carries S^T for one (sequence, head) and WARPGROUPS * 64 value columns, 64 rows of S^T to a warpgroup; a
// further warpgroup brings tiles ahead (scan.cu): v as it lies in memory, all else as the chunk's record (tiles.cuh), whose
// factors are b, f, i, e, with d = exp(G_C).
//
// A chunk is five products, each with its left factor in registers and its right one in shared memory:
//
//     X = S^T k^T;   U = v^T b - X f;   W = U T^T  (the writes, by token);   o^T = (S^T q^T) i + W P^T
//     S^T = d S^T + (W e) k
//
// where factors scale columns. The accumulators of one product are, rounded to bf16, the left factor of the next.

// d [64, 64] = a [64, 64] times T^T, both in float16.
__device__ __forceinline__ void product_half(float (&d)[32], const u32* a, u64 tile) {
    first_64_half(d, a, tile);
#pragma unroll
    for (int i = 1; i < 4; ++i) add_64_half(d, a + 4 * i, tile + i * (2 * GROUP >> 4));
}

// One chunk: `state_t` comes already multiplied by d, `left` is S^T before that, in bf16; o is where the warp's first
// value of the first token goes. Returns with the update of `state_t` under way.
__device__ __forceinline__ void step(float (&state_t)[K / 2], const u32 (&left)[K / 4], u32 at, const Place& w,
                                     bf16* o, unsigned char* tile, int rows) {
    float x[32], out[32];
    u32 values[16];
    mma_fence();
    const u64 keys = by_columns(at), queries = by_columns(at + AT_Q);
    product<K / 16>(x, left, keys, false);
    mma_commit();
    if (OUTPUT && !TIGHT) {
        product<K / 16>(out, left, queries, false);
        mma_commit();
    }
    mma_wait<OUTPUT && !TIGHT ? 1 : 0>();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        u32 v[4];
        load_transposed(v, at + w.corner + i * 16 * Values::PITCH);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int e = 8 * i + 2 * j;
            const u32 factor = at + AT_FACTORS + (i * 16 + j / 2 * 8 + w.pair) * 4;
            const float2 b = load_shared_pair(factor), f = load_shared_pair(factor + 256);
            x[e] = low(v[j]) * b.x - x[e] * f.x, x[e + 1] = high(v[j]) * b.y - x[e + 1] * f.y;
        }
    }
    float down[2];
    halved(values, down, x);
    if (OUTPUT && TIGHT) {
        mma_fence();
        product<K / 16>(out, left, queries, false);
        mma_commit();
    }
    mma_wait<0>();
    mma_fence();
    const u64 solve = by_columns(at + AT_INVERSE), scores = by_columns(at + AT_SCORES), writes = by_rows(at);
    product_half(x, values, solve);
    mma_commit();
    if (OUTPUT) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float2 f = load_shared_pair(at + AT_FACTORS + 512 + (j * 8 + w.pair) * 4);
            out[4 * j] *= f.x, out[4 * j + 1] *= f.y, out[4 * j + 2] *= f.x, out[4 * j + 3] *= f.y;
        }
    }
    mma_wait<0>();
    restore(x, down);
    if (OUTPUT) {
#pragma unroll
        for (int i = 0; i < 16; ++i) values[i] = pack(x[2 * i], x[2 * i + 1]);
        mma_fence();
        product<4>(out, values, scores, true);
        mma_commit();
        if (TIGHT) mma_wait<0>();
    }
    u32 decayed[16];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const float2 f = load_shared_pair(at + AT_FACTORS + 768 + (j * 8 + w.pair) * 4);
#pragma unroll
        for (int r = 0; r < 2; ++r)
            decayed[2 * j + r] = pack(x[4 * j + 2 * r] * f.x, x[4 * j + 2 * r + 1] * f.y);
    }
    mma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) add_keys(state_t, decayed + 4 * i, writes + i * 16);
    mma_commit();
    mma_wait<1>();
    if (!SUMMARY) emit(OUTPUT ? out : x, at, w, o, tile, rows);
}
