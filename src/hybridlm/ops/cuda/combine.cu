// The state that each segment of a row begins with, from what the segments made of zeros (scan.cu): in place, one after
// the other, starts[next] += A starts[this], and in reverse A^T. All in float32. The first two in order are done already.
//
// A block has 32 value columns of one (row, head).

struct Combine {
    float* starts;             // [rows, segments, H, K, V]
    const float* transitions;  // [rows, segments, H, K, K]
    const int* kept;           // [rows, segments, H]: whether A is not zero
    int heads, value_dim, segments;
};

constexpr int COLUMNS = 32, THREADS = 256, EACH = K / 8, PITCH = K + 1;

extern "C" __global__ void __launch_bounds__(THREADS) combine(const __grid_constant__ Combine s) {
    extern __shared__ __align__(128) unsigned char memory[];
    float *const state = (float*)memory, *const a = state + K * COLUMNS;
    const int slabs = s.value_dim / COLUMNS, slab = blockIdx.x % slabs, head = blockIdx.x / slabs % s.heads;
    const int row = blockIdx.x / slabs / s.heads, t = threadIdx.x, column = t % COLUMNS, group = t / COLUMNS;
    const long step = (REVERSE ? -1L : 1L) * s.heads * K * s.value_dim;
    for (int i = 1; i < s.segments - 1; ++i) {
        const long here = ((long)row * s.segments + (REVERSE ? s.segments - 1 - i : i)) * s.heads + head;
        if (!s.kept[here]) continue;
        float* const from = s.starts + here * K * s.value_dim + slab * COLUMNS + column;
        for (int k = group; k < K; k += THREADS / COLUMNS) state[k * COLUMNS + column] = from[(long)k * s.value_dim];
        for (int j = t; j < K * K; j += THREADS) {
            const int to = REVERSE ? j % K * PITCH + j / K : j / K * PITCH + j % K;
            a[to] = s.transitions[here * K * K + j];
        }
        __syncthreads();
        float sum[EACH];
#pragma unroll
        for (int r = 0; r < EACH; ++r) sum[r] = from[step + (long)(group * EACH + r) * s.value_dim];
#pragma unroll 4
        for (int k = 0; k < K; ++k) {
            const float x = state[k * COLUMNS + column];
#pragma unroll
            for (int r = 0; r < EACH; ++r) sum[r] += a[(group * EACH + r) * PITCH + k] * x;
        }
#pragma unroll
        for (int r = 0; r < EACH; ++r) from[step + (long)(group * EACH + r) * s.value_dim] = sum[r];
        __syncthreads();
    }
}
