// The PTX that the kernels use (ptx.cuh and the wgmma wrappers), on a CPU: a block's threads are fibers that run in
// turn, warps meet where the hardware makes them meet, tensor cores read shared memory through real descriptors.
// What it cannot show: hazards of asynchronous work, since every copy and product here is done at once.

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <map>
#include <vector>

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short bf16;

#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__
#define __align__(n) __attribute__((aligned(n)))

struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint4 { u32 x, y, z, w; };
struct Index { int x; };

unsigned char memory[1 << 18] __attribute__((aligned(128)));
static Index threadIdx, blockIdx, gridDim;

// -- fibers ---------------------------------------------------------------------------------------------------------

struct Meeting {
    int arrived = 0, phase = 0;
};
struct Exchange {
    u32 lanes[32][4];
};
struct Signal {
    int count, pending, phase;
};
static ucontext_t scheduler;
static std::vector<ucontext_t> fibers;
static std::vector<bool> finished;
static int current, threads_of_block;
static Meeting block_meeting, warp_meetings[32], meetings[16];
static Exchange exchanges[32];
static std::map<u32, Signal> signals;
static void (*body)();

static void yield() {
    int me = current;
    swapcontext(&fibers[me], &scheduler);
}
static void meet(Meeting& m, int count) {
    int phase = m.phase;
    if (++m.arrived == count) m.arrived = 0, ++m.phase;
    else while (m.phase == phase) yield();
}
static void warp_meet() { meet(warp_meetings[threadIdx.x / 32], 32); }
static void enter() {
    body();
    finished[current] = true;
    swapcontext(&fibers[current], &scheduler);
}
static void run_block(int block, int threads, void (*f)()) {
    static std::vector<char> stacks(1024 * 65536);
    body = f, threads_of_block = threads;
    fibers.assign(threads, {}), finished.assign(threads, false), signals.clear();
    for (auto& m : warp_meetings) m = Meeting();
    block_meeting = Meeting();
    memset(memory, 0xff, sizeof memory);  // NaNs, where nothing is written
    for (int i = 0; i < threads; ++i) {
        getcontext(&fibers[i]);
        fibers[i].uc_stack.ss_sp = &stacks[i * 65536];
        fibers[i].uc_stack.ss_size = 65536;
        makecontext(&fibers[i], enter, 0);
    }
    int left = threads;
    for (long turn = 0; left; ++turn) {
        if (turn > 20000) { for (int w = 0; w < threads / 32; ++w) fprintf(stderr, "warp %d: %d there, finished %d\n", w, warp_meetings[w].arrived, (int)finished[w * 32]); for (auto& m : meetings) fprintf(stderr, "%d ", m.arrived); for (auto& s : signals) fprintf(stderr, "[%u: %d of %d, %d] ", s.first, s.second.pending, s.second.count, s.second.phase); fprintf(stderr, "deadlock\n"); abort(); }
        left = 0;
        for (current = 0; current < threads; ++current)
            if (!finished[current]) {
                ++left;
                threadIdx.x = current, blockIdx.x = block;
                swapcontext(&scheduler, &fibers[current]);
            }
    }
}

// -- what CUDA has built in -----------------------------------------------------------------------------------------

static void __syncthreads() { meet(block_meeting, threads_of_block); }
static void __syncwarp() { warp_meet(); }
static inline float __uint_as_float(u32 x) { float r; memcpy(&r, &x, 4); return r; }
static inline u32 as_bits(float x) { u32 r; memcpy(&r, &x, 4); return r; }
static inline u32 __float_as_uint(float x) { return as_bits(x); }
static inline int min(int a, int b) { return a < b ? a : b; }
static inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
static u32 shuffle(u32 x, int from) {
    Exchange& e = exchanges[threadIdx.x / 32];
    e.lanes[threadIdx.x % 32][0] = x;
    warp_meet();
    u32 r = e.lanes[from & 31][0];
    warp_meet();
    return r;
}
static int __shfl_sync(u32, int x, int from) { return (int)shuffle((u32)x, from); }
static float __shfl_xor_sync(u32, float x, int by) {
    return __uint_as_float(shuffle(as_bits(x), threadIdx.x % 32 ^ by));
}
static float __shfl_down_sync(u32, float x, int by) {
    int lane = threadIdx.x % 32;
    return __uint_as_float(shuffle(as_bits(x), lane + by < 32 ? lane + by : lane));
}
static float __shfl_up_sync(u32, float x, int by) {
    int lane = threadIdx.x % 32;
    return __uint_as_float(shuffle(as_bits(x), lane >= by ? lane - by : lane));
}

