// What an instruction set provides besides matrices: norms, rotation, Gated DeltaNet, attention.
#pragma once

namespace hybridlm {

struct MixerKernels {
    int unused;
};

}  // namespace hybridlm
