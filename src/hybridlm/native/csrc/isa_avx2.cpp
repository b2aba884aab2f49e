#include <immintrin.h>
#define HYBRIDLM_ISA avx2
#define HYBRIDLM_AVX2 1
#include "isa.inl"
