// What the scans over chunks share: their parameters, what a stage of shared memory holds, who brings it, who stands
// where. The kernels are forward.cu and reverse.cu; scan.cu is the loop around either.

struct Scan {
    const bf16 *q, *k, *v;           // [tokens, HK, K], [tokens, H, V]
    const bf16 *inverse, *scores;    // T and P [chunks, H, 64, 64]
    const float *factors, *carry;    // [chunks, H, 7, 64], whose first four are b, f, i, e; d [chunks, H]
    const int *bounds, *offsets;     // [rows + 1]: first token and first chunk of each row; null: `time` tokens a row
    const float* initial;            // [rows, H, K, V] or null for zeros
    float* final;                    // [rows, H, K, V] or null
    bf16* o;                         // [tokens, H, V]: with OUTPUT o, without it the writes W
    bf16* states;                    // [chunks, H, V, K]: S^T at each chunk's start, or null
    int heads, key_heads, value_dim, time, split;  // even rows may come in parts of `split` chunks, each its own row
};

constexpr int KEY_TILE = K / 8 * GROUP;
constexpr int SQUARE_TILE = CHUNK / 8 * GROUP;
constexpr int VALUES = WARPGROUPS * 64;
constexpr int VALUE_TILE = VALUES / 8 * GROUP;
constexpr int AT_Q = KEY_TILE, AT_INVERSE = 2 * KEY_TILE, AT_SCORES = AT_INVERSE + SQUARE_TILE,
              AT_V = AT_SCORES + SQUARE_TILE, AT_FACTORS = AT_V + VALUE_TILE, AT_CARRY = AT_FACTORS + 1024, STAGE = AT_CARRY + 32;
constexpr bool TIGHT = WARPGROUPS > 2;  // 160 registers a thread do not hold both products with S^T at once

// Where a thread stands among the values of its block.
struct Place {
    int head, warp, lane, own, value, pair;  // own: the warp's first value column in the tile; value: the lane's, in V
    u32 corner;                              // where the lane points for a 16 x 16 transposed access of the value tile
    long pitch;                              // elements from token to token of v and o
};

// A warp's [16 values, 64 tokens], each row brought to [1, 2) by a power of two, as a left factor in float16, for products
// with T; `x` is multiplied back by `down` afterwards.
__device__ __forceinline__ void halved(u32 (&left)[16], float (&down)[2], const float (&x)[32]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float top = 0.f;
#pragma unroll
        for (int i = 2 * r; i < 32; i += 4) top = fmaxf(top, fmaxf(fabsf(x[i]), fabsf(x[i + 1])));
        top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 2));
        const u32 power = __float_as_uint(top) & 0x7f800000;
        const float up = __uint_as_float(0x7f000000 - power);
        down[r] = __uint_as_float(power);
#pragma unroll
        for (int i = r; i < 16; i += 2) left[i] = pack_half(x[2 * i] * up, x[2 * i + 1] * up);
    }
}
__device__ __forceinline__ void restore(float (&x)[32], const float (&down)[2]) {
#pragma unroll
    for (int i = 0; i < 32; ++i) x[i] *= down[i % 4 / 2];
}

// A warp's [16 values, 64 tokens] of accumulators to memory, token by token, through its own part of the value tile.
__device__ __forceinline__ void emit(const float (&x)[32], u32 corner, u32 column, bf16* to, long pitch, int rows,
                                     int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
        store_transposed(corner + i * 256, pack(x[8 * i], x[8 * i + 1]), pack(x[8 * i + 2], x[8 * i + 3]),
                         pack(x[8 * i + 4], x[8 * i + 5]), pack(x[8 * i + 6], x[8 * i + 7]));
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int token = i * 16 + lane / 2;
        const uint4 r = load_shared16(column + lane % 2 * GROUP + token * 16);
        if (token < rows) *(uint4*)(to + token * pitch + lane % 2 * 8) = r;
    }
}

