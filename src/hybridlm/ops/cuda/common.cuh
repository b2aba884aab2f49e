// Hopper building blocks of the gated delta rule kernels: bf16 conversion, shared-memory tiles, barriers, wgmma.
//
// No header is included, so NVRTC compiles this anywhere. A tile of R rows (tokens) by N columns of bf16 lies in
// shared memory as columns of 8: element (r, n) at byte (n / 8) * GROUP + r * 16 + (n % 8) * 2, with
// GROUP = R * 16 + 32. Eight rows of a column group are 128 bytes on end, which is the tensor cores' "core matrix"
// without swizzle, whether rows are their n (K-major) or their k (MN-major): one tile serves S k and S^T k^T alike.
// The extra 32 bytes keep neighbouring column groups in different banks.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short bf16;  // the bits

constexpr int CHUNK = 64;
constexpr int GROUP = CHUNK * 16 + 32;  // bytes from one group of 8 columns to the next

__device__ __forceinline__ u32 pack(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
__device__ __forceinline__ float low(u32 x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high(u32 x) { return __uint_as_float(x & 0xffff0000u); }

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// -- copies ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void copy16(u32 to, const void* from, bool valid) {  // zeros where not valid
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy4(u32 to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void load_matrix(u32* r, u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from) : "memory");
}
__device__ __forceinline__ void load_transposed(u32 (&r)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from) : "memory");
}
__device__ __forceinline__ void store_transposed(u32 to, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
__device__ __forceinline__ uint4 load_shared16(u32 from) {
    uint4 r;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "r"(from)
                 : "memory");
    return r;
}
__device__ __forceinline__ float load_shared(u32 from) {
    float r;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(r) : "r"(from) : "memory");
    return r;
}
__device__ __forceinline__ float4 load_shared_four(u32 from) {
    float4 r;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(r.x), "=f"(r.y), "=f"(r.z), "=f"(r.w) : "r"(from)
                 : "memory");
    return r;
}
__device__ __forceinline__ float2 load_shared_pair(u32 from) {
    float2 r;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(r.x), "=f"(r.y) : "r"(from) : "memory");
    return r;
}

// -- barriers -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(u32 bar, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 bar, u32 parity) {
    asm volatile("{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@p bra done;\nbra again;\ndone:\n}" ::"r"(bar), "r"(parity) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 bar) {
    asm volatile("{\n.reg .b64 t;\nmbarrier.arrive.shared::cta.b64 t, [%0];\n}" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void barrier_arrive_copies(u32 bar) {  // once this thread's copies so far have landed
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// -- tensor cores ---------------------------------------------------------------------------------------------------

// Descriptors of a B operand without swizzle, from the byte address of its first element.
__device__ __forceinline__ u64 descriptor(u32 address, u32 leading, u32 stride) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)(leading >> 4) << 16 | (u64)(stride >> 4) << 32;
}
// Rows are n, columns are k: the next 16 of k lie 2 * GROUP further.
__device__ __forceinline__ u64 by_columns(u32 address) {
    return SWAP_COLUMNS ? descriptor(address, 128, GROUP) : descriptor(address, GROUP, 128);
}
// Rows are k, columns are n: the next 16 of k lie 256 bytes further.
__device__ __forceinline__ u64 by_rows(u32 address) {
    return SWAP_ROWS ? descriptor(address, GROUP, 128) : descriptor(address, 128, GROUP);
}

__device__ __forceinline__ void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void mma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// d [64, 64] = a [64, 16 STEPS] times a tile whose rows are columns of d, and plus d if `add`.
template <int STEPS> __device__ __forceinline__ void product(float (&d)[32], const u32* a, u64 tile, bool add) {
#pragma unroll
    for (int i = 0; i < STEPS; ++i)
        if (i > 0 || add) add_64(d, a + 4 * i, tile + i * (2 * GROUP >> 4));
        else first_64(d, a, tile);
}

// -- tiles of a chunk -----------------------------------------------------------------------------------------------

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

