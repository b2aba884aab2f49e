#include <immintrin.h>
#define HYBRIDLM_ISA avx512
#define HYBRIDLM_AVX512 1
#include "isa.inl"
