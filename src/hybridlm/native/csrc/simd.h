// A vector of floats, as wide as the instruction set that this translation unit is compiled for.
//
// Kernels are written once over `V` (L floats) and compiled once per instruction set: scalar, AVX2 + FMA + F16C,
// AVX-512, NEON. Included by mixers.inl inside the instruction set's namespace, hence without headers of its own, and
// without templates of the standard library (isa.inl says why).
//
// exp is within 1.5 ulp over the whole range (0 below -104, inf above 88.73, NaN stays NaN); sigmoid and silu follow
// from it by one division.

#if defined(HYBRIDLM_AVX512)
#define HLM_AVX512 1
#elif defined(HYBRIDLM_AVX2)
#define HLM_AVX2 1
#elif defined(HYBRIDLM_NEON)
#define HLM_NEON 1
#endif

#if defined(_MSC_VER)
#define HLM_INLINE static __forceinline
#define HLM_RESTRICT __restrict
#define HLM_UNROLL
#else
#define HLM_INLINE static inline __attribute__((always_inline))
#define HLM_RESTRICT __restrict__
#define HLM_UNROLL _Pragma("GCC unroll 32")
#endif

// ---- scalar helpers ------------------------------------------------------------------------------------------------

HLM_INLINE int least(int a, int b) { return a < b ? a : b; }
HLM_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
HLM_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
HLM_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

HLM_INLINE float fma1(float a, float b, float c) {
#if defined(HLM_AVX512) || defined(HLM_AVX2) || defined(HLM_NEON)
    return fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

HLM_INLINE float half_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = uint32_t(h & 0x7fff) << 13;
    uint32_t bits;
    float f;
    if (magnitude < (0x0400u << 13)) {  // zero or subnormal: an exact multiple of 2^-24
        f = float(h & 0x7fff) * 5.9604644775390625e-8f;
        memcpy(&bits, &f, 4);
    } else {
        bits = magnitude + ((127u - 15u) << 23);
        if (magnitude >= (0x7c00u << 13)) bits += (127u + 1 - 16u) << 23;  // inf, NaN
    }
    bits |= sign;
    memcpy(&f, &bits, 4);
    return f;
}

HLM_INLINE uint16_t float_to_half(float f) {  // to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &f, 4);
    const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to 65536 or beyond
    if (magnitude < 0x38800000) {                                 // subnormal: adding 0.5 rounds at 2^-24
        float m;
        memcpy(&m, &magnitude, 4);
        m += 0.5f;
        uint32_t r;
        memcpy(&r, &m, 4);
        return uint16_t(sign | (r - 0x3f000000));
    }
    return uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13));
}

HLM_INLINE void prefetch(const void* p) {
#if defined(_MSC_VER)
    _mm_prefetch((const char*)p, _MM_HINT_T0);
#else
    __builtin_prefetch(p);
#endif
}

// Into the second-level cache: for what is used soon, but not next.
HLM_INLINE void prefetch2(const void* p) {
#if defined(_MSC_VER)
    _mm_prefetch((const char*)p, _MM_HINT_T1);
#else
    __builtin_prefetch(p, 0, 2);
#endif
}

// Subnormal results are zero while this lives: a state that decays to nothing must not slow the machine down.
struct FlushSubnormals {
#if defined(__x86_64__) || defined(_M_X64)
    unsigned saved;
    FlushSubnormals() : saved(_mm_getcsr()) { _mm_setcsr(saved | 0x8040); }
    ~FlushSubnormals() { _mm_setcsr(saved); }
#elif defined(__aarch64__) && !defined(_MSC_VER)
    uint64_t saved;
    FlushSubnormals() {
        __asm__ volatile("mrs %0, fpcr" : "=r"(saved));
        __asm__ volatile("msr fpcr, %0" : : "r"(saved | (uint64_t(1) << 24)));
    }
    ~FlushSubnormals() { __asm__ volatile("msr fpcr, %0" : : "r"(saved)); }
#else
    FlushSubnormals() {}
    ~FlushSubnormals() {}
#endif
};

// ---- the vector ----------------------------------------------------------------------------------------------------

#if defined(HLM_AVX512)

typedef __m512 V;
static constexpr int L = 16, REGISTERS = 32;

