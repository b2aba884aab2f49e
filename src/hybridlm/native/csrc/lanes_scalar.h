// The vectors of lanes.h as arrays, which a compiler may turn into whatever the baseline has.

constexpr int lanes = 4;
constexpr int wide_tile = 4;
constexpr int straight = 1;
struct U {
    uint32_t v[lanes];
};
struct I {
    int32_t v[lanes];
};
struct F {
    float v[lanes];
};
#define HYBRIDLM_EACH for (int k = 0; k < lanes; ++k)

HYBRIDLM_INLINE U load(const void* p) {
    U r;
    memcpy(&r, p, sizeof r);
    return r;
}
HYBRIDLM_INLINE void store(void* p, U v) { memcpy(p, &v, sizeof v); }
HYBRIDLM_INLINE U same(uint32_t v) {
    U r;
    HYBRIDLM_EACH r.v[k] = v;
    return r;
}
HYBRIDLM_INLINE U bit_and(U a, U b) {
    HYBRIDLM_EACH a.v[k] &= b.v[k];
    return a;
}
HYBRIDLM_INLINE U bit_or(U a, U b) {
    HYBRIDLM_EACH a.v[k] |= b.v[k];
    return a;
}
HYBRIDLM_INLINE U bit_xor(U a, U b) {
    HYBRIDLM_EACH a.v[k] ^= b.v[k];
    return a;
}
template <int n> HYBRIDLM_INLINE U right(U a) {
    HYBRIDLM_EACH a.v[k] >>= n;
    return a;
}
template <int n> HYBRIDLM_INLINE U left(U a) {
    HYBRIDLM_EACH a.v[k] <<= n;
    return a;
}
HYBRIDLM_INLINE U across(U low, U high) { return bit_or(right<16>(low), left<16>(high)); }
HYBRIDLM_INLINE void nibbles_across(U low, U high, U& first, U& second) {
    U both = across(low, high), mask = same(0x0f0f0f0fu);
    first = bit_and(both, mask);
    second = bit_and(right<4>(both), mask);
}
template <int i> HYBRIDLM_INLINE U fifth_bits(U bits) {
    U r;
    HYBRIDLM_EACH r.v[k] = (((bits.v[k] >> (4 * i) & 15u) * 0x00204081u) & 0x01010101u) << 4;
    return r;
}
HYBRIDLM_INLINE U lookup(U index, const uint8_t* table) {
    U r;
    HYBRIDLM_EACH {
        uint32_t q = index.v[k];
        r.v[k] =
            table[q & 15] | table[q >> 8 & 15] << 8 | table[q >> 16 & 15] << 16 | uint32_t(table[q >> 24 & 15]) << 24;
    }
    return r;
}
HYBRIDLM_INLINE F half_low(U a) {
    F r;
    HYBRIDLM_EACH r.v[k] = from_f16(uint16_t(a.v[k]));
    return r;
}
HYBRIDLM_INLINE F half_high(U a) { return half_low(right<16>(a)); }
template <int n> HYBRIDLM_INLINE F byte(U a) {
    F r;
    HYBRIDLM_EACH r.v[k] = float(int32_t(a.v[k] >> (8 * n) & 0xff));
    return r;
}
template <int n> HYBRIDLM_INLINE F signed_byte(U a) {
    F r;
    HYBRIDLM_EACH r.v[k] = float(int8_t(a.v[k] >> (8 * n)));
    return r;
}
HYBRIDLM_INLINE F load_f(const float* p) {
    F r;
    memcpy(&r, p, sizeof r);
    return r;
}
HYBRIDLM_INLINE void store_f(float* p, F v) { memcpy(p, &v, sizeof v); }
HYBRIDLM_INLINE F same_f(float v) {
    F r;
    HYBRIDLM_EACH r.v[k] = v;
    return r;
}
HYBRIDLM_INLINE F zero_f() { return same_f(0); }
HYBRIDLM_INLINE F times(F a, F b) {
    HYBRIDLM_EACH a.v[k] *= b.v[k];
    return a;
}
HYBRIDLM_INLINE F fused(F a, F b, F c) {
    HYBRIDLM_EACH c.v[k] += a.v[k] * b.v[k];
    return c;
}
HYBRIDLM_INLINE F fused_minus(F a, F b, F c) {
    HYBRIDLM_EACH c.v[k] -= a.v[k] * b.v[k];
    return c;
}
HYBRIDLM_INLINE F convert(I a) {
    F r;
    HYBRIDLM_EACH r.v[k] = float(a.v[k]);
    return r;
}

HYBRIDLM_INLINE void rows_to_dwords(const uint8_t* p, size_t stride, U* out) {
    for (int i = 0; i < 4; ++i) HYBRIDLM_EACH memcpy(&out[i].v[k], p + k * stride + 4 * i, 4);
}
template <int bias> HYBRIDLM_INLINE U prepare(U w) { return w; }
template <int bias, int max, int n> HYBRIDLM_INLINE I dots_of(const U* w, const int8_t* x, const int32_t* start) {
    I sum;
    HYBRIDLM_EACH sum.v[k] = bias ? *start : 0;
    for (int i = 0; i < n; ++i)
        for (int b = 0; b < 4; ++b) HYBRIDLM_EACH sum.v[k] += int32_t(w[i].v[k] >> (8 * b) & 0xff) * x[4 * i + b];
    return sum;
}
HYBRIDLM_INLINE double spin_dots(int64_t turns) {
    volatile int32_t sum = 0;
    for (int64_t turn = 0; turn < turns; ++turn) sum = sum + int32_t(turn & 127) * 3;
    return static_cast<double>(turns) * 2;
}
HYBRIDLM_INLINE F columns(const float* p) { return load_f(p); }
HYBRIDLM_INLINE F columns_f16(const uint16_t* p) {
    F r;
    HYBRIDLM_EACH r.v[k] = from_f16(p[k]);
    return r;
}
HYBRIDLM_INLINE F columns_bf16(const uint16_t* p) {
    F r;
    HYBRIDLM_EACH r.v[k] = from_bf16(p[k]);
    return r;
}
HYBRIDLM_INLINE float total(F v) { return (v.v[0] + v.v[1]) + (v.v[2] + v.v[3]); }
HYBRIDLM_INLINE void fetch(const void*) {}
#undef HYBRIDLM_EACH
