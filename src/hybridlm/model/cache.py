"""What each layer remembers between calls of a model, for decoding token by token.

A Gated DeltaNet layer keeps its last convolution inputs and one matrix per head, an attention layer its keys and
values (with a window, only those still in sight). A cache is filled by the calls it is passed to; `copy` makes an
independent snapshot, the only way back. Meant for inference: call the model under `torch.no_grad()`.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridlm.config import LINEAR, HybridConfig

__all__ = ["Cache", "DeltaNetCache", "KVCache"]


@dataclass(slots=True)
class DeltaNetCache:
    conv: Tensor | None = None  # [B, W - 1, 2 Hk K + Hv V], the convolution's last inputs: q, k and v side by side
    state: Tensor | None = None  # [B, Hv, K, V], float32 at least

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.conv, self.state) if t is not None)

    def copy(self) -> DeltaNetCache:
        return copy(self)  # its tensors are replaced, never written to


@dataclass(slots=True)
class KVCache:
    window: int | None = None
    length: int = 0  # rows of k and v in use
    k: Tensor | None = None  # [B, capacity, Hkv, d]
    v: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, T, Hkv, d] of new tokens; returns all that these tokens may look at."""
        if self.window is not None:
            if self.k is not None and self.v is not None:
                k, v = torch.cat([self.k, k], 1), torch.cat([self.v, v], 1)
            seen = max(k.shape[1] - (self.window - 1), 0)
            self.k, self.v = k[:, seen:], v[:, seen:]
            self.length = self.k.shape[1]
            return k, v
        end = self.length + k.shape[1]
        self.k, self.v = self._room(self.k, k, end), self._room(self.v, v, end)
        self.k[:, self.length:end] = k
        self.v[:, self.length:end] = v
        self.length = end
        return self.k[:, :end], self.v[:, :end]

    def _room(self, old: Tensor | None, new: Tensor, rows: int) -> Tensor:
        """`old` if it holds `rows`, else a buffer that does, at least twice as long, with what is in use."""
        if old is not None and old.shape[1] >= rows:
            return old
        rows = -(-rows // 256) * 256 if old is None else max(rows, 2 * old.shape[1])
        grown = new.new_empty(new.shape[0], rows, *new.shape[2:])
        if old is not None:
            grown[:, :self.length] = old[:, :self.length]
        return grown

    @property
    def nbytes(self) -> int:
        return sum(t[:, :self.length].nbytes for t in (self.k, self.v) if t is not None)

    def copy(self) -> KVCache:
        used = [None if t is None else t[:, :self.length].clone() for t in (self.k, self.v)]
        return KVCache(self.window, self.length, *used)


class Cache:
    """One cache per layer, of the kind that the layer needs; `position` tokens have been read."""

    def __init__(self, config: HybridConfig) -> None:
        self.position = 0
        self.layers: list[DeltaNetCache | KVCache] = [
            DeltaNetCache() if kind == LINEAR else KVCache(config.window_of(i))
            for i, kind in enumerate(config.layer_types)]

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        return sum(layer.nbytes for layer in self.layers)

    def copy(self) -> Cache:
        """An independent snapshot."""
        other = copy(self)
        other.layers = [layer.copy() for layer in self.layers]
        return other
