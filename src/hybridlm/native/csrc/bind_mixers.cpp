#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_mixers(nb::module_&) {}
