// What the scans over chunks share: their parameters, what a stage of shared memory holds, who brings it, who stands
// where. The kernels are forward.cu and reverse.cu; scan.cu is the loop around either.

struct Scan {
    const unsigned char* records;    // [chunks, H, RECORD]
    const bf16* v;                   // [tokens, H, V]
    const int *bounds, *offsets;     // [rows + 1]: first token and first chunk of each row; null: `time` tokens a row
    const float* initial;            // [rows, H, K, V] or null for zeros
    float* final;                    // [rows, H, K, V] or null
    bf16* o;                         // [tokens, H, V], with OUTPUT
    unsigned char* tiles;            // [chunks, H, V / 64, SQUARE], without: W or dX, a tile for 64 values
    unsigned char* states;           // [chunks, H, V / 64, KEY_TILE]: 64 rows of S^T at each chunk's start, or null
    float* starts;                   // [rows, segments, H, K, V]: the state each segment but the first begins with
    float* transitions;              // [rows, segments, H, K, K], with SUMMARY: what a segment makes of a state
    int* kept;                       // [rows, segments, H], with SUMMARY: whether anything of it is left
    int heads, value_dim, time, segments, length;  // segments of `length` chunks, the last one of a row what is left
    float forget;                    // a state multiplied by less than this counts as forgotten
};

constexpr int VALUES = WARPGROUPS * 64;
typedef Lines<VALUES> Values;
constexpr int AT_V = RECORD, STAGE = RECORD + Values::SIZE;
constexpr bool TIGHT = WARPGROUPS > 2;  // 160 registers a thread do not hold both products with S^T at once

// Where a thread stands among the values of its block.
struct Place {
    int warp, lane, own, value, pair;  // own: the warp's first value in the tile; value: the lane's, in V
    u32 corner;                        // where the lane points for a 16 x 16 transposed access of the values
    long pitch;                        // elements from token to token of v and o
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

// A warp's [16 values, 64 tokens] of accumulators to memory, through its own part of the values: to o by token, or to
// their tile.
__device__ __forceinline__ void emit(const float (&x)[32], u32 at, const Place& w, bf16* o, unsigned char* tile, int rows) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
        store_transposed(at + w.corner + i * 16 * Values::PITCH, pack(x[8 * i], x[8 * i + 1]),
                         pack(x[8 * i + 2], x[8 * i + 3]), pack(x[8 * i + 4], x[8 * i + 5]),
                         pack(x[8 * i + 6], x[8 * i + 7]));
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int token = i * 16 + w.lane / 2, half = w.lane % 2;
        const uint4 r = load_shared16(at + AT_V + token * Values::PITCH + (w.own / 8 + half) * 16);
        if (!OUTPUT) *(uint4*)(tile + (w.warp * 2 + half) * GROUP + token * 16) = r;
        else if (token < rows) *(uint4*)(o + token * w.pitch + half * 8) = r;
    }
}
