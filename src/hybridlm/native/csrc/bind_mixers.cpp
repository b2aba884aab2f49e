// Checks what Python hands to the kernels between the projections and cuts the work for the pool.
//
// How work is cut into sums never depends on the number of threads; small calls stay on the calling thread, since
// waking another costs more than a decode step's norm.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>

#include "dispatch.h"
#include "pool.h"

namespace nb = nanobind;
using namespace hybridlm;

namespace {

template <class T, int N>
using Array = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
using In1 = Array<const float, 1>;
using In2 = Array<const float, 2>;
using Out2 = Array<float, 2>;
using Out3 = Array<float, 3>;
using Out4 = Array<float, 4>;
using Table = Array<const uint64_t, 2>;
using Positions = Array<const int32_t, 1>;

void require(bool holds, const char* what) {
    if (!holds) throw nb::value_error(what);
}

void require_shape(const char* name, int64_t rows, int64_t cols, int64_t want_rows, int64_t want_cols) {
    if (rows == want_rows && cols == want_cols) return;
    const std::string text = std::string(name) + " must be [" + std::to_string(want_rows) + ", " +
                             std::to_string(want_cols) + "], got [" + std::to_string(rows) + ", " +
                             std::to_string(cols) + "]";
    throw nb::value_error(text.c_str());
}

template <class A>
void require_shape(const char* name, const A& a, int64_t rows, int64_t cols) {
    require_shape(name, int64_t(a.shape(0)), int64_t(a.shape(1)), rows, cols);
}

void require_length(const char* name, const In1& a, int64_t n) {
    if (int64_t(a.shape(0)) == n) return;
    const std::string text =
        std::string(name) + " must have " + std::to_string(n) + " entries, got " + std::to_string(a.shape(0));
    throw nb::value_error(text.c_str());
}

// f(first, last) over `n` items that cost `cost` elements each, in parts of about 32k elements.
template <class F>
void over(int64_t n, int64_t cost, F&& f) {
    const int64_t part = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, cost));
    if (n <= 2 * part) {
        if (n > 0) f(int64_t(0), n);
        return;
    }
    nb::gil_scoped_release release;
    parallel_for((n + part - 1) / part, [&](int64_t task, int) { f(task * part, std::min(n, (task + 1) * part)); });
}

void rms_norm(In2 x, In1 weight, float eps, Out2 out) {
    const int64_t rows = int64_t(x.shape(0)), width = int64_t(x.shape(1));
    require_length("weight", weight, width);
    require_shape("out", out, rows, width);
    const MixerKernels& k = kernels().mixers;
    over(rows, width, [&](int64_t first, int64_t last) {
        k.rms_norm(x.data() + first * width, weight.data(), eps, out.data() + first * width, last - first, width);
    });
}

void swiglu(In2 gate, In2 up, Out2 out) {
    require_shape("up", up, int64_t(gate.shape(0)), int64_t(gate.shape(1)));
    require_shape("out", out, int64_t(gate.shape(0)), int64_t(gate.shape(1)));
    const MixerKernels& k = kernels().mixers;
    over((int64_t(gate.size()) + 1023) / 1024, 4096, [&](int64_t first, int64_t last) {
        const int64_t begin = first * 1024, end = std::min<int64_t>(int64_t(gate.size()), last * 1024);
        k.swiglu(gate.data() + begin, up.data() + begin, out.data() + begin, end - begin);
    });
}

void add(Out2 x, In2 y) {
    require_shape("y", y, int64_t(x.shape(0)), int64_t(x.shape(1)));
    const MixerKernels& k = kernels().mixers;
    over((int64_t(x.size()) + 1023) / 1024, 1024, [&](int64_t first, int64_t last) {
        const int64_t begin = first * 1024, end = std::min<int64_t>(int64_t(x.size()), last * 1024);
        k.add(x.data() + begin, y.data() + begin, end - begin);
    });
}

void rope(Out2 x, Positions positions, In1 inv_freq, float scale) {
    const int64_t rows = int64_t(x.shape(0)), width = int64_t(x.shape(1)), d = 2 * int64_t(inv_freq.shape(0));
    require(d > 0 && width % d == 0, "x must be [T, H d] with d twice the number of frequencies");
    require(int64_t(positions.shape(0)) == rows, "positions must have one entry for each row of x");
    const MixerKernels& k = kernels().mixers;
    over(rows, 2 * width + 64 * d, [&](int64_t first, int64_t last) {
        k.rope(x.data() + first * width, positions.data() + first, inv_freq.data(), scale, last - first, width / d, d);
    });
}

