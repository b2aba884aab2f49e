"""`CudaState`: everything a model remembers of the tokens it has read, in the memory of a GPU.

The counterpart of `state.State`, built the same way: the fixed part (a float32 matrix per head, the convolutions' past,
the last hidden row) in one allocation that every token rewrites, keys and values in pages of PAGE tokens, written once.
A page is a tensor of its own; states share full pages by sharing tensors, and PyTorch's allocator takes one back
with its last owner. Kernels find everything by address, so nothing has to lie in a pool of fixed size, and nothing
moves when a sequence grows: its table of page addresses, on the device, gets one entry more.

As bytes a state is what `State` writes: convolutions and hidden row in float32, the past in the order of time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybridlm.engine.layout import PAGE, Layout, product
from hybridlm.engine.state import State

__all__ = ["KV_DTYPES", "CudaPages", "CudaState", "CudaTrial"]

KV_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class CudaPages:
    """Keys and values of one group of attention layers."""

    __slots__ = ("device", "group", "layout", "pages", "table")

    def __init__(self, layout: Layout, group: int, device: torch.device) -> None:
        self.layout, self.group, self.device = layout, group, device
        self.pages: list[Tensor | None] = []  # [layers, K or V, Hkv, PAGE, d]; None before the window's first page
        self.table = torch.zeros(16, dtype=torch.int64, device=device)  # their addresses; of dropped ones stale

    def reserve(self, position: int, tokens: int) -> None:
        """Pages for `tokens` in all; lets go of those that no token from `position` on can see."""
        layers, _, heads, _, _ = self.layout.page_shape(self.group)
        shape = (layers, 2, heads, PAGE, self.layout.kv[1])
        dtype = KV_DTYPES[self.layout.kv_type]
        # Zeroed: weights of 0 meet the unused rows, and 0 times NaN would be NaN.
        self.adopt([torch.zeros(shape, dtype=dtype, device=self.device)
                    for _ in range(-(-tokens // PAGE) - len(self.pages))])
        first = self.layout.first_page(self.group, position)
        if first and self.pages[first - 1] is not None:
            self.pages[:first] = [None] * first

    def adopt(self, pages: Sequence[Tensor | None]) -> None:
        """Become the owner, with others, of these pages, from the next on."""
        if not pages:
            return
        count, total = len(self.pages), len(self.pages) + len(pages)
        if total > len(self.table):
            table = torch.zeros(max(2 * len(self.table), total), dtype=torch.int64, device=self.device)
            table[:count] = self.table[:count]
            self.table = table
        self.pages.extend(pages)
        self.table[count:total] = torch.tensor([0 if p is None else p.data_ptr() for p in pages], dtype=torch.int64)

    def clone(self, position: int) -> CudaPages:
        """The same up to `position`: full pages shared, the last one copied if it is in use."""
        copy = CudaPages(self.layout, self.group, self.device)
        first = self.layout.first_page(self.group, position)
        copy.adopt([None] * first + self.pages[first:position // PAGE])
        if used := position % PAGE:
            last = self.pages[position // PAGE]
            assert last is not None
            page = torch.zeros_like(last)
            page[..., :used, :] = last[..., :used, :]
            copy.adopt([page])
        return copy


class CudaState(State):
    """Memory of one sequence on a device. `fixed` holds `recurrent` [layers, Hv, K, V] float32, `conv` [layers, W,
    channels] (the input of position p at p mod W) and `hidden` [D], the last two in the type of activations."""

    __slots__ = ("device", "dtype", "fixed")

    def __init__(self, layout: Layout, device: torch.device, dtype: torch.dtype) -> None:
        """The state before the first token."""
        self.layout, self.device, self.dtype = layout, device, dtype
        self.tokens: list[int] = []
        self.valid = True
        self.trial: Any = None
        self._arrange(torch.zeros(_sizes(layout, dtype)[-1], dtype=torch.uint8, device=device))
        self.groups: Any = tuple(CudaPages(layout, g, device) for g in range(len(layout.windows)))

    def _arrange(self, fixed: Tensor) -> None:
        layers, (channels, past) = self.layout.layers.count(-1), self.layout.conv
        a, b, _ = _sizes(self.layout, self.dtype)
        self.fixed: Tensor = fixed
        shape, taps = (layers, *self.layout.recurrent), (layers, past + 1, channels)
        self.recurrent: Any = fixed[:a].view(torch.float32)[:product(shape)].view(shape)
        self.conv: Any = fixed[a:b].view(self.dtype)[:product(taps)].view(taps)
        self.hidden: Any = fixed[b:].view(self.dtype)[:self.layout.hidden]

    @property
    def own_nbytes(self) -> int:
        """Bytes that only this state holds, on the device: all but full pages."""
        used = self.position % PAGE > 0
        return self.fixed.nbytes + (sum(self.layout.page_bytes(g) for g in range(len(self.groups))) if used else 0)

    def clone(self) -> CudaState:
        """An independent copy, sharing the full pages. So what this state has read cannot be taken back any more."""
        copy = CudaState.__new__(CudaState)
        copy.layout, copy.device, copy.dtype = self.layout, self.device, self.dtype
        copy.tokens, copy.valid, copy.trial = self.tokens.copy(), self.valid, None
        copy._arrange(self.fixed.clone())
        copy.groups = tuple(group.clone(self.position) for group in self.groups)
        if self.trial is not None:
            self.trial.position = -1
        return copy

    def reset(self) -> None:
        """Back to before the first token, keeping the memory of the fixed part."""
        self.tokens, self.valid = [], True
        self.fixed.zero_()
        self.groups = tuple(CudaPages(self.layout, g, self.device) for g in range(len(self.layout.windows)))

    def new_trial(self) -> CudaTrial:
        return CudaTrial(self)

    # -- bytes ---------------------------------------------------------------------------------------------------

    def own_parts(self) -> list[Any]:
        """Buffers of all but the full pages, as `State` writes them."""
        past = self.layout.conv[1]
        places = [(self.position - past + i) % (past + 1) for i in range(past)]
        conv = self.conv[:, places].transpose(1, 2).float()  # oldest first, as nothing but zeros precedes the first
        used = self.position % PAGE
        parts = [self.recurrent, conv, self.hidden.float()]
        parts += [group.pages[self.position // PAGE][..., :used, :] for group in self.groups if used]
        return [_bytes(x) for x in parts]

    def block_bytes(self, block: Any) -> Any:
        return _bytes(block)

    def rebuilt(self, tokens: list[int], own: Any, blocks: Sequence[Any]) -> CudaState:
        """As `State.rebuilt`; blocks are pages on the device, or bytes that become such."""
        layout, data = self.layout, np.frombuffer(own, np.uint8)
        if (data.nbytes != layout.own_bytes(len(tokens))
                or [b.nbytes for b in blocks] != [layout.page_bytes(g) for g in layout.full_pages(len(tokens))]):
            raise ValueError("state: parts of the wrong size")
        state, offset = CudaState(layout, self.device, self.dtype), 0
        state.tokens = list(tokens)

        def take(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            nonlocal offset
            size = product(shape) * dtype.itemsize
            part = torch.from_numpy(data[offset:offset + size].copy()).view(dtype).view(shape)
            offset += size
            return part

        (channels, past), position = layout.conv, len(tokens)
        state.recurrent.copy_(take(tuple(state.recurrent.shape), torch.float32))
        conv = take((len(state.conv), channels, past), torch.float32).transpose(1, 2)
        for i in range(past):
            state.conv[:, (position - past + i) % (past + 1)] = conv[:, i].to(self.device)
        state.hidden.copy_(take((layout.hidden,), torch.float32))
        full, used, taken = position // PAGE, position % PAGE, 0
        for g, group in enumerate(state.groups):
            first = layout.first_page(g, position)
            found = blocks[taken:taken + full - first]
            group.adopt([None] * first + [b if isinstance(b, Tensor) else self.block_of(b) for b in found])
            taken += full - first
        for group in state.groups:
            if used:
                group.reserve(position, position)
                part = group.pages[full][..., :used, :]
                part.copy_(take(tuple(part.shape), part.dtype))
        return state

    def block_of(self, data: Any) -> Tensor:
        """A page from its bytes, on the device. Groups differ in their layers alone, so the size tells which it is."""
        dtype = KV_DTYPES[self.layout.kv_type]
        flat = torch.from_numpy(np.frombuffer(data, np.uint8).copy()).view(dtype)
        return flat.view(-1, 2, self.layout.kv[0], PAGE, self.layout.kv[1]).to(self.device)


class CudaTrial:
    """What a pass leaves behind so that its last tokens can be taken back; see `state.Trial`."""

    __slots__ = ("addresses", "fixed", "hidden", "position", "rows")

    def __init__(self, state: CudaState) -> None:
        self.fixed = torch.empty_like(state.fixed)
        self.addresses: Any = None  # of the state's recurrent states and convolutions, on the device
        self.position = -1  # before the pass; -1: none to take back
        self.hidden: Any = None  # the row before the pass and the pass's final rows
        self.rows: dict[int, tuple[Tensor, ...]] = {}  # per Gated DeltaNet layer: q, k, v, a, b

    def begin(self, state: CudaState) -> None:
        """Before a pass: all matrices as they are."""
        self.fixed.copy_(state.fixed)
        self.addresses = torch.tensor([state.recurrent.data_ptr(), state.conv.data_ptr()], device=state.device)

    def keep(self, slot: int, *rows: Tensor) -> None:
        self.rows[slot] = tuple(row.clone() for row in rows)

    def go_back(self, state: CudaState) -> None:
        """Give the state its memory from before the pass (and take the other, for the next trial)."""
        fixed, self.fixed = self.fixed, state.fixed
        state._arrange(fixed)
        del state.tokens[self.position:]
        self.position = -1


def _sizes(layout: Layout, dtype: torch.dtype) -> tuple[int, int, int]:
    """Where, in bytes, the recurrent states end, the convolutions' past ends, and all ends; multiples of 256."""
    layers, (channels, past) = layout.layers.count(-1), layout.conv
    heads, keys, values = layout.recurrent
    ends, total = [], 0
    for size in (4 * layers * heads * keys * values, dtype.itemsize * layers * (past + 1) * channels,
                 dtype.itemsize * layout.hidden):
        total += -(-size // 256) * 256
        ends.append(total)
    return ends[0], ends[1], ends[2]


def _bytes(x: Tensor) -> np.ndarray:
    """The numbers of a tensor, in order, as bytes in main memory."""
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
