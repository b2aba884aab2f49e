// Matrix kernels, written over the vectors of lanes.h and compiled once per instruction set.

namespace matrices {

#include "scalars.inl"
#include "lanes.h"
#include "blocks.inl"
#include "source.inl"
#include "quantize.inl"

// ---- quantised weights ---------------------------------------------------------------------------------------------

// Adds one block of 32 columns to the sums of `rows` rows of x.
template <class Q, int rows> HYBRIDLM_INLINE void accumulate(F* sum, const U* w, F scale, F second, const int8_t* x,
                                                             const float* dx, const float* sx, const int32_t* start) {
    I dot[rows];
    if constexpr (Q::halves) {
        dots<Q::bias, Q::max, 4, rows>(w, x, start, 2, dot);
        for (int t = 0; t < rows; ++t) sum[t] = fused(convert(dot[t]), times(scale, same_f(dx[t])), sum[t]);
        dots<Q::bias, Q::max, 4, rows>(w + 4, x + 16, start + 1, 2, dot);
        for (int t = 0; t < rows; ++t) sum[t] = fused(convert(dot[t]), times(second, same_f(dx[t])), sum[t]);
    } else {
        dots<Q::bias, Q::max, 8, rows>(w, x, start, 1, dot);
        for (int t = 0; t < rows; ++t) sum[t] = fused(convert(dot[t]), times(scale, same_f(dx[t])), sum[t]);
        if constexpr (Q::minimum)
            for (int t = 0; t < rows; ++t) sum[t] = fused_minus(second, same_f(sx[t]), sum[t]);
    }
}

// What the kernel over panels must know of a type; types that look alike to `dots` share one.
template <int bias_, int max_, bool minimum_, bool halves_> struct Kind {
    static constexpr int bias = bias_, max = max_;
    static constexpr bool minimum = minimum_, halves = halves_;
    static constexpr int record = 32 * lanes + 4 * lanes * (1 + (minimum || halves));  // bytes of a block in a panel
};
#if defined(HYBRIDLM_AVX2)
template <class Q> using KindOf = Kind<Q::bias, Q::max, Q::minimum, Q::halves>;
#else
template <class Q> using KindOf = Kind<Q::bias ? 1 : 0, 0, Q::minimum, Q::halves>;
#endif

// Fetches the next panel while this one is worked on, as streams of four rows each in the order of memory: a core gets
// more out of memory by a few long streams than by one, and more than by a short one for every row.
struct Ahead {
    const uint8_t* at;  // of the first stream, where this unit's share begins
    int64_t apart;
    template <class Q> HYBRIDLM_INLINE void step(int block) const {
        constexpr int share = 4 * Q::unit_bytes;
        for (int line = (block * share / 8 + 63) / 64; line < ((block + 1) * share / 8 + 63) / 64; ++line)
            for (int s = 0; s < (lanes + 3) / 4; ++s) fetch(at + s * apart + 64 * line);
    }
};

// Sinks: where unpacked blocks go.
struct ToPanel {
    uint8_t* out;
    Ahead ahead;
    template <class Q> HYBRIDLM_INLINE void put(int block, const U* w, F scale, F second) {
        ahead.template step<Q>(block);
        uint8_t* p = out + block * KindOf<Q>::record;
        for (int i = 0; i < 8; ++i) store(p + 4 * lanes * i, prepare<Q::bias>(w[i]));
        store_f(reinterpret_cast<float*>(p + 32 * lanes), scale);
        if constexpr (Q::minimum || Q::halves) store_f(reinterpret_cast<float*>(p + 36 * lanes), second);
    }
};

template <int rows> struct ToSums {  // meets the rows of x straight away
    const int8_t* x;
    const float *dx, *sx;
    const int32_t* start;
    Ahead ahead;
    F sum[rows];
    template <class Q> HYBRIDLM_INLINE void put(int block, const U* w, F scale, F second) {
        ahead.template step<Q>(block);
        U v[8];
        for (int i = 0; i < 8; ++i) v[i] = prepare<Q::bias>(w[i]);
        const int at = rows * block;
        accumulate<Q, rows>(sum, v, scale, second, x + 32 * at, dx + at, sx + at, start + (Q::halves ? 2 : 1) * at);
    }
};

// sums[t] += blocks of a panel times t rows of x.
template <class K, int width> void panel(const uint8_t* records, int64_t blocks, const int8_t* x, const float* dx,
                                         const float* sx, const int32_t* start, float* sums) {
    F sum[width];
    for (int t = 0; t < width; ++t) sum[t] = load_f(sums + t * lanes);
    for (int64_t b = 0; b < blocks; ++b) {
        U w[8];
        for (int i = 0; i < 8; ++i) w[i] = load(records + 4 * lanes * i);
        F scale = load_f(reinterpret_cast<const float*>(records + 32 * lanes)), second = scale;
        if constexpr (K::minimum || K::halves) second = load_f(reinterpret_cast<const float*>(records + 36 * lanes));
        constexpr int starts = K::halves ? 2 : 1, left = width % 4, whole = width - left;
        HYBRIDLM_UNROLL
        for (int t = 0; t < whole; t += 4)
            accumulate<K, 4>(sum + t, w, scale, second, x + 32 * t, dx + t, sx + t, start + starts * t);
        if constexpr (left > 0)
            accumulate<K, left>(sum + whole, w, scale, second, x + 32 * whole, dx + whole, sx + whole,
                                start + starts * whole);
        records += K::record;
        x += 32 * width, dx += width, sx += width, start += (K::halves ? 2 : 1) * width;
    }
    for (int t = 0; t < width; ++t) store_f(sums + t * lanes, sum[t]);
}

using PanelKernel = void (*)(const uint8_t*, int64_t, const int8_t*, const float*, const float*, const int32_t*,
                             float*);

template <class K> PanelKernel panel_kernel(int width) {
    switch (width) {
        case 1: return panel<K, 1>;
        case 2: return panel<K, 2>;
        case 3: return panel<K, 3>;
        case 4: return panel<K, 4>;
    }
    if constexpr (wide_tile > 4) {
        switch (width) {
            case 5: return panel<K, 5>;
            case 6: return panel<K, 6>;
            case 7: return panel<K, 7>;
            case 8: return panel<K, 8>;
        }
    }
    if constexpr (wide_tile > 8) return panel<K, wide_tile>;
    return nullptr;
}

constexpr int64_t largest_record = 40 * lanes;
constexpr int64_t few = 16;  // rows of x up to which weights are unpacked a unit at a time, on the way

// Panels that are unpacked together, so that a tile of x stays in the second cache while it meets them.
inline int64_t panels_together(int64_t blocks) {
    int64_t n = 480 * 1024 / (blocks * largest_record);
    return n < 1 ? 1 : n > 8 ? 8 : n;
}

inline size_t scratch_bytes(int64_t cols) {
    int64_t blocks = (cols + 255) / 256 * 8;
    return static_cast<size_t>(stage_bytes + few * lanes * 4 + 64 + panels_together(blocks) * blocks * largest_record);
}

template <int type> void quantised_of(const uint8_t* data, int64_t rows, int64_t cols, int64_t first, int64_t last,
                                      const Tile* tiles, int count, const uint8_t* after, float* out, int64_t stride,
                                      void* scratch) {
    using Q = Blocks<type>;
    using K = KindOf<Q>;
    constexpr int starts = Q::halves ? 2 : 1;
    constexpr int slot = type == Q4_0                     ? 0
                         : type == Q5_0                   ? 1
                         : type == Q6_K                   ? 2
                         : type == Q8_0 || type == IQ4_NL ? 3
                                                          : -1;
    TypeInfo info{};
    type_info(type, info);
    const int64_t units = (cols + 255) / 256, blocks = 8 * units;
    uint8_t* stage = static_cast<uint8_t*>(scratch);
    float* sums = reinterpret_cast<float*>(stage + stage_bytes);
    uint8_t* records = reinterpret_cast<uint8_t*>(sums + few * lanes) + 64;
    const Source source{data, rows, cols / info.block * info.bytes, stage};

    int64_t total_width = 0;
    for (int i = 0; i < count; ++i) total_width += tiles[i].width;
    auto starts_of = [&](const Tile& tile) {
        if constexpr (slot < 0) return reinterpret_cast<const int32_t*>(tile.x);  // never read
        else return static_cast<const int32_t*>(tile.start[slot]);
    };
    auto finish = [&](int64_t row, int64_t t, const float* from, int width) {
        for (int i = 0; i < width; ++i)
            memcpy(out + (t + i) * stride + row, from + i * lanes, static_cast<size_t>(4 * smaller(lanes, rows - row)));
    };

    auto ahead = [&](int64_t p, int64_t u) {
        const uint8_t* next = p + 1 == last ? after : nullptr;
        if (p + 1 < last && (p + 2) * lanes <= rows) next = data + (p + 1) * lanes * source.row_bytes;
        if (!next || 256 * (u + 1) > cols) return Ahead{data, 0};
        return Ahead{next + u * 4 * Q::unit_bytes, 4 * source.row_bytes};
    };

    if (count == 1 && total_width <= straight) {
        auto with = [&](auto& sink) {
            const auto begin = sink;
            for (int64_t p = first; p < last; ++p) {
                sink = begin;
                for (int64_t u = 0; u < units; ++u) {
                    size_t step;
                    const uint8_t* from = source.unit<Q>(p * lanes, u, step);
                    sink.ahead = ahead(p, u);
                    Q::unit(from, step, sink);
                    const int64_t n = 8 * total_width;
                    sink.x += 32 * n, sink.dx += n, sink.sx += n, sink.start += starts * n;
                }
                for (int t = 0; t < total_width; ++t) store_f(sums + t * lanes, sink.sum[t]);
                finish(p * lanes, 0, sums, static_cast<int>(total_width));
            }
        };
        const Tile& tile = tiles[0];
        const int32_t* s = starts_of(tile);
        if (total_width == 1) {
            ToSums<1> sink{tile.x, tile.scale, tile.sum, s, {}, {zero_f()}};
            return with(sink);
        }
        if constexpr (straight >= 4) {
            if (total_width == 2) {
                ToSums<2> sink{tile.x, tile.scale, tile.sum, s, {}, {zero_f(), zero_f()}};
                return with(sink);
            }
            if (total_width == 3) {
                ToSums<3> sink{tile.x, tile.scale, tile.sum, s, {}, {zero_f(), zero_f(), zero_f()}};
                return with(sink);
            }
            ToSums<4> sink{tile.x, tile.scale, tile.sum, s, {}, {zero_f(), zero_f(), zero_f(), zero_f()}};
            return with(sink);
        }
    }

    if (total_width <= few) {
        for (int64_t p = first; p < last; ++p) {
            memset(sums, 0, few * lanes * 4);
            for (int64_t u = 0; u < units; ++u) {
                size_t step;
                const uint8_t* from = source.unit<Q>(p * lanes, u, step);
                ToPanel sink{records, ahead(p, u)};
                Q::unit(from, step, sink);
                float* s = sums;
                for (int i = 0; i < count; ++i) {
                    const Tile& tile = tiles[i];
                    const int64_t at = 8 * u * tile.width;
                    panel_kernel<K>(tile.width)(records, 8, tile.x + 32 * at, tile.scale + at, tile.sum + at,
                                                starts_of(tile) + starts * at, s);
                    s += tile.width * lanes;
                }
            }
            finish(p * lanes, 0, sums, static_cast<int>(total_width));
        }
        return;
    }

    const int64_t together = panels_together(blocks), panel_bytes = blocks * K::record;
    for (int64_t p = first; p < last; p += together) {
        const int64_t n = smaller(together, last - p);
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t u = 0; u < units; ++u) {
                size_t step;
                const uint8_t* from = source.unit<Q>((p + i) * lanes, u, step);
                ToPanel panel_sink{records + i * panel_bytes + 8 * u * K::record, ahead(p + i, u)};
                Q::unit(from, step, panel_sink);
            }
        }
        int64_t t = 0;
        for (int j = 0; j < count; ++j) {
            const Tile& tile = tiles[j];
            const PanelKernel kernel = panel_kernel<K>(tile.width);
            for (int64_t i = 0; i < n; ++i) {
                memset(sums, 0, static_cast<size_t>(tile.width) * lanes * 4);
                kernel(records + i * panel_bytes, blocks, tile.x, tile.scale, tile.sum, starts_of(tile), sums);
                finish((p + i) * lanes, t, sums, tile.width);
            }
            t += tile.width;
        }
    }
}

