// Matrices for Python: checks what comes in, quantises the activations once for all matrices that share them, and deals
// panels of rows out to the threads.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "dispatch.h"
#include "pool.h"

namespace nb = nanobind;
using namespace hybridlm;

namespace {

template <class T, int N> using Array = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;

[[noreturn]] void refuse(const std::string& text) { throw nb::value_error(text.c_str()); }

TypeInfo info_of(int type) {
    TypeInfo info{};
    if (!type_info(type, info)) refuse("no kernels for ggml type " + std::to_string(type));
    return info;
}

int64_t row_bytes_of(int type, int64_t cols) {
    TypeInfo info = info_of(type);
    if (cols < 1 || cols > (int64_t(1) << 31) || cols % info.block)
        refuse("a row of " + std::to_string(cols) + " is not a whole number of blocks of " +
               std::to_string(info.block));
    return cols / info.block * info.bytes;
}

struct Matrix {
    nb::object owner;  // of the memory
    const uint8_t* data = nullptr;
    int type = 0;
    int64_t rows = 0, cols = 0, row_bytes = 0;

    Matrix(nb::object source, int type_, int64_t rows_, int64_t cols_) : type(type_), rows(rows_), cols(cols_) {
        row_bytes = row_bytes_of(type, cols);
        if (rows < 1 || rows > (int64_t(1) << 31)) refuse("a matrix of " + std::to_string(rows) + " rows");
        // A memoryview holds the memory for as long as it lives. The stable ABI knows no PyMemoryView_GET_BUFFER, so a
        // second look at the same memory says where it is.
        owner = nb::steal(PyMemoryView_FromObject(source.ptr()));
        Py_buffer view;
        if (!owner.is_valid() || PyObject_GetBuffer(owner.ptr(), &view, PyBUF_SIMPLE) != 0) {
            PyErr_Clear();
            refuse("data must be contiguous memory, such as a numpy array or a mapped file");
        }
        const int64_t length = view.len;
        data = static_cast<const uint8_t*>(view.buf);
        PyBuffer_Release(&view);
        if (length < rows * row_bytes)
            refuse("data holds " + std::to_string(length) + " bytes, the matrix needs " +
                   std::to_string(rows * row_bytes));
        if (is_float(type) && reinterpret_cast<uintptr_t>(data) % (type == F32 ? 4 : 2))
            refuse("float data must lie at a multiple of its size");
    }
};

// Memory of the calling thread that lives from call to call, for the 8-bit activations.
struct Arena {
    std::vector<uint8_t> bytes;
    size_t used = 0;
    void reset(size_t size) {
        if (bytes.size() < size + 64) bytes.resize(size + 64);
        used = 64 - reinterpret_cast<uintptr_t>(bytes.data()) % 64;
        if (bytes.capacity() > 4 * (size + 64) && bytes.capacity() > (64u << 20)) {
            bytes.resize(size + 64);
            bytes.shrink_to_fit();
            used = 64 - reinterpret_cast<uintptr_t>(bytes.data()) % 64;
        }
        used %= 64;
    }
    template <class T> T* take(int64_t count) {
        T* p = reinterpret_cast<T*>(bytes.data() + used);
        used += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
        return p;
    }
};

// A tile is full, or one of those that end the rows: what is left goes in pieces that kernels exist for.
std::vector<int> tile_widths(int64_t rows, int wide) {
    std::vector<int> widths;
    for (; rows >= wide; rows -= wide) widths.push_back(wide);
    const int most = std::min(wide, 8);
    for (; rows > 0; rows -= widths.back()) widths.push_back(static_cast<int>(std::min<int64_t>(rows, most)));
    return widths;
}

struct Job {
    const Matrix* matrix;
    float* out;
};

struct Part {
    const Job* job;
    int64_t first, last;  // rows or panels
};

void multiply_floats(const Kernels& k, const float* x, int64_t t, int64_t cols, const std::vector<Job>& jobs) {
    // Parts of about 128k weights, and enough of them for everybody.
    std::vector<Part> parts;
    const int64_t unit = float_rows(cols);
    int64_t total = 0;
    for (const Job& job : jobs) total += job.matrix->rows;
    const int64_t step = std::max<int64_t>(1, std::min(131072 / cols, total / (8 * threads())));
    for (const Job& job : jobs) {
        const int64_t size = (step + unit - 1) / unit * unit;
        const int64_t use = total < 4 * unit * threads() ? std::max<int64_t>(4, (step + 3) / 4 * 4) : size;
        for (int64_t r = 0; r < job.matrix->rows; r += use)
            parts.push_back({&job, r, std::min(job.matrix->rows, r + use)});
    }
    parallel_for(static_cast<int64_t>(parts.size()), [&](int64_t i, int thread) {
        const Part& part = parts[static_cast<size_t>(i)];
        const Matrix& m = *part.job->matrix;
        k.matmul.floats(m.type, m.data, cols, part.first, part.last, x, t, part.job->out, m.rows,
                        scratch(thread, float_scratch(cols)));
    });
}

// Panels of all matrices in a row, cut into parts that get smaller towards the end: long ones stream well, short ones let
// everybody finish together.
std::vector<Part> panel_parts(const std::vector<Job>& jobs, int lanes, int64_t most) {
    std::vector<Part> parts;
    auto panels_of = [&](const Job& job) { return (job.matrix->rows + lanes - 1) / lanes; };
    int64_t left = 0, size = 0;
    for (const Job& job : jobs) left += panels_of(job);
    int given = 0;
    for (const Job& job : jobs) {
        const int64_t n = panels_of(job);
        for (int64_t p = 0; p < n;) {
            if (given++ % threads() == 0) size = std::max<int64_t>(1, (left + 3 * threads() - 1) / (3 * threads()));
            const int64_t take = std::min(std::min(size, most), n - p);
            parts.push_back({&job, p, p + take});
            p += take, left -= take;
        }
    }
    return parts;
}

void multiply_quantised(const Kernels& k, const float* x, int64_t t, int64_t cols, const std::vector<Job>& jobs) {
    const int64_t blocks = (cols + 255) / 256 * 8;
    unsigned slots = 0;
    for (const Job& job : jobs) {
        int slot = bias_slot(job.matrix->type);
        if (slot >= 0) slots |= 1u << slot;
    }
    const std::vector<int> widths = tile_widths(t, k.matmul.wide);
    static thread_local Arena arena;
    arena.reset(static_cast<size_t>(t * blocks * (32 + 4 + 4 + 4 * 5)) + 64 * 8 * widths.size());
    std::vector<Tile> tiles;
    std::vector<int64_t> firsts;
    int64_t row = 0;
    for (int width : widths) {
        const int64_t n = width * blocks;
        Tile tile{};
        tile.width = width;
        tile.x = arena.take<int8_t>(32 * n);
        tile.scale = arena.take<float>(n);
        tile.sum = arena.take<float>(n);
        for (int slot = 0; slot < 4; ++slot) {
            if (slots >> slot & 1) tile.start[slot] = arena.take<int32_t>(slot == 2 ? 2 * n : n);
        }
        tiles.push_back(tile);
        firsts.push_back(row);
        row += width;
    }
    auto quantise = [&](int64_t i, int) {
        k.matmul.activations(x + firsts[static_cast<size_t>(i)] * cols, cols, tiles[static_cast<size_t>(i)], slots);
    };
    if (t * cols < 65536) {
        for (size_t i = 0; i < tiles.size(); ++i) quantise(static_cast<int64_t>(i), 0);
    } else {
        parallel_for(static_cast<int64_t>(tiles.size()), quantise);
    }

    const int64_t lanes = k.matmul.lanes;
    const std::vector<Part> parts = panel_parts(jobs, k.matmul.lanes, INT64_MAX);
    const size_t bytes = k.matmul.scratch_bytes(cols);
    parallel_for(static_cast<int64_t>(parts.size()), [&](int64_t i, int thread) {
        const Part& part = parts[static_cast<size_t>(i)];
        const Matrix& m = *part.job->matrix;
        // The others take the next parts, this thread most likely the one after those.
        const uint8_t* after = nullptr;
        if (const size_t j = static_cast<size_t>(i + threads()); j < parts.size()) {
            const Matrix& then = *parts[j].job->matrix;
            if (then.type == m.type && (parts[j].first + 1) * lanes <= then.rows)
                after = then.data + parts[j].first * lanes * then.row_bytes;
        }
        k.matmul.quantised(m.type, m.data, m.rows, cols, part.first, part.last, tiles.data(),
                           static_cast<int>(tiles.size()), after, part.job->out, m.rows, scratch(thread, bytes));
    });
}

void multiply_tiles(const Kernels& k, const float* x, int64_t t, int64_t cols, const std::vector<Job>& jobs) {
    const TileKernels& tiles = *k.matmul.tiles;
    constexpr int64_t most_rows = 512, most_panels = 32;  // what sums in the second cache allow
    static thread_local Arena arena;
    const std::vector<Part> parts = panel_parts(jobs, k.matmul.lanes, most_panels);
    for (int64_t row = 0; row < t; row += most_rows) {
        const int64_t n = std::min(most_rows, t - row);
        arena.reset(tiles.arranged_bytes(n, cols));
        uint16_t* arranged = arena.take<uint16_t>(static_cast<int64_t>(tiles.arranged_bytes(n, cols) / 2));
        parallel_for((n + 15) / 16,
                     [&](int64_t i, int) { tiles.arrange(x + row * cols, n, cols, i, arranged); });
        parallel_for(static_cast<int64_t>(parts.size()), [&](int64_t i, int thread) {
            const Part& part = parts[static_cast<size_t>(i)];
            const Matrix& m = *part.job->matrix;
            tiles.product(m.type, m.data, m.rows, cols, part.first, part.last, arranged, n,
                          part.job->out + row * m.rows, m.rows,
                          scratch(thread, tiles.scratch_bytes(n, part.last - part.first)));
        });
    }
}

void linear(const Array<const float, 2>& x, const std::vector<const Matrix*>& weights,
            const std::vector<Array<float, 2>>& outs, bool exact, bool prompt) {
    const int64_t t = static_cast<int64_t>(x.shape(0)), cols = static_cast<int64_t>(x.shape(1));
    if (weights.size() != outs.size())
        refuse(std::to_string(weights.size()) + " weights but " + std::to_string(outs.size()) + " outs");
    std::vector<Job> floats, quantised;
    for (size_t i = 0; i < weights.size(); ++i) {
        const Matrix& m = *weights[i];
        if (m.cols != cols)
            refuse("x has " + std::to_string(cols) + " columns, weight " + std::to_string(i) + " has " +
                   std::to_string(m.cols));
        if (static_cast<int64_t>(outs[i].shape(0)) != t || static_cast<int64_t>(outs[i].shape(1)) != m.rows)
            refuse("out " + std::to_string(i) + " must be [" + std::to_string(t) + ", " + std::to_string(m.rows) +
                   "], got [" + std::to_string(outs[i].shape(0)) + ", " + std::to_string(outs[i].shape(1)) + "]");
        (exact || is_float(m.type) ? floats : quantised).push_back({&m, outs[i].data()});
    }
    if (t == 0 || weights.empty()) return;
    nb::gil_scoped_release release;
    const Kernels& k = kernels();
    if (!floats.empty()) multiply_floats(k, x.data(), t, cols, floats);
    if (quantised.empty()) return;
    if (prompt && k.matmul.tiles) multiply_tiles(k, x.data(), t, cols, quantised);
    else multiply_quantised(k, x.data(), t, cols, quantised);
}

void embed(const Matrix& table, const Array<const int32_t, 1>& ids, const Array<float, 2>& out) {
    const size_t count = ids.shape(0);
    if (out.shape(0) != count || static_cast<int64_t>(out.shape(1)) != table.cols)
        refuse("out must be [" + std::to_string(count) + ", " + std::to_string(table.cols) + "]");
    for (size_t i = 0; i < count; ++i) {
        int32_t id = ids.data()[i];
        if (id < 0 || id >= table.rows)
            throw nb::index_error(
                ("id " + std::to_string(id) + " is outside the table's " + std::to_string(table.rows) + " rows")
                    .c_str());
    }
    nb::gil_scoped_release release;
    const Kernels& k = kernels();
    for (size_t i = 0; i < count; ++i)
        k.matmul.decode(table.type, table.data + ids.data()[i] * table.row_bytes, out.data() + i * out.shape(1),
                        table.cols);
}

void quantize(int type, const Array<const float, 2>& x, const Array<uint8_t, 2>& out,
              const std::optional<Array<const float, 1>>& importance) {
    const int64_t rows = static_cast<int64_t>(x.shape(0)), cols = static_cast<int64_t>(x.shape(1));
    const int64_t row_bytes = row_bytes_of(type, cols);
    if (static_cast<int64_t>(out.shape(0)) != rows || static_cast<int64_t>(out.shape(1)) != row_bytes)
        refuse("out must be [" + std::to_string(rows) + ", " + std::to_string(row_bytes) + "]");
    std::vector<float> weigh;
    if (importance) {
        if (static_cast<int64_t>(importance->shape(0)) != cols)
            refuse("importance must have " + std::to_string(cols) + " entries");
        double mean = 0;
        for (int64_t i = 0; i < cols; ++i) {
            float w = importance->data()[i];
            if (!std::isfinite(w) || w < 0) refuse("importance must be finite and not negative");
            mean += w / static_cast<double>(cols);
        }
        // Relative to the mean, with a floor: a column that no calibration text touched still keeps its weights.
        if (mean > 0)
            for (int64_t i = 0; i < cols; ++i) weigh.push_back(static_cast<float>(importance->data()[i] / mean + 1e-4));
    }
    nb::gil_scoped_release release;
    const Kernels& k = kernels();
    parallel_for(rows, [&](int64_t row, int) {
        k.matmul.encode(type, x.data() + row * cols, cols, weigh.empty() ? nullptr : weigh.data(),
                        out.data() + row * row_bytes);
    });
}

void dequantize(int type, const Array<const uint8_t, 2>& data, const Array<float, 2>& out) {
    const int64_t rows = static_cast<int64_t>(out.shape(0)), cols = static_cast<int64_t>(out.shape(1));
    const int64_t row_bytes = row_bytes_of(type, cols);
    if (static_cast<int64_t>(data.shape(0)) != rows || static_cast<int64_t>(data.shape(1)) != row_bytes)
        refuse("data must be [" + std::to_string(rows) + ", " + std::to_string(row_bytes) + "]");
    if (is_float(type) && reinterpret_cast<uintptr_t>(data.data()) % (type == F32 ? 4 : 2))
        refuse("float data must lie at a multiple of its size");
    nb::gil_scoped_release release;
    const Kernels& k = kernels();
    const int64_t step = std::max<int64_t>(1, 65536 / cols);
    parallel_for((rows + step - 1) / step, [&](int64_t part, int) {
        for (int64_t row = part * step; row < std::min(rows, (part + 1) * step); ++row)
            k.matmul.decode(type, data.data() + row * row_bytes, out.data() + row * cols, cols);
    });
}

double seconds_since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double read_bandwidth(const Array<const uint8_t, 1>& data, int repeats) {
    if (data.shape(0) < 1) refuse("nothing to read");
    nb::gil_scoped_release release;
    const Kernels& k = kernels();
    const int64_t size = static_cast<int64_t>(data.shape(0)), parts = threads();
    std::atomic<uint64_t> sink{0};
    double best = 0;
    for (int i = 0; i < std::max(1, repeats); ++i) {
        auto start = std::chrono::steady_clock::now();
        parallel_for(parts, [&](int64_t part, int) {
            const int64_t first = size * part / parts, last = size * (part + 1) / parts;
            sink ^= k.matmul.read(data.data() + first, static_cast<size_t>(last - first));
        });
        best = std::max(best, static_cast<double>(size) / seconds_since(start));
    }
    return best;
}

// Operations a second of a loop in registers, on all threads: the best of several tries.
double peak_of(double (*loop)(int64_t), int64_t turns, double seconds) {
    const int64_t parts = threads();
    double best = 0;
    const auto begin = std::chrono::steady_clock::now();
    do {
        std::atomic<int64_t> done{0};
        auto start = std::chrono::steady_clock::now();
        parallel_for(parts, [&](int64_t, int) {
            double operations = 0;
            for (int i = 0; i < 20; ++i) operations += loop(turns);
            done += static_cast<int64_t>(operations);
        });
        best = std::max(best, static_cast<double>(done.load()) / seconds_since(start));
    } while (seconds_since(begin) < seconds);
    return best;
}

double int8_peak(double seconds) {
    nb::gil_scoped_release release;
    return peak_of(kernels().matmul.peak, 20000, seconds);
}

double tile_peak(double seconds) {
    nb::gil_scoped_release release;
    const TileKernels* tiles = kernels().matmul.tiles;
    return tiles ? peak_of(tiles->peak, 5000, seconds) : 0;
}

}  // namespace

