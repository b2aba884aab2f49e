// Gated DeltaNet between its projections: short convolution, gates, delta rule, gated norm; one key head at a time.
//
// Two forms of the recurrence S <- e^g S; d = beta (v - k^T S); S <- S + k d^T; o = q^T S:
//
// - token by token, used for up to SHORT tokens. k^T S and q^T S come from one reading of the state, which then lies in
//   the second-level cache for the update: main memory sees it read once and written once. With more than one token
//   the columns of S, which do not interact, are taken in blocks that stay in the first-level cache. The arithmetic of
//   a column does not depend on the block, so one call of n tokens equals n calls of one bit for bit.
// - in chunks of CHUNK tokens as matrix products. Within a chunk the d's solve a triangular system with the keys' Gram
//   matrix; it is solved forwards, in the order of the recurrence, with coefficients formed in double. On a CPU the
//   state's three products per token cost the same in any chunk length and the work within a chunk grows with it, so a
//   short chunk is best: just long enough to keep the operands of the products in registers.
//
// Decays near 1 multiply as S + (e^g - 1) S: rounding e^g itself would add up over thousands of tokens.

static constexpr int CHUNK = 16, SHORT = 16, COLUMNS = 64, SOLVE = 32;
static constexpr int64_t DEPTH = 24;  // rows to a partial sum: rounding errors of a sum grow with its length

// A causal convolution over the channels of one head: taps by tap and what preceded the first token by token, both
// padded to whole vectors with zeros.
struct Conv {
    const float* x;
    int64_t stride, n, padded, W;
    float *taps, *before;
};

static void conv_prepare(Conv& c, const float* taps, const float* state) {
    for (int64_t w = 0; w < c.W; w++) {
        float *to = c.taps + w * c.padded, *past = c.before + w * c.padded;
        for (int64_t i = 0; i < c.padded; i++) to[i] = i < c.n ? taps[i * c.W + w] : 0;
        if (w + 1 == c.W) break;
        for (int64_t i = 0; i < c.padded; i++) past[i] = i < c.n ? state[i * (c.W - 1) + w] : 0;
    }
}

// out[padded] = SiLU(convolution) at token t; the padding becomes zero.
static void conv_row(const Conv& c, int64_t t, float* out) {
    const int64_t W = c.W, full = c.n / L * L;
    if (W == 4) {
        const float* r[4];
        for (int w = 0; w < 4; w++) {
            const int64_t s = t - 3 + w;
            r[w] = s < 0 ? c.before + (3 + s) * c.padded : c.x + s * c.stride;
        }
        const float *t0 = c.taps, *t1 = t0 + c.padded, *t2 = t1 + c.padded, *t3 = t2 + c.padded;
        for (int64_t i = 0; i < full; i += L) {
            V y = mul(load(t0 + i), load(r[0] + i));
            y = fma(load(t1 + i), load(r[1] + i), y);
            y = fma(load(t2 + i), load(r[2] + i), y);
            y = fma(load(t3 + i), load(r[3] + i), y);
            store(out + i, silu(y));
        }
        if (full == c.n) return;
    }
    for (int64_t i = W == 4 ? full : 0; i < c.n; i += L) {
        const int part = int(least(int64_t(L), c.n - i));
        V y = zero();
        for (int64_t w = 0; w < W; w++) {
            const int64_t s = t - (W - 1) + w;
            const float* r = s < 0 ? c.before + (W - 1 + s) * c.padded : c.x + s * c.stride;
            const V x = part == L ? load(r + i) : load_part(r + i, part), tap = load(c.taps + w * c.padded + i);
            y = w == 0 ? mul(tap, x) : fma(tap, x, y);
        }
        store(out + i, silu(y));
    }
}

// The last W - 1 inputs after T tokens.
static void conv_remember(const float* x, int64_t stride, int64_t n, int64_t W, int64_t T, float* state) {
    const int64_t keep = W - 1, fresh = least(keep, T), old = keep - fresh;
    for (int64_t i = 0; i < n; i++) {
        float* s = state + i * keep;
        for (int64_t w = 0; w < old; w++) s[w] = s[w + fresh];
        for (int64_t w = 0; w < fresh; w++) s[old + w] = x[(T - fresh + w) * stride + i];
    }
}