void quantised(int type, const uint8_t* data, int64_t rows, int64_t cols, int64_t first, int64_t last,
               const Tile* tiles, int count, const uint8_t* after, float* out, int64_t stride, void* scratch) {
    switch (type) {
        case Q8_0: return quantised_of<Q8_0>(data, rows, cols, first, last, tiles, count, after, out, stride, scratch);
        case Q4_0: return quantised_of<Q4_0>(data, rows, cols, first, last, tiles, count, after, out, stride, scratch);
        case Q5_0: return quantised_of<Q5_0>(data, rows, cols, first, last, tiles, count, after, out, stride, scratch);
        case Q4_K: return quantised_of<Q4_K>(data, rows, cols, first, last, tiles, count, after, out, stride, scratch);
        case Q5_K: return quantised_of<Q5_K>(data, rows, cols, first, last, tiles, count, after, out, stride, scratch);
        case Q6_K: return quantised_of<Q6_K>(data, rows, cols, first, last, tiles, count, after, out, stride, scratch);
        case IQ4_NL: return quantised_of<IQ4_NL>(data, rows, cols, first, last, tiles, count, after, out, stride, scratch);
    }
}

// 8-bit activations: block by block the largest magnitude becomes 127. A block with a number that is not finite gets
// the scale NaN, so that it shows. Blocks past the last column are zero.
void activations(const float* x, int64_t cols, const Tile& tile, unsigned slots) {
    const int64_t blocks = (cols + 255) / 256 * 8;
    auto block = [&](int64_t b, int t) {
        const int64_t at = b * tile.width + t;
        int32_t sums[2] = {0, 0};
        float scale = 0;
        if (32 * b < cols) {
            const float* p = x + t * cols + 32 * b;
            const int32_t bits = largest_bits(p);
            const float largest = from_bits(static_cast<uint32_t>(bits));
            if (bits < 0x7f800000 && largest > 1e-30f) {
                scale = largest / 127.0f;
                round_block(p, 127.0f / largest, tile.x + 32 * at, sums);
            } else {
                scale = bits < 0x7f800000 ? 0.0f : from_bits(0x7fc00000);
                memset(tile.x + 32 * at, 0, 32);
            }
        } else {
            memset(tile.x + 32 * at, 0, 32);
        }
        tile.scale[at] = scale;
        tile.sum[at] = scale * static_cast<float>(sums[0] + sums[1]);
        if (slots & 1) tile.start[0][at] = -8 * (sums[0] + sums[1]);
        if (slots & 2) tile.start[1][at] = -16 * (sums[0] + sums[1]);
        if (slots & 4) tile.start[2][2 * at] = -32 * sums[0], tile.start[2][2 * at + 1] = -32 * sums[1];
        if (slots & 8) tile.start[3][at] = -128 * (sums[0] + sums[1]);
    };
    for (int64_t first = 0; first < blocks; first += 8)
        for (int t = 0; t < tile.width; ++t)
            for (int64_t b = first; b < first + 8; ++b) block(b, t);
}

