// Rows of floats to blocks of a ggml type and back.
//
// The way back gives the floats that gguf's own decoder gives. The way there looks for the scale with the least squared
// error (weighed by `importance` where given): for a handful of scales it rounds every weight, solves for the scale that
// fits these roundings best, and keeps the best pair. Blocks lie side by side in vectors of one number each (`Each`, of
// the compiler's own vector arithmetic), so every block is worked out the same way whatever the instruction set. Q8_0 is
// the exception: the largest magnitude becomes 127, as everybody does it.

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
HYBRIDLM_INLINE bool is_finite(float f) { return (to_bits(f) & 0x7f800000u) != 0x7f800000u; }
HYBRIDLM_INLINE float round_f16(float f) { return from_f16(to_f16(f)); }

// Blocks are worked on side by side, a number of each in a vector.
#if defined(HYBRIDLM_AVX512)
constexpr int group = 16;
#elif defined(HYBRIDLM_AVX2)
constexpr int group = 8;
#else
constexpr int group = 4;
#endif
#if defined(__GNUC__)
typedef float Each __attribute__((vector_size(4 * group)));
typedef int32_t Which __attribute__((vector_size(4 * group)));
HYBRIDLM_INLINE Each pick(Which which, Each a, Each b) { return which ? a : b; }
#else
struct Which {
    bool v[group];
    friend Which operator&(Which a, Which b) { for (int i = 0; i < group; ++i) a.v[i] = a.v[i] && b.v[i]; return a; }
};
struct Each {
    float v[group];
    float& operator[](int i) { return v[i]; }
    float operator[](int i) const { return v[i]; }
#define HYBRIDLM_EACH(op) \
    friend Each operator op(Each a, Each b) { for (int i = 0; i < group; ++i) a.v[i] = a.v[i] op b.v[i]; return a; } \
    friend Each operator op(Each a, float b) { for (int i = 0; i < group; ++i) a.v[i] = a.v[i] op b; return a; } \
    friend Each operator op(float a, Each b) { for (int i = 0; i < group; ++i) b.v[i] = a op b.v[i]; return b; }
    HYBRIDLM_EACH(+) HYBRIDLM_EACH(-) HYBRIDLM_EACH(*) HYBRIDLM_EACH(/)
#undef HYBRIDLM_EACH
#define HYBRIDLM_EACH(op) \
    friend Which operator op(Each a, Each b) { Which m; for (int i = 0; i < group; ++i) m.v[i] = a.v[i] op b.v[i]; return m; } \
    friend Which operator op(Each a, float b) { Which m; for (int i = 0; i < group; ++i) m.v[i] = a.v[i] op b; return m; }
    HYBRIDLM_EACH(<) HYBRIDLM_EACH(>) HYBRIDLM_EACH(<=) HYBRIDLM_EACH(>=)
#undef HYBRIDLM_EACH
    Each& operator+=(Each b) { return *this = *this + b; }
    Each operator-() const { return 0.0f - *this; }
};
HYBRIDLM_INLINE Each pick(Which which, Each a, Each b) {
    for (int i = 0; i < group; ++i) a.v[i] = which.v[i] ? a.v[i] : b.v[i];
    return a;
}
#endif
HYBRIDLM_INLINE Each same_each(float v) { return v - Each{}; }
HYBRIDLM_INLINE Each size_of(Each v) { return pick(v < 0.0f, -v, v); }
HYBRIDLM_INLINE Each limit(Each v, float low, float high) {
    v = pick(v < same_each(low), same_each(low), v);
    return pick(v > same_each(high), same_each(high), v);
}
HYBRIDLM_INLINE Each nearest(Each v) { return (v + 12582912.0f) - 12582912.0f; }
HYBRIDLM_INLINE Each reciprocal(Each v) { return pick(size_of(v) > same_each(1e-30f), 1.0f / v, Each{}); }
HYBRIDLM_INLINE Each round_f16(Each v) {
    for (int b = 0; b < group; ++b) v[b] = round_f16(v[b]);
    return v;
}
HYBRIDLM_INLINE float reciprocal(float v) { return magnitude(v) > 1e-30f ? 1.0f / v : 0.0f; }