// One token: convolution, SiLU and the shift of the state without transposing anything.
static void conv_step(const float* x, const float* taps, int64_t n, int64_t padded, int64_t W, float* state,
                      float* out) {
    if (W == 4) {
        for (int64_t i = 0; i < n; i++) {
            const float *t = taps + 4 * i, s1 = state[3 * i + 1], s2 = state[3 * i + 2];
            float y = t[0] * state[3 * i];
            y = fma1(t[1], s1, y);
            y = fma1(t[2], s2, y);
            out[i] = fma1(t[3], x[i], y);
            state[3 * i] = s1;
            state[3 * i + 1] = s2;
            state[3 * i + 2] = x[i];
        }
    } else {
        for (int64_t i = 0; i < n; i++) {
            const float* t = taps + W * i;
            float *s = state + (W - 1) * i, y = 0;
            for (int64_t w = 0; w < W; w++) {
                const float in = w + 1 < W ? s[w] : x[i];
                y = w == 0 ? t[0] * in : fma1(t[w], in, y);
                if (w > 0) s[w - 1] = in;
            }
            out[i] = y;
        }
    }
    for (int64_t i = n; i < padded; i++) out[i] = 0;
    for (int64_t i = 0; i < padded; i += L) store(out + i, silu(load(out + i)));
}

static double dot_double(const float* x, const float* y, int64_t n) {
    double s[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int l = 0; l < 8; l++) s[l] += double(x[i + l]) * double(y[i + l]);
    for (; i < n; i++) s[0] += double(x[i]) * double(y[i]);
    return ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
}

// Scales x to length 1 (or less, near zero: 1e-6 is added under the root), times `scale`. Rounded to float the square
// of the length is off by about 1e-7, always the same way where keys repeat, and where beta is near 2 that adds up token
// by token: the result, by which beta is to be multiplied, undoes it.
static double l2norm(float* x, int64_t n, int64_t padded, double scale) {
    const double square = dot_double(x, x, n);
    const V r = set1(float(scale / sqrt(square + 1e-6)));
    for (int64_t i = 0; i < padded; i += L) store(x + i, mul(load(x + i), r));
    const double got = dot_double(x, x, n);
    return got > 0 ? square / (square + 1e-6) * scale * scale / got : 1;
}

// Memory that is needed soon, fetched a few lines at a time while something else is computed.
struct Fetch {
    const char *at[8], *end[8];
    size_t count = 0, now = 0;
    int64_t lines = 0;

    void add(const float* p, int64_t n) {
        at[count] = reinterpret_cast<const char*>(p);
        end[count] = at[count] + n * 4;
        lines += (n * 4 + 63) / 64;
        count++;
    }

    void step(int64_t n) {
        for (; n > 0 && now < count; n--) {
            prefetch2(at[now]);
            at[now] += 64;
            if (at[now] >= end[now]) now++;
        }
    }
};

HLM_INLINE void fetch_row(const float* p, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) prefetch2(p + i);
}

struct Gates {
    double alpha[CHUNK];
    float fade[CHUNK];          // alpha - 1
    float beta[CHUNK], low[CHUNK];  // beta is the sum of both
};

static void gates(const GdnCall& c, int64_t head, int64_t first, int64_t n, const double* square, Gates& g) {
    const double A = c.ssm_a[head], dt = c.dt_bias[head];
    for (int64_t i = 0; i < n; i++) {
        const double x = double(c.a[(first + i) * c.Hv + head]) + dt, b = double(c.b[(first + i) * c.Hv + head]);
        const double softplus = (x > 0 ? x : 0) + log1p(::exp(-fabs(x)));
        double decay = A == 0 ? 0 * x : A * softplus;
        if (decay < -1000) decay = -1000;  // e^-1000 is 0 here, and differences of infinities would not be numbers
        if (x == INFINITY && A == 0) decay = 0;
        g.alpha[i] = ::exp(decay);
        g.fade[i] = float(expm1(decay));
        const double beta = (c.negative ? 2.0 : 1.0) / (1.0 + ::exp(-b)) * square[i];
        g.beta[i] = float(beta);
        g.low[i] = float(beta - double(g.beta[i]));
    }
}

