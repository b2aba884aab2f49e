"""`Layout`: the shapes of a model's state, from its configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hybridlm.config import LINEAR, HybridConfig
from hybridlm.errors import HybridLMError

__all__ = ["KV_TYPES", "PAGE", "KVType", "Layout", "product"]

PAGE = 128  # tokens of a page: enough in a row for the hardware to fetch, and for large pages of the system
_MOST = 1 << 24  # of any number in a layout; a wider window is as good as none


@dataclass(frozen=True, slots=True)
class KVType:
    """How keys and values are stored: a ggml type with `block` numbers in `nbytes` bytes."""

    id: int
    block: int
    nbytes: int


KV_TYPES = {"f32": KVType(0, 1, 4), "f16": KVType(1, 1, 2), "bf16": KVType(30, 1, 2), "q8_0": KVType(8, 32, 34)}


@dataclass(frozen=True)
class Layout:
    """The shapes of a model's state, and which model it belongs to. States of equal layouts can stand for each other.

    Attention layers that look back equally far form a group; each group has its own pages.
    """

    fingerprint: str
    kv_type: str
    layers: tuple[int, ...]  # per layer: -1 for Gated DeltaNet, else its group
    windows: tuple[int, ...]  # per group: tokens that a token sees, 0 for all
    conv: tuple[int, int]  # channels of q|k|v, taps - 1
    recurrent: tuple[int, int, int]  # Hv, K, V
    kv: tuple[int, int]  # Hkv, head width
    hidden: int  # D

    @classmethod
    def of(cls, config: HybridConfig, fingerprint: str, kv_type: str) -> Layout:
        if kv_type not in KV_TYPES:
            raise HybridLMError(f"kv_type: {kv_type!r} is unknown; known are {', '.join(KV_TYPES)}")
        if config.has_attention and config.head_dim % KV_TYPES[kv_type].block:
            raise HybridLMError(f"kv_type: {kv_type} stores {KV_TYPES[kv_type].block} numbers together, which does not "
                                f"divide this model's head width {config.head_dim}; use f16")
        seen = [None if kind == LINEAR else min(config.window_of(i) or 0, _MOST - 1)
                for i, kind in enumerate(config.layer_types)]
        windows = tuple(dict.fromkeys(w for w in seen if w is not None))
        return cls(fingerprint, kv_type, tuple(-1 if w is None else windows.index(w) for w in seen), windows,
                   (config.conv_channels, config.linear_conv_kernel_dim - 1),
                   (config.value_heads, config.key_dim, config.value_dim),
                   (config.kv_heads, config.head_dim if config.has_attention else 0), config.hidden_size)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Layout:
        """The inverse of `dataclasses.asdict`, from JSON; ValueError, TypeError or KeyError for what is no layout."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        layout = cls(**fields)
        lengths = (layout.conv, 2), (layout.recurrent, 3), (layout.kv, 2)
        numbers = [*layout.layers, *layout.windows, *layout.conv, *layout.recurrent, *layout.kv, layout.hidden]
        if not (isinstance(layout.fingerprint, str) and layout.kv_type in KV_TYPES
                and all(len(values) == n for values, n in lengths) and len(layout.layers) <= 4096
                and all(type(n) is int and -1 <= n < _MOST for n in numbers)
                and min((*layout.windows, *layout.conv, *layout.recurrent, *layout.kv, layout.hidden)) >= 0
                and set(layout.layers) - {-1} == set(range(len(layout.windows)))
                and layout.kv[1] % KV_TYPES[layout.kv_type].block == 0):
            raise ValueError
        return layout

    @cached_property
    def slots(self) -> tuple[int, ...]:
        """Per layer its index among the layers of its kind."""
        return tuple(self.layers[:i].count(kind) for i, kind in enumerate(self.layers))

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's key, or value, in one head."""
        kv = KV_TYPES[self.kv_type]
        return self.kv[1] // kv.block * kv.nbytes

    def page_shape(self, group: int) -> tuple[int, int, int, int, int]:
        """[layers, K or V, Hkv, tokens, bytes] of a page."""
        return (self.layers.count(group), 2, self.kv[0], PAGE, self.row_bytes)

    def page_bytes(self, group: int) -> int:
        return product(self.page_shape(group))

    def first_page(self, group: int, position: int) -> int:
        """The first page that the token at `position`, or one after it, can still see."""
        window = self.windows[group]
        return max(0, position - window + 1) // PAGE if window else 0

    @property
    def fixed_bytes(self) -> int:
        """Bytes of the part that does not grow."""
        return 4 * self.layers.count(-1) * (product(self.conv) + product(self.recurrent)) + 4 * self.hidden

    def own_bytes(self, position: int) -> int:
        """Bytes, as saved, of all but the full pages: the fixed part and the used part of each last page."""
        return self.fixed_bytes + sum(self.page_bytes(g) // PAGE * (position % PAGE) for g in range(len(self.windows)))

    def full_pages(self, position: int) -> list[int]:
        """The group of each full page that a state of this many tokens keeps, in the order of `State.blocks`."""
        return [g for g in range(len(self.windows)) for _ in range(self.first_page(g, position), position // PAGE)]

    def kv_bytes_read(self, position: int) -> int:
        """Bytes of keys and values that the token at `position` reads, its own included."""
        return sum(self.page_bytes(g) // PAGE * min(position + 1, window or position + 1)
                   for g, window in enumerate(self.windows))


def product(numbers: Sequence[int]) -> int:
    result = 1
    for n in numbers:
        result *= n
    return result