// The numbers that a code can stand for, before the scale, and the codes, counted from 0.
template <int half> struct Even {  // -half .. half - 1
    static constexpr float reach = half;
    static HYBRIDLM_INLINE Each value(Each x) { return limit(nearest(x), -half, half - 1); }
    static HYBRIDLM_INLINE Each code(Each x) { return value(x) + static_cast<float>(half); }
};
struct Nonlinear {
    static constexpr float reach = 127;
    static HYBRIDLM_INLINE float middle(int k) { return 0.5f * static_cast<float>(nonlinear[k] + nonlinear[k + 1]); }
    static HYBRIDLM_INLINE Each value(Each x) {
        Each v = same_each(-127.0f);
        HYBRIDLM_UNROLL
        for (int k = 0; k < 15; ++k)
            v = pick(x > same_each(middle(k)), v + static_cast<float>(nonlinear[k + 1] - nonlinear[k]), v);
        return v;
    }
    static HYBRIDLM_INLINE Each code(Each x) {
        Each c{};
        for (int k = 0; k < 15; ++k) c = pick(x > same_each(middle(k)), c + 1.0f, c);
        return c;
    }
};

// A group of blocks by column. Where there are fewer, the rest is zero.
template <int columns> struct Side {
    Each x[columns];
    Each weight[columns];
    Each largest;  // of the largest magnitude
    HYBRIDLM_INLINE void take(const float* from, int blocks, const float* importance) {
        largest = Each{};
        for (int i = 0; i < columns; ++i) {
            Each a{}, w = same_each(1.0f);
            for (int b = 0; b < blocks; ++b) a[b] = from[b * columns + i];
            if (importance)
                for (int b = 0; b < blocks; ++b) w[b] = importance[b * columns + i];
            x[i] = a, weight[i] = w;
            largest = pick(size_of(a) > size_of(largest), a, largest);
        }
    }
};

// The best scale of each block, and what the squared error falls by with it: (sum w x v)^2 / (sum w v^2), v being the grid
// values that the scale rounds to. The largest magnitude is put on, just inside or just outside the end of the grid that
// reaches furthest, on that side and on the other.
template <class Grid, int columns> struct Search {
    const Side<columns>& s;
    Each best{}, most{};
    HYBRIDLM_INLINE void attempt(Each inverse) {
        Each xv{}, vv{};
        for (int i = 0; i < columns; ++i) {
            Each v = Grid::value(s.x[i] * inverse), wv = s.weight[i] * v;
            xv += wv * s.x[i];
            vv += wv * v;
        }
        Each scale = pick(vv > Each{}, xv / vv, Each{}), fits = xv * scale;
        Which better = fits > most;
        most = pick(better, fits, most);
        best = pick(better, scale, best);
    }
    void run(int tries, float step, int turns) {
        Each unit = reciprocal(s.largest);
        for (int k = -tries; k <= tries; ++k) {
            attempt((Grid::reach + step * static_cast<float>(k)) * unit);
            attempt((-Grid::reach - step * static_cast<float>(k)) * unit);
        }
        for (int turn = 0; turn < turns; ++turn) attempt(reciprocal(best));
    }
};

// Squared error of each block with the scale that will be stored.
template <class Grid, int columns> HYBRIDLM_INLINE Each errors(const Side<columns>& s, Each scale) {
    Each inverse = reciprocal(scale), sum{};
    for (int i = 0; i < columns; ++i) {
        Each e = Grid::value(s.x[i] * inverse) * scale - s.x[i];
        sum += s.weight[i] * e * e;
    }
    return sum;
}

