#define HYBRIDLM_ISA scalar
#define HYBRIDLM_SCALAR 1
#include "isa.inl"
