// The loop over the chunks of a row: one warpgroup brings, the others carry the state through `step`.

extern "C" __global__ void __launch_bounds__((WARPGROUPS + 1) * 128, 1) scan(const __grid_constant__ Scan s) {
    extern __shared__ __align__(128) unsigned char memory[];
    const u32 base = shared_address(memory);
    const u32 full = base + STAGES * STAGE, empty = full + STAGES * 8;
    const int slabs = s.value_dim / VALUES;
    const int slab = blockIdx.x % slabs, head = blockIdx.x / slabs % s.heads, row = blockIdx.x / slabs / s.heads;
    long first = (long)row * s.time;
    int tokens = s.time, chunk = row * ((s.time + CHUNK - 1) / CHUNK);
    if (s.bounds) first = s.bounds[row], tokens = s.bounds[row + 1] - s.bounds[row], chunk = s.offsets[row];
    const int chunks = (tokens + CHUNK - 1) / CHUNK;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(full + i * 8, 32);
            barrier_init(empty + i * 8, WARPGROUPS * 4);
        }
        fence_async();
    }
    __syncthreads();

    const int group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);  // told to the compiler as uniform in a warp
    if (group == WARPGROUPS) {  // bring tiles
        if (WARPGROUPS > 1) release_registers<TIGHT ? 32 : 40>();
        const int lane = threadIdx.x % 128;
        const long pitch = (long)s.heads * s.value_dim;
        const bf16* v = s.v + first * pitch + (long)head * s.value_dim + slab * VALUES;
        const unsigned char* record = s.records + ((long)chunk * s.heads + head) * RECORD;
        constexpr int SIZE = OUTPUT || REVERSE ? RECORD : AT_Q;
        for (int n = 0; n < chunks && lane < 32; ++n) {
            const int stage = n % STAGES, c = REVERSE ? chunks - 1 - n : n, rows = tokens - c * CHUNK;
            const u32 at = base + stage * STAGE, bar = full + stage * 8;
            barrier_wait(empty + stage * 8, (n / STAGES & 1) ^ 1);
            Values::clear(at + AT_V, rows, lane);
            barrier_expect(bar, Values::expected(rows, lane) + (lane == 0 ? SIZE : 0));
            if (lane == 0) fetch(at, record + (long)c * s.heads * RECORD, SIZE, bar);
            Values::bring(at + AT_V, v + c * CHUNK * pitch, pitch, rows, lane, bar);
        }
    } else {
        if (WARPGROUPS > 1) claim_registers<TIGHT ? 160 : 232>();
        Place w;
        w.warp = threadIdx.x / 32 % 4, w.lane = threadIdx.x % 32, w.pair = w.lane % 4 * 2;
        w.own = group * 64 + w.warp * 16, w.value = slab * VALUES + w.own + w.lane / 4;
        w.corner = AT_V + (w.lane / 16 * 8 + w.lane % 8) * Values::PITCH + (w.own / 8 + (w.lane / 8 & 1)) * 16;
        w.pitch = (long)s.heads * s.value_dim;
        const long state = ((long)row * s.heads + head) * K * s.value_dim;
        bf16* const o = s.o + first * w.pitch + (long)head * s.value_dim + slab * VALUES + w.own;
        // tiles of 64 values, by chunk and head
        const int wide = s.value_dim / 64, tile = slab * WARPGROUPS + group;
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
            const long here = (((long)chunk + c) * s.heads + head) * wide + tile;
            if (s.states) {
                unsigned char* to = s.states + here * KEY_TILE + (w.value % 64) * 16 + w.pair * 2;
#pragma unroll
                for (int i = 0; i < K / 4; ++i) *(u32*)(to + i / 2 * GROUP + i % 2 * 128) = left[i];
            }
            barrier_wait(full + stage * 8, n / STAGES & 1);
            const float decay = load_shared(at + AT_CARRY);
#pragma unroll
            for (int j = 0; j < K / 2; ++j) state_t[j] *= decay;
            step(state_t, left, at, w, o + (long)c * CHUNK * w.pitch, s.tiles + here * SQUARE, tokens - c * CHUNK);
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
