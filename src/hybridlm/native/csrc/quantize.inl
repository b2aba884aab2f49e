// Rows of floats to blocks of a ggml type and back.
//
// The way back gives the floats that gguf's own decoder gives. The way there looks for the scale with the least squared
// error (weighed by `importance` where given): for a handful of scales it rounds every weight, solves for the scale
// that fits these roundings best, and keeps the best pair. Blocks lie side by side in an inner loop of fixed length
// (`group`), which compilers turn into vector code without being asked in an instruction set's own words. Q8_0 is the
// exception: the largest magnitude becomes 127, as everybody does it.

// ---- back to floats ------------------------------------------------------------------------------------------------

HYBRIDLM_INLINE float half_at(const uint8_t* p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return from_f16(h);
}

HYBRIDLM_INLINE void put_half(uint8_t* p, float f) {
    uint16_t h = to_f16(f);
    memcpy(p, &h, 2);
}

// Scale and minimum j of the 12 bytes of a Q4_K or Q5_K block.
HYBRIDLM_INLINE void six_bits(const uint8_t* p, int j, int& scale, int& minimum) {
    if (j < 4) {
        scale = p[j] & 63, minimum = p[4 + j] & 63;
    } else {
        scale = (p[4 + j] & 15) | p[j - 4] >> 6 << 4;
        minimum = p[4 + j] >> 4 | p[j] >> 6 << 4;
    }
}

HYBRIDLM_INLINE void put_six_bits(uint8_t* p, const int* scale, const int* minimum) {
    for (int j = 0; j < 4; ++j) {
        p[j] = static_cast<uint8_t>(scale[j] | scale[4 + j] >> 4 << 6);
        p[4 + j] = static_cast<uint8_t>(minimum[j] | minimum[4 + j] >> 4 << 6);
        p[8 + j] = static_cast<uint8_t>((scale[4 + j] & 15) | (minimum[4 + j] & 15) << 4);
    }
}

void decode(int type, const uint8_t* p, float* out, int64_t count) {
    switch (type) {
        case F32: memcpy(out, p, static_cast<size_t>(count) * 4); return;
        case F16: {
            const uint16_t* h = reinterpret_cast<const uint16_t*>(p);
            for (int64_t i = 0; i < count; ++i) out[i] = from_f16(h[i]);
            return;
        }
        case BF16: {
            const uint16_t* h = reinterpret_cast<const uint16_t*>(p);
            for (int64_t i = 0; i < count; ++i) out[i] = from_bf16(h[i]);
            return;
        }
        case Q8_0:
            for (int64_t b = 0; b < count / 32; ++b, p += 34, out += 32) {
                float d = half_at(p);
                const int8_t* q = reinterpret_cast<const int8_t*>(p + 2);
                for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(q[i]);
            }
            return;
        case Q4_0:
            for (int64_t b = 0; b < count / 32; ++b, p += 18, out += 32) {
                float d = half_at(p);
                for (int i = 0; i < 16; ++i) out[i] = d * static_cast<float>((p[2 + i] & 15) - 8);
                for (int i = 0; i < 16; ++i) out[16 + i] = d * static_cast<float>((p[2 + i] >> 4) - 8);
            }
            return;
        case IQ4_NL:
            for (int64_t b = 0; b < count / 32; ++b, p += 18, out += 32) {
                float d = half_at(p);
                for (int i = 0; i < 16; ++i) out[i] = d * static_cast<float>(nonlinear[p[2 + i] & 15]);
                for (int i = 0; i < 16; ++i) out[16 + i] = d * static_cast<float>(nonlinear[p[2 + i] >> 4]);
            }
            return;
        case Q5_0:
            for (int64_t b = 0; b < count / 32; ++b, p += 22, out += 32) {
                float d = half_at(p);
                uint32_t high;
                memcpy(&high, p + 2, 4);
                for (int i = 0; i < 16; ++i)
                    out[i] = d * static_cast<float>(int32_t((p[6 + i] & 15u) | (high >> i << 4 & 16u)) - 16);
                for (int i = 0; i < 16; ++i)
                    out[16 + i] = d * static_cast<float>(int32_t((p[6 + i] >> 4) | (high >> (i + 16) << 4 & 16u)) - 16);
            }
            return;
        case Q4_K:
            for (int64_t b = 0; b < count / 256; ++b, p += 144) {
                float d = half_at(p), dmin = half_at(p + 2);
                for (int j = 0; j < 8; ++j, out += 32) {
                    int scale, minimum;
                    six_bits(p + 4, j, scale, minimum);
                    float s = d * static_cast<float>(scale), m = dmin * static_cast<float>(minimum);
                    const uint8_t* q = p + 16 + 32 * (j / 2);
                    for (int i = 0; i < 32; ++i) out[i] = s * static_cast<float>(q[i] >> (j % 2 * 4) & 15) - m;
                }
            }
            return;
        case Q5_K:
            for (int64_t b = 0; b < count / 256; ++b, p += 176) {
                float d = half_at(p), dmin = half_at(p + 2);
                for (int j = 0; j < 8; ++j, out += 32) {
                    int scale, minimum;
                    six_bits(p + 4, j, scale, minimum);
                    float s = d * static_cast<float>(scale), m = dmin * static_cast<float>(minimum);
                    const uint8_t *q = p + 48 + 32 * (j / 2), *h = p + 16;
                    for (int i = 0; i < 32; ++i)
                        out[i] = s * static_cast<float>((q[i] >> (j % 2 * 4) & 15) | (h[i] >> j & 1) << 4) - m;
                }
            }
            return;
        case Q6_K:
            for (int64_t b = 0; b < count / 256; ++b, p += 210) {
                float d = half_at(p + 208);
                for (int j = 0; j < 8; ++j, out += 32) {
                    const uint8_t *q = p + 64 * (j / 4) + 32 * (j % 2), *h = p + 128 + 32 * (j / 4);
                    const int8_t* scales = reinterpret_cast<const int8_t*>(p + 192 + 2 * j);
                    float s[2] = {d * static_cast<float>(scales[0]), d * static_cast<float>(scales[1])};
                    for (int i = 0; i < 32; ++i) {
                        int v = (q[i] >> (j % 4 / 2 * 4) & 15) | (h[i] >> (j % 4 * 2) & 3) << 4;
                        out[i] = s[i / 16] * static_cast<float>(v - 32);
                    }
                }
            }
            return;
    }
}

