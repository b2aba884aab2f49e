// What a chunk's writes do to each other, for all chunks at once.
//
// A block of four warps takes one (chunk, head): two Gram products on the tensor cores, decays, then the unit lower
// triangular inverse by forward substitution in float32, a column to a thread. With G the running sum of log decays,
// D_ij = exp(G_i - G_j) and r = 1 / |k| (or 1 without l2 norm):
//
//     L_ij = beta_i D_ij k_i.k_j r_i r_j (i > j)     T = (I + L)^-1     P_ij = scale D_ij q_i.k_j (i >= j)
//
// All that the scans read of k, q and the gates leaves as a record (tiles.cuh). T is in float16: its entries are no larger
// than 2, and where they alternate, bf16's rounding would cost a hundred times more than everything else.

struct Prepare {
    const bf16 *q, *k;              // [tokens, HK, K]
    const float *g, *beta;          // [tokens, H]
    const int *bounds, *offsets;    // [sequences + 1]: first token and first chunk of each; null: `time` tokens each
    unsigned char* records;         // [chunks, H, RECORD]
    int heads, key_heads, time, sequences, normalise;
    float scale;
};

constexpr int PITCH = 68;  // floats from row to row of L transposed, which lies over k and q once they are multiplied
constexpr int AT_SOLVED = CHUNK * PITCH * 4, SCRATCH = AT_SOLVED + CHUNK * CHUNK * 4;
constexpr int AT_T = 2 * KEY_TILE > SCRATCH ? 2 * KEY_TILE : SCRATCH, AT_P = AT_T + SQUARE;
constexpr int AT_GATES = AT_P + SQUARE;  // G, beta, r, t: 64 floats each

// x_i = e_i - sum over j < i of L_ij x_j: a column of T in blocks of 16 rows, from `block` on, where its 1 stands or
// above. `lower` is L transposed, `solved` [64, 64] keeps what is known of x. The loops stay loops: unrolled, 2,000
// multiplications that run once each wait for their instructions.
__device__ __forceinline__ void substitute(u32 lower, u32 solved, unsigned char* tile, int column, int block) {
    unsigned short* const to = (unsigned short*)(tile + column / 8 * GROUP) + column % 8;
    const int top = block * 16;
    for (int i = 0; i < top; ++i) to[i * 8] = 0;
#pragma unroll 1
    for (; block < 4; ++block) {
        const u32 rows = lower + block * 64;
        float x[16];
#pragma unroll
        for (int i = 0; i < 16; ++i) x[i] = column == block * 16 + i ? 1.f : 0.f;
#pragma unroll 4
        for (int j = top; j < block * 16; ++j) {
            const float y = load_shared(solved + (j * CHUNK + column) * 4);
#pragma unroll
            for (int i = 0; i < 16; i += 4) {
                const float4 l = load_shared_four(rows + j * PITCH * 4 + i * 4);
                x[i] -= l.x * y, x[i + 1] -= l.y * y, x[i + 2] -= l.z * y, x[i + 3] -= l.w * y;
            }
        }
#pragma unroll
        for (int j = 0; j < 15; ++j)
#pragma unroll
            for (int i = j / 4 * 4; i < 16; i += 4) {
                const float4 l = load_shared_four(rows + (block * 16 + j) * PITCH * 4 + i * 4);
                if (i > j) x[i] -= l.x * x[j];
                if (i + 1 > j) x[i + 1] -= l.y * x[j];
                if (i + 2 > j) x[i + 2] -= l.z * x[j];
                if (i + 3 > j) x[i + 3] -= l.w * x[j];
            }
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            store_shared(solved + ((block * 16 + i) * CHUNK + column) * 4, x[i]);
            to[(block * 16 + i) * 8] = (unsigned short)pack_half(x[i], 0.f);
        }
    }
}

// 64 rows of k or q to their tile; rows from `rows` on become zeros.
__device__ __forceinline__ void bring(u32 tile, const bf16* from, long pitch, int rows, int thread) {
    constexpr int GROUPS = K / 8, EACH = (GROUPS + 3) / 4;
    uint4 x[2 * EACH];
    const int group = thread % 4;
#pragma unroll
    for (int i = 0; i < 2 * EACH; ++i) {
        const int row = thread / 4 + i / EACH * 32, column = group + i % EACH * 4;
        x[i] = uint4{0, 0, 0, 0};
        if (row < rows && column < GROUPS) x[i] = *(const uint4*)(from + row * pitch + column * 8);
    }
#pragma unroll
    for (int i = 0; i < 2 * EACH; ++i) {
        const int row = thread / 4 + i / EACH * 32, column = group + i % EACH * 4;
        if (column < GROUPS) store_shared16(tile + column * GROUP + row * 16, x[i]);
    }
}