static void gated_norm(const GdnCall& c, const float* o, int64_t head, int64_t t) {
    const int64_t n = c.V, at = t * c.Hv * n + head * n;
    const float *gate = c.gate + at, *w = c.norm;
    float* out = c.out + at;
    const V r = set1(1.0f / sqrtf(dot(o, o, n) / float(n) + c.eps));
    int64_t i = 0;
    for (; i + L <= n; i += L) store(out + i, mul(mul(load(w + i), mul(load(o + i), r)), silu(load(gate + i))));
    if (i < n) {
        const int part = int(n - i);
        const V y = mul(load_part(w + i, part), mul(load(o + i), r));
        store_part(out + i, mul(y, silu(load_part(gate + i, part))), part);
    }
}

// ---- token by token ------------------------------------------------------------------------------------------------

// m += k^T S and o += q^T S over `rows` rows and NR vectors of columns, summed in registers first.
template <int NR>
HLM_INLINE void probe_tile(const float* S, int64_t stride, int64_t rows, const float* k, const float* q, float* m,
                           float* o, bool fetch) {
    V x[NR], y[NR];
    HLM_UNROLL
    for (int c = 0; c < NR; c++) x[c] = y[c] = zero();
    for (int64_t i = 0; i < rows; i++) {
        const float* row = S + i * stride;
        const V u = set1(k[i]), w = set1(q[i]);
        if (fetch) {
            HLM_UNROLL
            for (int c = 0; c < NR * L; c += 16) prefetch(row + DEPTH * stride + c);
        }
        HLM_UNROLL
        for (int c = 0; c < NR; c++) {
            const V s = load(row + c * L);
            x[c] = fma(u, s, x[c]);
            y[c] = fma(w, s, y[c]);
        }
    }
    HLM_UNROLL
    for (int c = 0; c < NR; c++) {
        store(m + c * L, add(load(m + c * L), x[c]));
        store(o + c * L, add(load(o + c * L), y[c]));
    }
}

// m = k^T S and o = q^T S. A state in main memory is read row by row where a row's sums fit into registers, which the
// hardware's prefetching follows best; where they do not, the next DEPTH rows are fetched by hand (`stream`).
static void probe(const float* S, int64_t stride, int64_t K, int64_t n, const float* k, const float* q, float* m,
                  float* o, bool stream) {
    constexpr int WIDE = REGISTERS == 32 ? 12 : 6;
    for (int64_t j = 0; j < n; j += L) {
        store(m + j, zero());
        store(o + j, zero());
    }
    const bool fetch = stream && n > WIDE * L;
    for (int64_t i = 0; i < K; i += DEPTH, S += DEPTH * stride, k += DEPTH, q += DEPTH) {
        const int64_t rows = least(DEPTH, K - i);
        int64_t j = 0;
        for (; j + WIDE * L <= n; j += WIDE * L)
            probe_tile<WIDE>(S + j, stride, rows, k, q, m + j, o + j, fetch);
        for (; j + 4 * L <= n; j += 4 * L) probe_tile<4>(S + j, stride, rows, k, q, m + j, o + j, stream);
        for (; j + L <= n; j += L) probe_tile<1>(S + j, stride, rows, k, q, m + j, o + j, stream);
        if (j == n) continue;
        V x = zero(), y = zero();
        for (int64_t r = 0; r < rows; r++) {
            const V s = load_part(S + r * stride + j, int(n - j));
            x = fma(set1(k[r]), s, x);
            y = fma(set1(q[r]), s, y);
        }
        store(m + j, add(load(m + j), x));
        store(o + j, add(load(o + j), y));
    }
}

// S <- S + fade S + k d^T; `between(i)` is called before row i, to fetch what comes next.
template <class Between>
HLM_INLINE void update(float* S, int64_t stride, int64_t K, int64_t n, float fade, const float* k, const float* d,
                       Between between) {
    const V f = set1(fade);
    for (int64_t i = 0; i < K; i++) {
        float* row = S + i * stride;
        between(i);
        const V x = set1(k[i]);
        int64_t j = 0;
        for (; j + L <= n; j += L) {
            const V s = load(row + j);
            store(row + j, fma(x, load(d + j), fma(f, s, s)));
        }
        if (j < n) {
            const int part = int(n - j);
            const V s = load_part(row + j, part);
            store_part(row + j, fma(x, load(d + j), fma(f, s, s)), part);
        }
    }
}

