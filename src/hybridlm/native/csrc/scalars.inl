// What all matrix code starts from: macros, and single numbers in their formats.

#if defined(_MSC_VER)
#define HYBRIDLM_INLINE static __forceinline
#define HYBRIDLM_UNROLL
#else
#define HYBRIDLM_UNROLL _Pragma("GCC unroll 8")
#if defined(HYBRIDLM_SCALAR)
#define HYBRIDLM_INLINE inline  // arrays instead of vectors: inlining all of that takes the compiler half a minute
#else
#define HYBRIDLM_INLINE inline __attribute__((always_inline))
#endif
#endif

inline float from_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline uint32_t to_bits(float f) { return __builtin_bit_cast(uint32_t, f); }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Without a branch, so that loops over it become vector code.
HYBRIDLM_INLINE float from_f16(uint16_t h) {
    uint32_t shifted = uint32_t(h & 0x7fff) << 13;
    float normal = from_bits(shifted) * from_bits(0x77800000);  // 2^112: the exponents' difference; subnormals too
    uint32_t bits = shifted >= (0x7c00u << 13) ? shifted | 0x7f800000u : to_bits(normal);
    return from_bits(bits | uint32_t(h & 0x8000) << 16);
}

HYBRIDLM_INLINE uint16_t to_f16(float f) {  // nearest, ties to even
    uint32_t bits = to_bits(f), sign = bits >> 16 & 0x8000, x = bits & 0x7fffffff;
    uint32_t tiny = to_bits(from_bits(x) + 0.5f) - 0x3f000000u;  // below 2^-14: the sum rounds to 2^-24 steps
    uint32_t normal = (x - 0x38000000u + 0xfff + (x >> 13 & 1)) >> 13;
    uint32_t h = x > 0x7f800000u ? 0x7e00u : x >= 0x477ff000u ? 0x7c00u : x < 0x38800000u ? tiny : normal;
    return uint16_t(sign | h);
}

HYBRIDLM_INLINE float from_bf16(uint16_t h) { return from_bits(uint32_t(h) << 16); }

HYBRIDLM_INLINE uint16_t to_bf16(float f) {
    uint32_t bits = to_bits(f);
    return uint16_t((bits & 0x7fffffff) > 0x7f800000u ? bits >> 16 | 64 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// To the nearest integer, ties to even, for |x| < 2^22.
HYBRIDLM_INLINE int32_t nearest(float x) { return int32_t(to_bits(x + 12582912.0f)) - 0x4b400000; }
