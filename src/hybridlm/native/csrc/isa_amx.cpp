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

constexpr int64_t stretch = 8;         // blocks of 32 columns: with two tiles of x all fits into the first cache
constexpr int64_t together = 2;        // stretches that are unpacked at a time: whole cache lines of weights
constexpr int64_t block_bytes = 1024;  // of a panel's block, or of a tile of x
constexpr int64_t pair_floats = 1024;  // of 32 rows of x times 32 of weights

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

// sums[i][j] += rows i of x times panel j over a stretch, for `tall` x `wide` tiles; from zero where `fresh`.
template <int tall, int wide> void multiply(const uint16_t* x, const uint8_t* w, bool fresh, float* sums) {
    constexpr int64_t x_step = stretch * block_bytes / 2, w_step = stretch * block_bytes;
    fence();
    if (fresh) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 128);
        if constexpr (wide > 1) _tile_loadd(1, sums + 16, 128);
        if constexpr (tall > 1) _tile_loadd(2, sums + 512, 128);
        if constexpr (tall > 1 && wide > 1) _tile_loadd(3, sums + 528, 128);
    }
    for (int64_t b = 0; b < stretch; ++b) {
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
    _tile_stored(0, sums, 128);
    if constexpr (wide > 1) _tile_stored(1, sums + 16, 128);
    if constexpr (tall > 1) _tile_stored(2, sums + 512, 128);
    if constexpr (tall > 1 && wide > 1) _tile_stored(3, sums + 528, 128);
    fence();
}

void multiply(int64_t tall, int64_t wide, const uint16_t* x, const uint8_t* w, bool fresh, float* sums) {
    if (tall == 2 && wide == 2) multiply<2, 2>(x, w, fresh, sums);
    else if (tall == 2) multiply<2, 1>(x, w, fresh, sums);
    else if (wide == 2) multiply<1, 2>(x, w, fresh, sums);
    else multiply<1, 1>(x, w, fresh, sums);
}

// Fetches the weights that come next, a little at a time: their rows lie too far apart for the hardware to do it. Of two
// neighbouring lines one is asked for; memory gives both.
struct Ahead {
    const uint8_t* at = nullptr;
    int64_t row_bytes = 0, run = 0, left = 0, now = 0;  // bytes of a row, lines that are left, bytes into the run

    template <class Q> static Ahead of(const Source& s, int64_t panel, int64_t unit, int64_t units) {
        const int64_t rows = smaller(s.rows - panel * lanes, 2 * lanes);
        const int64_t run = smaller(units * Q::unit_bytes, s.row_bytes - unit * Q::unit_bytes);
        return {s.data + panel * lanes * s.row_bytes + unit * Q::unit_bytes, s.row_bytes, run, rows * ((run + 127) / 128), 0};
    }

    void step(int64_t n) {
        for (; n > 0 && left > 0; --n, --left) {
            fetch(at + now);
            now += 128;
            if (now >= run) now = 0, at += row_bytes;
        }
    }
};

int64_t blocks_of(int64_t cols) { return (cols + 255) / 256 * 8; }
int64_t tiles_of(int64_t t) { return (t + 15) / 16; }

struct Room {
    uint8_t *stage, *weights;
    float* sums;  // [pairs of panels][pairs of tiles of x][32 rows][32 lanes]
    int64_t bytes;
};

Room room_of(int64_t t, int64_t panels, void* scratch) {
    uint8_t* base = static_cast<uint8_t*>(scratch);
    const int64_t staged = (stage_bytes + 63) / 64 * 64, unpacked = together * 2 * stretch * block_bytes;
    const int64_t pairs = (panels + 1) / 2 * ((tiles_of(t) + 1) / 2);
    return {base, base + staged, reinterpret_cast<float*>(base + staged + unpacked),
            staged + unpacked + pairs * 4 * pair_floats};
}

size_t scratch_bytes(int64_t t, int64_t panels) { return static_cast<size_t>(room_of(t, panels, nullptr).bytes); }

template <int type> void product_of(const uint8_t* data, int64_t rows, int64_t cols, int64_t first, int64_t last,
                                    const uint16_t* x, int64_t t, float* out, int64_t stride, void* scratch) {
    using Q = Blocks<type>;
    TypeInfo info{};
    type_info(type, info);
    const Room room = room_of(t, last - first, scratch);
    const Source source{data, rows, cols / info.block * info.bytes, room.stage};
    const int64_t units = (cols + 255) / 256, tiles = tiles_of(t), across = (tiles + 1) / 2;
    constexpr int64_t step = stretch * block_bytes, x_step = step / 2;
    configure();
    for (int64_t at = 0; at < units; at += together) {
        const int64_t n = smaller(together, units - at);
        float* sums = room.sums;
        for (int64_t p = first; p < last; p += 2) {
            const int64_t wide = smaller(2, last - p);
            for (int64_t i = 0; i < n * wide; ++i) {
                size_t apart;
                const uint8_t* from = source.unit<Q>((p + i % wide) * lanes, at + i / wide, apart);
                ToTiles sink{room.weights + (i / wide * 2 + i % wide) * step};
                Q::unit(from, apart, sink);
            }
            Ahead ahead = p + 2 < last ? Ahead::of<Q>(source, p + 2, at, n) : Ahead{};
            const int64_t share = (ahead.left + n * across - 1) / (n * across);
            for (int64_t u = 0; u < n; ++u) {
                for (int64_t i = 0; i < tiles; i += 2) {
                    ahead.step(share);
                    multiply(smaller(2, tiles - i), wide, x + ((at + u) * tiles + i) * x_step,
                             room.weights + u * 2 * step, at + u == 0, sums + i / 2 * pair_floats);
                }
            }
            sums += across * pair_floats;
        }
    }
    _tile_release();
    const float* sums = room.sums;
    for (int64_t p = first; p < last; p += 2) {
        const int64_t wide = smaller(2, last - p);
        for (int64_t i = 0; i < tiles; i += 2, sums += pair_floats) {
            for (int64_t row = 16 * i; row < smaller(16 * i + 32, t); ++row) {
                for (int64_t j = 0; j < wide; ++j) {
                    const __mmask16 there = static_cast<__mmask16>(0xffffu >> (16 - smaller(16, rows - (p + j) * lanes)));
                    _mm512_mask_storeu_ps(out + row * stride + (p + j) * lanes, there,
                                          load_f(sums + (row - 16 * i) * 32 + 16 * j));
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
        uint16_t* to = out + ((b / stretch * tiles + i) * stretch + b % stretch) * (block_bytes / 2);
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

double peak(int64_t turns) {
    configure();
    _tile_zero(4);
    _tile_zero(6);
    for (int64_t turn = 0; turn < turns; ++turn) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 6);
        _tile_dpbf16ps(2, 4, 6);
        _tile_dpbf16ps(3, 4, 6);
    }
    _tile_release();
    return static_cast<double>(turns) * 4 * 16 * 16 * 32 * 2;
}

extern const TileKernels tiles;
const TileKernels tiles = {arrange, arranged_bytes, product, scratch_bytes, peak};

}  // namespace hybridlm::amx
