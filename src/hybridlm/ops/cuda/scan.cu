// The forward scan of the chunked gated delta rule: the state stays in registers from the first chunk to the last.
//
// A block carries S^T for one (sequence, head) and WARPGROUPS * 64 value columns, 64 rows of S^T to a warpgroup; a
// further warpgroup brings tiles ahead. With the chunk's k, q, v [64, *] as they lie in memory and, from `prepare`,
//
//     A [i, j] = (I + L)^-1 beta_j     P [i, j] = scale D_ij q_i.k_j (i >= j)       k, q at unit length
//     a = e^G |k|^-1    b = e^{G_C - G} |k|^-1    c = scale e^G |q|^-1    d = e^{G_C}
//
// a chunk is five products, each with its left factor in registers and its right one in shared memory:
//
//     X = S^T k^T;   U = v^T - X a;   N = U A^T  (the writes, by token);   o^T = (S^T q^T) c + N P^T
//     S^T = d S^T + (N b) k
//
// where a, b, c scale columns. The accumulators of one product are, rounded to bf16, the left factor of the next.

struct Scan {
    const bf16 *q, *k, *v, *a, *p;  // q, k [tokens, HK, K]; v [tokens, H, V]; a, p [chunks, H, 64, 64]
    const float* scalars;           // [chunks, H, 256]: a, b, c of 64 tokens each, then d and 63 unused
    const float* start;             // [rows, H, K, V] or null for zeros
    float* end;                     // [rows, H, K, V] or null
    bf16* o;                        // [tokens, H, V] or null
    bf16* states;                   // [chunks, H, V, K]: S^T at each chunk's start, or null
    const int* table;               // [rows, 3]: first token, tokens, first chunk; or null for even rows
    int heads, key_heads, value_dim, time, split;  // even rows: `time` tokens each, in parts of `split` chunks
};

constexpr int KEY_TILE = K / 8 * GROUP;
constexpr int SQUARE_TILE = CHUNK / 8 * GROUP;
constexpr int VALUES = WARPGROUPS * 64;
constexpr int VALUE_TILE = VALUES / 8 * GROUP;
constexpr int AT_Q = KEY_TILE, AT_A = 2 * KEY_TILE, AT_P = AT_A + SQUARE_TILE, AT_V = AT_P + SQUARE_TILE,
              AT_SCALARS = AT_V + VALUE_TILE, STAGE = AT_SCALARS + 1024;
constexpr bool TIGHT = WARPGROUPS > 2;  // 160 registers a thread do not hold both products with S^T at once

// 64 rows of COLUMNS bf16, `pitch` elements from row to row, into a tile; rows from `rows` on become zeros.
template <int COLUMNS> __device__ __forceinline__ void bring(u32 tile, const bf16* from, long pitch, int rows,
                                                             int thread) {
    constexpr int GROUPS = COLUMNS / 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = thread / 4 + half * 32, group = thread % 4;
        const bool valid = row < rows;
        const bf16* at = from + (valid ? row * pitch : 0) + group * 8;
        const u32 to = tile + group * GROUP + row * 16;
#pragma unroll
        for (int i = 0; i < GROUPS; i += 4)
            if (GROUPS % 4 == 0 || i + group < GROUPS) copy16(to + i * GROUP, at + i * 8, valid);
    }
}

// d [64, 64] = a [64, 16 STEPS] times a tile whose rows are columns of d, and plus d if `add`.
template <int STEPS> __device__ __forceinline__ void product(float (&d)[32], const u32* a, u64 tile, bool add) {
#pragma unroll
    for (int i = 0; i < STEPS; ++i)
        if (i > 0 || add) add_64(d, a + 4 * i, tile + i * (2 * GROUP >> 4));
        else first_64(d, a, tile);
}

