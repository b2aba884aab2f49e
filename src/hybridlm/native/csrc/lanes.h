// The vectors of the matrix kernels: `lanes` rows of weights side by side, four columns (a dword) of each at a time.
//
// Whatever unpacks weights works on dwords within a lane, so it is written once in blocks.inl and is vector code
// everywhere. An instruction set gives: a load that turns 16 bytes of each of `lanes` rows into four vectors of dwords,
// bit operations, and `dots`, the sum over dwords of four products with 8-bit activations that all lanes share.
//   U: a dword of packed bits a lane.   I: an int32 a lane.   F: a float32 a lane.

#if defined(HYBRIDLM_AVX512)

constexpr int lanes = 16;
constexpr int wide_tile = 16;
constexpr int straight = 4;  // rows of x up to which weights are used as they are unpacked, without a panel in between
using U = __m512i;
using I = __m512i;
using F = __m512;

HYBRIDLM_INLINE U load(const void* p) { return _mm512_loadu_si512(p); }
HYBRIDLM_INLINE void store(void* p, U v) { _mm512_storeu_si512(p, v); }
HYBRIDLM_INLINE U same(uint32_t v) { return _mm512_set1_epi32(static_cast<int>(v)); }
HYBRIDLM_INLINE U bit_and(U a, U b) { return _mm512_and_si512(a, b); }
HYBRIDLM_INLINE U bit_or(U a, U b) { return _mm512_or_si512(a, b); }
HYBRIDLM_INLINE U bit_xor(U a, U b) { return _mm512_xor_si512(a, b); }
template <int n> HYBRIDLM_INLINE U right(U a) { return _mm512_srli_epi32(a, n); }
template <int n> HYBRIDLM_INLINE U left(U a) { return _mm512_slli_epi32(a, n); }
// Bytes 2 to 5 of the eight bytes low, high.
HYBRIDLM_INLINE U across(U low, U high) { return _mm512_rol_epi32(_mm512_mask_blend_epi16(0x55555555u, low, high), 16); }
// The nibbles of `across`.
HYBRIDLM_INLINE void nibbles_across(U low, U high, U& first, U& second) {
    U turned = _mm512_mask_blend_epi16(0x55555555u, low, high), mask = same(0x0f0f0f0fu);
    first = _mm512_and_si512(_mm512_rol_epi32(turned, 16), mask);
    second = _mm512_and_si512(_mm512_rol_epi32(turned, 12), mask);
}
// 0x10 in byte b of a lane where bit 4 i + b of it is set.
template <int i> HYBRIDLM_INLINE U fifth_bits(U bits) {
    const U byte = _mm512_set1_epi32((i / 2) * 0x01010101), bit = _mm512_set1_epi32(i % 2 ? static_cast<int>(0x80402010u) : 0x08040201);
    const U home = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
    U spread = _mm512_shuffle_epi8(bits, _mm512_add_epi8(byte, home));
    return _mm512_maskz_mov_epi8(_mm512_test_epi8_mask(spread, bit), same(0x10101010u));
}
HYBRIDLM_INLINE U lookup(U index, const uint8_t* table) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))), index);
}
HYBRIDLM_INLINE F half_low(U a) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(a)); }
HYBRIDLM_INLINE F half_high(U a) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(a, 16))); }
template <int n> HYBRIDLM_INLINE F byte(U a) {
    return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(a, 8 * n), same(0xff)));
}
template <int n> HYBRIDLM_INLINE F signed_byte(U a) {
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(a, 24 - 8 * n), 24));
}
HYBRIDLM_INLINE F load_f(const float* p) { return _mm512_loadu_ps(p); }
HYBRIDLM_INLINE void store_f(float* p, F v) { _mm512_storeu_ps(p, v); }
HYBRIDLM_INLINE F same_f(float v) { return _mm512_set1_ps(v); }
HYBRIDLM_INLINE F zero_f() { return _mm512_setzero_ps(); }
HYBRIDLM_INLINE F times(F a, F b) { return _mm512_mul_ps(a, b); }
HYBRIDLM_INLINE F fused(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
HYBRIDLM_INLINE F fused_minus(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
HYBRIDLM_INLINE F convert(I a) { return _mm512_cvtepi32_ps(a); }

HYBRIDLM_INLINE void rows_to_dwords(const uint8_t* p, size_t stride, U* out) {
    U a[4];
    for (int i = 0; i < 4; ++i) {
        const uint8_t* q = p + i * stride;
        __m512i v = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
        v = _mm512_inserti32x4(v, _mm_loadu_si128(reinterpret_cast<const __m128i*>(q + 4 * stride)), 1);
        v = _mm512_inserti32x4(v, _mm_loadu_si128(reinterpret_cast<const __m128i*>(q + 8 * stride)), 2);
        a[i] = _mm512_inserti32x4(v, _mm_loadu_si128(reinterpret_cast<const __m128i*>(q + 12 * stride)), 3);
    }
    // Lane L of a[i] is row 4 L + i: transposing the 4 x 4 dwords within lanes leaves the rows in order.
    U b0 = _mm512_unpacklo_epi32(a[0], a[1]), b1 = _mm512_unpackhi_epi32(a[0], a[1]);
    U b2 = _mm512_unpacklo_epi32(a[2], a[3]), b3 = _mm512_unpackhi_epi32(a[2], a[3]);
    out[0] = _mm512_unpacklo_epi64(b0, b2);
    out[1] = _mm512_unpackhi_epi64(b0, b2);
    out[2] = _mm512_unpacklo_epi64(b1, b3);
    out[3] = _mm512_unpackhi_epi64(b1, b3);
}

// Weights as `dots` wants them, from unsigned numbers with a bias.
template <int bias> HYBRIDLM_INLINE U prepare(U w) { return w; }

#if defined(__GNUC__) && !defined(__clang__)  // gcc does not fold the broadcast into the instruction by itself
HYBRIDLM_INLINE I dot(I sum, U w, const int32_t* x) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*x));
    return sum;
}
#else
HYBRIDLM_INLINE I dot(I sum, U w, const int32_t* x) { return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(*x)); }
#endif

