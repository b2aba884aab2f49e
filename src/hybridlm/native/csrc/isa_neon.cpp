#include <arm_neon.h>
#define HYBRIDLM_ISA neon
#define HYBRIDLM_NEON 1
#include "isa.inl"
