// The vectors of lanes.h in AVX-512 with VNNI.

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
HYBRIDLM_INLINE U across(U low, U high) {
    return _mm512_rol_epi32(_mm512_mask_blend_epi16(0x55555555u, low, high), 16);
}
// The nibbles of `across`.
HYBRIDLM_INLINE void nibbles_across(U low, U high, U& first, U& second) {
    U turned = _mm512_mask_blend_epi16(0x55555555u, low, high), mask = same(0x0f0f0f0fu);
    first = _mm512_and_si512(_mm512_rol_epi32(turned, 16), mask);
    second = _mm512_and_si512(_mm512_rol_epi32(turned, 12), mask);
}
// 0x10 in byte b of a lane where bit 4 i + b of it is set.
template <int i> HYBRIDLM_INLINE U fifth_bits(U bits) {
    const U byte = _mm512_set1_epi32((i / 2) * 0x01010101),
            bit = _mm512_set1_epi32(i % 2 ? static_cast<int>(0x80402010u) : 0x08040201);
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
// The rows take turns, since each sum is a chain of instructions that wait for one another; a single row gets two
// chains.
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

// The largest magnitude of 32 numbers, as bits.
HYBRIDLM_INLINE int32_t largest_bits(const float* p) {
    const __m512i mask = _mm512_set1_epi32(0x7fffffff);
    return _mm512_reduce_max_epi32(_mm512_max_epi32(_mm512_and_si512(_mm512_loadu_si512(p), mask),
                                                    _mm512_and_si512(_mm512_loadu_si512(p + 16), mask)));
}
// 32 numbers times a factor, rounded to 8 bits, and the sums of the first and the second half.
HYBRIDLM_INLINE void round_block(const float* p, float factor, int8_t* q, int32_t* sums) {
    const __m512 f = _mm512_set1_ps(factor);
    __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(p), f));
    __m512i b = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(p + 16), f));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q), _mm512_cvtepi32_epi8(a));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 16), _mm512_cvtepi32_epi8(b));
    sums[0] = _mm512_reduce_add_epi32(a), sums[1] = _mm512_reduce_add_epi32(b);
}

HYBRIDLM_INLINE double spin_dots(int64_t turns) {
    __m512i x = _mm512_set1_epi8(3), s[12];
    for (int i = 0; i < 12; ++i) s[i] = _mm512_set1_epi32(i);
    for (int64_t turn = 0; turn < turns; ++turn)
        asm volatile(
            "vpdpbusd %12, %12, %0\n\tvpdpbusd %12, %12, %1\n\tvpdpbusd %12, %12, %2\n\t"
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
HYBRIDLM_INLINE F columns_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
HYBRIDLM_INLINE F columns_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
HYBRIDLM_INLINE float total(F v) { return _mm512_reduce_add_ps(v); }
HYBRIDLM_INLINE void fetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
}  // into the second cache
