// One token of Gated DeltaNet for each row of a batch: convolution, SiLU, l2norm, gates, delta rule, gated RMSNorm.
//
// An item is one value head of one row. Its state, K x V float32, is one run of memory, and reading and writing it is all
// that takes time if nothing else is waited for. So a block stays, takes item after item, and has three kinds of warps:
// one that brings states into shared memory, STAGES of them in turns; a few that prepare what an item needs besides
// (convolution, gates, norms), an item ahead; and WARPS that take the state into registers, so that the next one can
// come, and write it back from there.
//
// A warp computes on 32 columns and every HALVES-th group of 4 rows, a lane on four columns of each fourth row. Both
// products with the state (k^T S, and q^T S for the output, which the update then corrects by (q.k) delta) come from one
// pass over it, which leaves it in registers; the norms of q and k are factors of the results.
//
// Defined before: HK, HV, K, V, W, HALVES, STAGES, BULK (the copy engine brings states), BF16 (activations and the convolution's past: bf16 or float).

#if BF16
typedef unsigned short Number;
__device__ __forceinline__ float widen(Number x) { return __uint_as_float((unsigned)x << 16); }
__device__ __forceinline__ Number narrow(float x) {
    const unsigned u = __float_as_uint(x);
    return (Number)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
#else
typedef float Number;
__device__ __forceinline__ float widen(Number x) { return x; }
__device__ __forceinline__ Number narrow(float x) { return x; }
#endif

struct Parameters {
    const Number *q, *k, *v, *a, *b, *gate;
    const float *taps_q, *taps_k, *taps_v, *ssm_a, *dt_bias, *norm;
    const long long *recurrent, *conv, *positions;
    Number* out;
    long long stride, out_stride;  // of rows, in numbers
    int taps_stride, layer, items;
    float eps, scale, strength;
};

constexpr int CHANNELS = 2 * HK * K + HV * V, COLUMNS = V / 4, BLOCKS = V / 32, ROWS = K / (4 * HALVES);
constexpr int WARPS = BLOCKS * HALVES, HELPERS = 3, HELP = 32 * HELPERS, THREADS = 32 * (WARPS + HELPERS + 1);
constexpr int MIXED = 2 * K + V, EACH = (MIXED + HELP - 1) / HELP, GATES = (V + HELP - 1) / HELP;
static_assert(V % 32 == 0 && K % (4 * HALVES) == 0, "sizes");
constexpr unsigned BYTES = 4 * K * V;  // of a state
static_assert(BYTES % 512 == 0, "copies are of 16 bytes a lane");

struct __align__(16) Prepared {  // of an item
    float2 kq[K];  // k and q after convolution and SiLU
    float v[V], gate[V];  // gate: SiLU of it times the norm's weight
    float decay, beta, products[3];  // |q|^2, |k|^2, q.k
    int real;
};

__device__ __forceinline__ float silu(float x) { return x / (1 + __expf(-x)); }

// -- waiting, and copies between global and shared memory -----------------------------------------------------------

__device__ __forceinline__ unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void make(unsigned long long* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void arrive(unsigned long long* barrier) {  // a warp, by its first lane
    __syncwarp();
    if (threadIdx.x % 32 == 0)
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void wait_for(unsigned long long* barrier, unsigned phase) {
    asm volatile("{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra again;\n}"
                 ::"r"(shared_address(barrier)), "r"(phase) : "memory");
}

template <int ID, int COUNT>
__device__ __forceinline__ void meet() {  // COUNT threads of the block
    asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(COUNT) : "memory");
}

// A state on its way: `loaded` completes a phase when it is there. By one warp.
__device__ __forceinline__ void bring(float* to, const char* from, unsigned long long* loaded) {
    const unsigned barrier = shared_address(loaded), lane = threadIdx.x % 32;
#if BULK
    if (lane) return;
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(BYTES) : "memory");
    constexpr unsigned PIECE = BYTES / 8;
#pragma unroll
    for (unsigned i = 0; i < BYTES; i += PIECE)
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                     ::"r"(shared_address(to) + i), "l"(from + i), "r"(PIECE), "r"(barrier) : "memory");
#else
    const unsigned at = shared_address(to) + 16 * lane;
    from += 16 * lane;
#pragma unroll 8
    for (unsigned i = 0; i < BYTES; i += 512)
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(at + i), "l"(from + i) : "memory");
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
#endif
}

