"""Weights of a `HybridLM` from and to a Hugging Face folder, one tensor in memory at a time.

Reading takes every naming that `hybridlm.formats` knows. Writing uses the released names, which both transformers and
vLLM read (transformers' own default, since its convolutions became one, is a naming that vLLM refuses).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hybridlm.config import HybridConfig
from hybridlm.formats.checkpoint import Checkpoint, save_checkpoint
from hybridlm.formats.names import specs

if TYPE_CHECKING:
    from hybridlm.model.language_model import HybridLM

__all__ = ["load", "save"]

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_GATES = (".A_log", ".dt_bias")  # a few numbers that decay rates hang on: never rounded on writing


def load(folder: str | Path, config: HybridConfig, dtype: torch.dtype | None,
         device: torch.device | str | None) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every weight; `dtype` None keeps each as it is stored."""
    checkpoint = Checkpoint.open(folder)
    checkpoint.check(config)
    for name, info in checkpoint.tensors.items():
        if info.dtype in _DTYPES:
            flat = torch.from_numpy(np.array(checkpoint.raw(name))).view(_DTYPES[info.dtype])
        else:
            flat = torch.from_numpy(np.array(checkpoint.array(name)))
        yield name, flat.reshape(info.shape).to(device=device, dtype=dtype)


def save(model: HybridLM, folder: str | Path, dtype: torch.dtype | None, max_shard_bytes: int) -> None:
    """Write config.json and the weights, in `dtype` (None: as they are) except for the gates' own parameters."""
    weights = model.state_dict()

    def entry(name: str) -> tuple[str, str, tuple[int, ...], Any]:
        to = weights[name].dtype if dtype is None or name.endswith(_GATES) else dtype

        def data() -> np.ndarray:
            flat = weights[name].detach().to(device="cpu", dtype=to).contiguous().flatten()
            return flat.view(torch.uint8).numpy()

        return name, _NAMES[to], tuple(weights[name].shape), data

    stored = dtype or model.head_weight.dtype
    extra = {key: value for key, value in model.config.extra.items() if key != "torch_dtype"}
    save_checkpoint(folder, [entry(spec.name) for spec in specs(model.config)], max_shard_bytes=max_shard_bytes)
    model.config.with_(extra={**extra, "dtype": str(stored).removeprefix("torch.")}).save_pretrained(folder)