static void copy_columns(const float* S, float* to, int64_t stride, int64_t K, int64_t n) {
    for (int64_t i = 0; i < K; i++) memcpy(to + i * stride, S + i * stride, size_t(n) * 4);
}

// ---- scratch -------------------------------------------------------------------------------------------------------

struct GdnRoom {
    int64_t Kp, Vp, group;
    float *taps_q, *taps_k, *taps_v, *before_q, *before_k, *before_v;
    float* kq;      // [2 CHUNK, Kp]: keys, then queries
    float* ke;      // [CHUNK, Kp]: keys as they weigh at the chunk's end
    float* v;       // [CHUNK, Vp]; becomes d
    float* p;       // [2 CHUNK, Vp]: k^T S and q^T S; the latter become o
    float* weigh;   // [CHUNK, CHUNK]
    float* S;       // [group, K, Vp] where V is not whole vectors
    size_t floats;
};

static GdnRoom gdn_room(const GdnCall& c, float* base) {
    GdnRoom r;
    r.Kp = round_up(c.K, L);
    r.Vp = round_up(c.V, L);
    r.group = c.Hv / c.Hk;
    size_t at = 0;
    auto take = [&](int64_t n) {
        float* p = base + at;
        at += size_t(round_up(n, 16));
        return p;
    };
    r.taps_q = take(c.W * r.Kp);
    r.taps_k = take(c.W * r.Kp);
    r.taps_v = take(r.group * c.W * r.Vp);
    r.before_q = take(c.W * r.Kp);
    r.before_k = take(c.W * r.Kp);
    r.before_v = take(r.group * c.W * r.Vp);
    r.kq = take(2 * CHUNK * r.Kp);
    r.ke = take(CHUNK * r.Kp);
    r.v = take(CHUNK * r.Vp);
    r.p = take(2 * CHUNK * r.Vp);
    r.weigh = take(CHUNK * CHUNK);
    r.S = take(r.Vp == c.V ? 0 : r.group * c.K * r.Vp);
    r.floats = at;
    return r;
}

static size_t gdn_scratch(const GdnCall& c) { return gdn_room(c, nullptr).floats * 4; }

// ---- pieces --------------------------------------------------------------------------------------------------------

// `n` <= CHUNK tokens of a value head through the recurrence; keys and queries in kq, values in v; o left in p.
static void recurrent_piece(const GdnCall& c, const GdnRoom& r, int64_t head, int64_t first, int64_t n, const Gates& g,
                            const float* ahead, Fetch& fetch) {
    float* S = c.state + head * c.K * c.V;
    float m[COLUMNS + 16], o[COLUMNS + 16], qk[CHUNK];
    for (int64_t t = 0; t < n; t++) qk[t] = dot(r.kq + t * r.Kp, r.kq + (CHUNK + t) * r.Kp, c.K);
    // A single token streams whole rows; its sums then go where a chunk's would.
    const int64_t block = n == 1 && !c.history ? c.V : int64_t(COLUMNS);
    for (int64_t j0 = 0; j0 < c.V; j0 += block) {
        const int64_t columns = least(block, c.V - j0);
        for (int64_t t = 0; t < n; t++) {
            const float *k = r.kq + t * r.Kp, *q = r.kq + (CHUNK + t) * r.Kp, *v = r.v + t * r.Vp + j0;
            float *out = r.p + t * r.Vp + j0, *mm = m, *oo = o;
            if (block > COLUMNS) mm = r.p + CHUNK * r.Vp, oo = out;
            probe(S + j0, c.V, c.K, columns, k, q, mm, oo, n == 1);
            const V fade = set1(g.fade[t]), beta = set1(g.beta[t]), low = set1(g.low[t]), same = set1(qk[t]);
            for (int64_t j = 0; j < columns; j += L) {
                const V x = load(mm + j), y = load(oo + j);
                const V miss = sub(load(v + j), fma(fade, x, x)), d = fma(beta, miss, mul(low, miss));
                store(mm + j, d);
                store(oo + j, fma(same, d, fma(fade, y, y)));
            }
            if (oo != out) memcpy(out, oo, size_t(columns) * 4);
            if (block == c.V) {
                const int64_t lines = t + 1 == n ? (fetch.lines + c.K - 1) / c.K : 0;
                // A third of the next state meanwhile: as much as memory gives in that time.
                update(S, c.V, c.K, columns, g.fade[t], k, mm, [&](int64_t i) {
                    if (ahead) fetch_row(ahead + i * 96, 96);
                    fetch.step(lines);
                });
            } else {
                const float* next = t + 1 < n ? nullptr : j0 + columns < c.V ? S + j0 + columns : ahead;
                update(S + j0, c.V, c.K, columns, g.fade[t], k, mm, [&](int64_t i) {
                    if (next) fetch_row(next + i * c.V, COLUMNS);
                });
            }
            if (c.history)
                copy_columns(S + j0, c.history + ((first + t) * c.Hv + head) * c.K * c.V + j0, c.V, c.K, columns);
        }
    }
}

