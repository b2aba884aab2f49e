// The loop over the chunks of a row: one warpgroup brings, the others carry the state through `step`.
//
// A row may be cut into segments that run side by side. A segment turns the state it begins with into A S + B. With
// SUMMARY the segments find B, by running from zeros, and forward also A, by running without values from the identity;
// combine.cu makes of these the state that each segment begins with, and a second launch runs all of them from there. In
// reverse a segment makes A^T dS + B of a gradient. |A| is at most the product of the decays, as k has length 1 and
// beta is at most 2: where that falls below `forget`, A counts as zero, and B needs but the chunks after.

extern "C" __global__ void __launch_bounds__((WARPGROUPS + 1) * 128, 1) scan(const __grid_constant__ Scan s) {
    extern __shared__ __align__(128) unsigned char memory[];
    const u32 base = shared_address(memory);
    const u32 full = base + STAGES * STAGE, empty = full + STAGES * 8;
    const int of_values = s.value_dim / VALUES;
    const int slabs = of_values + (SUMMARY && !REVERSE ? (K + VALUES - 1) / VALUES : 0), place = blockIdx.x / slabs;
    const int head = place % s.heads, cuts = s.segments - SUMMARY, row = place / s.heads / cuts;
    const int segment = place / s.heads % cuts + (SUMMARY && REVERSE), last = s.segments - 1;
    const bool of_keys = blockIdx.x % slabs >= of_values, leads = segment == (REVERSE ? last : 0);
    const int slab = blockIdx.x % slabs - (of_keys ? of_values : 0);
    long first = (long)row * s.time;
    int tokens = s.time, chunk = row * ((s.time + CHUNK - 1) / CHUNK);
    if (s.bounds) first = s.bounds[row], tokens = s.bounds[row + 1] - s.bounds[row], chunk = s.offsets[row];
    if (s.segments > 1) {
        const int before = segment * s.length;
        first += before * CHUNK, chunk += before, tokens = min(tokens - before * CHUNK, s.length * CHUNK);
    }
    const int chunks = (tokens + CHUNK - 1) / CHUNK;
    int skipped = 0;
    bool whole = true;
    const long segment_head = ((long)row * s.segments + segment) * s.heads + head;
    if (SUMMARY) {
        float* const carries = (float*)memory;
        for (int c = threadIdx.x; c < chunks; c += (WARPGROUPS + 1) * 128)
            carries[c] = *(const float*)(s.records + ((long)(chunk + c) * s.heads + head) * RECORD + AT_CARRY);
        __syncthreads();
        float carry = 1.f;
        for (skipped = chunks; skipped > 0 && carry >= s.forget;)
            --skipped, carry *= carries[REVERSE ? chunks - 1 - skipped : skipped];
        whole = carry >= s.forget;
        fence_async();
        if (of_keys) {
            if (leads) return;
            if (slab == 0 && threadIdx.x == 0) s.kept[segment_head] = whole;
            if (!whole) return;
        }
        __syncthreads();
    }
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
        for (int n = 0; n + skipped < chunks && lane < 32; ++n) {
            const int stage = n % STAGES, c = REVERSE ? chunks - 1 - n - skipped : n + skipped;
            const int rows = of_keys ? 0 : tokens - c * CHUNK;
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
        const long size = (long)K * s.value_dim, state = ((long)row * s.heads + head) * size;
        const float* from = leads ? s.initial ? s.initial + state : 0 : s.starts + segment_head * size;
        if (SUMMARY && !(leads && whole)) from = 0;
        bf16* const o = s.o + first * w.pitch + (long)head * s.value_dim + slab * VALUES + w.own;
        // tiles of 64 values, by chunk and head
        const int wide = s.value_dim / 64, tile = slab * WARPGROUPS + group;
        float state_t[K / 2];
#pragma unroll
        for (int j = 0; j < K / 2; ++j) {
            const int key = j / 4 * 8 + w.pair + j % 2, column = w.value + j % 4 / 2 * 8;
            state_t[j] = from ? from[(long)key * s.value_dim + column] : of_keys && key == column ? 1.f : 0.f;
        }
        for (int n = 0; n + skipped < chunks; ++n) {
            const int stage = n % STAGES, c = REVERSE ? chunks - 1 - n - skipped : n + skipped;
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
        float* to = s.final && segment == (REVERSE ? 0 : last) ? s.final + state : 0;
        if (SUMMARY) to = of_keys ? s.transitions + segment_head * K * K
                                  : s.starts + (segment_head + (REVERSE ? -s.heads : s.heads)) * size;
        const int width = of_keys ? K : s.value_dim;
        if (to) {
#pragma unroll
            for (int j = 0; j < K / 2; ++j) {
                const int key = j / 4 * 8 + w.pair + j % 2, column = w.value + j % 4 / 2 * 8;
                if (!of_keys || column < K) to[(long)key * width + column] = state_t[j];
            }
        }
    }
}
