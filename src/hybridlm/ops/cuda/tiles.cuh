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

// A record is what `prepare` leaves of a chunk and head: tiles as they lie in shared memory, fetched as one stretch.
//
//     k | T (float16) | factors [7, 64] float32 and exp(G_C) | q | P
//
// Factors by token, with r = 1 / |k| and t = scale / |q|: b = beta, f = beta exp(G) r, i = exp(G) t, e = exp(G_C - G) r,
// then G, r and t. Who needs no q and P stops before them.
constexpr int KEY_TILE = K / 8 * GROUP, SQUARE = CHUNK / 8 * GROUP;
constexpr int AT_K = 0, AT_INVERSE = KEY_TILE, AT_FACTORS = AT_INVERSE + SQUARE, AT_CARRY = AT_FACTORS + 1792,
              AT_Q = AT_CARRY + 32, AT_SCORES = AT_Q + KEY_TILE, RECORD = AT_SCORES + SQUARE;

// 64 rows of COLUMNS bf16 as they lie in memory, each BYTES long and PITCH apart here, fetched by a warp; rows from
// `rows` on become zeros. First the lane says how much it will fetch.
template <int COLUMNS> struct Lines {
    static constexpr int BYTES = COLUMNS * 2, PITCH = BYTES + 16, SIZE = CHUNK * PITCH;
    static __device__ __forceinline__ int expected(int rows, int lane) {
        return ((lane < rows) + (lane + 32 < rows)) * BYTES;
    }
    static __device__ __forceinline__ void clear(u32 to, int rows, int lane) {
        for (int row = lane; row < CHUNK; row += 32)
            if (row >= rows)
                for (int i = 0; i < BYTES; i += 16) store_shared16(to + row * PITCH + i, uint4{0, 0, 0, 0});
    }
    static __device__ __forceinline__ void bring(u32 to, const bf16* from, long pitch, int rows, int lane, u32 bar) {
        for (int row = lane; row < min(CHUNK, rows); row += 32) fetch(to + row * PITCH, from + row * pitch, BYTES, bar);
    }
};

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
