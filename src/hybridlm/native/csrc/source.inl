// A unit may reach past the last row or column: then it is copied and padded with zeros, which have scale 0.
struct Source {
    const uint8_t* data;
    int64_t rows, row_bytes;
    uint8_t* stage;
    template <class Q> HYBRIDLM_INLINE const uint8_t* unit(int64_t row, int64_t u, size_t& stride) const {
        int64_t have = row_bytes - u * Q::unit_bytes;
        const uint8_t* p = data + row * row_bytes + u * Q::unit_bytes;
        stride = static_cast<size_t>(row_bytes);
        if (have >= Q::unit_bytes && row + lanes <= rows) return p;
        return copy(p, smaller(rows - row, lanes), smaller(have, Q::unit_bytes), Q::unit_bytes, stride);
    }
    const uint8_t* copy(const uint8_t* p, int64_t valid, int64_t bytes, int64_t unit_bytes, size_t& stride) const {
        for (int k = 0; k < lanes; ++k) {
            uint8_t* to = stage + k * unit_bytes;
            int64_t take = k < valid ? bytes : 0;
            if (take) memcpy(to, p + k * row_bytes, static_cast<size_t>(take));
            memset(to + take, 0, static_cast<size_t>(unit_bytes - take));
        }
        stride = static_cast<size_t>(unit_bytes);
        return stage;
    }
};

constexpr int64_t stage_bytes = lanes * 272 + 64;