// kk[i][j] = k_i . k_j for j < i < n in double, qk[i][j] = q_i . k_j for j <= i < n; entries beyond are not to be read.
static void gram(const float* k, const float* q, int64_t stride, int64_t K, int64_t n, double (&kk)[CHUNK][CHUNK],
                 float (&qk)[CHUNK][CHUNK]) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < i; j++) kk[i][j] = dot_double(k + i * stride, k + j * stride, K);
    for (int64_t i = 0; i < n; i += 4)
        kv_dots<KV_F32, 4>(q + i * stride, stride, reinterpret_cast<const uint8_t*>(k), stride * 4, least(i + 4, n), K,
                           qk[i], CHUNK);
}

// d_i = beta_i (v_i - lead_i p_i - sum_{j<i} solve_ij d_j), over `columns` <= SOLVE columns; d takes the place of v. In
// double: where keys are alike and beta is near 2 the d's alternate and nothing averages their errors out.
static void substitute(float* v, const float* p, int64_t stride, int64_t columns, int64_t n, const Gates& g,
                       const double* lead, const double* solve) {
    double d[CHUNK][SOLVE];
    for (int64_t i = 0; i < n; i++) {
        double x[SOLVE];
        for (int c = 0; c < SOLVE; c++) x[c] = 0;
        const float *vi = v + i * stride, *pi = p + i * stride;
        for (int64_t c = 0; c < columns; c++) x[c] = double(vi[c]) - lead[i] * double(pi[c]);
        for (int64_t j = 0; j < i; j++) {
            const double s = solve[i * CHUNK + j];
            for (int c = 0; c < SOLVE; c++) x[c] -= s * d[j][c];
        }
        const double beta = double(g.beta[i]) + double(g.low[i]);
        for (int c = 0; c < SOLVE; c++) d[i][c] = beta * x[c];
        for (int64_t c = 0; c < columns; c++) v[i * stride + c] = float(d[i][c]);
    }
}

// The same as `recurrent_piece` in matrix products, on a state whose rows lie Vp apart.
static void chunked_piece(const GdnCall& c, const GdnRoom& r, float* S, int64_t n, const Gates& g,
                          const double (&kk)[CHUNK][CHUNK], const float (&qk)[CHUNK][CHUNK]) {
    const int64_t Kp = r.Kp, Vp = r.Vp;
    for (int part = 0; part < 2; part++) {
        const float* a = r.kq + part * CHUNK * Kp;
        float* p = r.p + part * CHUNK * Vp;
        gemm<FRESH>(a, Kp, 1, S, Vp, n, Vp, least(c.K, DEPTH), p, Vp);
        for (int64_t i = DEPTH; i < c.K; i += DEPTH)
            gemm<SUM>(a + i, Kp, 1, S + i * Vp, Vp, n, Vp, least(c.K - i, DEPTH), p, Vp);
    }

    // decay[j]: from after token j to token i; begin: from the chunk's start.
    double lead[CHUNK], solve[CHUNK * CHUNK];
    double decay[CHUNK], begin = 1;
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j < i; j++) decay[j] *= g.alpha[i];
        decay[i] = 1;
        begin *= g.alpha[i];
        lead[i] = begin;
        for (int64_t j = 0; j < CHUNK; j++) {
            solve[i * CHUNK + j] = j < i ? decay[j] * kk[i][j] : 0;
            r.weigh[i * CHUNK + j] = j <= i ? float(decay[j] * double(qk[i][j])) : 0;
        }
        float* o = r.p + (CHUNK + i) * Vp;
        const V b = set1(float(begin));
        for (int64_t j = 0; j < Vp; j += L) store(o + j, mul(b, load(o + j)));
    }
    for (int64_t j = 0; j < Vp; j += SOLVE)
        substitute(r.v + j, r.p + j, Vp, least(int64_t(SOLVE), Vp - j), n, g, lead, solve);

    const int64_t half = least(n, int64_t(CHUNK / 2));
    gemm<ACCUMULATE>(r.weigh, CHUNK, 1, r.v, Vp, half, Vp, half, r.p + CHUNK * Vp, Vp);
    if (n > half)
        gemm<ACCUMULATE>(r.weigh + half * CHUNK, CHUNK, 1, r.v, Vp, n - half, Vp, n, r.p + (CHUNK + half) * Vp, Vp);

    for (int64_t i = 0; i < n; i++) {
        const V d = set1(float(decay[i]));
        for (int64_t p = 0; p < Kp; p += L) store(r.ke + i * Kp + p, mul(d, load(r.kq + i * Kp + p)));
    }
    gemm<GROW>(r.ke, 1, Kp, r.v, Vp, c.K, Vp, n, S, Vp, float(begin - 1));
}

