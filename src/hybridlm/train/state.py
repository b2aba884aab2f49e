"""The tensors that a run is made of, under names that neither wrappers nor the number of ranks change.

`model.NAME` for weights and buffers, `optimizer.NAME.KEY` for what an optimiser keeps of a parameter. A sharded tensor
is a DTensor; a plain one is the same on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

__all__ = ["local", "model_tensors", "optimizer_tensors", "optimizers", "parameters", "pin", "room_for", "share"]

WRAPPERS = ("module.", "_orig_mod.", "_checkpoint_wrapped_module.")


def parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters under their own names."""
    for name, parameter in model.named_parameters():
        yield _plain(name), parameter


def _plain(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {f"model.{_plain(n)}": t for n, t in model.state_dict().items()}


def optimizers(optimizer: Optimizer | Sequence[Optimizer]) -> Sequence[Optimizer]:
    return [optimizer] if isinstance(optimizer, Optimizer) else optimizer


def optimizer_tensors(model: nn.Module, optimizer: Optimizer | Sequence[Optimizer]) -> dict[str, Tensor]:
    return {f"optimizer.{name}.{key}": value for one in optimizers(optimizer) for name, parameter in parameters(model)
            for key, value in one.state.get(parameter, {}).items() if isinstance(value, Tensor)}


def room_for(optimizer: Optimizer, model: nn.Module, stored: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Room for the optimiser's state of each of its parameters, laid out like the parameter where it has its shape."""
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    state: dict[str, dict[str, Tensor]] = {}
    for name, parameter in parameters(model):
        prefix = f"optimizer.{name}."
        for key in (k for k in stored if id(parameter) in own and k.startswith(prefix)):
            entry = stored[key]
            like = entry.size == parameter.shape and entry.size
            room = torch.zeros_like(parameter, dtype=entry.properties.dtype, requires_grad=False) if like else \
                torch.zeros(entry.size, dtype=entry.properties.dtype)
            state.setdefault(name, {})[key.removeprefix(prefix)] = room
    return state


def share(tensors: dict[str, Tensor], rank: int, world: int) -> dict[str, Tensor]:
    """What a rank writes: its pieces of sharded tensors, and its part of those that all ranks hold, about equal."""
    own: dict[str, Tensor] = {}
    load = [0] * world
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].numel(), item[0])):
        if isinstance(tensor, DTensor):
            own[name] = tensor
            continue
        least = load.index(min(load))
        load[least] += tensor.numel() * tensor.element_size()
        if least == rank:
            own[name] = tensor
    return own


def local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def pin(tensor: Tensor) -> None:
    """Let the GPU write into host memory directly; without it copies are only slower."""
    with suppress(RuntimeError):
        torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.numel() * tensor.element_size(), 0)
