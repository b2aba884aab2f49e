// Long texts on processors with matrix tiles (AMX): weights and activations in bfloat16, sums in float32.
//
// A tile instruction multiplies 16 rows of x by 16 rows of weights over 32 columns. Quantised weights are unpacked to
// bfloat16 a stretch of columns at a time, scales applied, so that a tile sums over as many columns as there are; every
// unpacked weight meets all rows of x. Rounding to bfloat16 moves a number by up to 2^-9 of itself, less than 8-bit
// activations do. x is laid out in tiles beforehand: stretch by stretch, 16 rows by 16 rows, 32 columns a tile.
//
// A row of x gives the same numbers whatever other rows there are: each result is summed over the columns in order.
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "dispatch.h"

namespace hybridlm::amx {

#define HYBRIDLM_AVX512 1
#include "scalars.inl"
#include "lanes.h"
#include "blocks.inl"
#include "source.inl"

constexpr int64_t stretch = 16;        // blocks of 32 columns: 16 KB of each of two panels stay in the first cache
constexpr int64_t block_bytes = 1024;  // of a panel's block, or of a tile of x
constexpr int64_t sum_floats = 256;    // of a tile of results

// Two columns of bfloat16 in a dword, as tiles want them; ties go away from zero.
HYBRIDLM_INLINE U pair(F low, F high) {
    const U half = same(0x8000u);
    const U l = _mm512_add_epi32(_mm512_castps_si512(low), half), h = _mm512_add_epi32(_mm512_castps_si512(high), half);
    return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(l, 16), h);
}

struct ToTiles {
    uint8_t* out;
    template <class Q> HYBRIDLM_INLINE void put(int block, const U* w, F scale, F second) {
        const F bias = same_f(-static_cast<float>(Q::bias)), zero = zero_f();
        F offset = Q::minimum ? _mm512_sub_ps(zero, second) : times(bias, scale);
        uint8_t* to = out + block * block_bytes;
        for (int i = 0; i < 8; ++i) {
            if (Q::halves && i == 4) scale = second, offset = times(bias, scale);
            const F a = fused(byte<0>(w[i]), scale, offset), b = fused(byte<1>(w[i]), scale, offset);
            const F c = fused(byte<2>(w[i]), scale, offset), d = fused(byte<3>(w[i]), scale, offset);
            store(to + 128 * i, pair(a, b));
            store(to + 128 * i + 64, pair(c, d));
        }
    }
};

// Tiles 0 to 3 hold sums, 4 and 5 rows of x, 6 and 7 weights; all are 16 rows of 64 bytes.
void configure() {
    alignas(64) uint8_t shape[64] = {};
    shape[0] = 1;
    for (int i = 0; i < 8; ++i) shape[16 + 2 * i] = 64, shape[48 + i] = 16;
    asm volatile("ldtilecfg %0" ::"m"(shape));  // the intrinsic of some compilers forgets that it reads 64 bytes
}

// Tile instructions read and write memory behind the compiler's back: nothing may move across.
HYBRIDLM_INLINE void fence() { asm volatile("" ::: "memory"); }