// Item n of a block is blockIdx.x + n * gridDim.x, its state lies in stage n % STAGES, what is prepared in place n % 2. The
// address of a row that only fills up the batch is 0: nothing is copied for it.
__device__ __forceinline__ char* state_of(const Parameters& p, int item) {
    if (item >= p.items) return 0;
    const long long address = p.recurrent[item / HV];
    return address ? (char*)address + ((long long)p.layer * HV + item % HV) * BYTES : (char*)0;
}

// -- the three kinds of warps ---------------------------------------------------------------------------------------

__device__ __forceinline__ void move(const Parameters& p, float* states, unsigned long long* loaded,
                                     unsigned long long* done) {  // one warp
    for (int n = 0, item = blockIdx.x; item < p.items; n++, item += gridDim.x) {
        const int stage = n % STAGES;
        const char* from = state_of(p, item);
        if (n >= STAGES) wait_for(done + stage, (n / STAGES - 1) & 1);
        if (from) bring(states + stage * K * V, from, loaded + stage);
    }
}

struct Row {  // where an item's row has its memory
    bool real;
    int now;  // the place of its position in the ring
    Number* ring;
    __device__ Row(const Parameters& p, int item) {
        const int row = min(item, p.items - 1) / HV;
        real = p.recurrent[row] != 0;
        now = p.positions[row] % W;
        ring = (Number*)p.conv[row] + (long long)p.layer * W * CHANNELS;
    }
};

__device__ __forceinline__ int channel(int head, int c) {  // of the c-th of this head's q, k and v
    const int key_head = head / (HV / HK);
    return c < K ? key_head * K + c : c < 2 * K ? (HK + key_head - 1) * K + c : 2 * (HK - 1) * K + head * V + c;
}

struct Raw {  // what a helper's thread needs of an item, on its way
    Number fresh[EACH], past[EACH][W], gate[GATES], a, b;
    float tap[EACH][W], weight[GATES], bias, rate;

    __device__ void fetch_own(const Parameters& p, int item, const Row& row, int t) {  // of the layer and the past
        const int head = item % HV;
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            const int c = min(t + j * HELP, MIXED - 1), part = c < K ? 0 : c < 2 * K ? 1 : 2, at = channel(head, c);
            const float* taps = part == 0 ? p.taps_q + at : part == 1 ? p.taps_k + at - HK * K : p.taps_v + at - 2 * HK * K;
#pragma unroll
            for (int i = 0; i < W; i++) tap[j][i] = taps[i * p.taps_stride];
#pragma unroll
            for (int back = 1; back < W; back++) {
                const int place = row.now >= back ? row.now - back : row.now - back + W;
                past[j][back] = row.real ? row.ring[place * CHANNELS + at] : Number(0);
            }
        }
#pragma unroll
        for (int j = 0; j < GATES; j++) weight[j] = p.norm[min(t + j * HELP, V - 1)];
        bias = p.dt_bias[head], rate = p.ssm_a[head];
    }
    __device__ void fetch_given(const Parameters& p, int item, int t) {  // what the kernel before this one has made
        const int head = item % HV;
        const long long row = item / HV * p.stride;
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            const int c = min(t + j * HELP, MIXED - 1), part = c < K ? 0 : c < 2 * K ? 1 : 2, at = channel(head, c);
            fresh[j] = part == 0 ? p.q[row + at] : part == 1 ? p.k[row + at - HK * K] : p.v[row + at - 2 * HK * K];
        }
#pragma unroll
        for (int j = 0; j < GATES; j++) gate[j] = p.gate[row + head * V + min(t + j * HELP, V - 1)];
        a = p.a[row + head], b = p.b[row + head];
    }
};