// ---- to blocks: one scale ------------------------------------------------------------------------------------------

HYBRIDLM_INLINE float magnitude(float f) { return from_bits(to_bits(f) & 0x7fffffff); }
HYBRIDLM_INLINE int32_t clip(int32_t q, int32_t low, int32_t high) { return q < low ? low : q > high ? high : q; }

// The numbers that a code can stand for, before the scale.
template <int half> struct Even {  // -half .. half - 1
    static constexpr float reach = half;
    static HYBRIDLM_INLINE int32_t code(float x) { return clip(nearest(x), -half, half - 1); }
    static HYBRIDLM_INLINE float value(float x) { return static_cast<float>(code(x)); }
};
struct Nonlinear {
    static constexpr float reach = 127;
    static HYBRIDLM_INLINE int32_t code(float x) {
        int32_t c = 0;
        for (int k = 0; k < 15; ++k) c += x > 0.5f * static_cast<float>(nonlinear[k] + nonlinear[k + 1]);
        return c;
    }
    static HYBRIDLM_INLINE float value(float x) {
        int32_t v = -127;
        for (int k = 0; k < 15; ++k)
            v += x > 0.5f * static_cast<float>(nonlinear[k] + nonlinear[k + 1]) ? nonlinear[k + 1] - nonlinear[k] : 0;
        return static_cast<float>(v);
    }
};

constexpr int group = 8;  // blocks side by side

// Blocks side by side: [column][block].
template <int columns> struct Side {
    alignas(64) float x[columns][group];
    alignas(64) float weight[columns][group];
    void take(const float* from, int64_t step, int blocks, const float* importance) {
        for (int b = 0; b < group; ++b) {
            for (int i = 0; i < columns; ++i) {
                x[i][b] = b < blocks ? from[b * step + i] : 0.0f;
                weight[i][b] = b < blocks && importance ? importance[b * step + i] : 1.0f;
            }
        }
    }
};

