// Small float32 matrix products inside a mixer: C = A B or C += A B with B and C a few hundred columns wide.
//
// B's rows and C's rows lie `bs` and `cs` floats apart and are padded to whole vectors; an element (i, p) of A lies at
// a[i * ar + p * ac], so a transposed A costs nothing. Each element of C is summed over p in order, whatever the tile
// it falls into.

// acc[i][j] += rows i of A times vectors j of B.
template <int MR, int NR>
HLM_INLINE void gemm_inner(const float* HLM_RESTRICT a, int64_t ar, int64_t ac, const float* HLM_RESTRICT b, int64_t bs,
                           int64_t depth, V (&acc)[MR][NR]) {
    for (int64_t p = 0; p < depth; p++) {
        V x[NR];
        HLM_UNROLL
        for (int j = 0; j < NR; j++) x[j] = load(b + p * bs + j * L);
        HLM_UNROLL
        for (int i = 0; i < MR; i++) {
            const V y = set1(a[i * ar + p * ac]);
            HLM_UNROLL
            for (int j = 0; j < NR; j++) acc[i][j] = fma(y, x[j], acc[i][j]);
        }
    }
}

// How C enters: not at all, as what the sum starts from, added to the finished sum, or as C + C * grow (grow being a
// factor - 1: a factor near 1 would lose by rounding).
enum GemmInit { FRESH, ACCUMULATE, SUM, GROW };

template <int MR, int NR, GemmInit INIT>
static void gemm_tile(const float* a, int64_t ar, int64_t ac, const float* b, int64_t bs, int64_t depth, float* c,
                      int64_t cs, float grow) {
    V acc[MR][NR];
    HLM_UNROLL
    for (int i = 0; i < MR; i++) {
        HLM_UNROLL
        for (int j = 0; j < NR; j++) {
            acc[i][j] = INIT == FRESH || INIT == SUM ? zero() : load(c + i * cs + j * L);
            if (INIT == GROW) acc[i][j] = fma(set1(grow), acc[i][j], acc[i][j]);
        }
    }
    gemm_inner<MR, NR>(a, ar, ac, b, bs, depth, acc);
    HLM_UNROLL
    for (int i = 0; i < MR; i++) {
        HLM_UNROLL
        for (int j = 0; j < NR; j++) {
            if (INIT == SUM) acc[i][j] = add(acc[i][j], load(c + i * cs + j * L));
            store(c + i * cs + j * L, acc[i][j]);
        }
    }
}

static constexpr int GEMM_ROWS = REGISTERS == 32 ? 8 : 4, GEMM_VECTORS = 3;

template <int NR, GemmInit INIT>
static void gemm_columns(const float* a, int64_t ar, int64_t ac, const float* b, int64_t bs, int64_t rows,
                         int64_t depth, float* c, int64_t cs, float grow) {
    int64_t i = 0;
    for (; i + GEMM_ROWS <= rows; i += GEMM_ROWS)
        gemm_tile<GEMM_ROWS, NR, INIT>(a + i * ar, ar, ac, b, bs, depth, c + i * cs, cs, grow);
    if (i + 4 <= rows) {
        gemm_tile<4, NR, INIT>(a + i * ar, ar, ac, b, bs, depth, c + i * cs, cs, grow);
        i += 4;
    }
    for (; i < rows; i++) gemm_tile<1, NR, INIT>(a + i * ar, ar, ac, b, bs, depth, c + i * cs, cs, grow);
}

// `columns` is a multiple of L.
template <GemmInit INIT>
static void gemm(const float* a, int64_t ar, int64_t ac, const float* b, int64_t bs, int64_t rows, int64_t columns,
                 int64_t depth, float* c, int64_t cs, float grow = 0) {
    int64_t j = 0;
    for (; columns - j >= GEMM_VECTORS * L && columns - j != 4 * L; j += GEMM_VECTORS * L)
        gemm_columns<GEMM_VECTORS, INIT>(a, ar, ac, b + j, bs, rows, depth, c + j, cs, grow);
    for (; j + 2 * L <= columns; j += 2 * L)  // four vectors are two and two
        gemm_columns<2, INIT>(a, ar, ac, b + j, bs, rows, depth, c + j, cs, grow);
    if (j < columns) gemm_columns<1, INIT>(a, ar, ac, b + j, bs, rows, depth, c + j, cs, grow);
}
