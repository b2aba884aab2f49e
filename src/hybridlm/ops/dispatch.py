"""Where an operation runs: the Triton kernels for CUDA tensors where Triton is installed, else PyTorch."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

__all__ = ["on_triton"]

HAVE_TRITON = importlib.util.find_spec("triton") is not None


def on_triton(x: Tensor) -> bool:
    """Whether the kernels take x; they compute in float32, so float64 stays with PyTorch."""
    return HAVE_TRITON and x.is_cuda and x.dtype != torch.float64