// How well grid values times a scale can match: fits[b] = (sum w x v)^2 / (sum w v^2) is what the squared error falls
// by, and scale[b] does it.
template <class Grid, int columns>
HYBRIDLM_INLINE void fit(const Side<columns>& s, const float* inverse, float* scale, float* fits) {
    alignas(64) float xv[group] = {}, vv[group] = {};
    for (int i = 0; i < columns; ++i) {
        for (int b = 0; b < group; ++b) {
            float v = Grid::value(s.x[i][b] * inverse[b]), wv = s.weight[i][b] * v;
            xv[b] += wv * s.x[i][b];
            vv[b] += wv * v;
        }
    }
    for (int b = 0; b < group; ++b) {
        scale[b] = vv[b] > 0 ? xv[b] / vv[b] : 0.0f;
        fits[b] = xv[b] * scale[b];
    }
}

HYBRIDLM_INLINE float reciprocal(float s) { return magnitude(s) > 1e-30f ? 1.0f / s : 0.0f; }

// The best scale of each block. The largest magnitude is put on, just inside or just outside the end of the grid that
// reaches furthest, on that side and on the other.
template <class Grid, int columns> void best_scales(const Side<columns>& s, int tries, float step, float* best) {
    alignas(64) float largest[group] = {}, inverse[group], scale[group], fits[group], most[group] = {};
    for (int i = 0; i < columns; ++i)
        for (int b = 0; b < group; ++b)
            largest[b] = magnitude(s.x[i][b]) > magnitude(largest[b]) ? s.x[i][b] : largest[b];
    for (int b = 0; b < group; ++b) best[b] = 0;
    auto keep = [&] {
        for (int b = 0; b < group; ++b) {
            bool better = fits[b] > most[b];
            most[b] = better ? fits[b] : most[b];
            best[b] = better ? scale[b] : best[b];
        }
    };
    for (int side = 0; side < 2; ++side) {
        for (int k = -tries; k <= tries; ++k) {
            float reach = (Grid::reach + step * static_cast<float>(k)) * (side ? 1.0f : -1.0f);
            for (int b = 0; b < group; ++b) inverse[b] = reach * reciprocal(largest[b]);
            fit<Grid>(s, inverse, scale, fits);
            keep();
        }
    }
    for (int turn = 0; turn < 3; ++turn) {
        for (int b = 0; b < group; ++b) inverse[b] = reciprocal(best[b]);
        fit<Grid>(s, inverse, scale, fits);
        keep();
    }
}

// Squared error of each block with the scale that will be stored.
template <class Grid, int columns> void errors(const Side<columns>& s, const float* scale, float* error) {
    alignas(64) float inverse[group], sum[group] = {};
    for (int b = 0; b < group; ++b) inverse[b] = reciprocal(scale[b]);
    for (int i = 0; i < columns; ++i) {
        for (int b = 0; b < group; ++b) {
            float e = Grid::value(s.x[i][b] * inverse[b]) * scale[b] - s.x[i][b];
            sum[b] += s.weight[i][b] * e * e;
        }
    }
    for (int b = 0; b < group; ++b) error[b] = sum[b];
}

template <class Grid, class Pack> HYBRIDLM_INLINE void encode_one_scale(const float* x, int64_t cols,
                                                                        const float* importance, int tries, float step,
                                                                        Pack pack) {
    Side<32> s;
    for (int64_t first = 0; first < cols / 32; first += group) {
        const int blocks = static_cast<int>(smaller(group, cols / 32 - first));
        s.take(x + 32 * first, 32, blocks, importance ? importance + 32 * first : nullptr);
        alignas(64) float best[group], plain[group], with_best[group], with_plain[group];
        best_scales<Grid>(s, tries, step, best);
        for (int b = 0; b < group; ++b) {
            float largest = 0;
            for (int i = 0; i < 32; ++i) largest = magnitude(s.x[i][b]) > magnitude(largest) ? s.x[i][b] : largest;
            plain[b] = from_f16(to_f16(largest / -Grid::reach));
            best[b] = from_f16(to_f16(best[b]));
        }
        errors<Grid>(s, best, with_best);
        errors<Grid>(s, plain, with_plain);
        for (int b = 0; b < blocks; ++b) {
            float d = with_best[b] <= with_plain[b] ? best[b] : plain[b], inverse = reciprocal(d);
            for (int i = 0; i < 32; ++i)
                if ((to_bits(s.x[i][b]) & 0x7f800000u) == 0x7f800000u)
                    d = from_bits(0x7fc00000);  // not finite: let it show
            int32_t code[32];
            for (int i = 0; i < 32; ++i) code[i] = Grid::code(s.x[i][b] * inverse);
            pack(first + b, d, code);
        }
    }
}