// The sums over n dwords for several rows of x, 32 bytes apart; max is the largest unsigned number among the weights.
// The rows take turns, since each sum is a chain of instructions that wait for one another; a single row gets two chains.
template <int bias, int max, int n, int rows>
HYBRIDLM_INLINE void dots(const U* w, const int8_t* x, const int32_t* start, int starts, I* sums) {
    const int32_t* q = reinterpret_cast<const int32_t*>(x);
    for (int t = 0; t < rows; ++t) sums[t] = bias ? _mm512_set1_epi32(start[t * starts]) : _mm512_setzero_si512();
    if constexpr (rows == 1) {
        I others[rows];
        for (int t = 0; t < rows; ++t) others[t] = _mm512_setzero_si512();
        for (int i = 0; i < n; i += 2) {
            for (int t = 0; t < rows; ++t) {
                sums[t] = dot(sums[t], w[i], q + 8 * t + i);
                others[t] = dot(others[t], w[i + 1], q + 8 * t + i + 1);
            }
        }
        for (int t = 0; t < rows; ++t) sums[t] = _mm512_add_epi32(sums[t], others[t]);
    } else {
#pragma GCC unroll 8
        for (int i = 0; i < n; ++i)
#pragma GCC unroll 4
            for (int t = 0; t < rows; ++t) sums[t] = dot(sums[t], w[i], q + 8 * t + i);
    }
}

HYBRIDLM_INLINE double spin_dots(int64_t turns) {
    __m512i x = _mm512_set1_epi8(3), s[12];
    for (int i = 0; i < 12; ++i) s[i] = _mm512_set1_epi32(i);
    for (int64_t turn = 0; turn < turns; ++turn)
        asm volatile("vpdpbusd %12, %12, %0\n\tvpdpbusd %12, %12, %1\n\tvpdpbusd %12, %12, %2\n\t"
                     "vpdpbusd %12, %12, %3\n\tvpdpbusd %12, %12, %4\n\tvpdpbusd %12, %12, %5\n\t"
                     "vpdpbusd %12, %12, %6\n\tvpdpbusd %12, %12, %7\n\tvpdpbusd %12, %12, %8\n\t"
                     "vpdpbusd %12, %12, %9\n\tvpdpbusd %12, %12, %10\n\tvpdpbusd %12, %12, %11"
                     : "+v"(s[0]), "+v"(s[1]), "+v"(s[2]), "+v"(s[3]), "+v"(s[4]), "+v"(s[5]), "+v"(s[6]), "+v"(s[7]),
                       "+v"(s[8]), "+v"(s[9]), "+v"(s[10]), "+v"(s[11])
                     : "v"(x));
    return static_cast<double>(turns) * 12 * 64 * 2;
}