// Three items are under way: one is computed, the loads of the next one are, and the addresses of the one after it.
__device__ __forceinline__ void prepare(const Parameters& p, Prepared* places, unsigned long long* full,
                                        unsigned long long* empty) {
    const int t = threadIdx.x - 32 * WARPS, warp = t / 32, lane = t % 32, step = gridDim.x;
    int item = blockIdx.x;
    Row row(p, item);
    Raw raw;
    raw.fetch_own(p, item, row, t);
    Row after(p, item + step);
    asm volatile("griddepcontrol.wait;" ::: "memory");  // what precedes may only now have written q, k, v, a, b, gate
    raw.fetch_given(p, item, t);
    for (int n = 0; item < p.items; n++, item += step) {
        Raw next;
        const Row later(p, item + 2 * step);
        if (item + step < p.items) {
            next.fetch_own(p, item + step, after, t);
            next.fetch_given(p, item + step, t);
        }
        const int head = item % HV;
        Prepared& to = places[n % 2];
        if (n > 1) wait_for(empty + n % 2, (n / 2 - 1) & 1);
        if (row.real) {
#pragma unroll
            for (int j = 0; j < EACH; j++) {
                const int c = t + j * HELP;
                if (c >= MIXED) continue;
                float y = widen(raw.fresh[j]) * raw.tap[j][W - 1];
#pragma unroll
                for (int back = 1; back < W; back++) y += widen(raw.past[j][back]) * raw.tap[j][W - 1 - back];
                if (c >= 2 * K || head % (HV / HK) == 0)  // nobody reads this place of the ring now
                    row.ring[row.now * CHANNELS + channel(head, c)] = raw.fresh[j];
                y = silu(y);
                if (c < K) to.kq[c].y = y;
                else if (c < 2 * K) to.kq[c - K].x = y;
                else to.v[c - 2 * K] = y;
            }
#pragma unroll
            for (int j = 0; j < GATES; j++)
                if (t + j * HELP < V) to.gate[t + j * HELP] = silu(widen(raw.gate[j])) * raw.weight[j];
            meet<3, HELP>();
            float sum = 0;  // a helper for each of the three
            for (int i = lane; i < K; i += 32) {
                const float2 x = to.kq[i];
                sum += (warp == 1 ? x.x : x.y) * (warp == 0 ? x.y : x.x);
            }
#pragma unroll
            for (int i = 16; i; i >>= 1) sum += __shfl_xor_sync(~0u, sum, i);
            if (!lane) to.products[warp] = sum;
        }
        if (t == 0) {
            const float rise = widen(raw.a) + raw.bias, softplus = fmaxf(rise, 0.f) + log1pf(expf(-fabsf(rise)));
            to.decay = expf(raw.rate * softplus), to.beta = p.strength / (1 + expf(-widen(raw.b))), to.real = row.real;
        }
        arrive(full + n % 2);
        raw = next, row = after, after = later;
    }
}

struct Meeting {  // what the computing warps tell each other, of this item and the one before
    float4 read[2][HALVES][COLUMNS], seen[2][HALVES][COLUMNS];
    float squares[2][BLOCKS];
};

__device__ __forceinline__ void add(float4& x, float4 y) { x.x += y.x, x.y += y.y, x.z += y.z, x.w += y.w; }

__device__ __forceinline__ float4 over_rows(float4 x) {  // the sum of the four rows of a warp
#pragma unroll
    for (int i = 8; i <= 16; i <<= 1)
        add(x, {__shfl_xor_sync(~0u, x.x, i), __shfl_xor_sync(~0u, x.y, i), __shfl_xor_sync(~0u, x.z, i),
                __shfl_xor_sync(~0u, x.w, i)});
    return x;
}

