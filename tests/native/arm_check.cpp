// NEON against the scalar kernels, on an Arm machine or an emulated one: test_arm.py builds and runs this.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "dispatch.h"

using namespace hybridlm;

namespace {

std::mt19937 dice(1);

struct Rounded {
    std::vector<std::vector<int8_t>> x;
    std::vector<std::vector<float>> scale, sum;
    std::vector<std::vector<int32_t>> start;
    std::vector<Tile> tiles;
};

std::vector<float> product(const MatmulKernels& k, int type, const std::vector<uint8_t>& w, int64_t rows, int64_t cols,
                           const std::vector<float>& x, int64_t t, bool exact) {
    std::vector<float> out(static_cast<size_t>(t * rows), NAN);
    if (exact || is_float(type)) {
        std::vector<uint8_t> scratch(float_scratch(cols));
        k.floats(type, w.data(), cols, 0, rows, x.data(), t, out.data(), rows, scratch.data());
        return out;
    }
    const int64_t blocks = (cols + 255) / 256 * 8;
    Rounded r;
    for (int64_t at = 0; at < t;) {
        const int width = static_cast<int>(t - at >= k.wide ? k.wide : t - at > 8 ? 8 : t - at);
        const size_t n = static_cast<size_t>(width * blocks);
        Tile tile{};
        tile.width = width;
        r.x.emplace_back(32 * n), r.scale.emplace_back(n), r.sum.emplace_back(n);
        tile.x = r.x.back().data(), tile.scale = r.scale.back().data(), tile.sum = r.sum.back().data();
        for (auto& start : tile.start) r.start.emplace_back(2 * n), start = r.start.back().data();
        k.activations(x.data() + at * cols, cols, tile, 15);
        r.tiles.push_back(tile);
        at += width;
    }
    std::vector<uint8_t> scratch(k.scratch_bytes(cols) + 64);
    k.quantised(type, w.data(), rows, cols, 0, (rows + k.lanes - 1) / k.lanes, r.tiles.data(),
                static_cast<int>(r.tiles.size()), out.data(), rows, scratch.data());
    return out;
}

}  // namespace

int main() {
    const MatmulKernels &a = scalar::table.matmul, &b = neon::table.matmul;
    std::normal_distribution<float> normal;
    int failures = 0, checks = 0;
    for (int type : {0, 1, 30, 8, 2, 6, 20, 12, 13, 14}) {
        TypeInfo info{};
        type_info(type, info);
        for (int64_t rows : {1, 8, 21}) {
            for (int64_t cols : {256, 768}) {
                for (int64_t t : {1, 2, 3, 5, 8, 9, 20}) {
                    std::vector<float> w(static_cast<size_t>(rows * cols)), x(static_cast<size_t>(t * cols));
                    for (auto& v : w) v = normal(dice);
                    for (auto& v : x) v = normal(dice);
                    const size_t bytes = static_cast<size_t>(cols / info.block * info.bytes);
                    std::vector<uint8_t> ra(bytes * static_cast<size_t>(rows)), rb(ra);
                    for (int64_t r = 0; r < rows; ++r) {
                        a.encode(type, &w[static_cast<size_t>(r * cols)], cols, nullptr, &ra[static_cast<size_t>(r) * bytes]);
                        b.encode(type, &w[static_cast<size_t>(r * cols)], cols, nullptr, &rb[static_cast<size_t>(r) * bytes]);
                    }
                    if (ra != rb) ++failures, std::printf("type %d: encoders differ\n", type);
                    std::vector<float> da(w), db(w);
                    a.decode(type, ra.data(), da.data(), rows * cols);
                    b.decode(type, ra.data(), db.data(), rows * cols);
                    if (da != db) ++failures, std::printf("type %d: decoders differ\n", type);
                    for (bool exact : {false, true}) {
                        const auto pa = product(a, type, ra, rows, cols, x, t, exact);
                        const auto pb = product(b, type, ra, rows, cols, x, t, exact);
                        double worst = 0;
                        for (size_t i = 0; i < pa.size(); ++i) worst = std::fmax(worst, std::fabs(pa[i] - pb[i]));
                        ++checks;
                        if (!(worst <= 1e-5 * std::sqrt(static_cast<double>(cols)))) {
                            ++failures;
                            std::printf("type %d, %d x %d, %d rows of x, exact %d: differs by %g\n", type, int(rows),
                                        int(cols), int(t), exact, worst);
                        }
                    }
                }
            }
        }
    }
    std::printf("%d checks, %d failures\n", checks, failures);
    return failures != 0;
}
