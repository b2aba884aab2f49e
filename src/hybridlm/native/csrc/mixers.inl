// Kernels between the projections, compiled once per instruction set.
static const MixerKernels mixer_kernels = {0};
