// The forward scan of the chunked gated delta rule: the state stays in registers from the first chunk to the last.
//
// A block carries S^T for one (sequence, head) and WARPGROUPS * 64 value columns, 64 rows of S^T to a warpgroup; a
// further warpgroup brings tiles ahead. Besides the chunk's k, q, v [64, *] as they lie in memory it takes from
// `prepare` T = (I + L)^-1, P, and per token the factors (r, t: 1 / |k| and scale / |q|)
//
//     b = beta    f = beta exp(G) r    i = exp(G) t    e = exp(G_C - G) r    and for the chunk d = exp(G_C)
//
// A chunk is five products, each with its left factor in registers and its right one in shared memory:
//
//     X = S^T k^T;   U = v^T b - X f;   W = U T^T  (the writes, by token);   o^T = (S^T q^T) i + W P^T
//     S^T = d S^T + (W e) k
//
// where factors scale columns. The accumulators of one product are, rounded to bf16, the left factor of the next.

struct Scan {
    const bf16 *q, *k, *v;           // [tokens, HK, K], [tokens, H, V]
    const bf16 *inverse, *scores;    // T and P [chunks, H, 64, 64]
    const float *factors, *carry;    // [chunks, H, 7, 64], whose first four are b, f, i, e; d [chunks, H]
    const int *bounds, *offsets;     // [rows + 1]: first token and first chunk of each row; null: `time` tokens a row
    const float* initial;            // [rows, H, K, V] or null for zeros
    float* final;                    // [rows, H, K, V] or null
    bf16* o;                         // [tokens, H, V]: with OUTPUT o, without it the writes W
    bf16* states;                    // [chunks, H, V, K]: S^T at each chunk's start, or null
    int heads, key_heads, value_dim, time, split;  // even rows may come in parts of `split` chunks, each its own row
};

constexpr int KEY_TILE = K / 8 * GROUP;
constexpr int SQUARE_TILE = CHUNK / 8 * GROUP;
constexpr int VALUES = WARPGROUPS * 64;
constexpr int VALUE_TILE = VALUES / 8 * GROUP;
constexpr int AT_Q = KEY_TILE, AT_INVERSE = 2 * KEY_TILE, AT_SCORES = AT_INVERSE + SQUARE_TILE,
              AT_V = AT_SCORES + SQUARE_TILE, AT_FACTORS = AT_V + VALUE_TILE, AT_CARRY = AT_FACTORS + 1024, STAGE = AT_CARRY + 32;
constexpr bool TIGHT = WARPGROUPS > 2;  // 160 registers a thread do not hold both products with S^T at once

// A warp's [16 values, 64 tokens] of accumulators to memory, token by token, through its own part of the value tile.
__device__ __forceinline__ void emit(const float (&x)[32], u32 corner, u32 column, bf16* to, long pitch, int rows,
                                     int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
        store_transposed(corner + i * 256, pack(x[8 * i], x[8 * i + 1]), pack(x[8 * i + 2], x[8 * i + 3]),
                         pack(x[8 * i + 4], x[8 * i + 5]), pack(x[8 * i + 6], x[8 * i + 7]));
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int token = i * 16 + lane / 2;
        const uint4 r = load_shared16(column + lane % 2 * GROUP + token * 16);
        if (token < rows) *(uint4*)(to + token * pitch + lane % 2 * 8) = r;
    }
}