void gdn(In2 q, In2 k, In2 v, In2 a, In2 b, In2 gate, In2 conv_q, In2 conv_k, In2 conv_v, In1 ssm_a, In1 dt_bias,
         In1 norm, Out2 conv_state, Out3 state, float eps, bool allow_neg_eigval, Out2 out, bool chunked,
         std::optional<Out4> history) {
    GdnCall c;
    c.T = int64_t(q.shape(0));
    c.Hv = int64_t(state.shape(0));
    c.K = int64_t(state.shape(1));
    c.V = int64_t(state.shape(2));
    c.W = int64_t(conv_q.shape(1));
    require(c.Hv > 0 && c.K > 0 && c.V > 0 && c.W > 0, "state must be [Hv, K, V] and conv_q [Hk K, W], none of them 0");
    require(c.W <= 64, "a convolution has at most 64 taps");
    require(int64_t(q.shape(1)) % c.K == 0 && q.shape(1) > 0, "q must be [T, Hk K] with the K of state");
    c.Hk = int64_t(q.shape(1)) / c.K;
    require(c.Hv % c.Hk == 0, "value heads must be a multiple of key heads");
    const int64_t keys = c.Hk * c.K, values = c.Hv * c.V;
    require_shape("k", k, c.T, keys);
    require_shape("v", v, c.T, values);
    require_shape("a", a, c.T, c.Hv);
    require_shape("b", b, c.T, c.Hv);
    require_shape("gate", gate, c.T, values);
    require_shape("conv_q", conv_q, keys, c.W);
    require_shape("conv_k", conv_k, keys, c.W);
    require_shape("conv_v", conv_v, values, c.W);
    require_length("ssm_a", ssm_a, c.Hv);
    require_length("dt_bias", dt_bias, c.Hv);
    require_length("norm", norm, c.V);
    require_shape("conv_state", conv_state, 2 * keys + values, c.W - 1);
    require_shape("out", out, c.T, values);
    c.history = nullptr;
    if (history) {
        require(int64_t(history->shape(0)) == c.T && int64_t(history->shape(1)) == c.Hv &&
                    int64_t(history->shape(2)) == c.K && int64_t(history->shape(3)) == c.V,
                "history must be [T, Hv, K, V]");
        c.history = history->data();
    }
    c.q = q.data(), c.k = k.data(), c.v = v.data(), c.a = a.data(), c.b = b.data(), c.gate = gate.data();
    c.conv_q = conv_q.data(), c.conv_k = conv_k.data(), c.conv_v = conv_v.data();
    c.ssm_a = ssm_a.data(), c.dt_bias = dt_bias.data(), c.norm = norm.data();
    c.conv_state = conv_state.data(), c.state = state.data(), c.out = out.data();
    c.eps = eps, c.negative = allow_neg_eigval, c.chunked = chunked;
    if (c.T == 0) return;

    nb::gil_scoped_release release;
    const MixerKernels& kernel = kernels().mixers;
    const size_t bytes = kernel.gdn_scratch(c);
    // Neighbouring heads stay together in a decode step, where one fetches the next one's state; else one by one.
    const int64_t small = 32768 / std::max<int64_t>(1, c.T * c.K * c.V * (c.Hv / c.Hk));
    int64_t heads = std::max<int64_t>(1, small);
    if (c.T == 1) heads = std::max<int64_t>(heads, c.Hk / (3 * threads()));
    parallel_for((c.Hk + heads - 1) / heads, [&](int64_t task, int thread) {
        kernel.gdn(c, task * heads, std::min(c.Hk, (task + 1) * heads), scratch(thread, bytes));
    });
}

int64_t row_bytes(int kv_type, int64_t d) {
    require(kv_type == 0 || kv_type == 1 || kv_type == 8, "kv_type must be 0 (F32), 1 (F16) or 8 (Q8_0)");
    return kv_type == 0 ? 4 * d : kv_type == 1 ? 2 * d : (d + 31) / 32 * 34;
}

void require_table(const Table& table, int64_t block, int64_t end) {
    require(table.shape(1) == 2, "table must be [blocks, 2]");
    require(block > 0, "block must be at least 1");
    require((end + block - 1) / block <= int64_t(table.shape(0)), "table has too few blocks for these tokens");
}

void store_kv(In2 x, Table table, int which, int64_t block, int kv_type, int64_t start, int64_t kv_heads,
              int64_t head_dim) {
    const int64_t rows = int64_t(x.shape(0));
    require(kv_heads > 0 && head_dim > 0 && start >= 0, "kv_heads and head_dim must be positive, start not negative");
    require_shape("x", x, rows, kv_heads * head_dim);
    require(which == 0 || which == 1, "which must be 0 (K) or 1 (V)");
    row_bytes(kv_type, head_dim);
    require_table(table, block, start + rows);
    const StoreCall c{x.data(), table.data(), which, block, start, kv_heads, head_dim, kv_type};
    const MixerKernels& k = kernels().mixers;
    over(rows, 2 * kv_heads * head_dim, [&](int64_t first, int64_t last) { k.store_kv(c, first, last); });
}