void bind_matmul(nb::module_& m) {
    nb::class_<Matrix>(m, "Matrix")
        .def(nb::init<nb::object, int, int64_t, int64_t>(), nb::arg("data"), nb::arg("type"), nb::arg("rows"),
             nb::arg("cols"))
        .def_ro("rows", &Matrix::rows)
        .def_ro("cols", &Matrix::cols)
        .def_ro("type", &Matrix::type)
        .def_prop_ro("nbytes", [](const Matrix& self) { return self.rows * self.row_bytes; });
    m.def("linear", linear, nb::arg("x").noconvert(), nb::arg("weights"), nb::arg("outs").noconvert(),
          nb::arg("exact") = false, nb::arg("prompt") = false);
    m.def("embed", embed, nb::arg("table"), nb::arg("ids").noconvert(), nb::arg("out").noconvert());
    m.def("quantize", quantize, nb::arg("type"), nb::arg("x").noconvert(), nb::arg("out").noconvert(),
          nb::arg("importance").noconvert().none() = nb::none());
    m.def("dequantize", dequantize, nb::arg("type"), nb::arg("data").noconvert(), nb::arg("out").noconvert());
    m.def("read_bandwidth", read_bandwidth, nb::arg("data").noconvert(), nb::arg("repeats") = 1);
    m.def("int8_peak", int8_peak, nb::arg("seconds") = 0.2);
    m.def("tile_peak", tile_peak, nb::arg("seconds") = 0.2);
}