// ---- float weights -------------------------------------------------------------------------------------------------

template <int type> HYBRIDLM_INLINE F float_columns(const uint8_t* p, int64_t i) {
    if constexpr (type == F32) return columns(reinterpret_cast<const float*>(p) + i);
    else if constexpr (type == F16) return columns_f16(reinterpret_cast<const uint16_t*>(p) + i);
    else return columns_bf16(reinterpret_cast<const uint16_t*>(p) + i);
}

// height rows of weights times width rows of x. Each result is summed alike whatever the two are: columns i, i + lanes,
// .. in lane i, what is left over padded with zeros, then the lanes.
template <int type, int height, int width> void float_tile(const uint8_t* w, int64_t row_bytes, int64_t cols,
                                                           const float* x, float* out, int64_t stride, int64_t ahead) {
    constexpr size_t size = type == F32 ? 4 : 2;
    F sum[height][width];
    for (int r = 0; r < height; ++r)
        for (int t = 0; t < width; ++t) sum[r][t] = zero_f();
    const int64_t whole = cols / lanes * lanes;
    for (int64_t i = 0; i < whole; i += lanes) {
        F v[width];
        for (int t = 0; t < width; ++t) v[t] = columns(x + t * cols + i);
        for (int r = 0; r < height; ++r) {
            fetch(w + r * row_bytes + i * size + ahead);  // the rows that come next
            F u = float_columns<type>(w + r * row_bytes, i);
            for (int t = 0; t < width; ++t) sum[r][t] = fused(u, v[t], sum[r][t]);
        }
    }
    if (whole < cols) {
        const size_t left = static_cast<size_t>(cols - whole);
        F v[width];
        for (int t = 0; t < width; ++t) {
            float part[lanes] = {};
            memcpy(part, x + t * cols + whole, 4 * left);
            v[t] = columns(part);
        }
        for (int r = 0; r < height; ++r) {
            uint8_t part[4 * lanes] = {};
            memcpy(part, w + r * row_bytes + static_cast<size_t>(whole) * size, size * left);
            F u = float_columns<type>(part, 0);
            for (int t = 0; t < width; ++t) sum[r][t] = fused(u, v[t], sum[r][t]);
        }
    }
    for (int r = 0; r < height; ++r)
        for (int t = 0; t < width; ++t) out[t * stride + r] = total(sum[r][t]);
}