// -- ptx.cuh --------------------------------------------------------------------------------------------------------

static inline u32 rounded(float x) {
    u32 b = as_bits(x);
    return (b & 0x7fffffff) > 0x7f800000 ? 0x7fff : (b + 0x7fff + (b >> 16 & 1)) >> 16;
}
static inline u32 pack(float low, float high) { return rounded(high) << 16 | rounded(low); }
static inline u32 half_bits(float x) { _Float16 h = (_Float16)x; unsigned short r; memcpy(&r, &h, 2); return r; }
static inline u32 pack_half(float low, float high) { return half_bits(high) << 16 | half_bits(low); }
static inline float low(u32 x) { return __uint_as_float(x << 16); }
static inline float high(u32 x) { return __uint_as_float(x & 0xffff0000u); }
static inline float widened(bf16 x) { return __uint_as_float((u32)x << 16); }
static inline u32 shared_address(const void* p) { return (const unsigned char*)p - memory; }
static inline float exponential(float x) { return expf(x); }

static void check(u32 address, int size) {
    if (address % size || address + size > sizeof memory) { fprintf(stderr, "bad shared address %u\n", address); abort(); }
}
static void fetch(u32 to, const void* from, int bytes, u32) {
    check(to, 16);
    if ((u64)from % 16 || bytes % 16) { fprintf(stderr, "unaligned fetch\n"); abort(); }
    memcpy(memory + to, from, bytes);
}
static void deliver(void* to, u32 from, int bytes) {
    check(from, 16);
    if ((u64)to % 16 || bytes % 16) { fprintf(stderr, "unaligned delivery\n"); abort(); }
    memcpy(to, memory + from, bytes);
}
static void wait_delivered() {}

// Each lane names a row of 16 bytes of matrix lane / 8; lane l then holds elements of row l / 4 (or column, transposed).
static void matrices(u32* r, u32 from, bool transposed) {
    Exchange& e = exchanges[threadIdx.x / 32];
    int lane = threadIdx.x % 32;
    check(from, 16);
    e.lanes[lane][0] = from;
    warp_meet();
    for (int m = 0; m < 4; ++m) {
        bf16 two[2];
        for (int i = 0; i < 2; ++i) {
            int row = transposed ? lane % 4 * 2 + i : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + i;
            memcpy(two + i, memory + e.lanes[m * 8 + row][0] + column * 2, 2);
        }
        r[m] = (u32)two[1] << 16 | two[0];
    }
    warp_meet();
}
static void load_matrix(u32* r, u32 from) { matrices(r, from, false); }
static void load_transposed(u32* r, u32 from) { matrices(r, from, true); }
static void stored(u32 to, u32 a, u32 b, u32 c, u32 d, bool transposed);
static void store_transposed(u32 to, u32 a, u32 b, u32 c, u32 d) { stored(to, a, b, c, d, true); }
static void store_matrix(u32 to, u32 a, u32 b, u32 c, u32 d) { stored(to, a, b, c, d, false); }
static void stored(u32 to, u32 a, u32 b, u32 c, u32 d, bool transposed) {
    Exchange& e = exchanges[threadIdx.x / 32];
    int lane = threadIdx.x % 32;
    check(to, 16);
    e.lanes[lane][0] = to;
    warp_meet();
    u32 r[4] = {a, b, c, d};
    for (int m = 0; m < 4; ++m)
        for (int i = 0; i < 2; ++i) {
            bf16 x = (bf16)(r[m] >> 16 * i);
            int row = transposed ? lane % 4 * 2 + i : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + i;
            memcpy(memory + e.lanes[m * 8 + row][0] + column * 2, &x, 2);
        }
    warp_meet();
}
template <typename T> static T from_shared(u32 from) {
    T r;
    check(from, sizeof r);
    memcpy(&r, memory + from, sizeof r);
    return r;
}
static uint4 load_shared16(u32 from) { return from_shared<uint4>(from); }
static u32 load_shared4(u32 from) { return from_shared<u32>(from); }
static void store_shared(u32 to, float x) { check(to, 4); memcpy(memory + to, &x, 4); }
static void store_shared16(u32 to, uint4 x) { check(to, 16); memcpy(memory + to, &x, 16); }
static float load_shared(u32 from) { return from_shared<float>(from); }
static float4 load_shared_four(u32 from) { return from_shared<float4>(from); }
static float2 load_shared_pair(u32 from) { return from_shared<float2>(from); }

