// The vectors of the matrix kernels: `lanes` rows of weights side by side, four columns (a dword) of each at a time.
//
// Whatever unpacks weights works on dwords within a lane, so it is written once in blocks.inl and is vector code
// everywhere. An instruction set gives: a load that turns 16 bytes of each of `lanes` rows into four vectors of dwords,
// bit operations, and `dots`, the sum over dwords of four products with 8-bit activations that all lanes share.
//   U: a dword of packed bits a lane.   I: an int32 a lane.   F: a float32 a lane.

#if defined(HYBRIDLM_AVX512)
#include "lanes_avx512.h"
#else
#if defined(HYBRIDLM_AVX2)
#include "lanes_avx2.h"
#elif defined(HYBRIDLM_NEON)
#include "lanes_neon.h"
#else
#include "lanes_scalar.h"
#endif

// What only AVX-512 says in its own words.
template <int bias, int max, int n, int rows>
HYBRIDLM_INLINE void dots(const U* w, const int8_t* x, const int32_t* start, int starts, I* sums) {
    for (int t = 0; t < rows; ++t) sums[t] = dots_of<bias, max, n>(w, x + 32 * t, start + starts * t);
}

HYBRIDLM_INLINE int32_t largest_bits(const float* p) {
    int32_t most = 0;
    for (int i = 0; i < 32; ++i) {
        int32_t bits = static_cast<int32_t>(to_bits(p[i]) & 0x7fffffff);
        most = bits > most ? bits : most;
    }
    return most;
}
HYBRIDLM_INLINE void round_block(const float* p, float factor, int8_t* q, int32_t* sums) {
    int32_t v[32], first = 0, second = 0;
    for (int i = 0; i < 32; ++i) v[i] = nearest(p[i] * factor);
    for (int i = 0; i < 32; ++i) q[i] = static_cast<int8_t>(v[i]);
    for (int i = 0; i < 16; ++i) first += v[i];
    for (int i = 16; i < 32; ++i) second += v[i];
    sums[0] = first, sums[1] = second;
}

#endif