template <int type, int height> HYBRIDLM_INLINE void float_rows_of(const uint8_t* w, int64_t row_bytes, int64_t cols,
                                                                   const float* x, int64_t count, float* out,
                                                                   int64_t stride, int64_t ahead) {
    int64_t t = 0;
    for (; t + 4 <= count; t += 4)
        float_tile<type, height, 4>(w, row_bytes, cols, x + t * cols, out + t * stride, stride, t ? 0 : ahead);
    if (count - t >= 2) {
        float_tile<type, height, 2>(w, row_bytes, cols, x + t * cols, out + t * stride, stride, t ? 0 : ahead);
        t += 2;
    }
    if (t < count)
        float_tile<type, height, 1>(w, row_bytes, cols, x + t * cols, out + t * stride, stride, t ? 0 : ahead);
}

template <int type> void float_direct(const uint8_t* data, int64_t row_bytes, int64_t cols, int64_t first, int64_t last,
                                      const float* x, int64_t count, float* out, int64_t stride) {
    int64_t r = first;
    for (; r + 4 <= last; r += 4)
        float_rows_of<type, 4>(data + r * row_bytes, row_bytes, cols, x, count, out + r, stride,
                               r + 8 <= last ? 4 * row_bytes : 0);
    for (; r < last; ++r) float_rows_of<type, 1>(data + r * row_bytes, row_bytes, cols, x, count, out + r, stride, 0);
}

