"""The chunked gated delta rule in CUDA C++ for Hopper GPUs, compiled at run time. Nothing here is imported on a CPU."""
