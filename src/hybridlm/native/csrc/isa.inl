// Every kernel for one instruction set; the isa_*.cpp that includes this names it in HYBRIDLM_ISA.
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

#include "dispatch.h"

namespace hybridlm::HYBRIDLM_ISA {

#include "matmul.inl"
#include "mixers.inl"

#define HYBRIDLM_NAME_(x) #x
#define HYBRIDLM_NAME(x) HYBRIDLM_NAME_(x)
extern const Kernels table;
const Kernels table = {HYBRIDLM_NAME(HYBRIDLM_ISA), matmul_kernels, mixer_kernels};

}  // namespace hybridlm::HYBRIDLM_ISA
