// One token of Gated DeltaNet for each row of a batch: convolution, SiLU, l2norm, gates, delta rule, gated RMSNorm.
//
// An item is one value head of one row. Its state, K x V float32, is one run of memory, which the copy engine brings into
// shared memory and takes back: while a block computes with one state, the next ones are on their way in and the last
// one on its way out, STAGES in all, so the memory never waits for arithmetic. Blocks stay and take item after item.
//
// Thread t has four columns of every GROUPS-th row in registers. Both products with the state (k^T S, and q^T S for the
// output, which the update then corrects by (q.k) delta) come from one pass over them; the norms of q and k are factors
// of the results.
//
// Defined before: HK, HV, K, V, W, THREADS, STAGES, BF16 (activations and the convolution's past: bf16 or float).

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

constexpr int CHANNELS = 2 * HK * K + HV * V, COLUMNS = V / 4, GROUPS = THREADS / COLUMNS, ROWS = K / GROUPS;
static_assert(V % 4 == 0 && THREADS % COLUMNS == 0 && K % GROUPS == 0 && THREADS % 32 == 0 && THREADS >= 96, "sizes");
constexpr unsigned BYTES = 4 * K * V, PIECE = BYTES / 4;  // of a state; of one copy
static_assert(PIECE % 16 == 0, "copies are of whole 16 bytes");

__device__ __forceinline__ float sum_warp(float x) {
#pragma unroll
    for (int i = 16; i; i >>= 1) x += __shfl_xor_sync(~0u, x, i);
    return x;
}

__device__ __forceinline__ float silu(float x) { return x / (1 + __expf(-x)); }

// -- copies between global and shared memory ------------------------------------------------------------------------

__device__ __forceinline__ unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void bring(float* to, const char* from, unsigned barrier) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(BYTES) : "memory");
#pragma unroll
    for (unsigned i = 0; i < BYTES; i += PIECE)
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                     ::"r"(shared_address(to) + i), "l"(from + i), "r"(PIECE), "r"(barrier) : "memory");
}

__device__ __forceinline__ void take_back(char* to, const float* from) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n\tcp.async.bulk.commit_group;"
                 ::"l"(to), "r"(shared_address(from)), "r"(BYTES) : "memory");
}

__device__ __forceinline__ void wait_for(unsigned barrier, unsigned phase) {
    asm volatile("{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra again;\n}"
                 ::"r"(barrier), "r"(phase) : "memory");
}