void attention(In2 q, Table table, int64_t block, int kv_type, int64_t start, int64_t kv_heads, int64_t head_dim,
               int64_t window, Out2 out) {
    AttentionCall c;
    require(kv_heads > 0 && head_dim > 0 && start >= 0 && window >= 0,
            "kv_heads and head_dim must be positive, start and window not negative");
    c.T = int64_t(q.shape(0));
    require(q.shape(1) > 0 && int64_t(q.shape(1)) % (kv_heads * head_dim) == 0,
            "q must be [T, H d] with H a multiple of kv_heads");
    require_shape("out", out, c.T, int64_t(q.shape(1)));
    row_bytes(kv_type, head_dim);
    require_table(table, block, start + c.T);
    c.q = q.data(), c.table = table.data(), c.out = out.data(), c.partial = nullptr;
    c.block = block, c.start = start, c.H = int64_t(q.shape(1)) / head_dim, c.Hkv = kv_heads, c.d = head_dim;
    c.window = window, c.kv_type = kv_type;
    if (c.T == 0) return;

    // Tiles of about 64 rows; where those are few and keys many, spans of keys as well: tasks enough for any machine,
    // and the same ones on every machine.
    const int64_t group = c.H / c.Hkv;
    c.tile = std::max<int64_t>(1, 64 / group);
    c.tiles = (c.T + c.tile - 1) / c.tile;
    c.first_key = window ? std::max<int64_t>(0, start - window + 1) / 64 * 64 : 0;
    const int64_t keys = start + c.T - c.first_key, tasks = c.Hkv * c.tiles;
    c.spans = 1;
    if (tasks < 64) c.spans = std::max<int64_t>(1, std::min((256 + tasks - 1) / tasks, keys / 256));
    c.span = ((keys + c.spans - 1) / c.spans + 63) / 64 * 64;
    c.spans = (keys + c.span - 1) / c.span;

    nb::gil_scoped_release release;
    const MixerKernels& k = kernels().mixers;
    const size_t bytes = k.attention_scratch(c);
    std::unique_ptr<float[]> partial;
    if (c.spans > 1) {
        partial.reset(new float[size_t(c.T * c.H * c.spans * (c.d + 2))]);
        c.partial = partial.get();
    }
    const auto task = [&](int64_t i, int thread) {  // the last tiles see most: they go first
        const int64_t span = i % c.spans, head = i / c.spans % c.Hkv, tile = c.tiles - 1 - i / c.spans / c.Hkv;
        k.attention(c, head, tile, span, scratch(thread, bytes));
    };
    const int64_t count = tasks * c.spans;
    if (c.T * c.H * keys * c.d < 65536) {
        parallel_for(1, [&](int64_t, int thread) {
            for (int64_t i = 0; i < count; i++) task(i, thread);
        });
    } else {
        parallel_for(count, task);
    }
    if (c.spans > 1) {
        const int64_t rows = c.T * c.H, part = std::max<int64_t>(1, 65536 / (c.spans * c.d));
        if (rows <= 2 * part) k.attention_merge(c, 0, rows);
        else
            parallel_for((rows + part - 1) / part, [&](int64_t i, int) {
                k.attention_merge(c, i * part, std::min(rows, (i + 1) * part));
            });
    }
}

void negate(Array<float, 1> x) {
    const MixerKernels& k = kernels().mixers;
    const int64_t n = int64_t(x.shape(0)), part = 16384;
    nb::gil_scoped_release release;
    parallel_for((n + part - 1) / part, [&](int64_t i, int) {
        k.negate(x.data() + i * part, std::min(part, n - i * part));
    });
}

void activations(In1 x, Array<float, 2> out) {
    const int64_t n = int64_t(x.shape(0));
    require_shape("out", out, 3, n);
    kernels().mixers.activations(x.data(), out.data(), out.data() + n, out.data() + 2 * n, n);
}

}  // namespace

void bind_mixers(nb::module_& m) {
    using nb::arg;
    m.def("rms_norm", rms_norm, arg("x").noconvert(), arg("weight").noconvert(), arg("eps"), arg("out").noconvert());
    m.def("swiglu", swiglu, arg("gate").noconvert(), arg("up").noconvert(), arg("out").noconvert());
    m.def("add", add, arg("x").noconvert(), arg("y").noconvert());
    m.def("rope", rope, arg("x").noconvert(), arg("positions").noconvert(), arg("inv_freq").noconvert(), arg("scale"));
    m.def("gdn", gdn, arg("q").noconvert(), arg("k").noconvert(), arg("v").noconvert(), arg("a").noconvert(),
          arg("b").noconvert(), arg("gate").noconvert(), arg("conv_q").noconvert(), arg("conv_k").noconvert(),
          arg("conv_v").noconvert(), arg("ssm_a").noconvert(), arg("dt_bias").noconvert(), arg("norm").noconvert(),
          arg("conv_state").noconvert(), arg("state").noconvert(), arg("eps"), arg("allow_neg_eigval"),
          arg("out").noconvert(), arg("chunked") = true, arg("history").noconvert() = nb::none());
    m.def("attention", attention, arg("q").noconvert(), arg("table").noconvert(), arg("block"), arg("kv_type"),
          arg("start"), arg("kv_heads"), arg("head_dim"), arg("window"), arg("out").noconvert());
    m.def("store_kv", store_kv, arg("x").noconvert(), arg("table").noconvert(), arg("which"), arg("block"),
          arg("kv_type"), arg("start"), arg("kv_heads"), arg("head_dim"));
    m.def("_negate", negate, arg("x").noconvert());
    m.def("_activations", activations, arg("x").noconvert(), arg("out").noconvert());
}
