// The vectors of lanes.h in NEON with the dot product of Armv8.2: pairs of registers.

constexpr int lanes = 8;
constexpr int wide_tile = 8;
constexpr int straight = 1;
struct U {
    uint32x4_t a, b;
};
struct I {
    int32x4_t a, b;
};
struct F {
    float32x4_t a, b;
};

HYBRIDLM_INLINE U load(const void* p) {
    const uint32_t* q = static_cast<const uint32_t*>(p);
    return {vld1q_u32(q), vld1q_u32(q + 4)};
}
HYBRIDLM_INLINE void store(void* p, U v) {
    uint32_t* q = static_cast<uint32_t*>(p);
    vst1q_u32(q, v.a), vst1q_u32(q + 4, v.b);
}
HYBRIDLM_INLINE U same(uint32_t v) { return {vdupq_n_u32(v), vdupq_n_u32(v)}; }
HYBRIDLM_INLINE U bit_and(U a, U b) { return {vandq_u32(a.a, b.a), vandq_u32(a.b, b.b)}; }
HYBRIDLM_INLINE U bit_or(U a, U b) { return {vorrq_u32(a.a, b.a), vorrq_u32(a.b, b.b)}; }
HYBRIDLM_INLINE U bit_xor(U a, U b) { return {veorq_u32(a.a, b.a), veorq_u32(a.b, b.b)}; }
template <int n> HYBRIDLM_INLINE U right(U a) {
    if constexpr (n == 0) return a;
    else return {vshrq_n_u32(a.a, n), vshrq_n_u32(a.b, n)};
}
template <int n> HYBRIDLM_INLINE U left(U a) { return {vshlq_n_u32(a.a, n), vshlq_n_u32(a.b, n)}; }
HYBRIDLM_INLINE U across(U low, U high) { return bit_or(right<16>(low), left<16>(high)); }
HYBRIDLM_INLINE void nibbles_across(U low, U high, U& first, U& second) {
    U both = across(low, high), mask = same(0x0f0f0f0fu);
    first = bit_and(both, mask);
    second = bit_and(right<4>(both), mask);
}
template <int i> HYBRIDLM_INLINE U fifth_bits(U bits) {
    U four = bit_and(right<4 * i>(bits), same(15));
    uint32x4_t spread = vdupq_n_u32(0x00204081u);
    return left<4>(bit_and({vmulq_u32(four.a, spread), vmulq_u32(four.b, spread)}, same(0x01010101u)));
}
HYBRIDLM_INLINE U lookup(U index, const uint8_t* table) {
    uint8x16_t t = vld1q_u8(table);
    return {vreinterpretq_u32_u8(vqtbl1q_u8(t, vreinterpretq_u8_u32(index.a))),
            vreinterpretq_u32_u8(vqtbl1q_u8(t, vreinterpretq_u8_u32(index.b)))};
}
HYBRIDLM_INLINE F half_low(U a) {
    return {vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(a.a))), vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(a.b)))};
}
HYBRIDLM_INLINE F half_high(U a) { return half_low(right<16>(a)); }
template <int n> HYBRIDLM_INLINE F byte(U a) {
    U b = bit_and(right<8 * n>(a), same(0xff));
    return {vcvtq_f32_u32(b.a), vcvtq_f32_u32(b.b)};
}
template <int n> HYBRIDLM_INLINE F signed_byte(U a) {
    U b = left<24 - 8 * n>(a);
    return {vcvtq_f32_s32(vshrq_n_s32(vreinterpretq_s32_u32(b.a), 24)),
            vcvtq_f32_s32(vshrq_n_s32(vreinterpretq_s32_u32(b.b), 24))};
}
HYBRIDLM_INLINE F load_f(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
HYBRIDLM_INLINE void store_f(float* p, F v) { vst1q_f32(p, v.a), vst1q_f32(p + 4, v.b); }
HYBRIDLM_INLINE F same_f(float v) { return {vdupq_n_f32(v), vdupq_n_f32(v)}; }
HYBRIDLM_INLINE F zero_f() { return same_f(0); }
HYBRIDLM_INLINE F times(F a, F b) { return {vmulq_f32(a.a, b.a), vmulq_f32(a.b, b.b)}; }
HYBRIDLM_INLINE F fused(F a, F b, F c) { return {vfmaq_f32(c.a, a.a, b.a), vfmaq_f32(c.b, a.b, b.b)}; }
HYBRIDLM_INLINE F fused_minus(F a, F b, F c) { return {vfmsq_f32(c.a, a.a, b.a), vfmsq_f32(c.b, a.b, b.b)}; }
HYBRIDLM_INLINE F convert(I a) { return {vcvtq_f32_s32(a.a), vcvtq_f32_s32(a.b)}; }

HYBRIDLM_INLINE void four_rows(const uint8_t* p, size_t stride, uint32x4_t* out) {
    uint32x4_t r0 = vreinterpretq_u32_u8(vld1q_u8(p)), r1 = vreinterpretq_u32_u8(vld1q_u8(p + stride));
    uint32x4_t r2 = vreinterpretq_u32_u8(vld1q_u8(p + 2 * stride)), r3 = vreinterpretq_u32_u8(vld1q_u8(p + 3 * stride));
    uint64x2_t a = vreinterpretq_u64_u32(vtrn1q_u32(r0, r1)), b = vreinterpretq_u64_u32(vtrn2q_u32(r0, r1));
    uint64x2_t c = vreinterpretq_u64_u32(vtrn1q_u32(r2, r3)), d = vreinterpretq_u64_u32(vtrn2q_u32(r2, r3));
    out[0] = vreinterpretq_u32_u64(vtrn1q_u64(a, c));
    out[1] = vreinterpretq_u32_u64(vtrn1q_u64(b, d));
    out[2] = vreinterpretq_u32_u64(vtrn2q_u64(a, c));
    out[3] = vreinterpretq_u32_u64(vtrn2q_u64(b, d));
}
HYBRIDLM_INLINE void rows_to_dwords(const uint8_t* p, size_t stride, U* out) {
    uint32x4_t low[4], high[4];
    four_rows(p, stride, low);
    four_rows(p + 4 * stride, stride, high);
    for (int i = 0; i < 4; ++i) out[i] = {low[i], high[i]};
}

// The dot product takes signed numbers: the bias comes off here.
template <int bias> HYBRIDLM_INLINE U prepare(U w) {
    uint8x16_t b = vdupq_n_u8(bias);
    return {vreinterpretq_u32_u8(vsubq_u8(vreinterpretq_u8_u32(w.a), b)),
            vreinterpretq_u32_u8(vsubq_u8(vreinterpretq_u8_u32(w.b), b))};
}

template <int bias, int max, int n> HYBRIDLM_INLINE I dots_of(const U* w, const int8_t* x, const int32_t*) {
    const int32_t* q = reinterpret_cast<const int32_t*>(x);
    I sum = {vdupq_n_s32(0), vdupq_n_s32(0)};
    for (int i = 0; i < n; ++i) {
        int8x16_t four = vreinterpretq_s8_s32(vdupq_n_s32(q[i]));
        sum.a = vdotq_s32(sum.a, vreinterpretq_s8_u32(w[i].a), four);
        sum.b = vdotq_s32(sum.b, vreinterpretq_s8_u32(w[i].b), four);
    }
    return sum;
}

HYBRIDLM_INLINE double spin_dots(int64_t turns) {
    int8x16_t x = vdupq_n_s8(3);
    int32x4_t s[12];
    for (int i = 0; i < 12; ++i) s[i] = vdupq_n_s32(i);
    for (int64_t turn = 0; turn < turns; ++turn) {
        for (int i = 0; i < 12; ++i) s[i] = vdotq_s32(s[i], x, x);
        for (int i = 0; i < 12; ++i) asm volatile("" : "+w"(s[i]));
    }
    return static_cast<double>(turns) * 12 * 16 * 2;
}

HYBRIDLM_INLINE F columns(const float* p) { return load_f(p); }
HYBRIDLM_INLINE F columns_f16(const uint16_t* p) {
    return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))), vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4)))};
}
HYBRIDLM_INLINE F columns_bf16(const uint16_t* p) {
    return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)),
            vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4), 16))};
}
HYBRIDLM_INLINE float total(F v) { return vaddvq_f32(vaddq_f32(v.a, v.b)); }
HYBRIDLM_INLINE void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }
