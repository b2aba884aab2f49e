// All gradients of a chunk, once the scans have left each chunk's state and what it writes, and the same of the gradient.
//
// With dO the gradient of o, W the writes, E the gradient of T's right-hand side (all [64, V]), S [K, V] the state at the
// chunk's start, dS' its gradient at the end, D_ij = exp(G_i - G_j), r = 1 / |k|, t = scale / |q|:
//
//     dP = dO W^T D t r (i >= j)          M = -E W^T D r r (i > j)
//     dq = exp(G) t (dO S^T) + dP k       dk = -f (E S^T) + e (W dS'^T) + dP^T q + b M k + (b M)^T k
//     dv = b E                            dbeta = E.v - exp(G) r k.(E S^T) + k.(M k)
//     dG = q.dq + k.[-f (E S^T) + b M k] - k.[all else of dk],  and at the last token + the sum of k.[e (W dS'^T)]
//          + d <S, dS'>: each G stands in an exponent beside a q or a k; dg is its running sum from the right
//
// Two warpgroups compute, one dq, dP and M, one dk and what is summed over rows; a third brings tiles, 64 values at a
// time, for one chunk and head after another. All rows here are tokens, all factors a row's own.

struct Gradient {
    const unsigned char* records;            // [chunks, H, RECORD]
    const bf16 *v, *grad;                    // [tokens, H, V]; grad is dO
    const unsigned char *e, *w;              // [chunks, H, V / 64, SQUARE]
    const unsigned char *states, *dstates;   // [chunks, H, V / 64, KEY_TILE]
    const float* g;                          // [tokens, H]
    const int *bounds, *offsets;
    bf16 *dq, *dk, *dv;                      // [tokens, H, K], [tokens, H, V]
    float *dg, *dbeta;                       // [tokens, H]
    int heads, value_dim, time, sequences, chunks, normalise;
    float scale;
};

// a stage: 64 columns of dO, v, E and W, and 64 rows of S^T and dS'^T
typedef Lines<64> Values;
constexpr int AT_GRAD = 0, AT_V = Values::SIZE, AT_E = 2 * Values::SIZE, AT_W = AT_E + SQUARE, AT_S = AT_W + SQUARE,
              AT_DS = AT_S + KEY_TILE, STAGE = AT_DS + KEY_TILE, STAGES = 2;
// a task, which is a chunk and head: k, q, and the record's factors
constexpr int KEYS = 0, QUERIES = KEY_TILE, FACTORS = 2 * KEY_TILE, CARRY = FACTORS + 1792, TASK = CARRY + 32,
              TASKS = K > 96 ? 1 : 2;
// then: dP^T, M and (b M)^T as tiles; sums by row: q.dq, E.v, dG, dbeta, k.[e (W dS'^T)], and <S, dS'> by warp
constexpr int SCRATCH = STAGES * STAGE + TASKS * TASK, SUMS = SCRATCH + 3 * SQUARE, BARRIERS = SUMS + 6 * 256;
constexpr int STEP = 2 * GROUP >> 4;

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}
__device__ __forceinline__ float dot16(uint4 a, uint4 b) {
    return low(a.x) * low(b.x) + high(a.x) * high(b.x) + low(a.y) * low(b.y) + high(a.y) * high(b.y)
         + low(a.z) * low(b.z) + high(a.z) * high(b.z) + low(a.w) * low(b.w) + high(a.w) * high(b.w);
}
__device__ __forceinline__ u32 scaled(u32 x, float by) { return pack(low(x) * by, high(x) * by); }

// The dot products of a thread's two rows of `d` with those of a tile, at `corner` of it.
__device__ __forceinline__ void dots(float (&sum)[2], const float (&d)[K / 2], u32 corner) {
    sum[0] = sum[1] = 0.f;
#pragma unroll
    for (int j = 0; j < K / 8; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const u32 x = load_shared4(corner + j * GROUP + r * 128);
            sum[r] += d[4 * j + 2 * r] * low(x) + d[4 * j + 2 * r + 1] * high(x);
        }
    sum[0] = quad_sum(sum[0]), sum[1] = quad_sum(sum[1]);
}