HLM_INLINE V zero() { return _mm512_setzero_ps(); }
HLM_INLINE V set1(float x) { return _mm512_set1_ps(x); }
HLM_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
HLM_INLINE void store(float* p, V x) { _mm512_storeu_ps(p, x); }
HLM_INLINE __mmask16 first(int n) { return __mmask16((1u << n) - 1); }
HLM_INLINE V load_part(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
HLM_INLINE void store_part(float* p, V x, int n) { _mm512_mask_storeu_ps(p, first(n), x); }
HLM_INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
HLM_INLINE V sub(V a, V b) { return _mm512_sub_ps(a, b); }
HLM_INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
HLM_INLINE V div(V a, V b) { return _mm512_div_ps(a, b); }
HLM_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }    // a b + c
HLM_INLINE V fnma(V a, V b, V c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
HLM_INLINE V max(V a, V b) { return _mm512_max_ps(a, b); }              // b where either is NaN
HLM_INLINE V min(V a, V b) { return _mm512_min_ps(a, b); }
HLM_INLINE float hsum(V x) { return _mm512_reduce_add_ps(x); }
HLM_INLINE float hmax(V x) { return _mm512_reduce_max_ps(x); }
HLM_INLINE V round(V x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
HLM_INLINE V scale2(V x, V n) { return _mm512_scalef_ps(x, n); }  // x 2^n for whole n
HLM_INLINE V load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
HLM_INLINE V set1_half(uint16_t h) { return _mm512_cvtph_ps(_mm256_set1_epi16(short(h))); }
HLM_INLINE void store_half(uint16_t* p, V x) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
HLM_INLINE V load_int8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
HLM_INLINE void store_int8(int8_t* p, V x) {  // of whole numbers in -128 .. 127
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
}
// Lane i of the result is the sum over the lanes of v[i].
HLM_INLINE V sums(const V v[L]) {
    __m512 a[8], b[4], c[2];
    HLM_UNROLL
    for (int i = 0; i < 8; i++)
        a[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    HLM_UNROLL
    for (int i = 0; i < 4; i++) {
        const __m512d x = _mm512_castps_pd(a[2 * i]), y = _mm512_castps_pd(a[2 * i + 1]);
        b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    HLM_UNROLL
    for (int i = 0; i < 2; i++)
        c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
}

#elif defined(HLM_AVX2)

typedef __m256 V;
static constexpr int L = 8, REGISTERS = 16;

HLM_INLINE V zero() { return _mm256_setzero_ps(); }
HLM_INLINE V set1(float x) { return _mm256_set1_ps(x); }
HLM_INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
HLM_INLINE void store(float* p, V x) { _mm256_storeu_ps(p, x); }
HLM_INLINE __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
HLM_INLINE V load_part(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
HLM_INLINE void store_part(float* p, V x, int n) { _mm256_maskstore_ps(p, first(n), x); }
HLM_INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
HLM_INLINE V sub(V a, V b) { return _mm256_sub_ps(a, b); }
HLM_INLINE V mul(V a, V b) { return _mm256_mul_ps(a, b); }
HLM_INLINE V div(V a, V b) { return _mm256_div_ps(a, b); }
HLM_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
HLM_INLINE V fnma(V a, V b, V c) { return _mm256_fnmadd_ps(a, b, c); }
HLM_INLINE V max(V a, V b) { return _mm256_max_ps(a, b); }
HLM_INLINE V min(V a, V b) { return _mm256_min_ps(a, b); }
HLM_INLINE float hsum(V x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
HLM_INLINE float hmax(V x) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
HLM_INLINE V round(V x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
HLM_INLINE V scale2(V x, V n) {  // in two halves, so that neither leaves the range of exponents
    const __m256i e = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(e, 1), bias = _mm256_set1_epi32(127);
    const __m256i rest = _mm256_sub_epi32(e, half);
    x = _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23)));
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23)));
}
HLM_INLINE V load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
HLM_INLINE V set1_half(uint16_t h) { return _mm256_cvtph_ps(_mm_set1_epi16(short(h))); }
HLM_INLINE void store_half(uint16_t* p, V x) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
HLM_INLINE V load_int8(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
HLM_INLINE void store_int8(int8_t* p, V x) {
    const __m256i e = _mm256_cvtps_epi32(x);
    const __m128i w = _mm_packs_epi32(_mm256_castsi256_si128(e), _mm256_extracti128_si256(e, 1));
    _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(w, w));
}
HLM_INLINE V sums(const V v[L]) {
    const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

#elif defined(HLM_NEON)

typedef float32x4_t V;
static constexpr int L = 4, REGISTERS = 32;

HLM_INLINE V zero() { return vdupq_n_f32(0); }
HLM_INLINE V set1(float x) { return vdupq_n_f32(x); }
HLM_INLINE V load(const float* p) { return vld1q_f32(p); }
HLM_INLINE void store(float* p, V x) { vst1q_f32(p, x); }
HLM_INLINE V load_part(const float* p, int n) {
    float t[4] = {0, 0, 0, 0};
    for (int i = 0; i < n; i++) t[i] = p[i];
    return vld1q_f32(t);
}
HLM_INLINE void store_part(float* p, V x, int n) {
    float t[4];
    vst1q_f32(t, x);
    for (int i = 0; i < n; i++) p[i] = t[i];
}
HLM_INLINE V add(V a, V b) { return vaddq_f32(a, b); }
HLM_INLINE V sub(V a, V b) { return vsubq_f32(a, b); }
HLM_INLINE V mul(V a, V b) { return vmulq_f32(a, b); }
HLM_INLINE V div(V a, V b) { return vdivq_f32(a, b); }
HLM_INLINE V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
HLM_INLINE V fnma(V a, V b, V c) { return vfmsq_f32(c, a, b); }
HLM_INLINE V max(V a, V b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
HLM_INLINE V min(V a, V b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
HLM_INLINE float hsum(V x) { return vaddvq_f32(x); }
HLM_INLINE float hmax(V x) { return vmaxvq_f32(x); }
HLM_INLINE V round(V x) { return vrndnq_f32(x); }
HLM_INLINE V scale2(V x, V n) {
    const int32x4_t e = vcvtnq_s32_f32(n), half = vshrq_n_s32(e, 1), bias = vdupq_n_s32(127);
    const int32x4_t rest = vsubq_s32(e, half);
    x = vmulq_f32(x, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(half, bias), 23)));
    return vmulq_f32(x, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(rest, bias), 23)));
}
HLM_INLINE V load_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
HLM_INLINE V set1_half(uint16_t h) { return vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(h))); }
HLM_INLINE void store_half(uint16_t* p, V x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
HLM_INLINE V load_int8(const int8_t* p) {
    int32_t four;
    memcpy(&four, p, 4);
    const int16x8_t w = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(w)));
}
HLM_INLINE void store_int8(int8_t* p, V x) {
    int32_t e[4];
    vst1q_s32(e, vcvtnq_s32_f32(x));
    for (int i = 0; i < 4; i++) p[i] = int8_t(e[i]);
}
HLM_INLINE V sums(const V v[L]) { return vpaddq_f32(vpaddq_f32(v[0], v[1]), vpaddq_f32(v[2], v[3])); }

