// Tiles in shared memory, and the products with them.
//
// A tile of 64 rows (tokens) by N columns of bf16 lies in shared memory as columns of 8: element (r, n) at byte
// (n / 8) * GROUP + r * 16 + (n % 8) * 2. Eight rows of a column group are 128 bytes on end, which is the tensor cores'
// "core matrix" without swizzle, whether rows are their n (K-major) or their k (MN-major): one tile serves S k and
// S^T k^T alike. The extra 32 bytes of a group keep neighbouring groups in different banks.

constexpr int CHUNK = 64;
constexpr int GROUP = CHUNK * 16 + 32;  // bytes from one group of 8 columns to the next

// Descriptors of a B operand without swizzle, from the byte address of its first element.
__device__ __forceinline__ u64 descriptor(u32 address, u32 leading, u32 stride) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)(leading >> 4) << 16 | (u64)(stride >> 4) << 32;
}
// Rows are n, columns are k: the next 16 of k lie 2 * GROUP further.
__device__ __forceinline__ u64 by_columns(u32 address) {
    return descriptor(address, GROUP, 128);
}
// Rows are k, columns are n: the next 16 of k lie 256 bytes further.
__device__ __forceinline__ u64 by_rows(u32 address) {
    return descriptor(address, 128, GROUP);
}

// d [64, 64] = a [64, 16 STEPS] times a tile whose rows are columns of d, and plus d if `add`.
template <int STEPS> __device__ __forceinline__ void product(float (&d)[32], const u32* a, u64 tile, bool add) {
#pragma unroll
    for (int i = 0; i < STEPS; ++i)
        if (i > 0 || add) add_64(d, a + 4 * i, tile + i * (2 * GROUP >> 4));
        else first_64(d, a, tile);
}

// 64 rows of COLUMNS bf16, `pitch` elements from row to row, into a tile by THREADS threads; rows from `rows` on become
// zeros.
template <int COLUMNS, int THREADS> __device__ __forceinline__ void bring(u32 tile, const bf16* from, long pitch, int rows,
                                                                          int thread) {
    constexpr int GROUPS = COLUMNS / 8, LINES = THREADS / 4;
    const int group = thread % 4;
#pragma unroll 1  // whoever brings has few registers
    for (int row = thread / 4; row < CHUNK; row += LINES) {
        const bool valid = row < rows;
        const bf16* at = from + (valid ? row * pitch : 0) + group * 8;
        const u32 to = tile + group * GROUP + row * 16;
#pragma unroll
        for (int j = 0; j < GROUPS; j += 4)
            if (GROUPS % 4 == 0 || j + group < GROUPS) copy16(to + j * GROUP, at + j * 8, valid);
    }
}

// Tiles are brought by 96 threads of a warpgroup, with copies of the ordinary kind. Before the tensor cores may read
// what those wrote, a fence is due that waits for all earlier stores of the thread it is in. The fourth warp, which
// stores nothing, stands for everybody: it passes on what has `landed` as `full`.
constexpr int BRINGERS = 96;

__device__ __forceinline__ void pass_on(u32 landed, u32 full, u32 parity) {
    barrier_wait(landed, parity);
    fence_async();
    barrier_arrive(full);
}

// The tokens of a chunk, counted through all sequences: its first one and how many; false for a chunk nobody has.
__device__ __forceinline__ bool locate(const int* bounds, const int* offsets, int sequences, int time, int chunk,
                                       long& first, int& rows) {
    if (!bounds) {
        const int chunks = (time + CHUNK - 1) / CHUNK, n = chunk % chunks;
        first = (long)(chunk / chunks) * time + n * CHUNK;
        rows = min(CHUNK, time - n * CHUNK);
        return true;
    }
    if (chunk >= offsets[sequences]) return false;
    int low = 0, high = sequences;  // the sequence with offsets[n] <= chunk < offsets[n + 1]
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (offsets[middle] <= chunk) low = middle;
        else high = middle;
    }
    first = bounds[low] + (chunk - offsets[low]) * CHUNK;
    rows = min(CHUNK, int(bounds[low + 1] - first));
    return true;
}