extern "C" __global__ void __launch_bounds__(128, 4) prepare(const __grid_constant__ Prepare s) {
    extern __shared__ __align__(128) unsigned char memory[];
    const u32 base = shared_address(memory);
    float* const gates = (float*)(memory + AT_GATES);
    const int head = blockIdx.x % s.heads, chunk = blockIdx.x / s.heads, key_head = head / (s.heads / s.key_heads);
    const int thread = threadIdx.x, warp = __shfl_sync(0xffffffff, thread / 32, 0), lane = thread % 32;
    long first;
    int rows;
    if (!locate(s.bounds, s.offsets, s.sequences, s.time, chunk, first, rows)) return;
    unsigned char* const record = s.records + ((long)chunk * s.heads + head) * RECORD;
    const long pitch = (long)s.key_heads * K, start = first * pitch + key_head * K;
    bring(base, s.k + start, pitch, rows, thread);
    bring(base + KEY_TILE, s.q + start, pitch, rows, thread);
    if (warp == 0) {
        const int t0 = 2 * lane, t1 = t0 + 1;
        const float* g = s.g + first * s.heads + head;
        // the floor's exp is 0, and keeps a reset (-inf) from making inf - inf
        float x = t0 < rows ? fmaxf(g[(long)t0 * s.heads], -110.f) : 0.f;
        float y = t1 < rows ? fmaxf(g[(long)t1 * s.heads], -110.f) : 0.f;
        float sum = x + y;
        for (int i = 1; i < 32; i *= 2) {
            const float other = __shfl_up_sync(0xffffffff, sum, i);
            if (lane >= i) sum += other;
        }
        gates[t0] = sum - y, gates[t1] = sum;
    } else if (warp < 3) {
        const int t = thread - 32;
        gates[64 + t] = t < rows ? s.beta[(first + t) * s.heads + head] : 0.f;
    }
    fence_async();
    __syncthreads();
    if (thread == 0) deliver(record + AT_K, base, KEY_TILE), deliver(record + AT_Q, base + KEY_TILE, KEY_TILE);

    // Gram products: each warp's 16 rows of k and q against all k
    float kk[32], qk[32];
    {
        u32 left[K / 4];
        const u32 corner = base + lane / 16 * GROUP + (warp * 16 + lane / 8 % 2 * 8 + lane % 8) * 16;
#pragma unroll
        for (int i = 0; i < K / 16; ++i) load_matrix(left + 4 * i, corner + 2 * i * GROUP);
        mma_fence();
        product<K / 16>(kk, left, by_columns(base), false);
        mma_commit();
        mma_wait<0>();
#pragma unroll
        for (int i = 0; i < K / 16; ++i) load_matrix(left + 4 * i, corner + KEY_TILE + 2 * i * GROUP);
        mma_fence();
        product<K / 16>(qk, left, by_columns(base), false);
        mma_commit();
    }
    {  // lengths: k by the first 64 threads, q by the others
        const u32 row = base + thread / 64 * KEY_TILE + thread % 64 * 16;
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < K / 8; ++i) {
            const uint4 x = load_shared16(row + i * GROUP);
            sum += low(x.x) * low(x.x) + high(x.x) * high(x.x) + low(x.y) * low(x.y) + high(x.y) * high(x.y)
                 + low(x.z) * low(x.z) + high(x.z) * high(x.z) + low(x.w) * low(x.w) + high(x.w) * high(x.w);
        }
        gates[128 + thread] = (s.normalise ? rsqrtf(sum + 1e-6f) : 1.f) * (thread < 64 ? 1.f : s.scale);
    }
    mma_wait<0>();
    if (thread == 0) wait_delivered();  // L will lie where k and q do
    __syncthreads();

    // L to shared memory, P to the record
    {
        const int pair = lane % 4 * 2;
        float* const lower = (float*)(memory);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const int column = j * 8 + pair;
            const float2 gc = *(const float2*)(gates + column), kc = *(const float2*)(gates + 128 + column);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int row = warp * 16 + lane / 4 + r * 8;
                const float gr = gates[row], lr = gates[128 + row] * gates[64 + row], pr = gates[192 + row];
                const float d0 = row >= column ? exponential(gr - gc.x) * kc.x : 0.f;
                const float d1 = row >= column + 1 ? exponential(gr - gc.y) * kc.y : 0.f;
                lower[column * PITCH + row] = kk[4 * j + 2 * r] * lr * d0;  // on and above the diagonal never read
                lower[(column + 1) * PITCH + row] = kk[4 * j + 2 * r + 1] * lr * d1;
                *(u32*)(memory + AT_P + j * GROUP + row * 16 + pair * 2)
                    = pack(qk[4 * j + 2 * r] * pr * d0, qk[4 * j + 2 * r + 1] * pr * d1);
            }
        }
        if (warp < 2) {
            const int t = thread;
            const float g = gates[t], last = gates[63], into = exponential(g);
            const float k = t < rows ? gates[128 + t] : 0.f, q = t < rows ? gates[192 + t] : 0.f;
            float* const to = (float*)(record + AT_FACTORS) + t;
            to[0] = gates[64 + t];
            to[64] = gates[64 + t] * into * k;
            to[128] = into * q;
            to[192] = exponential(last - g) * k;
            to[256] = g;
            to[320] = k;
            to[384] = q;
            if (t == 63) *(float*)(record + AT_CARRY) = into;
        }
    }
    __syncthreads();

    // Forward substitution, a column to a thread, takes two of the four warps; which two goes round with the blocks,
    // so that all four schedulers of the multiprocessor get their share.
    const int turn = (warp + blockIdx.x) % 4;
    if (turn < 2) substitute(base, base + AT_SOLVED, memory + AT_T, turn * 32 + lane, turn * 2);
    fence_async();
    __syncthreads();
    if (thread == 0) {
        deliver(record + AT_INVERSE, base + AT_T, SQUARE), deliver(record + AT_SCORES, base + AT_P, SQUARE);
        wait_delivered();
    }
}