template <class Grid, class Pack>
HYBRIDLM_INLINE void encode_one_scale(const float* x, int64_t cols, const float* importance, int tries, float step, Pack pack) {
    Side<32> s;
    for (int64_t first = 0; first < cols / 32; first += group) {
        const int blocks = static_cast<int>(smaller(group, cols / 32 - first));
        s.take(x + 32 * first, blocks, importance ? importance + 32 * first : nullptr);
        Search<Grid, 32> search{s};
        search.run(tries, step, 2);
        Each best = round_f16(search.best), plain = round_f16(s.largest * (-1.0f / Grid::reach));
        Each d = pick(errors<Grid>(s, best) <= errors<Grid>(s, plain), best, plain), inverse = reciprocal(d);
        Each codes[32];
        for (int i = 0; i < 32; ++i) codes[i] = Grid::code(s.x[i] * inverse);
        for (int b = 0; b < blocks; ++b) {
            bool finite = true;
            for (int i = 0; i < 32; ++i) finite &= is_finite(x[32 * (first + b) + i]);
            uint8_t code[32];
            for (int i = 0; i < 32; ++i) code[i] = finite ? static_cast<uint8_t>(codes[i][b]) : 0;
            pack(first + b, finite ? d[b] : from_bits(0x7fc00000), code);  // not finite: let it show
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

// Super-blocks of 256 that are worked on together, as `parts` groups of their blocks.
template <int blocks> struct Together {
    static constexpr int parts = group >= blocks ? 1 : blocks / group, supers = group >= blocks ? group / blocks : 1;
};

// x is close to scale * q + offset, q from 0 to `most`: sums over a block that say everything about the fit for the q that
// it rounds to.
struct Line {
    Each q, qq, xq;
};

template <int most> struct Affine {
    Side<32> s;
    Each low, high, w, wx, wxx;  // extremes and sums of a block; low <= 0
    Each scale, offset, error;   // the best so far

    HYBRIDLM_INLINE Line line(Each inverse, Each from) const {
        Line l{};
        for (int i = 0; i < 32; ++i) {
            Each q = limit(nearest((s.x[i] - from) * inverse), 0, most), wq = s.weight[i] * q;
            l.q += wq;
            l.qq += wq * q;
            l.xq += wq * s.x[i];
        }
        return l;
    }
    HYBRIDLM_INLINE Each error_of(const Line& l, Each a, Each c) const {
        return wxx + a * (a * l.qq - 2.0f * l.xq + 2.0f * c * l.q) + c * (c * w - 2.0f * wx);
    }
    // Fits a line through what the roundings are, with an offset that is not positive. Where all are 0, it is level.
    HYBRIDLM_INLINE void attempt(Each inverse, Each from) {
        Line l = line(inverse, from);
        Each det = w * l.qq - l.q * l.q;
        Each a = (w * l.xq - wx * l.q) / det, c = (l.qq * wx - l.q * l.xq) / det;
        Which two = (det > Each{}) & (c <= Each{});
        Which level = l.qq <= Each{};
        a = pick(two, a, pick(level, Each{}, l.xq / l.qq));
        c = pick(two, c, pick(level, pick(wx < Each{}, wx / w, Each{}), Each{}));
        Each e = error_of(l, a, c);
        Which better = (e < error) & (a >= Each{});
        error = pick(better, e, error);
        scale = pick(better, a, scale);
        offset = pick(better, c, offset);
    }
    void run(const float* from, int blocks, const float* importance) {
        s.take(from, blocks, importance);
        low = w = wx = wxx = scale = offset = Each{};
        high = s.x[0];
        for (int i = 0; i < 32; ++i) {
            Each x = s.x[i], v = s.weight[i];
            low = pick(x < low, x, low);
            high = pick(x > high, x, high);
            w += v, wx += v * x, wxx += v * x * x;
        }
        error = wxx;
        Each unit = reciprocal(high - low);
        for (int k = 0; k < 20; ++k) attempt((static_cast<float>(most) - 1.0f + 0.1f * static_cast<float>(k)) * unit, low);
        for (int turn = 0; turn < 3; ++turn) attempt(reciprocal(scale), offset);
    }
};

// What is stored for a super-block: x is close to d * scale[j] * q - dmin * minimum[j].
struct Super {
    float d = 0, dmin = 0, least = from_bits(0x7f7fffff);
    float next_d = 0, next_dmin = 0;
    int scale[8] = {}, minimum[8] = {};
    bool done = false;
};

// Super-blocks at `from`: codes [256] each.
template <int most>
void encode_with_minimum(const float* from, const float* importance, int supers, Super* out, uint8_t* codes) {
    constexpr int parts = Together<8>::parts;
    Affine<most> affine[parts];
    for (int p = 0; p < parts; ++p)
        affine[p].run(from + 32 * group * p, static_cast<int>(smaller(group, 8 * supers)),
                      importance ? importance + 32 * group * p : nullptr);
    auto at = [&](int super, int j) { return 8 * super + j; };  // block number: part * group + lane
    for (int u = 0; u < supers; ++u) {
        float most_scale = 0, most_minimum = 0;
        for (int j = 0; j < 8; ++j) {
            const auto& a = affine[at(u, j) / group];
            float scale = a.scale[at(u, j) % group], minimum = -a.offset[at(u, j) % group];
            most_scale = scale > most_scale ? scale : most_scale;
            most_minimum = minimum > most_minimum ? minimum : most_minimum;
        }
        out[u].next_d = round_f16(most_scale / 63), out[u].next_dmin = round_f16(most_minimum / 63);
    }
    // Whole-number scales and minima for the two super scales, then super scales for the whole numbers, while it helps.
    for (int round = 0; round < 3; ++round) {
        Each sc[parts], mn[parts], error[parts];
        Line kept[parts];
        bool more = false;
        for (int p = 0; p < parts; ++p) {
            auto& a = affine[p];
            Each d{}, dmin{};
            for (int b = 0; b < group && (group * p + b) / 8 < supers; ++b)
                d[b] = out[(group * p + b) / 8].next_d, dmin[b] = out[(group * p + b) / 8].next_dmin;
            Each start = limit(nearest(a.scale * reciprocal(d)), 0, 63);
            Each start_minimum = limit(nearest(-a.offset * reciprocal(dmin)), 0, 63);
            error[p] = same_each(from_bits(0x7f7fffff));
            sc[p] = mn[p] = Each{};
            kept[p] = Line{};
            for (int ds = -1; ds <= 1; ++ds) {
                Each scale = limit(start + static_cast<float>(ds), 0, 63), step = d * scale, inverse = reciprocal(step);
                for (int dm = -2; dm <= 2; ++dm) {
                    Each minimum = limit(start_minimum + static_cast<float>(dm), 0, 63), offset = -dmin * minimum;
                    Line l = a.line(inverse, offset);
                    Each e = a.error_of(l, step, offset);
                    Which better = e < error[p];
                    error[p] = pick(better, e, error[p]);
                    sc[p] = pick(better, scale, sc[p]);
                    mn[p] = pick(better, minimum, mn[p]);
                    kept[p].q = pick(better, l.q, kept[p].q);
                    kept[p].qq = pick(better, l.qq, kept[p].qq);
                    kept[p].xq = pick(better, l.xq, kept[p].xq);
                }
            }
        }
        for (int u = 0; u < supers; ++u) {
            Super& o = out[u];
            if (o.done) continue;
            float sum = 0;
            for (int j = 0; j < 8; ++j) sum += error[at(u, j) / group][at(u, j) % group];
            if (!(sum < o.least)) {
                o.done = true;
                continue;
            }
            o.least = sum, o.d = o.next_d, o.dmin = o.next_dmin;
            double ss = 0, sm = 0, mm = 0, sx = 0, mx = 0;
            for (int j = 0; j < 8; ++j) {
                const int p = at(u, j) / group, b = at(u, j) % group;
                double q = sc[p][b], m = mn[p][b];
                o.scale[j] = static_cast<int>(sc[p][b]), o.minimum[j] = static_cast<int>(mn[p][b]);
                affine[p].scale[b] = o.d * sc[p][b], affine[p].offset[b] = -o.dmin * mn[p][b];
                ss += q * q * kept[p].qq[b], sm += q * m * kept[p].q[b], mm += m * m * affine[p].w[b];
                sx += q * kept[p].xq[b], mx += m * affine[p].wx[b];
            }
            double det = ss * mm - sm * sm;
            if (det > 1e-9 * ss * mm) {
                o.next_d = static_cast<float>((sx * mm - mx * sm) / det);
                o.next_dmin = static_cast<float>((sx * sm - mx * ss) / det);
            } else if (ss > 0) {
                o.next_d = static_cast<float>(sx / ss);
            }
            o.next_d = round_f16(o.next_d), o.next_dmin = round_f16(o.next_dmin);
            o.done = !(o.next_d > 0) || !(o.next_dmin >= 0) || (o.next_d == o.d && o.next_dmin == o.dmin);
            more |= !o.done;
        }
        if (!more) break;
    }
    for (int u = 0; u < supers; ++u) {
        for (int j = 0; j < 8; ++j) {
            const float* x = from + 256 * u + 32 * j;
            float a = out[u].d * static_cast<float>(out[u].scale[j]), c = -out[u].dmin * static_cast<float>(out[u].minimum[j]);
            float inverse = reciprocal(a);
            uint8_t* code = codes + 256 * u + 32 * j;
            for (int i = 0; i < 32; ++i) code[i] = static_cast<uint8_t>(clip(nearest((x[i] - c) * inverse), 0, most));
        }
    }
}

HYBRIDLM_INLINE bool all_finite(const float* x) {
    bool finite = true;
    for (int i = 0; i < 256; ++i) finite &= is_finite(x[i]);
    return finite;
}

template <int type> void encode_minimum_type(const float* x, int64_t cols, const float* importance, uint8_t* p) {
    constexpr int most = type == Q4_K ? 15 : 31, bytes = type == Q4_K ? 144 : 176, together = Together<8>::supers;
    for (int64_t first = 0; first < cols; first += 256 * together) {
        const int supers = static_cast<int>(smaller(together, (cols - first) / 256));
        Super super[together];
        uint8_t codes[256 * together];
        encode_with_minimum<most>(x + first, importance ? importance + first : nullptr, supers, super, codes);
        for (int u = 0; u < supers; ++u, p += bytes) {
            const uint8_t* code = codes + 256 * u;
            if (all_finite(x + first + 256 * u)) {
                put_half(p, super[u].d);
                put_half(p + 2, super[u].dmin);
            } else {
                put_half(p, from_bits(0x7fc00000));
                put_half(p + 2, 0);
            }
            put_six_bits(p + 4, super[u].scale, super[u].minimum);
            uint8_t* low = p + (type == Q4_K ? 16 : 48);
            for (int c = 0; c < 4; ++c)
                for (int i = 0; i < 32; ++i)
                    low[32 * c + i] = static_cast<uint8_t>((code[64 * c + i] & 15) | (code[64 * c + 32 + i] & 15) << 4);
            if constexpr (type == Q5_K) {
                for (int i = 0; i < 32; ++i) {
                    int bits = 0;
                    for (int j = 0; j < 8; ++j) bits |= code[32 * j + i] >> 4 << j;
                    p[16 + i] = static_cast<uint8_t>(bits);
                }
            }
        }
    }
}

inline void encode_q6_k(const float* x, int64_t cols, const float* importance, uint8_t* p) {
    using Grid = Even<32>;
    constexpr int parts = Together<16>::parts;
    Side<16> side[parts];
    for (int64_t first = 0; first < cols; first += 256, p += 210) {
        Each best[parts];
        float most = 0;
        for (int h = 0; h < parts; ++h) {
            side[h].take(x + first + 16 * group * h, group, importance ? importance + first + 16 * group * h : nullptr);
            Search<Grid, 16> search{side[h]};
            search.run(6, 0.15f, 2);
            best[h] = search.best;
            for (int b = 0; b < group; ++b) most = magnitude(best[h][b]) > magnitude(most) ? best[h][b] : most;
        }
        float d = round_f16(most / -128), least = from_bits(0x7f7fffff), stored = 0;
        Each kept[parts] = {};
        for (int turn = 0; turn < 3; ++turn) {
            Each scale[parts];
            double ss = 0, sx = 0, sum = 0;
            for (int h = 0; h < parts; ++h) {
                Each start = limit(nearest(best[h] * same_each(reciprocal(d))), -128, 127);
                Each error = same_each(from_bits(0x7f7fffff));
                scale[h] = Each{};
                for (int ds = -1; ds <= 1; ++ds) {
                    Each tried = limit(start + static_cast<float>(ds), -128, 127), e = errors<Grid>(side[h], d * tried);
                    scale[h] = pick(e < error, tried, scale[h]);
                    error = pick(e < error, e, error);
                }
                Each inverse = reciprocal(d * scale[h]), vv{}, xv{};
                for (int i = 0; i < 16; ++i) {
                    Each v = scale[h] * Grid::value(side[h].x[i] * inverse), wv = side[h].weight[i] * v;
                    vv += wv * v;
                    xv += wv * side[h].x[i];
                }
                for (int b = 0; b < group; ++b) sum += error[b], ss += vv[b], sx += xv[b];
            }
            if (!(sum < least)) break;
            least = static_cast<float>(sum);
            stored = d;
            for (int h = 0; h < parts; ++h) kept[h] = scale[h];
            float next = ss > 0 ? round_f16(static_cast<float>(sx / ss)) : d;
            if (next == d || next == 0) break;
            d = next;
        }
        uint8_t codes[256];
        int32_t scales[16];
        for (int j = 0; j < 16; ++j) {
            scales[j] = static_cast<int32_t>(kept[j / group][j % group]);
            float inverse = reciprocal(stored * static_cast<float>(scales[j]));
            const float* v = x + first + 16 * j;
            for (int i = 0; i < 16; ++i) codes[16 * j + i] = static_cast<uint8_t>(clip(nearest(v[i] * inverse), -32, 31) + 32);
        }
        if (!all_finite(x + first)) stored = from_bits(0x7fc00000);
        for (int h = 0; h < 2; ++h) {
            const uint8_t* c = codes + 128 * h;
            for (int i = 0; i < 64; ++i) p[64 * h + i] = static_cast<uint8_t>((c[i] & 15) | (c[64 + i] & 15) << 4);
            for (int i = 0; i < 32; ++i)
                p[128 + 32 * h + i] = static_cast<uint8_t>(c[i] >> 4 | c[32 + i] >> 4 << 2 | c[64 + i] >> 4 << 4 | c[96 + i] >> 4 << 6);
        }
        for (int j = 0; j < 16; ++j) p[192 + j] = static_cast<uint8_t>(scales[j]);
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
            return encode_one_scale<Even<8>>(x, cols, importance, 7, 0.12f, [&](int64_t block, float d, const uint8_t* q) {
                uint8_t* p = out + 18 * block;
                put_half(p, d);
                for (int i = 0; i < 16; ++i) p[2 + i] = static_cast<uint8_t>(q[i] | q[16 + i] << 4);
            });
        case Q5_0:
            return encode_one_scale<Even<16>>(x, cols, importance, 7, 0.15f, [&](int64_t block, float d, const uint8_t* q) {
                uint8_t* p = out + 22 * block;
                uint32_t high = 0;
                put_half(p, d);
                for (int i = 0; i < 32; ++i) high |= static_cast<uint32_t>(q[i] >> 4) << i;
                memcpy(p + 2, &high, 4);
                for (int i = 0; i < 16; ++i) p[6 + i] = static_cast<uint8_t>((q[i] & 15) | (q[16 + i] & 15) << 4);
            });
        case IQ4_NL:
            return encode_one_scale<Nonlinear>(x, cols, importance, 5, 4.0f, [&](int64_t block, float d, const uint8_t* q) {
                uint8_t* p = out + 18 * block;
                put_half(p, d);
                for (int i = 0; i < 16; ++i) p[2 + i] = static_cast<uint8_t>(q[i] | q[16 + i] << 4);
            });
        case Q4_K: return encode_minimum_type<Q4_K>(x, cols, importance, out);
        case Q5_K: return encode_minimum_type<Q5_K>(x, cols, importance, out);
        case Q6_K: return encode_q6_k(x, cols, importance, out);
    }
}
