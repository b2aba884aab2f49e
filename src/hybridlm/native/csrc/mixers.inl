// Kernels between the projections, compiled once per instruction set.
namespace mixers {

#include "simd.h"

#include "gemm.inl"
#include "kv.inl"
#include "pointwise.inl"
#include "gdn.inl"
#include "attention.inl"

}  // namespace mixers

static const MixerKernels mixer_kernels = {
    mixers::rms_norm,          mixers::swiglu,    mixers::add_to,          mixers::rope,     mixers::gdn_scratch, mixers::gdn,
    mixers::attention_scratch, mixers::attention, mixers::attention_merge, mixers::store_kv, mixers::negate,
    mixers::activations,
};
