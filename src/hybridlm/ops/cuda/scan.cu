// The loop over the chunks of a row: one warpgroup brings, the others carry the state through `step`.

extern "C" __global__ void __launch_bounds__((WARPGROUPS + 1) * 128, 1) scan(const __grid_constant__ Scan s) {
    extern __shared__ __align__(128) unsigned char memory[];
    const u32 base = shared_address(memory);
    const u32 full = base + STAGES * STAGE, empty = full + STAGES * 8, landed = empty + STAGES * 8;
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
            barrier_init(landed + i * 8, BRINGERS);
            barrier_init(full + i * 8, 1);
            barrier_init(empty + i * 8, WARPGROUPS * 4);
        }
        fence_async();
    }
    __syncthreads();

    const int group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);  // told to the compiler as uniform in a warp
    if (group == WARPGROUPS) {  // bring tiles
        if (WARPGROUPS > 1) release_registers<TIGHT ? 32 : 40>();
        const int thread = threadIdx.x % 128;
        const long key_pitch = (long)s.key_heads * K, value_pitch = (long)s.heads * s.value_dim;
        const int key_head = head / (s.heads / s.key_heads);
        const bf16* k = s.k + first * key_pitch + key_head * K;
        const bf16* q = s.q + first * key_pitch + key_head * K;
        const bf16* v = s.v + first * value_pitch + (long)head * s.value_dim + slab * VALUES;
        if (thread == BRINGERS)
            for (int n = 0; n < chunks; ++n) {
                const int bar = n % STAGES * 8;
                pass_on(landed + bar, full + bar, n / STAGES & 1);
            }
        for (int n = 0; n < chunks && thread < BRINGERS; ++n) {
            const int stage = n % STAGES, c = REVERSE ? chunks - 1 - n : n;
            const u32 at = base + stage * STAGE;
            barrier_wait(empty + stage * 8, (n / STAGES & 1) ^ 1);
            const int rows = tokens - c * CHUNK;
            const long square = (long)(chunk + c) * s.heads + head, token = (long)c * CHUNK;
            bring<K, BRINGERS>(at, k + token * key_pitch, key_pitch, rows, thread);
            bring<64, BRINGERS>(at + AT_INVERSE, s.inverse + square * 4096, 64, 64, thread);
            bring<VALUES, BRINGERS>(at + AT_V, v + token * value_pitch, value_pitch, rows, thread);
            if (thread < 64) copy16(at + AT_FACTORS + thread * 16, s.factors + square * 448 + thread * 4, true);
            if (thread == 64) copy4(at + AT_CARRY, s.carry + square);
            if (OUTPUT || REVERSE) {
                bring<K, BRINGERS>(at + AT_Q, q + token * key_pitch, key_pitch, rows, thread);
                bring<64, BRINGERS>(at + AT_SCORES, s.scores + square * 4096, 64, 64, thread);
            }
            barrier_arrive_copies(landed + stage * 8);
        }
        wait_copies();
    } else {
        if (WARPGROUPS > 1) claim_registers<TIGHT ? 160 : 232>();
        Place w;
        w.head = head, w.warp = threadIdx.x / 32 % 4, w.lane = threadIdx.x % 32, w.pair = w.lane % 4 * 2;
        w.own = group * 64 + w.warp * 16, w.value = slab * VALUES + w.own + w.lane / 4;
        w.corner = AT_V + (w.own / 8 + (w.lane / 8 & 1)) * GROUP + (w.lane / 16 * 8 + w.lane % 8) * 16;
        w.pitch = (long)s.heads * s.value_dim;
        const long state = ((long)row * s.heads + head) * K * s.value_dim;
        bf16* const o = s.o + first * w.pitch + (long)head * s.value_dim + slab * VALUES + w.own;
        float state_t[K / 2];
#pragma unroll
        for (int j = 0; j < K / 2; ++j) {
            const int key = j / 4 * 8 + w.pair + j % 2, column = w.value + j % 4 / 2 * 8;
            state_t[j] = s.initial ? s.initial[state + (long)key * s.value_dim + column] : 0.f;
        }
        for (int n = 0; n < chunks; ++n) {
            const int stage = n % STAGES, c = REVERSE ? chunks - 1 - n : n;
            const u32 at = base + stage * STAGE;
            u32 left[K / 4];
#pragma unroll
            for (int i = 0; i < K / 4; ++i) left[i] = pack(state_t[2 * i], state_t[2 * i + 1]);
            if (s.states) {
                u32* to = (u32*)(s.states + (((long)(chunk + c) * s.heads + head) * s.value_dim + w.value) * K + w.pair);
#pragma unroll
                for (int i = 0; i < K / 4; ++i) to[i / 2 * 4 + i % 2 * 4 * K] = left[i];
            }
            barrier_wait(full + stage * 8, n / STAGES & 1);
            const float decay = load_shared(at + AT_CARRY);
#pragma unroll
            for (int j = 0; j < K / 2; ++j) state_t[j] *= decay;
            step(state_t, left, at, w, o + (long)c * CHUNK * w.pitch, tokens - c * CHUNK);
            mma_wait<0>();
            __syncwarp();
            if (w.lane == 0) barrier_arrive(empty + stage * 8);
        }
        if (s.final) {
#pragma unroll
            for (int j = 0; j < K / 2; ++j) {
                const int key = j / 4 * 8 + w.pair + j % 2, column = w.value + j % 4 / 2 * 8;
                s.final[state + (long)key * s.value_dim + column] = state_t[j];
            }
        }
    }
}