#else

typedef float V;
static constexpr int L = 1, REGISTERS = 16;

HLM_INLINE V zero() { return 0; }
HLM_INLINE V set1(float x) { return x; }
HLM_INLINE V load(const float* p) { return *p; }
HLM_INLINE void store(float* p, V x) { *p = x; }
HLM_INLINE V load_part(const float*, int) { return 0; }
HLM_INLINE void store_part(float*, V, int) {}
HLM_INLINE V add(V a, V b) { return a + b; }
HLM_INLINE V sub(V a, V b) { return a - b; }
HLM_INLINE V mul(V a, V b) { return a * b; }
HLM_INLINE V div(V a, V b) { return a / b; }
HLM_INLINE V fma(V a, V b, V c) { return fma1(a, b, c); }
HLM_INLINE V fnma(V a, V b, V c) { return fma1(-a, b, c); }
HLM_INLINE V max(V a, V b) { return a > b ? a : b; }
HLM_INLINE V min(V a, V b) { return a < b ? a : b; }
HLM_INLINE float hsum(V x) { return x; }
HLM_INLINE float hmax(V x) { return x; }
HLM_INLINE V round(V x) { return rintf(x); }
HLM_INLINE V scale2(V x, V n) { return ldexpf(x, n == n ? int(n) : 0); }
HLM_INLINE V load_half(const uint16_t* p) { return half_to_float(*p); }
HLM_INLINE V set1_half(uint16_t h) { return half_to_float(h); }
HLM_INLINE void store_half(uint16_t* p, V x) { *p = float_to_half(x); }
HLM_INLINE V load_int8(const int8_t* p) { return float(*p); }
HLM_INLINE void store_int8(int8_t* p, V x) { *p = int8_t(x); }
HLM_INLINE V sums(const V v[L]) { return v[0]; }

#endif

// ---- functions -----------------------------------------------------------------------------------------------------

// 2^n e^r with |r| <= ln(2)/2; the polynomial's relative error is 3e-9. Constants on the left of min and max keep NaN.
HLM_INLINE V exp(V x) {
    x = min(set1(88.8f), max(set1(-104.0f), x));
    const V n = round(mul(x, set1(1.44269504088896341f)));
    V r = fnma(n, set1(0.693359375f), x);
    r = fnma(n, set1(-2.12194440054690583e-4f), r);
    V p = fma(set1(0.0013814599f), r, set1(0.008368717f));
    p = fma(p, r, set1(0.04166839f));
    p = fma(p, r, set1(0.16666521f));
    p = fma(p, r, set1(0.49999994f));
    p = fma(mul(p, r), r, r);
    return scale2(add(p, set1(1.0f)), n);
}

HLM_INLINE V sigmoid(V x) { return div(set1(1.0f), add(set1(1.0f), exp(sub(zero(), x)))); }

HLM_INLINE V silu(V x) {  // -0 at -inf
    x = max(set1(-3.0e38f), x);
    return div(x, add(set1(1.0f), exp(sub(zero(), x))));
}

HLM_INLINE float dot(const float* a, const float* b, int64_t n) {
    V s0 = zero(), s1 = zero(), s2 = zero(), s3 = zero();
    int64_t i = 0;
    for (; i + 4 * L <= n; i += 4 * L) {
        s0 = fma(load(a + i), load(b + i), s0);
        s1 = fma(load(a + i + L), load(b + i + L), s1);
        s2 = fma(load(a + i + 2 * L), load(b + i + 2 * L), s2);
        s3 = fma(load(a + i + 3 * L), load(b + i + 3 * L), s3);
    }
    for (; i + L <= n; i += L) s0 = fma(load(a + i), load(b + i), s0);
    if (i < n) s1 = fma(load_part(a + i, int(n - i)), load_part(b + i, int(n - i)), s1);
    return hsum(add(add(s0, s1), add(s2, s3)));
}