inline void encode_q8_0(const float* x, int64_t cols, uint8_t* p) {
    for (int64_t b = 0; b < cols / 32; ++b, x += 32, p += 34) {
        int32_t most = 0, v[32];
        for (int i = 0; i < 32; ++i) {
            int32_t bits = static_cast<int32_t>(to_bits(x[i]) & 0x7fffffff);
            most = bits > most ? bits : most;
        }
        float d = from_bits(static_cast<uint32_t>(most)) / 127, inverse = d > 0 && most < 0x7f800000 ? 1.0f / d : 0.0f;
        for (int i = 0; i < 32; ++i) {  // halves go away from zero, as in the reference
            float scaled = x[i] * inverse, size = magnitude(scaled);
            int32_t whole = static_cast<int32_t>(size < 128.0f ? size : 0.0f);
            whole += size - static_cast<float>(whole) >= 0.5f;
            v[i] = scaled < 0 ? -whole : whole;
        }
        put_half(p, most < 0x7f800000 ? d : from_bits(0x7fc00000));
        for (int i = 0; i < 32; ++i) p[2 + i] = static_cast<uint8_t>(v[i]);
    }
}

// ---- to blocks: scales of scales -----------------------------------------------------------------------------------

// Sums over a block of 32 that say everything about fitting x by scale * q + offset, for the q that it rounds to.
struct Line {
    alignas(64) float q[group], qq[group], xq[group];
};
struct Moments {
    alignas(64) float w[group], x[group], xx[group];
};

HYBRIDLM_INLINE void line(const Side<32>& s, int most, const float* inverse, const float* offset, Line& l) {
    alignas(64) float q1[group] = {}, q2[group] = {}, xq[group] = {};
    for (int i = 0; i < 32; ++i) {
        for (int b = 0; b < group; ++b) {
            float q = static_cast<float>(clip(nearest((s.x[i][b] - offset[b]) * inverse[b]), 0, most));
            float wq = s.weight[i][b] * q;
            q1[b] += wq;
            q2[b] += wq * q;
            xq[b] += wq * s.x[i][b];
        }
    }
    for (int b = 0; b < group; ++b) l.q[b] = q1[b], l.qq[b] = q2[b], l.xq[b] = xq[b];
}

HYBRIDLM_INLINE float line_error(const Moments& m, const Line& l, int b, float scale, float offset) {
    return m.xx[b] + scale * (scale * l.qq[b] - 2 * l.xq[b] + 2 * offset * l.q[b]) +
           offset * (offset * m.w[b] - 2 * m.x[b]);
}