extern "C" __global__ void __launch_bounds__((WARPGROUPS + 1) * 128, 1) scan(const __grid_constant__ Scan s) {
    extern __shared__ __align__(128) unsigned char memory[];
    const u32 base = shared_address(memory);
    const u32 full = base + STAGES * STAGE, empty = full + STAGES * 8;
    const int slabs = s.value_dim / VALUES;
    const int slab = blockIdx.x % slabs, head = blockIdx.x / slabs % s.heads, row = blockIdx.x / slabs / s.heads;
    long first;
    int tokens, chunk;
    if (s.bounds) {
        first = s.bounds[row], tokens = s.bounds[row + 1] - s.bounds[row], chunk = s.offsets[row];
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
            bring<64>(at + AT_INVERSE, s.inverse + square * 4096, 64, 64, thread);
            bring<VALUES>(at + AT_V, v + token * value_pitch, value_pitch, rows, thread);
            if (thread < 64) copy16(at + AT_FACTORS + thread * 16, s.factors + square * 448 + thread * 4, true);
            if (thread == 64) copy4(at + AT_CARRY, s.carry + square);
            if (OUTPUT) {
                bring<K>(at + AT_Q, q + token * key_pitch, key_pitch, rows, thread);
                bring<64>(at + AT_SCORES, s.scores + square * 4096, 64, 64, thread);
            }
            barrier_arrive_copies(full_bar);
        }
        asm volatile("cp.async.wait_all;" ::: "memory");
    } else {
        if (WARPGROUPS > 1) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(WARPGROUPS > 2 ? 160 : 240));
        const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
        const int own = group * 64 + warp * 16;                    // the warp's first value column in the tile
        const int value = slab * VALUES + own + lane / 4, pair = lane % 4 * 2;
        const long pitch = (long)s.heads * s.value_dim, state = ((long)row * s.heads + head) * K * s.value_dim;
        // where this lane points for a 16 x 16 transposed load or store of the value tile
        const u32 corner = AT_V + (own / 8 + (lane / 8 & 1)) * GROUP + (lane / 16 * 8 + lane % 8) * 16;
        float state_t[K / 2];
#pragma unroll
        for (int j = 0; j < K / 2; ++j) {
            const int key = j / 4 * 8 + pair + j % 2, column = value + j % 4 / 2 * 8;
            state_t[j] = s.initial ? s.initial[state + (long)key * s.value_dim + column] : 0.f;
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
            const float decay = load_shared(at + AT_CARRY);
#pragma unroll
            for (int j = 0; j < K / 2; ++j) state_t[j] *= decay;
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
                load_transposed(v, at + corner + i * 256);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int e = 8 * i + 2 * j;
                    const u32 factor = at + AT_FACTORS + (i * 16 + j / 2 * 8 + pair) * 4;
                    const float2 b = load_shared_pair(factor), f = load_shared_pair(factor + 256);
                    values[4 * i + j] = pack(low(v[j]) * b.x - x[e] * f.x, high(v[j]) * b.y - x[e + 1] * f.y);
                }
            }
            if (OUTPUT && TIGHT) {
                mma_fence();
                product<K / 16>(out, left, queries, false);
                mma_commit();
            }
            mma_wait<0>();
            mma_fence();
            const u64 solve = by_columns(at + AT_INVERSE), scores = by_columns(at + AT_SCORES), writes = by_rows(at);
            product<4>(x, values, solve, false);
            mma_commit();
            if (OUTPUT) {
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    const float2 f = load_shared_pair(at + AT_FACTORS + 512 + (j * 8 + pair) * 4);
                    out[4 * j] *= f.x, out[4 * j + 1] *= f.y, out[4 * j + 2] *= f.x, out[4 * j + 3] *= f.y;
                }
            }
            mma_wait<0>();
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
                const float2 f = load_shared_pair(at + AT_FACTORS + 768 + (j * 8 + pair) * 4);
#pragma unroll
                for (int r = 0; r < 2; ++r)
                    decayed[2 * j + r] = pack(x[4 * j + 2 * r] * f.x, x[4 * j + 2 * r + 1] * f.y);
            }
            mma_fence();
#pragma unroll
            for (int i = 0; i < 4; ++i) add_keys(state_t, decayed + 4 * i, writes + i * 16);
            mma_commit();
            mma_wait<1>();
            emit(OUTPUT ? out : x, at + corner, at + AT_V + own / 8 * GROUP,
                 s.o + (first + n * CHUNK) * pitch + (long)head * s.value_dim + slab * VALUES + own, pitch,
                 tokens - n * CHUNK, lane);
            mma_wait<0>();
            __syncwarp();
            if (lane == 0) barrier_arrive(empty + stage * 8);
        }
        if (s.final) {
#pragma unroll
            for (int j = 0; j < K / 2; ++j) {
                const int key = j / 4 * 8 + pair + j % 2, column = value + j % 4 / 2 * 8;
                s.final[state + (long)key * s.value_dim + column] = state_t[j];
            }
        }
    }
}
