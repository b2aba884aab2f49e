// One table of function pointers per instruction set, and which of them is in use.
//
// Kernels work on ranges that the common code hands them and never start threads; the common code (bind_*.cpp) checks
// shapes and splits the work. Code inside an isa_*.cpp must not instantiate inline functions of the standard library:
// the linker keeps one copy of such a function, perhaps the one compiled for a processor that this machine is not.
#pragma once

#include "matmul_kernels.h"
#include "mixer_kernels.h"

namespace hybridlm {

struct Kernels {
    const char* name;
    MatmulKernels matmul;
    MixerKernels mixers;
};

namespace scalar { extern const Kernels table; }
namespace avx2 { extern const Kernels table; }
namespace avx512 { extern const Kernels table; }
namespace neon { extern const Kernels table; }
namespace amx { extern const TileKernels tiles; }  // besides everything of avx512

// The one in use. A call reads it once, so that a change meanwhile cannot mix two.
const Kernels& kernels();

// Those that this build holds and this machine runs, worst first; the count, and the tables into `out` (of 8).
int available(const Kernels** out);
bool choose(const char* name);

}  // namespace hybridlm