static void move_rows(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows, int64_t n) {
    for (int64_t i = 0; i < rows; i++) {
        memcpy(to + i * to_stride, from + i * from_stride, size_t(n) * 4);
        for (int64_t j = n; j < to_stride; j++) to[i * to_stride + j] = 0;
    }
}

// The convolutions of the next value head of a decode step: too short for the hardware's fetching to catch up with. The
// state itself it follows better alone.
static void fetch_head(const GdnCall& c, int64_t head, bool keys, Fetch& fetch) {
    const int64_t group = c.Hv / c.Hk, K = c.K, width = c.Hk * K, keep = c.W - 1, kh = head / group;
    if (keys) {
        fetch.add(c.conv_q + kh * K * c.W, K * c.W);
        fetch.add(c.conv_k + kh * K * c.W, K * c.W);
        fetch.add(c.conv_state + kh * K * keep, K * keep);
        fetch.add(c.conv_state + (width + kh * K) * keep, K * keep);
    }
    fetch.add(c.conv_v + head * c.V * c.W, c.V * c.W);
    fetch.add(c.conv_state + (2 * width + head * c.V) * keep, c.V * keep);
}

// A single token of a key head and its value heads.
static void gdn_step(const GdnCall& c, const GdnRoom& r, int64_t kh, bool last) {
    const int64_t K = c.K, width = c.Hk * K, keep = c.W - 1;
    float *k = r.kq, *q = r.kq + CHUNK * r.Kp;
    conv_step(c.q + kh * K, c.conv_q + kh * K * c.W, K, r.Kp, c.W, c.conv_state + kh * K * keep, q);
    conv_step(c.k + kh * K, c.conv_k + kh * K * c.W, K, r.Kp, c.W, c.conv_state + (width + kh * K) * keep, k);
    l2norm(q, K, r.Kp, 1 / sqrt(double(K)));
    const double square = l2norm(k, K, r.Kp, 1);
    for (int64_t j = 0; j < r.group; j++) {
        const int64_t head = kh * r.group + j, at = head * c.V;
        conv_step(c.v + at, c.conv_v + at * c.W, c.V, r.Vp, c.W, c.conv_state + (2 * width + at) * keep, r.v);
        Gates g;
        gates(c, head, 0, 1, &square, g);
        Fetch fetch;
        if (!last || j + 1 < r.group) fetch_head(c, head + 1, j + 1 == r.group, fetch);
        const bool more = !last || j + 1 < r.group;
        recurrent_piece(c, r, head, 0, 1, g, more ? c.state + (head + 1) * K * c.V : nullptr, fetch);
        gated_norm(c, r.p, head, 0);
    }
}