extern "C" __global__ void __launch_bounds__(THREADS) gdn_decode(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(128) float states[];  // [STAGES][K][V]
    __shared__ __align__(16) float mixed[2 * K + V];  // q, k, v of this head after convolution and SiLU
    __shared__ float4 parts[2][GROUPS][COLUMNS];
    __shared__ float factors[3], squares[THREADS / 32];
    __shared__ unsigned long long barriers[STAGES];
    const int t = threadIdx.x, warp = t / 32, lane = t % 32, group = t / COLUMNS, column = t % COLUMNS;
    asm volatile("griddepcontrol.launch_dependents;");

    // Item n of this block is blockIdx.x + n * gridDim.x, and lies in stage n % STAGES. The address of a row that only
    // fills up the batch is 0: nothing is copied for it.
    const auto state_of = [&](int item) {
        const long long address = p.recurrent[item / HV];
        return address ? (char*)address + ((long long)p.layer * HV + item % HV) * BYTES : (char*)0;
    };
    if (t == 0) {
        for (int i = 0; i < STAGES; i++)
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barriers + i)) : "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        for (int n = 0; n < STAGES - 1; n++) {
            const int item = blockIdx.x + n * gridDim.x;
            char* from = item < p.items ? state_of(item) : 0;
            if (from) bring(states + n * K * V, from, shared_address(barriers + n));
        }
    }
    __syncthreads();
    asm volatile("griddepcontrol.wait;" ::: "memory");  // what precedes may still have been writing q, k, v, a, b, gate

    unsigned phases = 0;  // one bit for each stage
    for (int n = 0, item = blockIdx.x; item < p.items; n++, item += gridDim.x) {
        const int head = item % HV, row = item / HV, stage = n % STAGES, key_head = head / (HV / HK);
        char* home = state_of(item);
        float* state = states + stage * K * V;
        if (home) {
            Number* ring = (Number*)p.conv[row] + (long long)p.layer * W * CHANNELS;
            const int now = p.positions[row] % W;
            for (int c = t; c < 2 * K + V; c += THREADS) {
                const int part = c < K ? 0 : c < 2 * K ? 1 : 2;
                const int within = part == 0 ? key_head * K + c : part == 1 ? key_head * K + c - K : head * V + c - 2 * K;
                const Number* x = part == 0 ? p.q : part == 1 ? p.k : p.v;
                const float* taps = (part == 0 ? p.taps_q : part == 1 ? p.taps_k : p.taps_v) + within;
                Number* past = ring + (part == 0 ? 0 : part == 1 ? HK * K : 2 * HK * K) + within;
                const Number fresh = x[row * p.stride + within];
                float y = widen(fresh) * taps[(W - 1) * p.taps_stride];
#pragma unroll
                for (int back = 1; back < W; back++) {
                    const int place = now >= back ? now - back : now - back + W;
                    y += widen(past[place * CHANNELS]) * taps[(W - 1 - back) * p.taps_stride];
                }
                if (part == 2 || head % (HV / HK) == 0) past[now * CHANNELS] = fresh;  // nobody reads this place now
                mixed[c] = silu(y);
            }
            const float rise = widen(p.a[row * p.stride + head]) + p.dt_bias[head];
            const float softplus = fmaxf(rise, 0.f) + log1pf(expf(-fabsf(rise)));
            const float decay = expf(p.ssm_a[head] * softplus);
            const float beta = p.strength / (1 + expf(-widen(p.b[row * p.stride + head])));
            __syncthreads();
            if (warp < 3) {  // |q|^2, |k|^2, q.k
                const float *x = mixed + (warp == 1 ? K : 0), *y = mixed + (warp == 0 ? 0 : K);
                float sum = 0;
                for (int i = lane; i < K; i += 32) sum += x[i] * y[i];
                sum = sum_warp(sum);
                if (!lane) factors[warp] = sum;
            }
            wait_for(shared_address(barriers + stage), phases >> stage & 1);
            phases ^= 1u << stage;
            float4 s[ROWS], read = {0, 0, 0, 0}, seen = {0, 0, 0, 0};
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                const float q = mixed[i * GROUPS + group], k = mixed[K + i * GROUPS + group];
                s[i] = ((float4*)state)[i * THREADS + t];
                read.x += k * s[i].x, read.y += k * s[i].y, read.z += k * s[i].z, read.w += k * s[i].w;
                seen.x += q * s[i].x, seen.y += q * s[i].y, seen.z += q * s[i].z, seen.w += q * s[i].w;
            }
            parts[0][group][column] = read;
            parts[1][group][column] = seen;
            __syncthreads();

            const float q_size = rsqrtf(factors[0] + 1e-6f) * p.scale, k_size = rsqrtf(factors[1] + 1e-6f);
            const float both = factors[2] * q_size * k_size;
            read = {0, 0, 0, 0}, seen = {0, 0, 0, 0};
#pragma unroll
            for (int g = 0; g < GROUPS; g++) {
                const float4 x = parts[0][g][column];
                read.x += x.x, read.y += x.y, read.z += x.z, read.w += x.w;
            }
            const float4 value = ((const float4*)(mixed + 2 * K))[column];
            const float fade = decay * k_size;
            const float4 delta = {beta * (value.x - fade * read.x), beta * (value.y - fade * read.y),
                                  beta * (value.z - fade * read.z), beta * (value.w - fade * read.w)};
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                const float k = mixed[K + i * GROUPS + group] * k_size;
                s[i].x = decay * s[i].x + k * delta.x, s[i].y = decay * s[i].y + k * delta.y;
                s[i].z = decay * s[i].z + k * delta.z, s[i].w = decay * s[i].w + k * delta.w;
                ((float4*)state)[i * THREADS + t] = s[i];
            }
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            float o[4], square = 0;
            if (t < COLUMNS) {
#pragma unroll
                for (int g = 0; g < GROUPS; g++) {
                    const float4 y = parts[1][g][column];
                    seen.x += y.x, seen.y += y.y, seen.z += y.z, seen.w += y.w;
                }
                const float turn = decay * q_size;
                o[0] = turn * seen.x + both * delta.x, o[1] = turn * seen.y + both * delta.y;
                o[2] = turn * seen.z + both * delta.z, o[3] = turn * seen.w + both * delta.w;
                square = o[0] * o[0] + o[1] * o[1] + o[2] * o[2] + o[3] * o[3];
            }
            square = sum_warp(square);
            if (!lane) squares[warp] = square;
            __syncthreads();
            if (t == 0) take_back(home, state);
            if (t < COLUMNS) {
                float total = 0;
                for (int i = 0; i * 32 < COLUMNS; i++) total += squares[i];
                const float size = rsqrtf(total / V + p.eps);
                const Number* gate = p.gate + row * p.stride + head * V + 4 * t;
                Number* out = p.out + row * p.out_stride + head * V + 4 * t;
#pragma unroll
                for (int i = 0; i < 4; i++) out[i] = narrow(o[i] * size * p.norm[4 * t + i] * silu(widen(gate[i])));
            }
        }
        if (t == 0) {  // the stage of the item before this one takes the next, once that has been read out of it
            const int after = item + (STAGES - 1) * gridDim.x;
            char* from = after < p.items ? state_of(after) : 0;
            if (from) {
                if (home) asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
                else asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
                const int next = (n + STAGES - 1) % STAGES;
                bring(states + next * K * V, from, shared_address(barriers + next));
            }
        }
    }
    if (t == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