// One block of 256: x is close to d * scale[j] * q - dmin * minimum[j], q from 0 to `most`.
inline void encode_with_minimum(const float* from, const float* importance, int most, float& d, float& dmin, int* scale,
                                int* minimum, uint8_t* codes) {
    Side<32> s;
    s.take(from, 32, 8, importance);
    Moments m{};
    Line l;
    alignas(64) float low[group] = {}, high[group], inverse[group], offset[group];
    alignas(64) float best_scale[group] = {}, best_offset[group] = {}, best_error[group];
    for (int b = 0; b < group; ++b) high[b] = s.x[0][b];
    for (int i = 0; i < 32; ++i) {
        for (int b = 0; b < group; ++b) {
            float x = s.x[i][b], w = s.weight[i][b];
            low[b] = x < low[b] ? x : low[b];
            high[b] = x > high[b] ? x : high[b];
            m.w[b] += w, m.x[b] += w * x, m.xx[b] += w * x * x;
        }
    }
    for (int b = 0; b < group; ++b) best_error[b] = m.xx[b];
    auto keep = [&] {  // fits a line through what the roundings are, with an offset that is not positive
        for (int b = 0; b < group; ++b) {
            float det = m.w[b] * l.qq[b] - l.q[b] * l.q[b];
            float a = (m.w[b] * l.xq[b] - m.x[b] * l.q[b]) / det, c = (l.qq[b] * m.x[b] - l.q[b] * l.xq[b]) / det;
            bool two = det > 0 && c <= 0;
            a = two ? a : l.qq[b] > 0 ? l.xq[b] / l.qq[b] : 0.0f;
            float flat = m.x[b] < 0 ? m.x[b] / m.w[b] : 0.0f;  // all rounded to 0: the offset alone
            c = two ? c : l.qq[b] > 0 ? 0.0f : flat;
            float error = line_error(m, l, b, a, c);
            bool better = error < best_error[b] && a >= 0;
            best_error[b] = better ? error : best_error[b];
            best_scale[b] = better ? a : best_scale[b];
            best_offset[b] = better ? c : best_offset[b];
        }
    };
    for (int k = 0; k < 20; ++k) {
        float reach = static_cast<float>(most) - 1.0f + 0.1f * static_cast<float>(k);
        for (int b = 0; b < group; ++b) inverse[b] = reach * reciprocal(high[b] - low[b]);
        line(s, most, inverse, low, l);
        keep();
    }
    for (int turn = 0; turn < 3; ++turn) {
        for (int b = 0; b < group; ++b) inverse[b] = reciprocal(best_scale[b]), offset[b] = best_offset[b];
        line(s, most, inverse, offset, l);
        keep();
    }

    float most_scale = 0, most_minimum = 0;
    for (int b = 0; b < group; ++b) {
        most_scale = best_scale[b] > most_scale ? best_scale[b] : most_scale;
        most_minimum = -best_offset[b] > most_minimum ? -best_offset[b] : most_minimum;
    }
    // Whole-number scales and minima for the two super scales, then super scales for the whole numbers, while it helps.
    float next_d = from_f16(to_f16(most_scale / 63)), next_dmin = from_f16(to_f16(most_minimum / 63));
    float least = from_bits(0x7f7fffff);
    for (int turn = 0; turn < 3; ++turn) {
        int start_scale[group], start_minimum[group], sc[group] = {}, mn[group] = {};
        float error[group], sum = 0;
        Line kept{};
        for (int b = 0; b < group; ++b) {
            start_scale[b] = clip(nearest(best_scale[b] * reciprocal(next_d)), 0, 63);
            start_minimum[b] = clip(nearest(-best_offset[b] * reciprocal(next_dmin)), 0, 63);
            error[b] = from_bits(0x7f7fffff);
        }
        for (int ds = -1; ds <= 1; ++ds) {
            for (int dm = -2; dm <= 2; ++dm) {
                alignas(64) float a[group], c[group];
                for (int b = 0; b < group; ++b) {
                    a[b] = next_d * static_cast<float>(clip(start_scale[b] + ds, 0, 63));
                    c[b] = -next_dmin * static_cast<float>(clip(start_minimum[b] + dm, 0, 63));
                    inverse[b] = reciprocal(a[b]);
                }
                line(s, most, inverse, c, l);
                for (int b = 0; b < group; ++b) {
                    float e = line_error(m, l, b, a[b], c[b]);
                    if (!(e < error[b])) continue;
                    error[b] = e;
                    sc[b] = clip(start_scale[b] + ds, 0, 63), mn[b] = clip(start_minimum[b] + dm, 0, 63);
                    kept.q[b] = l.q[b], kept.qq[b] = l.qq[b], kept.xq[b] = l.xq[b];
                }
            }
        }
        for (int b = 0; b < group; ++b) sum += error[b];
        if (!(sum < least)) break;
        least = sum, d = next_d, dmin = next_dmin;
        double ss = 0, sm = 0, mm = 0, sx = 0, mx = 0;
        for (int b = 0; b < group; ++b) {
            scale[b] = sc[b], minimum[b] = mn[b];
            best_scale[b] = d * static_cast<float>(sc[b]), best_offset[b] = -dmin * static_cast<float>(mn[b]);
            double u = sc[b], v = mn[b];
            ss += u * u * kept.qq[b], sm += u * v * kept.q[b], mm += v * v * m.w[b], sx += u * kept.xq[b],
                mx += v * m.x[b];
        }
        double det = ss * mm - sm * sm;
        if (det > 1e-9 * ss * mm) {
            next_d = static_cast<float>((sx * mm - mx * sm) / det);
            next_dmin = static_cast<float>((sx * sm - mx * ss) / det);
        } else if (ss > 0) {
            next_d = static_cast<float>(sx / ss);
        }
        next_d = from_f16(to_f16(next_d)), next_dmin = from_f16(to_f16(next_dmin));
        if (!(next_d > 0) || !(next_dmin >= 0) || (next_d == d && next_dmin == dmin)) break;
    }
    for (int j = 0; j < 8; ++j) {
        float a = d * static_cast<float>(scale[j]), c = -dmin * static_cast<float>(minimum[j]), inv = reciprocal(a);
        for (int i = 0; i < 32; ++i)
            codes[32 * j + i] = static_cast<uint8_t>(clip(nearest((s.x[i][j] - c) * inv), 0, most));
    }
}