// Two rows of d, less `along` times those of a tile (the norm's own derivative), to memory.
__device__ __forceinline__ void leave(const float (&d)[K / 2], u32 corner, const float (&along)[2], bf16* to, long pitch,
                                      int row, int rows) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
        if (row + r * 8 < rows)
#pragma unroll
            for (int j = 0; j < K / 8; ++j) {
                const u32 x = load_shared4(corner + j * GROUP + r * 128);
                *(u32*)(to + (row + r * 8) * pitch + j * 8) = pack(d[4 * j + 2 * r] - along[r] * low(x),
                                                                   d[4 * j + 2 * r + 1] - along[r] * high(x));
            }
}

extern "C" __global__ void __launch_bounds__(384, 1) gradient(const __grid_constant__ Gradient s) {
    extern __shared__ __align__(128) unsigned char memory[];
    const u32 base = shared_address(memory);
    const u32 full = base + BARRIERS, empty = full + 8 * STAGES, task_full = empty + 8 * STAGES,
              task_empty = task_full + 8 * TASKS;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) barrier_init(full + i * 8, 32), barrier_init(empty + i * 8, 8);
        for (int i = 0; i < TASKS; ++i) barrier_init(task_full + i * 8, 1), barrier_init(task_empty + i * 8, 8);
        fence_async();
    }
    __syncthreads();
    const int group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0), thread = threadIdx.x % 128;
    const int warp = thread / 32, lane = thread % 32, row = warp * 16 + lane / 4, pair = lane % 4 * 2;
    const long pitch = (long)s.heads * s.value_dim, out_pitch = (long)s.heads * K;
    int turn = 0, slab = 0;  // counts over all tasks
    if (group == 2) {
        release_registers<40>();
        for (int task = blockIdx.x; task < s.chunks * s.heads && thread < 32; task += gridDim.x) {
            const int head = task % s.heads, chunk = task / s.heads;
            long first;
            int rows;
            if (!locate(s.bounds, s.offsets, s.sequences, s.time, chunk, first, rows)) break;
            const u32 at = base + STAGES * STAGE + turn % TASKS * TASK, task_bar = task_full + turn % TASKS * 8;
            const unsigned char* record = s.records + (long)task * RECORD;
            barrier_wait(task_empty + turn % TASKS * 8, (turn / TASKS & 1) ^ 1);
            if (lane == 0) {
                barrier_expect(task_bar, 2 * KEY_TILE + 1824);
                fetch(at + KEYS, record + AT_K, KEY_TILE, task_bar);
                fetch(at + QUERIES, record + AT_Q, KEY_TILE, task_bar);
                fetch(at + FACTORS, record + AT_FACTORS, 1824, task_bar);
            }
            ++turn;
            for (int v = 0; v < s.value_dim; v += 64, ++slab) {
                const u32 to = base + slab % STAGES * STAGE, bar = full + slab % STAGES * 8;
                barrier_wait(empty + slab % STAGES * 8, (slab / STAGES & 1) ^ 1);
                const long from = first * pitch + (long)head * s.value_dim + v;
                const long tile = (long)task * (s.value_dim / 64) + v / 64;
                Values::clear(to + AT_GRAD, rows, lane), Values::clear(to + AT_V, rows, lane);
                barrier_expect(bar, 2 * Values::expected(rows, lane) + (lane == 0 ? 2 * (SQUARE + KEY_TILE) : 0));
                if (lane == 0) {
                    fetch(to + AT_E, s.e + tile * SQUARE, SQUARE, bar), fetch(to + AT_W, s.w + tile * SQUARE, SQUARE, bar);
                    fetch(to + AT_S, s.states + tile * KEY_TILE, KEY_TILE, bar);
                    fetch(to + AT_DS, s.dstates + tile * KEY_TILE, KEY_TILE, bar);
                }
                Values::bring(to + AT_GRAD, s.grad + from, pitch, rows, lane, bar);
                Values::bring(to + AT_V, s.v + from, pitch, rows, lane, bar);
            }
        }
    } else {
        claim_registers<232>();
        const u32 transposed = (warp * 2 + (lane / 8 & 1)) * GROUP + (lane / 16 * 8 + lane % 8) * 16;
        const u32 straight = lane / 16 * GROUP + (warp * 16 + lane / 8 % 2 * 8 + lane % 8) * 16;
        const u32 scores = base + SCRATCH, lower = scores + SQUARE, upper = lower + SQUARE, sums = base + SUMS;
        for (int task = blockIdx.x; task < s.chunks * s.heads; task += gridDim.x) {
            const int head = task % s.heads, chunk = task / s.heads;
            long first;
            int rows;
            if (!locate(s.bounds, s.offsets, s.sequences, s.time, chunk, first, rows)) break;
            const u32 at = base + STAGES * STAGE + turn % TASKS * TASK, factors = at + FACTORS + row * 4;
            const u32 k_corner = at + KEYS + row * 16 + pair * 2, q_corner = at + QUERIES + row * 16 + pair * 2;
            barrier_wait(task_full + turn % TASKS * 8, turn / TASKS & 1);
            if (group == 0) {
                float dq[K / 2], dp[32], m[32], kept = 0.f;
#pragma unroll
                for (int j = 0; j < K / 2; ++j) dq[j] = 0.f;
#pragma unroll
                for (int j = 0; j < 32; ++j) dp[j] = m[j] = 0.f;
                for (int v = 0; v < s.value_dim; v += 64, ++slab) {
                    const u32 from = base + slab % STAGES * STAGE;
                    barrier_wait(full + slab % STAGES * 8, slab / STAGES & 1);
                    const u64 w = by_columns(from + AT_W);
                    const u32 grads = from + AT_GRAD + (warp * 16 + lane / 8 % 2 * 8 + lane % 8) * Values::PITCH
                                      + lane / 16 * 16;
                    u32 grad[16];
#pragma unroll
                    for (int i = 0; i < 4; ++i) load_matrix(grad + 4 * i, grads + i * 32);
                    mma_fence();
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        add_keys(dq, grad + 4 * i, by_rows(from + AT_S) + i * 16);
                        add_64(dp, grad + 4 * i, w + i * STEP);
                        add_64_shared(m, by_columns(from + AT_E) + i * STEP, w + i * STEP);
                    }
                    mma_commit();
#pragma unroll
                    for (int i = 0; i < K / 16; ++i) {
                        const u32 piece = from + (thread / 64 + 2 * i) * GROUP + thread % 64 * 16;
                        kept += dot16(load_shared16(piece + AT_S), load_shared16(piece + AT_DS));
                    }
                    mma_wait<0>();
                    __syncwarp();
                    if (lane == 0) barrier_arrive(empty + slab % STAGES * 8);
                }
                // dP and M from products of values, as factors of the next products and, transposed, for the others
                rendezvous<1, 256>();  // who have left the last ones behind
                u32 left[16];
                float along[2];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    u32 straight_m[4], scaled_m[4];
#pragma unroll
                    for (int h = 0; h < 4; ++h) {
                        const int r = h % 2, j = 2 * i + h / 2, e = 4 * j + 2 * r, column = j * 8 + pair, line = row + r * 8;
                        const u32 by_row = factors + r * 32, by_column = at + FACTORS + column * 4;
                        const float g = load_shared(by_row + 1024), rk = load_shared(by_row + 1280);
                        const float2 gc = load_shared_pair(by_column + 1024), rc = load_shared_pair(by_column + 1280);
                        const float t = load_shared(by_row + 1536), b = load_shared(by_row);
                        const float d0 = line >= column ? exponential(g - gc.x) * rc.x : 0.f;
                        const float d1 = line > column ? exponential(g - gc.y) * rc.y : 0.f;
                        left[4 * i + h] = pack(dp[e] * d0 * t, dp[e + 1] * d1 * t);
                        const float m0 = line > column ? -m[e] * d0 * rk : 0.f;
                        const float m1 = line > column + 1 ? -m[e + 1] * d1 * rk : 0.f;
                        straight_m[h] = pack(m0, m1), scaled_m[h] = pack(m0 * b, m1 * b);
                    }
                    store_transposed(scores + transposed + i * 256, left[4 * i], left[4 * i + 1], left[4 * i + 2],
                                     left[4 * i + 3]);
                    store_transposed(upper + transposed + i * 256, scaled_m[0], scaled_m[1], scaled_m[2], scaled_m[3]);
                    store_matrix(lower + straight + 2 * i * GROUP, straight_m[0], straight_m[1], straight_m[2],
                                 straight_m[3]);
                }
                fence_async();
                rendezvous<2, 256>();
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const float into = load_shared(factors + r * 32 + 512);
#pragma unroll
                    for (int j = 0; j < K / 8; ++j) dq[4 * j + 2 * r] *= into, dq[4 * j + 2 * r + 1] *= into;
                }
                mma_fence();