// A stretch of columns of one float row.
HYBRIDLM_INLINE F columns(const float* p) { return _mm512_loadu_ps(p); }
HYBRIDLM_INLINE F columns_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
HYBRIDLM_INLINE F columns_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
HYBRIDLM_INLINE float total(F v) { return _mm512_reduce_add_ps(v); }
HYBRIDLM_INLINE void fetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }  // into the second cache

#elif defined(HYBRIDLM_AVX2)

constexpr int lanes = 8;
constexpr int wide_tile = 4;
constexpr int straight = 1;
using U = __m256i;
using I = __m256i;
using F = __m256;

HYBRIDLM_INLINE U load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
HYBRIDLM_INLINE void store(void* p, U v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
HYBRIDLM_INLINE U same(uint32_t v) { return _mm256_set1_epi32(static_cast<int>(v)); }
HYBRIDLM_INLINE U bit_and(U a, U b) { return _mm256_and_si256(a, b); }
HYBRIDLM_INLINE U bit_or(U a, U b) { return _mm256_or_si256(a, b); }
HYBRIDLM_INLINE U bit_xor(U a, U b) { return _mm256_xor_si256(a, b); }
template <int n> HYBRIDLM_INLINE U right(U a) { return _mm256_srli_epi32(a, n); }
template <int n> HYBRIDLM_INLINE U left(U a) { return _mm256_slli_epi32(a, n); }
HYBRIDLM_INLINE U across(U low, U high) { return _mm256_or_si256(_mm256_srli_epi32(low, 16), _mm256_slli_epi32(high, 16)); }
HYBRIDLM_INLINE void nibbles_across(U low, U high, U& first, U& second) {
    U both = across(low, high), mask = same(0x0f0f0f0fu);
    first = _mm256_and_si256(both, mask);
    second = _mm256_and_si256(_mm256_srli_epi32(both, 4), mask);
}
template <int i> HYBRIDLM_INLINE U fifth_bits(U bits) {
    const U home = _mm256_set_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0, 0x0c0c0c0c, 0x08080808, 0x04040404, 0);
    const U bit = _mm256_set1_epi32(i % 2 ? static_cast<int>(0x80402010u) : 0x08040201);
    U spread = _mm256_shuffle_epi8(bits, _mm256_add_epi8(_mm256_set1_epi32((i / 2) * 0x01010101), home));
    return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit), same(0x10101010u));
}
HYBRIDLM_INLINE U lookup(U index, const uint8_t* table) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))), index);
}
HYBRIDLM_INLINE F half_low(U a) {
    U low = _mm256_and_si256(a, same(0xffff));
    return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
}
HYBRIDLM_INLINE F half_high(U a) {
    U high = _mm256_srli_epi32(a, 16);
    return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
}
template <int n> HYBRIDLM_INLINE F byte(U a) {
    return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(a, 8 * n), same(0xff)));
}
template <int n> HYBRIDLM_INLINE F signed_byte(U a) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(a, 24 - 8 * n), 24));
}
HYBRIDLM_INLINE F load_f(const float* p) { return _mm256_loadu_ps(p); }
HYBRIDLM_INLINE void store_f(float* p, F v) { _mm256_storeu_ps(p, v); }
HYBRIDLM_INLINE F same_f(float v) { return _mm256_set1_ps(v); }
HYBRIDLM_INLINE F zero_f() { return _mm256_setzero_ps(); }
HYBRIDLM_INLINE F times(F a, F b) { return _mm256_mul_ps(a, b); }
HYBRIDLM_INLINE F fused(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
HYBRIDLM_INLINE F fused_minus(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
HYBRIDLM_INLINE F convert(I a) { return _mm256_cvtepi32_ps(a); }

HYBRIDLM_INLINE void rows_to_dwords(const uint8_t* p, size_t stride, U* out) {
    U a[4];
    for (int i = 0; i < 4; ++i) {
        const uint8_t* q = p + i * stride;
        a[i] = _mm256_inserti128_si256(
            _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q))),
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(q + 4 * stride)), 1);
    }
    U b0 = _mm256_unpacklo_epi32(a[0], a[1]), b1 = _mm256_unpackhi_epi32(a[0], a[1]);
    U b2 = _mm256_unpacklo_epi32(a[2], a[3]), b3 = _mm256_unpackhi_epi32(a[2], a[3]);
    out[0] = _mm256_unpacklo_epi64(b0, b2);
    out[1] = _mm256_unpackhi_epi64(b0, b2);
    out[2] = _mm256_unpacklo_epi64(b1, b3);
    out[3] = _mm256_unpackhi_epi64(b1, b3);
}

