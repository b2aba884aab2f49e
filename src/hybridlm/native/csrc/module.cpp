// The Python module: what belongs to no kernel is bound here, the rest in bind_matmul.cpp and bind_mixers.cpp.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.h"
#include "pool.h"

namespace nb = nanobind;

void bind_matmul(nb::module_& m);
void bind_mixers(nb::module_& m);

namespace {

std::vector<std::string> names() {
    const hybridlm::Kernels* tables[8];
    int count = hybridlm::available(tables);
    std::vector<std::string> all;
    for (int i = 0; i < count; ++i) all.push_back(tables[i]->name);
    return all;
}

std::string refusal(const std::string& name) {
    std::string text = "this machine has no instruction set \"" + name + "\"; it has";
    for (const auto& each : names()) text += " " + each;
    return text;
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "The compiled kernels of hybridlm.";
    nb::set_leak_warnings(false);
    const char* wanted = std::getenv("HYBRIDLM_ISA");
    if (wanted && *wanted && !hybridlm::choose(wanted))
        throw std::runtime_error("HYBRIDLM_ISA: " + refusal(wanted));
    m.def("available", names);
    m.def("isa", [] { return std::string(hybridlm::kernels().name); });
    m.def("set_isa", [](const std::string& name) {
        if (!hybridlm::choose(name.c_str())) throw nb::value_error(refusal(name).c_str());
    });
    m.def("threads", hybridlm::threads);
    m.def("set_threads", [](int count) {
        if (count < 1) throw nb::value_error("threads must be at least 1");
        nb::gil_scoped_release release;
        hybridlm::set_threads(count);
    });
    bind_matmul(m);
    bind_mixers(m);
}