#pragma unroll
                for (int i = 0; i < 4; ++i) add_keys(dq, left + 4 * i, by_rows(at + KEYS) + i * 16);
                mma_commit();
#pragma unroll
                for (int i = 1; i < 32; i *= 2) kept += __shfl_xor_sync(0xffffffff, kept, i);
                if (lane == 0) store_shared(sums + 5 * 256 + warp * 4, kept);
                mma_wait<0>();
                dots(along, dq, q_corner);
                if (pair == 0) store_shared(sums + row * 4, along[0]), store_shared(sums + row * 4 + 32, along[1]);
                rendezvous<3, 256>();
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const float t = load_shared(factors + r * 32 + 1536) / s.scale;
                    along[r] = s.normalise ? along[r] * t * t : 0.f;
                }
                leave(dq, q_corner, along, s.dq + first * out_pitch + (long)head * K + pair, out_pitch, row, rows);
            } else {
                float dk[K / 2], es[K / 2], ev[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
                for (int j = 0; j < K / 2; ++j) dk[j] = es[j] = 0.f;
                for (int v = 0; v < s.value_dim; v += 64, ++slab) {
                    const u32 from = base + slab % STAGES * STAGE;
                    barrier_wait(full + slab % STAGES * 8, slab / STAGES & 1);
                    mma_fence();
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        add_keys_shared(es, by_columns(from + AT_E) + i * STEP, by_rows(from + AT_S) + i * 16);
                        add_keys_shared(dk, by_columns(from + AT_W) + i * STEP, by_rows(from + AT_DS) + i * 16);
                    }
                    mma_commit();
                    bf16* const dv = s.dv + first * pitch + (long)head * s.value_dim + v + thread % 8 * 8;
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int line = thread / 8 + 16 * i;
                        const u32 piece = from + thread % 8 * GROUP + line * 16;
                        const uint4 x = load_shared16(piece + AT_E);
                        ev[i] += dot16(x, load_shared16(from + AT_V + line * Values::PITCH + thread % 8 * 16));
                        const float b = load_shared(at + FACTORS + line * 4);
                        const uint4 y = {scaled(x.x, b), scaled(x.y, b), scaled(x.z, b), scaled(x.w, b)};
                        if (line < rows) *(uint4*)(dv + line * pitch) = y;
                    }
                    mma_wait<0>();
                    __syncwarp();
                    if (lane == 0) barrier_arrive(empty + slab % STAGES * 8);
                }
                rendezvous<1, 256>();
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    ev[i] += __shfl_xor_sync(0xffffffff, ev[i], 4);
                    ev[i] = quad_sum(ev[i]);
                    if (lane % 8 == 0) store_shared(sums + 256 + (thread / 8 + 16 * i) * 4, ev[i]);
                }
                float start[2], rest[2], inside[2], along[2];
                dots(start, es, k_corner);
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const float f = load_shared(factors + r * 32 + 256), e = load_shared(factors + r * 32 + 768);
#pragma unroll
                    for (int j = 0; j < K / 8; ++j)
