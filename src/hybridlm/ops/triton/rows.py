"""What the kernels over rows share: how a tensor is seen as rows, and how many programs reduce over them."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["as_rows", "partials"]


def as_rows(x: Tensor) -> Tensor:
    """x [..., D] as [N, D] with neighbouring columns, without a copy wherever that can be."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x.reshape(-1, x.shape[-1])


def partials(device: torch.device, elements: int) -> int:
    """Programs that reduce over rows, a tile of `elements` at a time, each into a partial sum of its own.

    As many as a GPU holds at once; the same on every run, so the sums are too.
    """
    return _processors(device) * max(1, 8192 // elements) if device.type == "cuda" else 3


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