template <int type> void encode_minimum_type(const float* x, int64_t cols, const float* importance, uint8_t* p) {
    constexpr int most = type == Q4_K ? 15 : 31, bytes = type == Q4_K ? 144 : 176;
    for (int64_t first = 0; first < cols; first += 256, p += bytes) {
        float d = 0, dmin = 0;
        int scale[8] = {}, minimum[8] = {};
        uint8_t codes[256] = {};
        bool finite = true;
        for (int i = 0; i < 256; ++i) finite &= (to_bits(x[first + i]) & 0x7f800000u) != 0x7f800000u;
        if (finite)
            encode_with_minimum(x + first, importance ? importance + first : nullptr, most, d, dmin, scale, minimum,
                                codes);
        else d = from_bits(0x7fc00000);
        put_half(p, d);
        put_half(p + 2, dmin);
        put_six_bits(p + 4, scale, minimum);
        uint8_t* low = p + (type == Q4_K ? 16 : 48);
        for (int c = 0; c < 4; ++c)
            for (int i = 0; i < 32; ++i)
                low[32 * c + i] = static_cast<uint8_t>((codes[64 * c + i] & 15) | (codes[64 * c + 32 + i] & 15) << 4);
        if constexpr (type == Q5_K) {
            for (int i = 0; i < 32; ++i) {
                int bits = 0;
                for (int j = 0; j < 8; ++j) bits |= codes[32 * j + i] >> 4 << j;
                p[16 + i] = static_cast<uint8_t>(bits);
            }
        }
    }
}

inline void encode_q6_k(const float* x, int64_t cols, const float* importance, uint8_t* p) {
    using Grid = Even<32>;
    Side<16> side[2];
    for (int64_t first = 0; first < cols; first += 256, p += 210) {
        alignas(64) float best[16], error[16], inverse[group];
        int scale[16] = {};
        float most = 0;
        bool finite = true;
        for (int i = 0; i < 256; ++i) finite &= (to_bits(x[first + i]) & 0x7f800000u) != 0x7f800000u;
        for (int h = 0; h < 2; ++h) {
            side[h].take(x + first + 128 * h, 16, group, importance ? importance + first + 128 * h : nullptr);
            best_scales<Grid>(side[h], 6, 0.15f, best + group * h);
        }
        for (int j = 0; j < 16; ++j) most = magnitude(best[j]) > magnitude(most) ? best[j] : most;
        float d = from_f16(to_f16(most / -128)), least = from_bits(0x7f7fffff), stored = 0;
        int kept[16] = {};
        for (int turn = 0; turn < 3; ++turn) {
            double ss = 0, sx = 0, sum = 0;
            for (int h = 0; h < 2; ++h) {
                int start[group];
                for (int b = 0; b < group; ++b) {
                    start[b] = clip(nearest(best[group * h + b] * reciprocal(d)), -128, 127);
                    error[group * h + b] = from_bits(0x7f7fffff);
                }
                for (int ds = -1; ds <= 1; ++ds) {
                    alignas(64) float a[group], e[group];
                    for (int b = 0; b < group; ++b) a[b] = d * static_cast<float>(clip(start[b] + ds, -128, 127));
                    errors<Grid>(side[h], a, e);
                    for (int b = 0; b < group; ++b) {
                        if (e[b] < error[group * h + b]) {
                            error[group * h + b] = e[b];
                            scale[group * h + b] = clip(start[b] + ds, -128, 127);
                        }
                    }
                }
                for (int b = 0; b < group; ++b) {
                    inverse[b] = reciprocal(d * static_cast<float>(scale[group * h + b]));
                    sum += error[group * h + b];
                    for (int i = 0; i < 16; ++i) {
                        double v =
                            scale[group * h + b] * static_cast<double>(Grid::value(side[h].x[i][b] * inverse[b]));
                        ss += side[h].weight[i][b] * v * v;
                        sx += side[h].weight[i][b] * v * side[h].x[i][b];
                    }
                }
            }
            if (!(sum < least)) break;
            least = static_cast<float>(sum);
            stored = d;
            for (int j = 0; j < 16; ++j) kept[j] = scale[j];
            float next = ss > 0 ? from_f16(to_f16(static_cast<float>(sx / ss))) : d;
            if (next == d || next == 0) break;
            d = next;
        }
        uint8_t codes[256];
        for (int j = 0; j < 16; ++j) {
            float inv = reciprocal(stored * static_cast<float>(kept[j]));
            for (int i = 0; i < 16; ++i)
                codes[16 * j + i] = static_cast<uint8_t>(Grid::code(x[first + 16 * j + i] * inv) + 32);
        }
        if (!finite) stored = from_bits(0x7fc00000);
        for (int h = 0; h < 2; ++h) {
            const uint8_t* c = codes + 128 * h;
            for (int i = 0; i < 64; ++i) p[64 * h + i] = static_cast<uint8_t>((c[i] & 15) | (c[64 + i] & 15) << 4);
            for (int i = 0; i < 32; ++i)
                p[128 + 32 * h + i] =
                    static_cast<uint8_t>(c[i] >> 4 | c[32 + i] >> 4 << 2 | c[64 + i] >> 4 << 4 | c[96 + i] >> 4 << 6);
        }
        for (int j = 0; j < 16; ++j) p[192 + j] = static_cast<uint8_t>(kept[j]);
        put_half(p + 208, stored);
    }
}

