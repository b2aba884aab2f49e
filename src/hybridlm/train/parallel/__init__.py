"""What training asks of the processes it runs on.

Every rank computes the gradient of its own rows, tokens and heads; the sum over all ranks is the gradient. Summed by an
all-reduce where every rank holds all weights, and by FSDP2 where they are divided (docs/parallelism.md).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from hybridlm.model import HybridLM
from hybridlm.train.parallel.exchange import Group
from hybridlm.train.parallel.mesh import Layout
from hybridlm.train.parallel.split import Split, split_model

__all__ = ["Layout", "Parallel"]


class Parallel:
    """One rank's view of the processes that train together.

    Attributes: `rank` of `world`; `data_rank` of `data_world`, which decides the rows that it reads (ranks that share
    rows share it); `row_ranks`, how many ranks a row's tokens are split over.
    """

    def __init__(self, device: torch.device, rank: int, world: int, layout: Layout | None = None) -> None:
        self.device, self.rank, self.world = device, rank, world
        self.layout = (layout or Layout(0)).of(world)
        self.row_ranks = self.layout.context * self.layout.tensor
        self.data_rank, self.data_world = rank // self.row_ranks, world // self.row_ranks
        self.is_main = rank == 0
        self.split: Split | None = None
        if self.row_ranks > 1:
            rows = init_device_mesh(device.type, (self.data_world, self.row_ranks), mesh_dim_names=("data", "row"))
            both = init_device_mesh(device.type, (self.data_world, self.layout.context, self.layout.tensor),
                                    mesh_dim_names=("data", "context", "tensor"))
            self.split = Split(*(Group(mesh.get_group(name), mesh.get_local_rank(name), mesh.size(at))
                                 for mesh, name, at in ((rows, "row", 1), (both, "context", 1), (both, "tensor", 2))))

    @classmethod
    def start(cls, layout: Layout, device: torch.device, timeout: float = 60) -> Parallel:
        """Join the others, by torchrun's environment; with one process there is nothing to join.

        timeout: seconds after which a rank gives up waiting for another. Raises `ConfigError` when the layout does not
        fit the number of processes.
        """
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        layout = layout.of(world)
        if device.type == "cuda" and device.index is None and world > 1:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        if world > 1:
            backend = "gloo" if device.type == "cpu" else "nccl"
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        return cls(device, rank, world, layout)

    def apply(self, model: HybridLM, *, compute_dtype: torch.dtype | None, recompute: float, compile: bool) -> None:
        """Change a model, of the same weights on every rank, in place: split rows, recompute, compile, divide weights.

        recompute: the share of the layers, 0 to 1, whose activations are computed again in the backward pass.
        """
        layers = list(model.model.layers)
        if self.split:
            split_model(model, self.split)
        for layer in layers[:math.ceil(recompute * len(layers))]:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        model.compute_dtype = compute_dtype
        if compile:
            model.compile_blocks(fullgraph=self.split is None and not self.layout.sharded)
        if self.layout.sharded:
            shape, names = (self.layout.replicate, self.world // self.layout.replicate), ("replicate", "shard")
            mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
            if self.layout.replicate == 1:
                mesh = mesh["shard"]
            for layer in layers:
                fully_shard(layer, mesh=mesh)
            # The table and the head stay whole from the forward pass to the backward: the loss uses the head between.
            fully_shard(model, mesh=mesh, reshard_after_forward=False)
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.set_gradient_divide_factor(1.0)  # sums, not means,
                    module.set_force_sum_reduction_for_comms(True)  # by the one operation that gloo has too
            register_fsdp_forward_method(model, "hidden")

    def settle(self, model: nn.Module) -> None:
        """After forward passes without a backward pass: divide again the weights that were left whole."""
        if isinstance(model, FSDPModule):
            model.reshard()

    def mine(self, x: Tensor) -> Tensor:
        """This rank's tokens [B, t] of whole rows [B, T]: those that `model.hidden` returns."""
        return self.split.mine(x) if self.split else x

    @contextmanager
    def accumulate(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Around the forward and backward pass of a microbatch; after the `last` one gradients are sums over ranks."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
            model.set_is_last_backward(last)
            yield
            return
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
        """The sum over all ranks."""
        if self.world > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def sum_rows(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks that read different rows, of what ranks of one row know alike; whole numbers."""
        return self.sum(tensor) / self.row_ranks

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
        """Scale gradients to a norm of at most `limit` (0: no limit); their norm before, that of the whole model."""
        norm = nn.utils.clip_grad_norm_(parameters, limit or math.inf)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def agree(self, flag: bool) -> bool:
        """Whether any rank says so."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item()) if self.world > 1 else flag

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def stop(self) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()
