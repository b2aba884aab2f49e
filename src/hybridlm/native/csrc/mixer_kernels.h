// What an instruction set provides besides matrices: norms, rotation, Gated DeltaNet, attention.
//
// Kernels take raw pointers and the range of work to do; bind_mixers.cpp has checked shapes and splits the ranges.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hybridlm {

// One call of a Gated DeltaNet mixer; names and shapes as in _native.pyi.
struct GdnCall {
    const float *q, *k, *v, *a, *b, *gate;
    const float *conv_q, *conv_k, *conv_v;  // taps
    const float *ssm_a, *dt_bias, *norm;
    float *conv_state, *state, *out, *history;  // history may be null
    int64_t T, Hk, Hv, K, V, W;
    float eps;
    bool negative;  // eigenvalues: beta up to 2
    bool chunked;
};

// One call of attention, and how it is cut into tasks: (kv head, tile of queries, span of keys). The cut depends on
// shapes only, never on the number of threads, so results do not either.
struct AttentionCall {
    const float* q;
    const uint64_t* table;  // [blocks, 2]: addresses of K and V blocks
    float* out;
    float* partial;  // [T, H, spans, d + 2] where spans > 1: maximum, sum, weighted values
    int64_t block, start, T, H, Hkv, d, window;
    int kv_type;
    int64_t tile, tiles;                // queries of a tile
    int64_t first_key, span, spans;     // keys first_key + s span ..
};

struct StoreCall {
    const float* x;
    const uint64_t* table;
    int64_t which, block, start, Hkv, d;
    int kv_type;
};

struct MixerKernels {
    void (*rms_norm)(const float* x, const float* weight, float eps, float* out, int64_t rows, int64_t width);
    void (*swiglu)(const float* gate, const float* up, float* out, int64_t n);
    void (*add)(float* x, const float* y, int64_t n);
    void (*rope)(float* x, const int32_t* positions, const float* inv_freq, float scale, int64_t rows, int64_t heads,
                 int64_t d);
    size_t (*gdn_scratch)(const GdnCall&);
    void (*gdn)(const GdnCall&, int64_t first_key_head, int64_t last_key_head, void* scratch);
    size_t (*attention_scratch)(const AttentionCall&);
    void (*attention)(const AttentionCall&, int64_t kv_head, int64_t tile, int64_t span, void* scratch);
    void (*attention_merge)(const AttentionCall&, int64_t first_row, int64_t last_row);  // rows of [T H]
    void (*store_kv)(const StoreCall&, int64_t first, int64_t last);                      // rows of x
    void (*negate)(float* x, int64_t n);  // the plainest update in place: what memory allows, for benchmarks
    void (*activations)(const float* x, float* exp, float* sigmoid, float* silu, int64_t n);  // for tests of accuracy
};

}  // namespace hybridlm