static void barrier_init(u32 bar, int count) { signals[bar] = {count, count, 0}; }
static void barrier_arrive(u32 bar) {
    Signal& s = signals.at(bar);
    if (--s.pending == 0) s.pending = s.count, ++s.phase;
}
static void barrier_wait(u32 bar, u32 parity) { while ((signals.at(bar).phase & 1) == (int)parity) yield(); }
static void barrier_expect(u32 bar, int) { barrier_arrive(bar); }
template <int ID, int THREADS> static void rendezvous() { meet(meetings[ID], THREADS); }
static void fence_async() {}
static void mma_fence() {}
static void mma_commit() {}
template <int N> static void mma_wait() {}
template <int N> static void release_registers() {}
template <int N> static void claim_registers() {}

// A fragment of a as a wgmma reads it from shared memory, with k along its rows.
static void fragment(u32 (&r)[4], u64 a) {
    u32 start = (a & 0x3fff) << 4, leading = (a >> 16 & 0x3fff) << 4, stride = (a >> 32 & 0x3fff) << 4;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    for (int i = 0; i < 4; ++i) {
        int row = warp * 16 + lane / 4 + i % 2 * 8;
        memcpy(r + i, memory + start + row / 8 * stride + i / 2 * leading + row % 8 * 16 + lane % 4 * 4, 4);
    }
}
// d [64, WIDTH] (+)= a [64, 16] b: a warp has 16 rows of d and a.
static float as_half(u32 x) { unsigned short b = x; _Float16 h; memcpy(&h, &b, 2); return (float)h; }
template <int WIDTH, bool HALF = false> static void wgmma(float* d, const u32* a, u64 b, bool rows_are_k, bool add) {
    Exchange& e = exchanges[threadIdx.x / 32];
    int lane = threadIdx.x % 32;
    for (int i = 0; i < 4; ++i) e.lanes[lane][i] = a[i];
    warp_meet();
    u32 start = (b & 0x3fff) << 4, leading = (b >> 16 & 0x3fff) << 4, stride = (b >> 32 & 0x3fff) << 4;
    for (int j = 0; j < WIDTH / 2; ++j) {
        int row = lane / 4 + j % 4 / 2 * 8, n = j / 4 * 8 + lane % 4 * 2 + j % 2;
        float sum = 0;
        for (int k = 0; k < 16; ++k) {
            u32 pair = e.lanes[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
            u32 at = start + n / 8 * stride + k / 8 * leading + (rows_are_k ? k % 8 * 16 + n % 8 * 2 : n % 8 * 16 + k % 8 * 2);
            bf16 x;
            memcpy(&x, memory + at, 2);
            if (HALF) sum += as_half(k % 2 ? pair >> 16 : pair) * as_half(x);
            else sum += (k % 2 ? high(pair) : low(pair)) * widened(x);
        }
        d[j] = add ? d[j] + sum : sum;
    }
    warp_meet();
}
static void first_64(float (&d)[32], const u32* a, u64 b) { wgmma<64>(d, a, b, false, false); }
static void add_64(float (&d)[32], const u32* a, u64 b) { wgmma<64>(d, a, b, false, true); }
static void first_64_half(float (&d)[32], const u32* a, u64 b) { wgmma<64, true>(d, a, b, false, false); }
static void add_64_half(float (&d)[32], const u32* a, u64 b) { wgmma<64, true>(d, a, b, false, true); }
static void first_64_rows_half(float (&d)[32], const u32* a, u64 b) { wgmma<64, true>(d, a, b, true, false); }
static void add_64_rows_half(float (&d)[32], const u32* a, u64 b) { wgmma<64, true>(d, a, b, true, true); }
static void add_64_rows(float (&d)[32], const u32* a, u64 b) { wgmma<64>(d, a, b, true, true); }
static void add_keys(float (&d)[K / 2], const u32* a, u64 b) { wgmma<K>(d, a, b, true, true); }
static void add_64_shared(float (&d)[32], u64 a, u64 b) { u32 r[4]; fragment(r, a); wgmma<64>(d, r, b, false, true); }
static void add_keys_shared(float (&d)[K / 2], u64 a, u64 b) { u32 r[4]; fragment(r, a); wgmma<K>(d, r, b, true, true); }
