// How each ggml type packs weights, over lanes: a unit is 256 columns of `lanes` rows, handed on as eight blocks of 32.
//
// `Blocks<type>::unit(p, stride, sink)` reads a unit whose first row starts at p and calls, for block 0 to 7 in turn,
// sink.template put<Blocks>(block, w, scale, second): w[i] holds columns 4 i .. 4 i + 3 as unsigned numbers with a
// bias, the value being scale * (w - bias). `second` is the minimum to be subtracted (`minimum`), or the scale of
// columns 16 to 31 (`halves`), or nothing. Types with blocks of 32 have an odd number of 16-bit words in a block: of
// two blocks in a row the first is read across dword boundaries.

alignas(16) static const int8_t nonlinear[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                                 1,    13,   25,  38,  53,  69,  89,  113};
alignas(16) static const uint8_t nonlinear_biased[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                                         129, 141, 153, 166, 181, 197, 217, 241};

template <int type> struct Blocks;

// Loads n * 16 bytes of each row as 4 n dwords.
template <int n> HYBRIDLM_INLINE void load_dwords(const uint8_t* p, size_t stride, U* out) {
    rows_to_dwords(p, stride, out);
    if constexpr (n > 1) load_dwords<n - 1>(p + 16, stride, out + 4);
}

template <class Sink, int type, int pair_dwords> struct Pairs {
    // Calls Blocks<type>::even and ::odd for four pairs, each of pair_dwords dwords, and loads what a pair needs just
    // before it: a burst of loads would hold up those that fetch ahead, and the registers don't hold a whole unit.
    template <int n> static HYBRIDLM_INLINE void from(const uint8_t* p, size_t stride, U* d, Sink& sink) {
        constexpr int have = (n * pair_dwords + 3) / 4, need = ((n + 1) * pair_dwords + 3) / 4;
        load_dwords<need - have>(p + 16 * have, stride, d + 4 * have);
        U w[8];
        const U* q = d + n * pair_dwords;
        F scale = Blocks<type>::even(q, w);
        sink.template put<Blocks<type>>(2 * n, w, scale, scale);
        scale = Blocks<type>::odd(q, w);
        sink.template put<Blocks<type>>(2 * n + 1, w, scale, scale);
        if constexpr (n < 3) from<n + 1>(p, stride, d, sink);
    }
};

template <> struct Blocks<Q8_0> {
    static constexpr int bias = 128, max = 255, unit_bytes = 272;
    static constexpr bool minimum = false, halves = false;
    static HYBRIDLM_INLINE F even(const U* d, U* w) {
        for (int i = 0; i < 8; ++i) w[i] = bit_xor(across(d[i], d[i + 1]), same(0x80808080u));
        return half_low(d[0]);
    }
    static HYBRIDLM_INLINE F odd(const U* d, U* w) {
        for (int i = 0; i < 8; ++i) w[i] = bit_xor(d[9 + i], same(0x80808080u));
        return half_high(d[8]);
    }
    template <class Sink> static HYBRIDLM_INLINE void unit(const uint8_t* p, size_t stride, Sink& sink) {
        U d[68];
        Pairs<Sink, Q8_0, 17>::template from<0>(p, stride, d, sink);
    }
};

template <> struct Blocks<Q4_0> {
    static constexpr int bias = 8, max = 15, unit_bytes = 144;
    static constexpr bool minimum = false, halves = false;
    static HYBRIDLM_INLINE F even(const U* d, U* w) {
        for (int i = 0; i < 4; ++i) nibbles_across(d[i], d[i + 1], w[i], w[i + 4]);
        return half_low(d[0]);
    }
    static HYBRIDLM_INLINE F odd(const U* d, U* w) {
        const U mask = same(0x0f0f0f0fu);
        for (int i = 0; i < 4; ++i) {
            w[i] = bit_and(d[5 + i], mask);
            w[i + 4] = bit_and(right<4>(d[5 + i]), mask);
        }
        return half_high(d[4]);
    }
    template <class Sink> static HYBRIDLM_INLINE void unit(const uint8_t* p, size_t stride, Sink& sink) {
        U d[36];
        Pairs<Sink, Q4_0, 9>::template from<0>(p, stride, d, sink);
    }
};