// Any number of tokens of a key head and its value heads, CHUNK at a time.
static void gdn_pieces(const GdnCall& c, const GdnRoom& r, int64_t kh, bool last, bool chunked) {
    const int64_t K = c.K, Vw = c.V, W = c.W, width = c.Hk * K, values = c.Hv * Vw;
    Conv cq = {c.q + kh * K, width, K, r.Kp, W, r.taps_q, r.before_q};
    Conv ck = {c.k + kh * K, width, K, r.Kp, W, r.taps_k, r.before_k};
    float *state_q = c.conv_state + kh * K * (W - 1), *state_k = c.conv_state + (width + kh * K) * (W - 1);
    conv_prepare(cq, c.conv_q + kh * K * W, state_q);
    conv_prepare(ck, c.conv_k + kh * K * W, state_k);
    for (int64_t j = 0; j < r.group; j++) {
        const int64_t at = (kh * r.group + j) * Vw;
        Conv cv = {nullptr, 0, Vw, r.Vp, W, r.taps_v + j * W * r.Vp, r.before_v + j * W * r.Vp};
        conv_prepare(cv, c.conv_v + at * W, c.conv_state + (2 * width + at) * (W - 1));
    }
    const bool own = chunked && r.Vp != Vw;  // the chunked form needs padded rows
    if (own) move_rows(c.state + kh * r.group * K * Vw, Vw, r.S, r.Vp, r.group * K, Vw);

    double kk[CHUNK][CHUNK];
    float qk[CHUNK][CHUNK];
    double square[CHUNK];
    for (int64_t first = 0; first < c.T; first += CHUNK) {
        const int64_t n = least(int64_t(CHUNK), c.T - first);
        for (int64_t t = 0; t < n; t++) {
            float *k = r.kq + t * r.Kp, *q = r.kq + (CHUNK + t) * r.Kp;
            // The same token of the next chunk: rows lie too far apart for the hardware to fetch them.
            fetch_row(ck.x + (first + t + CHUNK) * width, K);
            fetch_row(cq.x + (first + t + CHUNK) * width, K);
            conv_row(ck, first + t, k);
            conv_row(cq, first + t, q);
            square[t] = l2norm(k, K, r.Kp, 1);
            l2norm(q, K, r.Kp, 1 / sqrt(double(K)));
        }
        if (chunked) gram(r.kq, r.kq + CHUNK * r.Kp, r.Kp, K, n, kk, qk);
        for (int64_t j = 0; j < r.group; j++) {
            const int64_t head = kh * r.group + j;
            const Conv cv = {c.v + head * Vw, values, Vw, r.Vp, W, r.taps_v + j * W * r.Vp, r.before_v + j * W * r.Vp};
            for (int64_t t = 0; t < n; t++) {
                fetch_row(cv.x + (first + t + CHUNK) * values, Vw);
                fetch_row(c.gate + (first + t) * values + head * Vw, Vw);
                conv_row(cv, first + t, r.v + t * r.Vp);
            }
            Gates g;
            gates(c, head, first, n, square, g);
            if (chunked) {
                float* S = own ? r.S + j * K * r.Vp : c.state + head * K * Vw;
                chunked_piece(c, r, S, n, g, kk, qk);
                for (int64_t t = 0; t < n; t++) gated_norm(c, r.p + (CHUNK + t) * r.Vp, head, first + t);
            } else {
                const bool more = c.T <= CHUNK && (j + 1 < r.group || !last);
                Fetch none;
                recurrent_piece(c, r, head, first, n, g, more ? c.state + (head + 1) * K * Vw : nullptr, none);
                for (int64_t t = 0; t < n; t++) gated_norm(c, r.p + t * r.Vp, head, first + t);
            }
        }
    }
    if (own)
        for (int64_t i = 0; i < r.group * K; i++)
            memcpy(c.state + (kh * r.group * K + i) * Vw, r.S + i * r.Vp, size_t(Vw) * 4);
    conv_remember(c.q + kh * K, width, K, W, c.T, state_q);
    conv_remember(c.k + kh * K, width, K, W, c.T, state_k);
    for (int64_t j = 0; j < r.group; j++) {
        const int64_t at = (kh * r.group + j) * Vw;
        conv_remember(c.v + at, values, Vw, W, c.T, c.conv_state + (2 * width + at) * (W - 1));
    }
}

static void gdn(const GdnCall& c, int64_t first, int64_t last, void* scratch) {
    FlushSubnormals flush;
    const GdnRoom r = gdn_room(c, static_cast<float*>(scratch));
    const bool chunked = c.chunked && !c.history && c.T > SHORT;
    for (int64_t kh = first; kh < last; kh++) {
        if (c.T == 1) gdn_step(c, r, kh, kh + 1 == last);
        else gdn_pieces(c, r, kh, kh + 1 == last, chunked);
    }
}
