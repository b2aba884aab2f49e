"""What training asks of the processes it runs on: replicas that add up their gradients."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Layout:
    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    context: int = 1


class Parallel:
    """Replicas: every rank holds the whole model and a part of the batch."""

    def __init__(self, device: torch.device, rank: int, world: int) -> None:
        self.device, self.rank, self.world = device, rank, world
        self.data_rank, self.data_world = rank, world
        self.is_main = rank == 0

    @classmethod
    def start(cls, layout: Layout, device: torch.device, timeout: float = 60) -> Parallel:
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if world > 1:
            backend = "gloo" if device.type == "cpu" else "nccl"
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        return cls(device, rank, world)

    def apply(self, model: Any, *, compute_dtype: torch.dtype | None, recompute: float, compile: bool) -> None:
        for i, layer in enumerate(model.model.layers):
            if int((i + 1) * recompute) > int(i * recompute):  # that share of the layers, evenly
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        model.compute_dtype = compute_dtype
        if compile:
            model.compile_blocks()

    @contextmanager
    def accumulate(self, model: nn.Module, last: bool) -> Iterator[None]:
        yield
        if not last or self.world == 1:
            return
        # One flat sum in the order of names: the same arithmetic in the first step of a process as in every other.
        grads = [p.grad for _, p in sorted(model.named_parameters()) if p.grad is not None]
        flat = torch.cat([g.view(-1) for g in grads])
        dist.all_reduce(flat)
        for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def sum(self, tensor: Tensor) -> Tensor:
        if self.world > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, limit or math.inf)

    def agree(self, flag: bool) -> bool:
        return bool(self.sum(torch.tensor(float(flag))).item()) if self.world > 1 else flag

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def stop(self) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()