// One row.
void encode(int type, const float* x, int64_t cols, const float* importance, uint8_t* out) {
    switch (type) {
        case F32: memcpy(out, x, static_cast<size_t>(cols) * 4); return;
        case F16: {
            uint16_t* h = reinterpret_cast<uint16_t*>(out);
            for (int64_t i = 0; i < cols; ++i) h[i] = to_f16(x[i]);
            return;
        }
        case BF16: {
            uint16_t* h = reinterpret_cast<uint16_t*>(out);
            for (int64_t i = 0; i < cols; ++i) h[i] = to_bf16(x[i]);
            return;
        }
        case Q8_0: return encode_q8_0(x, cols, out);
        case Q4_0:
            return encode_one_scale<Even<8>>(x, cols, importance, 7, 0.12f,
                                             [&](int64_t block, float d, const int32_t* q) {
                                                 uint8_t* p = out + 18 * block;
                                                 put_half(p, d);
                                                 for (int i = 0; i < 16; ++i)
                                                     p[2 + i] = static_cast<uint8_t>((q[i] + 8) | (q[16 + i] + 8) << 4);
                                             });
        case Q5_0:
            return encode_one_scale<Even<16>>(
                x, cols, importance, 7, 0.15f, [&](int64_t block, float d, const int32_t* q) {
                    uint8_t* p = out + 22 * block;
                    uint32_t high = 0;
                    put_half(p, d);
                    for (int i = 0; i < 32; ++i) high |= static_cast<uint32_t>((q[i] + 16) >> 4) << i;
                    memcpy(p + 2, &high, 4);
                    for (int i = 0; i < 16; ++i)
                        p[6 + i] = static_cast<uint8_t>(((q[i] + 16) & 15) | ((q[16 + i] + 16) & 15) << 4);
                });
        case IQ4_NL:
            return encode_one_scale<Nonlinear>(x, cols, importance, 7, 3.0f,
                                               [&](int64_t block, float d, const int32_t* q) {
                                                   uint8_t* p = out + 18 * block;
                                                   put_half(p, d);
                                                   for (int i = 0; i < 16; ++i)
                                                       p[2 + i] = static_cast<uint8_t>(q[i] | q[16 + i] << 4);
                                               });
        case Q4_K: return encode_minimum_type<Q4_K>(x, cols, importance, out);
        case Q5_K: return encode_minimum_type<Q5_K>(x, cols, importance, out);
        case Q6_K: return encode_q6_k(x, cols, importance, out);
    }
}
