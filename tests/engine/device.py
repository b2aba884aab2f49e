"""Engines of the GPU's code on PyTorch's CPU tensors, in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tests.engine.helpers import random_tensors, small_config

from hybridlm.config import HybridConfig
from hybridlm.engine.cuda import CUDA
from hybridlm.engine.cuda_weights import DeviceLoader
from hybridlm.engine.engine import Engine
from hybridlm.engine.layout import Layout
from hybridlm.engine.weights import bind


def device_engine(config: HybridConfig | None = None, seed: int = 0, *, tensors: dict[str, np.ndarray] | None = None,
                  kv_type: str = "f32", kernels: bool = False, slab: int | None = None, **options: Any) -> Engine:
    """With `kernels`, Triton's (in its interpreter, here), otherwise PyTorch's forms."""
    config = config or small_config()
    tensors = tensors or random_tensors(config, np.random.default_rng(seed))
    place = torch.device("cpu")
    layout = Layout.of(config, f"seed {seed}", kv_type)
    loader = DeviceLoader(config, lambda name, shape, matrix: torch.from_numpy(tensors[name]), place, torch.float32)
    ops = CUDA(config, layout, place, torch.float32, kernels=kernels)
    if slab:
        ops.slab = slab
    return Engine(bind(config, loader), ops, layout, **options)