extern "C" __global__ void __launch_bounds__((WARPGROUPS + 1) * 128, 1) scan(const __grid_constant__ Scan s) {
    extern __shared__ __align__(128) unsigned char memory[];
    const u32 base = shared_address(memory);
    const u32 full = base + STAGES * STAGE, empty = full + STAGES * 8;
    const int slabs = s.value_dim / VALUES;
    const int slab = blockIdx.x % slabs, head = blockIdx.x / slabs % s.heads, row = blockIdx.x / slabs / s.heads;
    long first;
    int tokens, chunk;
    if (s.table) {
        first = s.table[row * 3], tokens = s.table[row * 3 + 1], chunk = s.table[row * 3 + 2];
    } else {
        const int chunks = (s.time + CHUNK - 1) / CHUNK, parts = (chunks + s.split - 1) / s.split;
        const int part = row % parts;
        first = (long)(row / parts) * s.time + (long)part * s.split * CHUNK;
        tokens = min(s.split * CHUNK, s.time - part * s.split * CHUNK);
        chunk = row / parts * chunks + part * s.split;
    }
    const int chunks = (tokens + CHUNK - 1) / CHUNK;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(full + i * 8, 128);
            barrier_init(empty + i * 8, WARPGROUPS * 4);
        }
        fence_async();
    }
    __syncthreads();

    const int group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);  // told to the compiler as uniform in a warp
    if (group == WARPGROUPS) {  // bring tiles
        if (WARPGROUPS > 1) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(WARPGROUPS > 2 ? 32 : 24));
        const int thread = threadIdx.x % 128;
        const long key_pitch = (long)s.key_heads * K, value_pitch = (long)s.heads * s.value_dim;
        const int key_head = head / (s.heads / s.key_heads);
        const bf16* k = s.k + first * key_pitch + key_head * K;
        const bf16* q = s.q + first * key_pitch + key_head * K;
        const bf16* v = s.v + first * value_pitch + (long)head * s.value_dim + slab * VALUES;
        for (int n = 0; n < chunks; ++n) {
            const int stage = n % STAGES;
            const u32 at = base + stage * STAGE, full_bar = full + stage * 8;
            barrier_wait(empty + stage * 8, (n / STAGES & 1) ^ 1);
            const int rows = tokens - n * CHUNK;
            const long square = (long)(chunk + n) * s.heads + head, token = (long)n * CHUNK;
            bring<K>(at, k + token * key_pitch, key_pitch, rows, thread);
            bring<64>(at + AT_A, s.a + square * 4096, 64, 64, thread);
            if (thread < 64) copy16(at + AT_SCALARS + thread * 16, s.scalars + square * 256 + thread * 4, true);
            if (s.v) bring<VALUES>(at + AT_V, v + token * value_pitch, value_pitch, rows, thread);
            if (s.o) {
                bring<K>(at + AT_Q, q + token * key_pitch, key_pitch, rows, thread);
                bring<64>(at + AT_P, s.p + square * 4096, 64, 64, thread);
            }
            barrier_arrive_copies(full_bar);
        }
        asm volatile("cp.async.wait_all;" ::: "memory");
    } else {
        if (WARPGROUPS > 1) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(WARPGROUPS > 2 ? 160 : 240));
        const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
        const int own = group * 64 + warp * 16;                    // the warp's first value column in the tile
        const int value = slab * VALUES + own + lane / 4, pair = lane % 4 * 2;
        const long state = ((long)row * s.heads + head) * K * s.value_dim;
        // where this lane points for a 16 x 16 transposed load or store of the value tile
        const u32 corner = AT_V + (own / 8 + (lane / 8 & 1)) * GROUP + (lane / 16 * 8 + lane % 8) * 16;
        float state_t[K / 2];