__device__ __forceinline__ void compute(const Parameters& p, float* states, const Prepared* places, Meeting& m,
                                        unsigned long long* loaded, unsigned long long* done,
                                        unsigned long long* full, unsigned long long* empty) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, half = warp / BLOCKS, block = warp % BLOCKS;
    const int part = lane / 8, column = block * 8 + lane % 8, first = 4 * half + part;
    unsigned phases = 0;  // one bit for each stage
    for (int n = 0, item = blockIdx.x; item < p.items; n++, item += gridDim.x) {
        const int stage = n % STAGES;
        const Prepared& x = places[n % 2];
        float4* home = (float4*)state_of(p, item) + first * COLUMNS + column;
        wait_for(full + n % 2, n / 2 & 1);
        if (x.real) {
            wait_for(loaded + stage, phases >> stage & 1);
            phases ^= 1u << stage;
            const float4* state = (const float4*)(states + stage * K * V) + first * COLUMNS + column;
            float4 s[ROWS], read = {0, 0, 0, 0}, seen = {0, 0, 0, 0};
            float keys[ROWS];
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                const float2 kq = x.kq[i * 4 * HALVES + first];
                keys[i] = kq.x;
                s[i] = state[i * 4 * HALVES * COLUMNS];
                read.x += kq.x * s[i].x, read.y += kq.x * s[i].y, read.z += kq.x * s[i].z, read.w += kq.x * s[i].w;
                seen.x += kq.y * s[i].x, seen.y += kq.y * s[i].y, seen.z += kq.y * s[i].z, seen.w += kq.y * s[i].w;
            }
            arrive(done + stage);
            read = over_rows(read), seen = over_rows(seen);
            if (part == 0) m.read[n % 2][half][column] = read;
            if (part == 1) m.seen[n % 2][half][column] = seen;
            const float q_size = rsqrtf(x.products[0] + 1e-6f) * p.scale, k_size = rsqrtf(x.products[1] + 1e-6f);
            const float4 value = ((const float4*)x.v)[column];
            const float fade = x.decay * k_size;
            meet<1, 32 * WARPS>();

            read = m.read[n % 2][0][column];
#pragma unroll
            for (int i = 1; i < HALVES; i++) add(read, m.read[n % 2][i][column]);
            const float4 delta = {x.beta * (value.x - fade * read.x), x.beta * (value.y - fade * read.y),
                                  x.beta * (value.z - fade * read.z), x.beta * (value.w - fade * read.w)};
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                const float k = keys[i] * k_size;
                home[i * 4 * HALVES * COLUMNS] = {x.decay * s[i].x + k * delta.x, x.decay * s[i].y + k * delta.y,
                                                  x.decay * s[i].z + k * delta.z, x.decay * s[i].w + k * delta.w};
            }
            if (half == 0) {
                seen = m.seen[n % 2][0][column];
#pragma unroll
                for (int i = 1; i < HALVES; i++) add(seen, m.seen[n % 2][i][column]);
                const float turn = x.decay * q_size, both = x.products[2] * q_size * k_size;
                const float o[4] = {turn * seen.x + both * delta.x, turn * seen.y + both * delta.y,
                                    turn * seen.z + both * delta.z, turn * seen.w + both * delta.w};
                float square = o[0] * o[0] + o[1] * o[1] + o[2] * o[2] + o[3] * o[3];
#pragma unroll
                for (int i = 1; i < 8; i <<= 1) square += __shfl_xor_sync(~0u, square, i);
                if (!lane) m.squares[n % 2][block] = square;
                meet<2, 32 * BLOCKS>();
                if (part == 0) {
                    float total = 0;
#pragma unroll
                    for (int i = 0; i < BLOCKS; i++) total += m.squares[n % 2][i];
                    const float size = rsqrtf(total / V + p.eps);
                    Number* out = p.out + (item / HV) * p.out_stride + (item % HV) * V + 4 * column;
#pragma unroll
                    for (int i = 0; i < 4; i++) out[i] = narrow(o[i] * size * x.gate[4 * column + i]);
                }
            }
        } else arrive(done + stage);
        arrive(empty + n % 2);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) gdn_decode(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(128) float states[];  // [STAGES][K][V]
    __shared__ __align__(16) Prepared places[2];
    __shared__ Meeting meeting;
    __shared__ unsigned long long loaded[STAGES], done[STAGES], full[2], empty[2];
    const int warp = threadIdx.x / 32;
    asm volatile("griddepcontrol.launch_dependents;");
    if (threadIdx.x == 32 * (WARPS + HELPERS)) {
        for (int i = 0; i < STAGES; i++) make(loaded + i, BULK ? 1 : 32), make(done + i, WARPS);
        for (int i = 0; i < 2; i++) make(full + i, HELPERS), make(empty + i, WARPS);
        asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    if (warp < WARPS) compute(p, states, places, meeting, loaded, done, full, empty);
    else if (warp < WARPS + HELPERS) prepare(p, places, full, empty);
    else move(p, states, loaded, done);
}
