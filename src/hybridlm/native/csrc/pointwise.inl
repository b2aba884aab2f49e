// Row by row: RMSNorm, SwiGLU, sums, rotary embedding.

static void rms_norm(const float* x, const float* weight, float eps, float* out, int64_t rows, int64_t width) {
    for (int64_t t = 0; t < rows; t++, x += width, out += width) {
        const V r = set1(1.0f / sqrtf(dot(x, x, width) / float(width) + eps));
        int64_t i = 0;
        for (; i + L <= width; i += L) store(out + i, mul(load(weight + i), mul(load(x + i), r)));
        if (i < width) {
            const int n = int(width - i);
            store_part(out + i, mul(load_part(weight + i, n), mul(load_part(x + i, n), r)), n);
        }
    }
}

static void swiglu(const float* gate, const float* up, float* out, int64_t n) {
    int64_t i = 0;
    for (; i + L <= n; i += L) store(out + i, mul(silu(load(gate + i)), load(up + i)));
    if (i < n) {
        const int part = int(n - i);
        store_part(out + i, mul(silu(load_part(gate + i, part)), load_part(up + i, part)), part);
    }
}

static void add_to(float* x, const float* y, int64_t n) {
    int64_t i = 0;
    for (; i + L <= n; i += L) store(x + i, add(load(x + i), load(y + i)));
    if (i < n) {
        const int part = int(n - i);
        store_part(x + i, add(load_part(x + i, part), load_part(y + i, part)), part);
    }
}

// Angles are formed and reduced in double: position * frequency in float32 would be off by 4e-3 rad at 65536.
static void rope(float* x, const int32_t* positions, const float* inv_freq, float scale, int64_t rows, int64_t heads,
                 int64_t d) {
    constexpr int BLOCK = 64;
    const int64_t half = d / 2;
    float c[BLOCK], s[BLOCK];
    for (int64_t t = 0; t < rows; t++, x += heads * d) {
        for (int64_t first = 0; first < half; first += BLOCK) {
            const int n = int(least(int64_t(BLOCK), half - first));
            for (int i = 0; i < n; i++) {
                const double angle = double(positions[t]) * double(inv_freq[first + i]);
                c[i] = float(cos(angle) * double(scale));
                s[i] = float(sin(angle) * double(scale));
            }
            for (int64_t h = 0; h < heads; h++) {
                float* u = x + h * d + first;
                float* w = u + half;
                int i = 0;
                for (; i + L <= n; i += L) {
                    const V a = load(u + i), b = load(w + i), co = load(c + i), si = load(s + i);
                    store(u + i, fnma(b, si, mul(a, co)));
                    store(w + i, fma(a, si, mul(b, co)));
                }
                for (; i < n; i++) {
                    const float a = u[i], b = w[i];
                    u[i] = fma1(-b, s[i], a * c[i]);
                    w[i] = fma1(a, s[i], b * c[i]);
                }
            }
        }
    }
}

static void negate(float* x, int64_t n) {
    for (int64_t i = 0; i < n; i += L) {
        const int part = int(least(int64_t(L), n - i));
        if (part == L) store(x + i, sub(zero(), load(x + i)));
        else store_part(x + i, sub(zero(), load_part(x + i, part)), part);
    }
}

static void activations(const float* x, float* e, float* sig, float* sil, int64_t n) {
    for (int64_t i = 0; i < n; i += L) {
        const int part = int(least(int64_t(L), n - i));
        const V v = part == L ? load(x + i) : load_part(x + i, part);
        V y[3] = {exp(v), sigmoid(v), silu(v)};
        float* to[3] = {e, sig, sil};
        for (int j = 0; j < 3; j++) {
            if (part == L) store(to[j] + i, y[j]);
            else store_part(to[j] + i, y[j], part);
        }
    }
}
