"""What ranks say to each other inside a layer, with the gradients that go back the other way.

Every rank of a group must make the same calls in the same order, forward and backward, so results that a rank has no
use for are multiplied by zero and not left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Group", "gather", "shares", "to_heads", "to_tokens"]


@dataclass(frozen=True)
class Group:
    """Ranks that work on the same rows; `rank` is this one's place among them."""

    group: dist.ProcessGroup | None
    rank: int
    size: int


def shares(count: int, size: int) -> list[tuple[int, int]]:
    """`count` heads over `size` ranks as [first, end) each, as even as can be: 30 over 4 is 8, 8, 7, 7."""
    each, more = divmod(count, size)
    ends = [each * (r + 1) + min(r + 1, more) for r in range(size)]
    return list(zip([0, *ends[:-1]], ends, strict=True))


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flat: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        out = flat.new_empty(sum(receive))
        dist.all_to_all_single(out, flat.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        out = grad.new_empty(sum(ctx.send))
        dist.all_to_all_single(out, grad.contiguous(), ctx.send, ctx.receive, group=ctx.group)
        return out, None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        out = x.new_empty(group.size, *x.shape)
        dist.all_gather(list(out.unbind()), x.contiguous(), group=group.group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group.group)
        return grad[ctx.group.rank], None


def gather(x: Tensor, group: Group) -> Tensor:
    """Every rank's x: [size, *x.shape]."""
    if group.size == 1:
        return x[None]
    gathered: Tensor = _Gather.apply(x, group)
    return gathered


def to_heads(parts: list[Tensor], ranges: list[list[tuple[int, int]]], group: Group) -> list[Tensor]:
    """From all heads of this rank's tokens to this rank's heads of all tokens, for several tensors in one message.

    parts: [B, t, H_i, d_i] of one dtype; ranges: for each of them the heads that each rank gets, which may overlap.
    Returns [B, size * t, mine, d_i].
    """
    if group.size == 1:
        return parts
    batch, time = parts[0].shape[:2]
    pieces = [torch.cat([x[:, :, slice(*r[rank])].flatten(2) for x, r in zip(parts, ranges, strict=True)], -1)
              for rank in range(group.size)]
    widths = [(r[group.rank][1] - r[group.rank][0]) * x.shape[3] for x, r in zip(parts, ranges, strict=True)]
    flat: Tensor = _AllToAll.apply(torch.cat([p.flatten() for p in pieces]), [p.numel() for p in pieces],
                                   [batch * time * sum(widths)] * group.size, group.group)
    # [rank, B, t, channels] -> [B, rank * t, channels]
    whole = flat.view(group.size, batch, time, sum(widths)).transpose(0, 1).flatten(1, 2)
    return [y.unflatten(-1, (-1, x.shape[3])) for y, x in zip(whole.split(widths, -1), parts, strict=True)]


def to_tokens(x: Tensor, ranges: list[tuple[int, int]], group: Group) -> Tensor:
    """The way back: this rank's heads of all tokens [B, size * t, mine, d] to all heads of its tokens [B, t, H, d]."""
    if group.size == 1:
        return x
    batch, time, _, width = x.shape
    time //= group.size
    counts = [batch * time * (end - first) * width for first, end in ranges]
    send = x.unflatten(1, (group.size, time)).transpose(0, 1)
    flat: Tensor = _AllToAll.apply(send.flatten(), [send[0].numel()] * group.size, counts, group.group)
    return torch.cat([p.view(batch, time, -1, width) for p in flat.split(counts)], 2)