// The product of bytes adds pairs in 16 bits, where 255 * 127 * 2 has no room: such weights stay signed, and their sign
// moves over to x.
template <int bias> HYBRIDLM_INLINE U prepare(U w) { return bias == 128 ? _mm256_xor_si256(w, same(0x80808080u)) : w; }

template <int bias, int max, int n> HYBRIDLM_INLINE I dots_of(const U* w, const int8_t* x, const int32_t* start) {
    const int32_t* q = reinterpret_cast<const int32_t*>(x);
    constexpr bool is_signed = bias == 128;
    constexpr int room = is_signed ? 1 : 32767 / (max * 127 * 2), group = room >= n ? n : room >= 4 ? 4 : room >= 2 ? 2 : 1;
    const U ones = _mm256_set1_epi16(1);
    I sum = bias && !is_signed ? _mm256_set1_epi32(*start) : _mm256_setzero_si256();
    for (int i = 0; i < n; i += group) {
        U part = _mm256_setzero_si256();
        for (int j = i; j < i + group; ++j) {
            U four = _mm256_set1_epi32(q[j]);
            U pair = is_signed ? _mm256_maddubs_epi16(_mm256_abs_epi8(w[j]), _mm256_sign_epi8(four, w[j]))
                               : _mm256_maddubs_epi16(w[j], four);
            part = j == i ? pair : _mm256_add_epi16(part, pair);
        }
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(part, ones));
    }
    return sum;
}

HYBRIDLM_INLINE double spin_dots(int64_t turns) {
    __m256i x = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1), s[8];
    for (int i = 0; i < 8; ++i) s[i] = _mm256_set1_epi32(i);
    for (int64_t turn = 0; turn < turns; ++turn) {
        for (int i = 0; i < 8; ++i) {
            __m256i p = _mm256_maddubs_epi16(x, x);
            asm volatile("" : "+x"(p));
            s[i] = _mm256_add_epi32(s[i], _mm256_madd_epi16(p, ones));
        }
        asm volatile("" : "+x"(x), "+x"(s[0]), "+x"(s[1]), "+x"(s[2]), "+x"(s[3]), "+x"(s[4]), "+x"(s[5]), "+x"(s[6]), "+x"(s[7]));
    }
    return static_cast<double>(turns) * 8 * 32 * 2;
}

HYBRIDLM_INLINE F columns(const float* p) { return _mm256_loadu_ps(p); }
HYBRIDLM_INLINE F columns_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
HYBRIDLM_INLINE F columns_bf16(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
HYBRIDLM_INLINE float total(F v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
HYBRIDLM_INLINE void fetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }  // into the second cache

#elif defined(HYBRIDLM_NEON)

constexpr int lanes = 8;
constexpr int wide_tile = 8;
constexpr int straight = 1;
struct U { uint32x4_t a, b; };
struct I { int32x4_t a, b; };
struct F { float32x4_t a, b; };

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
template <int n> HYBRIDLM_INLINE U right(U a) { if constexpr (n == 0) return a; else return {vshrq_n_u32(a.a, n), vshrq_n_u32(a.b, n)}; }
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
    return {vcvtq_f32_s32(vshrq_n_s32(vreinterpretq_s32_u32(b.a), 24)), vcvtq_f32_s32(vshrq_n_s32(vreinterpretq_s32_u32(b.b), 24))};
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
    return {vreinterpretq_u32_u8(vsubq_u8(vreinterpretq_u8_u32(w.a), b)), vreinterpretq_u32_u8(vsubq_u8(vreinterpretq_u8_u32(w.b), b))};
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
    return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)), vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4), 16))};
}
HYBRIDLM_INLINE float total(F v) { return vaddvq_f32(vaddq_f32(v.a, v.b)); }
HYBRIDLM_INLINE void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

