"""One process: what training asks of its surroundings, with nothing to share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Layout:
    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    context: int = 1


class Parallel:
    rank = data_rank = 0
    world = data_world = 1
    is_main = True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @classmethod
    def start(cls, layout: Layout, device: torch.device, timeout: float = 60) -> Parallel:
        return cls(device)

    def apply(self, model: Any, *, compute_dtype: torch.dtype | None, recompute: float, compile: bool) -> None:
        if recompute:
            for layer in model.model.layers:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        model.compute_dtype = compute_dtype
        if compile:
            model.compile_blocks()

    @contextmanager
    def accumulate(self, model: nn.Module, last: bool) -> Iterator[None]:
        yield

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, limit or math.inf)

    def agree(self, flag: bool) -> bool:
        return flag

    def barrier(self) -> None: ...

    def stop(self) -> None: ...
