"""The operations as Triton kernels for NVIDIA GPUs. Nothing here is imported until a CUDA tensor asks for it."""