#else  // scalar: arrays, which a compiler may turn into whatever the baseline has

constexpr int lanes = 4;
constexpr int wide_tile = 4;
constexpr int straight = 1;
struct U { uint32_t v[lanes]; };
struct I { int32_t v[lanes]; };
struct F { float v[lanes]; };
#define HYBRIDLM_EACH for (int k = 0; k < lanes; ++k)

HYBRIDLM_INLINE U load(const void* p) { U r; memcpy(&r, p, sizeof r); return r; }
HYBRIDLM_INLINE void store(void* p, U v) { memcpy(p, &v, sizeof v); }
HYBRIDLM_INLINE U same(uint32_t v) { U r; HYBRIDLM_EACH r.v[k] = v; return r; }
HYBRIDLM_INLINE U bit_and(U a, U b) { HYBRIDLM_EACH a.v[k] &= b.v[k]; return a; }
HYBRIDLM_INLINE U bit_or(U a, U b) { HYBRIDLM_EACH a.v[k] |= b.v[k]; return a; }
HYBRIDLM_INLINE U bit_xor(U a, U b) { HYBRIDLM_EACH a.v[k] ^= b.v[k]; return a; }
template <int n> HYBRIDLM_INLINE U right(U a) { HYBRIDLM_EACH a.v[k] >>= n; return a; }
template <int n> HYBRIDLM_INLINE U left(U a) { HYBRIDLM_EACH a.v[k] <<= n; return a; }
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
        r.v[k] = table[q & 15] | table[q >> 8 & 15] << 8 | table[q >> 16 & 15] << 16 | uint32_t(table[q >> 24 & 15]) << 24;
    }
    return r;
}
HYBRIDLM_INLINE F half_low(U a) { F r; HYBRIDLM_EACH r.v[k] = from_f16(uint16_t(a.v[k])); return r; }
HYBRIDLM_INLINE F half_high(U a) { return half_low(right<16>(a)); }
template <int n> HYBRIDLM_INLINE F byte(U a) { F r; HYBRIDLM_EACH r.v[k] = float(int32_t(a.v[k] >> (8 * n) & 0xff)); return r; }
template <int n> HYBRIDLM_INLINE F signed_byte(U a) { F r; HYBRIDLM_EACH r.v[k] = float(int8_t(a.v[k] >> (8 * n))); return r; }
HYBRIDLM_INLINE F load_f(const float* p) { F r; memcpy(&r, p, sizeof r); return r; }
HYBRIDLM_INLINE void store_f(float* p, F v) { memcpy(p, &v, sizeof v); }
HYBRIDLM_INLINE F same_f(float v) { F r; HYBRIDLM_EACH r.v[k] = v; return r; }
HYBRIDLM_INLINE F zero_f() { return same_f(0); }
HYBRIDLM_INLINE F times(F a, F b) { HYBRIDLM_EACH a.v[k] *= b.v[k]; return a; }
HYBRIDLM_INLINE F fused(F a, F b, F c) { HYBRIDLM_EACH c.v[k] += a.v[k] * b.v[k]; return c; }
HYBRIDLM_INLINE F fused_minus(F a, F b, F c) { HYBRIDLM_EACH c.v[k] -= a.v[k] * b.v[k]; return c; }
HYBRIDLM_INLINE F convert(I a) { F r; HYBRIDLM_EACH r.v[k] = float(a.v[k]); return r; }

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
HYBRIDLM_INLINE F columns_f16(const uint16_t* p) { F r; HYBRIDLM_EACH r.v[k] = from_f16(p[k]); return r; }
HYBRIDLM_INLINE F columns_bf16(const uint16_t* p) { F r; HYBRIDLM_EACH r.v[k] = from_bf16(p[k]); return r; }
HYBRIDLM_INLINE float total(F v) { return (v.v[0] + v.v[1]) + (v.v[2] + v.v[3]); }
HYBRIDLM_INLINE void fetch(const void*) {}
#undef HYBRIDLM_EACH

#endif

#if !defined(HYBRIDLM_AVX512)
template <int bias, int max, int n, int rows>
HYBRIDLM_INLINE void dots(const U* w, const int8_t* x, const int32_t* start, int starts, I* sums) {
    for (int t = 0; t < rows; ++t) sums[t] = dots_of<bias, max, n>(w, x + 32 * t, start + starts * t);
}
#endif