// sums[i][j] += rows i of x times panel j over `blocks` blocks, for `tall` x `wide` tiles.
template <int tall, int wide>
void multiply(const uint16_t* x, int64_t x_step, const uint8_t* w, int64_t w_step, int64_t blocks, float* sums) {
    fence();
    _tile_loadd(0, sums, 64);
    if constexpr (wide > 1) _tile_loadd(1, sums + sum_floats, 64);
    if constexpr (tall > 1) _tile_loadd(2, sums + 2 * sum_floats, 64);
    if constexpr (tall > 1 && wide > 1) _tile_loadd(3, sums + 3 * sum_floats, 64);
    for (int64_t b = 0; b < blocks; ++b) {
        _tile_loadd(4, x, 64);
        _tile_loadd(6, w, 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (wide > 1) {
            _tile_loadd(7, w + w_step, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (tall > 1) {
            _tile_loadd(5, x + x_step, 64);
            _tile_dpbf16ps(2, 5, 6);
            if constexpr (wide > 1) _tile_dpbf16ps(3, 5, 7);
        }
        x += block_bytes / 2, w += block_bytes;
    }
    _tile_stored(0, sums, 64);
    if constexpr (wide > 1) _tile_stored(1, sums + sum_floats, 64);
    if constexpr (tall > 1) _tile_stored(2, sums + 2 * sum_floats, 64);
    if constexpr (tall > 1 && wide > 1) _tile_stored(3, sums + 3 * sum_floats, 64);
    fence();
}

int64_t blocks_of(int64_t cols) { return (cols + 255) / 256 * 8; }
int64_t tiles_of(int64_t t) { return (t + 15) / 16; }

struct Room {
    uint8_t *stage, *weights;
    float* sums;  // [pairs of panels][pairs of tiles of x][2 x 2 tiles]
    int64_t bytes;
};

Room room_of(int64_t t, int64_t panels, void* scratch) {
    uint8_t* base = static_cast<uint8_t*>(scratch);
    const int64_t staged = (stage_bytes + 63) / 64 * 64, unpacked = 2 * stretch * block_bytes;
    const int64_t pairs = (panels + 1) / 2 * ((tiles_of(t) + 1) / 2);
    return {base, base + staged, reinterpret_cast<float*>(base + staged + unpacked),
            staged + unpacked + pairs * 16 * sum_floats};
}

size_t scratch_bytes(int64_t t, int64_t panels) { return static_cast<size_t>(room_of(t, panels, nullptr).bytes); }

template <int type> void product_of(const uint8_t* data, int64_t rows, int64_t cols, int64_t first, int64_t last,
                                    const uint16_t* x, int64_t t, float* out, int64_t stride, void* scratch) {
    using Q = Blocks<type>;
    TypeInfo info{};
    type_info(type, info);
    const Room room = room_of(t, last - first, scratch);
    const Source source{data, rows, cols / info.block * info.bytes, room.stage};
    const int64_t blocks = blocks_of(cols), tiles = tiles_of(t), across = (tiles + 1) / 2;
    memset(room.sums, 0, static_cast<size_t>((last - first + 1) / 2 * across * 16 * sum_floats));
    configure();
    for (int64_t at = 0; at < blocks; at += stretch) {
        const int64_t n = smaller(stretch, blocks - at);
        const uint16_t* xs = x + at * tiles * (block_bytes / 2);
        const int64_t x_step = n * (block_bytes / 2), w_step = stretch * block_bytes;
        float* sums = room.sums;
        for (int64_t p = first; p < last; p += 2) {
            const bool two = p + 1 < last;
            for (int64_t i = 0; i < 1 + two; ++i) {
                for (int64_t u = 0; u < n / 8; ++u) {
                    size_t step;
                    const uint8_t* from = source.unit<Q>((p + i) * lanes, at / 8 + u, step);
                    ToTiles sink{room.weights + i * w_step + 8 * u * block_bytes};
                    Q::unit(from, step, sink);
                }
            }
            // Rows of weights lie too far apart for the hardware to fetch what comes next.
            const int64_t ahead = smaller(rows - (p + 2) * lanes, 2 * lanes);
            const uint8_t* next = data + (p + 2) * lanes * source.row_bytes + at / 8 * Q::unit_bytes;
            const int64_t bytes = smaller(n / 8 * Q::unit_bytes, source.row_bytes - at / 8 * Q::unit_bytes);
            if (p + 2 < last)
                for (int64_t r = 0; r < ahead; ++r)
                    for (int64_t line = 0; line < bytes; line += 64) fetch(next + r * source.row_bytes + line);
            for (int64_t i = 0; i < tiles; i += 2, sums += 4 * sum_floats) {
                const uint16_t* rows_of_x = xs + i * x_step;
                if (i + 1 < tiles && two) multiply<2, 2>(rows_of_x, x_step, room.weights, w_step, n, sums);
                else if (i + 1 < tiles) multiply<2, 1>(rows_of_x, x_step, room.weights, w_step, n, sums);
                else if (two) multiply<1, 2>(rows_of_x, x_step, room.weights, w_step, n, sums);
                else multiply<1, 1>(rows_of_x, x_step, room.weights, w_step, n, sums);
            }
        }
    }
    _tile_release();
    const float* sums = room.sums;
    for (int64_t p = first; p < last; p += 2) {
        for (int64_t i = 0; i < across; ++i, sums += 4 * sum_floats) {
            for (int64_t row = 0; row < smaller(32, t - 32 * i); ++row) {
                for (int64_t j = 0; j < smaller(2, last - p); ++j) {
                    const int64_t at = (p + j) * lanes, n = smaller(lanes, rows - at);
                    const float* from = sums + (row / 16 * 2 + j) * sum_floats + row % 16 * lanes;
                    memcpy(out + (32 * i + row) * stride + at, from, static_cast<size_t>(4 * n));
                }
            }
        }
    }
}

void product(int type, const uint8_t* data, int64_t rows, int64_t cols, int64_t first, int64_t last, const uint16_t* x,
             int64_t t, float* out, int64_t stride, void* scratch) {
    switch (type) {
        case Q8_0: return product_of<Q8_0>(data, rows, cols, first, last, x, t, out, stride, scratch);
        case Q4_0: return product_of<Q4_0>(data, rows, cols, first, last, x, t, out, stride, scratch);
        case Q5_0: return product_of<Q5_0>(data, rows, cols, first, last, x, t, out, stride, scratch);
        case Q4_K: return product_of<Q4_K>(data, rows, cols, first, last, x, t, out, stride, scratch);
        case Q5_K: return product_of<Q5_K>(data, rows, cols, first, last, x, t, out, stride, scratch);
        case Q6_K: return product_of<Q6_K>(data, rows, cols, first, last, x, t, out, stride, scratch);
        case IQ4_NL: return product_of<IQ4_NL>(data, rows, cols, first, last, x, t, out, stride, scratch);
    }
}

// 16 rows of x, the i-th ones, into their places; rows and columns that are not there are zero.
void arrange(const float* x, int64_t t, int64_t cols, int64_t i, uint16_t* out) {
    const int64_t blocks = blocks_of(cols), tiles = tiles_of(t);
    const __m512i one = _mm512_set1_epi32(1), most = _mm512_set1_epi32(0x7fff), nan = _mm512_set1_epi32(0x7fc00000);
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t at = b / stretch * stretch, n = smaller(stretch, blocks - at);
        uint16_t* to = out + (at * tiles + i * n + b - at) * (block_bytes / 2);
        for (int64_t row = 16 * i; row < 16 * i + 16; ++row) {
            for (int64_t c = 32 * b; c < 32 * b + 32; c += 16, to += 16) {
                const int64_t left = row < t ? smaller(16, cols - c) : 0;
                const __mmask16 there = left <= 0 ? 0 : static_cast<__mmask16>(0xffffu >> (16 - left));
                const __m512 v = _mm512_maskz_loadu_ps(there, x + row * cols + c);
                const __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
                __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, most));
                rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), nan);
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                                    _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
            }
        }
    }
}

size_t arranged_bytes(int64_t t, int64_t cols) { return static_cast<size_t>(tiles_of(t) * blocks_of(cols) * block_bytes); }

extern const TileKernels tiles;
const TileKernels tiles = {arrange, arranged_bytes, product, scratch_bytes};

}  // namespace hybridlm::amx
