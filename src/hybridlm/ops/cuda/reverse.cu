// The reverse scan of the backward pass: the gradient of the state, from the last chunk to the first.
//
// As in forward.cu, with dS' [K, V] the gradient of the state at a chunk's end, transposed in registers, dO^T the
// gradient of o, and the tiles of the same stage (T, P, k, q and the factors f, i, e, d):
//
//     dW^T = (dS'^T k^T) e + dO^T P;   dX^T = dW^T T   (the gradient of the writes, and of T's right-hand side)
//     dS^T = d dS'^T + (dO^T i) q - (dX^T f) k
//
// dX leaves by token where o does in the forward scan, dS' by chunk where S does.

__device__ __forceinline__ void step(float (&state_t)[K / 2], const u32 (&left)[K / 4], u32 at, const Place& w,
                                     bf16* o, unsigned char* tile, int rows) {
    float x[32];
    u32 grads[16], values[16];
    const u64 keys = by_rows(at), queries = by_rows(at + AT_Q);
    mma_fence();
    product<K / 16>(x, left, by_columns(at), false);
    mma_commit();
#pragma unroll
    for (int i = 0; i < 4; ++i) load_transposed(grads + 4 * i, at + w.corner + i * 16 * Values::PITCH);
    mma_wait<0>();
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const float2 f = load_shared_pair(at + AT_FACTORS + 768 + (j * 8 + w.pair) * 4);
        x[4 * j] *= f.x, x[4 * j + 1] *= f.y, x[4 * j + 2] *= f.x, x[4 * j + 3] *= f.y;
    }
    mma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) add_64_rows(x, grads + 4 * i, by_rows(at + AT_SCORES) + i * 16);
    mma_commit();
    mma_wait<0>();
    float down[2];
    halved(values, down, x);
    mma_fence();
    first_64_rows_half(x, values, by_rows(at + AT_INVERSE));
#pragma unroll
    for (int i = 1; i < 4; ++i) add_64_rows_half(x, values + 4 * i, by_rows(at + AT_INVERSE) + i * 16);
    mma_commit();
    u32 scaled[16];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const float2 f = load_shared_pair(at + AT_FACTORS + 512 + (j * 8 + w.pair) * 4);
#pragma unroll
        for (int r = 0; r < 2; ++r)
            scaled[2 * j + r] = pack(low(grads[2 * j + r]) * f.x, high(grads[2 * j + r]) * f.y);
    }
    mma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) add_keys(state_t, scaled + 4 * i, queries + i * 16);
    mma_commit();
    mma_wait<TIGHT ? 0 : 1>();
    restore(x, down);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const float2 f = load_shared_pair(at + AT_FACTORS + 256 + (j * 8 + w.pair) * 4);
#pragma unroll
        for (int r = 0; r < 2; ++r)
            values[2 * j + r] = pack(-x[4 * j + 2 * r] * f.x, -x[4 * j + 2 * r + 1] * f.y);
    }
    mma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) add_keys(state_t, values + 4 * i, keys + i * 16);
    mma_commit();
    if (!SUMMARY) emit(x, at, w, o, tile, rows);
}