void floats(int type, const uint8_t* data, int64_t cols, int64_t first, int64_t last, const float* x, int64_t count,
            float* out, int64_t stride, void* scratch) {
    TypeInfo info{};
    type_info(type, info);
    const int64_t row_bytes = cols / info.block * info.bytes;
    if (count <= 8 && type == F32) return float_direct<F32>(data, row_bytes, cols, first, last, x, count, out, stride);
    if (count <= 8 && type == F16) return float_direct<F16>(data, row_bytes, cols, first, last, x, count, out, stride);
    if (count <= 8 && type == BF16)
        return float_direct<BF16>(data, row_bytes, cols, first, last, x, count, out, stride);
    // Expand a few rows, and let groups of four rows of x meet all of them before the next four come.
    float* rows = static_cast<float*>(scratch);
    const int64_t together = float_rows(cols);
    for (int64_t r = first; r < last; r += together) {
        const int64_t n = smaller(together, last - r);
        for (int64_t i = 0; i < n; ++i) decode(type, data + (r + i) * row_bytes, rows + i * cols, cols);
        const uint8_t* expanded = reinterpret_cast<const uint8_t*>(rows);
        for (int64_t t = 0; t < count; t += 4)
            float_direct<F32>(expanded, 4 * cols, cols, 0, n, x + t * cols, smaller(4, count - t), out + t * stride + r,
                              stride);
    }
}

// ---- probes --------------------------------------------------------------------------------------------------------

// Four streams at once, as far as memory goes; every byte counts.
uint64_t read(const uint8_t* data, size_t bytes) {
    constexpr size_t vector = 4 * lanes, step = 4 * vector;
    const size_t quarter = bytes / 4 / step * step;
    U sum[4] = {same(0), same(0), same(0), same(0)};
    for (size_t at = 0; at < quarter; at += step)
        for (int s = 0; s < 4; ++s)
            for (int i = 0; i < 4; ++i) sum[i] = bit_xor(sum[i], load(data + s * quarter + at + i * vector));
    for (size_t at = 4 * quarter; at + vector <= bytes; at += vector) sum[0] = bit_xor(sum[0], load(data + at));
    uint32_t parts[lanes];
    store(parts, bit_xor(bit_xor(sum[0], sum[1]), bit_xor(sum[2], sum[3])));
    uint64_t result = 0;
    for (int k = 0; k < lanes; ++k) result ^= parts[k];
    return result;
}

double peak(int64_t turns) { return spin_dots(turns); }

}  // namespace matrices

static const MatmulKernels matmul_kernels = {
    matrices::lanes,  matrices::wide_tile, matrices::activations, matrices::quantised, matrices::scratch_bytes,
    matrices::floats, matrices::decode,    matrices::encode,      matrices::read,      matrices::peak,      nullptr,
};