#pragma unroll
                        for (int i = 4 * j + 2 * r; i < 4 * j + 2 * r + 2; ++i) es[i] *= -f, dk[i] *= e;
                }
                dots(rest, dk, k_corner);
#pragma unroll
                for (int j = 0; j < K / 2; ++j) dk[j] += es[j], es[j] = 0.f;
                rendezvous<2, 256>();
                mma_fence();
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    add_keys_shared(es, by_columns(lower) + i * STEP, by_rows(at + KEYS) + i * 16);
                    add_keys_shared(dk, by_columns(scores) + i * STEP, by_rows(at + QUERIES) + i * 16);
                    add_keys_shared(dk, by_columns(upper) + i * STEP, by_rows(at + KEYS) + i * 16);
                }
                mma_commit();
                mma_wait<0>();
                dots(inside, es, k_corner);
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const float b = load_shared(factors + r * 32);
#pragma unroll
                    for (int j = 0; j < K / 8; ++j)
                        dk[4 * j + 2 * r] += b * es[4 * j + 2 * r], dk[4 * j + 2 * r + 1] += b * es[4 * j + 2 * r + 1];
                }
                dots(along, dk, k_corner);
                rendezvous<3, 256>();
                if (pair == 0)
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        const u32 factor = factors + r * 32, sum = sums + (row + r * 8) * 4;
                        const float b = load_shared(factor), f = load_shared(factor + 256);
                        const float into = exponential(load_shared(factor + 1024)) * load_shared(factor + 1280);
                        store_shared(sum + 512, load_shared(sum) + 2.f * (b * inside[r] - f * start[r]) - along[r]);
                        store_shared(sum + 768, load_shared(sum + 256) - into * start[r] + inside[r]);
                        store_shared(sum + 1024, rest[r]);
                    }
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const float t = load_shared(factors + r * 32 + 1280);
                    along[r] = s.normalise ? along[r] * t * t : 0.f;
                }
                leave(dk, k_corner, along, s.dk + first * out_pitch + (long)head * K + pair, out_pitch, row, rows);
                rendezvous<4, 128>();
                if (warp == 0) {
                    const float2 rests = load_shared_pair(sums + 1024 + lane * 8);
                    float last = rests.x + rests.y;
#pragma unroll
                    for (int i = 1; i < 32; i *= 2) last += __shfl_xor_sync(0xffffffff, last, i);
                    const float2 s01 = load_shared_pair(sums + 5 * 256), s23 = load_shared_pair(sums + 5 * 256 + 8);
                    last += load_shared(at + CARRY) * (s01.x + s01.y + s23.x + s23.y);
                    const float2 x = load_shared_pair(sums + 512 + lane * 8), db = load_shared_pair(sums + 768 + lane * 8);
                    float sum = x.x + x.y;
#pragma unroll
                    for (int i = 1; i < 32; i *= 2) {
                        const float other = __shfl_down_sync(0xffffffff, sum, i);
                        if (lane + i < 32) sum += other;
                    }
                    sum += last;
                    const long gate = (first + 2 * lane) * s.heads + head;
                    // a decay at the floor, or a reset, feels nothing
                    if (2 * lane < rows) s.dg[gate] = s.g[gate] > -110.f ? sum : 0.f, s.dbeta[gate] = db.x;
                    if (2 * lane + 1 < rows) {
                        s.dg[gate + s.heads] = s.g[gate + s.heads] > -110.f ? sum - x.x : 0.f;
                        s.dbeta[gate + s.heads] = db.y;
                    }
                }
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(task_empty + turn % TASKS * 8);
            ++turn;
        }
    }
}
