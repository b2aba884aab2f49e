// What an instruction set provides for matrices.
//
// Quantised weights meet 8-bit activations: x is cut into blocks of 32 with one float scale each, the products of a
// block are summed in integers, and the block sums are added up in float, in the order of the columns, one accumulator
// a result. So a result is the same whatever the number of threads and however many rows of x go together.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hybridlm {

// ggml's numbers.
enum Type { F32 = 0, F16 = 1, Q4_0 = 2, Q5_0 = 6, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14, IQ4_NL = 20, BF16 = 30 };

struct TypeInfo {
    int block;  // weights
    int bytes;  // of a block
};

inline bool type_info(int type, TypeInfo& info) {
    switch (type) {
        case F32: info = {1, 4}; return true;
        case F16:
        case BF16: info = {1, 2}; return true;
        case Q4_0:
        case IQ4_NL: info = {32, 18}; return true;
        case Q5_0: info = {32, 22}; return true;
        case Q8_0: info = {32, 34}; return true;
        case Q4_K: info = {256, 144}; return true;
        case Q5_K: info = {256, 176}; return true;
        case Q6_K: info = {256, 210}; return true;
        default: return false;
    }
}

inline bool is_float(int type) { return type == F32 || type == F16 || type == BF16; }

// Weights are multiplied as unsigned numbers with a bias where the machine's dot product wants them so; what that adds
// is taken back by where the sum starts: -bias * (sum of the block's x). One array of starts for each bias that occurs.
constexpr int biases[4] = {8, 16, 32, 128};
inline int bias_slot(int type) {
    return type == Q4_0 ? 0 : type == Q5_0 ? 1 : type == Q6_K ? 2 : type == Q8_0 || type == IQ4_NL ? 3 : -1;
}

// Up to `max_tile` rows of x in 8 bits. Columns are padded with zeros to a multiple of 256, blocks = padded / 32.
constexpr int max_tile = 16;
struct Tile {
    int width;          // rows of x
    int8_t* x;          // [blocks][width][32]
    float* scale;       // [blocks][width]
    float* sum;         // [blocks][width]: scale * sum of the block's 8-bit numbers
    int32_t* start[4];  // [blocks][width], for the bias 32 [blocks][width][2]: one for each half of a block
};

// Many rows of x at once in bfloat16, where the processor multiplies tiles. Quantised types only.
struct TileKernels {
    void (*arrange)(const float* x, int64_t t, int64_t cols, int64_t i, uint16_t* out);  // rows 16 i .. 16 i + 15
    size_t (*arranged_bytes)(int64_t t, int64_t cols);
    // As `quantised`, of arranged x; `scratch` holds scratch_bytes(t, last - first).
    void (*product)(int type, const uint8_t* data, int64_t rows, int64_t cols, int64_t first, int64_t last,
                    const uint16_t* x, int64_t t, float* out, int64_t stride, void* scratch);
    size_t (*scratch_bytes)(int64_t t, int64_t panels);
    double (*peak)(int64_t turns);  // operations that were done
};

struct MatmulKernels {
    int lanes;  // rows of weights that are worked on together: a panel
    int wide;   // rows of x of a full tile; others have 1 to min(wide, 8)

    // Rows of x, `cols` wide, into a tile; `slots` says which starts are wanted.
    void (*activations)(const float* x, int64_t cols, const Tile& tile, unsigned slots);

    // out[t][row] for the rows of panels first .. last - 1 (row numbers start at `out`) and all tiles, t counting on
    // through the tiles. `after` is a whole panel of this type that this thread will want next, to be fetched at the
    // end, or null. `scratch` holds scratch_bytes.
    void (*quantised)(int type, const uint8_t* data, int64_t rows, int64_t cols, int64_t first, int64_t last,
                      const Tile* tiles, int count, const uint8_t* after, float* out, int64_t stride, void* scratch);
    size_t (*scratch_bytes)(int64_t cols);

    // The same with float32 activations, for every type: rows first .. last - 1. Scratch: float_scratch(cols) bytes.
    void (*floats)(int type, const uint8_t* data, int64_t cols, int64_t first, int64_t last, const float* x, int64_t t,
                   float* out, int64_t stride, void* scratch);

    void (*decode)(int type, const uint8_t* data, float* out, int64_t count);
    void (*encode)(int type, const float* x, int64_t cols, const float* importance, uint8_t* out);  // one row

    uint64_t (*read)(const uint8_t* data, size_t bytes);  // touches every byte, as fast as it goes
    double (*peak)(int64_t turns);                        // operations that were done

    const TileKernels* tiles;  // null where there are none
};

// Rows of weights that `floats` expands at a time.
inline int64_t float_rows(int64_t cols) {
    int64_t rows = (256 * 1024) / (4 * (cols < 1 ? 1 : cols)) / 4 * 4;
    return rows < 4 ? 4 : rows > 32 ? 32 : rows;
}
inline size_t float_scratch(int64_t cols) { return static_cast<size_t>(float_rows(cols) * cols) * 4 + 64; }

}  // namespace hybridlm
