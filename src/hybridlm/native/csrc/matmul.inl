// Matrix kernels, written over the vectors of lanes.h and compiled once per instruction set.
static const MatmulKernels matmul_kernels = {0};