template <> struct Blocks<IQ4_NL> {
    static constexpr int bias = 128, max = 255, unit_bytes = 144;
    static constexpr bool minimum = false, halves = false;
    static HYBRIDLM_INLINE F even(const U* d, U* w) {
        F scale = Blocks<Q4_0>::even(d, w);
        for (int i = 0; i < 8; ++i) w[i] = lookup(w[i], nonlinear_biased);
        return scale;
    }
    static HYBRIDLM_INLINE F odd(const U* d, U* w) {
        F scale = Blocks<Q4_0>::odd(d, w);
        for (int i = 0; i < 8; ++i) w[i] = lookup(w[i], nonlinear_biased);
        return scale;
    }
    template <class Sink> static HYBRIDLM_INLINE void unit(const uint8_t* p, size_t stride, Sink& sink) {
        U d[36];
        Pairs<Sink, IQ4_NL, 9>::template from<0>(p, stride, d, sink);
    }
};

template <> struct Blocks<Q5_0> {
    static constexpr int bias = 16, max = 31, unit_bytes = 176;
    static constexpr bool minimum = false, halves = false;
    static HYBRIDLM_INLINE void fifth(U bits, U* w) {
        w[0] = bit_or(w[0], fifth_bits<0>(bits)), w[1] = bit_or(w[1], fifth_bits<1>(bits));
        w[2] = bit_or(w[2], fifth_bits<2>(bits)), w[3] = bit_or(w[3], fifth_bits<3>(bits));
        w[4] = bit_or(w[4], fifth_bits<4>(bits)), w[5] = bit_or(w[5], fifth_bits<5>(bits));
        w[6] = bit_or(w[6], fifth_bits<6>(bits)), w[7] = bit_or(w[7], fifth_bits<7>(bits));
    }
    static HYBRIDLM_INLINE F even(const U* d, U* w) {
        for (int i = 0; i < 4; ++i) nibbles_across(d[1 + i], d[2 + i], w[i], w[i + 4]);
        fifth(across(d[0], d[1]), w);
        return half_low(d[0]);
    }
    static HYBRIDLM_INLINE F odd(const U* d, U* w) {
        const U mask = same(0x0f0f0f0fu);
        for (int i = 0; i < 4; ++i) {
            w[i] = bit_and(d[7 + i], mask);
            w[i + 4] = bit_and(right<4>(d[7 + i]), mask);
        }
        fifth(d[6], w);
        return half_high(d[5]);
    }
    template <class Sink> static HYBRIDLM_INLINE void unit(const uint8_t* p, size_t stride, Sink& sink) {
        U d[44];
        Pairs<Sink, Q5_0, 11>::template from<0>(p, stride, d, sink);
    }
};

// The first 16 bytes of Q4_K and Q5_K: two float16 and eight 6-bit scales and minima.
struct SixBits {
    U scale[2], minimum[2];  // byte j of lane: of block j, 4 + j
    F d, dmin;
    HYBRIDLM_INLINE explicit SixBits(const U* h) {
        const U low6 = same(0x3f3f3f3fu), low4 = same(0x0f0f0f0fu), high2 = same(0x30303030u);
        d = half_low(h[0]);
        dmin = half_high(h[0]);
        scale[0] = bit_and(h[1], low6);
        minimum[0] = bit_and(h[2], low6);
        scale[1] = bit_or(bit_and(h[3], low4), bit_and(right<2>(h[1]), high2));
        minimum[1] = bit_or(bit_and(right<4>(h[3]), low4), bit_and(right<2>(h[2]), high2));
    }
    template <int j> HYBRIDLM_INLINE F scales() const { return times(d, byte<j % 4>(scale[j / 4])); }
    template <int j> HYBRIDLM_INLINE F minima() const { return times(dmin, byte<j % 4>(minimum[j / 4])); }
};

template <> struct Blocks<Q4_K> {
    static constexpr int bias = 0, max = 15, unit_bytes = 144;
    static constexpr bool minimum = true, halves = false;
    template <int c, class Sink>
    static HYBRIDLM_INLINE void chunks(const uint8_t* p, size_t stride, const SixBits& s, Sink& sink) {
        const U mask = same(0x0f0f0f0fu);
        U d[8], w[8];
        load_dwords<2>(p, stride, d);
        for (int i = 0; i < 8; ++i) w[i] = bit_and(d[i], mask);
        sink.template put<Blocks>(2 * c, w, s.scales<2 * c>(), s.minima<2 * c>());
        for (int i = 0; i < 8; ++i) w[i] = bit_and(right<4>(d[i]), mask);
        sink.template put<Blocks>(2 * c + 1, w, s.scales<2 * c + 1>(), s.minima<2 * c + 1>());
        if constexpr (c < 3) chunks<c + 1>(p + 32, stride, s, sink);
    }
    template <class Sink> static HYBRIDLM_INLINE void unit(const uint8_t* p, size_t stride, Sink& sink) {
        U head[4];
        rows_to_dwords(p, stride, head);
        chunks<0>(p + 16, stride, SixBits(head), sink);
    }
};

