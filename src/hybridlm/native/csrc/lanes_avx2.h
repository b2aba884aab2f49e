// The vectors of lanes.h in AVX2 with FMA and F16C.

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
HYBRIDLM_INLINE U across(U low, U high) {
    return _mm256_or_si256(_mm256_srli_epi32(low, 16), _mm256_slli_epi32(high, 16));
}
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
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))),
                               index);
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
        a[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q))),
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
    constexpr int room = is_signed ? 1 : 32767 / (max * 127 * 2), group = room >= n   ? n
                                                                          : room >= 4 ? 4
                                                                          : room >= 2 ? 2
                                                                                      : 1;
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
        asm volatile(""
                     : "+x"(x), "+x"(s[0]), "+x"(s[1]), "+x"(s[2]), "+x"(s[3]), "+x"(s[4]), "+x"(s[5]), "+x"(s[6]),
                       "+x"(s[7]));
    }
    return static_cast<double>(turns) * 8 * 32 * 2;
}

HYBRIDLM_INLINE F columns(const float* p) { return _mm256_loadu_ps(p); }
HYBRIDLM_INLINE F columns_f16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
HYBRIDLM_INLINE F columns_bf16(const uint16_t* p) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
HYBRIDLM_INLINE float total(F v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
HYBRIDLM_INLINE void fetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
}  // into the second cache
