// What an instruction set provides for matrices.
#pragma once

namespace hybridlm {

struct MatmulKernels {
    int unused;
};

}  // namespace hybridlm