template <> struct Blocks<Q5_K> {
    static constexpr int bias = 0, max = 31, unit_bytes = 176;
    static constexpr bool minimum = true, halves = false;
    template <int j> static HYBRIDLM_INLINE U fifth(U bits) {
        const U bit = same(0x10101010u);
        if constexpr (j < 4) return bit_and(left<4 - j>(bits), bit);
        else return bit_and(right<j - 4>(bits), bit);
    }
    template <int c, class Sink>
    static HYBRIDLM_INLINE void chunks(const uint8_t* p, size_t stride, const SixBits& s, const U* bits, Sink& sink) {
        const U mask = same(0x0f0f0f0fu);
        U d[8], w[8];
        load_dwords<2>(p, stride, d);
        for (int i = 0; i < 8; ++i) w[i] = bit_or(bit_and(d[i], mask), fifth<2 * c>(bits[i]));
        sink.template put<Blocks>(2 * c, w, s.scales<2 * c>(), s.minima<2 * c>());
        for (int i = 0; i < 8; ++i) w[i] = bit_or(bit_and(right<4>(d[i]), mask), fifth<2 * c + 1>(bits[i]));
        sink.template put<Blocks>(2 * c + 1, w, s.scales<2 * c + 1>(), s.minima<2 * c + 1>());
        if constexpr (c < 3) chunks<c + 1>(p + 32, stride, s, bits, sink);
    }
    template <class Sink> static HYBRIDLM_INLINE void unit(const uint8_t* p, size_t stride, Sink& sink) {
        U head[4], bits[8];
        rows_to_dwords(p, stride, head);
        load_dwords<2>(p + 16, stride, bits);
        chunks<0>(p + 48, stride, SixBits(head), bits, sink);
    }
};

template <> struct Blocks<Q6_K> {
    static constexpr int bias = 32, max = 63, unit_bytes = 210;
    static constexpr bool minimum = false, halves = true;
    template <int q, class Sink>  // block 4 half + q
    static HYBRIDLM_INLINE void quarter(int block, const U* low, const U* high, U scales, F d, Sink& sink) {
        const U mask4 = same(0x0f0f0f0fu), mask2 = same(0x30303030u);
        U w[8];
        for (int i = 0; i < 8; ++i) {
            U four = q < 2 ? bit_and(low[8 * (q % 2) + i], mask4) : bit_and(right<4>(low[8 * (q % 2) + i]), mask4);
            U two;
            if constexpr (q < 2) two = left<4 - 2 * q>(high[i]);
            else if constexpr (q == 2) two = high[i];
            else two = right<2>(high[i]);
            w[i] = bit_or(four, bit_and(two, mask2));
        }
        sink.template put<Blocks>(block, w, times(d, signed_byte<2 * (q % 2)>(scales)),
                                  times(d, signed_byte<2 * (q % 2) + 1>(scales)));
    }
    template <int half, class Sink>
    static HYBRIDLM_INLINE void halfway(const uint8_t* p, size_t stride, const U* scales, F d, Sink& sink) {
        U low[16], high[8];
        load_dwords<4>(p + 64 * half, stride, low);
        load_dwords<2>(p + 128 + 32 * half, stride, high);
        quarter<0>(4 * half, low, high, scales[2 * half], d, sink);
        quarter<1>(4 * half + 1, low, high, scales[2 * half], d, sink);
        quarter<2>(4 * half + 2, low, high, scales[2 * half + 1], d, sink);
        quarter<3>(4 * half + 3, low, high, scales[2 * half + 1], d, sink);
    }
    template <class Sink> static HYBRIDLM_INLINE void unit(const uint8_t* p, size_t stride, Sink& sink) {
        U scales[4], last[4];
        rows_to_dwords(p + 192, stride, scales);
        rows_to_dwords(p + 194, stride, last);  // ends with the scale of the scales
        F d = half_high(last[3]);
        halfway<0>(p, stride, scales, d, sink);
        halfway<1>(p, stride, scales, d, sink);
    }
};