#pragma unroll
        for (int j = 0; j < K / 2; ++j) {
            const int key = j / 4 * 8 + pair + j % 2, column = value + j % 4 / 2 * 8;
            state_t[j] = s.start ? s.start[state + (long)key * s.value_dim + column] : 0.f;
        }
        for (int n = 0; n < chunks; ++n) {
            const int stage = n % STAGES;
            const u32 at = base + stage * STAGE;
            const long square = (long)(chunk + n) * s.heads + head;
            u32 left[K / 4];
#pragma unroll
            for (int i = 0; i < K / 4; ++i) left[i] = pack(state_t[2 * i], state_t[2 * i + 1]);
            if (s.states) {
                u32* to = (u32*)(s.states + (square * s.value_dim + value) * K + pair);
#pragma unroll
                for (int i = 0; i < K / 4; ++i) to[i / 2 * 4 + i % 2 * 4 * K] = left[i];
            }
            barrier_wait(full + stage * 8, n / STAGES & 1);
            fence_async();
            const float decay = load_shared_pair(at + AT_SCALARS + 768).x;
#pragma unroll
            for (int j = 0; j < K / 2; ++j) state_t[j] *= decay;
            float x[32], out[32];
            u32 values[16];
            mma_fence();
            const u64 keys = by_columns(at), queries = by_columns(at + AT_Q);
            product<K / 16>(x, left, keys, false);
            mma_commit();
            if (!TIGHT) {
                product<K / 16>(out, left, queries, false);
                mma_commit();
            }
            mma_wait<TIGHT ? 0 : 1>();
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                u32 v[4];
                load_transposed(v, at + corner + i * 256);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int e = 8 * i + 2 * j;
                    const float2 a = load_shared_pair(at + AT_SCALARS + (i * 16 + j / 2 * 8 + pair) * 4);
                    values[4 * i + j] = pack(low(v[j]) - a.x * x[e], high(v[j]) - a.y * x[e + 1]);
                }
            }
            if (TIGHT) {
                mma_fence();
                product<K / 16>(out, left, queries, false);
                mma_commit();
            }
            mma_wait<0>();
            mma_fence();
            const u64 solve = by_columns(at + AT_A), scores = by_columns(at + AT_P), writes = by_rows(at);
            product<4>(x, values, solve, false);
            mma_commit();
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float2 c = load_shared_pair(at + AT_SCALARS + 512 + (j * 8 + pair) * 4);
                out[4 * j] *= c.x, out[4 * j + 1] *= c.y, out[4 * j + 2] *= c.x, out[4 * j + 3] *= c.y;
            }
            mma_wait<0>();
#pragma unroll
            for (int i = 0; i < 16; ++i) values[i] = pack(x[2 * i], x[2 * i + 1]);
            mma_fence();
            product<4>(out, values, scores, true);
            mma_commit();
            if (TIGHT) mma_wait<0>();
            u32 decayed[16];
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float2 b = load_shared_pair(at + AT_SCALARS + 256 + (j * 8 + pair) * 4);
#pragma unroll
                for (int r = 0; r < 2; ++r)
                    decayed[2 * j + r] = pack(x[4 * j + 2 * r] * b.x, x[4 * j + 2 * r + 1] * b.y);
            }
            mma_fence();
#pragma unroll
            for (int i = 0; i < 4; ++i) add_keys(state_t, decayed + 4 * i, writes + i * 16);
            mma_commit();
            mma_wait<1>();
            if (s.o) {  // through the warp's own part of the value tile, which nobody reads any more
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    store_transposed(at + corner + i * 256, pack(out[8 * i], out[8 * i + 1]),
                                     pack(out[8 * i + 2], out[8 * i + 3]), pack(out[8 * i + 4], out[8 * i + 5]),
                                     pack(out[8 * i + 6], out[8 * i + 7]));
                __syncwarp();
                const int column = lane % 2;
                bf16* to = s.o + (first + n * CHUNK) * s.heads * s.value_dim + (long)head * s.value_dim
                           + slab * VALUES + own + column * 8;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int token = i * 16 + lane / 2;
                    const uint4 r = load_shared16(at + AT_V + (own / 8 + column) * GROUP + token * 16);
                    if (n * CHUNK + token < tokens) *(uint4*)(to + (long)token * s.heads * s.value_dim) = r;
                }
            }
            mma_wait<0>();
            __syncwarp();
            if (lane == 0) barrier_arrive(empty + stage * 8);
        }
        if (s.end) {
#pragma unroll
            for (int j = 0; j < K / 2; ++j) {
                const int key = j / 4 * 8 + pair + j % 2, column = value + j % 4 / 2 * 8;
                s.end[state + (long)key * s.value_dim + column] = state_t[j];
            }
        }
    }
}
